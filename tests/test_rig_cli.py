"""`edgekit run` with the sensors of a rig, each a source of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgekit.cli.rig_options import named_sources, read_sync
from edgekit.errors import UsageError
from edgekit.runtime.sync import SyncOptions
from edgekit.synth.street_rig import street_rig
from tests import fusion_plans as plans
from tests.cli_runs import cli
from tests.rig_doubles import sensor


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plans.write(tmp_path_factory.mktemp("rig") / "tiny.host.edge", tolerance=1e-3)


def test_sensors_by_name(bundle: Path, tmp_path: Path) -> None:
    rig, out = tmp_path / "rig.toml", tmp_path / "out.jsonl"
    street_rig(3, 64, 64).write(rig)
    words = [
        f"--source={name}={sensor(name, 3, fps=10, live=0)}" for name in ("CAM_FRONT", "CAM_BACK", "lidar")
    ]
    ran = cli("run", bundle, "--rig", rig, "--sync", "window=40,timeout=500", *words, "--sink", out, "--json")
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out)
    assert summary["frames"] == 3
    assert summary["missing"] == {"tiny": {}} and summary["drops"] == {}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["camera"] for line in lines] == ["rig"] * 3
    assert lines[0]["missing"] == [
        "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK_LEFT",
    ]  # fmt: skip


def test_one_misspelt_name_is_told(bundle: Path, tmp_path: Path) -> None:
    rig = tmp_path / "rig.toml"
    street_rig(3, 64, 64).write(rig)
    ran = cli("run", bundle, "--rig", rig, f"--source=CAM_FRNT={sensor('CAM_FRONT', 2, fps=10, live=0)}")
    assert ran.code == 2
    assert "source 'CAM_FRNT': no sensor of the rig. Did you mean 'CAM_FRONT' or" in ran.err


def test_a_sensor_that_ends_early_is_told(bundle: Path) -> None:
    words = [
        f"--source={name}={sensor(name, n, fps=10, live=0)}" for name, n in (("CAM_FRONT", 2), ("lidar", 4))
    ]
    ran = cli("run", bundle, *words)
    assert ran.code == 0, ran.err
    assert "tiny: without CAM_FRONT lost 2" in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source=lidar=x", "--source=y"], "option --source y: has no name"),
        (["--source=lidar=x", "--source=lidar=y"], "given twice"),
        (["--source=lidar=x", "--sync", "windw=3"], "window"),
        (["--source=lidar=x", "--sync", "window=three"], "expected a number"),
        (["--source=lidar=x", "--sync", "window=0"], "window_ms"),
        (["--source=lidar=x", "--rig", "nowhere.toml"], "nowhere.toml"),
        (["--source=CAM_FRNT=x", "--source=lidar=x"], "x"),
    ],
)
def test_wrong_options_are_one_line(bundle: Path, words: list[str], said: str) -> None:
    ran = cli("run", bundle, *words)
    assert ran.code == 2
    assert said in ran.err and len(ran.err.strip().splitlines()) == 1


def test_names_are_names_only_where_no_file_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_sources(["a=b.mp4"]) == {"a": "b.mp4"}
    Path("a=b.mp4").touch()
    assert named_sources(["a=b.mp4"]) == ["a=b.mp4"]
    for uri in ("synthetic://street?seed=3", "v4l2:/dev/video0?size=64x64", "gst:videotestsrc pattern=ball"):
        assert named_sources([uri]) == [uri]
    assert read_sync(None) is None
    assert read_sync("depth=4,window=12.5") == SyncOptions(depth=4, window_ms=12.5)
    with pytest.raises(UsageError, match="depth"):
        read_sync("depth=4.5")
