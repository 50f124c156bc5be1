"""Today's INT8 tools beside edgekit: same networks, same calibration pictures, same judge, interleaved timing.

    bash benchmarks/peers/setup.sh                                   once: the peers' environments
    python benchmarks/peers/run.py --network yolox_nano --calibration ../shared/data/coco_mini/train
    python benchmarks/peers/run.py --network all --peers ort-minmax,litert-int8,edgekit

Prints one table per network and appends a JSON line per row to runs/peers.jsonl. Everything runs on one
thread. Ratios (onnxruntime's float time / this one's) are the result; milliseconds belong to the machine.
A peer that is not installed, or fails, is a row that says so. See docs/peers.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import torch_networks  # noqa: E402
from benchmarks.common import peers, reference_data, say, warn_if_busy  # noqa: E402
from benchmarks.peers import cases, integers, runners  # noqa: E402
from benchmarks.peers.timing import Times, interleave  # noqa: E402
from edgekit.bundle import Bundle  # noqa: E402
from edgekit.errors import EdgekitError  # noqa: E402
from edgekit.host import backend_problem  # noqa: E402
from edgekit.runtime.bench import machine  # noqa: E402
from edgekit.tasks.detect.evaluate import evaluate_pipeline  # noqa: E402
from edgekit.tasks.detect.pipeline import DetectPipeline, read_spec  # noqa: E402
from edgekit.toolchain import cache  # noqa: E402

HERE = Path(__file__).resolve().parent
BASELINE = "ort-float"


@dataclass(frozen=True)
class Peer:
    """A way to get a network onto this CPU. maker: (script, its argument), None = the float graph itself.

    venv: the environment that the maker needs, "" = this one. runner: what runs the file.
    """

    title: str
    runner: str
    maker: tuple[str, str] | None = None
    venv: str = ""
    slow: bool = False


PEERS = {
    "ort-float": Peer("onnxruntime float32", "onnxruntime"),
    "openvino-float": Peer("OpenVINO float32 (f32 hint)", "openvino"),
    "openvino-bf16": Peer("OpenVINO as it comes (bf16)", "openvino-bf16"),
    "litert-float": Peer("LiteRT float32", "litert", ("make_litert.py", "float"), "litert"),
    "ort-defaults": Peer(
        "onnxruntime quantize_static defaults", "onnxruntime", ("make_onnxruntime.py", "defaults")
    ),
    "ort-minmax": Peer("onnxruntime U8S8 MinMax", "onnxruntime", ("make_onnxruntime.py", "minmax")),
    "ort-percentile": Peer(
        "onnxruntime U8S8 percentile 99.999", "onnxruntime", ("make_onnxruntime.py", "percentile")
    ),
    "openvino-minmax": Peer("OpenVINO on that MinMax file", "openvino", ("make_onnxruntime.py", "minmax")),
    "openvino-percentile": Peer(
        "OpenVINO on that percentile file", "openvino", ("make_onnxruntime.py", "percentile")
    ),
    "nncf-performance": Peer("OpenVINO, NNCF defaults", "openvino", ("make_nncf.py", "performance"), "nncf"),
    "nncf-mixed": Peer("OpenVINO, NNCF MIXED", "openvino", ("make_nncf.py", "mixed"), "nncf"),
    "litert-int8": Peer(
        "LiteRT int8 (onnx2tf, ai-edge-quantizer)", "litert", ("make_litert.py", "int8"), "litert"
    ),
    "litert-dynamic": Peer("LiteRT dynamic range int8", "litert", ("make_litert.py", "dynamic"), "litert"),
    "modelopt-entropy": Peer(
        "modelopt entropy", "onnxruntime", ("make_modelopt.py", "entropy"), "modelopt", slow=True
    ),
    "modelopt-max": Peer("modelopt max", "onnxruntime", ("make_modelopt.py", "max"), "modelopt", slow=True),
}
EDGEKIT = "edgekit"


class Unavailable(Exception):
    """Why a row has no figures."""


@dataclass
class Row:
    """One line of the table. `why`: the reason where there are no figures."""

    name: str
    title: str
    why: str = ""
    bytes: int = 0
    build_seconds: float | None = None
    integer_macs: float | None = None
    metric: dict[str, float | None] = field(default_factory=dict)
    times: Times | None = None
    net: Times | None = None
    chosen: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""


# --- making files -----------------------------------------------------------------------------------


def made(peer: Peer, case: cases.Case, data: cases.Calibration) -> Path:
    """Folder with the peer's file and made.json, from the cache when all that went in is the same.

    Raises: Unavailable with the reason.
    """
    assert peer.maker is not None
    script, argument = HERE / peer.maker[0], peer.maker[1]
    python = Path(sys.executable)
    if peer.venv:
        venv = peers() / f"venv-{peer.venv}"
        if not (venv / "ready").is_file():
            raise Unavailable(f"not installed (bash benchmarks/peers/setup.sh {peer.venv})")
        python = venv / "bin" / "python"
    setup = (HERE / "setup.sh").read_bytes() if peer.venv else json.dumps(cache.tools()).encode()
    used = "" if argument == "float" else data.digest
    key = cache.digest(case.graph, used, script.read_bytes(), argument, setup)
    folder = peers() / "made" / f"{case.name}-{script.stem}-{argument}-{key[:16]}"
    if (folder / "made.json").is_file():
        return folder
    work = folder.with_suffix(f".{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        (work / "graph.onnx").write_bytes(case.graph)
        np.save(work / "calibration.npy", data.inputs)
        words = [python, script, argument, work / "graph.onnx", work / "calibration.npy", work]
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(w) for w in words], capture_output=True, text=True, check=False, env=variables, cwd=work
        )
        if done.returncode:
            raise Unavailable("failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:200])
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        for given in ("calibration.npy", "graph.onnx"):
            (work / given).unlink(missing_ok=True)
        (work / "made.json").write_text(json.dumps(facts), encoding="utf-8")
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


# --- rows -------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A row with what is needed to run it. `answer` gives the raw outputs for a picture's input."""

    row: Row
    run: Callable[[], None]
    answer: Callable[[list[np.ndarray]], list[dict[str, np.ndarray]]]
    pipeline: Callable[[], DetectPipeline]
    net: Callable[[], None] | None = None


def peer_entry(name: str, case: cases.Case, data: cases.Calibration) -> Entry:
    """Make (or find) a peer's file and load it. Raises: Unavailable."""
    peer = PEERS[name]
    row = Row(name, peer.title)
    shape = tuple(data.inputs.shape[1:])
    if peer.maker is None:
        folder = peers() / "made" / f"{case.name}-float-{cache.digest(case.graph)[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "model.onnx"
        file.write_bytes(case.graph)
    else:
        folder = made(peer, case, data)
        facts = runners.facts(folder)
        file = folder / facts["file"]
        row.build_seconds, row.versions = facts["seconds"], facts["versions"]
    row.bytes = sum(
        f.stat().st_size
        for f in file.parent.glob(f"{file.stem}.*")
        if f.suffix in (".xml", ".bin", file.suffix)
    )
    net = None
    try:
        if peer.runner == "onnxruntime":
            runner: Any = runners.onnxruntime(file.read_bytes())
            row.integer_macs = integers.onnxruntime(file.read_bytes(), case.layers)
        elif peer.runner.startswith("openvino"):
            problem = backend_problem("openvino")
            if problem:
                raise Unavailable(problem)
            precision = "bf16" if peer.runner.endswith("bf16") else "f32"
            runner = runners.OpenVino(file, case.outputs, precision)
            row.integer_macs = integers.openvino(runner.compiled, case.layers)
        else:
            runner = runners.LiteRt(file, facts, (1, *shape), case.input)
            row.integer_macs, dynamic = integers.litert(file.read_bytes())
            row.note = f"weights only: {dynamic:.0%} of MACs" if dynamic else ""
            net = runner.net
    except (EdgekitError, RuntimeError, ValueError, ImportError) as error:
        raise Unavailable("does not load: " + str(error).strip().splitlines()[0][:200]) from error
    return Entry(
        row,
        runner.run,
        lambda inputs: runners.outputs_of(runner, inputs),
        lambda: DetectPipeline(_required(case.spec), runner),
        net,
    )


def _required(value: Any) -> Any:
    assert value is not None, "only detectors have a pipeline"
    return value


def bundle_entries(path: Path, case: cases.Case, seconds: float | None, note: str = "") -> list[Entry]:
    """A row for each payload of an edgekit bundle; the one that `edgekit.load` would take is marked."""
    from edgekit.runtime.engine import load

    bundle = Bundle.open(path)
    with load(bundle, threads=1) as engine:
        chosen = {variant.name for variant in engine.variants.values()}
    reference = runners.onnxruntime(case.graph)
    wanted = {name: array.shape for name, array in reference.outputs.items()}
    entries = []
    for segment, variant in bundle.manifest.variants():
        row = Row(f"edgekit {variant.name}", f"edgekit, {variant.backend} {variant.precision}")
        row.bytes, row.build_seconds, row.chosen = variant.bytes, seconds, variant.name in chosen
        row.note = note
        data = bytes(bundle.read(variant.path))
        if variant.format == "onnx":
            row.integer_macs = integers.q_dq(data)
        elif variant.format == "tflite":
            row.integer_macs = integers.litert(data)[0]
        elif variant.backend == "native":
            row.integer_macs = integers.native(data)
        if set(segment.outputs) != set(wanted):
            raise Unavailable(f"bundle outputs {sorted(segment.outputs)}, expected {sorted(wanted)}")
        payload = runners.Bundled(bundle, variant)

        def answer(
            inputs: list[np.ndarray], payload: runners.Bundled = payload
        ) -> list[dict[str, np.ndarray]]:
            found = []
            for x in inputs:
                payload.feed(x)
                payload.binding.run()
                found.append(payload.read(wanted))
            return found

        def pipeline(payload: runners.Bundled = payload) -> DetectPipeline:
            return DetectPipeline(read_spec(bundle.manifest), payload.binding)

        entries.append(Entry(row, payload.binding.run, answer, pipeline))
    return entries


def built_bundle(
    case: cases.Case,
    calibration: Path | None,
    target: str = "host",
    count: int = 100,
    words: Sequence[str] = (),
) -> tuple[Path, float, str]:
    """Build the network with `edgekit build --precision int8` on the peers' calibration pictures, from the
    cache when nothing changed. words: more of its command line.

    Returns: the bundle, the seconds it took, and those of CPU in words: what a quiet machine would have taken.
    Raises: Unavailable with the build's own words.
    """
    pictures = cases.calibration_folder(calibration, count, peers() / "pictures")
    words = [*build_words(case, pictures, target), *words]
    key = cache.digest(case.source.read_bytes(), pictures.name, words, cache.sources("."), cache.tools())
    out = peers() / "bundles" / f"{case.name}-{target}-{key[:16]}"
    record = out / "built.json"
    if not record.is_file():
        # what an earlier build of this network left: its calibration is part of the time
        with tempfile.TemporaryDirectory(prefix="edgekit-peers-") as fresh:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "EDGEKIT_CACHE": fresh}
            start, before = time.perf_counter(), _children_seconds()
            done = subprocess.run(
                [sys.executable, "-m", "edgekit", *words, "--out", str(out)],
                capture_output=True,
                text=True,
                check=False,
                env=environment,
            )
            known = {"seconds": time.perf_counter() - start, "cpu_seconds": _children_seconds() - before}
        if done.returncode:
            raise Unavailable(
                "edgekit build: " + (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            )
        (built,) = json.loads(done.stdout)["bundles"]
        record.write_text(json.dumps({"path": built["path"], **known}), encoding="utf-8")
    known = json.loads(record.read_text(encoding="utf-8"))
    return Path(known["path"]), float(known["seconds"]), f"{known['cpu_seconds']:.0f} s of CPU to build"


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def build_words(case: cases.Case, pictures: Path, target: str) -> list[str]:
    """The command line of `edgekit` for a case; nothing in it is tuned to the network."""
    words = ["build", str(case.source), "--target", target, "--precision", "int8", "--json"]
    words += ["--allow-drop", "--calibration", str(pictures)]  # its row shows what a drop is worth
    if case.data is not None:
        labelled = reference_data() / "coco_mini"
        words += ["--data", str(labelled / "instances_val_a.json"), "--images", str(labelled / "val_a")]
    if case.spec is None:
        rule = torch_networks.NETWORKS[case.name]
        words += ["--task", "classify", "--resize", "stretch", "--color", "rgb"]
        for option, levels in (("--mean", rule.mean), ("--std", rule.std)):
            words += [option, ",".join(map(str, levels))]
    return words


# --- measuring --------------------------------------------------------------------------------------


CLOCKS: dict[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
"""cpu: what this process was given, of all its threads. On a machine that others use it leaves out the time in
which they ran, though not what they did to the caches."""


def measure(
    case: cases.Case, entries: list[Entry], *, rounds: int, calls: int, clock: str, say: Callable[[str], None]
) -> None:
    """Fill in accuracy and times of every row; the baseline must be among them."""
    inputs = [case.feed(image) for image in case.pictures]
    base = next(e for e in entries if e.row.name == BASELINE)
    reference = base.answer(inputs)
    for entry in entries:
        say(f"{case.name}: judge {entry.row.name}")
        got = entry.answer(inputs)
        entry.row.metric["sqnr_db"] = round(cases.sqnr(reference, got), 2)
        if case.spec is None:
            entry.row.metric["top1_agreement"] = round(cases.top1_agreement(reference, got), 4)
        elif case.data is not None:
            found, _ = evaluate_pipeline(entry.pipeline(), case.data)
            entry.row.metric.update({"AP": found["AP"], "AP50": found["AP50"]})
        entry.answer(inputs[:1])  # timed on a picture, not on what the judge left
    turns: dict[str, Callable[[], None]] = {e.row.name: e.run for e in entries}
    turns.update({f"{e.row.name} net": e.net for e in entries if e.net is not None})
    say(f"{case.name}: time {len(turns)} runners")
    times = interleave(turns, BASELINE, rounds=rounds, calls=calls, clock=CLOCKS[clock])
    for entry in entries:
        entry.row.times, entry.row.net = times[entry.row.name], times.get(f"{entry.row.name} net")


def table(rows: list[Row], detector: bool, labelled: bool) -> list[str]:
    """The rows as aligned text, the fastest first, those without figures at the end."""
    what = "AP / AP50" if labelled else ("" if detector else "top-1 same")
    lines = [
        f"{'':44}{what:>14}{'SQNR dB':>9}{'x':>7}{'quartiles':>13}{'x best':>8}{'ms':>8}{'MB':>7}{'build s':>9}{'int MACs':>9}"
    ]
    known = [r for r in rows if r.times is not None]
    for row in sorted(known, key=lambda r: -r.times.ratio if r.times else 0):
        assert row.times is not None
        ap = ""
        if labelled:
            ap = f"{row.metric['AP'] or 0:.3f} / {row.metric['AP50'] or 0:.3f}"
        elif not detector:
            ap = f"{row.metric['top1_agreement']:.2f}"
        t = row.times
        build = "-" if row.build_seconds is None else f"{row.build_seconds:.1f}"
        macs = "-" if row.integer_macs is None else f"{row.integer_macs:.0%}"
        mark = "* " if row.chosen else "  "
        lines.append(
            f"{mark}{row.title:42}{ap:>14}{row.metric['sqnr_db']:9.1f}{t.ratio:7.2f}"
            f"{f'{t.spread[0]:.2f}-{t.spread[1]:.2f}':>13}{t.ratio_of_min:8.2f}{t.median_ms:8.2f}"
            f"{row.bytes / 1e6:7.2f}{build:>9}{macs:>9}" + (f"  {row.note}" if row.note else "")
        )
        if row.net is not None:
            lines.append(
                f"{'':4}{'the invocation alone':40}{'':>23}{row.net.ratio:7.2f}{'':>13}{row.net.ratio_of_min:8.2f}{row.net.median_ms:8.2f}"
            )
    lines += [f"  {row.title:42}{row.why}" for row in rows if row.times is None]
    return lines


def commit() -> str:
    """The checkout's commit, with a + when files were changed; "" outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )


def compare(name: str, wanted: list[str], args: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    """Everything about one network."""
    case = cases.load(name)
    say(f"{name}: calibration pictures")
    data = cases.calibration(case, args.calibration, args.count)
    entries, missing = [], []
    for peer in dict.fromkeys([BASELINE, *wanted]):
        say(f"{name}: {peer}")
        try:
            if peer != EDGEKIT:
                entries.append(peer_entry(peer, case, data))
                continue
            path, seconds, note = args.bundle, None, ""
            if path is None:
                path, seconds, note = built_bundle(case, args.calibration, count=args.count)
            entries += bundle_entries(path, case, seconds, note)
        except (Unavailable, EdgekitError) as error:
            missing.append(Row(peer, PEERS[peer].title if peer in PEERS else EDGEKIT, str(error)))
    measure(case, entries, rounds=args.rounds, calls=args.calls, clock=args.clock, say=say)
    rows = [e.row for e in entries] + missing
    print(
        f"\n{name}: {sum(layer.macs for layer in case.layers) / 1e6:.0f} M MACs, calibrated on {data.what}, one thread, {args.clock} time"
    )
    print("\n".join(table(rows, case.spec is not None, case.data is not None)), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as log:
        for row in rows:
            line: Mapping[str, Any] = {
                "benchmark": "peers",
                "network": name,
                **dataclasses.asdict(row),
                "calibration": data.what,
                "rounds": args.rounds,
                "calls": args.calls,
                "clock": args.clock,
                "commit": commit(),
                "machine": {**machine(1), "load": round(os.getloadavg()[0], 2)},
            }
            log.write(json.dumps(line) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="yolox_nano", help=f"{', '.join(cases.NAMES)} or all")
    parser.add_argument(
        "--peers", default="all", help=f"of {', '.join(PEERS)}, {EDGEKIT}; all = those not slow"
    )
    parser.add_argument("--slow", action="store_true", help="with all: also the slow ones")
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="pictures (default: synthetic streets)"
    )
    parser.add_argument("--count", type=int, default=100, help="how many of them (100)")
    parser.add_argument("--bundle", type=Path, help="time this edgekit bundle instead of building one")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=3, help="timed calls per round")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: this process's own time, for a busy machine"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "peers.jsonl")
    args = parser.parse_args()
    networks = list(cases.NAMES) if args.network == "all" else args.network.split(",")
    every = [n for n, p in PEERS.items() if args.slow or not p.slow] + [EDGEKIT]
    wanted = every if args.peers == "all" else args.peers.split(",")
    for given, known, kind in ((networks, cases.NAMES, "network"), (wanted, (*PEERS, EDGEKIT), "peer")):
        for name in given:
            if name not in known:
                parser.error(f"{kind} {name!r}: unknown, expected one of {', '.join(known)}")
    if args.bundle and len(networks) != 1:
        parser.error("--bundle: is of one network, name it with --network")
    warn_if_busy()
    for name in networks:
        try:
            compare(name, wanted, args, say)
        except FileNotFoundError as error:
            print(f"\n{name}: not run: {error}")


if __name__ == "__main__":
    main()
