"""Every operator of a program against the graph that it came from, one by one, each fed with the graph's own numbers.

End to end one code that was rounded the other way spreads; fed like this, none does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgekit.backends.native import pointwise
from edgekit.backends.native.arrange import arrange
from edgekit.backends.native.emitter import Emitter
from edgekit.backends.native.engine import NativeExecutable
from edgekit.backends.native.format import Act, Builder, Dtype, Op, OpType, encode
from edgekit.backends.native.lower import emitted
from edgekit.quant import simulate
from edgekit.quant.annotate import quant
from edgekit.quant.placement import prepared

EXACT = ".exact"
"""Behind the name of an annotated value: what it was before rounding (quant.simulate)."""


@dataclass(frozen=True)
class Layer:
    """An operator: how many of its `elements` differ from the graph's, and by how much at most (codes; of real numbers
    the share of the largest)."""

    name: str
    type: str
    act: str
    elements: int
    differing: int
    most: float


def check(model: ir.Model, feed: Mapping[str, np.ndarray], isa: str | None = None) -> Iterator[Layer]:
    """Layers of the annotated `model` in order, on the best instruction set here or the one named. Operators between two
    values of the graph only: copies into a Concat are left out."""
    model = prepared(model).clone()
    arrange(model)  # names mean the same here and there
    e = emitted(model, "int8")
    values = {str(v.name): v for v in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs))}
    inputs = {str(v.name) for v in model.graph.inputs}
    reference = simulate.fake_quantized(model)
    names = [str(v.name) for v in {*e.codes, *e.reals} if str(v.name) not in inputs]
    known = {str(o.name) for n in reference.graph for o in n.outputs}
    wanted_too = [f"{n}{EXACT}" for n in names]
    (numbers,) = simulate.run(reference, [feed], [n for n in (*names, *wanted_too) if n in known])
    numbers |= {name: feed[name] for name in inputs}
    of = {(t, v): str(v.name) for held in (e.codes, e.reals) for v, t in held.items()}
    read = {t: name for (t, _), name in of.items() if name in numbers}
    places = {_place(e, t): values[name] for (t, _), name in of.items() if name in numbers}
    for op in e.made.ops:
        wanted = places.get(_place(e, op.output))
        if wanted is None or any(t is not None and t not in read for t in op.inputs):
            continue
        got = _run(e, op, [None if t is None else numbers[read[t]] for t in op.inputs], isa)
        name = str(wanted.name)
        if got.dtype == np.float32 and op.type != OpType.dequantize:  # rounded by whoever reads it
            name = name + EXACT if name + EXACT in numbers else name
        yield _compared(op, got, numbers[name], wanted)


def _place(e: Emitter, tensor: int) -> tuple[int, ...]:
    t = e.made.tensors[tensor]
    return t.buffer, t.offset, t.pitch, *t.shape


def _last(numbers: np.ndarray) -> np.ndarray:
    """The graph's [N, C, ...] with channels last."""
    return np.moveaxis(numbers, 1, -1) if numbers.ndim > 2 else numbers


def _laid_out(e: Emitter, tensor: int, numbers: np.ndarray) -> np.ndarray:
    t = e.made.tensors[tensor]
    found = _last(numbers).reshape(t.shape)
    if t.dtype == Dtype.f32:
        return np.ascontiguousarray(found, np.float32)
    return pointwise.codes_at(found, t.scale, t.zero)


def _run(e: Emitter, op: Op, inputs: list[np.ndarray | None], isa: str | None) -> np.ndarray:
    made = Builder()
    tensors: list[int | None] = []
    arrays = {}
    for i, (number, array) in enumerate(zip(op.inputs, inputs, strict=True)):
        if number is None or array is None:
            tensors.append(None)
            continue
        t = e.made.tensors[number]
        tensors.append(made.tensor(t.shape, t.dtype, t.scale, t.zero, True))
        made.port(f"in{i}", len(made.tensors) - 1, False, t.shape, False)
        arrays[f"in{i}"] = _laid_out(e, number, array)
    t = e.made.tensors[op.output]
    out = made.tensor(t.shape, t.dtype, t.scale, t.zero, True)
    made.port("out", out, True, t.shape, False)
    made.op(replace(op, inputs=tuple(tensors), output=out))
    engine = NativeExecutable(encode(made.program()), op.name, 1, isa)
    binding = engine.bind()
    for name, array in arrays.items():
        binding.inputs[name][...] = array
    binding.run()
    return np.array(binding.outputs["out"])


def _compared(op: Op, got: np.ndarray, numbers: np.ndarray, value: ir.Value) -> Layer:
    params = quant(value)
    found = _last(numbers)
    if got.dtype == np.float32:
        wanted = found.reshape(got.shape)
        reach = max(float(np.abs(wanted).max()), 1e-30)
        apart = np.abs(got - wanted) / reach
        differing = int((apart > 1e-5).sum())
    else:
        assert params is not None
        apart = np.abs(got.astype(np.int32) - pointwise.codes(found, params).reshape(got.shape))
        differing = int((apart > 0).sum())
    act = "" if op.act == Act.none else op.act.name
    return Layer(op.name, op.type.name, act, got.size, differing, float(apart.max()))
