"""A rig's calibration as the tensors that a plan takes: data, so that another rig needs no other bundle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgekit.kernels import depth_raster
from edgekit.rig import Camera, Rig, RigFrame, inverse
from edgekit.tasks.preprocess import ImagePreprocess, place


def fit(rule: ImagePreprocess, width: int, height: int) -> np.ndarray:
    """float64 [3, 3]: a pixel (x, y, 1) of a camera's picture of that size -> of the network's."""
    placed = place(rule, width, height)
    return np.array([[placed.scale_x, 0, placed.left], [0, placed.scale_y, placed.top], [0, 0, 1.0]])


@dataclass(frozen=True, eq=False)
class Calibration:
    """Of a rig's cameras in the order in which a network takes them.

    cameras: their names.  rule: from a camera's picture to the network's.
    """

    rig: Rig
    cameras: tuple[str, ...]
    rule: ImagePreprocess

    def _cameras(self) -> list[Camera | None]:
        return [self.rig.cameras.get(name) for name in self.cameras]

    @cached_property
    def known(self) -> np.ndarray:
        """bool [cam]: which of them the rig has."""
        return np.array([camera is not None for camera in self._cameras()])

    @cached_property
    def _fitted(self) -> np.ndarray:
        """float64 [cam, 3, 3]: intrinsics of the network's pictures; the identity for a camera that the rig has not."""
        result = np.tile(np.eye(3), (len(self.cameras), 1, 1))
        for matrix, camera in zip(result, self._cameras(), strict=True):
            if camera is not None:
                matrix[:] = fit(self.rule, camera.width, camera.height) @ camera.matrix
        return result

    @cached_property
    def intrinsics(self) -> np.ndarray:
        """float32 [cam, 3, 3], of the network's pictures."""
        return np.ascontiguousarray(self._fitted, np.float32)

    @cached_property
    def camera_to_lidar(self) -> np.ndarray:
        """float32 [cam, 4, 4]. The vehicle's motion between a picture and the sweep is not in it: tables are made from
        it once a rig."""
        result = np.tile(np.eye(4), (len(self.cameras), 1, 1))
        for matrix, camera in zip(result, self._cameras(), strict=True):
            if camera is not None:
                matrix[:] = self.rig.lidar.from_ego @ camera.to_ego
        return np.ascontiguousarray(result, np.float32)

    def projections(self, moment: RigFrame) -> np.ndarray:
        """float32 [cam, 3, 4]: points of the moment's LiDAR -> pixels of the network's pictures times depth. The
        vehicle's motion up to each picture is in it."""
        to_camera = np.tile(inverse(self.rig.lidar.to_ego), (len(self.cameras), 1, 1))
        for i, name in enumerate(self.cameras):
            if self.known[i]:
                to_camera[i] = moment.lidar_to_camera(name)
        return depth_raster.projections(self._fitted, to_camera)


def within(points: np.ndarray, reach: float) -> np.ndarray:
    """The points [n, >=2] that lie nearer than `reach` metres along x and along y; all for 0."""
    if not reach:
        return points
    near: np.ndarray = (np.abs(points[:, :2]) < reach).all(axis=1)
    kept: np.ndarray = points[near]
    return kept
