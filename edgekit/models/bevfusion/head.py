"""What is said about the view from above: CenterHead (Yin et al. 2021, arXiv:2006.11275), and a map of the ground.

Outputs, raw: `heat_<g>` [B, classes of group g, rows, columns], logits; `box_<g>` [B, 8 or 10, rows, columns] with the
channels of `BOX`; `segments` [B, classes, rows, columns], logits. `pipeline` says the same to `tasks.fusion`.

Differences from the published head: the regressions of a group share their hidden layer, and z is the centre's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.models.bevfusion.config import Config
from edgekit.models.bevfusion.inputs import rule
from edgekit.models.bevfusion.layers import conv
from edgekit.tasks.detect.spec import Channels
from edgekit.tasks.fusion.metric import NUSCENES_RANGES
from edgekit.tasks.fusion.spec import CenterGroup, CenterHead, FusionSpec, QueryHead, VoxelCells

BOX = ("offset x", "offset y", "z", "log l", "log w", "log h", "sin yaw", "cos yaw", "vx", "vy")
PRIOR = -2.19
"""Bias of heat maps at the start: a score of 0.1 everywhere (Lin et al. 2017, section 4.1)."""


class BoxHead(nn.Module):
    """[B, channels, rows, columns] -> outputs by name."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        head = config.head
        self.shared = conv(channels, head.shared)
        values = len(BOX) if head.velocity else len(BOX) - 2
        self.heat = nn.ModuleList(_branch(head.shared, head.hidden, len(group)) for group in head.groups)
        self.box = nn.ModuleList(_branch(head.shared, head.hidden, values) for _ in head.groups)
        self.start()

    def start(self) -> None:
        """Last layers that say next to nothing: the loss begins at what knowing nothing costs."""
        for branches, bias in ((self.heat, PRIOR), (self.box, 0.0)):
            for branch in branches:
                assert isinstance(branch, nn.Sequential)
                last = branch[-1]
                assert isinstance(last, nn.Conv2d) and last.bias is not None
                nn.init.normal_(last.weight, std=0.01)
                nn.init.constant_(last.bias, bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.shared(x)
        out = {f"heat_{i}": branch(x) for i, branch in enumerate(self.heat)}
        return out | {f"box_{i}": branch(x) for i, branch in enumerate(self.box)}


def _branch(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv(inputs, hidden), nn.Conv2d(hidden, outputs, 3, padding=1))


class SegmentHead(nn.Module):
    """BEVFusion's BEVSegmentationHead: sampled at the map's cells (bilinear, zeros outside), two convolutions, logits."""

    grid: Tensor

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        low, high, step = config.head.segment_range
        centres = low + step * (torch.arange(round((high - low) / step)) + 0.5)
        x, y = (
            2 * (centres - axis[0]) / (axis[1] - axis[0]) - 1
            for axis in (config.bev.pool.x, config.bev.pool.y)
        )
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        self.register_buffer("grid", torch.stack([columns, rows], -1)[None], persistent=False)
        hidden = config.head.shared
        self.net = nn.Sequential(
            conv(channels, hidden), conv(hidden, hidden), nn.Conv2d(hidden, len(config.head.segments), 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        grid = self.grid.expand(int(x.shape[0]), -1, -1, -1)
        out: Tensor = self.net(functional.grid_sample(x, grid, "bilinear", "zeros", align_corners=False))
        return out


def output_names(config: Config) -> list[str]:
    """In the order in which the exported network gives them."""
    if config.head.queries is not None:
        names = ["classes", "boxes", "queries"]
        return [*names, "segments"] if config.head.segments else names
    count = range(len(config.head.groups))
    names = [f"heat_{i}" for i in count] + [f"box_{i}" for i in count]
    return [*names, "segments"] if config.head.segments else names


def pipeline(config: Config, score_threshold: float = 0.1) -> FusionSpec:
    """How `tasks.fusion` feeds the plan and decodes its outputs. Suppression by circles where the configuration has them,
    else by overlap."""
    head = _centers(config) if config.head.queries is None else _queries(config)
    voxels, reach = config.lidar.grid, config.bev.pool.x[1]
    labels = config.head.labels
    known = (
        NUSCENES_RANGES
        if set(labels) <= set(NUSCENES_RANGES) and reach >= 50
        else dict.fromkeys(labels, reach)
    )
    return FusionSpec(
        head,
        labels,
        score_threshold,
        cameras=config.camera.names,
        preprocess=rule(config.camera),
        reach=config.lidar.reach,
        voxels=VoxelCells(voxels.low, voxels.high, voxels.size),
        ranges={label: known[label] for label in labels},
    )


def _grid(config: Config) -> tuple[float, float, float, float]:
    """Low corner, then sides of a cell; metres along x and y."""
    return config.bev.pool.x[0], config.bev.pool.y[0], *config.cell


def _centers(config: Config) -> CenterHead:
    groups = []
    for i, labels in enumerate(config.head.groups):
        offset, height, size, rotation, velocity = (Channels(f"box_{i}", start) for start in (0, 2, 3, 6, 8))
        group = CenterGroup(labels, Channels(f"heat_{i}"), offset, height, size, rotation)
        if config.head.velocity:
            group = replace(group, velocity=velocity)
        if config.head.circles:
            group = replace(group, suppress="circle", limits=(config.head.circles[i],))
        groups.append(group)
    return CenterHead(tuple(groups), *_grid(config))


def _queries(config: Config) -> QueryHead:
    """As `transfusion.TransFusionHead` gives them."""
    center, height, size, rotation, velocity = (Channels("boxes", start) for start in (0, 2, 3, 6, 8))
    return QueryHead(
        Channels("classes"), Channels("queries"), center, height, size, rotation, *_grid(config),
        velocity=velocity if config.head.velocity else None,
    )  # fmt: skip
