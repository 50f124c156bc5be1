"""What the heads learn: targets of centres, and the losses (CenterPoint's; depth as in BEVDepth, Li et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgekit.models.bevfusion.config import CameraConfig, Config
from edgekit.models.bevfusion.head import BOX

OVERLAP = 0.1
"""IoU that a box moved to the edge of its bump still has (CenterPoint's `gaussian_overlap`)."""
VALUE_WEIGHTS = (1.0,) * 8 + (0.2, 0.2)
"""Of `BOX`: velocities count a fifth."""


@dataclass(frozen=True)
class Weights:
    """Of the parts of the loss."""

    heat: float = 1.0
    box: float = 0.25
    depth: float = 0.5
    segments: float = 1.0


@dataclass(frozen=True, eq=False)
class Targets:
    """By group: `heat` float32 [B, classes, rows, columns], 1 at centres and a bump around; `cells` int64 [n], where in
    [B, rows, columns] each object's centre lies; `values` float32 [n, 10], `BOX`, NaN where unknown."""

    heat: tuple[Tensor, ...]
    cells: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def to(self, device: torch.device) -> Targets:
        parts = (tuple(t.to(device) for t in group) for group in (self.heat, self.cells, self.values))
        return Targets(*parts)


def bump_radius(length: float, width: float) -> float:
    """How many cells a box of that size (cells) may be off and still overlap by `OVERLAP`: the least of three cases.

    The cases (both corners inside, both outside, one each) are CornerNet's (Law & Deng 2018), with the roots that CenterPoint takes.
    """
    total, area, m = length + width, length * width, OVERLAP
    cases = (
        (1.0, total, area * (1 - m) / (1 + m)),
        (4.0, 2 * total, (1 - m) * area),
        (4 * m, -2 * m * total, (m - 1) * area),
    )
    return min((b + math.sqrt(b * b - 4 * a * c)) / 2 for a, b, c in cases)


def targets(config: Config, boxes: Sequence[np.ndarray], classes: Sequence[np.ndarray]) -> Targets:
    """Of a batch: per sample boxes float32 [k, 9] (`rig.BOX_FIELDS`) and classes int [k] into `config.head.labels`.

    Objects whose centre is outside of the map are left out. Where two share a cell, both are learnt.
    """
    head, (rows, columns), cell = config.head, config.shape, config.cell
    low = config.bev.pool.x[0], config.bev.pool.y[0]
    first, heats, cells, values = 0, [], [], []
    for group in head.groups:
        heat = np.zeros((len(boxes), len(group), rows, columns), np.float32)
        at: list[int] = []
        said: list[list[float]] = []
        for b, (some, kinds) in enumerate(zip(boxes, classes, strict=True)):
            for box, kind in zip(some.astype(np.float64), kinds, strict=True):
                if not first <= kind < first + len(group):
                    continue
                column, row = ((box[k] - low[k]) / cell[k] for k in range(2))
                if not (0 <= column < columns and 0 <= row < rows):
                    continue
                i, j = int(row), int(column)
                radius = max(head.min_radius, int(bump_radius(box[3] / cell[0], box[4] / cell[1])))
                _bump(heat[b, kind - first], i, j, radius)
                at.append((b * rows + i) * columns + j)
                said.append([
                    column - j, row - i, box[2], *np.log(box[3:6]), np.sin(box[6]), np.cos(box[6]), *box[7:9]
                ])  # fmt: skip
        heats.append(torch.from_numpy(heat))
        cells.append(torch.tensor(at, dtype=torch.int64))
        values.append(torch.tensor(said, dtype=torch.float32).reshape(-1, len(BOX)))
        first += len(group)
    return Targets(tuple(heats), tuple(cells), tuple(values))


def _bump(heat: np.ndarray, row: int, column: int, radius: int) -> None:
    """Raise `heat` to a Gaussian of standard deviation (2 radius + 1) / 6 around a cell, within `radius`."""
    top, left = max(0, row - radius), max(0, column - radius)
    part = heat[top : row + radius + 1, left : column + radius + 1]
    y, x = np.ogrid[top : top + part.shape[0], left : left + part.shape[1]]
    spread = (2 * radius + 1) / 6
    np.maximum(
        part, np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * spread**2)), out=part, casting="same_kind"
    )


def heat_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Gaussian focal loss (Law & Deng 2018, alpha 2, beta 4), summed; the caller divides by the number of objects."""
    score = logits.sigmoid()
    centre = heat == 1
    found = functional.logsigmoid(logits) * (1 - score) ** 2
    rest = functional.logsigmoid(-logits) * score**2 * (1 - heat) ** 4
    return -torch.where(centre, found, rest).sum()


def box_loss(said: Tensor, cells: Tensor, values: Tensor) -> Tensor:
    """L1 at the centres, unknown values left out, summed over objects and values.  said: [B, 8 or 10, rows, columns]."""
    count = said.shape[1]
    at = said.permute(0, 2, 3, 1).reshape(-1, count)[cells]
    wanted, weight = values[:, :count], said.new_tensor(VALUE_WEIGHTS[:count])
    known = wanted.isfinite()
    return ((at - wanted.nan_to_num()).abs() * known * weight).sum()


def depth_bins(config: CameraConfig, depth_images: Tensor) -> Tensor:
    """Depth bin of each feature pixel, int64 [N, h, w]: of the nearest LiDAR point in its block; -1 where there is none
    within the bins."""
    first, _, step = config.depth
    far = torch.where(depth_images > 0, depth_images, depth_images.new_full((), 1e6))
    nearest = -functional.max_pool2d(-far, config.STRIDE)[:, 0]
    bins = torch.floor((nearest - first) / step + 0.5)
    return torch.where((bins >= 0) & (bins < config.frustum.bins), bins, -1).long()


def loss(
    out: dict[str, Tensor], wanted: Targets, depth: Tensor, config: Config, weights: Weights | None = None
) -> dict[str, Tensor]:
    """Parts of the loss by name, each times its weight; their sum is to be made small.

    depth: int64 [N, h, w], `depth_bins` of the depth images with the LiDAR there, whatever the network was given.
    """
    weights = weights or Weights()
    heat = box = out["heat_0"].new_zeros((), dtype=torch.float32)
    for g in range(len(config.head.groups)):
        objects = max(1, len(wanted.cells[g]))
        heat = heat + heat_loss(out[f"heat_{g}"].float(), wanted.heat[g]) / objects
        box = box + box_loss(out[f"box_{g}"].float(), wanted.cells[g], wanted.values[g]) / objects
    parts = {"heat": heat * weights.heat, "box": box * weights.box}
    if weights.depth:
        # a mean over none would be NaN
        found = functional.cross_entropy(out["depth_logits"].float(), depth, ignore_index=-1, reduction="sum")
        parts["depth"] = found / (depth >= 0).sum().clamp(min=1) * weights.depth
    return parts


def segment_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017, alpha not used, gamma 2) of a map of the ground; both [B, classes, rows, columns]."""
    plain = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (plain * (1 - torch.exp(-plain)) ** 2).mean()
