"""How much each unit of a group matters: small ones are pruned first.

    score(work.model, group, "l2")                                                    # [units], from weights alone
    gates = Gates(model, groups, problem.loss, batches); gates.taylor(group)           # from gradients

Every score is the mean over the layers that make a unit (several meet in a residual addition), except where its paper
says otherwise. Of magnitudes only the order within a group means something: `normalised` divides them by their mean.
Taylor and Fisher estimate the change of the loss, so they compare across groups as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgekit.compression import surgery
from edgekit.compression.groups import Group, Slot
from edgekit.compression.problem import Batch
from edgekit.compression.work import Hook
from edgekit.errors import UsageError

WEIGHTS = ("l1", "l2", "fpgm", "slimming", "group_l2")
GRADIENTS = ("taylor", "fisher")
IMPORTANCES = (*WEIGHTS, *GRADIENTS, "random")


def score(model: nn.Module, group: Group, kind: str) -> Tensor:
    """Importance of every unit of `group` from weights, float64 [units]; kind: one of WEIGHTS.

    l1, l2: norm of the filters (Li et al. 2017, "Pruning Filters for Efficient ConvNets"). fpgm: sum of distances to the
    other filters of the layer (He et al. 2019, "Filter Pruning via Geometric Median"). slimming: |gamma| of the batch
    norms behind (Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming").
    group_l2: norm of all that leaves with a unit, readers included (Fang et al. 2023, DepGraph).
    Raises: UsageError where slimming finds no batch norm.
    """
    parts = dict(model.named_modules())
    if kind == "slimming":
        norms = [slot for slot in group.having("both") if isinstance(parts[slot.module], _BatchNorm)]
        found = [_rows(parts[s.module].weight.detach().abs().double()[:, None], s).sum(1) for s in norms]
        if not found:
            raise UsageError(
                f"importance slimming: no batch norm behind {group.name}, expected one. Take l2 or taylor"
            )
        return torch.stack(found).mean(0)
    if kind == "group_l2":
        squares = torch.zeros(group.units, dtype=torch.float64)
        for slot in group.slots:
            squares += _rows(_matrix(parts[slot.module], slot.side), slot).square().sum(1)
        return squares.sqrt()
    each = {"l1": lambda f: f.abs().sum(1), "l2": lambda f: f.square().sum(1).sqrt(), "fpgm": _distances}[
        kind
    ]
    makers = [s for s in group.having("out", "both") if isinstance(parts[s.module], surgery.MIXING)]
    return torch.stack([each(_rows(_matrix(parts[s.module], "out"), s)) for s in makers]).mean(0)


def random(group: Group, *key: int) -> Tensor:
    """The control: an order drawn from `key` and the group's name."""
    draw = np.random.default_rng([*key, *group.name.encode()])
    return torch.from_numpy(draw.permutation(group.units) + 1.0)


def normalised(found: Tensor) -> Tensor:
    """Divided by the mean, so that groups of other sizes compare."""
    return found / found.mean().clamp_min(1e-30)


class Gates:
    """The derivative of each example's loss by a gate of value 1 on every unit, where the layers that read it take it in.

    A gate's derivative is the sum over places of activation times gradient; closing the gate removes the unit. It is
    that of Molchanov et al. 2019 ("Importance Estimation for Neural Network Pruning"), whose gates stand behind the
    batch norms: between gate and reader lie only ReLUs, which are homogeneous. Evaluation mode, batches as training has
    them; the loss must be a mean over the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        loss: Callable[[Any, Any], Tensor],
        batches: Iterable[Batch],
    ) -> None:
        parts = dict(model.named_modules())
        readers = sorted({slot.module for group in groups for slot in group.having("in")})
        seen: dict[str, list[Tensor]] = {name: [] for name in readers}
        self._sums = {group.name: torch.zeros(2, group.units, dtype=torch.float64) for group in groups}
        self.examples = 0

        def watch(name: str) -> Callable[..., tuple[Tensor, ...]]:
            def hook(part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                own = inputs[0].clone()  # its gradient is what flows back from this reader alone
                if not own.requires_grad:
                    own.requires_grad_()
                own.retain_grad()
                seen[name].append(own)
                return (own, *inputs[1:])

            return hook

        hooks = [parts[name].register_forward_pre_hook(watch(name)) for name in readers]
        modes = {part: part.training for part in model.modules()}
        model.eval()
        try:
            for inputs, targets in batches:
                loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
                gates = {
                    name: torch.stack([_gates(parts[name], x) for x in found]).sum(0)
                    for name, found in seen.items()
                }
                size = len(inputs)
                for group in groups:
                    readers_of = list(group.having("in"))
                    each = torch.stack([_gated(gates[slot.module], slot) for slot in readers_of]).sum(0)
                    each = each * size  # of an example's own loss
                    self._sums[group.name][0] += each.abs().sum(0)
                    self._sums[group.name][1] += each.square().sum(0)
                for found in seen.values():
                    found.clear()
                model.zero_grad(set_to_none=True)
                self.examples += size
        finally:
            for hook in hooks:
                hook.remove()
            for part, before in modes.items():
                part.training = before

    def taylor(self, group: Group) -> Tensor:
        """|sum w dL/dw| of an example, mean over examples: first order (Molchanov et al. 2019, over batches of one: over
        larger ones the signs cancel near a minimum)."""
        return self._sums[group.name][0] / self.examples

    def fisher(self, group: Group) -> Tensor:
        """Half the mean square of an example's derivative: the diagonal of Optimal Brain Damage (LeCun et al. 1990) with
        the Hessian estimated by the empirical Fisher information (Theis et al. 2018, "Faster gaze prediction with dense
        networks and Fisher pruning")."""
        return self._sums[group.name][1] / (2 * self.examples)


class Slimming(Hook):
    """L1 on the factors of batch norms while training, so that unneeded channels fade (Liu et al. 2017): `strength` is the
    paper's lambda; its subgradient is added to that of the loss."""

    def __init__(self, groups: Sequence[Group], strength: float = 1e-4) -> None:
        self.names = {slot.module for group in groups for slot in group.having("both")}
        self.strength = strength

    def gradients(self, model: nn.Module, step: int, steps: int) -> None:
        for name, part in model.named_modules():
            if name in self.names and isinstance(part, _BatchNorm) and part.weight.grad is not None:
                part.weight.grad.add_(part.weight.detach().sign(), alpha=self.strength)


def _matrix(part: nn.Module, side: str) -> Tensor:
    """Weights as float64 [channels of the side, rest]."""
    if isinstance(part, surgery.ALONG):
        bias = part.bias if isinstance(part, _BatchNorm) else None
        return torch.stack([v.detach().double() for v in (part.weight, bias) if v is not None], 1)
    assert isinstance(part, surgery.MIXING)
    weight: Tensor = part.weight.detach().double()
    if isinstance(part, nn.Linear):
        return weight if side != "in" else weight.T
    first, second = weight.shape[:2]  # outputs, inputs per group; transposed: inputs, outputs per group
    if (side == "in") != bool(part.transposed):
        per = weight.reshape(part.groups, first // part.groups, second, -1).transpose(1, 2)
        weight = per.reshape(part.groups * second, -1)
    return weight.flatten(1)


def _rows(values: Tensor, slot: Slot) -> Tensor:
    """[channels, n] -> [units, channels of a unit * n]."""
    return values[torch.tensor(slot.channels)].flatten(1)


def _gated(gates: Tensor, slot: Slot) -> Tensor:
    """[examples, channels] -> [examples, units]."""
    return gates[:, torch.tensor(slot.channels)].sum(2)


def _distances(filters: Tensor) -> Tensor:
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def _gates(part: nn.Module, x: Tensor) -> Tensor:
    """Activation times gradient, summed over places: float64 [examples, channels]."""
    assert x.grad is not None
    found = (x.detach() * x.grad).double()
    if isinstance(part, nn.Linear):
        return found.reshape(len(found), math.prod(found.shape[1:-1]), found.shape[-1]).sum(1)
    return found.flatten(2).sum(2)
