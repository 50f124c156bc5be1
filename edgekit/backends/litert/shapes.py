"""Operators that move, choose or reduce values: axes are those of the graph, mapped to where they lie in the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.backends.litert import layout
from edgekit.backends.litert.elementwise import rename, unary_copy
from edgekit.backends.litert.emitter import Emitter, quantize_constant
from edgekit.backends.litert.layout import NHWC, plain, stored
from edgekit.backends.litert.plan import Unit, full_shape
from edgekit.backends.lowering import Unsupported
from edgekit.passes.graph import constant, integer, ints, scalar
from edgekit.spec import DType, QuantParams

MAX_CONCAT = 5
MAX_SPLIT = 4
"""Tensors that XNNPACK joins or splits in one operator."""


def first(unit: Unit) -> ir.Value:
    value = unit.node.inputs[0]
    assert value is not None
    return value


def version(unit: Unit, real: int = 1) -> int:
    return 2 if unit.integer else real


def reshape(e: Emitter, unit: Unit) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: free, or after a transpose where merged axes do not lie together.

    A picture that is flattened for a matrix product stays as it lies: the product's weights are reordered.
    """
    x, out = first(unit), unit.outputs[0]
    before, after = full_shape(x), full_shape(out)
    needed, result = layout.reshape(before, after, e.order[x])
    params = e.params(unit, x)
    if needed != e.order[x] and _only_products(e, out) and len(after) == 2 and after[0] == 1:
        have = e.order[x]
        places = np.arange(int(np.prod(before))).reshape(before)
        e.row_order[out] = np.transpose(places, have).reshape(-1)
        needed, result = have, plain(2)
    source = e.read(x, needed, params)
    e.reshape(source, e.out(unit, result), stored(after, result))


def _only_products(e: Emitter, value: ir.Value) -> bool:
    readers = e.plan.readers.get(value, [])
    return (
        bool(readers)
        and not value.is_graph_output()
        and all(
            r.op in ("Gemm", "MatMul")
            and r.node.inputs[0] is value
            and constant(r.node.inputs[1]) is not None
            and not integer(r.node, "transA", 0)
            for r in readers
        )
    )


def transpose(e: Emitter, unit: Unit) -> None:
    """Nothing moves here: the value is known by another order (see layout)."""
    x = first(unit)
    rank = len(full_shape(x))
    perm = ints(unit.node, "perm", tuple(reversed(range(rank))))
    order = layout.transposed(e.order[x], perm)
    rename(e, unit, x, order)


def concat(e: Emitter, unit: Unit) -> None:
    out = unit.outputs[0]
    rank = len(full_shape(out))
    inputs = [v for v in unit.node.inputs if v is not None]
    computed = [v for v in inputs if constant(v) is None]
    votes = [e.order[v] for v in computed]
    order = max(votes, key=votes.count) if votes else layout.picture(rank)
    axis = order.index(integer(unit.node, "axis", 0) % rank)
    params = e.plan.params[out] if unit.integer else None
    tensors = []
    for value in inputs:
        data = constant(value)
        if data is None:
            tensors.append(e.read(value, order, params))
        elif params is None:
            tensors.append(e.floats(layout.arrange(data, order)))
        else:
            tensors.append(
                e.writer.constant(quantize_constant(layout.arrange(data, order), params)[1], "", params)
            )
    join(e, tensors, [stored(full_shape(v), order) for v in inputs], axis, params, lambda: e.out(unit, order))


def join(
    e: Emitter,
    tensors: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    axis: int,
    params: QuantParams | None,
    out: Callable[[], int],
) -> None:
    """Concatenate, MAX_CONCAT at a time."""
    tensors, shapes = list(tensors), list(shapes)
    real = 1 if params is None else 2
    options = {"axis": axis, "fusedActivationFunction": 0}
    while len(tensors) > MAX_CONCAT:
        shape = list(shapes[0])
        shape[axis] = sum(s[axis] for s in shapes[:MAX_CONCAT])
        target = e.temp(shape, params)
        e.op("CONCATENATION", tensors[:MAX_CONCAT], [target], "ConcatenationOptions", options, real)
        tensors, shapes = [target, *tensors[MAX_CONCAT:]], [tuple(shape), *shapes[MAX_CONCAT:]]
    e.op("CONCATENATION", tensors, [out()], "ConcatenationOptions", options, real)


def split(e: Emitter, unit: Unit) -> None:
    x = first(unit)
    shape, order = full_shape(x), e.order[x]
    axis = integer(unit.node, "axis", 0) % len(shape)
    sizes = [full_shape(v)[axis] for v in unit.outputs]
    source = e.read(x, order, e.params(unit, x))
    used = [bool(tuple(v.uses())) or v.is_graph_output() for v in unit.outputs]
    if len(sizes) <= MAX_SPLIT and len(set(sizes)) == 1 and all(used):
        targets = [e.out(unit, order, i) for i in range(len(sizes))]
        where = e.writer.constant(np.array(order.index(axis), np.int32))
        e.op("SPLIT", [where, source], targets, "SplitOptions", {"numSplits": len(sizes)}, version(unit))
        return
    start = 0
    for i, size in enumerate(sizes):
        begin = [0] * len(shape)
        begin[order.index(axis)] = start
        start += size
        extent = stored(full_shape(unit.outputs[i]), order)
        if used[i]:
            e.op(
                "SLICE", [source, e.ints(begin), e.ints(extent)], [e.out(unit, order, i)], "SliceOptions",
                version=version(unit),
            )  # fmt: skip


def slice_(e: Emitter, unit: Unit) -> None:
    node, x = unit.node, first(unit)
    shape, order = full_shape(x), e.order[x]
    parts = [constant(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] is not None else None for i in range(1, 5)]  # fmt: skip
    starts, ends, axes, steps = parts
    if starts is None or ends is None:
        raise Unsupported("Slice with computed bounds")
    names = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    begin, end, step = [0] * len(shape), list(shape), [1] * len(shape)
    for axis, a, b, s in zip(names, starts.tolist(), ends.tolist(), strides, strict=True):
        if s < 1:
            raise Unsupported("Slice with a negative step")
        begin[axis], end[axis], _ = slice(a, b, s).indices(shape[axis])
        step[axis] = s
    if (
        order == NHWC
        and step[0] == step[2] == step[3] == 1
        and begin[1] < step[1]
        and shape[1] % step[1] == 0
    ):
        whole = begin[2:] == [0, 0] and end[2:] == list(shape[2:]) and end[1] - begin[1] > shape[1] - step[1]
        if step[1] > 1 and whole:
            every(e, unit, begin[1], step[1])
            return
    source = e.read(x, order, e.params(unit, x))
    if all(s == 1 for s in step):
        cut(e, source, stored(begin, order), stored(full_shape(unit.outputs[0]), order), e.out(unit, order), version(unit))  # fmt: skip
        return
    masks = ("beginMask", "endMask", "ellipsisMask", "newAxisMask", "shrinkAxisMask")
    tensors = [source, *(e.ints(stored(v, order)) for v in (begin, end, step))]
    values = dict.fromkeys(masks, 0)
    e.op("STRIDED_SLICE", tensors, [e.out(unit, order)], "StridedSliceOptions", values, version(unit))


def every(e: Emitter, unit: Unit, start: int, step: int) -> None:
    """Every `step`-th channel from `start`: a channel shuffle. XNNPACK has no strided slices.

    In integers the convolution that reads them takes all channels, with zeros for the others, or where
    another operator reads them, a convolution with one weight per output copies them exactly. In floats
    a transpose deals them out.
    """
    x, out = first(unit), unit.outputs[0]
    shape, params = full_shape(x), e.params(unit, x)
    readers = e.plan.readers.get(out, [])
    only = readers[0] if len(readers) == 1 and not out.is_graph_output() else None
    if (
        unit.integer
        and only is not None
        and only.integer
        and only.op == "Conv"
        and integer(only.node, "group", 1) == 1
    ):
        e.chosen[out] = (x, start, step)
        return
    if not unit.integer:
        dealt = e.apart(x, step, params)
        rest = shape[0] * shape[1] * shape[2] * shape[3] // step
        one = e.temp((1, rest), params)
        cut(e, dealt, (start, 0), (1, rest), one, version(unit))
        e.reshape(one, e.out(unit, NHWC), stored(full_shape(out), NHWC))
        return
    assert params is not None
    count = shape[1] // step
    codes = np.zeros((count, 1, 1, shape[1]), np.int8)
    codes[np.arange(count), 0, 0, start + step * np.arange(count)] = 127
    scale = float(np.float32(1 / 127))
    weight = e.writer.constant(codes, "", QuantParams(DType.int8, (scale,) * count, (0,) * count, 0))
    product = float(np.float32(params.scale[0] * scale))
    offset_params = QuantParams(DType.int32, (product,) * count, (0,) * count, 0)
    offset = e.writer.constant(np.zeros(count, np.int32), "", offset_params)
    slide = {
        "padding": 1, "strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1,
        "fusedActivationFunction": 0,
    }  # fmt: skip
    source = e.read(x, NHWC, params)
    e.op("CONV_2D", [source, weight, offset], [e.out(unit, NHWC)], "Conv2DOptions", slide, 3)


def cut(
    e: Emitter, source: int, begin: Sequence[int], size: Sequence[int], target: int, version: int
) -> None:
    e.op("SLICE", [source, e.ints(begin), e.ints(size)], [target], "SliceOptions", version=version)


def gather(e: Emitter, unit: Unit) -> None:
    x, indices = first(unit), constant(unit.node.inputs[1])
    shape, order = full_shape(x), e.order[x]
    axis = integer(unit.node, "axis", 0) % len(shape)
    if indices is None or indices.ndim > 1:
        raise Unsupported("Gather with computed or many-axis indices")
    out = unit.outputs[0]
    chosen = [int(i) % shape[axis] for i in indices.reshape(-1)]
    source = e.read(x, order, e.params(unit, x))
    params = e.plan.params[out] if unit.integer else None
    new_order = order
    size = [len(chosen) if a == axis else d for a, d in enumerate(shape)]
    run = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    if indices.ndim == 0:
        new_order = tuple(a - (a > axis) for a in order if a != axis)
        sliced = e.temp(stored(size, order), params)
        begin = stored([chosen[0] if a == axis else 0 for a in range(len(shape))], order)
        cut(e, source, begin, stored(size, order), sliced, version(unit))
        e.reshape(sliced, e.out(unit, new_order), stored(full_shape(out), new_order))
    elif run:
        begin = stored([chosen[0] if a == axis else 0 for a in range(len(shape))], order)
        cut(e, source, begin, stored(size, order), e.out(unit, order), version(unit))
    else:
        options = {"axis": order.index(axis), "batchDims": 0}
        e.op(
            "GATHER", [source, e.ints(chosen)], [e.out(unit, order)], "GatherOptions", options, version(unit)
        )


def pad(e: Emitter, unit: Unit) -> None:
    node, x = unit.node, first(unit)
    order, rank = e.order[x], len(full_shape(x))
    widths = constant(node.inputs[1])
    if widths is None or (widths < 0).any():
        raise Unsupported("Pad with computed or negative widths")
    before, after = widths[: len(widths) // 2], widths[len(widths) // 2 :]
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    pairs = [[0, 0] for _ in range(rank)]
    for axis, a, b in zip(range(rank) if axes is None else axes.tolist(), before, after, strict=True):
        pairs[axis] = [int(a), int(b)]
    table = e.ints([pairs[axis] for axis in order])
    mode = node.attributes.get("mode")
    kind = "constant" if mode is None else mode.as_string()
    source = e.read(x, order, e.params(unit, x))
    if kind == "reflect":
        e.op(
            "MIRROR_PAD",
            [source, table],
            [e.out(unit, order)],
            "MirrorPadOptions",
            {"mode": 0},
            version(unit),
        )
    elif kind != "constant":
        raise Unsupported(f"Pad of mode {kind}")
    else:
        given = node.inputs[2] if len(node.inputs) > 2 else None
        value = 0.0 if given is None else scalar(given)
        if value is None:
            raise Unsupported("Pad with a computed value")
        if value == 0:
            e.op("PAD", [source, table], [e.out(unit, order)], "PadOptions", version=version(unit))
        else:
            fill = e.writer.constant(np.array([value], np.float32))
            e.op("PADV2", [source, table, fill], [e.out(unit, order)], "PadV2Options")


def reduce(e: Emitter, unit: Unit) -> None:
    """ReduceMean, ReduceSum, ReduceMax, ReduceMin and the global pools."""
    node, x = unit.node, first(unit)
    shape, order = full_shape(x), e.order[x]
    keep = bool(integer(node, "keepdims", 1))
    if unit.op.startswith("Global"):
        axes = list(range(2, len(shape)))
    else:
        given = node.inputs[1] if len(node.inputs) > 1 else None
        listed = constant(given).tolist() if given is not None and constant(given) is not None else None  # type: ignore[union-attr]
        if given is not None and listed is None:
            raise Unsupported(f"{unit.op} with computed axes")
        listed = list(ints(node, "axes", ())) if listed is None else listed
        if not listed and integer(node, "noop_with_empty_axes", 0):
            unary_copy(e, unit)
            return
        axes = [a % len(shape) for a in listed] or list(range(len(shape)))
    name = {
        "ReduceMean": "MEAN", "GlobalAveragePool": "MEAN", "ReduceSum": "SUM", "ReduceMax": "REDUCE_MAX",
        "GlobalMaxPool": "REDUCE_MAX", "ReduceMin": "REDUCE_MIN",
    }[unit.op]  # fmt: skip
    left = [a for a in range(len(shape)) if a not in axes]
    new_order = order if keep else tuple(left.index(a) for a in order if a in left)
    source = e.read(x, order, e.params(unit, x))
    where = e.ints([order.index(a) for a in axes])
    e.op(name, [source, where], [e.out(unit, new_order)], "ReducerOptions", {"keepDims": keep}, version(unit))


def arg_max(e: Emitter, unit: Unit) -> None:
    from edgekit.backends.litert.writer import schema

    node, x = unit.node, first(unit)
    if integer(node, "select_last_index", 0):
        raise Unsupported("ArgMax of the last index")
    shape, order = full_shape(x), e.order[x]
    axis = integer(node, "axis", 0) % len(shape)
    keep = bool(integer(node, "keepdims", 1))
    source = e.read(x, order)
    where = e.ints([order.index(axis)])
    left = [a for a in range(len(shape)) if a != axis]
    small = tuple(left.index(a) for a in order if a != axis)
    values = {"outputType": schema().TensorType.INT64}
    reduced = stored([shape[a] for a in left], small)
    target = e.temp(reduced, None, np.int64) if keep else e.out(unit, small)
    name, options = ("ARG_MAX", "ArgMaxOptions") if unit.op == "ArgMax" else ("ARG_MIN", "ArgMinOptions")
    e.op(name, [source, where], [target], options, values)
    if keep:
        e.reshape(target, e.out(unit, order), stored(full_shape(unit.outputs[0]), order))


def depth_to_space(e: Emitter, unit: Unit) -> None:
    x, out = first(unit), unit.outputs[0]
    block = integer(unit.node, "blocksize", 1)
    params = e.params(unit, x)
    source = e.read(x, NHWC, params)
    mode = unit.node.attributes.get("mode")
    if mode is not None and mode.as_string() == "CRD":  # channels c * b * b + y * b + x
        n, c, h, w = full_shape(x)
        c //= block * block
        parts = e.temp((n, h, w, c, block, block), params)
        e.reshape(source, parts, (n, h, w, c, block, block))
        moved = e.temp((n, h, block, w, block, c), params)
        perm = e.ints((0, 1, 4, 2, 5, 3))
        e.op("TRANSPOSE", [parts, perm], [moved], "TransposeOptions", version=4)
        e.reshape(moved, e.out(unit, NHWC), stored(full_shape(out), NHWC))
        return
    options = {"blockSize": block}
    e.op("DEPTH_TO_SPACE", [source], [e.out(unit, NHWC)], "DepthToSpaceOptions", options, version(unit))


def space_to_depth(e: Emitter, unit: Unit) -> None:
    x = first(unit)
    source = e.read(x, NHWC, e.params(unit, x))
    options = {"blockSize": integer(unit.node, "blocksize", 1)}
    e.op("SPACE_TO_DEPTH", [source], [e.out(unit, NHWC)], "SpaceToDepthOptions", options, version(unit))


HANDLERS: dict[str, Callable[[Emitter, Unit], None]] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "GlobalAveragePool", "GlobalMaxPool"), reduce
    ),
    **dict.fromkeys(("ArgMax", "ArgMin"), arg_max),
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "Pad": pad,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
