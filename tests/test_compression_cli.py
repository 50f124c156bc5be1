"""`edgekit compress` and `edgekit.compress`: from a project with a torch module to one that builds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import edgekit
from edgekit.cli.build import progress_bar
from edgekit.compression.problems import open_problem, trainable
from edgekit.errors import CalibrationError, UsageError
from edgekit.frontends.torch_module import exported, load_module
from edgekit.project import ModelEntry, load_project, open_project
from edgekit.project.training import ModuleSource
from edgekit.project.writing import write_entry
from tests.cli_runs import cli, refusal
from tests.compression_nets import TinyNet, pictures, tiny_problem
from tests.helpers import ROOT

NET = """
import torch
from tests.compression_nets import TinyNet

def make():
    return TinyNet()

def soft():
    return torch.nn.Sequential(TinyNet(), torch.nn.Softmax(1))

def normed():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return (x - 10.0) / 200.0
    return torch.nn.Sequential(Norm(), TinyNet())

def problem():
    from tests.compression_nets import tiny_problem
    return tiny_problem()

def nothing():
    return 5

def fails():
    raise RuntimeError("no\\nnet")

number = 3
"""
PROJECT = """
[project]
name = "quarters"

[[model]]
name = "tiny"
module = "quarters_net:make"
weights = "tiny.pt"
input = [1, 3, 8, 8]
task = "classify"
classes = ["a", "b", "c", "d"]

[model.preprocess]
resize = "stretch"
color = "rgb"
mean = [0, 0, 0]
std = [255, 255, 255]

[model.train]
data = "data.npz"
batch = 8
lr = 1e-2

[model.evaluation]
data = "data.npz"

[model.accept]
max_drop = 0.5
"""
RECIPE = """
name = "short"
[[step]]
method = "finetune"
steps = 6
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of TinyNet, its weights and its pictures, and a recipe."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "quarters_net.py").write_text(NET)
    (folder / "edgekit.toml").write_text(PROJECT)
    (folder / "r.toml").write_text(RECIPE)
    problem = tiny_problem()
    torch.save(problem.model.state_dict(), folder / "tiny.pt")
    train, test = pictures(1, 48), pictures(2, 24)
    np.savez(folder / "data.npz", x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1])
    for images, labels, split in ((*train, "train"), (*test, "val")):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / "abcd"[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image[:, :, ::-1])
    return folder


def changed(app: Path, tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """A copy of the project with other text in its file."""
    folder = tmp_path / "copy"
    shutil.copytree(app, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = PROJECT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "edgekit.toml").write_text(text)
    return folder


# --- from end to end -----------------------------------------------------------------------------


def test_compress_then_build(app: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("compress", app, "--recipe", app / "r.toml", "--out", out, "--target", "rpi5")
    ran = cli(*words)
    assert ran.code == 0, ran.err
    assert "1-finetune" in ran.out and "top1 " in ran.out
    assert f"edgekit build {out} --target rpi5" in ran.out
    before = load_project(app).models[0]
    after = load_project(out).models[0]
    for field in ("name", "task", "classes", "preprocess", "evaluation", "accept", "calibration"):
        if field == "evaluation":
            assert after.evaluation is not None and before.evaluation is not None
            assert after.evaluation.data is not None and before.evaluation.data is not None
            assert after.evaluation.data.samefile(before.evaluation.data)
        else:
            assert getattr(after, field) == getattr(before, field)
    built = cli(
        "build", out, "--target", "host", "--precision", "float32", "--out", tmp_path / "dist", "--json"
    )
    assert built.code == 0, built.err
    again = cli(*words, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["points"][-1]["stage"] == "1-finetune"
    with edgekit.Bundle.open(tmp_path / "dist" / "tiny.host.edge") as bundle:
        metric = bundle.evidence["metric"]["payload"]["top1"]
    summary = json.loads((out / "summary.json").read_text())
    assert metric == pytest.approx(summary["points"][-1]["metrics"]["top1"], abs=1e-6), "judged alike"


def test_an_interrupted_run_goes_on(app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("compress", app, "--recipe", app / "r.toml", "--json", "--out")
    whole = json.loads(cli(*words, tmp_path / "whole").out)

    class Interrupting:
        calls = 0

        def __enter__(self) -> Callable[..., None]:
            return self.progress

        def __exit__(self, *_: Any) -> None:
            pass

        def progress(self, *_: Any) -> None:
            Interrupting.calls += 1
            if Interrupting.calls == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr("edgekit.compression.work.SAVE_SECONDS", -1.0)
    monkeypatch.setattr("edgekit.cli.compress.progress_bar", Interrupting)
    ran = cli(*words, tmp_path / "part")
    assert (ran.code, ran.out) == (130, "")
    assert "the same command goes on" in ran.err
    assert not (tmp_path / "part" / "tiny.onnx").exists()
    monkeypatch.setattr("edgekit.cli.compress.progress_bar", progress_bar)
    found = json.loads(cli(*words, tmp_path / "part").out)
    assert found["weights"] == whole["weights"]
    assert (tmp_path / "part" / "tiny.onnx").read_bytes() == (tmp_path / "whole" / "tiny.onnx").read_bytes()
    refusal(cli(*words, tmp_path / "part", "--seed", "1"), 2, "another run", "seed is 0 there, 1 here")


def test_an_onnx_network_trains_again(app: Path, tmp_path: Path) -> None:
    onnx = exported(load_project(app).models[0]).source
    options: tuple[object, ...] = (
        "--task", "classify", "--resize", "stretch", "--color", "rgb", "--mean", "0", "--std", "255",
        "--train", app / "train", "--data", app / "val",
    )  # fmt: skip
    ran = cli("compress", onnx, "--recipe", app / "r.toml", "--out", tmp_path / "out", "--json", *options)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["points"][1]["metrics"] != found["points"][0]["metrics"] or found["points"][0]["zeros"] == 0
    entry = load_project(tmp_path / "out").models[0]
    assert (entry.task, entry.preprocess.resize, entry.preprocess.std) == (
        "classify",
        "stretch",
        (255.0,) * 3,
    )
    reference = open_problem(load_project(app).models[0]).problem
    start = found["points"][0]["metrics"]["top1"]
    assert start == pytest.approx(reference.evaluate(reference.model)["top1"], abs=1e-6), (
        "batch norms undo nothing"
    )


def test_dry_run_and_lists(app: Path, tmp_path: Path) -> None:
    words = ("compress", app, "--recipe", app / "r.toml", "--steps-scale", "0.5", "--dry-run")
    plan = json.loads(cli(*words, "--json").out)["plan"]
    assert plan["recipe"]["step"] == [{"method": "finetune", "steps": 3, "ema": 0.0, "clip": 10.0}]
    assert plan["data"] == {"pictures": 48, "classes": 4, "judged_on": 24}
    shown = cli(*words, "--target", "rpi5").out
    assert "trained on 48 pictures, judged on 24" in shown
    assert "1. finetune: steps = 3" in shown
    assert "finetune" in json.loads(cli("compress", "--json").out)["recipes"]
    assert "methods for recipes of your own: " in cli("compress").out
    assert not (tmp_path / "out").exists()


def test_from_python(app: Path, tmp_path: Path) -> None:
    steps = {"name": "s", "step": [{"method": "finetune", "steps": 2}]}
    net = TinyNet().eval()
    done = edgekit.compress(
        net, steps, tmp_path / "module", input=(1, 3, 8, 8), task="classify", train=app / "data.npz", data=app / "data.npz",
        preprocess={"resize": "stretch", "color": "rgb", "mean": [0, 0, 0], "std": [255, 255, 255]},
    )  # fmt: skip
    assert done.onnx == tmp_path / "module" / "TinyNet.onnx"
    assert load_project(done.folder).models[0].source.samefile(done.onnx)
    done = edgekit.compress(tiny_problem(), steps, tmp_path / "problem")
    assert not (tmp_path / "problem" / "edgekit.toml").exists(), "nobody said what it is for"
    done = edgekit.compress("tests.compression_nets:tiny_problem", steps, tmp_path / "factory")
    assert done.after.metrics.keys() == {"top1", "loss"}


@pytest.mark.parametrize("as_onnx", [False, True])
def test_a_network_that_normalises_itself(app: Path, tmp_path: Path, as_onnx: bool) -> None:
    """What a build finds out about its input holds for what is trained and judged, and is written down with the result."""
    inner = load_module(ModuleSource("quarters_net:normed", root=app), "model m")[1]
    explicit = changed(
        app,
        tmp_path,
        ("mean = [0, 0, 0]", "mean = [10, 10, 10]"),
        ("std = [255, 255, 255]", "std = [200, 200, 200]"),
    )
    torch.save(inner.state_dict(), explicit / "tiny.pt")
    plain = open_problem(load_project(explicit).models[0]).problem
    text = (explicit / "edgekit.toml").read_text()
    text = text.replace("mean = [10, 10, 10]\nstd = [200, 200, 200]\n", "").replace(
        "quarters_net:make", "quarters_net:normed"
    )
    torch.save({f"1.{name}": value for name, value in inner.state_dict().items()}, explicit / "tiny.pt")
    (explicit / "edgekit.toml").write_text(text)
    entry = load_project(explicit).models[0]
    if as_onnx:
        entry = exported(entry)
    opened = open_problem(entry)
    found = opened.problem
    assert found.evaluate(found.model) == plain.evaluate(plain.model)
    (a, _), (b, _) = found.batch(3), plain.batch(3)
    with torch.no_grad():
        torch.testing.assert_close(found.model(a).flatten(1), plain.model(b), atol=1e-4, rtol=1e-4)
    assert opened.entry is not None
    assert (opened.entry.preprocess.mean, opened.entry.preprocess.std) == (
        ((0.0,) * 3, (1.0,) * 3) if as_onnx else (None, None)
    )


@pytest.mark.parametrize("as_onnx", [False, True])
def test_a_network_that_ends_in_softmax(app: Path, tmp_path: Path, as_onnx: bool) -> None:
    folder = changed(app, tmp_path, ("quarters_net:make", "quarters_net:soft"))
    inner = load_project(app).models[0]
    assert inner.module is not None
    net = load_module(inner.module, "model m")
    torch.save({f"0.{name}": value for name, value in net.state_dict().items()}, folder / "tiny.pt")
    entry = load_project(folder).models[0]
    plain = open_problem(inner).problem
    found = open_problem(exported(entry) if as_onnx else entry).problem
    inputs, classes = plain.batch(0)
    with torch.no_grad():
        wanted = plain.loss(plain.model(inputs), classes)
        torch.testing.assert_close(found.loss(found.model(inputs), classes), wanted, atol=1e-4, rtol=1e-4)


def test_batches_depend_on_seed_and_step_alone(app: Path) -> None:
    entry = load_project(app).models[0]
    one, two = open_problem(entry).problem, open_problem(entry).problem
    for step in (5, 0, 11, 5):
        (a, x), (b, y) = one.batch(step), two.batch(step)
        assert torch.equal(a, b) and torch.equal(x, y)
    assert not torch.equal(one.batch(5)[0], open_problem(entry, seed=1).problem.batch(5)[0])
    seen = torch.cat([one.batch(step)[1] for step in range(6)])
    every = np.load(app / "data.npz")["y_train"]
    assert np.array_equal(np.bincount(seen.numpy()), np.bincount(every)), "an epoch is each picture once"


def test_scratch(app: Path, tmp_path: Path) -> None:
    folder = changed(app, tmp_path, ('weights = "tiny.pt"\n', ""), ("batch = 8", "batch = 8\nsteps = 40"))
    refusal(
        cli("build", folder, "--target", "host", "--out", tmp_path), 2, "trained by 'edgekit compress' first"
    )
    done = edgekit.compress(folder, folder / "r.toml", tmp_path / "out")
    assert done.before.metric > 0.4, "chance is 0.25"
    assert load_project(tmp_path / "out").models[0].train is not None
    assert "steps" not in (tmp_path / "out" / "edgekit.toml").read_text()


# --- torch modules as sources ----------------------------------------------------------------------


def test_a_module_is_exported_by_its_content(app: Path) -> None:
    entry = load_project(app).models[0]
    first, second = exported(entry), exported(entry)
    assert first.module is None
    assert first.source == second.source
    assert first.source.suffix == ".onnx"
    assert exported(first) is first


def test_the_project_s_own_file_wins(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samename.py").write_text(f"def make():\n    return '{name}'\n")
    made = [
        load_module(ModuleSource("samename:make", root=tmp_path / name), "model m")
        for name in ("one", "two", "one")
    ]
    assert made == ["one", "two", "one"]


def test_random_weights_are_the_same_each_time(app: Path) -> None:
    source = ModuleSource("quarters_net:make", (1, 3, 8, 8), root=app)
    state = torch.get_rng_state()
    a, b = (load_module(source, "model m").state_dict() for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("factory", "needle"),
    [
        ("quarters_net:mak", "has no function mak"),
        ("quarters_net:number", "has no function number"),
        ("quarters_nets:make", "cannot be imported: ModuleNotFoundError: No module named 'quarters_nets'"),
        ("quarters_net:fails", "fails() failed: RuntimeError: no net"),
        ("quarters_net:nothing", "gives a int, expected a torch.nn.Module"),
    ],
)
def test_modules_that_cannot_be_made(app: Path, tmp_path: Path, factory: str, needle: str) -> None:
    folder = changed(app, tmp_path, ("quarters_net:make", factory), ('weights = "tiny.pt"\n', ""))
    for words in (("build", folder, "--target", "host"), ("compress", folder, "--recipe", "finetune")):
        refusal(cli(*words, "--out", tmp_path / "out"), 2, needle)


def test_weights_that_do_not_fit(app: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    source = ModuleSource("quarters_net:make", (1, 3, 8, 8), path, app)

    def message() -> str:
        with pytest.raises(UsageError) as failed:
            load_module(source, "model m")
        return str(failed.value)

    state = TinyNet(24).state_dict()
    torch.save(state, path)
    assert "stem.0.weight is [16, 3, 3, 3] in it, [24, 3, 3, 3] in the file" in message()
    torch.save(TinyNet(), path)
    assert "hold more than tensors" in message()
    torch.save([1, 2], path)
    assert "expected a state_dict" in message()
    path.write_bytes(b"PK\x03\x04 nothing")
    assert "not a file of torch.save" in message()
    torch.save({"state_dict": TinyNet().state_dict(), "step": 5}, path)
    load_module(source, "model m")


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ([('module = "quarters_net:make"', 'module = "quarters_net"')], "module 'quarters_net' must look like"),
        ([('module = "quarters_net:make"\n', "")], "expected one of source (a file) and module"),
        ([('module = "quarters_net:make"', 'source = "r.toml"')], "weights and input go with module"),
        ([('"tiny.pt"', '"gone.pt"')], "model[0].weights: no such file"),
        ([("[1, 3, 8, 8]", "[0]")], "model[0].input: expected the sizes"),
        ([("batch = 8", "batch = 8\nsteps = 5")], "train.steps: trains a network from nothing, but it has weights"),
        ([("batch = 8", "batch = 0")], "model[0].train: batch must be between 1 and 4096, got 0"),
        ([("batch = 8", "bach = 8")], "model[0].train: unknown key 'bach'. Did you mean 'batch'?"),
        ([("lr = 1e-2", "zoom = 2")], "zoom must be between 0.1 and 1"),
        ([('data = "data.npz"\nbatch', 'data = "gone.npz"\nbatch')], "model[0].train"),
    ],
)  # fmt: skip
def test_wrong_projects(app: Path, tmp_path: Path, changes: list[tuple[str, str]], needle: str) -> None:
    folder = changed(app, tmp_path, *changes)
    refusal(cli("compress", folder, "--recipe", "finetune", "--out", tmp_path / "o"), 2, needle)


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ([('[model.evaluation]\ndata = "data.npz"\n', "")], "no labelled pictures to judge it by"),
        ([('[model.train]\ndata = "data.npz"\nbatch = 8\nlr = 1e-2\n', "")], "no pictures to train on"),
        ([("input = [1, 3, 8, 8]\n", "")], "the sizes of its input are not known"),
        ([('task = "classify"', 'task = "video"')], "networks of the task video are not trained by edgekit"),
        ([('resize = "stretch"\n', "")], "its input rule is not known"),
        ([('classes = ["a", "b", "c", "d"]', 'classes = ["a", "b"]')], "2 class names for a network with 4 classes"),
        ([("[1, 3, 8, 8]", "[1, 2, 8, 8]")], "cannot be exported to ONNX"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained(
    app: Path, tmp_path: Path, changes: list[tuple[str, str]], needle: str
) -> None:
    folder = changed(app, tmp_path, *changes)
    refusal(cli("compress", folder, "--recipe", "finetune", "--out", tmp_path / "o"), 2, needle)
    assert not (tmp_path / "o").exists(), "refused before anything is written"


def test_pictures_in_both_sets_are_refused(app: Path, tmp_path: Path) -> None:
    shutil.copytree(app / "val", tmp_path / "leak")
    for index, path in enumerate(sorted((app / "train").rglob("*.png"))[:20]):
        shutil.copy(path, tmp_path / "leak" / "a" / f"other-{index}.png")
    folder = changed(app, tmp_path, ('data = "data.npz"\nbatch', 'data = "train"\nbatch'))
    words = ("compress", folder, "--recipe", "finetune", "--out", tmp_path / "o", "--data", tmp_path / "leak")
    refusal(cli(*words), 2, "20 of 48 training pictures are evaluation pictures too")
    same = ("compress", folder, "--recipe", "finetune", "--out", tmp_path / "o", "--data", folder / "train")
    refusal(cli(*same), 2, "training and evaluation are the same pictures")
    with pytest.raises(CalibrationError):
        edgekit.compress(folder, "finetune", tmp_path / "o", data=tmp_path / "leak")


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("--recipe", "finetun"), "did you mean 'finetune'"),
        (("--recipe", "finetune", "--steps-scale", "0"), "expected a number above 0"),
        (("--recipe", "finetune", "--target", "rpi55"), "did you mean 'rpi5'"),
        (("--recipe", "finetune", "--precision", "int8"), "Give --target"),
        (
            ("--recipe", "finetune", "--target", "jetson-orin", "--precision", "dynamic"),
            "not available there",
        ),
        (("--recipe", "finetune", "--model", "tinny"), "did you mean 'tiny'"),
        (("--recipe", "finetune", "--input", "8"), "expected sizes, as 1x3x224x224"),
        (("--recipe", "finetune", "--seed", "-1"), "expected a whole number"),
        (("--recip", "finetune"), "option --recip: unknown"),
        (("--recipe", "finetune", "--train-images", "x"), "--train and --train-images"),
    ],
)
def test_wrong_options(app: Path, tmp_path: Path, words: tuple[str, ...], needle: str) -> None:
    refusal(cli("compress", app, "--out", tmp_path / "o", *words), 2, needle)


def test_options_that_are_missing(app: Path) -> None:
    refusal(cli("compress", app, "--recipe", "finetune"), 2, "option --out: missing")
    refusal(cli("compress", "--recipe", "finetune", "--out", "x"), 2, "argument MODEL: missing")
    refusal(cli("compress", app, "--recipe", "finetune", "--out", app), 2, "holds something else than a run")


def test_detectors_that_are_no_yolo_lite(app: Path, tmp_path: Path) -> None:
    assert {"classify", "detect"} <= set(trainable())
    folder = changed(app, tmp_path, ('task = "classify"', 'task = "detect"'))
    shutil.copytree(app / "val", folder / "pictures")
    categories = [{"id": i, "name": n} for i, n in enumerate("abcd")]
    (folder / "i.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    text = (folder / "edgekit.toml").read_text()
    train = text.index("[model.train]")
    (folder / "edgekit.toml").write_text(
        text[:train] + '[model.train]\nsource = "synthetic://street"\ncount = 1\n'
        '[model.evaluation]\nsource = "synthetic://street"\nseed = 10\ncount = 2\n'
    )
    words = ("compress", folder, "--recipe", "finetune", "--out", tmp_path / "o")
    refusal(cli(*words), 2, "its module is a TinyNet, expected edgekit.models.yolo_lite.YoloLite")


# --- a project written back ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["detect", "gesture"])
def test_entries_read_back_as_they_were(tmp_path: Path, name: str) -> None:
    entry = load_project(ROOT / "apps" / name).models[0]
    write_entry(entry, tmp_path, "a note")
    found = load_project(tmp_path).models[0]
    assert found.source.samefile(entry.source)
    assert dataclasses.replace(found, source=entry.source) == entry


def test_all_that_an_entry_may_say_reads_back(app: Path, tmp_path: Path) -> None:
    text = PROJECT.replace(
        'module = "quarters_net:make"\nweights = "tiny.pt"\ninput = [1, 3, 8, 8]', 'source = "net.onnx"'
    )
    text = text.replace('"a", "b"', '"a \\"quoted\\" ünit", "b"') + (
        '[model.thresholds]\ntop_k = 2\n[model.calibration]\nimages = "train"\ncount = 5\n'
        '[model.target.rpi5]\nprecision = "float32"\nbackends = ["litert"]\n[model.target.rpi5.thresholds]\nscore = 0.5\n'
    )
    folder = tmp_path / "a"
    shutil.copytree(app, folder)
    (folder / "net.onnx").write_bytes(b"")
    (folder / "edgekit.toml").write_text(text)
    entry = load_project(folder).models[0]
    (tmp_path / "b").mkdir()
    write_entry(entry, tmp_path / "b", "a note")
    found = load_project(tmp_path / "b").models[0]

    def plain(e: ModelEntry) -> str:
        return repr(e).replace(str(folder), "").replace(f"{tmp_path / 'b'}/../a", "")

    assert plain(found) == plain(entry)


def test_open_project_knows_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry = open_project(Path("net.sub:make")).models[0]
    assert entry.module == ModuleSource("net.sub:make", root=tmp_path)
    assert entry.name == "make"
    with pytest.raises(UsageError, match="no such file"):
        open_project(Path("net.sub:make:more"))
