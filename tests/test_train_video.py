"""tools/train_video.py: batches, that training can be interrupted, what it exports and how it is judged."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import onnx
import pytest
import torch

from edgekit.models.tsm import MEAN, STD, TSM, export_online
from edgekit.synth.gestures import CLIP, EVENT, GESTURES, GestureWorld, Poses
from tests.helpers import load_script

TINY = ["--size", "32", "--width", "0.1", "--batch", "4", "--steps", "4", "--warmup", "1", "--clips", "24",
        "--threads", "1", "--eval-clips", "12", "--eval-events", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def tool():
    """tools/train_video.py as a module."""
    yield load_script("tools/train_video.py")
    del sys.modules["train_video"]


def weights(path):
    return {v.name: onnx.numpy_helper.to_array(v) for v in onnx.load(path).graph.initializer}


def test_training_resumes_as_if_never_stopped(tool, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tool.main(["--out", str(whole), *TINY]) == 0
    assert tool.main(["--out", str(parts), *TINY, "--stop-at", "2"]) == 0
    assert not (parts / "eval.json").exists()
    assert tool.main(["--out", str(parts), *TINY, "--resume"]) == 0
    for name in ("clip.onnx", "online.onnx"):
        a, b = (weights(folder / "online" / name) for folder in (whole, parts))
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)
    lines = [json.loads(line) for line in (parts / "online" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    results = json.loads((whole / "eval.json").read_text())
    assert results["online"]["clips"] == 12
    assert results["online"]["events"] == 1
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["mode"] == "online"
    with pytest.raises(SystemExit, match="made with"):
        tool.main(["--out", str(parts), *TINY, "--resume", "--lr", "1"])


def test_every_mode_is_trained_and_exported(tool, tmp_path):
    assert tool.main(["--out", str(tmp_path), *TINY, "--steps", "1", "--modes", "none", "offline"]) == 0
    assert set(json.loads((tmp_path / "eval.json").read_text())) == {"none", "offline"}
    assert (tmp_path / "none" / "online.onnx").is_file()
    assert (tmp_path / "offline" / "clip.onnx").is_file()
    assert not (tmp_path / "offline" / "online.onnx").exists()


@pytest.fixture(scope="module")
def clips(tool, tmp_path_factory):
    out = tmp_path_factory.mktemp("clips")
    made = tool.drawn(tool.Options(size=32, clips=24, lead=3), out, 1)
    stamp = (folder := next(out.iterdir())).stat().st_mtime_ns
    again = tool.drawn(tool.Options(size=32, clips=24, lead=3, mode="none"), out, 1)
    assert np.array_equal(made.images, again.images)  # kept for the other modes
    assert folder.stat().st_mtime_ns == stamp
    return made


def path_of(poses):
    return np.stack([poses.x, poses.y, poses.size, poses.angle], 1)


def test_clips_are_those_of_the_world(clips):
    world = GestureWorld(0, 32, 32)
    for i in (0, 13):
        images, label = world.clip(i, lead=3)
        assert label == i % 12
        assert np.array_equal(clips.images[i], images)
        assert np.array_equal(clips.paths[i], path_of(world.poses(i, lead=3)))


def test_batches_depend_on_their_step_alone(tool, clips):
    options = tool.Options(size=32, batch=6, lead=3)
    for step in (4, 5):
        one, other = clips.batch(options, step), clips.batch(options, step)
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        images, _, paths = one
        assert images.shape == (6, CLIP + (3 if step % 2 else 0), 32, 32, 3)
        assert paths.shape == (*images.shape[:2], 4)
        assert not np.array_equal(images, clips.batch(options, step + 2)[0])
    plain = clips.batch(tool.Options(mode="none", size=32, batch=2, lead=3), 1)
    assert plain[0].shape[1] == CLIP


def motion(path):
    """What a class says of its path: the sign of the motion in x, y, size and angle, first to last frame."""
    moved = path[-1] - path[0]
    return {
        "left": moved[0] < 0,
        "right": moved[0] > 0,
        "up": moved[1] < 0,
        "down": moved[1] > 0,
        "zoom in": moved[2] > 0,
        "zoom out": moved[2] < 0,
        "turn clockwise": moved[3] > 0,
        "turn counter-clockwise": moved[3] < 0,
    }


def test_the_class_of_a_varied_clip_is_what_its_path_does(tool, clips):
    rng = np.random.default_rng(0)
    seen = set()
    for turn in range(240):
        i = turn % 24
        images, label, path = tool.varied(rng, clips.images[i, 3:], i % 12, clips.paths[i, 3:], True)
        name = GESTURES[label]
        seen.add((i % 12, label))
        assert motion(path).get(name, True), name
        ways = (images, images[:, :, ::-1], images[:, ::-1], images[:, ::-1, ::-1])
        kept = [np.sort(way, -1) for way in (*ways, *(w[::-1] for w in ways))]  # in any order of colours
        assert any(np.array_equal(np.sort(clips.images[i, 3:], -1), way) for way in kept)
    assert len(seen) > 12  # some did change class


def test_a_mirrored_picture_is_that_of_the_mirrored_path(tool):
    """An object drawn at x is, mirrored, at -x: the centre of what differs from the backdrop moves along."""
    world = GestureWorld(5, 64, 64)
    images, label = world.clip(1)
    path = path_of(world.poses(1))
    for seed in range(40):
        rng = np.random.default_rng(seed)
        seen, kind, after = tool.varied(rng, images, label, path, False)
        if np.array_equal(np.sort(seen, -1), np.sort(images[:, :, ::-1], -1)):
            break
    assert GESTURES[label] == "left"
    assert GESTURES[kind] == "right"
    np.testing.assert_array_equal(after[:, 0], -path[:, 0])
    np.testing.assert_array_equal(after[:, 1:3], path[:, 1:3])


def test_targets_are_places_and_steps(tool):
    """An object that moves by a usual step each way, but for the first frame, which has none before."""
    t = np.arange(4.0)
    path = Poses(0.15 + 0.035 * t, -0.15 - 0.035 * t, np.exp(-0.8 + 0.09 * t), 0.22 * t)
    found = tool.targets(path_of(path))
    np.testing.assert_allclose(found[0], [1, -1, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1:, 3:], np.tile([1, -1, 1, 1], (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(found[:, 0], 1 + 0.035 / 0.15 * t, rtol=1e-5)


def test_cells_move_as_the_object_does(tool):
    """A point fixed to the object, followed by its pose, lands where the flow of its cell says."""
    before, after = np.array([0.1, -0.05, 0.5, 0.3]), np.array([0.1004, -0.0497, 0.5012, 0.3015])
    found = tool.cells(np.stack([before, after]), 8)
    assert found.shape == (2, 3, 8, 8)
    assert not found[0, 1:].any()
    at = (np.arange(8) + 0.5) / 8 - 0.5
    checked = 0
    for row in range(8):
        for column in range(8):
            there = np.array([at[column], at[row]])
            inside = np.hypot(*(there - after[:2])) < after[2] / 2
            assert found[1, 0, row, column] == inside
            turn = after[3] - before[3]
            back = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
            was = before[:2] + back @ (there - after[:2]) * before[2] / after[2]
            np.testing.assert_allclose(found[1, 1:, row, column] * tool.USUAL_STEP, there - was, atol=3e-5)
            checked += inside
    assert checked > 10


def test_auxiliary_outputs_are_cut_off(tool):
    model = TSM("mobilenet_v2", len(GESTURES) + tool.HINTS, "online", 0.1).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)[:, : len(GESTURES)]
        tool._cut(model)
        torch.testing.assert_close(model(images), wanted)


def test_pixels_are_normalised(tool):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), np.uint8)
    found = tool.normalised(images)
    assert found.shape == (2, 3, 5, 6)
    assert found.dtype == np.float32
    for channel in range(3):
        wanted = (images[..., 2 - channel] / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(found[:, channel], wanted, atol=1e-5)


def oracle(path, answers):
    """A graph that answers `answers` [T, K] whatever it sees."""
    constant = onnx.helper.make_node(
        "Constant", [], ["logits"], value=onnx.numpy_helper.from_array(np.asarray(answers, np.float32))
    )
    graph = onnx.helper.make_graph(
        [constant],
        "oracle",
        [onnx.helper.make_tensor_value_info("clip", 1, [CLIP, 3, 32, 32])],
        [onnx.helper.make_tensor_value_info("logits", 1, np.shape(answers))],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path
    )


def test_accuracy_counts_the_mean_of_the_rows(tool, tmp_path):
    """Seven rows for `left`, one that outweighs them for `right`: the mean says `right`, class 2 of 12."""
    rows = np.zeros((CLIP, len(GESTURES)))
    rows[:, 1], rows[-1, 2] = 1.0, 20.0
    oracle(tmp_path / "net.onnx", rows)
    found = tool.evaluate(tmp_path / "net.onnx", 24)
    assert found["accuracy"] == pytest.approx(1 / 12, abs=1e-4)
    assert (found["accuracy right"], found["accuracy left"], found["accuracy still"]) == (1.0, 0.0, 0.0)
    assert len(found["mixed up"]) == 5


def test_streams_are_run_with_their_states(tool, tmp_path):
    """The tool's answer equals the clip model's over the whole stream, which has no states to lose."""
    torch.manual_seed(3)
    model = TSM("mobilenet_v2", len(GESTURES), "online", 0.1).eval()
    export_online(model, tmp_path / "online.onnx", (32, 32))
    events, seed = 12, tool.EVAL_SEED + 1
    world = GestureWorld(seed, 32, 32)
    frames = np.stack([world.frame(i).image for i in range(events * EVENT)])
    with torch.no_grad():
        logits = model(torch.from_numpy(tool.normalised(frames))).numpy()
    spans = [world.event(number) for number in range(events)]
    right = sum(logits[e.start : e.stop].sum(0).argmax() == e.label for e in spans)
    found = tool.evaluate_stream(tmp_path / "online.onnx", events)
    assert found == {"events": events, "event accuracy": round(right / events, 4)}


def test_evaluating_a_missing_model(tool, tmp_path, capsys):
    assert tool.main(["--eval-only", str(tmp_path / "none.onnx")]) == 2
    assert "not found" in capsys.readouterr().err


def test_learning_rate_warms_up_and_falls(tool):
    options = tool.Options(steps=100, warmup=10, lr=1.0)
    rates = [tool.learning_rate(options, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.02
