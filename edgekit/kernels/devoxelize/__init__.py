"""Voxels to points: trilinear interpolation between the eight voxels around a point, for point-voxel networks.

The weights depend on points and sites only: `neighbours` once, `devoxelize` for each layer's features
(PVCNN, arXiv 1907.03739; SPVNAS, arXiv 2007.16100).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.devoxelize import reference
from edgekit.kernels.sparse_conv import Sites


@dataclass(frozen=True)
class Neighbours:
    """index: int32 [n, 8], rows of the sites' features, -1 for none.  weight: float32 [n, 8], 0 there."""

    index: np.ndarray
    weight: np.ndarray
    sites: int
    """Number of sites that `index` counts."""


def neighbours(
    points: np.ndarray,
    at: Sites,
    low: tuple[float, float, float],
    size: tuple[float, float, float],
    *,
    center: float = 0.5,
    batch: int = 0,
    threads: int = 0,
) -> Neighbours:
    """The voxels around each point and their weights; reference.py states the rule to the last bit.

    points: float32 [n, c >= 3], x y z first.  low, size: corner of the grid and a voxel's sides at the resolution of
    `at`, metres in x, y, z.  center: where in a voxel its value lies (0.5: the middle; 0 for SPVNAS's checkpoints).
    batch: which sample of `at` the points belong to.
    Raises: UsageError for arrays of another shape or dtype, or sides that are not positive.
    """
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype != np.float32:
        raise UsageError(f"points: expected float32 [n, 3 or more], got {points.dtype} {list(points.shape)}.")
    if (
        len(low) != 3
        or len(size) != 3
        or not all(map(math.isfinite, (*low, *size, center)))
        or min(size) <= 0
    ):
        raise UsageError(
            f"devoxelize: expected finite low and positive size in x, y, z, got {low}, {size}, {center}."
        )
    if not 0 <= batch < at.batch or threads < 0:
        raise UsageError(
            f"devoxelize: expected a batch in 0..{at.batch - 1} and threads of at least 0, got {batch}, {threads}."
        )
    corner, side = np.array(low, np.float32), np.array(size, np.float32)
    module = kernels.native()
    if module is None or at._made is None:
        found = reference.neighbours(points, at.coordinates, at.shape, corner, side, center, batch)
    else:
        found = module.devoxelize_neighbours(
            np.ascontiguousarray(points), at._made, corner, side, center, batch, threads
        )
    return Neighbours(*found, len(at))


def devoxelize(features: np.ndarray, around: Neighbours, *, threads: int = 0) -> np.ndarray:
    """float32 [n, c]: the features of the voxels around each point, weighted; 0 where there are none.

    features: float32 [sites, c]. Raises: UsageError for features of other sites.
    """
    if features.ndim != 2 or len(features) != around.sites or features.dtype != np.float32:
        raise UsageError(
            f"features: expected float32 [{around.sites}, channels], got {features.dtype} {list(features.shape)}."
        )
    module = kernels.native()
    if module is None:
        return reference.devoxelize(features, around.index, around.weight)
    out: np.ndarray = module.devoxelize(np.ascontiguousarray(features), around.index, around.weight, threads)
    return out
