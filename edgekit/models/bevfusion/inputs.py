"""From what a rig saw to what the network takes, in numpy and with the kernels that a device runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekit.errors import UsageError
from edgekit.kernels.bev_pool import Geometry, Table, build
from edgekit.kernels.depth_raster import depth_raster, projections
from edgekit.kernels.voxelize import voxelize
from edgekit.models.bevfusion.config import CameraConfig, Config
from edgekit.models.bevfusion.lidar import voxel_values
from edgekit.models.tsm import MEAN, STD
from edgekit.rig import Rig, RigFrame, moved


@dataclass(frozen=True, eq=False)
class Sample:
    """One moment.

    images: float32 [cam, 3, H, W], RGB, (level / 255 - MEAN) / STD; zeros for a camera that is missing.
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


def augmentation(config: CameraConfig, width: int, height: int) -> np.ndarray:
    """float64 [3, 3]: a pixel of a camera's picture of that size -> of the network's: scaled, then cut.

    Raises: UsageError for a picture that is too low once it is scaled.
    """
    rows, columns = config.image
    scale = config.scaled_width / width
    scaled = round(height * scale)
    if scaled < rows or config.scaled_width < columns:
        raise UsageError(
            f"camera picture {width}x{height}: scaled to {config.scaled_width}x{scaled}, "
            f"expected at least {columns}x{rows}"
        )
    left, above = (config.scaled_width - columns) // 2, scaled - rows
    return np.array([[scale, 0, -left], [0, scale, -above], [0, 0, 1.0]])


def normalised(images: np.ndarray) -> np.ndarray:
    """uint8 BGR [..., H, W, 3] -> float32 RGB [..., 3, H, W]."""
    scale = np.array([1 / (255 * s) for s in STD], np.float32)
    offset = np.array([m / s for m, s in zip(MEAN, STD, strict=True)], np.float32)
    return np.ascontiguousarray(np.moveaxis(images[..., ::-1] * scale - offset, -1, -3))


def fitted(config: CameraConfig, image: np.ndarray) -> np.ndarray:
    """A camera's picture, uint8 [h, w, 3], as large as the network wants it; bilinear."""
    height, width = image.shape[:2]
    matrix = augmentation(config, width, height)
    rows, columns = config.image
    if (height, width) != config.image:
        import cv2

        scaled = (config.scaled_width, round(height * matrix[0, 0]))
        image = cv2.resize(
            image, scaled, interpolation=cv2.INTER_AREA if matrix[0, 0] < 1 else cv2.INTER_LINEAR
        )
    left, above = -int(matrix[0, 2]), -int(matrix[1, 2])
    return image[above : above + rows, left : left + columns]


def geometry(rig: Rig, config: Config, turned: np.ndarray | None = None) -> Geometry:
    """Where the cameras of a rig look, in the LiDAR's frame. turned: float64 [4, 4] multiplied to points and boxes
    (training). The vehicle's motion between a picture and the sweep is left out: tables are made once per rig."""
    cameras = list(rig.cameras.values())
    if len(cameras) != config.camera.count:
        raise UsageError(f"rig {rig.name}: expected {config.camera.count} cameras, got {len(cameras)}")
    to_lidar = np.stack([rig.lidar.from_ego @ camera.to_ego for camera in cameras])
    if turned is not None:
        to_lidar = turned @ to_lidar
    fit = np.stack([augmentation(config.camera, camera.width, camera.height) for camera in cameras])
    intrinsics = np.stack([camera.matrix for camera in cameras])
    return Geometry(intrinsics, to_lidar, fit, config.camera.frustum, config.bev.pool)


def depth_images(frame: RigFrame, config: Config, threads: int = 0) -> np.ndarray:
    """float32 [cam, 1, H, W]; zeros without LiDAR."""
    rig, size = frame.rig, config.camera.image
    if frame.points is None or not config.camera.lidar_depth:
        return np.zeros((len(rig.cameras), 1, *size), np.float32)
    cameras = rig.cameras.values()
    fit = np.stack([augmentation(config.camera, camera.width, camera.height) for camera in cameras])
    to_camera = np.stack([frame.lidar_to_camera(name) for name in rig.cameras])
    matrices = projections(np.stack([camera.matrix for camera in cameras]), to_camera, fit)
    return depth_raster(frame.points, matrices, size, threads=threads)[:, None]


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
    Raises: UsageError for a rig with another number of cameras.
    """
    if table is None:
        table = build(geometry(frame.rig, config, turned), threads)
    images = np.zeros((len(frame.rig.cameras), 3, *config.camera.image), np.float32)
    there = np.zeros(len(images), bool)
    for i, name in enumerate(frame.rig.cameras):
        if name in frame.shots:
            images[i], there[i] = normalised(fitted(config.camera, frame.shots[name].image)), True
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
