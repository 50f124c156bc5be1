"""Labelled clips from folders, arrays and the synthetic world, and the accuracy of a network on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgekit import tasks
from edgekit.errors import UsageError
from edgekit.synth.gestures import GESTURES, GestureWorld
from edgekit.tasks.video.dataset import Frames, VideoSet, class_names, read_set
from edgekit.tasks.video.metric import bootstrap, evaluate, score_clip
from edgekit.tasks.video.pipeline import VideoPipeline
from edgekit.tasks.video.spec import Smoothing
from tests.video_bundles import LABELS, Script, picture, spec


def clips(count: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 10, 12, 3), np.uint8)


def write_npz(path: Path, **arrays: Any) -> Path:
    data = {"clips": clips(), "labels": np.array([0, 1, 2, 3, 4, 1])} | arrays
    np.savez(path, **{k: v for k, v in data.items() if v is not None})
    return path


def write_folder(root: Path) -> Path:
    """wave: a video and a folder of pictures; push: a folder whose names count past 9."""
    (root / "wave" / "b").mkdir(parents=True)
    writer = cv2.VideoWriter(str(root / "wave" / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 20, (32, 24))
    for level in (0, 80, 160, 240):
        writer.write(np.full((24, 32, 3), level, np.uint8))
    writer.release()
    for i, level in enumerate((10, 20, 30)):
        cv2.imwrite(str(root / "wave" / "b" / f"{i}.png"), picture(level))
    (root / "push" / "c").mkdir(parents=True)
    for i in (10, 9, 8, 100):
        cv2.imwrite(str(root / "push" / "c" / f"f{i}.png"), picture(i))
    (root / "push" / ".hidden").mkdir()
    (root / "push" / "notes.txt").write_text("no clip")
    return root


def test_arrays(tmp_path: Path) -> None:
    data = read_set(write_npz(tmp_path / "a.npz"), None)
    assert (data.task, data.name, len(data.images)) == ("video", f"{tmp_path.name}/a.npz", 6)
    assert data.labels == tuple(f"class_{i}" for i in range(5))
    clip = data.clip(2)
    assert clip.step_s is None and len(clip.images) == 4
    np.testing.assert_array_equal(np.stack(list(clip.images))[..., ::-1], clips()[2])
    np.testing.assert_array_equal(data.read(2)[..., ::-1], clips()[2][2])
    named = read_set(
        write_npz(tmp_path / "b.npz", names=np.array(["Wave", "nothing", "push", "shake", "turn"])), None, labels=LABELS
    )  # fmt: skip
    assert [c.cls for c in named.images] == [1, 0, 2, 4, 3, 0]
    assert named.labels == LABELS
    assert class_names(tmp_path / "b.npz") == ("Wave", "nothing", "push", "shake", "turn")
    assert class_names(tmp_path / "a.npz") == ()
    assert tasks.of(data) is tasks.task("video")


def test_a_digest_tells_classes_pixels_and_number_apart(tmp_path: Path) -> None:
    first = read_set(write_npz(tmp_path / "a.npz"), None)
    assert first.digest == read_set(write_npz(tmp_path / "b.npz"), None).digest
    other = clips()
    other[3, 1, 2, 3, 0] ^= 1
    changed = [
        read_set(write_npz(tmp_path / "c.npz", clips=other), None),
        read_set(write_npz(tmp_path / "d.npz", labels=np.array([0, 1, 2, 3, 4, 2])), None),
        read_set(tmp_path / "a.npz", None, limit=5),
    ]
    assert len({first.digest, *(s.digest for s in changed)}) == 4


def test_folders(tmp_path: Path) -> None:
    data = read_set(write_folder(tmp_path), None, labels=LABELS)
    assert [(c.cls, c.path and c.path.name) for c in data.images] == [(2, "c"), (1, "a.avi"), (1, "b")]
    assert [int(i.mean()) for i in data.clip(0).images] == [8, 9, 10, 100], "numbers count by value"
    video = data.clip(1)
    assert video.step_s == pytest.approx(1 / 20)
    np.testing.assert_allclose([i.mean() for i in video.images], [0, 80, 160, 240], atol=3)
    assert [int(i.mean()) for i in data.clip(2).images] == [10, 20, 30]
    assert [c.path and c.path.name for c in read_set(tmp_path, None, limit=2).images] == ["c", "a.avi"]
    (tmp_path / "push" / "d").mkdir()
    cv2.imwrite(str(tmp_path / "push" / "d" / "0.png"), picture())
    in_turn = [c.path and c.path.name for c in read_set(tmp_path, None).images]
    assert in_turn == ["c", "a.avi", "d", "b"], "of every class in turn"
    data = read_set(tmp_path, None, labels=LABELS)
    before = data.digest
    cv2.imwrite(str(tmp_path / "push" / "c" / "f9.png"), picture(50))
    assert read_set(tmp_path, None, labels=LABELS).digest != before


@pytest.mark.parametrize("slashes", ["//", "/"], ids=["uri", "path"])
def test_the_synthetic_world(slashes: str) -> None:
    data = read_set(Path(f"synthetic:{slashes}gestures?clips=30&seed=7&size=48x32&frames=5"), None)
    assert (len(data.images), data.labels, data.images[13].cls) == (30, GESTURES, 1)
    world = GestureWorld(7, 48, 32)
    np.testing.assert_array_equal(np.stack(list(data.clip(13).images)), world.clip(13, 5)[0])
    assert data.read(0).shape == (32, 48, 3)
    others = ("clips=30&seed=8&size=48x32&frames=5", "clips=30&seed=7&size=48&frames=5", "clips=29&seed=7")
    assert (
        len({data.digest, *(read_set(Path(f"synthetic://gestures?{q}"), None).digest for q in others)}) == 4
    )
    shuffled = read_set(Path("synthetic://gestures?clips=12"), None, labels=GESTURES[::-1])
    assert [c.cls for c in shuffled.images] == list(range(11, -1, -1))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"clips": None}, "expected the arrays clips and labels, got labels"),
        ({"clips": clips()[:, 0]}, r"expected uint8 \[N, T, H, W, 3\]"),
        ({"clips": clips().astype(np.float32)}, "got float32"),
        ({"labels": np.arange(5)}, "expected 6 whole numbers"),
        ({"labels": np.arange(6) / 2}, "whole numbers, got float64"),
        ({"labels": np.array([0, 1, 2, 3, 9, 1])}, "label 9"),
        ({"names": np.array(["a", "a"])}, "array names"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_set(write_npz(tmp_path / "a.npz", **arrays), None, labels=LABELS)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("missing", "no such file or folder"),
        ("synthetic://street?clips=3", "no labelled clips"),
        ("synthetic://gestures?clip=3", "Did you mean 'clips'"),
        ("synthetic://gestures?clips=0", "clips '0': expected a whole number, 1 to"),
        ("synthetic://gestures?size=big", "size 'big'"),
        ("synthetic://gestures?size=5000", "out of range"),
        ("empty", "holds no folders"),
        ("pictures", "holds pictures, expected clips"),
        ("nothing", "holds no clips"),
    ],
)
def test_sets_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing" / "wave").mkdir(parents=True)
    (tmp_path / "pictures" / "wave").mkdir(parents=True)
    cv2.imwrite("pictures/wave/1.png", picture())
    with pytest.raises(UsageError, match=says) as caught:
        read_set(Path(data), None)
    assert class_names(Path(data)) == (
        ("wave",) if data in ("pictures", "nothing") else GESTURES if "gestures" in data else ()
    )
    assert "\n" not in str(caught.value)


def test_damaged_clips_are_named_when_they_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "wave" / "a.avi").write_bytes(b"no video")
    (tmp_path / "wave" / "b" / "1.png").write_bytes(b"no picture")
    for path in (tmp_path / "push" / "c").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(UsageError, match="holds no pictures"):
        read_set(tmp_path, None, labels=LABELS)
    (tmp_path / "push" / "c" / "f8.txt").rename(tmp_path / "push" / "c" / "f8.png")
    data = read_set(tmp_path, None, labels=LABELS)
    for index, says in ((1, "no frame can be decoded"), (2, "1.png")):
        with pytest.raises(UsageError, match=says):
            data.clip(index)
    with pytest.raises(UsageError, match="limit 0"):
        read_set(tmp_path, None, limit=0)
    with pytest.raises(UsageError, match="Leave --images"):
        read_set(tmp_path, tmp_path / "wave")


# --- the metric ----------------------------------------------------------------------------------


class Counting(Script):
    """Outputs that tell which runs since the last reset they are of, and with which input."""

    def __init__(self) -> None:
        super().__init__([])
        self.since = 0
        self.log: list[tuple[int, int]] = []

    def run(self) -> None:
        level = round(float(self.inputs["image"].mean()) * 255)
        self.log.append((self.since, level))
        self.outputs["logits"][0] = [self.since, level, 0, 0, 0]
        self.since += 1

    def reset(self) -> None:
        self.since = 0


def ramp(count: int, step_s: float | None = None) -> Frames:
    return Frames([picture(i) for i in range(count)], step_s)


def test_a_clip_is_the_mean_of_its_outputs_from_a_reset_on() -> None:
    session = Counting()
    pipeline = VideoPipeline(spec(dt_s=0.1, smoothing=Smoothing(12, True)), session)
    for _ in range(2):  # what was before does not count
        scores = score_clip(pipeline, ramp(6))
        np.testing.assert_allclose(scores, [2.5, 2.5, 0, 0, 0], atol=1e-6)
    assert session.log == [(i, i) for i in range(6)] * 2


def test_a_clip_is_played_in_the_networks_step() -> None:
    session = Counting()
    pipeline = VideoPipeline(spec(dt_s=0.1), session)
    score_clip(pipeline, ramp(30, 1 / 30))
    assert [level for _, level in session.log] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    session.log.clear()
    score_clip(pipeline, ramp(5, 0.1))
    assert [level for _, level in session.log] == [0, 1, 2, 3, 4]


def test_segments_and_crops() -> None:
    session = Counting()
    pipeline = VideoPipeline(spec(frames=3), session)
    score_clip(pipeline, ramp(10), segments=3)
    assert session.log == [(0, 0), (1, 1), (2, 2), (0, 4), (1, 5), (2, 6), (0, 7), (1, 8), (2, 9)]
    session.log.clear()
    wide = np.zeros((12, 36, 3), np.uint8)
    wide[:, 12:24], wide[:, 24:] = 100, 200
    score_clip(pipeline, Frames([wide]), crops=3)
    assert session.log == [(0, 0), (0, 100), (0, 200)]
    session.log.clear()
    slope = (8 * np.arange(16) + 4 * np.arange(16)[:, None]).astype(np.uint8)  # of 16 pixels a crop has 14
    score_clip(pipeline, Frames([np.repeat(slope[..., None], 3, axis=2)]), crops=5)
    means = [level for _, level in session.log]
    assert [level - means[0] for level in means] == [0, 16, 8, 24, 12]
    for bad in ({"crops": 2}, {"segments": 0}):
        with pytest.raises(UsageError, match="1, 3 or 5 crops"):
            score_clip(pipeline, ramp(3), **bad)


def test_accuracy_and_its_interval(tmp_path: Path) -> None:
    truth = np.arange(20) % 5
    said = np.where(np.arange(20) < 14, truth, (truth + 1) % 5)
    data = read_set(write_npz(tmp_path / "a.npz", clips=clips(20), labels=truth), None, labels=LABELS)
    pipeline = VideoPipeline(spec(), Script(lambda run: np.eye(5)[said[run // 4]] * 5))
    seen: list[tuple[int, int]] = []
    found, answers = evaluate(pipeline, data, progress=lambda done, of: seen.append((done, of)))
    assert found["top1"] == 0.7 and found["top5"] is None
    assert found["per_class"] == {
        name: round(float(np.mean(said[truth == c] == c)), 4) for c, name in enumerate(LABELS)
    }
    assert sum(entry["pictures"] for entry in found["confusions"]) == 6
    assert seen[-1] == (20, 20)
    rounds = bootstrap(data, answers)
    assert rounds == bootstrap(data, answers) and abs(np.mean(np.array(rounds, float)) - 0.7) < 0.02


def test_order_decides_the_answer() -> None:
    """A network that adds up what moves gets the right direction from frames in order, the other one from the reverse."""

    class Motion(Script):
        def __init__(self) -> None:
            super().__init__([], len(GESTURES))
            self.last: float | None = None

        def run(self) -> None:
            level = float(self.inputs["image"].mean())
            change = 0.0 if self.last is None else level - self.last
            self.last = level
            self.outputs["logits"][0, 1:3] = -change, change

        def reset(self) -> None:
            self.last = None

    pipeline = VideoPipeline(spec(labels=GESTURES, background="still"), Motion())
    up = Frames([picture(20 * i) for i in range(8)])
    assert int(np.argmax(score_clip(pipeline, up))) == 2
    assert int(np.argmax(score_clip(pipeline, Frames(up.images[::-1])))) == 1


def test_a_set_is_what_the_core_asks_for(tmp_path: Path) -> None:
    data: tasks.EvaluationSet = read_set(write_npz(tmp_path / "a.npz"), None)
    assert isinstance(data, VideoSet) and data.read(0).shape == (10, 12, 3)
