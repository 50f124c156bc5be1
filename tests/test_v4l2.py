"""The V4L2 source without a camera: its structures, URIs, choice of formats and errors. With one: tests/camera."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import EdgekitError, StreamError, UsageError
from edgekit.pixels import PixelLayout, Pixels
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.sources import open_source
from edgekit.runtime.sources import v4l2_abi as abi
from edgekit.runtime.sources.v4l2 import Options, list_cameras, parse_uri, passed
from edgekit.runtime.sources.v4l2_buffers import pages
from edgekit.runtime.sources.v4l2_device import explain, lay_out
from edgekit.runtime.sources.v4l2_modes import Mode, SizeRange, choose

SIZES = {  # sizeof on x86-64 and aarch64
    "Capability": ("v4l2_capability", 104),
    "FmtDesc": ("v4l2_fmtdesc", 64),
    "FrameSize": ("v4l2_frmsizeenum", 44),
    "FrameInterval": ("v4l2_frmivalenum", 52),
    "PixFormat": ("v4l2_pix_format", 48),
    "PixFormatMplane": ("v4l2_pix_format_mplane", 192),
    "FormatOf": ("v4l2_format", 208),
    "StreamParm": ("v4l2_streamparm", 204),
    "RequestBuffers": ("v4l2_requestbuffers", 20),
    "Plane": ("v4l2_plane", 64),
    "Buffer": ("v4l2_buffer", 88),
    "ExportBuffer": ("v4l2_exportbuffer", 64),
    "QueryControl": ("v4l2_queryctrl", 68),
    "EventSubscription": ("v4l2_event_subscription", 32),
    "Event": ("v4l2_event", 136),
}
REQUESTS = {
    "QUERYCAP": 0x80685600, "ENUM_FMT": 0xC0405602, "G_FMT": 0xC0D05604, "S_FMT": 0xC0D05605, "REQBUFS": 0xC0145608,
    "QUERYBUF": 0xC0585609, "QBUF": 0xC058560F, "EXPBUF": 0xC0405610, "DQBUF": 0xC0585611, "STREAMON": 0x40045612,
    "STREAMOFF": 0x40045613, "G_PARM": 0xC0CC5615, "S_PARM": 0xC0CC5616, "G_CTRL": 0xC008561B, "S_CTRL": 0xC008561C,
    "QUERYCTRL": 0xC0445624, "S_INPUT": 0xC0045627, "TRY_FMT": 0xC0D05640, "ENUM_FRAMESIZES": 0xC02C564A,
    "ENUM_FRAMEINTERVALS": 0xC034564B, "DQEVENT": 0x80885659, "SUBSCRIBE_EVENT": 0x4020565A,
}  # fmt: skip
FIELDS = {  # ours -> the header's
    "Buffer": {
        "timestamp": "timestamp",
        "sequence": "sequence",
        "memory": "memory",
        "m": "m",
        "length": "length",
    },
    "FormatOf": {"fmt": "fmt"},
    "PixFormat": {"priv": "priv", "ycbcr_enc": "ycbcr_enc", "quantization": "quantization"},
    "PixFormatMplane": {"plane_fmt": "plane_fmt", "num_planes": "num_planes", "quantization": "quantization"},
    "Plane": {"m": "m", "data_offset": "data_offset"},
    "Event": {"u": "u", "pending": "pending", "id": "id"},
    "FrameSize": {"values": "discrete"},
    "FrameInterval": {"values": "discrete"},
    "ExportBuffer": {"fd": "fd"},
    "QueryControl": {"minimum": "minimum", "flags": "flags"},
}


def test_structures_have_the_kernel_s_sizes():
    assert {name: ctypes.sizeof(getattr(abi, name)) for name in SIZES} == {
        n: s for n, (_, s) in SIZES.items()
    }


def test_requests_have_the_kernel_s_numbers():
    assert {name: getattr(abi, name) for name in REQUESTS} == REQUESTS
    assert abi.DMA_BUF_SYNC == 0x40086200


def test_structures_match_the_header_of_this_machine(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/usr/include/linux/videodev2.h").is_file():
        pytest.skip("needs a C compiler and the kernel's headers")
    wanted, lines = {}, []
    for name, (kind, _) in SIZES.items():
        wanted[name] = ctypes.sizeof(getattr(abi, name))
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {kind}));')
        for ours, theirs in FIELDS.get(name, {}).items():
            wanted[f"{name}.{ours}"] = getattr(getattr(abi, name), ours).offset
            lines.append(f'printf("{name}.{ours} %zu\\n", offsetof(struct {kind}, {theirs}));')
    for name in REQUESTS:
        wanted[name] = getattr(abi, name)
        lines.append(f'printf("{name} %lu\\n", (unsigned long)(unsigned)VIDIOC_{name});')
    for name in (
        "BUF_FLAG_ERROR", "BUF_FLAG_TIMESTAMP_MASK", "BUF_FLAG_TIMESTAMP_MONOTONIC", "BUF_FLAG_TSTAMP_SRC_MASK",
        "BUF_FLAG_TSTAMP_SRC_SOE", "CAP_VIDEO_CAPTURE_MPLANE", "CAP_STREAMING", "CAP_DEVICE_CAPS", "PIX_FMT_PRIV_MAGIC",
        "EVENT_SOURCE_CHANGE", "CID_MIN_BUFFERS_FOR_CAPTURE", "CTRL_FLAG_NEXT_CTRL",
    ):  # fmt: skip
        wanted[name] = getattr(abi, name)
        lines.append(f'printf("{name} %lu\\n", (unsigned long)(unsigned)V4L2_{name});')
    source = tmp_path / "abi.c"
    source.write_text(
        "#include <linux/videodev2.h>\n#include <stdio.h>\n#include <stddef.h>\nint main(void) {"
        + "\n".join(lines)
        + "}\n"
    )
    subprocess.run([compiler, "-o", tmp_path / "abi", source], check=True, timeout=60)
    printed = subprocess.run(
        [tmp_path / "abi"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert {k: int(v) for k, v in (line.split() for line in printed.splitlines())} == wanted


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("v4l2:0", Options("/dev/video0")),
        ("v4l2:/dev/video12", Options("/dev/video12")),
        ("v4l2:///dev/video1", Options("/dev/video1")),
        ("v4l2://2", Options("/dev/video2")),
        ("v4l2:/dev/v4l/by-id/usb-Cam%20A-index0", Options("/dev/v4l/by-id/usb-Cam A-index0")),
        (
            "v4l2:/dev/video0?size=1280x720&format=yuyv&fps=30&io=dmabuf&buffers=8",
            Options("/dev/video0", (1280, 720), "yuyv", 30.0, "dmabuf", 8),
        ),
        ("v4l2:0?format=YUY2&fps=7.5", Options("/dev/video0", format="yuyv", fps=7.5)),
        ("v4l2:0?format=nm12", Options("/dev/video0", format="NM12")),
        ("v4l2:0?format=rgb24&stride=4096", Options("/dev/video0", format="rgb", stride=4096)),
        ("v4l2:0?matrix=bt709&range=full", Options("/dev/video0", matrix="bt709", range="full")),
        (
            "v4l2:0?ctrl.exposure_auto=1&ctrl.gain=-3&input=2",
            Options("/dev/video0", input=2, controls={"exposure_auto": 1, "gain": -3}),
        ),
    ],
)
def test_uris(uri, options):
    assert parse_uri(uri) == options


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("v4l2:", "no device, expected v4l2:/dev/video0"),
        ("v4l2:/dev/video%00", "no device, expected v4l2:/dev/video0"),
        ("v4l2:0?sise=1x1", "unknown option 'sise'. Did you mean 'size'"),
        ("v4l2:0?size=1280", "size: expected WIDTHxHEIGHT such as 1280x720, got '1280'"),
        ("v4l2:0?size=0x720", "size: expected"),
        ("v4l2:0?format=yuvy", "unknown format 'yuvy'. Did you mean 'yuyv'"),
        ("v4l2:3?format=mjpeg", "compressed, expected pixels as they are. Use usb:/dev/video3"),
        ("v4l2:0?fps=0", "fps: expected"),
        ("v4l2:0?fps=nan", "fps: expected"),
        ("v4l2:0?io=read", "io: expected mmap or dmabuf or userptr, got 'read'"),
        ("v4l2:0?buffers=2", "buffers: expected a whole number from 3 to 32, got '2'"),
        ("v4l2:0?ctrl.gain=loud", "ctrl.gain: expected a whole number"),
        ("v4l2:0?range=wide", "range: expected full or limited"),
    ],
)
def test_uris_that_are_wrong(uri, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse_uri(uri)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40))
def test_no_uri_breaks_the_parser(text):
    with contextlib.suppress(UsageError):
        assert parse_uri("v4l2:" + text).path.isprintable()


def mode(name: str, width: int, height: int, *rates: float, **more) -> Mode:
    codes = {c.format: code for code, c in reversed(abi.PIXEL_CODES.items())}
    return Mode(name, codes.get(name, 1), name in codes, name == "MJPEG", width, height, rates, **more)


WEBCAM = [
    mode("MJPEG", 1920, 1080, 30.0),
    mode("MJPEG", 1280, 720, 30.0),
    mode("yuyv", 640, 480, 15.0, 30.0),
    mode("yuyv", 1280, 720, 10.0),
    mode("yuyv", 320, 240, 30.0),
]


def test_a_live_rate_goes_before_size():
    chosen = choose(WEBCAM, "/dev/video0")
    assert (chosen.width, chosen.height, chosen.rate(None)) == (640, 480, 30.0)


def test_wishes_are_fulfilled_or_refused():
    assert choose(WEBCAM, "/dev/video0", size=(1280, 720)).rate(None) == 10.0
    assert choose(WEBCAM, "/dev/video0", fps=12).rate(12) == 15.0
    with pytest.raises(UsageError, match=r"no 30 frames per second, expected at most 10 \(1280x720 yuyv\)"):
        choose(WEBCAM, "/dev/video0", size=(1280, 720), fps=30)
    with pytest.raises(UsageError, match=r"1920x1080 is offered only as MJPEG. Use usb:/dev/video0"):
        choose(WEBCAM, "/dev/video0", size=(1920, 1080))
    with pytest.raises(UsageError, match="no size 800x600, expected 640x480, "):
        choose(WEBCAM, "/dev/video0", size=(800, 600))
    with pytest.raises(UsageError, match="no format nv12, expected one of yuyv"):
        choose(WEBCAM, "/dev/video0", format="nv12")


def test_a_camera_without_raw_pixels():
    with pytest.raises(
        UsageError, match=r"offers only MJPEG, expected pixels as they are. Use usb:/dev/video2 "
    ):
        choose(WEBCAM[:2], "/dev/video2")
    with pytest.raises(
        UsageError, match=r"offers RG10, expected one of nv12, i420, .* or csi:0 for a bare sensor"
    ):
        choose([Mode("RG10", 1, False, False, 0, 0)], "/dev/video0")
    with pytest.raises(UsageError, match="offers no format"):
        choose([], "/dev/video0")


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (("rgb", "yuyv", "grey", "bgra", "nv12"), "nv12"),
        (("grey", "bgra", "bgr"), "bgr"),
        (("grey", "rgba"), "rgba"),
        (("grey",), "grey"),
        (("uyvy", "i420"), "i420"),
    ],
)
def test_few_bytes_first_and_colour_before_grey(names, best):
    assert choose([mode(n, 640, 480, 30.0) for n in names], "c").name == best


@pytest.mark.parametrize(
    ("sizes", "best"),
    [
        ([(640, 480), (1280, 720), (1920, 1080)], (1280, 720)),
        ([(1920, 1080), (3840, 2160)], (1920, 1080)),
        ([(320, 240), (800, 600)], (800, 600)),
    ],
)
def test_size_taken_unasked(sizes, best):
    chosen = choose([mode("nv12", w, h, 30.0) for w, h in sizes], "c")
    assert (chosen.width, chosen.height) == best


def test_rates():
    assert mode("nv12", 2, 2).rate(None) is None  # unknown: left to the driver
    assert mode("nv12", 2, 2).rate(12) == 12
    assert mode("nv12", 2, 2, 29.97, 60.0).rate(30) == 29.97
    assert mode("nv12", 2, 2, 5.0, 120.0, any_rate=True).rate(33) == 33
    assert mode("nv12", 2, 2, 5.0, 20.0, any_rate=True).rate(None) == 20
    assert mode("nv12", 2, 2, 60.0, 120.0).rate(None) == 60


def test_free_sizes():
    free = SizeRange(16, 4096, 16, 16, 2160, 2)
    assert free.nearest(None) == (1280, 720)
    assert free.nearest((1000, 601)) == (992, 600)
    assert free.nearest((9000, 1)) == (4096, 16)
    assert SizeRange(32, 640, 0, 32, 480, 0).nearest((700, 700)) == (640, 480)


@pytest.mark.parametrize(
    ("declared", "meant"),
    [  # colorspace, ycbcr_enc, quantization
        ((8, 0, 0), ("bt601", "limited")),  # sRGB, what USB cameras say
        ((7, 0, 0), ("bt601", "full")),  # JPEG
        ((3, 0, 0), ("bt709", "limited")),  # REC709
        ((1, 0, 0), ("bt601", "limited")),  # SMPTE170M
        ((8, 2, 1), ("bt709", "full")),
        ((3, 1, 2), ("bt601", "limited")),
        ((10, 0, 0), ("bt709", "limited")),  # BT.2020: the nearer of the two
        ((7, 2, 2), ("bt709", "limited")),
    ],
)
def test_colours_as_the_kernel_defines_them(declared, meant):
    assert abi.colour(*declared) == meant


@pytest.mark.parametrize(
    ("format", "strides", "sizes", "rows", "offsets", "memory"),
    [
        ("yuyv", (768,), (768 * 180,), (768,), (0,), (0,)),
        ("nv12", (384,), (384 * 270,), (384, 384), (0, 384 * 180), (0, 0)),
        ("i420", (384,), (384 * 270,), (384, 192, 192), (0, 384 * 180, 384 * 180 + 192 * 90), (0, 0, 0)),
        ("nv12", (384, 512), (384 * 180, 512 * 90), (384, 512), (0, 0), (0, 1)),
        ("i420", (384, 192, 192), (1, 1, 1), (384, 192, 192), (0, 0, 0), (0, 1, 2)),
    ],
)
def test_where_planes_lie(format, strides, sizes, rows, offsets, memory):
    form = lay_out(0, PixelLayout(format, 320, 180), strides, sizes)
    assert (form.strides, form.offsets, form.memory) == (rows, offsets, memory)
    if len(sizes) == 1:  # and the contract's own view of such a buffer agrees
        assert Pixels.view(np.zeros(sizes[0], np.uint8), form.layout, form.strides, form.offsets)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENODEV, SourceLost, "unplugged, seen while streaming"),
        (errno.EIO, SourceLost, "the driver reports a streaming error while streaming"),
        (errno.EPIPE, SourceLost, "the driver reports a streaming error"),
        (errno.ENOSPC, SourceLost, "not enough USB bandwidth"),
        (errno.EBUSY, SourceLost, "busy, in use by a process of another user"),
        (errno.EACCES, UsageError, "no permission .*sudo usermod -aG video"),
        (errno.EPERM, UsageError, "no permission"),
        (errno.ENOMEM, StreamError, "no memory for its buffers .*buffers=4"),
        (errno.EINVAL, SourceLost, "failed while streaming"),
        (9999, SourceLost, "failed while streaming"),
    ],
)
def test_errors_in_words(number, kind, message):
    error = explain("/dev/video77", OSError(number, "text"), "streaming")
    assert type(error) is kind
    assert re.match(f"camera /dev/video77: {message}", str(error)), str(error)
    assert "\n" not in str(error)


def test_a_camera_that_is_not_there_may_come():
    with pytest.raises(SourceLost, match="camera /dev/video98: no such device"):
        open_source("v4l2:98")


@pytest.mark.parametrize("path", ["/dev/null", "/dev", "/etc/passwd"])
def test_what_is_no_camera(path):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UsageError, match="camera"):
        open_source(f"v4l2:{path}")
    assert os.listdir("/proc/self/fd") == before


def test_listing_works_without_cameras():
    assert all(c.path.startswith("/dev/video") for c in list_cameras())


@pytest.mark.parametrize(
    ("last", "now", "frames"),
    [(0, 1, 1), (5, 9, 4), (2**32 - 1, 0, 1), (2**32 - 2, 3, 5), (0, 0, 1), (7, 3, 1), (0, 2**31, 1)],
)
def test_the_driver_s_count(last, now, frames):
    assert passed(last, now) == frames


def test_own_memory_begins_on_a_page():
    block = pages(5000)
    assert block.size == 5000 and block.ctypes.data % 4096 == 0 and block.flags.writeable


def test_errors_are_ours():
    assert issubclass(SourceLost, EdgekitError)
