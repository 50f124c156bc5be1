"""What breaks says so in one line, leaves nothing behind, and works again afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from edgekit.errors import EdgekitError, UsageError
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.sources.v4l2 import V4l2Source, list_cameras
from tests.camera.conftest import BOARD, HDMI, MULTIPLANAR, USB

SMALL = f"v4l2:{USB}?size=320x180&format=yuyv"


def works() -> None:
    with V4l2Source(SMALL, None) as source:
        for _ in range(3):
            source.read(10).release()


def drain(source: V4l2Source, frames: int = 100) -> None:
    for _ in range(frames):
        source.read(10).release()


def lost(source: V4l2Source) -> str:
    """Read until the camera is lost; what it says, in one line."""
    with pytest.raises(SourceLost) as caught:
        drain(source)
    text = str(caught.value)
    assert "\n" not in text and source._device.path in text
    return text


def test_a_damaged_buffer_is_marked(vivid):
    with V4l2Source(SMALL, None) as source:
        with source.read(10) as frame:
            assert not frame.corrupt
        vivid(USB).press("inject_v4l2_buf_flag_error")
        marks = []
        for _ in range(10):
            with source.read(10) as frame:
                marks.append(frame.corrupt)
        assert marks.count(True) == 1
        assert not marks[-1]


def test_unplugged_and_plugged_in_again(vivid):
    camera = vivid(USB)
    with V4l2Source(SMALL, None) as source:
        kept = source.read(10)
        before = kept.pixels.copy()
        camera.press("disconnect")
        assert "unplugged" in lost(source)
        assert "unplugged" in lost(source)
        with pytest.raises(SourceLost, match="no such device"):
            V4l2Source(SMALL, None)
        assert (before.planes[0] == kept.pixels.planes[0]).all()
        kept.release()  # to a camera that is gone
        del kept
    works()


def test_unplugged_while_waiting(vivid):
    camera = vivid(USB)
    with V4l2Source(f"v4l2:{USB}?size=3840x2160&format=nv12&fps=1", None) as source:
        source.read(20).release()
        camera.press("disconnect")
        began = time.monotonic()
        assert "unplugged" in lost(source)
        assert time.monotonic() - began < 8
    works()


def test_fatal_streaming_error(vivid):
    with V4l2Source(SMALL, None) as source:
        source.read(10).release()
        vivid(USB).press("inject_fatal_streaming_error")
        assert "streaming error" in lost(source)
    works()


@pytest.mark.parametrize(
    ("control", "doing"),
    [
        ("inject_vidioc_reqbufs_error", "asking for mmap buffers"),
        ("inject_vidioc_qbuf_error", "giving a buffer back"),
        ("inject_vidioc_streamon_error", "starting"),
    ],
)
def test_a_camera_that_cannot_be_started(vivid, control, doing):
    vivid(USB).press(control)
    with pytest.raises(SourceLost, match=f"failed while {doing}"):
        V4l2Source(SMALL, None)
    works()


def test_a_buffer_that_cannot_be_given_back(vivid):
    with V4l2Source(SMALL, None) as source:
        frame = source.read(10)
        vivid(USB).press("inject_vidioc_qbuf_error")
        frame.release()  # a reader, perhaps on another thread: it is not told
        assert "giving a buffer back" in lost(source)
    works()


def test_a_camera_in_use_says_by_whom():
    first = V4l2Source(SMALL, None)
    with pytest.raises(SourceLost, match="busy, in use elsewhere in this process"):
        V4l2Source(f"v4l2:{USB}?size=640x360&format=rgb", None)
    first.close()
    script = f"from edgekit.runtime.sources.v4l2 import *; s = V4l2Source({SMALL!r}, None); print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(SourceLost, match=rf"busy, in use by .* \(process {other.pid}\)"):
            V4l2Source(SMALL, None)
    finally:
        other.communicate("\n", timeout=60)
    works()


def test_the_signal_changes(vivid):
    with V4l2Source(f"v4l2:{HDMI}?format=yuyv", None) as source:
        source.read(10).release()
        vivid(HDMI).set("dv_timings_signal_mode", "No Signal")
        assert "its signal changed" in lost(source)
    vivid(HDMI).set("dv_timings_signal_mode", "Current DV Timings")
    with V4l2Source(f"v4l2:{HDMI}?format=yuyv", None) as source:
        source.read(10).release()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"v4l2:{USB}?size=321x200", "no size 321x200, expected 320x180, 640x360"),
        (f"v4l2:{USB}?size=1280x720&fps=30", "no 30 frames per second, expected at most 12.5"),
        (f"v4l2:{USB}?ctrl.brightnes=1", "no control 'brightnes'. Did you mean 'brightness'"),
        (f"v4l2:{USB}?ctrl.brightness=256", "control brightness: expected 0 to 255, got 256"),
        ("v4l2:/dev/null", "not a video device"),
        ("v4l2:/dev", "not a device"),
        ("v4l2:7", "no such device .*Here are: /dev/video0, /dev/video1"),
    ],
)
def test_wrong_wishes_are_told(uri, message):
    with pytest.raises(EdgekitError, match=message):
        V4l2Source(uri, None)


def test_controls_are_set():
    with V4l2Source(f"{SMALL}&ctrl.brightness=77", None) as source:
        assert source._device.get_control("brightness") == 77
    V4l2Source(f"{SMALL}&ctrl.brightness=128", None).close()


def test_without_permission():
    """As a user outside the group video."""
    script = (
        f"import os; from edgekit.runtime.sources.v4l2 import *; os.chmod({USB!r}, 0o600); os.setuid(65534)\n"
        f"try: V4l2Source({SMALL!r}, None)\nexcept Exception as e: print(type(e).__name__, e)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    finally:
        os.chmod(USB, 0o660)
    assert done.stdout.startswith(
        f"UsageError camera {USB}: no permission (EACCES). Add yourself to the group video"
    )


def test_listing():
    cameras = list_cameras()
    assert [c.path for c in cameras] == [USB, BOARD, MULTIPLANAR, HDMI]
    first = cameras[0]
    assert (first.name, first.driver, first.bus, first.problem) == (
        "vivid",
        "vivid",
        "platform:vivid-000",
        "",
    )
    assert any(f.startswith("yuyv 320x180@60") for f in first.formats)


def test_a_camera_is_found_under_another_number():
    """Plugged in again, a camera may get another node: it is known by its name and its port."""
    uri = SMALL.replace(USB, "/dev/video9")
    known = ("vivid", "platform:vivid-001", "0")
    with V4l2Source(uri, None, known=known) as source:
        assert source._device.path == BOARD
        with_same_memory = source.again
    with with_same_memory() as source:
        assert source._device.path == BOARD
    with pytest.raises(SourceLost, match="video9: no such device"):
        V4l2Source(uri, None, known=("another", "usb-1", "0"))


def test_usage_error_is_not_a_loss():
    with pytest.raises(UsageError):
        V4l2Source(f"v4l2:{USB}?size=321x200", None)
