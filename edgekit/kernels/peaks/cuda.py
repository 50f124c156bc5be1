"""Peaks of heat maps on NVIDIA GPUs, from a TensorRT engine's outputs to a few rows.

Tests run the source's arithmetic as C++ against reference.py; **this file has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from edgekit.errors import UsageError
from edgekit.kernels.cuda import CudaKernel, blocks, fields
from edgekit.kernels.peaks import reference

BLOCK = 128
MAX_MAPS = 8
CAPACITY = 8192
"""Peaks that are looked at. The place of each is found by counting, so time grows with its square."""


class Parameters(ctypes.Structure):
    """`struct PeakMaps` of kernel.cu, field by field."""

    _fields_ = fields(
        f"u64 heat, windows, map[{MAX_MAPS}], keys, found, scores, cells, values",
        f"int channels[{MAX_MAPS}], maps, classes, height, width, limit, capacity",
        "float low",
    )


def launches(p: Parameters) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The functions to launch in turn, each with its grid of blocks of `BLOCK` threads."""
    cells = p.classes * p.height * p.width
    if not cells:
        return (("peaks_clear", (1,)),)
    return (
        ("peaks_clear", (1,)),
        ("peaks", (blocks(cells, BLOCK),)),
        ("peaks_pick", (blocks(p.capacity, BLOCK),)),
    )


class CudaPeaks(CudaKernel):
    """The kernel on device 0 for maps of one shape; for one thread at a time.

    shape: (classes, height, width) of the heat map.  channels: of each map.  threshold, limit, window: as `peaks`.
    Raises: MissingExtraError without cuda-bindings or NVRTC, StreamError on CUDA errors, UsageError for arguments out
    of range.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        *,
        threshold: float,
        limit: int,
        window: int | Sequence[int] = 3,
        capacity: int = CAPACITY,
    ) -> None:
        windows = (
            np.full(shape[0], window, np.int32) if isinstance(window, int) else np.asarray(window, np.int32)
        )
        if len(channels) > MAX_MAPS or windows.shape != shape[:1] or not np.isin(windows, (1, 3)).all():
            raise UsageError(
                f"peaks: expected at most {MAX_MAPS} maps and windows of 1 or 3, got {len(channels)}, {window}."
            )
        if not 0 <= threshold <= 1 or limit < 1 or capacity < limit:
            raise UsageError(
                f"peaks: expected threshold in 0..1, limit at least 1 and at most the capacity, "
                f"got {threshold}, {limit}, {capacity}."
            )
        super().__init__("peaks", windows=windows, keys=np.zeros(capacity, np.uint64))
        p = self._parameters = Parameters(**self._at)
        p.channels[: len(channels)] = list(channels)
        p.maps, p.limit, p.capacity = len(channels), limit, capacity
        p.classes, p.height, p.width = shape
        p.low = reference.cutoff(threshold)

    def launch(
        self,
        heat: int,
        maps: Sequence[int],
        found: int,
        scores: int,
        cells: int,
        values: int,
        stream: int = 0,
    ) -> None:
        """Enqueue the kernels on `stream`; returns at once. All arguments are device addresses.

        heat: float32 [classes, height, width].  maps: of float32 [channels, height, width] each.  found: uint32, how many
        peaks there were: the first min(found, limit) rows of scores float32 [limit], cells int32 [limit, 3] and
        values float32 [limit, all channels] hold them, best first; above `capacity` the rows are void.
        Raises: UsageError for another number of maps, StreamError on CUDA errors and when closed.
        """
        p = self._parameters
        if len(maps) != p.maps:
            raise UsageError(f"peaks: expected {p.maps} maps, got {len(maps)}.")
        p.map[: len(maps)] = list(maps)
        p.heat, p.found, p.scores, p.cells, p.values = heat, found, scores, cells, values
        self._enqueue(launches(p), (BLOCK,), stream, p)
