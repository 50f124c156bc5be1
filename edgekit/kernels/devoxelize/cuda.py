"""Arguments and launches of kernel.cu, for a caller that keeps the arrays on the device.

Tests run the source's arithmetic as C++ against reference.py; **it has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes

BLOCK = 256


class Parameters(ctypes.Structure):
    """`struct Devoxelize` of kernel.cu, field by field."""

    _fields_ = (
        ("points", ctypes.c_uint64),
        ("bits", ctypes.c_uint64),
        ("before", ctypes.c_uint64),
        ("index", ctypes.c_uint64),
        ("weight", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("low", ctypes.c_float * 3),
        ("size", ctypes.c_float * 3),
        ("center", ctypes.c_float),
        ("n", ctypes.c_int),
        ("step", ctypes.c_int),
        ("batch", ctypes.c_int),
        ("z", ctypes.c_int),
        ("y", ctypes.c_int),
        ("x", ctypes.c_int),
        ("words", ctypes.c_int),
        ("channels", ctypes.c_int),
    )


def launches(p: Parameters) -> tuple[tuple[str, tuple[int, int]], ...]:
    """The functions to launch in turn, each with its grid of blocks of `BLOCK` threads."""
    return (
        ("devoxelize_neighbours", (max(1, -(-p.n // BLOCK)), 1)),
        ("devoxelize", (max(1, -(-p.n * p.channels // BLOCK)), 1)),
    )
