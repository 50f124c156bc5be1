"""Boxes in space: what one moment of a rig gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekit.rig import RigFrame

FIELDS = ("x", "y", "z", "l", "w", "h", "yaw", "vx", "vy")
"""Columns of boxes: metres, radians, metres per second; NaN where a velocity is unknown."""


@dataclass(frozen=True)
class Boxes3D:
    """n boxes, best score first, in the LiDAR's frame at `taken_ns`.

    boxes: [n, 9] float32, `FIELDS`: the centre, full sizes, yaw counter-clockwise seen from above, from +x to the
    direction of the length (where the object is heading), and velocity over ground.
    scores: [n] float32 in 0..1.  classes: [n] int32.  labels: name of every class.
    missing: sensors of the rig that this result was made without: cameras in the network's order, `lidar` last.
    notes: what was done to hold a budget or a limit, in words (deadline.py).
    moment: what it was made from, for drawing; None where nobody kept it.
    """

    task: ClassVar[str] = "fusion"

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    labels: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    taken_ns: int = 0
    notes: tuple[str, ...] = ()
    moment: RigFrame | None = field(default=None, repr=False, compare=False)

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
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep], classes=self.classes[keep])

    def to_json(self) -> dict[str, Any]:
        """Lists of plain numbers: boxes (columns as `FIELDS`, null where unknown), scores, classes, labels (one name
        per box), missing, taken_ns, and notes where there are some."""
        found = {
            "boxes": [
                [round(v, 4) if math.isfinite(v) else None for v in box] for box in self.boxes.tolist()
            ],
            "scores": [round(float(s), 6) for s in self.scores],
            "classes": [int(c) for c in self.classes],
            "labels": [self.label(int(c)) for c in self.classes],
            "missing": list(self.missing),
            "taken_ns": self.taken_ns,
        }
        return found | {"notes": list(self.notes)} if self.notes else found

    def draw(self, image: np.ndarray) -> np.ndarray:
        """All cameras and the view from above with the boxes in them, uint8 BGR (draw.py), from the moment that the
        result was made from; without it a copy of the picture with the caption in it.

        Raises: MissingExtraError without OpenCV.
        """
        from edgekit.tasks.fusion import draw

        if self.moment is None:
            return draw.captioned(image, self.caption())
        cameras = self.moment.rig.cameras.values()
        width = min(480, max(256, *(camera.width for camera in cameras))) if cameras else 480
        return draw.draw(replace(self.moment, truth=None), self, width=width)

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
