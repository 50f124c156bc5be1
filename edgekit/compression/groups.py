"""Which channels of a network can only leave together (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning").

    found = groups(model, example, head={"head"})
    remove(model, [(found[0], [3, 5])], masks)          # in place; look for groups anew afterwards

Torch-Pruning traces the network and says which layers hang together. What it says is proven before it is used: half of
a group's units are cut out of a copy, which must give what the network gives when the layers that read them see zeros.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.compression import surgery
from edgekit.errors import MissingExtraError

TOLERANCE = 1e-4
"""Of the largest output: sums in another order."""


@dataclass(frozen=True)
class Slot:
    """One side of one layer. side: "out", "in", or "both" (norms, depthwise). channels: of each unit, its channels there."""

    module: str
    side: str
    channels: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Units 0..n-1 that leave one by one, each with all of its channels in every slot. name: the layer that makes them."""

    name: str
    slots: tuple[Slot, ...]

    @property
    def units(self) -> int:
        return len(self.slots[0].channels)

    @property
    def per_unit(self) -> int:
        """Channels of a unit in the layer that makes it."""
        return len(self.slots[0].channels[0])

    def having(self, *sides: str) -> Iterator[Slot]:
        return (slot for slot in self.slots if slot.side in sides)


def groups(
    model: nn.Module,
    example: Tensor,
    head: Collection[str] = (),
    left: MutableMapping[str, str] | None = None,
) -> list[Group]:
    """The groups of `model` whose channels may leave, in the order of its layers.

    example: one input. head: names of layers whose outputs stay, as all that reaches the network's outputs does.
    left: takes what was left alone, by layer, with the reason. Raises: MissingExtraError without Torch-Pruning.
    """
    left = {} if left is None else left
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    found = []
    for group in sorted(_traced(model, example, order), key=lambda g: order[g.name]):
        reason = _fixed(group, head)
        if reason:
            left[group.name] = reason
        else:
            found.append(group)
    if not unproven(model, found, example):  # all at once
        return found
    reasons = {group.name: unproven(model, [group], example) for group in found}
    left.update({name: reason for name, reason in reasons.items() if reason})
    return [group for group in found if not reasons[group.name]]


def remove(
    model: nn.Module,
    leaving: Iterable[tuple[Group, Sequence[int]]],
    masks: MutableMapping[str, Tensor] | None = None,
) -> None:
    """Cut units out of `model` in place, all at once (groups share layers). masks: of parameters, cut along.

    Raises: ValueError where nothing would be left of a layer.
    """
    gone: dict[tuple[str, str], list[int]] = {}
    for group, units in leaving:
        for slot in group.slots:
            channels = (c for unit in units for c in slot.channels[unit])
            gone.setdefault((slot.module, slot.side), []).extend(channels)
    surgery.cut(model, gone, masks)


@contextmanager
def silenced(model: nn.Module, leaving: Iterable[tuple[Group, Sequence[int]]]) -> Iterator[None]:
    """`model` as if units were gone: layers that read them see zeros. Not for measuring time."""
    parts, hooks = dict(model.named_modules()), []
    for group, units in leaving:
        for slot in group.having("in"):
            gone = torch.tensor([c for unit in units for c in slot.channels[unit]], dtype=torch.long)

            def zero(part: nn.Module, inputs: tuple[Tensor, ...], gone: Tensor = gone) -> tuple[Tensor, ...]:
                axis = -1 if isinstance(part, nn.Linear) else 1
                return (inputs[0].index_fill(axis, gone, 0.0), *inputs[1:])

            hooks.append(parts[slot.module].register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unproven(model: nn.Module, found: Sequence[Group], example: Tensor) -> str:
    """Why groups cannot be used, "" where cutting half of their units gives what silencing them gives."""
    draw = torch.Generator().manual_seed(0)
    halves = [torch.randperm(group.units, generator=draw)[: group.units // 2].tolist() for group in found]
    leaving = list(zip(found, halves, strict=True))
    probe = torch.rand(example.shape, generator=draw).to(example.dtype)
    small = copy.deepcopy(model).eval()
    try:
        remove(small, leaving)
        with torch.no_grad(), _evaluating(model):
            with silenced(model, leaving):
                want = tensors(model(probe))
            got = tensors(small(probe))
    except (RuntimeError, ValueError, IndexError) as error:
        return f"the network does not run without half of them: {str(error).splitlines()[0][:120]}"
    if any(a.shape != b.shape for a, b in zip(want, got, strict=True)):
        return "reaches the outputs"
    for a, b in zip(want, got, strict=True):
        if not torch.allclose(a, b, rtol=0, atol=TOLERANCE * max(float(a.abs().max()), 1e-6)):
            return "cutting is not the same as silencing: channels are mixed between the layers"
    return ""


def tensors(outputs: Any) -> list[Tensor]:
    """All floating tensors in nested outputs, in order."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = outputs.values()
    return [t for each in outputs for t in tensors(each)] if isinstance(outputs, Iterable) else []


def _fixed(group: Group, head: Collection[str]) -> str:
    held = [slot.module for slot in group.having("out", "both") if slot.module in head]
    if held:
        return f"head {held[0]}"
    if not any(group.having("in")):
        return "reaches the outputs"
    if group.units < 2:
        return "has one channel"
    counts = [{len(c) for c in slot.channels} for slot in group.slots]
    return "" if all(len(n) == 1 and 0 not in n for n in counts) else "units of unequal size"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, was in before.items():
            part.training = was


def _traced(model: nn.Module, example: Tensor, order: Mapping[str, int]) -> Iterator[Group]:
    """What Torch-Pruning finds; a layer that `surgery` cannot cut ends a group's hopes in the proof."""
    try:
        import torch_pruning as tp  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtraError("torch-pruning", "torch", "prune channels") from None
    traced = copy.deepcopy(model).requires_grad_(True)
    names = {part: name for name, part in traced.named_modules()}
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(traced, (example,), verbose=False)
    for found in graph.get_all_groups():
        root = found[0].dep
        units = _units(graph, found.items, names)
        if (
            len({len(unit) for unit in units}) > 1
        ):  # some come back to the root: it says so when asked one by one
            alone = [
                graph.get_pruning_group(root.target.module, root.handler, [i]) for i in range(len(units))
            ]
            units = [set().union(*_units(graph, one.items, names)) for one in alone]
        yield _grouped(_tied(units, traced), order)


Place = tuple[str, str, int]
"""(module, side, channel)."""


def _units(graph: Any, items: Sequence[Any], names: Mapping[nn.Module, str]) -> list[set[Place]]:
    """What leaves with each channel of the root of a group of Torch-Pruning."""
    units: dict[int, set[Place]] = {unit: set() for unit in sorted(items[0].idxs)}
    for item in items:
        part = item.dep.target.module
        if not isinstance(part, (*surgery.MIXING, *surgery.ALONG)):
            continue
        side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        if isinstance(part, surgery.ALONG) or surgery.depthwise(part):
            side = "both"
        for channel, unit in zip(item.idxs, item.root_idxs, strict=True):
            units[unit].add((names[part], side, channel))
    return list(units.values())


def _tied(units: Sequence[set[Place]], model: nn.Module) -> list[set[Place]]:
    """Units that share a channel are one, and so are those at the same place of each group of a convolution, whose groups
    keep equal shares."""
    parts = dict(model.named_modules())
    owner: dict[Place, int] = {}
    one = list(range(len(units)))

    def first(at: int) -> int:
        while one[at] != at:
            at = one[at]
        return at

    for at, unit in enumerate(units):
        for module, side, channel in unit:
            part, place = parts[module], channel
            if isinstance(part, surgery.Convs) and part.groups > 1 and side != "both":
                place = channel % (surgery.channels(part, side) // part.groups)
            other = first(owner.setdefault((module, side, place), at))
            low, high = sorted((first(at), other))
            one[high] = low
    found: dict[int, set[Place]] = {}
    for at, unit in enumerate(units):
        found.setdefault(first(at), set()).update(unit)
    return list(found.values())


def _grouped(units: Sequence[set[Place]], order: Mapping[str, int]) -> Group:
    """A group with its slots in the order of layers, makers first."""
    ranks = {"out": 0, "both": 1, "in": 2}
    places = {(module, side) for unit in units for module, side, _ in unit}
    slots = []
    for at in sorted(places, key=lambda at: (ranks[at[1]], order[at[0]])):
        channels = (sorted(c for module, side, c in unit if (module, side) == at) for unit in units)
        slots.append(Slot(*at, tuple(tuple(c) for c in channels)))
    return Group(slots[0].module, tuple(slots))
