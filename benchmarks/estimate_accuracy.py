"""Holds the latency estimate against published latencies, and fits its coefficients on them.

    python benchmarks/estimate_accuracy.py --rows published_latency.csv           the table and its summary
    python benchmarks/estimate_accuracy.py --rows published_latency.csv --fit     and fit anew, cross-validated

The rows stay outside the repository; their columns are device, power_mode, model, input, batch, precision,
runtime, version, threads, latency_ms, includes, source. What is fitted is the few numbers of
edgekit/toolchain/coefficients.json. Held-out errors come from fits that never saw the board (or the network).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import networks, published  # noqa: E402
from benchmarks.published import Row  # noqa: E402
from edgekit.toolchain import cost  # noqa: E402
from edgekit.toolchain.estimate import Estimator, machine  # noqa: E402

SIGMA, PRIOR, CAP = 0.25, 0.7, 1.5
"""Of a row's log error; of a coefficient's logarithm around its prior; where a row's pull stops growing (Huber)."""
TIE = 0.05
"""Published latencies closer than this are no pair to order."""


@functools.cache
def estimator(network: str, size: tuple[int, int], unit: str) -> Estimator:
    """The layers of a network as a GPU or CPU library fuses them (on any board: only they are used)."""
    board, backend = ("jetson-orin", "tensorrt") if unit == "gpu" else ("rpi5", "onnxruntime")
    return Estimator(networks.build(network, size), published.boards()[board], backend=backend)


def row_work(row: Row) -> cost.Work:
    where = machine(row.target, row.backend, row.power, row.threads, runtime=row.runtime)
    return estimator(row.network, row.size, where.unit).work(row.precision, where)


class Data:
    """Rows of one unit, all their layers in one table."""

    def __init__(self, rows: Sequence[Row], unit: str) -> None:
        self.rows, self.unit = rows, unit
        parts = [row_work(row) for row in rows]
        self.sizes = [len(p.kind) for p in parts]
        self.work = cost.join(parts)
        self.log = np.log([row.seconds for row in rows])

    def take(self, keep: np.ndarray) -> Data:
        found = object.__new__(Data)
        found.rows, found.unit = [r for r, k in zip(self.rows, keep, strict=True) if k], self.unit
        found.sizes = [s for s, k in zip(self.sizes, keep, strict=True) if k]
        mask = np.repeat(keep, self.sizes)
        found.work = cost.Work(*(getattr(self.work, f)[mask] for f in cost.Work.__dataclass_fields__))
        found.log = self.log[keep]
        return found

    def seconds(self, c: Mapping[str, float]) -> np.ndarray:
        times, _, _ = cost.seconds(self.work, self.unit, c)
        return np.add.reduceat(times, np.cumsum([0, *self.sizes[:-1]])) + c["once_us"] * 1e-6

    def errors(self, c: Mapping[str, float]) -> np.ndarray:
        """log(estimated / published) of every row."""
        return np.log(self.seconds(c)) - self.log

    def weights(self) -> np.ndarray:
        """Boards and libraries with many rows count for more, but not in proportion."""
        keys = [(r.board, r.runtime, r.precision) for r in self.rows]
        counts = {k: keys.count(k) for k in set(keys)}
        return np.array([min(1.0, (6 / counts[k]) ** 0.5) for k in keys])


def fit(data: Data, prior: Mapping[str, float], start: Mapping[str, float], rounds: int = 25) -> dict[str, float]:
    """Levenberg-Marquardt on the logarithms of the coefficients: Huber loss of the rows' log errors, and a
    normal prior around `prior` that keeps what the rows do not determine at a plausible value."""
    names = list(prior)
    centre = np.log([prior[n] for n in names])
    theta = np.log([start[n] for n in names])
    sigma = np.array([PRIOR for _ in names])
    weights = data.weights()

    def unpack(t: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.exp(t).tolist(), strict=True))

    def residuals(t: np.ndarray) -> np.ndarray:
        r = data.errors(unpack(t)) / SIGMA
        huber = np.where(np.abs(r) <= CAP, r, np.sign(r) * np.sqrt(2 * CAP * np.abs(r) - CAP**2))
        return np.concatenate([huber * np.sqrt(weights), (t - centre) / sigma])

    damping, now = 1e-2, residuals(theta)
    for _ in range(rounds):
        step = 1e-4
        jacobian = np.stack([(residuals(theta + step * e) - now) / step for e in np.eye(len(names))], axis=1)
        gradient, hessian = jacobian.T @ now, jacobian.T @ jacobian
        before = now @ now
        for _ in range(8):
            move = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -gradient)
            tried = theta + np.clip(move, -0.7, 0.7)
            new = residuals(tried)
            if new @ new < before:
                theta, now, damping = tried, new, max(damping / 5, 1e-6)
                break
            damping *= 4
        if before - now @ now < 1e-4 * before:
            break
    return unpack(theta)


def held_out(data: Data, prior: Mapping[str, float], whole: Mapping[str, float], key: Callable[[Row], str]) -> np.ndarray:
    """log errors of every row by a fit that saw no row of the same `key`."""
    errors = np.zeros(len(data.rows))
    keys = np.array([key(r) for r in data.rows])
    for name in sorted(set(keys)):
        inside = keys == name
        seen = data.take(~inside)
        found = fit(seen, prior, whole, rounds=6)
        errors[inside] = data.take(inside).errors(found)
    return errors


def pairs(rows: Sequence[Row], estimated: np.ndarray) -> tuple[int, int]:
    """(pairs ordered right, pairs) of two networks measured alike on one board."""
    groups: dict[Any, list[int]] = {}
    for i, r in enumerate(rows):
        groups.setdefault((r.device, r.target.cpus[0].clock_hz, r.power, r.runtime, r.precision, r.threads, r.source), []).append(i)
    right = total = 0
    for members in groups.values():
        for i, j in itertools.combinations(members, 2):
            if rows[i].network == rows[j].network and rows[i].size == rows[j].size:
                continue
            if abs(np.log(rows[i].seconds / rows[j].seconds)) < TIE:
                continue
            total += 1
            right += (rows[i].seconds < rows[j].seconds) == (estimated[i] < estimated[j])
    return right, total
