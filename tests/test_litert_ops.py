"""Every operator that LiteRT payloads hold, in floats, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgekit.backends.litert import layout
from edgekit.backends.litert.lower import lower
from edgekit.errors import LoweringError, UsageError
from tests.litert_graphs import HOST, graph, same

node = helper.make_node
few = settings(max_examples=25, deadline=None)


def values(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@st.composite
def convolutions(draw: Any) -> tuple[Any, dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    kh, kw = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2)]))
    channels, kind = draw(
        st.sampled_from([(3, "dense"), (4, "depthwise"), (4, "grouped"), (8, "dense"), (1, "dense")])
    )
    group = {"dense": 1, "depthwise": channels, "grouped": 2}[kind]
    count = group * draw(st.integers(1, 3))
    pads = [draw(st.integers(0, 2)) for _ in range(4)]
    h = draw(st.integers((kh - 1) * dilation[0] + 1, 11))
    w = draw(st.integers((kw - 1) * dilation[1] + 1, 11))
    strides = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilation, "group": group}
    if draw(st.booleans()):
        attributes["pads"] = pads
    else:
        attributes["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))
        if attributes["auto_pad"] != "VALID":
            attributes["dilations"] = (1, 1)
    weights = {"w": values(count, channels // group, kh, kw)}
    names = ["x", "w"]
    if draw(st.booleans()):
        weights["b"] = values(count)
        names.append("b")
    return node("Conv", names, ["y"], **attributes), {"x": (1, channels, h, w)}, weights


@few
@given(convolutions(), st.sampled_from(["", "Relu", "Clip"]))
def test_conv(case: Any, act: str) -> None:
    conv, inputs, weights = case
    nodes = [conv]
    if act:
        conv.output[0] = "t"
        limits = ["", ""] if act == "Relu" else ["low", "high"]
        nodes.append(node(act, ["t", *filter(None, limits)], ["y"]))
        weights = {**weights, "low": np.float32(0), "high": np.float32(6)}
        weights = weights if act == "Clip" else {k: v for k, v in weights.items() if k not in ("low", "high")}
    facts = same(graph(nodes, inputs, weights))
    assert facts["partitions"] == 1
    assert facts["delegated"] == facts["operators"]


@few
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 1),
    st.sampled_from([1, 2]),
)
def test_conv_transpose(kernel: int, stride: int, before: int, after: int, extra: int, group: int) -> None:
    if 4 * stride + kernel - before - after < 1 or (extra and (stride == 1 or after == 0)):
        return
    attributes = {"strides": [stride] * 2, "pads": [before, before, after, after], "group": group}
    attributes["output_padding"] = [extra] * 2
    weights = {"w": values(4, 3, kernel, kernel), "b": values(3 * group)}
    same(graph([node("ConvTranspose", ["x", "w", "b"], ["y"], **attributes)], {"x": (1, 4, 5, 5)}, weights))


@few
@given(
    st.sampled_from(["MaxPool", "AveragePool"]), st.integers(2, 4), st.integers(1, 3), st.integers(0, 1), st.integers(0, 1),
    st.integers(5, 9), st.booleans(), st.integers(0, 1), st.booleans(),
)  # fmt: skip
def test_pool(
    op: str,
    kernel: int,
    stride: int,
    before: int,
    after: int,
    size: int,
    ceil: bool,
    include: int,
    positive: bool,
) -> None:
    if ceil:  # onnx and ONNX Runtime do not agree on windows that lie in the padding altogether
        before, after, stride = 0, 0, min(stride, kernel)
    attributes: dict[str, Any] = {
        "kernel_shape": [kernel] * 2,
        "strides": [stride] * 2,
        "ceil_mode": int(ceil),
    }
    attributes["pads"] = [before, before, after, after]
    if op == "AveragePool":
        attributes["count_include_pad"] = include
    nodes = [node("Relu", ["x"], ["r"])] if positive else []
    nodes.append(node(op, ["r" if positive else "x"], ["y"], **attributes))
    same(graph(nodes, {"x": (1, 3, size, size + 1)}))


BROADCASTS = [
    ((1, 4, 5, 6), (1, 4, 5, 6)), ((1, 4, 5, 6), (4, 1, 1)), ((1, 4, 5, 6), (1, 1, 5, 6)), ((1, 4, 5, 6), (6,)), ((2, 3, 4), (3, 1)),
    ((1, 4, 1, 1), (1, 4, 5, 6)), ((1, 4, 5, 6), ()), ((4, 1, 1), (1, 4, 5, 6)), ((3, 7), (7,)),
]  # fmt: skip


@pytest.mark.parametrize("shapes", BROADCASTS)
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min"])
@pytest.mark.parametrize("fixed", [None, 0, 1])
def test_elementwise(op: str, shapes: Any, fixed: int | None) -> None:
    if () in shapes and shapes.index(()) != fixed:
        return  # a scalar input: refused, see below
    inputs = {f"x{i}": s for i, s in enumerate(shapes) if i != fixed}
    weights = {f"x{fixed}": np.abs(values(*shapes[fixed])) + 0.5} if fixed is not None else {}
    nodes = [node(op, ["x0", "x1"], ["y"])]
    if len(shapes[0]) == 4 and 0 in [fixed, None] and op == "Add":
        nodes = [node(op, ["x0", "x1"], ["t"]), node("Relu", ["t"], ["y"])]
    same(graph(nodes, inputs, weights), low=0.5)


UNARY: list[tuple[str, dict[str, Any], tuple[float, float]]] = [
    ("Relu", {}, (-2, 2)), ("LeakyRelu", {"alpha": 0.2}, (-2, 2)), ("Sigmoid", {}, (-6, 6)), ("Tanh", {}, (-3, 3)),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, (-5, 5)), ("HardSwish", {}, (-5, 5)), ("Elu", {}, (-3, 3)),
    ("Exp", {}, (-2, 2)), ("Sqrt", {}, (0.1, 4)), ("Abs", {}, (-2, 2)), ("Neg", {}, (-2, 2)), ("Log", {}, (0.1, 4)),
    ("Floor", {}, (-3, 3)), ("Ceil", {}, (-3, 3)), ("Softplus", {}, (-30, 30)), ("Reciprocal", {}, (0.5, 2)),
    ("Identity", {}, (-2, 2)), ("Softmax", {"axis": 1}, (-3, 3)), ("Softmax", {"axis": -1}, (-3, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes", "limits"), UNARY)
@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (2, 7)])
def test_unary(op: str, attributes: dict[str, Any], limits: tuple[float, float], shape: Any) -> None:
    same(graph([node(op, ["x"], ["y"], **attributes)], {"x": shape}), low=limits[0], high=limits[1])


@pytest.mark.parametrize("limits", [(0, 6), (0, None), (-1, 1), (-0.5, 0.7), (None, 0.3), (0, 1)])
def test_clip(limits: tuple[float | None, float | None]) -> None:
    weights = {n: np.float32(v) for n, v in zip(("low", "high"), limits, strict=True) if v is not None}
    names = ["x", *(n if n in weights else "" for n in ("low", "high"))]
    same(graph([node("Clip", names, ["y"])], {"x": (1, 3, 4, 5)}, weights), low=-9, high=9)


def test_gelu_from_erf() -> None:
    weights = {"r": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}
    nodes = [
        node("Div", ["x", "r"], ["a"]), node("Erf", ["a"], ["e"]), node("Add", ["e", "one"], ["p"]),
        node("Mul", ["x", "p"], ["m"]), node("Mul", ["m", "half"], ["y"]),
    ]  # fmt: skip
    facts = same(graph(nodes, {"x": (1, 5, 8)}, weights), tolerance=1e-4)
    assert facts["operators"] == 1


def test_prelu_power_and_layer_norm() -> None:
    same(graph([node("PRelu", ["x", "s"], ["y"])], {"x": (1, 4, 5, 6)}, {"s": np.abs(values(4, 1, 1))}))
    for exponent in (2.0, 0.5, 1.7):
        weights = {"e": np.float32(exponent)}
        same(graph([node("Pow", ["x", "e"], ["y"])], {"x": (1, 4, 5, 6)}, weights), low=0.1, tolerance=1e-4)
    for axis in (-1, 1):
        shape = (2, 3, 8)
        weights = {"s": values(*shape[axis:]), "b": values(*shape[axis:])}
        layer = node("LayerNormalization", ["x", "s", "b"], ["y"], axis=axis)
        same(graph([layer], {"x": shape}, weights), tolerance=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("count", [2, 5, 7])
def test_concat(axis: int, count: int) -> None:
    same(
        graph(
            [node("Concat", [f"x{i}" for i in range(count)], ["y"], axis=axis)],
            {f"x{i}": (1, 3, 4, 5) for i in range(count)},
        )
    )


@pytest.mark.parametrize(
    ("axis", "sizes"), [(1, [4, 4]), (1, [2, 6]), (2, [1, 1, 1, 1, 1, 1]), (3, [3, 2]), (-1, [1, 4])]
)
def test_split(axis: int, sizes: list[int]) -> None:
    shape = [1, 8, 6, 5]
    names = [f"y{i}" for i in range(len(sizes))]
    split = node("Split", ["x", "s"], names, axis=axis)
    same(graph([split], {"x": shape}, {"s": np.array(sizes, np.int64)}, names))


@few
@given(st.data())
def test_slice(data: Any) -> None:
    shape = (1, 8, 6, 10)
    axes = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3, unique=True))
    starts, ends, steps = [], [], []
    for axis in axes:
        start = data.draw(st.integers(-shape[axis], shape[axis] - 1))
        first = start % shape[axis]
        end = data.draw(st.integers(first + 1, shape[axis]))
        starts.append(start)
        ends.append(end if data.draw(st.booleans()) else (2**31 if end == shape[axis] else end))
        steps.append(data.draw(st.integers(1, 3)))
    weights = {n: np.array(v, np.int64) for n, v in (("s", starts), ("e", ends), ("a", axes), ("t", steps))}
    same(graph([node("Slice", ["x", "s", "e", "a", "t"], ["y"])], {"x": shape}, weights))


def test_every_other_channel_is_delegated() -> None:
    weights = {"a": np.array([1]), "two": np.array([2]), "end": np.array([2**31])}
    nodes = []
    for start in (0, 1):
        weights[f"s{start}"] = np.array([start])
        nodes.append(node("Slice", ["x", f"s{start}", "end", "a", "two"], [f"y{start}"]))
    facts = same(graph(nodes, {"x": (1, 8, 6, 5)}, weights, ["y0", "y1"]))
    assert facts["partitions"] == 1


RESHAPES = [
    ((1, 8, 5, 6), (1, 8, 30)), ((1, 8, 5, 6), (1, 240)), ((1, 8, 5, 6), (1, 2, 4, 5, 6)), ((1, 8, 1, 1), (1, 8)), ((1, 8), (1, 8, 1, 1)),
    ((1, 8, 30), (1, 8, 5, 6)), ((1, 8, 5, 6), (8, 30)), ((1, 8, 5, 6), (1, 40, 6)), ((2, 3, 4), (6, 4)), ((1, 4, 6, 6), (1, 1, 4, 36)),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), RESHAPES)
@pytest.mark.parametrize("then", ["", "transpose", "mean"])
def test_reshape(before: tuple[int, ...], after: tuple[int, ...], then: str) -> None:
    weights = {"s": np.array(after, np.int64)}
    nodes = [node("Reshape", ["x", "s"], ["y" if not then else "t"])]
    if then == "transpose":
        nodes.append(node("Transpose", ["t"], ["y"], perm=list(reversed(range(len(after))))))
    elif then:
        nodes.append(node("ReduceMean", ["t", "axes"], ["y"], keepdims=0))
        weights["axes"] = np.array([-1])
    same(graph(nodes, {"x": before}, weights))


def test_shuffle_squeeze_and_transposes_between() -> None:
    weights = {"five": np.array([1, 2, 4, 5, 6]), "four": np.array([1, 8, 5, 6]), "axis": np.array([0])}
    nodes = [
        node("Reshape", ["x", "five"], ["a"]), node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["b", "four"], ["c"]), node("Squeeze", ["c", "axis"], ["d"]), node("Unsqueeze", ["d", "axis"], ["e"]),
        node("Transpose", ["e"], ["f"], perm=[0, 2, 3, 1]), node("Transpose", ["f"], ["y"], perm=[0, 3, 1, 2]),
    ]  # fmt: skip
    same(graph(nodes, {"x": (1, 8, 5, 6)}, weights))


def test_a_flattened_picture_moves_nothing_before_a_product() -> None:
    weights = {"w": values(7, 3 * 4 * 5), "b": values(7)}
    nodes = [
        node("Relu", ["x"], ["r"]), node("Flatten", ["r"], ["f"]), node("Gemm", ["f", "w", "b"], ["y"], transB=1),
    ]  # fmt: skip
    facts = same(graph(nodes, {"x": (1, 3, 4, 5)}, weights))
    assert facts["operators"] == 3


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)])
def test_matrix_products(shape: tuple[int, ...]) -> None:
    same(graph([node("MatMul", ["x", "w"], ["y"])], {"x": shape}, {"w": values(6, 4)}))
    other = (*shape[:-2], 6, 4)
    same(graph([node("MatMul", ["x", "z"], ["y"])], {"x": shape, "z": other}))
    same(graph([node("Gemm", ["x", "w", "b"], ["y"])], {"x": (3, 6)}, {"w": values(6, 4), "b": values(4)}))


@few
@given(
    st.sampled_from(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"]),
    st.lists(st.integers(-4, 3), min_size=1, max_size=3, unique_by=lambda a: a % 4),
    st.integers(0, 1),
)
def test_reduce(op: str, axes: list[int], keep: int) -> None:
    weights = {"a": np.array(axes, np.int64)}
    same(graph([node(op, ["x", "a"], ["y"], keepdims=keep)], {"x": (2, 3, 4, 5)}, weights))


def test_global_pools_arg_max_gather_pad_and_cast() -> None:
    shape = {"x": (1, 3, 4, 5)}
    same(graph([node("GlobalAveragePool", ["x"], ["y"])], shape))
    same(graph([node("GlobalMaxPool", ["x"], ["y"])], shape))
    for keep in (0, 1):
        types = {"y": TensorProto.INT64}
        same(graph([node("ArgMax", ["x"], ["y"], axis=1, keepdims=keep)], shape, None, ["y"], types))
    for indices in (np.array(1), np.array([2, 0]), np.array([1, 2])):
        same(graph([node("Gather", ["x", "i"], ["y"], axis=1)], shape, {"i": indices.astype(np.int64)}))
    for mode, value in (("constant", 0.0), ("constant", 1.5), ("reflect", 0.0)):
        weights = {"p": np.array([0, 0, 1, 2, 0, 0, 2, 1]), "v": np.float32(value)}
        same(graph([node("Pad", ["x", "p", "v"], ["y"], mode=mode)], shape, weights))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    facts = same(graph([node("DepthToSpace", ["x"], ["y"], blocksize=2, mode=mode)], {"x": (1, 12, 3, 5)}))
    assert facts["partitions"] == 1
    same(graph([node("SpaceToDepth", ["x"], ["y"], blocksize=2)], {"x": (1, 3, 4, 6)}))


_HALF = ("half_pixel", "pytorch_half_pixel")
REFUSED = {
    (8, 12): [*((c, "floor") for c in _HALF), ("align_corners", "floor")],
    (12, 18): [*((c, "floor") for c in _HALF), ("align_corners", "floor"), ("asymmetric", "round_prefer_floor")],
    (7, 11): [(c, r) for c in _HALF for r in ("floor", "round_prefer_floor")],
    (3, 5): [
        *((c, "round_prefer_floor") for c in (*_HALF, "asymmetric", "align_corners")), ("align_corners", "floor")
    ],
}  # fmt: skip
"""Output size (of 4 x 6) -> coordinates and rounding whose elements TensorFlow Lite cannot choose."""


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (12, 18), (7, 11), (3, 5)])
@pytest.mark.parametrize("coordinates", ["asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_is_exact_or_refused(size: tuple[int, int], coordinates: str, mode: str) -> None:
    weights = {"s": np.array([1, 3, *size], np.int64)}
    for rule in ("floor", "round_prefer_floor") if mode == "nearest" else ("floor",):
        resize = node(
            "Resize",
            ["x", "", "", "s"],
            ["y"],
            mode=mode,
            coordinate_transformation_mode=coordinates,
            nearest_mode=rule,
        )
        model = graph([resize], {"x": (1, 3, 4, 6)}, weights)
        refused = mode == "nearest" and (coordinates, rule) in REFUSED.get(size, ())
        if refused:
            with pytest.raises(LoweringError, match="TensorFlow Lite chooses otherwise"):
                lower(model, HOST, "float32")
            continue
        same(model)


def test_doubling_stays_in_the_delegate() -> None:
    weights = {"s": np.array([1, 1, 2, 2], np.float32)}
    rule = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    resize = node("Resize", ["x", "", "s"], ["y"], **rule)
    assert same(graph([resize], {"x": (1, 3, 4, 6)}, weights))["partitions"] == 1


def test_all_that_cannot_be_written_is_named_at_once() -> None:
    nodes = [node("CumSum", ["x", "a"], ["t"]), node("Conv", ["t", "k"], ["c"]), node("Selu", ["c"], ["y"])]
    weights = {"a": np.array(1), "k": values(2, 2, 1, 1)}
    with pytest.raises(LoweringError, match=r"2 operators: CumSum t .*; Selu y "):
        lower(graph(nodes, {"x": (1, 2, 4, 4)}, weights), HOST, "float32")


def test_a_scalar_input_is_refused() -> None:
    with pytest.raises(LoweringError, match="input x1: a scalar"):
        lower(graph([node("Add", ["x0", "x1"], ["y"])], {"x0": (1, 2), "x1": ()}), HOST, "float32")


def test_an_unknown_precision_and_a_weight_too_large_for_half_are_refused() -> None:
    model = graph([node("Mul", ["x", "w"], ["y"])], {"x": (1, 2)}, {"w": np.full((1, 2), 1e5, np.float32)})
    with pytest.raises(UsageError, match="int4"):
        lower(model, HOST, "int4")
    with pytest.raises(LoweringError, match="does not fit in float16"):
        lower(model, HOST, "float16")


@few
@given(st.permutations([0, 1, 2, 3]), st.sampled_from([s for s in RESHAPES if len(s[0]) == 4]))
def test_a_planned_reshape_moves_no_data(order: list[int], shapes: Any) -> None:
    """The orders that layout.reshape names make a reshape of the stored bytes the reshape of the graph."""
    before, after = shapes
    data = np.arange(np.prod(before)).reshape(before)
    needed, result = layout.reshape(before, after, tuple(order))
    stored = layout.arrange(data, needed).reshape(layout.stored(after, result))
    np.testing.assert_array_equal(stored, layout.arrange(data.reshape(after), result))
