"""What the camera URIs mean as GStreamer pipelines. Text only: needs no GStreamer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgekit.errors import UsageError
from edgekit.runtime.sources.gst_pipelines import (
    CAMERA,
    FORMATS,
    SINK,
    Pipeline,
    package_of,
    pipeline,
)
from tests.helpers import ROOT


def plan(uri: str, *installed: str) -> Pipeline:
    return pipeline(uri, lambda element: element in installed)


def values(found: Pipeline) -> dict[str, str]:
    assert {element for element, _, _ in found.arguments} <= {CAMERA}
    return {name: value for _, name, value in found.arguments}


def test_a_pipeline_gets_an_appsink() -> None:
    assert plan("gst:videotestsrc").launch == f"videotestsrc ! appsink name={SINK}"
    for text in (
        "videotestsrc ! appsink",
        "videotestsrc ! appsink name=a",
        "appsink name=a  videotestsrc ! a.",
    ):
        assert plan(f"gst:{text}").launch == text
    # a name that only looks like one
    assert plan("gst:filesrc location=my-appsink").launch.endswith(f"! appsink name={SINK}")
    # as open_source shows a text of several lines
    assert plan("gst:videotestsrc\\n  ! queue").launch.startswith("videotestsrc   ! queue !")
    assert not plan("gst:videotestsrc").camera


def test_usb() -> None:
    found = plan("usb:0")
    like = "video/x-raw,width=1280,height=720,framerate=30/1"
    assert found.launch == f"v4l2src name={CAMERA} ! {like};video/x-raw ! appsink name={SINK}"
    assert values(found) == {"device": "/dev/video0", "io-mode": "mmap"} and found.camera
    assert values(plan("usb:/dev/v4l/by-id/cam"))["device"] == "/dev/v4l/by-id/cam"
    assert values(plan("usb:12")) == values(plan("usb:///dev/video12"))
    assert values(plan("usb:12"))["device"] == "/dev/video12"
    launch = plan("usb:0?size=640x480").launch
    size = "video/x-raw,width=640,height=480"
    assert f"! {size},framerate=30/1;{size} !" in launch
    launch = plan("usb:0?size=1280x720&fps=29.97&format=yuyv").launch
    assert "! video/x-raw,format=YUY2,width=1280,height=720,framerate=30000/1001 !" in launch
    for said, meant in (
        ("59.94", "60000/1001"),
        ("23.976", "24000/1001"),
        ("12.5", "25/2"),
        ("30000/1001", "30000/1001"),
    ):
        assert f"framerate={meant} !" in plan(f"usb:0?size=1x1&fps={said}").launch
    launch = plan("usb:0?size=640x480&fps=30&format=mjpeg").launch
    assert "! image/jpeg,width=640,height=480,framerate=30/1 ! jpegdec ! videoconvert !" in launch


@pytest.mark.parametrize(("theirs", "ours"), FORMATS.items())
def test_usb_takes_our_names(theirs: str, ours: str) -> None:
    launch = plan(f"usb:0?format={ours}").launch
    assert launch.count(f"format={theirs}") == (0 if theirs in ("BGRA", "RGBA") else 2)


def test_csi() -> None:
    found = plan("csi:1?size=1920x1080&fps=60")
    assert values(found) == {"sensor-id": "1"} and found.camera
    assert found.launch == (
        f"nvarguscamerasrc name={CAMERA} ! "
        "video/x-raw(memory:NVMM),format=NV12,width=1920,height=1080,framerate=60/1 ! "
        f"nvvidconv ! video/x-raw,format=NV12 ! appsink name={SINK}"
    )
    assert [hop.copied for hop in found.hops] == [1920 * 1080 * 3 // 2]  # in the ledger: it is a copy
    assert values(plan("csi:")) == values(plan("csi://0")) == {"sensor-id": "0"}


def test_rtsp() -> None:
    found = plan("rtsp://cam.local:8554/live?channel=1&latency=30&subtype=0")
    assert found.uri == "rtsp://cam.local:8554/live?channel=1&subtype=0" and found.camera
    assert values(found) == {
        "location": "rtsp://cam.local:8554/live?channel=1&subtype=0",
        "latency": "30",
        "drop-on-latency": "true",
        "protocols": "tcp",
        "tcp-timeout": "5000000",
    }
    assert "media=video ! decodebin ! videoconvert ! appsink" in found.launch
    assert values(plan("rtsp://h/x?protocols=udp"))["protocols"] == "udp"
    assert values(plan("rtsps://h/x"))["protocols"] == "tcp+tls"
    # a Jetson's decoders give NVMM
    assert "decodebin ! nvvidconv ! video/x-raw,format=NV12 !" in plan("rtsp://h/x", "nvvidconv").launch


def test_passwords_stay_secret() -> None:
    uri = "rtsp://ann:p%40ss%2Fword@cam/x?user=ann&password=hunter2&channel=1"
    found = plan(uri)
    assert found.uri == "rtsp://***@cam/x?user=***&password=***&channel=1"
    given = values(found)
    assert (given["user-id"], given["user-pw"]) == ("ann", "p@ss/word")
    assert given["location"] == "rtsp://cam/x?user=ann&password=hunter2&channel=1"
    for part in (found.launch, found.uri, found.hide(f"cannot open {given['location']} as p@ss/word")):
        assert not any(secret in part for secret in ("hunter2", "p@ss/word", "p%40ss"))
    bad = "rtsp://ann:hunter2@cam/x?latency=soon"
    with pytest.raises(UsageError) as caught:
        plan(bad)
    assert "hunter2" not in str(caught.value)
    inline = plan("gst:rtspsrc location=rtsp://ann:hunter2@cam/ user-pw=swordfish ! decodebin")
    assert inline.hide(inline.launch).count("***") == 2
    assert "hunter2" not in inline.uri and "swordfish" not in inline.uri


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("gst:", "no pipeline"),
        ("gst:  ", "no pipeline"),
        ("gst:a ! appsink  b ! appsink", "2 appsinks"),
        ("usb:video0", "expected a number or a path"),
        ("usb:0?sise=1x1", "Did you mean 'size'"),
        ("usb:0?size=1x1&size=2x2", "twice"),
        ("usb:0?size=1280", "WIDTHxHEIGHT"),
        ("usb:0?size=0x4", "WIDTHxHEIGHT"),
        ("usb:0?fps=0", "fps '0'"),
        ("usb:0?fps=1/0", "fps '1/0'"),
        ("usb:0?fps=fast", "fps 'fast'"),
        ("usb:0?format=yuy2", "Did you mean 'yuyv'"),
        ("usb:0?format=h264", "unknown format"),
        ("csi:left", "expected a number"),
        ("csi:0?format=nv12", "unknown key"),
        ("rtsp://", "no usable host"),
        ("rtsp:/x", "no usable host"),
        ("rtsp://:554/x", "no usable host"),
        ("rtsp://h:port/x", "no usable host"),
        ("rtsp://h:99999/x", "no usable host"),
        ("rtsp://[h/x", "not a valid URI"),
        ("rtsp://h/x?latency=-1", "latency '-1'"),
        ("rtsp://h/x?protocols=http", "expected tcp or udp"),
    ],
)
def test_wrong_uris_are_refused(uri: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(uri)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_missing_elements_name_their_package() -> None:
    assert package_of("v4l2src") == "Run: apt install gstreamer1.0-plugins-good"
    assert package_of("avdec_h264") == "Run: apt install gstreamer1.0-libav"
    assert "nvidia-l4t-gstreamer" in package_of("nvarguscamerasrc")
    assert "gst-inspect-1.0" in package_of("foo")


def test_without_gstreamer() -> None:
    """The library is looked for only when a pipeline is opened, and its absence says what to install."""
    code = """
import ctypes, sys
real = ctypes.CDLL
def missing(name, *args, **kwargs):
    if name and "gst" in str(name):
        raise OSError(f"{name}: cannot open shared object file")
    return real(name, *args, **kwargs)
ctypes.CDLL = missing
from edgekit.errors import MissingExtraError
from edgekit.runtime.sources import open_source
try:
    open_source("gst:videotestsrc")
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "Run: apt install libgstreamer1.0-0 gstreamer1.0-plugins-base" in done.stdout
