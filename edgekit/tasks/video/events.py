"""Events out of answers: a label begins when it holds, and ends when it no longer does (spec.EventRule)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgekit.tasks.video.spec import EventRule


@dataclass(frozen=True)
class Edge:
    """The beginning or the end of an event.

    number: counts events from 0; both edges of one have the same.  taken_ns: of the frame where the label began
    to hold, or no longer did; a reset ends it at the last frame before. That is known only `min_on` (`min_off`) steps
    later, when the edge is reported.  score: the highest that the label had so far.
    reason: of an end by a reset, in words; else "".
    """

    kind: Literal["start", "end"]
    number: int
    cls: int
    label: str
    taken_ns: int
    score: float
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "kind": self.kind,
            "event": self.number,
            "label": self.label,
            "taken_ns": self.taken_ns,
            "score": round(self.score, 6),
        }
        return values | ({"reason": self.reason} if self.reason else {})


class EventTracker:
    """One stream's events: at most one at a time, so edges alternate between start and end and never overlap.

    open: the edge that began the event that goes on, None when there is none.
    """

    def __init__(self, rule: EventRule, labels: tuple[str, ...], background: str = "") -> None:
        self._rule = rule
        self._labels = labels
        self._nothing = labels.index(background) if background else -1
        self._number = 0
        self._last_ns = 0
        self.open: Edge | None = None
        self._peak = 0.0
        self._missing, self._missing_ns = 0, 0
        """Steps in a row where the open event did not hold, and the first one's time."""
        self._next: int | None = None
        self._held, self._held_ns, self._held_peak = 0, 0, 0.0
        """The class that may become the next event, for how many steps in a row, since when."""

    def step(self, answer: int, scores: np.ndarray, taken_ns: int) -> list[Edge]:
        """One step of the network. scores: [C], 0..1. Returns: the edges that are certain now, in order of time.

        `taken_ns` must not go back between two resets.
        """
        self._last_ns = taken_ns
        rule = self._rule
        score = float(scores[answer])
        on = answer != self._nothing and score >= rule.on  # not so where the score is no number
        edges: list[Edge] = []
        if self.open is not None:
            own = float(scores[self.open.cls])
            if own >= rule.off and not (on and answer != self.open.cls):
                self._missing = 0
                self._peak = max(self._peak, own)
                on = False  # none can begin while this one holds
            else:
                if self._missing == 0:
                    self._missing_ns = taken_ns
                self._missing += 1
        if not on:
            self._next = None
        elif self._next == answer:
            self._held += 1
            self._held_peak = max(self._held_peak, score)
        else:
            self._next, self._held, self._held_ns, self._held_peak = answer, 1, taken_ns, score
        begins = self._next is not None and self._held >= rule.min_on
        if self.open is not None and self._missing and (begins or self._missing >= rule.min_off):
            edges.append(self._end(self._missing_ns))
        if begins:
            assert self._next is not None and self.open is None
            self.open = self._edge("start", self._next, self._held_ns, self._held_peak)
            self._peak, self._next = self._held_peak, None
            edges.append(self.open)
        return edges

    def reset(self, reason: str) -> list[Edge]:
        """Time broke: the open event ends at the last step before. Returns: its end, if there is one."""
        self._next = None
        return [self._end(self._missing_ns if self._missing else self._last_ns, reason)] if self.open else []

    def follow(self, other: EventTracker, reason: str) -> list[Edge]:
        """Number events on from `other`, which stays as it is. Returns: the end of its open event, if there is one."""
        before = copy.copy(other)
        edges = before.reset(reason)
        self._number = before._number
        return edges

    def _end(self, taken_ns: int, reason: str = "") -> Edge:
        assert self.open is not None
        edge = self._edge("end", self.open.cls, taken_ns, self._peak, reason)
        self.open, self._missing = None, 0
        self._number += 1
        return edge

    def _edge(
        self, kind: Literal["start", "end"], cls: int, taken_ns: int, score: float, reason: str = ""
    ) -> Edge:
        return Edge(kind, self._number, cls, self._labels[cls], taken_ns, score, reason)
