"""The task's metric of a payload and of the float network it came from, on the same labelled pictures."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgekit import tasks
from edgekit.runtime.selftest import cpu_name
from edgekit.schema import to_json
from edgekit.tasks import EvaluationSet, Spec, open_pipeline
from edgekit.tasks.interval import interval95
from edgekit.toolchain import cache
from edgekit.toolchain.clips import clip_accuracy
from edgekit.toolchain.running import Running, Subject

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgekit.passes.streamify import Streamified

Progress = Callable[[str, int, int], None]

CODE = (
    "kernels",
    "tasks",
    "timebase.py",
    "runtime/session.py",
    "runtime/state.py",
    "backends/onnxruntime",
    "backends/litert",
    "backends/openvino",
)
"""Packages and modules whose code decides what a metric comes to."""


def metric(subject: Subject, data: EvaluationSet, progress: Progress) -> dict[str, Any]:
    """The task's metric of the float network and of the payload, its drop, and 95 % intervals of both.

    `drop_interval95` is paired: each round draws the same pictures for both networks, so what the
    choice of pictures does to both alike cancels out.
    """
    known = measure(subject.reference, subject.spec, data, "accuracy, float", progress)
    what = f"accuracy, {subject.candidate.payload.precision}"
    got = measure(subject.candidate, subject.spec, data, what, progress)
    return compared(known, got, data, subject.run_by)


def compared(
    known: Mapping[str, Any], got: Mapping[str, Any], data: EvaluationSet, run_by: str
) -> dict[str, Any]:
    """What `metric` says of two results of `measured` on the same `data`."""
    task = tasks.of(data)
    name = task.METRIC
    before, after = known["metric"][name], got["metric"][name]
    drops = [
        a - b if a is not None and b is not None else None
        for a, b in zip(known["rounds"], got["rounds"], strict=True)
    ]
    return {
        "name": name,
        "data": data.name,
        "data_digest": data.digest,
        "images": len(data.images),
        "of": task.LABELLED,
        "reference": {k: v for k, v in known["metric"].items() if not isinstance(v, (dict, list))},
        "payload": {k: v for k, v in got["metric"].items() if not isinstance(v, (dict, list))},
        **{k: v for k, v in got["metric"].items() if isinstance(v, (dict, list))},
        "drop": None if before is None or after is None else round(before - after, 6),
        "interval95": interval95(got["rounds"]),
        "drop_interval95": interval95(drops),
        "measured_by": run_by,
    }


def lost_by_conversion(
    clip_model: ir.Model, made: Streamified, reference: Running, spec: Any, data: Any, progress: Progress
) -> dict[str, Any]:
    """The task's metric of a clip model that looks ahead and of the float one-frame network made of it, on the
    same clips: how much the conversion costs. `drop_interval95` is paired, as in `metric`."""
    task = tasks.of(data)
    before, answers = clip_accuracy(clip_model, made, spec, data, progress)
    got = measure(reference, spec, data, "accuracy, float", progress)
    rounds = zip(task.bootstrap(data, answers), got["rounds"], strict=True)
    drops = [a - b if a is not None and b is not None else None for a, b in rounds]
    name = task.METRIC
    return {
        "name": name,
        "data": data.name,
        "images": len(data.images),
        "clip_model": before[name],
        "one_frame": got["metric"][name],
        "drop": round(before[name] - got["metric"][name], 6),
        "drop_interval95": interval95(drops),
    }


def measure(
    running: Running, spec: Spec, data: EvaluationSet, what: str, progress: Progress
) -> dict[str, Any]:
    """`metric` and its bootstrap `rounds`; from the cache where this very payload was measured before."""
    content = [
        running.payload.backend,  # two libraries may run the same file
        running.payload.data,
        to_json(spec),
        to_json(list(getattr(running.binding, "state_specs", ()))),
    ]
    return measured(lambda: open_pipeline(spec, running.binding), content, data, what, progress)


def measured(
    opened: Callable[[], Any], content: Sequence[Any], data: EvaluationSet, what: str, progress: Progress
) -> dict[str, Any]:
    """`metric` of the pipeline that `opened` gives, and its bootstrap `rounds`. content: all that decides what it finds,
    the code and tools here aside: where that was measured before on these data, the result comes from the cache."""
    key = cache.digest(
        *content,
        data.digest,
        list(data.labels),
        cache.tools(),
        cache.sources(*CODE),
        [platform.machine(), cpu_name()],
    )
    known = cache.load("metric", key)
    if known is not None:
        return known
    pipeline, task = opened(), tasks.of(data)
    found, results = task.evaluate(pipeline, data, progress=lambda done, of: progress(what, done, of))
    rounds = task.bootstrap(data, results, progress=lambda done, of: progress(f"{what}: interval", done, of))
    assert {task.METRIC, "per_class"} <= set(found), "what the evidence shows"
    result = {"metric": found, "rounds": rounds}
    cache.store("metric", key, result)
    return result
