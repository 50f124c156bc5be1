"""The task's metric of a payload and of the float network it came from, on the same labelled pictures."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from edgekit.runtime.selftest import cpu_name
from edgekit.schema import to_json
from edgekit.tasks.detect.dataset import CocoSet
from edgekit.tasks.detect.evaluate import evaluate_pipeline
from edgekit.tasks.detect.metric import NAMES, bootstrap, interval95
from edgekit.tasks.detect.pipeline import DetectPipeline
from edgekit.tasks.detect.spec import DetectSpec
from edgekit.toolchain import cache
from edgekit.toolchain.running import Running, Subject

Progress = Callable[[str, int, int], None]

CODE = ("kernels", "tasks", "backends/onnxruntime")
"""Packages whose code decides what a metric comes to."""


def metric(subject: Subject, data: CocoSet, progress: Progress) -> dict[str, Any]:
    """AP of the float network and of the payload, its drop, and 95 % intervals of both.

    `drop_interval95` is paired: each round draws the same pictures for both networks, so what the
    choice of pictures does to both alike cancels out.
    """
    known = measure(subject.reference, subject.spec, data, "accuracy, float", progress)
    what = f"accuracy, {subject.candidate.payload.precision}"
    got = measure(subject.candidate, subject.spec, data, what, progress)
    before, after = known["metric"]["AP"], got["metric"]["AP"]
    drops = [
        a - b if a is not None and b is not None else None
        for a, b in zip(known["rounds"], got["rounds"], strict=True)
    ]
    return {
        "name": "AP",
        "data": data.name,
        "data_digest": data.digest,
        "images": len(data.images),
        "reference": {k: v for k, v in known["metric"].items() if k != "per_class"},
        "payload": {k: v for k, v in got["metric"].items() if k != "per_class"},
        "per_class": got["metric"]["per_class"],
        "drop": None if before is None or after is None else round(before - after, 6),
        "interval95": interval95(got["rounds"]),
        "drop_interval95": interval95(drops),
        "measured_by": subject.run_by,
    }


def measure(
    running: Running, spec: DetectSpec, data: CocoSet, what: str, progress: Progress
) -> dict[str, Any]:
    """`metric` and its bootstrap `rounds`; from the cache where this very payload was measured before."""
    key = cache.digest(
        running.payload.data,
        to_json(spec),
        data.digest,
        list(data.labels),
        cache.tools(),
        cache.sources(*CODE),
        [platform.machine(), cpu_name()],
    )
    known = cache.load("metric", key)
    if known is not None:
        return known
    pipeline = DetectPipeline(spec, running.binding)
    found, results = evaluate_pipeline(pipeline, data, progress=lambda done, of: progress(what, done, of))
    rounds = bootstrap(data, results, progress=lambda done, of: progress(f"{what}: interval", done, of))
    measured = {"metric": found, "rounds": rounds}
    assert set(NAMES) <= set(found), "what the evidence shows"
    cache.store("metric", key, measured)
    return measured
