"""INT8 of a plan: each network by the search that single networks have, then all of them together.

A network's search asks what its rounding does to the outputs of the whole plan, the others being float. Then all of them are
put together and the task's metric decides; while it refuses, the network whose rounding does the most damage goes back to
float: first some of its values, found by its search with that metric as the gate, then all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.backends.base import Payload, half
from edgekit.errors import LoweringError
from edgekit.quant.calibrate import calibrate
from edgekit.quant.likeness import warnings
from edgekit.quant.rules import PREFERENCE, rules_for
from edgekit.quant.search import Look, Quantized
from edgekit.quant.sensitivity import output_error
from edgekit.target import Target
from edgekit.toolchain import cache, quantize
from edgekit.toolchain.plans.moments import LOSSES, LOST, Moments, without
from edgekit.toolchain.plans.running import Payloads, PlanRunning, Workshop
from edgekit.toolchain.plans.source import Network, PlanSource, key
from edgekit.toolchain.quantize import Calibrated, Gate, Int8

Progress = Callable[[str, int, int], None]

CODE = ("kernels", "tasks", "runtime/session.py", "backends/onnxruntime")
"""What decides, beside the plan, what its networks are fed with."""
SLICES = 2
"""Slices of a repeated network that are taken of each moment, in turn: the cameras of a moment see alike light."""
CHECKED = 4
"""Moments on which the outputs of the whole plan are compared, each with all sensors and without each kind of them."""
MAX_ERROR = 0.04
"""Noise over variance of the plan's outputs that one network's rounding may cause, all sensors or not: 14 dB, as
`quant.search.NOISY`."""
FLOATS = ("float32", "float16")


def seen(moments: Moments, index: int) -> Any:
    """Moment `index` of a calibration set: every fourth lacks the LiDAR, every fourth the cameras."""
    return without(moments.read(index), LOST[index % len(LOST)])


@dataclass(frozen=True)
class Recorded:
    """What a network of the float plan is fed with, moment by moment (see quantize.FeedSet).

    places: (moment, slice; None = whole tensors).
    """

    network: Network
    running: PlanRunning
    moments: Moments
    places: tuple[tuple[int, int | None], ...]
    digest: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (feed for _, feed in self._feeds(range(len(self.places))))

    def pick(self, which: Collection[int]) -> dict[int, dict[str, np.ndarray]]:
        return dict(self._feeds(sorted(which)))

    def spread(self, count: int, skip: Collection[int] = ()) -> list[int]:
        known = [i for i in range(len(self.places)) if i not in skip]
        count = min(count, len(known))
        return [known[i * len(known) // count] for i in range(count)]

    def first(self, count: int) -> Recorded:
        chosen = tuple(self.places[i] for i in self.spread(count))
        digest = cache.digest(self.digest, [list(place) for place in chosen])
        return Recorded(self.network, self.running, self.moments, chosen, digest, self.provenance)

    def _feeds(self, which: Sequence[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        buffers, last = self.running.session.buffers, None
        for number in which:
            moment, part = self.places[number]
            if moment != last:
                self.running.pipeline(seen(self.moments, moment))
                last = moment
            inputs = self.network.step.inputs
            own = slice(None) if part is None else slice(part, part + 1)
            yield number, {name: np.array(buffers[name][own], order="C") for name in inputs}


def recorded(
    shop: Workshop, floats: PlanRunning, moments: Moments, progress: Progress
) -> dict[str, Recorded]:
    """The feeds of every network, by its name; a step that is left out at a moment has none of it."""
    source = shop.source
    known = key(source, moments.digest, LOST, SLICES, cache.sources(*CODE), list(floats.content))
    there = cache.load("plan", known)
    if there is None:
        there = {name: [] for name in source.networks}
        for index in range(len(moments)):
            progress("look at moments", index, len(moments))
            floats.pipeline(seen(moments, index))
            for name, network in source.networks.items():
                there[name] += [[index, part] for part in _parts(network, floats, index)]
        cache.store("plan", known, there)
    found = {}
    for name, network in source.networks.items():
        places = tuple((int(i), None if part is None else int(part)) for i, part in there[name])
        provenance = {
            "calibration": moments.name,
            "digest": moments.digest,
            "moments": len(moments),
            "pictures": len(places),
        }
        digest = cache.digest(known, name, [list(place) for place in places])
        found[name] = Recorded(network, floats, moments, places, digest, provenance)
    return found


def _parts(network: Network, floats: PlanRunning, index: int) -> list[int | None]:
    """Slices of a network that ran at a moment: all (None), or of a repeated one SLICES of those, in turn."""
    step = network.step
    when = None if step.when is None else np.asarray(floats.session.buffers[step.when]).ravel()
    if step.repeat == 1:
        return [None] if when is None or when.any() else []
    parts = [i for i in range(step.repeat) if when is None or when[i % len(when)]]
    return [parts[(index * SLICES + k) % len(parts)] for k in range(min(SLICES, len(parts)))] if parts else []


@dataclass
class Bench:
    """What the searches of all targets share. exact: the outputs of the float plan at the moments `checked`, by what is
    lost."""

    shop: Workshop
    moments: Moments
    floats: PlanRunning
    payloads: Payloads
    """Of the float plan."""
    feeds: Mapping[str, Recorded]
    scheme: str
    exact: dict[str, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    checked: tuple[int, ...] = ()
    calibrated: dict[str, Calibrated] = field(default_factory=dict)
    searches: dict[str, dict[str, Quantized]] = field(default_factory=dict)

    @staticmethod
    def of(shop: Workshop, floats: PlanRunning, moments: Moments, scheme: str, progress: Progress) -> Bench:
        feeds = recorded(shop, floats, moments, progress)
        count = min(CHECKED, len(moments))
        checked = tuple(i * len(moments) // count for i in range(count))
        bench = Bench(shop, moments, floats, floats.payloads, feeds, scheme, {}, checked)
        bench.exact = bench.outputs(floats)
        return bench

    def outputs(self, running: PlanRunning) -> dict[str, list[dict[str, np.ndarray]]]:
        found: dict[str, list[dict[str, np.ndarray]]] = {}
        for lost in LOSSES:
            for index in self.checked:
                running.pipeline(without(self.moments.read(index), lost))
                outputs = {name: array.copy() for name, array in running.session.outputs.items()}
                found.setdefault(lost, []).append(outputs)
        return found

    def error(self, payloads: Payloads) -> float:
        """Noise over variance of the plan's outputs (`sensitivity.output_error`) with these payloads in place of the
        float ones: with all sensors or without some, whichever is worst."""
        with self.shop.opened({**self.payloads, **payloads}) as running:
            got = self.outputs(running)
        errors = {
            lost: float(np.mean([output_error(x, y) for x, y in zip(rows, got[lost], strict=True)]))
            for lost, rows in self.exact.items()
        }
        return max(errors.values())

    def known(self, name: str, progress: Progress) -> Calibrated:
        """Statistics of a network, calibrated once for all targets."""
        if name not in self.calibrated:
            feeds, model = self.feeds[name], self.shop.source.networks[name].model
            stats = calibrate(model, lambda: iter(feeds), progress=progress, cache_key=feeds.digest)
            self.calibrated[name] = Calibrated(model, stats, feeds, tuple(warnings(model, stats, None)))
        return self.calibrated[name]


@dataclass
class Quantization:
    """INT8 for a target. columns: by backend, the payload of every network, the preferred library's first.

    given_back: network -> why it is float.  effects: network -> error of the plan's outputs that its rounding alone causes.
    """

    columns: dict[str, dict[str, Payload]]
    found: dict[str, Int8]
    effects: dict[str, float]
    given_back: dict[str, str] = field(default_factory=dict)
    not_lowered: dict[str, str] = field(default_factory=dict)
    tightened: list[str] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    """What the task's metric said, each time it was asked, and which networks were float then."""


def search(bench: Bench, target: Target, backends: Sequence[str], progress: Progress) -> Quantization:
    """Every network in INT8 for every backend of a target that takes it; nothing judged by the task's metric yet.

    Raises: LoweringError when a network cannot be lowered for the preferred backend in float either.
    """
    # what takes whole networks only seldom takes those of a plan, which are more than networks of one picture
    order = sorted((b for b in backends if not rules_for(b, target).whole), key=PREFERENCE.index)
    made = Quantization({backend: {} for backend in order}, {}, {})
    for name in bench.shop.source.networks:

        def gate(payload: Payload, name: str = name) -> Look:
            error = bench.error({name: payload})
            return Look(
                error <= MAX_ERROR, reason=f"error of the plan's outputs {error:.4f}, at most {MAX_ERROR}"
            )

        _take(made, bench, target, name, gate, progress)
    return made


def tighten(
    made: Quantization, bench: Bench, target: Target, name: str, gate: Gate, progress: Progress
) -> None:
    """Put as much of a network back to float as the gate, which knows the task's metric, asks for."""
    made.tightened.append(name)
    _take(made, bench, target, name, gate, progress, again=True)


def _take(
    made: Quantization,
    bench: Bench,
    target: Target,
    name: str,
    gate: Gate,
    progress: Progress,
    again: bool = False,
) -> None:
    """A network's INT8 payloads, by search or going on from it, into the columns; its float ones where there are none."""

    def report(what: str, done: int, of: int) -> None:
        progress(f"{name}: {what}", done, of)

    order, network = list(made.columns), bench.shop.source.networks[name]
    shared = bench.searches.setdefault(name, {})
    try:
        found = quantize.quantize(
            bench.known(name, report), target, order, gate, bench.scheme, shared, report, tighten=again
        )
    except LoweringError as error:
        made.given_back[name] = str(error)
    else:
        made.found[name] = found
        for payload in found.payloads:
            made.columns[payload.backend][name] = payload
        for backend, why in found.record["not_lowered"].items():
            made.not_lowered[f"{name}/{backend}"] = why
        report("its part in the plan's error", 0, 1)
        made.effects[name] = bench.error({name: found.payloads[0]})
    for backend, payloads in made.columns.items():
        if name not in payloads:
            payloads[name] = lowered(network, backend, target, resting(target, backend))


def give_back(made: Quantization, bench: Bench, target: Target, name: str, why: str) -> None:
    """Put a network back to float, for every backend."""
    made.given_back[name] = why
    network = bench.shop.source.networks[name]
    for backend, payloads in made.columns.items():
        payloads[name] = lowered(network, backend, target, resting(target, backend))


def worst(made: Quantization) -> str | None:
    """The network in INT8 whose rounding does the most damage; None where all are float."""
    left = [name for name in made.effects if name not in made.given_back]
    return max(left, key=lambda name: (made.effects[name], name), default=None)


def resting(target: Target, backend: str) -> str:
    """The float that a network goes back to: the one that the backend prefers on that board."""
    return next((p for p in target.precisions.get(backend, ()) if p in FLOATS), "float32")


def floats(source: PlanSource, target: Target) -> dict[str, Payload]:
    """The float plan that everything is held against: every network on ONNX Runtime in float32."""
    return {name: lowered(n, "onnxruntime", target, "float32") for name, n in source.networks.items()}


def lowered(network: Network, backend: str, target: Target, precision: str) -> Payload:
    """The prepared network as `backend` wants it. Raises: LoweringError."""
    try:
        (payload,) = half(backend, "lower").lower(network.model, target, precision)
    except LoweringError as error:
        raise LoweringError(f"network {network.name}: {error}") from None
    found: Payload = payload
    return found
