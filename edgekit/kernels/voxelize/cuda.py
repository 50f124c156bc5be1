"""Arguments and launches of kernel.cu, for a caller that keeps the arrays on the device.

Tests run the source's arithmetic as C++ against reference.py; **it has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes

BLOCK = 256
PIECE = 256
"""Points that one thread numbers (`kPiece`)."""


class Parameters(ctypes.Structure):
    """`struct Voxelize` of kernel.cu, field by field."""

    _fields_ = (
        ("points", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("place", ctypes.c_uint64),
        ("partial", ctypes.c_uint64),
        ("head", ctypes.c_uint64),
        ("next", ctypes.c_uint64),
        ("coordinates", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("counts", ctypes.c_uint64),
        ("voxel", ctypes.c_uint64),
        ("slot", ctypes.c_uint64),
        ("total", ctypes.c_uint64),
        ("low", ctypes.c_float * 3),
        ("size", ctypes.c_float * 3),
        ("grid", ctypes.c_int * 3),
        ("n", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("table", ctypes.c_int),
        ("most", ctypes.c_int),
        ("max_points", ctypes.c_int),
        ("batch", ctypes.c_int),
    )


def table_size(n: int) -> int:
    """Places of the hash table for n points: a power of two, at most half of it is filled."""
    return max(64, 1 << (2 * n - 1).bit_length())


def launches(p: Parameters) -> tuple[tuple[str, tuple[int, int]], ...]:
    """The functions to launch in turn, each with its grid of blocks of `BLOCK` threads."""

    def grid(threads: int) -> tuple[int, int]:
        return max(1, -(-threads // BLOCK)), 1

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
