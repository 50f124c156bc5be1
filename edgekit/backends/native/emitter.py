"""Memory of a program while it is written: which buffer and channels a value lies in, as codes and as real numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.lowering import Unsupported
from edgekit.backends.native import pointwise
from edgekit.backends.native.format import Act, Builder, Dtype, Op, OpType, Tensor
from edgekit.backends.native.plan import Plan, Unit
from edgekit.passes.graph import shape
from edgekit.quant.annotate import quant
from edgekit.spec import QuantParams

Shape = tuple[int, int, int, int]
Home = tuple[int, int, int]
"""Buffer, offset of the first channel, elements between pixels."""
BYTES = {Dtype.u8: 1, Dtype.f32: 4}


def full_shape(value: ir.Value) -> tuple[int, ...]:
    found = shape(value)
    if found is None or any(d < 1 for d in found):
        raise Unsupported(f"value {value.name} without a fixed shape")
    return found


def picture(sizes: Sequence[int]) -> Shape:
    """[n, h, w, c] as the engine sees a tensor of the graph."""
    if len(sizes) == 4:
        n, c, h, w = sizes
    elif len(sizes) == 3:
        n, c, w, h = *sizes, 1
    elif len(sizes) == 2:
        n, c, h, w = *sizes, 1, 1
    else:
        raise Unsupported(f"a tensor of {len(sizes)} axes")
    return n, h, w, c


def picture_of(value: ir.Value) -> Shape:
    return picture(full_shape(value))


class Emitter:
    """Collects buffers, tensors and operators. `codes` and `reals`: tensors of the values that are there so far."""

    def __init__(self, plan: Plan, ports: dict[ir.Value, Dtype], byte_weights: bool = False) -> None:
        self.plan = plan
        self.ports = ports
        """Graph outputs, and as what they leave."""
        self.byte_weights = byte_weights
        self.made = Builder()
        self.codes: dict[ir.Value, int] = {}
        self.reals: dict[ir.Value, int] = {}
        self.flat: dict[ir.Value, ir.Value] = {}
        """Pictures in a row, which only products read: the picture itself."""
        self.shuffled: dict[ir.Value, tuple[ir.Value, tuple[int, ...]]] = {}
        """Values of which only parts are read: what they are a shuffle of."""
        self.apart: dict[ir.Value, tuple[ir.Value, ...]] = {}
        """Concats that are not made: their inputs."""
        self.pools: dict[tuple[ir.Value, Any], int] = {}
        """Pools of a picture that were computed, and in which tensor."""
        self._homes: dict[tuple[ir.Value, Dtype], Home] = {}
        self._there: set[ir.Value] = set()
        """Values that were written in the scale of the Concat that they lie in."""
        self.inputs: dict[ir.Value, int] = {}
        self.outputs: dict[ir.Value, int] = {}
        """Tensors of the ports."""

    def is_taken(self, tensor: int) -> bool:
        """Whether its memory is that of an output, or of an input, that is known already."""
        taken = (*self.outputs.values(), *self.inputs.values())
        return self.made.tensors[tensor].buffer in {self.made.tensors[t].buffer for t in taken}

    def assume(self, value: ir.Value) -> None:
        """Something for a value that could not be computed, so that its readers can be judged."""
        try:
            sizes = picture_of(value)
        except Unsupported:
            sizes = (1, 1, 1, 1)
        params = quant(value)
        if params is not None:
            self.codes.setdefault(value, self.temp(sizes, params))
        self.reals.setdefault(value, self.temp(sizes, None))

    # --- memory ---

    def buffer(self, sizes: Shape, dtype: Dtype, external: bool = False) -> int:
        return self.made.buffer(math.prod(sizes) * BYTES[dtype], external)

    def tensor(self, home: Home, sizes: Shape, dtype: Dtype, params: QuantParams | None = None) -> int:
        buffer, offset, pitch = home
        scale, zero = (1.0, 0) if params is None else pointwise.scale_zero(params)
        return self.made.tensor(sizes, dtype, float(scale), int(zero), False, buffer, offset, pitch)

    def like(self, t: Tensor, home: Home, sizes: Shape) -> int:
        """A tensor of the type and scale of `t`."""
        buffer, offset, pitch = home
        return self.made.tensor(sizes, t.dtype, t.scale, t.zero, False, buffer, offset, pitch)

    def temp(self, sizes: Shape, params: QuantParams | None) -> int:
        dtype = Dtype.f32 if params is None else Dtype.u8
        return self.tensor((self.buffer(sizes, dtype), 0, sizes[3]), sizes, dtype, params)

    def home(self, value: ir.Value, dtype: Dtype) -> Home:
        """Where the value lies, or is to be written."""
        key = value, dtype
        if key not in self._homes:
            within = self.plan.parts.get(value)
            if within is not None and self.is_codes(within[0]) == (dtype == Dtype.u8):
                buffer, offset, pitch = self.home(within[0], dtype)
                self._homes[key] = buffer, offset + within[1], pitch
            else:
                sizes = picture_of(value)
                buffer = self.buffer(sizes, dtype, self.ports.get(value) == dtype)
                self._homes[key] = buffer, 0, sizes[3]
        return self._homes[key]

    def is_codes(self, concat: ir.Value) -> bool:
        """Whether a Concat's result is joined as codes."""
        return self.plan.writers[concat].integer

    def put(self, value: ir.Value, params: QuantParams | None) -> int:
        """The tensor to write `value` to, in its own scale or as real numbers."""
        dtype = Dtype.f32 if params is None else Dtype.u8
        number = self.tensor(self.home(value, dtype), picture_of(value), dtype, params)
        (self.reals if params is None else self.codes)[value] = number
        return number

    def out_codes(self, unit: Unit) -> tuple[int, QuantParams]:
        """(tensor, its params) for the codes that a unit writes: those of the Concat that they go to, where the unit
        can turn its codes into those."""
        params = quant(unit.out)
        if params is None:  # clipped after rounding
            params = quant(unit.stages[-1].result)
        assert params is not None
        within = self.plan.parts.get(unit.out)
        if within is not None and self.is_codes(within[0]):
            theirs = quant(within[0])
            assert theirs is not None
            if theirs != params:
                self._there.add(unit.out)
                home = self.home(unit.out, Dtype.u8)
                return self.tensor(home, picture_of(unit.out), Dtype.u8, theirs), theirs
        return self.put(unit.out, params), params

    # --- values in the form that a reader wants ---

    def as_codes(self, value: ir.Value) -> int:
        if value not in self.codes:
            params = quant(value)
            assert params is not None and value in self.reals, f"{value.name} has no codes"
            source = self.reals[value]
            scale, _ = pointwise.scale_zero(params)
            self.op(
                OpType.quantize,
                [source],
                self.put(value, params),
                str(value.name),
                scalars=(1.0 / float(scale),),
            )
        return self.codes[value]

    def as_real(self, value: ir.Value) -> int:
        if value not in self.reals:
            params = quant(value)
            assert params is not None and value in self.codes, f"{value.name} is not there"
            source = self.codes[value]
            numbers = pointwise.real(pointwise.ALL, params)
            self.op(OpType.dequantize, [source], self.put(value, None), str(value.name), constants=(numbers,))
        return self.reals[value]

    def pieces(self, value: ir.Value) -> list[int]:
        """The tensors that hold the channels of codes, one behind the other."""
        return [self.as_codes(v) for v in self.apart.get(value, (value,))]

    def written_as(self, tensor: int, params: QuantParams) -> int:
        """The same memory with the scale that an operator rounds in, before its table makes other codes of that."""
        t = self.made.tensors[tensor]
        scale, zero = pointwise.scale_zero(params)
        if (t.scale, t.zero) == (float(scale), zero):
            return tensor
        return self.tensor((t.buffer, t.offset, t.pitch), t.shape, t.dtype, params)

    def known(self, value: ir.Value) -> bool:
        return value in self.codes or value in self.reals

    def is_there(self, value: ir.Value) -> bool:
        return value in self._there

    def move(self, source: int, target: int, name: str) -> None:
        """Copy, from one scale to the other if they are codes."""
        a, b = self.made.tensors[source], self.made.tensors[target]
        assert a.dtype == b.dtype
        if a.dtype == Dtype.f32:
            self.op(OpType.copy_f32, [source], target, name)
            return
        table = pointwise.codes_at(pointwise.real_at(pointwise.ALL, a.scale, a.zero), b.scale, b.zero)
        self.op(OpType.table, [source], target, name, constants=(table,))

    def same_place(self, tensor: int, home: Home) -> bool:
        t = self.made.tensors[tensor]
        return (t.buffer, t.offset, t.pitch) == home

    def dense(self, tensor: int, name: str) -> int:
        """The tensor, or a copy, with its pixels one behind the other."""
        t = self.made.tensors[tensor]
        if t.pitch == t.shape[3] and t.offset == 0:
            return tensor
        home = self.buffer(t.shape, t.dtype), 0, t.shape[3]
        copy = self.like(t, home, t.shape)
        self.move(tensor, copy, name)
        return copy

    def seen_as(self, tensor: int, sizes: Shape) -> int:
        """The same memory as a picture of other sizes."""
        t = self.made.tensors[tensor]
        pitch = t.pitch if sizes[3] == t.shape[3] else sizes[3]
        return self.like(t, (t.buffer, t.offset, pitch), sizes)

    def channels(self, tensor: int, first: int, count: int) -> int:
        t = self.made.tensors[tensor]
        return self.like(t, (t.buffer, t.offset + first, t.pitch), (*t.shape[:3], count))

    # --- operators ---

    def op(
        self,
        type_: OpType,
        inputs: Sequence[int | None],
        output: int,
        name: str,
        *,
        act: Act = Act.none,
        kernel: Sequence[int] = (1, 1),
        stride: Sequence[int] = (1, 1),
        dilation: Sequence[int] = (1, 1),
        pad: Sequence[int] = (0, 0, 0, 0),
        group: int = 1,
        ints: Sequence[int] = (),
        scalars: Sequence[float] = (),
        constants: Sequence[np.ndarray | None] = (),
    ) -> None:
        self.made.op(
            Op(
                type_,
                tuple(inputs),
                output,
                act,
                (kernel[0], kernel[1]),
                (stride[0], stride[1]),
                (dilation[0], dilation[1]),
                (pad[0], pad[1], pad[2], pad[3]),
                group,
                tuple(ints),
                tuple(float(np.float32(s)) for s in scalars),
                tuple(None if c is None else np.ascontiguousarray(c) for c in constants),
                name,
            )
        )
