"""tools/train_video.py: batches, that training can be interrupted, what it exports and how it is judged."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys

import numpy as np
import onnx
import pytest
import torch

from edgekit.models.tsm import MEAN, STD, TSM, export_online
from edgekit.synth.gestures import CLIP, EVENT, GESTURES, GestureWorld, Poses
from tests.helpers import ROOT

TINY = ["--size", "32", "--width", "0.1", "--batch", "4", "--steps", "4", "--warmup", "1", "--workers", "0",
        "--threads", "1", "--eval-clips", "12", "--eval-events", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def tool():
    """tools/train_video.py as a module."""
    spec = importlib.util.spec_from_file_location("train_video", ROOT / "tools" / "train_video.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_video"] = module
    spec.loader.exec_module(module)
    yield module
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


def test_batches_are_fresh_clips_and_depend_on_their_step_alone(tool):
    options = tool.Options(size=32, batch=4, steps=6, lead=3)
    whole = list(tool.batches(options, 0, 0))
    later = list(tool.batches(options, 3, 0))
    for one, other in zip(whole[3:], later, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    world = GestureWorld(0, 32, 32)
    for step, (images, labels, hints) in enumerate(whole):
        assert images.shape == (4, CLIP + (3 if step % 2 else 0), 32, 32, 3)
        for i in range(4):
            at = (step * 4 + i) * 12 + int(labels[i])
            wanted, label = world.clip(at, lead=3 if step % 2 else 0)
            assert np.array_equal(images[i], wanted)
            assert labels[i] == label
            path = world.poses(at, lead=3 if step % 2 else 0)
            assert np.array_equal(hints[i], tool.targets(path))
    plain = next(tool.batches(tool.Options(mode="none", size=32, batch=2, lead=3), 1, 0))
    assert plain[0].shape[1] == CLIP


def test_targets_are_places_and_steps(tool):
    """An object that moves by a usual step each way, but for the first frame, which has none before."""
    t = np.arange(4.0)
    path = Poses(0.15 + 0.035 * t, -0.15 - 0.035 * t, np.exp(-0.8 + 0.09 * t), 0.22 * t)
    found = tool.targets(path)
    np.testing.assert_allclose(found[0], [1, -1, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1:, 3:], np.tile([1, -1, 1, 1], (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(found[:, 0], 1 + 0.035 / 0.15 * t, rtol=1e-5)


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
