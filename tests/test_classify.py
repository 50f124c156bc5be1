"""The task classify: Softmax cut, scores, metric, agreement, and the whole way through the verbs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import edgekit
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, CalibrationError, EvidenceError, ModelError, UsageError
from edgekit.passes import prepare, probe
from edgekit.project import Accept, open_project, with_options
from edgekit.tasks.classify.agreement import agreement
from edgekit.tasks.classify.classification import Classification
from edgekit.tasks.classify.dataset import ClassSet, Item
from edgekit.tasks.classify.metric import accuracy, bootstrap, evaluate
from edgekit.tasks.classify.pipeline import ClassifyPipeline
from edgekit.tasks.classify.spec import ClassifySpec
from edgekit.tasks.interval import interval95
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.toolchain import build as main_path
from edgekit.toolchain import evidence
from edgekit.toolchain.data import calibration_feeds
from tests.classifiers import COLORS, RULE, SIZE, WORDS, folder_per_class, network, pictures
from tests.cli_runs import cli, refusal
from tests.helpers import shared_data
from tests.test_lean_import import modules_after

# --- the Softmax cut -----------------------------------------------------------------------------


def host_scores(model: onnx.ModelProto) -> tuple[Any, np.ndarray, np.ndarray]:
    """(prepared, scores of the original, scores that the host computes)."""
    original = ir.from_proto(model)
    prepared = prepare(original, task="classify")
    feeds, want = probe.finite_pictures(original)
    (values,) = probe.evaluate(prepared.model, feeds).values()
    got = values.reshape(-1)
    if prepared.activation == "softmax":
        got = np.exp(got - got.max()) / np.exp(got - got.max()).sum()
    return prepared, next(iter(want.values())).reshape(-1), got


@pytest.mark.parametrize(("tail", "opset"), [("Softmax", 13), ("Softmax", 11), ("reshaped", 13)])
def test_a_softmax_is_cut_and_the_host_computes_the_same(tail: str, opset: int) -> None:
    prepared, want, got = host_scores(network(tail, opset))
    assert prepared.activation == "softmax" and "Softmax" not in {n.op_type for n in prepared.model.graph}
    assert [o.name for o in prepared.model.graph.outputs] == ["y"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    (record,) = [r for r in prepared.log if r.name == "split_softmax"]
    assert record.max_abs_diff is not None and record.max_abs_diff < 1e-6 and "Softmax" in record.note


def test_a_logsoftmax_is_cut_too() -> None:
    prepared, want, got = host_scores(network("LogSoftmax"))
    assert prepared.activation == "softmax"
    np.testing.assert_allclose(got, np.exp(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tail", "activation", "word"),
    [("none", "softmax", "logits"), ("Sigmoid", "none", "Sigmoid"), ("spelled", "none", "add up to 1")],
)
def test_other_tails_stay(tail: str, activation: str, word: str) -> None:
    model = network(tail)
    prepared, want, got = host_scores(model)
    assert prepared.activation == activation and word in prepared.notes[0]
    assert len(prepared.model.graph) >= len(model.graph.node) - 1
    if activation == "none":
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_a_softmax_over_another_axis_stays() -> None:
    """[1, 3, 1, 1] over the last axis: always 1, and cutting it would change everything."""
    model = network("reshaped")
    model.graph.node[-2].input[0], model.graph.node[-2].output[0] = "q", "y"
    model.graph.node[-1].input[0], model.graph.node[-1].output[0] = "logits", "q"
    nodes = [*list(model.graph.node)[:-2], model.graph.node[-1], model.graph.node[-2]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    prepared = prepare(ir.from_proto(model), task="classify")
    assert "Softmax" in {n.op_type for n in prepared.model.graph}


def test_several_outputs_are_left_alone_and_refused_by_the_build(tmp_path: Path) -> None:
    model = network()
    model.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 3]))
    assert len(prepare(ir.from_proto(model), task="classify").model.graph.outputs) == 2
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match=r"expected one output \[1, classes\]"):
        edgekit.build(tmp_path / "m.onnx", task="classify", preprocess=RULE, out=tmp_path / "out")


# --- scores --------------------------------------------------------------------------------------


class FakeSession:
    """Gives what it is told to."""

    def __init__(self, values: list[float]) -> None:
        self.inputs = {"x": np.zeros((1, 3, SIZE, SIZE), np.float32)}
        self.outputs = {"y": np.array([values], np.float32)}

    def run(self) -> None: ...


PREPROCESS = ImagePreprocess(SIZE, SIZE, resize="stretch", color="rgb")
BLANK = np.zeros((SIZE, SIZE, 3), np.uint8)


def fake(values: list[float], **options: Any) -> ClassifyPipeline:
    labels = tuple(f"class_{i}" for i in range(len(values)))
    return ClassifyPipeline(ClassifySpec(PREPROCESS, "y", labels, **options), FakeSession(values))


def test_top_k_thresholds_and_ties() -> None:
    got = fake([0.0, 2.0, 2.0, -1.0, 1.0], top_k=3)(BLANK)
    assert got.classes.tolist() == [1, 2, 4], "of equal scores the lower class first"
    want = np.exp([0, 2, 2, -1, 1]) / np.exp([0, 2, 2, -1, 1]).sum()
    np.testing.assert_allclose(got.all_scores, want, rtol=1e-6)
    np.testing.assert_allclose(got.scores, want[[1, 2, 4]], rtol=1e-6)
    assert [label for _, _, label in got] == ["class_1", "class_2", "class_4"]
    pipeline = fake([0.1, 0.7, 0.2], activation="none")
    assert pipeline(BLANK).scores.tolist() == pytest.approx([0.7, 0.2, 0.1])
    assert len(pipeline(BLANK, score_threshold=0.5)) == 1 and len(pipeline(BLANK, top_k=2)) == 2
    assert len(pipeline(BLANK, score_threshold=0.9)) == 0


def test_large_logits_do_not_overflow() -> None:
    got = fake([1e4, -1e4, 0.0])(BLANK)
    assert got.all_scores.tolist() == [1.0, 0.0, 0.0]


def test_the_result_as_json_and_as_a_picture() -> None:
    result = fake([3.0, 0.0, 1.0], top_k=2)(BLANK)
    text = json.loads(json.dumps(result.to_json()))
    assert text["classes"] == [0, 2] and text["labels"] == ["class_0", "class_2"]
    assert text["scores"] == pytest.approx([0.843795, 0.114195], abs=1e-6)
    shown = result.draw(BLANK)
    assert shown.dtype == np.uint8 and shown.shape == (240, 240, 3), "enlarged by a whole factor"
    assert shown.any() and not BLANK.any()
    wide = np.full((300, 400, 3), 200, np.uint8)
    assert result.draw(wide).shape == wide.shape and (wide == 200).all()
    assert (result.draw(wide)[60:] == 200).all(), "only a strip at the top"
    with pytest.raises(ValueError, match="uint8"):
        result.draw(wide.astype(np.float32))
    assert result.caption() == "class_0 84%, class_2 11%"


def test_a_spec_that_does_not_fit_its_network() -> None:
    with pytest.raises(BundleError, match="expected 2 values in output 'y', got 3"):
        ClassifyPipeline(ClassifySpec(PREPROCESS, "y", ("a", "b")), FakeSession([0, 0, 0]))
    with pytest.raises(BundleError, match="got nothing"):
        ClassifyPipeline(ClassifySpec(PREPROCESS, "z", ("a",)), FakeSession([0]))
    wrong = dataclasses.replace(PREPROCESS, width=8)
    with pytest.raises(BundleError, match="does not fit"):
        ClassifyPipeline(ClassifySpec(wrong, "y", ("a",)), FakeSession([0]))
    with pytest.raises(UsageError, match="uint8"):
        fake([0, 1])(BLANK.astype(np.float32))


# --- the metric ------------------------------------------------------------------------------------


def labelled(*classes: int, count: int = 7) -> ClassSet:
    items = tuple(Item(c, None, i) for i, c in enumerate(classes))
    arrays = np.zeros((len(classes), 4, 4, 3), np.uint8)
    return ClassSet("set", tuple(f"c{i}" for i in range(count)), items, "digest", arrays)


def test_accuracy_of_known_answers() -> None:
    data = labelled(0, 0, 1, 2, 2)
    got = accuracy(data, [(0, 0), (3, 4), (1, 0), (1, 5), (1, 1)])
    assert (got["top1"], got["top5"]) == (0.4, 0.8)
    assert got["per_class"] == {"c0": 0.5, "c1": 1.0, "c2": 0.0}
    assert got["confusions"][0] == {"truth": "c2", "answer": "c1", "pictures": 2}
    assert sum(c["pictures"] for c in got["confusions"]) == 3
    assert accuracy(labelled(0, count=5), [(0, 0)])["top5"] is None, "always right with five classes"


def test_the_rank_counts_equal_scores_as_the_result_lists_them() -> None:
    pipeline = fake([1.0, 3.0, 3.0, 2.0, 0, 0, 0])
    metric, answers = evaluate(pipeline, labelled(1, 2, 3, 0, 6))
    assert answers == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 6)]
    assert (metric["top1"], metric["top5"]) == (0.2, 0.8)


def test_rounds_of_two_networks_are_paired() -> None:
    data = labelled(*[0] * 40)
    good = [(0, 0)] * 36 + [(1, 1)] * 4
    worse = [(0, 0)] * 34 + [(1, 1)] * 6
    first, second = bootstrap(data, good), bootstrap(data, worse)
    assert first == bootstrap(data, good) and len(first) == 1000
    drops = [a - b for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    low, high = interval95(drops) or (1, -1)
    assert low >= 0 and high > 0.05, "two more mistakes are nowhere better"
    alone = interval95(first) or (0, 0)
    assert alone[0] < 0.9 < alone[1]


# --- agreement and the verdict ---------------------------------------------------------------------


def scored(*scores: float) -> Classification:
    values = np.array(scores, np.float32)
    order = np.argsort(-values)
    return Classification(order.astype(np.int32), values[order], values)


def test_agreement_of_answers() -> None:
    same = scored(0.7, 0.2, 0.1)
    got = agreement([(same, same), (same, scored(0.6, 0.3, 0.1))])
    assert (got["answers_reference"], got["answers_matched"], got["unit"]) == (2, 2, "answers")
    assert got["score_shift_max"] == pytest.approx(0.1) and got["lost_score_max"] is None
    got = agreement([(same, scored(0.3, 0.6, 0.1)), (scored(0.4, 0.35, 0.25), scored(0.3, 0.4, 0.3))])
    assert got["answers_matched"] == 0
    assert got["score_shift_max"] == pytest.approx(0.4) and got["score_shift_mean"] == pytest.approx(-0.25)
    assert got["lost_score_max"] == pytest.approx(0.25), "half the lead of 0.5"
    assert got["pairs"][0] == [0.7, 0.3]
    assert evidence.agreement([(same, same)]) == agreement([(same, same)])


@pytest.mark.parametrize(
    ("passed", "accept", "found", "candidate"),
    [
        (True, Accept(max_drop=0.005), {"drop": 0.005}, (0.7, 0.2, 0.1)),
        (False, Accept(max_drop=0.005), {"drop": 0.006}, (0.7, 0.2, 0.1)),
        (True, Accept(max_score_shift=0.11), {"drop": 0.0}, (0.6, 0.3, 0.1)),
        (False, Accept(max_score_shift=0.09), {"drop": 0.0}, (0.6, 0.3, 0.1)),
        (False, Accept(min_metric=0.8), {"drop": 0.0}, (0.7, 0.2, 0.1)),
        (None, Accept(), {"not_measured": "no data"}, (0.7, 0.2, 0.1)),
        (False, Accept(), {"not_measured": "no data"}, (0.1, 0.2, 0.7)),
    ],
)
def test_verdicts(
    passed: bool | None, accept: Accept, found: dict[str, Any], candidate: tuple[float, ...]
) -> None:
    if "drop" in found:
        found |= {"name": "top1", "payload": {"top1": 0.75}}
    agreed = agreement([(scored(0.7, 0.2, 0.1), scored(*candidate))] * 4)
    got = evidence.check_accept(found, agreed, accept, 0.0)
    assert got["passed"] is passed, got
    if passed is False and "drop" in found and found["drop"] > 0.005:
        assert got["reason"].startswith("top1 dropped by 0.0060")


# --- the whole way ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.onnx, a folder per class (12 pictures, 3 of them labelled wrongly) and an array file."""
    root = tmp_path_factory.mktemp("classify")
    onnx.save(network(), str(root / "net.onnx"))
    images, classes = pictures(12, size=20)
    folder_per_class(root / "val", images, np.where(np.arange(12) < 3, (classes + 1) % 3, classes))
    x, y = pictures(30, seed=1)
    names = np.array(COLORS)
    np.savez(root / "set.npz", x_train=x[:18], y_train=y[:18], x_test=x[18:], y_test=y[18:], classes=names)
    return root


@pytest.fixture(scope="module")
def bundle(data: Path) -> Path:
    """Built by the command line."""
    ran = cli("build", data / "net.onnx", "--target", "host", *WORDS, "--data", data / "val",
              "--out", data / "dist", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    return Path(json.loads(ran.out)["bundles"][0]["path"])


def test_the_evidence_of_a_classifier(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        record, manifest = opened.evidence, opened.manifest
    assert manifest.task == "classify" and manifest.pipeline["labels"] == ["blue", "green", "red"]
    assert [step.name for step in manifest.plan] == ["classifier"]
    assert record["metric"]["name"] == "top1" and record["metric"]["drop"] == 0
    assert record["accept"]["passed"] is True
    assert record["graph"]["head"]["activation"] == "softmax"
    assert record["agreement"]["answers_matched"] == record["agreement"]["answers_reference"] == 12
    # the folders are in alphabetical order and the network's classes are not: a network must be told
    assert record["metric"]["payload"]["top1"] < 0.5
    assert "taken from val" in record["graph"]["labels"]


def test_names_make_the_metric_right(data: Path, tmp_path: Path) -> None:
    (data / "names.txt").write_text("\n".join(COLORS))
    ran = cli("build", data / "net.onnx", "--target", "host", *WORDS, "--data", data / "val",
              "--classes", data / "names.txt", "--out", tmp_path)  # fmt: skip
    assert ran.code == 0 and "top1 0.750 (float 0.750) on 12 pictures" in ran.out
    with Bundle.open(tmp_path / "net.host.edge") as opened:
        metric = opened.evidence["metric"]
    assert metric["payload"]["top1"] == 0.75 and metric["payload"]["top5"] is None
    assert metric["interval95"][0] < 0.75 < metric["interval95"][1]
    assert {c["pictures"] for c in metric["confusions"]} == {1}
    # verify measures the same, and knows the float network's figure for the very pictures
    ran = cli("verify", tmp_path / "net.host.edge", "--data", data / "val", "--json")
    got = json.loads(ran.out)
    assert got["metric"]["top1"] == 0.75 and got["reference"]["top1"] == 0.75
    ran = cli("verify", tmp_path / "net.host.edge", "--data", data / "set.npz")
    assert "top1 1.0000" in ran.out and "float" not in ran.out.replace("float32", "")


def test_run_bench_report_and_inspect(bundle: Path, data: Path, tmp_path: Path) -> None:
    source = data / "val" / "red"
    ran = cli("run", bundle, "--source", source, "--sink", tmp_path / "found.jsonl", "--sink", f"{tmp_path}/shown/",
              "--sink", tmp_path / "a.mp4", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    frames = len(list(source.iterdir()))
    assert json.loads(ran.out)["frames"] == frames and json.loads(ran.out)["classes"] == 3 * frames
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert len(lines) == frames and all(set(line["labels"]) == set(COLORS) for line in lines)
    assert lines[0]["scores"] == sorted(lines[0]["scores"], reverse=True)
    assert len(list((tmp_path / "shown").iterdir())) == frames and (tmp_path / "a.mp4").stat().st_size > 0
    ran = cli("run", bundle, "--source", source, "--score", "0.9")
    assert ran.code == 0 and f"{frames} frames, " in ran.out and " classes in " in ran.out
    ran = cli("bench", bundle, "--runs", "3", "--warmup", "1", "--json")
    assert json.loads(ran.out)["stages"]["decode"]["runs"] == 3
    assert cli("report", bundle, "--out", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    for text in ("Answers found again", "12 answers", "Most frequent mistakes", "softmax", "best 5", "top1"):
        assert text in page, text
    assert "boxes" not in page.lower() and page.count("data:image/jpeg") == 3
    ran = cli("inspect", bundle)
    assert "net (classify) for host" in ran.out and "metric.payload.top1" in ran.out
    with edgekit.load(bundle) as engine:
        result = engine.predict(np.full((9, 9, 3), (255, 0, 0), np.uint8))
    assert isinstance(result, edgekit.Classification) and result.classes[0] == 2, "BGR in, RGB network"


def test_a_project_builds_as_the_options_do(bundle: Path, data: Path, tmp_path: Path) -> None:
    text = f"""
[project]
name = "p"
[[model]]
name = "net"
source = {json.dumps(str(data / "net.onnx"))}
task = "classify"
[model.preprocess]
resize = "stretch"
color = "rgb"
mean = [0.0, 0.0, 0.0]
std = [1.0, 1.0, 1.0]
[model.evaluation]
data = {json.dumps(str(data / "val"))}
"""
    (tmp_path / "edgekit.toml").write_text(text)
    (built,) = edgekit.build(tmp_path, out=tmp_path / "out")
    with built, Bundle.open(bundle) as other:
        assert built.payload_digest == other.payload_digest
    (tmp_path / "edgekit.toml").write_text(text + "[model.thresholds]\ntop_k = 1\nscore = 0.4\n")
    (built,) = edgekit.build(tmp_path, out=tmp_path / "out")
    with built:
        assert (built.manifest.pipeline["top_k"], built.manifest.pipeline["score_threshold"]) == (1, 0.4)
    (tmp_path / "edgekit.toml").write_text(text + "[model.thresholds]\niou = 0.5\n")
    with pytest.raises(UsageError, match=r"thresholds.iou: the task classify has none"):
        edgekit.build(tmp_path, out=tmp_path / "out")


def test_the_boards_get_it_too(data: Path, tmp_path: Path) -> None:
    built = edgekit.build(data / "net.onnx", ["rpi5", "jetson-orin"], task="classify", preprocess=RULE,
                          data=data / "set.npz", out=tmp_path)  # fmt: skip
    for one in built:
        with one:
            assert one.evidence["metric"]["payload"]["top1"] == 1.0
            assert one.evidence["metric"]["data"].endswith("set.npz")


def test_a_damaged_payload_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = main_path.prove

    def prove(work: Any, target: Any, payloads: Any, *rest: Any) -> Any:
        (payload,) = payloads
        model = onnx.load_from_string(payload.data)
        tensor = next(t for t in model.graph.initializer if list(t.dims) == [3, 3])
        rolled = np.roll(numpy_helper.to_array(tensor), 1, axis=0)
        tensor.CopyFrom(numpy_helper.from_array(rolled, tensor.name))
        changed = dataclasses.replace(payload, data=model.SerializeToString())
        return original(work, target, (changed,), *rest)

    monkeypatch.setattr(main_path, "prove", prove)
    options: dict[str, Any] = {"task": "classify", "preprocess": RULE, "out": tmp_path / "out"}
    with pytest.raises(EvidenceError, match=r"top1 dropped by 1\.0000"):
        edgekit.build(data / "net.onnx", data=data / "set.npz", **options)
    with pytest.raises(EvidenceError, match=r"only 0 of the float network's \d+ answers are found again"):
        edgekit.build(data / "net.onnx", calibration=data / "set.npz", **options)
    assert not list((tmp_path / "out").glob("*.edge"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--task", "classify"), ("resize, color, mean, std", "--resize --color --mean --std")),
        (WORDS[:4], ("expected color, mean, std",)),
        (("--task", "clasify"), ("classify", "did you mean")),
        ((*WORDS, "--head", "yolox"), ("head 'yolox' is a detector's",)),
        ((*WORDS, "--data", "nowhere.npz"), ("nowhere.npz", "no such file")),
        ((*WORDS, "--data", "i.json"), ("both or neither",)),
        ((*WORDS[:2], "--resize", "squash"), ("squash", "stretch, crop")),
        ((*WORDS[:2], "--resize", "stretch:9"), ("crop:PIXELS",)),
        ((*WORDS[:2], "--resize", "crop:8", *WORDS[4:]), ("shorter_side 8", "16")),
        (("--mean", "1,2"), ("--mean 1,2", "a number, or three")),
        (("--std", "nan"), ("--std nan",)),
        (("--std", "0", *WORDS[:-2]), ("std must not be 0",)),
    ],
)
def test_refusals(data: Path, tmp_path: Path, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    ran = cli("build", data / "net.onnx", "--target", "host", "--out", tmp_path / "out", *words)
    refusal(ran, 2, *parts)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_detector_and_a_classifier_are_told_apart(data: Path, tmp_path: Path) -> None:
    refusal(cli("build", data / "net.onnx", "--target", "host", "--out", tmp_path), 2, "--task classify")


# --- calibration -----------------------------------------------------------------------------------


def test_arrays_are_calibrated_on_their_training_part(data: Path, bundle: Path) -> None:
    project = with_options(
        open_project(data / "net.onnx"),
        task="classify",
        data=data / "set.npz",
        calibration=str(data / "set.npz"),
    )
    (entry,) = project.models
    spec = ClassifySpec(PREPROCESS, "y", COLORS)
    feeds = calibration_feeds(entry, spec, input_name="x", progress=lambda *_: None)
    with np.load(data / "set.npz") as file:
        want = [image.transpose(2, 0, 1)[None].astype(np.float32) for image in file["x_train"]]
    got = [feed["x"] for feed in feeds]
    assert len(got) == 18 and all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    again = calibration_feeds(entry, spec, 6, input_name="x", progress=lambda *_: None)
    assert [np.array_equal(a["x"], b) for a, b in zip(again, want[::3], strict=True)] == [True] * 6


def test_calibrating_on_what_is_judged_is_refused(data: Path, tmp_path: Path) -> None:
    net = open_project(data / "net.onnx")
    with pytest.raises(UsageError, match="same pictures"):
        with_options(net, data=data / "val", calibration=str(data / "val"))
    with np.load(data / "set.npz") as file:
        np.savez(tmp_path / "one.npz", images=file["x_test"], labels=file["y_test"])
        folder_per_class(tmp_path / "copy", file["x_test"], file["y_test"])
    with pytest.raises(UsageError, match="same pictures"):
        with_options(net, data=tmp_path / "one.npz", calibration=str(tmp_path / "one.npz"))
    for given in ("one.npz", "copy"):  # the same pixels under another name
        project = with_options(net, data=data / "set.npz", calibration=str(tmp_path / given))
        spec = ClassifySpec(PREPROCESS, "y", COLORS)
        with pytest.raises(CalibrationError, match="12 of 12 calibration pictures"):
            calibration_feeds(project.models[0], spec, input_name="x", progress=lambda *_: None)


# --- the rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["edgekit.tasks.classify.task", "edgekit.tasks.detect.task"])
def test_a_task_imports_numpy_and_itself(module: str) -> None:
    import sys

    before = modules_after("")
    found = modules_after(f"import {module}") - before - set(sys.stdlib_module_names)
    assert found <= {"edgekit", "numpy"}


def test_every_task_has_both_halves() -> None:
    from typing import get_args

    from edgekit import project, tasks
    from edgekit.toolchain import tasks as toolchain_tasks

    assert get_args(project.TaskName) == tasks.TASKS
    for name in tasks.TASKS:
        for module, contract in (
            (tasks.task(name), tasks.Task),
            (toolchain_tasks.half(name), toolchain_tasks.ToolchainTask),
        ):
            wanted = {k for k in (*vars(contract), *contract.__annotations__) if not k.startswith("_")}
            assert wanted and all(hasattr(module, k) for k in wanted), (name, wanted)
    with pytest.raises(UsageError, match="unknown"):
        tasks.task("segment")
    with pytest.raises(UsageError, match="unknown"):
        toolchain_tasks.half("segment")


def test_resnet8_on_cifar10(tmp_path: Path) -> None:
    """The figure that the reference data states."""
    shared = shared_data()
    (built,) = edgekit.build(
        shared / "models" / "cifar10_resnet8" / "resnet8_cifar10.onnx", task="classify",
        preprocess=RULE, data=shared / "cifar10_mini" / "cifar10_mini.npz", out=tmp_path,
    )  # fmt: skip
    with built:
        metric = built.evidence["metric"]
        assert metric["payload"]["top1"] == pytest.approx(0.771, abs=0.001) and metric["images"] == 1000
        assert built.manifest.pipeline["labels"][:2] == ["airplane", "automobile"]
