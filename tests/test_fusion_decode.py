from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import schema
from edgekit.errors import BundleError
from edgekit.tasks.detect.spec import Channels
from edgekit.tasks.fusion.boxes import Boxes3D, no_boxes
from edgekit.tasks.fusion.decode import CenterDecoder
from edgekit.tasks.fusion.metric import Rules, evaluate, judge
from edgekit.tasks.fusion.spec import CenterGroup, CenterHead, FusionSpec
from tests.helpers import shared_data
from tests.test_fusion_metric import Truth
from tests.test_kernels import PATHS, using
from tests.test_lean_import import modules_after

ROWS, COLUMNS = 16, 20
CELL = 0.5
LOW = (-4.0, -3.0)


def group(labels: tuple[str, ...], tensor: str, velocity: bool = True, **rule: object) -> CenterGroup:
    """All its maps in one tensor: regression first, then the velocity, then the heat."""
    places = [Channels(tensor, start) for start in (0, 2, 3, 6)]
    return CenterGroup(
        labels,
        Channels(tensor, 10 if velocity else 8),
        *places,
        velocity=Channels(tensor, 8) if velocity else None,
        **rule,  # type: ignore[arg-type]
    )


def spec_of(*groups: CenterGroup, **rule: object) -> FusionSpec:
    head_rule = {k: rule.pop(k) for k in ("rows", "sizes", "log_sizes", "bounds") if k in rule}
    head = CenterHead(groups, *LOW, CELL, CELL, **head_rule)  # type: ignore[arg-type]
    labels = tuple(label for g in groups for label in g.labels)
    return FusionSpec(head, labels, **rule)  # type: ignore[arg-type]


def put(
    tensor: np.ndarray,
    head: CenterHead,
    cls: int,
    logit: float,
    box: tuple[float, ...],
    velocity: bool = True,
) -> None:
    """Write a box (x y z l w h yaw vx vy) where the head reads it: the inverse of the decoding rule."""
    x, y, z, length, width, height, yaw, vx, vy = box
    fx, fy = (x - head.low_x) / head.cell_x, (y - head.low_y) / head.cell_y
    ix, iy = int(fx), int(fy)
    row, column = (iy, ix) if head.rows == "y" else (ix, iy)
    sizes = (length, width, height) if head.sizes == "lwh" else (width, length, height)
    values = [fx - ix, fy - iy, z, *(np.log(sizes) if head.log_sizes else sizes), np.sin(yaw), np.cos(yaw)]
    if velocity:
        values += [vx, vy]
    tensor[0, : len(values), row, column] = values
    tensor[0, len(values) + cls, row, column] = logit


def empty(classes: int, velocity: bool = True) -> np.ndarray:
    tensor = np.zeros((1, (10 if velocity else 8) + classes, ROWS, COLUMNS), np.float32)
    tensor[0, -classes:] = -8
    return tensor


CAR = (1.3, 2.2, -0.5, 4.4, 1.9, 1.6, 2.5, 3.0, -1.0)
VAN = (-2.9, -1.1, 0.1, 5.0, 2.0, 2.2, -3.0, 0.0, 0.5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", ["y", "x"])
@pytest.mark.parametrize("sizes", ["lwh", "wlh"])
@pytest.mark.parametrize("log_sizes", [True, False])
def test_what_was_put_in_comes_out(path: str, rows: str, sizes: str, log_sizes: bool) -> None:
    spec = spec_of(
        group(("car", "van"), "a"),
        group(("person",), "b", velocity=False),
        rows=rows,
        sizes=sizes,
        log_sizes=log_sizes,
    )
    outputs = {"a": empty(2), "b": empty(1, velocity=False), "other": np.zeros(3)}
    put(outputs["a"], spec.head, 0, 2.0, CAR)
    put(outputs["a"], spec.head, 1, 1.0, VAN)
    put(outputs["b"], spec.head, 0, 1.5, (0.1, 0.1, 0, 0.6, 0.5, 1.7, 0.3, 0, 0), velocity=False)
    with using(path):
        got = CenterDecoder(spec, outputs)(outputs, missing=("CAM_BACK",), taken_ns=5)
    assert got.classes.tolist() == [0, 2, 1] and got.labels == ("car", "van", "person")
    np.testing.assert_allclose(got.scores, 1 / (1 + np.exp([-2.0, -1.5, -1.0])), rtol=1e-6)
    np.testing.assert_allclose(got.boxes[0], CAR, atol=1e-5)
    np.testing.assert_allclose(got.boxes[2], VAN, atol=1e-5)
    assert np.isnan(got.boxes[1, 7:]).all()
    assert got.missing == ("CAM_BACK",) and got.taken_ns == 5


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    suppress=st.sampled_from(("none", "circle", "rotated")),
    across=st.booleans(),
    rows=st.sampled_from(("x", "y")),
)
def test_kernels_agree_to_the_bit(seed: int, suppress: str, across: bool, rows: str) -> None:
    rng = np.random.default_rng(seed)
    groups = (
        group(("a", "b"), "first", suppress=suppress, limits=(0.3,) if across else (0.1, 0.6), across=across),
        group(("c",), "second", windows=(1,), suppress=suppress, limits=(0.5,)),
    )
    spec = spec_of(*groups, rows=rows, bounds=(-3.5, -3.0, -2, 5, 4, 2), per_group=9, max_detections=12)
    outputs = {
        "first": rng.normal(0, 1.5, empty(2).shape),
        "second": np.round(rng.normal(0, 1.5, empty(1).shape)),
    }
    outputs = {
        k: np.where(rng.random(v.shape) < 0.01, np.nan, v).astype(np.float32) for k, v in outputs.items()
    }
    results = []
    for path in PATHS:
        with using(path):
            results.append(CenterDecoder(spec, outputs)(outputs))
    for name in ("boxes", "scores", "classes"):
        a, b = (getattr(r, name) for r in results)
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
    boxes, scores = results[0].boxes, results[0].scores
    assert len(boxes) <= 12 and (np.diff(scores) <= 0).all() and (scores >= 0.1).all()
    assert np.isfinite(boxes).all() and (boxes[:, 3:6] > 0).all()
    assert ((boxes[:, :3] >= (-3.5, -3.0, -2)) & (boxes[:, :3] <= (5, 4, 2))).all()


def neighbours(spec: FusionSpec, second_class: int = 0) -> tuple[list[float], list[int]]:
    """Scores and classes where two boxes overlap, 1 m and two cells apart."""
    outputs = {"a": empty(2)}
    put(outputs["a"], spec.head, 0, 2.0, CAR)
    put(outputs["a"], spec.head, second_class, 1.0, (CAR[0] + 1.0, *CAR[1:]))
    got = CenterDecoder(spec, outputs)(outputs)
    return got.scores.round(2).tolist(), got.classes.tolist()


def test_suppression() -> None:
    def rule(**kwargs: object) -> FusionSpec:
        return spec_of(group(("car", "van"), "a", **kwargs))

    both, one = [np.float32(0.88).item(), np.float32(0.73).item()], [np.float32(0.88).item()]
    assert neighbours(rule(suppress="none"))[0] == pytest.approx(both)
    assert neighbours(rule(suppress="rotated", limits=(0.2,)))[0] == pytest.approx(one)
    assert neighbours(rule(suppress="rotated", limits=(0.9,)))[0] == pytest.approx(both)
    assert neighbours(rule(suppress="circle", limits=(1.2,)))[0] == pytest.approx(one)
    assert neighbours(rule(suppress="circle", limits=(0.8,)))[0] == pytest.approx(both)
    assert neighbours(rule(suppress="circle", limits=(0.8, 9.0)))[0] == pytest.approx(both)
    assert neighbours(rule(suppress="circle", limits=(1.2,)), 1)[1] == [0, 1]
    assert neighbours(rule(suppress="circle", limits=(1.2,), across=True), 1)[1] == [0]


def test_limits_on_numbers() -> None:
    outputs = {"a": empty(1)}
    spec = spec_of(group(("car",), "a", suppress="none"), candidates=4, per_group=3, max_detections=2)
    for i in range(5):
        put(outputs["a"], spec.head, 0, 1.0 + i, (i * 1.5 - 3.0, 0.2, 0, 1, 1, 1, 0, 0, 0))
    decoder = CenterDecoder(spec, outputs)
    assert len(decoder(outputs)) == 2 and len(decoder(outputs, max_detections=9)) == 3
    assert len(decoder(outputs, score_threshold=0.99)) == 1
    assert len(decoder(outputs, score_threshold=1.0)) == 0


def test_boxes_that_are_none() -> None:
    spec = spec_of(group(("car",), "a"))
    for channel, value in ((0, np.nan), (3, 200.0), (6, np.inf), (8, np.nan), (4, -900.0)):
        outputs = {"a": empty(1)}
        put(outputs["a"], spec.head, 0, 2.0, CAR)
        decoder = CenterDecoder(spec, outputs)
        assert len(decoder(outputs)) == 1
        outputs["a"][0, channel] = value
        found = decoder(outputs)
        # an infinite sine still has a direction
        assert len(found) == (1 if channel == 6 else 0) and np.isfinite(found.boxes).all()


def test_outputs_that_do_not_fit() -> None:
    spec = spec_of(group(("car",), "a"))
    good = empty(1)
    for outputs, message in (
        ({}, r"heat of group 'car': no output 'a'"),
        ({"a": good.astype(np.float64)}, "expected float32"),
        ({"a": good[0]}, r"expected float32 \[1, channels"),
        ({"a": good[:, :10]}, r"heat .* expected channels 10\.\.10, got 10 channels"),
    ):
        with pytest.raises(BundleError, match=message):
            CenterDecoder(spec, outputs)
    other = dataclasses.replace(spec.head.groups[0], velocity=Channels("b", 0))
    with pytest.raises(BundleError, match=r"velocity .* expected cells \[16, 20\], got \[4, 4\]"):
        CenterDecoder(spec_of(other), {"a": good, "b": np.zeros((1, 2, 4, 4), np.float32)})
    negative = dataclasses.replace(spec.head.groups[0], offset=Channels("a", -1))
    with pytest.raises(BundleError, match="expected channels -1"):
        CenterDecoder(spec_of(negative), {"a": good})


def test_a_spec_is_read_back() -> None:
    spec = spec_of(
        group(("car", "van"), "a", limits=(0.1, 0.2), windows=(3, 1)), group(("person",), "b", velocity=False)
    )
    text = json.dumps(schema.to_json(spec))
    assert schema.from_json(FusionSpec, json.loads(text), "spec") == spec


def test_specs_that_are_wrong() -> None:
    for rule, message in (
        ({"windows": (2, 3)}, "windows must be 1 or 3"),
        ({"windows": (3,)}, "windows must be 1 or 3, one per class"),
        ({"suppress": "soft"}, "suppress must be one of none, circle, rotated"),
        ({"limits": ()}, "limits must be one"),
        ({"limits": (0.1, 0.2), "across": True}, "limits must be one"),
        ({"limits": (1.5,)}, "between 0 and 1.0"),
        ({"limits": (float("inf"),), "suppress": "circle"}, "between 0 and inf"),
    ):
        with pytest.raises(ValueError, match=message):
            group(("car", "van"), "a", **rule)
    car = group(("car",), "a")
    for rule, message in (
        ({"rows": "z"}, "unknown rows"),
        ({"bounds": (0, 0, 0, 1, 1, 0)}, "three lows, then three highs"),
        ({"bounds": (0,)}, "three lows"),
        ({"score_threshold": 2.0}, "score_threshold"),
        ({"candidates": 0}, "candidates must be between"),
    ):
        with pytest.raises(ValueError, match=message):
            spec_of(car, **rule)
    with pytest.raises(ValueError, match="cells above 0"):
        CenterHead((car,), 0, 0, 0, 1)
    with pytest.raises(ValueError, match="at least one group"):
        CenterHead((), 0, 0, 1, 1)
    with pytest.raises(ValueError, match="labels must be those of the groups"):
        FusionSpec(spec_of(car).head, ("van",))
    with pytest.raises(ValueError, match="labels must differ"):
        spec_of(car, car)
    with pytest.raises(ValueError, match="at least one label"):
        group((), "a")


def test_it_imports_numpy_and_itself() -> None:
    found = modules_after(
        "import edgekit.tasks.fusion.decode, edgekit.tasks.fusion.metric, edgekit.tasks.fusion.agreement"
    )
    assert found - modules_after("") - set(sys.stdlib_module_names) <= {"edgekit", "numpy"}


def test_result() -> None:
    boxes = np.array([CAR, (*VAN[:7], np.nan, np.nan)], np.float32)
    result = Boxes3D(
        boxes,
        np.array([0.9, 0.25], np.float32),
        np.array([1, 7], np.int32),
        ("car", "van"),
        ("lidar", "CAM_BACK"),
        12,
    )
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (
        data["labels"] == ["van", "7"] and data["missing"] == ["lidar", "CAM_BACK"] and data["taken_ns"] == 12
    )
    assert data["boxes"][0] == pytest.approx(CAR) and data["boxes"][1][7:] == [None, None]
    assert result.caption() == "2 boxes, without lidar, CAM_BACK" and no_boxes().caption() == "0 boxes"
    few = result.above(0.5)
    assert len(few) == 1 and few.missing == result.missing and few.taken_ns == 12
    assert [(score, cls, label) for _, score, cls, label in few] == [(pytest.approx(0.9), 1, "van")]
    with pytest.raises(ValueError, match=r"boxes \[n, 9\]"):
        Boxes3D(boxes[:, :7], result.scores, result.classes)


@pytest.mark.parametrize("path", PATHS)
def test_boxes_of_a_real_scene_come_through(path: str) -> None:
    """The labels of a nuScenes frame, written into the maps of a head and read from them: none is lost or moved, as no
    two of a class overlap by IoU 0.2, and by the metric they are what they were."""
    info = json.loads((shared_data() / "nuscenes_sample" / "frame.json").read_text())
    labels = tuple(info["metainfo"]["categories"])
    things = info["data_list"][0]["instances"]
    boxes = np.array([[*t["bbox_3d"], *t["velocity"]] for t in things], np.float32)
    classes = np.array([t["bbox_label_3d"] for t in things], np.int32)
    inside = (np.abs(boxes[:, :2]) < 54).all(axis=1) & (classes >= 0)  # -1: a class that nobody asks for
    boxes, classes = boxes[inside], classes[inside]
    assert len(boxes) > 40 and len(set(classes.tolist())) > 4
    rule = {"windows": (1,), "suppress": "rotated", "limits": (0.2,)}
    groups = tuple(group((label,), label, **rule) for label in labels)
    head = CenterHead(groups, -54.0, -54.0, 0.3, 0.3)
    spec = FusionSpec(head, labels)
    outputs = {label: np.full((1, 11, 360, 360), -9, np.float32) for label in labels}
    for k, (box, cls) in enumerate(zip(boxes, classes, strict=True)):
        box = np.where(np.isnan(box), np.float32(0), box)  # an unknown velocity
        put(outputs[labels[cls]], head, 0, 1.0 + k / 100, tuple(box.astype(float)))
    with using(path):
        found = CenterDecoder(spec, outputs)(outputs)
    assert len(found) == len(boxes)
    order = np.argsort(-np.arange(len(boxes)))
    assert found.classes.tolist() == classes[order].tolist()
    np.testing.assert_allclose(found.boxes[:, :6], boxes[order, :6], atol=1e-4)
    truth = Truth(boxes, classes, np.array([t["num_lidar_pts"] for t in things])[inside])
    metric = evaluate(judge([truth], [found], labels, Rules(min_points=0)))
    assert metric["mAP"] == pytest.approx(1) and metric["ATE"] < 1e-4 and metric["AOE"] < 1e-5
