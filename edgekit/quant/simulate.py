"""What the annotations mean, computed in floats: the reference of every integer kernel, and of error ranking.

Runs on ONNX Runtime with graph optimizations off, so that nothing is fused, reordered or turned into integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.errors import UsageError, did_you_mean
from edgekit.passes.exact import open_session as exact_session
from edgekit.passes.graph import clean, constant, new_weight, shape
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.placement import prepared
from edgekit.quant.qdq import MIN_OPSET, Style, integer_operands, pair, raise_opset
from edgekit.quant.rules import bias
from edgekit.quant.weights import bias_codes, bias_scale, rounded

Feed = Mapping[str, np.ndarray]
MAX_VALUE_BYTES = 64 << 20
"""Inner values held at a time."""


def fake_quantized(model: ir.Model, *, int32_bias: bool = True) -> ir.Model:
    """A float32 model that computes what the annotated `model` means.

    Weights are the numbers behind their codes; biases of integer nodes are rounded to int32 codes (TensorRT
    keeps them float: int32_bias False); every annotated activation passes through Q and DQ. Values keep their
    names and hold the rounded number: an annotated inner value "v" is called "v.exact" before rounding.
    """
    model = raise_opset(prepared(model), MIN_OPSET)
    graph = model.graph
    for node in graph:
        operands, value = integer_operands(node), bias(node)
        if int32_bias and operands is not None and value is not None:
            numbers = constant(value)
            assert numbers is not None
            scale = bias_scale(*operands)
            if numbers.size == scale.size:
                found = bias_codes(numbers, scale).astype(np.float32) * scale
                node.replace_input_with(
                    2, new_weight(graph, f"{value.name}.rounded", found.reshape(numbers.shape))
                )
    style = Style()
    for value in [*graph.initializers.values(), *graph.inputs, *(v for n in graph for v in n.outputs)]:
        params = quant(value)
        numbers = constant(value)
        if params is None:
            continue
        set_quant(value, None)
        if numbers is not None and params.axis is not None:
            value.const_value = ir.tensor(rounded(numbers, params), name=value.name)
        elif value.uses() or value.is_graph_output():
            name, inner = str(value.name), value.producer() is not None
            result = pair(graph, value, params, style)
            if inner:
                value.name, result.name = f"{name}.exact", name
    clean(model)
    return model


def run(model: ir.Model, feeds: Iterable[Feed], names: Sequence[str] = ()) -> Iterator[dict[str, np.ndarray]]:
    """The values called `names` (the outputs if none), one dict per feed, as the model defines them.

    Raises: UsageError for a name that is no value of the model.
    """
    session, wanted = _session(model, names)
    for feed in feeds:
        yield dict(zip(wanted, session.run(wanted, dict(feed)), strict=True))


def batches(model: ir.Model, names: Sequence[str], limit: int = MAX_VALUE_BYTES) -> Iterator[list[str]]:
    """`names` in groups whose values take at most `limit` bytes together (a larger one alone)."""
    sizes = {
        str(v.name): 4 * int(np.prod(shape(v) or (1,))) for n in prepared(model).graph for v in n.outputs
    }
    group: list[str] = []
    used = 0
    for name in names:
        size = sizes.get(name, 0)
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


def sqnr(
    reference: ir.Model, quantized: ir.Model, feeds: Sequence[Feed], names: Sequence[str]
) -> dict[str, float]:
    """Signal to quantization noise of each value, dB over all feeds: 10 log10(sum x^2 / sum (x - x')^2).

    `reference` and `quantized` (of `fake_quantized`) hold values of these names. Infinite without any error.
    """
    found: dict[str, float] = {}
    for group in batches(reference, names):
        signal, noise = dict.fromkeys(group, 0.0), dict.fromkeys(group, 0.0)
        pairs = zip(run(reference, feeds, group), run(quantized, feeds, group), strict=True)
        for exact, rounded_ in pairs:
            for name in group:
                x = exact[name].astype(np.float64)
                signal[name] += float((x**2).sum())
                noise[name] += float(((x - rounded_[name]) ** 2).sum())
        for name in group:
            found[name] = 10 * np.log10(max(signal[name], 1e-30) / noise[name]) if noise[name] else np.inf
    return found


def _session(model: ir.Model, names: Sequence[str]) -> tuple[Any, list[str]]:
    """(ONNX Runtime session, names of its outputs): `model` with the values `names` as its outputs."""
    model = model.clone()
    graph = model.graph
    if names:
        known = {str(v.name): v for n in graph for v in n.outputs}
        unknown = [n for n in names if n not in known]
        if unknown:
            raise UsageError(f"value {unknown[0]!r}: not in this network. {did_you_mean(unknown[0], known)}")
        outputs = [known[n] for n in dict.fromkeys(names)]
        if any(v.shape is None for v in outputs):
            model = prepared(model)
            graph = model.graph
            known = {str(v.name): v for n in graph for v in n.outputs}
            outputs = [known[n] for n in dict.fromkeys(names)]
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        clean(model)
    session = open_session(model)
    return session, [o.name for o in session.get_outputs()]


def open_session(model: ir.Model) -> Any:
    """An ONNX Runtime session that computes the graph as it stands, with the same bits on every machine."""
    return exact_session(ir.to_proto(model).SerializeToString(), "run a network", arena=False)
