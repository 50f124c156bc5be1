"""What one frame of a stream gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from edgekit.tasks.video.events import Edge

UNKNOWN = -1
"""In a history: no answer, as time broke there."""


@dataclass(frozen=True)
class History:
    """The last seconds of a stream, for people.

    answers: (taken_ns, class) where the answer changed, oldest first; each holds until the next, the last until
    `until_ns`. UNKNOWN where nothing was seen. edges: of the events in that time.
    """

    seconds: float
    until_ns: int
    answers: tuple[tuple[int, int], ...] = ()
    edges: tuple[Edge, ...] = ()


@dataclass(frozen=True)
class VideoResult:
    """The answer at one frame.

    classes: [k] int32, the best k classes, best first; scores: [k] float32, 0..1, smoothed.
    all_scores: [C] float32, smoothed, of every class in the network's order. raw_scores: [C] float32, of this
    frame alone (the network remembers; the windows do not count). logits: [C] float32, the network's output.

    answer: the class that holds, after masks, merging and votes; background: the class that means that nothing
    happens, UNKNOWN where there is none. edges: events that began or ended, known since this
    frame. event: the start of the one that goes on.

    taken_ns: when the frame was taken; without time, steps of the nominal length from the first call.
    steps: runs of the network for this frame. 0 = it came before its step was due: the answer before it still
    holds. missed: nominal steps since the frame before that were not run. reset: why the network's state
    began anew at this frame, "" where it did not.
    """

    task: ClassVar[str] = "video"

    classes: np.ndarray
    scores: np.ndarray
    all_scores: np.ndarray
    raw_scores: np.ndarray
    logits: np.ndarray
    answer: int
    labels: tuple[str, ...]
    background: int = UNKNOWN
    taken_ns: int = 0
    steps: int = 1
    missed: int = 0
    reset: str = ""
    edges: tuple[Edge, ...] = ()
    event: Edge | None = None
    history: History = field(default_factory=lambda: History(0.0, 0), repr=False)

    def __len__(self) -> int:
        """Events that began, known since this frame: over a stream they add up to its events."""
        return sum(edge.kind == "start" for edge in self.edges)

    def best(self) -> list[tuple[int, float, str]]:
        """(class, score, label) of the best k, best first."""
        return [
            (int(c), float(s), self.label(int(c))) for c, s in zip(self.classes, self.scores, strict=True)
        ]

    def events(self) -> list[tuple[int, str, int, int | None]]:
        """(class, label, start, end) of the events in the history, nanoseconds; end None of the one that goes
        on. Where one began before the history, start is the history's begin."""
        begin = self.history.until_ns - round(self.history.seconds * 1e9)
        found: list[tuple[int, str, int, int | None]] = []
        started: dict[int, int] = {}
        for edge in self.history.edges:
            if edge.kind == "start":
                started[edge.number] = edge.taken_ns
            else:
                found.append((edge.cls, edge.label, started.pop(edge.number, begin), edge.taken_ns))
        if self.event is not None:
            found.append((self.event.cls, self.event.label, max(begin, self.event.taken_ns), None))
        return found

    def label(self, cls: int) -> str:
        return self.labels[cls] if 0 <= cls < len(self.labels) else str(cls)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts: answer; classes, scores (smoothed), raw_scores, labels of the best k; steps,
        missed, reset; taken_ns; edges; event (what goes on, or null)."""
        return {
            "answer": self.label(self.answer),
            "classes": [int(c) for c in self.classes],
            "scores": [round(float(s), 6) for s in self.scores],
            "raw_scores": [round(float(self.raw_scores[c]), 6) for c in self.classes],
            "labels": [self.label(int(c)) for c in self.classes],
            "taken_ns": self.taken_ns,
            "steps": self.steps,
            "missed": self.missed,
            "reset": self.reset,
            "edges": [edge.to_json() for edge in self.edges],
            "event": None if self.event is None else self.event.to_json(),
        }

    def draw(self, image: np.ndarray) -> np.ndarray:
        """A copy of `image`, uint8 BGR [H, W, 3], with the answer and its history on it (see tasks.video.draw)."""
        from edgekit.tasks.video.draw import draw

        return draw(image, self)

    def caption(self) -> str:
        """The answer and its score, and the event that goes on."""
        text = f"{self.label(self.answer)} {float(self.all_scores[self.answer]):.0%}"
        if self.event is not None:
            seconds = (self.taken_ns - self.event.taken_ns) / 1e9
            text += f", event {self.event.label} for {max(0.0, seconds):.1f} s"
        return text
