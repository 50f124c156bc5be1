"""The right picture in every format: vivid's colour bars, read as the source describes them."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.pixels import Pixels
from edgekit.runtime.sources.v4l2 import V4l2Source
from tests.camera.conftest import BOARD, HDMI, MULTIPLANAR, USB

BARS = [
    (255, 255, 255),
    (255, 255, 0),
    (0, 255, 255),
    (0, 255, 0),
    (255, 0, 255),
    (255, 0, 0),
    (0, 0, 255),
    (0, 0, 0),
]
"""RGB of "100% Colorbar", left to right."""
LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
"""Weights of red and blue (ITU-R BT.601, BT.709)."""


def yuv(pixels: Pixels) -> np.ndarray:
    """float64 [H, W, 3], Y 0..1, U and V -0.5..0.5; chroma repeated."""
    layout, planes = pixels.layout, [p.astype(float) for p in pixels.planes]
    h, w = layout.height, layout.width
    if layout.format in ("yuyv", "uyvy"):
        first = layout.format == "uyvy"
        y, c = planes[0][:, :, 1 if first else 0], planes[0][:, :, 0 if first else 1]
        u, v = c[:, 0::2].repeat(2, 1), c[:, 1::2].repeat(2, 1)
    else:
        y = planes[0]
        half = planes[1:] if layout.format == "i420" else [planes[1][:, :, 0], planes[1][:, :, 1]]
        u, v = (
            c.repeat(2, 0).repeat(2, 1)[:h, :w] for c in (half[::-1] if layout.format == "nv21" else half)
        )
    if layout.range == "limited":
        return np.stack([(y - 16) / 219, (u - 128) / 224, (v - 128) / 224], 2)
    return np.stack([y / 255, (u - 128) / 255, (v - 128) / 255], 2)


def rgb(pixels: Pixels) -> np.ndarray:
    """float64 [H, W, 3] RGB 0..255, by the definitions."""
    layout = pixels.layout
    if layout.format == "grey":
        return pixels.planes[0] * np.ones(3)  # full range, as the formats' definition has it
    if layout.format in ("rgb", "rgba", "bgr", "bgra"):
        plane = pixels.planes[0][:, :, :3].astype(float)
        return plane if layout.format.startswith("rgb") else plane[:, :, ::-1]
    y, u, v = np.moveaxis(yuv(pixels), 2, 0)
    red, blue = LUMA[layout.matrix]
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    return np.stack([r, g, b], 2) * 255


def check_bars(source: V4l2Source) -> None:
    frame = source.read(10)
    assert frame is not None
    with frame:
        picture = rgb(frame.pixels)
    h, w = picture.shape[:2]
    assert (w, h) == source.size
    for i, colour in enumerate(BARS):
        inside = picture[:, w * i // 8 + 8 : w * (i + 1) // 8 - 8]
        expected = np.array(colour, float)
        if source.layout.format == "grey":
            expected = expected @ [0.2126, 0.7152, 0.0722] * np.ones(3)  # vivid makes grey so
        # the driver rounds once to 8 bits, and chroma weighs at most 1.9: two levels of the source
        assert np.abs(inside - expected).max() <= 4, (source.layout, i, inside.mean((0, 1)), colour)


@pytest.fixture
def bars(vivid):
    def show(path: str) -> None:
        vivid(path).set("test_pattern", "100% Colorbar")
        vivid(path).set("osd_text_mode", "None")

    return show


@pytest.mark.parametrize(
    "format",
    ["yuyv", "uyvy", "nv12", "nv21", "i420", "rgb", "bgr", "bgra", "rgba", "grey", "BGR4", "AR24", "AB24"],
)
def test_colour_bars(bars, format):
    bars(USB)
    with V4l2Source(f"v4l2:{USB}?size=320x180&format={format}", None) as source:
        assert source.layout.format == {"BGR4": "bgra", "AR24": "bgra", "AB24": "rgba"}.get(format, format)
        check_bars(source)


@pytest.mark.parametrize("format", ["yuyv", "i420"])
@pytest.mark.parametrize(("encoding", "matrix"), [("ITU-R 601", "bt601"), ("Rec. 709", "bt709")])
@pytest.mark.parametrize(("quantization", "levels"), [("Full Range", "full"), ("Limited Range", "limited")])
def test_colour_rules_are_the_driver_s(bars, vivid, format, encoding, matrix, quantization, levels):
    bars(USB)
    vivid(USB).set("y_cbcr_encoding", encoding)
    vivid(USB).set("quantization", quantization)
    with V4l2Source(f"v4l2:{USB}?size=320x180&format={format}", None) as source:
        assert (source.layout.matrix, source.layout.range) == (matrix, levels)
        check_bars(source)


def test_colour_rules_can_be_corrected(bars):
    with V4l2Source(f"v4l2:{USB}?size=320x180&format=yuyv&matrix=bt709&range=full", None) as source:
        assert (source.layout.matrix, source.layout.range) == ("bt709", "full")


@pytest.mark.parametrize("format", ["yuyv", "nv12", "i420", "rgb"])
def test_padded_rows(bars, format):
    bars(USB)
    with V4l2Source(f"v4l2:{USB}?size=320x180&format={format}&stride=1024", None) as source:
        with source.read(10) as frame:
            strides = [p.strides[0] for p in frame.pixels.planes]
        assert strides == ([1024, 512, 512] if format == "i420" else [1024] * len(strides))
        check_bars(source)


@pytest.mark.parametrize("format", ["NV12", "NM12", "NM21", "YM12", "yuyv", "rgb"])
@pytest.mark.parametrize("io", ["mmap", "dmabuf", "userptr"])
def test_multi_planar_interface(bars, format, io):
    bars(MULTIPLANAR)
    with V4l2Source(f"v4l2:{MULTIPLANAR}?size=320x180&format={format}&io={io}", None) as source:
        check_bars(source)
        with source.read(10) as frame:
            planes = {"NM12": 2, "NM21": 2, "YM12": 3}.get(format, 1)
            if io == "dmabuf":
                assert len(set(source.dmabuf_fds(frame))) == planes


def test_contiguous_memory(bars):
    bars(BOARD)
    with V4l2Source(f"v4l2:{BOARD}?size=640x360&format=nv12&io=dmabuf", None) as source:
        check_bars(source)


def test_hdmi_declares_its_own_colours(bars):
    bars(HDMI)
    with V4l2Source(f"v4l2:{HDMI}?format=yuyv", None) as source:
        assert source.layout.matrix == "bt709"
        check_bars(source)


def test_camera_takes_the_usual_mode_unasked():
    with V4l2Source(f"v4l2:{USB}", None) as source:  # 1280x720 comes at 12.5 there, 640x480 at 25
        assert (source.size, source.layout.format, source.fps) == ((640, 480), "nv12", 25)


def test_rate_is_agreed_on():
    with V4l2Source("v4l2:0?size=320x180&fps=15", None) as source:
        assert source.fps == 15
