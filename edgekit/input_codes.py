"""Codes of real numbers, for inputs that a network takes quantized: the arithmetic of the native engine's `quantize`
(docs/native.md), so that it does not matter who computes them."""

from __future__ import annotations

import numpy as np

from edgekit.spec import QuantParams


def input_codes(real: np.ndarray, quant: QuantParams) -> np.ndarray:
    """clamp(round_half_even(x * (1 / scale)) + zero_point) of `quant.dtype`, every step in float32; NaN gives the zero point.

    A scale and zero point per channel lie along `quant.axis`.
    """
    sizes = [1] * real.ndim
    if quant.axis is not None:
        sizes[quant.axis] = len(quant.scale)
    scale = np.asarray(quant.scale, np.float32).reshape(sizes if quant.axis is not None else ())
    zero = np.asarray(quant.zero_point, np.int64).reshape(scale.shape)
    limits = np.iinfo(quant.dtype.value)
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.rint(
            real.astype(np.float32, copy=False) * (1 / scale.astype(np.float64)).astype(np.float32)
        )
    codes = np.clip(np.nan_to_num(whole.astype(np.float64), nan=0.0) + zero, limits.min, limits.max)
    result: np.ndarray = codes.astype(quant.dtype.value)
    return result
