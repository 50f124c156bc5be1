"""Sensors in, boxes out: what a plan is told of one moment of a rig, and what its outputs say.

A moment comes whole (`FusionPipeline(frame)`), or its cameras one by one as their pictures arrive:

    seen = {name: pipeline.camera(name, picture)}      # preprocess and the camera's own network, at once
    boxes = pipeline.finish(moment, seen)              # the rest, when the sweep is complete

Any sensor may be missing; the result names those. Calibration travels with the rig of each moment.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import Any, Protocol, cast

import numpy as np

from edgekit.errors import BundleError, UsageError, did_you_mean
from edgekit.kernels.letterbox import plan
from edgekit.manifest import Manifest
from edgekit.pixels import Pixels, as_pixels
from edgekit.rig import Rig, RigFrame
from edgekit.tasks import Runnable, spec_in
from edgekit.tasks.fusion.boxes import Boxes3D, no_boxes
from edgekit.tasks.fusion.calibration import Calibration, within
from edgekit.tasks.fusion.deadline import Deadline
from edgekit.tasks.fusion.decode import decoder
from edgekit.tasks.fusion.spec import FusionSpec

LIDAR = "lidar"
_COLUMNS = 5
_POOL = 4
"""Copies of a camera's tensors that are kept for further pictures."""


class PlanSession(Protocol):
    """What the pipeline uses of a `runtime.session.Session`."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    buffers: Mapping[str, np.ndarray]
    step_ns: Mapping[str, tuple[int, int]]

    def run(self, done: Collection[str] = ()) -> None: ...

    def run_slot(self, step: str, slot: int) -> None: ...


def read_spec(manifest: Manifest) -> FusionSpec:
    """The spec in a manifest. Raises: BundleError when it is not one."""
    return spec_in(manifest, FusionSpec)


class Seen:
    """One camera's picture as far as it can be processed alone. Good for any moment of this pipeline, once or more.

    camera: its name.  size: (width, height) of the picture.  stage_ns: (preprocess, engine), nanoseconds of wall time.
    tensors: what is kept of it; None as long as the session's own buffers still hold it, which spares copies.
    """

    __slots__ = ("__weakref__", "camera", "size", "stage_ns", "tensors")

    def __init__(self, camera: str, size: tuple[int, int], stage_ns: tuple[int, int]) -> None:
        self.camera, self.size, self.stage_ns = camera, size, stage_ns
        self.tensors: dict[str, np.ndarray] | None = None


class FusionPipeline:
    """One thread's way from what a rig sees to boxes.

    Raises: BundleError when `spec` does not fit the session's tensors.
    stage_ns: (preprocess, engine, decode) of the last call, nanoseconds of wall time. step_ns: (start, end) of each step of
    the last run, `perf_counter_ns`.
    counts: how often a sweep was cut down, by what was done (`cropped`, `coarser`, `over` = still above the budget,
    `thinned` = more points than the plan has room for, `broken` = points with an intensity or time that is not finite).
    """

    takes_rigs = True

    def __init__(self, spec: FusionSpec, session: Runnable) -> None:
        self.spec, self.session = spec, cast("PlanSession", session)
        self._slots = {name: i for i, name in enumerate(spec.cameras)}
        self._check()
        self._decode = decoder(spec, session.outputs)
        self._calibration: Calibration | None = None
        self._spare: list[dict[str, np.ndarray]] = []
        self._living: list[weakref.ref[Seen] | None] = [None] * len(spec.cameras)
        """By slot: whose tensors the session's buffers hold."""
        self._blank = [True] * len(spec.cameras)
        """By slot: whether `images` holds no picture there."""
        self._deadline = None if spec.voxels is None else Deadline(spec.voxels)
        self._budget_ms = spec.lidar_budget_ms
        self.counts: Counter[str] = Counter()
        self.stage_ns = (0, 0, 0)
        self.step_ns: Mapping[str, tuple[int, int]] = {}

    # --- whole moments --------------------------------------------------------------------------

    def __call__(
        self,
        frame: RigFrame,
        *,
        score_threshold: float | None = None,
        taken_ns: int | None = None,
        epoch: int = 0,
    ) -> Boxes3D:
        """Boxes in the LiDAR's frame at `frame.taken_ns`. score_threshold: the bundle's by default. taken_ns, epoch: not
        used, a moment knows its time.

        Raises: UsageError for anything that is no frame of a rig, StreamError when the engine fails.
        """
        if not isinstance(frame, RigFrame):
            raise UsageError(
                f"moment: expected a frame of a rig, got {type(frame).__name__}. "
                "Read one from a source of a rig, or with edgekit.rig_files"
            )
        return self.finish(frame, {}, score_threshold=score_threshold)

    # --- sensors as they arrive -----------------------------------------------------------------

    def camera(self, name: str, picture: np.ndarray | Pixels) -> Seen:
        """What can be done with one camera's picture, uint8 [H, W, 3] BGR or Pixels of any format, before the others are
        there.

        Raises: UsageError for a camera that the network does not know, StreamError when the engine fails.
        """
        slot = self._slots.get(name)
        if slot is None:
            raise UsageError(
                f"camera {name!r}: not one of this network. {did_you_mean(name, self.spec.cameras)}"
            )
        start = time.perf_counter_ns()
        self._leave(slot)
        size = self._place(slot, picture)
        placed = time.perf_counter_ns()
        step = self.spec.camera_step
        if step:
            self.session.run_slot(step, slot)
        seen = Seen(name, size, (placed - start, time.perf_counter_ns() - placed))
        self._living[slot] = weakref.ref(seen)
        return seen

    def finish(
        self, moment: RigFrame, seen: Mapping[str, Seen], *, score_threshold: float | None = None
    ) -> Boxes3D:
        """Boxes of a moment of which some cameras are `seen` already; its other shots are processed now.

        `moment.points` is the sweep, or None; `moment.shots` tell when pictures were taken and how the vehicle has
        moved since. Raises: as a call; UsageError for what was seen by another camera, or another pipeline.
        """
        spec, inputs = self.spec, self.session.inputs
        start = time.perf_counter_ns()
        told = self._told(moment.rig)
        there = np.zeros(len(self._slots), np.float32)
        step = spec.camera_step
        for name, one in seen.items():
            self._mine(name, one)
        done: tuple[str, ...] = (step,) if seen and step else ()
        late = []
        for slot, name in enumerate(self._slots):  # buffers that change below
            living = self._living[slot]
            stays = name in seen and told.known[slot] and living is not None and living() is seen[name]
            if not stays:
                self._leave(slot)
        for name, slot in self._slots.items():
            if not told.known[slot] or (name not in seen and name not in moment.shots):
                if not self._blank[slot]:  # a plan that does not ask who is there must not see an old picture
                    self.session.inputs["images"][slot] = 0
                    self._blank[slot] = True
                if "cameras" not in inputs:
                    late.append(slot)
                continue
            if name in seen:
                self._fits(moment.rig, name, seen[name].size)
                if (tensors := seen[name].tensors) is not None:
                    for key, part in self._kept(slot).items():
                        np.copyto(part, tensors[key])
            else:
                self._fits(moment.rig, name, self._place(slot, moment.shots[name].image))
                late.append(slot)
            there[slot] = 1
        notes: list[str] = []
        voxels = self._put_points(moment.points, notes)
        lidar = moment.points is not None
        missing = tuple(name for name, slot in self._slots.items() if not there[slot])
        missing = missing if lidar or "points" not in inputs else (*missing, LIDAR)
        if not there.any() and not lidar:
            self.stage_ns, self.step_ns = (time.perf_counter_ns() - start, 0, 0), {}
            return dataclasses.replace(no_boxes(spec.labels, missing, moment.taken_ns), moment=moment)
        self._put("cameras", there)
        self._put("lidar", np.float32(lidar))
        self._put("present", np.array([[there.any(), lidar]], np.float32))
        self._put("intrinsics", told.intrinsics)
        self._put("camera_to_lidar", told.camera_to_lidar)
        if "projections" in inputs:
            self._put("projections", told.projections(moment))
        placed = time.perf_counter_ns()
        if done:
            for slot in late:
                self.session.run_slot(step, slot)
        self.session.run(done)
        ran = time.perf_counter_ns()
        self.step_ns = self.session.step_ns
        if voxels is not None and self._deadline is not None and spec.lidar_step in self.step_ns:
            begun, ended = self.step_ns[spec.lidar_step]
            self._deadline.observe(voxels, (ended - begun) / 1e6)
        boxes = self._decode(
            self.session.outputs, score_threshold=score_threshold, missing=missing, taken_ns=moment.taken_ns
        )
        result = dataclasses.replace(boxes, notes=tuple(notes), moment=moment)
        self.stage_ns = (placed - start, ran - placed, time.perf_counter_ns() - ran)
        return result

    def prepare(self, rig: Rig) -> list[Future[Any]]:
        """Make ahead, in other threads, what a rig's calibration needs, so that its first moment does not wait. Returns at
        once; the futures are done when it is there.

        For any thread, and while the pipeline runs with another rig.
        """
        from edgekit.kernels import steps

        told = Calibration(rig, self.spec.cameras, self.spec.preprocess)
        return [
            steps.prefetch(executable, told.intrinsics, told.camera_to_lidar)
            for executable in getattr(self.session, "executables", {}).values()
            if isinstance(executable, steps.PoolCameras)
        ]

    # --- the LiDAR's budget ---------------------------------------------------------------------

    @property
    def lidar_budget_ms(self) -> float | None:
        """Milliseconds that the step `spec.lidar_step` may take (deadline.py); None = as long as it takes."""
        return self._budget_ms

    @lidar_budget_ms.setter
    def lidar_budget_ms(self, value: float | None) -> None:
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise UsageError(f"lidar_budget_ms {value!r}: expected above 0 milliseconds, or None")
        if value is not None and self._deadline is None:
            raise UsageError(
                "lidar_budget_ms: this bundle does not say what its voxels are, so no deadline can be held. "
                "Give `voxels` in the plan's pipeline and build again"
            )
        self._budget_ms = value

    # --- parts ----------------------------------------------------------------------------------

    def _put_points(self, points: np.ndarray | None, notes: list[str]) -> int | None:
        """The sweep into its tensor; how many voxels it makes, where that is watched."""
        inputs = self.session.inputs
        if "points" not in inputs:
            return None
        room, count = inputs["points"], inputs["point_count"]
        if points is None:
            count[0] = 0
            return None
        if points.ndim != 2 or points.shape[1] != _COLUMNS or points.dtype != np.float32:
            raise UsageError(
                f"moment: expected points float32 [n, {_COLUMNS}], got {points.dtype} {list(points.shape)}"
            )
        finite = np.isfinite(points).all(axis=1)
        if not finite.all():
            placed = np.isfinite(points[:, :3]).all(axis=1)  # others are rays that nothing sent back
            if broken := int(np.count_nonzero(placed & ~finite)):
                notes.append(f"lidar: {broken} points left out, their intensity or time is no finite number")
                self.counts["broken"] += 1
            points = points[finite]
        points = within(points, self.spec.reach)
        voxels = None
        if self._budget_ms is not None and self._deadline is not None:
            cut = self._deadline.fit(points, self._budget_ms)
            points, voxels = cut.points, cut.voxels
            notes += cut.notes
            self.counts.update(cut.done)
        if len(points) > len(room):
            notes.append(f"lidar: {len(points) - len(room)} points beyond the {len(room)} there is room for")
            self.counts["thinned"] += 1
            away = np.square(points[:, :2]).sum(axis=1)
            points = points[np.sort(np.argpartition(away, len(room))[: len(room)])]
        room[: len(points)] = points
        count[0] = len(points)
        return voxels

    def _place(self, slot: int, picture: np.ndarray | Pixels) -> tuple[int, int]:
        """A picture into its slice of `images`; its (width, height)."""
        pixels = as_pixels(picture)
        target = self.session.inputs["images"][slot : slot + 1]
        self._blank[slot] = False
        plan(self.spec.preprocess, pixels.layout).run(pixels, target)
        return pixels.layout.width, pixels.layout.height

    def _mine(self, name: str, seen: Seen) -> None:
        """Raises: UsageError unless it was seen by that camera, through this pipeline."""
        if getattr(seen, "camera", None) != name:
            raise UsageError(
                f"camera {name!r}: expected what pipeline.camera({name!r}, ..) gave, got "
                f"{getattr(seen, 'camera', type(seen).__name__)!r}"
            )
        slot = self._slots.get(name)
        living = None if slot is None else self._living[slot]
        if seen.tensors is None and (living is None or living() is not seen):
            raise UsageError(
                f"camera {name!r}: was seen by another pipeline. Give what this one's camera() returned"
            )

    def _kept(self, slot: int) -> dict[str, np.ndarray]:
        """What is kept of a camera: its slices of tensors of the plan."""
        names = self.spec.camera_tensors if self.spec.camera_step else ("images",)
        found = {}
        for name in names:
            tensor = self.session.buffers[name]
            rows = len(tensor) // len(self._slots)
            found[name] = tensor[slot * rows : (slot + 1) * rows]
        return found

    def _leave(self, slot: int) -> None:
        """The buffers of a slot are about to change: who lives in them gets a copy."""
        living, self._living[slot] = self._living[slot], None
        seen = None if living is None else living()
        if seen is None:
            return
        kept, spare = self._kept(slot), self._spare
        tensors = spare.pop() if spare else {key: np.empty_like(part) for key, part in kept.items()}
        for key, part in kept.items():
            np.copyto(tensors[key], part)
        seen.tensors = tensors
        # whoever drops it last gives its memory back
        weakref.finalize(seen, _give_back, spare, tensors, _POOL * len(self._slots)).atexit = False

    def _put(self, name: str, value: np.ndarray | np.float32) -> None:
        if name in self.session.inputs:
            self.session.inputs[name][...] = value

    def _told(self, rig: Rig) -> Calibration:
        told = self._calibration
        if told is None or (told.rig is not rig and told.rig != rig):
            told = self._calibration = Calibration(rig, self.spec.cameras, self.spec.preprocess)
        return told

    def _fits(self, rig: Rig, name: str, size: tuple[int, int]) -> None:
        """A picture may be of another size than its calibration says, but not of another shape."""
        camera, (width, height) = rig.cameras[name], size
        off = abs(width * camera.height - height * camera.width)
        if off > max(width, height, camera.width, camera.height):  # one pixel of a side
            raise UsageError(
                f"camera {name}: a picture of {width}x{height} pixels, but the rig says "
                f"{camera.width}x{camera.height}. Give the rig that took it"
            )

    def _check(self) -> None:
        spec, inputs = self.spec, self.session.inputs
        cameras, rule = len(spec.cameras), spec.preprocess
        wanted: dict[str, tuple[tuple[int | None, ...], str]] = {
            "points": ((None, _COLUMNS), "float32"),
            "point_count": ((1,), "int32"),
            "lidar": ((1,), "float32"),
            "present": ((1, 2), "float32"),
        }
        if cameras:
            wanted |= {
                "images": ((cameras, 3, rule.height, rule.width), "float32"),
                "cameras": ((cameras,), "float32"),
                "projections": ((cameras, 3, 4), "float32"),
                "intrinsics": ((cameras, 3, 3), "float32"),
                "camera_to_lidar": ((cameras, 4, 4), "float32"),
            }
        for name, tensor in inputs.items():
            if name not in wanted:
                raise BundleError(
                    f"bundle: input {name!r} of its plan means nothing to the task fusion. "
                    f"{did_you_mean(name, tuple(wanted))}"
                )
            shape, dtype = wanted[name]
            same = len(shape) == tensor.ndim and all(
                b in (None, a) for a, b in zip(tensor.shape, shape, strict=True)
            )
            if not same or tensor.dtype != dtype:
                raise BundleError(
                    f"bundle: its pipeline does not fit its plan: input {name!r}: expected {dtype} "
                    f"{['n' if side is None else side for side in shape]}, got {tensor.dtype} {list(tensor.shape)}"
                )
        if cameras and "images" not in inputs:
            raise BundleError(f"bundle: {cameras} cameras, but its plan has no input 'images'")
        if ("points" in inputs) != ("point_count" in inputs):
            raise BundleError("bundle: a plan with 'points' has 'point_count' too, and the other way round")
        if not cameras and "points" not in inputs:
            raise BundleError("bundle: a plan of the task fusion has 'images' of cameras, 'points', or both")
        buffers = self.session.buffers
        slots = getattr(self.session, "slots", None)
        if cameras and spec.camera_step and slots is not None and slots(spec.camera_step) != cameras:
            raise BundleError(
                f"bundle: camera_step {spec.camera_step!r} of its pipeline: expected a step that reads inputs of the plan "
                f'only and is repeated {cameras} times, once per camera; "" where there is none'
            )
        for name in spec.camera_tensors if cameras and spec.camera_step else ():
            if name not in buffers or buffers[name].ndim < 1 or len(buffers[name]) % cameras:
                raise BundleError(
                    f"bundle: its pipeline keeps {name!r} of each camera, expected a tensor of the plan with "
                    f"a multiple of {cameras} along its first axis"
                )
        if cameras and (rule.layout != "NCHW" or rule.dtype.value != "float32"):
            raise BundleError("bundle: pictures of a plan are float32 in the order NCHW")


def _give_back(spare: list[dict[str, np.ndarray]], tensors: dict[str, np.ndarray], most: int) -> None:
    if len(spare) < most:
        spare.append(tensors)
