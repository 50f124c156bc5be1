"""Letterbox in numpy: the definition that the native kernel follows bit for bit.

Everything up to the 8-bit level is integer arithmetic, so that numpy, x86 and ARM agree exactly.
Per axis, output pixel d of n takes source pixels i and i + 1 of m on the grid of
`cv2.resize(INTER_LINEAR)`, position (d + 0.5) * m / n - 0.5, clamped to the picture:

    p = (2 d + 1) m - n                             # position times 2 n
    i = p // (2 n),  f = ((p mod 2 n) * 2^b + n) // (2 n)      # b-bit fraction, rounded half up
    p < 0 -> i, f = 0, 0;  i >= m - 1 -> i, f = m - 1, 0;  f = 2^b -> i, f = i + 1, 0

**RGB and grey**, b = 11. Horizontal, then vertical, each rounded half up (7 fractional bits in between):

    h = ((2048 - fx) * S[i] + fx * S[i + 1] + 8) >> 4          # 0..32640
    v = ((2048 - fy) * h[j] + fy * h[j + 1] + 2^17) >> 18      # 0..255

The levels lie within 0.6 of the exact bilinear value, so within 1 of cv2's; within 2 on ARM, where
cv2 shortens its sums.

**YUV**, b = 15. Interpolation and colour conversion commute, so Y, U and V are interpolated and only
output pixels converted. Chroma is that of the pixel's pair or square (U[i // 2], as cv2 takes it: neither
filtered nor sited), seen at the resolution of luma. All values fit 16 bits; m(a, b) = (a b + 2^14) >> 15
is one instruction on x86 (pmulhrsw) and ARM (sqrdmulh), and sums saturate at 16 bits:

    h = 128 S[i] + m(128 (S[i + 1] - S[i]), fx);  v = h[j] + m(h[j + 1] - h[j], fy)      # 7 fractional bits
    y = m(v_Y - 128 black, cy) + 32;  u, v = 2 (v_U - 2^14), 2 (v_V - 2^14)
    level = clamp((y + m(u, cu) + m(v, cv)) >> 6, 0, 255)      # per channel; 6 fractional bits

with the coefficients of ITU-R BT.601-7 / BT.709-6 and the range, in 15 bits. The levels lie within 0.6
of exact real arithmetic on the same steps (interpolate, convert, clip once). Who converts first, as a
cv2 chain does, clips before it interpolates: where saturated colours meet, beyond what RGB can show, the
two differ by more.

**Area**: per axis, output pixel d covers source pixels from d m / n to (d + 1) m / n, each with a whole weight
out of m / gcd(m, n); an axis that grows has the bilinear taps, out of 2^b. With T the product of both axes'
totals and S the weighted sum of bytes, the RGB level is (2 S + T) // (2 T), the exact mean rounded half up;
a YUV value is (256 S + T) // (2 T), converted as above. At half size this is the bilinear result.

**Values**: a table of 256 per channel takes the level to the input's value, made in float32 with each
operation rounded once: x = (level - mean) / std, then float16 to nearest even where the input is that,
or, where it is quantized, clamp(round_half_even(x * (1 / scale)) + zero_point) (edgekit.input_codes).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from edgekit.input_codes import input_codes
from edgekit.pixels import PLANAR, SEMI_PLANAR, YUV, PixelLayout, Pixels, as_pixels
from edgekit.spec import QuantParams
from edgekit.tasks.preprocess import ImagePreprocess, Placement

BITS = 11
ONE = 1 << BITS
YUV_BITS = 15


def axis_taps(
    source: int, size: int, first: int = 0, count: int = 0, bits: int = BITS
) -> tuple[np.ndarray, np.ndarray]:
    """First source index and weight (0..2^bits - 1) of the second, per output pixel: int32 [size] each.

    Of `count` output pixels from `first` on, where a crop wants no more (0 = all).
    """
    p = (2 * np.arange(first, first + (count or size), dtype=np.int64) + 1) * source - size
    index, rest = np.divmod(p, 2 * size)
    weight = ((rest << bits) + size) // (2 * size)
    index += weight >> bits
    weight[(p < 0) | (index >= source - 1) | (weight >> bits != 0)] = 0
    return np.clip(index, 0, source - 1).astype(np.int32), weight.astype(np.int32)


@dataclass(frozen=True)
class Filter:
    """Of one axis: output pixel d sums source pixels start[d] + k times weight[d, k], each row of which makes `total`."""

    start: np.ndarray
    weight: np.ndarray
    total: int


def area_filter(source: int, size: int, first: int, count: int, bits: int) -> Filter:
    """The mean of what each of `count` output pixels from `first` on covers; bilinear where it is less than a pixel."""
    if size > source:
        index, weight = axis_taps(source, size, first, count, bits)
        return Filter(index, np.stack([(1 << bits) - weight, weight], -1), 1 << bits)
    gcd = math.gcd(source, size)
    total, unit = (
        source // gcd,
        size // gcd,
    )  # a source pixel is `unit` wide, what an output pixel covers `total`
    begin = np.arange(first, first + count, dtype=np.int64)[:, None] * total
    start = begin // unit
    left = (start + np.arange(-(-total // unit) + 1)) * unit
    weight = np.maximum(np.minimum(left + unit, begin + total) - np.maximum(left, begin), 0)
    used = int(np.flatnonzero(weight.any(axis=0))[-1]) + 1  # the last is for those that begin within a pixel
    return Filter(start[:, 0].astype(np.int32), np.ascontiguousarray(weight[:, :used], np.int32), total)


def halved(f: Filter) -> Filter:
    """The same over chroma, of which a pixel serves two of luma."""
    start = f.start >> 1
    place = ((f.start[:, None] + np.arange(f.weight.shape[1])) >> 1) - start[:, None]
    weight = np.zeros((len(start), int(place.max()) + 1), np.int32)
    np.add.at(weight, (np.arange(len(start))[:, None], place), f.weight)
    return Filter(start, weight, f.total)


def channel_order(color: str, wanted: str) -> tuple[int, int, int]:
    """Source channel of each input channel, for pictures of the format `color`; YUV becomes B, G, R."""
    if color == "grey":
        return (0, 0, 0)
    return (0, 1, 2) if ("rgb" if color.startswith("rgb") else "bgr") == wanted else (2, 1, 0)


@dataclass(frozen=True)
class Tables:
    """All that depends on the picture's layout and the rule only.

    values: [3, 256] of the input's dtype, per channel what it gets for each level; pad: [3], for the padding.
    filters: for `area` those of x and y, of luma and then of chroma; empty otherwise.
    color: YUV to B, G, R, int32 [7]: 128 * black, cy, then cu of B; cu, cv of G; cv of R, and 0.
    """

    layout: PixelLayout
    x_index: np.ndarray
    x_weight: np.ndarray
    y_index: np.ndarray
    y_weight: np.ndarray
    order: tuple[int, int, int]
    mean: np.ndarray
    std: np.ndarray
    values: np.ndarray
    pad: np.ndarray
    color: np.ndarray
    filters: tuple[Filter, ...]


def tables(
    spec: ImagePreprocess, placement: Placement, layout: PixelLayout, quant: QuantParams | None = None
) -> Tables:
    """Tables for pictures of `layout`; `quant` where the input is quantized."""
    # a crop lies outside of the input on both sides: only what falls inside is computed
    x = max(0, -placement.left), min(spec.width, placement.width)
    y = max(0, -placement.top), min(spec.height, placement.height)
    bits = YUV_BITS if layout.format in YUV else BITS
    x_index, x_weight = axis_taps(layout.width, placement.width, *x, bits)
    y_index, y_weight = axis_taps(layout.height, placement.height, *y, bits)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    values = value_table(mean, std, np.dtype((quant or spec).dtype.value), quant)
    order = channel_order(layout.format, spec.color)
    pad = np.ascontiguousarray(values[:, spec.pad_value])
    color = yuv_coefficients(layout)
    filters: tuple[Filter, ...] = ()
    if spec.interpolation == "area":
        along = (
            area_filter(layout.width, placement.width, *x, bits),
            area_filter(layout.height, placement.height, *y, bits),
        )
        square = layout.format in (*SEMI_PLANAR, *PLANAR)
        filters = (*along, halved(along[0]), halved(along[1]) if square else along[1])
    return Tables(layout, x_index, x_weight, y_index, y_weight, order, mean, std, values, pad, color, filters)


def value_table(
    mean: np.ndarray, std: np.ndarray, dtype: np.dtype, quant: QuantParams | None = None
) -> np.ndarray:
    """[3, 256] of `dtype`: what an input channel gets for each 8-bit level."""
    levels = np.arange(256, dtype=np.float32)
    with np.errstate(over="ignore"):  # a tiny std may leave the range of float16
        x = (levels - mean[:, None]) / std[:, None]
        if quant is not None:
            x = input_codes(x, replace(quant, axis=0 if len(quant.scale) > 1 else None))
        return np.ascontiguousarray(x.astype(dtype))


@functools.cache
def yuv_coefficients(layout: PixelLayout) -> np.ndarray:
    """`Tables.color`: gains of ITU-R BT.601-7 2.5 and BT.709-6 3 in 15 bits.

    Halved, as the sums have one fractional bit less than the values; of chroma, which is doubled, quartered.
    """
    kr, kb = (0.299, 0.114) if layout.matrix == "bt601" else (0.2126, 0.0722)
    kg = 1 - kr - kb
    black, luma, chroma = (16, 219, 224) if layout.range == "limited" else (0, 255, 255)
    blue, red = 2 * (1 - kb) * 255 / chroma, 2 * (1 - kr) * 255 / chroma
    gains = [255 / luma / 2, blue / 4, -blue * kb / kg / 4, -red * kr / kg / 4, red / 4]
    return np.array([128 * black, *(int(np.rint(32768 * gain)) for gain in gains), 0], np.int32)


def _m(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    result: np.ndarray = (a * b + (1 << 14)) >> 15
    return result


def split(pixels: Pixels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Y, U and V planes of a YUV picture: views."""
    planes, layout = pixels.planes, pixels.layout
    if layout.format in ("yuyv", "uyvy"):
        luma = 0 if layout.format == "yuyv" else 1
        chroma = planes[0][:, :, 1 - luma]
        return planes[0][:, :, luma], chroma[:, 0::2], chroma[:, 1::2]
    if layout.format in SEMI_PLANAR:
        u = 0 if layout.format == "nv12" else 1
        return planes[0], planes[1][:, :, u], planes[1][:, :, 1 - u]
    return planes[0], planes[1], planes[2]


def _interpolated(plane: np.ndarray, t: Tables, chroma: bool) -> np.ndarray:
    """A Y, U or V plane -> int32 [h, w] with 7 fractional bits, bilinear."""
    halved_x = 1 if chroma else 0
    halved_y = 0 if t.layout.format in ("yuyv", "uyvy") else halved_x
    x0, x1 = t.x_index >> halved_x, np.minimum(t.x_index + 1, t.layout.width - 1) >> halved_x
    y0, y1 = t.y_index >> halved_y, np.minimum(t.y_index + 1, t.layout.height - 1) >> halved_y

    def horizontal(rows: np.ndarray) -> np.ndarray:
        picture = plane[rows].astype(np.int32) << 7
        a = picture[:, x0]
        result: np.ndarray = a + _m(picture[:, x1] - a, t.x_weight[None])
        return result

    h = horizontal(y0)
    result: np.ndarray = h + _m(horizontal(y1) - h, t.y_weight[:, None])
    return result


def _mean(plane: np.ndarray, t: Tables, chroma: bool, bits: int) -> np.ndarray:
    """A plane [H, W] or [H, W, C] -> int64 [h, w] or [h, w, C] with `bits` fractional bits, rounded half up."""
    x, y = t.filters[2:] if chroma else t.filters[:2]
    tail = (1,) * (plane.ndim - 2)
    rows: np.ndarray = np.zeros((len(y.start), *plane.shape[1:]), np.int64)
    for k, weight in enumerate(y.weight.T):  # beyond the last pixel weights are 0
        rows += weight.reshape(-1, 1, *tail) * plane[np.minimum(y.start + k, len(plane) - 1)]
    total: np.ndarray = np.zeros((len(y.start), len(x.start), *plane.shape[2:]), np.int64)
    for k, weight in enumerate(x.weight.T):
        total += weight.reshape(1, -1, *tail) * rows[:, np.minimum(x.start + k, plane.shape[1] - 1)]
    divisor = x.total * y.total
    result: np.ndarray = ((total << (bits + 1)) + divisor) // (2 * divisor)
    return result


def resize_yuv(pixels: Pixels, t: Tables) -> np.ndarray:
    """YUV -> uint8 [h, w, 3], in the channel order of the network."""
    y, u, v = (
        _mean(plane, t, i > 0, 7).astype(np.int32) if t.filters else _interpolated(plane, t, i > 0)
        for i, plane in enumerate(split(pixels))
    )
    black, cy, u_blue, u_green, v_green, v_red = (int(c) for c in t.color[:6])
    y, u, v = _m(y - black, cy) + 32, 2 * (u - (1 << 14)), 2 * (v - (1 << 14))
    saturated = [y + _m(u, u_blue), y + _m(u, u_green) + _m(v, v_green), y + _m(v, v_red)]
    bgr = np.stack([np.clip(np.clip(s, -32768, 32767) >> 6, 0, 255) for s in saturated], -1)
    result: np.ndarray = bgr.astype(np.uint8)[:, :, list(t.order)]
    return result


def resize(image: np.ndarray, t: Tables) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [h, w, 3], in the channel order of the network."""
    if t.filters:
        mean: np.ndarray = _mean(image, t, False, 0).astype(np.uint8)[:, :, list(t.order)]
        return mean
    right = np.minimum(t.x_index + 1, image.shape[1] - 1)
    below = np.minimum(t.y_index + 1, image.shape[0] - 1)
    wx, wy = t.x_weight[None, :, None], t.y_weight[:, None, None]

    def horizontal(rows: np.ndarray) -> np.ndarray:
        picture = image[rows]
        result: np.ndarray = ((ONE - wx) * picture[:, t.x_index] + wx * picture[:, right] + 8) >> 4
        return result

    v = ((ONE - wy) * horizontal(t.y_index) + wy * horizontal(below) + (1 << 17)) >> 18
    result: np.ndarray = v.astype(np.uint8)[:, :, list(t.order)]
    return result


def levels(pixels: Pixels, t: Tables) -> np.ndarray:
    """A picture of any format -> uint8 [h, w, 3], in the channel order of the network."""
    return resize_yuv(pixels, t) if pixels.layout.format in YUV else resize(pixels.planes[0], t)


def letterbox(
    image: np.ndarray | Pixels, t: Tables, placement: Placement, out: np.ndarray, nhwc: bool
) -> None:
    """A picture into `out`, [1, h, w, 3] if `nhwc` else [1, 3, h, w]."""
    target = out[0] if nhwc else out[0].transpose(1, 2, 0)
    target[...] = t.pad
    top, left = max(0, placement.top), max(0, placement.left)
    bottom, right = top + len(t.y_index), left + len(t.x_index)
    picture = levels(as_pixels(image), t)
    for c in range(3):
        target[top:bottom, left:right, c] = t.values[c][picture[:, :, c]]
