"""benchmarks/bevfusion_full.py on the real frame with the small network: the same way, in seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cli_runs import environment
from tests.helpers import ROOT, shared_data

STAGES = [
    "preprocess",
    "camera",
    "depth_raster",
    "lift",
    "pool",
    "voxelize",
    "encoder",
    "lidar",
    "fusion",
    "decode",
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_time_and_memory_of_every_stage():
    frame = shared_data() / "nuscenes_sample/frame.json"
    command = [sys.executable, ROOT / "benchmarks/bevfusion_full.py", "--config", "lite"]
    ran = subprocess.run(
        [*map(str, command), "--rounds", "2", "--threads", "1", "--frame", str(frame)],
        capture_output=True, text=True, timeout=120, env=environment(), check=False,
    )  # fmt: skip
    assert ran.stderr == ""
    (line,) = map(json.loads, ran.stdout.splitlines())
    assert list(line["stages"]) == STAGES
    assert all(ms > 0 for ms in line["stages"].values())
    # a round's own remainder; medians of rounds add up about as well
    assert abs(line["remainder_ms"]) < 0.5 * line["wall_ms"]
    assert ran.returncode == (0 if abs(line["remainder_share"]) <= 0.02 else 1)
    assert set(line["memory"]) == set(STAGES) - {"voxelize"}
    assert all(stage["peak"] >= stage["added"] >= 0 for stage in line["memory"].values())
    assert line["peak_mib"] >= max(stage["peak"] for stage in line["memory"].values())
    assert line["points"] == 34688
    assert line["voxels"] > 3000
    assert line["same_bits"] is True
    assert line["finite"] is True
    # the small network has room for fewer points, which is said; with all of them torch gives the same (test_bevfusion_parts.py)
    assert len(line["notes"]) == 1
    assert "points beyond" in line["notes"][0]
    assert line["difference"] is None


def test_a_frame_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/bevfusion_full.py", "--frame", tmp_path / "none.json"]
    ran = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, env=environment(), check=False
    )
    assert ran.returncode == 2
    assert "no frame" in ran.stderr
    assert "Traceback" not in ran.stderr
