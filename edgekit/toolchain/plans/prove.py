"""What is proven of a plan's payloads, by running the whole of it beside the float plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from edgekit import tasks
from edgekit.bundle import golden_bytes, golden_path
from edgekit.errors import EvidenceError, ModelError
from edgekit.manifest import Golden, GoldenTensor
from edgekit.project import Accept
from edgekit.quant.search import Look
from edgekit.rig import RigFrame
from edgekit.schema import to_json
from edgekit.target import Target
from edgekit.tasks.fusion.draw import draw
from edgekit.toolchain import accuracy, evidence
from edgekit.toolchain.plans.moments import LOSSES, Moments, without
from edgekit.toolchain.plans.running import Payloads, PlanRunning, Workshop

Progress = Callable[[str, int, int], None]

SAMPLES, SAMPLE_WIDTH, CAMERA_WIDTH = 3, 1280, 320
TIMING_WARMUP, TIMING_RUNS = 5, 40


@dataclass(frozen=True)
class Ground:
    """What a plan is proven on. frames: to compare results on.  labelled: for the task's metric, or None with the reason."""

    floats: PlanRunning
    frames: tuple[RigFrame, ...]
    what: str
    labelled: Moments | None
    why_unlabelled: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lost:
    """Labelled moments without a kind of sensor, as an evaluation set (`moments.without`)."""

    task: ClassVar[str] = "fusion"

    whole: Moments
    lost: str

    @property
    def name(self) -> str:
        return f"{self.whole.name}, without {self.lost}"

    @property
    def digest(self) -> str:
        return f"{self.whole.digest} without {self.lost}"

    @property
    def labels(self) -> tuple[str, ...]:
        return self.whole.labels

    @property
    def labelled_in(self) -> tuple[str, ...]:
        return self.whole.labelled_in

    @property
    def images(self) -> range:
        return self.whole.images

    def read(self, index: int) -> RigFrame:
        return without(self.whole.read(index), self.lost)


@dataclass(frozen=True)
class Judged:
    """One set of payloads, and what was found out about it."""

    payloads: Payloads
    metric: dict[str, Any]
    agreement: dict[str, Any]
    verdict: dict[str, Any]
    outputs: list[dict[str, Any]]
    simulated: bool
    run_by: str

    @property
    def look(self) -> Look:
        name = self.metric.get("name")
        value = None if name is None else self.metric["payload"][name]
        return Look(self.verdict["passed"], value, self.metric.get("drop"), self.verdict["reason"])


def judge(shop: Workshop, ground: Ground, payloads: Payloads, what: str, progress: Progress) -> Judged:
    """Run payloads and the float plan on the same moments: errors of outputs, agreement, metric, verdict.

    Raises: ModelError where the float plan gives NaN or infinity, EvidenceError where the payloads do.
    """
    with shop.opened(payloads) as running:
        outputs = {name: evidence.Noise() for name in running.session.outputs}
        pairs: list[tuple[Any, Any]] = []
        for number, frame in enumerate(ground.frames):
            progress(f"{what}: results", number, len(ground.frames))
            frame = without(frame, LOSSES[number % len(LOSSES)])
            pairs.append((ground.floats.pipeline(frame), running.pipeline(frame)))
            for name, noise in outputs.items():
                want = ground.floats.session.outputs[name].astype(np.float64)
                got = running.session.outputs[name].astype(np.float64)
                _check_finite(name, want, got, what, number)
                noise.add(want, got)
        agreement = evidence.agreement(pairs)
        found = _metric(ground, running, what, progress)
        verdict = evidence.check_accept(
            found, agreement, shop.source.entry.accept, running.spec.score_threshold
        )
        rows = [noise.row(name) for name, noise in outputs.items()]
        return Judged(payloads, found, agreement, verdict, rows, running.simulated, running.run_by)


def modes(
    shop: Workshop, ground: Ground, payloads: Payloads, what: str, progress: Progress
) -> dict[str, Any]:
    """The task's metric where a kind of sensor is lost all the time: float plan, payloads, drop with its interval; {}
    without labels. A network may lean on one of them so much that its rounding of the other shows nowhere else."""
    if ground.labelled is None:
        return {}
    found = {}
    with shop.opened(payloads) as running:
        for lost in filter(None, LOSSES):
            part = _metric(ground, running, f"{what}, without {lost}", progress, Lost(ground.labelled, lost))
            name = part["name"]
            found[f"without {lost}"] = {
                "name": name,
                "reference": part["reference"][name],
                "payload": part["payload"][name],
                "drop": part["drop"],
                "drop_interval95": part["drop_interval95"],
            }
    return found


def mode_limits(found: Mapping[str, Any], accept: Accept) -> list[str]:
    """A sentence for each mode whose drop is beyond the budget, which is held with all sensors."""
    return [
        f"{mode.capitalize()}, {m['name']} drops by {m['drop']:.4f} from {m['reference']:.4f}, beyond the {accept.max_drop} that is "
        "held with all sensors."
        for mode, m in found.items()
        if m["drop"] is not None and m["drop"] > accept.max_drop
    ]


def _metric(
    ground: Ground, running: PlanRunning, what: str, progress: Progress, part: Lost | None = None
) -> dict[str, Any]:
    """part: instead of the labelled moments."""
    data: Any = part or ground.labelled
    if data is None:
        return {"not_measured": ground.why_unlabelled}

    def measured(side: PlanRunning, label: str) -> dict[str, Any]:
        spec = running.spec
        content = [*side.content, to_json(spec)]
        return accuracy.measured(
            lambda: tasks.open_pipeline(spec, side.session), content, data, f"accuracy, {label}", progress
        )

    known = measured(ground.floats, "float")
    got = measured(running, what)
    return accuracy.compared(known, got, data, running.run_by)


def _check_finite(name: str, want: np.ndarray, got: np.ndarray, what: str, number: int) -> None:
    for values, side in ((want, "float"), (got, what)):
        bad = int(values.size - np.isfinite(values).sum())
        if bad and side == "float":
            raise ModelError(
                f"model: output {name} holds {bad} values of {values.size} that are NaN or infinite at moment {number}, in "
                "float32 already. Check the export"
            )
        if bad:
            raise EvidenceError(
                f"payloads {what}: output {name} holds {bad} values of {values.size} that are NaN or infinite at moment "
                f"{number}. Build with --precision float32"
            )


# --- files of the evidence ------------------------------------------------------------------------------


def golden(shop: Workshop, ground: Ground, columns: Sequence[Payloads]) -> tuple[Golden, dict[str, bytes]]:
    """What a moment gives as inputs of the plan, and the outputs of the float plan, with tolerances that hold every one
    of `columns`."""
    frame = ground.frames[0]
    floats = ground.floats
    floats.pipeline(frame)
    files: dict[str, bytes] = {}
    sources = []
    for i, (name, value) in enumerate(floats.session.inputs.items()):
        sources.append(GoldenTensor(name, golden_path("input", i)))
        files[sources[-1].path] = golden_bytes(value)
    want = {name: value.copy() for name, value in floats.session.outputs.items()}
    reduced: list[dict[str, np.ndarray]] = []
    for payloads in columns:
        exact = all(
            step.options.get("precision", "float32") == "float32" for step in shop.source.kernels.values()
        )
        if exact and all(payload.precision == "float32" for payload in payloads.values()):
            continue
        with shop.opened(payloads) as running:
            for name, value in floats.session.inputs.items():
                np.copyto(running.session.inputs[name], value)
            running.session.run()
            reduced.append({name: value.copy() for name, value in running.session.outputs.items()})
    outputs = []
    for i, (name, value) in enumerate(want.items()):
        path = golden_path("output", i)
        outputs.append(evidence.tolerance(name, path, value, [got[name] for got in reduced]))
        files[path] = golden_bytes(value)
    return Golden(tuple(sources), tuple(outputs)), files


def samples(
    shop: Workshop, ground: Ground, payloads: Payloads, precision: str
) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """What is found at some moments: every camera and the view from above in one picture."""
    entries, files = [], {}
    with shop.opened(payloads) as running:
        for i, frame in enumerate(ground.frames[:SAMPLES]):
            result = running.pipeline(frame)
            name = f"evidence/sample_{i}.jpg"
            files[name] = evidence.jpeg(draw(frame, result, width=CAMERA_WIDTH), SAMPLE_WIDTH)
            entries.append(
                {"file": name, "caption": f"{result.caption()}, payloads {precision}; labels in white"}
            )
    return entries, files


def timing(shop: Workshop, ground: Ground, payloads: Payloads, progress: Progress) -> dict[str, Any]:
    """Times on this machine: stages, and of the plan each step, one after the other and with overlap."""
    from edgekit.runtime.bench import machine, run_once, step_times, summarize

    frame = ground.frames[0]
    taken: list[tuple[int, ...]] = []
    runs: dict[bool, list[dict[str, tuple[int, int]]]] = {False: [], True: []}
    with shop.opened(payloads) as running:
        session = running.session
        side_by_side = session.overlap
        progress("time", 0, 1)  # not once a run: drawing it would be timed too
        for turn in range(TIMING_WARMUP + TIMING_RUNS):
            for overlap in (False, side_by_side):
                session.overlap = overlap
                sample = run_once(running.pipeline, frame)
                if turn >= TIMING_WARMUP:
                    runs[overlap].append(dict(session.step_ns))
                    taken += [sample] if overlap == side_by_side else []
    alone, beside = step_times(runs[False]), step_times(runs[side_by_side])
    return {
        "machine": machine(shop.threads),
        "payload": "/".join(dict.fromkeys(p.variant for p in payloads.values())),
        "stages": summarize(np.array(taken)),
        "steps": {
            name: {"alone_ms": ms, "overlapped_ms": beside["median_ms"][name]}
            for name, ms in alone["median_ms"].items()
        },
        "serial_ms": alone["span_ms"],
        "overlapped_ms": beside["span_ms"],
        "runs": TIMING_RUNS,
    }


def limits(target: Target, judged: Judged, timed: bool, kernels: Sequence[str]) -> list[str]:
    """Plain sentences on what the evidence does not show."""
    texts = []
    if judged.verdict["passed"] is False:
        texts.append(f"The build missed its limits: {judged.verdict['reason']}.")
    if judged.simulated:
        texts.append(
            f"The payloads have not run on {target.title}: all results come from {judged.run_by}. The self-test at the first "
            "load there checks the outputs of the whole plan."
        )
    elif target.name != "host":
        texts.append(
            f"The payloads ran on the build machine, not on {target.title}; outputs there may differ in the last digits."
        )
    if target.gpu is not None and kernels:
        texts.append(
            f"The kernels {', '.join(kernels)} run on the CPU of {target.title}; CUDA ones are not bound to plans yet."
        )
    if not timed:
        texts.append(f"No latency was measured on {target.title}: run 'edgekit bench' there.")
    if "not_measured" in judged.metric:
        texts.append(f"Accuracy was not measured: {judged.metric['not_measured']}.")
    return texts
