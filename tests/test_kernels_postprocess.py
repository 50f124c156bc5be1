"""tasks/detect/decode.py: outputs to boxes in the picture."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.tasks.detect.decode import Postprocess, to_picture
from edgekit.tasks.detect.spec import Channels, DetectHead, DetectSpec, HeadLevel
from edgekit.tasks.preprocess import ImagePreprocess, place
from tests.test_kernels import PATHS, using

HEAD = DetectHead("rows", 2, rows="r", columns=("x1", "y1", "x2", "y2", "cls*"))


def spec(resize: str = "letterbox", **options: object) -> DetectSpec:
    preprocess = ImagePreprocess(100, 100, resize=resize)  # type: ignore[arg-type]
    return DetectSpec(preprocess, HEAD, ("cat", "dog"), **options)  # type: ignore[arg-type]


def rows(*values: tuple[float, ...]) -> dict[str, np.ndarray]:
    return {"r": np.array([values], np.float32)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("resize", ["letterbox", "letterbox-center", "stretch"])
def test_boxes_return_to_the_picture(path: str, resize: str) -> None:
    height, width = 50, 200
    s = spec(resize)
    p = place(s.preprocess, width, height)
    wanted = np.array([20, 10, 120, 40], np.float32)
    x1, x2 = wanted[[0, 2]] * p.scale_x + p.left
    y1, y2 = wanted[[1, 3]] * p.scale_y + p.top
    with using(path):
        found = Postprocess(s)(rows((x1, y1, x2, y2, 0.1, 0.9)), p, (height, width))
    np.testing.assert_allclose(found.boxes, [wanted], atol=1e-4)
    assert found.scores.tolist() == [np.float32(0.9)]
    assert [name for *_, name in found] == ["dog"]


@pytest.mark.parametrize("path", PATHS)
def test_thresholds_order_and_clipping(path: str) -> None:
    outputs = rows(
        (-50, -50, 500, 500, 0.5, 0.0),
        (10, 10, 20, 20, 0.3, 0.0),
        (10, 10, 20, 21, 0.9, 0.0),
        (10, 10, 20, 20, 0.0, 0.8),
        (60, 60, 70, 70, 0.2, 0.0),
        (float("nan"), 60, 70, 70, 0.99, 0.0),
    )
    p = place(spec().preprocess, 100, 100)
    with using(path):
        post = Postprocess(spec())
        found = post(outputs, p, (100, 100))
        assert found.boxes.tolist() == [[10, 10, 20, 21], [10, 10, 20, 20], [0, 0, 100, 100]]
        assert found.classes.tolist() == [0, 1, 0]
        assert found.boxes.dtype == found.scores.dtype == np.float32
        assert found.classes.dtype == np.int32
        assert len(post(outputs, p, (100, 100), score_threshold=0.1)) == 4
        assert len(post(outputs, p, (100, 100), score_threshold=0.1, iou_threshold=1.0)) == 5
        assert len(post(outputs, p, (100, 100), max_detections=1)) == 1
        assert len(post(outputs, p, (100, 100), max_detections=50_000)) == 3
        assert len(post(outputs, p, (100, 100), score_threshold=1.0)) == 0
        # results are the caller's own: the next call leaves them alone
        assert found.boxes.tolist()[0] == [10, 10, 20, 21]
        assert found.scores.tolist()[0] == np.float32(0.9)


@pytest.mark.parametrize("path", PATHS)
def test_bad_arguments(path: str) -> None:
    p = place(spec().preprocess, 100, 100)
    with using(path):
        post = Postprocess(spec())
        for options in ({"score_threshold": 1.1}, {"iou_threshold": -0.1}, {"max_detections": 0}):
            with pytest.raises(UsageError, match="expected thresholds"):
                post(rows((0, 0, 1, 1, 1, 0)), p, (100, 100), **options)
        with pytest.raises(UsageError, match="output 'r': missing"):
            post({"q": np.zeros((1, 1, 6), np.float32)}, p, (100, 100))


def test_both_paths_agree_on_a_crowded_head() -> None:
    levels = tuple(HeadLevel(s, Channels(f"b{s}"), Channels(f"c{s}"), Channels(f"o{s}")) for s in (8, 16, 32))
    s = DetectSpec(
        ImagePreprocess(160, 96), DetectHead("yolox", 4, levels), tuple("abcd"), score_threshold=0.01
    )
    rng = np.random.default_rng(4)
    outputs = {}
    for stride in (8, 16, 32):
        for name, channels in (("b", 4), ("c", 4), ("o", 1)):
            shape = (1, channels, 96 // stride, 160 // stride)
            outputs[f"{name}{stride}"] = rng.normal(0, 1.5, shape).astype(np.float32)
    p = place(s.preprocess, 640, 360)
    found = {}
    for path in PATHS:
        with using(path):
            found[path] = Postprocess(s)(outputs, p, (360, 640))
    assert len(found["numpy"]) > 50
    for field in ("boxes", "scores", "classes"):
        assert getattr(found["numpy"], field).tobytes() == getattr(found["native"], field).tobytes()


def test_to_picture_inverts_the_placement() -> None:
    p = place(ImagePreprocess(416, 416, resize="letterbox-center"), 1280, 720)
    corners = np.array([[p.left, p.top, p.left + p.width, p.top + p.height]], np.float32)
    np.testing.assert_allclose(to_picture(corners, p, (720, 1280)), [[0, 0, 1280, 720]], atol=1e-3)
