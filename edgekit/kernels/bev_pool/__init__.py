"""BEV pooling: camera features, weighted by a distribution over depth, summed into the cells of a bird's-eye view.

    geometry = Geometry(intrinsics, camera_to_ego, augmentation)     # calibration: once
    pool = BevPool(cached(geometry, folder), channels=80)
    pool.run(depth, features, out)                                   # each frame

The lifted tensor depth x feature (638 MB at BEVFusion's size) is never made: each cell adds up its products in
registers and is written once. reference.py states order and rounding; docs/kernels3d.md the design and figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.bev_pool import reference
from edgekit.kernels.bev_pool.geometry import BevGrid, Frustum, Geometry
from edgekit.kernels.bev_pool.table import Table, build, cached

__all__ = ["BevGrid", "BevPool", "Frustum", "Geometry", "Table", "build", "cached"]

MAX_CHANNELS = 4096
STREAM_BYTES = 8 << 20
"""Results from this size on are written past the caches, which would not hold them until they are read."""


class BevPool:
    """Pooling over one table: made once per calibration, shared by threads.

    channels: of the features.  layout: of the result, "NCHW" or "NHWC" with H rows and W columns of the grid.
    isa: code path of the native kernel, for tests.
    Raises: UsageError for a number of channels or a layout that cannot be used.
    """

    def __init__(
        self, table: Table, channels: int, layout: Literal["NCHW", "NHWC"] = "NCHW", isa: str = "auto"
    ) -> None:
        if not 1 <= channels <= MAX_CHANNELS or layout not in ("NCHW", "NHWC"):
            raise UsageError(
                f"BEV pooling: expected 1..{MAX_CHANNELS} channels and layout 'NCHW' or 'NHWC', "
                f"got {channels} and {layout!r}."
            )
        self.table, self.channels, self.layout = table, channels, layout
        cameras, _, height, width = table.shape
        self.features_shape = (cameras, height, width, channels)
        rows, columns = table.grid
        self.out_shape = (1, channels, rows, columns) if layout == "NCHW" else (1, rows, columns, channels)
        module = kernels.native()
        self._kernel: Any = (
            None
            if module is None
            else module.BevPool(
                table.starts, table.runs, table.shape, columns, channels, layout == "NHWC", isa
            )
        )

    def run(
        self,
        depth: np.ndarray,
        features: np.ndarray,
        out: np.ndarray | None = None,
        *,
        cameras: Sequence[bool] | None = None,
        threads: int = 0,
    ) -> np.ndarray:
        """Sum into `out`, all of it; returns it.

        depth: float32 or float16 [cam, D, h, w], the weight of each depth bin.
        features: float32 or float16 [cam, h, w, C]; float16 is converted first, sums are float32. Best where a cache
            line begins, as engines put theirs: they are copied there otherwise.
        out: float32 `out_shape`, C-contiguous, or None for a new one.
        cameras: which ones count, all by default; a missing one's tensors are not read (result as if it were not there).
        threads: 0 = as many as the process has CPUs; the bits do not depend on it.
        Raises: UsageError for arrays of another shape, dtype or layout.
        """
        depth = _tensor("depth", depth, self.table.shape)
        features = _tensor("features", features, self.features_shape)
        if out is None:
            out = np.empty(self.out_shape, np.float32)
        if out.shape != self.out_shape or out.dtype != np.float32:
            raise UsageError(
                f"argument out: wrong tensor, expected float32 {list(self.out_shape)}, "
                f"got {out.dtype} {list(out.shape)}. Pass the engine's own input."
            )
        if not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
            raise UsageError("argument out: expected a writable C-contiguous array, got another view.")
        used = np.ones(self.table.shape[0], bool) if cameras is None else np.array(cameras, bool)
        if used.shape != (self.table.shape[0],):
            raise UsageError(
                f"argument cameras: expected {self.table.shape[0]} flags, got {list(used.shape)}."
            )
        if self._kernel is not None:
            stream = out.nbytes >= STREAM_BYTES
            self._kernel.run(depth, features, out, used.view(np.uint8), stream, threads)
            return out
        sums = reference.pool(self.table.starts, self.table.runs, depth, features, used)
        if self.layout == "NCHW":
            sums = sums.T
        out[...] = sums.reshape(self.out_shape)
        return out


def _tensor(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`array` as C-contiguous float32. Raises: UsageError."""
    if array.shape != shape or array.dtype not in (np.float32, np.float16):
        raise UsageError(
            f"argument {name}: wrong tensor, expected float32 or float16 {list(shape)}, "
            f"got {array.dtype} {list(array.shape)}."
        )
    return np.ascontiguousarray(array, np.float32)
