"""Zeros in a pattern that a kernel can skip: punched blocks, or one of a few patterns in every 3x3 kernel.

`block`: within 8 filters and 4 input channels the same places of the kernel are zero, so a matrix product skips whole columns
for 8 rows at once (Cai et al.: YOLObile, AAAI 2021). `kernel`: each 3x3 kernel keeps 5 taps of one of 12 patterns and the
weakest kernels go altogether (Niu et al.: PatDNN, ASPLOS 2020). Both need a kernel of their own to be faster; they lose more
accuracy than zeros anywhere and less than whole filters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from edgekit.compression import patterns, sparse
from edgekit.compression.work import Work


@dataclass(frozen=True)
class Options(sparse.Training):
    """pattern: see above. patterns: that 3x3 kernels choose from. The `sparsity` of `kernel` is 4/9 at least."""

    pattern: Literal["block", "kernel"] = "block"
    patterns: int = patterns.LIBRARY

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in ("block", "kernel"):
            raise ValueError(f"pattern must be block or kernel, got {self.pattern!r}")
        if self.pattern == "kernel" and self.sparsity < 4 / 9:
            raise ValueError(f"sparsity of kernel patterns must be at least 4/9, got {self.sparsity}")
        if not 1 <= self.patterns <= 70:
            raise ValueError(f"patterns must be between 1 and 70, got {self.patterns}")


def refused(weight: Tensor, pattern: str) -> str:
    """Why this pattern does not fit the weight, "" if it does."""
    if pattern == "kernel":
        return "" if weight.shape[2:] == (3, 3) else "no 3x3 kernels"
    outputs, inputs = weight.shape[:2]
    filters, channels = patterns.BLOCK
    if outputs % filters or inputs % channels:
        return f"{outputs} filters of {inputs} input channels do not divide into {filters} x {channels}"
    return ""


def run(work: Work, options: Options) -> None:
    """`options.sparsity` of the weights of every layer that the pattern fits become zero."""
    weights, skipped = sparse.layers(work, options, lambda w: refused(w, options.pattern))
    known = patterns.library(weights, options.patterns) if options.pattern == "kernel" else None

    def masks(weights: sparse.Weights, sparsity: float) -> dict[str, Tensor]:
        if known is None:
            return {name: patterns.block_punched(w, sparsity) for name, w in weights.items()}
        return {name: patterns.kernel_patterns(w, known, sparsity) for name, w in weights.items()}

    sparse.train_sparse(work, options, masks, weights, skipped, pattern=options.pattern)
