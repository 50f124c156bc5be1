"""What a network that watches a stream gives, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from edgekit.spec import MAX_SECONDS, is_duration
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.timebase import Policy

Activation = Literal["none", "softmax"]
Fill = Literal["this", "last", "blend"]
MAX_WINDOW = 1000


@dataclass(frozen=True)
class Smoothing:
    """From a row of scores per step to an answer that does not flicker. The default is the step's own best.

    window: steps whose outputs are averaged before the activation (1 = each step stands alone). The best class
        of the mean is that of the sum.
    votes: a new answer is taken over only where the two answers before it agree with each other, so an
        answer stays for two steps at least.
    masked: labels that are never the answer: where one is best, the answer before it stays.
    merged: label -> the label that counts instead: several that mean "nothing" become one.

    The published online demo of TSM (temporal-shift-module, online_demo) has window 12, votes, five gestures
    masked and "Doing other things" merged into "No gesture"; it keeps 20 answers, of which it looks at two.
    """

    window: int = 1
    votes: bool = False
    masked: tuple[str, ...] = ()
    merged: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.window <= MAX_WINDOW:
            raise ValueError(f"smoothing window must be between 1 and {MAX_WINDOW} steps, got {self.window}")


@dataclass(frozen=True)
class EventRule:
    """When a label becomes an event: on for `min_on` steps, over when off for `min_off` steps.

    on: the label is the answer and has at least this score. off: an event goes on while its label has at
    least this score and no other label is on; below `on`, so that a score near it does not flicker.
    Steps are runs of the network: nominal steps, whatever the camera's rate, unless they were missed or `plain`.
    """

    on: float = 0.5
    off: float = 0.3
    min_on: int = 3
    min_off: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.off <= self.on <= 1:
            raise ValueError(f"events: expected 0 <= off <= on <= 1, got off {self.off}, on {self.on}")
        for name, steps in (("min_on", self.min_on), ("min_off", self.min_off)):
            if not 1 <= steps <= MAX_WINDOW:
                raise ValueError(f"events: {name} must be between 1 and {MAX_WINDOW} steps, got {steps}")


@dataclass(frozen=True)
class VideoSpec:
    """The `pipeline` of a network that sees one frame at a time and remembers: frame -> input, output -> answer.

    output: the engine's output, one value per class in any shape. activation: what turns it into scores
    0..1: `softmax`, or `none` (they are scores already). The `top_k` best classes with smoothed score
    >= `score_threshold` are listed.

    frames: length of the clips it was trained on, which is what an evaluation plays. dt_s: seconds between
    two of them, the nominal step; None = every frame is one step. reset_after_s: a longer gap ends
    the windows and the event, as it ends the network's state (StateSpec.reset_after_s: the shortest counts).

    stepping: what happens when frames are missing or come early (timebase.stepping). fill: what the steps
    are run with that `resample` makes up for missing frames: the `last` frame seen before them, `this` one, or a
    `blend` of both by time (benchmarks/drops.py compares them).

    background: the label that means that nothing happens: it is no event. "" = there is none.
    """

    task: ClassVar[str] = "video"

    preprocess: ImagePreprocess
    output: str
    labels: tuple[str, ...]
    activation: Activation = "softmax"
    top_k: int = 5
    score_threshold: float = 0.0
    frames: int = 8
    dt_s: float | None = None
    reset_after_s: float | None = None
    stepping: Policy = "resample"
    fill: Fill = "last"
    background: str = ""
    smoothing: Smoothing = field(default_factory=Smoothing)
    events: EventRule = field(default_factory=EventRule)

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("a video network needs at least one label")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ: events are told apart by them")
        if not 1 <= self.top_k <= 1000:
            raise ValueError(f"top_k must be between 1 and 1000, got {self.top_k}")
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold must be between 0 and 1, got {self.score_threshold}")
        if not 1 <= self.frames <= MAX_WINDOW:
            raise ValueError(f"frames must be between 1 and {MAX_WINDOW}, got {self.frames}")
        for name, seconds in (("dt_s", self.dt_s), ("reset_after_s", self.reset_after_s)):
            if seconds is not None and not is_duration(seconds):
                raise ValueError(f"{name} must be above 0 seconds and at most {MAX_SECONDS:g}, got {seconds}")
        for name, value, known in (("stepping", self.stepping, Policy), ("fill", self.fill, Fill)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        if self.reset_after_s is not None and self.dt_s is not None and self.reset_after_s <= self.dt_s:
            raise ValueError(
                f"reset_after_s must be longer than dt_s, got {self.reset_after_s} and {self.dt_s}: "
                "every frame would reset the state"
            )
        named = (*self.smoothing.masked, *self.smoothing.merged, *self.smoothing.merged.values())
        for label in (*named, *filter(None, [self.background])):
            if label not in self.labels:
                raise ValueError(f"{label[:60]!r} is not one of the {len(self.labels)} labels")
        if set(self.labels) <= {*self.smoothing.masked, *self.smoothing.merged}:
            raise ValueError("no label is left that may be the answer: all of them are masked or merged")
        if self.background in (*self.smoothing.masked, *self.smoothing.merged):
            raise ValueError(f"background {self.background!r} must not be masked or merged into another")
        for source, into in self.smoothing.merged.items():
            if into in self.smoothing.merged or into in self.smoothing.masked:
                raise ValueError(f"{source!r} is merged into {into!r}, which is masked or merged itself")
