"""Which layers of a network become chains, and at which ranks: candidates per layer, then a choice among them.

A candidate counts only where its chain is cheaper than the layer (by MACs or by a target's cost model), its ranks
rounded to what the target's kernels take at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.compression import lowrank_ranks
from edgekit.compression.lowrank import (
    Layer,
    Outputs,
    Ranks,
    break_even,
    decompose,
    fits,
    full_ranks,
    skeleton,
    tensor,
    unfold,
    watched,
)
from edgekit.compression.problem import macs
from edgekit.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

Cost = Callable[[nn.Module, tuple[int, ...]], float]
"""(a layer or a chain, shape of its input with batch 1) -> what one picture costs there."""
ENERGIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
PICTURES = 8
"""Inputs of a layer on which the error of a candidate is measured."""


def macs_cost(part: nn.Module, shape: tuple[int, ...]) -> float:
    """Multiply-accumulates of one picture."""
    return float(macs(part, torch.zeros(shape)))


def estimated_cost(target: Target, precision: str) -> Cost:
    """Seconds by the cost model of a board (toolchain/estimate.py) of a Conv2d, a Linear or a chain of them.

    A board's fixed cost of one inference is in it: differences count. Raises: UsageError for boards without the facts.
    """
    from edgekit.toolchain import estimate

    estimate.machine(target, target.backend)

    def cost(part: nn.Module, shape: tuple[int, ...]) -> float:
        return estimate.Estimator(_graph(part, shape), target)(precision).total_s

    return cost


def _graph(part: nn.Module, sizes: tuple[int, ...]) -> ir.Model:
    """The ONNX graph of a layer or a chain, weights by their shapes alone."""
    import onnx_ir as ir

    found: list[tuple[nn.Module, torch.Size]] = []
    layers = [p for p in part.modules() if isinstance(p, nn.Conv2d | nn.Linear)]
    hooks = [p.register_forward_hook(lambda p, _, y: found.append((p, y.shape))) for p in layers]
    with torch.no_grad():
        part(torch.zeros(sizes))
    for hook in hooks:
        hook.remove()
    x = first = ir.val("x0", ir.DataType.FLOAT, sizes)
    nodes, weights = [], []
    for i, (layer, size) in enumerate(found, 1):
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        shape = layer.weight.shape if isinstance(layer, nn.Conv2d) else layer.weight.shape[::-1]
        data = np.broadcast_to(np.zeros((), np.float32), tuple(shape))
        weights.append(ir.val(f"w{i}", const_value=ir.tensor(data, name=f"w{i}")))
        options: dict[str, int | tuple[int, ...]] = {}
        if isinstance(layer, nn.Conv2d):
            options = {"group": layer.groups, "strides": layer.stride}
        y = ir.val(f"x{i}", ir.DataType.FLOAT, tuple(size))
        kind = "Conv" if isinstance(layer, nn.Conv2d) else "MatMul"
        nodes.append(ir.node(kind, [x, weights[-1]], options, outputs=[y], name=f"n{i}"))
        x = y
    graph = ir.Graph([first], [x], nodes=nodes, initializers=weights, opset_imports={"": 17}, name="chain")
    return ir.Model(graph, ir_version=9)


@dataclass(frozen=True)
class Choice:
    """A layer as a chain. cost: of one picture, share of the layer's own in `dense`. error: of its outputs, squared,
    over their variance."""

    layer: str
    kind: str
    ranks: Ranks
    cost: float
    dense: float
    error: float


@dataclass(frozen=True)
class Seen:
    """A layer and what passed through it: inputs [n, ...] of a few pictures, moments of outputs for kind "data", and the
    shape [1, ...] of its input where the network is given the size that is shipped (trainings may see another)."""

    part: Layer
    inputs: Tensor
    outputs: Outputs | None
    shape: tuple[int, ...]


def spectra(seen: Seen, kind: str) -> list[np.ndarray]:
    """Singular values, descending, that each rank of `kind` cuts: one array a rank (cp: none)."""
    weight = tensor(seen.part)
    t, s, kh, kw = weight.shape
    if kind == "cp":
        return []
    if kind == "data":
        assert seen.outputs is not None
        values = torch.linalg.eigvalsh(seen.outputs.covariance).flip(0).clamp(min=0).sqrt()
        return [values[: full_ranks(seen.part, kind)[0]].numpy()]
    if kind == "tucker":
        matrices = [unfold(weight, 0), unfold(weight, 1)]
    elif kind == "spatial":
        matrices = [weight.permute(1, 2, 0, 3).reshape(s * kh, t * kw)]
    else:
        matrices = [unfold(weight, 0)]
    low = [m if m.shape[0] <= m.shape[1] else m.T for m in matrices]
    return [torch.linalg.eigvalsh(m @ m.T).flip(0).clamp(min=0).sqrt().numpy() for m in low]


def shapes(part: Layer, kind: str) -> list[tuple[int, int]]:
    """Shapes of the matrices of `spectra`."""
    t, s, kh, kw = tensor(part).shape
    if kind == "tucker":
        return [(t, s * kh * kw), (s, t * kh * kw)]
    return [(s * kh, t * kw) if kind == "spatial" else (t, s * kh * kw)]


def rounded(ranks: Sequence[int], full: Ranks, step: int) -> Ranks:
    """Ranks up to the next multiple of `step`, at most the full ones."""
    return tuple(min(max(-(-r // step), 1) * step, f) for r, f in zip(ranks, full, strict=True))


def rule(seen: Seen, kind: str, how: str, value: float, step: int) -> Ranks:
    """Ranks of one layer by `how`: energy (value: share kept), evbmf, noise (threshold), or ratio (of its weights).

    cp has no spectrum of its own: its rank is the larger of Tucker's two, at which HOSVD keeps what the rule wants.
    """
    full = full_ranks(seen.part, kind)
    if how == "ratio":
        t, s, kh, kw = sizes = tensor(seen.part).shape
        even = value * break_even(kind, sizes)
        if kind != "tucker":
            return rounded([math.ceil(even)], full, step)
        # x t outputs and x s inputs: x^2 t s taps + x (s^2 + t^2) = value t s taps
        dense, sides = t * s * kh * kw, s * s + t * t
        share = (math.sqrt(sides**2 + 4 * dense**2 * value) - sides) / (2 * dense)
        return rounded([math.ceil(share * t), math.ceil(share * s)], full, step)
    base = "tucker" if kind == "cp" else kind
    found = []
    for values, shape in zip(spectra(seen, base), shapes(seen.part, base), strict=True):
        if how == "energy":
            found.append(lowrank_ranks.energy(values, value))
        elif how == "noise":
            found.append(lowrank_ranks.threshold(values, shape))
        else:
            found.append(len(lowrank_ranks.evbmf(values, shape)[0]))
    return rounded([max(found)] if kind == "cp" else found, full, step)


def candidates(name: str, seen: Seen, kind: str, step: int, cost: Cost, most: int = 10) -> list[Choice]:
    """Chains of this kind that are cheaper than the layer, at most `most` of different ranks, cheapest first."""
    full = full_ranks(seen.part, kind)
    if kind == "cp":
        t, s, kh, kw = tensor(seen.part).shape
        least = t * s * kh * kw / (t + s + kh + kw)
        ranks = {rounded([round(least * i / 8)], full, step) for i in range(1, 8)}
    else:
        found = spectra(seen, kind)
        ranks = {rounded([lowrank_ranks.energy(v, e) for v in found], full, step) for e in ENERGIES}
        ranks |= {rounded([max(1, f // 8)] * len(full), full, step) for f in full}
    dense = cost(seen.part, seen.shape)
    cheap: list[tuple[float, Ranks]] = []
    for each in sorted(ranks):
        price = cost(skeleton(seen.part, kind, each), seen.shape)
        if price < dense:
            cheap.append((price, each))
    cheap.sort()
    if len(cheap) > most:
        cheap = [cheap[round(i * (len(cheap) - 1) / (most - 1))] for i in range(most)]
    return [Choice(name, kind, each, price, dense, error(seen, kind, each)) for price, each in cheap]


def error(seen: Seen, kind: str, ranks: Ranks) -> float:
    """Squared error of the chain's outputs on the inputs seen, over the variance of the layer's."""
    with torch.no_grad():
        goal = seen.part(seen.inputs)
        found = decompose(seen.part, kind, ranks, seen.outputs, rounds=10)(seen.inputs)
        axes = [d for d in range(goal.ndim) if d != (goal.ndim - 1 if goal.ndim < 4 else 1)]
        variance = goal.var(axes, unbiased=False).sum() if axes else goal.square().sum()
        return float(((found - goal) ** 2).mean(axes).sum() / variance.clamp(min=1e-30))


def look(
    model: nn.Module, names: Sequence[str], example: Tensor, inputs: Tensor, outputs: Mapping[str, Outputs]
) -> dict[str, Seen]:
    """The layers with what they are given for `inputs` [n, ...]; layers that nothing reaches are left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    found: dict[str, Seen] = {}
    with watched(model, names, lambda name, _, given, __: shapes.update({name: tuple(given.shape)})):
        model(example)

    def see(name: str, part: Layer, given: Tensor, _: Tensor) -> None:
        found[name] = Seen(part, given.detach().clone(), outputs.get(name), shapes[name])

    with watched(model, names, see):
        model(inputs)
    return found


def eligible(
    model: nn.Module, kinds: Sequence[str], head: frozenset[str], names: Sequence[str]
) -> dict[str, list[str]]:
    """Layers by name with the kinds that are defined for them: `names`, or all but the head where none are given."""
    found = {}
    for name, part in model.named_modules():
        if (name in names) if names else (name not in head):
            kept = [kind for kind in kinds if fits(part, kind)]
            if kept:
                found[name] = kept
    return found


def choose(options: Mapping[str, Sequence[Choice]], saving: float) -> dict[str, Choice] | None:
    """At most one choice a layer, so that together they save at least `saving` of cost with the least sum of errors.

    Lagrangian: every layer minimises error + weight * cost at the smallest weight that saves enough; then layers
    take back what was saved too much. None where even the cheapest choices do not save enough.
    """
    if sum(max((c.dense - c.cost for c in each), default=0.0) for each in options.values()) < saving:
        return None

    def at(weight: float) -> dict[str, Choice]:
        picked = {}
        for name, each in options.items():
            best = min(each, key=lambda c: c.error - weight * (c.dense - c.cost), default=None)
            if best is not None and best.error - weight * (best.dense - best.cost) < 0:
                picked[name] = best
        return picked

    low, high = 0.0, 1.0
    scale = max(c.dense for each in options.values() for c in each)
    while saved(at(high / scale)) < saving and high < 1e18:
        high *= 4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(at(middle / scale)) >= saving else (middle, high)
    picked = at(high / scale)
    spare = saved(picked) - saving
    while True:
        better = [
            (
                now.error - (new.error if new else 0.0),
                (now.dense if new is None else new.cost) - now.cost,
                name,
                new,
            )
            for name, now in picked.items()
            for new in (*options[name], None)
            if (new.error if new else 0.0) < now.error
        ]
        possible = [each for each in better if each[1] <= spare]
        if not possible:
            return picked
        gain = max(possible, key=lambda each: each[0])
        spare -= gain[1]
        if gain[3] is None:
            del picked[gain[2]]
        else:
            picked[gain[2]] = gain[3]


def saved(picked: Mapping[str, Choice]) -> float:
    """Cost saved by these choices."""
    return sum(c.dense - c.cost for c in picked.values())


def shuffled(
    options: Mapping[str, Sequence[Choice]], saving: float, seed: int, draws: int = 4000
) -> dict[str, Choice]:
    """The control: layers and ranks drawn at random until they save as much, to 2 % (else the closest that saves more)."""
    rng = np.random.default_rng(seed)
    best: dict[str, Choice] = {
        name: min(each, key=lambda c: c.cost) for name, each in options.items() if each
    }
    for _ in range(draws):
        share = rng.random()
        drawn = {
            name: each[int(rng.integers(len(each)))]
            for name, each in options.items()
            if each and rng.random() < share
        }
        if saving <= saved(drawn) < saved(best):
            best = drawn
            if saved(drawn) <= 1.02 * saving:
                break
    return best


def within(options: Mapping[str, Sequence[Choice]], limit: float) -> dict[str, Choice]:
    """The cheapest choice of every layer whose own error is at most `limit`."""
    found = {}
    for name, each in options.items():
        good = [c for c in each if c.error <= limit]
        if good:
            found[name] = min(good, key=lambda c: c.cost)
    return found


def by_rule(
    name: str, seen: Seen, kinds: Sequence[str], how: str, value: float, step: int, cost: Cost
) -> Choice | None:
    """The cheapest kind at the ranks that the rule gives, None where none is cheaper than the layer."""
    dense = cost(seen.part, seen.shape)
    found = []
    for kind in kinds:
        ranks = rule(seen, kind, how, value, step)
        price = cost(skeleton(seen.part, kind, ranks), seen.shape)
        if price < dense:
            found.append(Choice(name, kind, ranks, price, dense, 0.0))
    if not found:
        return None
    best = min(found, key=lambda c: c.cost)
    return replace(best, error=error(seen, best.kind, best.ranks))
