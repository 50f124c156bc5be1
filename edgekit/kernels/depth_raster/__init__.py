"""Depth images: a LiDAR's points as each camera sees them, the nearest one per pixel."""

from __future__ import annotations

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.depth_raster import reference

MAX_SIDE = 16384
NEAR, FAR = 1e-5, 1e5
"""Depths in metres between which points count: the bounds of the published BEVFusion."""


def projections(
    intrinsics: np.ndarray, lidar_to_camera: np.ndarray, augmentation: np.ndarray | None = None
) -> np.ndarray:
    """Matrices for `depth_raster`: float32 [cam, 3, 4], composed in float64.

    intrinsics: [cam, 3, 3], camera -> pixels of the sensor's picture.  lidar_to_camera: [cam, 4, 4].
    augmentation: [cam, 3, 3], affine, sensor's pixel (x, y, 1) -> network's pixel, or None.
    Raises: UsageError for other shapes.
    """
    cameras = len(intrinsics)
    if augmentation is None:
        augmentation = np.broadcast_to(np.eye(3), (cameras, 3, 3))
    k, t, a = (np.asarray(m, np.float64) for m in (intrinsics, lidar_to_camera, augmentation))
    if k.shape != (cameras, 3, 3) or t.shape != (cameras, 4, 4) or a.shape != (cameras, 3, 3):
        raise UsageError(
            f"projections: wrong shapes, expected [cam, 3, 3], [cam, 4, 4] and [cam, 3, 3], "
            f"got {list(k.shape)}, {list(t.shape)} and {list(a.shape)}."
        )
    result: np.ndarray = np.ascontiguousarray(a @ k @ t[:, :3, :], np.float32)
    return result


def depth_raster(
    points: np.ndarray,
    matrices: np.ndarray,
    size: tuple[int, int],
    out: np.ndarray | None = None,
    *,
    near: float = NEAR,
    far: float = FAR,
    threads: int = 0,
) -> np.ndarray:
    """Depth of the nearest point per pixel, metres along the camera's axis: float32 [cam, height, width]; 0 = none.

    points: float32 [n, >= 3], x y z first, C-contiguous.  matrices: float32 [cam, 3, 4], LiDAR -> pixels times depth
    (`projections`).  size: (height, width) of the images.  out: written whole, or None for new memory.
    near, far: points with near < depth <= far count.  threads: 0 = as many as the process has CPUs.
    The same bits in every run, for any number of threads and any order of points. reference.py states the rule.
    Raises: UsageError for arrays of another shape or dtype, or limits out of order.
    """
    height, width = size
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype != np.float32:
        raise UsageError(
            f"argument points: wrong array, expected float32 [n, 3 or more], got {points.dtype} {list(points.shape)}."
        )
    if matrices.ndim != 3 or matrices.shape[1:] != (3, 4) or matrices.dtype != np.float32:
        raise UsageError(
            f"argument matrices: wrong array, expected float32 [cam, 3, 4], "
            f"got {matrices.dtype} {list(matrices.shape)}."
        )
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and 0 <= near < far):
        raise UsageError(
            f"depth image: expected sides of 1..{MAX_SIDE} and 0 <= near < far, "
            f"got {width}x{height}, near {near}, far {far}."
        )
    shape = (len(matrices), height, width)
    if out is None:
        out = np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32 or not (out.flags.c_contiguous and out.flags.writeable):
        raise UsageError(
            f"argument out: wrong tensor, expected float32 {list(shape)}, writable and C-contiguous, "
            f"got {out.dtype} {list(out.shape)}."
        )
    points, matrices = np.ascontiguousarray(points), np.ascontiguousarray(matrices)
    module = kernels.native()
    if module is None:
        reference.raster(points, matrices, out, np.float32(near), np.float32(far))
    else:
        module.depth_raster(points, matrices, out, near, far, threads)
    return out
