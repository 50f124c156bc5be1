"""What a stream gives for one frame: the task's result, the frame it belongs to, and how old it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgekit.runtime.frames import Frame, Hop


@dataclass(eq=False)
class StreamResult:
    """One frame's result.

    result: the task's own (Detections, Classification).
    age_ns: from `frame.taken_ns` to when the result was there, nanoseconds.
    stage_ns: where that time went, nanoseconds by stage, in order: `transport` (taken -> in our hands),
        `wait` (in our hands -> taken up by the engine's thread), then the pipeline's own
        (`preprocess`, `engine`, `decode`). What the stages do not explain is `unaccounted_ns`.
    engine: name of the engine where a stream has several.
    hops: the copy ledger of the whole way.
    ages: of a rig: how old each sensor's part was when the result was there, nanoseconds.
    missing: of a rig: sensors that the result was made without, and why (`sync.Why`; `absent`: the frame came so).

    Of a rig whose sensors come one by one, `frame.rig` is the moment, and the age counts from its sweep (without LiDAR:
    from the picture of the camera that paces). Stages: `transport` (of that), `match` (until the last part had come,
    or waiting ended), `wait`, `cameras` (their networks, as far as they ran after that), then the pipeline's.

    The frame is leased: it is valid until the stream gives the next result. Call `frame.share()` or
    `frame.detach()` to hold on to it.
    """

    frame: Frame
    result: Any
    age_ns: int
    stage_ns: Mapping[str, int] = field(default_factory=dict)
    engine: str = ""
    hops: tuple[Hop, ...] = ()
    ages: Mapping[str, int] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def oldest_ns(self) -> int:
        """Age of the oldest part that the result is made of."""
        return max(self.ages.values(), default=self.age_ns)

    @property
    def age_ms(self) -> float:
        return self.age_ns / 1e6

    @property
    def unaccounted_ns(self) -> int:
        """Wall time that no stage claims: the check that nothing is left out."""
        return self.age_ns - sum(self.stage_ns.values())

    @property
    def camera(self) -> str:
        return self.frame.camera

    def share(self) -> StreamResult:
        """The same result with a lease of its own."""
        return replace(self, frame=self.frame.share())
