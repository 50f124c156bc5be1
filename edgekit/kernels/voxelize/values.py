"""What a network is told of each voxel."""

from __future__ import annotations

from typing import Literal

import numpy as np

from edgekit.kernels.voxelize import VoxelGrid, Voxels

Values = Literal["raw", "local"]

LOCAL = ("x in the voxel", "y in the voxel", "z / 2 m", "intensity", "10 dt", "log(1 + points) / 2")
"""What `local` values are: x and y from the voxel's middle in voxel sides."""


def voxel_values(voxels: Voxels, grid: VoxelGrid, values: Values, count: int) -> np.ndarray:
    """Inputs of an encoder, float32 [m, count], of voxels of points x, y, z, intensity, dt.

    values: `raw` = the first `count` means of the points' columns, `local` = `LOCAL`, of ordinary size.
    """
    if values == "raw":
        return voxels.features[:, :count]
    assert count == len(LOCAL), "local values are six"
    at = voxels.coordinates[:, :0:-1].astype(np.float32)  # x, y, z
    result = np.empty((len(at), len(LOCAL)), np.float32)
    for k in range(2):
        result[:, k] = (voxels.features[:, k] - np.float32(grid.low[k])) / np.float32(grid.size[k])
        result[:, k] -= at[:, k] + np.float32(0.5)
    result[:, 2] = voxels.features[:, 2] / 2
    result[:, 3] = voxels.features[:, 3]
    result[:, 4] = voxels.features[:, 4] * 10
    result[:, 5] = np.log1p(voxels.counts.astype(np.float32)) / 2
    return result
