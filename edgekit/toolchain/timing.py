"""Times of payloads on this machine: evidence of a build whose target it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.backends.base import Payload
from edgekit.host import board
from edgekit.spec import StateSpec
from edgekit.target import Target
from edgekit.toolchain import evidence
from edgekit.toolchain.running import Running, Still, Subject, frames, restart, run_here

Progress = Callable[[str, int, int], None]
TIMING_WARMUP, TIMING_RUNS = 10, 100
COMPARE_ROUNDS, COMPARE_RUNS = 30, 2


def is_here(target: Target) -> bool:
    """This machine is the target: what is timed here is true of it."""
    here = board()
    return target.name == "host" or (here is not None and here.name == target.name)


def time_here(subject: Subject, first: Still, progress: Progress) -> dict[str, Any]:
    """Stage times of the payload on this machine (only used when this machine is the target)."""
    from edgekit.runtime.bench import machine, run_once, summarize

    _, pipeline = subject.pipelines()
    image, _ = next(frames([first]))
    restart(pipeline)
    progress("time", 0, 1)  # not once a run: drawing it would be timed too
    samples = [run_once(pipeline, image) for _ in range(TIMING_WARMUP + TIMING_RUNS)]
    return {
        "machine": machine(0),
        "payload": subject.candidate.payload.variant,
        "stages": summarize(np.array(samples[TIMING_WARMUP:])),
        "image": list(image.shape[1::-1]),
    }


def compare_here(subjects: Sequence[Subject], first: Still, progress: Progress) -> dict[str, Any]:
    """Milliseconds of each payload and of the float network, network alone with its conversions, interleaved.

    A payload that takes its picture as codes gets them ready, as its pipeline writes them (docs/native.md).
    Median and spread (quartiles) over rounds; one thread each, so that libraries' thread pools do not meet.
    States go round in every one of them, from the first frame of a clip on: moving them is part of the time.
    """
    states = subjects[0].reference.states
    runs = {"float": open_timed(subjects[0].reference.payload, states)}
    runs |= {s.candidate.payload.variant: open_timed(s.candidate.payload, states) for s in subjects}
    image, _ = next(frames([first]))
    evidence.feed(subjects[0], image)
    ((name, array),) = subjects[0].reference.binding.inputs.items()
    for running in runs.values():
        running.session.write(name, array)
    order = np.random.default_rng(0)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    progress("time the variants", 0, 1)
    for turn in range(COMPARE_ROUNDS + 3):
        for name in order.permutation(list(runs)):
            start = time.perf_counter()
            for _ in range(COMPARE_RUNS):
                runs[name].binding.run()
            if turn >= 3:
                taken[name].append(1e3 * (time.perf_counter() - start) / COMPARE_RUNS)
    quarters = {name: np.percentile(times, [25, 50, 75]) for name, times in taken.items()}
    for running in runs.values():
        running.binding.close()
    return {
        name: {
            "ms": round(float(q[1]), 4),
            "quartiles": [round(float(q[0]), 4), round(float(q[2]), 4)],
            "ratio": round(float(quarters["float"][1] / q[1]), 3),
        }
        for name, q in quarters.items()
    }


def fastest(subjects: Sequence[Subject], speed: Mapping[str, Any]) -> Subject:
    """The one that the device would choose: the least median of `compare_here`."""
    return min(subjects, key=lambda s: float(speed[s.candidate.payload.variant]["ms"]))


def open_timed(payload: Payload, states: Sequence[StateSpec] = ()) -> Running:
    return run_here(payload, states, threads=1)
