"""What the evidence says, computed on small known cases; and the cache that it leans on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.backends.onnxruntime.lower import lower
from edgekit.errors import EvidenceError
from edgekit.project import Accept
from edgekit.target import Target
from edgekit.tasks.detect.dataset import CocoSet, read_coco
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.metric import bootstrap, interval95
from edgekit.toolchain import accuracy, cache, evidence
from edgekit.toolchain.running import Running, Subject
from tests.test_onnxruntime_backend import network

LABELS = ("a", "b")


def boxes(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    """x1 y1 x2 y2 score class."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int32), LABELS)


# --- agreement ---------------------------------------------------------------------------------


def test_agreement_of_equal_and_of_empty_pictures() -> None:
    one = boxes((0, 0, 10, 10, 0.9, 0), (20, 20, 40, 40, 0.5, 1))
    got = evidence.agreement([(one, one), (boxes(), boxes())])
    assert (got["images"], got["boxes_reference"], got["boxes_matched"], got["boxes_payload"]) == (2, 2, 2, 2)
    assert got["score_shift_max"] == got["score_shift_mean"] == 0
    assert got["lost_score_max"] is None
    nothing = evidence.agreement([(boxes(), boxes())])
    assert nothing["score_shift_max"] is None and nothing["pairs"] == []


def test_agreement_counts_lost_moved_and_new_boxes() -> None:
    reference = boxes((0, 0, 10, 10, 0.9, 0), (20, 20, 40, 40, 0.8, 1), (60, 60, 80, 80, 0.7, 0))
    candidate = boxes(
        (0, 0, 10, 9, 0.8, 0),  # found, 0.1 lower
        (20, 20, 40, 40, 0.8, 0),  # another class
        (70, 60, 90, 80, 0.7, 0),  # IoU 1/3
        (100, 0, 110, 10, 0.3, 1),
    )
    got = evidence.agreement([(reference, candidate)])
    assert (got["boxes_matched"], got["boxes_payload"]) == (1, 4)
    assert got["score_shift_max"] == pytest.approx(0.1)
    assert got["score_shift_mean"] == pytest.approx(-0.1)
    assert got["lost_score_max"] == pytest.approx(0.8)


def test_a_box_is_matched_once() -> None:
    twice = boxes((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 10, 0.8, 0))
    got = evidence.agreement([(twice, boxes((0, 0, 10, 10, 0.9, 0)))])
    assert got["boxes_matched"] == 1 and got["lost_score_max"] == pytest.approx(0.8)


# --- the verdict -------------------------------------------------------------------------------


def verdict(
    accept: Accept, drop: float | None = 0.0, ap: float = 0.5, measured: bool = True, **agreed: Any
) -> dict[str, Any]:
    found = {"drop": drop, "payload": {"AP": ap}} if measured else {"not_measured": "no data"}
    known = {"boxes_matched": 10, "boxes_reference": 10, "score_shift_max": 0.01, "lost_score_max": None}
    return evidence.check_accept(found, {**known, **agreed}, accept, 0.25)


@pytest.mark.parametrize(
    ("passed", "arguments"),
    [
        (True, {"accept": Accept()}),
        (True, {"accept": Accept(max_drop=0.01), "drop": 0.01}),
        (False, {"accept": Accept(max_drop=0.01), "drop": 0.0101}),
        (True, {"accept": Accept(max_drop=0.0), "drop": -0.2}),
        (None, {"accept": Accept(), "drop": None}),
        (None, {"accept": Accept(), "measured": False}),
        (True, {"accept": Accept(min_metric=0.5)}),
        (False, {"accept": Accept(min_metric=0.51)}),
        (False, {"accept": Accept(min_metric=0.1), "measured": False}),
        (False, {"accept": Accept(min_metric=0.1), "drop": None}),
        (True, {"accept": Accept(max_score_shift=0.01)}),
        (False, {"accept": Accept(max_score_shift=0.009)}),
        (True, {"accept": Accept(max_score_shift=0.0), "score_shift_max": None}),
        # a lost box of 0.31 moved by 0.06 at least
        (True, {"accept": Accept(max_score_shift=0.07), "lost_score_max": 0.31}),
        (False, {"accept": Accept(max_score_shift=0.05), "lost_score_max": 0.31}),
        (None, {"accept": Accept(), "measured": False, "boxes_matched": 0, "lost_score_max": 0.3}),
        (False, {"accept": Accept(), "measured": False, "boxes_matched": 4, "lost_score_max": 0.9}),
        (None, {"accept": Accept(), "measured": False, "boxes_matched": 5, "lost_score_max": 0.9}),
    ],
)
def test_verdicts(passed: bool | None, arguments: dict[str, Any]) -> None:
    got = verdict(**arguments)
    assert got["passed"] is passed and got["reason"]
    if passed is False:
        with pytest.raises(EvidenceError, match="model m for t: "):
            evidence.require(got, "m", "t", False)
        kept = evidence.require(got, "m", "t", True)
        assert kept["passed"] is False and kept["allowed"] is True
    else:
        assert evidence.require(got, "m", "t", False) == got
        assert "allowed" not in evidence.require(got, "m", "t", True)


def test_all_problems_are_told_at_once() -> None:
    got = verdict(Accept(max_drop=0.0, min_metric=0.9, max_score_shift=0.0), drop=0.1)
    assert got["reason"].count(";") == 2
    assert got["max_drop"] == 0.0 and got["min_metric"] == 0.9 and got["max_score_shift"] == 0.0


# --- facts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "element"), [("float32", 4), ("float16", 2)])
def test_payload_facts(precision: str, element: int) -> None:
    (payload,) = lower(ir.from_proto(network((40, 40))), Target.load("rpi5"), precision)
    facts = evidence.payload_facts(payload)
    # biases of 40 values are below what is worth halving
    assert facts["weight_bytes"] == element * (40 * 3 * 9 + 40 * 40 * 9) + 4 * 80
    assert facts["bytes"] == len(payload.data) <= 1.05 * facts["weight_bytes"]
    assert facts["ops"]["Conv"] == 2 and facts["ops"]["Relu"] == 2
    assert json.loads(json.dumps(facts)) == facts


# --- the metric and its interval -----------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> CocoSet:
    """Twelve pictures with one object each."""
    import cv2

    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for i in range(12):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((64, 64, 3), i, np.uint8))
        tree["images"].append({"id": i + 1, "file_name": f"{i}.png", "width": 64, "height": 64})
        box = {"image_id": i + 1, "category_id": 1, "bbox": [4, 4, 40, 40], "area": 1600, "iscrowd": 0}
        tree["annotations"].append({"id": i + 1, **box})
    (tmp_path / "i.json").write_text(json.dumps(tree))
    return read_coco(tmp_path / "i.json", tmp_path, labels=LABELS)


def results(data: CocoSet, missed: int) -> list[tuple[int, Detections]]:
    """The first `missed` pictures without a box, the others right."""
    right = boxes((4, 4, 44, 44, 0.9, 0))
    return [(p.id, boxes() if i < missed else right) for i, p in enumerate(data.images)]


def test_rounds_are_paired(labelled: CocoSet) -> None:
    same = bootstrap(labelled, results(labelled, 3)), bootstrap(labelled, results(labelled, 3))
    assert same[0] == same[1] and len(same[0]) == 100
    drops = [a - b for a, b in zip(*same, strict=True) if a is not None and b is not None]
    assert interval95(drops) == (0.0, 0.0), "equal networks differ on no choice of pictures"
    worse = bootstrap(labelled, results(labelled, 4))
    drops = [a - b for a, b in zip(same[0], worse, strict=True) if a is not None and b is not None]
    low, high = interval95(drops) or (1, -1)
    assert low >= 0 and high > 0, "one that misses a picture more is nowhere better"
    alone = interval95(same[0]) or (0, 0)
    assert high - low < alone[1] - alone[0], "pairing narrows the interval"
    assert interval95([]) is None and interval95([None, None]) is None


class FakePipeline:
    """Stands for DetectPipeline; finds what it is told to."""

    runs = 0
    missed = 0

    def __init__(self, spec: Any, binding: Any) -> None:
        self.missed = binding.missed

    def __call__(self, image: np.ndarray, **_: Any) -> Detections:
        type(self).runs += 1
        return boxes() if image[0, 0, 0] < self.missed else boxes((4, 4, 44, 44, 0.9, 0))


class FakeBinding:
    def __init__(self, missed: int) -> None:
        self.missed = missed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(accuracy, "open_pipeline", FakePipeline)
    monkeypatch.setattr(accuracy, "to_json", lambda spec: spec)
    monkeypatch.setattr(FakePipeline, "runs", 0)
    (payload,) = lower(ir.from_proto(network((8,))), Target.load("rpi5"), "float32")
    (other,) = lower(ir.from_proto(network((9,))), Target.load("rpi5"), "float32")

    def measure(data: CocoSet, spec: Any = "spec", missed: int = 3, second: bool = False) -> dict[str, Any]:
        running = Running(other if second else payload, FakeBinding(missed))  # type: ignore[arg-type]
        return accuracy.measure(running, spec, data, "what", lambda *_: None)

    measure.subject = lambda: Subject(  # type: ignore[attr-defined]
        "spec",  # type: ignore[arg-type]
        Running(payload, FakeBinding(3)),  # type: ignore[arg-type]
        Running(other, FakeBinding(4)),  # type: ignore[arg-type]
    )
    return measure


def test_the_metric_of_a_payload_is_measured_once(labelled: CocoSet, fake: Any) -> None:
    first = fake(labelled)
    assert FakePipeline.runs == 12
    assert fake(labelled) == first and FakePipeline.runs == 12
    for change in ({"spec": "other"}, {"second": True}):
        fake(labelled, **change)
    assert FakePipeline.runs == 36


@pytest.mark.parametrize("what", ["tools", "sources", "cpu", "data"])
def test_whatever_decides_the_metric_is_in_its_key(
    labelled: CocoSet, fake: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fake(labelled)
    data = labelled
    if what == "tools":
        monkeypatch.setattr(cache, "tools", lambda: {"onnxruntime": "0.1"})
    elif what == "sources":
        monkeypatch.setattr(cache, "sources", lambda *_: "new code")
    elif what == "cpu":
        monkeypatch.setattr(accuracy, "cpu_name", lambda: "another")
    else:
        path = labelled.images[0].path
        path.write_bytes(labelled.images[1].path.read_bytes())
        data = read_coco(path.parent / "i.json", path.parent, labels=LABELS)
    fake(data)
    assert FakePipeline.runs == 24


def test_metric_of_both_networks(labelled: CocoSet, fake: Any) -> None:
    got = accuracy.metric(fake.subject(), labelled, lambda *_: None)
    assert got["reference"]["AP"] > got["payload"]["AP"]
    assert got["drop"] == pytest.approx(got["reference"]["AP"] - got["payload"]["AP"], abs=1e-6)
    low, high = got["drop_interval95"]
    assert low <= got["drop"] <= high
    assert got["per_class"] == {"a": pytest.approx(got["payload"]["AP"], abs=1e-4)}
    assert json.loads(json.dumps(got))["drop_interval95"] == [low, high]


def test_a_damaged_cache_entry_is_measured_again(labelled: CocoSet, fake: Any) -> None:
    first = fake(labelled)
    (entry,) = (cache.cache_dir() / "metric").glob("*.json")
    whole = entry.read_text()
    text = whole.replace(str(first["metric"]["AP"]), "0.999999", 1)
    assert text != whole
    for runs, damage in enumerate(
        (text, whole[:-9], "", "[]", '{"value": {}}', "\x00", '{"sha256": 1, "value": 2}'), 2
    ):
        entry.write_text(damage)
        assert fake(labelled) == first
        assert FakePipeline.runs == 12 * runs


# --- the cache ---------------------------------------------------------------------------------


@given(
    value=st.dictionaries(
        st.text(max_size=5),
        st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False), st.lists(st.integers(-9, 9))),
    )
)
def test_what_is_stored_comes_back(value: dict[str, Any]) -> None:
    cache.store("test", "key", value)
    assert cache.load("test", "key") == value
    assert cache.load("test", "other") is None and cache.load("other", "key") is None


def test_an_entry_under_another_name_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    cache.store("metric", "a", {"AP": 1})
    (tmp_path / "metric" / "a.json").rename(tmp_path / "metric" / "b.json")
    assert cache.load("metric", "b") is None


@pytest.mark.parametrize("place", ["a file", "below a file", "a long name"])
def test_a_cache_that_cannot_be_used_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("")
    path = {"a file": "file", "below a file": "file/deeper", "a long name": "x" * 300}[place]
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / path))
    cache.store("metric", "key", {"AP": 1})
    assert cache.load("metric", "key") is None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    assert cache.cache_dir() == tmp_path
    monkeypatch.setenv("EDGEKIT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "edgekit"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.cache_dir() == Path.home() / ".cache" / "edgekit"


def test_digests_do_not_run_parts_together() -> None:
    assert cache.digest("ab", "c") != cache.digest("a", "bc")
    assert cache.digest(b"1") != cache.digest("1") != cache.digest(1)
    assert cache.digest({"a": 1, "b": 2}) == cache.digest({"b": 2, "a": 1})
    assert cache.sources("kernels") != cache.sources("tasks") != cache.sources()
