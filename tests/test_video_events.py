"""Events: their edges alternate, never overlap, are in order of time, and end where time breaks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgekit.tasks.video.events import Edge, EventTracker
from edgekit.tasks.video.spec import EventRule
from tests.video_bundles import LABELS

NOTHING, WAVE, PUSH = 0, 1, 2
RULES = st.builds(
    lambda low, high, on, off: EventRule(max(low, high), min(low, high), on, off),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 4),
    st.integers(1, 4),
)
STEP = st.tuples(
    st.integers(0, len(LABELS) - 1),
    st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5),
    st.integers(0, 3),
)
STEPS = st.lists(st.one_of(STEP, st.just(None)), max_size=80)
"""(answer, scores, time since the step before), or None: time broke."""


def play(tracker: EventTracker, steps: list[tuple[int, list[float], int] | None]) -> list[tuple[int, Edge]]:
    """(number of the step, edge)"""
    found: list[tuple[int, Edge]] = []
    now = 0
    for i, step in enumerate(steps):
        if step is None:
            found += [(i, edge) for edge in tracker.reset("cable")]
            assert tracker.open is None
            continue
        answer, scores, later = step
        now += later
        found += [(i, edge) for edge in tracker.step(answer, np.array(scores, np.float32), now)]
    return found


def held(tracker: EventTracker, rows: list[tuple[int, float]]) -> list[tuple[int, str, str, int]]:
    """Edges of (class, its score) per step; the other classes share the rest. Times are the step's number."""
    found = []
    for i, (cls, score) in enumerate(rows):
        scores = np.full(5, (1 - score) / 4, np.float32)
        scores[cls] = score
        found += [(i, e.kind, e.label, e.taken_ns) for e in tracker.step(cls, scores, i)]
    return found


@given(RULES, STEPS, st.sampled_from(["", "nothing"]))
def test_edges_alternate_never_overlap_and_are_in_order(
    rule: EventRule, steps: list[tuple[int, list[float], int] | None], background: str
) -> None:
    tracker = EventTracker(rule, LABELS, background)
    edges = [edge for _, edge in play(tracker, steps)]
    assert [e.kind for e in edges] == ["start", "end"] * (len(edges) // 2) + ["start"] * (len(edges) % 2)
    assert [e.taken_ns for e in edges] == sorted(e.taken_ns for e in edges)
    assert [e.number for e in edges] == [i // 2 for i in range(len(edges))]
    for start, end in zip(edges[::2], edges[1::2], strict=False):
        assert (start.cls, start.label) == (end.cls, end.label) == (end.cls, LABELS[end.cls])
        assert end.score >= start.score >= rule.on
    assert all(e.label != background for e in edges)
    assert (tracker.open is not None) == (len(edges) % 2 == 1)


@given(RULES, STEPS)
def test_an_event_begins_exactly_where_its_label_was_on_for_long_enough(
    rule: EventRule, steps: list[tuple[int, list[float], int] | None]
) -> None:
    found = play(EventTracker(rule, LABELS, "nothing"), steps)
    for at, edge in found:
        if edge.kind == "start":
            part = steps[at - rule.min_on + 1 : at + 1]
            assert len(part) == rule.min_on
            for step in part:
                assert (
                    step is not None
                    and step[0] == edge.cls
                    and float(np.float32(step[1][edge.cls])) >= rule.on
                )
    # and none is missed: a label that is on long enough is an event, whatever was before
    open_cls = None
    starts = {at: edge.cls for at, edge in found if edge.kind == "start"}
    run: list[int] = []
    for i, step in enumerate(steps):
        if step is None:
            open_cls, run = None, []
            continue
        on = step[0] != NOTHING and float(np.float32(step[1][step[0]])) >= rule.on
        run = [*run, step[0]] if on and (not run or run[-1] == step[0]) else ([step[0]] if on else [])
        open_cls = starts.get(i, open_cls)
        if len(run) >= rule.min_on:
            assert open_cls == run[-1]


def test_a_label_begins_when_it_holds_and_ends_when_it_does_not() -> None:
    rule = EventRule(on=0.6, off=0.4, min_on=3, min_off=2)
    rows = [(NOTHING, 0.9), (WAVE, 0.7), (WAVE, 0.8), (NOTHING, 0.9), (WAVE, 0.7), (WAVE, 0.7), (WAVE, 0.9)]
    rows += [(WAVE, 0.45), (WAVE, 0.3), (WAVE, 0.5), (NOTHING, 0.9), (NOTHING, 0.9), (NOTHING, 0.9)]
    # two steps are too few; 0.45 is not on, but not off either; one step off is too few
    assert held(EventTracker(rule, LABELS, "nothing"), rows) == [
        (6, "start", "wave", 4),
        (11, "end", "wave", 10),
    ]


def test_another_label_ends_an_event_where_it_begins() -> None:
    rule = EventRule(on=0.5, off=0.1, min_on=2, min_off=5)
    rows = [(WAVE, 0.9), (WAVE, 0.9), (PUSH, 0.5), (PUSH, 0.5), (PUSH, 0.9)]
    assert held(EventTracker(rule, LABELS, "nothing"), rows) == [
        (1, "start", "wave", 0),
        (3, "end", "wave", 2),
        (3, "start", "push", 2),
    ]


def test_a_reset_ends_the_event_at_the_last_step_that_was_seen() -> None:
    tracker = EventTracker(EventRule(min_on=1, min_off=3), LABELS, "nothing")
    assert held(tracker, [(WAVE, 0.9), (WAVE, 0.95)]) == [(0, "start", "wave", 0)]
    (end,) = tracker.reset("a gap of 3.000 s, over 0.5 s")
    assert (end.kind, end.taken_ns, end.reason) == ("end", 1, "a gap of 3.000 s, over 0.5 s")
    assert abs(end.score - 0.95) < 1e-6
    assert end.to_json() == {
        "kind": "end", "event": 0, "label": "wave", "taken_ns": 1, "score": round(end.score, 6),
        "reason": "a gap of 3.000 s, over 0.5 s",
    }  # fmt: skip
    assert tracker.reset("again") == []
    # what was on before a break does not count after it
    tracker = EventTracker(EventRule(min_on=2), LABELS, "nothing")
    held(tracker, [(WAVE, 0.9)])
    tracker.reset("cable")
    assert held(tracker, [(WAVE, 0.9)]) == []


def test_scores_that_are_no_numbers_begin_nothing() -> None:
    tracker = EventTracker(EventRule(min_on=1), LABELS, "nothing")
    assert tracker.step(WAVE, np.full(5, np.nan, np.float32), 0) == []
