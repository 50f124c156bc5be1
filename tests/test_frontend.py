"""The ONNX frontend: every exporter's file gives the same numbers, every bad file one line."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit import frontends, passes
from edgekit.errors import ModelError
from edgekit.frontends.onnx import OPSET
from tests import detectors
from tests.helpers import shared_data


def run(model: bytes | str, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def to_bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


def tiny(
    shape: tuple[object, ...] = (1, 3, 8, 8),
    *,
    opset: int = 11,
    ir_version: int = 8,
    listed: bool = False,
    nodes: list[onnx.NodeProto] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    elem_type: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    """Conv 3x3 and Relu on `x`; `listed`: weights among the inputs, as old exporters write."""
    rng = np.random.default_rng(0)
    weights = weights or {"w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32)}
    nodes = nodes or [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", elem_type, shape)]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    if listed:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    results = [helper.make_tensor_value_info(o, TensorProto.FLOAT, ["n", "c", "h", "w"]) for o in outputs]
    graph = helper.make_graph(nodes, "tiny", inputs, results, tensors)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, **options: object) -> str:
    """The message with which `load` refuses the file: one line that names it."""
    with pytest.raises(ModelError) as caught:
        frontends.load(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1200
    assert path.name in message
    return message


# --- what must load ---------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [8, 9, 11, 13, 17, 18, 20, 21])
@pytest.mark.parametrize("listed", [False, True])
def test_any_opset_gives_the_same_numbers(tmp_path: Path, opset: int, listed: bool) -> None:
    path = save(tiny(opset=opset, ir_version=3 if listed and opset < 12 else 8, listed=listed), tmp_path)
    model = frontends.load(path)
    assert model.graph.opset_imports == {"": OPSET}
    assert [v.name for v in model.graph.inputs] == ["x"]
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    # onnxruntime fuses less where weights could be overridden as inputs: the last bit differs
    np.testing.assert_allclose(run(to_bytes(model), x)[0], run(path.read_bytes(), x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "variant", "opset", "dynamo"),
    [
        ("yolox", "decode", 11, False),
        ("yolov5", "split", 12, False),
        ("yolov8", "joined", 13, False),
        ("nanodet", "plus", 20, True),
        ("fastestdet", "plain", 9, False),
    ],
)
def test_exporters_files_give_the_same_numbers(
    tmp_path: Path, family: str, variant: str, opset: int, dynamo: bool
) -> None:
    net = detectors.randomize(detectors.VARIANTS[family, variant]())
    path = detectors.export(net, tmp_path / "net.onnx", opset=opset, dynamo=dynamo)
    model = frontends.load(path)
    x = np.random.default_rng(2).random((1, 3, *detectors.SIZE), np.float32)
    for want, got in zip(run(str(path), x), run(to_bytes(model), x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("name", ["yolox_nano/yolox_nano.onnx", "fastestdet/FastestDet.onnx"])
def test_real_opset_11_files(name: str) -> None:
    path = shared_data() / "models" / name
    model = frontends.load(path)
    assert model.graph.opset_imports == {"": OPSET}
    assert len(model.graph.inputs) == 1
    x = np.random.default_rng(0).random(tuple(model.graph.inputs[0].shape), np.float32)  # type: ignore[arg-type]
    np.testing.assert_allclose(run(to_bytes(model), x)[0], run(path.read_bytes(), x)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("opset", [7, 8, 9, 10])
def test_upsample_of_old_opsets(tmp_path: Path, opset: int) -> None:
    weights = {"w": np.ones((4, 3, 1, 1), np.float32), "s": np.array([1, 1, 2, 2], np.float32)}
    if opset < 9:
        del weights["s"]
        last = helper.make_node("Upsample", ["c"], ["y"], mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])
    else:
        last = helper.make_node("Upsample" if opset == 9 else "Resize", ["c", "s"], ["y"], mode="nearest")
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), last]
    path = save(tiny(opset=opset, nodes=nodes, weights=weights), tmp_path)
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    got = run(to_bytes(frontends.load(path)), x)[0]
    np.testing.assert_allclose(got, run(path.read_bytes(), x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", ["batch", 0, -1, "N"])
def test_open_batch_becomes_one(tmp_path: Path, batch: object) -> None:
    model = frontends.load(save(tiny((batch, 3, 8, 8)), tmp_path))
    assert tuple(model.graph.inputs[0].shape) == (1, 3, 8, 8)  # type: ignore[arg-type]
    assert tuple(model.graph.outputs[0].shape) == (1, 4, 8, 8)  # type: ignore[arg-type]


def test_an_input_may_be_an_output(tmp_path: Path) -> None:
    """Its shape is known although no node infers it, and the passes leave it alone."""
    model = tiny(outputs=("y", "x"))
    loaded = frontends.load(save(model, tmp_path))
    assert [tuple(v.shape or ()) for v in loaded.graph.outputs] == [(1, 4, 8, 8), (1, 3, 8, 8)]
    prepared = passes.prepare(loaded, task="classify").model
    x = np.random.default_rng(4).standard_normal((1, 3, 8, 8)).astype(np.float32)
    for want, got in zip(run(model.SerializeToString(), x), run(to_bytes(prepared), x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_given_shape_fixes_open_axes(tmp_path: Path) -> None:
    path = save(tiny(("n", 3, "h", "w")), tmp_path)
    model = frontends.load(path, shapes={"x": (1, 3, 16, 24)})
    assert tuple(model.graph.outputs[0].shape) == (1, 4, 16, 24)  # type: ignore[arg-type]


def test_open_picture_size_says_which_axis_and_what_to_do(tmp_path: Path) -> None:
    message = refused(save(tiny((1, 3, "height", -1)), tmp_path))
    assert "'x'" in message
    assert "axis 2 (height)" in message
    assert "axis 3" in message
    assert "--shape x=1x3x416x416" in message


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 4, 8, 8), (1, 3, 0, 8)])
def test_shape_that_does_not_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert "does not fit input 'x'" in refused(save(tiny((1, 3, "h", "w")), tmp_path), shapes={"x": shape})


def test_shape_for_an_unknown_input(tmp_path: Path) -> None:
    assert "no input 'images'" in refused(save(tiny(), tmp_path), shapes={"images": (1, 3, 8, 8)})


def test_unsorted_nodes_are_sorted(tmp_path: Path) -> None:
    model = tiny()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert [n.op_type for n in frontends.load(save(model, tmp_path)).graph] == ["Conv", "Relu"]


def external(folder: Path, location: str = "weights.bin", **entries: str) -> Path:
    model = tiny()
    tensor = model.graph.initializer[0]
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return save(model, folder)


def test_external_data_beside_the_model(tmp_path: Path) -> None:
    path = external(tmp_path)
    x = np.ones((1, 3, 8, 8), np.float32)
    np.testing.assert_array_equal(run(to_bytes(frontends.load(path)), x)[0], run(str(path), x)[0])


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    model = tiny(opset=17)
    block = helper.make_function(
        "local",
        "Block",
        ["a"],
        ["b"],
        [helper.make_node("Relu", ["a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    model.functions.append(block)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Block", "local"
    assert [n.op_type for n in frontends.load(save(model, tmp_path)).graph] == ["Conv", "Relu"]


# --- what must be refused ---------------------------------------------------------------------


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x" * 50)
    return buffer.getvalue()


BAD_BYTES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"hello, this is a text file\n" * 10, "not an ONNX"),
    "zip": (_zip(), "zip archive"),
    "jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(100), "JPEG"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG"),
    "tflite": (b"\x20\x00\x00\x00TFL3" + bytes(100), "TFLite"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html></html>", "web page"),
    "zeros": (bytes(4096), "not an ONNX"),
    "random": (np.random.default_rng(0).bytes(4096), "not an ONNX"),
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
    "cut short": (tiny().SerializeToString()[:-40], "cut short"),
}


@pytest.mark.parametrize("kind", BAD_BYTES)
def test_files_that_are_no_models(tmp_path: Path, kind: str) -> None:
    data, hint = BAD_BYTES[kind]
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    assert hint in refused(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent.onnx")
    (tmp_path / "folder.onnx").mkdir()
    assert "is a folder" in refused(tmp_path / "folder.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a regular file" in refused(tmp_path / "pipe.onnx")
    (tmp_path / "net.pth").write_bytes(b"x")
    assert "torch.onnx.export" in refused(tmp_path / "net.pth")


def test_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as stream:
        stream.truncate(2**31)  # sparse: takes no space, but reading it would take 2 GiB
    assert "too big" in refused(path)


@pytest.mark.parametrize(
    ("location", "entries", "hint"),
    [
        ("missing.bin", {}, "is missing"),
        ("../weights.bin", {}, "expected a file beside the model"),
        ("sub/../../weights.bin", {}, "expected a file beside the model"),
        ("/etc/hostname", {}, "expected a file beside the model"),
        ("C:\\weights.bin", {}, "expected a file beside the model"),
        ("", {}, "expected a file beside the model"),
        ("weights.bin", {"offset": "100"}, "cut short"),
        ("weights.bin", {"length": "99999999"}, "cut short"),
        ("weights.bin", {"offset": "-4"}, "cut short"),
        ("weights.bin", {"offset": "many"}, "cannot be read"),
        ("weights.bin", {"offset": "9" * 4000}, "cut short"),
        ("weights.bin", {"length": "8"}, "damaged"),
        ("x" * 5000, {}, "xxx...' cannot be read: File name too long"),
        ("a\n\x1b[2J\u202e", {}, "'a\\n\\x1b[2J\\u202e' is missing"),
        ("link.bin", {}, "leads out"),
    ],
)
def test_unsafe_external_data(tmp_path: Path, location: str, entries: dict[str, str], hint: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(432))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    assert hint in refused(external(folder, location, **entries))


def test_bad_weights_are_named_and_counted(tmp_path: Path) -> None:
    w = np.ones((4, 3, 3, 3), np.float32)
    w[0, 0, 0, :2] = np.nan
    w[1, 0, 0, 0] = np.inf
    assert "w (3 of 108)" in refused(save(tiny(weights={"w": w}), tmp_path))


def test_unsupported_operators_are_listed_at_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("EfficientNMS_TRT", ["a"], ["b"]),
        helper.make_node("Fancy", ["b"], ["c"], domain="my.ops"),
        helper.make_node("Fancy", ["c"], ["d"], domain="my.ops"),
        helper.make_node("RandomNormalLike", ["d"], ["y"]),
    ]
    model = tiny(nodes=nodes)
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    message = refused(save(model, tmp_path))
    assert "EfficientNMS_TRT (1), RandomNormalLike (1), my.ops::Fancy (2)" in message


def _dangling() -> onnx.ModelProto:
    return tiny(nodes=[helper.make_node("Conv", ["x", "gone"], ["y"])])


def _cycle() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Add", ["c", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    return tiny(nodes=nodes)


def _twice_written() -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Relu", ["x"], ["y"])]
    return tiny(nodes=nodes)


def _twice_named() -> onnx.ModelProto:
    model = tiny()
    model.graph.initializer.append(model.graph.initializer[0])
    return model


def _wrong_size() -> onnx.ModelProto:
    model = tiny()
    model.graph.initializer[0].dims[0] = 400
    return model


def _wrong_channels() -> onnx.ModelProto:
    return tiny(weights={"w": np.ones((4, 5, 3, 3), np.float32)})


def _no_network() -> onnx.ModelProto:
    return tiny(nodes=[helper.make_node("Relu", ["x"], ["y"])])


def _quantized() -> onnx.ModelProto:
    weights = {
        "w": np.ones((4, 3, 1, 1), np.float32),
        "s": np.float32(0.1).reshape(()),
        "z": np.zeros((), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["y"]),
    ]
    return tiny(nodes=nodes, weights=weights, opset=13)


def _loop() -> onnx.ModelProto:
    body = helper.make_graph([], "empty", [], [])
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
    ]
    return tiny(nodes=nodes)


def _bad_attribute() -> onnx.ModelProto:
    return tiny(nodes=[helper.make_node("Conv", ["x", "w"], ["y"], no_such_thing=1)])


def _no_opset() -> onnx.ModelProto:
    model = tiny()
    del model.opset_import[:]
    return model


def _old_opset() -> onnx.ModelProto:
    return tiny(opset=5)


def _huge_inner() -> onnx.ModelProto:
    weights = {"w": np.ones((4, 3, 1, 1), np.float32), "n": np.array([1, 1, 60000, 60000], np.int64)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Tile", ["c", "n"], ["y"])]
    return tiny(nodes=nodes, weights=weights, opset=13)


def _long_names() -> onnx.ModelProto:
    return tiny(nodes=[helper.make_node("Conv", ["n" * 100_000, "m" * 100_000], ["y"])])


def _odd_operator() -> onnx.ModelProto:
    return tiny(nodes=[helper.make_node("a\n\x1b[2J" + "o" * 100_000, ["x"], ["y"])])


def _wrong_field() -> onnx.ModelProto:
    """As many values as the shape asks for, but where float32 is not read from."""
    model = tiny()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.double_data.extend([1.0] * 108)
    return model


def _text_without_values() -> onnx.ModelProto:
    model = tiny()
    model.graph.initializer.add(name="text", data_type=TensorProto.STRING, dims=[2**40], raw_data=b"")
    return model


def _untyped_output() -> onnx.ModelProto:
    model = tiny()
    model.graph.output[0].type.tensor_type.elem_type = 0
    return model


def _many_large_tensors() -> onnx.ModelProto:
    names = ["c", *(f"r{i}" for i in range(32)), "y"]
    relus = [helper.make_node("Relu", [a], [b]) for a, b in pairwise(names)]
    conv = helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1])
    weights = {"w": np.ones((16, 3, 3, 3), np.float32)}
    return tiny((1, 3, 2048, 2048), nodes=[conv, *relus], weights=weights)


BAD_GRAPHS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "dangling": (_dangling, "nothing makes it"),
    "cycle": (_cycle, "cycle"),
    "written twice": (_twice_written, "written more than once"),
    "named twice": (_twice_named, "used twice"),
    "wrong size": (_wrong_size, "damaged"),
    "wrong channels": (_wrong_channels, "channels or kernel do not fit"),
    "no network": (_no_network, "no Conv or MatMul"),
    "quantized": (_quantized, "already quantized"),
    "branch": (_loop, "unsupported operators: If (1)"),
    "bad attribute": (_bad_attribute, "not a valid ONNX graph"),
    "no opset": (_no_opset, "opset"),
    "old opset": (_old_opset, "opset 5 is not supported"),
    "huge inner tensor": (_huge_inner, "at most"),
    "zero-sized input": (lambda: tiny((1, 3, 0, 8)), "expected sizes from 1"),
    "integer input": (lambda: tiny(elem_type=TensorProto.UINT8), "has type UINT8"),
    "half input": (lambda: tiny(elem_type=TensorProto.FLOAT16), "has type FLOAT16"),
    "enormous names": (_long_names, "mmm...', 'nnn"),
    "unprintable operator": (_odd_operator, "unsupported operators: a\\n\\x1b[2Jooo"),
    "values in another type's field": (_wrong_field, "needs 108 values, got 0"),
    "text without values": (_text_without_values, f"needs {2**40} values, got 0"),
    "untyped output": (_untyped_output, "output 'y' has no element type"),
    "future file format": (lambda: tiny(ir_version=99), "format version 99 is not known"),
    "no file format": (lambda: tiny(ir_version=0), "format version 0 is not known"),
    "million pixels along an axis": (lambda: tiny((1, 3, 10**6, 32)), "at most 33554432 elements"),
    "many large tensors": (_many_large_tensors, "elements in all, expected at most 2147483648"),
    "huge input": (lambda: tiny((1, 3, 2**30, 2**30)), "at most"),
    "output shrinks away": (
        lambda: tiny(nodes=[helper.make_node("Conv", ["x", "w"], ["y"], strides=[9, 9])], shape=(1, 3, 1, 1)),
        "channels or kernel do not fit",
    ),
    "no output": (lambda: tiny(outputs=()), "no output"),
    "open rank": (lambda: _open_rank(), "has no shape"),
}


def _open_rank() -> onnx.ModelProto:
    model = tiny()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    return model


@pytest.mark.parametrize("kind", BAD_GRAPHS)
def test_graphs_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    make, hint = BAD_GRAPHS[kind]
    assert hint in refused(save(make(), tmp_path))


def test_mutated_files_load_or_are_refused(tmp_path: Path) -> None:
    """Flips, cuts, and repeats of bytes anywhere: an `ir.Model` or a ModelError, nothing else."""
    good = tiny(listed=True).SerializeToString()
    rng = np.random.default_rng(7)
    path = tmp_path / "model.onnx"
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, len(data)))
            kind = rng.integers(0, 4)
            if kind == 0:
                data[at] ^= 1 << int(rng.integers(0, 8))
            elif kind == 1:
                data[at] = int(rng.integers(0, 256))
            elif kind == 2:
                del data[at : at + int(rng.integers(1, 16))]
            else:
                data[at:at] = data[at : at + int(rng.integers(1, 16))]
            if not data:
                break
        path.write_bytes(bytes(data))
        try:
            frontends.load(path)
            outcomes["loaded"] += 1
        except ModelError as error:
            outcomes["refused"] += "\n" not in str(error)
    assert sum(outcomes.values()) == 300
    assert min(outcomes.values()) > 20
