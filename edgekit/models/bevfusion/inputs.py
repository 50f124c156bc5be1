"""From what a rig saw to what the network takes, in numpy and with the kernels that a device runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from edgekit.kernels.bev_pool import Geometry, Table, build
from edgekit.kernels.depth_raster import depth_raster
from edgekit.kernels.letterbox import letterbox
from edgekit.kernels.voxelize import voxelize
from edgekit.models.bevfusion.config import CameraConfig, Config
from edgekit.models.bevfusion.lidar import voxel_values
from edgekit.rig import Rig, RigFrame, moved
from edgekit.tasks.fusion.calibration import Calibration, within
from edgekit.tasks.fusion.spec import PICTURE
from edgekit.tasks.preprocess import ImagePreprocess


@dataclass(frozen=True, eq=False)
class Sample:
    """One moment.

    images: float32 [cam, 3, H, W], by `rule`; zeros for a camera that is missing.
    depth_images: float32 [cam, 1, H, W], metres, 0 = no point.  table: which cells the cameras are pooled into.
    coordinates: int32 [m, 4], values: float32 [m, inputs], of the voxels.
    cameras: bool [cam], lidar: what is there.
    """

    images: np.ndarray
    depth_images: np.ndarray
    table: Table
    coordinates: np.ndarray
    values: np.ndarray
    cameras: np.ndarray
    lidar: bool


def rule(config: CameraConfig) -> ImagePreprocess:
    """From a camera's picture to the network's: RGB, (level / 255 - tsm.MEAN) / tsm.STD."""
    height, width = config.image
    return dataclasses.replace(PICTURE, width=width, height=height, scaled_width=config.scaled_width)


def calibration(rig: Rig, config: Config) -> Calibration:
    """What a device is told of a rig."""
    return Calibration(rig, config.camera.names, rule(config.camera))


def geometry(rig: Rig, config: Config, turned: np.ndarray | None = None) -> Geometry:
    """Where the cameras of a rig look, in the LiDAR's frame, with the rounding of `calibration`. turned: float64 [4, 4]
    multiplied to points and boxes (training). The vehicle's motion between a picture and the sweep is left out: tables
    are made once per rig."""
    told = calibration(rig, config)
    to_lidar = told.camera_to_lidar.astype(np.float64)
    if turned is not None:
        to_lidar = turned @ to_lidar
    return Geometry(told.intrinsics, to_lidar, None, config.camera.frustum, config.bev.pool)


def depth_images(frame: RigFrame, config: Config, threads: int = 0) -> np.ndarray:
    """float32 [cam, 1, H, W]; zeros without LiDAR, and for a camera that the rig has not."""
    told, size = calibration(frame.rig, config), config.camera.image
    if frame.points is None or not config.camera.lidar_depth:
        return np.zeros((len(told.cameras), 1, *size), np.float32)
    return depth_raster(frame.points, told.projections(frame), size, threads=threads)[:, None]


def voxels_of(points: np.ndarray | None, config: Config, threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(coordinates int32 [m, 4], values float32 [m, inputs]) of points float32 [n, 5]; none without LiDAR."""
    settings = config.lidar
    if points is None:
        points = np.zeros((0, 5), np.float32)
    found = voxelize(
        points, settings.grid, max_points=settings.max_points, max_voxels=settings.max_voxels, threads=threads
    )
    return found.coordinates, voxel_values(found, settings)


def prepare(
    frame: RigFrame,
    config: Config,
    table: Table | None = None,
    threads: int = 0,
    turned: np.ndarray | None = None,
) -> Sample:
    """What the network takes of a frame; sensors may be missing.

    table: of `geometry(frame.rig, config, turned)`, if it is there.  turned: float64 [4, 4], seen from above everything is turned,
    mirrored or scaled by it (training; boxes: `turned_boxes`); pictures and depths stay as they are.
    """
    if table is None:
        table = build(geometry(frame.rig, config, turned), threads)
    names, how = config.camera.names, rule(config.camera)
    images = np.zeros((len(names), 3, *config.camera.image), np.float32)
    there = np.zeros(len(names), bool)
    for i, name in enumerate(names):
        if name in frame.shots and name in frame.rig.cameras:
            letterbox(frame.shots[name].image, how, images[i : i + 1])
            there[i] = True
    if frame.points is not None:
        frame = dataclasses.replace(frame, points=within(frame.points, config.lidar.reach))
    points = frame.points
    if points is not None and turned is not None:
        points = points.copy()
        points[:, :3] = points[:, :3] @ turned[:3, :3].T.astype(np.float32) + turned[:3, 3].astype(np.float32)
    coordinates, values = voxels_of(points, config, threads)
    depth = depth_images(frame, config, threads)
    return Sample(images, depth, table, coordinates, values, there, frame.points is not None)


def turning(angle: float, scale: float, mirror_x: bool, mirror_y: bool) -> np.ndarray:
    """float64 [4, 4]: mirrored across the y or x axis, then turned about z, then scaled."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = (-1.0 if mirror else 1.0 for mirror in (mirror_x, mirror_y))
    result = np.eye(4)
    result[:3, :3] = scale * np.array([[cos * x, -sin * y, 0], [sin * x, cos * y, 0], [0, 0, 1]])
    return result


def turned_boxes(boxes: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """Boxes float32 [k, 9] (`rig.BOX_FIELDS`) after a `turning`."""
    result = moved(boxes, turned)
    result[:, 3:6] *= np.float32(np.cbrt(abs(np.linalg.det(turned[:3, :3]))))
    return result
