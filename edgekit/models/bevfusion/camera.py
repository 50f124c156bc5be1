"""The camera branch up to where depth is known: backbone, feature pyramid, depth per pixel.

`LSS` (Philion & Fidler 2020, arXiv:2008.05711) chooses depth from the picture alone; `DepthLSS` (BEVFusion) also sees the LiDAR's
depth image, zeros where it has no point, so that all zeros stand for no LiDAR. Neither makes the lifted tensor: what follows (pool.py,
kernels/bev_pool) takes the two factors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import UsageError, did_you_mean
from edgekit.models.bevfusion.config import CameraConfig
from edgekit.models.bevfusion.layers import conv
from edgekit.models.tsm import BACKBONES, InvertedResidual, MobileNetV2, ResNet

LEVELS = (2, 3, 4)
"""Stages of a ResNet whose results are used: 1/8, 1/16 and 1/32 of the picture."""
LAYERS = (6, 13, 17)
"""Layers of a MobileNetV2, likewise."""


def _same(x: Tensor) -> Tensor:
    return x


class Backbone(nn.Module):
    """A network of `tsm.BACKBONES` without its classifier: images [N, 3, H, W] -> features at strides 8, 16, 32, with
    `channels` each. Parameters have torchvision's names below `net`.

    Raises: UsageError for an unknown name.
    """

    def __init__(self, name: str, width: float) -> None:
        super().__init__()
        if name not in BACKBONES:
            raise UsageError(f"camera backbone {name!r}: unknown. {did_you_mean(name, BACKBONES)}")
        self.net = BACKBONES[name](1, width)
        if isinstance(self.net, ResNet):
            last = self.net.fc.in_features
            self.channels = tuple(last >> (LEVELS[-1] - level) for level in LEVELS)
            del self.net.fc
        else:
            assert isinstance(self.net, MobileNetV2)
            del self.net.classifier, self.net.features[LAYERS[-1] + 1 :]
            norms = (
                [p for p in self.net.features[i].modules() if isinstance(p, nn.BatchNorm2d)] for i in LAYERS
            )
            self.channels = tuple(found[-1].num_features for found in norms)

    def forward(self, images: Tensor) -> list[Tensor]:
        net, x, found = self.net, images, []
        if isinstance(net, ResNet):
            x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
            for level in range(1, LEVELS[-1] + 1):
                for block in net.get_submodule(f"layer{level}").children():
                    x = block(x, _same)
                found.append(x)
            return [found[level - 1] for level in LEVELS]
        assert isinstance(net, MobileNetV2)
        for part in net.features:
            x = part(x, _same) if isinstance(part, InvertedResidual) else part(x)
            found.append(x)
        return [found[layer] for layer in LAYERS]


class Pyramid(nn.Module):
    """BEVFusion's GeneralizedLSSFPN: coarse levels are scaled up and joined to the next finer one; gives the finest,
    [N, outputs, H / 8, W / 8]."""

    def __init__(self, channels: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        above = [*(outputs for _ in channels[2:]), channels[-1]]
        self.join = nn.ModuleList(
            conv(mine + coarser, outputs, 1) for mine, coarser in zip(channels, above, strict=False)
        )
        self.smooth = nn.ModuleList(conv(outputs, outputs) for _ in channels[1:])

    def forward(self, levels: list[Tensor]) -> Tensor:
        x = levels[-1]
        for i in range(len(levels) - 2, -1, -1):
            size = [int(side) for side in levels[i].shape[2:]]  # plain numbers: constants of the graph
            x = functional.interpolate(x, size, mode="bilinear", align_corners=False)
            x = self.smooth[i](self.join[i](torch.cat([levels[i], x], 1)))
        return x


class LSS(nn.Module):
    """Features [N, fpn, h, w] -> (depth logits [N, D, h, w], features [N, C, h, w]), from the picture alone."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.bins = config.frustum.bins
        self.choose = nn.Conv2d(config.fpn, self.bins + config.channels, 1)

    def forward(self, features: Tensor, depth_images: Tensor | None) -> tuple[Tensor, Tensor]:
        both = self.choose(features)
        return both[:, : self.bins], both[:, self.bins :]


class DepthLSS(nn.Module):
    """As `LSS`, with depth images [N, 1, H, W] in metres, 0 = none, as a second input."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.bins, self.far = config.frustum.bins, config.depth[1]
        first, second, third = config.depth_channels
        self.seen = nn.Sequential(conv(1, first, 1), conv(first, second, 5, 4), conv(second, third, 5, 2))
        self.choose = nn.Sequential(
            conv(third + config.fpn, config.hidden),
            conv(config.hidden, config.hidden),
            nn.Conv2d(config.hidden, self.bins + config.channels, 1),
        )

    def forward(self, features: Tensor, depth_images: Tensor | None) -> tuple[Tensor, Tensor]:
        assert depth_images is not None, "DepthLSS needs depth images; zeros where there is no LiDAR"
        both = self.choose(torch.cat([self.seen(depth_images / self.far), features], 1))
        return both[:, : self.bins], both[:, self.bins :]


class CameraNet(nn.Module):
    """All of it: images [N, 3, H, W], RGB, (level / 255 - tsm.MEAN) / tsm.STD, and depth images [N, 1, H, W] ->
    (depth logits [N, D, h, w], features [N, C, h, w])."""

    def __init__(self, config: CameraConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone, config.width)
        self.pyramid = Pyramid(self.backbone.channels, config.fpn)
        self.lift: nn.Module = DepthLSS(config) if config.lidar_depth else LSS(config)

    def forward(self, images: Tensor, depth_images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = self.pyramid(self.backbone(images))
        result: tuple[Tensor, Tensor] = self.lift(features, depth_images)
        return result
