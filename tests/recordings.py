"""Frames, results and recordings for the tests of the .mcap sink and of `replay:`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.pixels import PixelLayout, Pixels
from edgekit.runtime.frames import Frame
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.mcap import McapSink
from edgekit.runtime.sources.replay import ReplaySource
from edgekit.tasks.detect.detections import Detections

FOUND = Detections(
    np.array([[10, 20, 60, 70], [1.23456, 2, 30, 40]], np.float32),
    np.array([0.9, 0.3], np.float32),
    np.array([1, 0], np.int32),
    ("car", "dog"),
)
START_NS = 5_000_000_000_000


def noise(layout: PixelLayout, seed: int, strides: Sequence[int] = ()) -> Pixels:
    """Random pixels; the padding between rows is random too."""
    rows = [shape[0] for shape in layout.plane_shapes]
    natural = [int(np.prod(shape[1:])) for shape in layout.plane_shapes]
    steps = list(strides) or natural
    offsets = np.cumsum([0, *(r * s for r, s in zip(rows, steps, strict=True))])
    data = np.random.default_rng(seed).integers(0, 256, int(offsets[-1]), dtype=np.uint8)
    return Pixels.view(data, layout, steps, [int(o) for o in offsets[:-1]])


def frame(seq: int, layout: PixelLayout | None = None, **facts: Any) -> Frame:
    """Frame `seq` of a 25 fps camera whose frames take 6 ms to arrive."""
    at = START_NS + seq * 40_000_000
    values = {"pts_ns": at, "captured_ns": at + 6_000_000, "source": "v4l2:/dev/video0", "clock": "monotonic"}
    pixels = noise(layout or PixelLayout("yuyv", 64, 48), seq)
    return Frame(pixels, seq, **{**values, **facts})


def record(path: Path, frames: Sequence[Frame], **options: Any) -> Path:
    """A recording of `frames`, each with the same result."""
    with McapSink(path, **options) as sink:
        for f in frames:
            sink.write(StreamResult(f, FOUND, 9_000_000, {"transport": 6_000_000, "engine": 2_500_000}))
    return sink.path


def replay(path: Path, query: str = "", limit: int | None = None) -> ReplaySource:
    return ReplaySource(f"replay:{path}{query}", limit)


def played(path: Path) -> list[Frame]:
    """All frames of a recording."""
    with replay(path) as source:
        return list(source)


def same_pixels(a: Pixels, b: Pixels) -> bool:
    return a.layout == b.layout and all(map(np.array_equal, a.planes, b.planes))
