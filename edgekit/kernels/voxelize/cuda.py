"""Arguments and launches of kernel.cu, for a caller that keeps the arrays on the device.

Tests run the source's arithmetic as C++ against reference.py; **it has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes

from edgekit.kernels.cuda import blocks, fields

BLOCK = 256
PIECE = 256
"""Points that one thread numbers (`kPiece`)."""


class Parameters(ctypes.Structure):
    """`struct Voxelize` of kernel.cu, field by field."""

    _fields_ = fields(
        "u64 points, keys, first, number, place, partial, head, next, coordinates, features, counts, voxel, slot, total",
        "float low[3], size[3]",
        "int grid[3], n, channels, table, most, max_points, batch",
    )


def table_size(n: int) -> int:
    """Places of the hash table for n points: a power of two, at most half of it is filled."""
    return max(64, 1 << (2 * n - 1).bit_length())


def launches(p: Parameters) -> tuple[tuple[str, tuple[int, int]], ...]:
    """The functions to launch in turn, each with its grid of blocks of `BLOCK` threads."""

    def grid(threads: int) -> tuple[int, int]:
        return blocks(threads, BLOCK), 1

    pieces = -(-p.n // PIECE)
    return (
        ("voxelize_clear", grid(max(p.table, p.most, p.n))),
        ("voxelize", grid(p.n)),
        ("voxelize_count", grid(pieces)),
        ("voxelize_scan", grid(1)),
        ("voxelize_number", grid(pieces)),
        ("voxelize_link", grid(p.n)),
        ("voxelize_mean", grid(p.most)),
    )
