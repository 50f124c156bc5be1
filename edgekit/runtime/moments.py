"""A moment of a rig as a frame: what its sensors sent, each with its own lease, under one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from edgekit.errors import UsageError
from edgekit.pixels import PixelLayout, Pixels
from edgekit.rig import Array, Camera, Rig, RigFrame, Shot, arrange, inverse, mosaic
from edgekit.runtime.ego import Ego
from edgekit.runtime.frames import Frame, Lease
from edgekit.runtime.sync import LIDAR, Moment, Part

CAMERA = "rig"
"""What frames of moments call their camera."""


class FrameShot(Shot):
    """A camera's frame as a shot: BGR only when somebody looks."""

    def __init__(self, image: Array | Frame, taken_ns: int, motion: Array | None = None) -> None:
        """image: the frame, or an array, which `dataclasses.replace` passes on."""
        object.__setattr__(self, "_picture", image)
        object.__setattr__(self, "taken_ns", taken_ns)
        object.__setattr__(self, "motion", np.eye(4) if motion is None else motion)

    @property
    def image(self) -> Array:
        picture: Any = self.__dict__["_picture"]
        return picture.image if isinstance(picture, Frame) else picture


class MosaicPixels(Pixels):
    """All pictures of a moment in one, drawn when somebody looks."""

    def __init__(self, moment: RigFrame) -> None:
        cameras = moment.rig.cameras
        grid = arrange(list(cameras))
        wide = max((camera.width for camera in cameras.values()), default=64)
        tall = max((camera.height for camera in cameras.values()), default=64)
        layout = PixelLayout("bgr", wide * max(map(len, grid), default=1), tall * max(1, len(grid)))
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "_moment", moment)

    @cached_property
    def planes(self) -> tuple[np.ndarray, ...]:
        moment: RigFrame = self.__dict__["_moment"]
        if not moment.rig.cameras:
            return (np.zeros((self.layout.height, self.layout.width, 3), np.uint8),)
        return (mosaic(moment),)


class Builder:
    """Makes frames of moments. rig: the calibration from now on."""

    def __init__(self, rig: Rig, ego: Ego) -> None:
        self.rig = rig
        self.ego = ego
        self._sized: tuple[Rig, dict[str, tuple[int, int]], Rig] | None = None

    def learn(self, part: Part) -> None:
        """The pose that a part brings."""
        frame: Frame = part.item.frame
        if frame.rig is not None and frame.rig.pose is not None:
            self.ego.add(part.at_ns + _after(part.sensor, frame.rig), frame.rig.pose)

    def rig_frame(self, moment: Moment) -> RigFrame:
        """Raises: UsageError for a LiDAR without points."""
        sweep = moment.parts.get(LIDAR)
        swept = sweep.item.frame.rig if sweep is not None else None
        pose = swept.pose if swept is not None else None
        if pose is None or self.ego._ask is not None:
            pose = self.ego.at(moment.taken_ns)
        shots: dict[str, Shot] = {}
        for name, part in moment.parts.items():
            if name != LIDAR:
                shots[name] = self._shot(name, part, moment.taken_ns, pose)
        rig = self._fitting({name: part.item.frame for name, part in moment.parts.items() if name != LIDAR})
        return RigFrame(
            rig, moment.taken_ns, swept.points if swept is not None else None, shots,
            swept.rings if swept is not None else None, None, pose, moment.number,
        )  # fmt: skip

    def frame(self, moment: Moment, rig: RigFrame, *, timed: bool) -> Frame:
        """The frame of a moment: its lease ends those of all parts."""
        frames = [part.item.frame for part in moment.parts.values()]
        first: Frame = moment.anchor.item.frame

        def give_back() -> None:
            for frame in frames:
                frame.release()

        return Frame(
            MosaicPixels(rig), moment.number, moment.anchor.at_ns, moment.anchor.arrived_ns, first.source,
            clock="monotonic" if timed else "media", exposure=first.exposure, camera=CAMERA, epoch=first.epoch,
            hops=tuple(hop for frame in frames for hop in frame.hops), lease=Lease(give_back), rig=rig,
        )  # fmt: skip

    def _shot(self, name: str, part: Part, ref_ns: int, ref: Array | None) -> Shot:
        frame: Frame = part.item.frame
        own = frame.rig
        shot = own.shots.get(name) if own is not None else None
        then = own.pose @ inverse(shot.motion) if own is not None and own.pose is not None and shot else None
        if self.ego._ask is not None:
            then = None
        motion = self.ego.motion(ref_ns, part.at_ns, ref, then)
        if motion is None and shot is not None and own is not None:
            # its own frame of the rig is (nearly) the moment's: what it says holds
            apart = abs(part.at_ns + _after(name, own) - ref_ns)
            motion = shot.motion if apart < 2_000_000 else None
        return FrameShot(frame, part.at_ns, motion)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(width, height) of the pictures that came so far, by camera."""
        return self._sized[1] if self._sized is not None else {}

    def fitted(self, rig: Rig) -> Rig:
        """A rig, its cameras as large as these."""
        return fitted(rig, self.sizes)

    def _fitting(self, frames: Mapping[str, Frame]) -> Rig:
        sizes = {n: (f.width, f.height) for n, f in frames.items() if n in self.rig.cameras}
        if self._sized is not None:
            known = self._sized[1]
            if self._sized[0] is self.rig and all(known.get(name) == size for name, size in sizes.items()):
                return self._sized[2]
            sizes = known | sizes
        rig = fitted(self.rig, sizes)
        self._sized = (self.rig, sizes, rig)
        return rig


def fits(camera: Camera, size: tuple[int, int]) -> bool:
    """Whether a picture, (width, height), may be the camera's, scaled: its sides are as they are to a pixel."""
    off = abs(size[0] * camera.height - size[1] * camera.width)
    return off <= max(*size, camera.width, camera.height)


def fitted(rig: Rig, sizes: Mapping[str, tuple[int, int]]) -> Rig:
    """A rig, its cameras as large as their pictures are: a calibration holds for scaled pictures too. The same one where
    they are."""
    cameras = {
        name: camera
        if sizes.get(name, (camera.width, camera.height)) == (camera.width, camera.height)
        else camera.resized(*sizes[name])
        for name, camera in rig.cameras.items()
    }
    same = all(cameras[name] is camera for name, camera in rig.cameras.items())
    return rig if same else dataclasses.replace(rig, cameras=cameras)


def _after(sensor: str, own: RigFrame) -> int:
    """How long after the sensor measured is the time of the rig's frame that it came in, ns; whatever its clock says."""
    shot = own.shots.get(sensor)
    return own.taken_ns - shot.taken_ns if shot is not None else 0


def check_sensor(name: str, frame: Frame) -> None:
    """Raises: UsageError for a LiDAR's frame without points."""
    if name == LIDAR and (frame.rig is None or frame.rig.points is None):
        raise UsageError(
            f"source {frame.source}: its frames carry no points, expected `frame.rig.points`. "
            "A LiDAR's source gives frames with a rig.RigFrame"
        )
