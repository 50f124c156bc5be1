"""Association tables: built from a geometry, kept on disk by its content hash, mapped when there."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekit import kernels
from edgekit.archive import write_atomic
from edgekit.errors import OutputError
from edgekit.kernels.bev_pool import reference
from edgekit.kernels.bev_pool.geometry import Geometry

MAX_FILES = 32
"""Tables that a cache folder keeps, those used last."""

_MAGIC = f"edgekit-bev-1 {sys.byteorder}".encode().ljust(24, b"\0")
_HEADER = struct.Struct("=24s32s32s6IQ")  # magic, key, SHA-256 of the rest, shape, grid, runs
_ALIGN = 64
_START = -(-_HEADER.size // _ALIGN) * _ALIGN


class Table:
    """Which points of (camera, depth bin, pixel) each cell sums, as runs of rows (reference.py).

    shape: (cameras, depth bins, h, w) of depth.  grid: (rows, columns) of the bird's-eye view.
    starts: int32 [cells + 1].  runs: uint32 [runs, 3].  Both read-only, and a mapped file where it came from one.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        grid: tuple[int, int],
        starts: np.ndarray,
        runs: np.ndarray,
    ) -> None:
        self.shape, self.grid, self.starts, self.runs = shape, grid, starts, runs
        starts.flags.writeable = runs.flags.writeable = False

    @property
    def points(self) -> int:
        """Points that lie in the grid."""
        rows: int = (self.runs[:, 2] & ((1 << reference.COUNT_BITS) - 1)).sum(dtype=np.int64)
        return int(rows)

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + self.runs.nbytes


def build(geometry: Geometry, threads: int = 0) -> Table:
    """The table of `geometry`. threads: 0 = as many as the process has CPUs; the table is the same for any."""
    grid, frustum = geometry.grid, geometry.frustum
    module = kernels.native()
    if module is None:
        starts, runs = reference.table(geometry)
    else:
        (nx, ny), (low, high) = grid.size, grid.z
        axes = ((grid.x[0], grid.x[2], nx), (grid.y[0], grid.y[2], ny), (low, high - low, 1))
        starts, runs = module.bev_table(
            *geometry.rays(), frustum.depths(), axes, grid.rounding == "trunc", grid.order == "yx", threads
        )
    return Table((geometry.cameras, frustum.bins, *frustum.features), grid.shape, starts, runs)


def cached(geometry: Geometry, folder: Path | None, threads: int = 0) -> Table:
    """The table of `geometry` from `folder`, built and kept there when it is not in it.

    A folder that cannot be read or written costs a build and a warning, never an error; a damaged file counts as none.
    Files are written whole or not at all, so processes may share a folder. None: build.
    """
    if folder is None:
        return build(geometry, threads)
    path = folder / f"{geometry.key}.table"
    shape = (geometry.cameras, geometry.frustum.bins, *geometry.frustum.features)
    found = load(path, geometry.key, shape, geometry.grid.shape)
    if found is not None:
        return found
    made = build(geometry, threads)
    try:
        save(made, path, geometry.key)
        _trim(folder)
    except (OutputError, OSError) as error:
        warnings.warn(f"BEV table: not kept: {error}", RuntimeWarning, stacklevel=2)
    return made


def save(table: Table, path: Path, key: str) -> None:
    """Write `table` to `path` in one step. Raises: OutputError."""
    body = [table.starts.data.cast("B"), memoryview(_padding(table.starts.nbytes))]
    if len(table.runs):
        body.append(table.runs.data.cast("B"))
    head = _header(key, _digest(body), (*table.shape, *table.grid), len(table.runs))
    write_atomic(path, [head, *body], "BEV table")


def load(path: Path, key: str, shape: tuple[int, int, int, int], grid: tuple[int, int]) -> Table | None:
    """The table in `path`, mapped, if it is whole and that of `key`; None, with a warning, if it is not."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        warnings.warn(f"BEV table {path}: cannot be read ({error.strerror})", RuntimeWarning, stacklevel=3)
        return None
    cells = grid[0] * grid[1]
    first = _START + 4 * (cells + 1) + len(_padding(4 * (cells + 1)))
    runs = (size - first) // 12
    header = _header(key, _digest([data[_START:]]), (*shape, *grid), max(0, runs))
    if size != first + 12 * runs or data[:_START] != header:
        warnings.warn(f"BEV table {path}: is damaged; building it again", RuntimeWarning, stacklevel=3)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the age decides what is dropped first
    starts = np.frombuffer(data, np.int32, cells + 1, _START)
    return Table(shape, grid, starts, np.frombuffer(data, np.uint32, 3 * runs, first).reshape(runs, 3))


def _header(key: str, digest: bytes, sizes: Sequence[int], runs: int) -> bytes:
    return _HEADER.pack(_MAGIC, bytes.fromhex(key), digest, *sizes, runs).ljust(_START, b"\0")


def _padding(nbytes: int) -> bytes:
    return bytes(-nbytes % _ALIGN)


def _digest(parts: Sequence[memoryview]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _trim(folder: Path) -> None:
    """Drop the tables that were not used for the longest time."""
    used = []
    for path in folder.glob("*.table"):
        with contextlib.suppress(OSError):  # another process may drop it meanwhile
            used.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(used, reverse=True)[MAX_FILES:]:
        with contextlib.suppress(OSError):
            path.unlink()
