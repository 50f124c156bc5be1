"""Boxes and labels on a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.optional import load_cv2

if TYPE_CHECKING:
    from edgekit.tasks.detect.detections import Detections

Color = tuple[int, int, int]
Rect = tuple[int, int, int, int]

# BGR, bright enough to stand out on asphalt, sky and foliage; neighbours differ strongly in hue
_PALETTE: tuple[Color, ...] = (
    (80, 175, 76),
    (54, 67, 244),
    (243, 150, 33),
    (7, 193, 255),
    (176, 39, 156),
    (212, 188, 0),
    (34, 87, 255),
    (99, 30, 233),
    (57, 220, 205),
    (183, 58, 103),
    (136, 150, 0),
    (181, 81, 63),
    (74, 195, 139),
    (140, 180, 255),
    (200, 130, 255),
    (255, 200, 130),
)


def class_color(cls: int) -> Color:
    """BGR colour of a class: always the same, different for classes that are near in number."""
    base = _PALETTE[cls % len(_PALETTE)]
    shade = (1.0, 0.8, 1.15, 0.65)[cls // len(_PALETTE) % 4]  # 64 colours before one comes again
    return (_level(base[0] * shade), _level(base[1] * shade), _level(base[2] * shade))


def _level(value: float) -> int:
    return min(255, max(0, round(value)))


def draw(image: np.ndarray, detections: Detections, *, copy: bool = True) -> np.ndarray:
    """Draw every box with its label and score.

    image: uint8 BGR [height, width, 3]; with `copy=False` it is drawn on itself (it must be
    writable and C-contiguous). detections: boxes in its pixels; boxes outside the picture or
    with coordinates that are no finite numbers are left out. Returns the picture drawn on.

    Raises: MissingExtraError without OpenCV; ValueError for another dtype, shape or layout.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected a uint8 picture [height, width, 3], got {image.dtype} {image.shape}")
    if not copy and not (image.flags.c_contiguous and image.flags.writeable):
        raise ValueError("copy=False needs a writable, C-contiguous picture")
    canvas = np.array(image, order="C", copy=True) if copy else image
    if len(detections) == 0:
        return canvas
    cv2 = load_cv2("draw detections")
    height, width = canvas.shape[:2]
    thickness = max(1, round(min(width, height) / 240))
    shown = []
    # worst first, so that the best lies on top
    for box, score, cls, label in reversed(list(detections)):
        rect = _clip(box, width, height)
        if rect is None:
            continue
        shown.append((rect, score, cls, label))
        # a dark rim keeps the line visible on a ground of its own colour
        cv2.rectangle(canvas, rect[:2], rect[2:], (24, 24, 24), thickness + 2, cv2.LINE_AA)
        cv2.rectangle(canvas, rect[:2], rect[2:], class_color(cls), thickness, cv2.LINE_AA)
    taken: list[Rect] = []
    for rect, score, cls, label in reversed(shown):
        text = f"{_printable(label)} {score:.0%}" if np.isfinite(score) else _printable(label)
        _tag(cv2, canvas, rect, text, class_color(cls), thickness, taken)
    return canvas


def _clip(box: np.ndarray, width: int, height: int) -> Rect | None:
    """Corners inside the picture, or None when nothing of the box is."""
    if not np.isfinite(box).all():
        return None
    x1, y1, x2, y2 = (float(v) for v in box)
    if x2 < 0 or y2 < 0 or x1 > width or y1 > height or x2 < x1 or y2 < y1:
        return None
    left, right = (int(min(max(round(v), 0), width - 1)) for v in (x1, x2))
    top, bottom = (int(min(max(round(v), 0), height - 1)) for v in (y1, y2))
    return left, top, right, bottom


def _printable(label: str) -> str:
    """One short line; the font of older OpenCV has ASCII only."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in label)
    return text if len(text) <= 40 else text[:37] + "..."


def _tag(
    cv2: Any, canvas: np.ndarray, rect: Rect, text: str, color: Color, thickness: int, taken: list[Rect]
) -> None:
    """The label at the best free place: above the box, inside it, below it; always inside the picture."""
    height, width = canvas.shape[:2]
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, max(0.4, min(width, height) / 1000)
    weight = max(1, round(scale * 1.6))
    (text_w, text_h), below = cv2.getTextSize(text, font, scale, weight)
    pad = max(2, round(text_h * 0.35))
    tag_w, tag_h = text_w + 2 * pad, text_h + below // 2 + 2 * pad
    if tag_w > width or tag_h > height:
        return  # a picture too small for words: the box alone
    edge = thickness // 2 + 1
    left = min(max(rect[0] - edge, 0), width - tag_w)
    places = [(left, rect[1] - edge - tag_h + 1), (left, rect[1] - edge), (left, rect[3] + edge)]
    places = [(x, min(max(y, 0), height - tag_h)) for x, y in places]
    spots = [(x, y, x + tag_w, y + tag_h) for x, y in places]
    spot = next((s for s in spots if not any(_overlap(s, t) for t in taken)), spots[0])
    taken.append(spot)
    cv2.rectangle(canvas, spot[:2], (spot[2] - 1, spot[3] - 1), color, cv2.FILLED)
    # ITU-R BT.601 luma decides between dark and light letters
    luma = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2]
    ink = (20, 20, 20) if luma > 130 else (255, 255, 255)
    at = (spot[0] + pad, spot[1] + pad + text_h)
    cv2.putText(canvas, text, at, font, scale, ink, weight, cv2.LINE_AA)


def _overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
