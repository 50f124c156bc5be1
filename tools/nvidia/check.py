#!/usr/bin/env python3
"""check.py MODEL.onnx|BUNDLE.edge ... [--cc 8.6 12.0] [--json]

Parses and builds every TensorRT payload with NVIDIA's own builder (tensorrt_rtx, no GPU needed), by the
code that runs on a Jetson, and lints it first. Default capabilities: 8.6 (nearest to Orin's 8.7, which the
builder refuses without that GPU) and 12.0 (nearest to Thor's 11.0). In INT8 every convolution and matrix
product must have both operands quantized, but those that the bundle's evidence says stay float. Layers that
the plan calls 2:4 sparse must be. Uses the documented API only; the engines are dropped unread. Exit code:
0 all accepted, 1 something refused, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgekit.backends.tensorrt.compile import compile_engine
from edgekit.backends.tensorrt.lint import dtype_name, lint, summary
from edgekit.backends.tensorrt.plan import BuildPlan, Hardware, Io
from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError, MissingExtraError, UsageError
from edgekit.quant.sparsity import layers

DEFAULT = ("8.6", "12.0")
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
HINT = "Run: pip install -r tools/nvidia/requirements.txt (x86-64 Linux), or: make test-nvidia"


@dataclass(frozen=True)
class Candidate:
    """One ONNX to check, by the plan it came with or a plain one."""

    name: str
    data: bytes
    plan: BuildPlan
    floats: int | None = None
    """Products of an int8 payload that its build left in float on purpose; None where nothing says so."""


def candidates(path: Path) -> Iterator[Candidate]:
    """The TensorRT payloads of a bundle, or the one model of an ONNX file."""
    if not path.exists():
        raise UsageError(f"file {path}: not found")
    if path.suffix == ".onnx":
        data = path.read_bytes()
        yield Candidate(path.name, data, plain_plan(path, data))
        return
    with Bundle.open(path) as bundle:
        for segment, variant in bundle.manifest.variants():
            if variant.backend == "tensorrt":
                name = f"{path.name}:{segment.name}/{variant.name}"
                plan = BuildPlan.from_options(variant.options)
                floats = left_in_float(bundle.evidence, segment.name) if variant.precision == "int8" else None
                yield Candidate(name, bytes(bundle.read(variant.path)), plan, floats)


def left_in_float(evidence: Any, segment: str = "") -> int:
    """Products that the evidence of an int8 build lists as float, each with its reason. segment: of a plan of several,
    each of which has its own record."""
    several = evidence.get("segments")
    record = evidence if several is None else several["networks"][segment]
    nodes = record["quantization"]["integer"]["tensorrt"]["float"]
    return sum(node["op"] in PRODUCTS for node in nodes)


def plain_plan(path: Path, data: bytes) -> BuildPlan:
    model = load(data, path)

    def sides(values: Any) -> tuple[Io, ...]:
        shapes = [(str(v.name), dtype_name(v), tuple(v.shape or ())) for v in values]
        return tuple(
            Io(n, t, tuple(d if isinstance(d, int) else -1 for d in shape)) for n, t, shape in shapes
        )

    # old exporters list weights as inputs
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    return BuildPlan(sides(inputs), sides(model.graph.outputs), 4 << 30, Hardware("any", "8.7"))


def load(data: bytes, where: object) -> Any:
    """As onnx_ir.Model with the types that the lint needs."""
    import onnx
    import onnx_ir as ir
    from google.protobuf.message import DecodeError
    from onnx_ir.passes import common

    try:
        model = ir.from_proto(onnx.load_from_string(data))
    except (DecodeError, ValueError, TypeError) as error:
        raise UsageError(f"file {where}: not an ONNX model: {error}") from None
    for step in (common.RemoveInitializersFromInputsPass(), common.ShapeInferencePass()):
        model = step(model).model
    return model


def quantized(model: Any) -> tuple[int, int, int]:
    """(with both operands quantized, with one only, all) of the convolutions and matrix products."""
    nodes = [n for n in model.graph if n.op_type in PRODUCTS]
    sources = [[None if v is None else v.producer() for v in n.inputs[:2]] for n in nodes]
    operands = [sum(p is not None and p.op_type == "DequantizeLinear" for p in pair) for pair in sources]
    return operands.count(2), operands.count(1), len(nodes)


def problem(item: Candidate, int8: int, half: int, products: int) -> str:
    """What is wrong with the operands of its products, "" for nothing."""
    if half:
        return f"{half} products have one quantized operand only, and would run in float"
    if item.floats is not None and int8 != products - item.floats:
        return (
            f"{int8} of {products} products have both operands quantized, expected {products - item.floats}"
        )
    if item.floats is not None and int8 == 0:
        return "an int8 payload without any product in INT8"
    return ""


def sparse_problem(item: Candidate, found: int) -> str:
    """What is wrong with the plan of a payload in which `found` layers are 2:4 sparse, "" for nothing."""
    said = 0 if item.plan.sparse is None else len(item.plan.sparse.layers)
    if said != found and (said or item.plan.sparse_weights):
        return f"{found} layers are 2:4 sparse, its plan says {said}"
    return ""


def check(trt: Any, candidate: Candidate, capability: str) -> dict[str, Any]:
    """{"accepted", "seconds", "engine_bytes"} or {"accepted": False, "reason"}."""
    try:
        built = compile_engine(trt, candidate.data, candidate.plan, compute_capability=capability)
    except EdgekitError as error:
        return {"accepted": False, "reason": str(error)}
    return {"accepted": True, "seconds": round(built.seconds, 3), "engine_bytes": built.nbytes}


def capability(text: str) -> str:
    """86, 8.6 -> "8.6"; 120, 12.0 -> "12.0"."""
    digits = text.replace(".", "")
    if not digits.isdigit() or len(digits) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.6")
    return f"{digits[:-1]}.{digits[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--cc", nargs="+", type=capability, default=list(DEFAULT), metavar="CC")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    try:
        import tensorrt_rtx as trt
    except ImportError:
        raise MissingExtraError("tensorrt_rtx", "", "check payloads", hint=HINT) from None
    results: dict[str, Any] = {}
    for path in args.files:
        found = list(candidates(path))
        if not found:
            raise UsageError(f"bundle {path}: holds no TensorRT payload")
        for item in found:
            model = load(item.data, item.name)
            findings, (int8, half, products) = lint(model), quantized(model)
            sparse = sum(row.sparse for row in layers(model))
            wrong = problem(item, int8, half, products) or sparse_problem(item, sparse)
            targets = {cc: check(trt, item, cc) for cc in args.cc}
            results[item.name] = {
                "lint": [str(f) for f in findings],
                "int8": int8,
                "problem": wrong,
                "products": products,
                "sparse": sparse,
                "targets": targets,
            }
            if not args.json:
                left = f", {item.floats} float as planned" if item.floats else ""
                text = f"{int8} of {products} products in INT8{left}" if int8 else ""
                text += f", {sparse} are 2:4 sparse" if item.plan.sparse_weights else ""
                show(item, "; ".join(filter(None, [summary(findings), wrong])), text, targets)
    good = all(
        not r["lint"] and not r["problem"] and all(t["accepted"] for t in r["targets"].values())
        for r in results.values()
    )
    if args.json:
        print(
            json.dumps({"builder": f"tensorrt_rtx {trt.__version__}", "accepted": good, "payloads": results})
        )
    else:
        print(
            f"{'all accepted' if good else 'NOT accepted'} by tensorrt_rtx {trt.__version__}: {len(results)} payloads"
        )
    return 0 if good else 1


def show(item: Candidate, findings: str, int8: str, targets: dict[str, Any]) -> None:
    print(f"{item.name} ({len(item.data) / 1e6:.2f} MB{', ' if int8 else ''}{int8})")
    if findings:
        print(f"  lint: {findings}")
    for cc, result in targets.items():
        if result["accepted"]:
            text = f"accepted, {result['seconds']:.2f} s, engine {result['engine_bytes'] / 1e6:.2f} MB"
        else:
            text = f"REFUSED: {result['reason']}"
        print(f"  {cc:>4}: {text}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EdgekitError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
