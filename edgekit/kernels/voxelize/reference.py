"""Voxelization in numpy: the definition that the native kernel follows to the last bit.

The rule, and where published implementations differ:

- Cell: `floor((p - low) / size)` per axis, in float32, subtraction then division, as in mmdetection3d and spconv's
  `Point2Voxel`. `floor`, not truncation: points up to one cell below `low` are outside, where a cast to int lets them
  into cell 0 (CUDA-BEVFusion and BEVFusion's BEV pooling truncate).
- Inside: `0 <= cell < grid` on that float32 result, for all three axes; so a point just below `high` whose quotient
  rounds up to `grid` is outside, and NaN is. `high` itself serves only to count cells: `round((high - low) / size)`.
- Order: voxels in the order of their first point (as `hard_voxelize` on a CPU; on a GPU mmdetection3d and
  CUDA-BEVFusion order by chance).
- `max_voxels`: a point that would open one voxel more is dropped, later points of open voxels still count
  (mmdetection3d stops reading at that point in old versions; CUDA-BEVFusion crops the points at 300,000 unsaid).
- `max_points`: the first ones in order are kept. Mean: float32 sum in point order, divided once by the count.
"""

from __future__ import annotations

import numpy as np

Result = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def cells(points: np.ndarray, low: np.ndarray, size: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Linear cell (z * ny + y) * nx + x of every point, -1 outside: int64 [n]. low, size: float32 [3], grid: int [3], xyz."""
    with np.errstate(over="ignore", invalid="ignore"):
        at = np.floor((points[:, :3] - low) / size)
        inside = ((at >= 0) & (at < grid.astype(np.float32))).all(axis=1)
    x, y, z = np.where(inside[:, None], at, 0).astype(np.int64).T
    result: np.ndarray = np.where(inside, (z * grid[1] + y) * grid[0] + x, -1)
    return result


def voxelize(
    points: np.ndarray,
    low: np.ndarray,
    size: np.ndarray,
    grid: np.ndarray,
    max_points: int,
    max_voxels: int,
    batch: int,
) -> Result:
    """(coordinates, features, counts, voxel of each point, slot of each point); a limit of 0 is none."""
    n, channels = points.shape
    cell = cells(points, low, size, grid)
    inside = np.flatnonzero(cell >= 0)
    keys, first, group = np.unique(cell[inside], return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    count = min(len(order), max_voxels) if max_voxels else len(order)
    voxel = np.full(n, -1, np.int32)
    voxel[inside] = np.where(rank[group] < count, rank[group], -1)
    slot = np.full(n, -1, np.int32)
    taken = np.zeros(count, np.int32)
    sums = np.zeros((count, channels), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # values of points may be anything
        for i in np.flatnonzero(voxel >= 0):
            v = voxel[i]
            if max_points and taken[v] >= max_points:
                voxel[i] = -1
                continue
            slot[i] = taken[v]
            taken[v] += 1
            sums[v] += points[i]
    kept = keys[order[:count]]
    z, rest = np.divmod(kept, grid[1] * grid[0])
    y, x = np.divmod(rest, grid[0])
    coordinates = np.stack([np.full(count, batch), z, y, x], axis=1).astype(np.int32)
    features = sums / taken[:, None].astype(np.float32)
    return coordinates, features, taken, voxel, slot
