"""One network that holds many: every sub-net of it is narrower or shallower, or sees less, and shares its weights.

    net = SuperNet(model, example, head={"head"})            # width of every part, depth of every chain of residuals
    work.train(1000, lr=problem.lr, hooks=[Sandwich(net, problem)])
    small = net.extract(net.smallest())                      # a plain module; then recalibrate its batch norms

Once-for-all (Cai et al. 2020, arXiv:1908.09791) trained by the sandwich rule with in-place distillation (Yu & Huang 2019,
"Universally Slimmable Networks"): each step trains the largest net on the labels and the smallest and some random ones
on what the largest answers. A narrower layer has the channels that mattered most before that training (sum of |w|);
their order is kept as a list, the weights stay where they are. Which layers share their channels, groups.py says.

Batch norm statistics are of one sub-net: those that the training leaves are the largest net's. `batchnorm.recalibrate`
every sub-net before it is judged or used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgekit.compression.groups import Group, groups, remove, tensors
from edgekit.compression.importance import score
from edgekit.compression.problem import Problem
from edgekit.compression.surgery import depthwise
from edgekit.compression.work import Hook
from edgekit.models import blocks

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Of the channels of a part that a sub-net may keep."""
WIDTH, DEPTH, RESOLUTION = "width ", "depth ", "resolution"
"""How names of axes begin."""
KEPT = 512
"""Sub-nets whose layout is remembered."""

Choice = tuple[Any, ...]
"""A value for every axis of a Space."""


@dataclass(frozen=True)
class Space:
    """What can be chosen. axes: name -> values in order, the smallest first."""

    axes: Mapping[str, tuple[Any, ...]]

    @property
    def size(self) -> int:
        """How many choices there are."""
        return int(np.prod([len(values) for values in self.axes.values()], dtype=object))

    def smallest(self) -> Choice:
        return tuple(values[0] for values in self.axes.values())

    def largest(self) -> Choice:
        return tuple(values[-1] for values in self.axes.values())

    def random(self, rng: np.random.Generator) -> Choice:
        """Every axis on its own, all values alike."""
        return tuple(values[int(rng.integers(len(values)))] for values in self.axes.values())

    def uniform(self, share: float) -> Choice:
        """Every part at the largest width up to `share` (at least its smallest), everything else as large as it is."""
        return tuple(
            max((v for v in values if v <= share), default=values[0])
            if name.startswith(WIDTH)
            else values[-1]
            for name, values in self.axes.items()
        )

    def named(self, choice: Choice) -> dict[str, Any]:
        """For people and JSON."""
        return dict(zip(self.axes, choice, strict=True))

    def of(self, named: Mapping[str, Any]) -> Choice:
        """From `named`."""
        return tuple(named[name] for name in self.axes)


def part_of(name: str) -> str:
    """The part of a network that a layer belongs to: its first name, or "" for networks whose names say nothing."""
    return name.partition(".")[0]


class Resize:
    """Before a network's forward: pictures [B, C, H, W] are made `size` (height, width), bilinearly. Exported with it."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.resized(inputs[0]), *inputs[1:])

    def resized(self, images: Tensor) -> Tensor:
        return nn.functional.interpolate(images, self.size, mode="bilinear", align_corners=False)


class SuperNet:
    """`model` and its sub-nets. A choice has a share of channels for every part, a depth for every chain, a resolution.

    model: float32, its weights are those of all sub-nets. example, head: as in Problem. shares: that a part may keep,
    in channels rounded to `multiple`. part: of a layer's name; groups of one part are as wide as each other, relative to
    their own full width. chains: name -> residual blocks that a sub-net may skip from the end on, None for those in
    models.blocks, by the module that holds them. resolutions: shares of the sides of `example` that a sub-net may see,
    where outputs do not depend on them: an extracted net resizes what it is given (`Resize`). Pictures of any size are
    seen by a detector as it is; there resolution is a matter of its export. The space has an axis "width <part>" or
    "depth <chain>" each, and "resolution". Raises: MissingExtraError without Torch-Pruning; ValueError where nothing can
    be chosen, or outputs depend on the resolution.
    """

    def __init__(
        self, model: nn.Module, example: Tensor, head: Collection[str] = (), *, shares: Sequence[float] = SHARES,
        multiple: int = 8, part: Callable[[str], str] = part_of, chains: Mapping[str, Sequence[str]] | None = None,
        resolutions: Sequence[float] = (), importance: str = "l1",
    ) -> None:  # fmt: skip
        self.model, self.example, self.multiple = model, example, multiple
        named = dict(model.named_modules())
        self.groups = [
            group
            for group in groups(model, example, head)
            if group.units > multiple and not any(_grouped(named[slot.module]) for slot in group.slots)
        ]
        self.orders = [
            torch.argsort(score(model, group, importance), descending=True, stable=True).tolist()
            for group in self.groups
        ]
        self.parts = [part(group.name) for group in self.groups]
        self.chains = dict(_chains(model) if chains is None else chains)
        axes: dict[str, tuple[Any, ...]] = {}
        for name in dict.fromkeys(self.parts):
            own = [g for g, p in zip(self.groups, self.parts, strict=True) if p == name]
            values: dict[tuple[int, ...], float] = {}
            for share in sorted(
                {*shares, 1.0}
            ):  # of shares that keep the same channels, the one that is nearest to them
                kept = tuple(self._kept(g, share) for g in own)
                really = sum(kept) / sum(g.units for g in own)
                if kept not in values or abs(share - really) < abs(values[kept] - really):
                    values[kept] = float(share)
            axes[WIDTH + name] = tuple(values.values())
        for name, names in self.chains.items():
            axes[DEPTH + name] = tuple(range(len(names) + 1))
        if resolutions:
            axes[RESOLUTION] = tuple(sorted({*(float(share) for share in resolutions), 1.0}))
            self._check_resolutions(axes[RESOLUTION])
        self.space = Space({name: values for name, values in axes.items() if len(values) > 1})
        if not self.space.axes:
            raise ValueError("super-net: nothing can be chosen, expected channels or blocks that may leave")
        self._layouts: dict[Choice, tuple[nn.Module, dict[str, Callable[[Tensor], Tensor]]]] = {}
        self._places: nn.Module | None = None

    def smallest(self) -> Choice:
        return self.space.smallest()

    def largest(self) -> Choice:
        return self.space.largest()

    def resize(self, choice: Choice) -> Resize | None:
        """What a sub-net does to its inputs, None for nothing."""
        share = self.space.named(choice).get(RESOLUTION, 1.0)
        return None if share == 1 else _resize(self.example, share)

    def _check_resolutions(self, shares: Sequence[float]) -> None:
        before = {part: part.training for part in self.model.modules()}
        with torch.no_grad():
            answers = [
                self.model.eval()(_resize(self.example, share).resized(self.example)) for share in shares
            ]
        for part, mode in before.items():
            part.training = mode
        if len({tuple(t.shape for t in tensors(answer)) for answer in answers}) > 1:
            raise ValueError("super-net: outputs change with the resolution, expected one of classes, say")

    def _kept(self, group: Group, share: float) -> int:
        return min(group.units, max(1, round(group.units * share / self.multiple)) * self.multiple)

    def _cut(
        self, model: nn.Module, choice: Choice, masks: MutableMapping[str, Tensor] | None = None
    ) -> nn.Module:
        named = self.space.named(choice)
        for name, chain in self.chains.items():
            for gone in chain[named.get(DEPTH + name, len(chain)) :]:
                holder, _, last = gone.rpartition(".")
                setattr(model.get_submodule(holder), last, nn.Identity())
        left = dict(model.named_modules())
        if masks is not None:
            alive = dict(model.named_parameters())
            for name in [n for n in masks if n not in alive]:
                del masks[name]
        leaving = []
        for group, order, part in zip(self.groups, self.orders, self.parts, strict=True):
            units = order[self._kept(group, named.get(WIDTH + part, 1.0)) :]
            slots = tuple(s for s in group.slots if _has(left, s.module))
            if units and slots:
                leaving.append((Group(group.name, slots), units))
        remove(model, leaving, masks)
        return model

    def extract(self, choice: Choice, masks: MutableMapping[str, Tensor] | None = None) -> nn.Module:
        """The sub-net as a plain module with weights of its own. masks: by parameter name, cut along in place."""
        net = self._cut(copy.deepcopy(self.model), choice, masks)
        resize = self.resize(choice)
        if resize is not None:
            net.register_forward_pre_hook(resize)
        return net

    def forward(self, choice: Choice, inputs: Tensor) -> Any:
        """What the sub-net answers, with gradients to the shared weights; batch norms in the mode of the model."""
        if choice == self.largest():
            return self.model(inputs)
        net, takes = self._layout(choice)
        net.train(self.model.training)
        resize = self.resize(choice)
        inputs = inputs if resize is None else resize.resized(inputs)
        weights = dict(self.model.named_parameters())
        return functional_call(net, {name: take(weights[name]) for name, take in takes.items()}, (inputs,))

    def _layout(self, choice: Choice) -> tuple[nn.Module, dict[str, Callable[[Tensor], Tensor]]]:
        """The sub-net as a module, and for each of its parameters where its values are in the model's."""
        if choice not in self._layouts:
            if self._places is None:  # a copy whose weights are their own places
                self._places = copy.deepcopy(self.model).double().requires_grad_(False)
                for weight in self._places.parameters():
                    weight.copy_(torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape))
            cut = self._cut(copy.deepcopy(self._places), choice)
            full = dict(self.model.named_parameters())
            takes = {name: _taking(full[name], places.long()) for name, places in cut.named_parameters()}
            if len(self._layouts) >= KEPT:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[choice] = (cut.to(self.example.dtype), takes)
        return self._layouts[choice]


def _resize(example: Tensor, share: float) -> Resize:
    height, width = (max(4, round(side * share / 4) * 4) for side in example.shape[-2:])
    return Resize((height, width))


def _grouped(part: nn.Module) -> bool:
    """A convolution in groups wider than one channel: they would have to stay equal, so it stays as wide as it is."""
    return getattr(part, "groups", 1) > 1 and not depthwise(part)


def _has(parts: Mapping[str, nn.Module], name: str) -> bool:
    return name in parts and not isinstance(parts[name], nn.Identity)


def _chains(model: nn.Module) -> dict[str, list[str]]:
    """Residual blocks of models.blocks by the module that holds them."""
    found: dict[str, list[str]] = {}
    for name, part in model.named_modules():
        if isinstance(part, (blocks.Residual, blocks.Skip, blocks.Shuffle)):
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def _taking(full: Tensor, places: Tensor) -> Callable[[Tensor], Tensor]:
    """The function that takes the values at `places` (flat) out of a tensor like `full`, by whole rows where it can."""
    if places.numel() == full.numel():
        return lambda weight: weight
    if places.ndim >= 2 and places.shape[2:] == full.shape[2:]:
        rest = int(np.prod(full.shape[1:]))
        rows, columns = places.flatten(1)[:, 0] // rest, None
        inner = int(np.prod(full.shape[2:], dtype=int))
        columns = (places[0].reshape(places.shape[1], -1)[:, 0] % rest) // inner
        grid = torch.arange(full.numel()).reshape(full.shape)[rows][:, columns]
        if torch.equal(grid, places):
            return lambda weight: _rows(_rows(weight, 0, rows), 1, columns)
    if places.ndim == 1:
        return lambda weight: weight[places]
    return lambda weight: weight.flatten()[places.flatten()].reshape(places.shape)


def _rows(weight: Tensor, axis: int, which: Tensor) -> Tensor:
    return weight if len(which) == weight.shape[axis] else weight.index_select(axis, which)


class Sandwich(Hook):
    """The smallest and `count` random sub-nets learn, in every step of a training, what the largest answers.

    The training itself is the largest net's, on the labels. seed: which sub-nets a step trains.
    """

    def __init__(self, net: SuperNet, problem: Problem, *, count: int = 2, seed: int = 0) -> None:
        self.net, self.count, self.seed = net, count, seed
        self.imitate = problem.imitate or imitate_logits
        self.step = 0

    def before(self, model: nn.Module, step: int, steps: int) -> None:
        self.step = step

    def loss(self, inputs: Tensor, outputs: Any, targets: Any) -> Tensor | None:
        rng = np.random.default_rng([self.seed, 11, self.step])
        answers = detached(outputs)
        choices = [self.net.smallest(), *(self.net.space.random(rng) for _ in range(self.count))]
        total: Tensor | None = None
        for choice in choices:
            term = self.imitate(self.net.forward(choice, inputs), answers, targets)
            total = term if total is None else total + term
        return total


def imitate_logits(student: Tensor, teacher: Tensor, targets: Any) -> Tensor:
    """Cross-entropy of logits [B, C] to what the teacher's logits say (Yu & Huang 2019, section 3.3)."""
    return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()


def detached(outputs: Any) -> Any:
    """Outputs of any nesting of lists and tuples, without gradients."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    return type(outputs)(detached(each) for each in outputs)
