"""Weights in 8 bits: symmetric, one scale per output channel, and the codes that go with it."""

from __future__ import annotations

import numpy as np

from edgekit.errors import UsageError
from edgekit.spec import DType, QuantParams

SCHEMES = ("minmax", "mse")
STEPS = 80
"""Clipping ratios that the scheme `mse` tries, from 1 down to 0.4."""
TINY = float(np.finfo(np.float32).tiny)
HALF_STEP = 2.0**-24
"""Distance of the smallest float16 numbers."""
HALF_LEAST = 2.0**-20
"""Least scale that float16 holds with some precision (1/16)."""


def weight_params(
    weights: np.ndarray,
    axis: int,
    scheme: str = "mse",
    *,
    limit: int = 127,
    least: np.ndarray | None = None,
    float16_scales: bool = False,
) -> QuantParams:
    """Scales of `weights`, float32 of any shape, along `axis` (output channels): real = scale * code.

    scheme `minmax`: the largest weight gets the code `limit`. `mse`: per channel, the scale at or below that
    which loses least in the squared error of its weights. least: per channel, a scale not to go below.
    A channel of zeros gets scale 1. Raises: UsageError for an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"weight scheme {scheme!r}: unknown, expected {' or '.join(SCHEMES)}")
    rows = np.moveaxis(np.asarray(weights, np.float32), axis, 0).reshape(weights.shape[axis], -1)
    largest = np.abs(rows).max(axis=1).astype(np.float64)
    top = np.where(largest > 0, largest / limit, 1.0)

    def usable(scale: np.ndarray) -> np.ndarray:
        scale = scale if least is None else np.maximum(scale, least)
        return exact_in_float16(scale) if float16_scales else np.maximum(scale, TINY).astype(np.float32)

    best = usable(top)
    if scheme == "mse":
        error = _error(rows, best, limit)
        for ratio in np.linspace(1.0, 0.4, STEPS)[1:]:
            scale = usable(top * ratio)
            found = _error(rows, scale, limit)
            better = found < error
            best, error = np.where(better, scale, best), np.where(better, found, error)
        best = np.where(largest > 0, best, usable(top))
    return QuantParams(DType.int8, tuple(float(s) for s in best), (0,) * len(best), axis)


def exact_in_float16(scale: np.ndarray) -> np.ndarray:
    """The next float16 at or above each scale, as float32; at least 2^-20."""
    wanted = np.maximum(np.asarray(scale, np.float64), HALF_LEAST)
    half = wanted.astype(np.float16)
    half = np.where(half.astype(np.float64) < wanted, np.nextafter(half, np.float16(np.inf)), half)
    single: np.ndarray = half.astype(np.float32)
    return single


def codes(weights: np.ndarray, params: QuantParams, limit: int = 127) -> np.ndarray:
    """int8 codes in [-limit, limit], the shape of `weights`; rounded to nearest, ties to even."""
    scale = _along(params, weights.ndim)
    found: np.ndarray = np.clip(np.rint(np.asarray(weights, np.float32) / scale), -limit, limit)
    return found.astype(np.int8)


def rounded(weights: np.ndarray, params: QuantParams, limit: int = 127) -> np.ndarray:
    """The real numbers behind the codes, float32: weights already of that form come back bit for bit."""
    found: np.ndarray = codes(weights, params, limit).astype(np.float32) * _along(params, weights.ndim)
    return found


def bias_scale(activation: QuantParams, weight: QuantParams) -> np.ndarray:
    """float32 [C], scale of the int32 bias."""
    return (np.float32(activation.scale[0]) * np.asarray(weight.scale, np.float32)).astype(np.float32)


def bias_codes(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int32 [C]."""
    limit = np.iinfo(np.int32)
    found = np.rint(bias.reshape(-1).astype(np.float64) / scale.astype(np.float64))
    clipped: np.ndarray = np.clip(found, limit.min, limit.max)
    return clipped.astype(np.int32)


def _error(rows: np.ndarray, scale: np.ndarray, limit: int) -> np.ndarray:
    step = scale[:, None]
    difference = np.clip(np.rint(rows / step), -limit, limit) * step - rows
    error: np.ndarray = (difference**2).sum(axis=1, dtype=np.float64)
    return error


def _along(params: QuantParams, ndim: int) -> np.ndarray:
    scale = np.asarray(params.scale, np.float32)
    if params.axis is None:
        return scale.reshape(())
    shape = [1] * ndim
    shape[params.axis] = -1
    return scale.reshape(shape)
