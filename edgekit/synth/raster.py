"""Painter's-order rasteriser for convex quads, in numpy only.

All quads of a picture are cut into pixel spans in one vectorised step; the spans are then written,
far to near, as *paint numbers* into one uint16 buffer. Colour and instance are looked up from the
paint number afterwards, so every pixel is coloured once however often it was overdrawn, and the
instance of each pixel is known exactly.

A pixel belongs to a quad when its centre lies inside (half-open on the right and the bottom), so
two quads that share an edge neither overlap nor leave a gap.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def spans(quads: Array, width: int, height: int) -> tuple[Array, Array, Array, Array]:
    """Pixel spans of convex quads clipped to the picture.

    quads: float32 [n, 4, 2], corners (x, y) in pixels, in order around the quad; a triangle
    repeats a corner. Returns `(quad, row, start, stop)`, int64 [s], ordered by quad then row:
    quad number, row y and columns start..stop-1 whose centres lie inside.
    """
    y = quads[:, :, 1]
    first = np.ceil(np.clip(y.min(1), 0.0, height) - 0.5).astype(np.int64)
    last = np.ceil(np.clip(y.max(1), 0.0, height) - 0.5).astype(np.int64)
    x = quads[:, :, 0]
    count = np.where((x.max(1) > 0) & (x.min(1) < width), np.maximum(last - first, 0), 0)
    quad = np.repeat(np.arange(len(quads)), count)
    row = np.arange(len(quad)) - np.repeat(np.cumsum(count) - count - first, count)
    centre = (row + 0.5).astype(np.float32)

    left = np.full(len(quad), np.float32(width), np.float32)
    right = np.zeros(len(quad), np.float32)
    for a, b in ((0, 1), (1, 2), (2, 3), (3, 0)):
        xa, ya, xb, yb = x[:, a], y[:, a], x[:, b], y[:, b]
        rise = yb - ya
        slope = np.divide(xb - xa, rise, out=np.zeros_like(rise), where=rise != 0)
        low, high = np.minimum(ya, yb), np.maximum(ya, yb)
        crosses = (low[quad] <= centre) & (centre < high[quad])
        at = xa[quad] + (centre - ya[quad]) * slope[quad]
        np.minimum(left, at, out=left, where=crosses)
        np.maximum(right, at, out=right, where=crosses)
    start = np.ceil(np.clip(left, 0, width) - 0.5).astype(np.int64)
    stop = np.ceil(np.clip(right, 0, width) - 0.5).astype(np.int64)
    keep = stop > start
    return quad[keep], row[keep], start[keep], stop[keep]


_NARROW = 48
"""Spans up to this many pixels are written in one scatter; a loop is faster for wider ones (measured)."""


def paint(buffer: Array, row: Array, start: Array, stop: Array, value: Array) -> None:
    """Write `value[i]` to columns start[i]..stop[i]-1 of row[i], later spans over earlier ones."""
    width = buffer.shape[1]
    flat = buffer.reshape(-1)
    base = row * width
    for begin, end, number in zip(
        (base + start).tolist(), (base + stop).tolist(), value.tolist(), strict=True
    ):
        flat[begin:end] = number


def paint_rising(buffer: Array, row: Array, start: Array, stop: Array, value: Array) -> None:
    """As `paint`, for values that never fall along the spans and exceed what the buffer holds.

    The nearest span at a pixel is then the one with the greatest value, so narrow spans may be
    scattered into a layer of their own (numpy keeps the last of repeated indices) and merged.
    """
    wide = stop - start > _NARROW
    narrow = ~wide
    paint(buffer, row[wide], start[wide], stop[wide], value[wide])
    begin = row[narrow] * buffer.shape[1] + start[narrow]
    length = stop[narrow] - start[narrow]
    pixel = np.arange(int(length.sum())) + np.repeat(begin - (np.cumsum(length) - length), length)
    layer = np.zeros_like(buffer)
    layer.reshape(-1)[pixel] = np.repeat(value[narrow].astype(buffer.dtype), length)
    np.maximum(buffer, layer, out=buffer)


def covered(row: Array, start: Array, stop: Array) -> int:
    """How many pixels the union of spans covers.

    Counts, per row, the columns where more spans have begun than ended.
    """
    if len(row) == 0:
        return 0
    top, left = int(row.min()), int(start.min())
    width = int(stop.max()) - left + 1
    cells = (int(row.max()) - top + 1) * width
    base = (row - top) * width - left
    change = np.bincount(base + start, minlength=cells) - np.bincount(base + stop, minlength=cells)
    return int(np.count_nonzero(np.cumsum(change)))
