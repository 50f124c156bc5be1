"""From the driver's buffer to the network's input without a copy: told by addresses, not by our own counter."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit import kernels
from edgekit.kernels.letterbox import plan, reference
from edgekit.runtime.sources import open_source
from edgekit.runtime.sources.v4l2 import V4l2Source
from edgekit.runtime.sources.v4l2_buffers import pages
from edgekit.spec import DType
from edgekit.tasks.preprocess import ImagePreprocess
from tests.camera.conftest import BOARD, MULTIPLANAR, USB, mappings
from tests.camera.test_pictures import BARS

SPECS = {
    "float32 NCHW": ImagePreprocess(160, 160),
    "uint8 NHWC": ImagePreprocess(160, 160, layout="NHWC", dtype=DType.uint8),
}


@pytest.mark.parametrize("spec", list(SPECS))
@pytest.mark.parametrize(
    ("uri", "mapped"),
    [
        *((f"v4l2:{USB}?size=320x180&format={f}", USB) for f in ("yuyv", "uyvy", "nv12", "i420", "rgb", "grey")),
        (f"v4l2:{USB}?size=320x180&format=yuyv&stride=768", USB),
        (f"v4l2:{BOARD}?size=320x180&format=nv12&io=dmabuf", "/dmabuf"),
        (f"v4l2:{MULTIPLANAR}?size=320x180&format=NM12", MULTIPLANAR),
    ],
)  # fmt: skip
def test_the_kernel_reads_the_driver_s_buffer_and_writes_the_input(uri, mapped, spec):
    assert kernels.native() is not None, "the native kernels are not built"
    rule = SPECS[spec]
    shape = (1, 3, 160, 160) if rule.layout == "NCHW" else (1, 160, 160, 3)
    given = np.zeros(shape, rule.dtype.value)
    with open_source(uri) as source:
        ranges = mappings(mapped)
        for _ in range(3):
            with source.read(10) as frame:
                fused = plan(rule, frame.pixels.layout)
                fused.run(frame.pixels, given)
                read, written = fused.addresses(frame.pixels, given)
                copy = frame.pixels.copy()
            assert written == given.__array_interface__["data"][0]
            assert len(read) == len(copy.planes)
            assert all(any(at in r for r in ranges) for at in read)
            # what it read there is the picture: as the definition in numpy, from a copy, has it
            expected = np.zeros_like(given)
            reference.letterbox(copy, fused._tables, fused.placement, expected, rule.layout == "NHWC")
            assert np.array_equal(given, expected)


def test_user_memory_is_read_where_it_was_allocated():
    blocks = []

    def allocate(nbytes: int) -> np.ndarray:  # on a Jetson: memory that CPU and GPU share
        blocks.append(pages(nbytes))
        return blocks[-1]

    uri = f"v4l2:{USB}?size=320x180&format=yuyv&io=userptr"
    with V4l2Source(uri, None, allocator=allocate) as source, source.read(10) as frame:
        given = np.zeros((1, 3, 160, 160), np.float32)
        (read,), _ = plan(SPECS["float32 NCHW"], frame.pixels.layout).addresses(frame.pixels, given)
    assert read in {b.ctypes.data for b in blocks}


@pytest.mark.parametrize("format", ["yuyv", "nv12", "i420", "rgb"])
def test_the_kernel_sees_the_right_colours(vivid, format):
    vivid(USB).set("test_pattern", "100% Colorbar")
    vivid(USB).set("osd_text_mode", "None")
    with open_source(f"v4l2:{USB}?size=320x180&format={format}") as source, source.read(10) as frame:
        image = frame.image
    for i, colour in enumerate(BARS):
        inside = image[:, 40 * i + 8 : 40 * (i + 1) - 8, ::-1].astype(int)
        assert np.abs(inside - colour).max() <= 4, (i, colour)
