"""Boxes of one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgekit.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Detections:
    """n boxes, best score first.

    boxes: [n, 4] float32, x1 y1 x2 y2 in pixels of the original picture.
    scores: [n] float32 in 0..1.  classes: [n] int32.  labels: name of every class.
    ids: [n] int32, which object each is, the same in every frame (tasks.detect.tracking); -1 = none yet;
        None where nothing was tracked.
    """

    task: ClassVar[str] = "detect"

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    labels: tuple[str, ...] = ()
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.boxes)
        if self.boxes.shape != (n, 4) or self.scores.shape != (n,) or self.classes.shape != (n,):
            raise ValueError(
                f"expected boxes [n, 4], scores [n], classes [n], got {self.boxes.shape}, "
                f"{self.scores.shape}, {self.classes.shape}"
            )
        if self.ids is not None and self.ids.shape != (n,):
            raise ValueError(f"expected ids [{n}], got {self.ids.shape}")

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[tuple[np.ndarray, float, int, str]]:
        """(box, score, class, label) per detection."""
        for box, score, cls in zip(self.boxes, self.scores, self.classes, strict=True):
            yield box, float(score), int(cls), self.label(int(cls))

    def label(self, cls: int) -> str:
        return self.labels[cls] if 0 <= cls < len(self.labels) else str(cls)

    def above(self, score: float) -> Detections:
        """Those with at least this score."""
        keep = self.scores >= score
        ids = None if self.ids is None else self.ids[keep]
        return Detections(self.boxes[keep], self.scores[keep], self.classes[keep], self.labels, ids)

    def to_json(self) -> dict[str, Any]:
        """Lists of plain numbers: boxes, scores, classes, labels (one name per box), ids where there are some."""
        ids = {} if self.ids is None else {"ids": [int(i) for i in self.ids]}
        return {
            "boxes": [[round(float(v), 3) for v in box] for box in self.boxes],
            "scores": [round(float(s), 6) for s in self.scores],
            "classes": [int(c) for c in self.classes],
            "labels": [self.label(int(c)) for c in self.classes],
            **ids,
        }

    def draw(self, image: np.ndarray) -> np.ndarray:
        """A copy of `image`, uint8 BGR [H, W, 3], with every box, its label and score (see tasks.detect.draw)."""
        from edgekit.tasks.detect.draw import draw

        return draw(image, self)

    def caption(self) -> str:
        """A few words for below a picture."""
        return f"{len(self)} boxes"

    def to_supervision(self) -> Any:
        """As `supervision.Detections`. Raises: MissingExtraError without that package."""
        try:
            import supervision
        except ImportError:
            raise MissingExtraError("supervision", "supervision", "convert detections") from None
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.classes.astype(int),
            tracker_id=None if self.ids is None else self.ids.astype(int),
            data={"class_name": np.array([self.label(int(c)) for c in self.classes])},
        )

    @staticmethod
    def from_supervision(detections: Any, labels: tuple[str, ...] = ()) -> Detections:
        """From `supervision.Detections` (missing scores become 1, missing classes 0)."""
        n = len(detections.xyxy)
        scores = detections.confidence if detections.confidence is not None else np.ones(n)
        classes = detections.class_id if detections.class_id is not None else np.zeros(n)
        ids = detections.tracker_id
        return Detections(
            np.asarray(detections.xyxy, np.float32).reshape(n, 4),
            np.asarray(scores, np.float32),
            np.asarray(classes, np.int32),
            labels,
            None if ids is None else np.asarray(ids, np.int32),
        )
