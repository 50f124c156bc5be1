"""INT8 from end to end: calibrated, searched, proven, bundled for a host, an ARM board and a Jetson.

The searches here are cut short in their numbers (pictures, values looked at), not in their steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import edgekit
from edgekit.backends.base import Payload
from edgekit.bundle import Bundle
from edgekit.cli.main import main
from edgekit.errors import BundleError, EvidenceError, UsageError
from edgekit.quant import search
from edgekit.synth.street import StreetWorld
from edgekit.target import Target
from edgekit.toolchain import build as main_path
from edgekit.toolchain import quantize, timing
from tests import classifiers
from tests.bundle_samples import assert_same_but_for_times, files_of
from tests.cli_runs import cli, refusal
from tests.helpers import ROOT

APP = ROOT / "apps" / "detect"
CPUS = ("native", "litert", "onnxruntime", "openvino")
"""Libraries in the order in which a bundle holds their payloads."""


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Fewer pictures, values and repetitions, and a network prepared once, so that a build takes seconds."""
    changed = {
        search: {
            "PROBED": 3,
            "LOOKED_AT": 2,
            "TRIED": 1,
            "SCHEMES": ("mse",),
            "REPAIRS": ("bias_correction",),
        },
        quantize: {"FIT": 2, "CHECK": 2, "RESTAT": 3, "LAYER_PICTURES": 1},
        main_path: {"AGREEMENT_IMAGES": 2, "SAMPLE_IMAGES": 1},
        timing: {"TIMING_RUNS": 4, "COMPARE_ROUNDS": 3},
    }
    read, known = main_path.read, dict[str, main_path.Source]()

    def read_once(entry: Any, options: Any, progress: Any) -> main_path.Source:
        if entry.name not in known:
            known[entry.name] = read(entry, options, progress)
        return dataclasses.replace(known[entry.name], entry=entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_path, "read", read_once)
        for module, values in changed.items():
            for name, value in values.items():
                patch.setattr(module, name, value)
        yield


def project(folder: Path, accept: str, pictures: int = 3) -> Path:
    """The shipped detector with small sets and limits of its own."""
    folder.mkdir(exist_ok=True)
    shutil.copy(APP / "yolo_lite.onnx", folder)
    text = (APP / "edgekit.toml").read_text(encoding="utf-8").partition("[model.calibration]")[0]
    text += f'[model.calibration]\nset = "street"\ncount = {pictures}\n'
    text += f'[model.evaluation]\nset = "street-eval"\ncount = {pictures}\n[model.accept]\n{accept}\n'
    (folder / "edgekit.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("int8") / "app", "max_drop = 0.2")


def counted(original: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls.append(name)
        return original(*args)

    return call


@pytest.fixture(scope="module")
def calls() -> list[str]:
    """What `built` called, in order."""
    return []


@pytest.fixture(scope="module")
def built(app: Path, calls: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`edgekit build --precision int8` for three boards, by the command line."""
    out = tmp_path_factory.mktemp("bundles")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((quantize, "calibrated"), (search, "search")):
            patch.setattr(module, name, counted(getattr(module, name), name, calls))
        words = ("--precision", "int8", "--target", "host,rpi5,jetson-orin", "--out", out, "--json")
        ran = cli("build", app, *words)
    assert ran.code == 0, ran.err
    rows = {row["target"]: row for row in json.loads(ran.out)["bundles"]}
    assert list(rows) == ["host", "rpi5", "jetson-orin"]
    return {target: Path(row["path"]) for target, row in rows.items()}


@pytest.fixture(scope="module")
def floats(app: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network in float32."""
    (bundle,) = edgekit.build(app, "rpi5", out=tmp_path_factory.mktemp("floats"), limit=1)
    bundle.close()
    return bundle.path


def evidence(path: Path) -> dict[str, Any]:
    with Bundle.open(path) as bundle:
        record: dict[str, Any] = json.loads(json.dumps(bundle.evidence))
        return record


def names(path: Path) -> list[str]:
    with Bundle.open(path) as bundle:
        return [variant.name for _, variant in bundle.manifest.variants()]


# --- the bundles ---------------------------------------------------------------------------------


def test_every_library_of_a_board_has_its_payload_in_the_order_of_preference(built: dict[str, Path]) -> None:
    host = [b for b in CPUS if "int8" in Target.load("host").precisions.get(b, ())]
    assert names(built["host"]) == [f"{b}-int8" for b in host] and "litert-int8" in names(built["host"])
    assert names(built["rpi5"]) == ["native-int8", "litert-int8", "onnxruntime-int8"]
    assert names(built["jetson-orin"]) == ["tensorrt-int8"]


@pytest.mark.parametrize("target", ["host", "rpi5"])
def test_every_variant_loads_passes_its_self_test_and_finds_what_float_finds(
    built: dict[str, Path], floats: Path, target: str
) -> None:
    image = StreetWorld(10_000, 640, 360).frame(45).image
    with edgekit.load(floats) as engine:
        expected = engine.predict(image)
    assert len(expected.boxes) > 2
    for name in names(built[target]):
        with edgekit.load(built[target], variant=name) as engine:  # with its self-test
            (variant,) = engine.variants.values()
            assert (variant.name, engine.refused) == (name, {})
            found = engine.predict(image)
        assert abs(len(found.boxes) - len(expected.boxes)) <= 1 + len(expected.boxes) // 4
        best = np.argmax(expected.scores)
        assert np.abs(found.boxes - expected.boxes[best]).max(axis=1).min() < 8, "pixels of 640"


def test_a_jetson_payload_is_simulated_and_quantized_on_both_sides(built: dict[str, Path]) -> None:
    record = evidence(built["jetson-orin"])
    (payload,) = record["payloads"].values()
    assert payload["simulated"] is True
    assert "running the int8 graph that tensorrt compiles on the board" in payload["run_by"]
    assert "has not run on NVIDIA Jetson AGX Orin" in record["limits"][0]
    with Bundle.open(built["jetson-orin"]) as bundle:
        ((_, variant),) = bundle.manifest.variants()
        model = ir.from_proto(onnx.load_from_string(bytes(bundle.read(variant.path))))
    whole = 0
    for node in model.graph:
        if node.op_type == "Conv":
            sides = [v.producer() for v in node.inputs[:2] if v is not None]
            quantized = [p is not None and p.op_type == "DequantizeLinear" for p in sides]
            assert len(set(quantized)) == 1, f"{node.outputs[0].name} is quantized on one side only"
            whole += quantized[0]
    assert whole > 10
    with pytest.raises(BundleError):
        edgekit.load(built["jetson-orin"])


@pytest.mark.parametrize("target", ["host", "rpi5", "jetson-orin"])
def test_the_evidence_says_how_it_was_quantized(built: dict[str, Path], target: str) -> None:
    record = evidence(built[target])
    assert record["accept"]["passed"] is True and record["metric"]["payload"]["AP"] > 0
    assert record["metric"]["drop"] <= 0.2
    how = record["quantization"]
    assert set(how) == {
        *("scheme", "calibration", "warnings", "searched_for", "steps", "trials", "metric_looks"),
        *("output_error", "layers", "worst_values", "integer", "not_lowered", "left_out"),
    }
    assert how["scheme"] == "search" and how["calibration"]["pictures"] == 3
    assert any("3 pictures: too few" in text for text in how["warnings"])
    assert set(how["warnings"]) <= set(record["graph"]["notes"])
    assert how["steps"][0] == "mse ranges"
    assert how["trials"][-1]["passed"] is True and 0 < how["output_error"] < 1
    assert how["not_lowered"] == how["left_out"] == {}
    assert sorted(how["integer"]) == sorted(name.removesuffix("-int8") for name in names(built[target]))
    for integer in how["integer"].values():
        assert 0.9 < integer["mac_share"] <= 1
        assert all(row["reason"] for row in integer["float"])
    layers = how["layers"]
    assert len(layers) > 20 and math.fsum(row["share"] for row in layers) == pytest.approx(1, abs=0.01)
    for row in layers:
        assert row["precision"] == "int8" or row["reason"]
        assert row["op"].startswith(f"{row['id']} (node ") and row["sqnr_db"] > 3
    errors = [row["error"] for row in how["worst_values"]]
    assert errors and errors == sorted(errors, reverse=True)
    for name, payload in record["payloads"].items():
        assert payload["precision"] == "int8" and payload["images"] == 2
        assert payload["integer"] == how["integer"][payload["backend"]]
        assert set(payload["metric"]) == {"AP", "drop"}
        assert payload["bytes"] < 1.6e6 and payload["outputs"], name
        assert ("speed" in payload) is (target == "host")
    assert ("stages" in record["timing"]) is (target == "host")


def test_what_was_timed_is_the_variant_that_was_fastest(built: dict[str, Path]) -> None:
    record = evidence(built["host"])
    speeds = {name: payload["speed"]["ms"] for name, payload in record["payloads"].items()}
    assert speeds[record["timing"]["payload"]] == min(speeds.values())


def test_calibration_is_gone_through_once_and_searches_are_shared_by_rules(
    built: dict[str, Path], calls: list[str]
) -> None:
    """The native engine wants the same for every board: host and rpi5 take one search, the Jetson its own."""
    assert calls == ["calibrated", "search", "search"]
    found = {target: evidence(path)["quantization"] for target, path in built.items()}
    assert {target: how["searched_for"] for target, how in found.items()} == {
        "host": "edgekit's engine",
        "rpi5": "edgekit's engine",
        "jetson-orin": "TensorRT",
    }
    assert found["host"]["trials"] == found["rpi5"]["trials"] != found["jetson-orin"]["trials"]
    assert [found[target]["metric_looks"] for target in built] == [1, 0, 1]


# --- the same inputs, the same bytes ---------------------------------------------------------------


def test_two_builds_give_the_same_bytes_whatever_the_clock_says(
    app: Path, built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into another folder, from another cache, on a machine where the slowest library is the fastest."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    compare = main_path.compare_here

    def reversed_speeds(*args: Any) -> dict[str, Any]:
        found = compare(*args)
        order = sorted(found, key=lambda name: float(found[name]["ms"]))
        speeds = [found[name] for name in reversed(order)]
        return {name: {**speed, "ms": 3.0 * speed["ms"]} for name, speed in zip(order, speeds, strict=True)}

    monkeypatch.setattr(main_path, "compare_here", reversed_speeds)
    for bundle in edgekit.build(app, ["host", "jetson-orin"], precision="int8", out=tmp_path / "other"):
        bundle.close()
        a, b = (files_of(path) for path in (built[bundle.manifest.target], bundle.path))
        assert_same_but_for_times(a, b)


# --- limits --------------------------------------------------------------------------------------


def test_a_naive_build_outside_its_budget_is_refused_and_names_the_values_to_blame(tmp_path: Path) -> None:
    folder, out = project(tmp_path / "app", "min_metric = 1.0"), tmp_path / "out"
    words = (
        "build",
        folder,
        "--precision",
        "int8",
        "--target",
        "rpi5",
        "--limit",
        2,
        "--quantization",
        "minmax",
    )
    line = refusal(cli(*words, "--out", out), 1, "AP is 0.", "at least 1.0 required", "--allow-drop")
    assert "most of the error comes from " in line and line.count("(node ") >= 1 and "%" in line
    assert not list(out.glob("*"))

    ran = cli(*words, "--out", out, "--allow-drop")
    assert ran.code == 0, ran.err
    record = evidence(out / "yolo_lite.rpi5.edge")
    assert record["accept"]["passed"] is False and record["accept"]["allowed"] is True
    assert record["limits"][0].startswith("The build missed its limits: ")
    assert record["quantization"]["scheme"] == "minmax"
    assert record["quantization"]["steps"] == ["minmax ranges"]
    assert record["quantization"]["trials"][0]["passed"] is False
    with Bundle.open(out / "yolo_lite.rpi5.edge") as bundle:
        assert "kept with --allow-drop" in bundle.manifest.provenance["missed_limits"]
    page = tmp_path / "report.html"
    assert main(["report", str(out / "yolo_lite.rpi5.edge"), "--out", str(page)]) == 0
    assert "Outside its limits" in page.read_text(encoding="utf-8")


def failing(backends: tuple[str, ...]) -> Callable[..., Any]:
    """`build.judge` that finds the payloads of `backends` outside their limits."""
    original = main_path.judge

    def judge(work: Any, subject: Any, report: Any) -> Any:
        found, agreement, verdict = original(work, subject, report)
        if subject.candidate.payload.backend in backends:
            verdict = {**verdict, "passed": False, "reason": "AP dropped by 0.5"}
        return found, agreement, verdict

    return judge


def test_a_variant_that_fails_its_budget_is_left_out_with_the_reason(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_path, "judge", failing(("native", "litert")))  # even the one preferred
    options: dict[str, Any] = {"precision": "int8", "out": tmp_path, "limit": 2, "quantization": "mse"}
    (bundle,) = edgekit.build(app, "rpi5", **options)
    bundle.close()
    assert names(bundle.path) == ["onnxruntime-int8"]
    record = evidence(bundle.path)
    assert record["quantization"]["left_out"] == dict.fromkeys(("native", "litert"), "AP dropped by 0.5")
    assert list(record["payloads"]) == ["onnxruntime-int8"] and record["accept"]["passed"] is True
    monkeypatch.undo()
    monkeypatch.setattr(main_path, "judge", failing(CPUS))
    with pytest.raises(EvidenceError, match=r"AP dropped by 0\.5 \(most of the error comes from "):
        edgekit.build(app, "rpi5", **options)


def test_an_unknown_quantization_is_refused(app: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'minmax'"):
        edgekit.build(app, "rpi5", precision="int8", quantization="minmaxx", out=tmp_path)
    refusal(
        cli("build", app, "--target", "rpi5", "--quantization", "minmaxx"), 2, "--quantization", "minmaxx"
    )


# --- a classifier --------------------------------------------------------------------------------


def test_a_classifier_from_end_to_end(tmp_path: Path) -> None:
    import cv2

    onnx.save(classifiers.network(), str(tmp_path / "net.onnx"))
    (tmp_path / "names.txt").write_text("\n".join(classifiers.COLORS), encoding="utf-8")
    images, classes = classifiers.pictures(12, seed=3, size=20)
    classifiers.folder_per_class(tmp_path / "val", images, classes)
    (tmp_path / "drive").mkdir()
    for i, image in enumerate(classifiers.pictures(9, seed=4, size=20)[0]):
        assert cv2.imwrite(str(tmp_path / "drive" / f"{i}.png"), image[:, :, ::-1])
    data = (
        "--calibration",
        tmp_path / "drive",
        "--data",
        tmp_path / "val",
        "--classes",
        tmp_path / "names.txt",
    )
    words = ("--precision", "int8", "--target", "host,rpi5", "--out", tmp_path / "out", "--json")
    ran = cli("build", tmp_path / "net.onnx", *classifiers.WORDS, *data, *words)
    assert ran.code == 0, ran.err
    for row in json.loads(ran.out)["bundles"]:
        path = Path(row["path"])
        record = evidence(path)
        assert record["metric"]["payload"]["top1"] == record["metric"]["reference"]["top1"] == 1.0
        for name in names(path):
            with edgekit.load(path, variant=name) as engine:
                assert engine.refused == {}
                for image, cls in zip(images, classes, strict=True):
                    assert engine.predict(np.ascontiguousarray(image[:, :, ::-1])).classes[0] == cls


def test_libraries_that_miss_by_choices_of_another_are_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One payload of three was within the limits: the other two come from a search of their own, beside it."""

    def made(backends: Sequence[str], rules: str, looks: int) -> quantize.Int8:
        payloads = tuple(Payload(b, "int8", "x", rules.encode(), (), ()) for b in backends)
        told = {"searched_for": rules, "steps": [rules], "trials": [], "output_error": 0.1}
        record = {**told, "integer": dict.fromkeys(backends, rules), "not_lowered": {}, "metric_looks": looks}
        return quantize.Int8(payloads, record, "", tuple(rules for _ in backends))  # type: ignore[misc]

    asked: list[Sequence[str]] = []

    def quantized(work: Any, target: Any, backends: Sequence[str], progress: Any) -> quantize.Int8:
        asked.append(backends)
        return made(backends, "own", 2)

    monkeypatch.setattr(main_path, "quantized", quantized)

    def judged(work: Any, target: Any, payloads: Sequence[Payload], report: Any) -> list[main_path.Judged]:
        return [verdict(payload, True) for payload in payloads]

    def verdict(payload: Payload, passed: bool) -> main_path.Judged:
        subject: Any = SimpleNamespace(candidate=SimpleNamespace(payload=payload))
        return main_path.Judged(subject, {}, {}, {}, {"passed": passed, "reason": "AP dropped"})

    monkeypatch.setattr(main_path, "judged", judged)
    first = made(["native", "litert", "onnxruntime"], "native", 3)
    work: Any = SimpleNamespace(
        options=SimpleNamespace(quantization="search"), source=SimpleNamespace(states=())
    )
    target: Any = SimpleNamespace(name="host")

    def again(passed: int, quantization: str = "search") -> quantize.Int8 | None:
        work.options.quantization = quantization
        tried = [verdict(p, i < passed) for i, p in enumerate(first.payloads)]
        found, kept = main_path.searched_again(work, target, first, tried, lambda *_: None)
        if found is first:
            assert kept is tried
            return None
        assert kept[0] is tried[0] and [j.payload for j in kept] == list(found.payloads)
        return found

    assert again(2) is again(0) is again(1, quantization="mse") is None and not asked
    found = again(1)
    assert found is not None and asked == [["litert", "onnxruntime"]]
    assert [(p.backend, p.data) for p in found.payloads] == [
        ("native", b"native"),
        ("litert", b"own"),
        ("onnxruntime", b"own"),
    ]
    assert found.models == ("native", "own", "own") and found.record["metric_looks"] == 5
    assert found.record["integer"] == {"native": "native", "litert": "own", "onnxruntime": "own"}
    assert found.record["searched_for"] == "native" and found.record["then"]["searched_for"] == "own"
