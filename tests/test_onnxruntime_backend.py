"""The onnxruntime backend: payload layout, mapped weights, bound buffers, precision."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.backends.base import LoadOptions
from edgekit.backends.onnxruntime import wire
from edgekit.backends.onnxruntime.engine import OrtExecutable, load
from edgekit.backends.onnxruntime.lower import lower
from edgekit.errors import BundleError, LoweringError, UsageError
from edgekit.manifest import Variant
from edgekit.target import Target

VARIANT = Variant("onnxruntime-float32", "onnxruntime", "float32", "onnx", "p.onnx", 0, "")


def network(channels: tuple[int, ...] = (8, 24, 16), size: int = 12, seed: int = 0) -> onnx.ModelProto:
    """Conv + Relu layers with seeded weights, input x [1, 3, size, size], output y."""
    rng = np.random.default_rng(seed)
    nodes, weights, value, before = [], [], "x", 3
    for i, width in enumerate(channels):
        w = rng.normal(0, 0.3, (width, before, 3, 3)).astype(np.float32)
        b = rng.normal(0, 0.3, width).astype(np.float32)
        weights += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(b, f"b{i}")]
        nodes.append(helper.make_node("Conv", [value, f"w{i}", f"b{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}" if i + 1 < len(channels) else "y"]))
        value, before = f"r{i}", width
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, channels[-1], size, size])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def open_bytes(data: bytes) -> OrtExecutable:
    return load(memoryview(data), VARIANT, LoadOptions(threads=1))


def reference(data: bytes, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


@settings(max_examples=25, deadline=None)
@given(
    channels=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    alignment=st.sampled_from([4, 16, 64]),
    seed=st.integers(0, 99),
)
def test_aligned_file_is_the_same_model_with_aligned_weights(
    channels: list[int], alignment: int, seed: int
) -> None:
    model = network(tuple(channels), seed=seed)
    data = model.SerializeToString()
    aligned = wire.align_weights(data, alignment)
    parsed = onnx.load_from_string(aligned)
    onnx.checker.check_model(parsed)
    for tensor in parsed.graph.initializer:
        tensor.ClearField("doc_string")
    assert parsed == model
    base = memoryview(aligned)
    address = np.frombuffer(base, np.uint8).ctypes.data
    for array in wire.detach_weights(base)[1].values():
        assert (array.ctypes.data - address) % alignment == 0


def test_detached_weights_are_views_with_the_right_values() -> None:
    model = network((40, 40))
    data = memoryview(model.SerializeToString())
    graph, weights = wire.detach_weights(data)
    expected = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    large = {name for name, a in expected.items() if a.nbytes >= wire.SMALL}
    assert large and set(weights) == large
    for name in large:
        np.testing.assert_array_equal(weights[name], expected[name])
        assert not weights[name].flags.owndata
    assert len(graph) < len(data) - sum(expected[n].nbytes for n in large) + 200 * len(large)


def test_runs_on_mapped_weights_and_equals_a_plain_run(tmp_path: Path) -> None:
    path = tmp_path / "p.onnx"
    path.write_bytes(wire.align_weights(network((64, 64)).SerializeToString()))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    executable = load(memoryview(mapped), VARIANT, LoadOptions(threads=1))
    start = np.frombuffer(mapped, np.uint8).ctypes.data
    assert executable._weights
    for value in executable._weights.values():
        assert start <= value.data_ptr() < start + len(mapped), "the library uses the map, not a copy"
    binding = executable.bind()
    x = np.random.default_rng(1).normal(size=(1, 3, 12, 12)).astype(np.float32)
    binding.inputs["x"][...] = x
    binding.run()
    np.testing.assert_allclose(binding.outputs["y"], reference(path.read_bytes(), x), rtol=0, atol=1e-6)


def test_bindings_do_not_share_buffers_and_keep_their_arrays() -> None:
    executable = open_bytes(network().SerializeToString())
    a, b = executable.bind(), executable.bind()
    before = {name: array.ctypes.data for name, array in a.outputs.items()}
    a.inputs["x"][...] = 1
    b.inputs["x"][...] = 2
    a.run()
    first = a.outputs["y"].copy()
    b.run()
    np.testing.assert_array_equal(a.outputs["y"], first)
    assert not np.array_equal(b.outputs["y"], first)
    assert before == {name: array.ctypes.data for name, array in a.outputs.items()}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_payloads_are_errors_not_crashes(data: st.DataObject) -> None:
    good = bytearray(network((24,)).SerializeToString())
    kind = data.draw(st.sampled_from(["flip", "cut", "junk"]))
    if kind == "junk":
        bad = data.draw(st.binary(max_size=200))
    elif kind == "cut":
        bad = bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    else:
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] ^= 1 << data.draw(st.integers(0, 7))
        bad = bytes(good)
    # what does not load must be refused as a bundle error, in one line; anything else fails the test
    with contextlib.suppress(BundleError):
        open_bytes(bad)


def lowered(precision: str, model: onnx.ModelProto | None = None) -> bytes:
    graph = ir.from_proto(model or network((40, 40)))
    (payload,) = lower(graph, Target.load("rpi5"), precision)
    assert payload.precision == precision and payload.format == "onnx"
    return payload.data


def test_float32_payload_computes_the_same_and_stays_small() -> None:
    model = network((64, 64))
    data = lowered("float32", model)
    x = np.random.default_rng(2).normal(size=(1, 3, 12, 12)).astype(np.float32)
    np.testing.assert_array_equal(reference(data, x), reference(model.SerializeToString(), x))
    weights = sum(numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    assert len(data) <= 1.02 * weights


def test_float16_payload_halves_the_weights_and_runs_in_float32() -> None:
    model = network((64, 64))
    full, small = lowered("float32", model), lowered("float16", model)
    assert len(small) < 0.55 * len(full)
    x = np.random.default_rng(3).normal(size=(1, 3, 12, 12)).astype(np.float32)
    binding = open_bytes(small).bind()
    binding.inputs["x"][...] = x
    binding.run()
    want = reference(full, x)
    assert 0 < np.abs(binding.outputs["y"] - want).max() < 2e-3 * np.abs(want).max()


def test_lowering_is_deterministic_and_leaves_the_graph_alone() -> None:
    graph = ir.from_proto(network((40,)))
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    target = Target.load("rpi5")
    assert lower(graph, target, "float16")[0].data == lower(graph, target, "float16")[0].data
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before


def test_weights_beyond_float16_are_refused() -> None:
    model = network((40,))
    w = numpy_helper.to_array(model.graph.initializer[0]).copy()
    w[0, 0, 0, 0] = 1e6
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w0"))
    with pytest.raises(LoweringError, match=r"1e\+06 does not fit in float16"):
        lowered("float16", model)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="int8"):
        lowered("int8")
