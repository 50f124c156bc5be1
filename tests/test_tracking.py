"""tasks/detect/tracking.py with the real library, on the street's exact labels; and ids carried by Detections."""

from __future__ import annotations

import sys
from collections import defaultdict

import numpy as np
import pytest

from edgekit.errors import MissingExtraError, UsageError
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame
from edgekit.synth.street import StreetWorld
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.tracking import Tracker

PIXELS = Pixels.bgr(np.zeros((36, 64, 3), np.uint8))
LABELS = ("a", "b", "c")


def frame(seq: int, fps: float = 30.0, **options: object) -> Frame:
    given = {"seq": seq, "pts_ns": round(seq / fps * 1e9), "clock": "media"} | options
    return Frame(PIXELS, captured_ns=0, source="test", **given)  # type: ignore[arg-type]


def boxes(*rows: tuple[float, ...], score: float = 0.9) -> Detections:
    n = len(rows)
    return Detections(
        np.array(rows, np.float32).reshape(n, 4), np.full(n, score, np.float32), np.zeros(n, np.int32), LABELS
    )


def make(**options: object) -> Tracker:
    pytest.importorskip(
        "trackers", reason="package trackers is not installed (pip install 'edgekit[tracking]')"
    )
    return Tracker(**options)  # type: ignore[arg-type]


def moving(seq: int, *, start: float = 0.0, speed: float = 2.0) -> tuple[float, float, float, float]:
    return (start + speed * seq, 10, start + speed * seq + 20, 40)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every pair: [n, m]"""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.prod(np.maximum(high - low, 0), axis=2)
    area = [np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b)]
    return inter / (area[0][:, None] + area[1][None] - inter)


def street(seed: int, count: int) -> list[tuple[Detections, list[int]]]:
    """Exact boxes of a drive, and which object each is: the labels of neighbouring frames (33 ms apart) that
    overlap by more than half and have the same class, each other's best."""
    world = StreetWorld(seed, 320, 180)
    result: list[tuple[Detections, list[int]]] = []
    before: tuple[np.ndarray, np.ndarray, list[int]] | None = None
    objects = 0
    for index in range(count):
        seen = world.frame(index)
        names = []
        for k in range(len(seen.boxes)):
            name = -1
            if before is not None and len(before[0]):
                iou = overlap(before[0], seen.boxes)
                j = int(iou[:, k].argmax())
                if iou[j, k] > 0.5 and iou[j].argmax() == k and before[1][j] == seen.classes[k]:
                    name = before[2][j]
            if name < 0:
                name, objects = objects, objects + 1
            names.append(name)
        before = seen.boxes, seen.classes, names
        scores = np.full(len(names), 0.8, np.float32)
        result.append((Detections(seen.boxes, scores, seen.classes), names))
    return result


def test_ids_stay_with_their_objects_on_the_street() -> None:
    """Three drives. What is lost: people a few pixels wide who pass each other, and boxes that the picture's edge cuts."""
    objects = kept = shared = 0
    for seed in (3, 11, 20):
        tracker = make(fps=30)
        given: dict[int, list[int]] = defaultdict(list)
        owners: dict[int, set[int]] = defaultdict(set)
        for k, (detections, names) in enumerate(street(seed, 45)):
            tracked = tracker.update(detections, frame(k))
            assert tracked.boxes is detections.boxes and tracked.ids is not None
            known = tracked.ids[tracked.ids >= 0].tolist()
            assert len(known) == len(set(known)), "two objects of one frame have the same id"
            for name, who in zip(names, tracked.ids.tolist(), strict=True):
                given[name].append(who)
                owners[who].add(name)
        long = {name for name, ids in given.items() if len(ids) >= 10}
        objects += len(long)
        kept += sum(len({i for i in given[name] if i >= 0}) == 1 for name in long)
        shared += sum(who >= 0 and len(names & long) > 1 for who, names in owners.items())
    print(f"{kept} of {objects} objects kept one id, {shared} ids went to a second object")
    assert objects >= 40, "the drives show too little"
    assert kept >= 0.9 * objects
    assert shared <= 0.1 * objects


def test_an_object_that_is_hidden_for_a_while_comes_back_with_its_id() -> None:
    tracker = make()
    ids = []
    for k in range(40):
        hidden = 15 <= k < 30
        tracked = tracker.update(boxes() if hidden else boxes(moving(k)), frame(k))
        assert tracked.ids is not None and tracked.ids.dtype == np.int32
        ids += tracked.ids.tolist()
    assert ids[0] == -1 and set(ids[1:]) == {0}


def test_after_more_than_lost_s_it_is_another_object() -> None:
    tracker = make(lost_s=0.2)
    for k in range(5):
        tracker.update(boxes(moving(0)), frame(k))
    for k in range(20, 23):
        tracked = tracker.update(boxes(moving(0)), frame(k))
    assert tracked.ids is not None and tracked.ids.tolist() == [1]


def test_dropped_frames_are_allowed_for() -> None:
    """Of a fast object every fifth frame only: by count of updates it would be far from where it is expected."""
    tracker = make()
    ids = []
    for k in [0, 1, 2, 3, 4, 5, 10, 15, 20, 25]:
        tracked = tracker.update(boxes(moving(k, speed=8.0)), frame(k))
        assert tracked.ids is not None
        ids += tracked.ids.tolist()
    assert set(ids[1:]) == {0}


def test_weak_boxes_continue_a_track_but_begin_none() -> None:
    tracker = make(score=0.5)
    for k in range(4):
        tracked = tracker.update(boxes(moving(k), score=0.3), frame(k))
        assert tracked.ids is not None and tracked.ids.tolist() == [-1]
    for k in range(4, 8):
        tracked = tracker.update(boxes(moving(k), score=0.9), frame(k))
    tracked = tracker.update(boxes(moving(8), score=0.3), frame(8))
    assert tracked.ids is not None and tracked.ids.tolist() == [0]


@pytest.mark.parametrize("jump", [{"epoch": 1}, {"pts_ns": 0}])
def test_a_reconnect_or_a_clock_that_goes_back_begins_anew_with_new_ids(jump: dict[str, int]) -> None:
    tracker = make()
    for k in range(5):
        tracked = tracker.update(boxes(moving(0)), frame(k))
    assert tracked.ids is not None and tracked.ids.tolist() == [0]
    tracked = tracker.update(boxes(moving(0)), frame(5, **jump))
    assert tracked.ids is not None and tracked.ids.tolist() == [-1]
    later = {"epoch": jump.get("epoch", 0)}
    if "pts_ns" in jump:
        later["pts_ns"] = 33_000_000
    tracked = tracker.update(boxes(moving(0)), frame(6, **later))
    assert tracked.ids is not None and tracked.ids.tolist() == [1]


def test_each_camera_has_its_own_objects() -> None:
    tracker = make()
    for k in range(4):
        left = tracker.update(boxes(moving(k), moving(k, start=300)), frame(k, camera="left"))
        right = tracker.update(boxes(moving(k, start=600)), frame(k, camera="right"))
    assert left.ids is not None and right.ids is not None
    assert sorted(left.ids.tolist()) == [0, 1] and right.ids.tolist() == [0]


@pytest.mark.parametrize("clock", ["none", "monotonic"])
def test_frames_without_a_clock_and_with_a_coarse_one(clock: str) -> None:
    tracker = make()
    for k in range(4):
        tracked = tracker.update(boxes(moving(k)), frame(k, clock=clock, pts_ns=5))
    assert tracked.ids is not None and tracked.ids.tolist() == [0]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[tracking\]'"):
        Tracker()


@pytest.mark.parametrize(
    "options", [{"fps": 0}, {"score": 1.5}, {"lost_s": -1}, {"min_frames": 0}, {"min_iou": 2}]
)
def test_values_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="tracker: expected fps above 0"):
        Tracker(**options)  # type: ignore[arg-type]


def test_ids_are_carried_on() -> None:
    found = boxes((0, 0, 10, 10), (20, 20, 40, 40))
    assert "ids" not in found.to_json()
    tracked = Detections(
        found.boxes, np.array([0.9, 0.3], np.float32), found.classes, LABELS, np.array([7, -1], np.int32)
    )
    assert tracked.to_json()["ids"] == [7, -1]
    above = tracked.above(0.5)
    assert above.ids is not None and above.ids.tolist() == [7]
    with pytest.raises(ValueError, match=r"expected ids \[2\]"):
        Detections(found.boxes, found.scores, found.classes, LABELS, np.zeros(3, np.int32))


def test_supervision_keeps_ids() -> None:
    pytest.importorskip("supervision")
    tracked = Detections(*(getattr(boxes((0, 0, 10, 10)), f) for f in ("boxes", "scores", "classes")), LABELS)
    assert Detections.from_supervision(tracked.to_supervision()).ids is None
    back = Detections.from_supervision(
        Detections(
            tracked.boxes, tracked.scores, tracked.classes, LABELS, np.array([4], np.int32)
        ).to_supervision()
    )
    assert back.ids is not None and back.ids.tolist() == [4] and back.ids.dtype == np.int32


def test_an_object_is_drawn_in_its_own_colour_with_its_number() -> None:
    pytest.importorskip("cv2")
    from edgekit.tasks.detect.draw import class_color, draw

    image = np.zeros((200, 300, 3), np.uint8)
    plain = boxes((40, 60, 200, 160))
    tracked = Detections(plain.boxes, plain.scores, plain.classes, LABELS, np.array([7], np.int32))
    none = Detections(plain.boxes, plain.scores, plain.classes, LABELS, np.array([-1], np.int32))
    assert draw(image, tracked)[160, 100].tolist() == list(class_color(7)) != list(class_color(0))
    assert (draw(image, none) == draw(image, plain)).all()
    assert (draw(image, tracked)[:60] != draw(image, plain)[:60]).any()  # the tag
