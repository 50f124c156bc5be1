"""How much a video network loses when frames are missing, late or of another rate, for each way of stepping.

    python benchmarks/drops.py MODEL [--events 400] [--clips 600] [--seed 10001]

MODEL: an online network of the gesture classes: one-frame ONNX with its states (tools/train_video.py writes
online.onnx), or a bundle of one.

Streams of gestures (edgekit/synth/gestures.py) are seen by cameras that lose frames at random or in bursts, whose
moments jitter, or that run at twice or half the rate the network was trained for; pictures and timestamps are
those of the true moments. Each way of stepping (edgekit/timebase.py) sees the same frames:

plain, hold, reset: as named there.
resample: one run per nominal step; for the steps that were missed the network sees the `this` frame again, the
    `last` one again and then this one, or a `blend` of both by Stepping.at (VideoSpec.fill).

Event accuracy: share of the motions whose summed answers, one answer a frame as the caller gets it, name them
(tools/train_video.py `evaluate_stream`); `per step` sums over all runs instead. Clip accuracy: clips of
8 frames, state reset at the start, the mean of the answers. Intervals: bootstrap over motions or clips; `loss` is against
plain stepping on every frame, paired. The table goes to standard error, JSON lines to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit  # noqa: E402
from edgekit.errors import EdgekitError, UsageError  # noqa: E402
from edgekit.models.tsm import MEAN, STD  # noqa: E402
from edgekit.spec import StateSpec  # noqa: E402
from edgekit.synth.gestures import CLIP, EVENT, FRAMES_PER_SECOND, GESTURES, GestureWorld  # noqa: E402
from edgekit.tasks.interval import interval95  # noqa: E402
from edgekit.timebase import Policy, StateClock, stepping  # noqa: E402

LOST = 0.3
BURST = 3
"""Frames of a burst on average."""
JITTER = 0.4
"""A moment is off by up to this part of a nominal step."""
ROUNDS = 2000


# --- cameras ----------------------------------------------------------------------------------------


def at_random(count: int, rng: np.random.Generator) -> np.ndarray:
    """Which of `count` frames arrive when each is lost with probability LOST."""
    return rng.random(count) >= LOST


def in_bursts(count: int, rng: np.random.Generator) -> np.ndarray:
    """The same share lost in runs of BURST frames on average (Gilbert 1960: two states)."""
    ends = 1 / BURST
    begins = LOST / (1 - LOST) * ends
    arrived, lost = np.empty(count, bool), rng.random() < LOST
    for i, draw in enumerate(rng.random(count)):
        arrived[i] = not lost
        lost = draw >= ends if lost else draw < begins
    return arrived


def cameras(frames: int, seed: int) -> dict[str, np.ndarray]:
    """Name -> the moments of its frames, ascending, in nominal steps from 0 to below `frames`."""

    def rng(number: int) -> np.random.Generator:
        return np.random.default_rng([seed, number])

    every, twice = np.arange(float(frames)), np.arange(2 * frames) / 2
    shaken = np.maximum(every + rng(3).uniform(-JITTER, JITTER, frames), 0)
    lost = at_random(frames, rng(1))
    rate = FRAMES_PER_SECOND
    return {
        "every frame": every,
        f"{LOST:.0%} lost": every[lost],
        f"{LOST:.0%} lost in bursts": every[in_bursts(frames, rng(2))],
        "jitter": shaken,
        f"jitter, {LOST:.0%} lost": shaken[lost],
        f"{2 * rate:g} Hz": twice,
        f"{2 * rate:g} Hz, {LOST:.0%} lost": twice[at_random(2 * frames, rng(4))],
        f"{rate / 2:g} Hz": every[::2],
    }


# --- networks ---------------------------------------------------------------------------------------


class Network(Protocol):
    """Many streams on one online network. `size`: (height, width) of its input."""

    size: tuple[int, int]
    states: Sequence[StateSpec]

    def tensor(self, image: np.ndarray) -> np.ndarray:
        """The network's input of a picture, uint8 [H, W, 3] BGR."""
        ...

    def step(self, stream: str, tensor: np.ndarray) -> np.ndarray:
        """One run of a stream; its logits [K], a copy."""
        ...

    def reset(self, stream: str) -> None: ...

    def close(self) -> None: ...


def normalised(image: np.ndarray) -> np.ndarray:
    scaled = (image[..., ::-1].astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], np.float32)


class OnnxNetwork:
    """A one-frame ONNX file in ONNX Runtime; pictures are normalised as tools/train_video.py does."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        from edgekit import frontends
        from edgekit.passes.states import states

        self.states = states(frontends.load(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kept = {s.input for s in self.states} | {s.output for s in self.states}
        self._image, *others = [v for v in self._session.get_inputs() if v.name not in kept]
        outputs = [v.name for v in self._session.get_outputs() if v.name not in kept]
        if others or len(outputs) != 1 or len(self._image.shape) != 4:
            raise UsageError(f"model {path}: expected one picture in and one output, states aside")
        self._names = [*outputs, *(s.output for s in self.states)]
        self._initial = {s.input: np.full(s.shape, s.initial, np.float32) for s in self.states}
        self._held: dict[str, dict[str, np.ndarray]] = {}
        self.size = (self._image.shape[2], self._image.shape[3])

    def tensor(self, image: np.ndarray) -> np.ndarray:
        return normalised(image)

    def step(self, stream: str, tensor: np.ndarray) -> np.ndarray:
        held = self._held.get(stream, self._initial)
        logits, *after = self._session.run(self._names, {self._image.name: tensor, **held})
        self._held[stream] = {s.input: value for s, value in zip(self.states, after, strict=True)}
        return np.array(logits[0])

    def reset(self, stream: str) -> None:
        self._held.pop(stream, None)

    def close(self) -> None:
        self._held.clear()


class BundleNetwork:
    """A bundle; pictures go in by its own rule where it has one, else as in `OnnxNetwork`."""

    def __init__(self, path: Path, variant: str | None = None) -> None:
        import edgekit
        from edgekit import tasks

        self._engine = edgekit.load(path, variant=variant, threads=1)
        self._streams = self._engine.streams()
        manifest = self._engine.manifest
        self.states = manifest.states
        ((self._name, image),) = self._streams.inputs.items()
        (self._logits,) = self._streams.outputs.values()
        if image.dtype != np.float32 and self._name not in self._streams.codes:
            raise UsageError(f"bundle {path}: input {self._name} is {image.dtype}, expected float32")
        self._rule = None
        if manifest.task in tasks.TASKS:
            self._rule = tasks.task(manifest.task).read_spec(manifest).preprocess
        self._shape = image.shape
        channels_last = self._rule is not None and self._rule.layout == "NHWC"
        self.size = image.shape[1:3] if channels_last else image.shape[2:4]

    def tensor(self, image: np.ndarray) -> np.ndarray:
        from edgekit.kernels.letterbox import letterbox

        if self._rule is None:
            return normalised(image)
        made = np.empty(self._shape, np.float32)
        letterbox(image, self._rule, made)
        return made

    def step(self, stream: str, tensor: np.ndarray) -> np.ndarray:
        self._streams.step(stream, {self._name: tensor})
        return np.array(self._logits).reshape(-1)

    def reset(self, stream: str) -> None:
        if stream in self._streams:
            self._streams.drop(stream)

    def close(self) -> None:
        self._streams.close()
        self._engine.close()


class Opened:
    """`with Opened(path) as network`: a bundle or an ONNX file, by its name."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise UsageError(f"model {path}: not found, expected an online .onnx or .edge file")
        self.network: Network = OnnxNetwork(path) if path.suffix == ".onnx" else BundleNetwork(path)

    def __enter__(self) -> Network:
        return self.network

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.network.close()


# --- stepping ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A policy and, for `resample`, what the network sees in the steps that were missed."""

    policy: Policy
    fill: str = "this"

    @property
    def name(self) -> str:
        return f"{self.policy} {self.fill}" if self.policy == "resample" else self.policy


WAYS = (
    Way("plain"), Way("hold"), Way("reset"), Way("resample", "this"), Way("resample", "last"), Way("resample", "blend"),
)  # fmt: skip
PLAIN = WAYS[0].name


class Stepper:
    """One stream of a network under one way of stepping."""

    def __init__(self, network: Network, way: Way, clock: StateClock, stream: str) -> None:
        self.network, self.way, self.clock, self.stream = network, way, clock, stream
        self.restart()

    def restart(self) -> None:
        """Begin anew: the next frame is the first."""
        self.network.reset(self.stream)
        self.clock.forget()
        self._last: tuple[float, np.ndarray] | None = None
        self._answer: np.ndarray | None = None

    def feed(
        self, moment: float, tensor: np.ndarray
    ) -> tuple[np.ndarray | None, list[tuple[float, np.ndarray]]]:
        """The answer that holds after a frame taken at `moment` (nominal steps), and every run with its moment."""
        advance = self.clock.advance(round(moment / FRAMES_PER_SECOND * 1e9))
        step = stepping(self.way.policy, advance)
        if step.reset:
            self.network.reset(self.stream)
        before, old = self._last or (moment, tensor)
        runs = []
        for at in step.at:
            seen = tensor
            if at < 1 and self.way.fill == "blend":
                seen = old + np.float32(at) * (tensor - old)
            elif at < 1 and self.way.fill == "last":
                seen = old
            self._answer = self.network.step(self.stream, seen)
            runs.append((before + at * (moment - before), self._answer))
        if runs:  # a frame that came too early is not looked at, here as in the task
            self._last = (moment, tensor)
        return self._answer, runs


@dataclass
class Right:
    """Per motion or clip, whether its answers named it: one answer a frame, and every run."""

    frames: list[bool] = field(default_factory=list)
    runs: list[bool] = field(default_factory=list)


def steppers(network: Network, reset_after: float) -> dict[str, Stepper]:
    dt = next((s.nominal_dt_s for s in network.states if s.nominal_dt_s is not None), 1 / FRAMES_PER_SECOND)
    return {w.name: Stepper(network, w, StateClock(dt, reset_after * dt), w.name) for w in WAYS}


def judge_events(
    network: Network, world: GestureWorld, moments: np.ndarray, events: int, reset_after: float
) -> Iterator[dict[str, Right]]:
    """The motions of one stream, as the network names them under every way of stepping; yields as they grow."""
    ways = steppers(network, reset_after)
    right = {name: Right() for name in ways}
    bounds = np.searchsorted(moments, np.arange(events + 1) * EVENT)
    for number in range(events):
        event = world.event(number)
        totals = {name: np.zeros((2, len(GESTURES))) for name in ways}
        for moment in moments[bounds[number] : bounds[number + 1]]:
            tensor = network.tensor(world.seen(float(moment)))
            for name, stepper in ways.items():
                answer, runs = stepper.feed(float(moment), tensor)
                if answer is not None and event.start <= moment < event.stop:
                    totals[name][0] += answer
                for at, logits in runs:
                    if event.start <= at < event.stop:
                        totals[name][1] += logits
        for name, total in totals.items():
            # without one answer nothing is named
            right[name].frames.append(bool(total[0].any() and total[0].argmax() == event.label))
            right[name].runs.append(bool(total[1].any() and total[1].argmax() == event.label))
        yield right


def judge_clips(
    network: Network, world: GestureWorld, arrived: np.ndarray, reset_after: float
) -> Iterator[dict[str, Right]]:
    """Clips, state reset at the start of each. arrived: bool [clips, CLIP], at least one frame of each."""
    ways = steppers(network, reset_after)
    right = {name: Right() for name in ways}
    for index, kept in enumerate(arrived):
        images, label = world.clip(index)
        totals = {name: np.zeros((2, len(GESTURES))) for name in ways}
        for stepper in ways.values():
            stepper.restart()
        for i in np.flatnonzero(kept):
            tensor = network.tensor(images[i])
            for name, stepper in ways.items():
                answer, runs = stepper.feed(float(i), tensor)
                totals[name][0] += answer
                for _, logits in runs:
                    totals[name][1] += logits
        for name, total in totals.items():
            right[name].frames.append(bool(total[0].argmax() == label))
            right[name].runs.append(bool(total[1].argmax() == label))
        yield right


# --- results ----------------------------------------------------------------------------------------


def share(right: Sequence[bool], base: Sequence[bool], seed: int) -> dict[str, Any]:
    """Accuracy, and its loss against `base` on the same motions, with 95 % bootstrap intervals."""
    a, b = np.array(right, float), np.array(base, float)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(a), (ROUNDS, len(a)))
    return {
        "accuracy": round(float(a.mean()), 4),
        "interval95": interval95(a[drawn].mean(1)),
        "loss": round(float((b - a).mean()), 4),
        "loss_interval95": interval95((b - a)[drawn].mean(1)),
    }


def rows(what: str, found: Mapping[str, Mapping[str, Right]], seed: int) -> Iterator[dict[str, Any]]:
    """One line per camera; `found` by camera and way, the undisturbed camera first."""
    base = next(iter(found.values()))[PLAIN]
    for camera, ways in found.items():
        yield {
            "benchmark": "drops",
            "of": what,
            "camera": camera,
            "count": len(base.frames),
            **{name: share(right.frames, base.frames, seed) for name, right in ways.items()},
            "per step": {name: share(right.runs, base.runs, seed) for name, right in ways.items()},
        }


def table(lines: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Accuracy in per cent and points lost, a row per camera; the least loss is bold."""
    from rich.table import Table

    names = [w.name for w in WAYS]
    made = Table(title=title, caption="accuracy %, in brackets points lost")
    made.add_column("camera", no_wrap=True)
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        best = max(line[name]["accuracy"] for name in names)
        cells = []
        for name in names:
            value = line[name]
            text = f"{100 * value['accuracy']:.1f} ({100 * value['loss'] + 0.0:.1f})"
            cells.append(f"[bold]{text}[/bold]" if value["accuracy"] == best else text)
        made.add_row(line["camera"], *cells)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--events", type=int, default=400, help="motions of the stream")
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--seed", type=int, default=10_001, help="of streams, clips and losses")
    parser.add_argument(
        "--reset-after", type=float, default=5, help="a longer gap ends the state, nominal steps (default: 5)"
    )
    args = parser.parse_args(argv)
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    try:
        opened = Opened(args.model)
    except EdgekitError as error:
        print(error, file=sys.stderr)
        return 2
    with opened as network:
        height, width = (max(32, side) for side in network.size)
        streams: dict[str, dict[str, Right]] = {}
        for camera, moments in cameras(args.events * EVENT, args.seed).items():
            world = GestureWorld(args.seed, width, height)
            turns = judge_events(network, world, moments, args.events, args.reset_after)
            for right in track(turns, camera, total=args.events, console=console, transient=True):
                streams[camera] = right
        clips: dict[str, dict[str, Right]] = {}
        for number, (camera, lose) in enumerate(
            {
                "every frame": None,
                f"{LOST:.0%} lost": at_random,
                f"{LOST:.0%} lost in bursts": in_bursts,
            }.items()
        ):
            rng = np.random.default_rng([args.seed, 10 + number])
            arrived = np.ones((args.clips, CLIP), bool)
            if lose is not None:
                arrived = np.stack([lose(CLIP, rng) for _ in range(args.clips)])
                arrived[~arrived.any(1), -1] = True
            world = GestureWorld(args.seed, width, height)
            turns = judge_clips(network, world, arrived, args.reset_after)
            for right in track(turns, f"clips, {camera}", total=args.clips, console=console, transient=True):
                clips[camera] = right
    end = {"model": args.model.name, "seed": args.seed, "reset_after_steps": args.reset_after}
    for what, found in (("event accuracy", streams), ("clip accuracy", clips)):
        lines = list(rows(what, found, args.seed))
        for line in lines:
            print(json.dumps({**line, **end, "commit": commit()}), flush=True)
        console.print(table(lines, f"{what} of {args.model.name}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
