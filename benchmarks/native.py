"""The native engine beside today's runtimes: whole networks, one process, one thread, interleaved.

    bash benchmarks/peers/setup.sh litert                        once: what makes LiteRT's files
    python benchmarks/native.py --calibration ../shared/data/coco_mini/train
    python benchmarks/native.py --networks yolox_nano,shuffledet --rounds 60

Per network: float ONNX Runtime (what ratios count from), its INT8, OpenVINO as it comes (bf16) and in INT8, LiteRT INT8, and
the payloads of edgekit's own bundles: `plain`, quantized without a search (--quantization mse), and, where there are
labels, `budget`, what `edgekit build` finds within the accuracy that the project allows. Files of the peers are made, judged and
timed as in benchmarks/peers/run.py: conversions of input and output count, the picture is in the runner's input. That is
float32 [1, 3, H, W] for everybody but edgekit's own engine, whose input takes codes, which the letterbox kernel writes instead of
float32: `quantizing` is what making them of float32 inside would add to its time.

Afterwards: the engine with two threads against itself with one, interleaved, and the share of the processor's measured
int8 peak (native_peak.cpp, compiled here) that the network's products make up. Appends JSON lines to runs/native.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit, say, warn_if_busy  # noqa: E402
from benchmarks.peers import cases, run  # noqa: E402
from benchmarks.peers.timing import interleave  # noqa: E402
from edgekit.backends.base import LoadOptions, Ports, half  # noqa: E402
from edgekit.bundle import Bundle  # noqa: E402
from edgekit.errors import EdgekitError  # noqa: E402
from edgekit.runtime.bench import machine  # noqa: E402

FLOATS = ("ort-float", "openvino-bf16")
PEERS = (*FLOATS, "ort-minmax", "openvino-minmax", "litert-int8")
NETWORKS = ("yolox_nano", "fastestdet", "shuffledet", "mobilenetv2", "yolov8n", "resnet18")
GOALS = {
    "yolox_nano": "budget 3.5 and plain 4.3 x float",
    "fastestdet": "2.5 x the fastest other INT8",
    "shuffledet": "2.5 x the fastest other INT8",
    "mobilenetv2": "1.3 x the fastest other",
    "yolov8n": "1.2 x the fastest other",
    "resnet18": "1.0 x the fastest other",
}


def peak() -> float | None:
    """Best int8 multiply-accumulates a second of one core, in 1e9; None where there is no VNNI or no compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).with_name("native_peak.cpp")
        words = ["g++", "-O2", "-std=c++17", str(source), "-o", str(program)]
        try:
            subprocess.run(words, check=True, capture_output=True)
            found = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            return None
    return None if found[0] == "none" else float(found[0])


def scaling(path: Path, rounds: int) -> dict[str, float]:
    """Time of one thread over that of two, of a bundle's native payload, each session on an engine of its own."""
    with Bundle.open(path) as bundle:
        (found,) = (v for _, v in bundle.manifest.variants() if v.backend == "native")
        data = bundle.read(found.path)
        engine = half("native", "engine")
        runners: dict[str, Callable[[], None]] = {}
        for threads in (1, 2):
            runners[str(threads)] = engine.load(data, found, LoadOptions(threads=threads)).bind().run
        times = interleave(runners, "1", rounds=rounds, calls=5)
    return {"ratio": times["2"].ratio, "low": times["2"].spread[0], "high": times["2"].spread[1]}


def quantizing(path: Path, rounds: int) -> float:
    """Milliseconds of the step that makes codes of a float32 picture as large as the input that a bundle's native payload takes as
    codes; 0 where it makes them itself."""
    from edgekit.backends.native.engine import NativeExecutable
    from edgekit.backends.native.format import Builder, Dtype, Op, OpType, encode

    with Bundle.open(path) as bundle:
        (found,) = (v for _, v in bundle.manifest.variants() if v.backend == "native")
        if not Ports.of(found).codes:
            return 0.0
        (name,) = bundle.manifest.inputs
        n, c, h, w = bundle.manifest.tensor(name).shape
    b = Builder()
    source, target = (b.tensor((n, h, w, c), dtype, external=True) for dtype in (Dtype.f32, Dtype.u8))
    b.port("real", source, False)
    b.port("codes", target, True)
    b.op(Op(OpType.quantize, (source,), target, scalars=(1.0,)))
    binding = NativeExecutable(encode(b.program())).bind()
    binding.inputs["real"][...] = 114
    return interleave({"step": binding.run}, "step", rounds=rounds, calls=5)["step"].median_ms


def compare(name: str, args: argparse.Namespace) -> None:
    """Everything about one network."""
    case = cases.load(name)
    data = cases.calibration(case, args.calibration if name in cases.TRAINED else None, args.count)
    entries, missing, bundles = [], [], {}
    for peer in PEERS:
        say(f"{name}: {peer}")
        try:
            entries.append(run.peer_entry(peer, case, data))
        except (run.Unavailable, EdgekitError) as error:
            missing.append(run.Row(peer, run.PEERS[peer].title, str(error)))
    folder = args.calibration if name in cases.TRAINED else None
    for kind, words in (("plain", ["--quantization", "mse"]), ("budget", [])):
        if kind == "budget" and case.data is None:
            continue
        say(f"{name}: edgekit build, {kind}")
        try:
            path, seconds, _ = run.built_bundle(case, folder, count=args.count, words=words)
            for entry in run.bundle_entries(path, case, seconds, kind):
                entry.row.name = f"{kind} {entry.row.title.removeprefix('edgekit, ')}"
                entry.row.title = f"edgekit, {entry.row.name}"
                entries.append(entry)
            bundles[kind] = path
        except (run.Unavailable, EdgekitError) as error:
            missing.append(run.Row(kind, run.EDGEKIT, str(error)))
    run.measure(case, entries, rounds=args.rounds, calls=args.calls, clock=args.clock, say=say)
    macs = sum(layer.macs for layer in case.layers)
    print(
        f"\n{name}: {macs / 1e6:.0f} M MACs, calibrated on {data.what}, one thread. Goal: {GOALS.get(name, '-')}"
    )
    rows = [e.row for e in entries] + missing
    print("\n".join(run.table(rows, case.spec is not None, case.data is not None)))
    known = {row.name: row for row in rows if row.times is not None}
    every = {n: r for n, r in known.items() if "native" not in n}
    others = {n: r for n, r in every.items() if n not in FLOATS}
    facts: dict[str, Any] = {}
    for kind, path in bundles.items():
        mine = known.get(f"{kind} native int8")
        if mine is None or mine.times is None:
            continue
        fact: dict[str, Any] = {"x_float": mine.times.ratio, "metric": mine.metric}
        for what, them in (("x_fastest_int8", others), ("x_fastest", every)):
            best = max(them.values(), key=lambda r: r.times.ratio if r.times else 0)
            assert best.times is not None
            fact[what], fact[f"{what}_is"] = mine.times.ratio / best.times.ratio, best.name
        if args.peak:
            fact["share_of_peak"] = macs / (mine.times.median_ms * 1e-3) / (args.peak * 1e9)
        fact["two_threads"] = scaling(path, args.rounds)
        fact["quantizing_ms"] = quantizing(path, args.rounds)
        facts[kind] = fact
        print(
            f"  {kind}: {fact['x_float']:.2f} x float, {fact['x_fastest_int8']:.2f} x the fastest other INT8"
            f" ({fact['x_fastest_int8_is']}), {fact['x_fastest']:.2f} x the fastest other ({fact['x_fastest_is']}), two threads"
            f" {fact['two_threads']['ratio']:.2f} x"
            + (f", {fact['share_of_peak']:.0%} of the peak" if args.peak else "")
            + f"; from float32 {fact['quantizing_ms']:.3f} ms more"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as log:
        line = {
            "benchmark": "native", "network": name, "macs": macs, "native": facts, "peak_gmacs": args.peak,
            "rows": [dataclasses.asdict(row) for row in rows], "calibration": data.what, "rounds": args.rounds,
            "calls": args.calls, "clock": args.clock, "commit": commit(),
            "machine": {**machine(1), "load": round(os.getloadavg()[0], 2)},
        }  # fmt: skip
        log.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(NETWORKS), help="comma separated")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="pictures for the trained ones (default: synthetic streets)",
    )
    parser.add_argument("--count", type=int, default=100, help="how many of them (100)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=3, help="timed calls per round")
    parser.add_argument("--clock", choices=run.CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "native.jsonl")
    args = parser.parse_args()
    warn_if_busy()
    args.peak = peak()
    print(f"peak: {args.peak} G int8 multiply-accumulates a second, one thread")
    for name in args.networks.split(","):
        try:
            compare(name, args)
        except FileNotFoundError as error:
            print(f"\n{name}: not run: {error}")


if __name__ == "__main__":
    main()
