"""Weights on the set of a storage codec (edgekit/codecs.py): k-means codebooks, ternary, binary, powers of two, int4 ...

It pays in bytes: a bundle that stores the network so is a fraction as large, and runs as fast as before (no library here
multiplies in these forms). 16 centroids (4 bits) and powers of two cost little even at once; ternary and binary weights
need the training. Last step of a recipe: a later training leaves the set.

Training: `kmeans-K`: which centroid a weight has is settled at the start, centroids train with the sum of their members'
gradients (Han et al.: Deep Compression, ICLR 2016). All others: float weights are kept beside those of the set, the
forward pass has the latter and gradients pass straight through (Courbariaux et al.: BinaryConnect, 2015; Li et al.: Ternary
Weight Networks, 2016; Elhoushi et al.: DeepShift-Q, 2019); scales are fitted anew in every step.

A codebook is one for a layer, so batch norms behind such layers are folded in first, as an export would do later;
scales are per output channel and survive that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edgekit.compression import codecs, sparse
from edgekit.compression.codecs import Scheme
from edgekit.compression.work import Hook, Work
from edgekit.errors import UsageError


@dataclass(frozen=True)
class Options(sparse.Where):
    """codec: a name of compression/codecs.py without a mask; weights that are zero for good (masks of earlier steps) stay so.
    steps: 0 = at once. lr: peak, a tenth of the problem's where not said. control: `random` = a codebook drawn from the
    weights' mean and deviation in place of k-means, which then trains alike."""

    codec: str = "kmeans-16"
    steps: int = 400
    lr: float | None = None
    control: Literal["none", "random"] = "none"

    def __post_init__(self) -> None:
        try:
            how = codecs.scheme(self.codec)
        except UsageError as error:
            raise ValueError(str(error)) from None
        if how.values is not None or how.codec in ("float32", "float16", "abc"):
            raise ValueError(
                f"codec must be kmeans-K, ternary, ternary-2, binary, pow2-N or intN, got {self.codec!r}"
            )
        if self.control not in ("none", "random") or (self.control == "random" and how.codec != "kmeans"):
            raise ValueError(
                f"control must be none, or random of kmeans, got {self.control!r} of {self.codec}"
            )
        if not 0 <= self.steps <= 10**7:
            raise ValueError(f"steps must be between 0 and 10000000, got {self.steps}")
        if self.lr is not None and not 0 < self.lr <= 10:
            raise ValueError(f"lr must be above 0 and at most 10, got {self.lr:g}")


def run(work: Work, options: Options) -> None:
    """Weights of Conv2d and Linear become members of the codec's set; the first layer and heads stay as they are."""
    how = codecs.scheme(options.codec)
    folded = fold(work.model) if how.codec == "kmeans" else []
    weights, skipped = sparse.layers(work, options, lambda _: "")
    hook: Straight | Centroids
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    if how.codec == "kmeans":
        rng = np.random.default_rng(work.seed) if options.control == "random" else None
        hook = Centroids(weights, work.masks, how.settings["levels"], rng)
    else:
        hook = Straight(weights, work.masks, how)
    if options.steps:
        work.train(options.steps, lr=options.lr, hooks=[hook])
    rows: dict[str, Any] = {}
    for name, weight in weights.items():
        hook.settle(name)
        old, new = before[name].numpy(), weight.detach().numpy()
        packed = codecs.encode(new, stored_as(how, name in work.masks))
        rows[name.removesuffix(".weight")] = {
            "bytes": packed.nbytes,
            "of": 4 * new.size,
            "changed": round(codecs.error(old, new), 4),
        }
    work.facts[work.stage] = {
        "codec": options.codec, "control": options.control, "bytes": sum(r["bytes"] for r in rows.values()),
        "of": sum(r["of"] for r in rows.values()), "layers": rows, "skipped": skipped, "folded": folded,
    }  # fmt: skip


def stored_as(how: Scheme, masked: bool) -> Scheme:
    """The scheme that stores a layer's weights."""
    return Scheme("sparse", {"rows": 1, "columns": 1}, how) if masked else how


def fold(model: nn.Module) -> list[str]:
    """Fold batch norms of an nn.Sequential that stand right behind a convolution. Returns: names of the convolutions."""
    found = []
    for prefix, parent in model.named_modules():
        if not isinstance(parent, nn.Sequential):
            continue
        names = list(parent._modules)
        for one, two in itertools.pairwise(names):
            conv, norm = parent._modules[one], parent._modules[two]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(conv.eval(), norm.eval())
                conv.weight, conv.bias = fused.weight, fused.bias  # the module stays: others may watch it
                parent._modules[two] = nn.Identity()
                found.append(f"{prefix}.{one}".lstrip("."))
    return found


def project(weight: Tensor, how: Scheme, mask: Tensor | None = None) -> Tensor:
    """The nearest weights of the codec's set as `codecs.quantized` finds them (to rounding), where `mask` is not 0."""
    if mask is None:
        rows = weight.reshape(len(weight), -1)
        return _ROWS[how.codec](rows, how.settings).reshape(weight.shape)
    found = torch.zeros_like(weight)
    kept = weight[mask != 0]
    if kept.numel():
        found[mask != 0] = _ROWS[how.codec](kept[None], how.settings)[0]
    return found


def _binary(rows: Tensor, settings: Mapping[str, int]) -> Tensor:
    scale = rows.abs().mean(1, keepdim=True)
    return torch.where(rows < 0, -scale, scale)


def _ternary(rows: Tensor, settings: Mapping[str, int]) -> Tensor:
    size = rows.abs()
    if settings["signs"] == 1:
        kept = size > codecs.TWN_THRESHOLD * size.mean(1, keepdim=True)
        found: Tensor = rows.sign() * kept * _mean(size, kept)
        return found
    kept = size > codecs.TTQ_THRESHOLD * size.amax(1, keepdim=True)
    above, below = kept & (rows > 0), kept & (rows < 0)
    return above * _mean(size, above) - below * _mean(size, below)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)


def _pow2(rows: Tensor, settings: Mapping[str, int]) -> Tensor:
    scale = _positive(rows.abs().amax(1, keepdim=True))
    shift = (rows.abs() / scale).log2().round().clamp(min=1 - 2 ** (settings["bits"] - 1), max=0)
    found: Tensor = rows.sign() * scale * shift.exp2()
    return found


def _int(rows: Tensor, settings: Mapping[str, int]) -> Tensor:
    scale = _positive(rows.abs().amax(1, keepdim=True)) / (2 ** (settings["bits"] - 1) - 1)
    found: Tensor = (rows / scale).round() * scale
    return found


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


_ROWS = {"binary": _binary, "ternary": _ternary, "pow2": _pow2, "int": _int}


class Straight(Hook):
    """Forward and backward with weights of the set, steps of the optimizer on the float weights behind them."""

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], how: Scheme) -> None:
        self.weights, self.masks, self.how = weights, masks, how
        self.behind: dict[str, Tensor] = {}

    @torch.no_grad()
    def before(self, model: nn.Module, step: int, steps: int) -> None:
        for name, weight in self.weights.items():
            self.behind[name] = weight.data
            weight.data = project(weight.data, self.how, self.masks.get(name))

    def gradients(self, model: nn.Module, step: int, steps: int) -> None:
        for name, weight in self.weights.items():
            weight.data = self.behind.pop(name)

    @torch.no_grad()
    def settle(self, name: str) -> None:
        """Leave the weight as the codec stores it, to the bit."""
        weight = self.weights[name]
        found = codecs.quantized(weight.detach().numpy(), stored_as(self.how, name in self.masks))
        weight.copy_(torch.from_numpy(found))


class Centroids(Hook):
    """Weights that share few values, which train."""

    def __init__(
        self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], levels: int, rng: np.random.Generator | None
    ) -> None:  # fmt: skip
        self.weights = weights
        self.books: dict[str, nn.Parameter] = {}
        self.members: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor | None] = {}
        for name, weight in weights.items():
            mask = masks.get(name)
            self.kept[name] = None if mask is None else mask != 0
            values = (weight.detach() if mask is None else weight.detach()[mask != 0]).numpy().reshape(-1)
            if rng is None:
                book = codecs.codebook(values, levels)
            else:
                book = np.sort(rng.normal(values.mean(), values.std(), levels)).astype(np.float32)
            self.books[name] = nn.Parameter(torch.from_numpy(book))
            self.members[name] = torch.from_numpy(codecs.nearest(values, book))
            self.settle(name)

    def parameters(self) -> Sequence[nn.Parameter]:
        return list(self.books.values())

    def gradients(self, model: nn.Module, step: int, steps: int) -> None:
        for name, weight in self.weights.items():
            assert weight.grad is not None
            kept = self.kept[name]
            grad = (weight.grad if kept is None else weight.grad[kept]).reshape(-1)
            book = self.books[name]
            book.grad = torch.zeros_like(book).index_add_(0, self.members[name], grad)
            weight.grad = None

    def after(self, model: nn.Module, step: int, steps: int) -> None:
        for name in self.weights:
            self.settle(name)

    @torch.no_grad()
    def settle(self, name: str) -> None:
        weight, kept = self.weights[name], self.kept[name]
        found = self.books[name][self.members[name]]
        if kept is None:
            weight.copy_(found.reshape(weight.shape))
        else:
            weight.zero_()
            weight[kept] = found

    def state_dict(self) -> dict[str, Any]:
        return {name: book.detach().clone() for name, book in self.books.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, book in state.items():
            self.books[name].copy_(book)
