"""tasks/fusion: labelled moments, the metric of a pipeline on them, and the toolchain's half."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgekit import tasks
from edgekit.dataset import DataSet
from edgekit.errors import UsageError
from edgekit.kernels.sparse_conv import encoder
from edgekit.models.bevfusion.segments import Segments
from edgekit.rig import Truth
from edgekit.synth.street_rig import RigWorld
from edgekit.tasks.fusion.boxes import Boxes3D
from edgekit.tasks.fusion.dataset import Moments, content, numbered, read_set
from edgekit.tasks.fusion.evaluate import bootstrap, evaluate
from edgekit.tasks.fusion.pipeline import FusionPipeline
from edgekit.tasks.interval import interval95
from edgekit.toolchain.plans.moments import moments
from edgekit.toolchain.tasks import fusion as toolchain_half
from tests import bevfusion_nets as nets
from tests import fusion_rigs as rigs
from tests.helpers import shared_data

LABELS = nets.TINY.head.labels
FEW = "synthetic://street-rig?frames=3&worlds=2&size=64x40"


def test_synthetic_moments_come_from_the_streets_in_turn() -> None:
    found = read_set(Path(FEW), None, labels=LABELS)  # a path has lost a slash
    assert (len(found), list(found.images), found.labels) == (3, [0, 1, 2], LABELS)
    for index, (seed, frame) in enumerate(((10000, 25), (10001, 25), (10000, 50))):
        assert content(found.read(index)) == content(RigWorld(seed, width=64, height=40).frame(frame))
    assert len(read_set(Path(FEW), None, limit=2)) == 2
    same = read_set(Path("synthetic://street-rig?worlds=2&size=64x40&frames=3"), None, labels=LABELS)
    assert same.digest == found.digest
    others = (
        "frames=2&worlds=2&size=64x40",
        "frames=3&worlds=2&size=64x40&seed=5",
        "frames=3&worlds=1&size=64x40",
    )
    digests = {read_set(Path(f"synthetic://street-rig?{q}"), None, labels=LABELS).digest for q in others}
    assert len(digests) == 3 and found.digest not in digests


def test_a_set_that_a_build_was_given_is_the_same_one_for_verify() -> None:
    """`edgekit build --data` takes a source with `count`."""
    entry = moments(
        DataSet(source="synthetic://street-rig?size=64x40", seed=5, count=3), LABELS, labelled=True
    )
    again = read_set(Path("synthetic://street-rig?size=64x40&seed=5&count=3"), None, labels=LABELS)
    assert again.digest == entry.digest and len(again) == 3
    with pytest.raises(UsageError, match="expected a whole number"):
        read_set(Path("synthetic://street-rig?count=many"), None, labels=LABELS)


def test_classes_are_numbered_as_the_model_does() -> None:
    truth = Truth(
        np.arange(27, dtype=np.float32).reshape(3, 9), np.array([0, 2, 1], np.int32), ("Car", "Van", "Pedestrian"),
        np.array([1, 2, 3], np.int32), np.array([4, 5, 6], np.int32),
    )  # fmt: skip
    found = numbered(truth, ("pedestrian", "bus", "car"))
    assert found.classes.tolist() == [2, 0] and found.names == ("pedestrian", "bus", "car")
    assert found.points.tolist() == [1, 2] and np.array_equal(found.boxes, truth.boxes[:2])
    assert numbered(truth, truth.names) is truth
    empty = numbered(truth[np.zeros(3, bool)], ("car",))
    assert len(empty) == 0 and empty.names == ("car",)


def test_real_frames_are_read() -> None:
    shared = shared_data()
    nuscenes = read_set(shared / "nuscenes_sample", None, labels=LABELS)
    assert (len(nuscenes), nuscenes.labelled_in) == (1, ())
    truth = nuscenes.read(0).truth
    assert len(truth) > 20 and set(truth.classes.tolist()) <= set(range(5))
    own = read_set(shared / "nuscenes_sample" / "frame.json", None)
    assert (
        "traffic_cone" in own.labels and len(own.read(0).truth) > len(truth) and own.digest != nuscenes.digest
    )
    kitti = read_set(shared / "kitti_mini" / "training", None, labels=LABELS)
    assert len(kitti) >= 1 and kitti.labelled_in == ("image_2",)
    assert "image_2" in kitti.read(0).shots and kitti.read(0).truth.names == LABELS
    info = read_set(shared / "kitti_mini" / "reduced" / "000008.json", None, labels=LABELS)
    assert len(info.read(0).truth) > 0 and info.read(0).truth.names == LABELS


def test_a_changed_file_is_another_set(tmp_path) -> None:
    shared = shared_data()
    for part in ("velodyne", "calib", "label_2", "image_2"):
        shutil.copytree(shared / "kitti_mini" / "training" / part, tmp_path / part)
    for path in tmp_path.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = read_set(tmp_path, None, labels=LABELS)
    digest = before.digest
    assert read_set(tmp_path, None, labels=LABELS).digest == digest
    scan = sorted((tmp_path / "velodyne").iterdir())[0]
    scan.write_bytes(scan.read_bytes()[:-16])
    assert read_set(tmp_path, None, labels=LABELS).digest != digest
    shutil.rmtree(tmp_path / "label_2")
    with pytest.raises(UsageError, match="no scan of velodyne/ has labels"):
        read_set(tmp_path, None)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("synthetic://street?frames=3", "no rig sees it"),
        ("synthetic://street-rig?frame=3", "unknown key 'frame'"),
        ("synthetic://street-rig?frames=0", "frames '0': expected a whole number"),
        ("synthetic://street-rig?size=3x", "size '3x': expected 256x144"),
        ("synthetic://street-rig?size=3x9000", "out of range"),
        ("nowhere", "no such file or folder"),
        (".", "expected velodyne/ and label_2/ in it, or one info file"),
        ("list.json", "not an info file"),
        ("deep.json", "not an info file"),
        ("empty.json", "not an info file"),
        ("notes.txt", "not labelled moments"),
    ],
)
def test_what_is_no_set_is_said_in_one_line(tmp_path, monkeypatch, data, said) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1, 2]")
    Path("empty.json").write_text(json.dumps({"data_list": [], "metainfo": {}}))
    Path("deep.json").write_text("[" * 100_000)
    Path("notes.txt").write_text("x")
    with pytest.raises(UsageError, match=said) as caught:
        read_set(Path(data), None)
    assert "\n" not in str(caught.value)


def test_a_set_without_the_models_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="has none of the model's classes tram, but car"):
        read_set(Path(FEW), None, labels=("tram",))
    with pytest.raises(UsageError, match="limit 0"):
        read_set(Path(FEW), None, limit=0)
    with pytest.raises(UsageError, match="Leave --images"):
        read_set(Path("x.json"), Path("y"))


# --- the metric -----------------------------------------------------------------------------------


class Oracle:
    """Finds what is labelled, moved by `off` metres, and says it twice where `wrong`."""

    def __init__(self, off: float = 0.0, wrong: bool = False) -> None:
        self.spec, self.off, self.wrong = rigs.tiny().spec, off, wrong

    def __call__(self, frame, *, score_threshold=None) -> Boxes3D:
        boxes = frame.truth.boxes + np.array([self.off] + [0] * 8, np.float32)
        classes, scores = frame.truth.classes, np.full(len(boxes), 0.9, np.float32)
        if self.wrong:
            boxes, classes = np.concatenate([boxes, boxes * 0.5]), np.concatenate([classes, classes])
            scores = np.concatenate([scores, scores - 0.5])
        return Boxes3D(boxes, scores, classes, LABELS)


def test_the_metric_is_that_of_a_pipeline_on_moments() -> None:
    data = read_set(Path(FEW), None, labels=LABELS)
    right, judged = evaluate(Oracle(), data)
    assert right["mAP"] == pytest.approx(1.0) and right["ATE"] == pytest.approx(0.0, abs=1e-6)
    off, other = evaluate(Oracle(1.5), data)
    assert 0.2 < off["mAP"] < right["mAP"] and off["per_class"].keys() == right["per_class"].keys()
    rounds, others = bootstrap(data, judged), bootstrap(data, other)
    assert len(rounds) == len(others) and interval95(rounds) == (1.0, 1.0)
    assert tasks.task("fusion").evaluate is evaluate
    seen = []
    evaluate(Oracle(), data, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(UsageError, match="the network knows"):
        evaluate(Oracle(), read_set(Path(FEW), None, labels=("car", "bus")))


def test_what_lies_beyond_the_range_of_a_label_is_not_asked_for() -> None:
    data = read_set(Path(FEW), None, labels=LABELS)
    near = Oracle()
    near.spec = dataclasses.replace(near.spec, ranges=dict.fromkeys(LABELS, 8.0))
    _, all_of_it = evaluate(Oracle(), data)
    _, some = evaluate(near, data)
    assert 0 < sum(c.truths.sum() for c in some.classes) < sum(c.truths.sum() for c in all_of_it.classes)


def test_boxes_beside_what_labels_cover_do_not_count() -> None:
    whole = read_set(Path(FEW), None, labels=LABELS)
    ahead = Moments(whole.name, LABELS, 2, whole.take, whole.identity, labelled_in=("CAM_FRONT",))
    _, judged = evaluate(Oracle(), ahead)
    _, everything = evaluate(Oracle(), dataclasses.replace(ahead, labelled_in=()))
    said, all_of_it = (sum(len(c.scores) for c in j.classes) for j in (judged, everything))
    assert 0 < said < all_of_it


def test_a_network_is_measured_and_compared() -> None:
    look, data = rigs.tiny(), read_set(Path(FEW), None, limit=2, labels=LABELS)
    result, judged = evaluate(look, data)
    assert 0 <= result["mAP"] < 0.5 and judged.frames == 2
    found = [look(data.read(i), score_threshold=0.05) for i in range(2)]
    agreed = tasks.task("fusion").agreement([(one, one) for one in found])
    assert agreed["boxes_matched"] == agreed["boxes_reference"] == sum(map(len, found)) > 0


# --- the toolchain's half -------------------------------------------------------------------------


def test_an_encoder_in_int8_is_calibrated_and_close(tmp_path) -> None:
    plan = json.loads((rigs.folder() / "plan.json").read_text())
    step = next(step for step in plan["steps"] if step.get("kernel") == "lidar_encoder")
    weights = dict(np.load(rigs.folder() / step["weights"]))
    moments = [nets.frame(seed) for seed in (1, 2)]
    options = toolchain_half.int8_encoder(step["options"], weights, moments)
    assert options["precision"] == "int8" and step["options"]["precision"] == "float32"
    spec = nets.TINY.lidar.encoder
    assert set(options["scales"]) == {layer.name for layer in spec.layers()[:-1]}
    assert all(scale > 0 for scale in options["scales"].values())
    encoder.prepare(weights, spec, scales=options["scales"])
    shutil.copytree(rigs.folder(), tmp_path / "plan")
    step["options"] = options
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(plan))
    whole, small = rigs.tiny(), FusionPipeline(rigs.tiny().spec, Segments(tmp_path / "plan"))
    for frame in (moments[0], nets.frame(3)):
        whole(frame), small(frame)
        a, b = (look.session.buffers["lidar_grid"] for look in (whole, small))
        assert not np.array_equal(a, b)
        assert np.abs(a - b).mean() < 0.05 * np.abs(a[a != 0]).mean()
    with pytest.raises(UsageError, match="at least one cloud"):
        toolchain_half.int8_encoder(step["options"] | {"precision": "float32"}, weights, [])


def test_one_network_alone_is_no_rigs_model(tmp_path) -> None:
    from edgekit.project import ModelEntry

    fields = {f.name: f for f in dataclasses.fields(ModelEntry)}
    assert "source" in fields
    entry = ModelEntry(name="x", source=tmp_path / "camera.onnx", task="fusion")
    with pytest.raises(
        UsageError, match=r"camera.onnx is one network, but the task fusion takes a plan folder"
    ):
        toolchain_half.prepare_options(entry)
    assert toolchain_half.head_facts(rigs.tiny().spec) == {"family": "centers", "groups": 2, "classes": 5}
