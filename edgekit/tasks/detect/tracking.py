"""Which box is which object, from frame to frame: ByteTrack, by the library `trackers`.

    tracker = Tracker(fps=30)
    for item in edgekit.stream(bundle, source, score_threshold=0.1):
        tracked = tracker.update(item.result, item.frame).above(0.25)
        tracked.ids         # int32 [n], -1 = none yet

ByteTrack (Zhang et al. 2022) matches boxes with the predicted places of known objects by overlap, sure boxes first,
then weak ones, which continue a track but begin none: hand it weak boxes too, and drop them afterwards. Classes
are not compared, as detectors waver between them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from edgekit.runtime.frames import Frame
    from edgekit.tasks.detect.detections import Detections


@dataclass
class _Camera:
    """One camera's tracks. ids count on through `first` when it begins anew, so none comes again."""

    tracker: Any
    epoch: int
    seconds: float
    """The last frame's time."""
    told: float
    """What the library was told it was: it wants time to pass, though a clock may be too coarse for it."""
    first: int = 0
    highest: int = -1


class Tracker:
    """Gives detections their ids; frames of several cameras may come in turn, each has its own state and ids.

    fps: nominal frame rate; times come from the frames, so dropped and late ones are allowed for.
    score: boxes of at least this begin tracks. Weaker ones only continue one.
    lost_s: seconds for which an object that is not seen keeps its id.
    min_frames: consecutive frames in which an object must be seen before it gets an id.
    min_iou: least overlap of a box with a track's predicted place.
    For one thread at a time.
    Raises: MissingExtraError without `trackers`; UsageError for values out of range.
    """

    def __init__(
        self,
        fps: float = 30.0,
        *,
        score: float = 0.25,
        lost_s: float = 1.0,
        min_frames: int = 2,
        min_iou: float = 0.1,
    ) -> None:
        if not (fps > 0 and 0 <= score <= 1 and lost_s >= 0 and min_frames >= 1 and 0 <= min_iou <= 1):
            raise UsageError(
                f"tracker: expected fps above 0, score and min_iou in 0..1, lost_s at least 0, min_frames at least 1, "
                f"got fps {fps}, score {score}, min_iou {min_iou}, lost_s {lost_s}, min_frames {min_frames}."
            )
        try:
            import supervision
            from trackers import ByteTrackTracker
        except ImportError:
            raise MissingExtraError("trackers", "tracking", "track objects") from None
        self._detections = supervision.Detections
        self._make = ByteTrackTracker
        self._options: dict[str, Any] = {
            # in frames of 30 a second, whatever the frame rate
            "lost_track_buffer": round(lost_s * 30),
            "frame_rate": fps,
            "track_activation_threshold": score,
            "high_conf_det_threshold": score,
            "minimum_consecutive_frames": min_frames,
            "minimum_iou_threshold": min_iou,
        }
        self.fps = fps
        self._cameras: dict[str, _Camera] = {}

    def update(self, detections: Detections, frame: Frame) -> Detections:
        """The same detections with `ids`, in the same order.

        State begins anew where `frame.epoch` changes or time goes back; ids are never used again.
        """
        camera = frame.camera or frame.source
        seconds = frame.seq / self.fps if frame.clock == "none" else frame.pts_ns / 1e9
        state = self._cameras.get(camera)
        if state is None or state.epoch != frame.epoch or seconds < state.seconds:
            first = 0 if state is None else state.highest + 1
            state = _Camera(self._make(**self._options), frame.epoch, seconds, -math.inf, first, first - 1)
            self._cameras[camera] = state
        state.seconds, state.told = seconds, max(seconds, state.told + 1e-6)
        given = self._detections(
            xyxy=detections.boxes.astype(np.float64),
            confidence=detections.scores.astype(np.float64),
            class_id=detections.classes.astype(int),
            data={"index": np.arange(len(detections))},
        )
        # they come back in another order
        found = state.tracker.update(given, timestamp=state.told)
        ids = np.full(len(detections), -1, np.int32)
        if len(found):
            known = found.tracker_id >= 0
            ids[found.data["index"][known]] = found.tracker_id[known] + state.first
        state.highest = max(state.highest, int(ids.max(initial=-1)))
        return dataclasses.replace(detections, ids=ids)
