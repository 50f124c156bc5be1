"""A proven network in lanes: payloads of several streams a run, held against those that were proven.

What is proven (accuracy, agreement, errors) is the network of one stream. `passes.lanes` then gives each payload's
placed graph its lanes, and every lane has to compute what the proven payload does: golden values are
the proven ones, once for each lane.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.base import Payload
from edgekit.errors import LoweringError
from edgekit.manifest import Golden
from edgekit.passes.lanes import TOLERANCE, lanes
from edgekit.runtime.slots import Streams, StreamSlot
from edgekit.spec import StateSpec
from edgekit.target import Target
from edgekit.toolchain.lowering import of_pictures
from edgekit.toolchain.running import Running, run_here

STEPS = 3
"""Steps of each stream that are compared: states have gone round by then."""


@dataclass(frozen=True)
class Batched:
    """payloads, states, files: of a bundle with lanes. differences: of each payload's lanes from the proven payload, as
    a fraction of an output's range (at least 1); 0 = bit for bit."""

    payloads: tuple[Payload, ...]
    states: tuple[StateSpec, ...]
    files: dict[str, bytes]
    differences: tuple[float, ...]


def wide(states: Sequence[StateSpec], count: int) -> tuple[StateSpec, ...]:
    """`states` of as many lanes."""
    return tuple(dataclasses.replace(s, shape=(count * s.shape[0], *s.shape[1:])) for s in states)


def batched(
    proven: Sequence[tuple[Payload, ir.Model]],
    states: Sequence[StateSpec],
    golden: Golden,
    files: Mapping[str, bytes],
    count: int,
    target: Target,
) -> Batched:
    """`proven`: payloads, each with the graph it was lowered from, of one stream, as are `states` (of the graph) and the
    golden values in `files`.

    Raises: ModelError for a network that cannot take lanes; LoweringError when a lane computes something else.
    """
    found, differences = [], []
    for payload, model in proven:
        made = of_pictures(lanes(model, count), payload.backend, target, payload.precision)
        worst = difference(payload, made, states, count)
        if not worst <= TOLERANCE:
            raise LoweringError(
                f"payload {payload.backend} {payload.precision}: with {count} lanes an output differs by {worst:.2e} "
                f"of its range from the network of one, expected at most {TOLERANCE:.0e}. Build it without --batch"
            )
        found.append(made)
        differences.append(worst)
    repeated = dict(files)
    for value in (*golden.inputs, *golden.outputs):  # they begin with an axis of size 1
        repeated[value.path] = files[value.path] * count
    return Batched(tuple(found), wide(states, count), repeated, tuple(differences))


def one_lane(payload: Payload, states: Sequence[StateSpec]) -> Running:
    """A payload with lanes, run by one stream of them. states: with as many lanes."""
    running = run_here(payload, states)
    return dataclasses.replace(running, binding=StreamSlot(Streams(running.session), "", owner=True))


def difference(payload: Payload, made: Payload, states: Sequence[StateSpec], count: int) -> float:
    """Largest |difference| of an output or state of `made`, which has `count` lanes, from `payload`, which has one, as
    a fraction of its range (at least 1): streams of seeded noise, another one in every lane."""
    rng = np.random.default_rng(0)
    worst = 0.0
    alone = Streams(run_here(payload, states, threads=1).session)
    together = Streams(run_here(made, wide(states, count), threads=1).session)
    with alone, together:
        for _ in range(STEPS):
            feeds = {
                lane: {name: noise(rng, array) for name, array in alone.inputs.items()}
                for lane in range(count)
            }
            results = together.step_many(feeds)
            for lane, feed in feeds.items():
                pairs = [(alone.step(lane, feed), results[lane])]
                if states:
                    pairs.append((alone.snapshot(lane), together.snapshot(lane)))
                for want, got in pairs:
                    for name, value in want.items():
                        a, b = value.astype(np.float64), got[name].astype(np.float64)
                        worst = max(worst, float(np.abs(a - b).max()) / max(1.0, float(np.abs(a).max())))
    return worst


def noise(rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
    if like.dtype.kind == "f":
        return rng.standard_normal(like.shape).astype(like.dtype)
    limits = np.iinfo(like.dtype)
    return rng.integers(limits.min, limits.max, like.shape, like.dtype, endpoint=True)


def record(count: int, payloads: Mapping[str, float]) -> dict[str, Any]:
    """For the evidence. payloads: name -> largest difference."""
    return {
        "lanes": count,
        "payloads": {
            name: {"max_difference": worst, "bit_for_bit": worst == 0} for name, worst in payloads.items()
        },
        "what": "accuracy, agreement and errors are those of the network of one stream, which every lane equals so far",
    }
