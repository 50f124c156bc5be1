"""What block_conv computes, in numpy: a convolution of one picture, as any library has it.

Float sums: any order (the kernel's: input channels, then rows and columns of the kernel, rising). INT8 sums are exact,
and what becomes of them is the same to the last bit: code = zero + round(min(max(float32(sum) * scale, low), high)),
halves to even, low = 0 with ReLU, else -zero, high = 255 - zero.
"""

from __future__ import annotations

import numpy as np

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]
"""Padding: top, left, bottom, right."""


def out_size(size: Pair, kernel: Pair, stride: Pair, padding: Sides) -> Pair:
    """Rows and columns of the output."""
    top, left, bottom, right = padding
    return (size[0] + top + bottom - kernel[0]) // stride[0] + 1, (
        size[1] + left + right - kernel[1]
    ) // stride[1] + 1


def _sums(x: np.ndarray, weight: np.ndarray, stride: Pair, padding: Sides, blank: int) -> np.ndarray:
    """[O, out_h, out_w] in the type of `x`."""
    top, left, bottom, right = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right)), constant_values=blank)
    views = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))
    sums = np.tensordot(weight, views[:, :: stride[0], :: stride[1]], axes=((1, 2, 3), (0, 3, 4)))
    return np.asarray(sums)


def convolve(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: Pair, padding: Sides, relu: bool
) -> np.ndarray:
    """float32 [O, out_h, out_w] of float32 [C, H, W] and [O, C, kh, kw]."""
    found = _sums(x, weight, stride, padding, 0) + bias[:, None, None]
    return np.asarray(np.maximum(found, np.float32(0)) if relu else found)


def convolve8(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, stride: Pair, padding: Sides,
    zero_x: int, zero_y: int, relu: bool,
) -> np.ndarray:  # fmt: skip
    """uint8 [O, out_h, out_w] of uint8 [C, H, W], int8 weights and int32 bias [O]."""
    sums = _sums(x.astype(np.int32) - zero_x, weight.astype(np.int32), stride, padding, 0)
    real = (sums + bias[:, None, None]).astype(np.float32) * scale[:, None, None]
    low = np.float32(0 if relu else -zero_y)
    codes = np.rint(np.clip(real, low, np.float32(255 - zero_y))).astype(np.int32) + zero_y
    return np.asarray(codes, np.uint8)
