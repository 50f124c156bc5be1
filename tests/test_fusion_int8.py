"""A sparse encoder in INT8 by a plan's choice: scales from the build's moments, float where it costs too much."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import edgekit
from edgekit.dataset import DataSet
from edgekit.errors import CalibrationError
from edgekit.project import ModelEntry
from edgekit.target import Target
from edgekit.toolchain.build import Options
from edgekit.toolchain.plans import encoder, quantize
from edgekit.toolchain.plans.build import build
from edgekit.toolchain.plans.moments import calibration_moments
from edgekit.toolchain.plans.running import Workshop
from edgekit.toolchain.plans.source import read
from tests import bevfusion_nets as nets
from tests import fusion_rigs as rigs

MOMENTS = DataSet(source="synthetic://street-rig?size=64x40", seed=3, count=3)


def chosen(folder: Path, precision: str = "int8") -> ModelEntry:
    """The small network's plan, its encoder in that precision."""
    shutil.copytree(rigs.folder(), folder / "plan")
    path = folder / "plan" / "plan.json"
    plan = json.loads(path.read_text())
    step = next(step for step in plan["steps"] if step["name"] == "encoder")
    step["options"]["precision"] = precision
    path.write_text(json.dumps(plan))
    return ModelEntry(name="tiny", source=path, task="fusion", calibration=MOMENTS)


def test_scales_come_from_the_calibration_moments_and_the_float_plan_has_none(tmp_path) -> None:
    entry = chosen(tmp_path)
    source = read(entry)
    assert [step.name for step in encoder.wanted(source)] == ["encoder"]
    plain = encoder.in_float(source)
    assert not encoder.wanted(plain) and encoder.calibrated(plain, lambda: pytest.fail("not asked")) == plain
    made = encoder.calibrated(source, lambda: calibration_moments(entry))
    scales = made.kernels["encoder"].options["scales"]
    assert len(scales) == len(nets.TINY.lidar.encoder.layers()) - 1 and min(scales.values()) > 0
    again = encoder.calibrated(made, lambda: pytest.fail("they are there"))
    assert again.kernels["encoder"].options["scales"] == scales
    bare = replace(entry, calibration=None)
    with pytest.raises(CalibrationError, match="int8 needs moments"):
        encoder.calibrated(source, lambda: calibration_moments(bare))


def test_an_encoder_that_costs_too_much_stays_float(tmp_path, monkeypatch) -> None:
    entry = chosen(tmp_path)
    source = encoder.calibrated(read(entry), lambda: calibration_moments(entry))
    plain = Workshop(encoder.in_float(source))
    frames = [nets.frame(seed) for seed in (1, 2)]
    floats = plain.open(quantize.floats(source, Target.load("host")))
    try:
        kept, facts = encoder.judged(source, floats, frames)
        assert kept.kernels["encoder"].options["precision"] == "int8"
        assert facts["encoder"]["precision"] == "int8" and 0 < facts["encoder"]["error"] < quantize.MAX_ERROR
        monkeypatch.setattr(quantize, "MAX_ERROR", facts["encoder"]["error"] / 2)
        left, facts = encoder.judged(source, floats, frames)
        assert not encoder.wanted(left) and "INT8 left out: error" in facts["encoder"]["why"]
        shop = Workshop(kept)
        with shop.opened(floats.payloads) as running:  # another plan for whoever remembers what was measured
            assert running.content != floats.content
        shop.close()
    finally:
        floats.session.close()
        plain.close()


def test_a_bundle_has_it_and_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry = chosen(tmp_path)
    (made,) = build(entry, [Target.load("host")], Options(out=tmp_path, precision="float32"), lambda *_: None)
    step = next(step for step in made.evidence["plan"] if step["name"] == "encoder")
    assert step["precision"] == "int8" and step["error"] < quantize.MAX_ERROR
    engine = edgekit.load(made.path, tune=False)  # its self-test holds it to the float plan
    try:
        (kernel,) = [s for s in engine.manifest.plan if s.name == "encoder"]
        assert kernel.options["precision"] == "int8" and kernel.options["scales"]
        look = engine.pipeline()
        assert look.takes_rigs and len(look(nets.frame(1), score_threshold=0.02)) > 20
    finally:
        engine.close()
