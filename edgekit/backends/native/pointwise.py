"""What becomes of numbers and codes behind an activation: tables of 256 bytes, and curves from sums that were not
rounded (docs/native.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.quant.activations import Function, Stage, monotone_limits
from edgekit.quant.annotate import quant
from edgekit.spec import QuantParams

SEGMENTS, STEPS = 64, 32768
"""Of a curve: segments, and steps of the grid over its range."""
FRACTION = 64
"""Parts of an output code that a curve counts in."""

# --- codes: 0..255, the graph's int8 codes + 128 ---


def scale_zero(params: QuantParams) -> tuple[np.float32, int]:
    """(scale, zero point of 0..255) of an activation."""
    assert params.axis is None
    return np.float32(params.scale[0]), params.zero_point[0] + 128


def real_at(code: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """float32 numbers behind codes, as DequantizeLinear."""
    found: np.ndarray = (np.asarray(code, np.int32) - zero).astype(np.float32) * np.float32(scale)
    return found


def codes_at(numbers: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """uint8 codes of numbers, as QuantizeLinear in float32."""
    found = np.rint(np.asarray(numbers, np.float32) / np.float32(scale)) + zero
    return np.asarray(np.clip(found, 0, 255), np.uint8)


def real(code: np.ndarray, params: QuantParams) -> np.ndarray:
    scale, zero = scale_zero(params)
    return real_at(code, float(scale), zero)


def codes(numbers: np.ndarray, params: QuantParams) -> np.ndarray:
    scale, zero = scale_zero(params)
    return codes_at(numbers, float(scale), zero)


ALL = np.arange(256, dtype=np.uint8)


def table(before: QuantParams, stages: Sequence[Stage], after: QuantParams | None) -> np.ndarray:
    """What becomes of each code of `before`: uint8 [256], or without `after` float32 [256].

    Values between two stages that are annotated are rounded there, and so is the last one before it takes another scale.
    """
    x = real(ALL, before).astype(np.float64)
    for one in stages:
        x = one.function(x)
        params = quant(one.result)
        if params is not None and not (one is stages[-1] and params == after):
            x = real(codes(x, params), params).astype(np.float64)
    return x.astype(np.float32) if after is None else codes(x, after)


def coded(
    pre: ir.Value, stages: Sequence[Stage], after: QuantParams
) -> tuple[QuantParams, np.ndarray | None]:
    """How a number that is `pre` becomes codes of `after` behind `stages`: (the params that it is rounded in, the table
    behind that, None if codes stay as they are)."""
    first = quant(pre)
    clipped = ALL
    if first is None:
        until = next(i for i, one in enumerate(stages) if quant(one.result) is not None)
        first, limits = quant(stages[until].result), monotone_limits(stages[: until + 1])
        assert first is not None and limits is not None
        low, high = (int(codes(np.array(v), first)) for v in limits)
        clipped = np.clip(ALL, low, high)
        stages = stages[until + 1 :]
    found = clipped if not stages and first == after else table(first, stages, after)[clipped]
    return first, None if np.array_equal(found, ALL) else found


@dataclass(frozen=True)
class Curve:
    """step: real numbers per step of the grid; start: steps from its low end to 0; points: int16 base, then slope."""

    step: float
    start: int
    points: np.ndarray


def curve(function: Function, after: QuantParams, reach: float) -> Curve:
    """`function` as 64 segments over the numbers up to +-`reach` that its codes tell apart."""
    scale, zero = scale_zero(after)

    def code(x: np.ndarray) -> np.ndarray:  # not rounded, not beyond where rounding saturates
        return np.clip(function(x) / float(scale) + zero, -0.5, 255.5)

    low, high = -reach, reach
    ends = code(np.array([low, high]))
    for _ in range(3):  # ever finer
        low, high = _range(code, low, high, ends)
    step = (high - low) / STEPS
    start = int(np.clip(round(-low / step), -STEPS, STEPS - 1))
    width = STEPS // SEGMENTS
    grid = (np.arange(STEPS) - start) * step
    y = (code(grid) * FRACTION).reshape(SEGMENTS, width)
    t = np.arange(width) / width - (width - 1) / (2 * width)  # least squares, segment by segment
    slope = y @ t / (t @ t)
    base = y.mean(axis=1) + slope * t[0]
    limit = np.iinfo(np.int16)
    points = np.clip(np.rint(np.concatenate([base, slope])), limit.min, limit.max).astype(np.int16)
    return Curve(step, start, points)


def _range(code: Function, low: float, high: float, ends: np.ndarray) -> tuple[float, float]:
    """Where between `low` and `high` the codes are not yet those of the `ends`, 0 included."""
    x = np.linspace(low, high, 1 << 12)
    y = code(x)
    quarter = 0.25
    left, right = (np.flatnonzero(np.abs(y - end) > quarter) for end in ends)
    if not left.size or not right.size:  # next to constant
        return low, high
    least = 1e-3 * (high - low)
    return (
        min(float(x[max(left[0] - 1, 0)]), -least),
        max(float(x[min(right[-1] + 1, x.size - 1)]), least),
    )


def curve_codes(x: np.ndarray, found: Curve) -> np.ndarray:
    """What the engine makes of numbers `x` (docs/native.md): uint8 codes."""
    r = np.clip(np.rint(x / found.step), -32768, 32767)
    u = np.maximum(np.clip(r + found.start, -32768, 32767), 0).astype(np.int32)
    i, f = u >> 9, (u & 511) << 6
    base, slope = found.points[:SEGMENTS].astype(np.int32), found.points[SEGMENTS:].astype(np.int32)
    y = np.clip(base[i] + ((slope[i] * f + (1 << 14)) >> 15), -32768, 32767)
    return np.asarray(np.clip(np.clip(y + 32, -32768, 32767) >> 6, 0, 255), np.uint8)
