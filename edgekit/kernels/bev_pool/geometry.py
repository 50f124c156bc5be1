"""Where each camera looks and which cell of the bird's-eye view each of its depth bins falls into: settings only.

Frames of reference: *image* = the picture that the network sees (after resize and crop), *camera* = x right,
y down, z forward, *ego* = the frame of the bird's-eye view (BEVFusion: the LiDAR's). Metres, pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Literal

import numpy as np

from edgekit.errors import UsageError

MAX_CAMERAS = 64
MAX_POINTS = 1 << 28
MAX_CELLS = 1 << 24
MAX_ROWS = 1 << 15
_VERSION = 1  # of what `key` stands for: rises when a table of the same geometry would come out different


@dataclasses.dataclass(frozen=True)
class Frustum:
    """The points that pixels of the feature map are lifted to, the same for each camera.

    image: (height, width) of the network's picture, pixels.  features: (height, width) of its feature map.
    depth: (first, end, step) of the depth bins along the camera's z axis, metres: first + i step, below `end`.
    Defaults: BEVFusion on nuScenes, 118 bins. Pixel positions are linspace(0, side - 1, feature side).
    """

    image: tuple[int, int] = (256, 704)
    features: tuple[int, int] = (32, 88)
    depth: tuple[float, float, float] = (1.0, 60.0, 0.5)

    def __post_init__(self) -> None:
        first, end, step = self.depth
        if min(*self.image, *self.features) < 1 or self.features[0] > MAX_ROWS:
            raise UsageError(
                f"frustum: unusable sizes, expected sides of at least 1 and at most {MAX_ROWS} rows of features, "
                f"got image {self.image}, features {self.features}."
            )
        if not (math.isfinite(first) and math.isfinite(end) and 0 < step < math.inf and 0 < first < end):
            raise UsageError(
                f"frustum: unusable depth bins, expected (first, end, step) with 0 < first < end and step > 0, "
                f"got {self.depth}."
            )

    @property
    def bins(self) -> int:
        """Number of depth bins."""
        first, end, step = self.depth
        return max(1, math.ceil((end - first) / step))

    def depths(self) -> np.ndarray:
        """float64 [bins]: z of each bin, metres."""
        result: np.ndarray = self.depth[0] + self.depth[2] * np.arange(self.bins, dtype=np.float64)
        return result


@dataclasses.dataclass(frozen=True)
class BevGrid:
    """The cells of the bird's-eye view; one bin in z, which only bounds the height of points.

    x, y: (low, high, step), metres.  z: (low, high).
    order: "yx": rows are y and columns x, as voxel coordinates (batch, z, y, x) give them; "xy": rows are x, as the
        published BEVFusion.
    rounding: "floor": [low, high) exactly; "trunc": points less than one cell below `low` fall into the first cell
        (in z too, where a cell is high - low), as in the published BEVFusion.
    """

    x: tuple[float, float, float] = (-54.0, 54.0, 0.3)
    y: tuple[float, float, float] = (-54.0, 54.0, 0.3)
    z: tuple[float, float] = (-10.0, 10.0)
    order: Literal["yx", "xy"] = "yx"
    rounding: Literal["floor", "trunc"] = "floor"

    def __post_init__(self) -> None:
        for axis, (low, high, step) in (("x", self.x), ("y", self.y), ("z", (*self.z, 1.0))):
            cells = (high - low) / step if step else math.nan
            if not (math.isfinite(cells) and low < high and step > 0) or (
                axis != "z" and (round(cells) < 1 or abs(cells - round(cells)) > 1e-6 * cells)
            ):
                raise UsageError(
                    f"grid {axis}: unusable range, expected low < high with a whole number of steps between, "
                    f"got {low}..{high} step {step}."
                )
        if self.order not in ("yx", "xy") or self.rounding not in ("floor", "trunc"):
            raise UsageError(
                f"grid: expected order 'yx' or 'xy' and rounding 'floor' or 'trunc', "
                f"got {self.order!r}, {self.rounding!r}."
            )
        if self.cells > MAX_CELLS:
            raise UsageError(f"grid: too large, expected at most {MAX_CELLS} cells, got {self.cells}.")

    @property
    def size(self) -> tuple[int, int]:
        """(cells in x, cells in y)."""
        nx, ny = (round((high - low) / step) for low, high, step in (self.x, self.y))
        return nx, ny

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the bird's-eye view as `order` says."""
        nx, ny = self.size
        return (ny, nx) if self.order == "yx" else (nx, ny)

    @property
    def cells(self) -> int:
        nx, ny = self.size
        return nx * ny


class Geometry:
    """Calibration and settings that decide an association table; a value: two equal ones have the same `key`.

    intrinsics: [cam, 3, 3], camera -> pixels of the sensor's picture.
    camera_to_ego: [cam, 4, 4], rigid. A point cloud augmentation, if any, is multiplied to it from the left.
    augmentation: [cam, 3, 3] or None (identity): sensor's pixel (x, y, 1) -> network's pixel, affine: resize, crop,
        flip, rotation; each camera has its own.
    Raises: UsageError for other shapes, numbers that are not finite, or matrices that cannot be inverted.
    """

    def __init__(
        self,
        intrinsics: np.ndarray,
        camera_to_ego: np.ndarray,
        augmentation: np.ndarray | None = None,
        frustum: Frustum | None = None,
        grid: BevGrid | None = None,
    ) -> None:
        self.frustum, self.grid = frustum or Frustum(), grid or BevGrid()
        cameras = len(intrinsics)
        if augmentation is None:
            augmentation = np.broadcast_to(np.eye(3), (cameras, 3, 3))
        self.intrinsics = _matrices("intrinsics", intrinsics, (cameras, 3, 3))
        self.camera_to_ego = _matrices("camera_to_ego", camera_to_ego, (cameras, 4, 4))
        self.augmentation = _matrices("augmentation", augmentation, (cameras, 3, 3))
        if not 1 <= cameras <= MAX_CAMERAS or self.points > MAX_POINTS:
            raise UsageError(
                f"rig: too large, expected 1..{MAX_CAMERAS} cameras and at most {MAX_POINTS} points, "
                f"got {cameras} cameras and {self.points} points."
            )

    @property
    def cameras(self) -> int:
        return len(self.intrinsics)

    @property
    def points(self) -> int:
        """Cameras x depth bins x feature pixels."""
        height, width = self.frustum.features
        return self.cameras * self.frustum.bins * height * width

    @property
    def key(self) -> str:
        """SHA-256 of all that decides the table, 64 hexadecimal digits."""
        settings = json.dumps(
            [_VERSION, dataclasses.asdict(self.frustum), dataclasses.asdict(self.grid), self.cameras]
        )
        digest = hashlib.sha256(settings.encode())
        for part in (self.intrinsics, self.camera_to_ego, self.augmentation):
            digest.update(part.astype("<f8").tobytes())
        return digest.hexdigest()

    def rays(self) -> tuple[np.ndarray, np.ndarray]:
        """What a pixel sees: float64 rays [cam, h, w, 3] and origins [cam, 3], both in the ego frame.

        The point of depth bin z is ray * z + origin; rays have z = 1 in their camera's frame.
        """
        (rows, columns), (height, width) = self.frustum.features, self.frustum.image
        u, v = np.linspace(0, width - 1, columns), np.linspace(0, height - 1, rows)
        pixels = np.stack([*np.meshgrid(u, v), np.ones((rows, columns))], axis=-1)  # [h, w, 3]
        to_ego = self.camera_to_ego[:, :3, :3] @ np.linalg.inv(self.augmentation @ self.intrinsics)
        # sums written out: a matrix product may round differently from one library to the next
        rays = sum(to_ego[:, None, None, :, k] * pixels[None, ..., k, None] for k in range(3))
        return np.ascontiguousarray(rays), np.ascontiguousarray(self.camera_to_ego[:, :3, 3])


def _matrices(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of `values` as float64, read-only, after the checks that all of them share."""
    array = np.array(values, np.float64, order="C")
    if array.shape != shape:
        raise UsageError(
            f"argument {name}: wrong shape, expected {list(shape)}, got {list(array.shape)}. "
            "Pass one matrix per camera."
        )
    if not np.isfinite(array).all():
        raise UsageError(f"argument {name}: expected finite numbers, got some that are not.")
    for camera, matrix in enumerate(array):
        last = [0.0] * (len(matrix) - 1) + [1.0]
        if matrix[-1].tolist() != last or abs(np.linalg.det(matrix)) < 1e-12:
            raise UsageError(
                f"argument {name}, camera {camera}: expected an invertible matrix whose last row is {last}, "
                f"got {matrix.tolist()}."
            )
    array += 0.0  # -0.0 is 0.0: the same key
    array.flags.writeable = False
    return array
