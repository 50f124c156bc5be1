"""Every pass: what it must change, what it must leave, and that it keeps the numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit import frontends, passes
from edgekit.errors import ModelError, UsageError
from edgekit.passes import fold_constants, graph_facts, normalize_silu, probe
from edgekit.passes.graph import infer, op_counts
from tests import detectors
from tests.helpers import shared_data

RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def graph(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    *,
    x: tuple[int, ...] = (1, 4, 8, 6),
    outputs: tuple[str, ...] = ("y",),
) -> ir.Model:
    """A model on input `x` at the normal opset, shapes inferred."""
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in (weights or {}).items()]
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [onnx.ValueInfoProto(name=o) for o in outputs],
        tensors,
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    return ir.from_proto(proto)


def node(op: str, inputs: str, outputs: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def ops_after(model: ir.Model, *names: str) -> dict[str, int]:
    """Operators after the checked passes; the check itself compares the numbers."""
    result, records = passes.run_passes(model, names)
    assert all(r.max_abs_diff is not None for r in records)
    return op_counts(result.graph)


# --- the machinery ----------------------------------------------------------------------------


def test_passes_are_found_by_their_files() -> None:
    found = passes.names()
    assert {"fold_constants", "fuse_batchnorm", "fold_focus", "compact"} <= set(found)
    assert set(passes.BEFORE_SPLIT) | set(passes.AFTER_SPLIT) <= set(found)


def test_unknown_pass() -> None:
    model = graph([node("Relu", "x")])
    with pytest.raises(UsageError, match="Did you mean 'fold_focus'"):
        passes.run_passes(model, ["fold_focsu"])
    with pytest.raises(UsageError, match="unknown"):
        passes.run_passes(model, ["graph_facts"])


def test_the_given_model_is_left_alone() -> None:
    model = graph([node("Identity", "x", "a"), node("Relu", "a")])
    before = ir.to_proto(model).SerializeToString()
    passes.run_passes(model, ["remove_identity", "compact"])
    assert ir.to_proto(model).SerializeToString() == before


def _break_values(model: ir.Model) -> int:
    value = next(v for v in model.graph.initializers.values())
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() + 1)
    return 1


def _break_graph(model: ir.Model) -> int:
    next(iter(model.graph)).op_type = "Sigmoidal"
    return 1


def _stumble(model: ir.Model) -> int:
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("fault", "words"),
    [(_break_values, "changed output 'y'"), (_break_graph, "invalid graph"), (_stumble, "IndexError")],
)
def test_a_faulty_pass_is_named(monkeypatch: pytest.MonkeyPatch, fault: object, words: str) -> None:
    monkeypatch.setattr("edgekit.passes.fuse_pad.run", fault)
    model = graph([node("Add", "x b", "a"), node("Relu", "a")], {"b": f32(1, 4, 1, 1)})
    with pytest.raises(passes.PassError, match="pass fuse_pad") as caught:
        passes.run_passes(model, ["remove_identity", "fuse_pad", "compact"])
    assert words in str(caught.value)
    assert "passes before it: remove_identity" in str(caught.value)


def test_unchecked_faults_pass_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is what finds them: without it the same faulty pass goes through."""
    monkeypatch.setattr("edgekit.passes.fuse_pad.run", _break_values)
    model = graph([node("Add", "x b", "a"), node("Relu", "a")], {"b": f32(1, 4, 1, 1)})
    _, records = passes.run_passes(model, ["fuse_pad"], check=False)
    assert records[0].max_abs_diff is None


def test_a_network_that_cannot_run_is_a_model_error() -> None:
    broken = graph([node("Relu", "x")])
    next(iter(broken.graph)).op_type = "NoSuchOp"
    with pytest.raises(ModelError, match="onnxruntime cannot run"):
        passes.run_passes(broken, ["compact"])


def test_a_network_that_overflows_is_not_the_pass_s_fault() -> None:
    """Conv * 3e38 * 1e-38 is infinite as written and finite when folded."""
    nodes = [node("Conv", "x w", "c"), node("Mul", "c s")]
    weights = {"w": np.full((4, 4, 1, 1), 3e38, np.float32), "s": np.float32(1e-38)}
    with pytest.raises(ModelError, match="output 'y' is NaN or Inf on an ordinary picture") as caught:
        passes.run_passes(graph(nodes, weights), ["fuse_batchnorm"])
    assert not isinstance(caught.value, passes.PassError)


def test_difference_sees_nan_shape_and_absence() -> None:
    a = np.array([1.0, np.inf, 2.0])
    same = probe.largest_difference({"y": a}, {"y": a.copy()})
    assert same[:2] == (0.0, 0.0)
    for other in (
        {},
        {"y": a[:2]},
        {"y": np.array([1.0, np.nan, 2.0])},
        {"y": np.array([np.nan, np.inf, 2])},
    ):
        assert probe.largest_difference({"y": a}, other)[1] == math.inf
    assert probe.largest_difference({"y": a}, {"y": a + np.array([0, 0, 0.5])})[:2] == (0.5, 0.25)


def test_probe_pictures_are_natural_and_repeat() -> None:
    picture = probe.natural_picture((1, 3, 64, 48))
    np.testing.assert_array_equal(picture, probe.natural_picture((1, 3, 64, 48)))
    assert picture.min() == 0
    assert picture.max() == 255
    assert np.corrcoef(picture[0, 0, :, 1:].ravel(), picture[0, 0, :, :-1].ravel())[0, 1] > 0.7
    assert np.abs(picture - probe.natural_picture((1, 3, 64, 48), seed=1)).max() > 10


# --- fold_constants ---------------------------------------------------------------------------


def test_shape_arithmetic_folds() -> None:
    model = graph(
        [
            node("Shape", "x", "s"),
            node("Gather", "s two", "h"),
            node("Mul", "h three", "h3"),
            node("Unsqueeze", "h3 zero", "h3u"),
            node("Concat", "one h3u minus", "target", axis=0),
            node("Reshape", "x target"),
        ],
        {
            "two": np.array(2, np.int64),
            "three": np.array(3, np.int64),
            "zero": np.array([0], np.int64),
            "one": np.array([1], np.int64),
            "minus": np.array([-1], np.int64),
        },
    )
    assert ops_after(model, "fold_constants") == {"Reshape": 1}


def test_expand_of_a_constant_folds_unless_huge() -> None:
    def expanding(size: int) -> ir.Model:
        nodes = [
            node("ConstantOfShape", "n", "c", value=helper.make_tensor("", TensorProto.FLOAT, [1], [2.0])),
            node("ReduceMean", "c", "m", keepdims=0),
            node("Add", "x m"),
        ]
        return graph(nodes, {"n": np.array([size], np.int64)})

    small, large = expanding(16), expanding(fold_constants.MAX_ELEMENTS + 1)
    fold_constants.run(small)
    fold_constants.run(large)
    assert op_counts(small.graph) == {"Add": 1}
    assert "ConstantOfShape" in op_counts(large.graph)


# --- remove_identity --------------------------------------------------------------------------

NO_OPS = {
    "Identity": ([node("Identity", "x", "a")], {}),
    "Dropout": ([node("Dropout", "x", "a")], {}),
    "Cast": ([node("Cast", "x", "a", to=TensorProto.FLOAT)], {}),
    "Reshape": ([node("Reshape", "x s", "a")], {"s": np.array([1, 4, 8, 6], np.int64)}),
    "Slice": (
        [node("Slice", "x b e ax", "a")],
        {"b": np.array([0], np.int64), "e": np.array([99], np.int64), "ax": np.array([2], np.int64)},
    ),
    "Pad": ([node("Pad", "x p", "a")], {"p": np.zeros(8, np.int64)}),
    "Transpose": ([node("Transpose", "x", "a", perm=[0, 1, 2, 3])], {}),
    "Transpose pair": (
        [node("Transpose", "x", "t", perm=[0, 2, 3, 1]), node("Transpose", "t", "a", perm=[0, 3, 1, 2])],
        {},
    ),
    "Concat": ([node("Concat", "x", "a", axis=1)], {}),
    "Add 0": ([node("Add", "x z", "a")], {"z": np.zeros((1, 4, 1, 1), np.float32)}),
    "Mul 1": ([node("Mul", "o x", "a")], {"o": np.ones((), np.float32)}),
    "Relu twice": ([node("Relu", "x", "r"), node("Relu", "r", "a")], {}),
    "Reshape twice": (
        [node("Reshape", "x s", "r"), node("Reshape", "r t", "a")],
        {"s": np.array([1, 4, 48], np.int64), "t": np.array([1, 4, 8, 6], np.int64)},
    ),
}


@pytest.mark.parametrize("kind", NO_OPS)
def test_no_ops_go(kind: str) -> None:
    nodes, weights = NO_OPS[kind]
    left = ops_after(graph([*nodes, node("Sigmoid", "a")], weights), "remove_identity")
    assert left == ({"Relu": 1, "Sigmoid": 1} if kind == "Relu twice" else {"Sigmoid": 1})


KEPT = {
    "Slice backwards": (
        [node("Slice", "x b e ax st", "a")],
        {
            "b": np.array([7], np.int64),
            "e": np.array([-99], np.int64),
            "ax": np.array([2], np.int64),
            "st": np.array([-1], np.int64),
        },
    ),
    "Transpose equal sizes": ([node("Transpose", "x", "a", perm=[0, 1, 3, 2])], {}),
    "Sub from 0": ([node("Sub", "z x", "a")], {"z": np.zeros((), np.float32)}),
    "Div of 1": ([node("Div", "o x", "a")], {"o": np.ones((), np.float32)}),
    "Mul 1 that broadcasts": ([node("Mul", "x o", "a")], {"o": np.ones((2, 4, 6, 6), np.float32)}),
    "Concat twice": ([node("Concat", "x x", "a", axis=1)], {}),
}


@pytest.mark.parametrize("kind", KEPT)
def test_look_alikes_stay(kind: str) -> None:
    nodes, weights = KEPT[kind]
    x = (1, 4, 6, 6) if kind != "Slice backwards" else (1, 4, 8, 6)
    model = graph([*nodes, node("Sigmoid", "a")], weights, x=x)
    assert sum(ops_after(model, "remove_identity").values()) == 2


def test_identity_between_input_and_output_stays() -> None:
    assert ops_after(graph([node("Identity", "x")]), "remove_identity") == {"Identity": 1}


def test_output_names_survive() -> None:
    model = graph([node("Relu", "x", "r"), node("Identity", "r"), node("Neg", "r", "z")], outputs=("y", "z"))
    result, _ = passes.run_passes(model, ["remove_identity"])
    assert [o.name for o in result.graph.outputs] == ["y", "z"]
    assert op_counts(result.graph) == {"Neg": 1, "Relu": 1}


# --- fuse_batchnorm ---------------------------------------------------------------------------


def batchnorm(channels: int) -> dict[str, np.ndarray]:
    return {
        "g": f32(channels),
        "beta": f32(channels),
        "mean": f32(channels),
        "var": np.abs(f32(channels)) + 0.1,
    }


BN = "g beta mean var"


@settings(max_examples=15, deadline=None)
@given(
    group=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    shared=st.booleans(),
    op=st.sampled_from(["Conv", "ConvTranspose"]),
)
def test_batchnorm_folds_into_convolutions(group: int, bias: bool, shared: bool, op: str) -> None:
    out = 8
    w = f32(out, 4 // group, 3, 3) if op == "Conv" else f32(4, out // group, 3, 3)
    weights = {"w": w, "b": f32(out), **batchnorm(out)}
    inputs = "x w b" if bias else "x w"
    nodes = [
        node(op, inputs, "c", group=group, pads=[1, 1, 1, 1]),
        node("BatchNormalization", f"c {BN}", "n", epsilon=1e-3),
        node("Relu", "n"),
    ]
    outputs: tuple[str, ...] = ("y",)
    if shared:  # the same weights used again, unfused: must not be touched
        nodes.append(node(op, inputs, "z", group=group, pads=[1, 1, 1, 1]))
        outputs = ("y", "z")
    left = ops_after(graph(nodes, weights, outputs=outputs), "fuse_batchnorm")
    assert left == {op: 1 + shared, "Relu": 1}


def test_batchnorm_folds_into_gemm() -> None:
    nodes = [
        node("Flatten", "x", "f"),
        node("Gemm", "f w b", "c", transB=1),
        node("BatchNormalization", f"c {BN}"),
    ]
    model = graph(nodes, {"w": f32(5, 192), "b": f32(5), **batchnorm(5)})
    assert ops_after(model, "fuse_batchnorm") == {"Flatten": 1, "Gemm": 1}


def test_affine_tails_fold() -> None:
    nodes = [
        node("Conv", "x w", "c"),
        node("Mul", "s c", "m"),
        node("Sub", "m t", "a"),
        node("Div", "a d"),
    ]
    weights = {"w": f32(6, 4, 1, 1), "s": f32(1, 6, 1, 1), "t": f32(6, 1, 1), "d": np.float32(3.0)}
    assert ops_after(graph(nodes, weights), "fuse_batchnorm") == {"Conv": 1}


def test_what_must_not_fold() -> None:
    w = {"w": f32(6, 4, 1, 1), **batchnorm(6)}
    two_users = [node("Conv", "x w", "c"), node("BatchNormalization", f"c {BN}"), node("Relu", "c", "z")]
    assert ops_after(graph(two_users, w, outputs=("y", "z")), "fuse_batchnorm")["BatchNormalization"] == 1
    is_output = [node("Conv", "x w", "c"), node("BatchNormalization", f"c {BN}")]
    assert ops_after(graph(is_output, w, outputs=("y", "c")), "fuse_batchnorm")["BatchNormalization"] == 1
    per_row = [node("Conv", "x w", "c"), node("Mul", "c s")]
    assert ops_after(graph(per_row, {**w, "s": f32(1, 1, 8, 1)}), "fuse_batchnorm")["Mul"] == 1
    reverse = [node("Conv", "x w", "c"), node("Sub", "s c")]
    assert ops_after(graph(reverse, {**w, "s": f32(1, 6, 1, 1)}), "fuse_batchnorm")["Sub"] == 1


# --- fuse_pad ---------------------------------------------------------------------------------


def test_pad_moves_into_the_convolution() -> None:
    weights = {"p": np.array([0, 0, 0, 1, 0, 0, 2, 3], np.int64), "w": f32(4, 4, 3, 3)}
    nodes = [node("Pad", "x p", "a"), node("Conv", "a w", "y", pads=[1, 0, 1, 0], strides=[2, 2])]
    assert ops_after(graph(nodes, weights), "fuse_pad") == {"Conv": 1}


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_pad_becomes_explicit(auto: str, stride: int) -> None:
    nodes = [node("Conv", "x w", "y", auto_pad=auto, strides=[stride, stride])]
    result, _ = passes.run_passes(graph(nodes, {"w": f32(4, 4, 3, 4)}), ["fuse_pad"])
    assert "auto_pad" not in next(iter(result.graph)).attributes


@pytest.mark.parametrize(
    ("pads", "extra"),
    [
        ([0, 1, 0, 0, 0, 0, 0, 0], {}),  # channels
        ([0, 0, 1, 1, 0, 0, 1, 1], {"fill": np.float32(1.0)}),
        ([0, 0, -1, 0, 0, 0, 0, 0], {}),  # cropping
        ([0, 0, 1, 1, 0, 0, 1, 1], {"mode": "reflect"}),
    ],
)
def test_other_pads_stay(pads: list[int], extra: dict[str, object]) -> None:
    channels = 5 if pads[1] else 4
    weights = {"p": np.array(pads, np.int64), "w": f32(4, channels, 3, 3)}
    inputs = "x p"
    if "fill" in extra:
        weights["v"] = np.asarray(extra["fill"])
        inputs = "x p v"
    mode = {"mode": extra["mode"]} if "mode" in extra else {}
    model = graph([node("Pad", inputs, "a", **mode), node("Conv", "a w")], weights)
    assert ops_after(model, "fuse_pad") == {"Conv": 1, "Pad": 1}


# --- join_slices ------------------------------------------------------------------------------


def halves(*, axis: int = 1, size: int = 4, start: int = 2, step: int = 1) -> tuple[list, dict]:
    """a, b: the two parts of x along an axis, as exporters write torch.chunk."""
    weights = {"o": [0], "k": [start], "e": [2**62], "a": [axis], "t": [step]}
    nodes = [node("Slice", "x o k a t", "a_"), node("Slice", "x k e a t", "b_")]
    return nodes, {k: np.array(v, np.int64) for k, v in weights.items()}


def test_slices_that_are_joined_again_are_not_cut() -> None:
    nodes, weights = halves()
    block = [*nodes, node("Relu", "b_", "m"), node("Concat", "a_ b_ m", axis=1)]
    assert ops_after(graph(block, weights), "join_slices") == {"Slice": 1, "Relu": 1, "Concat": 1}
    split = [node("Split", "x", "a_ b_", axis=1, num_outputs=2), node("Relu", "a_", "m")]
    left = ops_after(graph([*split, node("Concat", "m a_ b_", axis=-3)]), "join_slices")
    assert left == {"Split": 1, "Relu": 1, "Concat": 1}
    whole = [node("Relu", "x", "r"), node("Split", "r", "a_ b_", axis=1, num_outputs=2)]
    assert ops_after(graph([*whole, node("Concat", "a_ b_", axis=1)]), "join_slices") == {"Relu": 1}


@pytest.mark.parametrize(
    ("made", "order", "axis"),
    [
        (halves(), "b_ a_", 1),  # a shuffle
        (halves(), "a_ a_", 1),
        (halves(), "a_ b_", 2),  # along another axis
        (halves(step=2), "a_ b_", 1),
        (halves(start=1), "b_ x", 1),  # not from the start
    ],
)
def test_slices_joined_otherwise_stay(made: tuple[list, dict], order: str, axis: int) -> None:
    nodes, weights = made
    model = graph([*nodes, node("Concat", order, axis=axis)], weights)
    result, (record,) = passes.run_passes(model, ["join_slices"])
    assert record.changed == 0 and [n.op_type for n in result.graph].count("Concat") == 1


# --- normalize_silu ---------------------------------------------------------------------------

C = {k: np.float32(v) for k, v in {"one": 1, "three": 3, "six": 6, "zero": 0, "sixth": 1 / 6}.items()}
GATE = [node("Add", "x three", "p"), node("Clip", "p zero six", "g")]
ACTIVATIONS = {
    "sigmoid first": ([node("Sigmoid", "x", "s"), node("Mul", "s x")], "silu"),
    "sigmoid last": ([node("Sigmoid", "x", "s"), node("Mul", "x s")], "silu"),
    "written out": (
        [node("Neg", "x", "n"), node("Exp", "n", "e"), node("Add", "e one", "d"), node("Div", "x d")],
        "silu",
    ),
    "gate / 6": ([*GATE, node("Div", "g six", "h"), node("Mul", "x h")], "hardswish"),
    "gate * sixth": ([*GATE, node("Mul", "sixth g", "h"), node("Mul", "h x")], "hardswish"),
    "product / 6": ([*GATE, node("Mul", "x g", "h"), node("Div", "h six")], "hardswish"),
    "hard sigmoid": (
        [node("HardSigmoid", "x", "h", alpha=1 / 6, beta=0.5), node("Mul", "x h")],
        "hardswish",
    ),
    "other hard sigmoid": ([node("HardSigmoid", "x", "h", alpha=0.2), node("Mul", "x h")], ""),
    "gate of another": ([node("Sigmoid", "x", "s"), node("Relu", "x", "r"), node("Mul", "r s")], ""),
    "relu5": (
        [
            node("Add", "x three", "p"),
            node("Clip", "p zero three", "g"),
            node("Div", "g six", "h"),
            node("Mul", "x h"),
        ],
        "",
    ),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_recognised(kind: str) -> None:
    nodes, form = ACTIVATIONS[kind]
    result, _ = passes.run_passes(graph(nodes, C), ["normalize_silu"])
    assert normalize_silu.counts(result) == {
        "silu": int(form == "silu"),
        "hardswish": int(form == "hardswish"),
    }


# --- fold_focus, fold_shuffle -----------------------------------------------------------------


def focus(order: list[tuple[int, int]], kernel: int = 3, **conv: object) -> ir.Model:
    nodes, weights, parts = [], {"two": np.array([2], np.int64), "end": np.array([2**31], np.int64)}, []
    weights |= {f"a{i}": np.array([i], np.int64) for i in range(4)}
    for i, (dy, dx) in enumerate(order):
        name = f"{i}"
        nodes.append(node("Slice", f"x a{dy} end a2 two", f"r{name}"))
        nodes.append(node("Slice", f"r{name} a{dx} end a3 two", f"p{name}"))
        parts.append(f"p{name}")
    weights["w"] = f32(5, 12 // int(str(conv.get("group", 1))), kernel, kernel)
    nodes += [node("Concat", " ".join(parts), "f", axis=1), node("Conv", "f w", "y", **conv)]
    return graph(nodes, weights, x=(1, 3, 16, 12))


@settings(max_examples=10, deadline=None)
@given(order=st.permutations([(0, 0), (0, 1), (1, 0), (1, 1)]), kernel=st.sampled_from([1, 3, 5]))
def test_focus_becomes_one_convolution(order: list[tuple[int, int]], kernel: int) -> None:
    model = focus(order, kernel, pads=[kernel // 2] * 4)
    assert ops_after(model, "fold_focus") == {"Conv": 1}


def test_space_to_depth_becomes_one_convolution() -> None:
    nodes = [node("SpaceToDepth", "x", "f", blocksize=2), node("Conv", "f w", "y", pads=[0, 1, 1, 0])]
    model = graph(nodes, {"w": f32(5, 12, 3, 3)}, x=(1, 3, 16, 12))
    assert ops_after(model, "fold_focus") == {"Conv": 1}


def test_focus_look_alikes_stay() -> None:
    order = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for model in (focus(order, strides=[2, 2]), focus(order, 1, dilations=[2, 2], pads=[1] * 4)):
        assert "Concat" in ops_after(model, "fold_focus")
    assert "Concat" in ops_after(focus([(0, 0), (0, 0), (1, 0), (1, 1)]), "fold_focus")


def shuffle(split: str, step: int = 2) -> ir.Model:
    weights = {
        "s1": np.array([4, step, 48] if step == 2 else [2, 4, 48], np.int64),
        "s2": np.array([2, -1, 4, 8, 6], np.int64),
        "s3": np.array([1, 8, 8, 6], np.int64),
        "i0": np.array(0, np.int64),
        "i1": np.array(1, np.int64),
    }
    nodes = [node("Reshape", "x s1", "r"), node("Transpose", "r", "t", perm=[1, 0, 2])]
    if split == "gather":
        nodes += [
            node("Reshape", "t s2", "u"),
            node("Gather", "u i0", "a", axis=0),
            node("Gather", "u i1", "b", axis=0),
        ]
    else:
        nodes += [node("Reshape", "t s3", "u"), node("Split", "u", "a b", axis=1, num_outputs=2)]
    nodes += [node("Relu", "a"), node("Sigmoid", "b", "z")]
    return graph(nodes, weights, x=(1, 8, 8, 6), outputs=("y", "z"))


@pytest.mark.parametrize("split", ["gather", "split"])
def test_channel_shuffle_becomes_slices(split: str) -> None:
    assert ops_after(shuffle(split), "fold_shuffle") == {"Relu": 1, "Sigmoid": 1, "Slice": 2}


def test_a_shuffle_without_a_step_stays() -> None:
    """Two groups of four: each half takes channels 0 4 1 5, no arithmetic progression."""
    assert "Transpose" in ops_after(shuffle("split", step=4), "fold_shuffle")


# --- compact, facts ---------------------------------------------------------------------------


def test_compact_keeps_interface_and_bytes_repeat() -> None:
    nodes = [
        node(
            "Conv", "x w a", "b", dilations=[1, 1], group=1, kernel_shape=[3, 3], pads=[0] * 4, strides=[1, 1]
        ),
        node("LeakyRelu", "b", "c", alpha=0.01),
        node("LeakyRelu", "c", alpha=0.1),
    ]
    # the names that compact hands out itself must not collide with these
    model = graph(nodes, {"w": f32(4, 4, 3, 3), "a": f32(4)})
    data = [ir.to_proto(passes.run_passes(model, ["compact"])[0]) for _ in range(2)]
    assert data[0].SerializeToString(deterministic=True) == data[1].SerializeToString(deterministic=True)
    proto = data[0]
    assert [i.name for i in proto.graph.input] == ["x"]
    assert [o.name for o in proto.graph.output] == ["y"]
    assert not proto.graph.value_info
    assert [[a.name for a in n.attribute] for n in proto.graph.node] == [[], [], ["alpha"]]
    assert not any(n.name or n.doc_string for n in proto.graph.node)
    names = [t.name for t in proto.graph.initializer] + [o for n in proto.graph.node for o in n.output]
    assert len(set(names)) == len(names)


def test_compacting_twice_changes_nothing(tmp_path: Path) -> None:
    net = detectors.randomize(detectors.VARIANTS["yolov5", "slice"]())
    model = frontends.load(detectors.export(net, tmp_path / "net.onnx"))
    once, _ = passes.run_passes(model, ["compact"])
    twice, _ = passes.run_passes(once, ["compact"])
    assert ir.to_proto(once).SerializeToString() == ir.to_proto(twice).SerializeToString()


def test_facts_count_by_hand() -> None:
    nodes = [
        node("Conv", "x w b", "c", group=2, strides=[2, 2], pads=[1] * 4),
        node("ConvTranspose", "c t", "u", strides=[2, 2]),
        node("Flatten", "u", "f"),
        node("Gemm", "f g"),
    ]
    weights = {"w": f32(6, 2, 3, 3), "b": f32(6), "t": f32(6, 2, 2, 2), "g": f32(2 * 8 * 6, 7)}
    facts = graph_facts.facts(graph(nodes, weights))
    conv, transposed, dense = 6 * 4 * 3 * (2 * 9), 6 * 4 * 3 * (2 * 4), 7 * 96
    assert [layer["macs"] for layer in facts["layers"]] == [conv, transposed, dense]
    assert facts["macs"] == conv + transposed + dense
    assert facts["parameters"] == 108 + 6 + 48 + 672
    assert facts["weight_bytes"] == 4 * facts["parameters"]
    assert facts["ops"] == {"Conv": 1, "ConvTranspose": 1, "Flatten": 1, "Gemm": 1}
    assert facts["layers"][0]["shape"] == [1, 6, 4, 3]


def test_facts_of_a_compact_model(tmp_path: Path) -> None:
    net = detectors.randomize(detectors.VARIANTS["yolov8", "joined"]())
    model = frontends.load(detectors.export(net, tmp_path / "net.onnx"))
    model, _ = passes.run_passes(model, passes.BEFORE_SPLIT)
    compact, _ = passes.run_passes(model, ["compact"])
    assert graph_facts.facts(compact)["macs"] == graph_facts.facts(model)["macs"] > 0
    infer(compact)
    assert all(o.shape is not None for n in compact.graph for o in n.outputs)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("yolox_nano/yolox_nano.onnx", 904_467), ("fastestdet/FastestDet.onnx", 240_305)],
)
def test_compact_files_are_little_more_than_weights(name: str, parameters: int) -> None:
    model = frontends.load(shared_data() / "models" / name)
    prepared = passes.prepare(model, check=False)
    size = len(ir.to_proto(prepared.model).SerializeToString())
    facts = graph_facts.facts(prepared.model)
    assert facts["parameters"] == parameters
    assert size <= 1.02 * facts["weight_bytes"]
    structure = size - facts["weight_bytes"]
    assert structure <= 0.02 * 2 * parameters  # float16 weights take half, the structure the same


def test_two_preparations_give_the_same_bytes() -> None:
    path = shared_data() / "models" / "fastestdet" / "FastestDet.onnx"
    first, second = (
        ir.to_proto(passes.prepare(frontends.load(path), check=False).model).SerializeToString()
        for _ in range(2)
    )
    assert first == second
