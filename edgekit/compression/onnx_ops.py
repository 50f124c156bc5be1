"""ONNX operators as functions of torch: what `onnx_module` calls for nodes without weights.

An operator is a function (attributes, inputs, sizes) -> outputs. Inputs are tensors, or numpy arrays where the graph
computes sizes and indices; sizes(i) are those of output i as relations to the inputs give them, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Value = Tensor | np.ndarray
Attributes = Mapping[str, Any]
Inputs = list[Any]
Wanted = Callable[[int], "tuple[int, ...] | None"]
Op = Callable[[Attributes, Inputs, Wanted], Any]

OPS: dict[str, Op] = {}
CHECKS: dict[str, Callable[[Attributes], str]] = {}
"""Operator -> why these attributes cannot be had, "" if they can."""


def call(op: str, attributes: Attributes, inputs: Inputs, wanted: Wanted) -> Sequence[Value]:
    """The outputs of one node."""
    if inputs and any(isinstance(v, Tensor) for v in inputs):
        if op in _POINTWISE or op in ("Concat", "Where"):
            like = next(v for v in inputs if isinstance(v, Tensor))
            inputs = [torch.tensor(v, device=like.device) if isinstance(v, np.ndarray) else v for v in inputs]
        found = OPS[op](attributes, inputs, wanted)
    elif op in _HOST:
        found = _HOST[op](attributes, inputs)
    else:
        tensors = [torch.tensor(np.asarray(v)) if v is not None else None for v in inputs]
        found = OPS[op](attributes, tensors, wanted)
        found = tuple(
            v.numpy() if isinstance(v, Tensor) and not v.is_floating_point() else v for v in _tuple(found)
        )
    return _tuple(found)


def _tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def op(*names: str) -> Callable[[Op], Op]:
    def add(function: Op) -> Op:
        OPS.update(dict.fromkeys(names, function))
        return function

    return add


def _ints(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return [int(v) for v in np.asarray(value).reshape(-1)]


def same_pads(
    attributes: Mapping[str, Any], sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[int, ...]:  # fmt: skip
    """(top, left, bottom, right) of auto_pad SAME_*, () where the node says its pads. attributes: values, or onnx_ir's."""
    found = attributes.get("auto_pad", "NOTSET")
    kind = str(getattr(found, "value", found))
    if kind not in ("SAME_UPPER", "SAME_LOWER"):
        return ()
    before, after = [], []
    for size, k, stride, dilation in zip(sizes[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if kind == "SAME_UPPER" else large)
        after.append(large if kind == "SAME_UPPER" else small)
    return (*before, *after)


# ---- one input, one output ----

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Erf": torch.erf, "Exp": torch.exp, "Log": torch.log,
    "Sqrt": torch.sqrt, "Abs": torch.abs, "Neg": torch.neg, "Reciprocal": torch.reciprocal, "Floor": torch.floor,
    "Ceil": torch.ceil, "Round": torch.round, "Softplus": F.softplus, "Mish": F.mish, "HardSwish": F.hardswish,
    "Identity": lambda x: x, "Not": torch.logical_not, "Sin": torch.sin, "Cos": torch.cos,
}  # fmt: skip


def _unary(function: Callable[[Tensor], Tensor]) -> Op:
    return lambda _a, inputs, _w: function(inputs[0])


OPS.update({name: _unary(function) for name, function in _UNARY.items()})
OPS["Dropout"] = lambda _a, inputs, _w: inputs[0]
OPS["LeakyRelu"] = lambda a, i, _w: F.leaky_relu(i[0], a.get("alpha", 0.01))
OPS["Elu"] = lambda a, i, _w: F.elu(i[0], a.get("alpha", 1.0))
OPS["HardSigmoid"] = lambda a, i, _w: (i[0] * a.get("alpha", 0.2) + a.get("beta", 0.5)).clamp(0, 1)
OPS["Gelu"] = lambda a, i, _w: F.gelu(i[0], approximate=a.get("approximate", "none"))
OPS["Softmax"] = lambda a, i, _w: F.softmax(i[0], a.get("axis", -1))
OPS["LogSoftmax"] = lambda a, i, _w: F.log_softmax(i[0], a.get("axis", -1))
OPS["GlobalAveragePool"] = lambda _a, i, _w: i[0].mean(tuple(range(2, i[0].dim())), keepdim=True)
OPS["GlobalMaxPool"] = lambda _a, i, _w: i[0].amax(tuple(range(2, i[0].dim())), keepdim=True)
OPS["Transpose"] = lambda a, i, _w: i[0].permute(a.get("perm", tuple(range(i[0].dim()))[::-1]))


@op("Clip")
def _clip(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    low, high = (inputs[i] if len(inputs) > i else None for i in (1, 2))
    x: Tensor = inputs[0]
    if low is None and high is None:
        return x
    return x.clamp(*(None if v is None else float(v) for v in (low, high)))


@op("Cast")
def _cast(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Any:
    kind = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 11: torch.float64}[
        int(attributes["to"])
    ]
    return inputs[0].to(kind)


CHECKS["Cast"] = lambda a: "" if int(a["to"]) in (1, 6, 7, 9, 11) else f"to type {int(a['to'])}"

# ---- several inputs ----

_POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Pow": torch.pow, "Equal": torch.eq, "Greater": torch.gt,
    "Less": torch.lt, "And": torch.logical_and, "Or": torch.logical_or, "Max": torch.maximum, "Min": torch.minimum,
    "Div": lambda a, b: a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
}  # fmt: skip


def _pointwise(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    def run(_attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
        found: Tensor = inputs[0]
        for other in inputs[1:]:
            found = function(found, other)
        return found

    return run


OPS.update({name: _pointwise(function) for name, function in _POINTWISE.items()})
OPS["Where"] = lambda _a, i, _w: torch.where(i[0].bool(), i[1], i[2])
OPS["Concat"] = lambda a, i, _w: torch.cat(i, a["axis"])
OPS["MatMul"] = lambda _a, i, _w: torch.matmul(i[0], i[1])


@op("Gemm")
def _gemm(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    a = inputs[0].mT if attributes.get("transA", 0) else inputs[0]
    b = inputs[1].mT if attributes.get("transB", 0) else inputs[1]
    found: Tensor = attributes.get("alpha", 1.0) * (a @ b)
    if len(inputs) > 2 and inputs[2] is not None:
        found = found + attributes.get("beta", 1.0) * inputs[2]
    return found


@op("PRelu")
def _prelu(_attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    found: Tensor = torch.relu(inputs[0]) - inputs[1] * torch.relu(-inputs[0])
    return found


@op("LayerNormalization")
def _layer_norm(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    axis = attributes.get("axis", -1) % inputs[0].dim()
    offset = inputs[2] if len(inputs) > 2 else None
    return F.layer_norm(inputs[0], inputs[0].shape[axis:], inputs[1], offset, attributes.get("epsilon", 1e-5))


@op("InstanceNormalization")
def _instance_norm(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    return F.instance_norm(inputs[0], weight=inputs[1], bias=inputs[2], eps=attributes.get("epsilon", 1e-5))


# ---- pooling, resizing, padding ----


def _window(attributes: Attributes, x: Tensor) -> tuple[list[int], list[int], list[int], tuple[int, ...]]:
    kernel = list(attributes["kernel_shape"])
    strides = list(attributes.get("strides", [1] * len(kernel)))
    dilations = list(attributes.get("dilations", [1] * len(kernel)))
    pads = same_pads(attributes, tuple(x.shape), kernel, strides, dilations)
    return kernel, strides, dilations, pads or tuple(attributes.get("pads", (0, 0, 0, 0)))


@op("MaxPool")
def _max_pool(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    kernel, strides, dilations, (top, left, bottom, right) = _window(attributes, x)
    ceil = bool(attributes.get("ceil_mode", 0))
    fits = (top, left) == (bottom, right) and top <= kernel[0] // 2 and left <= kernel[1] // 2
    if not fits:
        x = F.pad(x, (left, right, top, bottom), value=-torch.inf)
    return F.max_pool2d(x, kernel, strides, (top, left) if fits else 0, dilations, ceil)


@op("AveragePool")
def _average_pool(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    kernel, strides, _, (top, left, bottom, right) = _window(attributes, x)
    ceil, counted = bool(attributes.get("ceil_mode", 0)), bool(attributes.get("count_include_pad", 0))
    if (top, left) == (bottom, right) and top <= kernel[0] // 2 and left <= kernel[1] // 2:
        return F.avg_pool2d(x, kernel, strides, (top, left), ceil, counted)
    pads = (left, right, top, bottom)
    found = F.avg_pool2d(F.pad(x, pads), kernel, strides, 0, ceil)
    if counted:
        return found
    share = F.avg_pool2d(F.pad(torch.ones_like(x[:1, :1]), pads), kernel, strides, 0, ceil)
    return found / share


def _pool_check(attributes: Attributes) -> str:
    return "" if len(attributes["kernel_shape"]) == 2 else "of no picture"


CHECKS["MaxPool"] = _pool_check
CHECKS["AveragePool"] = lambda a: (
    _pool_check(a) or ("with dilations" if any(d != 1 for d in a.get("dilations", ())) else "")
)


@op("Resize")
def _resize(attributes: Attributes, inputs: Inputs, wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    scales, sizes = (inputs[i] if len(inputs) > i else None for i in (2, 3))
    if scales is not None and np.asarray(scales).size:
        numbers = (
            np.asarray(scales, np.float64)[-2:] if isinstance(scales, np.ndarray) else scales.tolist()[-2:]
        )
        size = [int(n * s) for n, s in zip(x.shape[2:], numbers, strict=True)]
    else:
        size = _relative(x, _ints(sizes)[-2:], attributes)
    if attributes.get("mode", "nearest") == "nearest":
        return F.interpolate(x, size=size, mode="nearest")
    corners = attributes.get("coordinate_transformation_mode") == "align_corners"
    kind = {"linear": "bilinear", "cubic": "bicubic"}[attributes["mode"]]
    return F.interpolate(x, size=size, mode=kind, align_corners=corners)


def _relative(x: Tensor, size: Sequence[int], attributes: Attributes) -> list[int]:
    """Sizes that the file states, in proportion to what comes in."""
    before = attributes.get("edgekit.before")
    if before is None:
        return list(size)
    return [round(n * s / b) for n, s, b in zip(x.shape[2:], size, before, strict=True)]


def _resize_check(attributes: Attributes) -> str:
    mode, where = (
        attributes.get("mode", "nearest"),
        attributes.get("coordinate_transformation_mode", "half_pixel"),
    )
    if mode == "nearest":
        rounding = attributes.get("nearest_mode", "round_prefer_floor")
        if (where, rounding) == ("asymmetric", "floor") or attributes.get("edgekit.whole"):
            return ""
        return f"nearest by {where}, {rounding}"
    if mode == "cubic" and (
        attributes.get("cubic_coeff_a", -0.75) != -0.75 or attributes.get("exclude_outside", 0)
    ):
        return "cubic of another kind"
    known = mode in ("linear", "cubic") and where in ("half_pixel", "pytorch_half_pixel", "align_corners")
    return "" if known else f"{mode} by {where}"


CHECKS["Resize"] = _resize_check


@op("Pad")
def _pad(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    pads = _ints(inputs[1])
    axes = _ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(x.dim()))
    before, after = [0] * x.dim(), [0] * x.dim()
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    flat = [n for axis in reversed(range(x.dim())) for n in (before[axis], after[axis])]
    while len(flat) > 2 and not any(flat[-2:]):
        flat = flat[:-2]
    mode: str = attributes.get("mode", "constant")
    mode = "replicate" if mode == "edge" else mode
    if mode != "constant":
        return F.pad(x, flat, mode=mode)
    fill = inputs[2] if len(inputs) > 2 and inputs[2] is not None else 0.0
    return F.pad(x, flat, value=float(fill))


CHECKS["Pad"] = lambda a: (
    "" if a.get("mode", "constant") in ("constant", "edge", "reflect") else f"by {a['mode']}"
)


@op("DepthToSpace")
def _depth_to_space(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    block = attributes["blocksize"]
    if attributes.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    b, c, h, w = x.shape
    x = x.reshape(b, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // block**2, h * block, w * block)


@op("SpaceToDepth")
def _space_to_depth(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    block = attributes["blocksize"]
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(b, c * block**2, h // block, w // block)


# ---- shapes and places ----


@op("Shape")
def _shape(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Any:
    sizes = [int(n) for n in inputs[0].shape]
    return np.array(sizes[attributes.get("start", 0) : attributes.get("end", len(sizes))], np.int64)


@op("Reshape", "Flatten")
def _reshape(attributes: Attributes, inputs: Inputs, wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    sizes = wanted(0)
    if sizes is None and len(inputs) > 1:
        sizes = tuple(x.shape[i] if n == 0 else n for i, n in enumerate(_ints(inputs[1])))
    return x.flatten(attributes.get("axis", 1)) if sizes is None else x.reshape(sizes)


@op("Squeeze")
def _squeeze(_attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    return x.squeeze(tuple(_ints(inputs[1]))) if len(inputs) > 1 and inputs[1] is not None else x.squeeze()


@op("Unsqueeze")
def _unsqueeze(_attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    axes = _ints(inputs[1])
    for axis in sorted(a % (x.dim() + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return x


@op("Expand")
def _expand(_attributes: Attributes, inputs: Inputs, wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    sizes = np.broadcast_shapes(tuple(_ints(inputs[1])), tuple(x.shape))
    return x.expand(sizes)


OPS["Tile"] = lambda _a, i, _w: i[0].repeat(_ints(i[1]))


@op("Slice")
def _slice(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
    x: Tensor = inputs[0]
    starts, ends = _ints(inputs[1]), _ints(inputs[2])
    axes = _ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = _ints(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    before = attributes.get("edgekit.before")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= x.dim()
        size = int(x.shape[axis])
        if step < 0:
            places = list(range(size))[slice(start, None if end < -size else end, step)]
            x = x.index_select(axis, torch.tensor(places, device=x.device))
            continue
        if before and axis in attributes.get("edgekit.channels", ()):
            start, end = span(start, end, step, before[axis], size)
        elif before and end >= before[axis]:
            end = size
        index = [slice(None)] * x.dim()
        index[axis] = slice(start, end, step)
        x = x[tuple(index)]
    return x


def span(start: int, end: int, step: int, before: int, size: int) -> tuple[int, int]:
    """(start, end) for an axis of `size` where the file has them for one of `before`: in proportion, strided ones to the
    end stay so."""
    start, end = (min(max(n + before if n < 0 else n, 0), before) for n in (start, end))
    if size == before:
        return start, end
    if step > 1:
        return start, size if end > before - step else round(end * size / before)
    return round(start * size / before), round(end * size / before)


@op("Split")
def _split(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    axis = attributes.get("axis", 0)
    size = int(x.shape[axis])
    if len(inputs) > 1 and inputs[1] is not None:
        sizes = _ints(inputs[1])
    else:
        count = attributes["edgekit.outputs"]
        each = -(-size // count)
        sizes = [each] * (count - 1) + [size - each * (count - 1)]
    if sum(sizes) != size:
        ends = [round(sum(sizes[: i + 1]) * size / sum(sizes)) for i in range(len(sizes))]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return tuple(torch.split(x, sizes, axis))


@op("Gather")
def _gather(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Any:
    x, index = inputs
    axis = attributes.get("axis", 0) % x.dim()
    if isinstance(index, np.ndarray):
        if index.ndim == 0:
            return x.select(axis, int(index))
        index = torch.tensor(index, device=x.device)
    index = torch.where(index < 0, index + x.shape[axis], index).long()
    found = x.index_select(axis, index.reshape(-1))
    return found.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _reduce(name: str) -> Op:
    def run(attributes: Attributes, inputs: Inputs, _wanted: Wanted) -> Tensor:
        x: Tensor = inputs[0]
        axes = attributes.get("axes")
        if axes is None and len(inputs) > 1 and inputs[1] is not None:
            axes = _ints(inputs[1])
        if axes is None and attributes.get("noop_with_empty_axes", 0):
            return x
        dims = tuple(axes) if axes is not None else tuple(range(x.dim()))
        found: Tensor = _REDUCTIONS[name](x, dims, bool(attributes.get("keepdims", 1)))
        return found

    return run


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceMean": lambda x, dims, keep: x.mean(dims, keepdim=keep),
    "ReduceSum": lambda x, dims, keep: x.sum(dims, keepdim=keep),
    "ReduceMax": lambda x, dims, keep: x.amax(dims, keepdim=keep),
    "ReduceMin": lambda x, dims, keep: x.amin(dims, keepdim=keep),
    "ReduceL2": lambda x, dims, keep: x.square().sum(dims, keepdim=keep).sqrt(),
}
OPS.update({name: _reduce(name) for name in _REDUCTIONS})

# ---- sizes and indices, computed on the host ----

_HOST: dict[str, Callable[[Attributes, Inputs], Any]] = {
    "Concat": lambda a, i: np.concatenate([np.atleast_1d(v) for v in i], a["axis"]),
    "Gather": lambda a, i: np.take(i[0], i[1], a.get("axis", 0)),
    "Slice": lambda a, i: np.asarray(i[0])[slice(int(i[1][0]), int(i[2][0]), int(i[4][0]) if len(i) > 4 else 1)],
    "Unsqueeze": lambda a, i: np.expand_dims(i[0], tuple(_ints(i[1]))),
    "Squeeze": lambda a, i: np.squeeze(i[0], tuple(_ints(i[1])) if len(i) > 1 else None),
    "Identity": lambda a, i: i[0],
    "Add": lambda a, i: i[0] + i[1],
    "Sub": lambda a, i: i[0] - i[1],
    "Mul": lambda a, i: i[0] * i[1],
    "Div": lambda a, i: i[0] // i[1] if i[0].dtype.kind == "i" else i[0] / i[1],
}  # fmt: skip
