"""Resize: only what TensorFlow Lite's coordinates reproduce exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekit.backends.litert.emitter import Emitter
from edgekit.backends.litert.layout import NHWC, stored
from edgekit.backends.litert.plan import Unit, full_shape
from edgekit.backends.lowering import Unsupported, nearest, positions
from edgekit.passes.graph import text

MODES = (
    {"alignCorners": False, "halfPixelCenters": False},
    {"alignCorners": False, "halfPixelCenters": True},
    {"alignCorners": True, "halfPixelCenters": False},
)


def lite_positions(size: int, out: int, align: bool, half: bool) -> np.ndarray:
    i = np.arange(out, dtype=np.float64)
    scale = (size - 1) / (out - 1) if align and out > 1 else size / out
    return (i + 0.5) * scale - 0.5 if half else i * scale


def lite_nearest(size: int, out: int, align: bool, half: bool) -> np.ndarray:
    """tflite/kernels/internal/reference/resize_nearest_neighbor.h, in float32 as there."""
    i = np.arange(out, dtype=np.float32)
    scale = np.float32((size - 1) / (out - 1)) if align and out > 1 else np.float32(size / out)
    where = (i + np.float32(0.5 if half else 0)) * scale
    chosen = np.floor(where + np.float32(0.5)) if align else np.floor(where)
    result: np.ndarray = np.clip(chosen, 0, size - 1).astype(np.int64)
    return result


def resize(e: Emitter, unit: Unit) -> None:
    node = unit.node
    x = node.inputs[0]
    assert x is not None
    before, after = full_shape(x), full_shape(unit.outputs[0])
    if len(before) != 4 or before[:2] != after[:2]:
        raise Unsupported("Resize of other than height and width of a picture")
    if node.attributes.get("antialias") is not None and node.attributes["antialias"].as_int():
        raise Unsupported("Resize with antialias")
    kind = text(node, "mode", "nearest")
    params = e.params(unit, x)
    source = e.read(x, NHWC, params)
    if kind == "nearest":
        _nearest(e, unit, source, before, after)
        return
    if kind != "linear":
        raise Unsupported(f"Resize of mode {kind}")
    for mode in MODES:
        fits = all(
            np.allclose(
                np.clip(positions(node, axis), 0, before[axis] - 1),
                np.clip(
                    lite_positions(before[axis], after[axis], mode["alignCorners"], mode["halfPixelCenters"]),
                    0,
                    before[axis] - 1,
                ),
                atol=1e-5,
            )
            for axis in (2, 3)
        )
        if fits:
            version = 3 if mode["halfPixelCenters"] else 2 if unit.integer else 1
            tensors = [source, e.ints(after[2:])]
            e.op("RESIZE_BILINEAR", tensors, [e.out(unit, NHWC)], "ResizeBilinearOptions", mode, version)
            return
    raise Unsupported("Resize with scales that TensorFlow Lite rounds otherwise")


def _nearest(e: Emitter, unit: Unit, source: int, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    node = unit.node
    chosen = [nearest(node, axis) for axis in (2, 3)]
    factors = [after[axis] // before[axis] for axis in (2, 3)]
    repeats = all(
        after[axis] == before[axis] * f and np.array_equal(c, np.arange(after[axis]) // f)
        for axis, f, c in zip((2, 3), factors, chosen, strict=True)
    )
    if repeats and max(factors) <= 5:
        _repeat(e, unit, source, before, factors)
        return
    for mode in MODES:
        lite = [
            lite_nearest(before[a], after[a], mode["alignCorners"], mode["halfPixelCenters"]) for a in (2, 3)
        ]
        if all(np.array_equal(a, b) for a, b in zip(chosen, lite, strict=True)):
            version = 3 if mode["halfPixelCenters"] or mode["alignCorners"] else 2 if unit.integer else 1
            tensors = [source, e.ints(after[2:])]
            e.op("RESIZE_NEAREST_NEIGHBOR", tensors, [e.out(unit, NHWC)], "ResizeNearestNeighborOptions", mode, version)  # fmt: skip
            return
    raise Unsupported("Resize to nearest with indices that TensorFlow Lite chooses otherwise")


def _repeat(e: Emitter, unit: Unit, source: int, before: tuple[int, ...], factors: list[int]) -> None:
    """Repeat pixels, then rows, by concatenation: XNNPACK has it, and has no nearest neighbours."""
    n, c, h, w = before
    down, across = factors
    params = e.plan.params[unit.outputs[0]] if unit.integer else None
    version = 2 if unit.integer else 1
    if across > 1:
        wide = e.temp((n, h, w, across * c), params)
        options = {"axis": 3, "fusedActivationFunction": 0}
        e.op("CONCATENATION", [source] * across, [wide], "ConcatenationOptions", options, version)
        source = wide
    if down > 1:
        tall = e.temp(
            (n, h, down * w, across * c), params
        )  # a row lies behind its copy: no reshape, which copies
        options = {"axis": 2, "fusedActivationFunction": 0}
        e.op("CONCATENATION", [source] * down, [tall], "ConcatenationOptions", options, version)
        source = tall
    e.reshape(source, e.out(unit, NHWC), stored(full_shape(unit.outputs[0]), NHWC))


HANDLERS: dict[str, Callable[[Emitter, Unit], None]] = {"Resize": resize}
