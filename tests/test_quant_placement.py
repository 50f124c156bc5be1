"""Placement: which values a library's rules and a search's choices annotate, and with what."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.backends.onnxruntime.lower import lower
from edgekit.errors import CalibrationError, UsageError
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.lint import lint
from edgekit.quant.placement import Choices, place
from edgekit.quant.residual import skip_inputs
from edgekit.quant.rules import refusal, rules_for
from edgekit.quant.weights import codes, exact_in_float16, rounded, weight_params
from edgekit.spec import DType, QuantParams
from edgekit.target import Target
from tests.quant_graphs import (
    BETWEEN,
    SHAPE,
    annotated,
    between,
    executed,
    network,
    params,
    produced,
    statistics,
)
from tests.tensorrt_graphs import graph

ARM, ORIN = Target.load("rpi5"), Target.load("jetson-orin")
X86 = replace(Target.load("rpi5"), arch="x86_64", cpus=(replace(ARM.cpus[0], isa=("avx2", "avx512_vnni")),))
ORT, ORT_ARM = rules_for("onnxruntime", X86), rules_for("onnxruntime", ARM)
TRT, LITERT = rules_for("tensorrt", ORIN), rules_for("litert", ARM)
CONV = "Conv <pads=[1,1,1,1]>"

KERNELS = {
    "Conv": "QLinearConv",
    **{op: f"QLinear{op}" for op in ("Add", "Mul", "Sigmoid", "LeakyRelu", "Concat")},
    **{op: f"QLinear{op}" for op in ("AveragePool", "GlobalAveragePool", "Softmax")},
    "MaxPool": "NhwcMaxPool",
}
LIBRARY = {"HardSwish": {"Mul"}}
"""Operators that ONNX Runtime splits a float one into."""
DROPPED = {
    "Reshape",
    "Transpose",
    "Expand",
    "Unsqueeze",
    "Squeeze",
    "Flatten",
    "Tile",
    "Gather",
    "Slice",
    "Split",
    "Pad",
}
"""They run on codes or are folded away; either way no DequantizeLinear is left for them."""


@pytest.mark.parametrize("arm", [False, True], ids=["x86", "arm"])
@pytest.mark.parametrize("name", BETWEEN)
def test_what_the_lint_promises_is_what_onnxruntime_runs(name: str, arm: bool, tmp_path: Path) -> None:
    """Every operator, on codes exactly where the lint says so, with no conversion left over."""
    rules, target = (ORT_ARM, ARM) if arm else (ORT, X86)
    model = annotated(between(name), rules)
    reports = lint(model, rules)
    ran = executed(lower(model, target, "int8")[0].data, tmp_path, arm=arm)
    absorbed = {r.op for r in reports if r.integer} & rules.absorbed
    assert not absorbed & set(ran)
    expected = Counter(KERNELS[r.op] for r in reports if r.integer and r.op in KERNELS)
    assert {k: ran[k] for k in expected} == expected
    floats = [r.op for r in reports if not r.integer and r.op != "Identity"]
    assert not any(ran[op] for op in set(KERNELS) - {"MaxPool"} - set(floats) - LIBRARY.get(name, set()))
    # one conversion into the network and one out of it, and a pair around each group of float nodes
    assert ran["QuantizeLinear"] == 1 + bool(floats)
    assert (ran["DequantizeLinear"] == 1) == (not floats)
    for r in reports:
        if r.integer:
            assert r.op in {*KERNELS, *DROPPED, *absorbed, "Resize"}, r


def test_the_model_is_not_changed() -> None:
    model = between("SiLU")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    annotated(model, ORT)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert params(model) == {}


def test_everything_between_convolutions_is_annotated_and_biases_are_not() -> None:
    found = params(annotated(between("SiLU"), ORT))
    assert set(found) == {"x", "a", "g", "b", "y", "w3", "w2"}
    assert all(p.dtype is DType.int8 for p in found.values())
    assert found["w2"].axis == 0
    assert len(found["w2"].scale) == 16
    assert set(found["w2"].zero_point) == {0}
    assert any(found[v].zero_point != (0,) for v in "xaby"), "activations are asymmetric"


def test_the_input_keeps_its_whole_range() -> None:
    """Pictures have 256 levels, which only the whole range holds exactly."""
    model = between("nothing")
    stats = statistics(model)
    found = params(place(model, stats, ORT, Choices(scheme="percentile:90")))
    assert found["x"] == params(place(model, stats, ORT, Choices(scheme="minmax")))["x"]
    assert found["y"] != params(place(model, stats, ORT, Choices(scheme="minmax")))["y"]


@pytest.mark.parametrize("name", ["Relu", "Clip"])
def test_an_activation_is_absorbed_in_the_range(name: str) -> None:
    found = params(annotated(between(name), ORT))
    assert "a" not in found
    assert found["b"].zero_point == (-128,)
    if name == "Clip":
        assert found["b"].scale[0] * 255 <= 2 * (1 + 1e-6)


def test_a_given_range_ends_where_the_activation_does() -> None:
    found = params(annotated(between("Clip"), ORT, ranges=(("b", (-3.0, 5.0)),)))["b"]
    assert found.zero_point == (-128,)
    assert found.scale[0] * 255 == pytest.approx(2)


def test_an_activation_that_others_look_behind_stands_alone() -> None:
    model = network(
        f"a = {CONV} (x, w1, b1) \n r = Relu(a) \n b = {CONV} (r, w2, b2) \n c = {CONV} (a, w3, b3) \n y = Add(b, c)"
    )
    found = annotated(model, ORT)
    assert {"a", "r"} <= set(params(found))
    (relu,) = (r for r in lint(found, ORT) if r.op == "Relu")
    assert not relu.integer
    assert "stands alone" in relu.reason


@pytest.mark.parametrize(
    "name", ["MaxPool", "ResizeNearest", "Reshape", "Transpose", "Slice", "Gather", "Split"]
)
def test_what_moves_codes_keeps_one_scale(name: str) -> None:
    found = params(annotated(between(name), ORT))
    outputs = [v for v in ("b", "p", "q") if v in found]
    assert all(found[v] == found["a"] for v in outputs)


def test_concat_shares_its_scale_unless_told() -> None:
    model = between("Concat")
    together = params(annotated(model, ORT))
    assert together["a"] == together["c"] == together["n"]
    apart = params(annotated(model, ORT, own_scales=frozenset({"n"})))
    assert len({apart[v] for v in "acn"}) > 1


def test_a_given_range_decides_for_all_that_share_it() -> None:
    found = params(annotated(between("Concat"), ORT, ranges=(("n", (-1.0, 1.0)),)))
    assert found["a"] == found["c"] == found["n"]
    assert found["a"].scale[0] == pytest.approx(2 / 255)


def test_a_scheme_of_its_own() -> None:
    model, stats = between("nothing"), None
    stats = statistics(model)
    base = Choices(scheme="minmax")
    one = params(place(model, stats, ORT, replace(base, schemes=(("y", "percentile:90"),))))
    rest = params(place(model, stats, ORT, base))
    assert {n for n in one if one[n] != rest[n]} == {"y"}


HEAD = "a = Conv <pads=[1,1,1,1]> (x, w1, b1) \n g = GlobalAveragePool(a) \n f = Flatten(g) \n "


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("y = Gemm(f, wm, b2)", ""),
        ("y = Gemm <transB=1> (f, wm)", ""),
        ("y = MatMul(f, wm)", ""),
        ("y = Gemm <alpha=0.5> (f, wm, b2)", "it scales its product by alpha or beta"),
        ("y = Gemm <beta=0.5> (f, wm, b2)", "it scales its product by alpha or beta"),
        ("t = Transpose(f) \n y = Gemm <transA=1> (t, wm, b2)", "it transposes its input"),
        ("t = Transpose(f) \n y = MatMul(f, t)", "its weight is computed, not constant"),
    ],
)
def test_products(line: str, reason: str, tmp_path: Path) -> None:
    model = annotated(network(HEAD + line), ORT)
    (report,) = (r for r in lint(model, ORT) if r.id == "y")
    assert report.reason == reason
    ran = executed(lower(model, X86, "int8")[0].data, tmp_path)
    assert (ran["QGemm"] + ran["QLinearMatMul"] == 1) == (not reason)


# --- float islands ---------------------------------------------------------------------------------


def test_a_float_convolution_keeps_float_weights_and_activations() -> None:
    """What is left out is left out whole: float weights, and no codes between two float layers."""
    model = network(
        f"a = {CONV} (x, w1, b1) \n g = Sigmoid(a) \n m = Mul(a, g) \n b = {CONV} (m, w2, b2) \n y = {CONV} (b, w3, b3)"
    )
    found = params(annotated(model, ORT, float_nodes=frozenset({"a", "b"})))
    assert set(found) == {"b", "y", "w3"}


def test_a_float_gate_makes_the_whole_silu_float() -> None:
    found = params(annotated(between("SiLU"), ORT, float_nodes=frozenset({"g"})))
    assert "g" not in found
    assert {"a", "b"} <= set(found)


def test_concat_of_float_results_runs_on_codes_only_behind_integer_layers() -> None:
    body = f"a = {CONV} (x, w1, b1) \n g = Sigmoid(a) \n m = Mul(a, g) \n n = Concat <axis=1> (m, m) \n "
    body += f"s = Slice(n, s0, s16, s1) \n y = {CONV} (s, w2, b2)"
    gate = params(annotated(network(body), ORT, float_nodes=frozenset({"g"})))
    assert {"m", "n", "s"} <= set(gate)
    island = params(annotated(network(body), ORT, float_nodes=frozenset({"a"})))
    assert not {"m", "n"} & set(island)


def test_the_tail_stays_float() -> None:
    model = network(f"a = {CONV} (x, w1, b1) \n y = Sigmoid(a)")
    assert set(params(annotated(model, ORT))) == {"x", "a", "w1"}


def test_float_everything_annotates_nothing() -> None:
    assert params(annotated(between("Add"), ORT, float_nodes=frozenset({"a", "c", "y"}))) == {}


@pytest.mark.parametrize("choice", [{"float_nodes": frozenset({"aa"})}, {"ranges": (("aa", (0.0, 1.0)),)}])
def test_a_choice_for_nothing_is_refused(choice: dict) -> None:
    with pytest.raises(UsageError, match=r"'aa': not in this network. Did you mean 'a'"):
        annotated(between("Add"), ORT, **choice)


def test_a_value_without_statistics_is_refused() -> None:
    model = between("Add")
    stats = {n: s for n, s in statistics(model).items() if n != "a"}
    with pytest.raises(CalibrationError, match="value a: has no statistics"):
        place(model, stats, ORT)


def test_choices_are_a_cache_key() -> None:
    one = Choices("mse", (("a", "minmax"),), (("b", (0.0, 1.0)),), frozenset("xy"), frozenset("z"))
    other = replace(one, float_nodes=frozenset("yx"))
    assert hash(one) == hash(other)
    text = json.dumps(one.to_json(), sort_keys=True)
    assert text == json.dumps(other.to_json(), sort_keys=True)
    assert Choices.from_json(json.loads(text)) == one


# --- LiteRT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("Sigmoid", "b", (1 / 256, -128)), ("Tanh", "b", (1 / 128, 0))],
)
def test_litert_fixes_outputs(name: str, value: str, expected: tuple[float, int]) -> None:
    found = params(annotated(between(name), LITERT))[value]
    assert (found.scale[0], found.zero_point[0]) == expected
    if name == "Sigmoid":
        free = params(annotated(between(name), ORT))[value]
        assert (free.scale[0], free.zero_point[0]) != expected


def test_a_fixed_value_stands_aside_where_scales_are_shared() -> None:
    body = f"a = {CONV} (x, w1, b1) \n g = Sigmoid(a) \n n = Concat <axis=1> (a, g) \n s = Slice(n, s0, s16, s1) \n "
    model = annotated(network(body + f"y = {CONV} (s, w2, b2)"), LITERT)
    found = params(model)
    assert found["g"].scale == (1 / 256,)
    assert found["a"] == found["n"] == found["s"] != found["g"]


def test_a_fixed_scale_goes_on_through_what_moves_codes() -> None:
    body = f"a = {CONV} (x, w1, b1) \n g = Sigmoid(a) \n p = Transpose <perm=[0,1,3,2]> (g) \n y = {CONV} (p, w2, b2)"
    found = params(annotated(network(body), LITERT))
    assert found["p"] == found["g"]
    assert found["p"].scale == (1 / 256,)


def test_a_moved_fixed_scale_stands_aside_too() -> None:
    body = f"a = {CONV} (x, w1, b1) \n g = Sigmoid(a) \n p = Transpose <perm=[0,1,3,2]> (g) \n "
    body += f"n = Concat <axis=1> (a, p) \n s = Slice(n, s0, s16, s1) \n y = {CONV} (s, w2, b2)"
    found = params(annotated(network(body), LITERT))
    assert found["p"].scale == (1 / 256,)
    assert found["a"] == found["n"] != found["p"]


def test_litert_absorbs_what_its_operators_take_and_runs_the_rest_alone() -> None:
    other = params(annotated(between("Clip"), LITERT))  # at 2: TensorFlow Lite has 6 and 1
    assert {"a", "b"} <= set(other)
    six = params(annotated(between("Clip"), replace(LITERT, clips=frozenset({(0.0, 2.0)}))))
    assert "a" not in six
    assert "a" not in params(annotated(between("Relu"), LITERT))
    pooled = network(
        f"a = {CONV} (x, w1, b1) \n p = GlobalAveragePool(a) \n r = Relu(p) \n s = Add(a, r) \n y = {CONV} (s, w2, b2)"
    )
    assert {"p", "r"} <= set(params(annotated(pooled, LITERT)))
    assert "p" not in params(annotated(pooled, ORT))
    assert all(r.integer for r in lint(annotated(pooled, LITERT), LITERT))


@pytest.mark.parametrize("name", ["Pad", "ResizeLinear", "DepthToSpace"])
def test_litert_shares_the_scale_of_moves(name: str) -> None:
    model = annotated(between(name), LITERT)
    found = params(model)
    assert found["a"] == found["b"]
    assert all(r.integer for r in lint(model, LITERT))
    if name == "ResizeLinear":  # the others only move what they get
        assert (other := params(annotated(between(name), ORT)))["a"] != other["b"]


# --- boards ----------------------------------------------------------------------------------------


def test_codes_follow_the_board() -> None:
    assert (ORT.codes, ORT_ARM.codes) == ("uint8", "int8")
    assert rules_for("openvino", X86).codes == "uint8"
    with pytest.raises(UsageError, match="no rules for int8"):
        rules_for("tensorflow", X86)


def test_weights_have_seven_bits_where_products_saturate() -> None:
    """AVX2 and AVX-512 without VNNI add two products in 16 bits."""
    plain = replace(X86, cpus=(replace(X86.cpus[0], isa=("avx2", "avx512f")),))
    model = annotated(between("Relu"), rules_for("onnxruntime", plain), weights="mse")
    for name in ("w2", "w3"):
        value = model.graph.initializers[name]
        assert np.abs(codes(value.const_value.numpy(), quant(value))).max() == 64
    model = annotated(between("Relu"), ORT)
    assert (
        np.abs(
            codes(model.graph.initializers["w2"].const_value.numpy(), quant(model.graph.initializers["w2"]))
        ).max()
        == 127
    )


# --- TensorRT --------------------------------------------------------------------------------------


def test_tensorrt_quantizes_inputs_only_and_symmetrically() -> None:
    found = params(annotated(between("SiLU"), TRT))
    assert set(found) == {"x", "b", "w2", "w3"}
    assert all(set(p.zero_point) == {0} for p in found.values())


def test_tensorrt_scales_are_exact_in_float16() -> None:
    for p in params(annotated(between("SiLU"), TRT)).values():
        assert np.array_equal(np.asarray(p.scale).astype(np.float16).astype(np.float64), p.scale)
    wanted = np.array([1e-9, 3.3e-5, 0.01, 0.1234567, 2.0])
    found = exact_in_float16(wanted)
    assert (found >= np.float32(wanted) * (1 - 1e-7)).all()
    assert np.array_equal(found.astype(np.float16).astype(np.float32), found)


RESIDUAL = f"a = {CONV} (x, w1, b1) \n b = {CONV} (a, w2, b2) \n s = Add(b, a) \n r = Relu(s) \n y = {CONV} (r, w3, b3)"
DOWNSAMPLE = (
    f"a = {CONV} (x, w1, b1) \n r = Relu(a) \n b = {CONV} (r, w2, b2) \n c = {CONV} (x, w3, b3) \n "
    f"s = Add(b, c) \n y = {CONV} (s, w3, b3)"
)


def test_tensorrt_quantizes_the_skip_input_and_not_the_fused_one() -> None:
    found = params(annotated(network(DOWNSAMPLE), TRT))
    assert "c" in found
    assert "b" not in found
    without = params(annotated(network(DOWNSAMPLE), replace(TRT, residual=False)))
    assert "c" not in without


def test_skip_inputs_by_structure() -> None:
    def found(body: str) -> dict[str, str]:
        model = network(body)
        return {
            str(n.outputs[0].name): str(v.name)
            for n, v in skip_inputs(model.graph, list(model.graph)).items()
        }

    assert found(RESIDUAL) == {"s": "a"}
    assert found(DOWNSAMPLE) == {"s": "c"}
    silu = f"a = {CONV} (x, w1, b1) \n g = Sigmoid(a) \n m = Mul(a, g) \n y = Add(x, m)"
    assert found(silu) == {"y": "x"}
    assert found(silu.replace("(x, m)", "(m, x)")) == {"y": "x"}
    # two branches of one length, a sum with a constant, a value with itself, no convolution at the end
    assert found(f"a = {CONV} (x, w1, b1) \n b = {CONV} (x, w2, b2) \n y = Add(a, b)") == {}
    assert found(f"a = {CONV} (x, w1, b1) \n y = Add(a, k)") == {}
    assert found(f"a = {CONV} (x, w1, b1) \n y = Add(a, a)") == {}
    assert found(f"a = {CONV} (x, w1, b1) \n p = MaxPool <kernel_shape=[1,1]> (a) \n y = Add(p, x)") == {}


def test_tensorrt_concat_sharing_is_a_choice() -> None:
    model = between("Concat")
    shared = params(annotated(model, TRT))
    assert shared["a"] == shared["c"] == shared["n"] == shared["b"]
    alone = params(annotated(model, TRT, own_scales=frozenset({"n"})))
    assert not {"a", "c"} & set(alone)


def test_tensorrt_leaves_thin_layers_in_float() -> None:
    def kept(shape: tuple[int, ...], group: int = 1, first: bool = True) -> bool:
        source = "x" if first else "z"
        body = f"z = Relu(x) \n y = Conv <group={group}> ({source}, weight)"
        channels = shape[1] * group
        made = graph(
            body,
            {"x": (1, channels, 8, 8)},
            {"y": (1, shape[0], 1, 1)},
            {"weight": np.ones(shape, np.float32)},
            19,
        )
        made.graph.output[0].type.tensor_type.ClearField("shape")
        model = ir.from_proto(onnx.shape_inference.infer_shapes(made))
        return not refusal(produced(model, "y"), TRT)

    assert kept((16, 16, 3, 3))
    assert kept((16, 3, 3, 3)), "the first layer"
    assert not kept((16, 3, 3, 1)), "not a square kernel"
    assert kept((8, 16, 1, 1), first=False)
    assert not kept((8, 8, 1, 1), first=False)
    assert not kept((4, 64, 1, 1), first=False), "a box head"
    assert kept((8, 1, 3, 3), group=8)
    assert not kept((12, 1, 3, 3), group=12)
    assert not kept((8, 1, 1, 1), group=8)


# --- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scheme", ["minmax", "mse"])
def test_weight_scales(axis: int, scheme: str) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((6, 5, 3, 3)).astype(np.float32)
    weights[(slice(None),) * axis + (2,)] = 0
    found = weight_params(weights, axis, scheme)
    assert (len(found.scale), found.axis) == (weights.shape[axis], axis)
    assert found.scale[2] == 1.0
    rest = np.delete(np.moveaxis(weights, axis, 0), 2, 0)
    scale = np.delete(np.array(found.scale), 2)
    limit = np.abs(rest).reshape(len(rest), -1).max(1) / 127
    assert (scale <= limit * (1 + 1e-6)).all()
    if scheme == "minmax":
        assert scale == pytest.approx(limit)


def test_mse_weights_lose_less() -> None:
    weights = np.random.default_rng(0).standard_t(3, (8, 512, 1, 1)).astype(np.float32)
    errors = [
        ((rounded(weights, weight_params(weights, 0, scheme)) - weights) ** 2).sum(axis=(1, 2, 3))
        for scheme in ("minmax", "mse")
    ]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < errors[0].sum()


def test_weights_of_codes_come_back_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((16, 16, 3, 3)).astype(np.float32)
    found = weight_params(weights, 0)
    once = rounded(weights, found)
    assert np.array_equal(rounded(once, found), once)


def test_a_repair_chooses_the_codes() -> None:
    """Params on a weight stay, and so do the numbers behind its codes."""
    model = between("nothing")
    value = model.graph.initializers["w2"]
    chosen = QuantParams(DType.int8, (0.0123,) * 16, (0,) * 16, 0)
    numbers = rounded(value.const_value.numpy(), chosen)
    value.const_value = ir.tensor(numbers, name="w2")
    set_quant(value, chosen)
    found = annotated(model, ORT).graph.initializers["w2"]
    assert quant(found) == chosen
    assert np.array_equal(found.const_value.numpy(), numbers)


def test_int32_biases_do_not_overflow() -> None:
    """A dead channel with a large bias: its weight scale grows until the bias fits."""
    model = between("nothing")
    weights = model.graph.initializers["w2"].const_value.numpy().copy()
    weights[3] *= 1e-12
    model.graph.initializers["w2"].const_value = ir.tensor(weights, name="w2")
    bias = np.full(16, 100, np.float32)
    model.graph.initializers["b2"].const_value = ir.tensor(bias, name="b2")
    found = params(annotated(model, ORT))
    assert 100 / (found["w2"].scale[3] * found["a"].scale[0]) < 2**31
    loose = params(annotated(model, replace(ORT, int32_bias=False)))
    assert 100 / (loose["w2"].scale[3] * loose["a"].scale[0]) > 2**31


def test_shapes_are_those_of_the_network() -> None:
    assert tuple(annotated(between("Add"), ORT).graph.outputs[0].shape) == SHAPE


@pytest.mark.parametrize("rules", [ORT, ORT_ARM, LITERT], ids=lambda r: r.name)
@pytest.mark.parametrize("activation", ["Relu(a)", "Clip(a, zero, six)"])
def test_an_activation_does_not_cut_off_what_it_is_joined_with(rules, activation):
    """The codes of a Relu end at 0: joined with numbers below, it keeps a scale of its own."""
    model = network(
        f"a = {CONV} (x, w1, b1) \n r = {activation} \n c = {CONV} (x, w2, b2) \n "
        f"n = Concat <axis=1> (r, c) \n s = Slice(n, s8, s16, s1) \n d = Concat <axis=1> (s, s) \n y = {CONV} (d, w3, b3)"
    )
    found = params(annotated(model, rules))
    assert found["c"] == found["n"] == found["d"] != found["r"]
    seen, (scale,), (zero,) = statistics(model)["c"], found["c"].scale, found["c"].zero_point
    assert scale * (-128 - zero) <= seen.low + scale and scale * (127 - zero) >= seen.high - scale
    assert found["r"].zero_point == (-128,)
