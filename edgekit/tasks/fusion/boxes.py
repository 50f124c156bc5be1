"""Boxes in space: what one moment of a rig gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

FIELDS = ("x", "y", "z", "l", "w", "h", "yaw", "vx", "vy")
"""Columns of boxes: metres, radians, metres per second; NaN where a velocity is unknown."""


@dataclass(frozen=True)
class Boxes3D:
    """n boxes, best score first, in the LiDAR's frame at `taken_ns`.

    boxes: [n, 9] float32, `FIELDS`: the centre, full sizes, yaw counter-clockwise seen from above, from +x to the
    direction of the length (where the object is heading), and velocity over ground.
    scores: [n] float32 in 0..1.  classes: [n] int32.  labels: name of every class.
    missing: sensors of the rig that this result was made without.
    """

    task: ClassVar[str] = "fusion"

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    labels: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    taken_ns: int = 0

    def __post_init__(self) -> None:
        n = len(self.boxes)
        if self.boxes.shape != (n, len(FIELDS)) or self.scores.shape != (n,) or self.classes.shape != (n,):
            raise ValueError(
                f"expected boxes [n, {len(FIELDS)}], scores [n], classes [n], got {self.boxes.shape}, "
                f"{self.scores.shape}, {self.classes.shape}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[tuple[np.ndarray, float, int, str]]:
        """(box, score, class, label) per box."""
        for box, score, cls in zip(self.boxes, self.scores, self.classes, strict=True):
            yield box, float(score), int(cls), self.label(int(cls))

    def label(self, cls: int) -> str:
        return self.labels[cls] if 0 <= cls < len(self.labels) else str(cls)

    def above(self, score: float) -> Boxes3D:
        """Those with at least this score."""
        keep = self.scores >= score
        return Boxes3D(
            self.boxes[keep], self.scores[keep], self.classes[keep], self.labels, self.missing, self.taken_ns
        )

    def to_json(self) -> dict[str, Any]:
        """Lists of plain numbers: boxes (columns as `FIELDS`, null where unknown), scores, classes, labels (one name
        per box), missing, taken_ns."""
        return {
            "boxes": [
                [round(v, 4) if math.isfinite(v) else None for v in box] for box in self.boxes.tolist()
            ],
            "scores": [round(float(s), 6) for s in self.scores],
            "classes": [int(c) for c in self.classes],
            "labels": [self.label(int(c)) for c in self.classes],
            "missing": list(self.missing),
            "taken_ns": self.taken_ns,
        }

    def caption(self) -> str:
        """A few words for below a picture; sensors that are missing are named."""
        text = f"{len(self)} boxes"
        return f"{text}, without {', '.join(self.missing)}" if self.missing else text


def no_boxes(labels: tuple[str, ...] = (), missing: tuple[str, ...] = (), taken_ns: int = 0) -> Boxes3D:
    """A result with nothing in it."""
    return Boxes3D(
        np.zeros((0, len(FIELDS)), np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.int32),
        labels,
        missing,
        taken_ns,
    )
