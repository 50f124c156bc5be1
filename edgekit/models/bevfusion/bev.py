"""Seen from above: where the sensors are joined, and the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekit.models.bevfusion.config import BevConfig
from edgekit.models.bevfusion.layers import EPS, MOMENTUM, conv


class ConcatFuser(nn.Module):
    """BEVFusion's ConvFuser: one convolution over both. It has learnt with both and needs both: a missing one is zeros."""

    def __init__(self, cameras: int, lidar: int, outputs: int) -> None:
        super().__init__()
        self.both = conv(cameras + lidar, outputs)

    def forward(self, cameras: Tensor, lidar: Tensor, present: Tensor) -> Tensor:
        share = present.reshape(-1, 2, 1, 1, 1)
        joined: Tensor = self.both(torch.cat([cameras * share[:, 0], lidar * share[:, 1]], 1))
        return joined


class MeanFuser(nn.Module):
    """A convolution for each, then the mean of those that are there (BEVFusion's AddFuser). One alone is taken as it is,
    neither gives zeros; trained with sensors left out at random, any of them can go missing."""

    def __init__(self, cameras: int, lidar: int, outputs: int) -> None:
        super().__init__()
        self.cameras, self.lidar = conv(cameras, outputs), conv(lidar, outputs)

    def forward(self, cameras: Tensor, lidar: Tensor, present: Tensor) -> Tensor:
        share = present / present.sum(1, keepdim=True).clamp(min=1e-6)
        weight = share.reshape(-1, 2, 1, 1, 1)
        joined: Tensor = self.cameras(cameras) * weight[:, 0] + self.lidar(lidar) * weight[:, 1]
        return joined


class Decoder(nn.Module):
    """SECOND and its pyramid (Yan et al. 2018): stages one after the other, each brought to the first one's size and joined."""

    def __init__(self, config: BevConfig) -> None:
        super().__init__()
        self.stages, self.ups = nn.ModuleList(), nn.ModuleList()
        channels, size = config.channels, 1
        for layers, width, stride in zip(config.layers, config.widths, config.strides, strict=True):
            self.stages.append(
                nn.Sequential(conv(channels, width, 3, stride), *(conv(width, width) for _ in range(layers)))
            )
            channels, size = width, size * stride
            grow: nn.Module = nn.Conv2d(width, config.up, 1, bias=False)
            if size > 1:
                grow = nn.ConvTranspose2d(width, config.up, size, size, bias=False)
            self.ups.append(
                nn.Sequential(grow, nn.BatchNorm2d(config.up, EPS, MOMENTUM), nn.ReLU(inplace=True))
            )
        self.channels = config.up * len(config.widths)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for stage, up in zip(self.stages, self.ups, strict=True):
            x = stage(x)
            found.append(up(x))
        return torch.cat(found, 1)


class BevNet(nn.Module):
    """Pooled cameras [B, Cc, rows, columns] (times `shrink`), LiDAR [B, Cl, rows, columns] and `present` float [B, 2]
    (cameras, LiDAR; 1 = there, 0 = not) -> [B, channels, rows, columns]."""

    def __init__(self, config: BevConfig, cameras: int, lidar: int) -> None:
        super().__init__()
        self.shrink: nn.Module = nn.Identity()
        if config.shrink == 2:  # BEVFusion's `downsample`
            self.shrink = nn.Sequential(
                conv(cameras, cameras), conv(cameras, cameras, 3, 2), conv(cameras, cameras)
            )
        fuser = {"concat": ConcatFuser, "mean": MeanFuser}[config.fuser]
        self.fuser = fuser(cameras, lidar, config.channels)
        self.decoder = Decoder(config)
        self.channels = self.decoder.channels

    def forward(self, cameras: Tensor, lidar: Tensor, present: Tensor) -> Tensor:
        x: Tensor = self.decoder(self.fuser(self.shrink(cameras), lidar, present))
        return x
