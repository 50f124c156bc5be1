"""Clipping search: range ends chosen by what they cost where the value is read, not by the value's own error.

A value's own squared error weighs each number alike; what reads it does not. For given values a handful of
ranges is derived from the histogram that calibration kept, and each is tried: by the error of the results of
the nodes that read the value, or by the error of the network's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.errors import UsageError, did_you_mean
from edgekit.quant import simulate
from edgekit.quant.activations import rounded
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.ranges import activation_range, covered, params
from edgekit.quant.repair import Feed, Progress, checked
from edgekit.quant.repair.walk import Walk
from edgekit.quant.rules import COPIES, data_inputs
from edgekit.quant.stats import Stats
from edgekit.spec import QuantParams

PAPER = (
    "Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort: A White Paper on Neural Network "
    "Quantization, 2021, section 3.1 (range setting), with the error taken behind the reader as in Nahshan et al.: "
    "Loss Aware Post-training Quantization, 2019"
)
SCHEMES = ("minmax", "percentile:99.999", "percentile:99.99", "percentile:99.9", "percentile:99.5", "mse")
SHARES = (0.75, 0.5, 0.25, 0.125)
"""Of the whole range, where most numbers lie beyond what a reader tells apart."""
BETTER = 0.99
"""Another range must bring the error to this share of the present one."""
Range = tuple[float, float]


def search(
    model: ir.Model,
    float_model: ir.Model,
    feeds: Sequence[Feed],
    stats: Stats,
    values: Sequence[str],
    *,
    by: str = "readers",
    progress: Progress | None = None,
) -> dict[str, Range]:
    """Value name -> (low, high) where another range is better than that of the annotated `model`.

    values: names of annotated inner values or inputs, tried in this order. by: "readers", the squared error of
    what the nodes that read the value compute, of that value's rounding alone; or "outputs", that of the
    network's outputs with everything else rounded as annotated, each value behind the choices before it (one
    run of the network per picture and range). Values that share a scale are changed together.
    The result fits `Choices.ranges`. Raises: UsageError for a value that is not annotated or has no
    statistics, or another `by`; CalibrationError without pictures.
    """
    checked(feeds)
    if by not in ("readers", "outputs"):
        raise UsageError(f"clip search by {by!r}: unknown, expected readers or outputs. Use one of them")
    graph = model.graph
    known = {str(v.name): v for v in (*graph.inputs, *(v for n in graph for v in n.outputs)) if quant(v)}
    for name in values:
        if name not in known or name not in stats:
            raise UsageError(
                f"value {name!r}: is not quantized or has no statistics. {did_you_mean(name, known)}"
            )
    symmetric = all(p.zero_point == (0,) for v in known.values() if (p := quant(v)) is not None)
    tried = {n: _candidates(known[n], stats, symmetric) for n in values}
    if by == "readers":
        return dict(_by_readers(float_model, feeds, known, tried, progress))
    return dict(_by_outputs(model, float_model, feeds, known, tried, progress))


def _candidates(value: ir.Value, stats: Stats, symmetric: bool) -> dict[QuantParams, Range]:
    """Params -> range, the present one first."""
    old = quant(value)
    assert old is not None
    found = {old: covered(old)}
    ranges = [activation_range(stats[str(value.name)], scheme, symmetric) for scheme in SCHEMES]
    ranges += [(share * ranges[0][0], share * ranges[0][1]) for share in SHARES]
    for low, high in ranges:
        found.setdefault(params(low, high, symmetric), (low, high))
    return found


def _by_readers(
    float_model: ir.Model,
    feeds: Sequence[Feed],
    known: Mapping[str, ir.Value],
    tried: Mapping[str, Mapping[QuantParams, Range]],
    progress: Progress | None,
) -> Iterator[tuple[str, Range]]:
    with Walk(float_model, feeds, quantized=False) as walk:
        places = [(n, r) for n in tried if (r := walk.readers(n))]
        # the walk cannot go back
        places.sort(key=lambda place: walk.position(place[1][0]))
        for done, (name, readers) in enumerate(places):
            if progress:
                progress("clip search", done, len(places))
            walk.advance(readers[0])
            errors = {}
            for candidate in tried[name]:
                change = {name: lambda x, p=candidate: rounded(x, p)}
                errors[candidate] = _noise(walk.values(readers), walk.values(readers, change))
            yield from _best(name, errors, tried[name])


def _by_outputs(
    model: ir.Model,
    float_model: ir.Model,
    feeds: Sequence[Feed],
    known: Mapping[str, ir.Value],
    tried: Mapping[str, Mapping[QuantParams, Range]],
    progress: Progress | None,
) -> Iterator[tuple[str, Range]]:
    exact = list(simulate.run(float_model, feeds))
    model = model.clone()
    values = {str(v.name): v for v in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs))}
    for done, name in enumerate(tried):
        if progress:
            progress("clip search", done, len(tried))
        shared = _shared(values[name])
        errors = {}
        for candidate in tried[name]:
            for value in shared:
                set_quant(value, candidate)
            errors[candidate] = _noise(exact, simulate.run(simulate.fake_quantized(model), feeds))
        found = list(_best(name, errors, tried[name]))
        keep = min(errors, key=lambda p: errors[p]) if found else next(iter(tried[name]))
        for value in shared:
            set_quant(value, keep)
        yield from found


def _best(
    name: str, errors: Mapping[QuantParams, float], tried: Mapping[QuantParams, Range]
) -> Iterator[tuple[str, Range]]:
    present, best = next(iter(tried)), min(errors, key=lambda p: errors[p])
    if errors[best] < BETTER * errors[present]:
        yield name, tried[best]


def _noise(exact: Iterable[Mapping[str, np.ndarray]], found: Iterable[Mapping[str, np.ndarray]]) -> float:
    """Squared error over squared signal, summed over values."""
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    for a, b in zip(exact, found, strict=True):
        for name, x in a.items():
            if x.dtype.kind == "f":
                wide = x.astype(np.float64)
                signal[name] = signal.get(name, 0.0) + float((wide**2).sum())
                noise[name] = noise.get(name, 0.0) + float(((wide - b[name]) ** 2).sum())
    return sum(n / max(signal[name], 1e-30) for name, n in noise.items())


def _shared(value: ir.Value) -> list[ir.Value]:
    """`value` and what has its scale because nodes between them only move codes."""
    own = quant(value)
    found = [value]
    for one in found:
        near = [one.producer(), *(n for n, _ in one.uses())]
        for node in near:
            if node is not None and node.op_type in COPIES:
                sides = [*data_inputs(node), *node.outputs]
                found += [v for v in sides if quant(v) == own and all(v is not f for f in found)]
    return found
