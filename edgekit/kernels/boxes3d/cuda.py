"""IoU of rotated boxes on NVIDIA GPUs, from device address to device address.

Tests run the source's arithmetic as C++ against reference.py; **this file has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes

import numpy as np

from edgekit.errors import UsageError
from edgekit.kernels.cuda import CudaKernel, blocks, fields

BLOCK = 128
BOX_BYTES = 80
"""`struct Box` of kernel.cu: ten float64."""


class Parameters(ctypes.Structure):
    """`struct Boxes3d` of kernel.cu, field by field."""

    _fields_ = fields(
        "u64 a, b, prepared, out",
        "int n, m, three_d",
    )


def launches(p: Parameters) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The functions to launch in turn, each with its grid of blocks of `BLOCK` threads."""
    if not p.n * p.m:
        return ()
    return (("boxes3d_prepare", (blocks(p.n + p.m, BLOCK),)), ("boxes3d", (blocks(p.n * p.m, BLOCK),)))


class CudaBoxes3D(CudaKernel):
    """The kernel on device 0 with room for `most` boxes, those of both sets together; for one thread at a time.

    Raises: MissingExtraError without cuda-bindings or NVRTC, StreamError on CUDA errors.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        super().__init__("boxes3d", prepared=np.zeros(max(1, most) * BOX_BYTES, np.uint8))

    def launch(
        self, a: int, n: int, b: int, m: int, out: int, *, three_d: bool = False, stream: int = 0
    ) -> None:
        """Enqueue the kernels on `stream`; returns at once. Calls on several streams would share the prepared boxes.

        a, b: device addresses of float32 [n, 7] and [m, 7].  out: of float32 [n, m], IoU as `bev_iou` or `iou_3d`.
        Raises: UsageError for more boxes than there is room for, StreamError on CUDA errors and when closed.
        """
        if n + m > self._most:
            raise UsageError(f"boxes3d: expected at most {self._most} boxes in both sets, got {n} and {m}.")
        p = Parameters(a, b, self._at["prepared"], out, n, m, three_d)
        self._enqueue(launches(p), (BLOCK,), stream, p)
