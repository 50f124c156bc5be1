"""Running a recipe: a network in, a smaller or faster one out, with what every step did to it.

    done = compress(problem, read_recipe("finetune"), Path("runs/mine"))
    done.onnx, done.summary["points"]

The folder holds the whole run and nothing but it:

    run.json          what decides the result: weights, recipe, problem, target, tools
    <name>.onnx       the network as it came out
    summary.json      metric, size and cost before, after each step and at the end; what the steps have to tell
    accuracy.png      accuracy against cost
    log.jsonl         one line per 20 batches and per measurement
    steps/            trainings and measured values, to go on from
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from edgekit import __version__
from edgekit.archive import check_writable, write_atomic, write_error
from edgekit.compression.fake_quant import FakeQuantized
from edgekit.compression.plot import write_plot
from edgekit.compression.problem import Problem, macs, parameters, zeros
from edgekit.compression.recipe import Recipe
from edgekit.compression.work import Work, begin, digest, frozen
from edgekit.errors import UsageError, printable
from edgekit.target import Target

RUN, SUMMARY, LOG, PLOT, STEPS = "run.json", "summary.json", "log.jsonl", "accuracy.png", "steps"
START, SCRATCH = "start", "0-train"
TOOLS = ("torch", "torch-pruning", "numpy", "onnx")

Progress = Callable[[str, int, int], None]
"""progress(what, done, of)"""


@dataclass(frozen=True)
class Point:
    """What is known of the network at one place of a recipe.

    stage: "start", or the step that ended. metrics: of Problem.evaluate, the first counts. zeros: share of zeros in the
    weights. latency_s: on the target, estimated (toolchain.estimate), with the range that holds four of five measurements;
    None where it is not known. seconds: what the step took here, of the runs that it needed.
    """

    stage: str
    metrics: dict[str, float]
    parameters: int
    macs: int
    zeros: float
    latency_s: float | None = None
    latency_range_s: tuple[float, float] | None = None
    seconds: float | None = None

    @property
    def metric(self) -> float:
        return next(iter(self.metrics.values()))


@dataclass(frozen=True)
class Compressed:
    """module: in evaluation mode. onnx: the same network as a file. points: before, and after each step.
    summary: what summary.json holds."""

    module: nn.Module
    onnx: Path
    folder: Path
    points: tuple[Point, ...]
    summary: dict[str, Any]

    @property
    def before(self) -> Point:
        return self.points[0]

    @property
    def after(self) -> Point:
        return self.points[-1]


def compress(
    problem: Problem,
    recipe: Recipe,
    out: Path,
    target: Target | None = None,
    *,
    precision: str | None = None,
    scratch: int = 0,
    progress: Progress = lambda *_: None,
) -> Compressed:
    """Run `recipe` on a copy of `problem.model`, all in the folder `out`; a run that was interrupted goes on there.

    target, precision: what it has to be fast on, and in which precision it will run there (its default).
    scratch: batches that train the network, as it came, before the recipe; the result is what the recipe starts from.
    An interrupted run that is started again gives the same bits as one that was not (on as many threads of the same
    machine), except for what is measured by the clock.

    Raises: UsageError for a folder with another run, OutputError where it cannot be written, EdgekitError for a
    training that fails, and whatever the methods raise.
    """
    recipe.check(target)
    if target is not None:
        precision = precision or target.precisions[target.backend][0]
    started = {
        "problem": {"name": problem.name, **problem.identity},
        "weights": digest(problem.model),
        "recipe": recipe.table(),
        "target": None if target is None else target.name,
        "precision": precision,
        "scratch": scratch,
        "tools": tools(),
    }
    identity: dict[str, Any] = json.loads(json.dumps(started))
    check_writable(out)
    resumed = check_folder(out, identity)
    folder = out / STEPS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), (out / LOG).open("a", encoding="utf-8") as log:
            if not resumed:
                write_atomic(out / RUN, [_json(identity)], "run")
            return _run(problem, recipe, out, target, precision, scratch, progress, _sayer(log), resumed)
    except OSError as error:
        raise write_error("run", out, error) from None


def tools() -> dict[str, str]:
    """Versions of what computes a run."""
    found = {"edgekit": __version__}
    for name in TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_folder(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether `out` holds a run of this identity. Raises: UsageError for another one, or for a folder that is not a run's."""
    path = out / RUN
    what = f"folder {printable(out)}"
    if not path.is_file():
        if (out / "edgekit.toml").exists() or (out / STEPS).exists():
            raise UsageError(
                f"{what}: holds something else than a run (no {RUN} in it). Choose another folder with --out"
            )
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}: its {RUN} is damaged: {str(error)[:100]}. Choose another folder") from None
    different = list(_differences(found, identity, ""))
    if different:
        place, was, now = different[0]
        more = f", and {len(different) - 1} more differ" if len(different) > 1 else ""
        raise UsageError(
            f"{what}: holds another run: {place} is {_short(was)} there, {_short(now)} here{more}. "
            "Choose another folder with --out, or delete it"
        )
    return True


def _run(
    problem: Problem, recipe: Recipe, out: Path, target: Target | None, precision: str | None, scratch: int,
    progress: Progress, say: Callable[[Mapping[str, Any]], None], resumed: bool,
) -> Compressed:  # fmt: skip
    label = ""

    def inside(name: str, done: int, of: int) -> None:
        what = name.rpartition(".")[2]
        progress(f"{label}: {'train' if what.isdecimal() else what}", done, of)

    with torch.random.fork_rng(devices=[]):  # the caller's generator is not ours
        work = begin(
            problem, target=target, precision=precision or "float32", seed=recipe.seed, folder=out / STEPS, say=say,
            progress=inside,
        )  # fmt: skip
        say(
            {
                "event": "resumed" if resumed else "begun",
                "time": time.time(),
                "threads": torch.get_num_threads(),
            }
        )
        if scratch:
            label = "before the recipe"
            work.enter(SCRATCH)
            with _clocked(work):
                work.train(scratch, lr=problem.lr)
            work.teacher = frozen(work.model)
        progress("start: measure", 0, 1)
        points = [_measure(work, START)]
        for number, (stage, step) in enumerate(zip(recipe.stages(), recipe.steps, strict=True), 1):
            label = f"step {number} of {len(recipe.steps)}, {step.method}"
            progress(label, 0, 1)
            work.enter(stage)
            with _clocked(work):
                step.run(work, step.options)
            work.model.eval()
            progress(f"{label}: measure", 0, 1)
            points.append(_measure(work, stage))
        progress("write the network", 0, 1)
        onnx = out / f"{problem.name}.onnx"
        problem.write(work.model, onnx)
    found = json.loads(json.dumps(_summary(problem, recipe, work, points, onnx)))
    write_atomic(out / SUMMARY, [_json(found)], "summary")
    name = next(iter(points[0].metrics))
    write_plot(
        out / PLOT, f"{problem.name}: {recipe.name}", name, points, None if target is None else target.name
    )
    say({"event": "done", "time": time.time()})
    return Compressed(work.model, onnx, out, tuple(points), found)


def _measure(work: Work, stage: str) -> Point:
    """The network as it is after `stage`, which it may have been measured in already."""
    seconds = work.facts.get(stage, {}).pop("seconds", None)
    if not work.facts.get(stage, True):
        del work.facts[stage]
    work.enter(stage)
    metrics = work.metric("end")
    latency = work.remember("latency.end", lambda: estimated(work)) if work.target is not None else {}
    model = (
        work.model.network if isinstance(work.model, FakeQuantized) else work.model
    )  # what is inside the rounding
    point = Point(
        stage, metrics, parameters(model), macs(model, work.problem.example), round(zeros(model), 6),
        latency.get("seconds"), tuple(latency["range"]) if "range" in latency else None, seconds,
    )  # fmt: skip
    if "not_estimated" in latency:
        work.facts["latency"] = {"not_estimated": latency["not_estimated"]}
    work.say({"stage": stage, "point": dataclasses.asdict(point)})
    return point


def estimated(work: Work) -> dict[str, Any]:
    """The latency of the network on the target: seconds and their range, or the reason why it is not known."""
    from edgekit import frontends
    from edgekit.errors import ModelError
    from edgekit.passes import prepare
    from edgekit.toolchain.estimate import Estimator

    assert work.target is not None
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        path = Path(folder) / "network.onnx"
        try:
            work.problem.write(work.model, path)
            model = frontends.load(path)
            try:
                prepared = prepare(model, check=False).model  # a detector, whose decoding is cut off
            except ModelError:
                prepared = prepare(frontends.load(path), task="", check=False).model
            found = Estimator(prepared, work.target)(work.precision)
        except (UsageError, ModelError) as error:
            return {"not_estimated": str(error)}
    return {"seconds": found.total_s, "range": [found.low_s, found.high_s]}


def _summary(problem: Problem, recipe: Recipe, work: Work, points: list[Point], onnx: Path) -> dict[str, Any]:
    rows = [
        {k: v for k, v in dataclasses.asdict(point).items() if v is not None}
        for point in points
    ]  # fmt: skip
    return {
        "name": problem.name,
        "recipe": recipe.table(),
        "target": None if work.target is None else work.target.name,
        "precision": None if work.target is None else work.precision,
        "metric": next(iter(points[0].metrics)),
        "points": rows,
        "onnx": {"file": onnx.name, "bytes": onnx.stat().st_size},
        "weights": digest(work.model),
        "facts": work.facts,
    }


@contextlib.contextmanager
def _clocked(work: Work) -> Iterator[None]:
    """Adds up the seconds of a stage over the runs that it needed, into its facts at the end."""
    stage = work.stage
    assert work.folder is not None
    path = work.folder / f"{stage}.seconds"
    before = float(path.read_text()) if path.is_file() else 0.0
    ended = (work.folder / f"{stage}.metric.end.json").is_file()  # being computed anew: no new cost
    start = time.monotonic()
    try:
        yield
    finally:
        total = before if ended else before + time.monotonic() - start
        write_atomic(path, [f"{total:.3f}\n".encode()], "run")
    work.facts.setdefault(stage, {})["seconds"] = round(total, 3)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time. Raises: UsageError when another one is at work there."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"folder {printable(folder.parent)}: another process runs a recipe there. Wait for it, or choose another folder"
            ) from None
        yield


def _sayer(log: IO[str]) -> Callable[[Mapping[str, Any]], None]:
    def say(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), file=log, flush=True)

    return say


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _differences(a: Any, b: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """(place, value in a, value in b) wherever two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**b, **a}:
            yield from _differences(a.get(key), b.get(key), f"{place}.{key}" if place else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{place}[{i}]")
    elif a != b:
        yield place, a, b


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a {'table' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = "not set" if value is None else str(value)
    return printable(text if len(text) <= 40 else text[:12] + "...")
