"""The toolchain half of the tensorrt backend: float16 typing, lint, plan. Needs no NVIDIA library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from onnx import TensorProto, numpy_helper

from edgekit.backends.tensorrt import operators
from edgekit.backends.tensorrt.lint import lint, summary
from edgekit.backends.tensorrt.lower import lower
from edgekit.backends.tensorrt.plan import BuildPlan, parse_version
from edgekit.errors import LoweringError
from edgekit.passes.graph import constant, new_weight
from edgekit.quant.annotate import set_quant
from edgekit.quant.rules import rules_for
from edgekit.spec import DType, QuantParams
from edgekit.target import Target
from tests.helpers import shared_data
from tests.quant_graphs import network, produced, unmeasured
from tests.tensorrt_graphs import BAD, build, graph, random_network

ORIN = Target.load("jetson-orin")


def lowered(model: onnx.ModelProto, precision: str = "float16", **kwargs) -> onnx.ModelProto:
    (payload,) = lower(ir.from_proto(model), ORIN, precision, **kwargs)
    proto = onnx.load_from_string(payload.data)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, inputs
    )


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info)}
    return found | {t.name: t.data_type for t in inferred.initializer}


# --- float16 ---


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_networks_agree_and_are_strongly_typed(seed: int) -> None:
    model, inputs = random_network(seed)
    half = lowered(model)
    assert [v.name for v in half.graph.input] == [v.name for v in model.graph.input]
    assert [v.name for v in half.graph.output] == [v.name for v in model.graph.output]
    io = (*half.graph.input, *half.graph.output)
    assert all(v.type.tensor_type.elem_type == TensorProto.FLOAT for v in io)
    assert lint(ir.from_proto(half)) == ()
    for node in half.graph.node:
        kinds = {types(half)[n] for n in node.input if n} & {TensorProto.FLOAT, TensorProto.FLOAT16}
        assert len(kinds) <= 1 or node.op_type == "Resize", (node.op_type, kinds)
    for want, got in zip(run(model, inputs), run(half, inputs), strict=True):
        # 11 bits of mantissa; errors add up over at most 12 layers of values up to about 50
        np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02 * (1 + np.abs(want).max()))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["float16", "float32"]))
def test_same_graph_same_bytes_and_the_input_is_untouched(seed: int, precision: str) -> None:
    model, _ = random_network(seed)
    source = ir.from_proto(model)
    # `source` shares its tensors with `model`
    before = [m.SerializeToString(deterministic=True) for m in (ir.to_proto(source), model)]
    first = lower(source, ORIN, precision)
    assert [m.SerializeToString(deterministic=True) for m in (ir.to_proto(source), model)] == before
    assert first == lower(ir.from_proto(model), ORIN, precision)


def test_float32_is_exact() -> None:
    model, inputs = random_network(7)
    for want, got in zip(run(model, inputs), run(lowered(model, "float32"), inputs), strict=True):
        np.testing.assert_array_equal(got, want)


def conv_net(weight: np.ndarray, tail: str = "y = Relu(c)") -> onnx.ModelProto:
    return graph(
        f"c = Conv(x, w) \n {tail}",
        {"x": (1, 4, 8, 8)},
        {"y": (1, 4, 8, 8)},
        {"w": weight.astype(np.float32)},
    )


def test_weights_beyond_float16_keep_their_node_float32() -> None:
    weight = np.ones((4, 4, 1, 1))
    assert TensorProto.FLOAT16 in {t.data_type for t in lowered(conv_net(weight)).graph.initializer}
    weight[0, 0] = 70000
    half = lowered(conv_net(weight))
    assert [t.data_type for t in half.graph.initializer] == [TensorProto.FLOAT]
    assert [n.op_type for n in half.graph.node] == ["Conv", "Cast", "Relu", "Cast"]
    (payload,) = lower(ir.from_proto(conv_net(weight)), ORIN, "float16")
    assert payload.options["plan"]["kept_float32"] == {"Conv: constants above 65504": 1}
    x = np.full((1, 4, 8, 8), 0.5, np.float32)
    np.testing.assert_allclose(run(half, {"x": x})[0], run(conv_net(weight), {"x": x})[0], rtol=1e-3)


def test_known_activations_beyond_the_limit_keep_their_node_float32() -> None:
    net = conv_net(np.ones((4, 4, 1, 1)))
    assert [n.op_type for n in lowered(net, ranges={"c": 512.0}).graph.node] == [
        "Cast",
        "Conv",
        "Relu",
        "Cast",
    ]
    # c is written by Conv and read by Relu: both stay, so no Cast is left
    assert [n.op_type for n in lowered(net, ranges={"c": 513.0}).graph.node] == ["Conv", "Relu"]


def test_clip_saturates_its_bounds() -> None:
    net = graph(
        "y = Clip(x, lo, hi)",
        {"x": (4,)},
        {"y": (4,)},
        {"lo": np.float32(0), "hi": np.float32(np.finfo(np.float32).max)},
    )
    half = lowered(net)
    assert [n.op_type for n in half.graph.node] == ["Cast", "Clip", "Cast"]
    x = np.array([-1, 0, 3, 6e4], np.float32)
    np.testing.assert_allclose(run(half, {"x": x})[0], [0, 0, 3, 6e4], rtol=1e-3)


def test_operators_listed_as_float32_stay_so() -> None:
    net = graph(
        "r = Relu(x) \n s = ReduceSumSquare <keepdims=1> (r, axes) \n y = Sqrt(s)",
        {"x": (1, 512)},
        {"y": (1, 1)},
        {"axes": np.array([1])},
        opset=18,
    )
    half = lowered(net)
    assert [n.op_type for n in half.graph.node] == [
        "Cast",
        "Relu",
        "Cast",
        "ReduceSumSquare",
        "Cast",
        "Sqrt",
        "Cast",
    ]
    # the sum, 204800, is beyond float16: the Cast after it overflows unless the range is known
    x = np.full((1, 512), 20, np.float32)
    kept = lowered(net, ranges={"s": 204800.0})
    assert [n.op_type for n in kept.graph.node] == ["Cast", "Relu", "Cast", "ReduceSumSquare", "Sqrt"]
    np.testing.assert_allclose(run(kept, {"x": x})[0], [[np.sqrt(204800)]], rtol=1e-3)


def test_value_used_in_both_precisions_is_cast_once() -> None:
    net = graph(
        "a = Relu(x) \n b = GridSample(a, g) \n c = GridSample(a, g) \n d = Sigmoid(a) \n y = Sum(b, c, d)",
        {"x": (1, 1, 4, 4), "g": (1, 4, 4, 2)},
        {"y": (1, 1, 4, 4)},
        opset=16,
    )
    ops = [n.op_type for n in lowered(net).graph.node]
    # in: x (g is read in float32 only); a to float32 once; b and c back; out: y
    assert ops.count("Cast") == 5


def test_input_used_twice_is_cast_once() -> None:
    net = graph("a = Relu(x) \n b = Sigmoid(x) \n y = Add(a, b)", {"x": (4,)}, {"y": (4,)})
    assert [n.op_type for n in lowered(net).graph.node] == ["Cast", "Relu", "Sigmoid", "Add", "Cast"]


def test_output_that_is_also_read_inside_and_outputs_of_other_types() -> None:
    net = graph(
        "a = Relu(x) \n b = Sigmoid(a) \n i = ArgMax <axis=1, keepdims=0> (b)",
        {"x": (1, 5)},
        {"a": (1, 5), "b": (1, 5), "i": (1,)},
        types={"i": TensorProto.INT64},
    )
    half = lowered(net)
    assert [v.type.tensor_type.elem_type for v in half.graph.output] == [1, 1, 7]
    x = np.array([[-1, 4, 2, 0, 1]], np.float32)
    a, b, i = run(half, {"x": x})
    np.testing.assert_allclose(a, np.maximum(x, 0))
    np.testing.assert_allclose(b, 1 / (1 + np.exp(-np.maximum(x, 0))), rtol=1e-3)
    assert i == [1]


def test_casts_in_the_graph_follow_the_type() -> None:
    net = graph(
        "s = Shape(x) \n f = Cast <to=1> (s) \n p = ReduceProd <keepdims=0> (f) \n r = Relu(x) \n y = Div(r, p)",
        {"x": (2, 3)},
        {"y": (2, 3)},
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(run(lowered(net), {"x": x})[0], x / 6, rtol=1e-3)


# --- lint ---


@pytest.mark.parametrize("name", sorted(BAD))
def test_lint_finds(name: str) -> None:
    bad = BAD[name]
    findings = lint(build(bad), bad.tensorrt, bad.compute_capability)
    assert {f.rule for f in findings} == {bad.rule}, summary(findings)
    assert bad.says in summary(findings)
    assert "\n" not in summary(findings)


def test_all_findings_come_in_one_line() -> None:
    net = graph(
        "d = Det(x) \n e = Det(x) \n u = Custom.Op(x) \n q = Hardmax(u) \n y = Sum(q, d, e)",
        {"x": (3, 3)},
        {"y": ()},
    )
    net.graph.node[2].op_type, net.graph.node[2].domain = "Op", "com.custom"
    net.opset_import.add(domain="com.custom", version=1)
    for i, node in enumerate(net.graph.node):
        node.name = f"n{i}"
    with pytest.raises(LoweringError) as caught:
        lower(ir.from_proto(net), ORIN, "float16")
    message = str(caught.value)
    assert "\n" not in message
    assert "Det 'n0' and 1 more: not supported by TensorRT's ONNX parser" in message
    assert "com.custom::Op 'n2': a custom operator" in message


def test_operator_table_agrees_with_onnx() -> None:
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    assert set(operators.TYPES) <= known
    assert set(operators.SINCE) <= set(operators.TYPES)
    assert not {"Det", "Unique", "QLinearConv", "Optional"} & set(operators.TYPES)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu": None}, "has no GPU"),
        ({"software": (replace(ORIN.software[0], tensorrt="8.5.2"),)}, "carries TensorRT 8.5.2"),
    ],
)
def test_boards_that_cannot(change: dict, says: str) -> None:
    with pytest.raises(LoweringError, match=says):
        lower(ir.from_proto(conv_net(np.ones((4, 4, 1, 1)))), replace(ORIN, **change), "float16")


def test_types_that_cannot_be_inferred_are_an_error() -> None:
    # shapes that contradict each other end inference, and with it the types
    net = graph(
        "a = Relu(x) \n b = Add(a, w) \n y = Sigmoid(b)",
        {"x": (4,)},
        {"y": (4,)},
        {"w": np.ones(3, np.float32)},
    )
    with pytest.raises(LoweringError, match="cannot be inferred"):
        lower(ir.from_proto(net), ORIN, "float16")


def test_precision_that_is_not_there() -> None:
    with pytest.raises(LoweringError, match="precision 'int4'"):
        lower(ir.from_proto(conv_net(np.ones((4, 4, 1, 1)))), ORIN, "int4")


# --- plan and payload ---


@pytest.mark.parametrize("name", [n for n in Target.names() if n.startswith("jetson")])
def test_every_jetson_with_tensorrt_lowers(name: str) -> None:
    target = Target.load(name)
    if "tensorrt" not in target.backends:
        with pytest.raises(LoweringError):
            lower(ir.from_proto(conv_net(np.ones((4, 4, 1, 1)))), target, "float16")
        return
    assert target.gpu is not None
    for precision in target.precisions["tensorrt"]:
        model = ir.from_proto(conv_net(np.ones((4, 4, 1, 1))))
        if precision == "int8":
            set_quant(model.graph.inputs[0], QuantParams(DType.int8, (0.5,), (0,)))
            set_quant(model.graph.initializers["w"], QuantParams(DType.int8, (0.25,) * 4, (0,) * 4, 0))
        (payload,) = lower(model, target, precision)
        assert (payload.backend, payload.precision, payload.format) == ("tensorrt", precision, "onnx")
        assert [(t.name, t.dtype, t.shape) for t in payload.inputs] == [("x", DType.float32, (1, 4, 8, 8))]
        plan = BuildPlan.from_options(json.loads(json.dumps(payload.options)))
        assert plan.to_options() == payload.options
        assert plan.hardware.compute_capability == target.gpu.compute_capability
        assert plan.workspace_bytes <= target.dram_bytes // 8


@pytest.mark.parametrize(
    ("text", "numbers"), [("10.3.0.30", (10, 3, 0, 30)), ("8.5.2", (8, 5, 2)), ("11", (11,)), ("x", ())]
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers


MODELS = ["yolox_nano/yolox_nano.onnx", "fastestdet/FastestDet.onnx", "cifar10_resnet8/resnet8_cifar10.onnx"]


@pytest.mark.shared
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_real_models_are_little_more_than_their_weights(model: str, precision: str) -> None:
    path: Path = shared_data() / "models" / model
    (payload,) = lower(ir.load(path), ORIN, precision)
    weights = sum(numpy_helper.to_array(t).nbytes for t in onnx.load(path).graph.initializer)
    assert len(payload.data) <= 1.02 * weights / (2 if precision == "float16" else 1)


@pytest.mark.shared
def test_real_model_in_float16_agrees_on_a_photo() -> None:
    cv2 = pytest.importorskip("cv2")
    data = shared_data()
    source = onnx.load(data / "models" / MODELS[0])
    half = lowered(source)
    photo = cv2.imread(str(sorted((data / "photos").glob("*.jpg"))[0]))
    x = cv2.resize(photo, (416, 416)).transpose(2, 0, 1)[None].astype(np.float32)
    want, got = run(source, {"images": x})[0], run(half, {"images": x})[0]
    # scores. Of logits up to 38 the 11 bits of float16 leave errors of up to 0.5 in few places
    error = np.abs(got[..., 4:] - want[..., 4:])
    assert error.mean() < 3e-4
    assert error.max() < 0.1
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_products_given_back_to_float_are_wholly_float() -> None:
    """One reads what another reads as codes, one has weights that carry a repair's codes."""
    rules = rules_for("tensorrt", ORIN)
    body = """a = Conv <pads=[1,1,1,1]> (x, w3, b3)
        b = Conv <pads=[1,1,1,1]> (x, w3, b3)
        s = Add (a, b)
        y = Conv <pads=[1,1,1,1]> (s, w2, b2)"""
    model = network(body)
    model = unmeasured(model, rules)
    second, last = produced(model, "b"), produced(model, "y")
    own = new_weight(model.graph, "own", constant(second.inputs[1]))
    second.replace_input_with(1, own)
    set_quant(last.inputs[0], None)
    (made,) = lower(model, ORIN, "int8")
    graph = ir.from_proto(onnx.load_from_string(made.data)).graph
    convs = [n for n in graph if n.op_type == "Conv"]
    sources = [[v.producer() for v in n.inputs[:2]] for n in convs]
    quantized = [[p is not None and p.op_type == "DequantizeLinear" for p in pair] for pair in sources]
    assert quantized == [[True, True], [False, False], [False, False]]
