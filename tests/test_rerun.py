"""The Rerun sink, read back with Rerun's own command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import MissingExtraError, OutputError, UsageError
from edgekit.pixels import FORMATS, PixelLayout
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import open_sink
from edgekit.tasks.classify.classification import Classification
from tests.recordings import FOUND, frame


def entities(path: Path) -> dict[str, int]:
    """Number of chunks by entity, as Rerun's own reader counts them; the file is verified first."""
    tool = [sys.executable, "-m", "rerun", "rrd"]
    env = {**os.environ, "TELEMETRY_ENABLED": "false"}
    subprocess.run([*tool, "verify", str(path)], check=True, capture_output=True, env=env)
    out = subprocess.run(
        [*tool, "stats", str(path)], check=True, capture_output=True, text=True, env=env
    ).stdout
    return {name: int(count) for name, count in re.findall(r"^/(\S+): (\d+)$", out, re.MULTILINE)}


@pytest.fixture
def _rerun() -> None:
    pytest.importorskip("rerun", reason="needs rerun-sdk (edgekit[rerun])")


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[rerun\]'"):
        open_sink("rerun:a.rrd")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rerun:a.txt", "Name the file with .rrd"),
        ("rerun:a.rrd?images=png", "images 'png', expected jpeg, raw, none"),
        ("rerun:?image=raw", "Did you mean 'images'"),
    ],
)
def test_wrong_text_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=re.escape(reason)) as error:
        open_sink(text)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("_rerun")
@pytest.mark.parametrize("images", ["raw", "jpeg", "none"])
def test_everything_is_in_the_file_that_rerun_reads(tmp_path: Path, images: str) -> None:
    if images == "jpeg":
        pytest.importorskip("cv2", reason="needs OpenCV")
    path = tmp_path / "a.rrd"
    with open_sink(f"rerun:{path}?images={images}") as sink:
        assert sink.needs_pixels == (images != "none")
        for i, format in enumerate(FORMATS):
            f = frame(i, PixelLayout(format, 64, 48), camera=format)
            sink.write(StreamResult(f, FOUND, 9_000_000, {"engine": 2_000_000}, "yolo"))
    found = entities(path)
    for format in FORMATS:
        assert (f"{format}/image" in found) == (images != "none")
        assert found[f"{format}/image/yolo/boxes"] >= 1
        assert found[f"{format}/yolo/age_ms"] == found[f"{format}/yolo/stage/engine_ms"] == 1


@pytest.mark.usefixtures("_rerun")
def test_files_without_a_clock_and_other_results_are_shown_too(tmp_path: Path) -> None:
    result = Classification(
        np.array([1], np.int32), np.array([0.5], np.float32), np.array([0.5, 0.5], np.float32)
    )
    with open_sink(f"rerun:{tmp_path / 'a.rrd'}?images=raw") as sink:
        for i, clock in enumerate(("media", "none")):
            sink.write(StreamResult(frame(i, clock=clock), result, 1))
    assert entities(tmp_path / "a.rrd")["camera/image/result"] >= 1


@pytest.mark.usefixtures("_rerun")
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "b.rrd").mkdir()
    with pytest.raises(OutputError, match=r"Is a directory\. Choose another path"):
        open_sink(f"rerun:{tmp_path / 'b.rrd'}")


@pytest.mark.usefixtures("_rerun")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.rrd").symlink_to("/dev/full")

    def work() -> None:
        with open_sink(f"rerun:{tmp_path / 'a.rrd'}?images=raw") as sink:
            sink.write(StreamResult(frame(0), FOUND, 1))

    with pytest.raises(OutputError, match=r"No space left on device.*Free some space") as error:
        work()
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("_rerun")
def test_a_viewer_that_is_not_there_is_one_line() -> None:
    with pytest.raises(OutputError, match="Start the viewer with 'rerun'"):
        open_sink("rerun:127.0.0.1:1?images=none")
