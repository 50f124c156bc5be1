"""The small detector: its size, its graph, what it learns from, and that training can be interrupted."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.models.detect_data import augment
from edgekit.models.yolo_lite import STRIDES, YoloLite, cells, decode, export_onnx
from edgekit.models.yolox_loss import assign, losses, overlaps
from edgekit.synth.street import CLASSES
from tests.helpers import ROOT, load_script

SIZE = (64, 96)


@pytest.fixture(scope="module")
def tool():
    """tools/train_detect.py as a module."""
    yield load_script("tools/train_detect.py")
    del sys.modules["train_detect"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = YoloLite(len(CLASSES)).eval()
    for part in net.modules():  # batch norms away from the identity, so that folding them is tested
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.3, 0.3)
            part.running_var.uniform_(0.5, 1.5)
    return net


def test_size_and_shape_of_the_network(model):
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000
    convs = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    assert {conv.kernel_size for conv in convs} == {(1, 1), (3, 3)}
    assert all(conv.groups == 1 for conv in convs)
    odd = [conv.out_channels for conv in convs if conv.out_channels % 16]
    assert sorted(odd) == sorted([4, 1, len(CLASSES)] * 3)  # only the raw head
    with torch.no_grad():
        levels = model(torch.zeros(1, 3, *SIZE))
    for stride, (box, objectness, classes) in zip(STRIDES, levels, strict=True):
        grid = (SIZE[0] // stride, SIZE[1] // stride)
        assert box.shape == (1, 4, *grid)
        assert objectness.shape == (1, 1, *grid)
        assert classes.shape == (1, len(CLASSES), *grid)


def test_export_equals_torch(model, tmp_path):
    import onnx
    import onnxruntime

    path = tmp_path / "net.onnx"
    export_onnx(model, path, *SIZE)
    graph = onnx.load(path).graph
    assert {node.op_type for node in graph.node} <= {
        "Conv", "Relu", "Add", "Concat", "Resize", "Sigmoid", "Reshape", "Transpose", "Constant", "Identity",
    }  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(1).integers(0, 256, (1, 3, *SIZE)).astype(np.float32)
    (rows,) = session.run(["output"], {"images": image})
    with torch.no_grad():
        levels = model(torch.from_numpy(image))
    wanted = torch.cat(
        [torch.cat([b, o.sigmoid(), c.sigmoid()], 1).flatten(2) for b, o, c in levels], 2
    ).transpose(1, 2)
    assert rows.shape == (1, sum(SIZE[0] // s * (SIZE[1] // s) for s in STRIDES), 5 + len(CLASSES))
    np.testing.assert_allclose(rows, wanted.numpy(), rtol=1e-4, atol=1e-4)
    assert sorted(tmp_path.iterdir()) == [path]


def test_decode_is_the_formula_of_yolox():
    grid, stride = cells(*SIZE)
    raw = torch.randn(len(grid), 4, generator=torch.Generator().manual_seed(3))
    boxes = decode(raw, grid, stride)
    n = 0
    for step in STRIDES:
        for y in range(SIZE[0] // step):
            for x in range(SIZE[1] // step):
                tx, ty, tw, th = raw[n].tolist()
                cx, cy, w, h = (tx + x) * step, (ty + y) * step, np.exp(tw) * step, np.exp(th) * step
                wanted = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                np.testing.assert_allclose(boxes[n], wanted, rtol=1e-4, atol=1e-3)
                n += 1
    assert n == len(boxes)


box = st.tuples(st.floats(0, 60), st.floats(0, 60), st.floats(1, 30), st.floats(1, 30))


@given(box, box)
def test_overlaps(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    pair = torch.tensor([[ax, ay, ax + aw, ay + ah], [bx, by, bx + bw, by + bh]], dtype=torch.float64)
    iou, giou = overlaps(pair[0], pair[1])
    inter = max(min(ax + aw, bx + bw) - max(ax, bx), 0) * max(min(ay + ah, by + bh) - max(ay, by), 0)
    union = aw * ah + bw * bh - inter
    hull = (max(ax + aw, bx + bw) - min(ax, bx)) * (max(ay + ah, by + bh) - min(ay, by))
    assert iou.item() == pytest.approx(inter / union, abs=1e-9)
    assert giou.item() == pytest.approx(inter / union - (hull - union) / hull, abs=1e-9)


def guesses(seed, batch=2):
    grid, stride = cells(*SIZE)
    random = torch.Generator().manual_seed(seed)
    raw = 0.5 * torch.randn(batch, len(grid), 4, generator=random)
    scores = torch.rand(batch, len(grid), len(CLASSES), generator=random)
    return decode(raw, grid, stride), scores


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(
        st.tuples(st.floats(0, 80), st.floats(0, 50), st.floats(4, 60), st.floats(4, 60)),
        min_size=1,
        max_size=6,
    ),
)
def test_assignment_stays_near_and_reaches_every_truth(seed, objects):
    boxes, scores = guesses(seed)
    truth = torch.tensor([[x, y, min(x + w, 96), min(y + h, 64)] for x, y, w, h in objects])
    kinds = torch.arange(len(objects)) % len(CLASSES)
    truth, kinds = truth.expand(2, -1, -1).clone(), kinds.expand(2, -1).clone()
    kinds[1] = -1  # the second picture is empty
    matched, which = assign(boxes, scores, truth, kinds, SIZE)
    assert not matched[1].any()
    grid, stride = cells(*SIZE)
    centre = (grid + 0.5) * stride[:, None]
    for cell in matched[0].nonzero()[:, 0].tolist():
        goal = truth[0, which[0, cell]]
        away = (centre[cell] - (goal[:2] + goal[2:]) / 2).abs()
        half = (goal[2:] - goal[:2]) / 2
        assert (away <= 2.5 * stride[cell] + 1e-3).all()
        assert (away <= half.clamp(min=float(stride[cell])) + 1e-3).all()
    if len(objects) == 1:
        assert 1 <= int(matched[0].sum()) <= 10


def test_assignment_prefers_the_cell_that_is_right():
    boxes, scores = guesses(5, 1)
    truth, kinds = torch.tensor([[[20.0, 10.0, 44.0, 40.0]]]), torch.tensor([[2]])
    cell = 3 * 12 + 4  # stride 8, centre (36, 28)
    boxes[0, cell], scores[0, cell] = truth[0, 0], 0.0
    scores[0, cell, 2] = 1.0
    matched, which = assign(boxes, scores, truth, kinds, SIZE)
    assert matched[0, cell]
    assert which[0, cell] == 0


@pytest.mark.parametrize("empty", [False, True])
def test_losses_fall_and_stay_finite(empty):
    torch.manual_seed(0)
    net = YoloLite(len(CLASSES))
    image = torch.rand(2, 3, *SIZE) * 255
    truth = torch.tensor([[[20.0, 10.0, 44.0, 40.0], [60.0, 30.0, 90.0, 60.0]]] * 2)
    kinds = torch.tensor([[1, 4]] * 2) if not empty else torch.full((2, 2), -1)
    grid, stride = cells(*SIZE)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    history = []
    for _ in range(25):
        parts = losses(net(image), truth, kinds, grid, stride, SIZE, True)
        total = sum(parts.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert np.isfinite(history).all()
    assert history[-1] < 0.7 * history[0]
    if empty:
        assert parts["box"].item() == parts["l1"].item() == 0


def tiny(tmp_path, out, *more):
    return [
        "--out", str(tmp_path / out), "--cache", str(tmp_path / "cache"), "--steps", "4", "--batch", "2",
        "--seeds", "2", "--frames", "2", "--warmup", "2", "--workers", "0", "--render-workers", "0",
        "--save-every", "2", "--eval-every", "0", "--eval-streets", "1", "--eval-frames", "1", "--threads", "1",
        *more,
    ]  # fmt: skip


def test_training_resumes_as_if_never_stopped(tool, tmp_path, capsys):
    assert tool.main(tiny(tmp_path, "whole")) == 0
    assert {"AP", "AP50", "images"} <= set(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
    assert tool.main(tiny(tmp_path, "parts", "--stop-at", "2")) == 0
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] == 2
    assert tool.main(tiny(tmp_path, "parts", "--resume")) == 0
    whole, parts = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for group in ("model", "mean"):
        for name, value in whole[group].items():
            assert torch.equal(value, parts[group][name]), name
    first, second = ((tmp_path / out / "yolo_lite.onnx").read_bytes() for out in ("whole", "parts"))
    assert first == second
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    with pytest.raises(SystemExit, match=r"checkpoint .* made with"):
        tool.main(tiny(tmp_path, "parts", "--resume", "--lr", "1"))
    assert not list(tmp_path.rglob("*.part"))


def test_evaluating_a_missing_model(tool, tmp_path, capsys):
    assert tool.main(["--eval-only", str(tmp_path / "none.onnx")]) == 2
    assert "not found" in capsys.readouterr().err


def test_crops_keep_boxes_on_their_objects():
    """A red square on black, labelled: after every augmentation the label still fits the square."""
    image = np.zeros((216, 384, 3), np.uint8)
    image[100:140, 200:230, 2] = 200
    label = np.array([[200, 100, 230, 140]], np.float32)
    checked = 0
    for seed in range(40):
        for size, crop in (((128, 256), True), ((224, 384), False)):
            rng = np.random.default_rng(seed)
            picture, boxes, kinds = augment(image, label, np.array([3]), size, rng, crop)
            assert picture.shape == (*size, 3)
            if len(boxes) == 0:
                continue
            y, x = np.nonzero((picture[..., 2] > 60) & (picture[..., 1] < 40))  # padding is grey
            assert kinds.tolist() == [3]
            np.testing.assert_allclose(boxes[0], [x.min(), y.min(), x.max() + 1, y.max() + 1], atol=1.6)
            checked += 1
    assert checked > 60


def test_shipped_weights_see_unseen_streets(tool, tmp_path):
    """A small part of the evaluation that apps/detect/README.md reports in full."""
    weights = ROOT / "apps" / "detect" / "yolo_lite.onnx"
    assert weights.stat().st_size <= 6_000_000
    folder, truth = tool.eval_set(tmp_path, 15, 1)
    result = tool.evaluate(weights, folder, truth)
    assert result["images"] == 15
    assert result["AP50"] > 0.75
