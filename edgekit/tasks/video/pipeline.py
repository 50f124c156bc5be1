"""Frame in, answer out: preprocessing, state, smoothing and events around a session that sees one frame a run."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import deque

import numpy as np

from edgekit.errors import BundleError
from edgekit.manifest import Manifest
from edgekit.pixels import Pixels, as_pixels
from edgekit.tasks import Runnable, spec_in
from edgekit.tasks.classes import best, check_output
from edgekit.tasks.picture_input import PictureInput, only_input
from edgekit.tasks.video.events import Edge, EventTracker
from edgekit.tasks.video.result import UNKNOWN, History, VideoResult
from edgekit.tasks.video.smoothing import Smoother
from edgekit.tasks.video.spec import VideoSpec
from edgekit.timebase import Advance, StateClock, Stepping, stepping

HISTORY_S = 10.0
"""Seconds that a result's history goes back."""
_PARTS = 2000
"""Answers and edges of a history at most: a camera that flickers at its full rate fills no memory."""
_SWAPPED = "another bundle took over"
_NO_STEP_NS = 100_000_000
"""Time that a call without `taken_ns` takes where no nominal step is known."""


def read_spec(manifest: Manifest) -> VideoSpec:
    """The spec in a manifest. Raises: BundleError when it is not one."""
    return spec_in(manifest, VideoSpec)


class VideoPipeline:
    """One stream's network: it remembers, so each camera has its own. Calling it with a frame gives a VideoResult.

    Raises: BundleError when `spec` does not fit the session's tensors.
    stage_ns: (preprocess, engine, decode) of the last call, nanoseconds of wall time.
    """

    def __init__(self, spec: VideoSpec, session: Runnable) -> None:
        array, quant = only_input(session, "a video network has one input beside its states")
        check_output(session, spec.output, len(spec.labels))
        self._input = PictureInput(spec.preprocess, array, quant)
        self.spec = spec
        self.session = session
        self.stage_ns = (0, 0, 0)
        self._holds_last = False
        """The input is the last frame that was run, and not another pipeline's or nothing."""
        self._clock = _clock(spec, session)
        self._dt_ns = _NO_STEP_NS if spec.dt_s is None else max(1, round(spec.dt_s * 1e9))
        self._smoother = Smoother(spec)
        self._background = spec.labels.index(spec.background) if spec.background else UNKNOWN
        self._events = EventTracker(spec.events, spec.labels, spec.background)
        self._now_ns = -self._dt_ns
        self._pending: list[Edge] = []
        self._result: VideoResult | None = None
        self._answers: deque[tuple[int, int]] = deque(maxlen=_PARTS)
        self._edges: deque[Edge] = deque(maxlen=_PARTS)

    def reset(self) -> None:
        """Forget what was seen: the next frame is the first of a stream. An open event's end comes with it.

        Raises: StreamError where state is on a device that fails.
        """
        self._clock.forget()
        self._begin_anew("reset by the program")

    def take_over(self, old: VideoPipeline) -> None:
        """Go on where `old` is, which stays as it was: its time and, where both name the same labels, its answers and
        events. The network's state is the session's affair. (Hot swap: runtime.swap.)"""
        if self.spec.labels != old.spec.labels or old._result is None:
            # the next frame is the first one, whenever it comes
            self._pending = [*old._pending, *self._events.follow(old._events, _SWAPPED)]
            self._now_ns = old._now_ns
            return
        self._clock.follow(old._clock)
        self._now_ns, self._result, self._pending = old._now_ns, old._result, list(old._pending)
        self._answers, self._edges = old._answers.copy(), old._edges.copy()
        rules = ("activation", "smoothing", "events", "background")
        if all(getattr(self.spec, name) == getattr(old.spec, name) for name in rules):
            self._smoother, self._events = copy.deepcopy(old._smoother), copy.deepcopy(old._events)
        else:
            self._pending += self._events.follow(old._events, _SWAPPED)
        mine, theirs = self._input.array, old._input.array
        alike = (theirs.shape, theirs.dtype) == (mine.shape, mine.dtype)
        if old._holds_last and alike and self.spec.preprocess == old.spec.preprocess:
            np.copyto(mine, theirs)
            self._input.forget()
            self._holds_last = True

    def __call__(
        self,
        image: np.ndarray | Pixels,
        *,
        score_threshold: float | None = None,
        taken_ns: int | None = None,
        epoch: int = 0,
        top_k: int | None = None,
    ) -> VideoResult:
        """The answer at a frame, uint8 [H, W, 3] in BGR order or Pixels of any format.

        taken_ns, epoch: of the frame (runtime.frames.Frame); without `taken_ns` a call is one nominal step.
        score_threshold, top_k: which classes are listed; by default the bundle's.
        Raises: UsageError for anything that is no such picture, StreamError when the engine fails.
        """
        pixels = as_pixels(image)
        start = time.perf_counter_ns()
        clock, now_ns = copy.copy(self._clock), self._now_ns
        step, missed, reason = self._advance(taken_ns, epoch)
        spent = 0
        if step.runs:
            try:
                outputs, spent = self._run(pixels, step)
            except BaseException:  # as if the frame had not come: its steps fall to the next one
                self._clock, self._now_ns = clock, now_ns
                raise
            ran = time.perf_counter_ns()
            result = self._take(outputs, score_threshold, top_k)
        else:
            ran = start
            assert self._result is not None, "the first frame is never too early"
            result = self._result
        edges, self._pending = tuple(self._pending), []
        result = dataclasses.replace(
            result,
            taken_ns=self._now_ns,
            steps=step.runs,
            missed=missed,
            reset=reason,
            edges=edges,
            event=self._events.open,
            history=self._history(result.answer, edges),
        )
        self._result = result
        self.stage_ns = (ran - start - spent, spent, time.perf_counter_ns() - ran)
        return result

    def _advance(self, taken_ns: int | None, epoch: int) -> tuple[Stepping, int, str]:
        """What the frame's time means: the runs, the steps that are left out, and why the state began anew, or ""."""
        if taken_ns is None:
            self._clock.forget()  # calls with a time may follow: they begin a base of their own
            advance, step = Advance("continue", 1), Stepping(False, (1.0,))
            self._now_ns += self._dt_ns
        else:
            advance = self._clock.advance(taken_ns, epoch)
            step = stepping(self.spec.stepping, advance)
            back = self._now_ns - taken_ns
            # a clock that begins after calls without a time breaks nothing, but an event cannot end before it began
            if advance.action == "continue" and back > 0:
                self._pending += self._events.reset(f"the clock went back {back / 1e9:.3f} s")
        missed = max(0, advance.steps - step.runs)
        reason = advance.reason
        if advance.action == "reset":
            self._begin_anew(reason)
        elif step.reset:  # the network's own memory only: answers and events go on
            self._reset_network()
            reason = f"{missed} steps missed"
        if taken_ns is not None:
            self._now_ns = taken_ns
        return step, missed, reason

    def _place(self, pixels: Pixels) -> None:
        self._holds_last = False
        self._input.place(pixels)
        self._holds_last = True

    def _run(self, pixels: Pixels, step: Stepping) -> tuple[list[np.ndarray], int]:
        """Every run's output, float32 [C], and the nanoseconds in the engine.

        Steps made up for missing frames are run as `fill` says: with the last frame as long as the input holds it.
        """
        outputs: list[np.ndarray] = []
        spent, array = 0, self._input.array

        def run() -> None:
            nonlocal spent
            start = time.perf_counter_ns()
            self.session.run()
            spent += time.perf_counter_ns() - start
            outputs.append(np.array(self.session.outputs[self.spec.output], np.float32).reshape(-1))

        made_up, fill = step.at[:-1], self.spec.fill if self._holds_last else "this"
        if fill == "last":
            for _ in made_up:
                run()
        last = array.copy() if made_up and fill == "blend" else None
        self._place(pixels)
        if last is not None:
            this = array.copy()
            try:
                for at in made_up:
                    _mix(last, this, at, array)
                    run()
            finally:  # no mixture stays there for the next frame to be mixed with
                np.copyto(array, this)
        elif fill == "this":
            for _ in made_up:
                run()
        run()
        return outputs, spent

    def _take(
        self, outputs: list[np.ndarray], score_threshold: float | None, top_k: int | None
    ) -> VideoResult:
        spec, smoother = self.spec, self._smoother
        for output in outputs:
            scores = smoother.scores(output)
            answer = smoother.answer(scores)
            self._pending += self._events.step(answer, smoother.grouped(scores), self._now_ns)
        least = spec.score_threshold if score_threshold is None else score_threshold
        classes = best(scores, spec.top_k if top_k is None else top_k, least)
        return VideoResult(
            classes=classes,
            scores=scores[classes],
            all_scores=scores,
            raw_scores=smoother.activate(output),
            logits=output,
            answer=answer,
            labels=spec.labels,
            background=self._background,
        )

    def _begin_anew(self, reason: str) -> None:
        self._pending += self._events.reset(reason)
        self._reset_network()
        self._smoother.reset()
        if self._answers and self._answers[-1][1] != UNKNOWN:
            self._answers.append((self._now_ns, UNKNOWN))

    def _reset_network(self) -> None:
        reset = getattr(self.session, "reset", None)
        if reset is not None:
            reset()

    def _history(self, answer: int, edges: tuple[Edge, ...]) -> History:
        now = self._now_ns
        answers = self._answers
        if answers and answers[-1][0] > now:  # the clock went back: what was before is at no known distance
            answers.clear()
            self._edges.clear()
        if not answers or answers[-1][1] != answer:
            answers.append((now, answer))
        self._edges.extend(edges)
        begin = now - round(HISTORY_S * 1e9)
        while len(answers) > 1 and answers[1][0] <= begin:
            answers.popleft()
        while self._edges and self._edges[0].taken_ns < begin:
            self._edges.popleft()
        return History(HISTORY_S, now, tuple(answers), tuple(self._edges))


def _mix(last: np.ndarray, this: np.ndarray, at: float, out: np.ndarray) -> None:
    """The input at the share `at` of the way from the last frame to this one."""
    mixed = last.astype(np.float32) * (1 - at) + this.astype(np.float32) * at
    whole = np.issubdtype(out.dtype, np.integer)
    np.copyto(out, np.rint(mixed) if whole else mixed, casting="unsafe")


def _clock(spec: VideoSpec, session: Runnable) -> StateClock:
    """Of the network's states and of the spec: one step, and the shortest gap that ends anything."""
    states = getattr(session, "state_specs", ())
    steps = {s for s in (spec.dt_s, *(state.nominal_dt_s for state in states)) if s is not None}
    if len(steps) > 1:
        raise BundleError(
            f"bundle: its states and its pipeline were made for different steps, {sorted(steps)} s, expected "
            "one. Build it again"
        )
    limits = [s.reset_after_s for s in states if s.reset_after_s is not None]
    limits += [spec.reset_after_s] if spec.reset_after_s is not None else []
    return StateClock(next(iter(steps), None), min(limits, default=None))
