"""Voxels to points in numpy: the definition that the native kernel follows to the last bit.

A point at q = (p - low) / size - center, float32 per axis, lies between the voxels floor(q) and floor(q) + 1 of each
axis. With f = q - floor(q), neighbour (dz, dy, dx), number 4 dz + 2 dy + dx, has the weight (wz * wy) * wx where w is
f for 1 and 1 - f for 0. Neighbours that are no site have index -1 and weight 0; the other weights are divided by
their sum (in neighbour order) if it is above 0. A point that is not finite, or far outside, has no neighbours.
The result is the float32 sum of weight * feature in neighbour order.

`center`: where in a voxel its value lies. 0.5 is its middle. SPVNAS takes 0 (`floor` as voxel and as lower corner, so
that features move by half a voxel), which its checkpoints need; it also adds 1e-8 to the sum. PVCNN rounds points to
voxels, so that 0.5 is its rule, on a dense grid whose neighbours all exist.
"""

from __future__ import annotations

import numpy as np

from edgekit.kernels.sparse_conv.reference import Triple, linear

FAR = np.float32(1 << 24)


def neighbours(
    points: np.ndarray,
    coordinates: np.ndarray,
    shape: Triple,
    low: np.ndarray,
    size: np.ndarray,
    center: float,
    batch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(index int32 [n, 8], weight float32 [n, 8]). coordinates: sorted sites; low, size: float32 [3], xyz."""
    with np.errstate(over="ignore", invalid="ignore"):
        q = (points[:, :3] - low) / size - np.float32(center)
        usable = (np.abs(q) < FAR).all(axis=1)
    q = np.where(usable[:, None], q, np.float32(0))
    base = np.floor(q)
    high = q - base
    both = np.stack([np.float32(1) - high, high])  # [2, n, xyz]
    places = linear(coordinates, shape)
    index = np.full((len(points), 8), -1, np.int32)
    weight = np.zeros((len(points), 8), np.float32)
    for number, (dz, dy, dx) in enumerate(np.ndindex(2, 2, 2)):
        at = base[:, ::-1].astype(np.int64) + np.array((dz, dy, dx))
        rows = np.flatnonzero(usable & ((at >= 0) & (at < shape)).all(axis=1))
        wanted = linear(np.concatenate([np.full((len(rows), 1), batch), at[rows]], axis=1), shape)
        found = np.searchsorted(places, wanted)
        hit = found < len(places)
        hit[hit] = places[found[hit]] == wanted[hit]
        index[rows[hit], number] = found[hit]
        weight[rows[hit], number] = ((both[dz, :, 2] * both[dy, :, 1]) * both[dx, :, 0])[rows[hit]]
    total = weight[:, 0].copy()
    for number in range(1, 8):
        total += weight[:, number]
    above = total > 0
    weight[above] /= total[above, None]
    return index, weight


def devoxelize(features: np.ndarray, index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    out = np.zeros((len(index), features.shape[1]), np.float32)
    for number in range(8):
        rows = np.flatnonzero(index[:, number] >= 0)
        out[rows] += weight[rows, number, None] * features[index[rows, number]]
    return out
