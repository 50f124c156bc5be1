"""Bundles whose weights are stored in few bits: what is loaded is what was proven, and bytes that were tampered with are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import edgekit
from edgekit import packed
from edgekit.backends.base import half
from edgekit.bundle import Bundle
from edgekit.cli.main import main
from edgekit.codecs import decode
from edgekit.compression.codecs import encode, quantized
from edgekit.errors import BundleError, UsageError
from edgekit.passes import probe
from edgekit.passes.graph import constant
from edgekit.toolchain import packing
from tests import classifiers
from tests.helpers import ROOT
from tests.litert_graphs import HOST, graph, open_payload

node = helper.make_node


def network() -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(size=(16, 4, 3, 3)), "w2": rng.normal(size=(32, 16, 3, 3)), "w3": rng.normal(size=(64, 1, 5, 5)),
        "w4": rng.normal(size=(64, 32, 1, 1)), "w5": rng.normal(size=(32, 64)), "w6": rng.normal(size=(8, 32)),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        node("Conv", ["a", "w2"], ["b"], pads=[1] * 4),
        node("Conv", ["b", "w4"], ["c"]),
        node("Conv", ["c", "w3"], ["d"], pads=[2] * 4, group=64),
        node("GlobalAveragePool", ["d"], ["e"]),
        node("Flatten", ["e"], ["f"]),
        node("Gemm", ["f", "w5"], ["g"], transB=1),
        node("Gemm", ["g", "w6"], ["y"], transB=1),
    ]
    return graph(nodes, {"x": (1, 4, 8, 8)}, {k: (v / 9).astype(np.float32) for k, v in weights.items()})


@pytest.mark.parametrize("backend", ["onnxruntime", "litert", "openvino"])
@pytest.mark.parametrize("name", ["kmeans-16", "ternary", "2:4+int8"])
def test_a_payload_comes_back_to_the_bit(backend: str, name: str) -> None:
    model = network()
    if ":" in name:  # depthwise kernels have one channel, which no group of 4 fits
        with pytest.raises(UsageError, match="no multiple of 4"):
            packing.coded(model, name)
        return
    made = packing.coded(model, name)
    (payload,) = half(backend, "lower").lower(made.model, HOST, "float32")
    small, record = packing.stored(payload, made)
    assert record["tensors"] == 4 and record["left_as_they_are"] == 0
    assert len(small.data) == record["packed_bytes"] < 0.35 * len(payload.data)
    assert record["stored_bytes"] == sum(encode(a, name, axis).nbytes for a, axis in made.tensors)
    back = packed.payload(memoryview(small.data), small.options)
    assert back == payload.data
    assert np.frombuffer(back, np.uint8).ctypes.data % 64 == 0
    originals = {k: constant(v) for k, v in model.graph.initializers.items()}
    for key, value in made.model.graph.initializers.items():
        data, old = constant(value), originals[key]
        assert data is not None and old is not None
        assert np.array_equal(data, quantized(old, name) if key in ("w2", "w3", "w4", "w5") else old)


def test_the_decoded_payload_runs_as_the_coded_network() -> None:
    made = packing.coded(network(), "kmeans-16")
    (payload,) = half("litert", "lower").lower(made.model, HOST, "float32")
    small, _ = packing.stored(payload, made)
    x = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    want = probe.evaluate(made.model, {"x": x})["y"]
    executable, binding = open_payload(
        replace(small, data=bytes(packed.payload(memoryview(small.data), small.options)))
    )
    np.copyto(binding.inputs["x"], x)
    binding.run()
    np.testing.assert_allclose(binding.outputs["y"], want, atol=1e-4)
    binding.close()
    executable.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A classifier of colours that is right by construction: 60 filters see one channel each, and some noise."""
    model = classifiers.network()
    rng = np.random.default_rng(0)
    wide = rng.normal(0, 1e-3, (60, 3, 3, 3)).astype(np.float32)
    wide[np.arange(60), np.arange(60) % 3, 1, 1] = 1
    gather = np.tile(0.05 / 20 * np.eye(3, dtype=np.float32), (20, 1))
    nodes = {n.op_type: n for n in model.graph.node}
    nodes["Conv"].output[0], nodes["Relu"].input[0] = "seen", "more"
    nodes["Gemm"].input[1] = "gather"
    at = list(model.graph.node).index(nodes["Relu"])
    model.graph.node.insert(at, node("Conv", ["seen", "wide"], ["more"], pads=[1] * 4))
    model.graph.initializer.extend(
        [numpy_helper.from_array(wide, "wide"), numpy_helper.from_array(gather, "gather")]
    )
    onnx.save(model, str(tmp_path / "net.onnx"))
    (tmp_path / "names.txt").write_text("\n".join(classifiers.COLORS), encoding="utf-8")
    classifiers.folder_per_class(tmp_path / "val", *classifiers.pictures(12, seed=3, size=20))
    return tmp_path


def words(project: Path, codec: str) -> list[str]:
    data = [
        "--classes",
        str(project / "names.txt"),
        "--data",
        str(project / "val"),
        "--out",
        str(project / "dist"),
    ]
    how = ["--precision", "float32", "--target", "host", "--weights-codec", codec]
    return ["build", str(project / "net.onnx"), *classifiers.WORDS, *data, *how]


def test_a_bundle_is_smaller_and_proven_with_its_weights(project: Path) -> None:
    assert main(words(project, "ternary")) == 0
    (path,) = (project / "dist").glob("*.edge")
    with Bundle.open(path) as bundle:
        record = bundle.evidence["weights"]
        ((_, variant),) = bundle.manifest.variants()
        assert variant.bytes == record["packed_bytes"] < 0.6 * record["payload_bytes"]
        assert (record["codec"], record["tensors"], record["left_as_they_are"]) == ("ternary", 1, 0)
        data = packed.payload(bundle.read(variant.path), variant.options)
        if variant.backend == "onnxruntime":
            found = {
                i.name: numpy_helper.to_array(i) for i in onnx.load_from_string(bytes(data)).graph.initializer
            }
            assert any(a.shape == (60, 3, 3, 3) and np.count_nonzero(a) == 60 for a in found.values())
    with edgekit.load(path) as engine:  # its self-test compares with what was proven
        assert engine.describe()


def test_weights_that_miss_the_budget_are_no_bundle(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(project, "binary")) == 1
    err = capsys.readouterr().err
    print(err)
    assert "top1" in err
    assert not list((project / "dist").glob("*.edge"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights_codec": "huffman", "precision": "float32"}, "codec 'huffman'"),
        ({"weights_codec": "int4", "precision": "int8"}, "--precision float32"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        edgekit.build(ROOT / "apps/detect", "host", out=tmp_path, **options)


def small() -> tuple[bytes, bytes, dict[str, Any]]:
    weight = np.random.default_rng(3).normal(size=(8, 8)).astype(np.float32)
    coded = encode(weight, "kmeans-4")
    data = b"before" + decode(coded).tobytes() + b"behind"
    return data, packed.pack(data, [(6, coded)]), {"packed": packed.facts(data)}


def test_what_is_not_packed_is_left_alone() -> None:
    data = memoryview(b"anything")
    assert packed.payload(data, {"plan": 1}) is data


def header(stored: bytes, **change: Any) -> bytes:
    """With another entry."""
    length = int.from_bytes(stored[8:12], "little")
    tree = json.loads(stored[12 : 12 + length])
    tree["tensors"][0] |= change
    text = json.dumps(tree).encode()
    return stored[:8] + len(text).to_bytes(4, "little") + text + stored[12 + length :]


def test_tampered_bytes_are_refused() -> None:
    data, stored, options = small()
    assert packed.payload(memoryview(stored), options) == data
    cases = [
        (stored[:-1], options, "add up"),
        (b"x" + stored[1:], options, "begin like one"),
        (stored[:9], options, "begin like one"),
        (stored[:8] + b"\xff\xff\xff\x7f" + stored[12:], options, "cut off"),
        (stored[:-1] + bytes([stored[-1] ^ 1]), options, "other weights"),
        (stored, {"packed": {"bytes": 1 << 40, "digest": ""}}, "are said to come out"),
        (stored, {"packed": 3}, "options are damaged"),
        (header(stored, at=7), options, "lies outside|other weights"),
        (header(stored, at=13), options, "lies outside"),
        (header(stored, shape=[1 << 40, 1 << 40]), options, "a size that is none|add up"),
        (header(stored, codec="none"), options, "unknown"),
    ]
    for bad, said, message in cases:
        with pytest.raises(BundleError, match=message):
            packed.payload(memoryview(bad), said)


@settings(deadline=None, max_examples=120)
@given(
    places=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 40),
)
def test_no_bytes_do_harm(places: list[tuple[int, int]], cut: int) -> None:
    data, stored, options = small()
    bad = bytearray(stored[: len(stored) - cut])
    for at, value in places:
        bad[at % len(bad)] = value
    try:
        assert packed.payload(memoryview(bytes(bad)), options) == data
    except BundleError as refused:
        assert len(str(refused).splitlines()) == 1  # noqa: PT017 - either may happen
