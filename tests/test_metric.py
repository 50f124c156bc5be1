"""Labelled sets and average precision, against cases worked out by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import MissingExtraError, UsageError
from edgekit.tasks.detect.coco import COCO_CLASSES
from edgekit.tasks.detect.dataset import MAX_JSON_BYTES, CocoSet, Picture, Truth, read_coco
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.metric import NAMES, bootstrap_interval, evaluate
from tests.helpers import shared_data

Box = tuple[float, float, float, float]


def labelled(*pictures: list[tuple[int, Box]], labels: tuple[str, ...] = ("car", "dog")) -> CocoSet:
    """Pictures 10, 20, ... with (class, x y w h) each."""
    images = tuple(Picture(10 * (i + 1), Path(f"{i}.png"), 640, 480) for i in range(len(pictures)))
    truths = tuple(
        Truth(image.id, cls, box, box[2] * box[3], False)
        for image, objects in zip(images, pictures, strict=True)
        for cls, box in objects
    )
    return CocoSet("t", labels, images, truths, "")


def found(*rows: tuple[int, float, Box]) -> Detections:
    """(class, score, x y w h)."""
    n = len(rows)
    boxes = np.array([(x, y, x + w, y + h) for _, _, (x, y, w, h) in rows], np.float32).reshape(n, 4)
    return Detections(
        boxes, np.array([r[1] for r in rows], np.float32), np.array([r[0] for r in rows], np.int32)
    )


SMALL, MEDIUM, LARGE = (5, 5, 20, 20), (100, 100, 50, 50), (200, 200, 150, 150)


# --- the metric ---


def test_perfect_detections_score_one() -> None:
    data = labelled([(0, SMALL), (1, MEDIUM)], [(0, LARGE)])
    results = [(10, found((0, 0.9, SMALL), (1, 0.8, MEDIUM))), (20, found((0, 0.7, LARGE)))]
    got = evaluate(data, iter(results))
    assert {k: v for k, v in got.items() if k != "per_class"} == dict.fromkeys((*NAMES, "AR100"), 1.0)
    assert got["per_class"] == {"car": 1.0, "dog": 1.0}
    assert bootstrap_interval(data, results) == (1.0, 1.0)


def test_nothing_found_scores_zero() -> None:
    data = labelled([(0, MEDIUM)], [(0, MEDIUM)])
    got = evaluate(data, [])
    assert (got["AP"], got["AP_medium"], got["AR100"], got["per_class"]) == (0, 0, 0, {"car": 0})
    assert (got["AP_small"], got["AP_large"]) == (None, None), "no such object: nothing to measure, not 0"


def test_one_of_two_found() -> None:
    # recall 0.5 at precision 1: the 51 recall points 0.00 .. 0.50 of 101 count
    data = labelled([(0, MEDIUM), (0, LARGE)])
    got = evaluate(data, [(10, found((0, 0.9, MEDIUM)))])
    assert got["AP"] == pytest.approx(51 / 101, abs=1e-6)
    assert (got["AR100"], got["AP_medium"], got["AP_large"]) == (0.5, 1, 0)


def test_a_better_scored_false_box_halves_precision() -> None:
    data = labelled([(0, MEDIUM)])
    got = evaluate(data, [(10, found((0, 0.9, LARGE), (0, 0.5, MEDIUM)))])
    assert got["AP"] == pytest.approx(0.5)
    assert evaluate(data, [(10, found((0, 0.3, LARGE), (0, 0.5, MEDIUM)))])["AP"] == 1


def test_overlap_decides_by_threshold() -> None:
    # 50x50 moved by 10: IoU = 40 * 50 / (2 * 2500 - 2000) = 2/3, above 0.50 .. 0.65: 4 of 10 thresholds
    got = evaluate(labelled([(0, MEDIUM)]), [(10, found((0, 0.9, (110, 100, 50, 50))))])
    assert (got["AP"], got["AP50"], got["AP75"]) == (pytest.approx(0.4), 1, 0)


def test_the_class_must_agree() -> None:
    got = evaluate(labelled([(0, MEDIUM)], [(1, MEDIUM)]), [(10, found((1, 0.9, MEDIUM)))])
    assert got["per_class"] == {"car": 0.0, "dog": 0.0}


def test_crowds_neither_reward_nor_punish() -> None:
    data = labelled([(0, MEDIUM)])
    crowd = Truth(10, 0, LARGE, LARGE[2] * LARGE[3], True)
    data = CocoSet(data.name, data.labels, data.images, (*data.truths, crowd), "")
    got = evaluate(data, [(10, found((0, 0.9, (220, 220, 40, 40)), (0, 0.8, MEDIUM)))])
    assert got["AP"] == 1
    only = CocoSet(data.name, data.labels, data.images, (crowd,), "")
    assert evaluate(only, [(10, found((0, 0.9, LARGE)))])["AP"] is None, "a crowd alone measures nothing"
    assert bootstrap_interval(only, []) is None


def test_objects_too_rare_to_be_drawn_have_no_interval() -> None:
    data = labelled([(0, MEDIUM)], *[[] for _ in range(400)])
    results = [(10, found((0, 0.9, MEDIUM)))]
    assert evaluate(data, results)["AP"] == 1
    seed = next(s for s in range(9) if 0 not in np.random.default_rng(s).integers(0, 401, 401))
    assert bootstrap_interval(data, results, rounds=1, seed=seed) is None
    assert bootstrap_interval(data, results, rounds=50) == (1.0, 1.0)


def test_a_set_without_objects_has_no_metric() -> None:
    data = labelled([])
    got = evaluate(data, [(10, found((0, 0.9, MEDIUM)))])
    assert got == {**dict.fromkeys((*NAMES, "AR100")), "per_class": {}}
    assert bootstrap_interval(data, []) is None
    json.dumps(got, allow_nan=False)


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ([(11, found())], "not in the data"),
        ([(10, found()), (10, found())], "repeated"),
        ([(10, found((2, 0.5, MEDIUM)))], "outside the data's 2 classes"),
        ([(10, found((-1, 0.5, MEDIUM)))], "outside"),
        ([(10, found((0, np.nan, MEDIUM)))], "not finite"),
        ([(10, found((0, 0.5, (0, 0, np.inf, 1))))], "not finite"),
    ],
)
def test_results_that_do_not_belong_are_refused(results: list[tuple[int, Detections]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate(labelled([(0, MEDIUM)]), results)


def noisy(pictures: int, seed: int = 0) -> tuple[CocoSet, list[tuple[int, Detections]]]:
    """Random objects, some missed, some moved, some invented."""
    rng = np.random.default_rng(seed)
    objects: list[list[tuple[int, Box]]] = []
    results = []
    for i in range(pictures):
        here: list[tuple[int, Box]] = []
        rows: list[tuple[int, float, Box]] = []
        for _ in range(rng.integers(1, 5)):
            x, y, w, h = (float(v) for v in rng.uniform((0, 0, 15, 15), (400, 300, 150, 150)))
            cls = int(rng.integers(2))
            here.append((cls, (x, y, w, h)))
            if rng.random() < 0.8:
                dx, dy = (float(v) for v in rng.normal(0, 0.06, 2) * (w, h))
                rows.append((cls, float(rng.uniform(0.2, 1)), (x + dx, y + dy, w, h)))
        if rng.random() < 0.5:
            rows.append((int(rng.integers(2)), float(rng.uniform(0, 0.8)), (10, 10, 60, 60)))
        rows.sort(key=lambda row: -row[1])
        objects.append(here)
        results.append((10 * (i + 1), found(*rows)))
    return labelled(*objects), results


def test_the_interval_is_seeded_holds_the_ap_and_narrows_with_more_pictures() -> None:
    widths = []
    for pictures in (12, 192):
        data, results = noisy(pictures)
        ap = evaluate(data, results)["AP"]
        interval = bootstrap_interval(data, results)
        assert interval is not None
        assert interval[0] < ap < interval[1]
        assert interval == bootstrap_interval(data, results)
        assert interval != bootstrap_interval(data, results, seed=1)
        widths.append(interval[1] - interval[0])
    # the error of a mean falls with the root of the sample: 16 times the pictures, about a quarter
    assert widths[1] < 0.5 * widths[0]


def test_evaluating_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    data, results = noisy(4)
    evaluate(data, results)
    bootstrap_interval(data, results, rounds=3)
    assert capfd.readouterr() == ("", "")


def test_without_pycocotools_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        evaluate(labelled([(0, MEDIUM)]), [])


# --- labelled sets ---


def tree() -> dict[str, Any]:
    """Two pictures, three boxes, category ids with a gap and out of order."""
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 64, "height": 48},
            {"id": 3, "file_name": "sub/a.png", "width": 32, "height": 24},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 10.5},
            {"id": 2, "image_id": 3, "category_id": 2, "bbox": [1.5, 2, 3, 4], "iscrowd": 1},
            {"id": 3, "image_id": 3, "category_id": 2, "bbox": [0, 0, 0, 0]},
        ],
        "categories": [{"id": 9, "name": "Dog"}, {"id": 2, "name": "traffic light"}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def written(folder: Path, content: Any) -> Path:
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refused(folder: Path, content: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read_coco(written(folder, content), folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_classes_follow_the_category_ids(folder: Path) -> None:
    data = read_coco(written(folder, tree()), folder)
    assert data.labels == ("traffic light", "Dog")
    assert [(p.id, p.path, p.width, p.height) for p in data.images] == [
        (7, folder / "b.png", 64, 48),
        (3, folder / "sub/a.png", 32, 24),
    ]
    assert [(t.image_id, t.cls, t.box, t.area, t.crowd) for t in data.truths] == [
        (7, 1, (1, 2, 3, 4), 10.5, False),
        (3, 0, (1.5, 2, 3, 4), 12, True),
        (3, 0, (0, 0, 0, 0), 0, False),
    ]


def test_limit_takes_the_first(folder: Path) -> None:
    data = read_coco(written(folder, tree()), folder, limit=1)
    assert [p.id for p in data.images] == [7] and len(data.truths) == 1


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("dog", "cat", "Traffic_Light"), [0, 2, 2]),  # by name, spelling aside, in the model's order
        (("class_0", "class_1"), [1, 0, 0]),  # names that say nothing: by order
        (("0", "1"), [1, 0, 0]),
    ],
)
def test_categories_are_matched_to_the_model(
    folder: Path, labels: tuple[str, ...], classes: list[int]
) -> None:
    data = read_coco(written(folder, tree()), folder, labels=labels)
    assert data.labels == labels and [t.cls for t in data.truths] == classes


def test_categories_that_say_nothing_are_matched_by_order(folder: Path) -> None:
    plain = tree()
    plain["categories"] = [{"id": 9, "name": "class_1"}, {"id": 2, "name": "class_0"}]
    assert [t.cls for t in read_coco(written(folder, plain), folder, labels=("cat", "dog")).truths] == [
        1,
        0,
        0,
    ]


def test_other_names_of_coco_classes_are_known(folder: Path) -> None:
    other = tree()
    other["categories"] = [{"id": 9, "name": "motorbike"}, {"id": 2, "name": "tv"}]
    data = read_coco(written(folder, other), folder, labels=("TVmonitor", "dog", "motorcycle"))
    assert [t.cls for t in data.truths] == [2, 0, 0]


def test_a_category_without_boxes_needs_no_class(folder: Path) -> None:
    extra = tree()
    extra["categories"].append({"id": 0, "name": "all objects"})
    data = read_coco(written(folder, extra), folder, labels=("traffic light", "dog"))
    assert [t.cls for t in data.truths] == [1, 0, 0]


def test_a_mismatch_is_said_shortly(folder: Path) -> None:
    says = refused(folder, tree(), labels=tuple(f"some thing {i}" for i in range(80)))
    assert "80 classes" in says and "'some thing 0'" in says and len(says) < 300 + len(str(folder))
    says = refused(folder, tree(), labels=("trafic light", "dog", "cat"))
    assert "Did you mean 'trafic light'?" in says


@pytest.mark.parametrize("labels", [("dog", "cat"), ("bus", "truck"), ("a", "b", "c"), ("dog",)])
def test_categories_the_model_does_not_have_are_refused(folder: Path, labels: tuple[str, ...]) -> None:
    says = refused(folder, tree(), labels=labels)
    assert "'traffic light' is not a class of the model (2 categories" in says


def test_the_digest_says_what_was_measured(folder: Path) -> None:
    path = written(folder, tree())
    first = read_coco(path, folder).digest
    assert read_coco(path, folder).digest == first
    assert read_coco(path, folder, limit=1).digest != first
    (folder / "b.png").write_bytes(b"other")
    assert read_coco(path, folder).digest != first


def spoiled() -> Iterator[tuple[str, Any, str]]:
    for key in ("images", "annotations", "categories"):
        broken = tree()
        del broken[key]
        yield f"no {key}", broken, f"'{key}'"
        yield f"{key} a number", {**tree(), key: 3}, f"'{key}'"
        yield f"{key} of numbers", {**tree(), key: [3]}, "not COCO instances"
    for key, items in (("images", ("id", "file_name", "width")), ("annotations", ("bbox", "category_id"))):
        for item in items:
            broken = tree()
            del broken[key][0][item]
            yield f"no {key}.{item}", broken, f"'{item}'"
    yield "not JSON", "{", "not JSON"
    yield "empty", "", "not JSON"
    yield "a list", "[]", "expected a list"
    yield "deep", "[" * 100_000, "not JSON"
    yield "no pictures", {**tree(), "images": [], "annotations": []}, "lists no pictures"
    for box in ([1, 2, 3], [1, 2, 3, "x"], None, [1, 2, 3, float("nan")], [1, 2, float("inf"), 4]):
        broken = tree()
        broken["annotations"][0]["bbox"] = box
        yield f"box {box}", broken, "not COCO instances"
    for key, value, says in (
        ("category_id", 77, "77"),
        ("image_id", 78, "the first is 78"),
    ):
        broken = tree()
        broken["annotations"][0][key] = value
        yield f"{key} {value}", broken, says
    for box in ([1, 2, -3, 4], [1, 2, 3, -4]):
        broken = tree()
        broken["annotations"][0]["bbox"] = box
        yield f"box {box}", broken, "expected finite x y width height"
    for key, item, value, says in (
        ("annotations", "area", float("nan"), "an area of nan"),
        ("annotations", "area", -1, "an area of -1"),
        ("images", "width", 0, "0x48 pixels"),
        ("images", "height", "tall", "not COCO instances"),
        ("images", "file_name", "a" * 5000, "are not in"),
        ("images", "file_name", "a\0b.png", "are not in"),
        ("categories", "id", 2, "1 category ids are there twice"),
    ):
        broken = tree()
        broken[key][0][item] = value
        yield f"{item} {str(value)[:9]!r}", broken, says
    for name in ("../b.png", "/etc/passwd", ""):
        broken = tree()
        broken["images"][0]["file_name"] = name
        yield f"file {name!r}", broken, "leads out"
    broken = tree()
    broken["images"][0]["file_name"] = "gone.png"
    yield "a missing picture", broken, "1 of 2 pictures are not in"
    broken = tree()
    broken["images"][0]["id"] = 3
    broken["annotations"][0]["image_id"] = 3
    yield "ids twice", broken, "twice"


@pytest.mark.parametrize(("content", "says"), [pytest.param(c, s, id=n) for n, c, s in spoiled()])
def test_bad_annotation_files_are_one_line(folder: Path, content: Any, says: str) -> None:
    assert says in refused(folder, content)


def test_a_huge_file_is_refused_unread(folder: Path) -> None:
    with (folder / "instances.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse
    with pytest.raises(UsageError, match="larger than 1024 MiB"):
        read_coco(folder / "instances.json", folder)


def test_a_device_is_refused_unread(folder: Path) -> None:
    with pytest.raises(UsageError, match="not a file"):
        read_coco(Path("/dev/zero"), folder)


def test_a_byte_order_mark_is_no_damage(folder: Path) -> None:
    (folder / "x.json").write_text(json.dumps(tree()), encoding="utf-8-sig")
    assert len(read_coco(folder / "x.json", folder).images) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_without_pictures_is_refused(folder: Path, limit: int) -> None:
    assert f"limit {limit}" in refused(folder, tree(), limit=limit)


def test_files_that_are_no_text_are_one_line(folder: Path) -> None:
    (folder / "x.json").write_bytes(b"\xff\xfe\0")
    for path in (folder / "x.json", folder / "gone.json", folder):
        with pytest.raises(UsageError) as caught:
            read_coco(path, folder)
        assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    where=st.sampled_from([(k, i) for k, items in tree().items() for i in (None, *items[0])]),
    value=JSON,
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_or_refused(folder: Path, where: tuple[str, str | None], value: Any) -> None:
    broken = tree()
    if where[1] is None:
        broken[where[0]] = value
    else:
        broken[where[0]][0][where[1]] = value
    reason = ""
    try:
        read_coco(written(folder, broken), folder)
    except UsageError as error:
        reason = str(error)
    assert "\n" not in reason


@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_in_one_line(folder: Path, content: bytes) -> None:
    (folder / "x.json").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_coco(folder / "x.json", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.shared
def test_real_coco_files_agree_with_pycocotools() -> None:
    """AP of jittered truths equals what the reference tool says of the file itself."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    root = shared_data() / "coco_mini"
    data = read_coco(root / "instances_val_a.json", root / "val_a", labels=COCO_CLASSES)
    assert (len(data.images), len(data.labels)) == (94, 80)
    rng = np.random.default_rng(0)
    results = []
    for image in data.images:
        rows = []
        for t in data.truths:
            if t.image_id == image.id and rng.random() < 0.8:
                x, y, w, h = t.box
                rows.append((t.cls, float(np.float32(rng.random())), (x + 0.1 * w * rng.normal(), y, w, h)))
        results.append((image.id, found(*rows)))
    ids = json.loads((root / "instances_val_a.json").read_text())["categories"]
    category = sorted(c["id"] for c in ids)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "instances_val_a.json"))
        rows_json = [
            {
                "image_id": i,
                "category_id": category[int(c)],
                "bbox": [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])],
                "score": float(s),
            }
            for i, d in results
            for b, s, c in zip(d.boxes, d.scores, d.classes, strict=True)
        ]
        reference = COCOeval(truth, truth.loadRes(rows_json), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    got = evaluate(data, results)
    assert [got[n] for n in NAMES] == pytest.approx(list(reference.stats[:6]), abs=1e-6)
    assert got["AR100"] == pytest.approx(reference.stats[8], abs=1e-6)
