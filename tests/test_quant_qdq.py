"""Q/DQ files: their form for each library, what ONNX Runtime makes of them, sizes and bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.backends.base import LoadOptions
from edgekit.backends.onnxruntime import engine
from edgekit.backends.onnxruntime.lower import lower
from edgekit.backends.tensorrt.lint import lint as tensorrt_lint
from edgekit.backends.tensorrt.lower import lower as tensorrt_lower
from edgekit.errors import UsageError
from edgekit.manifest import Variant
from edgekit.passes.graph import infer
from edgekit.quant import qdq
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.lint import lint
from edgekit.quant.simulate import fake_quantized, run
from edgekit.spec import DType, QuantParams
from edgekit.toolchain.running import run_here
from tests.quant_graphs import (
    BETWEEN,
    annotated,
    between,
    executed,
    network,
    params,
    pictures,
    produced,
    session,
)
from tests.test_quant_placement import ARM, CONV, ORIN, ORT, ORT_ARM, TRT, X86

ISLAND = f"a = {CONV} (x, w1, b1) \n r = Relu(a) \n b = {CONV} (r, w2, b2) \n s = Relu(b) \n y = {CONV} (s, w3, b3)"


def read(data: bytes) -> onnx.ModelProto:
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    return model


def stored(model: onnx.ModelProto) -> Counter[tuple[str, int]]:
    """(type, rank) of the initialisers."""
    return Counter(
        (onnx.TensorProto.DataType.Name(i.data_type), len(i.dims)) for i in model.graph.initializer
    )


@pytest.mark.parametrize(("rules", "target", "codes"), [(ORT, X86, "UINT8"), (ORT_ARM, ARM, "INT8")])
def test_onnxruntime_files(rules, target, codes: str) -> None:
    """Weights int8, biases int32, activations as the board wants them; nothing of the float weights left."""
    found = read(lower(annotated(between("Add"), rules), target, "int8")[0].data)
    kinds = stored(found)
    assert kinds["INT8", 4] == 3
    assert kinds["INT32", 1] == 3
    assert kinds["FLOAT", 4] == 0
    zeros = {n.input[2] for n in found.graph.node if n.op_type == "QuantizeLinear"}
    types = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in found.graph.initializer}
    assert {types[z] for z in zeros} == {codes}
    assert [i.name for i in found.graph.input] == ["x"]
    assert [o.name for o in found.graph.output] == ["y"]


def test_uint8_and_int8_files_hold_the_same_numbers() -> None:
    model = annotated(between("SiLU"), ORT)
    (feed,) = pictures(1)
    files = [qdq.to_qdq(model, qdq.Style(codes)) for codes in ("int8", "uint8")]
    one, other = (next(run(f, [feed]))["y"] for f in files)
    assert np.array_equal(one, other)


def test_one_pair_per_value() -> None:
    """A value that several nodes read is quantized once."""
    model = annotated(between("SiLU"), ORT)
    ops = Counter(n.op_type for n in qdq.to_qdq(model, qdq.Style.of(ORT)).graph)
    assert ops["QuantizeLinear"] == 5  # x a g b y
    assert ops["DequantizeLinear"] == 5 + 2 + 2  # and weights and biases


def test_an_output_that_others_read_stays_one_value() -> None:
    model = annotated(
        network(f"y = {CONV} (x, w1, b1) \n z = {CONV} (y, w2, b2)", outputs={"y": (1, 1), "z": (1, 1)}), ORT
    )
    file = read(lower(model, X86, "int8")[0].data)
    assert [o.name for o in file.graph.output] == ["y", "z"]
    (feed,) = pictures(1)
    expected = next(run(fake_quantized(model), [feed], ["y", "z"]))
    found = session(file.SerializeToString()).run(["y", "z"], feed)
    for name, value in zip("yz", found, strict=True):
        assert np.abs(value - expected[name]).max() <= 1.01 * params(model)[name].scale[0]


def test_two_lowers_give_the_same_bytes() -> None:
    for build, target, rules in ((lower, X86, ORT), (lower, ARM, ORT_ARM), (tensorrt_lower, ORIN, TRT)):
        first, second = (build(annotated(between("SiLU"), rules), target, "int8")[0].data for _ in range(2))
        assert first == second


@pytest.mark.parametrize(("build", "target"), [(lower, X86), (tensorrt_lower, ORIN)])
def test_without_annotations_nothing_is_lowered(build, target) -> None:
    with pytest.raises(
        UsageError, match=r"precision int8 for .*: the network has no quantization parameters"
    ):
        build(between("SiLU"), target, "int8")


def test_annotations_of_one_kind_only_are_not_enough() -> None:
    model = annotated(between("nothing"), ORT)
    for value in model.graph.initializers.values():
        value.meta.clear()
    with pytest.raises(UsageError, match="no quantization parameters"):
        lower(model, X86, "int8")


def test_old_opsets_are_raised() -> None:
    model = annotated(between("SiLU"), ORT)
    model.graph.opset_imports[""] = 11  # nothing in this network changed since
    found = read(lower(model, X86, "int8")[0].data)
    assert found.opset_import[0].version >= 13
    (feed,) = pictures(1)
    expected = next(run(fake_quantized(annotated(between("SiLU"), ORT)), [feed]))["y"]
    assert np.array_equal(session(found.SerializeToString()).run(None, feed)[0], expected)
    assert read(tensorrt_lower(_old(), ORIN, "int8")[0].data).opset_import[0].version >= 19


def _old() -> ir.Model:
    model = annotated(between("SiLU"), TRT)
    model.graph.opset_imports[""] = 13
    return model


@pytest.mark.parametrize("name", ["Relu", "Clip"])
def test_an_activation_inside_its_range_stays(name: str) -> None:
    """Codes that reach beyond its bounds do not do its work."""
    model = annotated(between(name), ORT)
    set_quant(produced(model, "b").outputs[0], QuantParams(DType.int8, (0.03,), (-30,)))
    assert not any(r.integer for r in lint(model, ORT) if r.id in "ab")
    file = read(lower(model, X86, "int8")[0].data)
    assert name in {n.op_type for n in file.graph.node}
    absorbed = read(lower(annotated(between(name), ORT), X86, "int8")[0].data)
    assert name not in {n.op_type for n in absorbed.graph.node}
    (feed,) = pictures(1)
    expected = next(run(fake_quantized(model), [feed]))["y"]
    (step,) = quant(model.graph.outputs[0]).scale
    assert np.abs(session(file.SerializeToString()).run(None, feed)[0] - expected).max() <= 1.01 * step


# --- float islands on ONNX Runtime ----------------------------------------------------------------


def test_a_float_layer_stays_float_in_onnxruntime(tmp_path: Path) -> None:
    """Its optimizer would quantize the weights of a float layer between integer ones."""
    model = annotated(network(ISLAND), ORT, float_nodes=frozenset({"b"}))
    payload = lower(model, X86, "int8")[0]
    ran = executed(payload.data, tmp_path)
    assert (ran["QLinearConv"], ran["Conv"] + ran["FusedConv"]) == (2, 1)
    (feed,) = pictures(1)
    variant = Variant("v", "onnxruntime", "int8", "onnx", "", 0, "")
    binding = engine.load(memoryview(payload.data), variant, LoadOptions(threads=1)).bind()
    binding.inputs["x"][:] = feed["x"]
    binding.run()
    expected = next(run(fake_quantized(model), [feed]))["y"]
    (step,) = quant(model.graph.outputs[0]).scale
    assert np.abs(binding.outputs["y"] - expected).max() <= 1.01 * step
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "undone.onnx")
    onnxruntime.InferenceSession(payload.data, options, providers=["CPUExecutionProvider"])
    undone = Counter(n.op_type for n in onnx.load(str(tmp_path / "undone.onnx")).graph.node)
    assert undone["QLinearConv"] == 3, "if this fails, the engine need not disable that optimizer any more"


# --- TensorRT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BETWEEN)
def test_tensorrt_payloads(name: str) -> None:
    """Clean by the lint, float16 between quantized layers, both operands of each of them quantized."""
    model = annotated(between(name), TRT)
    (payload,) = tensorrt_lower(model, ORIN, "int8")
    found = ir.from_proto(read(payload.data))
    infer(found)
    assert tensorrt_lint(found) == ()
    kinds = stored(read(payload.data))
    assert kinds["INT8", 4] == sum(n.op_type == "Conv" for n in found.graph)
    assert not kinds["INT32", 1]
    for node in found.graph:
        if node.op_type == "Conv":
            assert [v.producer().op_type for v in node.inputs[:2]] == ["DequantizeLinear"] * 2
            assert node.outputs[0].dtype == ir.DataType.FLOAT16
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0].dtype == node.inputs[1].dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize("name", ["SiLU", "Concat"])
def test_tensorrt_payload_runs_here_as_its_graph_says(name: str) -> None:
    """Concat: of float16 scales ONNX Runtime would make a QLinearConcat that it then refuses."""
    model = annotated(between(name), TRT)
    running = run_here(tensorrt_lower(model, ORIN, "int8")[0])
    (feed,) = pictures(1)
    running.binding.inputs["x"][:] = feed["x"]
    running.binding.run()
    expected = next(run(fake_quantized(model, int32_bias=False), [feed]))["y"]
    error = np.abs(running.binding.outputs["y"] - expected)
    # float16 moves a few numbers into the next code, each by one step of the value behind
    assert np.median(error) < 2e-3 * np.abs(expected).max()
    assert error.max() < 0.05 * np.abs(expected).max()


def test_quantized_layers_need_no_float16_headroom() -> None:
    """Codes are summed in int32; only what float16 cannot hold stays float32, together with its operands."""
    model = annotated(between("Relu"), TRT)
    (payload,) = tensorrt_lower(model, ORIN, "int8", ranges={"a": 5000.0})
    assert payload.options["plan"]["kept_float32"] == {"Relu: activations above 512": 1}
    (payload,) = tensorrt_lower(model, ORIN, "int8", ranges={"a": 60000.0})
    found = ir.from_proto(read(payload.data))
    infer(found)
    assert tensorrt_lint(found) == ()
    first = next(n for n in found.graph if n.op_type == "Conv")
    assert first.outputs[0].dtype == ir.DataType.FLOAT
    assert [v.producer().op_type for v in first.inputs[:2]] == ["DequantizeLinear"] * 2
