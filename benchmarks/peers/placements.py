"""Which Q/DQ placement is fastest on x86: one network, variants of its Q/DQ file, on ONNX Runtime and OpenVINO.

    python benchmarks/peers/placements.py --network resnet18 [--rounds 30]

The files are made by onnxruntime.quantization and by taking pairs out of them again. Interleaved, one thread;
ratios are ONNX Runtime's float time / this one's. Prints a table and appends JSON lines to runs/placements.jsonl.
What follows from it is in docs/peers.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.peers import cases, runners  # noqa: E402
from benchmarks.peers.make_onnxruntime import Reader  # noqa: E402
from benchmarks.peers.run import commit  # noqa: E402
from benchmarks.peers.timing import interleave  # noqa: E402
from edgekit.runtime.bench import machine  # noqa: E402

ACTIVATIONS = ["Relu", "Clip", "Sigmoid", "Mul", "LeakyRelu"]
CALIBRATION = 8

QUANTIZED: dict[str, dict[str, Any]] = {
    "everything": {},
    "Conv": {"ops": ["Conv"]},
    "Conv, activations": {"ops": ["Conv", *ACTIVATIONS]},
    "Conv, activations, Add": {"ops": ["Conv", "Add", *ACTIVATIONS]},
    "weights per tensor": {"per_channel": False},
    "weights uint8": {"weight": "QUInt8"},
    "activations int8": {"activation": "QInt8"},
    "activations int8, symmetric": {"activation": "QInt8", "extra": {"ActivationSymmetric": True}},
    "activations uint8, symmetric": {"extra": {"ActivationSymmetric": True}},
    "float biases": {"extra": {"QuantizeBias": False}},
    "Relu and Clip kept": {"extra": {"QDQKeepRemovableActivations": True}},
}
"""Name -> how it differs from: all operators, uint8 asymmetric activations, int8 weights per channel."""

Node = onnx.NodeProto
TAKEN: dict[str, Callable[[Node | None, Node], bool]] = {
    "no codes: Conv to Add": lambda made, user: _is(made, "Conv") and user.op_type == "Add",
    "no codes: into Add": lambda made, user: user.op_type == "Add",
    "no codes: Sigmoid to Mul": lambda made, user: _is(made, "Sigmoid") and user.op_type == "Mul",
    "no codes: inside SiLU": lambda made, user: (
        (_is(made, "Conv") and user.op_type in ("Sigmoid", "Mul"))
        or (_is(made, "Sigmoid") and user.op_type == "Mul")
    ),
    "no codes: inside SiLU, Concat, Resize, MaxPool": lambda made, user: (
        TAKEN["no codes: inside SiLU"](made, user) or user.op_type in ("Concat", "Resize", "MaxPool")
    ),
}
"""Name -> which (operator that made a value, operator that reads it) go without codes, of "Relu and Clip kept"."""


def _is(node: Node | None, op: str) -> bool:
    return node is not None and node.op_type == op


def take(data: bytes, free: Callable[[Node | None, Node], bool]) -> tuple[bytes, int]:
    """The Q/DQ file without the codes of the connections that `free` names, and how many there were."""
    model = onnx.load_from_string(data)
    graph = model.graph
    made = {output: node for node in graph.node for output in node.output}
    taken = 0
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for i, name in enumerate(node.input):
            pair = made.get(name)
            codes = made.get(pair.input[0]) if pair is not None and _is(pair, "DequantizeLinear") else None
            if codes is not None and _is(codes, "QuantizeLinear") and free(made.get(codes.input[0]), node):
                node.input[i] = codes.input[0]
                taken += 1
    outputs = {o.name for o in graph.output}
    while True:  # what nothing reads any more
        read = {name for node in graph.node for name in node.input} | outputs
        idle = [node for node in graph.node if not read.intersection(node.output)]
        if not idle:
            return model.SerializeToString(), taken
        for node in idle:
            graph.node.remove(node)


def variants(case: cases.Case) -> dict[str, bytes]:
    """Every distinct placement of the case's network."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    logging.disable(logging.WARNING)
    data = cases.calibration(case, None, CALIBRATION).inputs
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in.onnx"), Path(folder, "out.onnx")
        source.write_bytes(case.graph)
        for name, how in QUANTIZED.items():
            quantize_static(
                str(source),
                str(out),
                Reader(case.input, data),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=how.get("ops"),
                activation_type=QuantType[how.get("activation", "QUInt8")],
                weight_type=QuantType[how.get("weight", "QInt8")],
                per_channel=how.get("per_channel", True),
                calibrate_method=CalibrationMethod.MinMax,
                extra_options=how.get("extra", {}),
            )
            found[name] = out.read_bytes()
    for name, free in TAKEN.items():
        file, taken = take(found["Relu and Clip kept"], free)
        if taken:
            found[name] = file
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet18", choices=cases.NAMES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "placements.jsonl")
    args = parser.parse_args()
    case = cases.load(args.network)
    inputs = [case.feed(image) for image in case.pictures[:4]]
    files = {"float": case.graph, **variants(case)}
    turns: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            file = Path(folder, "m.onnx")
            file.write_bytes(data)
            turns[f"ORT {name}"] = runners.onnxruntime(data)
            turns[f"OpenVINO {name}"] = runners.OpenVino(file, case.outputs)
    reference = runners.outputs_of(turns["ORT float"], inputs)
    quality = {key: cases.sqnr(reference, runners.outputs_of(r, inputs)) for key, r in turns.items()}
    times = interleave({key: r.run for key, r in turns.items()}, "ORT float", rounds=args.rounds)
    print(f"{args.network}: float {times['ORT float'].min_ms:.2f} ms at best, load {os.getloadavg()[0]:.1f}")
    print(f"{'':48}{'ORT x':>8}{'x best':>8}{'dB':>7}{'OpenVINO x':>13}{'x best':>8}{'dB':>7}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as log:
        for name in files:
            row = f"{name:48}"
            for library, width in (("ORT", 8), ("OpenVINO", 13)):
                key = f"{library} {name}"
                t = times[key]
                row += f"{t.ratio:{width}.2f}{t.ratio_of_min:8.2f}{quality[key]:7.1f}"
                line = {
                    "benchmark": "placements",
                    "network": args.network,
                    "library": library,
                    "variant": name,
                }
                facts = {"sqnr_db": quality[key], **asdict(t), "commit": commit(), "machine": machine(1)}
                log.write(json.dumps({**line, **facts}) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
