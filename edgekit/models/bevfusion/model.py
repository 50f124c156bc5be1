"""The whole network, and the batch that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.models.bevfusion import lidar, pool
from edgekit.models.bevfusion.bev import BevNet
from edgekit.models.bevfusion.camera import CameraNet
from edgekit.models.bevfusion.config import Config
from edgekit.models.bevfusion.head import BoxHead, SegmentHead
from edgekit.models.bevfusion.inputs import Sample
from edgekit.models.bevfusion.layers import conv, initialise
from edgekit.models.bevfusion.transfusion import TransFusionHead


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples as tensors.

    images: float32 [B * cam, 3, H, W].  depth_images: float32 [B * cam, 1, H, W], metres, 0 = none.
    points: what is pooled.  cloud: what the LiDAR saw.
    cameras: float32 [B, cam], 1 = there.  lidar: float32 [B], likewise. What is not there may hold anything finite.
    """

    images: Tensor
    depth_images: Tensor
    points: pool.Points
    cloud: lidar.Cloud
    cameras: Tensor
    lidar: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.images.to(device), self.depth_images.to(device), self.points.to(device),
            self.cloud.to(device), self.cameras.to(device), self.lidar.to(device),
        )  # fmt: skip

    def without(self, cameras: Tensor | None = None, lidar: Tensor | None = None) -> Batch:
        """The same with fewer sensors: float masks [B, cam] and [B], multiplied to what is there."""
        return Batch(
            self.images, self.depth_images, self.points, self.cloud,
            self.cameras if cameras is None else self.cameras * cameras,
            self.lidar if lidar is None else self.lidar * lidar,
        )  # fmt: skip


def collate(samples: Sequence[Sample], config: Config, threads: int = 0) -> Batch:
    """A batch of samples; all sensors count that they have."""
    images = torch.from_numpy(np.concatenate([s.images for s in samples]))
    depth = torch.from_numpy(np.concatenate([s.depth_images for s in samples]))
    points = pool.stacked([pool.points_of(s.table) for s in samples])
    cloud = lidar.cloud(config.lidar.encoder, [(s.coordinates, s.values) for s in samples], threads)
    cameras = torch.tensor(np.stack([s.cameras for s in samples]), dtype=torch.float32)
    there = torch.tensor([s.lidar for s in samples], dtype=torch.float32)
    return Batch(images, depth, points, cloud, cameras, there)


class BEVFusion(nn.Module):
    """`Batch` -> raw outputs by name (head.py); with `depth_logits` [B * cam, D, h, w] for the loss of depth.

    A camera that is missing is not pooled; a LiDAR that is missing leaves the depth images empty, too.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.camera = CameraNet(config.camera)
        self.encoder = lidar.SparseEncoder(config.lidar.encoder)
        seen = config.lidar.channels
        self.neck: nn.Module = conv(seen, config.lidar.neck) if config.lidar.neck else nn.Identity()
        self.bev = BevNet(config.bev, config.camera.channels, config.lidar.neck or seen)
        self.head = (BoxHead if config.head.queries is None else TransFusionHead)(self.bev.channels, config)
        self.segments = SegmentHead(self.bev.channels, config) if config.head.segments else None
        initialise(self)
        self.head.start()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        count = self.config.camera.count
        lit = batch.lidar.repeat_interleave(count).reshape(-1, 1, 1, 1)
        depth_logits, features = self.camera(batch.images, batch.depth_images * lit)
        there = batch.cameras.reshape(-1, 1, 1, 1)
        weight = depth_logits.float().softmax(1) * there
        cameras = pool.pool(weight, features, batch.points, self.config.bev.pool.shape)
        with torch.autocast(batch.images.device.type, enabled=False):  # rows of odd lengths gain nothing
            grid = self.encoder(batch.cloud)
        out = self.judge(cameras, self.neck(grid), present(batch))
        return out | {"depth_logits": depth_logits}

    def judge(self, cameras: Tensor, above: Tensor, present: Tensor) -> dict[str, Tensor]:
        """The dense part after the sensors: pooled cameras, LiDAR from above, who is there -> outputs by name."""
        x = self.bev(cameras, above, present)
        out: dict[str, Tensor] = self.head(x)
        return out if self.segments is None else out | {"segments": self.segments(x)}


def present(batch: Batch) -> Tensor:
    """float32 [B, 2]: whether there is a camera, and a LiDAR."""
    return torch.stack([batch.cameras.amax(1), batch.lidar], 1)
