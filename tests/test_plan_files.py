"""plan.json is read strictly, with one line for what is wrong; what its files hold is checked against it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, load_model, numpy_helper, save

from edgekit.cli.init import write_project
from edgekit.errors import EdgekitError, ModelError, UsageError
from edgekit.project import ModelEntry, load_project, open_project
from edgekit.toolchain.plans.files import read_plan
from edgekit.toolchain.plans.source import read

TREE: dict[str, Any] = {
    "format": "edgekit-plan-1",
    "task": "fusion",
    "inputs": {"x": ["float32", [2, 3]], "on": ["float32", [2]]},
    "outputs": ["z"],
    "steps": [
        {"name": "first", "model": "first.onnx", "inputs": ["x"], "outputs": ["y"], "repeat": 2, "when": "on"},
        {"name": "between", "kernel": "some", "weights": "w.npz", "options": {"a": 1}, "inputs": ["y"], "outputs": ["k"]},
        {"name": "last", "model": "last.onnx", "inputs": ["y", "k"], "outputs": ["z"]},
    ],
    "pipeline": {},
}  # fmt: skip


def network(
    path: Path, inputs: dict[str, list[int]], output: str, shape: list[int], op: str = "Relu"
) -> None:
    """output = op(first input @ W, the others), all float32."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    made = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
    first, *others = inputs
    wide = inputs[first][1]
    weight = numpy_helper.from_array(np.ones((wide, wide), np.float32), "w_of_it")
    nodes = [
        helper.make_node("MatMul", [first, "w_of_it"], ["m_of_it"]),
        helper.make_node(op, ["m_of_it", *others], [output]),
    ]
    graph = helper.make_graph(nodes, "net", values, [made], [weight])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network(tmp_path / "first.onnx", {"x": [1, 3]}, "y", [1, 3])
    network(tmp_path / "last.onnx", {"y": [2, 3], "k": [2, 3]}, "z", [2, 3], "Add")
    np.savez(tmp_path / "w.npz", b=np.ones((2, 2), np.float32), a=np.zeros(3, np.float32))
    write(tmp_path, TREE)
    return tmp_path


def write(folder: Path, tree: Any) -> None:
    (folder / "plan.json").write_text(json.dumps(tree), encoding="utf-8")


def entry(folder: Path) -> ModelEntry:
    return ModelEntry("plan", folder / "plan.json", "fusion")


def test_a_plan_is_read_with_the_shapes_of_its_tensors(folder: Path) -> None:
    source = read(entry(folder))
    assert {n: t.shape for n, t in source.tensors.items()} == {
        "x": (2, 3), "on": (2,), "y": (2, 3), "k": (2, 3), "z": (2, 3),
    }  # fmt: skip
    assert list(source.networks) == ["first", "last"]
    kernel = source.kernels["between"]
    assert kernel.options == {"a": 1, "weights": [["a", [3]], ["b", [2, 2]]]}
    assert kernel.files == {"weights": "kernels/between/weights.bin"}
    packed = np.frombuffer(source.files["kernels/between/weights.bin"], "<f4")
    assert packed.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_the_digest_is_that_of_every_file(folder: Path) -> None:
    before = read(entry(folder)).digest
    assert read(entry(folder)).digest == before
    np.savez(folder / "w.npz", b=np.ones((2, 2), np.float32), a=np.ones(3, np.float32))
    assert read(entry(folder)).digest != before


def test_the_digest_is_also_that_of_weights_beside_a_network(folder: Path) -> None:
    """As large exports have them; else what was measured of other weights would come out of the cache."""
    model = load_model(folder / "first.onnx")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, 3), np.float32), "w_of_it"))
    save(model, folder / "first.onnx", save_as_external_data=True, location="first.data", size_threshold=0)
    before, onnx_file = read(entry(folder)).digest, (folder / "first.onnx").read_bytes()
    weights = np.full((3, 3), 2, np.float32).tobytes()
    assert len(weights) == (folder / "first.data").stat().st_size
    (folder / "first.data").write_bytes(weights)
    assert (folder / "first.onnx").read_bytes() == onnx_file
    assert read(entry(folder)).digest != before


def edited(path: str, value: Any) -> Callable[[Any], None]:
    """Set (or, with ..., delete) what lies at a dotted path."""

    def edit(tree: Any) -> None:
        *way, last = (int(part) if part.isdecimal() else part for part in path.split("."))
        for part in way:
            tree = tree[part]
        if value is ...:
            del tree[last]
        else:
            tree[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edited("format", "edgekit-plan-2"), "format: expected 'edgekit-plan-1'"),
        (edited("more", 1), "unknown key"),
        (edited("steps.0.modle", "x"), "unknown key"),
        (edited("task", "fuse"), "task 'fuse': unknown"),
        (edited("inputs.x", ["float32"]), "input 'x': expected [type, shape]"),
        (edited("inputs.x", ["float23", [1]]), "input 'x': unknown type"),
        (edited("inputs.x", ["float32", [10**12, 5]]), "input 'x': [1000000000000, 5] is too large"),
        (edited("inputs.x", ["float32", [0, 3]]), "sizes of at least 1"),
        (edited("inputs.x", ["float32", [True]]), "sizes of at least 1"),
        (edited("outputs", []), "expected at least one input, one output and one step"),
        (edited("outputs", ["x"]), "output 'x': no step makes it"),
        (edited("outputs", ["zz"]), "output 'zz': no step makes it"),
        (edited("steps.0.model", ...), "expected either model or kernel"),
        (edited("steps.0.kernel", "some"), "expected either model or kernel"),
        (edited("steps.0.options", {"a": 1}), "weights and options belong to kernels"),
        (edited("steps.1.repeat", 2), "repeat belongs to networks"),
        (edited("steps.0.repeat", 0), "repeat must be between 1 and"),
        (edited("steps.0.when", "of"), "when 'of' is no input of the plan. Known: on, x"),
        (edited("steps.0.when", "y"), "when 'y' is no input of the plan"),
        (edited("steps.0.inputs", ["k"]), "step first: input 'k' is not there before it"),
        (edited("steps.2.outputs", ["y"]), "output 'y' is written twice"),
        (edited("steps.2.name", "first"), "step first: there twice"),
        (edited("steps.2.name", "a/b"), "must be letters"),
        (edited("steps.0.model", "../first.onnx"), "must name a file in the folder"),
        (edited("steps.0.model", "/etc/passwd"), "must name a file in the folder"),
        (edited("steps.0.model", "second.onnx"), "step first: no file 'second.onnx' in the folder"),
        (edited("steps.1.weights", "v.npz"), "step between: no file 'v.npz' in the folder"),
        (edited("steps.0.outputs", []), "at least one input and one output"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder: Path, edit: Callable[[Any], None], said: str) -> None:
    tree = copy.deepcopy(TREE)
    edit(tree)
    write(folder, tree)
    with pytest.raises(UsageError) as error:
        read_plan(folder)
    text = str(error.value)
    assert said in text and "\n" not in text and text.startswith("plan ") and "plan.json" in text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1, "format": 2}', "\xff"])
def test_a_file_that_is_no_plan_is_refused(folder: Path, text: str) -> None:
    (folder / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"plan\.json: "):
        read_plan(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: network(f / "first.onnx", {"x": [2, 3]}, "y", [2, 3]), "with a first axis of 1, as it is repeated"),
        (lambda f: network(f / "first.onnx", {"w": [1, 3]}, "y", [1, 3]), "inputs of first.onnx are w, expected x"),
        (lambda f: network(f / "last.onnx", {"y": [2, 3], "k": [2, 3]}, "q", [2, 3], "Add"), "outputs of last.onnx are q"),
        (lambda f: network(f / "last.onnx", {"y": [2, 1], "k": [2, 3]}, "z", [2, 3], "Add"), "tensor y is float32 [2, 1], but elsewhere"),
        (lambda f: (f / "first.onnx").write_bytes(b"no"), "first.onnx"),
        (lambda f: (f / "w.npz").write_bytes(b"no"), "not an .npz file of arrays"),
        (lambda f: np.savez(f / "w.npz", a=np.zeros(3)), "array a is float64 [3], expected finite float32"),
        (lambda f: np.savez(f / "w.npz", a=np.full(3, np.nan, np.float32)), "expected finite float32"),
        (lambda f: np.savez(f / "w.npz"), "0 arrays"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_the_plan_are_refused(
    folder: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelError) as error:
        read(entry(folder))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_only_kernels_touch_has_no_shape(folder: Path) -> None:
    tree = copy.deepcopy(TREE)
    tree["steps"][2]["inputs"] = ["y"]
    write(folder, tree)
    network(folder / "last.onnx", {"y": [2, 3]}, "z", [2, 3])
    with pytest.raises(ModelError, match="tensor k: its shape is not known"):
        read(entry(folder))


# --- projects ---------------------------------------------------------------------------------------


def project(folder: Path, source: str, task: str = "fusion") -> Path:
    text = f'[project]\nname = "p"\n[[model]]\nname = "rig"\nsource = "{source}"\ntask = "{task}"\n'
    (folder / "edgekit.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("source", ["segments", "segments/plan.json"])
def test_a_project_names_the_folder_or_the_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, source: str
) -> None:
    root = tmp_path_factory.mktemp("app")
    (root / "segments").symlink_to(folder)
    (model,) = load_project(project(root, source)).models
    assert model.is_plan and model.source == root / "segments" / "plan.json" and model.task == "fusion"


def test_a_bare_folder_is_a_project(folder: Path) -> None:
    for path in (folder, folder / "plan.json"):
        (model,) = open_project(path).models
        assert (model.task, model.source, model.is_plan) == ("fusion", folder / "plan.json", True)


@pytest.mark.parametrize(
    ("source", "task", "said"),
    [
        (".", "detect", "is a plan, which does not fit task = 'detect'"),
        ("first.onnx", "fusion", "is no plan folder, which does not fit task = 'fusion'"),
        ("nothing", "fusion", "no such file"),
        ("empty", "fusion", "holds no plan.json"),
    ],
)
def test_source_and_task_must_fit(folder: Path, source: str, task: str, said: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(EdgekitError) as error:
        load_project(project(folder, source, task))
    assert said in str(error.value)


def test_init_writes_a_project_for_a_plan(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("app")
    (root / "segments").symlink_to(folder)
    (model,) = load_project(write_project(root)).models
    assert (model.task, model.source) == ("fusion", root / "segments" / "plan.json")
    for given in (folder, folder / "plan.json"):
        (model,) = load_project(write_project(root, given, force=True)).models
        assert model.source.resolve() == (folder / "plan.json").resolve()
    (model,) = load_project(write_project(folder)).models
    assert model.source == folder / "plan.json"
