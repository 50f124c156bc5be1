"""Points to voxels: dynamic (every point counts) and hard (so many points a voxel, so many voxels)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.voxelize import reference

MOST_CELLS = 2**31 - 1


@dataclass(frozen=True)
class VoxelGrid:
    """The box that is cut into voxels. low, high: its corners, size: a voxel's sides; metres, in x, y, z.

    Raises: UsageError for an empty box, a side that is not a whole number of voxels (to 1 %), or more than
    2^31 - 1 cells.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    size: tuple[float, float, float]

    def __post_init__(self) -> None:
        values = (*self.low, *self.high, *self.size)
        if len(values) != 9 or not all(map(math.isfinite, values)):
            raise UsageError(
                f"voxel grid: expected three finite numbers each for low, high and size, got {self}."
            )
        for axis, low, high, size in zip("xyz", self.low, self.high, self.size, strict=True):
            cells = (high - low) / size if size > 0 else 0.0
            if not 0.99 <= cells <= MOST_CELLS or abs(cells - round(cells)) > 0.01:
                raise UsageError(
                    f"voxel grid, axis {axis}: expected a whole number of voxels from {low} to {high}, "
                    f"got {cells:g} of {size}."
                )
        if math.prod(self.shape) > MOST_CELLS:
            raise UsageError(
                f"voxel grid: expected at most {MOST_CELLS} cells, got {math.prod(self.shape)}. "
                "Take a smaller range or larger voxels."
            )

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Number of cells along z, y, x."""
        x, y, z = (round((h - l) / s) for l, h, s in zip(self.low, self.high, self.size, strict=True))  # noqa: E741
        return z, y, x


NUSCENES = VoxelGrid((-54.0, -54.0, -5.0), (54.0, 54.0, 3.0), (0.075, 0.075, 0.2))
"""BEVFusion on nuScenes: 40 x 1440 x 1440 cells; with `max_points` 10, `max_voxels` 160,000 in test."""


@dataclass(frozen=True)
class Voxels:
    """coordinates: int32 [m, 4], batch z y x, in the order of each voxel's first point.
    features: float32 [m, c], the mean of the voxel's points.  counts: int32 [m], how many they are.
    voxel: int32 [n], each point's voxel, -1 where it is outside or beyond a limit.
    slot: int32 [n], how many points of that voxel came before, -1 likewise.
    """

    coordinates: np.ndarray
    features: np.ndarray
    counts: np.ndarray
    voxel: np.ndarray
    slot: np.ndarray

    def padded(self, points: np.ndarray, max_points: int) -> np.ndarray:
        """The points voxel by voxel: float32 [m, max_points, c], zeros where a voxel has fewer."""
        out = np.zeros((len(self.counts), max_points, points.shape[1]), np.float32)
        kept = np.flatnonzero((self.voxel >= 0) & (self.slot < max_points))
        out[self.voxel[kept], self.slot[kept]] = points[kept]
        return out


VALUES = ("x in the voxel", "y in the voxel", "z / 2 m", "intensity", "10 dt", "log(1 + points) / 2")
"""What `local_values` says of a voxel: x and y from its middle in voxel sides."""


def local_values(voxels: Voxels, grid: VoxelGrid) -> np.ndarray:
    """float32 [m, len(VALUES)] of voxels of points x, y, z, intensity, dt: of ordinary size wherever the voxel lies."""
    at = voxels.coordinates[:, :0:-1].astype(np.float32)  # x, y, z
    values = np.empty((len(at), len(VALUES)), np.float32)
    for k in range(2):
        values[:, k] = (voxels.features[:, k] - np.float32(grid.low[k])) / np.float32(grid.size[k])
        values[:, k] -= at[:, k] + np.float32(0.5)
    values[:, 2] = voxels.features[:, 2] / 2
    values[:, 3] = voxels.features[:, 3]
    values[:, 4] = voxels.features[:, 4] * 10
    values[:, 5] = np.log1p(voxels.counts.astype(np.float32)) / 2
    return values


def encoder_values(voxels: Voxels, grid: VoxelGrid, values: str, inputs: int) -> np.ndarray:
    """What an encoder of `inputs` values sees of each voxel, float32 [m, inputs]: `raw` = the means of its points' first
    fields, `local` = `local_values`."""
    return local_values(voxels, grid) if values == "local" else voxels.features[:, :inputs]


def voxelize(
    points: np.ndarray,
    grid: VoxelGrid,
    *,
    max_points: int = 0,
    max_voxels: int = 0,
    batch: int = 0,
    threads: int = 0,
) -> Voxels:
    """Group points by voxel. reference.py states the rule to the last bit; same bits for every thread count.

    points: float32 [n, c >= 3], x y z first, C-contiguous. max_points, max_voxels: 0 for no limit (dynamic
    voxelization). batch: written into the coordinates. threads: 0 for all CPUs of the process.
    Raises: UsageError for arrays of another shape or dtype, or negative limits.
    """
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype != np.float32:
        raise UsageError(f"points: expected float32 [n, 3 or more], got {points.dtype} {list(points.shape)}.")
    if max_points < 0 or max_voxels < 0 or threads < 0 or batch < 0:
        raise UsageError(
            f"voxelize: expected max_points, max_voxels, batch and threads of at least 0, "
            f"got {max_points}, {max_voxels}, {batch}, {threads}."
        )
    points = np.ascontiguousarray(points)
    low, size = np.array(grid.low, np.float32), np.array(grid.size, np.float32)
    cells = np.array(grid.shape[::-1], np.int32)
    module = kernels.native()
    if module is None:
        return Voxels(*reference.voxelize(points, low, size, cells, max_points, max_voxels, batch))
    return Voxels(*module.voxelize(points, low, size, cells, max_points, max_voxels, batch, threads))
