"""What a classifier's raw output means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgekit.tasks.preprocess import ImagePreprocess

Activation = Literal["none", "softmax"]


@dataclass(frozen=True)
class ClassifySpec:
    """The `pipeline` of a classifier bundle: picture -> input, raw output -> scores of the classes.

    output: the engine's output, one value per class in any shape. activation: what turns it into
    scores 0..1: `softmax` (the network was cut before its own, or ends in logits) or `none` (they
    are scores already). The `top_k` best classes with score >= `score_threshold` are reported.
    """

    task: ClassVar[str] = "classify"

    preprocess: ImagePreprocess
    output: str
    labels: tuple[str, ...]
    activation: Activation = "softmax"
    top_k: int = 5
    score_threshold: float = 0.0

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("a classifier needs at least one label")
        if not 1 <= self.top_k <= 1000:
            raise ValueError(f"top_k must be between 1 and 1000, got {self.top_k}")
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold must be between 0 and 1, got {self.score_threshold}")
