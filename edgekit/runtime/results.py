"""What a stream gives for one frame: the task's result, the frame it belongs to, and how old it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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

    The frame is leased: it is valid until the stream gives the next result. Call `frame.share()` or
    `frame.detach()` to hold on to it.
    """

    frame: Frame
    result: Any
    age_ns: int
    stage_ns: Mapping[str, int] = field(default_factory=dict)
    engine: str = ""
    hops: tuple[Hop, ...] = ()

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
        return StreamResult(
            self.frame.share(), self.result, self.age_ns, self.stage_ns, self.engine, self.hops
        )
