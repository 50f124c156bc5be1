"""BEV pooling on NVIDIA GPUs, between two TensorRT engines: device addresses in, a device address out.

Tests run the source's arithmetic as C++ against reference.py; **this file has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal

import numpy as np

from edgekit.errors import UsageError
from edgekit.kernels.bev_pool.table import Table
from edgekit.kernels.cuda import CudaKernel, blocks, fields

BLOCK = (32, 4)
CHANNELS = 8
"""That one thread sums."""


class Parameters(ctypes.Structure):
    """`struct BevPool` of kernel.cu, field by field."""

    _fields_ = fields(
        "u64 starts, runs, depth, features, out, used",
        "int cells, width, channels, half_in, half_out, last",
    )


class BevPoolCall:
    """What `BevPool` is for the CPU, up to the launch.

    in_dtype: of depth and features, out_dtype: of the result; float32 or float16. Sums are float32.
    Raises: UsageError for others, and for a number of channels or a layout that cannot be used.
    """

    def __init__(
        self,
        table: Table,
        channels: int,
        layout: Literal["NCHW", "NHWC"] = "NCHW",
        in_dtype: str = "float32",
        out_dtype: str = "float32",
    ) -> None:
        dtypes = ("float32", "float16")
        if channels < 1 or layout not in ("NCHW", "NHWC") or not {in_dtype, out_dtype} <= set(dtypes):
            raise UsageError(
                "BEV pooling: expected at least 1 channel, layout 'NCHW' or 'NHWC' and dtypes float32 or float16, "
                f"got {channels}, {layout!r}, {in_dtype}, {out_dtype}."
            )
        self.table, self.channels, self.last = table, channels, layout == "NHWC"
        self.half_in, self.half_out = in_dtype == "float16", out_dtype == "float16"
        cells = table.grid[0] * table.grid[1]
        self.grid = (blocks(cells, BLOCK[0]), blocks(channels, CHANNELS * BLOCK[1]))

    def parameters(
        self,
        starts: int,
        runs: int,
        depth: int,
        features: int,
        out: int,
        cameras: Sequence[bool] | None = None,
    ) -> Parameters:
        """The kernel's argument; addresses as the kernel sees them. Raises: UsageError for another number of cameras."""
        count = self.table.shape[0]
        flags = [True] * count if cameras is None else list(cameras)
        if len(flags) != count:
            raise UsageError(f"argument cameras: expected {count} flags, got {len(flags)}.")
        used = sum(1 << k for k, flag in enumerate(flags) if flag)
        cells, width = self.table.grid[0] * self.table.grid[1], self.table.shape[3]
        addresses = (starts, runs, depth, features, out, used)
        return Parameters(*addresses, cells, width, self.channels, self.half_in, self.half_out, self.last)


class CudaBevPool(CudaKernel):
    """The kernel on device 0 with one table there; for one thread at a time. Arguments as `BevPoolCall`.

    Raises: MissingExtraError without cuda-bindings or NVRTC, StreamError on CUDA errors, UsageError.
    """

    def __init__(
        self,
        table: Table,
        channels: int,
        layout: Literal["NCHW", "NHWC"] = "NCHW",
        in_dtype: str = "float32",
        out_dtype: str = "float32",
    ) -> None:
        self.call = BevPoolCall(table, channels, layout, in_dtype, out_dtype)
        super().__init__("bev_pool", starts=np.asarray(table.starts), runs=np.asarray(table.runs))

    def launch(
        self, depth: int, features: int, out: int, stream: int = 0, cameras: Sequence[bool] | None = None
    ) -> None:
        """Enqueue the kernel on `stream`; returns at once. Arguments: device addresses of C-contiguous tensors, shapes as
        `BevPool.run`. Raises: StreamError on CUDA errors and when closed, UsageError."""
        parameters = self.call.parameters(
            **self._at, depth=depth, features=features, out=out, cameras=cameras
        )
        self._enqueue([("bev_pool", self.call.grid)], BLOCK, stream, parameters)
