"""A plan folder becomes bundles: whole, proven, in float and in INT8. The network is small and knows nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.bundle import Bundle
from edgekit.dataset import DataSet, named_set
from edgekit.errors import CalibrationError, EvidenceError, UsageError
from edgekit.manifest import KernelStep, Segment
from edgekit.project import Accept, ModelEntry
from edgekit.quant import search
from edgekit.quant.sensitivity import output_error
from edgekit.runtime.engine import load
from edgekit.target import Target
from edgekit.tasks.fusion.dataset import read_set
from edgekit.toolchain import build as main_path
from edgekit.toolchain import quantize as single
from edgekit.toolchain.plans import build as plan_path
from edgekit.toolchain.plans import prove, quantize
from edgekit.toolchain.plans.moments import LOST, calibration_moments, evaluation_moments, moments
from edgekit.toolchain.plans.running import Workshop
from edgekit.toolchain.plans.source import read
from edgekit.toolchain.report import render
from tests.cli_runs import cli
from tests.helpers import shared_data
from tests.plan_folders import export

LABELLED = "synthetic://street-rig?count=2&seed=100"
CALIBRATION = "synthetic://street-rig?count=4&seed=5000"


def quiet(what: str, done: int, of: int) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Fewer moments and repetitions, so that a build takes seconds."""
    changed: dict[Any, dict[str, Any]] = {
        prove: {"SAMPLES": 1, "TIMING_RUNS": 3, "TIMING_WARMUP": 1},
        plan_path: {"AGREEMENT_MOMENTS": 3},
        quantize: {"CHECKED": 1},
        search: {"PROBED": 2},
        single: {"FIT": 2, "CHECK": 1, "LAYER_PICTURES": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, values in changed.items():
            for name, value in values.items():
                patch.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("rig"))


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32 for the host."""
    (bundle,) = edgekit.build(folder, data=LABELLED, out=tmp_path_factory.mktemp("float"))
    bundle.close()
    return bundle.path


@pytest.fixture(scope="module")
def integer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In INT8 for an ARM board and a Jetson."""
    bundles = edgekit.build(
        folder, ["rpi5", "jetson-orin"], data=LABELLED, calibration=CALIBRATION, precision="int8",
        quantization="minmax", out=tmp_path_factory.mktemp("int8"),
    )  # fmt: skip
    for bundle in bundles:
        bundle.close()
    return {bundle.manifest.target: bundle.path for bundle in bundles}


@pytest.fixture(scope="module")
def entry(folder: Path) -> ModelEntry:
    return ModelEntry(
        "rig", folder / "plan.json", "fusion",
        calibration=DataSet(source="synthetic://street-rig", seed=5000, count=4),
        evaluation=DataSet(source="synthetic://street-rig", seed=100, count=2),
    )  # fmt: skip


# --- float ------------------------------------------------------------------------------------------


def test_a_bundle_holds_the_whole_plan(built: Path, folder: Path) -> None:
    with Bundle.open(built) as bundle:
        steps = {step.name: step for step in bundle.manifest.plan}
        assert list(steps) == ["camera", "depth_raster", "lift", "pool", "encoder", "lidar", "fusion"]
        camera, encoder = steps["camera"], steps["encoder"]
        assert isinstance(camera, Segment) and (camera.repeat, camera.when) == (6, "cameras")
        assert isinstance(encoder, KernelStep) and encoder.when == "lidar"
        with np.load(folder / "lidar_encoder.npz") as weights:
            packed = np.frombuffer(bundle.read(encoder.files["weights"]), "<f4")
            assert packed.size == sum(weights[name].size for name in weights.files)
            first = sorted(weights.files)[0]
            assert np.array_equal(packed[: weights[first].size], weights[first].ravel())
        assert bundle.manifest.task == "fusion" and bundle.manifest.target == "host"


def test_it_computes_what_the_parts_do(built: Path, folder: Path) -> None:
    """Held against the exported parts one after the other (models.bevfusion.segments), any sensors missing."""
    from edgekit.models.bevfusion.segments import Segments
    from edgekit.tasks.fusion.pipeline import FusionPipeline

    moment = read_set(Path("synthetic://street-rig?frames=1&seed=7"), None).take(0)
    one_camera = dataclasses.replace(moment, shots={k: v for k, v in moment.shots.items() if k != "CAM_BACK"})
    with load(built) as engine:
        pipeline = engine.pipeline()
        parts = Segments(folder)
        plain = FusionPipeline(pipeline.spec, parts)
        for frame in (
            moment,
            one_camera,
            dataclasses.replace(moment, points=None),
            dataclasses.replace(moment, shots={}),
        ):
            got, want = pipeline(frame), plain(frame)
            assert got.missing == want.missing
            for name, value in parts.outputs.items():
                assert np.abs(pipeline.session.outputs[name] - value).max() < 1e-4 * max(
                    1.0, np.abs(value).max()
                )


def test_its_evidence_tells_of_every_step(built: Path) -> None:
    with Bundle.open(built) as bundle:
        e = bundle.evidence
        by_name = {step["name"]: step for step in e["plan"]}
        assert by_name["camera"]["repeat"] == 6 and by_name["camera"]["macs"] > 0
        assert by_name["encoder"]["kernel"] == "lidar_encoder" and by_name["encoder"]["bytes"] > 0
        assert e["model"]["macs"] == sum(step.get("macs", 0) for step in e["plan"])
        assert e["metric"]["name"] == "mAP" and e["metric"]["images"] == 2
        assert set(e["modes"]) == {"without lidar", "without cameras"}
        assert e["agreement"]["boxes_matched"] == e["agreement"]["boxes_reference"]
        assert set(e["timing"]["steps"]) == set(by_name)
        assert e["timing"]["serial_ms"] > 0 and e["timing"]["overlapped_ms"] > 0
        (sample,) = e["samples"]
        assert bytes(bundle.read(sample["file"])[:3]) == b"\xff\xd8\xff"
        assert {row["tensor"] for row in e["payloads"]["onnxruntime-float32"]["outputs"]} == set(
            bundle.manifest.outputs
        )


def test_what_is_small_is_not_said_to_be_nothing() -> None:
    from edgekit.cli.plans import _few

    assert [_few(v, 0) for v in (1690.4, 1.2, 0.04, 0.0)] == ["1690", "1", "0.04", "0"]
    assert [_few(v, 2) for v in (2.89, 0.01, 0.00123)] == ["2.89", "0.01", "0.001"]


def test_its_report_counts_moments(built: Path) -> None:
    with Bundle.open(built) as bundle:
        page = render([bundle])
    assert "Median per moment" in page and "Work per moment" in page and "Over 2 moments" in page


def test_same_inputs_same_payload(built: Path, folder: Path, tmp_path: Path) -> None:
    (again,) = edgekit.build(folder, data=LABELLED, out=tmp_path)
    with again, Bundle.open(built) as bundle:
        assert again.payload_digest == bundle.payload_digest


def test_the_commands_know_plans(built: Path, folder: Path, tmp_path: Path) -> None:
    ran = cli("verify", built, "--data", "synthetic://street-rig?frames=2&seed=100")
    assert (
        ran.code == 0
        and "self-test  passed" in ran.out
        and "mAP" in ran.out
        and "kernel of edgekit" in ran.out
    )
    ran = cli("inspect", built)
    assert ran.code == 0 and "kernel lidar_encoder" in ran.out and "network x 6" in ran.out
    ran = cli("bench", built, "--runs", "2", "--warmup", "0")
    assert ran.code == 0 and "from the first start to the last end" in ran.out and "encoder" in ran.out
    ran = cli("report", built, "--out", tmp_path / "r.html")
    assert ran.code == 0, ran.err
    page = (tmp_path / "r.html").read_text()
    assert (
        "Milliseconds of each step" in page and "With sensors lost" in page and "kernel lidar_encoder" in page
    )
    ran = cli("bench", built, "--source", "synthetic://street?frames=1")
    assert ran.code == 2 and "shows no rig" in ran.err


def test_a_bundle_is_compared_with_its_plan(built: Path, folder: Path) -> None:
    ran = cli("compare", folder, built, "--rounds", "0", "--limit", "2")
    assert ran.code == 0 and "heat_0: max 0, mean 0, exact" in ran.out, ran.err


def test_a_jetson_gets_its_networks_and_the_truth_about_kernels(entry: ModelEntry, tmp_path: Path) -> None:
    options = main_path.Options(tmp_path, "float16", limit=1)
    (made,) = main_path.build(entry, [Target.load("jetson-orin")], options, quiet)
    assert {step["variants"][0] for step in made.evidence["plan"] if "variants" in step} == {
        "tensorrt-float16"
    }
    said = " ".join(made.evidence["limits"])
    assert "run on the CPU" in said and "have not run on" in said
    assert "not_measured" in made.evidence["timing"]


# --- INT8 -------------------------------------------------------------------------------------------


def test_every_network_is_in_integers_for_every_library(integer: dict[str, Path]) -> None:
    with Bundle.open(integer["rpi5"]) as bundle:
        for step in bundle.manifest.plan:
            if isinstance(step, Segment):
                assert {"litert-int8", "onnxruntime-int8"} <= {v.name for v in step.variants}
        known = bundle.evidence["segments"]
        assert {name: n["precision"] for name, n in known["networks"].items()} == dict.fromkeys(
            ("camera", "lift", "lidar", "fusion"), "int8"
        )
        assert all(0 < n["error"] < 1 for n in known["networks"].values())
        assert [look["float"] for look in known["looks"]] == [[]]
        assert known["calibration"]["count"] == 4
    with Bundle.open(integer["jetson-orin"]) as bundle:
        assert {v.backend for _, v in bundle.manifest.variants()} == {"tensorrt"}


def test_int8_passes_its_self_test_and_is_near_the_float_plan(integer: dict[str, Path], built: Path) -> None:
    moment = read_set(Path("synthetic://street-rig?frames=1&seed=7"), None).take(0)
    with load(integer["rpi5"]) as engine, load(built) as floats:
        pipeline, exact = engine.pipeline(), floats.pipeline()
        pipeline(moment), exact(moment)
        error = output_error(dict(exact.session.outputs), dict(pipeline.session.outputs))
        assert 0 < error < 0.3


def test_a_network_is_fed_with_what_the_plan_feeds_it(entry: ModelEntry) -> None:
    source = read(entry)
    shop = Workshop(source)
    with shop.opened(quantize.floats(source, Target.load("host"))) as running:
        found = quantize.recorded(shop, running, calibration_moments(entry), quiet)
        assert LOST == ("", "", "lidar", "cameras")
        # two cameras of each moment that has some, in turn; what needs the LiDAR not at the third, fusion always
        assert found["camera"].places == ((0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5))
        assert found["lift"].places == ((0, None), (1, None), (2, None))
        assert found["lidar"].places == ((0, None), (1, None), (3, None))
        assert len(found["fusion"]) == 4
        feeds = list(found["camera"])
        assert [feed["images"].shape for feed in feeds] == [(1, 3, 40, 64)] * 6
        picked = found["camera"].pick({3, 1})
        assert sorted(picked) == [1, 3] and np.array_equal(picked[3]["images"], feeds[3]["images"])
        running.pipeline(calibration_moments(entry).read(1))
        assert np.array_equal(feeds[2]["images"][0], running.session.inputs["images"][2])
        lost = list(found["fusion"])
        assert not lost[2]["lidar_bev"].any() and lost[2]["present"].tolist() == [[1, 0]]
        assert not lost[3]["camera_bev"].any() and lost[3]["present"].tolist() == [[0, 1]]
        assert len({f.digest for f in found.values()}) == 4
        assert (
            quantize.recorded(shop, running, calibration_moments(entry), quiet)["lift"].digest
            == found["lift"].digest
        )
    shop.close()


def test_networks_go_back_to_float_until_the_budget_is_met(
    entry: ModelEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that nothing can meet: each is searched anew with the metric as the gate, then goes back to float, the one
    with the largest effect first; the bundle says so."""
    cut = {
        "PROBED": 2,
        "SCHEMES": ("mse",),
        "REPAIRS": (),
        "NOISY_REPAIRS": (),
        "ISLANDS": (1,),
        "NOISY": 1.0,
        "TRIED": 1,
    }
    for name, value in cut.items():
        monkeypatch.setattr(search, name, value)
    strict = dataclasses.replace(entry, accept=Accept(min_metric=0.9))
    options = main_path.Options(tmp_path, "int8", limit=1, allow_drop=True)
    (made,) = main_path.build(strict, [Target.load("jetson-orin")], options, quiet)
    known = made.evidence["segments"]
    floats = list(dict.fromkeys(frozenset(look["float"]) for look in known["looks"]))
    assert [len(names) for names in floats] == [0, 1, 2, 3, 4]
    (first,) = floats[1]
    assert all(set(look["float"]) <= set(look["partly"]) for look in known["looks"])
    effects = {name: n["error"] for name, n in known["networks"].items()}
    assert effects[first] == max(effects.values())
    assert {n["precision"] for n in known["networks"].values()} == {"float"}
    assert all("gave back to float" in n["why"] for n in known["networks"].values())
    for n in known["networks"].values():  # the network was asked about again, by the metric
        assert [t["label"] for t in n["quantization"]["trials"]].count("what the payload scores") == 2
    with Bundle.open(made.path) as bundle:
        assert {v.precision for _, v in bundle.manifest.variants()} == {"float16"}
        assert "missed_limits" in bundle.manifest.provenance


def test_a_build_outside_its_limits_leaves_nothing(entry: ModelEntry, tmp_path: Path) -> None:
    strict = dataclasses.replace(entry, accept=Accept(min_metric=0.9))
    with pytest.raises(EvidenceError, match=r"at least 0\.9 required"):
        main_path.build(strict, [Target.load("rpi5")], main_path.Options(tmp_path, "float32", limit=1), quiet)
    assert not list(tmp_path.iterdir())


def test_int8_needs_moments(entry: ModelEntry, tmp_path: Path) -> None:
    bare = dataclasses.replace(entry, calibration=None)
    with pytest.raises(CalibrationError, match="int8 needs"):
        main_path.build(bare, [Target.load("host")], main_path.Options(tmp_path, "int8"), quiet)


# --- moments ----------------------------------------------------------------------------------------


def test_moments_of_a_set_are_each_of_another_street(entry: ModelEntry) -> None:
    found = calibration_moments(entry)
    assert len(found) == 4 and len({m.rig.digest() for m in found}) == 4
    same = moments(DataSet(source="synthetic://street-rig", seed=5000, count=4))
    assert (
        found.digest
        == same.digest
        != moments(DataSet(source="synthetic://street-rig", seed=5001, count=4)).digest
    )
    assert np.array_equal(found.read(2).points, same.read(2).points)
    assert found.read(2) is found.read(2)


def test_labels_are_counted_as_the_network_counts_them(entry: ModelEntry) -> None:
    found = evaluation_moments(entry, ("bus", "car"), 1)
    assert found is not None and len(found) == 1
    truth = found.read(0).truth
    assert truth is not None and truth.names == ("bus", "car") and set(truth.classes.tolist()) <= {0, 1}


def test_moments_of_files_may_be_named_as_pictures_are() -> None:
    """A folder of nuScenes-style frames, for calibration."""
    sample = shared_data() / "nuscenes_sample"
    found = [moments(DataSet(**{key: sample})) for key in ("data", "images")]
    assert found[0].digest == found[1].digest and len(found[0]) == 1
    assert found[0].read(0).points is not None and not found[0].labelled


def test_the_digest_of_labelled_moments_is_the_tasks_own(entry: ModelEntry) -> None:
    """So that `edgekit verify` finds the float figure of the very same moments in the evidence."""
    found = evaluation_moments(entry, ("car", "bus"), None)
    assert found is not None
    uri = f"synthetic://{found.name}"
    assert found.digest == read_set(Path(uri), None, labels=("car", "bus")).digest


@pytest.mark.parametrize(
    "data", [DataSet(source="synthetic://street", seed=0, count=1), DataSet(images=Path("tests"))]
)
def test_pictures_are_no_moments(data: DataSet) -> None:
    with pytest.raises(UsageError, match=r"rig|info file"):
        moments(data)


@pytest.mark.parametrize("name", ["street-rig", "street-rig-eval"])
def test_the_shipped_sets_are_what_they_were_recorded_as(name: str) -> None:
    known = named_set(name)
    data = DataSet(source=known.source, count=1, seed=known.seed, name=name, sha256=known.sha256)
    assert len(moments(data)) == 1
    with pytest.raises(CalibrationError, match=f"set {name}: its pictures have changed"):
        moments(dataclasses.replace(data, sha256="0" * 64))
