"""Small BEVFusion networks for the tests, and what they are fed with."""

from __future__ import annotations

import functools

import numpy as np
import torch

from edgekit.kernels.bev_pool import BevGrid
from edgekit.kernels.sparse_conv.encoder import EncoderSpec, Stage
from edgekit.kernels.voxelize import VoxelGrid
from edgekit.models.bevfusion.config import BevConfig, CameraConfig, Config, HeadConfig, LidarConfig
from edgekit.models.bevfusion.inputs import Sample, prepare
from edgekit.models.bevfusion.model import BEVFusion, collate
from edgekit.rig import RigFrame
from edgekit.synth.street_rig import RigWorld

_GRID = VoxelGrid((-16.0, -16.0, -2.6), (16.0, 16.0, 2.2), (0.4, 0.4, 0.6))
_CAMERA = CameraConfig(
    image=(40, 64), scaled_width=64, depth=(1.0, 21.0, 2.0), backbone="resnet18", width=0.125, fpn=8, channels=8,
    hidden=8, depth_channels=(4, 4, 8),
)  # fmt: skip
_GROUPS = (("car", "truck", "bus"), ("pedestrian", "bicycle"))

TINY = Config(
    "tiny",
    _CAMERA,
    LidarConfig(
        _GRID,
        EncoderSpec((9, 80, 80), 6, (Stage(8, 1, 8), Stage(8, 1)), outputs=8),
        "local",
        0,
        0,
        neck=8,
        cloud=24_000,
    ),
    BevConfig(
        BevGrid((-16.0, 16.0, 0.8), (-16.0, 16.0, 0.8), (-3.0, 3.0)), 1, "mean", 8, (1, 1), (8, 8), up=8
    ),
    HeadConfig(_GROUPS, 8, 8, min_radius=1),
)
"""Like LITE."""

OTHER = Config(
    "other",
    CameraConfig(
        image=(40, 64), scaled_width=64, depth=(1.0, 21.0, 2.0), backbone="mobilenet_v2", width=0.25, fpn=8,
        channels=8, hidden=8, lidar_depth=False,
    ),
    LidarConfig(
        _GRID, EncoderSpec((9, 80, 80), 5, (Stage(8, 1, 8), Stage(8, 1)), outputs=8), "raw", 10, 4000, cloud=24_000
    ),
    BevConfig(
        BevGrid((-16.0, 16.0, 0.4), (-16.0, 16.0, 0.4), (-3.0, 3.0)), 2, "concat", 8, (1, 1), (8, 8), up=8
    ),
    HeadConfig(
        _GROUPS, 8, 8, velocity=False, segments=("road", "kerb"), segment_range=(-12.0, 12.0, 0.5),
        circles=(2.0, 0.5),
    ),
)  # fmt: skip
"""Everything that TINY is not: MobileNetV2, LSS, ConvFuser, pooled finer, no neck, a map of the ground, no velocity."""


@functools.lru_cache(4)
def frame(seed: int = 1, width: int = 64, height: int = 40) -> RigFrame:
    return RigWorld(seed, width=width, height=height).frame(10)


@functools.lru_cache(4)
def sample(config: Config, seed: int = 1) -> Sample:
    height, width = config.camera.image
    return prepare(frame(seed, width, height), config)


@functools.lru_cache(4)
def network(config: Config) -> BEVFusion:
    """In evaluation mode, with the figures of batch norms that it would have after some training."""
    torch.manual_seed(0)
    model = BEVFusion(config)
    given = collate([sample(config)], config)
    with torch.no_grad():
        for _ in range(3):
            model(given)
        for part in model.modules():
            if isinstance(part, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                part.momentum = 1.0
        model(given)
    return model.eval()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, in shares of the largest magnitude of b (at least 1)."""
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
