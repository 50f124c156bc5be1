"""What a network of fewer channels costs, and which channels to give up for it.

A `Cost` gives the seconds (or MACs) of a network whose groups keep so many units each, without building it:

    cost = Macs(model, groups, example)                              # multiply-accumulates
    cost = Estimated(model, groups, write, target, "int8")           # the cost model of a board
    cost = Measured(model, groups, example, seconds)                 # this machine
    kept = choose(cost, scores, steps, goal=cost(full) / 2)          # least importance lost per saved second
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor, nn

from edgekit.compression import surgery
from edgekit.compression.groups import Group, remove
from edgekit.compression.measure import read
from edgekit.compression.problem import macs_of
from edgekit.errors import UsageError
from edgekit.target import Target

if TYPE_CHECKING:
    from edgekit.toolchain.estimate import Estimator
    from edgekit.toolchain.layers import Layer

DEFAULT_GRANULARITY = 8


class Cost(Protocol):
    """unit: of what it gives. together: [groups, groups], whether one's share of the cost depends on the other's width."""

    unit: str
    together: np.ndarray

    def __call__(self, kept: Sequence[int]) -> float:
        """The cost where each group keeps so many units."""
        ...


class Macs:
    """Multiply-accumulates of the layers that groups touch, and of all others (problem.macs)."""

    unit = "macs"

    def __init__(self, model: nn.Module, groups: Sequence[Group], example: Tensor) -> None:
        parts = dict(model.named_modules())
        names = [n for n, p in parts.items() if isinstance(p, surgery.MIXING)]
        at = {name: i for i, name in enumerate(names)}
        self._full = np.array([group.units for group in groups], dtype=float)
        # channels that leave a side of a layer, per unit that leaves
        self._out, self._in = np.zeros((len(names), len(groups))), np.zeros((len(names), len(groups)))
        for g, group in enumerate(groups):
            for slot in group.slots:
                if slot.module in at:
                    side = (
                        self._in if slot.side == "in" else self._out
                    )  # depthwise: products go with the outputs
                    side[at[slot.module], g] += len(slot.channels[0])
        self._outputs = np.array([surgery.channels(parts[n], "out") for n in names], dtype=float)
        self._inputs = np.array([surgery.channels(parts[n], "in") for n in names], dtype=float)
        each = macs_of(model, example)
        self._macs = np.array([each[name] for name in names], dtype=float)
        touched = (self._out + self._in) > 0
        self.together = (touched.T.astype(int) @ touched) > 0

    def __call__(self, kept: Sequence[int]) -> float:
        return float(self.layers(kept).sum())

    def layers(self, kept: Sequence[int]) -> np.ndarray:
        """Of each layer."""
        gone = self._full - np.asarray(kept, dtype=float)
        outputs, inputs = 1 - self._out @ gone / self._outputs, 1 - self._in @ gone / self._inputs
        found: np.ndarray = self._macs * outputs * inputs
        return found


class Estimated:
    """Seconds of the exported network by the cost model of a board (toolchain/estimate.py), in one precision.

    Every value's size grows in proportion with the units of each group that is in it, so one export of the whole network
    and one per group tell the layers of any other. Raises: UsageError for boards without the facts of an estimate.
    """

    unit = "s"

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], write: Callable[[nn.Module, Path], None],
        target: Target, precision: str = "int8",
    ) -> None:  # fmt: skip
        from edgekit.toolchain.estimate import machine

        machine(target, target.backend)  # refuse before exporting
        self._full = np.array([group.units for group in groups])
        whole = estimator(model, write, target)
        self._estimator, self._precision = whole, precision
        base = [_numbers(layer) for layer in whole.layers]
        self._base = [np.array(numbers, dtype=float) for numbers in base]
        self._slopes = [np.zeros((len(groups), len(numbers))) for numbers in base]
        for g, group in enumerate(groups):
            small = copy.deepcopy(model)
            gone = max(group.units // 2, 1)
            remove(small, [(group, range(gone))])
            layers = estimator(small, write, target).layers
            if [_kinds(a) for a in layers] != [_kinds(b) for b in whole.layers]:
                raise UsageError(
                    f"group {group.name}: the exported network has other layers with fewer channels. Prune by macs"
                )
            for i, layer in enumerate(layers):
                self._slopes[i][g] = (self._base[i] - np.array(_numbers(layer), dtype=float)) / gone

        touched = np.stack([slopes.any(1) for slopes in self._slopes])
        self.together = (touched.T.astype(int) @ touched) > 0

    def __call__(self, kept: Sequence[int]) -> float:
        gone = self._full - np.asarray(kept)
        layers = [
            _resized(layer, base - gone @ slopes)
            for layer, base, slopes in zip(self._estimator.layers, self._base, self._slopes, strict=True)
        ]
        self._estimator.layers, whole = tuple(layers), self._estimator.layers
        try:
            return self._estimator(self._precision).total_s
        finally:
            self._estimator.layers = whole


class Measured:
    """Seconds as measured here: of the whole network, and of it with half of each group gone.

    In between, every layer's time is in proportion to its multiply-accumulates, and all share a constant: seconds per
    product of each layer, as near to equal as the measurements allow (least squares with a weak pull to the mean, none
    negative). seconds: takes networks, gives the time of each; they are made anew in every call of it.
    """

    unit = "s"
    PULL = 0.02
    """Noise of a measurement over that of a layer's seconds per product."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], example: Tensor,
        seconds: Callable[[Sequence[Callable[[], nn.Module]]], Sequence[float]],
    ) -> None:  # fmt: skip
        def halved(group: Group) -> nn.Module:
            small = copy.deepcopy(model)
            remove(small, [(group, range(group.units // 2))])
            return small

        self._macs = Macs(model, groups, example)
        self.together = self._macs.together
        full = [group.units for group in groups]
        points = [full] + [
            [n - n // 2 if i == g else n for i, n in enumerate(full)] for g in range(len(full))
        ]
        networks = [lambda: model] + [functools.partial(halved, group) for group in groups]
        self.measured = list(seconds(networks))
        # unknowns: each layer's share of the whole network's seconds, and the constant's
        products = np.stack([self._macs.layers(kept) for kept in points])
        shares = products / np.maximum(products[0], 1)
        rows = np.concatenate([shares, np.ones((len(points), 1))], 1)
        prior = np.append(products[0] / products[0].sum(), 0.0)
        wanted = np.array(self.measured) / self.measured[0]
        pull = self.PULL * np.diag(1 / np.maximum(prior, 1e-2))
        found = np.linalg.lstsq(np.vstack([rows, pull]), np.append(wanted, pull @ prior), rcond=None)[0]
        found = np.maximum(found, 0)
        self._rates = found * self.measured[0] / (rows[0] @ found)
        self._whole = np.maximum(products[0], 1)

    def __call__(self, kept: Sequence[int]) -> float:
        return float(self._rates[:-1] @ (self._macs.layers(kept) / self._whole) + self._rates[-1])


Rank = Callable[[Sequence[int], int, int], float]
"""(kept, group, units it would keep next) -> what goes first: the smallest; infinity: never."""


def choose(
    groups: Sequence[Group], steps: Sequence[int], least: Sequence[int], rank: Rank, done: Callable[[Sequence[int]], bool],
    together: np.ndarray | None = None, start: Sequence[int] | None = None,
) -> list[int] | None:  # fmt: skip
    """Units that each group keeps: step by step, the group of the smallest rank gives up its next ones until `done`.

    steps: what each group keeps is a multiple of this (or all it has). least: what it keeps at least. together: which
    ranks change when a group does (all). start: units kept so far (all). None where `done` cannot be reached.
    """
    kept = [group.units for group in groups] if start is None else list(start)
    ranks: list[float | None] = [None] * len(groups)
    while not done(kept):
        following = [(k - 1) // s * s for k, s in zip(kept, steps, strict=True)]
        for g, (n, low) in enumerate(zip(following, least, strict=True)):
            if ranks[g] is None:
                ranks[g] = rank(kept, g, n) if n >= max(low, 1) else math.inf
        first = min(range(len(groups)), key=lambda g: ranks[g], default=-1)  # type: ignore[arg-type,return-value]
        if first < 0 or ranks[first] == math.inf:
            return None
        kept[first] = following[first]
        for g in range(len(groups)):
            if g == first or together is None or together[first, g]:
                ranks[g] = None
    return kept


def per_saved(cost: Cost, scores: Sequence[Tensor]) -> Rank:
    """Importance that is lost per cost that is saved.

    What a step loses is the group's importance times the logarithm of the share that stays: as much as its units' scores
    while most are there, ever more towards the last, which scores of single units do not see.
    """
    held = [np.concatenate([[0.0], np.cumsum(np.sort(s.numpy())[::-1])]) for s in scores]

    def rank(kept: Sequence[int], group: int, following: int) -> float:
        saved = cost(kept) - cost([following if g == group else k for g, k in enumerate(kept)])
        most = held[group]
        if saved <= 0:
            return math.inf
        if most[-1] <= 0:
            return 0.0  # nothing in the group matters
        return float(most[-1] * np.log(most[kept[group]] / max(most[following], 1e-30)) / saved)

    return rank


def least_important(scores: Sequence[Tensor]) -> Rank:
    """One threshold for the whole network: the mean importance of the units that would go."""
    ordered = [np.sort(s.numpy()) for s in scores]

    def rank(kept: Sequence[int], group: int, following: int) -> float:
        units = len(ordered[group])
        return float(ordered[group][units - kept[group] : units - following].mean())

    return rank


def evenly(groups: Sequence[Group]) -> Rank:
    """The same share of every group."""
    return lambda kept, group, following: 1 - following / groups[group].units


def granularity(target: Target | None, precision: str) -> int:
    """Channels that kernels of the target take at once."""
    if target is None:
        return DEFAULT_GRANULARITY
    return target.channel_granularity.get(precision, DEFAULT_GRANULARITY)


def estimator(model: nn.Module, write: Callable[[nn.Module, Path], None], target: Target) -> Estimator:
    """Of the network as `edgekit estimate` reads its file."""
    from edgekit.toolchain.estimate import Estimator

    return Estimator(read(model, write), target)


def _kinds(layer: Layer) -> tuple[str, str, int, int, int, int]:
    return layer.op, layer.kind, layer.taps, layer.stride, len(layer.reads), len(layer.writes)


def _numbers(layer: Layer) -> list[float]:
    """What grows in proportion with channels: sides of the product, other weights (biases), values read and written."""
    product = layer.depth * layer.columns * layer.groups
    values = [n for _, n in (*layer.reads, *layer.writes)]
    return [layer.depth, layer.columns, layer.groups, layer.weights - product, *values]


def _resized(layer: Layer, numbers: np.ndarray) -> Layer:
    depth, columns, groups, more, *values = np.rint(numbers).astype(int).tolist()
    split = len(layer.reads)
    product = depth * columns * groups
    return dataclasses.replace(
        layer, depth=depth, columns=columns, groups=groups, macs=layer.rows * product, weights=product + more,
        reads=tuple((name, n) for (name, _), n in zip(layer.reads, values[:split], strict=True)),
        writes=tuple((name, n) for (name, _), n in zip(layer.writes, values[split:], strict=True)),
    )  # fmt: skip
