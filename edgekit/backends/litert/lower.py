"""Toolchain half: a `.tflite` file, written straight from the graph.

Pictures are stored channels last from the input to the outputs; the device half shows them in the graph's
[1, C, H, W] as strided views of the same memory (`options` below), so that nothing is transposed.

float32: as it is. float16: weights in half the bytes, widened once when the file is loaded. dynamic: weights
of dense products in int8, one scale per output channel; activations are quantized while running. int8: what
the graph's annotations say (quant/annotate.py, plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.base import Payload
from edgekit.backends.litert import elementwise, layout, products, resize, shapes
from edgekit.backends.litert.emitter import Emitter
from edgekit.backends.litert.layout import Order
from edgekit.backends.litert.plan import Plan, full_shape, make
from edgekit.backends.lowering import Unsupported
from edgekit.errors import LoweringError, UsageError
from edgekit.passes.graph import clean, constant, infer, op_counts, swap_node
from edgekit.quant.annotate import quant, set_quant, state_codes
from edgekit.schema import printable
from edgekit.spec import DType, TensorSpec
from edgekit.target import Target

PRECISIONS = ("float32", "float16", "int8", "dynamic")
HALF_MAX = float(np.finfo(np.float16).max)
HANDLERS = {**products.HANDLERS, **elementwise.HANDLERS, **shapes.HANDLERS, **resize.HANDLERS}
"""Operator of the graph -> what writes it."""

INTEGER_IO = "edgekit.integer_io"
"""Key of the model's metadata: names, comma-separated, of annotated graph inputs and outputs that an int8
payload reads and writes as codes, beside its states. All others are float32."""


def lower(model: ir.Model, target: Target, precision: str) -> tuple[Payload, ...]:
    """One `.tflite` payload. Its `options` say how to read the file's inputs and outputs: {"inputs": [[name,
    order, shape], ...], "outputs": ...}, in the order of the file. Read as an array of `shape`, axis i of it
    is axis order[i] of the graph's tensor.

    Raises: UsageError for an unknown precision; LoweringError with every operator that cannot be written.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision}: litert payloads are built in {', '.join(PRECISIONS)}. "
            f"Choose one of these for {target.name}"
        )
    if precision == "float16":
        _check_half(model)
    model = model.clone()  # annotations come along
    infer(model)
    _join_gelu(model)
    plan = make(model, precision == "int8")
    if precision == "int8" and not any(unit.integer for unit in plan.units):
        raise UsageError(
            f"precision int8 for {target.name}: the network has no quantization parameters, expected some from a "
            "calibration. Quantize it before lowering"
        )
    e = Emitter(plan, half=precision == "float16", dynamic=precision == "dynamic")
    integer_io = set(filter(None, model.metadata_props.get(INTEGER_IO, "").split(",")))
    if precision == "int8":
        integer_io |= set(state_codes(model))
    inputs = [_input(e, value, integer_io) for value in model.graph.inputs]
    _write(e, plan)
    outputs = [_output(e, value, integer_io) for value in model.graph.outputs]
    data = e.writer.finish([i for i, *_ in inputs], [i for i, *_ in outputs])
    return (
        Payload(
            "litert",
            precision,
            "tflite",
            data,
            tuple(_spec(v, v.name in integer_io) for v in model.graph.inputs),
            tuple(_spec(v, v.name in integer_io) for v in model.graph.outputs),
            {"inputs": _ports(model.graph.inputs, inputs), "outputs": _ports(model.graph.outputs, outputs)},
        ),
    )


def _ports(values: Sequence[ir.Value], ports: Sequence[Port]) -> list[list[Any]]:
    return [[v.name, list(order), list(shape)] for v, (_, order, shape) in zip(values, ports, strict=True)]


def operators(model: ir.Model, precision: str) -> dict[str, Any]:
    """What `lower` would write, for reports and lints: {"operators": counts by name, "integer": [names of nodes
    that compute in integers], "float": [names of the others]}, nodes called as quant.annotate.node_id does."""
    plan = make(model, precision == "int8")
    ids: dict[bool, list[str]] = {True: [], False: []}
    for unit in plan.units:
        ids[unit.integer].append(str(unit.node.outputs[0].name))
    return {"integer": ids[True], "float": ids[False], "operators": op_counts(u.node for u in plan.units)}


def _join_gelu(model: ir.Model) -> None:
    """0.5 * x * (1 + erf(x / sqrt(2))), as exporters write it, becomes one Gelu."""
    for node in list(model.graph):
        found = elementwise.erf_gelu(node) if node.op_type == "Erf" else None
        if found is not None:
            end, x = found
            params = quant(end.outputs[0])
            new = ir.node("Gelu", [x])
            swap_node(model.graph, end, new)
            set_quant(new.outputs[0], params)
    clean(model)


def _write(e: Emitter, plan: Plan) -> None:
    problems: list[str] = []
    for unit in plan.units:
        handler = HANDLERS.get(unit.op)
        try:
            if handler is None or unit.node.domain not in ("", "ai.onnx"):
                raise Unsupported("no such operator")
            handler(e, unit)
        except Unsupported as problem:
            problems.append(f"{unit.op} {printable(str(unit.outputs[0].name))} ({problem})")
            for value in unit.outputs:  # so that what follows is judged too
                e.declare(value, layout.picture(len(full_shape(value))), plan.params.get(value))
        e.flush()
    if problems:
        raise LoweringError(
            f"litert: cannot write {len(problems)} operators: {'; '.join(problems)}. "
            "Choose another backend, or cut the graph before them"
        )


Port = tuple[int, Order, tuple[int, ...]]
"""A tensor at the border: its number, order, and the shape to read its memory by before that order applies."""


def _input(e: Emitter, value: ir.Value, integer_io: set[str]) -> Port:
    order = layout.picture(len(full_shape(value)))
    shape = layout.stored(full_shape(value), order)
    _check_rank("input", value, shape)
    params = e.plan.params.get(value) or (quant(value) if value.name in integer_io else None)
    readers = e.plan.readers.get(value, [])
    if params is not None and len(readers) == 1 and products.pairs_columns(readers[0]):
        pairs = products.paired(shape)
        if value.name in integer_io:
            index = e.in_pairs[value] = e.writer.tensor(str(value.name), pairs, np.int8, params)
        else:
            index = e.writer.tensor(str(value.name), pairs, np.float32)
            e.in_pairs[value] = e.temp(pairs, params)
            e.quantize(index, e.in_pairs[value], 1)
        return index, order, shape
    if params is None or value.name in integer_io:
        return e.declare(value, order, params), order, shape
    index = e.writer.tensor(str(value.name), shape, np.float32)
    e.quantize(index, e.declare(value, order, params), 1)
    return index, order, shape


def _check_rank(side: str, value: ir.Value, shape: Sequence[int]) -> None:
    if not shape:
        raise LoweringError(
            f"litert: {side} {value.name}: a scalar, expected one axis or more. Export it as [1]"
        )


def _output(e: Emitter, value: ir.Value, integer_io: set[str]) -> Port:
    data = constant(value)
    if data is not None:
        return e.writer.constant(data, str(value.name)), layout.plain(data.ndim), data.shape
    order = e.order[value]
    _check_rank("output", value, order)
    params = quant(value) if value.name in integer_io else None
    return e.read(value, order, params), order, layout.stored(full_shape(value), order)


def _spec(value: ir.Value, integer: bool) -> TensorSpec:
    assert value.name is not None
    shape = full_shape(value)
    params = quant(value)
    if integer and params is not None:
        dtype = params.dtype
    else:
        dtype = DType.float32 if value.dtype is None else DType(value.dtype.numpy().name)
    return TensorSpec(
        value.name, dtype, shape, "NCHW" if len(shape) == 4 else "", params if integer else None
    )


def _check_half(model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        data = constant(value)
        if data is not None and data.dtype == np.float32 and float(np.abs(data).max(initial=0)) > HALF_MAX:
            raise LoweringError(
                f"initialiser {value.name}: {np.abs(data).max():.3g} does not fit in float16 "
                f"(at most {HALF_MAX:.0f}). Build with --precision float32"
            )
