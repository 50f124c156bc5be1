"""The main path as a function: what it writes, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgekit
from edgekit import archive
from edgekit.backends.base import Payload
from edgekit.bundle import Bundle
from edgekit.cli.main import main
from edgekit.errors import (
    CalibrationError,
    EvidenceError,
    MissingExtraError,
    ModelError,
    OutputError,
    UsageError,
)
from edgekit.target import Target
from edgekit.toolchain import api, cache
from edgekit.toolchain import build as main_path
from tests.helpers import ROOT

APP = ROOT / "apps" / "detect"


@pytest.fixture
def app(tmp_path: Path) -> Callable[..., Path]:
    """The shipped detector as a project with other limits (`accept`) or without labelled pictures."""

    def make(accept: str = "", labelled: bool = True) -> Path:
        folder = tmp_path / "app"
        folder.mkdir(exist_ok=True)
        shutil.copy(APP / "yolo_lite.onnx", folder)
        text = (APP / "edgekit.toml").read_text(encoding="utf-8").partition("[model.evaluation]")[0]
        if labelled:
            text += '[model.evaluation]\nset = "street-eval"\ncount = 8\n'
        (folder / "edgekit.toml").write_text(f"{text}[model.accept]\n{accept}\n", encoding="utf-8")
        return folder

    return make


def build(project: Path, out: Path, target: str = "host", limit: int | None = 2, **options: Any) -> Bundle:
    (bundle,) = edgekit.build(project, target, out=out, limit=limit, **options)
    bundle.close()
    return bundle


def left(out: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(p.relative_to(out)) for p in out.rglob("*")) if out.exists() else []


def damaged(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[..., main_path.Proof]:
    """`main_path.prove` of a payload with one altered layer, beside the float network as it is."""
    original = main_path.prove

    def prove(work: Any, target: Target, payloads: tuple[Payload], *rest: Any) -> main_path.Proof:
        (payload,) = payloads
        model = onnx.load_from_string(payload.data)
        tensors = [t for t in model.graph.initializer if len(t.dims) == 4]
        tensor = tensors[len(tensors) // 2]
        changed = edit(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        changed_payload = dataclasses.replace(payload, data=model.SerializeToString())
        return original(work, target, (changed_payload,), *rest)

    return prove


# --- the function ------------------------------------------------------------------------------


def test_several_targets_prepare_the_model_once_and_come_in_order(
    app_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for module, name in ((main_path.frontends, "load"), (main_path, "prepare"), (main_path, "pictures")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, _counted(original, name, calls))
    steps: list[tuple[str, int, int]] = []
    bundles = edgekit.build(
        APP,
        ["rpi5", Target.load("host"), "jetson-orin"],
        out=tmp_path,
        limit=2,
        progress=lambda *step: steps.append(step),
    )
    assert calls == ["load", "prepare", "pictures"]
    assert [b.manifest.target for b in bundles] == ["rpi5", "host", "jetson-orin"]
    assert left(tmp_path) == [f"yolo_lite.{t}.edge" for t in ("host", "jetson-orin", "rpi5")]
    for bundle in bundles:
        bundle.verify_files()
        bundle.close()
    texts = [what for what, _, _ in steps]
    for what in ("yolo_lite: read and prepare", "rpi5: prove outputs", "jetson-orin: accuracy, float16"):
        assert what in texts
    assert texts[-1] == "done" and all(0 <= done <= of for _, done, of in steps)


def _counted(original: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return original(*args, **options)

    return call


def test_the_same_target_twice_is_refused(tmp_path: Path) -> None:
    for targets in (["host", "host"], []):
        with pytest.raises(UsageError, match="each once"):
            edgekit.build(APP, targets, out=tmp_path)
    assert left(tmp_path) == []


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[build\]'"):
        edgekit.build(APP)
    with pytest.raises(MissingExtraError):
        api.require_extras()


def test_precision_that_a_board_cannot_run_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_path, "read", lambda *_: pytest.fail("worked first"))
    small = dataclasses.replace(Target.load("rpi5"), backends=("onnxruntime",))
    small = dataclasses.replace(small, precisions={"onnxruntime": ("float32",)})
    for precision in ("int8", "float16"):
        with pytest.raises(UsageError, match=f"precision {precision} for rpi5: .* float32 or auto"):
            build(APP, tmp_path, small, precision=precision)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="int8 needs pictures to calibrate on"):
        build(APP / "yolo_lite.onnx", tmp_path, "rpi5", precision="int8")
    with pytest.raises(UsageError, match="key"):
        build(APP, tmp_path, sign_key=tmp_path / "absent.pem")


def test_every_evidence_field_is_there(app_bundles: dict[str, Path]) -> None:
    for target, path in app_bundles.items():
        with Bundle.open(path) as bundle:
            record = json.loads(json.dumps(bundle.evidence))
            ((_, variant),) = bundle.manifest.variants()
        payload = record["payloads"][variant.name]
        assert payload["bytes"] == variant.bytes
        assert 1 <= payload["bytes"] / payload["weight_bytes"] <= 1.02, "hardly anything but weights"
        assert payload["ops"]["Conv"] > 10
        assert payload["simulated"] is (target == "jetson-orin")
        assert payload["run_by"] == record["metric"]["measured_by"]
        if target == "jetson-orin":
            assert "running the float16 graph that tensorrt compiles on the board" in payload["run_by"]
            assert "has not run on NVIDIA Jetson AGX Orin" in record["limits"][0]
        assert record["graph"]["input_rule"].startswith("input rule: ")
        assert record["graph"]["labels"] == "class names as given"
        assert record["metric"]["drop_interval95"] and record["metric"]["interval95"]
        assert ("stages" in record["timing"]) is (target == "host")
        assert record["accept"]["passed"] is True
        for key in ("model", "agreement", "samples"):
            assert record[key]


# --- without labels ----------------------------------------------------------------------------


def test_without_labels_the_accuracy_is_said_to_be_unknown(app: Callable[..., Path], tmp_path: Path) -> None:
    with Bundle.open(build(app(labelled=False), tmp_path / "out", "rpi5").path) as bundle:
        record = bundle.evidence
    assert record["accept"]["passed"] is None
    assert record["metric"] == {
        "not_measured": "no labelled pictures were given (--data instances.json --images DIR)"
    }
    assert any("Accuracy was not measured" in text for text in record["limits"])
    assert record["agreement"]["boxes_matched"] == record["agreement"]["boxes_reference"] > 0


def test_pictures_without_labels_are_used_where_no_labels_are_needed(
    app: Callable[..., Path], tmp_path: Path
) -> None:
    import cv2

    folder = tmp_path / "drive"
    folder.mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((40, 60, 3), 60 * i, np.uint8))
    bundle = build(app(labelled=False), tmp_path / "out", "rpi5", calibration=folder)
    with Bundle.open(bundle.path) as opened:
        (payload,) = opened.evidence["payloads"].values()
    assert (payload["images"], payload["pictures"]) == (3, "drive")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError):
        build(app(labelled=False), tmp_path / "out2", "rpi5", calibration=empty)


# --- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "labelled", "target", "edit", "reason"),
    [
        ("min_metric = 1.0", True, "rpi5", None, r"AP is 0\.\d+, at least 1\.0 required"),
        ("min_metric = 0.1", False, "rpi5", None, "required, but accuracy not measured"),
        ("max_drop = 0.0", True, "rpi5", lambda w: 0 * w, r"AP dropped by 0\.\d+, at most 0\.0 accepted"),
        ("max_score_shift = 0.0", True, "jetson-orin", None, r"scores shift by up to 0\.\d+"),
        ("", False, "rpi5", lambda w: 40 * w, "of the float network's .* boxes are found again"),
    ],
)
def test_a_build_outside_its_limits_writes_nothing_unless_told_to(
    app: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    accept: str,
    labelled: bool,
    target: str,
    edit: Callable[[np.ndarray], np.ndarray] | None,
    reason: str,
) -> None:
    project, out = app(accept, labelled), tmp_path / "out"
    if edit is not None:
        monkeypatch.setattr(main_path, "prove", damaged(edit))
    with pytest.raises(
        EvidenceError, match=rf"^model yolo_lite for {target}: .*{reason}.*--allow-drop"
    ) as error:
        build(project, out, target)
    assert error.value.exit_code == 1 and "\n" not in str(error.value)
    assert left(out) == []

    path = build(project, out, target, allow_drop=True).path
    with Bundle.open(path) as bundle:
        verdict = bundle.evidence["accept"]
        assert verdict["passed"] is False and verdict["allowed"] is True
        assert "kept with --allow-drop" in verdict["reason"]
        assert bundle.evidence["limits"][0].startswith("The build missed its limits: ")
        assert bundle.manifest.provenance["missed_limits"] == verdict["reason"]
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    assert "missed_limits" in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert main(["report", str(path), "--out", str(page)]) == 0
    assert "Outside its limits" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_payload_that_computes_nan_is_refused(
    app: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(main_path, "prove", damaged(lambda w: w * value))
    with pytest.raises(EvidenceError, match=r"NaN or infinite on picture 0.*--precision float32"):
        build(app(), tmp_path / "out", "rpi5", allow_drop=True)
    assert left(tmp_path / "out") == []


def test_a_network_that_computes_nan_by_itself_is_a_model_error(
    app: Callable[..., Path], tmp_path: Path
) -> None:
    project = app()
    path = project / "yolo_lite.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4:
            values = numpy_helper.to_array(tensor) * np.float32(1e30)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    with pytest.raises(ModelError) as error:
        build(project, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert left(tmp_path / "out") == []


# --- interrupted, full, unwritable ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["prove outputs", "accuracy", "golden", "write"])
def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, where: str) -> None:
    out = tmp_path / "out"

    def interrupt(what: str, done: int, of: int) -> None:
        if where in what and what.startswith("rpi5"):
            raise KeyboardInterrupt

    cache_before = left(cache.cache_dir())
    targets = ["host", "rpi5"] if where == "write" else ["rpi5"]
    options = {"precision": "float16"} if where == "accuracy" else {}
    with pytest.raises(KeyboardInterrupt):
        edgekit.build(APP, targets, out=out, limit=3, progress=interrupt, **options)
    assert left(out) == (["yolo_lite.host.edge"] if where == "write" else [])
    assert not [name for name in set(left(cache.cache_dir())) - set(cache_before) if name.endswith(".tmp")]


def test_an_interrupt_while_writing_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(APP, tmp_path, "rpi5").path
    before = path.read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archive.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(APP, tmp_path, "rpi5", precision="float16")
    assert left(tmp_path) == ["yolo_lite.rpi5.edge"] and path.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        build(APP, tmp_path / "file" / "out", "rpi5")


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file" / "cache"))
    with Bundle.open(build(APP, tmp_path / "out", "rpi5").path) as bundle:
        assert bundle.evidence["metric"]["images"] == 2
