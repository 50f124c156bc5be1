"""Toolchain half: an annotated graph as a program of the native engine (docs/native.md).

int8: what the annotations say (quant/annotate.py), activations and additions taken into the convolutions in front of
them (plan.py). float32: as it is. dynamic: weights as int8 with a scale per output channel, arithmetic in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from edgekit.backends.base import Payload, Ports
from edgekit.backends.lowering import Unsupported
from edgekit.backends.native.arrange import arrange
from edgekit.backends.native.emitter import Emitter, picture
from edgekit.backends.native.format import Dtype, OpType, decode, encode
from edgekit.backends.native.operators import HANDLERS
from edgekit.backends.native.plan import Plan, make
from edgekit.backends.native.pointwise import scale_zero
from edgekit.errors import LoweringError, UsageError
from edgekit.passes.graph import clean, constant, integer, ints, only_user, shape, text
from edgekit.passes.states import states
from edgekit.quant.annotate import quant, state_codes
from edgekit.quant.placement import prepared
from edgekit.quant.qdq import annotated
from edgekit.schema import printable
from edgekit.spec import DType, QuantParams, TensorSpec
from edgekit.target import Target

PRECISIONS = ("float32", "int8", "dynamic")


def lower(model: ir.Model, target: Target, precision: str, *, pictures: bool = False) -> tuple[Payload, ...]:
    """One payload. Pictures lie channels last in it; sessions see the graph's [N, C, H, W].

    pictures: its inputs beside states are pictures, which a pipeline can place as codes. Those of which only codes are read
    are then taken as such: `Payload.options` names them (backends.base.Ports), `inputs` says what the graph has.
    Raises: UsageError for an unknown precision, and for int8 without annotations; LoweringError with every operator
    that the engine cannot take.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision}: native payloads are built in {', '.join(PRECISIONS)}. "
            f"Choose one of these for {target.name}"
        )
    model = prepared(model)
    if precision == "int8" and not annotated(model):
        raise UsageError(
            f"precision int8 for {target.name}: the network has no quantization parameters, expected some from a "
            "calibration. Quantize it before lowering"
        )
    integers = precision == "int8"
    held = state_codes(model) if integers else {}
    sides = (model.graph.inputs, model.graph.outputs)
    inputs, outputs = (tuple(_spec(v, held.get(str(v.name))) for v in side) for side in sides)
    made = emitted(model, precision)
    taken = _taken_as_codes(made, model) if integers and pictures else {}
    if taken:
        made = emitted(model, precision, taken)
    specs = (_spec(v, taken[str(v.name)]) for v in model.graph.inputs if str(v.name) in taken)
    ports = Ports(codes={spec.name: spec.quant for spec in specs if spec.quant is not None})
    data = encode(made.made.program())
    return (Payload("native", precision, "ekn", data, inputs, outputs, ports.to_options()),)


def _taken_as_codes(made: Emitter, model: ir.Model) -> dict[str, QuantParams]:
    """The inputs that a program turns into codes first, and reads as nothing else."""
    inputs = {str(v.name): v for v in model.graph.inputs}
    held = {s.input for s in states(model)}
    found = {}
    for value, tensor in made.inputs.items():
        if str(value.name) in held:
            continue
        readers = [op.type for op in made.made.ops if tensor in op.inputs]
        params = quant(inputs[str(value.name)])
        if readers == [OpType.quantize] and params is not None and not value.is_graph_output():
            found[str(value.name)] = params
    return found


def facts(data: bytes) -> dict[str, Any]:
    """For evidence: bytes of the constants, and how many operators there are of each type."""
    found = decode(data)
    counts: dict[str, int] = {}
    for op in found.ops:
        counts[op.type.name] = counts.get(op.type.name, 0) + 1
    size = sum(c.nbytes for op in found.ops for c in op.constants if c is not None)
    return {"weight_bytes": size, "ops": dict(sorted(counts.items()))}


def emitted(model: ir.Model, precision: str, codes: Mapping[str, QuantParams] | None = None) -> Emitter:
    """The program, and which value of a prepared graph is which of its tensors. codes: inputs beside states that it takes
    as codes. Raises: LoweringError."""
    model = model.clone()
    _join_pads(model)
    integers = precision == "int8"
    if integers:
        arrange(model)
    graph = model.graph
    held = {**state_codes(model), **(codes or {})} if integers else {}
    plan = make(graph, integers)
    ports = {v: Dtype.u8 if str(v.name) in held else Dtype.f32 for v in graph.outputs}
    e = Emitter(plan, ports, byte_weights=precision == "dynamic")
    problems: list[str] = []
    for value in graph.inputs:
        try:
            _input(e, value, held.get(str(value.name)))
        except Unsupported as problem:
            problems.append(f"input {printable(str(value.name))} ({problem})")
    if not problems:
        problems = _write(e, plan)
    if not problems:
        for value in graph.outputs:
            _output(e, value)
    if problems:
        raise LoweringError(
            f"native: cannot take {len(problems)} operators: {'; '.join(problems)}. "
            "Choose another backend, or cut the graph before them"
        )
    next_of = {s.input: s.output for s in states(model)}
    numbers = {str(v.name): i + len(graph.inputs) for i, v in enumerate(graph.outputs)}
    for output, tensors in ((False, e.inputs), (True, e.outputs)):
        for value in graph.outputs if output else graph.inputs:
            name, sizes = str(value.name), shape(value)
            assert sizes is not None
            follows = None if output or name not in next_of else numbers[next_of[name]]
            e.made.port(name, tensors[value], output, sizes, len(sizes) >= 3, follows)
    return e


def _join_pads(model: ir.Model) -> None:
    """A Pad with zeros in front of an AveragePool becomes the pool's own, which counts."""
    for node in list(model.graph):
        pad = (
            node.inputs[0].producer()
            if node.op_type == "AveragePool" and node.inputs[0] is not None
            else None
        )
        if (
            pad is None
            or pad.op_type != "Pad"
            or only_user(pad.outputs[0]) is not node
            or len(pad.inputs) != 2
        ):
            continue
        amounts = constant(pad.inputs[1])
        if amounts is None or amounts.size != 8 or amounts[[0, 1, 4, 5]].any() or (amounts < 0).any():
            continue
        if any(ints(node, "pads", (0, 0, 0, 0))) or integer(node, "ceil_mode", 0):
            continue
        if text(pad, "mode", "constant") != "constant":
            continue
        node.replace_input_with(0, pad.inputs[0])
        node.attributes["pads"] = ir.AttrInt64s("pads", [int(a) for a in amounts[[2, 3, 6, 7]]])
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    clean(model)


def _input(e: Emitter, value: ir.Value, params: QuantParams | None) -> None:
    sizes = shape(value)
    if sizes is None or value.dtype != ir.DataType.FLOAT:
        raise Unsupported("expected float32 of a fixed shape")
    dtype = Dtype.f32 if params is None else Dtype.u8
    area = picture(sizes)
    tensor = e.tensor((e.buffer(area, dtype, True), 0, area[3]), area, dtype, params)
    e.inputs[value] = tensor
    (e.reals if params is None else e.codes)[value] = tensor


def _write(e: Emitter, plan: Plan) -> list[str]:
    problems = []
    for unit in plan.units:
        handler = HANDLERS.get(unit.kind)
        try:
            if handler is None or unit.node.domain not in ("", "ai.onnx"):
                raise Unsupported("no such operator")
            handler(e, unit)
        except Unsupported as problem:
            problems.append(f"{unit.node.op_type} {printable(str(unit.out.name))} ({problem})")
            for value in {*unit.node.outputs, unit.out}:  # so that what follows is judged too
                e.assume(value)
    return problems


def _output(e: Emitter, value: ir.Value) -> None:
    """Into memory of its own, if it does not lie there already."""
    codes = e.ports[value] == Dtype.u8
    tensor = e.as_codes(value) if codes else e.as_real(value)
    if (
        e.made.buffers[e.made.tensors[tensor].buffer].external
        and value not in e.inputs
        and not e.is_taken(tensor)
    ):
        e.outputs[value] = tensor
        return
    t = e.made.tensors[tensor]
    area = t.shape
    params = quant(value) if codes else None
    target = e.tensor((e.buffer(area, t.dtype, True), 0, area[3]), area, t.dtype, params)
    e.move(tensor, target, str(value.name))
    e.outputs[value] = target


def _spec(value: ir.Value, params: QuantParams | None) -> TensorSpec:
    sizes = shape(value)
    assert value.name is not None and sizes is not None
    layout = "NCHW" if len(sizes) == 4 else ""
    if params is None:
        return TensorSpec(value.name, DType.float32, sizes, layout)
    scale, zero = scale_zero(params)
    return TensorSpec(
        value.name, DType.uint8, sizes, layout, QuantParams(DType.uint8, (float(scale),), (zero,))
    )
