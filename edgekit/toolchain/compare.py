"""Two bundles, or a bundle and its float model, on the same pictures: what differs, and by how much.

Both sides run on this machine. A is what B is compared with: differences are B minus A, and SQNR takes
A's output for the signal. What cannot be compared is said with its reason and never guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import frontends, tasks
from edgekit.backends.base import half
from edgekit.errors import ModelError, UsageError, printable
from edgekit.frontends import torch_module
from edgekit.manifest import MANIFEST
from edgekit.passes import prepare
from edgekit.passes.states import states as graph_states
from edgekit.picture import read_picture
from edgekit.project import PLAN_NAME, PLANNED, ModelEntry, VideoHint, open_project
from edgekit.runtime import tuning
from edgekit.runtime.bench import machine
from edgekit.runtime.engine import foreign_target, load
from edgekit.runtime.sources import open_source
from edgekit.target import Target
from edgekit.tasks import Pipeline
from edgekit.tasks.interval import interval95
from edgekit.toolchain import recurrent
from edgekit.toolchain.clips import clips_of, footage, unlabelled_clips
from edgekit.toolchain.page import Facts
from edgekit.toolchain.running import Footage, Still, frames, restart, results, run_here
from edgekit.toolchain.tasks import half as toolchain_task

Progress = Callable[[str, int, int], None]

IMAGES = 16
"""Pictures on which outputs and results are compared, unless told otherwise."""
MAX_LAYERS = 5000
ROUNDS = 40
BUDGET_S = 30.0
SHOWN = 6
"""Pictures kept for the page: those whose results differ most."""


@dataclass(frozen=True)
class Side:
    """One of the two, ready to run. `facts`: JSON values for people; `layers`: its evidence, may be empty."""

    name: str
    facts: dict[str, Any]
    task: str
    spec: Any
    pipeline: Pipeline
    payload_bytes: int
    layers: list[Facts]


@dataclass(frozen=True)
class Shown:
    """A picture, uint8 [H, W, 3] BGR, and both results."""

    image: np.ndarray
    results: tuple[Any, Any]
    caption: str


@dataclass(frozen=True)
class Comparison:
    """`record`: JSON values (docs/cli.md, "compare"). `shown`: pictures for the page."""

    record: dict[str, Any]
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Options:
    """data, images: labelled pictures, or `images` alone: a folder or source of unlabelled ones.

    limit: at most so many labelled pictures. threads: of both sides. variants: payload names, by side.
    rounds: turns of the timing, 0 leaves it out.
    """

    data: Path | None = None
    images: str | None = None
    limit: int | None = None
    threads: int = 0
    variants: tuple[str | None, str | None] = (None, None)
    rounds: int = ROUNDS


def is_model(path: Path) -> bool:
    """Whether the argument names a network or a project, not a bundle. A folder is a bundle if it has a manifest."""
    if path.is_dir():
        return not (path / MANIFEST).exists()
    return path.suffix.lower() in (".onnx", ".toml") or path.name == PLAN_NAME


def compare(a: Path, b: Path, options: Options, progress: Progress) -> Comparison:
    """Compare what is at the two paths; at least one is a bundle, the other may be its ONNX model or project.

    Raises: UsageError when they do not do the same task or neither is a bundle; as `load` and the
    frontends for what cannot be run here; UsageError for pictures that cannot be used.
    """
    with contextlib.ExitStack() as stack:
        sides = _open(stack, a, b, options, progress)
        data, images, what = _pictures(options, sides[0])
        progress("outputs and results", 0, len(images))
        outputs, found, shown = _run(sides, images, progress)
        notes = []
        if sides[0].spec.labels != sides[1].spec.labels:
            notes.append("The class names differ; classes are compared by their number.")
        thresholds = [side.spec.score_threshold for side in sides]
        if thresholds[0] != thresholds[1]:
            notes.append(
                f"Each keeps results by its own score threshold: A {thresholds[0]:g}, B {thresholds[1]:g}."
            )
        record = {
            "task": sides[0].task,
            "a": sides[0].facts,
            "b": sides[1].facts,
            "pictures": {"what": what, "count": sum(1 for _ in frames(images))},
            "outputs": outputs,
            "layers": _layers(sides),
            "results": found,
            "metric": _metric(sides, data, options, progress),
            "size": _ratio("bytes", sides[0].payload_bytes, sides[1].payload_bytes),
            "latency": _latency(sides, images[0], options, progress),
            "notes": notes,
        }
        return Comparison(record, shown)


# --- the sides ---------------------------------------------------------------------------------


def _open(
    stack: contextlib.ExitStack, a: Path, b: Path, options: Options, progress: Progress
) -> tuple[Side, Side]:
    models = is_model(a), is_model(b)
    if all(models):
        raise UsageError(f"models {printable(a)} and {printable(b)}: expected a bundle among them. Build one")
    sides: list[Side | None] = [None, None]
    for i, path in enumerate((a, b)):
        if not models[i]:
            progress(f"load {path.name}", i, 2)
            sides[i] = _bundle_side(stack, path, options.threads, options.variants[i])
    for i, path in enumerate((a, b)):
        if models[i]:
            if options.variants[i]:
                raise UsageError(
                    f"variant {options.variants[i]!r}: {printable(path)} is a model and has none"
                )
            progress(f"read {path.name}", i, 2)
            other = sides[1 - i]
            assert other is not None, "one is a bundle"
            sides[i] = _model_side(stack, path, other, options.threads)
    first, second = sides
    assert first is not None and second is not None
    if first.task != second.task:
        raise UsageError(
            f"bundle {printable(b)}: does {second.task}, expected {first.task} as {printable(a)}. "
            "Compare two of the same task"
        )
    return first, second


def _bundle_side(stack: contextlib.ExitStack, path: Path, threads: int, variant: str | None) -> Side:
    engine = stack.enter_context(load(path, threads=threads, variant=variant))
    pipeline = engine.pipeline()
    used = list(engine.variants.values())
    described = list(engine.describe().values())
    facts = {
        "path": str(path),
        "kind": "bundle",
        "model": engine.manifest.model,
        "target": engine.manifest.target,
        "payload_digest": engine.bundle.payload_digest,
        "variant": ", ".join(dict.fromkeys(v.name for v in used)),
        "precision": ", ".join(dict.fromkeys(v.precision for v in used)),
        "library": ", ".join(
            dict.fromkeys(f"{d.get('library', '')} {d.get('version', '')}" for d in described)
        ),
        "why": "; ".join(engine.why.values()),
        "bundle_bytes": engine.bundle.nbytes,
        "warning": foreign_target(engine.bundle),
    }
    payloads = Facts(engine.bundle.evidence).at("payloads")
    layers = [f for v in used for f in payloads.at(v.name).tables("layers", MAX_LAYERS)]
    networks = Facts(engine.bundle.evidence).at("segments", "networks")
    for name, v in engine.variants.items() if networks else ():
        if v.precision == "int8":
            rows = networks.at(name, "quantization").tables("layers", MAX_LAYERS)
            layers += [Facts({**row.value, "id": f"{name}/{row.text('id', 200)}"}) for row in rows]
    spec = tasks.task(engine.task).read_spec(engine.manifest)
    size = sum(v.bytes for v in used)
    return Side(path.name, facts, engine.task, spec, pipeline, size, layers)


def _model_side(stack: contextlib.ExitStack, path: Path, bundle: Side, threads: int) -> Side:
    """The float network, prepared as a build does, with the bundle's own rules around it."""
    project = open_project(path)
    if len(project.models) != 1:
        raise UsageError(f"project {printable(path)}: has {len(project.models)} models, expected one")
    if project.models[0].is_plan:
        return _plan_side(stack, path, project.models[0], bundle, threads)
    same: dict[str, Any] = {"task": bundle.task, "video": _video(project.models[0], bundle)}
    entry = torch_module.exported(dataclasses.replace(project.models[0], **same))
    open_sizes = {name: array.shape for name, array in bundle.pipeline.session.inputs.items()}
    try:
        model = frontends.load(entry.source)
    except ModelError:  # sizes left open: those of the bundle
        model = frontends.load(entry.source, shapes=open_sizes)
    prepared = prepare(model, task=entry.task, **toolchain_task(entry.task).prepare_options(entry))
    (payload,) = half("onnxruntime", "lower").lower(prepared.model, Target.load("host"), "float32")
    states = recurrent.timed(graph_states(prepared.model), entry.video.dt_s, entry.video.reset_after_s)
    running = run_here(payload, states, threads)
    stack.callback(running.binding.close)
    found = running.facts
    library = f"{found['library']} {found['version']}"
    pipeline = tasks.open_pipeline(bundle.spec, running.binding)
    facts = _model_facts(path, entry.name, library, "the prepared float network")
    return Side(path.name, facts, bundle.task, bundle.spec, pipeline, len(payload.data), [])


def _model_facts(path: Path, name: str, library: str, why: str) -> dict[str, Any]:
    return {
        "path": str(path),
        "kind": "model",
        "model": name,
        "target": "",
        "payload_digest": "",
        "variant": "float reference",
        "precision": "float32",
        "library": library,
        "why": why,
        "bundle_bytes": None,
        "warning": "",
    }


def _plan_side(
    stack: contextlib.ExitStack, path: Path, entry: ModelEntry, bundle: Side, threads: int
) -> Side:
    """A plan folder in float, with the bundle's own rules around it."""
    from edgekit.toolchain.plans.quantize import floats
    from edgekit.toolchain.plans.running import Workshop
    from edgekit.toolchain.plans.source import read

    shop = Workshop(read(entry), threads)
    stack.callback(shop.close)
    payloads = floats(shop.source, Target.load("host"))
    running = stack.enter_context(shop.opened(payloads, bundle.spec))
    library = ", ".join(dict.fromkeys(f"{f['library']} {f['version']}" for f in running.facts.values()))
    facts = _model_facts(path, entry.name, library, "the prepared float plan")
    size = sum(len(payload.data) for payload in payloads.values())
    return Side(path.name, facts, bundle.task, bundle.spec, running.pipeline, size, [])


def _video(entry: ModelEntry, bundle: Side) -> VideoHint:
    """The project's table, with the time base of the bundle where it says none."""
    spec = bundle.spec
    if bundle.task != "video":
        return entry.video
    hint = entry.video
    return dataclasses.replace(
        hint,
        dt_s=hint.dt_s if hint.dt_s is not None else spec.dt_s,
        reset_after_s=hint.reset_after_s if hint.reset_after_s is not None else spec.reset_after_s,
        allow_bidirectional=True,  # the bundle was built from it: it was allowed then
    )


# --- what is compared --------------------------------------------------------------------------


def _pictures(options: Options, side: Side) -> tuple[Any, Footage, str]:
    """(labelled set or None, pictures, clips or moments to compare on, what they are)."""
    if side.task in PLANNED:
        return _moments(options, side)
    if options.data is not None:
        folder = None if options.images is None else Path(options.images)
        data: Any = tasks.task(side.task).read_set(
            options.data, folder, limit=options.limit, labels=side.spec.labels
        )
        if toolchain_task(side.task).CLIPS:
            return data, clips_of(data, side.spec).of(IMAGES), data.name
        return data, [data.read(i) for i in range(min(IMAGES, len(data.images)))], data.name
    task = toolchain_task(side.task)
    source = options.images if options.images is not None else task.DEFAULT_SOURCE
    limit = options.limit or IMAGES
    if task.CLIPS:
        found = unlabelled_clips(footage(source, limit), limit)
        return None, clips_of(found, side.spec).of(limit), source if "://" in source else found.name
    if Path(source).is_file():
        return None, [read_picture(Path(source))], Path(source).name
    with open_source(source, limit=limit) as frames:
        images = [np.array(frame.image) for frame in frames]
    if not images:
        raise UsageError(f"pictures {printable(source)}: there are none. Give a folder with pictures")
    return None, images, source if "://" in source else Path(source).name


def _moments(options: Options, side: Side) -> tuple[Any, Footage, str]:
    """As `_pictures`, of a rig."""
    from edgekit.tasks.fusion.dataset import read_set

    if options.data is not None:
        data = read_set(options.data, None, limit=options.limit, labels=side.spec.labels)
        return data, [data.read(i) for i in range(min(IMAGES, len(data)))], data.name
    limit = options.limit or IMAGES
    source = options.images or f"{toolchain_task(side.task).DEFAULT_SOURCE}?frames={limit}&seed=20000"
    found = read_set(Path(source), None, limit=limit)
    return None, [found.take(i) for i in range(len(found))], found.name


def _run(
    sides: tuple[Side, Side], images: Footage, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any], tuple[Shown, ...]]:
    """Outputs and results over the pictures, and the pictures worth showing."""
    task = tasks.task(sides[0].task)
    errors: dict[str, _Error] = {}
    pairs: list[tuple[Any, Any]] = []
    pipelines = [side.pipeline for side in sides]
    why = _outputs_differ(sides)
    stills = []
    for number, (image, pair) in enumerate(results(pipelines, images)):
        progress("outputs and results", number, max(number, len(images)))
        stills.append(image)
        pairs.append((pair[0], pair[1]))
        if not why:
            got = sides[1].pipeline.session.outputs
            for name, want in sides[0].pipeline.session.outputs.items():
                errors.setdefault(name, _Error()).add(want, got[name])
    agreed = [task.agreement([pair]) for pair in pairs]
    total = counts(task.agreement(pairs))
    found = {**total, "per_picture": [counts(one, pairs=False) for one in agreed]}
    outputs: dict[str, Any] = {"not_compared": why} if why else {
        "tensors": [{"tensor": name, **error.table()} for name, error in errors.items()]
    }  # fmt: skip

    def apart(i: int) -> tuple[float, float]:
        one = found["per_picture"][i]
        return (one["lost"] + one["new"], one["score_shift_max"] or 0.0)

    order = sorted(range(len(stills)), key=lambda i: (-apart(i)[0], -apart(i)[1], i))[:SHOWN]
    shown = tuple(Shown(stills[i], pairs[i], _caption(found["per_picture"][i])) for i in order)
    return outputs, found, shown


def _outputs_differ(sides: tuple[Side, Side]) -> str:
    """Why the raw outputs cannot be compared, "" when they can."""
    shapes = [{n: (a.shape, a.dtype.name) for n, a in s.pipeline.session.outputs.items()} for s in sides]
    if shapes[0] != shapes[1]:
        said = [", ".join(f"{n} {list(shape)} {kind}" for n, (shape, kind) in s.items()) for s in shapes]
        return f"the outputs differ: {said[0]} in A, {said[1]} in B"
    return ""


class _Error:
    """Sums of the difference of one output over pictures, in float64."""

    def __init__(self) -> None:
        self.worst = self.total = self.noise = self.signal = 0.0
        self.low, self.high, self.count, self.bad = np.inf, -np.inf, 0, 0

    def add(self, want: np.ndarray, got: np.ndarray) -> None:
        good = np.isfinite(want) & np.isfinite(got)
        self.bad += int(good.size - good.sum())
        a, b = (side[good].astype(np.float64) for side in (want, got))
        if not a.size:
            return
        error = np.abs(b - a)
        self.worst = max(self.worst, float(error.max()))
        self.total += float(error.sum())
        self.noise += float((error**2).sum())
        self.signal += float((a**2).sum())
        self.low, self.high = min(self.low, float(a.min())), max(self.high, float(a.max()))
        self.count += a.size

    def table(self) -> dict[str, Any]:
        if not self.count:
            return {"max_abs": None, "mean_abs": None, "rms": None, "sqnr_db": None, "range": None,
                    "not_finite": self.bad}  # fmt: skip
        ratio = self.signal / self.noise if self.noise else 0.0
        return {
            "max_abs": self.worst,
            "mean_abs": self.total / self.count,
            "rms": (self.noise / self.count) ** 0.5,
            "sqnr_db": round(10 * float(np.log10(ratio)), 2) if ratio > 0 else None,
            "range": [self.low, self.high],
            "not_finite": self.bad,
        }


def counts(agreed: Mapping[str, Any], pairs: bool = True) -> dict[str, Any]:
    """An agreement (tasks.Task.agreement) in neutral names: a, b, matched, lost (of A), new (in B)."""
    unit = agreed["unit"]
    a, b, matched = (agreed[f"{unit}_{key}"] for key in ("reference", "payload", "matched"))
    table = {"unit": unit, "a": a, "b": b, "matched": matched, "lost": a - matched, "new": b - matched}
    keys = ("score_shift_mean", "score_shift_max", "lost_score_max", *(("pairs",) if pairs else ()))
    return table | {key: agreed.get(key) for key in keys}


def _caption(one: Mapping[str, Any]) -> str:
    if not one["lost"] and not one["new"]:
        shift = one["score_shift_max"]
        return f"all {one['matched']} {one['unit']} matched" + (
            f", scores within {shift:.3f}" if shift else ""
        )
    return f"{one['matched']} {one['unit']} matched, {one['lost']} lost, {one['new']} new"


def _layers(sides: tuple[Side, Side]) -> dict[str, Any]:
    """The layers of both, joined by their id, in A's order; those of one side only at the end."""
    missing = [letter for letter, side in zip("AB", sides, strict=True) if not side.layers]
    if len(missing) == 2:
        return {"not_compared": "neither carries evidence by layer"}
    known: list[dict[str, Facts]] = [
        {layer.text("id", 200): layer for layer in side.layers if layer.text("id", 200)} for side in sides
    ]
    rows = []
    for name in dict.fromkeys([*known[0], *known[1]]):
        ends = [one.get(name, Facts()) for one in known]
        rows.append(
            {
                "id": name,
                "op": ends[0].text("op", 60) or ends[1].text("op", 60),
                **{
                    letter: {
                        "precision": end.text("precision", 40),
                        "sqnr_db": end.number("sqnr_db"),
                        "share": end.number("share"),
                    }
                    if end
                    else None
                    for letter, end in zip("ab", ends, strict=True)
                },
            }
        )
    note = f"{missing[0]} carries no evidence by layer" if missing else ""
    return {"layers": rows, "note": note}


def _metric(sides: tuple[Side, Side], data: Any, options: Options, progress: Progress) -> dict[str, Any]:
    """The task's metric of both on the labelled pictures, and the interval of the difference (paired bootstrap)."""
    if data is None:
        return {"not_measured": "no labelled pictures were given (--data, --images)"}
    task = tasks.task(sides[0].task)
    sets = [data, data]
    if sides[0].spec.labels != sides[1].spec.labels:
        assert options.data is not None
        folder = None if options.images is None else Path(options.images)
        labels = sides[1].spec.labels
        sets[1] = task.read_set(options.data, folder, limit=options.limit, labels=labels)
    found, rounds = [], []
    for letter, side, one in zip("AB", sides, sets, strict=True):
        report = _counting(progress, f"accuracy of {letter}")
        metric, results = task.evaluate(side.pipeline, one, progress=report)
        found.append(metric)
        rounds.append(task.bootstrap(one, results))
    key = task.METRIC
    before, after = found[0][key], found[1][key]
    differences = [
        y - x if x is not None and y is not None else None for x, y in zip(rounds[0], rounds[1], strict=True)
    ]
    return {
        "name": key,
        "data": data.name,
        "images": len(data.images),
        "of": task.LABELLED,
        "a": {k: v for k, v in found[0].items() if k != "per_class"},
        "b": {k: v for k, v in found[1].items() if k != "per_class"},
        "per_class": _per_class(found),
        "difference": None if before is None or after is None else round(after - before, 6),
        "difference_interval95": interval95(differences) if sets[0] is sets[1] else None,
    }


def _per_class(found: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    tables = [m.get("per_class") or {} for m in found]
    return {name: [t.get(name) for t in tables] for name in dict.fromkeys([*tables[0], *tables[1]])}


def _counting(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, of: progress(what, done, of)


def _ratio(unit: str, a: float, b: float) -> dict[str, Any]:
    return {f"a_{unit}": a, f"b_{unit}": b, "ratio": round(b / a, 4) if a else None}


def _latency(sides: tuple[Side, Side], still: Still, options: Options, progress: Progress) -> dict[str, Any]:
    """Interleaved here: the network alone, and everything from picture to result."""
    if not options.rounds:
        return {"not_measured": "left out (--rounds 0)"}
    image, _ = next(frames([still]))
    for side in sides:
        restart(side.pipeline)
    progress("time both, interleaved", 0, 1)  # not once a run: drawing it would be timed too
    effort = tuning.Effort(options.rounds, 2, BUDGET_S / 2)
    a, b = (side.pipeline for side in sides)
    tables = {}
    for part, runs in (
        ("engine", {"a": a.session.run, "b": b.session.run}),
        ("total", {"a": lambda: _drop(a(image)), "b": lambda: _drop(b(image))}),
    ):
        first, second = tuning.timings(tuning.race(runs, effort), "a")
        tables[part] = {
            "a_ms": first.median_ms,
            "b_ms": second.median_ms,
            "a_quartiles_ms": [first.p25_ms, first.p75_ms],
            "b_quartiles_ms": [second.p25_ms, second.p75_ms],
            "ratio": second.ratio,
            "rounds": first.rounds,
        }
    return {**tables, "machine": machine(options.threads)}


def _drop(result: Any) -> None:
    """Drop a result."""
