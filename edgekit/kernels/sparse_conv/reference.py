"""Sparse convolution in numpy: the definition of what the native kernel computes.

- Sites are sorted by (batch, z, y, x) and unique. (spconv keeps the order in which its hash table met them, which a
  GPU's threads decide.)
- Output o of kernel position k = (kz, ky, kx) reads input `o * stride - padding + k`, as in a dense convolution
  (cross-correlation, no flip). A submanifold convolution has the sites of its input; a strided one has every cell
  of `(n + 2 * padding - kernel) // stride + 1` whose window holds a site.
- Sum: over positions in rising order, then input channels in rising order. Where there is no input voxel nothing is
  added. float32: the native sum starts from the bias and uses fused multiply-add where the CPU has it, so that
  results agree to 1e-5 of the sum of magnitudes, and are the same bits in every run, for every thread count and on
  AVX2, AVX-512 and NEON.
- INT8: `sum(x * w)` in int32 exactly, then in float32 `sum * scale[o] + bias[o]`, `+ residual * residual_scale`,
  ReLU, and for int8 outputs `round(y / out_scale)`, halves to even, clamped to -127..127: the same bits everywhere.
"""

from __future__ import annotations

import numpy as np

Triple = tuple[int, int, int]
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


def linear(coordinates: np.ndarray, shape: Triple) -> np.ndarray:
    """Place of each (batch, z, y, x) in the grid: int64 [n]."""
    b, z, y, x = coordinates.astype(np.int64).T
    result: np.ndarray = ((b * shape[0] + z) * shape[1] + y) * shape[2] + x
    return result


def coordinates_at(places: np.ndarray, shape: Triple) -> np.ndarray:
    """The reverse of `linear`: int32 [n, 4]."""
    rest, x = np.divmod(places, shape[2])
    rest, y = np.divmod(rest, shape[1])
    b, z = np.divmod(rest, shape[0])
    return np.stack([b, z, y, x], axis=1).astype(np.int32)


def out_shape(shape: Triple, kernel: Triple, stride: Triple, padding: Triple) -> Triple:
    z, y, x = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, kernel, stride, padding, strict=True))
    return z, y, x


def strided_sites(
    coordinates: np.ndarray, shape: Triple, out: Triple, kernel: Triple, stride: Triple, padding: Triple
) -> np.ndarray:
    """Sites of a strided convolution's output, sorted: int32 [m, 4]."""
    found = [np.zeros(0, np.int64)]
    for k in np.ndindex(*kernel):
        place, rest = np.divmod(coordinates[:, 1:] + np.array(padding) - np.array(k), np.array(stride))
        ok = (rest == 0).all(axis=1) & (place >= 0).all(axis=1) & (place < np.array(out)).all(axis=1)
        found.append(linear(np.concatenate([coordinates[ok, :1], place[ok]], axis=1), out))
    return coordinates_at(np.unique(np.concatenate(found)), out)


def pairs(
    inputs: np.ndarray,
    shape: Triple,
    outputs: np.ndarray,
    kernel: Triple,
    stride: Triple,
    padding: Triple,
) -> Pairs:
    """The rulebook (position, input, output), int32 [n] each, sorted by position, then output."""
    places = linear(inputs, shape)
    result: list[np.ndarray] = [np.zeros((3, 0), np.int64)]
    for number, k in enumerate(np.ndindex(*kernel)):
        at = outputs[:, 1:].astype(np.int64) * np.array(stride) - np.array(padding) + np.array(k)
        rows = np.flatnonzero(((at >= 0) & (at < np.array(shape))).all(axis=1))
        wanted = linear(np.concatenate([outputs[rows, :1], at[rows]], axis=1), shape)
        found = np.searchsorted(places, wanted)
        hit = found < len(places)
        hit[hit] = places[found[hit]] == wanted[hit]
        result.append(np.stack([np.full(hit.sum(), number), found[hit], rows[hit]]))
    position, source, target = np.concatenate(result, axis=1).astype(np.int32)
    return position, source, target


def inverse(forward: Pairs) -> Pairs:
    """Inputs and outputs exchanged."""
    position, source, target = forward
    order = np.lexsort((source, position))
    return position[order], target[order], source[order]


def products(features: np.ndarray, weight: np.ndarray, book: Pairs, outputs: int) -> np.ndarray:
    """Sums of products. float32 features and weight [volume, in, out] -> float32; int8 -> int32."""
    kind = np.float32 if features.dtype == np.float32 else np.int32
    sums = np.zeros((outputs, weight.shape[2]), kind)
    position, source, target = book
    for k in range(len(weight)):
        mine = position == k  # every output occurs once at most
        sums[target[mine]] += features[source[mine]].astype(kind) @ weight[k].astype(kind)
    return sums


def convolve(
    features: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    book: Pairs,
    outputs: int,
    residual: np.ndarray | None,
    relu: bool,
) -> np.ndarray:
    result: np.ndarray = products(features, weight, book, outputs) + bias
    if residual is not None:
        result += residual
    return np.maximum(result, np.float32(0)) if relu else result


def convolve8(
    features: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    book: Pairs,
    outputs: int,
    residual: np.ndarray | None,
    residual_scale: float,
    relu: bool,
    out_scale: float | None,
) -> np.ndarray:
    y: np.ndarray = products(features, weight, book, outputs).astype(np.float32) * scale + bias
    if residual is not None:
        more = residual.astype(np.float32)
        y += more * np.float32(residual_scale) if residual.dtype == np.int8 else more
    if relu:
        y = np.maximum(y, np.float32(0))
    if out_scale is None:
        return y
    result: np.ndarray = np.clip(np.rint(y / np.float32(out_scale)), -127, 127).astype(np.int8)
    return result


def to_dense(coordinates: np.ndarray, features: np.ndarray, shape: Triple, batch: int) -> np.ndarray:
    out = np.zeros((batch, *shape, features.shape[1]), np.float32)
    out[tuple(coordinates.T)] = features
    return np.ascontiguousarray(np.moveaxis(out, -1, 1))
