"""Drawing: in the picture, visible, never a crash."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.draw import _Font, _overlap, class_color, draw


def detections(*boxes: tuple[float, float, float, float], labels: tuple[str, ...] = ("car",)) -> Detections:
    n = len(boxes)
    return Detections(
        np.array(boxes, np.float32).reshape(n, 4),
        np.linspace(0.9, 0.3, n).astype(np.float32),
        np.zeros(n, np.int32),
        labels,
    )


GREY = np.full((240, 320, 3), 127, np.uint8)


def test_the_box_is_where_it_should_be() -> None:
    out = draw(GREY, detections((100, 80, 200, 160)))
    color = class_color(0)
    assert (out[120, 100] == color).all() and (out[160, 150] == color).all()
    assert (out[120, 200] == color).all() and (out[80, 190] == color).all()
    assert (out[110:150, 110:190] == 127).all(), "the inside stays free"
    assert (out[180:] == 127).all() and (out[:, 210:] == 127).all()
    label = out[40:79, 98:160].reshape(-1, 3)
    assert (label == color).all(1).sum() > 200, "a label stands above the box"


def test_the_input_is_kept_unless_asked() -> None:
    image = GREY.copy()
    out = draw(image, detections((10, 10, 50, 50)))
    assert (image == 127).all() and out is not image
    assert draw(image, detections((10, 10, 50, 50)), copy=False) is image
    assert np.array_equal(image, out)


def test_no_detections_need_no_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cv2", None)
    assert np.array_equal(draw(GREY, detections()), GREY)


def test_labels_keep_inside_and_apart() -> None:
    tall = draw(GREY, detections((0, 0, 320, 240)))
    assert (tall == class_color(0)).all(2).sum() > 2 * (320 + 240) + 200, "box and label are both seen"
    both = draw(GREY, detections((100, 100, 200, 200), (100, 100, 200, 200)))
    one = draw(GREY, detections((100, 100, 200, 200)))
    assert (both == class_color(0)).all(2).sum() > (one == class_color(0)).all(2).sum() + 300


def test_labels_never_overlap_and_hide_no_small_box() -> None:
    rng = np.random.default_rng(0)
    font = _Font(cv2, 320, 240)
    low = rng.uniform((0, 0), (280, 200), (60, 2))
    boxes = np.hstack([low, low + rng.uniform(8, 60, (60, 2))]).astype(int)
    tags = np.zeros((0, 4), int)
    for box in boxes:
        tag = font.place(tuple(box), "pedestrian 93%", 1, boxes, tags)
        if tag is not None:
            tags = np.append(tags, [tag], axis=0)
    assert 10 < len(tags) < 60, "there is room for some"
    assert (tags >= 0).all() and (tags[:, 2] <= 320).all() and (tags[:, 3] <= 240).all()
    common = _overlap(tags, tags)
    assert (common[~np.eye(len(tags), dtype=bool)] == 0).all()
    # two boxes one above the other: the label of the lower leaves the upper, smaller one free
    two = np.array([(100, 100, 200, 200), (100, 82, 120, 96)])
    tag = font.place((100, 100, 200, 200), "car 90%", 1, two, np.zeros((0, 4), int))
    assert tag is not None and _overlap(np.array([tag]), two[1:]).sum() == 0


def test_the_best_scored_keeps_its_label_where_there_is_room_for_one() -> None:
    image = np.full((60, 70, 3), 127, np.uint8)
    full = [(2.0, 2.0, 68.0, 58.0)] * 12
    out = draw(image, detections(*full, labels=("carriage",)))
    one = draw(image, detections(full[0], labels=("carriage",)))
    assert (out == one).all(2)[0:20].mean() > 0.9


def test_boxes_partly_outside_are_cut_and_others_left_out() -> None:
    out = draw(GREY, detections((-50, -50, 100, 100)))
    assert (out[50, 100] == class_color(0)).all()
    for box in ((-9, -9, -1, -1), (400, 10, 500, 20), (50, 50, 40, 60), (np.nan, 0, 5, 5), (0, 0, np.inf, 5)):
        assert np.array_equal(draw(GREY, detections(box)), GREY), box


def test_lines_grow_with_the_picture() -> None:
    def run(side: int) -> int:
        image = np.full((side, side, 3), 127, np.uint8)
        out = draw(image, detections((side * 0.25, side * 0.25, side * 0.75, side * 0.75)))
        return int((out[side // 2, : side // 2] == class_color(0)).all(1).sum())

    assert run(240) == 1
    assert 3 * run(240) <= run(1440) <= 8


def test_colors_are_stable_distinct_and_readable() -> None:
    colors = [class_color(i) for i in range(64)]
    assert colors == [class_color(i) for i in range(64)] and class_color(1000) == class_color(1000)
    assert len(set(colors)) == 64
    near = [np.abs(np.subtract(a, b)).sum() for a, b in itertools.pairwise(colors)]
    assert min(near) > 90
    assert class_color(-1) in colors or len(class_color(-1)) == 3


def luminance(color: tuple[int, ...]) -> float:
    """WCAG 2.1 relative luminance of a BGR colour."""
    c = np.array(color[::-1]) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_letters_contrast_with_their_ground() -> None:
    from edgekit.tasks.detect.draw import ink_color

    for cls in range(64):
        light, dark = sorted(
            (luminance(class_color(cls)), luminance(ink_color(class_color(cls)))), reverse=True
        )
        assert (light + 0.05) / (dark + 0.05) >= 3, f"class {cls}: WCAG contrast for large text"


@given(
    st.lists(st.tuples(*[st.floats(width=32) for _ in range(4)]), max_size=5),
    st.integers(1, 60),
    st.integers(1, 60),
    st.text(max_size=60),
)
@settings(max_examples=200, deadline=None)
def test_any_boxes_and_labels_can_be_drawn(
    boxes: list[tuple[float, float, float, float]], width: int, height: int, label: str
) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    out = draw(image, detections(*boxes, labels=(label,)))
    assert out.shape == image.shape and out.dtype == np.uint8


def test_views_are_drawn_as_copies_and_refused_in_place() -> None:
    view = GREY[:, ::-1]
    assert draw(view, detections((10, 10, 50, 50))).flags.c_contiguous
    with pytest.raises(ValueError, match="contiguous"):
        draw(view, detections(), copy=False)
    for bad in (GREY[..., 0], GREY.astype(np.float32), GREY[:0]):
        with pytest.raises(ValueError, match="uint8 picture"):
            draw(bad, detections())
