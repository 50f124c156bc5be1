"""Estimate how long one picture takes on a board that is not at hand: a cost model, not a measurement."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.cli.build import parse_shape
from edgekit.cli.common import MAX_THREADS, integer, print_json
from edgekit.cli.targets import table
from edgekit.errors import ModelError, UsageError, did_you_mean, printable
from edgekit.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgekit.toolchain.estimate import Estimate, LayerCost

SHOWN = 15
TAKEN_FOR = "no latency of edgekit's own engine was published: taken as XNNPACK's kernels, fused as it fuses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  edgekit estimate m.onnx --target jetson-orin --power 30W --precision int8\n"
        "  edgekit estimate m.onnx --target rpi5 --threads 1 --all"
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="an .onnx file")
    parser.add_argument("--target", required=True, metavar="T", help="board; 'edgekit targets' lists them")
    parser.add_argument("--power", metavar="MODE", help="power mode of the board (default: no cap)")
    parser.add_argument(
        "--precision",
        default="auto",
        metavar="P",
        help="auto (the board's default), float32, float16, int8 or dynamic",
    )
    parser.add_argument("--backend", metavar="B", help="one of the board's (default: its first)")
    parser.add_argument(
        "--threads",
        type=integer("--threads", 1, MAX_THREADS),
        metavar="N",
        help="CPU threads (default: all big cores)",
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="INPUT=1x3x416x416",
        help="size of an input that the file leaves open",
    )
    parser.add_argument("--all", action="store_true", help=f"list every layer, not the {SHOWN} slowest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Runs the verb. Raises: UsageError, ModelError."""
    from edgekit.toolchain.api import require_extras

    target = Target.load(args.target)
    require_extras()
    from edgekit.toolchain.estimate import PRECISIONS, Estimator, machine

    backend = args.backend or target.backend
    if backend not in target.backends:
        hint = did_you_mean(backend, target.backends)
        raise UsageError(f"backend {printable(backend)!r} of {target.name}: not available there. {hint}")
    precision = target.precisions[backend][0] if args.precision == "auto" else args.precision
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {printable(precision)!r}: unknown. {did_you_mean(precision, (*PRECISIONS, 'auto'))}"
        )
    machine(target, backend, args.power, args.threads)  # refuse before reading the model
    model, note = read(args.model, dict(parse_shape(text) for text in args.shape))
    if backend == "native":
        note = "; ".join(filter(None, (note, TAKEN_FOR)))
    found = Estimator(model, target, args.power, backend=backend, threads=args.threads)(precision)
    if args.json:
        print_json(describe(found, args.model, precision, note))
        return 0
    print("\n".join(page(found, args.model, precision, note, len(found.layers) if args.all else SHOWN)))
    return 0


def read(path: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[ir.Model, str]:
    """(the prepared graph, what of the file was cut off). Raises: ModelError."""
    from edgekit import frontends
    from edgekit.passes import prepare

    model = frontends.load(path, shapes=shapes)
    try:
        prepared = prepare(model, check=False)
    except ModelError:  # not a detector that edgekit knows: the network as it is
        return _one_frame(model) or (prepare(model, task="", check=False).model, "")
    assert prepared.head is not None
    return prepared.model, f"decoding ({prepared.head.family}) is cut off, as a build does, and not counted"


def _one_frame(model: ir.Model) -> tuple[ir.Model, str] | None:
    """Of a clip model, the network that a device runs for each frame; None for any other."""
    from edgekit.passes import prepare
    from edgekit.passes.graph import shape

    sizes = shape(model.graph.inputs[0]) if len(model.graph.inputs) == 1 else None
    if sizes is None or len(sizes) < 4 or max(sizes[: len(sizes) - 3]) < 2:
        return None
    try:
        prepared = prepare(model, task="video", allow_bidirectional=True, check=False)
    except ModelError:
        return None
    assert prepared.streamed is not None
    return (
        prepared.model,
        f"of the one-frame network that a build makes of this clip of {prepared.streamed.frames}",
    )


def describe(found: Estimate, path: Path, precision: str, note: str) -> dict[str, Any]:
    """The estimate as JSON values; seconds and bytes."""
    return {
        "model": str(path),
        "measured": False,
        **{f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "layers"},
        "precision": precision,
        "note": note,
        "layers": [dataclasses.asdict(layer) for layer in found.layers],
    }


def page(found: Estimate, path: Path, precision: str, note: str, most: int) -> list[str]:
    """Text for people, the slowest layers first."""
    from edgekit.toolchain.estimate import by_time

    where = f"{found.threads} thread{'s' * (found.threads != 1)}" if found.threads else "GPU"
    mode = f"mode {found.power}" if found.power else "no power cap"
    lines = [
        f"{printable(path.name)} on {found.target}: {found.backend}, {precision}, {where}, {mode}",
        f"about {_ms(found.total_s)} for one picture, network only; of boards and networks that the model was not "
        f"fitted on, four of five measurements lie within {_ms(found.low_s)} to {_ms(found.high_s)}",
        "",
    ]
    lines += table([("LAYER", "OPERATORS", "TIME", "SHARE", "BOUND BY", "MMACS", "KB", "PRECISION"), *(
        _row(layer, found.total_s) for layer in by_time(found.layers)[:most]
    )])  # fmt: skip
    if len(found.layers) > most:
        rest = sum(layer.seconds for layer in by_time(found.layers)[most:])
        lines.append(f"... {len(found.layers) - most} more, {_ms(rest)} (--all shows them)")
    conversions = [layer for layer in found.layers if layer.op.startswith("convert ")]
    once = found.total_s - sum(layer.seconds for layer in found.layers)
    lines.append("")
    lines.append(_sum("conversions between precisions", conversions))
    lines.append(f"start of one inference: {_ms(once)}")
    if note:
        lines.append(f"note: {printable(note)}")
    lines.append("This is an estimate from the board's data sheet, not a measurement (docs/estimate.md).")
    return lines


def _sum(title: str, layers: Sequence[LayerCost]) -> str:
    return f"{title}: {len(layers)}, {_ms(sum(layer.seconds for layer in layers))}"


def _row(layer: LayerCost, total: float) -> tuple[str, ...]:
    return (
        printable(layer.node_id)[:40],
        layer.op,
        _ms(layer.seconds),
        f"{layer.seconds / total:.1%}",
        layer.bound,
        f"{layer.macs / 1e6:.1f}" if layer.macs else "-",
        f"{layer.bytes / 1024:.0f}",
        layer.precision,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
