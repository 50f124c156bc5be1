"""edgekit compare: what two sides on the same pictures differ in, as JSON and as a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgekit
from edgekit.backends.onnxruntime.wire import align_weights
from edgekit.errors import UsageError
from edgekit.toolchain import compare, compare_page
from edgekit.toolchain.page import Facts
from tests.bundle_samples import files_of, forge
from tests.cli_runs import cli, refusal
from tests.helpers import ROOT
from tests.plan_bundles import Step, network, replace_evidence, replace_file, write

STREET = "synthetic://street?seed=3&frames=3&size=320x180"
QUICK = compare.Options(images=STREET, threads=1, rounds=2)


def quiet(what: str, done: int, of: int) -> None:
    pass


def loose(path: Path, target: Path) -> Path:
    """The bundle with golden tolerances that any network meets."""

    def edit(tree: Any) -> None:
        for tensor in tree["golden"]["outputs"]:
            tensor["atol"] = 1e6

    target.write_bytes(forge(files_of(path), edit))
    return target


def layers(tree: dict[str, Any], shift: float) -> None:
    rows = [
        {
            "id": "stem",
            "op": "Conv",
            "sqnr_db": 30.0 - shift,
            "share": 0.1 + shift / 100,
            "precision": "int8",
        },
        {"id": "head", "op": "Conv", "sqnr_db": 25.0, "share": 0.4, "precision": "float32"},
        {"id": 7, "op": [], "sqnr_db": "odd", "share": None},
        "no table",
    ]
    for payload in tree["payloads"].values():
        payload["layers"] = rows


@pytest.fixture(scope="module")
def pair(host_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The shipped detector, and one whose weights were moved by 3 %, both with evidence by layer."""
    folder = tmp_path_factory.mktemp("compare")
    first = replace_evidence(Path(host_bundle), folder / "a.edge", lambda tree: layers(tree, 0.0))
    with edgekit.Bundle.open(first) as bundle:
        ((_, variant),) = bundle.manifest.variants()
        model = onnx.load_from_string(bytes(bundle.read(variant.path)))
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim == 4:
            moved = (value * (1 + 0.03 * rng.normal(size=value.shape))).astype(value.dtype)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    data = align_weights(model.SerializeToString())
    moved = replace_file(loose(first, folder / "l.edge"), folder / "m.edge", variant.path, data)
    return first, replace_evidence(moved, folder / "b.edge", lambda tree: layers(tree, 4.0))


@pytest.fixture(scope="module")
def found(pair: tuple[Path, Path]) -> compare.Comparison:
    return compare.compare(*pair, QUICK, quiet)


def test_differences_are_those_of_the_engines(found: compare.Comparison, pair: tuple[Path, Path]) -> None:
    with edgekit.open_source(STREET) as source:
        images = [np.array(frame.image) for frame in source]
    outputs: list[list[dict[str, np.ndarray]]] = []
    totals = [0, 0]
    for i, path in enumerate(pair):
        with edgekit.load(path, threads=1) as engine:
            pipeline = engine.pipeline()
            outputs.append([])
            for image in images:
                totals[i] += len(pipeline(image))
                outputs[i].append({n: a.astype(np.float64) for n, a in pipeline.session.outputs.items()})
    assert (found.record["results"]["a"], found.record["results"]["b"]) == tuple(totals)
    assert found.record["pictures"] == {"what": STREET, "count": 3}
    rows = {row["tensor"]: row for row in found.record["outputs"]["tensors"]}
    assert set(rows) == set(outputs[0][0])
    for name, row in rows.items():
        a, b = (np.stack([one[name] for one in side]) for side in outputs)
        assert row["max_abs"] == pytest.approx(np.abs(b - a).max())
        assert row["mean_abs"] == pytest.approx(np.abs(b - a).mean())
        assert row["rms"] == pytest.approx(np.sqrt(((b - a) ** 2).mean()))
        assert row["sqnr_db"] == pytest.approx(10 * np.log10((a**2).sum() / ((b - a) ** 2).sum()), abs=0.006)
        assert row["range"] == pytest.approx([a.min(), a.max()]) and row["not_finite"] == 0
        assert row["max_abs"] > 0


def test_a_bundle_equals_itself(pair: tuple[Path, Path]) -> None:
    same = compare.compare(
        pair[0], pair[0], compare.Options(images=STREET, threads=1, rounds=0), quiet
    ).record
    assert all(row["max_abs"] == 0 and row["sqnr_db"] is None for row in same["outputs"]["tensors"])
    results = same["results"]
    assert results["a"] == results["b"] == results["matched"] > 0 and results["lost"] == results["new"] == 0
    assert results["score_shift_max"] == 0 and same["size"]["ratio"] == 1
    assert same["latency"] == {"not_measured": "left out (--rounds 0)"}


@pytest.mark.parametrize(("matched", "lost", "new"), [(3, 2, 4), (5, 0, 0)])
def test_lost_are_of_a_and_new_are_of_b(matched: int, lost: int, new: int) -> None:
    agreed = {"unit": "boxes", "boxes_reference": matched + lost, "boxes_payload": matched + new}
    counted = compare.counts({**agreed, "boxes_matched": matched, "score_shift_max": 0.5, "pairs": [[1, 1]]})
    assert (counted["lost"], counted["new"], counted["score_shift_max"]) == (lost, new, 0.5)


def test_layers_are_joined_by_id(found: compare.Comparison) -> None:
    rows = {row["id"]: row for row in found.record["layers"]["layers"]}
    assert list(rows) == ["stem", "head", "7"]
    assert rows["stem"]["a"] == {"precision": "int8", "sqnr_db": 30.0, "share": 0.1}
    assert rows["stem"]["b"]["sqnr_db"] == 26.0 and rows["7"]["a"]["sqnr_db"] is None
    facts = [
        Facts({"id": "x", "op": "Conv", "sqnr_db": 9}),
        Facts({"id": "y", "op": "Add", "precision": "int8"}),
    ]
    sides: Any = tuple(
        compare.Side("", {}, "", None, None, 0, one)  # type: ignore[arg-type]
        for one in (facts[:1], facts)
    )
    joined = compare._layers(sides)["layers"]
    assert joined[1] == {
        "id": "y",
        "op": "Add",
        "a": None,
        "b": {"precision": "int8", "sqnr_db": None, "share": None},
    }
    assert (
        "A carries no evidence"
        in compare._layers((compare.dataclasses.replace(sides[0], layers=[]), sides[1]))["note"]
    )


def test_the_float_model_may_stand_on_either_side(pair: tuple[Path, Path]) -> None:
    options = compare.Options(images=STREET, threads=1, rounds=0)
    app = ROOT / "apps" / "detect"
    one = compare.compare(app, pair[1], options, quiet).record
    assert (one["a"]["kind"], one["b"]["kind"]) == ("model", "bundle")
    other = compare.compare(pair[1], app, options, quiet).record
    assert other["results"]["lost"] == one["results"]["new"]
    assert [r["max_abs"] for r in other["outputs"]["tensors"]] == [
        r["max_abs"] for r in one["outputs"]["tensors"]
    ]
    assert one["layers"]["note"] == "A carries no evidence by layer"
    with pytest.raises(UsageError, match="expected a bundle among them"):
        compare.compare(app, app, options, quiet)


def test_accuracy_of_both_on_labelled_pictures(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from edgekit.synth.coco import export_coco

    labels = export_coco(tmp_path / "set", [1, 2, 3, 4], [45], 320, 180)
    ran = cli(
        "compare",
        *pair,
        "--data",
        labels,
        "--images",
        tmp_path / "set",
        "--threads",
        1,
        "--rounds",
        1,
        "--json",
    )
    assert ran.code == 0, ran
    metric = json.loads(ran.out)["metric"]
    for side, path in zip("ab", pair, strict=True):
        alone = json.loads(
            cli("verify", path, "--data", labels, "--images", tmp_path / "set", "--threads", 1, "--json").out
        )
        assert metric[side]["AP"] == alone["metric"]["AP"]
    assert metric["difference"] == pytest.approx(metric["b"]["AP"] - metric["a"]["AP"], abs=1e-6)
    low, high = metric["difference_interval95"]
    assert low <= high and metric["images"] == 4
    assert set(metric["per_class"]) == {"car", "truck", "pedestrian", "traffic light", "traffic sign"}


# --- the verb ----------------------------------------------------------------------------------


def test_the_verb_prints_every_part(pair: tuple[Path, Path]) -> None:
    ran = cli("compare", *pair, "--images", STREET, "--threads", 1, "--rounds", 2)
    assert ran.code == 0, ran
    for needle in (
        "SQNR",
        "matched",
        "score shift",
        "3 known",
        "not measured: no labelled",
        "B / A",
        "interleaved",
    ):
        assert needle in ran.out, needle


def test_json_holds_its_contract(pair: tuple[Path, Path]) -> None:
    tree = json.loads(cli("compare", *pair, "--images", STREET, "--threads", 1, "--rounds", 2, "--json").out)
    keys = {
        "task",
        "a",
        "b",
        "pictures",
        "outputs",
        "layers",
        "results",
        "metric",
        "size",
        "latency",
        "notes",
    }
    assert set(tree) == keys
    assert set(tree["latency"]) == {"engine", "total", "machine"}
    assert tree["latency"]["total"]["rounds"] == 2 and tree["latency"]["total"]["ratio"] > 0
    assert len(tree["results"]["per_picture"]) == 3
    assert sum(one["lost"] for one in tree["results"]["per_picture"]) == tree["results"]["lost"]


def test_what_cannot_be_compared_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "o.edge", [Step("net", {"a": network("x", "y")})])
    refusal(cli("compare", pair[0], other), 2, "task 'none'")
    refusal(cli("compare", pair[0], tmp_path / "absent.edge"), 2, "no such file")
    refusal(cli("compare", pair[0], pair[1], "--variant-b", "nope"), 2, "variant 'nope'")
    refusal(cli("compare", pair[0], pair[1], "--html", pair[0]), 2, "--html")
    refusal(cli("compare", pair[0], pair[1], "--data", "x.json"), 2, "--data and --images")
    refusal(cli("compare", pair[0], pair[1], "--images", tmp_path), 2, "picture")


# --- the page ----------------------------------------------------------------------------------


class Tags(HTMLParser):
    VOID = frozenset({"meta", "img", "line", "rect", "circle", "path", "col"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(found: compare.Comparison, tmp_path: Path) -> None:
    text = compare_page.write_page(found, tmp_path / "c.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and tags.seen.count("img") == 2 * 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in tags.sources)
    for title in ("The two", "Outputs", "Results", "Pictures", "Accuracy", "Time", "Layers"):
        assert f"<h2>{title}</h2>" in text
    assert "26.0" in text and "30.0" in text, "the layers' figures"
    assert compare_page.render(found) == text


def test_the_page_shows_what_a_stranger_wrote_as_text(found: compare.Comparison) -> None:
    record = json.loads(json.dumps(found.record))
    evil = "<script>alert(1)</script>"
    record["b"]["model"] = record["layers"]["layers"][0]["id"] = record["notes"] = evil
    record["notes"] = [evil]
    record["outputs"]["tensors"][0]["tensor"] = evil
    text = compare_page.render(compare.Comparison(record, ()))
    assert "<script" not in text and text.count("&lt;script&gt;") >= 4


def test_the_page_says_what_is_missing(found: compare.Comparison) -> None:
    record = {
        **found.record,
        "outputs": {"not_compared": "the outputs differ"},
        "layers": {"not_compared": "neither carries evidence by layer"},
        "latency": {"not_measured": "left out (--rounds 0)"},
        "results": {
            **found.record["results"],
            "pairs": [],
            "score_shift_mean": None,
            "score_shift_max": None,
        },
    }
    text = compare_page.render(compare.Comparison(record, ()))
    assert len(re.findall(r"<b>Not measured\.</b>", text)) == 4
    assert "Accuracy was not measured" in text


def test_the_pictures_shown_are_those_that_differ_most(found: compare.Comparison) -> None:
    apart = [one["lost"] + one["new"] for one in found.record["results"]["per_picture"]]
    shown = [compare.counts(edgekit_agreement(one.results)) for one in found.shown]
    assert [one["lost"] + one["new"] for one in shown] == sorted(apart, reverse=True)


def edgekit_agreement(results: tuple[Any, Any]) -> dict[str, Any]:
    from edgekit import tasks

    return tasks.task("detect").agreement([results])
