"""N:M sparsity: at most N of each M consecutive input channels are not zero.

2:4 is what the tensor cores of Orin and later skip (TensorRT's sparse kernels, docs/tensorrt.md); other ratios save bytes, or
time where a kernel of ours runs. Schemes: `one-shot`: the largest of each group, then recovery; `sr-ste`: dense weights train
behind masks made anew each step, those masked away decay (Zhou et al.: Learning N:M Fine-grained Structured Sparse Neural
Networks From Scratch, ICLR 2021); `maxq`: the same, with kept weights counting more where they are large along other axes, and
blocks that become sparse one after the other (Xiang et al.: MaxQ, CVPR 2024). MaxQ was made for long trainings from scratch: its
soft masks change what a trained network computes, and some hundred batches do not always mend that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgekit.compression import patterns, sparse
from edgekit.compression.patterns import Ratio
from edgekit.compression.work import Hook, Work


@dataclass(frozen=True)
class Options(sparse.Where):
    """pattern: "N:M". schedule: of the share of blocks that hold it (`maxq`), done within the share `rise` of `steps`; `none`:
    from the start. soft: MaxQ's soft masks. decay: lambda of what is masked away; tau: softness in units of the weights.
    lr: peak, half of the problem's where not said. control: see sparse.Control; one-shot, whatever the scheme.
    """

    pattern: str = "2:4"
    scheme: Literal["one-shot", "sr-ste", "maxq"] = "sr-ste"
    control: sparse.Control = "none"
    steps: int = 400
    lr: float | None = None
    schedule: Literal["cubic", "linear", "none"] = "cubic"
    rise: float = 0.25
    soft: bool = True
    decay: float = 2e-4
    tau: float = patterns.TAU

    def __post_init__(self) -> None:
        Ratio.parse(self.pattern)
        if self.scheme not in ("one-shot", "sr-ste", "maxq"):
            raise ValueError(f"scheme must be one-shot, sr-ste or maxq, got {self.scheme!r}")
        if self.control not in ("none", "random"):
            raise ValueError(f"control must be none or random, got {self.control!r}")
        if self.schedule not in ("cubic", "linear", "none"):
            raise ValueError(f"schedule must be cubic, linear or none, got {self.schedule!r}")
        if self.steps < (0 if self.scheme == "one-shot" else 1):
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.rise <= 1:
            raise ValueError(f"rise must be above 0 and at most 1, got {self.rise}")
        if self.decay < 0 or self.tau <= 0 or (self.lr is not None and self.lr <= 0):
            raise ValueError(f"decay, tau, lr must be positive, got {self.decay}, {self.tau}, {self.lr}")


def refused(weight: Tensor, ratio: Ratio) -> str:
    """Why N:M does not fit the weight, "" if it does."""
    inputs = weight.shape[1]
    return f"{inputs} input channels do not divide by {ratio.m}" if inputs % ratio.m else ""


class StraightThrough(Hook):
    """The forward pass sees weights times masks, the backward pass lets the gradient through to the dense weights, and
    those masked away decay: g += decay * (1 - clip(mask, 0, 1)) * W."""

    def __init__(self, weights: Mapping[str, nn.Parameter], options: Options, ratio: Ratio) -> None:
        self.weights, self.options, self.ratio = weights, options, ratio
        self._dense: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}

    def mask(self, weight: Tensor, done: float) -> Tensor:
        """Of one layer when the share `done` of the training is over."""
        o = self.options
        if o.scheme == "sr-ste":
            return patterns.maxq(weight, self.ratio, soft=False)
        share = 1.0 if o.schedule == "none" else patterns.risen(o.schedule, done / o.rise)
        return patterns.maxq(weight, self.ratio, share, soft=o.soft, tau=o.tau)

    def before(self, model: nn.Module, step: int, steps: int) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                self._masks[name] = self.mask(weight, step / steps)
                self._dense[name] = weight.data
                weight.data = weight.data * self._masks[name]

    def gradients(self, model: nn.Module, step: int, steps: int) -> None:
        for name, weight in self.weights.items():
            weight.data = self._dense[name]
            assert weight.grad is not None
            weight.grad += self.options.decay * (1 - self._masks[name].clamp(0, 1)) * weight.data

    def fold(self) -> dict[str, Tensor]:
        """Store the weights times their masks; returns where they are kept."""
        found = {}
        for name, weight in self.weights.items():
            mask = self.mask(weight, 1.0)
            weight.data = weight.data * mask
            found[name] = mask != 0
        return found


def run(work: Work, options: Options) -> None:
    """Every layer that the ratio fits holds it, in the weights themselves."""
    ratio = Ratio.parse(options.pattern)
    weights, skipped = sparse.layers(work, options, lambda w: refused(w, ratio))
    at_once = options.scheme == "one-shot" or options.control == "random"
    scheme = "one-shot" if at_once else options.scheme
    facts = {"pattern": str(ratio), "scheme": scheme, "control": options.control}

    def masks(weights: sparse.Weights, sparsity: float) -> dict[str, Tensor]:
        return {name: patterns.n_of_m(w, ratio) for name, w in weights.items()}

    if at_once:
        made = sparse.controlled(masks, weights, options.control, work.seed)(weights, 0.0)
        sparse.hold(work, made, skipped, **facts)
        if options.steps:
            work.train(options.steps, lr=sparse.peak(work, options.lr))
    else:
        hook = StraightThrough(weights, options, ratio)
        work.train(options.steps, lr=sparse.peak(work, options.lr), hooks=[hook])
        sparse.hold(work, hook.fold(), skipped, **facts)
    named = dict(work.model.named_parameters())
    assert all(patterns.keeps(named[name], ratio) for name in weights)
