"""BEV pooling in torch, from the same association table as `kernels.bev_pool`.

`points_of` writes a table's runs out point by point, in the table's order: (cell; camera, column, depth bin, row). The
sum runs in this order on a CPU, so a result has the same bits in every run, and agrees with the kernel up to the rounding of
sums (tests: 1e-5). On a GPU torch adds in no fixed order.

The products of depth and feature are made for points inside of the grid only, and not kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekit.kernels.bev_pool import Table
from edgekit.kernels.bev_pool.reference import COUNT_BITS


@dataclass(frozen=True, eq=False)
class Points:
    """The points that are pooled, int64 [n] each: index into depth [cam, D, h, w], into pixels [cam, h, w], and cell.
    depths, pixels, cells: how many there are of each."""

    depth: Tensor
    pixel: Tensor
    cell: Tensor
    depths: int
    pixels: int
    cells: int

    def to(self, device: torch.device) -> Points:
        depth, pixel, cell = (t.to(device) for t in (self.depth, self.pixel, self.cell))
        return Points(depth, pixel, cell, self.depths, self.pixels, self.cells)


def points_of(table: Table) -> Points:
    """The points of a table in its order."""
    cameras, bins, height, width = table.shape
    runs = table.runs.astype(np.int64)
    rows = runs[:, 2] & ((1 << COUNT_BITS) - 1)
    within = (np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)) * width
    of_run = np.repeat(np.arange(len(table.starts) - 1), np.diff(table.starts))
    found = (
        np.repeat(runs[:, 0], rows) + within,
        np.repeat(runs[:, 1], rows) + within,
        np.repeat(of_run, rows),
    )
    depth, pixel, cell = map(torch.from_numpy, found)
    size = cameras * height * width
    return Points(depth, pixel, cell, size * bins, size, len(table.starts) - 1)


def stacked(parts: list[Points]) -> Points:
    """Points of a batch: samples one after the other, in all three."""
    depths = pixels = cells = 0
    depth, pixel, cell = [], [], []
    for part in parts:
        depth.append(part.depth + depths)
        pixel.append(part.pixel + pixels)
        cell.append(part.cell + cells)
        depths, pixels, cells = depths + part.depths, pixels + part.pixels, cells + part.cells
    return Points(torch.cat(depth), torch.cat(pixel), torch.cat(cell), depths, pixels, cells)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, depth: Tensor, features: Tensor, points: Points) -> Tensor:
        ctx.points = points
        ctx.save_for_backward(depth, features)
        products = features.index_select(0, points.pixel) * depth[points.depth, None]
        out = features.new_zeros((points.cells, features.shape[1]))
        return out.index_add_(0, points.cell, products)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        depth, features = ctx.saved_tensors
        points: Points = ctx.points
        arriving = gradient.index_select(0, points.cell)
        to_depth = torch.zeros_like(depth)  # a depth belongs to one point at most: nothing is summed
        to_depth[points.depth] = (arriving * features.index_select(0, points.pixel)).sum(1)
        to_features = torch.zeros_like(features)
        to_features.index_add_(0, points.pixel, arriving * depth[points.depth, None])
        return to_depth, to_features, None


def pool(depth: Tensor, features: Tensor, points: Points, shape: tuple[int, int]) -> Tensor:
    """Bird's-eye view float32 [B, C, rows, columns].

    depth: [B * cam, D, h, w], the weight of each bin.  features: [B * cam, C, h, w].  points: of the batch.
    shape: (rows, columns) of the grid.
    """
    channels = features.shape[1]
    flat = features.float().permute(0, 2, 3, 1).reshape(-1, channels)
    out: Tensor = _Pool.apply(depth.float().reshape(-1), flat, points)  # type: ignore[no-untyped-call]
    return out.reshape(-1, *shape, channels).permute(0, 3, 1, 2).contiguous()
