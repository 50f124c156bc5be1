"""Camera rigs for tests: random ones, and that of the real nuScenes frame."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from edgekit.kernels.bev_pool import BevGrid, Frustum, Geometry
from tests.helpers import shared_data

# camera axes (x right, y down, z forward) in an ego frame of x forward, y left, z up
UPRIGHT = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])


def rotation(axis: int, angle: float) -> np.ndarray:
    i, j = [k for k in range(3) if k != axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def random_geometry(
    rng: np.random.Generator, frustum: Frustum, grid: BevGrid, cameras: int, tilt: float
) -> Geometry:
    """Cameras that look all ways, `tilt` radians off upright at most, each with its own picture augmentation."""
    intrinsics, poses, augmentations = [], [], []
    height, width = frustum.image
    for k in range(cameras):
        pose = np.eye(4)
        turn = rotation(2, 2 * np.pi * k / cameras + rng.uniform(-0.3, 0.3))
        pose[:3, :3] = (
            turn @ rotation(1, rng.uniform(-tilt, tilt)) @ rotation(0, rng.uniform(-tilt, tilt)) @ UPRIGHT
        )
        pose[:3, 3] = rng.uniform(-1, 1, 3)
        focal = rng.uniform(0.4, 1.2) * width
        intrinsics.append(
            [[focal, 0, rng.uniform(0.4, 0.6) * width], [0, focal, rng.uniform(0.4, 0.6) * height], [0, 0, 1]]
        )
        scale, angle = rng.uniform(0.7, 1.3), rng.uniform(-0.1, 0.1)
        flip = rng.choice([-1, 1])
        augmentations.append(
            [
                [flip * scale * np.cos(angle), -scale * np.sin(angle), rng.uniform(-3, 3)],
                [scale * np.sin(angle), scale * np.cos(angle), rng.uniform(-3, 3)],
                [0, 0, 1],
            ]
        )
        poses.append(pose)
    return Geometry(np.array(intrinsics), np.array(poses), np.array(augmentations), frustum, grid)


def nuscenes_frame() -> dict[str, Any]:
    """The real frame's entry: `images` by camera, `lidar_points`."""
    frame = shared_data() / "nuscenes_sample/frame.json"
    entry: dict[str, Any] = json.loads(frame.read_text())["data_list"][0]
    return entry


# 1600x900 pictures to the network's 704x256: resize by 0.48, crop at (32, 176)
NUSCENES_AUGMENTATION = np.array([[0.48, 0, -32], [0, 0.48, -176], [0, 0, 1]])


def nuscenes_matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(intrinsics [6, 3, 3], lidar_to_camera [6, 4, 4], augmentation [6, 3, 3]) of the real frame."""
    images = nuscenes_frame()["images"].values()
    intrinsics = np.array([image["cam2img"] for image in images])[:, :3, :3]
    return (
        intrinsics,
        np.array([image["lidar2cam"] for image in images]),
        np.stack([NUSCENES_AUGMENTATION] * 6),
    )


def nuscenes_geometry(grid: BevGrid | None = None) -> Geometry:
    intrinsics, lidar_to_camera, augmentation = nuscenes_matrices()
    return Geometry(intrinsics, np.linalg.inv(lidar_to_camera), augmentation, grid=grid)
