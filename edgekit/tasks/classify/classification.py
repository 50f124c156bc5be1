"""Classes of one picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Classification:
    """The best k classes, best first; of equal scores the lower class number is first.

    classes: [k] int32. scores: [k] float32, 0..1. all_scores: [C] float32, of every class in the
    network's order. labels: name of every class.
    """

    task: ClassVar[str] = "classify"

    classes: np.ndarray
    scores: np.ndarray
    all_scores: np.ndarray
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.classes.ndim != 1 or self.classes.shape != self.scores.shape or self.all_scores.ndim != 1:
            raise ValueError(
                f"expected classes [k], scores [k], all_scores [C], got {self.classes.shape}, "
                f"{self.scores.shape}, {self.all_scores.shape}"
            )

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[tuple[int, float, str]]:
        """(class, score, label) of each, best first."""
        for cls, score in zip(self.classes, self.scores, strict=True):
            yield int(cls), float(score), self.label(int(cls))

    def label(self, cls: int) -> str:
        return self.labels[cls] if 0 <= cls < len(self.labels) else str(cls)

    def to_json(self) -> dict[str, Any]:
        """Lists of plain numbers: classes, scores, labels (one name per class listed)."""
        return {
            "classes": [int(c) for c in self.classes],
            "scores": [round(float(s), 6) for s in self.scores],
            "labels": [self.label(int(c)) for c in self.classes],
        }

    def draw(self, image: np.ndarray) -> np.ndarray:
        """A copy of `image`, uint8 BGR [H, W, 3], with the classes on it (see tasks.classify.draw)."""
        from edgekit.tasks.classify.draw import draw

        return draw(image, self)

    def caption(self) -> str:
        """The two best, for below a picture."""
        return ", ".join(f"{label} {score:.0%}" for _, score, label in list(self)[:2]) or "no class"
