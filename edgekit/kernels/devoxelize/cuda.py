"""Arguments and launches of kernel.cu, for a caller that keeps the arrays on the device.

Tests run the source's arithmetic as C++ against reference.py; **it has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes

from edgekit.kernels.cuda import blocks, fields

BLOCK = 256


class Parameters(ctypes.Structure):
    """`struct Devoxelize` of kernel.cu, field by field."""

    _fields_ = fields(
        "u64 points, bits, before, index, weight, features, out",
        "float low[3], size[3], center",
        "int n, step, batch, z, y, x, words, channels",
    )


def launches(p: Parameters) -> tuple[tuple[str, tuple[int, int]], ...]:
    """The functions to launch in turn, each with its grid of blocks of `BLOCK` threads."""
    return (
        ("devoxelize_neighbours", (blocks(p.n, BLOCK), 1)),
        ("devoxelize", (blocks(p.n * p.channels, BLOCK), 1)),
    )
