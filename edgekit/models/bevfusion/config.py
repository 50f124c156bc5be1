"""Settings of a BEVFusion network, as values: all sizes follow from one of these.

`FULL` has the geometry of the published network on nuScenes (six 256 x 704 pictures, voxels of 0.075 m, a view from
above of 360 x 360 cells for the cameras and 180 x 180 where sensors meet); `LITE` is one that two CPU cores can
train, for the synthetic rig.

Rows of every map seen from above are y, columns x, both rising, in the LiDAR's frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from edgekit.kernels.bev_pool import BevGrid, Frustum
from edgekit.kernels.sparse_conv.encoder import BEVFUSION, EncoderSpec, Stage
from edgekit.kernels.voxelize import NUSCENES, VoxelGrid

NUSCENES_CAMERAS = (
    "CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT",
)  # fmt: skip
"""Of the synthetic rig too."""


@dataclass(frozen=True)
class CameraConfig:
    """The camera branch.

    names: of the rig's cameras, in the order in which the network takes them.
    image: (height, width) that the network sees; pictures are scaled to `scaled_width`, then cut
    to it: the middle columns, the lowest rows (`inputs.rule`).  depth: (first, end, step) of the depth bins, metres.
    backbone, width: of `tsm.BACKBONES`.  fpn: channels of the feature pyramid.
    channels: of the features that are lifted.  hidden: of the layers that choose depth.
    lidar_depth: whether the LiDAR's depth image is an input (DepthLSS; else LSS).  depth_channels: of its layers.
    """

    names: tuple[str, ...] = NUSCENES_CAMERAS
    image: tuple[int, int] = (256, 704)
    scaled_width: int = 768
    depth: tuple[float, float, float] = (1.0, 60.0, 0.5)
    backbone: str = "resnet50"
    width: float = 1.0
    fpn: int = 256
    channels: int = 80
    hidden: int = 256
    lidar_depth: bool = True
    depth_channels: tuple[int, int, int] = (8, 32, 64)

    STRIDE = 8
    """Pixels of the picture per cell of the features."""

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def frustum(self) -> Frustum:
        height, width = self.image
        return Frustum(self.image, (height // self.STRIDE, width // self.STRIDE), self.depth)


@dataclass(frozen=True)
class LidarConfig:
    """The LiDAR branch.

    values: of a voxel: `raw` = the means of x, y, z, intensity, dt (the published network's); `local` =
    `kernels.voxelize.VALUES`, of ordinary size without training.
    max_points, max_voxels: limits of voxelization, 0 = none.  neck: channels of a 3x3 convolution after the encoder, 0 = none.
    cloud: points of a moment that an exported network has room for.  reach: metres along x and y, from the LiDAR, beyond which
    points are not taken, 0 = all are.
    """

    grid: VoxelGrid = NUSCENES
    encoder: EncoderSpec = BEVFUSION
    values: Literal["raw", "local"] = "raw"
    max_points: int = 10
    max_voxels: int = 160_000
    neck: int = 0
    cloud: int = 300_000
    reach: float = 0.0

    @property
    def channels(self) -> int:
        """Of the encoder's result seen from above: all heights of a cell."""
        return self.encoder.outputs * self.encoder.out_shape[0]


@dataclass(frozen=True)
class BevConfig:
    """Where the sensors meet, and what follows.

    pool: cells that the cameras are pooled into.  shrink: pooled cells per cell of the fused map along each axis, 1 or 2.
    fuser: `concat` = one convolution over both (ConvFuser); `mean` = a convolution each, then the mean of
    the sensors that are there.  channels: of the fused map.
    layers, widths, strides: of the decoder's stages (SECOND).  up: channels that each gives to the result.
    """

    pool: BevGrid = BevGrid()
    shrink: Literal[1, 2] = 2
    fuser: Literal["concat", "mean"] = "concat"
    channels: int = 256
    layers: tuple[int, ...] = (5, 5)
    widths: tuple[int, ...] = (128, 256)
    strides: tuple[int, ...] = (1, 2)
    up: int = 256


@dataclass(frozen=True)
class QueryConfig:
    """TransFusion's head (transfusion.py). count: queries.  hidden, heads, feedforward, layers: of the decoder.
    still: classes so small that two may lie in neighbouring cells: each cell may be one."""

    count: int = 200
    hidden: int = 128
    heads: int = 8
    feedforward: int = 256
    layers: int = 1
    still: tuple[str, ...] = ("pedestrian", "traffic_cone")


@dataclass(frozen=True)
class HeadConfig:
    """What is said. groups: classes that share maps (`tasks.fusion.spec.CenterGroup`).

    shared, hidden: channels of the first layer of all groups and of each group's own.  velocity: whether it is said.
    segments: names of what a map of the ground tells apart, () = no such head.  segment_range: (low, high, step)
    along x and y of that map, metres.
    min_radius: of the bump that a centre makes on its heat map, cells.
    circles: metres within which a group keeps one box, one per group; () = suppression by overlap.
    queries: boxes come from queries (of all classes together) in place of maps; None = maps.
    """

    groups: tuple[tuple[str, ...], ...]
    shared: int = 64
    hidden: int = 64
    velocity: bool = True
    segments: tuple[str, ...] = ()
    segment_range: tuple[float, float, float] = (-50.0, 50.0, 0.5)
    min_radius: int = 2
    circles: tuple[float, ...] = ()
    queries: QueryConfig | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for group in self.groups for label in group)


@dataclass(frozen=True)
class Config:
    """A network. Raises: ValueError where the branches do not meet in the same cells."""

    name: str
    camera: CameraConfig
    lidar: LidarConfig
    bev: BevConfig
    head: HeadConfig

    def __post_init__(self) -> None:
        _, rows, columns = self.lidar.encoder.out_shape
        pooled = tuple(side // self.bev.shrink for side in self.bev.pool.shape)
        if self.bev.pool.order != "yx" or pooled != (rows, columns):
            raise ValueError(
                f"configuration {self.name}: cameras are pooled into {pooled} cells (order {self.bev.pool.order}), "
                f"the LiDAR encoder gives {(rows, columns)} (order yx), expected the same"
            )
        voxels = self.lidar.grid
        if (self.bev.pool.x[:2], self.bev.pool.y[:2]) != (
            (voxels.low[0], voxels.high[0]), (voxels.low[1], voxels.high[1]),
        ):  # fmt: skip
            raise ValueError(f"configuration {self.name}: cells and voxels cover different ground")

    @property
    def cell(self) -> tuple[float, float]:
        """Metres along x and y of a cell of the fused map."""
        return self.bev.pool.x[2] * self.bev.shrink, self.bev.pool.y[2] * self.bev.shrink

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the fused map."""
        _, rows, columns = self.lidar.encoder.out_shape
        return rows, columns


NUSCENES_GROUPS = (
    ("car",), ("truck", "construction_vehicle"), ("bus", "trailer"), ("barrier",), ("motorcycle", "bicycle"),
    ("pedestrian", "traffic_cone"),
)  # fmt: skip
NUSCENES_SEGMENTS = ("drivable_area", "ped_crossing", "walkway", "stop_line", "carpark_area", "divider")

FULL = Config(
    "full", CameraConfig(), LidarConfig(), BevConfig(), HeadConfig(NUSCENES_GROUPS, segments=NUSCENES_SEGMENTS)
)  # fmt: skip

FULL_QUERIES = replace(FULL, name="full-queries", head=replace(FULL.head, queries=QueryConfig()))
"""With the head of the published network."""

LITE = Config(
    "lite",
    CameraConfig(
        image=(144, 256), scaled_width=256, depth=(1.0, 45.0, 1.0), backbone="resnet18", width=0.25, fpn=48,
        channels=32, hidden=48, depth_channels=(8, 16, 32),
    ),
    LidarConfig(
        grid=VoxelGrid((-32.0, -32.0, -2.6), (32.0, 32.0, 2.2), (0.2, 0.2, 0.3)),
        encoder=EncoderSpec(
            (17, 320, 320), 6, (Stage(16, 1, 24), Stage(24, 1, 32), Stage(32, 1)), outputs=24
        ),
        values="local", max_points=0, max_voxels=0, neck=48, cloud=24_576, reach=48.0,
    ),
    BevConfig(
        pool=BevGrid((-32.0, 32.0, 0.8), (-32.0, 32.0, 0.8), (-3.0, 3.0)), shrink=1, fuser="mean", channels=48,
        layers=(2, 3), widths=(48, 96), up=32,
    ),
    HeadConfig((("car", "truck", "bus"), ("pedestrian", "bicycle")), shared=48, hidden=32, min_radius=1),
)  # fmt: skip

CONFIGS = {config.name: config for config in (FULL, FULL_QUERIES, LITE)}
