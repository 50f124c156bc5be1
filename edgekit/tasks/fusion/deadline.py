"""A LiDAR branch that holds a budget of time: a sparse encoder takes as long as it has voxels, so cut those down.

The time of the encoder's step is predicted as a + b * voxels, fitted on this device while it runs: the slope is the
median of the slopes between all pairs of the last `WINDOW` runs (Theil 1950, Sen 1968), a the median of what is left, so
that a few runs which something else delayed do not count. Where the runs scatter more than their numbers of voxels explain, a
is 0; the runs that follow a cut tell better. All is multiplied by how much longer than the line `MARGIN` of the runs took
at most.

Over the budget, points are snapped to cells twice as large along each axis, the mean of each cell taken: near the LiDAR
first, where there are more than enough, then farther out (`COARSE`); and when all are, the farthest cells are left out
(`CROPS`). Near cells first, as they are most of a sweep: cropping saves few voxels and loses every object beyond
(benchmarks/lidar_budget.py prints what each step saves and costs).

The depth that cameras see comes from the same points: what is cut is missing there too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgekit.kernels.voxelize import Voxels, voxelize
from edgekit.tasks.fusion.spec import VoxelCells

WINDOW = 64
LEAST = 5
"""Runs before anything is predicted."""
SPREAD = 0.1
"""Numbers of voxels that differ by less than this share of the largest do not tell a slope."""
MARGIN = 0.9
CERTAIN = 2.0
"""Scatters that the runs' times must differ by, from few voxels to many, before a line with a is believed."""
COARSE = (0.15, 0.25, 0.375, 0.5, 2.0)
"""Shares of the range within which cells are twice as large, in the order in which they are tried; the last is all of it."""
CROPS = (0.85, 0.7, 0.55, 0.4)
"""Shares of the range that are left, likewise."""


class Fit:
    """Time by voxels, of the last runs."""

    def __init__(self) -> None:
        self._runs: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._line: tuple[float, float, float] | None = None

    def add(self, voxels: int, ms: float) -> None:
        """One run."""
        self._runs.append((float(voxels), ms))
        self._line = None

    def line(self) -> tuple[float, float, float] | None:
        """(a in milliseconds, b in milliseconds per voxel, the margin as a factor); None until there are enough runs."""
        if self._line is None and len(self._runs) >= LEAST:
            self._line = _line(np.array(self._runs))
        return self._line

    def predict(self, voxels: int) -> float | None:
        """Milliseconds, with the margin; None until there are enough runs."""
        line = self.line()
        return None if line is None else (line[0] + line[1] * voxels) * line[2]


def _line(runs: np.ndarray) -> tuple[float, float, float]:
    voxels, ms = runs[runs[:, 0] > 0].T
    if not len(voxels):
        return 0.0, 0.0, 1.0
    a, b = 0.0, float(np.median(ms / voxels))
    spread = voxels.max() - voxels.min()
    if spread >= SPREAD * voxels.max():
        i, j = np.triu_indices(len(voxels), 1)
        apart = np.abs(voxels[i] - voxels[j]) >= 0.02 * voxels.max()
        i, j = i[apart], j[apart]
        slope = max(0.0, float(np.median((ms[i] - ms[j]) / (voxels[i] - voxels[j]))))
        left = ms - slope * voxels
        scatter = 1.4826 * float(np.median(np.abs(left - np.median(left))))
        if b * spread >= CERTAIN * scatter:
            a, b = max(0.0, float(np.median(left))), slope
    line = np.maximum(a + b * voxels, 1e-9)
    return a, b, max(1.0, float(np.quantile(ms / line, MARGIN)))


@dataclass(frozen=True, eq=False)
class Cut:
    """points: float32 [n, 5], what is left of a sweep.  voxels: how many they make.  notes: what was done, in words,
    done: in words to count (`cropped`, `coarser`, `over`)."""

    points: np.ndarray
    voxels: int
    notes: tuple[str, ...] = ()
    done: tuple[str, ...] = ()


class Deadline:
    """Predicts and cuts, for one device and one encoder."""

    def __init__(self, cells: VoxelCells) -> None:
        self.grid, self.double = cells.grid(), cells.double()
        self.times = Fit()

    def observe(self, voxels: int, ms: float) -> None:
        """How long the encoder's step took with so many voxels."""
        self.times.add(voxels, ms)

    def fit(self, points: np.ndarray, budget_ms: float) -> Cut:
        """Of a sweep float32 [n, 5] what is expected to be encoded within the budget."""
        found = voxelize(points, self.grid)
        cut = Cut(points, len(found.counts))
        expected = self.times.predict(cut.voxels)
        if expected is None or expected <= budget_ms:
            return cut
        for cut in self.cuts(points, found):
            expected = self.times.predict(cut.voxels)
            assert expected is not None
            if expected <= budget_ms:
                return cut
        return Cut(
            cut.points, cut.voxels, (*cut.notes, f"lidar: still over {budget_ms:g} ms"), (*cut.done, "over")
        )

    def cuts(self, points: np.ndarray, found: Voxels) -> Iterator[Cut]:
        """From the least to the most that can be cut. found: `points` in the cells of the encoder."""
        coarse = voxelize(points, self.double)
        middle = coarse.coordinates[:, :1:-1] + 0.5  # x, y
        away = np.abs(middle * self.double.size[:2] + self.double.low[:2]).max(axis=1, initial=0.0)
        inside = np.flatnonzero(coarse.voxel >= 0)
        of_point = np.full(len(points), np.inf)
        of_point[inside] = away[coarse.voxel[inside]]
        of_voxel = np.full(len(found.counts), np.inf)  # cells lie in double ones as wholes
        kept = np.flatnonzero(found.voxel >= 0)
        of_voxel[found.voxel[kept]] = of_point[kept]
        most = max(abs(v) for v in (*self.grid.low[:2], *self.grid.high[:2]))
        note = "lidar: voxels of " + " x ".join(f"{side:.3g}" for side in self.double.size) + " m"
        for share in COARSE:
            reach = share * most
            near = away < reach
            left = np.concatenate([coarse.features[near], points[of_point >= reach]])
            count = int(np.count_nonzero(near) + np.count_nonzero(of_voxel >= reach))
            yield Cut(left, count, (note if share > 1 else f"{note} within {reach:.3g} m",), ("coarser",))
        for share in CROPS:
            near = away < share * most
            cropped = f"lidar: range cropped to {share * most:.3g} m"
            yield Cut(
                coarse.features[near], int(np.count_nonzero(near)), (note, cropped), ("coarser", "cropped")
            )
