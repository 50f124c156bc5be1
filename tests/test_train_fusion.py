"""tools/train_fusion.py: batches, resuming, and what it measures."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from edgekit.models.bevfusion import config
from edgekit.tasks.fusion.boxes import Boxes3D
from tests import bevfusion_nets as nets
from tests.helpers import load_script

FEW = ["--config", "tiny", "--worlds", "1", "--frames", "2", "--batch", "2", "--steps", "4", "--warmup", "1"]
QUIET = ["--threads", "1", "--eval-worlds", "1", "--eval-frames", "1", "--save-every", "1"]


@pytest.fixture(scope="module")
def tool():
    """tools/train_fusion.py as a module."""
    yield load_script("tools/train_fusion.py")
    del sys.modules["train_fusion"]


@pytest.fixture
def _tiny(monkeypatch):
    monkeypatch.setitem(config.CONFIGS, "tiny", nets.TINY)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_tiny")
def test_a_resumed_training_ends_where_a_straight_one_does(tool, tmp_path, capsys) -> None:
    straight, broken = tmp_path / "a", tmp_path / "b"
    assert tool.main(["--out", str(straight), *FEW, *QUIET]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == json.loads((straight / "eval.json").read_text())
    assert set(tool.MODES) < set(said) and said["frames"] == 1
    assert "camera+lidar - one camera lost" in said
    assert tool.main(["--out", str(broken), *FEW, *QUIET, "--stop-at", "2"]) == 0
    assert not (broken / "eval.json").exists()
    assert tool.main(["--out", str(broken), *FEW, *QUIET, "--resume"]) == 0
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (straight, broken))
    assert a["step"] == b["step"] == 4
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert (straight / "eval.json").read_text() == (broken / "eval.json").read_text()
    assert tool.main(["--out", str(broken), "--config", "tiny", *QUIET, "--eval-only"]) == 0
    with pytest.raises(SystemExit, match=r"checkpoint .*: made with"):
        tool.main(["--out", str(broken), *FEW, *QUIET, "--resume", "--lr", "1"])


@pytest.mark.usefixtures("_tiny")
def test_a_drawn_frame_is_the_worlds_and_a_batch_depends_on_its_step_alone(tool, tmp_path) -> None:
    frames = tool.drawn(tmp_path, "tiny", 1, 1, 2, 10, 1)
    mine, theirs = frames[0], nets.frame(1)  # frame 10 of world 1
    assert len(frames) == 2 and mine.rig == theirs.rig
    assert np.array_equal(mine.truth.boxes, theirs.truth.boxes)
    assert np.array_equal(mine.truth.points, theirs.truth.points)
    for name in theirs.shots:
        assert np.array_equal(mine.shots[name].image, theirs.shots[name].image)
        assert np.allclose(mine.lidar_to_camera(name), theirs.lidar_to_camera(name))
    near = (np.abs(theirs.points[:, :2]) < tool.REACH).all(1)
    assert np.array_equal(mine.points, theirs.points[near])

    options = tool.Options(config="tiny", batch=8)
    given, wanted = tool.batch(frames, options, 3, 1)
    again, _ = tool.batch(frames, options, 3, 1)
    other, _ = tool.batch(frames, options, 4, 1)
    assert torch.equal(given.cloud.values, again.cloud.values)
    assert not torch.equal(given.cloud.cells, other.cloud.cells)
    assert len(wanted.heat[0]) == 8
    many = [tool.batch(frames, options, step, 1)[0] for step in range(6)]
    lidar = torch.cat([b.lidar for b in many])
    cameras = torch.cat([b.cameras.sum(1) for b in many])
    assert 0 < (lidar == 0).sum() < 24 and 0 < (cameras == 0).sum() < 24
    assert ((cameras > 0) & (cameras < 6)).any() and not ((lidar == 0) & (cameras == 0)).any()


def test_modes_leave_out_what_they_say(tool) -> None:
    frame = nets.frame(1)
    cases = tool.cases(frame, 8)
    assert tuple(cases) == tool.MODES
    left = {mode: (len(given.shots), given.points is not None) for mode, given in cases.items()}
    assert left == {
        "camera+lidar": (6, True), "lidar": (0, True), "camera": (6, False), "one camera lost": (5, True)
    }  # fmt: skip
    names = list(frame.rig.cameras)
    for number in (8, 9):
        left_out = set(names) - set(tool.cases(frame, number)["one camera lost"].shots)
        assert left_out == {names[number - 6]}


def test_what_is_measured_tells_modes_apart(tool) -> None:
    frame = nets.frame(1)
    truth = frame.truth[(np.abs(frame.truth.boxes[:, :2]) < 20).all(1)]
    n = len(truth)
    right = Boxes3D(truth.boxes, np.linspace(0.9, 0.5, n).astype(np.float32), truth.classes)
    off = dataclasses.replace(right, boxes=right.boxes + np.array([1.5] + [0] * 8, np.float32))
    none = dataclasses.replace(
        right, boxes=right.boxes[:0], scores=right.scores[:0], classes=right.classes[:0]
    )
    found = {
        "camera+lidar": [right] * 2,
        "lidar": [off] * 2,
        "camera": [none] * 2,
        "one camera lost": [right] * 2,
    }
    said = tool.judged([truth] * 2, found, nets.TINY.head.labels)
    assert said["camera+lidar"]["mAP"] == 1 > said["lidar"]["mAP"] > said["camera"]["mAP"] == 0
    assert said["camera+lidar - lidar"]["mAP"] == round(1 - said["lidar"]["mAP"], 4)
    assert said["camera+lidar - one camera lost"] == {"mAP": 0.0, "interval": [0.0, 0.0]}


def test_nothing_to_measure_is_said(tool, tmp_path, capsys) -> None:
    assert tool.main(["--out", str(tmp_path), "--eval-only"]) == 2
    assert "not found, expected exported segments" in capsys.readouterr().err
