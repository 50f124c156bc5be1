"""A frame in, an answer out: state, time, policies, results and what is drawn of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekit
from edgekit.errors import BundleError, StreamError, UsageError
from edgekit.spec import DType, StateSpec
from edgekit.tasks.video.agreement import agreement
from edgekit.tasks.video.pipeline import VideoPipeline
from edgekit.tasks.video.result import UNKNOWN
from edgekit.tasks.video.spec import EventRule, Smoothing
from edgekit.timebase import StateClock, stepping
from tests import state_bundles, video_bundles
from tests.video_bundles import LABELS, Script, picture, spec

MS = 1_000_000


def one_hot(cls: int, high: float = 9.0) -> np.ndarray:
    row = np.zeros(len(LABELS))
    row[cls] = high
    return row


def opened(classes: list[int] | None = None, **fields: Any) -> tuple[VideoPipeline, Script]:
    """Trained for 100 ms a step; its runs answer `classes`, one after the other, or always 1."""
    session = Script(lambda run: one_hot(1 if classes is None else classes[run]))
    return VideoPipeline(spec(**{"dt_s": 0.1, "reset_after_s": 0.5} | fields), session), session


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return video_bundles.write(tmp_path_factory.mktemp("video") / "watch.edge")


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


def floats(images: np.ndarray) -> np.ndarray:
    """As RULE prepares them: [N, 1, 3, H, W]."""
    return np.ascontiguousarray((images.astype(np.float32) / 255).transpose(0, 3, 1, 2)[:, None])


def test_a_stream_of_frames_is_the_networks_recurrence(bundle: Path) -> None:
    images = frames(9)
    wanted = state_bundles.reference(state_bundles.shifted(), floats(images))
    with edgekit.load(bundle) as engine:
        pipeline = engine.pipeline()
        for i, (image, want) in enumerate(zip(images, wanted, strict=True)):
            result = pipeline(image, taken_ns=i * 100 * MS)
            np.testing.assert_allclose(result.logits, want["logits"].reshape(-1), atol=1e-5)
            e = np.exp(want["logits"].reshape(-1) - want["logits"].max())
            np.testing.assert_allclose(result.raw_scores, e / e.sum(), atol=1e-5)
            assert (result.steps, result.missed, result.reset) == (1, 0, "")
            assert result.taken_ns == i * 100 * MS


def test_after_a_reset_the_network_has_seen_nothing(bundle: Path) -> None:
    images = frames(4)
    with edgekit.load(bundle) as engine:
        pipeline, fresh = engine.pipeline(), engine.pipeline()
        for image in images:
            pipeline(image)
        pipeline.reset()
        assert pipeline(images[2]).logits.tobytes() == fresh(images[2]).logits.tobytes()
        # a break of time does the same, and says why
        broken = pipeline(images[3], taken_ns=0)
        late = pipeline(images[2], taken_ns=501 * MS)
        assert (broken.reset, late.reset) == ("", "a gap of 0.501 s, over 0.5 s")
        other = engine.pipeline()(images[2])
        assert late.logits.tobytes() == other.logits.tobytes()
        assert pipeline(images[0], taken_ns=600 * MS, epoch=1).reset == "epoch 0 ended"
        assert pipeline(images[0], taken_ns=500 * MS, epoch=1).reset == "the clock went back 0.100 s"


def test_an_engine_has_a_pipeline_with_state_for_every_thread_and_predict_is_told_the_time(
    bundle: Path,
) -> None:
    images = frames(3)
    with edgekit.load(bundle) as engine:
        pipeline = engine.pipeline()
        for i, image in enumerate(images):
            a = engine.predict(image, taken_ns=i * 100 * MS)
            b = pipeline(image, taken_ns=i * 100 * MS)
            assert a.logits.tobytes() == b.logits.tobytes()
        assert engine.predict(images[0], taken_ns=10**10).reset


def test_an_early_frame_holds_the_answer() -> None:
    pipeline, session = opened([1, 2, 3])
    first = pipeline(picture(10), taken_ns=0)
    early = pipeline(picture(20), taken_ns=33 * MS)
    assert (early.steps, session.runs) == (0, 1)
    assert early.taken_ns == 33 * MS and early.answer == first.answer and early.logits is first.logits
    assert pipeline.stage_ns[:2] == (0, 0), "nothing is prepared for a run that is not made"
    due = pipeline(picture(30), taken_ns=66 * MS)
    assert (due.steps, due.answer, session.runs) == (1, 2, 2)
    assert (session.seen[1] == np.float32(30) / np.float32(255)).all()


@settings(deadline=None)
@given(
    st.sampled_from(["plain", "hold", "resample", "reset"]),
    st.lists(st.integers(0, 450), min_size=1, max_size=40),
)
def test_runs_and_resets_are_those_of_the_policy(policy: str, gaps: list[int]) -> None:
    pipeline, session = opened(stepping=policy)
    clock, now = StateClock(0.1, 0.5), 0
    for gap in gaps:
        now += gap * MS
        runs, resets = session.runs, session.resets
        result = pipeline(picture(), taken_ns=now)
        advance = clock.advance(now)
        want = stepping(policy, advance)  # type: ignore[arg-type]
        assert (result.steps, session.runs - runs) == (want.runs, want.runs)
        assert (session.resets - resets, bool(result.reset)) == (int(want.reset), want.reset)
        assert result.missed == max(0, advance.steps - want.runs)


def test_missed_steps_are_run_with_what_the_spec_says() -> None:
    inputs: dict[str, list[int]] = {}
    for fill in ("this", "last", "blend"):
        pipeline, session = opened(fill=fill)
        pipeline(picture(40), taken_ns=0)
        assert pipeline(picture(100), taken_ns=300 * MS).steps == 3
        pipeline(picture(160), taken_ns=400 * MS)
        inputs[fill] = [round(float(seen.mean()) * 255) for seen in session.seen]
    assert inputs == {
        "this": [40, 100, 100, 100, 160],
        "last": [40, 40, 40, 100, 160],
        "blend": [40, 60, 80, 100, 160],
    }


def test_a_run_that_fails_leaves_no_mixture_behind() -> None:
    pipeline, session = opened(fill="blend", reset_after_s=5.0)
    run = session.run

    def fails() -> None:
        run()
        session.run = run  # type: ignore[method-assign]
        raise StreamError("engine: out of memory")

    pipeline(picture(40), taken_ns=0)
    session.run = fails  # type: ignore[method-assign]
    with pytest.raises(StreamError):
        pipeline(picture(100), taken_ns=300 * MS)
    pipeline(picture(160), taken_ns=400 * MS)
    levels = [round(float(seen.mean()) * 255) for seen in session.seen]
    assert levels == [40, 60, 115, 130, 145, 160], "from 100, the frame that was there last"


def test_a_reset_for_missed_steps_is_the_networks_own() -> None:
    pipeline, session = opened(stepping="reset", smoothing=Smoothing(3), events=EventRule(min_on=1))
    pipeline(picture(), taken_ns=0)
    result = pipeline(picture(), taken_ns=200 * MS)
    assert (result.reset, session.resets, result.missed) == ("1 steps missed", 1, 1)
    assert result.event is not None, "the event goes on"


def test_events_carry_the_time_of_the_frame_where_they_began() -> None:
    pipeline, _ = opened([0, 1, 1, 1, 0, 0, 0])
    results = [pipeline(picture(), taken_ns=5 + i * 100 * MS) for i in range(7)]
    edges = [(i, e.kind, e.label, e.taken_ns) for i, r in enumerate(results) for e in r.edges]
    assert edges == [(2, "start", "wave", 5 + 100 * MS), (5, "end", "wave", 5 + 400 * MS)]
    assert [r.event is not None for r in results] == [False, False, True, True, True, False, False]
    assert [len(r) for r in results] == [0, 0, 1, 0, 0, 0, 0]
    assert results[3].caption().endswith("event wave for 0.2 s")


def test_a_break_of_time_ends_the_event_and_the_windows() -> None:
    pipeline, _ = opened([1, 1, 1, 2, 2], smoothing=Smoothing(window=5))
    for i in range(3):
        pipeline(picture(), taken_ns=i * 100 * MS)
    after = pipeline(picture(), taken_ns=10_000 * MS)
    (end,) = after.edges
    assert (end.kind, end.taken_ns, end.reason) == ("end", 200 * MS, "a gap of 9.800 s, over 0.5 s")
    assert after.answer == 2, "the window holds nothing from before"
    assert after.event is None
    assert after.history.answers[-2:] == ((200 * MS, UNKNOWN), (10_000 * MS, 2))
    pipeline(picture(), taken_ns=10_100 * MS)
    pipeline.reset()
    pipeline.session.logits = lambda run: one_hot(0)  # type: ignore[attr-defined]
    again = pipeline(picture(), taken_ns=77)
    assert [(e.kind, e.reason) for e in again.edges] == [("end", "reset by the program")]


def test_calls_without_time_are_nominal_steps() -> None:
    pipeline, session = opened()
    taken = [pipeline(picture()).taken_ns for _ in range(4)]
    assert taken == [0, 100 * MS, 200 * MS, 300 * MS]
    assert (session.runs, session.resets) == (4, 0)
    assert pipeline(picture(), taken_ns=10**15).reset == "", "a clock that begins breaks nothing"
    pipeline(picture())
    assert pipeline(picture(), taken_ns=5).reset == "", "nor one that begins again"


def test_an_event_ends_where_calls_with_an_earlier_time_follow_those_without() -> None:
    pipeline, session = opened([0, 1, 1, 0, 0, 0])
    results = [pipeline(picture()) for _ in range(3)]
    assert results[2].event is not None and results[2].event.taken_ns == 100 * MS
    results += [pipeline(picture(), taken_ns=i * 10 * MS) for i in range(3)]
    edges = [(e.kind, e.taken_ns, e.reason) for r in results for e in r.edges]
    assert edges == [("start", 100 * MS, ""), ("end", 200 * MS, "the clock went back 0.200 s")]
    assert session.resets == 0 and results[3].reset == ""


@settings(deadline=None, max_examples=200)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from((0, 1, 1, 2)), st.none() | st.integers(0, 20), st.integers(0, 1)),
        max_size=25,
    )
)
def test_no_event_ends_before_it_began(calls: list[tuple[int, int | None, int]]) -> None:
    """Whatever times the calls have, or none."""
    pipeline, session = opened()
    open_since: int | None = None
    for cls, step, epoch in calls:
        session.logits = lambda run, cls=cls: one_hot(cls)
        taken_ns = None if step is None else step * 50 * MS
        for edge in pipeline(picture(), taken_ns=taken_ns, epoch=epoch).edges:
            assert (edge.kind == "end") == (open_since is not None)
            assert open_since is None or edge.taken_ns >= open_since
            open_since = edge.taken_ns if edge.kind == "start" else None


def test_a_network_without_a_nominal_step_runs_once_a_frame() -> None:
    pipeline, session = opened(dt_s=None, reset_after_s=None)
    for i in range(5):
        assert pipeline(picture(), taken_ns=i * i * 10**9).steps == 1
    assert (session.runs, session.resets) == (5, 0)


def test_the_clock_is_that_of_the_states_and_the_spec() -> None:
    session = Script(lambda run: one_hot(1))
    state = StateSpec("s", DType.float32, (1,), "s", "s_next", nominal_dt_s=0.1, reset_after_s=0.3)
    session.state_specs = (state,)  # type: ignore[attr-defined]
    pipeline = VideoPipeline(spec(reset_after_s=2.0), session)
    pipeline(picture(), taken_ns=0)
    assert pipeline(picture(), taken_ns=301 * MS).reset
    with pytest.raises(BundleError, match="different steps"):
        VideoPipeline(spec(dt_s=0.2), session)


def test_top_k_and_threshold_choose_what_is_listed() -> None:
    pipeline, _ = opened()
    result = pipeline(picture(), top_k=2)
    assert result.classes.tolist() == [1, 0]
    assert pipeline(picture(), score_threshold=0.5).classes.tolist() == [1]
    low = pipeline(picture(), score_threshold=1.0)
    assert low.classes.size == 0 and low.answer == 1


def test_a_result_is_plain_json() -> None:
    pipeline, _ = opened(smoothing=Smoothing(2))
    pipeline(picture(), taken_ns=0)
    values = pipeline(picture(), taken_ns=200 * MS).to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["answer"] == "wave" and values["labels"][0] == "wave"
    assert values["steps"] == 2 and values["missed"] == 0
    assert values["edges"][0]["kind"] == "start" and values["event"]["label"] == "wave"
    assert len(values["raw_scores"]) == len(values["scores"]) == 5


def test_the_history_is_bounded_and_in_order() -> None:
    pipeline, _ = opened([i // 3 % 2 + 1 for i in range(400)], reset_after_s=None)
    for i in range(400):
        result = pipeline(picture(), taken_ns=i * 100 * MS)
        times = [ns for ns, _ in result.history.answers]
        assert times == sorted(times)
        assert all(ns > result.taken_ns - 10_000 * MS for ns in times[1:])
        assert all(e.taken_ns >= result.taken_ns - 10_000 * MS for e in result.history.edges)
    assert 30 <= len(times) <= 36
    spans = result.events()
    assert spans[-1][3] is None and all(end is not None for *_, end in spans[:-1])
    assert all(a[3] is not None and a[3] <= b[2] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("size", [(64, 48), (640, 360), (3, 3), (1200, 20)])
def test_it_is_drawn_on_pictures_of_any_size(size: tuple[int, int]) -> None:
    pipeline, _ = opened([0, 1, 1, 1, 0, 0, 2, 2, 2])
    for i in range(9):
        result = pipeline(picture(), taken_ns=i * 100 * MS)
    image = np.full((size[1], size[0], 3), 90, np.uint8)
    drawn = result.draw(image)
    factor = drawn.shape[1] // size[0]
    assert drawn.shape == (size[1] * factor, size[0] * factor, 3) and drawn.shape[1] >= 320
    assert (image == 90).all() and not (drawn == 90).all()
    for bad in (image[..., 0], image.astype(np.float32), image[:0]):
        with pytest.raises(ValueError, match="uint8 picture"):
            result.draw(bad)


def test_the_strip_shows_when_events_were() -> None:
    """At 10 s over 1000 pixels a frame is 10 pixels: an event from 6 to 8 s ago is 200 pixels wide."""
    from edgekit.tasks.detect.draw import class_color

    pipeline, _ = opened([2] * 20 + [0] * 61, reset_after_s=None)
    for i in range(81):
        result = pipeline(picture(), taken_ns=i * 100 * MS)
    drawn = result.draw(np.zeros((400, 1000, 3), np.uint8))
    columns = np.flatnonzero((drawn[-8] == class_color(2)).all(axis=1))
    assert abs(columns.min() - 200) <= 3 and abs(columns.max() - 400) <= 3
    nothing = np.flatnonzero((drawn[-8] == (155, 148, 141)).all(axis=1))
    assert abs(nothing.min() - 400) <= 3 and nothing.max() >= 996
    assert not drawn[-8, :195].any(), "before the first frame there is nothing"


def test_agreement_is_that_of_frames_alone() -> None:
    first, _ = opened([1, 1, 2], smoothing=Smoothing(window=3))
    second, _ = opened([1, 1, 3], smoothing=Smoothing(window=3))
    pairs = [(first(picture()), second(picture())) for _ in range(3)]
    assert pairs[2][0].answer == pairs[2][1].answer == 1, "the windows hide it"
    found = agreement(pairs)
    assert (found["unit"], found["answers_reference"], found["answers_matched"]) == ("answers", 3, 2)


def test_what_does_not_fit_is_found_when_it_is_opened(bundle: Path) -> None:
    with pytest.raises(BundleError, match="expected 5 values in output 'x', got nothing"):
        VideoPipeline(spec(output="x"), Script([]))
    with pytest.raises(BundleError, match="expected 4 values"):
        VideoPipeline(spec(labels=LABELS[:4]), Script([]))
    session = Script([])
    session.inputs = {"a": session.inputs["image"], "b": session.inputs["image"]}
    with pytest.raises(BundleError, match="one input beside its states, got 2"):
        VideoPipeline(spec(), session)
    with edgekit.load(bundle) as engine:
        with pytest.raises(UsageError, match="uint8"):
            engine.pipeline()(np.zeros((4, 4), np.float32))
        with pytest.raises(UsageError, match="stepping 'fast': unknown"):
            engine.pipeline(stepping="fast")  # type: ignore[arg-type]


def test_stepping_means_nothing_to_a_network_without_state(host_bundle: str) -> None:
    with edgekit.load(host_bundle) as engine, pytest.raises(UsageError, match="keeps no state"):
        engine.pipeline(stepping="hold")


def test_another_pipeline_goes_on_with_the_last_frame_where_it_can_read_it() -> None:
    old, _ = opened()
    old(picture(40), taken_ns=0)
    for fields, filled in (
        ({}, 40),
        ({"preprocess": dataclasses.replace(video_bundles.RULE, color="rgb")}, 100),
    ):
        new, session = opened(**fields)
        new.take_over(old)
        assert new(picture(100), taken_ns=200 * MS).steps == 2
        assert [round(float(seen.mean()) * 255) for seen in session.seen] == [filled, 100]


def test_a_frame_that_fails_counts_as_one_that_never_came() -> None:
    failing = {0, 3}
    session = Script(lambda run: one_hot(1))
    run, calls = session.run, itertools.count()

    def may_fail() -> None:
        if next(calls) in failing:
            raise StreamError("engine: out of memory")
        run()

    session.run = may_fail  # type: ignore[method-assign]
    pipeline = VideoPipeline(spec(dt_s=0.1, reset_after_s=0.5), session)
    with pytest.raises(StreamError):
        pipeline(picture(), taken_ns=0)
    first = pipeline(picture(), taken_ns=10 * MS)  # would be too early, had the other one counted
    assert (first.steps, first.answer, first.taken_ns) == (1, 1, 10 * MS)
    assert pipeline(picture(), taken_ns=110 * MS).steps == 1
    with pytest.raises(StreamError):
        pipeline(picture(), taken_ns=210 * MS)
    again = pipeline(picture(), taken_ns=310 * MS)
    assert (again.steps, again.missed) == (2, 0), "the step of the frame that failed is made up"
    with pytest.raises(UsageError, match="unusable size"):
        pipeline(np.zeros((1, 100_000, 3), np.uint8), taken_ns=410 * MS, epoch=1)
    broken = pipeline(picture(), taken_ns=420 * MS, epoch=1)
    assert broken.reset == "epoch 0 ended", "and the break that it came with is not forgotten"
