"""The openvino backend: same numbers as ONNX Runtime, float32 unless told, bound buffers, plain refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit import host
from edgekit.backends.base import LoadOptions
from edgekit.backends.openvino import engine
from edgekit.backends.openvino.engine import OpenVinoExecutable
from edgekit.backends.openvino.lower import _FUSED, free_activations, lower
from edgekit.errors import BundleError, MissingExtraError, StreamError, UsageError
from edgekit.manifest import Variant
from edgekit.quant.annotate import quant, set_quant
from edgekit.spec import DType, QuantParams
from edgekit.target import Target
from tests.helpers import ROOT
from tests.test_onnxruntime_backend import network, reference

pytest.importorskip("openvino", reason="needs the optional library openvino")

VARIANT = Variant("openvino-float32", "openvino", "float32", "onnx", "p.onnx", 0, "")


def open_bytes(data: bytes, threads: int = 1) -> OpenVinoExecutable:
    return engine.load(memoryview(data), VARIANT, LoadOptions(threads=threads))


def picture(seed: int = 1, size: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, 3, size, size)).astype(np.float32)


def quantized(channels: int = 32, size: int = 12) -> bytes:
    """x -> Q/DQ -> Conv (int8 weights per channel) -> Q/DQ -> y: activations uint8, as on x86."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-127, 128, (channels, 3, 3, 3)).astype(np.int8)
    scales = rng.uniform(0.002, 0.004, channels).astype(np.float32)
    values = {
        "xs": np.float32(0.05),
        "xz": np.uint8(131),
        "w": weights,
        "ws": scales,
        "wz": np.zeros(channels, np.int8),
        "ys": np.float32(0.06),
        "yz": np.uint8(120),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "ys", "yz"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels, size, size])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def test_float_payload_computes_in_float32_and_says_so() -> None:
    data = network((64, 96, 64)).SerializeToString()
    executable = open_bytes(data)
    binding = executable.bind()
    binding.inputs["x"][...] = picture()
    binding.run()
    want = reference(data, picture())
    # bfloat16, the library's own choice where the CPU has it, is off by about 1e-2 of the range
    np.testing.assert_allclose(binding.outputs["y"], want, rtol=0, atol=1e-5 * np.abs(want).max())
    facts = executable.describe()
    assert facts["float_precision"] == "f32" and facts["threads"] == 1 and facts["library"] == "openvino"
    assert facts["version"][0].isdigit() and facts["device"]
    json.dumps(facts)


def test_threads_are_passed_on() -> None:
    assert open_bytes(network().SerializeToString(), threads=2).describe()["threads"] == 2


def test_q_dq_file_gives_the_codes_that_onnxruntime_gives() -> None:
    data = quantized()
    binding = open_bytes(data).bind()
    binding.inputs["x"][...] = picture()
    binding.run()
    # same integers; requantization may round a tie the other way
    steps = np.round((binding.outputs["y"] - reference(data, picture())) / 0.06)
    assert np.abs(steps).max() <= 1 and (steps != 0).mean() < 0.01
    assert len(np.unique(binding.outputs["y"])) > 100


def test_integer_pictures_lie_channels_last_and_say_the_same() -> None:
    def opened(precision: str, data: bytes) -> engine.OpenVinoBinding:
        variant = dataclasses.replace(VARIANT, precision=precision)
        executable = engine.load(memoryview(data), variant, LoadOptions(threads=1))
        assert executable.inputs[0].shape == (1, 3, 12, 12)
        binding = executable.bind()
        binding.inputs["x"][...] = picture()
        binding.run()
        return binding

    first, turned = opened("float32", quantized()), opened("int8", quantized())
    assert first.inputs["x"].flags.c_contiguous and turned.inputs["x"].shape == (1, 3, 12, 12)
    assert turned.inputs["x"].transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_array_equal(turned.outputs["y"], first.outputs["y"])
    wide = onnx.load_from_string(network((24,)).SerializeToString())
    assert engine._turn(_read(wide.SerializeToString())) == {"x"}
    wide.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8  # features of another network, no picture
    wide.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.zeros((24, 8, 3, 3), np.float32), wide.graph.initializer[0].name)
    )
    assert engine._turn(_read(wide.SerializeToString())) == frozenset()


def _read(data: bytes) -> Any:
    import openvino

    return openvino.Core().read_model(io.BytesIO(data))


def test_bindings_have_buffers_of_their_own_and_run_beside_each_other() -> None:
    data = network((24, 24)).SerializeToString()
    executable = open_bytes(data)
    bindings = [executable.bind() for _ in range(3)]
    addresses = [b.outputs["y"].ctypes.data for b in bindings]
    for i, binding in enumerate(bindings):
        binding.inputs["x"][...] = picture(i)

    def work(binding: engine.OpenVinoBinding) -> None:
        for _ in range(50):
            binding.run()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, bindings))
    for i, binding in enumerate(bindings):
        np.testing.assert_allclose(binding.outputs["y"], reference(data, picture(i)), rtol=0, atol=1e-4)
    assert [b.outputs["y"].ctypes.data for b in bindings] == addresses and len(set(addresses)) == 3


def test_the_payload_is_not_needed_after_loading() -> None:
    data = bytearray(network().SerializeToString())
    want = reference(bytes(data), picture())
    view = memoryview(data)
    executable = engine.load(view, VARIANT, LoadOptions(threads=1))
    view.release()
    data[:] = bytes(len(data))
    binding = executable.bind()
    binding.inputs["x"][...] = picture()
    binding.run()
    np.testing.assert_allclose(binding.outputs["y"], want, rtol=0, atol=1e-4)


def test_what_is_closed_says_so() -> None:
    executable = open_bytes(network().SerializeToString())
    binding = executable.bind()
    executable.close()
    executable.close()
    with pytest.raises(StreamError, match="closed"):
        executable.bind()
    binding.run()  # still its own
    binding.close()
    binding.close()
    with pytest.raises(StreamError, match="closed"):
        binding.run()
    assert binding.outputs["y"].shape == (1, 16, 12, 12)


def outside(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    return bytes(model.SerializeToString())


def open_size(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"junk", "not a valid ONNX file"),
        (network().SerializeToString()[:300], "not a valid ONNX file"),
        (network().SerializeToString().replace(b"Relu", b"Rolu"), "No conversion rule found.*Rolu"),
        (outside(network().SerializeToString()), "weight w0 lies in another file"),
        (open_size(network().SerializeToString()), "tensor x: expected a static tensor"),
    ],
    ids=["junk", "cut off", "operator", "weights elsewhere", "open size"],
)
def test_a_payload_that_cannot_run_is_a_bundle_error_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        open_bytes(data)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[openvino\]'"):
        open_bytes(network().SerializeToString())
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    assert "edgekit[openvino]" in host.backend_problem("openvino")
    assert "openvino" not in host.detect().backends


def test_host_lists_it_behind_onnxruntime_on_x86() -> None:
    target = host.detect()
    assert target.backends[0] == "onnxruntime"
    assert ("openvino" in target.backends) == (target.arch == "x86_64")
    arm = dataclasses.replace(target, arch="aarch64")
    with pytest.raises(UsageError, match="are for x86_64, got aarch64"):
        lower(ir.from_proto(network()), arm, "float32")


def test_lowering_is_the_file_of_onnxruntime() -> None:
    from edgekit.backends.onnxruntime.lower import lower as lower_onnxruntime

    target = dataclasses.replace(host.detect(), arch="x86_64")
    model = ir.from_proto(network())
    (payload,) = lower(model, target, "float32")
    (other,) = lower_onnxruntime(model, target, "float32")
    assert payload == dataclasses.replace(other, backend="openvino")
    with pytest.raises(UsageError, match="float32 or int8"):
        lower(model, target, "float16")


PARAMS = QuantParams(DType.int8, (0.05,), (3,))


def activated(kind: str) -> ir.Model:
    """x -> Conv -> activation -> Conv -> y, with every activation tensor annotated. kind: "silu", "shared"
    (the convolution's result is also an output), "skip" (SiLU of the input) or an operator."""
    nodes = [helper.make_node("Conv", ["x", "w0"], ["c"], pads=[1, 1, 1, 1])]
    source = "x" if kind == "skip" else "c"
    if kind in ("silu", "shared", "skip"):
        nodes += [
            helper.make_node("Sigmoid", [source], ["s"]),
            helper.make_node("Mul", ["s", source] if kind == "silu" else [source, "s"], ["a"]),
        ]
    else:
        nodes += [helper.make_node(kind, ["c"], ["a"])]
    nodes += [helper.make_node("Conv", ["a", "w1"], ["y"], pads=[1, 1, 1, 1])]
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.3, (3, 3, 3, 3)).astype(np.float32), f"w{i}") for i in (0, 1)
    ]
    outputs = ["y", "c"] if kind == "shared" else ["y"]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in outputs],
        weights,
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9))
    for value in (*model.graph.inputs, *(o for node in model.graph for o in node.outputs)):
        if value.name != "y":
            set_quant(value, PARAMS)
    return model


def coded(model: ir.Model) -> set[str]:
    values = (*model.graph.inputs, *(o for node in model.graph for o in node.outputs))
    return {str(v.name) for v in values if quant(v) is not None}


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("silu", {"x", "a"}),
        ("HardSwish", {"x", "a"}),
        ("Sigmoid", {"x", "a"}),
        ("Relu", {"x", "c", "a"}),  # no range of its own: placement absorbs it
        ("shared", {"x", "c", "s", "a"}),
        ("skip", {"x", "c", "s", "a"}),
    ],
)
def test_codes_inside_an_activation_are_taken_off(kind: str, left: set[str]) -> None:
    model = activated(kind)
    assert free_activations(model) == (left == {"x", "a"})
    assert coded(model) == left


def test_codes_stay_where_the_activation_or_the_product_is_float() -> None:
    for name in ("a", "x"):
        model = activated("silu")
        values = {v.name: v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs))}
        set_quant(values[name], None)
        before = coded(model)
        assert free_activations(model) == 0 and coded(model) == before


def test_a_bundle_of_it_runs_and_finds_what_onnxruntime_finds(tmp_path: Path, host_bundle: str) -> None:
    target = dataclasses.replace(
        Target.load("host"), backends=("openvino",), precisions={"openvino": ("float32",)}, arch="x86_64"
    )
    (bundle,) = edgekit.build(ROOT / "apps" / "detect", target, out=tmp_path, limit=2)
    assert [v.backend for _, v in bundle.manifest.variants()] == ["openvino"]
    image = np.random.default_rng(0).integers(0, 255, (180, 320, 3), np.uint8)
    with edgekit.load(bundle.path, threads=1) as ours, edgekit.load(host_bundle, threads=1) as other:
        (facts,) = ours.describe().values()
        assert facts["library"] == "openvino" and facts["float_precision"] == "f32"
        a, b = (e.predict(image, score_threshold=0.01) for e in (ours, other))
        assert len(a) == len(b) > 0
        np.testing.assert_allclose(a.scores, b.scores, rtol=0, atol=1e-4)
        np.testing.assert_allclose(a.boxes, b.boxes, rtol=0, atol=0.05)
    bundle.close()


def activated_codes(kind: str) -> bytes:
    """x -> Q/DQ -> Conv (int8 weights) -> activation -> Q/DQ -> Conv -> Q/DQ -> y."""
    rng = np.random.default_rng(0)
    values: dict[str, np.generic | np.ndarray] = {"s": np.float32(0.05), "z": np.uint8(120)}
    nodes = []
    for i in "01":
        values[f"b{i}"] = rng.normal(size=32).astype(np.float32)
        values[f"w{i}"] = rng.integers(-127, 128, (32, 32, 3, 3)).astype(np.int8)
        values[f"ws{i}"], values[f"wz{i}"] = np.full(32, 1e-3, np.float32), np.zeros(32, np.int8)
        nodes.append(helper.make_node("DequantizeLinear", [f"w{i}", f"ws{i}", f"wz{i}"], [f"wd{i}"], axis=0))

    def codes(x: str, name: str) -> None:
        nodes.append(helper.make_node("QuantizeLinear", [x, "s", "z"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [name]))

    codes("x", "x1")
    nodes.append(helper.make_node("Conv", ["x1", "wd0", "b0"], ["c"], pads=[1, 1, 1, 1]))
    if kind == "silu":
        nodes += [helper.make_node("Sigmoid", ["c"], ["g"]), helper.make_node("Mul", ["c", "g"], ["a"])]
    else:
        nodes.append(helper.make_node(kind, ["c"], ["a"]))
    codes("a", "a1")
    nodes.append(helper.make_node("Conv", ["a1", "wd1", "b1"], ["d"], pads=[1, 1, 1, 1]))
    codes("d", "y")
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32, 16, 16])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()],
    )
    opset = helper.make_opsetid("", 20)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString())


@pytest.mark.skipif(
    not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(host.detect().cpus[0].isa),
    reason="its integer convolutions were looked at on CPUs with VNNI",
)
@pytest.mark.parametrize("kind", ["silu", *_FUSED, "Softplus"])
def test_openvino_computes_these_activations_inside_the_convolution(kind: str) -> None:
    executable = open_bytes(activated_codes(kind))
    ops = executable._compiled.get_runtime_model().get_ordered_ops()
    kinds = [str(op.get_rt_info()["layerType"].astype(str)) for op in ops]
    first, second = (i for i, name in enumerate(kinds) if name == "Convolution")
    alone = {"Subgraph", "Eltwise", "Math"} & set(kinds[first:second])
    assert bool(alone) == (kind == "Softplus")  # which is therefore none of them
