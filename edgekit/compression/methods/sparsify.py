"""Unstructured sparsity: the smallest weights become zero, wherever they stand.

The most accurate way to a given number of zeros and the least useful one: dense libraries compute as long as before. It pays
where bytes count (bundle codecs store zeros in a bit) or where a sparse kernel runs. Magnitude: Han et al., NIPS 2015; the
gradual schedule: Zhu & Gupta 2017; LAMP: Lee et al., ICLR 2021; ADMM: Zhang et al., ECCV 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from edgekit.compression import patterns, sparse
from edgekit.compression.work import Work


@dataclass(frozen=True)
class Options(sparse.Training):
    """scope: every layer by itself (`layer`), one cut through all magnitudes (`global`), or through their LAMP scores."""

    scope: Literal["layer", "global", "lamp"] = "lamp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in ("layer", "global", "lamp"):
            raise ValueError(f"scope must be layer, global or lamp, got {self.scope!r}")


def run(work: Work, options: Options) -> None:
    """`options.sparsity` of the weights of all layers that take part become zero."""
    weights, skipped = sparse.layers(work, options, lambda _: "")

    def masks(weights: sparse.Weights, sparsity: float) -> dict[str, Tensor]:
        if options.scope == "layer":
            return {name: patterns.magnitude(w, sparsity) for name, w in weights.items()}
        score = patterns.lamp if options.scope == "lamp" else lambda w: w.detach().abs()
        return patterns.cut({name: score(w) for name, w in weights.items()}, sparsity)

    sparse.train_sparse(work, options, masks, weights, skipped, scope=options.scope)
