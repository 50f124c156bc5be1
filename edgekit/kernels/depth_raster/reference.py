"""Depth images of a point cloud in numpy: the definition that kernel.cpp and kernel.cu follow bit for bit.

In float32, one rounding per operation, no fused multiply-add, for each camera's 3x4 matrix m and each point:

    X = ((m00 x + m01 y) + m02 z) + m03,  Y and Z likewise,  u = X / Z,  v = Y / Z

The point counts if near < Z <= far, 0 <= u < width and 0 <= v < height; its pixel is (trunc u, trunc v). A pixel holds the
smallest Z of its points, 0 where there is none. NaN never counts.

How the published implementations differ (mit-han-lab/bevfusion `depth_lss.py`, NVIDIA's CUDA-BEVFusion `camera-depth.cu`):
- *the last point written wins*: in an order that threads decide, so two runs differ. Here the nearest wins: an
  occluded point does not show through, and the image depends on no order.
- *behind the camera*: they clamp Z to 1e-5..1e5 first, so a point behind the camera next to its axis may hit the image. Here it is
  dropped.
- *rounding of pixels*: to 0 after the bounds check, as here.
- *augmentation*: a second step after the division there, one matrix here (`projections`); u may differ in its last bits.
"""

from __future__ import annotations

import numpy as np


def raster(
    points: np.ndarray, matrices: np.ndarray, out: np.ndarray, near: np.float32, far: np.float32
) -> None:
    """points float32 [n, >= 3], matrices float32 [cam, 3, 4] -> out float32 [cam, height, width]."""
    height, width = out.shape[1:]
    x, y, z = (points[:, k] for k in range(3))
    for m, image in zip(matrices, out, strict=True):
        with np.errstate(all="ignore"):  # of points that do not count
            a, b, c = (((m[k, 0] * x + m[k, 1] * y) + m[k, 2] * z) + m[k, 3] for k in range(3))
            u, v = a / c, b / c
            inside = (c > near) & (c <= far) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        nearest = np.full(height * width, np.inf, np.float32)
        np.minimum.at(nearest, v[inside].astype(np.int64) * width + u[inside].astype(np.int64), c[inside])
        image[...] = np.where(np.isinf(nearest), np.float32(0), nearest).reshape(height, width)
