"""Arguments and launches of kernel.cu, for a caller that keeps the arrays on the device.

Tests run the source's arithmetic as C++ against reference.py; **it has not run on a GPU** (docs/gpu.md).
"""

from __future__ import annotations

import ctypes

from edgekit.kernels.cuda import blocks, fields

BLOCK = 256
PIECE = 64
"""Words of bits that one thread ranks (`kPiece`)."""
SHARES = 1024
"""Threads of `sparse_scan`; `partial` has room for as many sums behind the pieces."""
CHANNELS = 4
"""Output channels of a thread (`kChannels`)."""

Launch = tuple[str, tuple[int, int], tuple[int, ...]]


class Grid(ctypes.Structure):
    """`struct SparseGrid` of kernel.cu, field by field."""

    _fields_ = fields(
        "u64 bits, before, partial, coordinates, total, source",
        "int n, most, batch, z, y, x, words, pieces, kernel[3], stride[3], padding[3]",
    )


class Book(ctypes.Structure):
    """`struct SparseBook`."""

    _fields_ = fields(
        "u64 bits, before, outputs, neighbours",
        "int m, z, y, x, words, kernel[3], stride[3], padding[3]",
    )


class Convolution(ctypes.Structure):
    """`struct SparseConv`."""

    _fields_ = fields(
        "u64 neighbours, features, weights, scale, bias, residual, residual8, out, out8",
        "float residual_scale, out_scale",
        "int m, volume, channels, outputs, relu",
    )


def words_of(batch: int, z: int, y: int, x: int) -> tuple[int, int]:
    """(words of a row, words of the grid)"""
    words = -(-x // 32)
    return words, batch * z * y * words


def _blocks(threads: int) -> tuple[int, int]:
    return blocks(threads, BLOCK), 1


def site_launches(p: Grid, strided: bool) -> tuple[Launch, ...]:
    """(function, grid of blocks of `BLOCK` threads, further int arguments) in turn: sites from the voxels at
    `source`, or those that a strided convolution makes of them."""
    _, words = words_of(p.batch, p.z, p.y, p.x)
    marks = p.n * p.kernel[0] * p.kernel[1] * p.kernel[2] if strided else p.n
    return (
        ("sparse_clear", _blocks(words), ()),
        ("sparse_mark_strided" if strided else "sparse_mark", _blocks(marks), ()),
        ("sparse_count", _blocks(p.pieces), ()),
        ("sparse_scan", _blocks(SHARES), (0,)),
        ("sparse_scan_shares", (1, 1), ()),
        ("sparse_scan", _blocks(SHARES), (1,)),
        ("sparse_rank", _blocks(p.pieces), ()),
        ("sparse_emit", _blocks(words), ()),
    )


def book_launch(p: Book) -> Launch:
    return "sparse_neighbours", _blocks(p.m * p.kernel[0] * p.kernel[1] * p.kernel[2]), ()


def convolution_launch(p: Convolution, integers: bool) -> Launch:
    name = "sparse_conv8" if integers else "sparse_conv"
    return name, _blocks(p.m * -(-p.outputs // CHANNELS)), ()
