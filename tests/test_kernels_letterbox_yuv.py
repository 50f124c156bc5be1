"""The camera's own formats and quantized inputs: reference, native kernel and cv2 beside each other."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.letterbox import LetterboxPlan, letterbox, plan, reference, to_bgr
from edgekit.kernels.letterbox.cuda import LetterboxTables
from edgekit.pixels import FORMATS, YUV, Format, PixelLayout, Pixels
from edgekit.spec import DType, QuantParams
from edgekit.tasks.preprocess import ImagePreprocess, place
from tests.helpers import ROOT
from tests.test_kernels import PATHS, using
from tests.test_kernels_letterbox import float_mean, float_resize

IMAGENET = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
QUANTS = (
    None,
    QuantParams(DType.int8, (1.0,), (-128,)),
    QuantParams(DType.int8, (0.0187,), (-14,)),
    QuantParams(DType.uint8, (0.7, 1e-3, 250.0), (3, 200, 0)),
)


def view(rng: np.random.Generator, layout: PixelLayout, gap: int = 0, upside_down: bool = False) -> Pixels:
    """Random bytes in a driver's buffer, rows `gap` bytes further apart than they need be."""
    strides = [int(np.prod(shape[1:])) + gap for shape in layout.plane_shapes]
    sizes = [stride * shape[0] for stride, shape in zip(strides, layout.plane_shapes, strict=True)]
    buffer = rng.integers(0, 256, sum(sizes) + 5, np.uint8)
    offsets = [5 + sum(sizes[:i]) for i in range(len(sizes))]
    pixels = Pixels.view(buffer, layout, strides, offsets)
    return Pixels(tuple(plane[::-1] for plane in pixels.planes), layout) if upside_down else pixels


@st.composite
def layouts(draw: st.DrawFn, most: int = 200) -> PixelLayout:
    format: Format = draw(st.sampled_from(YUV))
    side = st.one_of(st.integers(1, 12), st.integers(1, most))
    width = draw(side)
    width += width % 2 if format in ("yuyv", "uyvy") else 0
    matrix, range_ = draw(st.sampled_from(("bt601", "bt709"))), draw(st.sampled_from(("full", "limited")))
    return PixelLayout(format, width, draw(side), matrix, range_)


@st.composite
def rules(draw: st.DrawFn, layout: PixelLayout, dtype: DType = DType.float32) -> ImagePreprocess:
    side = st.one_of(st.integers(1, 12), st.integers(1, 200))
    # halves and thirds too, which have code of their own
    divisor = draw(st.sampled_from((0, 0, 1, 2, 2, 3)))
    width = max(1, layout.width // divisor) if divisor else draw(side)
    height = max(1, layout.height // divisor) if divisor else draw(side)
    resize = draw(st.sampled_from(("letterbox", "letterbox-center", "stretch", "crop", "crop-bottom")))
    more = draw(st.sampled_from((None, 0, 1, 30))) if resize == "crop-bottom" else None
    return ImagePreprocess(
        width=width,
        height=height + draw(st.sampled_from((0, 7))),
        resize=resize,
        scaled_width=None if more is None else width + more,
        pad_value=draw(st.integers(0, 255)),
        color=draw(st.sampled_from(("bgr", "rgb"))),
        layout=draw(st.sampled_from(("NCHW", "NHWC"))),
        dtype=dtype,
        interpolation=draw(st.sampled_from(("bilinear", "bilinear", "area"))),
        **(draw(st.sampled_from(({}, IMAGENET))) if dtype != DType.uint8 else {}),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pixels, ImagePreprocess, QuantParams | None]:
    layout = draw(layouts())
    quant = draw(st.sampled_from(QUANTS))
    dtypes = (DType.float32,) if quant else (DType.float32, DType.float16, DType.uint8)
    spec = draw(rules(layout, draw(st.sampled_from(dtypes))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return view(rng, layout, draw(st.sampled_from((0, 0, 1, 37))), draw(st.booleans())), spec, quant


def empty_input(spec: ImagePreprocess, quant: QuantParams | None = None) -> np.ndarray:
    shape = (1, 3, spec.height, spec.width) if spec.layout == "NCHW" else (1, spec.height, spec.width, 3)
    return np.full(shape, 77, (quant or spec).dtype.value)


def by_reference(pixels: Pixels, spec: ImagePreprocess, quant: QuantParams | None) -> np.ndarray:
    placement, out = place(spec, pixels.width, pixels.height), empty_input(spec, quant)
    tables = reference.tables(spec, placement, pixels.layout, quant)
    reference.letterbox(pixels, tables, placement, out, spec.layout == "NHWC")
    return out


@pytest.mark.parametrize("isa", ["auto", "portable"])
@settings(deadline=None, max_examples=400)
@given(case=cases(), last=st.booleans())
def test_native_is_the_reference_bit_for_bit(
    isa: str, case: tuple[Pixels, ImagePreprocess, QuantParams | None], last: bool
) -> None:
    pixels, spec, quant = case
    with using("native"):
        out = empty_input(spec, quant)
        if last and spec.layout == "NCHW":  # NCHW over channels-last memory
            out = out.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
        LetterboxPlan(spec, pixels.layout, quant, isa).run(pixels, out)
    assert out.tobytes() == by_reference(pixels, spec, quant).tobytes()


def exact(pixels: Pixels, spec: ImagePreprocess) -> np.ndarray:
    """The picture part of the input by the plain rule in real numbers, float64 [h, w, 3], clipped once."""
    layout = pixels.layout
    placement = place(spec, layout.width, layout.height)
    rows, columns = np.arange(layout.height), np.arange(layout.width)
    packed = layout.format in ("yuyv", "uyvy")
    full = [
        plane if plane.shape == (layout.height, layout.width)
        else plane[rows if packed else rows // 2][:, columns // 2]
        for plane in reference.split(pixels)
    ]  # fmt: skip

    yuv = np.stack(full, -1).astype(np.float64)
    resize = float_resize if spec.interpolation == "bilinear" else float_mean
    yuv = resize(yuv, placement.width, placement.height)
    kr, kb = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[layout.matrix]
    limited = layout.range == "limited"
    y = (yuv[..., 0] - 16) / 219 if limited else yuv[..., 0] / 255
    pb, pr = (yuv[..., 1] - 128) / (224 if limited else 255), (yuv[..., 2] - 128) / (224 if limited else 255)
    red, blue = y + 2 * (1 - kr) * pr, y + 2 * (1 - kb) * pb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    bgr = np.stack([blue, green, red] if spec.color == "bgr" else [red, green, blue], -1)
    cut_y, cut_x = max(0, -placement.top), max(0, -placement.left)
    result: np.ndarray = np.clip(bgr * 255, 0, 255)[cut_y : cut_y + spec.height, cut_x : cut_x + spec.width]
    return result


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=200)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_within_six_tenths_of_exact_arithmetic(path: str, data: st.DataObject, seed: int) -> None:
    layout = data.draw(layouts(120))
    spec = data.draw(rules(layout, DType.uint8))
    pixels = view(np.random.default_rng(seed), layout)
    with using(path):
        out = empty_input(spec)
        p = letterbox(pixels, spec, out)
    levels = out[0] if spec.layout == "NHWC" else out[0].transpose(1, 2, 0)
    top, left = max(0, p.top), max(0, p.left)
    want = exact(pixels, spec)
    picture = levels[top : top + want.shape[0], left : left + want.shape[1]]
    assert np.abs(picture - want).max() <= 0.6
    outside = levels.astype(int)
    outside[top : top + want.shape[0], left : left + want.shape[1]] = spec.pad_value
    assert (outside == spec.pad_value).all()


def cv2_to_bgr(pixels: Pixels) -> np.ndarray:
    cv2 = pytest.importorskip("cv2")
    layout = pixels.layout
    code = getattr(cv2, f"COLOR_YUV2BGR_{layout.format.upper()}")
    flat = np.concatenate([plane.reshape(-1) for plane in pixels.planes])
    packed = layout.format in ("yuyv", "uyvy")
    shape = (layout.height, layout.width, 2) if packed else (layout.height * 3 // 2, layout.width)
    result: np.ndarray = cv2.cvtColor(flat.reshape(shape), code)
    return result


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", YUV)
def test_to_bgr_is_within_one_level_of_cv2(path: str, format: Format) -> None:
    """Any legal bytes; below black cv2 clips luma before it adds chroma, so luma starts at 16."""
    layout = PixelLayout(format, 64, 48)
    pixels = view(np.random.default_rng(3), layout)
    luma = reference.split(pixels)[0]
    np.maximum(luma, 16, out=luma)
    with using(path):
        got = to_bgr(pixels)
    assert got.shape == (48, 64, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - cv2_to_bgr(pixels)).max() <= 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", YUV)
def test_near_the_cv2_chain_on_natural_pictures(path: str, format: Format) -> None:
    """Convert, then resize, as one would with cv2: 1 level on average colours, 2 at most where none is saturated."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(5)
    layout = PixelLayout(format, 640, 360)
    pixels = view(rng, layout)
    for plane in pixels.planes:  # smooth, as pictures are, and not so colourful that RGB clips
        noise = cv2.GaussianBlur(rng.normal(0, 1, plane.shape).astype(np.float32), (0, 0), 4)
        smooth = np.clip(120 + 25 * noise.reshape(plane.shape) / noise.std(), 90, 150)
        plane[...] = smooth.astype(np.uint8)
    for size in ((320, 180), (416, 234), (213, 120), (700, 500)):
        spec = ImagePreprocess(*size, "stretch", layout="NHWC", dtype=DType.uint8)
        with using(path):
            out = empty_input(spec)
            letterbox(pixels, spec, out)
        want = cv2.resize(cv2_to_bgr(pixels), size, interpolation=cv2.INTER_LINEAR_EXACT)
        off = np.abs(out[0].astype(int) - want)
        assert off.max() <= 2 and off.mean() < 0.5


@pytest.mark.parametrize("path", PATHS)
def test_known_colours(path: str) -> None:
    """BT.601 limited: black, white, grey, and the primaries that SMPTE bars show at 75 %."""
    yuv = np.array(
        [[16, 128, 128], [235, 128, 128], [126, 128, 128], [65, 100, 212], [112, 72, 58], [35, 212, 114]]
    )
    want = np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128], [191, 0, 0], [0, 191, 0], [0, 0, 191]])
    buffer = np.stack([yuv[:, 0], yuv[:, 1], yuv[:, 0], yuv[:, 2]], -1).astype(np.uint8)
    with using(path):
        got = to_bgr(Pixels.view(buffer.reshape(-1), PixelLayout("yuyv", 2, len(yuv))))
    np.testing.assert_array_equal(got[:, 0], got[:, 1])
    assert np.abs(got[:, 0, ::-1].astype(int) - want).max() <= 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quant", QUANTS[1:])
def test_codes_are_the_float_input_quantized(path: str, quant: QuantParams) -> None:
    """What QuantizeLinear would make of the float32 input, element by element."""
    spec = ImagePreprocess(33, 40, layout="NHWC", **IMAGENET)
    pixels = view(np.random.default_rng(1), PixelLayout("nv12", 70, 50))
    with using(path):
        real, codes = empty_input(spec), empty_input(spec, quant)
        letterbox(pixels, spec, real)
        plan(spec, pixels.layout, quant).run(pixels, codes)
    info = np.iinfo(codes.dtype)
    factor = (1 / np.array(quant.scale, np.float32).astype(np.float64)).astype(np.float32)
    x = np.rint(real * factor).astype(np.float64) + np.array(quant.zero_point)
    np.testing.assert_array_equal(codes, np.clip(x, info.min, info.max).astype(codes.dtype))
    assert len(np.unique(codes)) > 3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", [*YUV, "bgr", "grey"])
def test_reads_the_buffer_and_writes_the_input_where_they_lie(path: str, format: Format) -> None:
    layout = PixelLayout(format, 32, 24)
    pixels = view(np.random.default_rng(2), layout, gap=16)
    for spec in (ImagePreprocess(16, 16), ImagePreprocess(16, 16, layout="NHWC")):
        with using(path):
            out, made = empty_input(spec), LetterboxPlan(spec, layout)
            planes, target = made.addresses(pixels, out)
        assert planes == pixels.addresses and target == out.__array_interface__["data"][0]
        if spec.layout == "NCHW":
            last = np.zeros((1, 16, 16, 3), np.float32).transpose(0, 3, 1, 2)
            with using(path):
                assert made.addresses(pixels, last)[1] == last.__array_interface__["data"][0]


@pytest.mark.parametrize("format", FORMATS)
def test_a_region_is_the_part_of_the_picture(format: Format) -> None:
    """Views of the same bytes; converted as the whole picture is, and resized as a picture of its own."""
    pixels = view(np.random.default_rng(8), PixelLayout(format, 40, 30), gap=8)
    whole = to_bgr(pixels)
    for x, y, width, height in ((0, 0, 40, 30), (6, 4, 20, 13), (38, 28, 2, 2), (12, 2, 2, 28)):
        part = pixels.region(x, y, width, height)
        assert all(np.shares_memory(a, b) for a, b in zip(part.planes, pixels.planes, strict=True))
        np.testing.assert_array_equal(to_bgr(part), whole[y : y + height, x : x + width])
        spec = ImagePreprocess(13, 9)
        out, own = empty_input(spec), empty_input(spec)
        letterbox(part, spec, out)
        letterbox(part.copy(), spec, own)
        np.testing.assert_array_equal(out, own)


@pytest.mark.parametrize(
    ("format", "region", "message"),
    [
        ("bgr", (0, 0, 41, 30), "outside"),
        ("bgr", (-1, 0, 4, 4), "outside"),
        ("nv12", (0, 30, 4, 1), "outside"),
        ("yuyv", (1, 0, 4, 4), "even"),
        ("uyvy", (0, 0, 3, 4), "even"),
        ("i420", (0, 1, 4, 4), "even"),
    ],
)
def test_wrong_regions(format: Format, region: tuple[int, int, int, int], message: str) -> None:
    pixels = view(np.random.default_rng(8), PixelLayout(format, 40, 30))
    with pytest.raises(UsageError, match=message):
        pixels.region(*region)


@pytest.mark.parametrize("path", PATHS)
def test_padding_is_kept_when_told(path: str) -> None:
    spec, layout = ImagePreprocess(16, 16, "letterbox-center"), PixelLayout("yuyv", 32, 16)
    pixels = view(np.random.default_rng(4), layout)
    with using("native"):
        out, made = empty_input(spec), LetterboxPlan(spec, layout)
        made.run(pixels, out, padded=True)
    assert (out[0, :, 0] == 77).all() and (out[0, :, 15] == 77).all()
    assert out[0, :, 4:12].tobytes() == by_reference(pixels, spec, None)[0, :, 4:12].tobytes()


@pytest.mark.parametrize(
    "quant", [QuantParams(DType.int32, (1.0,), (0,)), QuantParams(DType.int8, (1.0, 1.0), (0, 0))]
)
def test_wrong_quantization(quant: QuantParams) -> None:
    with pytest.raises(UsageError, match="unusable quantization"):
        LetterboxPlan(ImagePreprocess(8, 8), PixelLayout("nv12", 8, 8), quant)


def test_area_is_refused_where_only_the_cpu_does_it() -> None:
    with pytest.raises(UsageError, match="not done on the GPU"):
        LetterboxTables(ImagePreprocess(8, 8, interpolation="area"), PixelLayout("nv12", 16, 16))


def test_to_bgr_of_a_picture_that_is_too_large() -> None:
    with pytest.raises(UsageError, match="16384"):
        to_bgr(Pixels.view(np.zeros(20000 * 2 * 2, np.uint8), PixelLayout("yuyv", 20000, 2)))


GUARDED = """
import ctypes, mmap, sys
import numpy as np
from edgekit.kernels.letterbox import LetterboxPlan
from edgekit.pixels import FORMATS, PixelLayout, Pixels
from edgekit.tasks.preprocess import ImagePreprocess

libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
rng, size = np.random.default_rng(0), 24
area = np.frombuffer(mmap.mmap(-1, (size + 2) * page), np.uint8)
for edge in (0, size + 1):
    address = ctypes.c_void_p(area.ctypes.data + edge * page)
    assert libc.mprotect(address, ctypes.c_size_t(page), 0) == 0
usable = area[page : (size + 1) * page]
usable[:] = rng.integers(0, 256, usable.size, np.uint8)
if sys.argv[1:] == ["beyond"]:
    print(area[(size + 1) * page])
for _ in range(600):
    format = FORMATS[rng.integers(len(FORMATS))]
    width, height = int(rng.integers(1, 80)) * 2, int(rng.integers(1, 80))
    layout = PixelLayout(format, width, height)
    start = 0 if rng.integers(2) else usable.size - layout.nbytes
    pixels = Pixels.view(usable[start : start + layout.nbytes], layout)
    half = rng.integers(2)
    spec = ImagePreprocess(
        width // 2 if half else int(rng.integers(1, 130)), max(1, height // 2) if half else int(rng.integers(1, 130)),
        "stretch", interpolation=("bilinear", "bilinear", "area")[rng.integers(3)],
    )
    plan = LetterboxPlan(spec, layout)
    plan.run(pixels, np.empty(plan.out_shape, plan.out_dtype))
print("done")
"""


def test_reads_no_byte_beside_the_picture() -> None:
    """A driver's buffer may end where its memory does: with no access to the pages around it, nothing crashes."""
    with using("native"):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "EDGEKIT_KERNELS": "native"}
        done = subprocess.run([sys.executable, "-c", GUARDED], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
        # the guard works: the byte behind the buffer cannot be read
        beyond = subprocess.run([sys.executable, "-c", GUARDED, "beyond"], env=env, capture_output=True)
        assert beyond.returncode < 0
