"""Project files, bare networks, class files, named sets and the file that `edgekit init` writes."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from edgekit import dataset, project
from edgekit.cli import init
from edgekit.dataset import DataSet, named_set, named_sets, picture_digest
from edgekit.errors import CalibrationError, OutputError, UsageError
from edgekit.project import (
    PreprocessHint,
    Thresholds,
    bare_project,
    load_project,
    open_project,
    opening,
    read_classes,
    with_options,
)
from edgekit.project.entry import COLUMNS
from edgekit.project.reading import _ModelTable
from edgekit.project.training import TrainHint, TrainTable
from edgekit.tasks.detect.coco import COCO_ALIASES, COCO_CLASSES
from edgekit.tasks.detect.spec import DetectHead, DetectSpec
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.tasks.video.spec import Smoothing
from tests.helpers import ROOT, shared_data

HEAD = '[project]\nname = "demo"\n[[model]]\nname = "net"\nsource = "net.onnx"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with everything a project may name."""
    (tmp_path / "net.onnx").write_bytes(b"not read here")
    (tmp_path / "classes.txt").write_text("car\nbus\n")
    for name in ("calibration", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "instances.json").write_text("{}")
    (tmp_path / "instances_train.json").write_text("{}")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "edgekit.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refuse(call, *parts: str) -> str:
    """`call` raises UsageError on one line that holds every one of `parts`."""
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable(), "one line, nothing that moves a terminal's cursor"
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in message
    return message


# --- reading ---------------------------------------------------------------------------------------


def test_smallest_project(folder):
    loaded = load_project(write(folder, HEAD))
    (model,) = loaded.models
    assert loaded.name == "demo"
    assert loaded.path == folder / "edgekit.toml"
    assert model.source == folder / "net.onnx"
    assert (model.head.family, model.classes, model.calibration, model.evaluation) == ("auto", (), None, None)
    assert model.accept.max_drop == 0.01
    assert load_project(folder) == loaded, "a folder means the file in it"


def test_every_key(folder):
    text = HEAD + (
        'classes = "classes.txt"\n'
        '[model.head]\nfamily = "rows"\ncolumns = ["cx", "cy", "w", "h", "cls*"]\n'
        "normalized = true\n"
        '[model.preprocess]\nresize = "stretch"\npad_value = 0\ncolor = "rgb"\nmean = [1, 2, 3]\n'
        'std = [255, 255, 255]\nlayout = "NHWC"\ndtype = "uint8"\n'
        "[model.thresholds]\nscore = 0.3\niou = 0.5\nmax_detections = 50\n"
        '[model.calibration]\nimages = "calibration"\ndata = "instances_train.json"\ncount = 7\n'
        '[model.evaluation]\nimages = "images"\ndata = "instances.json"\n'
        "[model.accept]\nmax_drop = 0.02\nmin_metric = 0.3\nmax_score_shift = 0.1\n"
        '[model.target.host]\nprecision = "float32"\nbackends = ["onnxruntime"]\nthresholds = {score = 0.5}\n'
    )
    model = load_project(write(folder, text)).model("net")
    assert model.classes == ("car", "bus")
    assert model.head.columns == ("cx", "cy", "w", "h", "cls*")
    assert model.calibration == DataSet(
        images=folder / "calibration", data=folder / "instances_train.json", count=7
    )
    rule = model.preprocess.apply(ImagePreprocess(640, 480))
    assert (rule.width, rule.height, rule.resize, rule.mean) == (640, 480, "stretch", (1.0, 2.0, 3.0))
    on_host, elsewhere = model.on("host"), model.on("rpi5")
    assert on_host.thresholds == Thresholds(0.5, 0.5, 50), "the target's score over the model's others"
    assert (on_host.precision, on_host.backends) == ("float32", ("onnxruntime",))
    assert (elsewhere.thresholds, elsewhere.precision) == (Thresholds(0.3, 0.5, 50), None)
    spec = DetectSpec(rule, DetectHead("rows", 2, rows="o", columns=("x1",)), ("a", "b"))
    assert on_host.thresholds.apply(spec).score_threshold == 0.5
    assert Thresholds().apply(spec) == spec


def test_preprocess_hint_covers_the_rule():
    rule = {f.name for f in dataclasses.fields(ImagePreprocess)} - {"width", "height"}
    assert {f.name for f in dataclasses.fields(PreprocessHint)} == rule


def test_classes_as_a_list(folder):
    model = load_project(write(folder, HEAD + 'classes = [" car ", "bus"]\n')).model("net")
    assert model.classes == ("car", "bus")


def test_two_models(folder):
    (folder / "b.onnx").write_bytes(b"x")
    text = HEAD + '[model.head]\nfamily = "yolox"\n[[model]]\nname = "b"\nsource = "b.onnx"\n'
    loaded = load_project(write(folder, text))
    assert [m.head.family for m in loaded.models] == ["yolox", "auto"]
    refuse(lambda: loaded.model("nett"), "'nett'", "Did you mean 'net'?")
    refuse(lambda: with_options(loaded, head="yolox"), "got 2 models")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("'project' is missing",)),
        ('[project]\nname = "x"\n', ("no model", "[[model]]")),
        ("[project\n", ("not valid TOML", "line 1")),
        (HEAD + "sorce = 1\n", ("model[0]", "unknown key 'sorce'", "Did you mean 'source'")),
        (HEAD.replace("[[model]]", "[[modle]]"), ("unknown key 'modle'", "Did you mean 'model'")),
        (HEAD.replace('"net"', '"../net"'), ("model[0]", "letters, digits")),
        (HEAD.replace('"net.onnx"', '"no\\nsuch.onnx"'), ("model[0].source", "no such file")),
        (HEAD.replace('"net.onnx"', '"a\\u0000b"'), ("model[0].source", "no such file")),
        (HEAD.replace('"net.onnx"', f'"{"a" * 5000}"'), ("model[0].source", "no such file")),
        (HEAD + 'task = "segment"\n', ("model[0].task", "'detect'", "'segment'")),
        (HEAD + '[model.head]\nfamily = "yolo9"\n', ("model[0].head.family", "'yolox'", "'yolo9'")),
        (HEAD + '[model.head]\nfamily = "rows"\n', ("model[0].head", "needs columns")),
        (HEAD + '[model.head]\ncolumns = ["x1"]\n', ("model[0].head", 'family = "rows"')),
        (HEAD + '[model.head]\nfamily = "rows"\ncolumns = ["x"]\n', ("unknown column 'x'",)),
        (HEAD + '[model.head]\nfamily = "rows"\ncolumns = ["x1", "x1"]\n', ("differ",)),
        (HEAD + "[model.preprocess]\nwidth = 3\n", ("model[0].preprocess", "unknown key 'width'")),
        (HEAD + "[model.preprocess]\npad_value = 300\n", ("pad_value 300", "0 and 255")),
        (HEAD + "[model.preprocess]\nmean = [1]\n", ("preprocess.mean", "3 values")),
        (HEAD + "[model.thresholds]\nscore = 1.5\n", ("thresholds", "score", "0 and 1")),
        (HEAD + "[model.thresholds]\nscore = nan\n", ("thresholds.score", "finite")),
        (HEAD + "[model.thresholds]\nmax_detections = 0\n", ("max_detections", "between 1")),
        (HEAD + "[model.accept]\nmax_drop = -1\n", ("accept", "max_drop", "0 and 1")),
        (HEAD + '[model.target.hots]\nprecision = "int8"\n', ("'hots'", "Did you mean 'host'")),
        (HEAD + '[model.target.host]\nprecision = "int4"\n', ("precision", "'int8'", "'int4'")),
        (HEAD + '[model.target.host]\nbackends = ["onxruntime"]\n', ("'onxruntime'", "'onnxruntime'")),
        (HEAD + 'classes = "no.txt"\n', ("no.txt", "no such file")),
        (HEAD + 'classes = "a\\n\\u001b[2J.txt"\n', ("no such file",)),
        (HEAD + 'classes = ["a", "a"]\n', ("'a' is there twice", "entry 1 and entry 2")),
        (HEAD + "[model.calibration]\n", ("model[0].calibration", "expected one of", "got none")),
        (HEAD + '[model.calibration]\nset = "street"\nimages = "images"\n', ("got set and images",)),
        (HEAD + '[model.calibration]\nset = "stret"\n', ("set 'stret'", "Did you mean 'street'")),
        (HEAD + '[model.calibration]\nset = "../x"\n', ("unknown",)),
        (HEAD + '[model.calibration]\nset = "street-eval"\n', ("is for evaluation",)),
        (HEAD + '[model.evaluation]\nset = "street"\n', ("is for calibration",)),
        (HEAD + '[model.calibration]\nset = "street"\nseed = 3\n', ("calibration.seed", "its own seed")),
        (HEAD + '[model.calibration]\nset = "street"\ncount = 9999\n', ("calibration.count", "9999")),
        (HEAD + '[model.calibration]\nimages = "nope"\n', ("calibration.images", "no such folder")),
        (HEAD + '[model.calibration]\nimages = "images"\nseed = 1\n', ("calibration.seed", "folder")),
        (HEAD + '[model.calibration]\nimages = "images"\ncount = 0\n', ("calibration.count", "got 0")),
        (HEAD + '[model.calibration]\ndata = "instances.json"\n', ("got none",)),
        (HEAD + '[model.evaluation]\nimages = "images"\n', ("without labels", "instances.json")),
        (
            HEAD + '[model.evaluation]\nimages = "images"\ndata = "x.json"\n',
            ("evaluation.data", "no such file"),
        ),
        (HEAD + '[model.calibration]\nsource = "synthetic://street"\n', ("count", "got None")),
        (HEAD + '[model.calibration]\nsource = "http://x"\ncount = 3\n', ("synthetic://street",)),
        (HEAD + '[model.calibration]\nsource = "synthetic://s?seed=3"\ncount = 3\n', ("keys of their own",)),
        (HEAD + '[model.calibration]\nsource = "synthetic://s"\ncount = 3\nseed = -1\n', ("seed", "-1")),
        (HEAD + f"x = {'[' * 4000}{']' * 4000}\n", ()),
    ],
)
def test_refused(folder, text, parts):
    path = write(folder, text)
    message = refuse(lambda: load_project(path), *parts)
    assert str(folder) in message or "set " in message, "says which file"
    assert len(message) < 6000


def test_refused_files(folder, tmp_path):
    refuse(lambda: load_project(tmp_path / "nothing.toml"), "nothing.toml", "no such file")
    refuse(lambda: load_project(tmp_path / "images"), "holds no edgekit.toml", "edgekit init")
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    refuse(lambda: load_project(binary), "not UTF-8 text at byte 0")
    binary.write_bytes(b"#" * (1 << 21))
    refuse(lambda: load_project(binary), "too large")
    twice = HEAD + HEAD[HEAD.index("[[model]]") :]
    refuse(lambda: load_project(write(folder, twice)), "model[1].name", "there twice")


def test_damaged_files_are_read_or_refused_in_one_line(folder):
    """A valid file with a few bytes changed, cut or doubled: a project or a UsageError, nothing else."""
    good = init.write_project(folder).read_bytes()
    plain = re.sub(rb"(?m)^\s*#.*\n|\s+#.*$", b"", good)
    rng = random.Random(3)
    path, refused = folder / "edgekit.toml", []
    for _ in range(400):
        data = bytearray(plain)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            kind = rng.randrange(3)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 9)]
            else:
                data[at:at] = data[at : at + rng.randint(1, 40)]
        path.write_bytes(data)
        try:
            load_project(path)
        except UsageError as error:
            refused.append(str(error))
    assert len(refused) > 200
    for message in refused:
        assert message.isprintable()
        assert str(path) in message or "classes file" in message


# --- data sets -------------------------------------------------------------------------------------

STREET = 'source = "synthetic://street?size=320x180"\n'


@pytest.mark.parametrize(("seed", "fine"), [(100, False), (109, False), (110, True), (91, False), (90, True)])
def test_shared_seeds_are_refused(folder, seed, fine):
    text = HEAD + (
        f"[model.calibration]\n{STREET}count = 10\nseed = 100\n"
        f'[model.evaluation]\nsource = "synthetic://street"\ncount = 10\nseed = {seed}\n'
    )
    path = write(folder, text)
    if fine:
        assert load_project(path).model("net").calibration.seeds == range(100, 110)
    else:
        refuse(lambda: load_project(path), "share the seeds", f"{max(seed, 100)} to {min(seed, 100) + 9}")


def test_shared_pictures_are_refused(folder):
    evaluation = '[model.evaluation]\nimages = "images"\ndata = "instances.json"\n'
    same_folder = HEAD + evaluation + '[model.calibration]\nimages = "./calibration/../images"\n'
    refuse(lambda: load_project(write(folder, same_folder)), "the same pictures")
    same_labels = HEAD + evaluation + '[model.calibration]\nimages = "images"\ndata = "instances.json"\n'
    refuse(lambda: load_project(write(folder, same_labels)), "the same pictures")
    # one folder with two label files is how COCO-like sets are often split
    split = HEAD + evaluation + '[model.calibration]\nimages = "images"\ndata = "instances_train.json"\n'
    assert load_project(write(folder, split)).models


def test_indices_are_spread_evenly():
    assert DataSet(count=3).indices(10) == (0, 3, 6)
    assert DataSet(count=30).indices(3) == (0, 1, 2)
    assert DataSet().indices(4) == (0, 1, 2, 3)
    assert DataSet(count=3).indices(0) == ()


@pytest.mark.parametrize("name", named_sets())
def test_named_set(name):
    found = named_set(name)
    assert found.title
    low, high = {"evaluation": (10_000, 10**6), "calibration": (10**6, 2**31)}[found.purpose]
    assert low <= found.seed < found.seed + found.count <= high, "training seeds are below"


def test_named_sets_share_no_seed():
    seeds = {
        n: DataSet(source="s", count=named_set(n).count, seed=named_set(n).seed).seeds for n in named_sets()
    }
    assert len(seeds) >= 2
    for a, b in itertools.combinations(seeds, 2):
        assert max(seeds[a].start, seeds[b].start) >= min(seeds[a].stop, seeds[b].stop), (a, b)


def test_faulty_named_set(tmp_path, monkeypatch):
    (tmp_path / "calibration").mkdir()
    good = (ROOT / "calibration" / "street.toml").read_text()
    faulty = re.sub("^sha256 = .*$", 'sha256 = "abc"', good, flags=re.MULTILINE)
    assert faulty != good
    (tmp_path / "calibration" / "mine.toml").write_text(faulty)
    monkeypatch.setenv("EDGEKIT_PATH", str(tmp_path))
    assert {"mine", "street"} <= set(named_sets())
    refuse(lambda: named_set("mine"), "mine.toml", "64 hexadecimal digits")


def test_picture_digest():
    pictures = [np.full((2, 3, 3), i, np.uint8) for i in range(9)]
    digest = picture_digest(pictures)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest == picture_digest(pictures[:8]), "the first eight"
    assert digest != picture_digest(pictures[1:])
    dataset.check_digest(DataSet(sha256=digest), pictures)
    dataset.check_digest(DataSet(), pictures[1:])
    with pytest.raises(CalibrationError, match=f"set mine: .* expected sha256 {digest}, got"):
        dataset.check_digest(DataSet(name="mine", sha256=digest), pictures[1:])
    assert picture_digest([pictures[0]]) != picture_digest([pictures[0].reshape(3, 2, 3)]), "the shape counts"


def test_recorded_digest_is_checked_when_drawn():
    from edgekit.toolchain.data import render

    data = DataSet(source="synthetic://street?size=64x64", count=1, seed=5, name="mine", sha256="0" * 64)
    with pytest.raises(CalibrationError, match="its pictures have changed"):
        render(data, lambda what, done, of: None)


# --- class names -----------------------------------------------------------------------------------


def test_read_classes(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffcar\r\ntraffic light \r\nFußgänger\r\n\r\n".encode())
    assert read_classes(path) == ("car", "traffic light", "Fußgänger")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\na\n", "'a' is there twice, in line 1 and line 3"),
        (b"\x89PNG\r\n", "not UTF-8 text at byte 0"),
        (b"a\0b\n", "binary"),
        (b"a\x1b[31m\n", "line 1 is not a printable name"),
        (b"a" * 300, "at most 200"),
        (b"a\n" * (1 << 20), "too large"),
    ],
)
def test_classes_refused(tmp_path, data, part):
    path = tmp_path / "c.txt"
    path.write_bytes(data)
    refuse(lambda: read_classes(path), f"classes file {path}", part)


def test_labels(folder):
    model = with_options(bare_project(folder / "net.onnx"), classes=folder / "classes.txt").model("net")
    assert model.labels(2) == (("car", "bus"), "")
    refuse(lambda: model.labels(3), "2 class names", "3 classes")
    bare = bare_project(folder / "net.onnx").model("net")
    names, note = bare.labels(80)
    assert names == COCO_CLASSES
    assert "COCO" in note
    names, note = bare.labels(3)
    assert names == ("class_0", "class_1", "class_2")
    assert "class_0 to class_2" in note


@pytest.mark.shared
def test_coco_names_agree_with_the_data():
    data = shared_data()
    categories = json.loads((data / "coco_mini" / "instances_val_a.json").read_text())["categories"]
    assert tuple(c["name"] for c in sorted(categories, key=lambda c: c["id"])) == COCO_CLASSES
    darknet = read_classes(data / "models" / "coco_classes.txt")
    assert tuple(COCO_ALIASES.get(name, name) for name in darknet) == COCO_CLASSES


def test_coco_names():
    assert len(set(COCO_CLASSES)) == 80
    assert not set(COCO_ALIASES) & set(COCO_CLASSES)
    assert set(COCO_ALIASES.values()) <= set(COCO_CLASSES)


# --- bare networks and options ---------------------------------------------------------------------


def test_bare(folder):
    odd = folder / "my net (v2).onnx"
    odd.write_bytes(b"x")
    loaded = with_options(
        bare_project(odd),
        head="yolox",
        classes=folder / "classes.txt",
        calibration=str(folder / "calibration"),
        data=folder / "instances.json",
        images=folder / "images",
    )
    model = loaded.model("my-net-v2")
    assert loaded.path is None
    assert (model.head.family, model.source) == ("yolox", odd)
    assert model.evaluation == DataSet(images=folder / "images", data=folder / "instances.json")
    rows = with_options(bare_project(odd), head="rows", columns=COLUMNS[:4]).models[0]
    assert rows.head.columns == ("x1", "y1", "x2", "y2")
    assert with_options(bare_project(odd), calibration="street").models[0].calibration.name == "street"


def test_bare_refused(folder):
    net = folder / "net.onnx"
    refuse(lambda: bare_project(folder / "no.onnx"), "no.onnx", "no such file")
    refuse(lambda: with_options(bare_project(net), head="yolo"), "--head", "'yolox'", "'yolo'")
    refuse(lambda: with_options(bare_project(net), calibration="strret"), "strret", "Did you mean 'street'")
    refuse(
        lambda: with_options(bare_project(net), data=folder / "instances.json"),
        "--data and --images",
        "both or neither",
    )
    same = str(folder / "images")
    refuse(
        lambda: with_options(
            bare_project(net), calibration=same, data=folder / "instances.json", images=folder / "images"
        ),
        "the same pictures",
    )


def test_open_project(folder, monkeypatch, tmp_path):
    write(folder, HEAD)
    monkeypatch.chdir(folder)
    assert open_project(None).name == "demo", "./edgekit.toml"
    assert open_project(folder).name == "demo"
    assert open_project(Path("net.onnx")).name == "net"
    (folder / "edgekit.toml").unlink()
    shipped = tmp_path / "root" / "apps" / "detect"
    shipped.mkdir(parents=True)
    (shipped / "net.onnx").write_bytes(b"x")
    write(shipped, HEAD.replace("demo", "shipped"))
    monkeypatch.setenv("EDGEKIT_PATH", str(tmp_path / "root"))
    assert open_project(None).name == "shipped"
    monkeypatch.setattr(opening.content, "find", lambda kind, name: None)
    refuse(lambda: open_project(None), "apps/detect", "EDGEKIT_PATH")


# --- edgekit init ----------------------------------------------------------------------------------


def run_init(*words: str) -> int:
    parser = argparse.ArgumentParser()
    init.add_arguments(parser)
    return init.main(parser.parse_args(words))


@pytest.mark.parametrize("name", ["net.onnx", 'quo"te\\.onnx', "ünï {x}.onnx", "tab\t\x7f.onnx"])
def test_init_file_loads(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(b"x")
    target = tmp_path / "new" / "app"
    assert run_init(str(target), "--model", str(tmp_path / name)) == 0
    assert str(target / "edgekit.toml") in capsys.readouterr().out
    (model,) = load_project(target).models
    assert model.source.resolve() == (tmp_path / name).resolve()
    assert load_project(target).name == "app"


def test_init_examples_are_right(folder):
    """Every key that the file only shows in a comment is one that the reader takes."""
    text = init.write_project(folder).read_text()
    (folder / "train").mkdir()
    (folder / "train.json").write_text("{}")
    shown = re.sub(r"(?m)^# (\[model\.|[a-z_]+ = )", r"\1", text)
    assert shown.count("\n#") < text.count("\n#") - 20
    shown = shown.replace('family = "auto"\n', "", 1)
    refuse(lambda: load_project(write(folder, shown)), 'video: a table for task = "video"')
    model = load_project(write(folder, shown.replace('task = "detect"', 'task = "video"', 1))).models[0]
    assert model.head.family == "rows"
    assert (model.video.dt_s, model.video.background) == (0.1, "still")
    assert model.video.smoothing == Smoothing(window=4)
    assert model.video.allow_bidirectional is project.VideoHint().allow_bidirectional
    assert model.calibration.count == 200
    assert model.train == TrainHint(DataSet(images=folder / "train", data=folder / "train.json"))
    assert model.on("host").thresholds.score == 0.3
    # what is shown as a default is the default
    assert model.thresholds == Thresholds(0.25, 0.65, 300)
    fields = {f.name: f.default for f in dataclasses.fields(DetectSpec)}
    assert model.thresholds.apply(
        DetectSpec(ImagePreprocess(1, 1), DetectHead("rows", 1, rows="o", columns=("x1",)), ("a",))
    ) == DetectSpec(ImagePreprocess(1, 1), DetectHead("rows", 1, rows="o", columns=("x1",)), ("a",))
    assert fields["score_threshold"] == 0.25
    assert model.preprocess.apply(ImagePreprocess(1, 1)) == ImagePreprocess(1, 1)


def test_init_finds_the_network_and_classes(folder):
    init.write_project(folder)
    model = load_project(folder).models[0]
    assert model.source == folder / "net.onnx"
    assert model.classes == ("car", "bus")


def test_init_without_a_network(tmp_path, capsys):
    assert run_init(str(tmp_path)) == 0
    assert "put your network at" in capsys.readouterr().err
    refuse(lambda: load_project(tmp_path), "model.onnx", "no such file")
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert load_project(tmp_path).models[0].name == "model"


def test_init_never_overwrites(folder):
    write(folder, "mine")
    refuse(lambda: run_init(str(folder)), "exists already", "--force")
    assert (folder / "edgekit.toml").read_text() == "mine"
    assert run_init(str(folder), "--force") == 0
    assert load_project(folder).models
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "no temporary file is left"


def test_init_refused(folder, tmp_path):
    refuse(lambda: run_init(str(folder), "--model", "no.onnx"), "no.onnx", "no such file")
    refuse(lambda: run_init(str(folder / "net.onnx")), "a file, expected a folder")
    (folder / "edgekit.toml").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        run_init(str(folder), "--force")
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_docs_examples_load(folder):
    """The TOML in docs/projects.md is read by the reader, whole files as they are."""
    text = (ROOT / "docs" / "projects.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", text, re.S)
    whole = [b for b in blocks if "[project]" in b]
    sets = [b for b in blocks if "purpose =" in b]
    assert whole
    assert sets
    (folder / "yolo_lite.onnx").write_bytes(b"x")
    for block in whole:
        assert load_project(write(folder, block)).models
    (folder / "set.toml").write_text(sets[0])
    assert dataset.read_toml(dataset.NamedSet, folder / "set.toml", "set").count


def test_docs_name_every_key():
    text = (ROOT / "docs" / "projects.md").read_text(encoding="utf-8")
    tables = [_ModelTable, project.HeadHint, PreprocessHint, Thresholds, project.Accept]
    tables += [project.TargetOverride, project.VideoHint, dataset.DataTable, dataset.NamedSet, TrainTable]
    for table in tables:
        for key in dataclasses.fields(table):
            assert f"`{key.name}`" in text, (table, key.name)
