"""What the methods that make weights sparse share: which layers take part, and how zeros come about in a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgekit.compression.patterns import noise, risen
from edgekit.compression.problem import modules
from edgekit.compression.work import Hook, Work
from edgekit.errors import UsageError, did_you_mean

Weights = Mapping[str, Tensor]
Make = Callable[[Weights, float], dict[str, Tensor]]
"""(weights by parameter name, sparsity 0 to 1) -> masks by the same names (patterns.py)."""
PEAK = 0.5
"""Learning rate, in units of the problem's, where nothing else is said: many zeros do more damage than the tenth mends that
suits a network as it is."""
PROJECTIONS = 10
"""Of ADMM in a training. With many more the dual variables run ahead of the weights, which end further from the pattern."""
Control = Literal["none", "random"]
"""`random`: as many zeros in the same pattern, placed without looking at the weights."""


@dataclass(frozen=True)
class Where:
    """first: also the layer that the network begins with; depthwise: also those; heads: also layers whose outputs mean
    something (Problem.head); exclude: names of modules to leave alone."""

    first: bool = False
    depthwise: bool = False
    heads: bool = False
    exclude: tuple[str, ...] = ()


def layers(
    work: Work, where: Where, refuse: Callable[[Tensor], str]
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """(weights by parameter name, reason by module name of those left out) of each Conv2d and Linear of `work.model`.

    refuse: why the pattern does not fit a weight, "" if it does. Raises: UsageError where no layer is left, or a name of
    `exclude` is none.
    """
    found = modules(work.model, nn.Conv2d, nn.Linear)
    for name in where.exclude:
        if name not in found:
            raise UsageError(f"exclude {name!r}: no convolution or Linear of it. {did_you_mean(name, found)}")
    begins = _first(work)
    names = {id(p): name for name, p in work.model.named_parameters()}
    weights: dict[str, nn.Parameter] = {}
    skipped: dict[str, str] = {}
    for name, part in found.items():
        weight = part.weight
        assert isinstance(weight, nn.Parameter)
        thin = isinstance(part, nn.Conv2d) and part.groups > 1 and part.groups == part.in_channels
        if name in where.exclude:
            skipped[name] = "excluded"
        elif name == begins and not where.first:
            skipped[name] = "the first layer"
        elif thin and not where.depthwise:
            skipped[name] = "depthwise"
        elif name in work.problem.head and not where.heads:
            skipped[name] = "a head"
        elif reason := refuse(weight):
            skipped[name] = reason
        else:
            weights[names[id(weight)]] = weight
    if not weights:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise UsageError(f"sparsity: no layer can take the pattern ({reasons})")
    return weights, skipped


def _first(work: Work) -> str:
    """Name of the layer that computes first."""
    seen: list[str] = []
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, part in modules(work.model, nn.Conv2d, nn.Linear).items()
    ]
    training = {part: part.training for part in work.model.modules()}
    try:
        with torch.no_grad():
            work.model.eval()(work.problem.example)
    finally:
        for hook in hooks:
            hook.remove()
        for part, before in training.items():
            part.training = before
    return seen[0] if seen else ""


def controlled(make: Make, weights: Weights, control: Control, seed: int) -> Make:
    """`make`, or its random control: of fixed noise in place of the weights."""
    if control == "none":
        return make
    generator = torch.Generator().manual_seed(seed)
    instead = {name: noise(weight, generator) for name, weight in weights.items()}
    return lambda _, sparsity: make(instead, sparsity)


def peak(work: Work, lr: float | None) -> float:
    """The learning rate, `lr` or what is usual here."""
    return PEAK * work.problem.lr if lr is None else lr


def hold(work: Work, masks: Mapping[str, Tensor], skipped: Mapping[str, str], **facts: Any) -> None:
    """Zero what `masks` (1 = kept) say, from now on, and tell what became of each layer."""
    named = dict(work.model.named_parameters())
    rows = {}
    for name, mask in masks.items():
        old = work.masks.get(name)
        work.masks[name] = mask if old is None else old.to(mask.device, torch.bool) & mask
        named[name].data.mul_(work.masks[name])
        rows[name.removesuffix(".weight")] = round(1 - work.masks[name].float().mean().item(), 4)
    zero = sum(int((work.masks[n] == 0).sum()) for n in masks)
    total = sum(work.masks[n].numel() for n in masks)
    work.facts[work.stage] = {
        **facts,
        "sparsity": round(zero / total, 4),
        "layers": rows,
        "skipped": dict(skipped),
    }


class Rising(Hook):
    """Zeros that become more, and once gone stay gone: every `every` steps the masks are made anew, at a sparsity that
    rises to `sparsity` within the share `rise` of the training, by Zhu & Gupta's cubic (2017: To prune, or not to prune).

    `masks` are those of the last step.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], make: Make, sparsity: float, rise: float, every: int
    ) -> None:
        self.weights, self.make, self.sparsity = weights, make, sparsity
        self.rise, self.every = rise, every
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        self.reached = 0.0

    def gradients(self, model: nn.Module, step: int, steps: int) -> None:
        for name, weight in self.weights.items():
            assert weight.grad is not None
            weight.grad *= self.masks[name]

    def after(self, model: nn.Module, step: int, steps: int) -> None:
        done = (step + 1) / max(self.rise * steps, 1)
        last = done >= 1 or step + 1 == steps
        if self.reached < self.sparsity and (last or step % self.every == 0):
            self.reached = self.sparsity if last else self.sparsity * risen("cubic", done)
            made = self.make(self.weights, self.reached)
            self.masks = {name: self.masks[name] & mask for name, mask in made.items()}
        for name, weight in self.weights.items():
            weight.data.mul_(self.masks[name])

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks, "reached": self.reached}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.masks, self.reached = dict(state["masks"]), float(state["reached"])


class Admm(Hook):
    """Weights are drawn to their nearest sparse ones: + rho / 2 |W - Z + U|^2, and every `every` steps Z = the projection of
    W + U and U += W - Z (Zhang et al., ECCV 2018: A Systematic DNN Weight Pruning Framework using ADMM).

    rho: at first; tenfold after each of the PHASES of the training.
    """

    PHASES = 4

    def __init__(
        self, weights: Mapping[str, nn.Parameter], make: Make, sparsity: float, rho: float, every: int
    ) -> None:
        self.weights, self.rho, self.every = weights, rho, every
        self.make, self.sparsity = make, sparsity
        self.near = self._projected()
        self.dual = {name: torch.zeros_like(w) for name, w in weights.items()}

    def _projected(self, dual: Weights | None = None) -> dict[str, Tensor]:
        with torch.no_grad():
            moved = {n: w.detach() + (0 if dual is None else dual[n]) for n, w in self.weights.items()}
            masks = self.make(moved, self.sparsity)
            return {n: moved[n] * masks[n] for n in moved}

    def before(self, model: nn.Module, step: int, steps: int) -> None:
        if not step:
            return
        if self._rho(step, steps) > self._rho(step - 1, steps):
            for dual in self.dual.values():
                dual.div_(10)  # it is scaled by 1 / rho
        if step % self.every == 0:
            self.near = self._projected(self.dual)
            for name, weight in self.weights.items():
                self.dual[name] += weight.detach() - self.near[name]

    def gradients(self, model: nn.Module, step: int, steps: int) -> None:
        rho = self._rho(step, steps)
        for name, weight in self.weights.items():
            assert weight.grad is not None
            weight.grad += rho * (weight.detach() - self.near[name] + self.dual[name])

    def _rho(self, step: int, steps: int) -> float:
        return float(self.rho * 10 ** (step * self.PHASES // steps))

    def distance(self) -> float:
        """|W - projection of W| / |W|: what the hard masks still take away."""
        near = self._projected()
        off = sum(float((w.detach() - near[n]).square().sum()) for n, w in self.weights.items())
        return float((off / sum(float(w.detach().square().sum()) for w in self.weights.values())) ** 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"near": self.near, "dual": self.dual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.near, self.dual = dict(state["near"]), dict(state["dual"])


@dataclass(frozen=True)
class Training(Where):
    """How zeros come about.

    scheme: `one-shot` (at once, then `steps` to recover), `gradual` (rising within the share `rise` of `steps`), `admm` (the
    share `rise` of `steps` under the penalty, then the masks, then the rest to recover). every: steps between two masks, 0 = 20
    of `gradual` and 10 of `admm` in all. rho: of ADMM, at first. lr: peak, half of the problem's where not said.
    control: see `Control`.
    """

    sparsity: float = 0.75
    scheme: Literal["gradual", "admm", "one-shot"] = "gradual"
    control: Control = "none"
    steps: int = 400
    lr: float | None = None
    rise: float = 0.5
    every: int = 0
    rho: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity must be between 0 and 1, got {self.sparsity}")
        if self.scheme not in ("gradual", "admm", "one-shot"):
            raise ValueError(f"scheme must be gradual, admm or one-shot, got {self.scheme!r}")
        if self.control not in ("none", "random"):
            raise ValueError(f"control must be none or random, got {self.control!r}")
        least = 0 if self.scheme == "one-shot" else 1
        if self.steps < least:
            raise ValueError(f"steps must be at least {least}, got {self.steps}")
        if not 0 < self.rise < 1:
            raise ValueError(f"rise must be between 0 and 1, got {self.rise}")
        if self.every < 0 or self.rho <= 0:
            raise ValueError(f"every and rho must be positive, got {self.every} and {self.rho}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


def train_sparse(
    work: Work,
    options: Training,
    make: Make,
    weights: Mapping[str, nn.Parameter],
    skipped: Mapping[str, str],
    **facts: Any,
) -> None:
    """Zeros in `weights` as `options` say, that later steps of the recipe keep."""
    make = controlled(make, weights, options.control, work.seed)
    lr = peak(work, options.lr)
    facts |= {"scheme": options.scheme, "control": options.control}
    if options.scheme == "gradual":
        every = options.every or max(1, int(options.rise * options.steps) // 20)
        rising = Rising(weights, make, options.sparsity, options.rise, every)
        work.train(options.steps, lr=lr, hooks=[rising])
        hold(work, rising.masks, skipped, **facts)
        return
    rest = options.steps
    if options.scheme == "admm":
        first = max(1, round(options.rise * options.steps))
        rest -= first
        admm = Admm(
            weights, make, options.sparsity, options.rho, options.every or max(1, first // PROJECTIONS)
        )
        work.train(first, lr=lr, hooks=[admm], floor=0.5)
        facts["distance"] = round(admm.distance(), 4)
    hold(work, make(weights, options.sparsity), skipped, **facts)
    if rest:
        work.train(rest, lr=lr)
