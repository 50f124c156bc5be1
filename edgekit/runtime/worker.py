"""One engine's session and the frames that wait for it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from edgekit.errors import UsageError
from edgekit.runtime.frames import Frame
from edgekit.runtime.mailbox import Mailbox
from edgekit.runtime.results import StreamResult
from edgekit.runtime.swap import Holder, Pipelines

if TYPE_CHECKING:
    from edgekit.rig import Rig
    from edgekit.tasks import Pipeline


class Worker:
    """Takes frames from its mailbox, one at a time, through the engine."""

    def __init__(
        self,
        name: str,
        pipelines: Pipelines,
        box: Mailbox[Frame],
        score: float | None,
        timed: frozenset[str],
        rig: Rig | None = None,
        lidar_budget_ms: float | None = None,
    ) -> None:
        """timed: cameras whose frames come when they were taken, so that their arrival is a time, if there is no other.
        rig: the calibration instead of the one that frames of a rig bring. lidar_budget_ms: of its pipelines
        (FusionPipeline)."""
        self.name = name
        self.box = box
        self.thread: threading.Thread | None = None
        """Its own, where there are several."""
        self.uncounted: StreamResult | None = None
        """Its last result, until the metrics have it."""
        self.score = score
        self._timed = timed
        self.holder = Holder(pipelines)
        self.rig = rig
        self._budget_ms = lidar_budget_ms

    def set_up(self, pipeline: Any) -> Any:
        """A pipeline as this stream wants it. Raises: UsageError where it cannot be."""
        if self._budget_ms is not None and pipeline.lidar_budget_ms != self._budget_ms:
            pipeline.lidar_budget_ms = self._budget_ms
        return pipeline

    @property
    def pipelines(self) -> tuple[Pipeline, ...]:
        """All that are open."""
        return self.holder.current.opened

    def place(self, camera: str) -> str:
        """Where its results of that camera wait for the caller."""
        return f"{self.name}\n{camera}"

    def places(self, cameras: Iterable[str]) -> list[str]:
        return [self.place(camera) for camera in cameras]

    def check(self, rig: Rig) -> None:
        """Raises: UsageError for a calibration that cannot be that of what comes."""

    def recalibrate(self, rig: Rig) -> None:
        """From the next frame on. From any thread."""
        self.rig = rig

    def prepare(self, pipelines: Pipelines, rig: Rig | None = None) -> list[Future[Any]]:
        """Begin what pipelines need for the next frames, so that none waits for it: tables of a calibration (None: of the
        one in use). Done when the futures are. From any thread."""
        rig = rig or self.rig
        make = getattr(pipelines.opened[0], "prepare", None)
        return (make(rig) or []) if make is not None and rig is not None else []

    def step(self, wait_s: float) -> StreamResult | None:
        """The next result, or None after so long without. Raises: Closed at the end, StreamError of the engine."""
        frame = self.box.take(wait_s)
        if frame is None:
            return None
        try:
            return self.run(frame)
        except BaseException:
            frame.release()
            raise

    def run(self, frame: Frame) -> StreamResult:
        """One frame through the engine. Raises: StreamError when the inference library fails."""
        picked = time.monotonic_ns()
        taken = frame.taken_ns
        with self.holder.frame() as pipelines:
            pipeline = pipelines.of(frame.camera)
            picture: Any = frame.pixels
            if getattr(pipeline, "takes_rigs", False):
                if frame.rig is None:
                    raise UsageError(
                        f"source {frame.source}: its frames are pictures, but engine {self.name} takes those of a rig. "
                        "Name one source for each sensor, or open a source of a rig"
                    )
                self.set_up(pipeline)
                if self.rig is not None:
                    frame.rig = dataclasses.replace(frame.rig, rig=self.rig)
                picture = frame.rig
            result = pipeline(
                picture, score_threshold=self.score, taken_ns=self._moment(frame), epoch=frame.epoch
            )
            preprocess, engine, decode = pipeline.stage_ns
        stages = {
            "transport": frame.captured_ns - taken,
            "wait": picked - frame.captured_ns,
            "preprocess": preprocess,
            "engine": engine,
            "decode": decode,
        }
        now = time.monotonic_ns()
        age = now - taken
        item = StreamResult(frame, result, age, stages, self.name, frame.hops + pipelines.hops)
        if frame.rig is not None and picture is frame.rig:
            item.ages, item.missing = whole_rig(frame, now)
        return item

    def _moment(self, frame: Frame) -> int | None:
        """When the frame was taken, on a clock on which the source's frames are as far apart as they were taken:
        a file's arrive as fast as they are read. None for pictures, which have no time."""
        if frame.clock != "none":
            return frame.pts_ns
        return frame.captured_ns if frame.camera in self._timed else None

    def close(self) -> None:
        self.holder.close()


def whole_rig(frame: Frame, now_ns: int) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """Of a frame with a whole rig: how old each sensor's part is, and which are not there (why, nobody says)."""
    rig = frame.rig
    assert rig is not None
    base = now_ns - frame.taken_ns
    ages = {name: base + rig.taken_ns - shot.taken_ns for name, shot in rig.shots.items()}
    missing = {name: "absent" for name in rig.rig.cameras if name not in rig.shots}
    if rig.points is None:
        missing["lidar"] = "absent"
    else:
        ages["lidar"] = base
    return ages, missing
