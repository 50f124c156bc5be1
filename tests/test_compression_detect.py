"""Detectors as problems of compression: batches, reading networks back, their own metric, Pascal VOC."""

from __future__ import annotations

import copy
import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from edgekit.compression.detect_problem import detect_problem, head
from edgekit.compression.problem import macs
from edgekit.compression.work import begin
from edgekit.dataset import DataSet
from edgekit.errors import UsageError
from edgekit.models.detect_data import MAX_BOXES, Batching, augment, make_batch, pictures
from edgekit.models.voc import instances
from edgekit.models.voc import main as convert
from edgekit.models.yolo_lite import DEFAULT, YoloLite, export_onnx, load_onnx, remeasure, with_classes
from edgekit.project import ModelEntry, open_project
from edgekit.tasks.detect.dataset import read_coco
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.metric import bootstrap
from tests.helpers import ROOT

SIZE = (64, 96)
NAMES = ("red", "green")
COLORS = np.array([[0, 0, 220], [0, 220, 0]], np.uint8)


def write_voc(folder, count=6):
    """Pictures of 96x64 with one coloured square each, in VOC's format; returns the true boxes."""
    rng = np.random.default_rng(0)
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    truths = []
    for i in range(count):
        side, kind = int(rng.integers(20, 40)), i % 2
        x, y = int(rng.integers(0, 96 - side)), int(rng.integers(0, 64 - side))
        picture = np.full((64, 96, 3), 90, np.uint8)
        picture[y : y + side, x : x + side] = COLORS[kind]
        cv2.imwrite(str(folder / "JPEGImages" / f"p{i}.png"), picture)
        box = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + side}</xmax><ymax>{y + side}</ymax>"
        (folder / "Annotations" / f"p{i}.xml").write_text(
            f"<annotation><filename>p{i}.png</filename><size><width>96</width><height>64</height></size>"
            f"<object><name>{NAMES[kind]}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
            "<object><name>red</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>5</xmax><ymax>9</ymax></bndbox></object>"
            "</annotation>"
        )
        truths.append((kind, [x, y, side, side]))
    (folder / "ImageSets/Main/train.txt").write_text("".join(f"p{i}\n" for i in range(count)))
    return truths


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """(COCO instances, folder of pictures, truths) of what write_voc writes, converted."""
    folder = tmp_path_factory.mktemp("voc")
    truths = write_voc(folder)
    out = folder / "train.json"
    assert convert([str(folder), "train", str(out)]) == 0
    return out, folder / "JPEGImages", truths


def tiny(seed=0, classes=2):
    """A YOLO-lite of 8 or 16 channels."""
    torch.manual_seed(seed)
    return YoloLite(classes, dataclasses.replace(DEFAULT, stem=(8, 8), widths=(16, 16, 16), neck=16)).eval()


def problem(squares, model=None, **options):
    out, folder, _ = squares
    entry = ModelEntry("squares", out, classes=NAMES, evaluation=DataSet(data=out, images=folder))
    batching = Batching(batch=4, width=96, height=64, crop_width=64, crop_height=64, **options)
    data = pictures(read_coco(out, folder, labels=NAMES), SIZE)
    return detect_problem(entry, data, batching, model=model or tiny(), bf16=False)


def test_voc_becomes_coco(squares):
    out, folder, truths = squares
    found = read_coco(out, folder)
    assert found.labels == ("green", "red")  # sorted, as no order was given
    assert [
        (NAMES.index(found.labels[t.cls]), list(t.box)) for t in found.truths
    ] == truths  # and none of no size
    given = instances(out.parent, "train", NAMES)
    assert [c["name"] for c in given["categories"]] == list(NAMES)


def test_voc_refuses_what_is_missing(squares, tmp_path, capsys):
    folder = squares[0].parent
    with pytest.raises(UsageError, match=r"split .*val\.txt: cannot be read"):
        instances(folder, "val")
    with pytest.raises(UsageError, match="class 'green' is not one of red"):
        instances(folder, "train", ("red",))
    assert convert([str(tmp_path), "train", str(tmp_path / "x.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert convert([]) == 2


def test_pictures_fit_the_network(squares):
    out, folder, truths = squares
    images, boxes, classes = pictures(read_coco(out, folder, labels=NAMES), (32, 96))  # half as high
    assert boxes.shape == (len(truths), MAX_BOXES, 4)
    for image, box, kinds, (kind, (x, y, w, h)) in zip(images, boxes, classes, truths, strict=True):
        assert image.shape == (32, 48, 3)
        np.testing.assert_allclose(box[0], np.array([x, y, x + w, y + h]) / 2)
        assert kinds.tolist() == [kind] + [-1] * (MAX_BOXES - 1)


@pytest.mark.parametrize("crop", [False, True])
def test_turned_pictures_keep_their_boxes(crop):
    image = np.zeros((64, 96, 3), np.uint8)
    image[10:30, 50:80, 2] = 255
    box = np.array([[50, 10, 80, 30]], np.float32)
    below = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        turned, boxes, _ = augment(image, box, np.array([0]), SIZE, rng, crop, upright=False)
        if not len(boxes):
            continue
        y, x = np.nonzero((turned[..., 2] > 110) & (turned[..., 1] < 50))
        np.testing.assert_allclose(boxes[0], [x.min(), y.min(), x.max() + 1, y.max() + 1], atol=1.6)
        below += boxes[0, 1] > 30
    assert crop or 2 < below < 10


def test_bootstrap_at_one_overlap(squares):
    """Boxes that overlap the truth by about 0.6 count in full at 0.5 and for two or three of COCO's ten overlaps."""
    data = read_coco(squares[0], squares[1])
    results = []
    for picture in data.images:
        (truth,) = (t for t in data.truths if t.image_id == picture.id)
        x, y, w, h = truth.box
        boxes = np.array([[x + 0.234 * w, y, x + 1.234 * w, y + h]], np.float32)
        results.append((picture.id, Detections(boxes, np.ones(1, np.float32), np.array([truth.cls]))))
    assert bootstrap(data, results, rounds=5, at50=True) == [1.0] * 5
    assert all(v == pytest.approx(0.3) for v in bootstrap(data, results, rounds=5))


def test_batches_depend_on_their_step_alone(squares):
    made = problem(squares, steps=10, tail=0.5)
    (a, (boxes, kinds, whole)), (b, _) = made.batch(3), made.batch(3)
    assert torch.equal(a, b) and not whole and a.shape == (4, 3, 64, 64)
    assert boxes.shape[:2] == kinds.shape
    late, (_, _, whole) = made.batch(5)
    assert whole and late.shape == (4, 3, *SIZE)


def test_a_network_is_read_back_and_trains_as_if_never_folded(tmp_path, squares):
    model = tiny()
    batch = problem(squares, steps=4, tail=1.0).batch
    with torch.no_grad():  # widths that no constructor gives
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-0.3, 0.3)
                part.running_var.uniform_(0.5, 1.5)
    export_onnx(model, tmp_path / "a.onnx", *SIZE)
    again = load_onnx(tmp_path / "a.onnx")
    images = batch(0)[0]

    def rows(network):
        with torch.no_grad():
            return torch.cat([torch.cat(level, 1).flatten(2) for level in network(images)], 2)

    wanted = rows(model)
    scale = wanted.abs().max()
    assert (rows(again) - wanted).abs().max() < 1e-4 * scale
    remeasure(again, (batch(i)[0] for i in range(2)))
    assert (rows(again) - wanted).abs().max() < 1e-4 * scale
    seen = {}
    norm = again.stage16[0][1]
    handle = norm.register_forward_hook(lambda part, x, y: seen.update(x=x[0]))
    for i in range(2):
        again(batch(i)[0])
        seen.setdefault("all", []).append(seen["x"])
    handle.remove()
    found = torch.cat(seen["all"])
    torch.testing.assert_close(norm.running_mean, found.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.running_var, found.var((0, 2, 3), unbiased=False), rtol=1e-3, atol=1e-4)


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="expected a YOLO-lite of plain blocks"):
        load_onnx(ROOT / "apps" / "gesture" / "tsm_gesture.onnx")


def test_outputs_for_other_classes():
    model = with_classes(tiny(), 5).eval()
    with torch.no_grad():
        assert [level[2].shape[1] for level in model(torch.zeros(1, 3, *SIZE))] == [5, 5, 5]
    assert model.num_classes == 5


def test_a_detector_learns(squares):
    made = problem(squares, steps=12, tail=1.0)
    assert head(made.model) == made.head
    assert len(made.head) == 9
    work = begin(made)
    images, targets = made.batch(0)
    losses = []
    for _ in range(2):
        with torch.no_grad():  # norms by the batch: their averages are not there after so few
            losses.append(made.loss(copy.deepcopy(work.model).train()(images), targets).item())
        work.train(12, lr=3e-3)
    assert losses[1] < 0.97 * losses[0]
    levels = work.model(images)
    assert made.imitate(levels, levels, targets).item() == pytest.approx(0, abs=1e-3)
    assert made.imitate(levels, made.model(images), targets).item() > 0.02
    assert json.dumps(dict(made.identity))


def test_the_shipped_small_detector(squares):
    """Widths and accuracy of the network that the recipe detect-half made, in its project, on a few of its streets."""
    entry = open_project(ROOT / "apps" / "detect").models[0]
    small = entry.source.with_name("yolo_lite_half.onnx")
    data = pictures(read_coco(squares[0], squares[1]), (224, 384))
    made = detect_problem(
        dataclasses.replace(entry, source=small), data, Batching(steps=1, batch=1, tail=0.5), pictures=5
    )
    assert 2.5 * macs(made.model, made.example) < macs(load_onnx(entry.source), made.example)
    widths = {part.out_channels for name, part in made.model.named_modules() if isinstance(part, nn.Conv2d)}
    assert {n % 16 for n in widths - {1, 4, 5}} == {0}
    found = made.evaluate(made.model)
    assert list(found) == ["AP50", "AP"]
    assert found["AP50"] > 0.75 > found["AP"] > 0.3


def test_trainings_in_bfloat16(squares):
    made = dataclasses.replace(problem(squares, steps=2, tail=1.0), bf16=True)
    seen = []
    work = begin(made)
    work.model.stem[0][0].register_forward_hook(lambda part, x, y: seen.append(y.dtype))
    work.train(1)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in work.model.parameters()} == {torch.float32}


def test_make_batch_survives_a_picture_without_boxes():
    data = (
        [np.zeros((64, 96, 3), np.uint8)],
        np.zeros((1, MAX_BOXES, 4), np.float32),
        np.full((1, MAX_BOXES), -1),
    )
    images, boxes, classes = make_batch(
        data, Batching(steps=2, batch=2, width=96, height=64), 0
    )  # after other pictures
    assert images.dtype == torch.uint8
    assert boxes.shape == (2, 1, 4)
    assert (classes == -1).all()
