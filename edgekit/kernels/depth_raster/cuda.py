"""Depth images on NVIDIA GPUs: points at a device address in, the depth input of a TensorRT engine out.

Tests run the source's arithmetic as C++ against reference.py; **this file has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes

import numpy as np

from edgekit.errors import UsageError
from edgekit.kernels.cuda import CudaKernel, blocks, fields
from edgekit.kernels.depth_raster import FAR, NEAR

BLOCK = 256


class Parameters(ctypes.Structure):
    """`struct DepthRaster` of kernel.cu, field by field."""

    _fields_ = fields(
        "u64 points, matrices, image",
        "i64 n",
        "int step, cameras, height, width",
        "float near, far",
    )


def launches(p: Parameters) -> tuple[tuple[str, tuple[int, int]], ...]:
    """The functions to launch in turn, each with its grid of blocks of `BLOCK` threads."""
    pixels = (blocks(p.cameras * p.height * p.width, BLOCK), 1)
    points = (blocks(p.n, BLOCK), p.cameras)
    if p.cameras == 0:
        return ()
    drawn = (("depth_raster", points),) if p.n > 0 else ()
    return (("depth_raster_clear", pixels), *drawn, ("depth_raster_finish", pixels))


class CudaDepthRaster(CudaKernel):
    """The kernel on device 0 with the cameras' matrices there; for one thread at a time. Arguments as `depth_raster`.

    Raises: MissingExtraError without cuda-bindings or NVRTC, StreamError on CUDA errors, UsageError for matrices of
    another shape or dtype.
    """

    def __init__(
        self, matrices: np.ndarray, size: tuple[int, int], near: float = NEAR, far: float = FAR
    ) -> None:
        if matrices.ndim != 3 or matrices.shape[1:] != (3, 4) or matrices.dtype != np.float32:
            raise UsageError(
                f"argument matrices: wrong array, expected float32 [cam, 3, 4], "
                f"got {matrices.dtype} {list(matrices.shape)}."
            )
        self._cameras, self._size, self._limits = len(matrices), size, (near, far)
        super().__init__("depth_raster", matrices=matrices)

    def launch(self, points: int, n: int, step: int, out: int, stream: int = 0) -> None:
        """Enqueue the kernels on `stream`; returns at once.

        points: device address of float32 [n, step].  out: of float32 [cam, height, width].
        Raises: StreamError on CUDA errors and when closed.
        """
        p = Parameters(points, self._at["matrices"], out, n, step, self._cameras, *self._size, *self._limits)
        self._enqueue(launches(p), (BLOCK,), stream, p)
