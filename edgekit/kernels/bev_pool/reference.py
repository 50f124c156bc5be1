"""BEV pooling in numpy: the definition that kernel.cpp and kernel.cu follow bit for bit.

**Association.** Depth bin z of a pixel is the point p = ray * z + origin (float64, one rounding per operation), its
cell floor((p - low) / step) per axis (or trunc, `BevGrid.rounding`), kept if inside of the grid on all axes.

**Order.** Points of a cell are summed in the order (camera, column, depth bin, row). Cameras stand upright, so rows of one
column at one depth fall mostly into one cell: such neighbours are one *run*, and the table holds runs, not points: on
nuScenes 121,192 of them for 1,602,672 points.

**Pooling.** out[cell, c] = sum over its points of depth[point] * feature[pixel, c], in float32, from 0, each product rounded before it is
added; no fused multiply-add. Cells without points are 0.

How the published implementations differ (mit-han-lab/bevfusion `ops/bev_pool`, NVIDIA's CUDA-BEVFusion):
- *trunc, not floor*: a point less than a cell below the low edge falls into cell 0, and since z is one cell of 20 m, points down
  to -30 m count. `rounding="trunc"` gives that; the default keeps to the range that the configuration states.
- *last interval*: the published interval list ends one point early, so the last cell loses a point. Not here.
- *dropped points*: some ports give them rank 0, cell 0. Here they are in no run.
- *image augmentation*: CUDA-BEVFusion inverts camera 0's only. Here each camera has its own.
- *order of a sum*: theirs is that of an unstable sort; two runs may differ in the last bit. Here it is fixed.
- *geometry in float32 there*: points within 1e-5 m of an edge may fall on its other side.
"""

from __future__ import annotations

import numpy as np

from edgekit.kernels.bev_pool.geometry import Geometry

COUNT_BITS = 16


def cells(geometry: Geometry) -> np.ndarray:
    """Cell of each point, int32 [cam, depth, h, w]; -1 outside of the grid."""
    grid, z = geometry.grid, geometry.frustum.depths()
    rays, origins = geometry.rays()
    round_ = np.floor if grid.rounding == "floor" else np.trunc
    nx, ny = grid.size
    kept = np.ones((geometry.cameras, len(z), *geometry.frustum.features), bool)
    index = []
    for axis, (low, step, count) in enumerate(
        ((grid.x[0], grid.x[2], nx), (grid.y[0], grid.y[2], ny), (grid.z[0], grid.z[1] - grid.z[0], 1))
    ):
        point = rays[:, None, :, :, axis] * z[None, :, None, None] + origins[:, None, None, None, axis]
        cell = round_((point - low) / step)
        kept &= (cell >= 0) & (cell < count)
        index.append(cell)
    x, y = (np.where(kept, i, 0).astype(np.int32) for i in index[:2])
    result: np.ndarray = np.where(kept, y * nx + x if grid.order == "yx" else x * ny + y, -1).astype(np.int32)
    return result


def table(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """starts int32 [cells + 1]: first run of each cell; runs uint32 [runs, 3]: first depth index (of [cam, depth, h, w]), first
    pixel (of [cam, h, w]), camera << 16 | rows."""
    of_point = cells(geometry).transpose(0, 3, 1, 2)  # the order of sums: camera, column, depth, row
    cameras, width, bins, height = of_point.shape
    first = np.ones(of_point.shape, bool)
    first[..., 1:] = of_point[..., 1:] != of_point[..., :-1]
    begin = np.flatnonzero(first)
    length = np.diff(begin, append=of_point.size)
    cell = of_point.reshape(-1)[begin]
    begin, length, cell = begin[cell >= 0], length[cell >= 0], cell[cell >= 0]
    sort = np.argsort(cell, kind="stable")
    begin, length = begin[sort], length[sort]
    camera, column, depth, row = np.unravel_index(begin, (cameras, width, bins, height))
    runs = np.stack(
        [
            ((camera * bins + depth) * height + row) * width + column,
            (camera * height + row) * width + column,
            camera << COUNT_BITS | length,
        ],
        axis=1,
    )
    counts = np.bincount(cell, minlength=geometry.grid.cells)
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts, np.ascontiguousarray(runs, np.uint32)


def pool(
    starts: np.ndarray, runs: np.ndarray, depth: np.ndarray, features: np.ndarray, used: np.ndarray
) -> np.ndarray:
    """float32 [cells, C] of depth float32 [cam, D, h, w], features float32 [cam, h, w, C] and used bool [cam]."""
    width, channels = features.shape[2:]
    rows = (runs[:, 2] & ((1 << COUNT_BITS) - 1)).astype(np.int64)
    rows[~used[runs[:, 2] >> COUNT_BITS]] = 0
    ends = np.cumsum(rows)  # of each run, in points
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - rows, rows)
    weight = depth.reshape(-1)[np.repeat(runs[:, 0].astype(np.int64), rows) + within * width]
    pixel = np.repeat(runs[:, 1].astype(np.int64), rows) + within * width
    begin = np.concatenate([[0], ends])[starts]  # of each cell, in points
    length = np.diff(begin)
    longest = np.argsort(-length, kind="stable")
    out = np.zeros((len(length), channels), np.float32)
    flat = features.reshape(-1, channels)
    sums = np.zeros((np.count_nonzero(length), channels), np.float32)  # of the cells in falling length
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(int(length.max(initial=0))):
            live = int(np.searchsorted(-length[longest], -k))  # those with more than k points
            at = begin[longest[:live]] + k
            sums[:live] += weight[at, None] * flat[pixel[at]]
    out[longest[: len(sums)]] = sums
    return out
