"""Times a bundle stage by stage, the way a robot pays for it: everything between picture and result."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.runtime.engine import Engine
from edgekit.runtime.selftest import conditions
from edgekit.tasks import Pipeline

STAGES = ("preprocess", "engine", "decode", "total")


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
    copies per frame, machine and what ran; of a plan of several steps the median of each.
    """
    pipelines = [engine.pipeline() for engine in engines]
    for _ in range(warmup):
        for pipeline in pipelines:
            run_once(pipeline, image)
    samples = np.zeros((len(pipelines), runs, len(STAGES)), np.int64)
    steps: list[list[dict[str, tuple[int, int]]]] = [[] for _ in pipelines]
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
            **({"steps": step_times(steps[j])} if steps[j][0] else {}),
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


def step_times(runs: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, Any]:
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
