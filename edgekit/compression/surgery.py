"""Cutting channels out of layers, with the masks that belong to their weights.

cut(model, {("stage1.0", "out"): [3, 5], ("stage2.0", "in"): [3, 5], ("stage1.1", "both"): [3, 5]}, masks)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

SIDES = ("out", "in", "both")
Convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MIXING = (*Convs, nn.Linear)
"""Layers whose outputs each see many inputs: they have a side "in" and a side "out"."""
ALONG = (_BatchNorm, nn.PReLU)
"""Layers with values per channel, which pass every channel on: side "both", as for a depthwise convolution."""


def depthwise(part: nn.Module) -> bool:
    """A convolution whose every input channel feeds outputs of its own."""
    return isinstance(part, Convs) and part.groups > 1 and part.groups == part.in_channels


def channels(part: nn.Module, side: str) -> int:
    """Channels of a layer on a side, 0 for layers without."""
    if isinstance(part, _BatchNorm):
        return part.num_features
    if isinstance(part, nn.PReLU):
        return part.num_parameters if part.num_parameters > 1 else 0
    if isinstance(part, nn.Linear):
        return part.in_features if side == "in" else part.out_features
    if isinstance(part, Convs):
        return part.in_channels if side == "in" else part.out_channels
    return 0


def cut(
    model: nn.Module,
    gone: Mapping[tuple[str, str], Sequence[int]],
    masks: MutableMapping[str, Tensor] | None = None,
) -> None:
    """Remove channels in place. gone: (module, side) -> channels that leave; "both" of a depthwise convolution counts its
    outputs. masks: by parameter name, cut along.

    Raises: ValueError where a layer would be left without channels, or groups of a convolution with unequal shares.
    """
    parts = dict(model.named_modules())
    for name in dict.fromkeys(name for name, _ in gone):
        sides = {side: set(which) for (at, side), which in gone.items() if at == name and len(which)}
        if sides:
            _cut(parts[name], name, sides, {} if masks is None else masks)


def _cut(part: nn.Module, name: str, gone: dict[str, set[int]], masks: MutableMapping[str, Tensor]) -> None:
    kept = {side: [c for c in range(channels(part, side)) if c not in which] for side, which in gone.items()}
    if not all(kept.values()):
        raise ValueError(f"layer {name}: would lose its last channel")
    if isinstance(part, _BatchNorm):
        keep = torch.tensor(kept["both"])
        part.num_features = len(keep)
        for key in ("weight", "bias"):
            _replace(part, name, key, masks, lambda v: v[keep])
        for key in ("running_mean", "running_var"):
            value = getattr(part, key)
            if value is not None:
                setattr(part, key, value[keep])
    elif isinstance(part, nn.PReLU):
        part.num_parameters = len(kept["both"])
        _replace(part, name, "weight", masks, lambda v: v[kept["both"]])
    elif isinstance(part, nn.Linear):
        rows = kept.get("out", list(range(part.out_features)))
        columns = kept.get("in", list(range(part.in_features)))
        part.out_features, part.in_features = len(rows), len(columns)
        _replace(part, name, "weight", masks, lambda v: v[rows][:, columns])
        _replace(part, name, "bias", masks, lambda v: v[rows])
    else:
        assert isinstance(part, Convs), name
        _cut_conv(part, name, kept, masks)


def _cut_conv(
    part: _ConvNd, name: str, kept: dict[str, list[int]], masks: MutableMapping[str, Tensor]
) -> None:
    """Groups whose inputs (or outputs) all leave are gone; the others must keep equal shares."""
    groups, inputs, outputs = (
        part.groups,
        part.in_channels // part.groups,
        part.out_channels // part.groups,
    )
    if "both" in kept:  # depthwise: the inputs whose outputs all leave
        alive = {c // outputs for c in kept["both"]}
        kept = {"out": kept["both"], "in": sorted(alive)}
    keep_in = _per_group(kept.get("in"), groups, inputs)
    keep_out = _per_group(kept.get("out"), groups, outputs)
    live = [g for g in range(groups) if keep_in[g] and keep_out[g]]
    shares = {(len(keep_in[g]), len(keep_out[g])) for g in live}
    lost = any(bool(keep_in[g]) != bool(keep_out[g]) for g in range(groups))
    if len(shares) != 1 or lost:
        raise ValueError(f"layer {name}: its {groups} groups would keep unequal numbers of channels")
    transposed = bool(part.transposed)

    def weight(
        v: Tensor,
    ) -> Tensor:  # [outputs, inputs per group, ...], transposed [inputs, outputs per group, ...]
        first, second = (keep_in, keep_out) if transposed else (keep_out, keep_in)
        size = inputs if transposed else outputs
        return torch.cat([v[[g * size + c for c in first[g]]][:, second[g]] for g in live])

    rows = [g * outputs + c for g in live for c in keep_out[g]]
    (share_in, share_out) = shares.pop()
    part.groups, part.in_channels, part.out_channels = len(live), len(live) * share_in, len(live) * share_out
    _replace(part, name, "weight", masks, weight)
    _replace(part, name, "bias", masks, lambda v: v[rows])


def _per_group(kept: list[int] | None, groups: int, size: int) -> list[list[int]]:
    if kept is None:
        return [list(range(size)) for _ in range(groups)]
    return [[c % size for c in kept if c // size == g] for g in range(groups)]


def _replace(
    part: nn.Module, name: str, key: str, masks: MutableMapping[str, Tensor], of: Callable[[Tensor], Tensor]
) -> None:
    value = getattr(part, key, None)
    if value is None:
        return
    full = f"{name}.{key}" if name else key
    setattr(part, key, nn.Parameter(of(value.detach()).clone(), requires_grad=value.requires_grad))
    if full in masks:
        masks[full] = of(masks[full]).clone()
