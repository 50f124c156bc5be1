from __future__ import annotations

import platform
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.letterbox import LetterboxPlan, _array, letterbox, reference
from edgekit.pixels import PixelLayout, Pixels
from edgekit.schema import from_json, to_json
from edgekit.spec import DType
from edgekit.tasks.preprocess import ImagePreprocess, Placement, place
from tests.test_kernels import PATHS, using

IMAGENET = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
NORMS = ({}, IMAGENET, {"std": (255.0, 255.0, 255.0)}, {"mean": (127.5,) * 3, "std": (1e-4, -2.0, 3e38)})


@st.composite
def cases(draw: st.DrawFn, interpolation: str = "bilinear") -> tuple[np.ndarray, ImagePreprocess, str]:
    side = st.one_of(st.integers(1, 12), st.integers(1, 200))
    height, width, channels = draw(side), draw(side), draw(st.sampled_from((1, 3, 4)))
    divisor = draw(st.sampled_from((0, 0, 2, 3)))  # a half has code of its own
    dtype = draw(st.sampled_from((DType.float32, DType.float16, DType.uint8)))
    columns = max(1, width // divisor) if divisor else draw(side)
    resize = draw(st.sampled_from(("letterbox", "letterbox-center", "stretch", "crop-bottom")))
    more = draw(st.sampled_from((None, 0, 1, 30))) if resize == "crop-bottom" else None
    spec = ImagePreprocess(
        width=columns,
        height=max(1, height // divisor) if divisor else draw(side),
        resize=resize,
        scaled_width=None if more is None else columns + more,
        pad_value=draw(st.integers(0, 255)),
        color=draw(st.sampled_from(("bgr", "rgb"))),
        layout=draw(st.sampled_from(("NCHW", "NHWC"))),
        dtype=dtype,
        interpolation=interpolation,
        **(draw(st.sampled_from(NORMS)) if dtype != DType.uint8 else {}),
    )
    gap, seed = draw(st.integers(0, 9)), draw(st.integers(0, 2**32 - 1))
    rows = np.random.default_rng(seed).integers(0, 256, (height, width * channels + gap), np.uint8)
    if draw(st.booleans()):
        rows = rows[::-1]  # upside down: a negative row stride
    image = rows[:, : width * channels].reshape(height, width, channels) if gap == 0 else None
    if image is None:
        image = np.lib.stride_tricks.as_strided(
            rows, (height, width, channels), (rows.strides[0], channels, 1), writeable=False
        )
    return (image[:, :, 0] if channels == 1 else image), spec, draw(st.sampled_from(("bgr", "rgb")))


def empty_input(spec: ImagePreprocess) -> np.ndarray:
    shape = (1, 3, spec.height, spec.width) if spec.layout == "NCHW" else (1, spec.height, spec.width, 3)
    return np.full(shape, 77, spec.dtype.value)


def by_reference(image: np.ndarray, spec: ImagePreprocess, color: str) -> np.ndarray:
    pixels = _array(image, color)
    placement, out = place(spec, pixels.width, pixels.height), empty_input(spec)
    tables = reference.tables(spec, placement, pixels.layout)
    reference.letterbox(pixels, tables, placement, out, spec.layout == "NHWC")
    return out


@pytest.mark.parametrize("isa", ["auto", "portable"])
@settings(deadline=None, max_examples=400)
@given(case=st.one_of(cases(), cases("area")))
def test_native_is_the_reference_bit_for_bit(isa: str, case: tuple[np.ndarray, ImagePreprocess, str]) -> None:
    image, spec, color = case
    expected = by_reference(image, spec, color)
    picture = image[:, :, None] if image.ndim == 2 else image
    with using("native"):
        out = empty_input(spec)
        pixels = _array(picture, color)
        LetterboxPlan(spec, pixels.layout, isa=isa).run(pixels, out)
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=150)
@given(case=st.one_of(cases(), cases("area")))
def test_whole_input_is_written_as_specified(
    path: str, case: tuple[np.ndarray, ImagePreprocess, str]
) -> None:
    """Against a plain statement of the rule: float resize, pad, reorder, normalise."""
    image, spec, color = case
    with using(path):
        out = empty_input(spec)
        placement = letterbox(image, spec, out, color=color)
    assert placement == place(spec, image.shape[1], image.shape[0])
    bgr = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image[:, :, :3]
    if image.ndim == 3 and color != spec.color:
        bgr = bgr[:, :, ::-1]
    canvas = np.full((spec.height, spec.width, 3), float(spec.pad_value))
    resize = float_resize if spec.interpolation == "bilinear" else float_mean
    picture = resize(bgr, placement.width, placement.height)
    top, left = max(0, placement.top), max(0, placement.left)  # what is cut lies outside
    picture = picture[max(0, -placement.top) :, max(0, -placement.left) :][: spec.height, : spec.width]
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    got = out[0].astype(np.float64) if spec.layout == "NHWC" else out[0].transpose(1, 2, 0).astype(np.float64)
    if spec.std[2] > 1e38:
        return  # beyond what a round trip through float16 or float32 can show; covered bit for bit above
    levels = got * spec.std + spec.mean
    slack = 0.6 + (
        0.13 if spec.dtype == DType.float16 else 1e-3
    )  # half a level of rounding, 11-bit taps, float16
    assert np.abs(levels - canvas).max() <= slack


def float_resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    def taps(source: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
        first = np.floor(position).astype(int)
        return first, np.minimum(first + 1, source - 1), position - first

    x0, x1, fx = taps(image.shape[1], width)
    y0, y1, fy = taps(image.shape[0], height)
    rows = image[:, x0] * (1 - fx)[None, :, None] + image[:, x1] * fx[None, :, None]
    return rows[y0] * (1 - fy)[:, None, None] + rows[y1] * fy[:, None, None]


def mean_matrix(source: int, size: int) -> np.ndarray:
    """[size, source]: how much of each output pixel a source pixel covers; bilinear where it is enlarged."""
    if size > source:
        eye: np.ndarray = float_resize(np.eye(source)[:, :, None], source, size)[:, :, 0]
        return eye
    edges, pixels = np.arange(size + 1) * source / size, np.arange(source)
    low, high = np.maximum(edges[:-1, None], pixels), np.minimum(edges[1:, None], pixels + 1)
    result: np.ndarray = np.maximum(high - low, 0) * size / source
    return result


def float_mean(image: np.ndarray, width: int, height: int) -> np.ndarray:
    rows, columns = mean_matrix(image.shape[0], height), mean_matrix(image.shape[1], width)
    summed = np.tensordot(rows, image.astype(np.float64), 1)
    result: np.ndarray = np.tensordot(columns, summed, (1, 1)).transpose(1, 0, 2)
    return result


@pytest.mark.parametrize("path", PATHS)
def test_area_is_within_one_level_of_cv2(path: str) -> None:
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(6).integers(0, 256, (360, 480, 3), np.uint8)
    for size in ((160, 120), (240, 180), (480, 360), (123, 71), (77, 359), (1, 1)):
        spec = ImagePreprocess(*size, "stretch", layout="NHWC", dtype=DType.uint8, interpolation="area")
        with using(path):
            out = empty_input(spec)
            letterbox(image, spec, out)
        want = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        assert np.abs(out[0].astype(int) - want).max() <= 1


@pytest.mark.parametrize("path", PATHS)
def test_sums_beyond_31_bits(path: str) -> None:
    """Sides without a common divisor, as large as they get: white stays white, and black black."""
    spec = ImagePreprocess(7, 5, "stretch", pad_value=0, dtype=DType.uint8, interpolation="area")
    rng = np.random.default_rng(7)
    for height, width in ((1999, 1403), (3, 65521)):
        for image in (
            np.full((height, width, 3), 255, np.uint8),
            np.zeros((height, width, 3), np.uint8),
            rng.integers(0, 256, (height, width, 3), np.uint8),
        ):
            with using(path):
                out = empty_input(spec)
                letterbox(image, spec, out)
            want = float_mean(image, 7, 5).transpose(2, 0, 1)
            assert np.abs(out[0] - want).max() <= 0.51


def test_manifests_written_before_interpolation_keep_their_bytes() -> None:
    """A field that is its default is not written, so digests stay; one that is not is, and reads back."""
    plain, area = ImagePreprocess(8, 8), ImagePreprocess(8, 8, interpolation="area")
    assert "interpolation" not in to_json(plain)
    assert from_json(ImagePreprocess, to_json(plain), "rule") == plain
    assert to_json(area)["interpolation"] == "area"
    assert from_json(ImagePreprocess, to_json(area), "rule") == area


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 2**32 - 1),
)
def test_within_one_level_of_cv2(path: str, h: int, w: int, out_h: int, out_w: int, seed: int) -> None:
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    spec = ImagePreprocess(out_w, out_h, resize="stretch", layout="NHWC", dtype=DType.uint8)
    with using(path):
        out = empty_input(spec)
        letterbox(image, spec, out)
    got = out[0].astype(int)
    assert np.abs(got - cv2.resize(image, (out_w, out_h), interpolation=cv2.INTER_LINEAR_EXACT)).max() <= 1
    # cv2's ARM build shortens its sums: up to 1.25 levels off the exact value, where x86 is off by 0.78 and
    # this kernel by 0.57 everywhere (test_whole_input_is_written_as_specified holds it to 0.6)
    limit = 2 if platform.machine() == "aarch64" else 1
    assert np.abs(got - cv2.resize(image, (out_w, out_h), interpolation=cv2.INTER_LINEAR)).max() <= limit


@pytest.mark.parametrize("path", PATHS)
def test_known_values(path: str) -> None:
    """Twofold enlargement of [0, 100]: positions -0.25, 0.25, 0.75, 1.25 -> 0, 25, 75, 100."""
    image = np.array([[0, 100]], np.uint8)
    spec = ImagePreprocess(4, 3, pad_value=9, mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 5.0))
    with using(path):
        out = empty_input(spec)
        placement = letterbox(image, spec, out)
    assert (placement.width, placement.height) == (4, 2)
    level = np.array([[0, 25, 75, 100], [0, 25, 75, 100], [9, 9, 9, 9]], np.float32)
    for c, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        np.testing.assert_array_equal(out[0, c], (level - np.float32(mean)) / np.float32(std))


@pytest.mark.parametrize("path", PATHS)
def test_same_size_is_a_copy(path: str) -> None:
    image = np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8)
    spec = ImagePreprocess(53, 37, layout="NHWC", dtype=DType.uint8, color="rgb")
    with using(path):
        out = empty_input(spec)
        letterbox(image, spec, out, color="bgr")
    np.testing.assert_array_equal(out[0], image[:, :, ::-1])


@pytest.mark.parametrize("path", PATHS)
def test_views_of_any_strides(path: str) -> None:
    image = np.random.default_rng(2).integers(0, 256, (40, 60, 4), np.uint8)
    spec = ImagePreprocess(32, 32)
    for view in (image[:, :, :3], image[5:30, 7:50, ::-1], image[:, ::-1], image[::3, ::2], image[:, :1]):
        with using(path):
            out, plain = empty_input(spec), empty_input(spec)
            letterbox(view, spec, out)
            letterbox(np.ascontiguousarray(view), spec, plain)
        np.testing.assert_array_equal(out, plain)


@pytest.mark.parametrize("path", PATHS)
def test_float16_rounds_to_nearest_even(path: str) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for std in (255.0, 3e6, 1e9, 1e-3):  # normal, subnormal, vanishing, overflowing halves
        spec = ImagePreprocess(16, 16, dtype=DType.float16, std=(std, -std, std))
        with using(path):
            out = empty_input(spec)
            letterbox(image, spec, out)
            if path == "native":
                portable = empty_input(spec)
                pixels = _array(image, "bgr")
                LetterboxPlan(spec, pixels.layout, isa="portable").run(pixels, portable)
                assert portable.tobytes() == out.tobytes()
        with np.errstate(over="ignore"):
            expected = (image.astype(np.float32) / np.float32(std)).astype(np.float16)
        assert out[0, 0].tobytes() == expected.tobytes()


def test_plan_is_shared_by_threads() -> None:
    with using("native"):
        rng = np.random.default_rng(3)
        spec = ImagePreprocess(64, 64)
        plan = LetterboxPlan(spec, PixelLayout("bgr", 120, 90))
        images = [rng.integers(0, 256, (90, 120, 3), np.uint8) for _ in range(4)]
        wrong: list[int] = []

        def work(k: int) -> None:
            expected, out = by_reference(images[k], spec, "bgr"), empty_input(spec)
            for _ in range(100):
                plan.run(Pixels.bgr(images[k]), out)
                if not np.array_equal(out, expected):
                    wrong.append(k)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


GOOD = ImagePreprocess(8, 8)
PICTURE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("image", "spec", "out", "color", "message"),
    [
        (PICTURE.astype(np.float32), GOOD, empty_input(GOOD), "bgr", "uint8 array, got float32"),
        ([[1]], GOOD, empty_input(GOOD), "bgr", "got list"),
        (PICTURE[:, :, :2], GOOD, empty_input(GOOD), "bgr", r"got \[4, 4, 2\]"),
        (PICTURE[:0], GOOD, empty_input(GOOD), "bgr", r"got \[0, 4, 3\]"),
        (
            PICTURE,
            GOOD,
            empty_input(GOOD)[0],
            "bgr",
            r"expected float32 \[1, 3, 8, 8\], got float32 \[3, 8, 8\]",
        ),
        (PICTURE, GOOD, empty_input(GOOD).astype(float), "bgr", "got float64"),
        (PICTURE, GOOD, empty_input(replace(GOOD, width=16))[..., ::2], "bgr", "C-contiguous"),
        (PICTURE, GOOD, empty_input(GOOD), "yuv", "expected 'bgr' or 'rgb', got 'yuv'"),
        (PICTURE, replace(GOOD, dtype=DType.int8), empty_input(GOOD), "bgr", "unusable dtype"),
        (
            PICTURE,
            replace(GOOD, dtype=DType.uint8, std=(2.0, 1.0, 1.0)),
            empty_input(GOOD),
            "bgr",
            "cannot be normalised",
        ),
        (np.zeros((1, 70000, 3), np.uint8), GOOD, empty_input(GOOD), "bgr", "got 70000x1"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_wrong_arguments(
    path: str, image: object, spec: object, out: np.ndarray, color: str, message: str
) -> None:
    with using(path), pytest.raises(UsageError, match=message):
        letterbox(image, spec, out, color=color)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 80), width=st.integers(1, 80), size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    more=st.integers(0, 20), seed=st.integers(0, 9), interpolation=st.sampled_from(("bilinear", "area")),
)  # fmt: skip
def test_crop_bottom_scales_to_a_width_and_takes_the_middle_of_the_lowest_rows(
    height: int, width: int, size: tuple[int, int], more: int, seed: int, interpolation: str
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    scaled = size[0] + more
    spec = ImagePreprocess(
        *size, "crop-bottom", 9, layout="NHWC", interpolation=interpolation, scaled_width=scaled
    )
    out = np.full((1, size[1], size[0], 3), np.nan, np.float32)
    placed = letterbox(image, spec, out)
    rows = max(1, int(height * scaled / width + 1e-9))
    assert (placed.width, placed.height) == (scaled, rows)
    whole = (float_resize if interpolation == "bilinear" else float_mean)(image, scaled, rows)
    whole = np.concatenate([np.full((max(0, size[1] - rows), scaled, 3), 9.0), whole])
    left = (scaled - size[0]) // 2
    assert np.abs(out[0] - whole[-size[1] :, left : left + size[0]]).max() <= 0.61


def test_crop_bottom_is_what_the_published_bevfusion_does_and_nothing_where_sizes_agree() -> None:
    spec = ImagePreprocess(704, 256, "crop-bottom", scaled_width=768)
    assert place(spec, 1600, 900) == Placement(0.48, 0.48, -32, -176, 768, 432)
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    out = np.empty((1, 6, 8, 3), np.float32)
    for interpolation in ("bilinear", "area"):
        same = ImagePreprocess(8, 6, "crop-bottom", layout="NHWC", interpolation=interpolation)
        letterbox(image, same, out)
        assert np.array_equal(out[0], image)


@pytest.mark.parametrize(
    "bad", [{"std": (1.0, 5e-324, 1.0)}, {"std": (1.0, 1.0, 1e39)}, {"mean": (-1e308, 0.0, 0.0)}]
)
def test_numbers_beyond_float32_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="must fit float32"):
        ImagePreprocess(8, 8, **bad)


def test_a_width_that_does_not_fill_the_input_is_refused() -> None:
    with pytest.raises(ValueError, match="scaled_width 20 must be between"):
        ImagePreprocess(24, 8, resize="crop-bottom", scaled_width=20)
    with pytest.raises(ValueError, match="goes with resize 'crop-bottom'"):
        ImagePreprocess(24, 8, resize="crop", scaled_width=32)
    spec = ImagePreprocess(24, 8, resize="crop-bottom")
    assert "scaled_width" not in to_json(spec)  # what was written before it means the same
    spec = ImagePreprocess(24, 8, resize="crop-bottom", scaled_width=32)
    assert from_json(ImagePreprocess, to_json(spec), "x") == spec
