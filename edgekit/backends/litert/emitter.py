"""From values of the graph to tensors of the file: in the axis order and number format that a reader asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.litert import layout
from edgekit.backends.litert.layout import Order
from edgekit.backends.litert.plan import Plan, Unit, full_shape
from edgekit.backends.litert.writer import Writer
from edgekit.passes.graph import constant
from edgekit.quant.annotate import quant
from edgekit.spec import DType, QuantParams

MIN_HALF_ELEMENTS = 64
"""Smaller constants (biases of a few channels, scalars) are not worth an operator that widens them."""


class Emitter:
    """Writes operators and remembers, per value, which tensors hold it."""

    def __init__(self, plan: Plan, half: bool = False, dynamic: bool = False) -> None:
        """half: store float weights in float16. dynamic: store weights of products in int8."""
        self.writer = Writer()
        self.plan = plan
        self.half = half
        self.dynamic = dynamic
        self.order: dict[ir.Value, Order] = {}
        """Of the tensor that was written; others are derived from it."""
        self._made: dict[tuple[ir.Value, Order, QuantParams | None], int] = {}
        self._format: dict[ir.Value, QuantParams | None] = {}
        self._pending: list[tuple[int, ir.Value, Order]] = []
        self.row_order: dict[ir.Value, np.ndarray] = {}
        """Flattened values whose elements lie in another order than the graph's (see shapes.reshape)."""
        self.chosen: dict[ir.Value, tuple[ir.Value, int, int]] = {}
        """Values that are every n-th channel of another, left to the one convolution that reads them:
        (whole, first channel, n)."""
        self.in_pairs: dict[ir.Value, int] = {}
        """Pictures whose tensor has two columns as one (see products.pairs_columns)."""
        self._apart: dict[tuple[ir.Value, int, QuantParams | None], int] = {}
        self._wide: dict[int, int] = {}
        self._count = 0

    # --- values -----------------------------------------------------------------------------

    def declare(self, value: ir.Value, order: Order, params: QuantParams | None = None) -> int:
        """The tensor that is the value: a graph input, or what an operator is about to write."""
        dtype = np.dtype(np.int8) if params is not None else _dtype(value)
        index = self.writer.tensor(str(value.name), layout.stored(full_shape(value), order), dtype, params)
        self.order[value] = order
        self._format[value] = params
        self._made[value, order, params] = index
        return index

    def out(self, unit: Unit, order: Order, index: int = 0) -> int:
        """The tensor that `unit` writes for its output `index`, in the format in which it computes."""
        value = unit.outputs[index]
        held = self.plan.params.get(value)
        if unit.integer or held is None:
            assert not (unit.integer and held is None), f"{value.name} carries no scale"
            return self.declare(value, order, held)
        tensor = self.temp(layout.stored(full_shape(value), order), None)
        self._pending.append((tensor, value, order))
        return tensor

    def flush(self) -> None:
        """Round to codes what a unit that computes in floats has written to values stored as codes."""
        for tensor, value, order in self._pending:
            self.quantize(tensor, self.declare(value, order, self.plan.params[value]), 1)
        self._pending.clear()

    def alias(self, x: ir.Value, out: ir.Value, order: Order, params: QuantParams | None) -> None:
        """`out` is the tensor of `x` in `params` by another name, its axes counted as `order` says."""
        self._made[out, order, params] = self.read(x, self.order[x], params)
        self.order[out], self._format[out] = order, params

    def held(self, value: ir.Value) -> QuantParams | None:
        """The format in which a value was written."""
        return self._format[value]

    def params(self, unit: Unit, value: ir.Value) -> QuantParams | None:
        """The format in which `unit` reads `value`."""
        return self.plan.params[value] if unit.integer else None

    def read(self, value: ir.Value, order: Order, params: QuantParams | None = None) -> int:
        """A computed value as a tensor in this order and format; conversions are made once."""
        key = (value, order, params)
        if key not in self._made:
            have_order, have = self.order[value], self._format[value]
            if order == have_order:
                source = self._made[value, order, have]
                self._made[key] = self._convert(value, source, order, have, params)
            elif params == have:
                source = self._made[value, have_order, have]
                self._made[key] = self._move(
                    source, full_shape(value), have_order, order, have, _dtype(value)
                )
            elif params is None:  # codes are moved, they are a quarter of the bytes
                self._made[key] = self._convert(value, self.read(value, order, have), order, have, None)
            else:
                source = self.read(value, have_order, params)
                self._made[key] = self._move(
                    source, full_shape(value), have_order, order, params, _dtype(value)
                )
        return self._made[key]

    def _convert(
        self,
        value: ir.Value,
        source: int,
        order: Order,
        have: QuantParams | None,
        params: QuantParams | None,
    ) -> int:
        name = f"{value.name}/{'float' if params is None else 'codes'}"
        dtype = np.float32 if params is None else np.int8
        made = self.writer.tensor(name, layout.stored(full_shape(value), order), dtype, params)
        if params is None:
            self.writer.op("DEQUANTIZE", [source], [made], "DequantizeOptions", version=2)
        else:
            self.quantize(source, made, 1 if have is None else 2)
        return made

    def quantize(self, source: int, target: int, version: int) -> None:
        self.writer.op("QUANTIZE", [source], [target], "QuantizeOptions", version=version)

    def _move(
        self,
        source: int,
        shape: Sequence[int],
        old: Order,
        new: Order,
        params: QuantParams | None,
        dtype: np.dtype,
    ) -> int:
        target = self.temp(layout.stored(shape, new), params, dtype)
        if layout.moves_nothing(shape, old, new):
            self.reshape(source, target, layout.stored(shape, new))
        else:
            perm = [old.index(axis) for axis in new]
            self.writer.op(
                "TRANSPOSE", [source, self.ints(perm)], [target], "TransposeOptions", version=_version(params)
            )
        return target

    def apart(self, value: ir.Value, step: int, params: QuantParams | None) -> int:
        """A picture's channels dealt out to `step` pictures, as a tensor [step, n * h * w * c / step]."""
        key = (value, step, params)
        if key not in self._apart:
            source = self.read(value, layout.NHWC, params)
            rest = math.prod(full_shape(value)) // step
            flat, dealt = self.temp((rest, step), params), self.temp((step, rest), params)
            self.reshape(source, flat, (rest, step))
            perm = self.ints((1, 0))
            self.op("TRANSPOSE", [flat, perm], [dealt], "TransposeOptions", version=_version(params))
            self._apart[key] = dealt
        return self._apart[key]

    # --- pieces that operators are made of ----------------------------------------------------

    def temp(
        self, shape: Sequence[int], params: QuantParams | None, dtype: np.dtype | type = np.float32
    ) -> int:
        """A tensor between the operators that one node becomes."""
        self._count += 1
        return self.writer.tensor(f"_{self._count}", shape, np.int8 if params is not None else dtype, params)

    def ints(
        self, values: Sequence[int] | Sequence[Sequence[int]] | np.ndarray, dtype: type = np.int32
    ) -> int:
        return self.writer.constant(np.array(values, dtype))

    def reshape(self, source: int, target: int, shape: Sequence[int]) -> None:
        self.writer.op(
            "RESHAPE",
            [source, self.ints(shape)],
            [target],
            "ReshapeOptions",
            {"newShape": np.array(shape, np.int32)},
        )

    def floats(self, data: np.ndarray, name: str = "") -> int:
        """A constant; large float32 ones in float16 where the payload stores them so."""
        data = np.asarray(data)
        if self.half and data.dtype == np.float32 and data.size >= MIN_HALF_ELEMENTS:
            half = self.writer.constant(data.astype(np.float16), name)
            if half not in self._wide:
                self._wide[half] = self.temp(data.shape, None)
                self.writer.op("DEQUANTIZE", [half], [self._wide[half]], "DequantizeOptions", version=3)
            return self._wide[half]
        return self.writer.constant(data, name)

    def operand(self, unit: Unit, value: ir.Value, order: Order, rank: int) -> int:
        """An input of an element-wise operator, brought to `rank` axes in `order` (of the result)."""
        data = constant(value)
        if data is not None:
            full = data.reshape((1,) * (rank - data.ndim) + data.shape)
            full = layout.arrange(full, order)
            if unit.integer:
                own_params, codes = quantize_constant(full, quant(value))
                codes = whole_rows(codes, layout.stored(full_shape(unit.outputs[0]), order))
                return self.writer.constant(codes, str(value.name), own_params)
            return self.floats(full, str(value.name))
        params = self.params(unit, value)
        shape = full_shape(value)
        if len(shape) == rank:
            return self.read(value, order, params)
        own = layout.plain(len(shape))
        source = self.read(value, own, params)
        raised = (1,) * (rank - len(shape)) + shape
        target = self.temp(raised, params)
        self.reshape(source, target, raised)
        if order == layout.plain(rank):
            return target
        return self._move(target, raised, layout.plain(rank), order, params, np.dtype(np.float32))

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: str = "",
        values: Mapping[str, Any] | None = None,
        version: int = 1,
    ) -> None:
        self.writer.op(name, inputs, outputs, options, values, version)

    def act(self, unit: Unit) -> int:
        """The unit's activation as the schema's number."""
        from edgekit.backends.litert.writer import schema

        return int(getattr(schema().ActivationFunctionType, unit.act))


NARROW, ROW_BYTES = 128, 1 << 14


def whole_rows(codes: np.ndarray, result: Sequence[int]) -> np.ndarray:
    """Codes of one value per channel [1, 1, 1, C], repeated for a row of the picture [1, 1, W, C] if C is small.

    XNNPACK starts its loop anew for every pixel otherwise, which costs more than the few codes it handles there.
    """
    if codes.ndim != 4 or codes.shape[:3] != (1, 1, 1) or codes.shape[3] != result[3]:
        return codes
    if codes.shape[3] > NARROW or codes.shape[3] * result[2] > ROW_BYTES:
        return codes
    return np.tile(codes, (1, 1, result[2], 1))


def _version(params: QuantParams | None, integer: int = 2, real: int = 1) -> int:
    return real if params is None else integer


def _dtype(value: ir.Value) -> np.dtype:
    dtype = value.dtype
    return np.dtype(np.float32) if dtype is None else np.dtype(dtype.numpy())


def quantize_constant(data: np.ndarray, params: QuantParams | None = None) -> tuple[QuantParams, np.ndarray]:
    """int8 codes of a constant, in `params` or over its own range, which is made to hold 0."""
    if params is not None and len(params.scale) == 1:
        return params, _codes(data, params)
    low, high = min(float(data.min()), 0.0), max(float(data.max()), 0.0)
    if low == high:
        low, high = 0.0, 1.0
    if data.size == 1:  # one value: exact at either end of the codes
        scale = max(-low, high) / 127
        zero = 0
    else:
        scale = (high - low) / 255
        zero = round(-128 - low / scale)
    scale = float(np.float32(scale))
    params = QuantParams(DType.int8, (scale,), (int(np.clip(zero, -128, 127)),))
    return params, _codes(data, params)


def _codes(data: np.ndarray, params: QuantParams) -> np.ndarray:
    codes: np.ndarray = np.clip(np.rint(data / params.scale[0]) + params.zero_point[0], -128, 127)
    return codes.astype(np.int8)
