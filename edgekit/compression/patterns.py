"""Which weights to keep: masks by shape of the pattern, pure functions of the weights.

A weight is that of a Conv2d [O, I / groups, h, w] or of a Linear [O, I]; a mask is bool of its shape, True = kept. The
random control of a pattern is the same function of `noise` in place of the weight: as many zeros, placed as the pattern
demands, but anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

TAPS = 5
"""Kept of the 9 of a 3x3 kernel."""
LIBRARY = 12
"""Kernel patterns that a network chooses from."""
BLOCK = (8, 4)
"""Filters and input channels of a punched block: what one tile of the kernel computes."""
TAU = 0.01
"""Softness of MaxQ's masks, in units of the weights."""


@dataclass(frozen=True)
class Ratio:
    """At most `n` of each `m` consecutive input channels are not zero."""

    n: int
    m: int

    @staticmethod
    def parse(text: str) -> Ratio:
        """From "2:4". Raises: ValueError."""
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(f"pattern must be N:M with 0 < N < M, such as 2:4, got {text!r}")
        return Ratio(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of the shape of `weight` that say nothing about it, drawn on the processor: the same everywhere."""
    return torch.rand(weight.shape, generator=generator).to(weight.device, weight.dtype)


# --- unstructured --------------------------------------------------------------------------------


def magnitude(weight: Tensor, sparsity: float) -> Tensor:
    """All but the smallest round(sparsity * size) weights (Han et al. 2015); of equals the first is kept."""
    return cut({"": weight.abs()}, sparsity)[""]


def cut(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One cut through the scores of all layers: the smallest round(sparsity * number) go; of equals the first stays."""
    flat = torch.cat([s.detach().flatten() for s in scores.values()])
    gone = round(sparsity * flat.numel())
    kept = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    kept[flat.argsort(descending=True, stable=True)[: flat.numel() - gone]] = True
    sizes = [s.numel() for s in scores.values()]
    parts: list[Tensor] = list(kept.split(sizes))  # type: ignore[no-untyped-call]
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def lamp(weight: Tensor) -> Tensor:
    """w^2 over the sum of v^2 of all v of the layer with |v| >= |w|: scores that compare between layers.

    Lee, Park, Mo, Ahn, Shin: Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021. Of equals the first counts as the larger.
    """
    square = weight.detach().double().square().flatten()
    order = square.argsort(descending=True, stable=True)
    sums = square[order].cumsum(0)
    scores = torch.empty_like(square)
    scores[order] = square[order] / sums.clamp_min(torch.finfo(torch.float64).tiny)
    return scores.view(weight.shape)


# --- N:M -----------------------------------------------------------------------------------------


def n_of_m(weight: Tensor, ratio: Ratio) -> Tensor:
    """The `n` largest of each `m` consecutive input channels; of equals the lower channel is kept."""
    groups = _grouped(weight.detach().abs(), ratio.m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : ratio.n], True)
    return _ungrouped(kept, weight)


def keeps(weight: Tensor, ratio: Ratio) -> bool:
    """Whether every group holds at most `n` weights that are not zero."""
    return bool(((_grouped(weight, ratio.m) != 0).sum(-1) <= ratio.n).all())


def maxq(weight: Tensor, ratio: Ratio, share: float = 1.0, *, soft: bool = True, tau: float = TAU) -> Tensor:
    """MaxQ's mask, float of the weight's shape, 0 or between 1 and 3: what weights are multiplied by.

    share: of the blocks (groups) that hold N:M; those of the smallest sums stay dense longest. soft: kept weights count more
    where they are large among their filter and, in 3x3 kernels, among all of their position.
    Xiang et al.: MaxQ: Multi-Axis Query for N:M Sparsity Network, CVPR 2024.
    """
    weight = weight.detach()
    hard = n_of_m(weight, ratio)
    dense = math.floor((1 - share) * weight.numel() / ratio.m + 1e-9)
    if dense:
        groups = _grouped(weight.abs(), ratio.m)
        smallest = groups.sum(-1).flatten().argsort(stable=True)[:dense]
        open_ = torch.zeros(groups.numel() // ratio.m, dtype=torch.bool, device=weight.device)
        open_[smallest] = True
        hard = hard | _ungrouped(open_.view(groups.shape[:-1])[..., None].expand_as(groups), weight)
    if not soft:
        return hard.to(weight.dtype)
    filters = soft_rows(weight.abs().flatten(1), ratio, tau).view(weight.shape)
    mask = 1 + filters
    if weight.shape[2:] == (3, 3):
        rows = weight.abs().permute(2, 3, 0, 1)
        places = soft_rows(rows.flatten(2).flatten(0, 1), ratio, tau).view(rows.shape)
        mask = mask + places.permute(2, 3, 0, 1)
    return mask * hard


def soft_rows(rows: Tensor, ratio: Ratio, tau: float = TAU) -> Tensor:
    """How much more each of a row counts, 0 to 1. rows: absolute weights [n, length].

    0 for the floor((m - n) / m * length) smallest, a sigmoid around the cut for the others.
    """
    length = rows.shape[1]
    gone = (ratio.m - ratio.n) * length // ratio.m
    ordered, order = rows.sort(dim=1, stable=True)
    if not 0 < gone < length:
        return torch.full_like(rows, float(gone == 0))
    middle = ordered[:, gone - 1 : gone + 1].mean(1, keepdim=True)
    found = torch.sigmoid((rows - middle) / tau)
    return found.scatter(1, order[:, :gone], 0.0)


def risen(kind: str, done: float) -> float:
    """How far a schedule has come, 0 to 1, when `done` (0 to 1, clipped) of its time is over: `cubic` is fast, then slow."""
    done = min(max(done, 0.0), 1.0)
    if kind == "cubic":
        return 1 - (1 - done) ** 3
    if kind == "linear":
        return done
    raise ValueError(f"schedule must be cubic or linear, got {kind!r}")


def _grouped(values: Tensor, m: int) -> Tensor:
    """[O, h, w, I / m, m] of a Conv's, [O, I / m, m] of a Linear's."""
    assert values.shape[1] % m == 0, "layers that do not divide are not asked for"
    last = values.movedim(1, -1)
    return last.reshape(*last.shape[:-1], -1, m)


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    return groups.flatten(-2).movedim(-1, 1).contiguous().view(like.shape)


# --- kernels of 3x3 ------------------------------------------------------------------------------


def library(weights: Mapping[str, Tensor], size: int = LIBRARY) -> Tensor:
    """bool [size, 9]: the `size` patterns of TAPS taps, the middle one among them, that most 3x3 kernels would choose.

    Niu et al.: PatDNN: Achieving Real-Time DNN Execution on Mobile Devices with Pattern-based Weight Pruning, ASPLOS 2020.
    """
    around = [i for i in range(9) if i != 4]
    every = torch.zeros(math.comb(8, TAPS - 1), 9, dtype=torch.bool)
    for row, taps in zip(every, combinations(around, TAPS - 1), strict=True):
        row[[4, *taps]] = True
    count = torch.zeros(len(every), dtype=torch.int64)
    for weight in weights.values():
        count += torch.bincount(_nearest(weight.cpu(), every), minlength=len(every))
    return every[count.argsort(descending=True, stable=True)[:size]]


def kernel_patterns(weight: Tensor, patterns: Tensor, sparsity: float = 0.0) -> Tensor:
    """Each 3x3 kernel keeps the pattern of `patterns` (bool [P, 9]) whose taps have the largest L2 norm, the first of equals.

    sparsity: beyond what the patterns zero, whole kernels of the smallest norm go (PatDNN's connectivity pruning), until
    that share of all weights is zero.
    """
    chosen = patterns.to(weight.device)[_nearest(weight, patterns)].view(weight.shape)
    kept = patterns[0].sum().item() / 9
    gone = max(0.0, 1 - (1 - sparsity) / kept)
    norms = (weight.detach() * chosen).square().sum((2, 3))
    return chosen & magnitude(norms, gone)[:, :, None, None]


def _nearest(weight: Tensor, patterns: Tensor) -> Tensor:
    """int64 [O * I]: which pattern holds most of each kernel."""
    energy = weight.detach().flatten(2).flatten(0, 1).square()
    return (energy @ patterns.to(energy.device, energy.dtype).T).argmax(1)


# --- blocks --------------------------------------------------------------------------------------


def punched_scores(weight: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """[O / filters, I / channels, places of the kernel]: sums over a block's channels of the L2 norms over its filters.

    Cai et al.: YOLObile: Real-Time Object Detection on Mobile Devices via Compression-Compilation Co-Design, AAAI 2021.
    """
    filters, channels = block
    outputs, inputs = weight.shape[:2]
    tiles = weight.detach().reshape(outputs // filters, filters, inputs // channels, channels, -1)
    return tiles.square().sum(1).sqrt().sum(2)


def block_punched(weight: Tensor, sparsity: float, block: tuple[int, int] = BLOCK) -> Tensor:
    """Inside a block of filters and input channels the same places of the kernel are zero for all.

    Kept are those strictly above the percentile of the layer's scores; of a 1x1 kernel (a Linear) a block is kept or not.
    """
    scores = punched_scores(weight, block)
    if sparsity <= 0:
        return torch.ones_like(weight, dtype=torch.bool)
    kept = scores > torch.quantile(scores.flatten().double(), sparsity)
    filters, channels = block
    full = kept[:, None, :, None].expand(-1, filters, -1, channels, -1)
    return full.reshape(weight.shape)
