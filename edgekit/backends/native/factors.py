"""Multipliers of integer sums that a fixed-point product rounds as the floating-point one does.

The engine's codes are rint(float32(sum) * m) + zero, on every CPU. aarch64 has an instruction that does nearly the same at a
quarter of the cost, sqrdmulh: (sum * factor + 2^30) >> 31 with factor = m * 2^31. The two differ where a sum lies next to a
tie, which hangs on the last bits of m. So of the multipliers next to the wanted one the nearest is taken with which both step
from code to code at the same sums; the engine tests that again before it uses the instruction (same_steps in
src/neon_prepare.h), and computes in floats otherwise. The rounding of sqrdmulh: Arm Architecture Reference Manual, C7.2.
"""

from __future__ import annotations

import numpy as np

TRIES = 128
"""Multipliers on either side of the wanted one."""
MOST = 2.0**-8
"""How far, in codes, a result may move by another multiplier."""


def sums(weights: np.ndarray, bias: np.ndarray, zero: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the most, int64 [C], that `bias` and u8 codes less `zero` times `weights` (int8 [C, ...]) can add up to."""
    flat = weights.reshape(weights.shape[0], -1).astype(np.int64)
    up, down = np.maximum(flat, 0).sum(axis=1), np.maximum(-flat, 0).sum(axis=1)
    low, high = zero, 255 - zero
    return bias - up * low - down * high, bias + up * high + down * low


def with_same_steps(multipliers: np.ndarray, zero: int, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """float32 [C] near `multipliers` (float32 [C], >= 0) for sums within int64 `least` to `most` [C], to codes with zero point `zero`.

    Where a channel has no such multiplier all stay as they are: a convolution is computed in one way.
    """
    wanted = multipliers.astype(np.float64)
    if not ((wanted >= 0) & (wanted < 1)).all():
        return multipliers
    nearest = np.rint(wanted * 2.0**31)
    unit = 2.0 ** np.maximum(np.frexp(nearest)[1] - 24, 0)  # float32 has 24 bits
    nearest = np.rint(nearest / unit)
    reach = np.minimum(256, np.maximum(np.abs(least), np.abs(most)) * wanted)
    found = multipliers.copy()
    open_ = np.flatnonzero(wanted > 0)
    for number in range(2 * TRIES + 1):
        away = (number + 1) // 2 * (-1 if number % 2 else 1)
        factors = (nearest[open_] + away) * unit[open_]
        near = np.abs(factors / 2.0**31 - wanted[open_]) * reach[open_] <= MOST * wanted[open_]
        near &= (factors > 0) & (factors < 2**31)
        good = np.zeros(len(open_), bool)
        chosen = open_[near]
        good[near] = _same(factors[near].astype(np.int64), zero, least[chosen], most[chosen])
        found[open_[good]] = (factors[good] / 2.0**31).astype(np.float32)
        open_ = open_[~good]
        if not len(open_):
            return found
    return multipliers


def _same(factors: np.ndarray, zero: int, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """bool [C]: whether both products step from each code to the next at the same sum, or never within the sums there are."""
    m = (factors / 2.0**31).astype(np.float32)[:, None]
    code = np.arange(-zero, 256 - zero)[None]  # below the step

    def above(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        real = np.rint(sums.astype(np.float32) * m) > code
        fixed = (sums * factors[:, None] + 2**30) >> 31 > code
        return real, fixed

    at = np.clip(np.rint((code + 0.5) / m.astype(np.float64)), -(2**31), 2**31 - 2).astype(np.int64)
    at += ~above(at)[0]
    here = np.logical_and(*above(at)) & ~np.logical_or(*above(at - 1))
    always, never = np.logical_and(*above(least[:, None])), ~np.logical_or(*above(most[:, None]))
    same: np.ndarray = (here | always | never).all(axis=1)
    return same
