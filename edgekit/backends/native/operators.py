"""Operators without weights: sums, products, tables, pools, resizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgekit.backends.lowering import Unsupported, nearest, positions
from edgekit.backends.native import channels, pointwise, products
from edgekit.backends.native.channels import first
from edgekit.backends.native.emitter import Emitter, full_shape, picture, picture_of
from edgekit.backends.native.format import OpType
from edgekit.backends.native.plan import Unit, mode
from edgekit.backends.native.products import Window, real_act, window
from edgekit.passes.graph import constant, integer, ints
from edgekit.quant.activations import rounded
from edgekit.quant.annotate import quant
from edgekit.spec import QuantParams


def finish(e: Emitter, unit: Unit) -> tuple[int, QuantParams, list[np.ndarray | None]]:
    """(tensor to write, params to round in, [table behind that] if there is one) of a sum or product."""
    target, theirs = e.out_codes(unit)
    summed, table = pointwise.coded(unit.pre, unit.stages, theirs)
    return e.written_as(target, summed), summed, [] if table is None else [table]


def moved(e: Emitter, unit: Unit, before: QuantParams) -> tuple[int, list[np.ndarray | None]]:
    """(tensor to write, [table]) of an operator that hands on codes of `before`."""
    target, theirs = e.out_codes(unit)
    summed, table = pointwise.coded(unit.pre, unit.stages, theirs)
    found = np.arange(256, dtype=np.uint8) if summed == before else pointwise.table(before, (), summed)
    found = found if table is None else table[found]
    return target, [] if np.array_equal(found, pointwise.ALL) else [found]


def binary(e: Emitter, unit: Unit) -> None:
    """Add, Sub, Mul of two computed tensors."""
    a, b = (v for v in unit.node.inputs if v is not None)
    name, op = str(unit.out.name), unit.node.op_type
    if not unit.integer:
        _binary_real(e, unit, a, b)
        return
    if op == "Mul" and full_shape(a) != full_shape(unit.pre):
        a, b = b, a
    tensors = [e.as_codes(a), e.as_codes(b)]
    scales = [e.made.tensors[t].scale for t in tensors]
    target, summed, constants = finish(e, unit)
    scale = float(pointwise.scale_zero(summed)[0])
    if op == "Mul":
        e.op(OpType.mul, tensors, target, name, scalars=(scales[0] * scales[1] / scale,), constants=constants)
        return
    sign = -1.0 if op == "Sub" else 1.0
    factors = scales[0] / scale, sign * scales[1] / scale
    e.op(OpType.add, tensors, target, name, scalars=factors, constants=constants)


def _binary_real(e: Emitter, unit: Unit, a: ir.Value, b: ir.Value) -> None:
    op, name = unit.node.op_type, str(unit.out.name)
    for value, other, swapped in ((b, a, False), (a, b, True)):
        numbers, params = constant(value), quant(value)
        if numbers is not None:
            if params is not None:
                numbers = rounded(numbers, params)
            _with_constant(e, unit, other, numbers, swapped)
            return
    if op == "Mul" and full_shape(a) != full_shape(unit.pre):
        a, b = b, a
    whole = full_shape(a) == full_shape(b)
    scales = op == "Mul" and full_shape(b)[:2] == full_shape(a)[:2] and set(full_shape(b)[2:]) == {1}
    if op not in ("Add", "Mul") or not (whole or scales):
        raise Unsupported(f"shapes {list(full_shape(a))} and {list(full_shape(b))} in floats")
    kind = OpType.add_f32 if op == "Add" else OpType.mul_f32
    e.op(kind, [e.as_real(a), e.as_real(b)], e.put(unit.out, None), name)


def _with_constant(e: Emitter, unit: Unit, x: ir.Value, numbers: np.ndarray, swapped: bool) -> None:
    """x and a constant per channel (or one for all): a convolution of one weight per channel."""
    sizes, op = full_shape(x), unit.node.op_type
    full = numbers.astype(np.float32).reshape((1,) * (len(sizes) - numbers.ndim) + numbers.shape)
    per_channel = full.ndim == len(sizes) and all(d == 1 for i, d in enumerate(full.shape) if i != 1)
    if not per_channel or full_shape(unit.out) != sizes:
        raise Unsupported("a constant of more than one number per channel")
    c = sizes[1]
    values = np.broadcast_to(full.reshape(-1), (c,)).astype(np.float32)
    factor, offset = np.ones(c, np.float32), np.zeros(c, np.float32)
    if op == "Add" or (op == "Sub" and not swapped):
        offset = values if op == "Add" else -values
    elif op == "Sub":
        factor, offset = -factor, values
    elif op == "Mul" or (op == "Div" and not swapped):
        factor = values if op == "Mul" else (1 / values).astype(np.float32)
    else:
        raise Unsupported("a constant divided by a tensor")
    e.op(
        OpType.conv_f32, [e.as_real(x)], e.put(unit.out, None), str(unit.out.name), group=c,
        constants=(factor, offset),
    )  # fmt: skip


def table(e: Emitter, unit: Unit) -> None:
    """Activations alone."""
    source, name = unit.pre, str(unit.out.name)
    before = quant(source)
    if not unit.integer or before is None:
        act, parameters = real_act(unit.stages[0])
        target = e.put(unit.out, None)
        e.op(OpType.unary_f32, [e.as_real(source)], target, name, act=act, scalars=(0.0, 0.0, *parameters))
    elif quant(unit.out) is None:  # real numbers from here on
        numbers = pointwise.table(before, unit.stages, None)
        e.op(OpType.dequantize, [e.as_codes(source)], e.put(unit.out, None), name, constants=(numbers,))
    else:
        tensor = e.as_codes(source)
        target, theirs = e.out_codes(unit)
        found = pointwise.table(before, unit.stages, theirs)
        e.op(OpType.table, [tensor], target, name, constants=(found,))


def max_pool(e: Emitter, unit: Unit) -> None:
    x, name = first(unit), str(unit.out.name)
    if any(v.uses() for v in unit.node.outputs[1:]):
        raise Unsupported("the Indices of a MaxPool")
    geometry = _pool_window(unit, x)
    if not unit.integer:
        e.op(OpType.max_pool_f32, [e.as_real(x)], e.put(unit.out, None), name, **geometry.options())
        return
    before = quant(x)
    assert before is not None
    tensor = e.as_codes(x)
    chained = _chained(e, x, geometry)
    if chained is not None:
        tensor, geometry = chained
    target, constants = moved(e, unit, before)
    e.op(OpType.max_pool, [tensor], target, name, constants=constants, **geometry.options())
    if not constants:
        e.pools[x, geometry if chained is None else _pool_window(unit, x)] = target


def _chained(e: Emitter, x: ir.Value, wanted: Window) -> tuple[int, Window] | None:
    """A smaller pool of the same picture that the wanted one can go on from: windows of a and b in turn are one of
    a + b - 1."""
    best = None
    for (source, done), tensor in e.pools.items():
        if source is not x or not _same_size(done) or not _same_size(wanted):
            continue
        rest = [w - d + 1 for w, d in zip(wanted.kernel, done.kernel, strict=True)]
        if all(r >= 2 and r % 2 for r in rest) and (best is None or rest[0] < best[1].kernel[0]):
            pads = (rest[0] // 2, rest[1] // 2)
            best = tensor, Window((rest[0], rest[1]), pad=(*pads, *pads))
    return best


def _same_size(w: Window) -> bool:
    """Odd, centred, of stride 1."""
    half = tuple(k // 2 for k in w.kernel)
    return all(k % 2 for k in w.kernel) and w.stride == w.dilation == (1, 1) and w.pad == (*half, *half)


def _pool_window(unit: Unit, x: ir.Value) -> Window:
    node, sizes = unit.node, full_shape(x)
    if node.op_type.startswith("Global") or node.op_type == "ReduceMean":
        _, h, w, _ = picture(sizes)
        return Window((h, w))
    return window(node, ints(node, "kernel_shape", ()), sizes, full_shape(unit.pre))


def average_pool(e: Emitter, unit: Unit) -> None:
    node, x, name = unit.node, first(unit), str(unit.out.name)
    if node.op_type == "ReduceMean":
        _check_reduced(node, x)
    geometry = _pool_window(unit, x)
    counts = integer(node, "count_include_pad", 0)
    given = ints(node, "pads", (0, 0, 0, 0))
    if counts and any(
        a > b for a, b in zip(geometry.pad, given, strict=False)
    ):  # the pool ends where ONNX rounds up
        raise Unsupported("AveragePool that counts pads beyond those stated")
    if geometry.dilation != (1, 1):
        raise Unsupported("AveragePool with dilations")
    sizes = picture_of(x)
    out = geometry_out(sizes, geometry)
    if not unit.integer:
        if counts and any(geometry.pad):
            raise Unsupported("AveragePool in floats that counts pads")
        target = e.put(unit.out, None)
        target = target if e.made.tensors[target].shape == out else e.seen_as(target, out)
        e.op(OpType.avg_pool_f32, [e.as_real(x)], target, name, **geometry.options())
        return
    tensor = e.as_codes(x)
    target, theirs = e.out_codes(unit)
    target = target if e.made.tensors[target].shape == out else e.seen_as(target, out)
    factor = e.made.tensors[tensor].scale / float(pointwise.scale_zero(theirs)[0])
    e.op(OpType.avg_pool, [tensor], target, name, ints=(counts,), scalars=(factor,), **geometry.options())


def geometry_out(sizes: tuple[int, int, int, int], w: Window) -> tuple[int, int, int, int]:
    n, height, width, c = sizes
    rows, columns = (
        (size + w.pad[i] + w.pad[i + 2] - w.dilation[i] * (w.kernel[i] - 1) - 1) // w.stride[i] + 1
        for i, size in enumerate((height, width))
    )
    return n, rows, columns, c


def _check_reduced(node: ir.Node, x: ir.Value) -> None:
    rank = len(full_shape(x))
    axes = ints(node, "axes", ())
    if not axes and len(node.inputs) > 1:
        found = constant(node.inputs[1])
        axes = () if found is None else tuple(int(a) for a in found.reshape(-1))
    if rank != 4 or sorted(a % rank for a in axes) != [2, 3]:
        raise Unsupported("ReduceMean over other than height and width")


def resize(e: Emitter, unit: Unit) -> None:
    node, x, name = unit.node, first(unit), str(unit.out.name)
    before, after = full_shape(x), full_shape(unit.pre)
    if len(before) != 4 or before[:2] != after[:2]:
        raise Unsupported("Resize of other than height and width of a picture")
    if integer(node, "antialias", 0):
        raise Unsupported("Resize with antialias")
    kind = mode(node)
    if kind not in ("nearest", "linear"):
        raise Unsupported(f"Resize of mode {kind}")
    params = quant(x)
    if kind == "nearest":
        chosen: list[np.ndarray | None] = [nearest(node, axis).astype(np.int32) for axis in (2, 3)]
        if not unit.integer or params is None:
            e.op(OpType.nearest, [e.as_real(x)], e.put(unit.out, None), name, constants=chosen)
            return
        tensor = e.as_codes(x)
        target, constants = moved(e, unit, params)
        e.op(OpType.nearest, [tensor], target, name, constants=[*chosen, *constants])
        return
    weights: list[np.ndarray] = []
    for axis in (2, 3):
        where = np.clip(positions(node, axis), 0, before[axis] - 1)
        low = np.floor(where).astype(np.int32)
        high = np.minimum(low + 1, before[axis] - 1).astype(np.int32)
        weights += [np.stack([low, high], axis=1), (where - low).astype(np.float32)]
    if not unit.integer:
        e.op(OpType.bilinear, [e.as_real(x)], e.put(unit.out, None), name, scalars=(1.0,), constants=weights)
        return
    tensor = e.as_codes(x)
    target, theirs = e.out_codes(unit)
    factor = e.made.tensors[tensor].scale / float(pointwise.scale_zero(theirs)[0])
    e.op(OpType.bilinear, [tensor], target, name, scalars=(factor,), constants=weights)


def softmax(e: Emitter, unit: Unit) -> None:
    x = first(unit)
    if integer(unit.node, "axis", -1) % len(full_shape(x)) != 1:
        raise Unsupported("Softmax over other than channels")
    e.op(OpType.softmax_f32, [e.as_real(x)], e.put(unit.out, None), str(unit.out.name))


HANDLERS: dict[str, Callable[[Emitter, Unit], None]] = {
    **products.HANDLERS,
    **channels.HANDLERS,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), binary),
    "Table": table,
    **dict.fromkeys(("MaxPool", "GlobalMaxPool"), max_pool),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean"), average_pool),
    "Resize": resize,
    "Softmax": softmax,
}
"""Kind of unit -> what writes it."""
