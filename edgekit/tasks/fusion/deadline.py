"""A LiDAR branch that holds a budget of time: a sparse encoder takes as long as it has voxels, so cut those down.

The time of the encoder's step is predicted as a + b * voxels, fitted on this device while it runs: the slope is the
median of the slopes between all pairs of the last `WINDOW` runs (Theil 1950, Sen 1968), a the median of what is left, so
that a few runs which something else delayed do not count; on top comes `MARGIN` of the runs' scatter. Over the budget, in
this order: the farthest voxels are left out, in `CROPS` steps of the range; then points are snapped to cells twice as
large along each axis, the mean of each cell taken, and cropped again if that is not enough.

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
"""Quantile of what runs took beyond the fit that is added to a prediction."""
CROPS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Shares of the range, the largest first."""


class Fit:
    """Time by voxels, of the last runs.  a: milliseconds, b: milliseconds per voxel, extra: of the margin; None until
    there are enough runs."""

    def __init__(self) -> None:
        self._runs: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._line: tuple[float, float, float] | None = None

    def add(self, voxels: int, ms: float) -> None:
        """One run."""
        self._runs.append((float(voxels), ms))
        self._line = None

    def line(self) -> tuple[float, float, float] | None:
        """(a, b, extra)."""
        if self._line is None and len(self._runs) >= LEAST:
            self._line = _line(np.array(self._runs))
        return self._line

    def predict(self, voxels: int) -> float | None:
        """Milliseconds, with the margin; None until there are enough runs."""
        line = self.line()
        return None if line is None else line[0] + line[1] * voxels + line[2]


def _line(runs: np.ndarray) -> tuple[float, float, float]:
    voxels, ms = runs.T
    if voxels.max() - voxels.min() < SPREAD * voxels.max():
        # nearly the same number each time: the least that can be said, that none would take nothing
        a, b = 0.0, float(np.median(ms / np.maximum(voxels, 1)))
    else:
        i, j = np.triu_indices(len(voxels), 1)
        apart = np.abs(voxels[i] - voxels[j]) >= 0.02 * voxels.max()
        i, j = i[apart], j[apart]
        b = max(0.0, float(np.median((ms[i] - ms[j]) / (voxels[i] - voxels[j]))))
        a = max(0.0, float(np.median(ms - b * voxels)))
    extra = max(0.0, float(np.quantile(ms - a - b * voxels, MARGIN)))
    return a, b, extra


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
        count = len(found.counts)
        before = self.times.predict(count)
        if before is None or before <= budget_ms:
            return Cut(points, count)
        for cut in self._cuts(points, found):
            expected = self.times.predict(cut.voxels)
            assert expected is not None
            if expected <= budget_ms:
                return cut
        return Cut(
            cut.points, cut.voxels, (*cut.notes, f"lidar: still over {budget_ms:g} ms"), (*cut.done, "over")
        )

    def _cuts(self, points: np.ndarray, found: Voxels) -> Iterator[Cut]:
        """From the least to the most that can be cut."""
        most = max(abs(v) for v in (*self.grid.low[:2], *self.grid.high[:2]))
        for share in CROPS[1:]:
            kept, count = _cropped(points, found, share * most)
            yield Cut(kept, count, (f"lidar: range cropped to {share * most:.3g} m",), ("cropped",))
        coarse = voxelize(points, self.double)
        points = np.ascontiguousarray(coarse.features)
        found = voxelize(points, self.double)
        size = " x ".join(f"{side:.3g}" for side in self.double.size)
        note = f"lidar: voxels of {size} m"
        for share in CROPS:
            kept, count = _cropped(points, found, share * most)
            if share == 1.0:
                yield Cut(kept, count, (note,), ("coarser",))
            else:
                yield Cut(
                    kept,
                    count,
                    (note, f"lidar: range cropped to {share * most:.3g} m"),
                    ("coarser", "cropped"),
                )


def _cropped(points: np.ndarray, found: Voxels, reach: float) -> tuple[np.ndarray, int]:
    """The points within `reach` along x and y, and how many voxels they make, but for those on the edge."""
    near = (np.abs(points[:, :2]) < reach).all(axis=1)
    used = found.voxel[near]
    return points[near], len(np.unique(used[used >= 0]))
