"""Sums of products: convolutions, transposed convolutions, matrix products; and pooling, which slides alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.litert.emitter import Emitter
from edgekit.backends.litert.layout import NHWC, plain, stored
from edgekit.backends.litert.plan import Unit, full_shape
from edgekit.backends.lowering import Unsupported
from edgekit.passes.graph import constant, integer, ints, number
from edgekit.quant.annotate import quant
from edgekit.spec import DType, QuantParams

SAME, VALID = 0, 1
"""schema.Padding"""

INT32_MAX = 2**31 - 1

Pads = tuple[tuple[int, int], tuple[int, int]]
"""((top, bottom), (left, right))"""


def same_pads(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """What `SAME` pads before and after (tflite/kernels/padding.h)."""
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def window(node: ir.Node, kernel: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], Pads]:
    """(strides, dilations, pads) of a node that slides a window over H and W; pads cover exactly
    what the output needs (`ceil_mode`, remainders that no window reaches)."""
    strides, dilations = ints(node, "strides", (1, 1)), ints(node, "dilations", (1, 1))
    value = node.inputs[0]
    assert value is not None
    size, out = full_shape(value)[2:], full_shape(node.outputs[0])[2:]
    auto = node.attributes.get("auto_pad")
    mode = "NOTSET" if auto is None else auto.as_string()
    given = ints(node, "pads", (0, 0, 0, 0))
    pads = []
    for i in range(2):
        before = given[i]
        reach = (out[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
        if mode.startswith("SAME"):
            total = max(reach - size[i], 0)
            before = total // 2 if mode == "SAME_UPPER" else total - total // 2
        elif mode == "VALID":
            before = 0
        pads.append((before, reach - size[i] - before))  # after < 0: the last rows are not read
    return strides, dilations, (pads[0], pads[1])


def padding(
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Pads,
) -> int | None:
    """SAME or VALID where one of them means `pads`, else None."""
    if all(before == 0 and after <= 0 for before, after in pads):
        return VALID
    same = tuple(same_pads(n, k, s, d) for n, k, s, d in zip(size, kernel, strides, dilations, strict=True))
    outs = [
        (n + b + a - (k - 1) * d - 1) // s + 1
        for n, k, s, d, (b, a) in zip(size, kernel, strides, dilations, pads, strict=True)
    ]
    whole = [math.ceil(n / s) for n, s in zip(size, strides, strict=True)]
    fits = all(b == sb and max(a, 0) == sa for (b, a), (sb, sa) in zip(pads, same, strict=True))
    return SAME if fits and outs == whole else None


def pad_picture(e: Emitter, source: int, shape: Sequence[int], pads: Pads, params: QuantParams | None) -> int:
    """Zeros (the code of 0) around an NHWC tensor of `shape`."""
    rows, columns = ((before, max(after, 0)) for before, after in pads)
    n, h, w, c = shape
    target = e.temp((n, h + sum(rows), w + sum(columns), c), params)
    widths = e.ints([[0, 0], list(rows), list(columns), [0, 0]])
    e.op("PAD", [source, widths], [target], "PadOptions", version=1 if params is None else 2)
    return target


MAX_PAIRED = 4


def pairs_columns(unit: Unit) -> bool:
    """A first layer in integers: few channels, and windows that step by two columns.

    Kernels take channels in fours or eights, so that three cost as much as four or eight. Two columns
    are read as one of twice the channels, which is the same memory by another shape, and the filter
    gets zeros where its windows begin or end within such a pair.
    """
    if unit.op != "Conv" or not unit.integer or integer(unit.node, "group", 1) != 1:
        return False
    value = unit.node.inputs[0]
    assert value is not None
    shape = full_shape(value)
    step, dilation = ints(unit.node, "strides", (1, 1)), ints(unit.node, "dilations", (1, 1))
    return (
        len(shape) == 4
        and shape[1] <= MAX_PAIRED
        and shape[3] % 2 == 0
        and step[-1] == 2
        and dilation[-1] == 1
    )


def paired(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """[n, h, w, c] with two columns as one."""
    n, h, w, c = shape
    return n, h, w // 2, 2 * c


def pair_filter(data: np.ndarray, left: int) -> tuple[np.ndarray, int]:
    """Filter [out, kh, kw, c] for pairs of columns, and its padding on the left, in pairs."""
    pairs = math.ceil(left / 2)
    first = 2 * pairs - left
    count, kh, kw, c = data.shape
    width = math.ceil((first + kw) / 2)
    wide = np.zeros((count, kh, 2 * width, c), data.dtype)
    wide[:, :, first : first + kw] = data
    return wide.reshape(count, kh, width, 2 * c), pairs


def weights(
    e: Emitter,
    unit: Unit,
    value: ir.Value,
    data: np.ndarray,
    axis: int,
    scales: np.ndarray | None,
) -> tuple[int, np.ndarray | None]:
    """A filter, already in the file's layout with output channels on `axis`: (tensor, its scales if codes).

    In integer units codes of the annotated scales; in `dynamic` payloads codes of min-max scales.
    """
    if not unit.integer and not e.dynamic:
        return e.floats(data.astype(np.float32), str(value.name)), None
    rest = tuple(i for i in range(data.ndim) if i != axis)
    if scales is None:
        largest = np.abs(data).max(axis=rest)
        scales = np.where(largest > 0, largest / 127, 1.0)
    scales = np.broadcast_to(np.asarray(scales, np.float32), (data.shape[axis],)).astype(np.float32)
    by_channel = scales.reshape([-1 if i == axis else 1 for i in range(data.ndim)])
    codes = np.clip(np.rint(data / by_channel), -127, 127).astype(np.int8)
    params = QuantParams(DType.int8, tuple(map(float, scales)), (0,) * len(scales), axis)
    return e.writer.constant(codes, str(value.name), params), scales


def bias(e: Emitter, unit: Unit, count: int, value: ir.Value | None, scales: np.ndarray | None) -> int:
    """The bias: int32 at scale(input) * scale(weight) in integer units, else float32."""
    data = np.zeros(count, np.float32) if value is None else constant(value)
    if data is None:
        raise Unsupported("a bias that is computed")
    data = np.broadcast_to(data.reshape(-1), (count,))
    if not unit.integer:
        return e.writer.constant(np.ascontiguousarray(data, np.float32))
    x = unit.data()[0]
    x = e.chosen[x][0] if x in e.chosen else x
    assert scales is not None
    product = np.float64(e.plan.params[x].scale[0]) * scales.astype(np.float64)
    codes = np.clip(np.rint(data / product), -INT32_MAX, INT32_MAX).astype(np.int32)
    scale = tuple(float(np.float32(s)) for s in product)
    params = QuantParams(DType.int32, scale, (0,) * count, 0)
    return e.writer.constant(codes, "" if value is None else str(value.name), params)


def annotated_scales(unit: Unit, value: ir.Value) -> np.ndarray | None:
    params = quant(value)
    if not unit.integer or params is None:
        return None
    if any(params.zero_point):
        raise Unsupported("a weight whose zero point is not 0")
    return np.array(params.scale, np.float32)


def filter_of(unit: Unit) -> tuple[ir.Value, np.ndarray]:
    value = unit.node.inputs[1]
    data = constant(value)
    if value is None or data is None:
        raise Unsupported("a weight that is computed")
    return value, data


def conv(e: Emitter, unit: Unit) -> None:
    value, data = filter_of(unit)
    x = unit.node.inputs[0]
    assert x is not None
    if data.ndim != 4:
        raise Unsupported(f"{data.ndim - 2}-D convolution")
    group = integer(unit.node, "group", 1)
    count = data.shape[0]
    strides, dilations, pads = window(unit.node, data.shape[2:])
    if x in e.chosen:  # reads every n-th channel: all are read, with zeros for the others
        whole, start, step = e.chosen[x]
        spread = np.zeros((count, full_shape(whole)[1], *data.shape[2:]), data.dtype)
        spread[:, start::step] = data
        x, data = whole, spread
    params = e.params(unit, x)
    channels = full_shape(x)[1]
    shape = stored(full_shape(x), NHWC)
    scales = annotated_scales(unit, value)
    depthwise = group == channels and group > 1
    arranged = np.transpose(data[:, 0], (1, 2, 0))[None] if depthwise else np.transpose(data, (0, 2, 3, 1))
    if pairs_columns(unit):
        arranged, left = pair_filter(arranged, pads[1][0])
        if x in e.in_pairs:
            source = e.in_pairs[x]
        else:
            source = e.temp(paired(shape), params)
            e.reshape(e.read(x, NHWC, params), source, paired(shape))
        shape, strides = paired(shape), (strides[0], 1)
        reach = full_shape(unit.outputs[0])[3] - 1 + arranged.shape[2]
        pads = (pads[0], (left, reach - shape[2] - left))
    else:
        source = e.read(x, NHWC, params)
    mode = padding(shape[1:3], arranged.shape[1:3], strides, dilations, pads)
    if mode is None:
        source, mode = pad_picture(e, source, shape, pads, params), VALID
    slide = {
        "padding": mode,
        "strideH": strides[0],
        "strideW": strides[1],
        "dilationHFactor": dilations[0],
        "dilationWFactor": dilations[1],
        "fusedActivationFunction": e.act(unit),
    }
    if depthwise:
        # hybrid depthwise kernels are not in XNNPACK: a dynamic payload keeps these few weights in float
        dynamic, half = e.dynamic, e.half
        e.dynamic, e.half = False, half or dynamic
        tensor, scale = weights(e, unit, value, arranged, 3, scales)
        e.dynamic, e.half = dynamic, half
        name, options = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        slide["depthMultiplier"] = count // channels
        version = 3 if unit.integer else (1 if dilations == (1, 1) else 2)
    else:
        tensor, scale = weights(e, unit, value, arranged, 0, scales)
        name, options = "CONV_2D", "Conv2DOptions"
        version = 3 if unit.integer else (5 if e.dynamic else 1)
        version = max(version, 6) if group > 1 else version
    offset = bias(e, unit, count, unit.input(2), scale)
    e.op(name, [source, tensor, offset], [e.out(unit, NHWC)], options, slide, version)


def conv_transpose(e: Emitter, unit: Unit) -> None:
    """TRANSPOSE_CONV knows its output's size and pads SAME or VALID; other pads are cut from VALID."""
    node = unit.node
    value, data = filter_of(unit)
    x = node.inputs[0]
    assert x is not None
    if data.ndim != 4 or any(d != 1 for d in ints(node, "dilations", (1, 1))):
        raise Unsupported("a transposed convolution that is dilated or not 2-D")
    group = integer(node, "group", 1)
    per_group = data.shape[1]
    kh, kw = data.shape[2:]
    # [in, out / group, kh, kw] -> [out, kh, kw, in]; groups become blocks of a dense filter
    inputs = data.shape[0] // group
    dense = np.zeros((group * per_group, kh, kw, data.shape[0]), np.float32)
    for g in range(group):
        part = np.transpose(data[g * inputs : (g + 1) * inputs], (1, 2, 3, 0))
        dense[g * per_group : (g + 1) * per_group, :, :, g * inputs : (g + 1) * inputs] = part
    scales = annotated_scales(unit, value)
    if scales is not None and group > 1 and len(scales) == per_group:
        scales = np.tile(scales, group)
    strides = ints(node, "strides", (1, 1))
    size, out = full_shape(x)[2:], full_shape(unit.outputs[0])[2:]
    given = ints(node, "pads", (0, 0, 0, 0))
    auto = node.attributes.get("auto_pad")
    full = [(n - 1) * s + k for n, s, k in zip(size, strides, (kh, kw), strict=True)]
    if auto is not None and auto.as_string() not in ("NOTSET", "VALID"):
        total = [max(f - o, 0) for f, o in zip(full, out, strict=True)]
        upper = auto.as_string() == "SAME_UPPER"
        before = [t // 2 if upper else t - t // 2 for t in total]
    else:
        before = [given[0], given[1]]
    mode, cut = VALID, False
    if full != list(out):
        halves = [max(f - o, 0) // 2 for f, o in zip(full, out, strict=True)]
        whole = [math.ceil(o / s) for o, s in zip(out, strides, strict=True)]
        if halves == before and list(size) == whole and all(f >= o for f, o in zip(full, out, strict=True)):
            mode = SAME
        elif all(b + o <= f for b, o, f in zip(before, out, full, strict=True)):
            cut = True
        else:
            raise Unsupported("a transposed convolution whose output reaches past its last window")
    dynamic, e.dynamic = e.dynamic, False  # no hybrid kernel
    tensor, scale = weights(e, unit, value, dense, 0, scales)
    e.dynamic = dynamic
    offset = bias(e, unit, dense.shape[0], unit.input(2), scale)
    source = e.read(x, NHWC, e.params(unit, x))
    shape = stored(full_shape(unit.outputs[0]), NHWC)
    params = e.plan.params[unit.outputs[0]] if unit.integer else None
    if cut:
        shape = (shape[0], full[0], full[1], shape[3])
        target = e.temp(shape, params)
    else:
        target = e.out(unit, NHWC)
    act = {"fusedActivationFunction": e.act(unit)}
    slide = {"padding": mode, "strideH": strides[0], "strideW": strides[1], **act}
    version = 3 if unit.act == "NONE" else 4
    e.op(
        "TRANSPOSE_CONV",
        [e.ints(shape), tensor, source, offset],
        [target],
        "TransposeConvOptions",
        slide,
        version,
    )
    if cut:
        size_ = stored(full_shape(unit.outputs[0]), NHWC)
        begin = e.ints([0, *before, 0])
        version = 1 if params is None else 2
        e.op("SLICE", [target, begin, e.ints(size_)], [e.out(unit, NHWC)], "SliceOptions", version=version)


def fully_connected(
    e: Emitter, unit: Unit, x: ir.Value, value: ir.Value, data: np.ndarray, offset: ir.Value | None
) -> None:
    """`data`: [out, in]."""
    rank = len(full_shape(x))
    order = e.row_order.get(x)
    if order is not None:
        data = data[:, order]
    source = e.read(x, plain(rank), e.params(unit, x))
    tensor, scale = weights(e, unit, value, np.ascontiguousarray(data), 0, annotated_scales(unit, value))
    options = {"fusedActivationFunction": e.act(unit), "keepNumDims": rank != 2}
    per_channel = scale is not None and len(scale) > 1
    version = 12 if per_channel else 5 if rank != 2 else 4 if unit.integer else 1
    inputs = [source, tensor, bias(e, unit, data.shape[0], offset, scale)]
    target = e.out(unit, plain(len(full_shape(unit.outputs[0]))))
    e.op("FULLY_CONNECTED", inputs, [target], "FullyConnectedOptions", options, version)


def gemm(e: Emitter, unit: Unit) -> None:
    node = unit.node
    a, b = node.inputs[0], node.inputs[1]
    data = constant(b)
    assert a is not None and b is not None
    alpha, beta = number(node, "alpha", 1.0), number(node, "beta", 1.0)
    offset = unit.input(2)
    offset_data = None if offset is None else constant(offset)
    plain_offset = offset is None or (
        offset_data is not None and offset_data.size in (1, full_shape(unit.outputs[0])[-1]) and beta == 1
    )
    if data is None or alpha != 1 or integer(node, "transA", 0) or not plain_offset:
        raise Unsupported("Gemm other than x @ W + b with constant W and b")
    if not integer(node, "transB", 0):
        data = data.T
    fully_connected(e, unit, a, b, data, offset)


def matmul(e: Emitter, unit: Unit) -> None:
    a, b = unit.node.inputs
    assert a is not None and b is not None
    data = constant(b)
    if data is not None and data.ndim == 2:
        fully_connected(e, unit, a, b, data.T, None)
        return
    if min(len(full_shape(a)), len(full_shape(b))) < 2:
        raise Unsupported("MatMul with a vector")
    if unit.act != "NONE":
        raise Unsupported("an activation after a product of two computed matrices")
    tensors = []
    for value in (a, b):
        rank = len(full_shape(value))
        held = constant(value)
        tensors.append(e.read(value, plain(rank)) if held is None else e.floats(held, str(value.name)))
    target = e.out(unit, plain(len(full_shape(unit.outputs[0]))))
    options = {"adjX": False, "adjY": False}
    e.op("BATCH_MATMUL", tensors, [target], "BatchMatMulOptions", options)


def _pool(
    e: Emitter,
    unit: Unit,
    name: str,
    source: int,
    mode: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    target: int,
) -> None:
    options = {
        "padding": mode,
        "strideH": strides[0],
        "strideW": strides[1],
        "filterHeight": kernel[0],
        "filterWidth": kernel[1],
        "fusedActivationFunction": 0,
    }
    e.op(name, [source], [target], "Pool2DOptions", options, version=2 if unit.integer else 1)


def max_pool(e: Emitter, unit: Unit) -> None:
    node = unit.node
    kernel = ints(node, "kernel_shape", ())
    x = node.inputs[0]
    assert x is not None
    if len(kernel) != 2 or any(d != 1 for d in ints(node, "dilations", (1, 1))) or len(node.outputs) > 1:
        raise Unsupported("MaxPool with dilations, indices or other than 2 axes")
    strides, dilations, pads = window(node, kernel)
    params = e.params(unit, x)
    source, shape = e.read(x, NHWC, params), stored(full_shape(x), NHWC)
    mode = padding(shape[1:3], kernel, strides, dilations, pads)
    if mode is None and (lowest_code(params) or (params is None and not_negative(x))):
        source, mode = pad_picture(e, source, shape, pads, params), VALID
    elif mode is None:
        (top, bottom), (left, right) = ((b, max(a, 0)) for b, a in pads)
        target = e.temp((shape[0], shape[1] + top + bottom, shape[2] + left + right, shape[3]), params)
        widths = e.ints([[0, 0], [top, bottom], [left, right], [0, 0]])
        low = (
            e.writer.constant(np.array([np.finfo(np.float32).min], np.float32))
            if params is None
            else e.writer.constant(np.array([-128], np.int8), "", params)
        )
        version = 1 if params is None else 2
        e.op("PADV2", [source, widths, low], [target], "PadV2Options", version=version)
        source, mode = target, VALID
    _pool(e, unit, "MAX_POOL_2D", source, mode, kernel, strides, e.out(unit, NHWC))


def lowest_code(params: QuantParams | None) -> bool:
    """Zero is the smallest value that the codes can say, so that padding with it changes no maximum."""
    return params is not None and params.zero_point[0] == -128


def not_negative(value: ir.Value) -> bool:
    """The value is a result of an operator that gives no negative numbers."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type in ("Relu", "Sigmoid", "Abs", "Exp", "Softmax", "HardSigmoid"):
        return True
    if node.op_type == "Clip":
        low = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and float(low.reshape(-1)[0]) >= 0
    return node.op_type == "MaxPool" and node.inputs[0] is not None and not_negative(node.inputs[0])


def average_pool(e: Emitter, unit: Unit) -> None:
    node = unit.node
    kernel = ints(node, "kernel_shape", ())
    x = node.inputs[0]
    assert x is not None
    if len(kernel) != 2 or any(d != 1 for d in ints(node, "dilations", (1, 1))):
        raise Unsupported("AveragePool with dilations or other than 2 axes")
    strides, dilations, pads = window(node, kernel)
    params = e.params(unit, x)
    source, shape = e.read(x, NHWC, params), stored(full_shape(x), NHWC)
    mode = padding(shape[1:3], kernel, strides, dilations, pads)
    counts_pads = bool(integer(node, "count_include_pad", 0))
    given = ints(node, "pads", (0, 0, 0, 0))
    if unit.integer:  # no such kernel in XNNPACK: a depthwise convolution with equal weights is one
        c, area = shape[3], kernel[0] * kernel[1]
        scale = float(np.float32(1 / (127 * area)))
        filter_params = QuantParams(DType.int8, (scale,) * c, (0,) * c, 3)
        tensor = e.writer.constant(np.full((1, *kernel, c), 127, np.int8), "", filter_params)
        assert params is not None
        bias_params = QuantParams(DType.int32, (float(np.float32(params.scale[0] * scale)),) * c, (0,) * c, 0)
        offset = e.writer.constant(np.zeros(c, np.int32), "", bias_params)
        slide: dict[str, Any] = {"padding": VALID, "strideH": strides[0], "strideW": strides[1]}
        slide |= {
            "dilationHFactor": 1,
            "dilationWFactor": 1,
            "fusedActivationFunction": 0,
            "depthMultiplier": 1,
        }
        target = e.out(unit, NHWC)
        e.op("DEPTHWISE_CONV_2D", [source, tensor, offset], [target], "DepthwiseConv2DOptions", slide, 3)
        return
    if mode is not None and (mode == VALID or not counts_pads):
        _pool(e, unit, "AVERAGE_POOL_2D", source, mode, kernel, strides, e.out(unit, NHWC))
        return
    # pads that count as zeros, or that SAME cannot say: pool the padded picture, then set the divisor right
    size, out = shape[1:3], full_shape(unit.outputs[0])[2:]
    real = [
        _covered(size[i], kernel[i], strides[i], pads[i][0], out[i], (given[i], given[i + 2]), counts_pads)
        for i in range(2)
    ]
    factor = (kernel[0] * kernel[1] / np.outer(*real)).astype(np.float32)
    source = pad_picture(e, source, shape, pads, params)
    if (factor == 1).all():
        _pool(e, unit, "AVERAGE_POOL_2D", source, VALID, kernel, strides, e.out(unit, NHWC))
        return
    pooled = e.temp((shape[0], *out, shape[3]), None)
    _pool(e, unit, "AVERAGE_POOL_2D", source, VALID, kernel, strides, pooled)
    divisor = e.writer.constant(factor[None, :, :, None])
    e.op("MUL", [pooled, divisor], [e.out(unit, NHWC)], "MulOptions")


def _covered(
    size: int, kernel: int, stride: int, before: int, out: int, given: tuple[int, int], counts: bool
) -> np.ndarray:
    """How many elements each window averages along one axis."""
    start = np.arange(out) * stride - before
    low, high = (-given[0], size + given[1]) if counts else (0, size)
    result: np.ndarray = np.minimum(start + kernel, high) - np.maximum(start, low)
    return result


HANDLERS: dict[str, Callable[[Emitter, Unit], None]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
}
