"""Classes and their scores on a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekit.optional import load_cv2

if TYPE_CHECKING:
    from edgekit.tasks.classify.classification import Classification

MIN_WIDTH = 240
"""Smaller pictures (CIFAR's are 32 pixels wide) are enlarged by a whole factor: letters need room."""
LINE, LETTERS = 20, 0.45
MAX_LINES = 5


def draw(image: np.ndarray, result: Classification) -> np.ndarray:
    """A copy with a line per class in the top left corner: score bar, label and score.

    image: uint8 BGR [height, width, 3]; one narrower than 240 pixels comes back enlarged, so that
    the text can be read. Raises: MissingExtraError without OpenCV; ValueError for another array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected a uint8 picture [height, width, 3], got {image.dtype} {image.shape}")
    factor = -(-MIN_WIDTH // image.shape[1])
    canvas = np.ascontiguousarray(image.repeat(factor, 0).repeat(factor, 1))
    if len(result) == 0:
        return canvas
    cv2 = load_cv2("draw classes")
    height, width = canvas.shape[:2]
    lines = list(result)[: max(1, min(MAX_LINES, height // LINE))]
    ground = canvas[: min(height, LINE * len(lines) + 4)]
    ground[...] = ground // 3  # dark enough for white letters on any picture
    for i, (_, score, label) in enumerate(lines):
        bottom = LINE * (i + 1)
        share = min(max(score, 0.0), 1.0) if np.isfinite(score) else 0.0
        cv2.rectangle(canvas, (0, bottom - 1), (round(share * (width - 1)), bottom + 1), (243, 150, 33), -1)
        text = "".join(c if c.isascii() and c.isprintable() else "?" for c in label)[:40]
        shown = f"{text} {score:.1%}" if np.isfinite(score) else text
        cv2.putText(
            canvas, shown, (4, bottom - 6), cv2.FONT_HERSHEY_SIMPLEX, LETTERS, (255, 255, 255), 1, cv2.LINE_AA
        )
    return canvas
