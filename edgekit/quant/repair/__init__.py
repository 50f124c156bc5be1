"""Repairs of a quantized network: less error at the same precision, each measured, none taken on faith.

A repair is a module of this package with `PAPER`, where its method comes from, and

    run(model, float_model, feeds, *, progress=None, nodes=None) -> onnx_ir.Model

`model` is annotated (quant/annotate.py), `float_model` the network it stands for, with values of the same
names; `feeds` are calibration pictures; `nodes` (quant/annotate.py: `node_id`) limits what may change. The
result is an annotated copy. Nothing is drawn from the clock or the machine: the same inputs give the same bits.
`apply` runs one and measures its `Gain`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import CalibrationError, UsageError, did_you_mean
from edgekit.quant.annotate import node_id, quant

if TYPE_CHECKING:
    import onnx_ir as ir

NAMES = ("split_channels", "adaround", "bias_correction")
"""In the order in which they are best applied; `clip_search` chooses ranges, which comes before `place`."""
Feed = Mapping[str, np.ndarray]
Progress = Callable[[str, int, int], None]
"""progress(what, done, of)"""


@dataclass(frozen=True)
class Gain:
    """What a repair did, measured on pictures.

    before, after: signal to quantization noise of the outputs in dB, the mean over outputs; `outputs` has
    (name, before, after) of each. `changed`: weighted nodes whose weights, bias or output range are not
    what they were. `seconds` is informational.
    """

    repair: str
    paper: str
    before: float
    after: float
    outputs: tuple[tuple[str, float, float], ...]
    changed: int
    seconds: float = 0.0

    @property
    def decibels(self) -> float:
        """What the repair gained; negative where it did harm."""
        return 0.0 if self.after == self.before else self.after - self.before


def module(name: str) -> Any:
    """The repair called `name`. Raises: UsageError for an unknown one."""
    if name not in NAMES:
        raise UsageError(f"repair {name!r}: unknown. {did_you_mean(name, NAMES)}")
    return importlib.import_module(f"edgekit.quant.repair.{name}")


def apply(
    name: str,
    model: ir.Model,
    float_model: ir.Model,
    feeds: Sequence[Feed],
    *,
    check: Sequence[Feed] | None = None,
    progress: Progress | None = None,
    nodes: Collection[str] | None = None,
    **options: Any,
) -> tuple[ir.Model, Gain]:
    """(repaired copy of `model`, its Gain). `check`: other pictures to measure on; `feeds` if None.

    The copy is returned also where it gained nothing: the caller decides. options: of the repair's `run`.
    Raises: UsageError for an unknown repair, CalibrationError without pictures.
    """
    repair = module(name)
    start = time.perf_counter()
    repaired = repair.run(model, float_model, feeds, progress=progress, nodes=nodes, **options)
    seconds = time.perf_counter() - start
    return repaired, measure(
        name, repair.PAPER, model, repaired, float_model, check or feeds, seconds=seconds
    )


def measure(
    name: str,
    paper: str,
    before: ir.Model,
    after: ir.Model,
    float_model: ir.Model,
    feeds: Sequence[Feed],
    *,
    seconds: float = 0.0,
) -> Gain:
    """Compare the outputs of two annotated models with those of `float_model`."""
    first, second = (output_sqnr(m, float_model, feeds) for m in (before, after))
    outputs = tuple((n, float(first[n]), float(second[n])) for n in first)
    mean_before, mean_after = (float(np.mean([row[i] for row in outputs])) for i in (1, 2))
    return Gain(name, paper, mean_before, mean_after, outputs, _changed(before, after), seconds)


def output_sqnr(model: ir.Model, float_model: ir.Model, feeds: Sequence[Feed]) -> dict[str, float]:
    """dB of each output of the annotated `model` against `float_model`, as quant/simulate.py computes it."""
    from edgekit.quant import simulate

    checked(feeds)
    names = [str(v.name) for v in float_model.graph.outputs if v.producer() is not None]
    return simulate.sqnr(float_model, simulate.fake_quantized(model), feeds, names)


def checked(feeds: Sequence[Feed]) -> Sequence[Feed]:
    """Raises: CalibrationError without pictures."""
    if not len(feeds):
        raise CalibrationError("repair: there are no pictures, expected at least one. Give calibration data")
    return feeds


def chosen(model: ir.Model, nodes: Collection[str] | None) -> Iterator[ir.Node]:
    """The nodes of `model` that a repair may change. Raises: UsageError for a name that is no node."""
    known = {node_id(n) for n in model.graph}
    for name in sorted(set(nodes or ()) - known):
        raise UsageError(f"node {name!r}: not in this network. {did_you_mean(name, known)}")
    for node in model.graph:
        if nodes is None or node_id(node) in nodes:
            yield node


def _changed(before: ir.Model, after: ir.Model) -> int:
    from edgekit.passes.graph import constant
    from edgekit.quant.rules import WEIGHTED

    def state(node: ir.Node) -> list[Any]:
        numbers = [constant(v) for v in node.inputs[1:]]
        return [*numbers, quant(node.outputs[0]), *(quant(v) for v in node.inputs[:2])]

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return a.shape == b.shape and bool(np.array_equal(a, b))
        return not isinstance(a, np.ndarray) and not isinstance(b, np.ndarray) and bool(a == b)

    old = {node_id(n): state(n) for n in before.graph if n.op_type in WEIGHTED}
    new = {node_id(n): state(n) for n in after.graph if n.op_type in WEIGHTED}
    return sum(
        name not in old
        or len(old[name]) != len(found)
        or not all(same(a, b) for a, b in zip(old[name], found, strict=True))
        for name, found in new.items()
    )
