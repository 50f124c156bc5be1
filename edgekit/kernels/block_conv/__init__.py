"""Convolution on a CPU that skips what is not there: weights pruned in blocks, float32 and INT8.

    layer = BlockConv(weight, bias, size=(80, 80), padding=(1, 1, 1, 1), relu=True)
    y = layer(x)                                   # float32 [O, 80, 80] of float32 [C, 80, 80]
    layer = BlockConv8(codes, bias, scale, x_zero, y_zero, size=(80, 80), ...)     # uint8 to uint8

Zeros are left out where 8 consecutive filters share them (block=8: block-punched weights, docs/compression.md), and in
INT8 also 4 consecutive channels; block=1 leaves out every zero (N:M, unstructured), with less to do per weight loaded.
Any weights give the right result. One picture at a time; the same bits for any number of threads.
reference.py defines the arithmetic. benchmarks/sparse_kernels.py has it beside the libraries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.block_conv import reference
from edgekit.kernels.block_conv.reference import Pair, Sides

BLOCK = 8
MAX_KERNEL, MAX_STRIDE, MAX_SIDE, MAX_CHANNELS = 15, 8, 8192, 8192


def isas() -> list[str]:
    """Instruction sets that this machine has products for, best first; empty without the native module."""
    module = kernels.native()
    return module.block_isas() if module is not None else []


def kept(weight: np.ndarray, filters: int = BLOCK, channels: int = 1) -> float:
    """Share of weights [O, C, kh, kw] in blocks that are not zero throughout: what is multiplied."""
    o, c = weight.shape[:2]
    grid = np.zeros((-(-o // filters) * filters, -(-c // channels) * channels, *weight.shape[2:]), bool)
    grid[:o, :c] = weight != 0
    blocks = grid.reshape(-1, filters, grid.shape[1] // channels, channels, *weight.shape[2:]).any(
        axis=(1, 3), keepdims=True
    )
    whole = np.broadcast_to(
        blocks, (grid.shape[0] // filters, filters, grid.shape[1] // channels, channels, *weight.shape[2:])
    )
    return float(whole.reshape(grid.shape)[:o, :c].mean())


class _Conv:
    """Sizes of a layer, checked."""

    def __init__(
        self, weight: np.ndarray, dtype: Any, size: Pair, stride: Pair, padding: Sides, relu: bool
    ) -> None:
        if weight.ndim != 4 or weight.dtype != dtype or 0 in weight.shape:
            raise UsageError(
                f"block_conv weights: expected {np.dtype(dtype)} [O, C, kh, kw], got {weight.dtype} {list(weight.shape)}."
            )
        outputs, self.channels, *kernel = weight.shape
        sides = (len(size), len(stride), len(padding)) == (2, 2, 4)
        if not sides or max(kernel) > MAX_KERNEL or max(outputs, self.channels) > MAX_CHANNELS:
            raise UsageError(
                f"block_conv: expected sizes of two, padding of four, kernels up to {MAX_KERNEL}, got {list(kernel)}."
            )
        if not (min(size) >= 1 and max(size) <= MAX_SIDE and min(stride) >= 1 and max(stride) <= MAX_STRIDE):
            raise UsageError(f"block_conv: size {size} or stride {stride} is out of range.")
        if any(not 0 <= p < k for p, k in zip(padding, (*kernel, *kernel), strict=True)):
            raise UsageError(f"block_conv: padding {padding}: expected less than the kernel {list(kernel)}.")
        height, width = reference.out_size(size, (kernel[0], kernel[1]), stride, padding)
        if min(height, width) < 1:
            raise UsageError(f"block_conv: nothing comes out of {size} with kernel {list(kernel)}.")
        self.in_shape, self.out_shape = (self.channels, *size), (outputs, height, width)
        self.stride, self.padding, self.relu = stride, padding, relu
        self.weight = np.ascontiguousarray(weight)
        self._made: Any = None

    def _arrays(self, x: np.ndarray, out: np.ndarray | None, dtype: Any, threads: int) -> np.ndarray:
        if x.shape != self.in_shape or x.dtype != dtype or threads < 0:
            raise UsageError(
                f"block_conv: expected {np.dtype(dtype)} {list(self.in_shape)}, got {x.dtype} {list(x.shape)}."
            )
        if out is None:
            return np.empty(self.out_shape, dtype)
        if out.shape != self.out_shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise UsageError(f"block_conv: expected an output {np.dtype(dtype)} {list(self.out_shape)}.")
        return out


class BlockConv(_Conv):
    """A layer for pictures of one size. weight: float32 [O, C, kh, kw], its zeros are skipped. bias: float32 [O].

    size: rows and columns of the input. padding: top, left, bottom, right. block: filters that share what is
    skipped, 8 or 1. isa: one of `isas()`, for tests. Raises: UsageError for what does not fit.
    """

    def __init__(
        self, weight: np.ndarray, bias: np.ndarray | None = None, *, size: Pair, stride: Pair = (1, 1),
        padding: Sides = (0, 0, 0, 0), relu: bool = False, block: int = BLOCK, isa: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(weight, np.float32, size, stride, padding, relu)
        if block not in (1, BLOCK):
            raise UsageError(f"block_conv: blocks of {block} filters, expected 8 or 1.")
        self.bias = np.zeros(weight.shape[0], np.float32) if bias is None else np.ascontiguousarray(bias)
        if self.bias.shape != weight.shape[:1] or self.bias.dtype != np.float32:
            raise UsageError(f"block_conv bias: expected float32 [{weight.shape[0]}].")
        module = kernels.native()
        if module is not None:
            self._made = module.BlockConv(self.weight, self.bias, size, stride, padding, relu, block, isa)

    def __call__(self, x: np.ndarray, out: np.ndarray | None = None, *, threads: int = 0) -> np.ndarray:
        """float32 [O, h, w] of float32 [C, H, W], in `out` where given. Raises: UsageError for other arrays."""
        out = self._arrays(x, out, np.float32, threads)
        if self._made is None:
            out[:] = reference.convolve(x, self.weight, self.bias, self.stride, self.padding, self.relu)
        else:
            self._made.run(np.ascontiguousarray(x), out, threads)
        return out


class BlockConv8(_Conv):
    """A layer in INT8. weight: int8 in -127..127, symmetric, one scale per filter. bias: int32 [O], in units of
    x_scale * w_scale. scale: float32 [O], x_scale * w_scale / y_scale. Codes of input and output are uint8.

    Raises: UsageError for what does not fit.
    """

    def __init__(
        self, weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, x_zero: int, y_zero: int, *, size: Pair,
        stride: Pair = (1, 1), padding: Sides = (0, 0, 0, 0), relu: bool = False, isa: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(weight, np.int8, size, stride, padding, relu)
        if weight.min() < -127 or not (0 <= x_zero <= 255 and 0 <= y_zero <= 255):
            raise UsageError("block_conv: expected weights in -127..127 and zero points in 0..255.")
        if math.prod(weight.shape[1:]) * 255 * 127 >= 2**31:
            raise UsageError(f"block_conv: {math.prod(weight.shape[1:])} products do not fit 32 bits.")
        self.bias, self.scale = np.ascontiguousarray(bias), np.ascontiguousarray(scale)
        shape = weight.shape[:1]
        kinds = self.bias.dtype == np.int32 and self.scale.dtype == np.float32
        if self.bias.shape != shape or self.scale.shape != shape or not kinds:
            raise UsageError(f"block_conv: expected bias int32 and scale float32 [{shape[0]}].")
        self.x_zero, self.y_zero = x_zero, y_zero
        module = kernels.native()
        if module is not None:
            self._made = module.BlockConv8(
                self.weight, self.bias, self.scale, size, stride, padding, relu, x_zero, y_zero, isa
            )

    def __call__(self, x: np.ndarray, out: np.ndarray | None = None, *, threads: int = 0) -> np.ndarray:
        """uint8 [O, h, w] of uint8 [C, H, W], in `out` where given. Raises: UsageError for other arrays."""
        out = self._arrays(x, out, np.uint8, threads)
        if self._made is None:
            out[:] = reference.convolve8(
                x, self.weight, self.bias, self.scale, self.stride, self.padding, self.x_zero, self.y_zero, self.relu
            )  # fmt: skip
        else:
            self._made.run(np.ascontiguousarray(x), out, threads)
        return out
