"""Times a bundle stage by stage, the way a robot pays for it: everything between picture and result."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.manifest import Manifest
from edgekit.runtime.engine import Engine
from edgekit.runtime.plan import dependencies
from edgekit.runtime.selftest import conditions
from edgekit.tasks import Pipeline

STAGES = ("preprocess", "engine", "decode", "total")
SERIAL_RUNS = 50
"""Runs at most in which the steps of a plan are timed one after the other."""

StepTimes = Mapping[str, tuple[int, int]]
"""Begin and end of each step, `time.perf_counter_ns`."""


def machine(threads: int) -> dict[str, Any]:
    """What a timing depends on, for its record. `threads` 0 = the library's choice."""
    return {
        **conditions(threads),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def run_once(pipeline: Pipeline, image: Any) -> tuple[int, ...]:
    """One call with a picture, or a moment of a rig; (preprocess, engine, decode, total) in nanoseconds."""
    pipeline(image)
    return (*pipeline.stage_ns, sum(pipeline.stage_ns))


def summarize(samples: np.ndarray) -> dict[str, Any]:
    """Stage table of samples [runs, 4] in nanoseconds."""
    return {
        stage: {
            "median_ms": round(float(np.median(samples[:, i])) / 1e6, 4),
            "p95_ms": round(float(np.percentile(samples[:, i], 95)) / 1e6, 4),
            "p99_ms": round(float(np.percentile(samples[:, i], 99)) / 1e6, 4),
            "min_ms": round(float(samples[:, i].min()) / 1e6, 4),
            "runs": len(samples),
        }
        for i, stage in enumerate(STAGES)
    }


def measure(
    engines: list[Engine], image: Any, *, warmup: int = 20, runs: int = 200, threads: int = 0
) -> list[dict[str, Any]]:
    """Time engines on `image` (uint8 [H, W, 3] BGR, or a rig.RigFrame), interleaved call by call so that load hits all
    alike.

    Returns: per engine stages (median, p95, p99, min in ms), peak_rss_bytes of this process,
    copies per frame, machine and what ran; of a plan of several steps `step_times` and, one after the other and
    side by side, `account`.
    """
    pipelines = [engine.pipeline() for engine in engines]
    for _ in range(warmup):
        for pipeline in pipelines:
            run_once(pipeline, image)
    samples = np.zeros((len(pipelines), runs, len(STAGES)), np.int64)
    steps: list[list[StepTimes]] = [[] for _ in pipelines]
    for i in range(runs):
        for j, pipeline in enumerate(pipelines):
            samples[j, i] = run_once(pipeline, image)
            steps[j].append(dict(getattr(pipeline, "step_ns", {})))
    return [
        {
            "bundle": str(engine.bundle.path),
            "target": engine.manifest.target,
            "stages": summarize(samples[j]),
            "image": sizes(image),
            **(
                {"steps": _steps(engine, pipelines[j], image, steps[j], samples[j, :, 1])}
                if steps[j][0]
                else {}
            ),
            "peak_rss_bytes": peak_rss_bytes(),
            "copies": copies(pipelines[j]),
            "machine": machine(threads),
            "engine": engine.describe(),
        }
        for j, engine in enumerate(engines)
    ]


def sizes(image: Any) -> list[int]:
    """[width, height] of a picture, or of the first camera's of a rig; [0, 0] for a LiDAR alone."""
    if not isinstance(image, np.ndarray):
        image = next((shot.image for shot in image.shots.values()), np.zeros((0, 0, 3), np.uint8))
    return [int(image.shape[1]), int(image.shape[0])]


def step_times(runs: Sequence[StepTimes]) -> dict[str, Any]:
    """Of runs by step (`Session.step_ns`): median milliseconds of each, of all from the first start to the last end
    (`span_ms`), and their sum: with overlap it is the larger one."""
    taken = {name: [run[name][1] - run[name][0] for run in runs if name in run] for name in runs[0]}
    each = {name: round(float(np.median(values)) / 1e6, 4) for name, values in taken.items()}
    spans = [max(end for _, end in run.values()) - min(start for start, _ in run.values()) for run in runs]
    return {
        "median_ms": each,
        "sum_ms": round(sum(each.values()), 4),
        "span_ms": round(float(np.median(spans)) / 1e6, 4),
    }


def account(runs: Sequence[StepTimes], wall_ns: Sequence[int], manifest: Manifest) -> dict[str, Any]:
    """Where the time of runs (`Session.step_ns`, each with its wall time) went, medians in milliseconds.

    wall_ms; sum_ms: of all steps; critical_ms: of the longest chain of steps of which each waits for the one before, and
    `critical`, its steps in the run in the middle; rest_ms: what of the wall time is in no step. Of one run after the
    other, sum + rest = wall; side by side the wall time lies between critical and sum + rest.
    """
    sums, longest, rests, chains = [], [], [], []
    for run, wall in zip(runs, wall_ns, strict=True):
        sums.append(sum(end - start for start, end in run.values()))
        length, chain = _critical(run, manifest)
        longest.append(length)
        chains.append(chain)
        rests.append(wall - _covered(run))
    middle = chains[int(np.argsort(longest)[len(longest) // 2])]
    values = {"wall_ms": wall_ns, "sum_ms": sums, "critical_ms": longest, "rest_ms": rests}
    return {name: round(float(np.median(each)) / 1e6, 4) for name, each in values.items()} | {
        "critical": middle
    }


def _critical(run: StepTimes, manifest: Manifest) -> tuple[int, list[str]]:
    """Nanoseconds and steps of the longest chain in which each waits for the one before."""
    best: list[tuple[int, list[str]]] = []
    for step, after in zip(manifest.plan, dependencies(manifest), strict=True):
        length, chain = max((best[i] for i in after), default=(0, []), key=lambda found: found[0])
        start, end = run.get(step.name, (0, 0))
        best.append((length + end - start, [*chain, step.name]))
    return max(best, key=lambda found: found[0])


def _covered(run: StepTimes) -> int:
    """Nanoseconds in which at least one step was at work."""
    covered, until = 0, 0
    for start, end in sorted(run.values()):
        covered += max(0, end - max(start, until))
        until = max(until, end)
    return covered


def _steps(
    engine: Engine, pipeline: Any, image: Any, runs: Sequence[StepTimes], wall_ns: np.ndarray
) -> dict[str, Any]:
    """Tables of a plan; where steps ran side by side, also of some runs one after the other."""
    session, how = pipeline.session, "overlapped" if pipeline.session.overlap else "serial"
    told = {**step_times(runs), how: account(runs, wall_ns.tolist(), engine.manifest)}
    if session.overlap:
        session.overlap = False
        try:
            walls, alone = [], []
            for _ in range(min(len(runs), SERIAL_RUNS)):
                walls.append(run_once(pipeline, image)[1])
                alone.append(dict(pipeline.step_ns))
        finally:
            session.overlap = True
        told["serial"] = account(alone, walls, engine.manifest)
    return told


def copies(pipeline: Pipeline) -> dict[str, Any]:
    """The copy ledger of one frame: bytes copied unchanged, and what the fused kernel wrote."""
    copied = getattr(pipeline.session, "bytes_copied_per_run", 0)
    written = sum(a.nbytes for a in pipeline.session.inputs.values())
    return {
        "bytes_per_frame": copied,
        "hops": [
            {"hop": "picture -> engine input", "by": "CPU, fused kernel", "copied": 0, "written": written},
            {"hop": "between plan steps", "by": "CPU", "copied": copied, "written": copied},
        ],
    }


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:  # getrusage also counts the process that started this one
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
