"""The street as a whole rig sees it: six cameras around the vehicle, a LiDAR on its roof, and exact 3-D boxes.

    world = RigWorld(seed=7)
    frame = world.frame(40)            # 4 s into the drive, at 10 frames/s: a `rig.RigFrame`
    frame.points                       # float32 [n, 5] in the lidar frame
    frame.shots["CAM_FRONT"].image     # uint8 [144, 256, 3] BGR
    frame.truth.boxes                  # float32 [k, 9] in the lidar frame

numpy only. A frame depends on (seed, options, index) alone. Both sensors cast rays at the same solids, so what
hides a car from the LiDAR also hides it from a camera that stands there. Sensors are mounted, and fire one
after the other, as on nuScenes' cars: the LiDAR turns clockwise and each camera takes its picture when the
beam passes its middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import numpy as np

from edgekit.errors import UsageError
from edgekit.rig import (
    Camera,
    Lidar,
    Rig,
    RigFrame,
    Shot,
    Truth,
    count_inside,
    inverse,
    moved,
    quaternion,
    rigid,
)
from edgekit.synth.cast import Scene
from edgekit.synth.optics import Look
from edgekit.synth.rig_scene import Placed, RigStreet
from edgekit.synth.rig_view import View, view
from edgekit.synth.scene import stream
from edgekit.synth.solids import CLASSES, reflect_of_ground
from edgekit.synth.street import Time
from edgekit.synth.sweep import Spinner, Sweep, sweep

Array = np.ndarray

FRAMES_PER_SECOND = 10.0
RANGE = 60.0
"""Objects further from the LiDAR than this (metres, on the ground) are not labelled."""
WIDTH, HEIGHT = 256, 144

_CAMERAS = {  # heading in degrees; x, y, z in m; focal length over the picture's width
    "CAM_FRONT_LEFT": (55.0, (1.52, 0.49, 1.51), 0.795),
    "CAM_FRONT": (0.0, (1.70, 0.0, 1.51), 0.792),
    "CAM_FRONT_RIGHT": (-55.0, (1.55, -0.49, 1.50), 0.788),
    "CAM_BACK_RIGHT": (-110.0, (1.01, -0.48, 1.56), 0.787),
    "CAM_BACK": (180.0, (0.03, 0.0, 1.58), 0.506),
    "CAM_BACK_LEFT": (110.0, (1.04, 0.48, 1.59), 0.785),
}
_LIDAR = (0.94, 0.0, 1.84)


def street_rig(seed: int | None = None, width: int = WIDTH, height: int = HEIGHT) -> Rig:
    """The rig of the synthetic street. With a seed, as a workshop would have mounted it: each sensor up to 4 cm and
    1.5 degrees (the LiDAR 0.6) off the nominal place, focal lengths up to 2 %.
    """
    rng = stream(0 if seed is None else seed, 120)

    def off(by: float) -> float:
        return 0.0 if seed is None else rng.uniform(-by, by)

    spinner, period = Spinner(), 50.0
    cameras: dict[str, Camera] = {}
    for name, (heading, place, focal) in _CAMERAS.items():
        x, y, z = (v + off(0.04) for v in place)
        turn = _heading(heading + off(1.5), off(1.5), off(1.0)) @ _OPTICAL
        f = focal * width * (1 + off(0.02))
        cx, cy = width / 2 * (1 + off(0.02)), height * (0.5 + off(0.02))
        delay = spinner.delay_ms(heading, period) + off(0.3)
        cameras[name] = Camera((x, y, z), quaternion(turn), width, height, f, f, cx, cy, min(delay, 0.0))
    x, y, z = (v + off(0.04) for v in _LIDAR)
    turn = _heading(-90.0 + off(0.6), off(0.6), off(0.6))
    return Rig("street-rig", Lidar((x, y, z), quaternion(turn), period), cameras)


_OPTICAL = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
"""From a camera's axes (x right, y down, z ahead) to x ahead, y left, z up."""


def _heading(yaw: float, pitch: float, roll: float) -> Array:
    """Rotation by degrees about z, then the turned y, then the turned x."""
    a, b, c = (math.radians(v) for v in (yaw, pitch, roll))
    z = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    y = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    x = np.array([[1, 0, 0], [0, math.cos(c), -math.sin(c)], [0, math.sin(c), math.cos(c)]])
    turn: Array = z @ y @ x
    return turn


class RigWorld:
    """An endless street driven through with a rig. Every seed is another street, hour, weather and mounting.

    seed: any integer from 0 to 2^63 - 1.  rig: instead of the seed's own (`street_rig(seed, width, height)`).
    width, height: of each picture, pixels.  spinner: the LiDAR's rays.  sweeps: how many sweeps a frame holds,
    earlier ones brought into the last one's frame as the vehicle moved, `dt` telling them apart.  time, rain,
    fog: fix what the seed would choose.
    Raises UsageError for values out of range.
    """

    def __init__(
        self, seed: int = 0, rig: Rig | None = None, *, width: int = WIDTH, height: int = HEIGHT,
        spinner: Spinner | None = None, sweeps: int = 1, time: Time | None = None, rain: float | None = None,
        fog: float | None = None,
    ) -> None:  # fmt: skip
        if not 0 <= seed < 2**63:
            raise UsageError(
                f"street seed {seed}: out of range, expected 0 to {2**63 - 1}. Choose another seed"
            )
        if not (64 <= width <= 4096 and 36 <= height <= 4096):
            raise UsageError(f"street size {width}x{height}: out of range, expected 64x36 to 4096x4096")
        if not 1 <= sweeps <= 10:
            raise UsageError(f"street rig with {sweeps} sweeps a frame: expected 1 to 10")
        self.seed, self.sweeps = seed, sweeps
        self.rig = rig or street_rig(seed, width, height)
        self.spinner = spinner or Spinner()
        self.look = Look.choose(stream(seed, 0), seed, width, height, time, rain, fog)
        self.street = RigStreet(seed, self.look.night)
        self._grain: dict[tuple[int, int], Array] = {}

    def frame(self, index: int, sensors: Collection[str] | None = None) -> RigFrame:
        """Frame `index` (>= 0) of the drive: the world after index / FRAMES_PER_SECOND.

        `taken_ns` counts from the beginning of the first sweep. sensors: names of cameras and `lidar`; given, it is
        the frame with these alone and without labels, and takes only their time.
        """
        return self.observe(index, sensors)[0]

    def observe(
        self, index: int, sensors: Collection[str] | None = None
    ) -> tuple[RigFrame, list[Placed], Sweep | None, dict[str, View]]:
        """`frame`, with what it was made from: the objects that `owner` in the (last) sweep and the views numbers."""
        if index < 0:
            raise UsageError(f"street frame {index}: out of range, expected 0 or more")
        t = index / FRAMES_PER_SECOND
        taken_ns = round((t + self.rig.lidar.period_ms / 1e3) * 1e9)
        ego = self.street.ego(t)
        objects = self.street.objects(t)
        scene = self._scene(objects, ego)
        last, points, rings = None, None, None
        if sensors is None or "lidar" in sensors:
            last = self._sweep(t, scene)
            parts = [last, *(self._earlier(t, number) for number in range(1, self.sweeps))]
            points = np.concatenate([part.points for part in parts])
            rings = np.concatenate([part.rings for part in parts])
        views, shots = {}, {}
        for number, (name, camera) in enumerate(self.rig.cameras.items()):
            if sensors is None or name in sensors:
                dt = camera.offset_ms / 1e3
                views[name] = self._view(camera, scene, t, dt, (index, number))
                motion = inverse(_matrix(self._motion(t, dt)))
                shots[name] = Shot(views[name].image, taken_ns + round(dt * 1e9), motion)
        truth = self._truth(objects, ego, points, views) if sensors is None and points is not None else None
        frame = RigFrame(self.rig, taken_ns, points, shots, rings, truth, _matrix(ego), index)
        return frame, objects, last, views

    def nearness(self, frame: RigFrame) -> Array:
        """The points of a frame of one sweep as a picture, uint8 [rings, azimuths, 3]: a row for each ring, the highest
        on top, the columns in the order of time; white is near, black far or nothing."""
        rings, columns = self.spinner.rings, self.spinner.azimuths
        picture = np.zeros((rings, columns), np.uint8)
        if frame.points is not None and frame.rings is not None:
            turn = 1.0 + frame.points[:, 4] * 1e3 / self.rig.lidar.period_ms
            column = np.clip(np.floor(turn * columns), 0, columns - 1).astype(int)
            far = np.linalg.norm(frame.points[:, :3], axis=1) / self.spinner.reach
            picture[rings - 1 - frame.rings, column] = 255 * (1 - np.clip(far, 0, 1) ** 0.5)
        return np.repeat(picture[..., None], 3, 2)

    def _scene(self, objects: list[Placed], ego: tuple[float, float, float]) -> Scene:
        poses = np.array([(p.x, p.y, p.yaw, p.vx, p.vy) for p in objects]).reshape(-1, 5)
        templates = [p.solid.parts for p in objects]
        return Scene.of(templates, poses, np.arange(len(objects))).seen_from(*ego)

    def _motion(self, t: float, dt: float) -> tuple[float, float, float]:
        """Pose of the vehicle at t + dt in its frame at t."""
        x0, y0, yaw0 = self.street.ego(t)
        x, y, yaw = self.street.ego(t + dt)
        cos, sin = math.cos(yaw0), math.sin(yaw0)
        return cos * (x - x0) + sin * (y - y0), cos * (y - y0) - sin * (x - x0), yaw - yaw0

    def _ground(self, t: float, dt: float) -> Callable[[Array, Array], Array]:
        """Kind of ground by x, y in the ego frame at t + dt."""
        x0, y0, yaw = self.street.ego(t + dt)
        cos, sin = math.cos(yaw), math.sin(yaw)

        def kind(x: Array, y: Array) -> Array:
            # far down the street single precision would tear the markings apart
            x, y = x.astype(np.float64), y.astype(np.float64)
            return self.street.ground(cos * x - sin * y + x0, sin * x + cos * y + y0)

        return kind

    def _sweep(self, t: float, scene: Scene) -> Sweep:
        """The sweep that ends at t."""
        kind = self._ground(t, 0.0)
        # numbered by its time: the same noise whichever frame it is part of
        number = round(t * 1e3 / self.rig.lidar.period_ms) + 1000
        rng = np.random.default_rng([self.seed, 121, number])
        return sweep(
            self.spinner, self.rig.lidar, scene, lambda dt: self._motion(t, dt),
            lambda x, y: reflect_of_ground()[kind(x, y)], rng, self.look.rain,
        )  # fmt: skip

    def _earlier(self, t: float, number: int) -> Sweep:
        """The sweep `number` turns before the one that ends at t, in the frame of that one."""
        back = -number * self.rig.lidar.period_ms / 1e3
        found = self._sweep(t + back, self._scene(self.street.objects(t + back), self.street.ego(t + back)))
        to_last = self.rig.lidar.from_ego @ _matrix(self._motion(t, back)) @ self.rig.lidar.to_ego
        found.points[:, :3] = found.points[:, :3] @ to_last[:3, :3].T + to_last[:3, 3]
        found.points[:, 4] += np.float32(back)
        return found

    def _view(self, camera: Camera, scene: Scene, t: float, dt: float, key: tuple[int, int]) -> View:
        then = scene.after(dt).seen_from(*self._motion(t, dt))
        kind = self._ground(t, dt)
        return view(camera, then, self.look, kind, self.street.ego(t + dt)[2], self._noise(camera, key))

    def _noise(self, camera: Camera, key: tuple[int, int]) -> Array:
        size = (camera.height, camera.width)
        if size not in self._grain:
            rng = np.random.default_rng([self.seed, 122])
            shape = (camera.height + 61, camera.width + 61, 3)
            gray = rng.standard_normal(shape[:2], dtype=np.float32)[..., None]
            color = rng.standard_normal(shape, dtype=np.float32)
            self._grain[size] = ((0.6 * gray + 0.7 * color) * self.look.noise).astype(np.int16)
        pick = stream(self.seed, 123, *key)
        y, x = pick.randrange(60), pick.randrange(60)
        return self._grain[size][y : y + camera.height, x : x + camera.width]

    def _truth(
        self, objects: list[Placed], ego: tuple[float, float, float], points: Array, views: dict[str, View]
    ) -> Truth:
        pixels = np.zeros(len(objects), np.int64)
        for each in views.values():
            pixels += np.bincount(each.owner[each.owner >= 0], minlength=len(objects))
        chosen = [i for i, placed in enumerate(objects) if placed.solid.label >= 0]
        rows = [
            (p.x, p.y, p.solid.size[2] / 2, *p.solid.size, p.yaw, p.vx, p.vy)
            for p in (objects[i] for i in chosen)
        ]
        world = np.array(rows, np.float64).reshape(-1, 9)
        boxes = moved(world, self.rig.lidar.from_ego @ inverse(_matrix(ego)))
        near = np.hypot(boxes[:, 0], boxes[:, 1]) < RANGE
        classes = np.array([objects[i].solid.label for i in chosen], np.int32)
        counts = np.zeros(len(boxes), np.int32)
        counts[near] = count_inside(points, boxes[near])
        seen_in = pixels[chosen].astype(np.int32) if chosen else np.zeros(0, np.int32)
        # nobody can be asked to find what no sensor noticed
        return Truth(boxes, classes, CLASSES, counts, seen_in)[near & ((counts > 0) | (seen_in > 0))]


def _matrix(pose: tuple[float, float, float]) -> Array:
    x, y, yaw = pose
    return rigid(_heading(math.degrees(yaw), 0.0, 0.0), (x, y, 0.0))
