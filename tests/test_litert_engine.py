"""The LiteRT device half: views of the interpreter's memory, refusals, and whole networks against ONNX Runtime."""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from edgekit import frontends
from edgekit.backends.base import LoadOptions, half
from edgekit.backends.litert import engine
from edgekit.backends.litert.lower import lower
from edgekit.errors import BundleError, MissingExtraError, StreamError
from edgekit.kernels.letterbox import letterbox
from edgekit.manifest import Variant
from edgekit.passes import prepare, probe
from edgekit.quant.annotate import quant
from edgekit.tasks.preprocess import ImagePreprocess
from tests.helpers import ROOT, shared_data
from tests.litert_graphs import HOST, annotate, feeds, graph, open_payload, run

node = helper.make_node


def small(precision: str = "float32") -> Any:
    weights = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)}
    model = graph([node("Conv", ["x", "w"], ["y"])], {"x": (1, 3, 8, 8)}, weights)
    return lower(model, HOST, precision)[0]


def variant_of(payload: Any, **changes: Any) -> Variant:
    base = Variant(
        "v", "litert", payload.precision, "tflite", "", len(payload.data), "", dict(payload.options)
    )
    return replace(base, **changes)


def test_arrays_are_views_of_the_interpreters_memory() -> None:
    _, binding = open_payload(small())
    x, y = binding.inputs["x"], binding.outputs["y"]
    assert x.shape == (1, 3, 8, 8) and y.shape == (1, 4, 6, 6)
    assert x.transpose(0, 2, 3, 1).flags.c_contiguous and not x.flags.c_contiguous
    assert not x.flags.owndata and not y.flags.owndata
    binding.run()
    assert (y == 0).all()
    x[...] = 1
    binding.run()
    assert (y != 0).any() and (x == 1).all()
    details = binding._interpreter.get_input_details()[0]
    assert x.ctypes.data == binding._interpreter.tensor(details["index"])().ctypes.data


def test_a_run_allocates_nothing_on_the_heap_of_python() -> None:
    _, binding = open_payload(small())
    binding.run()
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    for _ in range(50):
        binding.run()
    grown = sum(
        s.size_diff
        for s in tracemalloc.take_snapshot().compare_to(before, "filename")
        if "litert" in s.traceback[0].filename
    )
    tracemalloc.stop()
    assert grown < 1024


def test_arrays_outlive_binding_and_executable() -> None:
    executable, binding = open_payload(small())
    binding.inputs["x"][...] = 2
    binding.run()
    want = np.array(binding.outputs["y"])
    y = binding.outputs["y"]
    executable.close()
    executable.close()
    binding.run()
    binding.close()
    binding.close()
    del executable
    gc.collect()
    np.testing.assert_array_equal(y, want)
    with pytest.raises(StreamError, match="closed"):
        binding.run()


def test_sessions_have_their_own_buffers_and_run_side_by_side() -> None:
    executable, first = open_payload(small())
    bindings = [first, executable.bind(), executable.bind()]
    for i, binding in enumerate(bindings):
        binding.inputs["x"][...] = i
    threads = [threading.Thread(target=lambda b=b: [b.run() for _ in range(50)]) for b in bindings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, binding in enumerate(bindings):
        np.testing.assert_allclose(binding.outputs["y"], bindings[1].outputs["y"] * i, rtol=1e-4, atol=1e-5)
    executable.close()
    with pytest.raises(StreamError, match="closed"):
        executable.bind()


def test_describe_counts_what_the_delegate_takes() -> None:
    executable, _ = open_payload(small())
    facts = executable.describe()
    assert facts["library"] == "ai-edge-litert"
    assert (facts["operators"], facts["delegated"], facts["partitions"], facts["threads"]) == (1, 1, 1, 1)
    weights = {"a": np.array([0]), "b": np.array([8]), "c": np.array([2]), "t": np.array([2])}
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Slice", ["r", "a", "b", "c", "t"], ["s"]),
        node("Exp", ["s"], ["y"]),
    ]
    executable, _ = open_payload(lower(graph(nodes, {"x": (1, 3, 8, 8)}, weights), HOST, "float32")[0])
    facts = executable.describe()
    assert (facts["operators"], facts["delegated"], facts["partitions"]) == (3, 2, 2)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"inputs": 3}, {"inputs": [["x", [0, 1, 2, 3]]]}, {"inputs": [["x", [0, 1, 2, 2], [1, 8, 8, 3]]]},
        {"inputs": [["x", [0, 2, 3, 1], [1, 8, 8, 4]]]}, {"inputs": []}, {"inputs": [["x", [0, 2, 3, 1], [1, -8, -8, 3]]]},
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_file_are_refused(options: dict[str, Any]) -> None:
    payload = small()
    given = {**payload.options, **options} if options else {}
    with pytest.raises(BundleError, match="Build the bundle again"):
        engine.load(memoryview(payload.data), variant_of(payload, options=given), LoadOptions())


@pytest.mark.parametrize("data", [b"", b"TFL3", b"\0" * 100, b"x" * 64])
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="LiteRT refuses it"):
        engine.load(memoryview(data), variant_of(small()), LoadOptions())


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    monkeypatch.setitem(sys.modules, "tflite_runtime", None)
    payload = small()
    with pytest.raises(MissingExtraError, match=r"edgekit\[litert\]"):
        engine.load(memoryview(payload.data), variant_of(payload), LoadOptions())


def test_the_older_runtime_serves_floats_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    from ai_edge_litert import interpreter as real

    payload, integers = small(), small("dynamic")
    older = types.ModuleType("tflite_runtime.interpreter")
    older.Interpreter = real.Interpreter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    monkeypatch.setitem(sys.modules, "tflite_runtime", types.ModuleType("tflite_runtime"))
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", older)
    executable = engine.load(memoryview(payload.data), variant_of(payload), LoadOptions())
    assert executable.describe()["library"] == "tflite-runtime"
    with pytest.raises(MissingExtraError):
        engine.load(memoryview(integers.data), variant_of(integers), LoadOptions())


@pytest.mark.parametrize("native", [True, False])
def test_letterbox_writes_into_the_view(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit import kernels
    from edgekit.kernels import letterbox as module

    if not native:
        monkeypatch.setattr(kernels, "native", lambda: None)
    module._plan.cache_clear()
    spec = ImagePreprocess(20, 16, color="rgb", mean=(1, 2, 3), std=(4, 5, 6))
    picture = np.random.default_rng(0).integers(0, 256, (31, 50, 3), np.uint8)
    want = np.empty((1, 3, 16, 20), np.float32)
    view = np.empty((1, 16, 20, 3), np.float32).transpose(0, 3, 1, 2)
    assert letterbox(picture, spec, want) == letterbox(picture, spec, view)
    np.testing.assert_array_equal(view, want)
    module._plan.cache_clear()


# --- whole networks ---------------------------------------------------------------------------


def relu6_inverted(blocks: int = 4) -> ir.Model:
    """As MobileNetV2 (Sandler et al. 2018): expand, depthwise, project, add."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {"lo": np.float32(0), "hi": np.float32(6)}
    nodes: list[Any] = []

    def conv(
        x: str,
        name: str,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        group: int = 1,
        act: bool = True,
    ) -> str:
        shape = (outputs, inputs // group, kernel, kernel)
        weights[f"{name}.w"] = (rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
        weights[f"{name}.b"] = (rng.normal(size=outputs) * 0.1).astype(np.float32)
        out = f"{name}.c" if act else name
        nodes.append(
            node(
                "Conv",
                [x, f"{name}.w", f"{name}.b"],
                [out],
                strides=[stride] * 2,
                pads=[kernel // 2] * 4,
                group=group,
            )
        )
        if act:
            nodes.append(node("Clip", [out, "lo", "hi"], [name]))
        return name

    x = conv("x", "stem", 3, 16, 3, 2)
    for i in range(blocks):
        stride = 2 if i % 2 else 1
        y = conv(x, f"e{i}", 16, 64, 1)
        y = conv(y, f"d{i}", 64, 64, 3, stride, 64)
        y = conv(y, f"p{i}", 64, 16, 1, act=False)
        if stride == 1:
            nodes.append(node("Add", [x, y], [f"s{i}"]))
            y = f"s{i}"
        x = y
    nodes.append(node("GlobalAveragePool", [x], ["g"]))
    nodes.append(node("Flatten", ["g"], ["f"]))
    weights["fc"], weights["fcb"] = (
        rng.normal(size=(10, 16)).astype(np.float32),
        rng.normal(size=10).astype(np.float32),
    )
    nodes.append(node("Gemm", ["f", "fc", "fcb"], ["y"], transB=1))
    return graph(nodes, {"x": (1, 3, 64, 64)}, weights)


def torch_network(kind: str, folder: Path) -> ir.Model:
    """ResNet-like (residual, strided 7x7 stem, padded max pool) or YOLOv8-like (SiLU, split, SPPF, upsampling)."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(
                nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
            )
            self.a, self.b = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
            self.down, self.short = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(16, 32, 1, 2)
            self.head = nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = torch.relu(x + self.b(torch.relu(self.a(x))))
            x = torch.relu(self.down(x) + self.short(x))
            return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))

    class Conv(nn.Sequential):
        def __init__(self, i: int, o: int, k: int = 1, s: int = 1) -> None:
            super().__init__(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU())

    class Yolo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.split = Conv(3, 16, 3, 2), Conv(16, 32, 3, 2), Conv(32, 32)
            self.m1, self.m2, self.join = Conv(16, 16, 3), Conv(16, 16, 3), Conv(48, 32)
            self.down, self.squeeze, self.spp = Conv(32, 64, 3, 2), Conv(64, 32), Conv(128, 64)
            self.up, self.box, self.cls = Conv(96, 32), nn.Conv2d(32, 64, 1), nn.Conv2d(64, 80, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.one(self.stem(x))
            a, b = self.split(x).chunk(2, 1)
            x = self.join(torch.cat([a, b, b + self.m2(self.m1(b))], 1))
            y = self.squeeze(self.down(x))
            p = [y]
            for _ in range(3):
                p.append(torch.nn.functional.max_pool2d(p[-1], 5, 1, 2))
            y = self.spp(torch.cat(p, 1))
            up = self.up(torch.cat([torch.nn.functional.interpolate(y, scale_factor=2.0), x], 1))
            return self.box(up), self.cls(y)

    network = (Residual() if kind == "residual" else Yolo()).eval()
    path = folder / f"{kind}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        example = (torch.zeros(1, 3, 64, 64),)
        torch.onnx.export(network, example, path, dynamo=False, opset_version=17, input_names=["x"])
    return prepare(frontends.load(path), task="classify", check=False).model


def real_network(name: str) -> ir.Model:
    path = {
        "yolo_lite": lambda: ROOT / "apps/detect/yolo_lite.onnx",
        "yolox_nano": lambda: shared_data() / "models/yolox_nano/yolox_nano.onnx",
        "fastestdet": lambda: shared_data() / "models/fastestdet/FastestDet.onnx",
        "resnet8": lambda: shared_data() / "models/cifar10_resnet8/resnet8_cifar10.onnx",
    }[name]()
    return prepare(
        frontends.load(path), task="classify" if name == "resnet8" else "detect", check=False
    ).model


@pytest.fixture(scope="module")
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    name = request.param
    if name in ("residual", "yolo"):
        return torch_network(name, tmp_path_factory.mktemp("torch"))
    return relu6_inverted() if name == "mobile" else real_network(name)


NETWORKS = ["mobile", "residual", "yolo", "yolo_lite", "resnet8", "fastestdet", "yolox_nano"]


def pictures(model: ir.Model, name: str, count: int) -> list[dict[str, np.ndarray]]:
    (x,) = model.graph.inputs
    sizes = tuple(int(d) for d in x.shape)  # type: ignore[union-attr]
    peak = {"yolo_lite": 255.0, "resnet8": 255.0, "yolox_nano": 255.0}.get(name, 1.0)
    return [{str(x.name): probe.natural_picture(sizes, seed, peak)} for seed in range(count)]


def sqnr(want: np.ndarray, got: np.ndarray) -> float:
    noise = float(((want - got) ** 2).mean())
    return 10 * float(np.log10(float((want**2).mean()) / max(noise, 1e-30)))


@pytest.mark.parametrize(("network", "name"), [(n, n) for n in NETWORKS], indirect=["network"])
def test_network_in_floats_and_integers(network: ir.Model, name: str) -> None:
    """Floats equal ONNX Runtime's. Integers come as near to the floats as Q/DQ in ONNX Runtime with the same
    scales (within 1.5 dB, or better), in one run of the delegate, and nothing is transposed."""
    *samples, picture = pictures(network, name, 3)
    want = probe.evaluate(network, picture)
    got, facts = run(network, picture)
    assert (facts["partitions"], facts["delegated"]) == (1, facts["operators"])
    for output, array in want.items():
        assert sqnr(array, got[output]) > 90, output
    annotated = annotate(network, [*samples, picture])
    (payload,) = lower(annotated, HOST, "int8")
    executable, binding = open_payload(payload)
    facts = executable.describe()
    assert (facts["partitions"], facts["delegated"]) == (1, facts["operators"])
    assert "TRANSPOSE" not in {o["op_name"] for o in binding._interpreter._get_ops_details()}
    (x,) = picture
    np.copyto(binding.inputs[x], picture[x])
    binding.run()
    simulated = probe.evaluate(with_qdq(annotated), picture)
    for output, array in want.items():
        assert sqnr(array, binding.outputs[output]) > sqnr(array, simulated[output]) - 1.5, output


def with_qdq(annotated: ir.Model) -> ir.Model:
    """QuantizeLinear and DequantizeLinear around every annotated value."""
    model = annotated.clone()
    graph_ = model.graph
    for value in [*graph_.inputs, *(v for n in graph_ for v in n.outputs), *graph_.initializers.values()]:
        params = quant(value)
        if params is None:
            continue
        if value.const_value is not None:
            scale = np.array(params.scale, np.float32)
            data = value.const_value.numpy()
            by = scale.reshape([-1 if i == params.axis else 1 for i in range(data.ndim)])
            value.const_value = ir.tensor((np.clip(np.rint(data / by), -127, 127) * by).astype(np.float32))
            continue
        constants = []
        for suffix, array in (("s", np.float32(params.scale[0])), ("z", np.int8(params.zero_point[0]))):
            tensor = ir.tensor(np.array(array), name=f"{value.name}.{suffix}")
            made = ir.Value(
                name=tensor.name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph_.register_initializer(made)
            constants.append(made)
        quantize = ir.node("QuantizeLinear", [value, *constants])
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *constants])
        out = dequantize.outputs[0]
        name = value.name
        if value.is_graph_output():
            value.name = f"{name}.raw"
            out.name = name
        else:
            out.name = f"{name}.q"
        out.type, out.shape = value.type, value.shape
        value.replace_all_uses_with(out, replace_graph_outputs=True)
        quantize.replace_input_with(0, value)
        producer = value.producer()
        if producer is None:
            graph_.insert_before(graph_[0], [quantize, dequantize])
        else:
            graph_.insert_after(producer, [quantize, dequantize])
    return model


def test_a_detector_finds_the_same_on_both_libraries() -> None:
    """Picture in, boxes out: letterbox into channels-last views, decode from them."""
    from edgekit.tasks.detect.pipeline import DetectPipeline
    from edgekit.tasks.detect.spec import DetectSpec
    from edgekit.toolchain.running import run_here

    prepared = prepare(frontends.load(ROOT / "apps/detect/yolo_lite.onnx"), check=False)
    assert prepared.head is not None
    (x,) = prepared.model.graph.inputs
    _, _, height, width = (int(d) for d in x.shape)  # type: ignore[union-attr]
    labels = tuple(map(str, range(prepared.head.num_classes)))
    spec = DetectSpec(ImagePreprocess(width, height), prepared.head, labels, score_threshold=0.02)
    picture = probe.natural_picture((3, 300, 480)).transpose(1, 2, 0).astype(np.uint8)
    found = []
    for backend in ("onnxruntime", "litert"):
        (payload,) = half(backend, "lower").lower(prepared.model, HOST, "float32")
        running = run_here(payload)
        found.append(DetectPipeline(spec, running.binding)(picture))
    assert len(found[0]) == len(found[1]) > 0
    np.testing.assert_allclose(found[1].boxes, found[0].boxes, atol=0.05)
    np.testing.assert_allclose(found[1].scores, found[0].scores, atol=1e-4)


def test_payload_facts() -> None:
    from edgekit.toolchain.evidence import payload_facts

    facts = payload_facts(small())
    assert facts["ops"] == {"CONV_2D": 1}
    assert facts["weight_bytes"] == 4 * (4 * 27 + 4)


def test_half_the_bytes() -> None:
    model = relu6_inverted()
    full, halved = lower(model, HOST, "float32")[0], lower(model, HOST, "float16")[0]
    assert len(halved.data) < 0.75 * len(full.data)
    want, (got, facts) = probe.evaluate(model, feeds(model)), run(model, feeds(model), "float16")
    assert facts["partitions"] == 1
    assert sqnr(want["y"], got["y"]) > 50


def test_backend_is_registered() -> None:
    assert half("litert", "lower").lower is lower
    assert half("litert", "engine") is engine
    assert HOST.precisions["litert"] == ("float32", "float16", "int8", "dynamic")
