"""Lightweight blocks as swappable parts: what a stage, a neck or a head of a small network is built from.

    block("separable", 64, 128, stride=2)    # instead of a 3x3 convolution
    residual("inverted6+se", 128)            # instead of x + conv3x3(conv1x1(x))

A kind is a name, where it takes one a number, and "+se" for squeeze-and-excitation at the end of its branch:

plain       3x3 convolution; as a residual 1x1 to half the channels, then 3x3
separable   3x3 depthwise, 1x1 (MobileNet, Howard et al. 2017): 1/outputs + 1/9 of a 3x3's products
invertedN   1x1 to N times the channels, 3x3 depthwise, 1x1 without activation (MobileNetV2, Sandler et al. 2018); N = 6
groupN      plain with the 3x3 in N groups (ResNeXt, Xie et al. 2017); N = 4
shuffle     half of the channels pass, half go 1x1, 3x3 depthwise, 1x1 (ShuffleNetV2, Ma et al. 2018)
ghostN      half of the channels by a 1x1, half from those by a 3x3 depthwise, twice: to N times the channels and back
            (GhostNet, Han et al. 2020, s = 2, d = 3); N = 2

Every convolution is followed by its own batch norm; activations are ReLU, so that all of it folds and quantizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgekit.errors import UsageError, did_you_mean

KINDS = ("plain", "separable", "inverted", "group", "shuffle", "ghost")
DEFAULTS = {"inverted": 6, "group": 4, "ghost": 2}
"""The number of a kind that takes one, where none is given."""
REDUCTION = 4
"""Squeeze-and-excitation: channels over those in its middle."""


def conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, linear: bool = False
) -> nn.Sequential:
    """Convolution, batch norm and, unless `linear`, ReLU."""
    parts: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03),
    ]
    return nn.Sequential(*parts, *([] if linear else [nn.ReLU(inplace=True)]))


def parse(kind: str) -> tuple[str, int, bool]:
    """(name, number or 0, with squeeze-and-excitation) of a kind. Raises: UsageError."""
    found = re.fullmatch(r"([a-z]+?)(\d*)((?:\+se)?)", kind)
    if found is None or found[1] not in KINDS:
        raise UsageError(
            f"block {kind!r}: unknown, expected one of {', '.join(KINDS)}, with +se or not. {did_you_mean(kind, KINDS)}"
        )
    name, number = found[1], int(found[2] or DEFAULTS.get(found[1], 0))
    if found[2] and (name not in DEFAULTS or not 1 <= number <= 64):
        takes = "a number of 1 to 64" if name in DEFAULTS else "no number"
        raise UsageError(f"block {kind!r}: {name} takes {takes}. Write {name}{DEFAULTS.get(name, '')}")
    return name, number, bool(found[3])


class SqueezeExcite(nn.Module):
    """x * sigmoid(conv(ReLU(conv(mean over places)))) (Hu et al. 2018): one factor a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = max(8, channels // REDUCTION)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, middle, 1), nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        factor: Tensor = self.expand(self.reduce(self.mean(x)).relu()).sigmoid()
        return x * factor


class Residual(nn.Module):
    """x + conv3x3(conv1x1(x)), half the channels in between."""

    def __init__(self, channels: int, groups: int = 1, excite: bool = False) -> None:
        super().__init__()
        self.reduce = conv(channels, channels // 2, 1)
        self.expand = conv(channels // 2, channels, groups=_groups(groups, channels // 2))
        if excite:
            self.expand.append(SqueezeExcite(channels))

    def forward(self, x: Tensor) -> Tensor:
        expanded: Tensor = self.expand(self.reduce(x))
        return x + expanded


class Skip(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.branch(x)
        return x + found


class Ghost(nn.Module):
    """1x1 to half of the outputs, the other half from those by a 3x3 depthwise. An even number of outputs."""

    def __init__(self, inputs: int, outputs: int, linear: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        self.primary = conv(inputs, half, 1, linear=linear)
        self.cheap = conv(half, half, groups=half, linear=linear)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], 1)


class GhostDown(nn.Module):
    """Ghost bottleneck of stride 2: its shortcut is a depthwise of stride 2 and a 1x1."""

    def __init__(self, branch: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Sequential(
            conv(inputs, inputs, 3, 2, groups=inputs, linear=True), conv(inputs, outputs, 1, linear=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.branch(x) + self.shortcut(x)
        return found


class Shuffle(nn.Module):
    """ShuffleNetV2's unit: channels are shuffled and halved, one half passes, one goes through the branch.

    The shuffle stands at the unit's start: even channels pass, odd ones are worked on, so that with the split it is
    one strided Slice a half (passes.fold_shuffle). An even number of channels.
    """

    def __init__(self, channels: int, excite: bool = False) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv(half, half, 1), conv(half, half, groups=half, linear=True), conv(half, half, 1)
        )
        if excite:
            self.branch.append(SqueezeExcite(half))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = (int(n) for n in x.shape)
        mixed = x.reshape(b, c // 2, 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        passing, worked = mixed.chunk(2, 1)
        return torch.cat([passing, self.branch(worked)], 1)


class ShuffleDown(nn.Module):
    """ShuffleNetV2's unit of stride 2: both branches see all channels. An even number of outputs."""

    def __init__(self, inputs: int, outputs: int, excite: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(
            conv(inputs, inputs, 3, 2, groups=inputs, linear=True), conv(inputs, half, 1)
        )
        self.right = nn.Sequential(
            conv(inputs, half, 1), conv(half, half, 3, 2, groups=half, linear=True), conv(half, half, 1)
        )
        if excite:
            self.right.append(SqueezeExcite(half))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def block(kind: str, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """[B, inputs, H, W] to [B, outputs, H / stride, W / stride], in place of a 3x3 convolution; stride 1 or 2.

    Raises: UsageError for an unknown kind, or an odd number of outputs where a kind halves them.
    """
    name, number, excite = parse(kind)
    if name in ("shuffle", "ghost") and outputs % 2:
        raise UsageError(f"block {kind!r}: {outputs} channels, expected an even number. It halves them")
    return _BLOCKS[name](inputs, outputs, stride, number, excite)


def residual(kind: str, channels: int) -> nn.Module:
    """[B, channels, H, W] to the same: a block with a way past it. Raises: UsageError as `block` does."""
    name, number, excite = parse(kind)
    if name in ("plain", "group"):
        return Residual(channels, max(number, 1), excite)
    made = block(kind, channels, channels)
    return Skip(made) if name == "separable" else made


def _groups(wanted: int, *channels: int) -> int:
    """The most groups, up to those wanted, that divide all of `channels`."""
    common = math.gcd(*channels)
    return max(n for n in range(1, min(wanted, common) + 1) if common % n == 0)


def _ended(parts: list[nn.Module], channels: int, excite: bool) -> nn.Sequential:
    return nn.Sequential(*parts, *([SqueezeExcite(channels)] if excite else []))


def _plain(inputs: int, outputs: int, stride: int, number: int, excite: bool) -> nn.Module:
    made = conv(inputs, outputs, 3, stride, _groups(max(number, 1), inputs, outputs))
    return made.append(SqueezeExcite(outputs)) if excite else made


def _separable(inputs: int, outputs: int, stride: int, number: int, excite: bool) -> nn.Module:
    return _ended([conv(inputs, inputs, 3, stride, groups=inputs), conv(inputs, outputs, 1)], outputs, excite)


def _inverted(inputs: int, outputs: int, stride: int, number: int, excite: bool) -> nn.Module:
    wide = inputs * number
    parts: list[nn.Module] = [] if number == 1 else [conv(inputs, wide, 1)]
    parts += [conv(wide, wide, 3, stride, groups=wide), conv(wide, outputs, 1, linear=True)]
    made = _ended(parts, outputs, excite)
    return Skip(made) if stride == 1 and inputs == outputs else made


def _shuffle(inputs: int, outputs: int, stride: int, number: int, excite: bool) -> nn.Module:
    if stride == 2:
        return ShuffleDown(inputs, outputs, excite)
    unit = Shuffle(outputs, excite)
    return unit if inputs == outputs else nn.Sequential(conv(inputs, outputs, 1), unit)


def _ghost(inputs: int, outputs: int, stride: int, number: int, excite: bool) -> nn.Module:
    wide = inputs * number + inputs * number % 2
    parts: list[nn.Module] = [Ghost(inputs, wide)]
    if stride == 2:
        parts.append(conv(wide, wide, 3, 2, groups=wide, linear=True))
    made = _ended([*parts, Ghost(wide, outputs, linear=True)], outputs, excite)
    if stride == 2:
        return GhostDown(made, inputs, outputs)
    return Skip(made) if inputs == outputs else made


_BLOCKS: dict[str, Callable[[int, int, int, int, bool], nn.Module]] = {
    "plain": _plain,
    "separable": _separable,
    "inverted": _inverted,
    "group": _plain,
    "shuffle": _shuffle,
    "ghost": _ghost,
}
