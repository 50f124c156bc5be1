"""The Rerun sink, read back with Rerun's own command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import MissingExtraError, OutputError, UsageError
from edgekit.pixels import FORMATS, PixelLayout
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import open_sink
from edgekit.runtime.sinks.rerun_rig import log_rig
from edgekit.runtime.sinks.rigs import shown
from edgekit.tasks.classify.classification import Classification
from tests.recordings import FOUND, frame
from tests.rig_items import rig_items


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
@pytest.mark.parametrize("images", ["raw", "jpeg", "none"])
def test_a_rig_is_shown_in_space(tmp_path: Path, images: str) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV")
    path = tmp_path / "a.rrd"
    items = rig_items()
    with open_sink(f"rerun:{path}?images={images}") as sink:
        for item in items:
            sink.write(item)
    found = entities(path)
    for name in items[0].frame.rig.rig.cameras:
        assert found[f"rig/ego/{name}"] >= 1, "a pinhole where it stands"
        assert found[f"rig/ego/{name}/image"] >= 1
    assert found["rig/ego/lidar/points"] >= 1
    assert found["rig/ego/lidar/bev/boxes"] >= 1
    assert found["rig/ego/lidar/labels"] >= 1
    assert found["rig/bev/result"] >= 1
    assert found["rig/bev/age_ms"] >= 1
    assert "rig/image" not in found, "all cameras in one picture would be a second copy"


@pytest.mark.usefixtures("_rerun")
def test_what_is_missing_is_not_shown_as_if_it_held(tmp_path: Path) -> None:
    """Through Rerun's own log calls: what each entity was told, in order."""
    import rerun

    told: dict[str, list[str]] = {}

    class Stream:
        def log(self, entity: str, *things: Any) -> None:
            told.setdefault(entity, []).extend(type(thing).__name__ for thing in things)

    whole, _, blind = rig_items()
    for item in (whole, blind):
        log_rig(rerun, Stream(), "rig", "", item, lambda image: rerun.Image(image, color_model="BGR"))
    assert told["rig/ego/lidar/points"] == ["Points3D", "Clear"]
    assert told["rig/ego/CAM_FRONT/image"] == ["Image", "Clear"]
    assert told["rig/ego/CAM_BACK/image"] == ["Image", "Image"]
    assert told["rig/result"] == ["TextLog", "TextLog"]
    # a result whose frame was not kept has its boxes all the same
    told.clear()
    bare = replace(whole, frame=whole.frame.without_pixels())
    log_rig(rerun, Stream(), "rig", "", bare, lambda image: None)
    assert set(told) == {"rig/ego/lidar/boxes", "rig/ego/lidar/velocities", "rig/result"}


@pytest.mark.usefixtures("_rerun")
def test_boxes_stand_where_they_are() -> None:
    import rerun

    said: dict[str, Any] = {}

    class Stream:
        def log(self, entity: str, thing: Any) -> None:
            said[entity] = thing

    (item, *_) = rig_items()
    log_rig(rerun, Stream(), "rig", "", item, lambda image: None)
    boxes, ours = said["rig/ego/lidar/boxes"], shown(item.result)
    assert len(ours) < len(item.result), "one of them is nowhere"
    centers = np.array(boxes.centers.as_arrow_array().to_pylist())
    assert np.allclose(centers, [each.box[:3] for each in ours])
    assert np.allclose(
        2 * np.array(boxes.half_sizes.as_arrow_array().to_pylist()), [each.box[3:6] for each in ours]
    )
    turns = np.array(boxes.quaternions.as_arrow_array().to_pylist())
    assert np.allclose(
        2 * np.arctan2(turns[:, 2], turns[:, 3]) % (2 * np.pi),
        [each.box[6] % (2 * np.pi) for each in ours],
        atol=1e-5,
    )
    moving = [each for each in ours if each.velocity is not None]
    assert len(said["rig/ego/lidar/velocities"].vectors.as_arrow_array()) == len(moving) > 0


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
