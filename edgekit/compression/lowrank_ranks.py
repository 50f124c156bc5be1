"""How many singular values matter: energy, variational Bayes, and a threshold against noise. numpy only."""

from __future__ import annotations

import functools
import math

import numpy as np


def energy(values: np.ndarray, share: float) -> int:
    """The fewest singular values (descending) whose squares hold `share` of the sum of squares; at least 1."""
    held = np.cumsum(np.square(values, dtype=np.float64))
    return 1 + int(np.searchsorted(held[:-1], share * held[-1] * (1 - 1e-12)))


def threshold(values: np.ndarray, shape: tuple[int, int]) -> int:
    """Singular values of a matrix of this shape that stick out of noise of unknown level (Gavish and Donoho 2014).

    Above omega(beta) times the median, beta the aspect: 2.858 for a square matrix.
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return int((values > omega * np.median(values)).sum())


@functools.cache
def _tau(alpha: float) -> float:
    """The root of phi(tau) + phi(tau / alpha) = 0, phi(z) = log(z + 1) / z - 1/2: about 2.5129 sqrt(alpha)."""
    low, high = 1e-9, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        found = sum(math.log1p(z) / z - 0.5 for z in (middle, middle / alpha))
        low, high = (middle, high) if found > 0 else (low, middle)
    return low


def evbmf(
    values: np.ndarray, shape: tuple[int, int], variance: float | None = None
) -> tuple[np.ndarray, float]:
    """Empirical variational Bayesian factorization from a matrix's singular values: (those kept, shrunk; variance).

    The global analytic solution of Nakajima et al. 2013 (JMLR 14, "Global Analytic Solution of Fully-observed
    Variational Bayesian Matrix Factorization", theorems 2 and 3). values: all of them, descending. variance: of the
    noise; None = estimated, by minimising the free energy over its bounds. The rank is the number of values kept.
    """
    small, large = sorted(shape)
    values = np.asarray(values, dtype=np.float64)
    assert values.shape == (small,)
    if not values.any():
        return values[:0], 0.0
    alpha = small / large
    tau = _tau(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    if variance is None:
        variance = _noise(values, small, large, edge)
    kept = values[values > math.sqrt(large * variance * edge)]
    inner = 1 - (small + large) * variance / kept**2
    return kept / 2 * (
        inner + np.sqrt(np.maximum(inner**2 - 4 * small * large * variance**2 / kept**4, 0))
    ), variance


def _noise(values: np.ndarray, small: int, large: int, edge: float) -> float:
    alpha = small / large
    square = values**2
    most = min(math.ceil(small / (1 + alpha)) - 1, small - 1)
    high = square.sum() / (small * large)
    low = max(square[most] / (large * edge), square[most:].mean() / large, high * 1e-12)

    def free(variance: float) -> float:
        x = np.maximum(square / (large * variance), 1e-300)
        total = float((x - np.log(x)).sum())
        inner = x[x > edge] - (1 + alpha)
        t = (inner + np.sqrt(np.maximum(inner**2 - 4 * alpha, 0))) / 2
        return total + float((np.log1p(t) + alpha * np.log1p(t / alpha) - t).sum())

    # many shallow valleys, one between each pair of values: a grid, then the best valley's bottom
    grid = np.geomspace(low, max(high, low * (1 + 1e-12)), 400)
    best = int(np.argmin([free(v) for v in grid]))
    a, b = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        c, d = b - golden * (b - a), a + golden * (b - a)
        a, b = (a, d) if free(c) < free(d) else (c, b)
    return float(min((grid[best], (a + b) / 2), key=free))
