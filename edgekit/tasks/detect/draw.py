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
    (200, 130, 255),
    (255, 200, 130),
    (140, 180, 255),
)


def class_color(cls: int) -> Color:
    """BGR colour of a class or of a tracked object: always the same, different for numbers that are near."""
    base = _PALETTE[cls % len(_PALETTE)]
    shade = (1.0, 0.8, 1.15, 0.65)[cls // len(_PALETTE) % 4]  # 64 colours before one comes again
    return (_level(base[0] * shade), _level(base[1] * shade), _level(base[2] * shade))


def ink_color(ground: Color) -> Color:
    """Dark or light letters, whichever contrast more with `ground` (WCAG 2.1 relative luminance)."""
    b, g, r = ((c / 255) ** 2.2 for c in ground)
    # equal contrast with black and white at luminance 0.18; letters this thin read a bit better in white
    return (20, 20, 20) if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.25 else (255, 255, 255)


def _level(value: float) -> int:
    return min(255, max(0, round(value)))


def draw(image: np.ndarray, detections: Detections, *, copy: bool = True) -> np.ndarray:
    """Draw every box with its label and score; tracked ones with their number, in a colour of their own.

    image: uint8 BGR [height, width, 3]; with `copy=False` it is drawn on itself (it must be
    writable and C-contiguous). detections: boxes in its pixels; boxes outside the picture or
    with coordinates that are no finite numbers are left out. Labels never cover each other: where
    there is no room for all, the best scored ones have theirs. Returns the picture drawn on.

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
    ids = [-1] * len(detections) if detections.ids is None else detections.ids.tolist()
    # worst first, so that the best lies on top
    for (box, score, cls, label), who in reversed(list(zip(detections, ids, strict=True))):
        rect = _clip(box, width, height)
        if rect is None:
            continue
        color = class_color(who if who >= 0 else cls)
        shown.append((rect, score, color, label if who < 0 else f"#{who} {label}"))
        # a dark rim keeps the line visible on a ground of its own colour
        cv2.rectangle(canvas, rect[:2], rect[2:], (24, 24, 24), thickness + 2)
        cv2.rectangle(canvas, rect[:2], rect[2:], color, thickness)
    font = _Font(cv2, width, height)
    boxes = np.array([rect for rect, *_ in shown], np.int64).reshape(-1, 4)
    tags = np.zeros((0, 4), np.int64)
    texts = []
    # the best choose their place first ...
    for rect, score, color, label in reversed(shown):
        text = f"{_printable(label)} {score:.0%}" if np.isfinite(score) else _printable(label)
        tag = font.place(rect, text, thickness, boxes, tags)
        if tag is not None:
            tags = np.append(tags, [tag], axis=0)
            texts.append((tag, text, color))
    # ... and all are drawn after the boxes, whose lines would cross them
    for tag, text, color in texts:
        font.write(canvas, tag, text, color)
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


class _Font:
    """Text sized for one picture."""

    def __init__(self, cv2: Any, width: int, height: int) -> None:
        self.cv2 = cv2
        self.width, self.height = width, height
        self.face = cv2.FONT_HERSHEY_SIMPLEX
        short = min(width, height)
        self.scale = max(0.4, short / 1200) if short >= 240 else 0.33
        self.weight = max(1, round(self.scale * 1.6))
        (_, self.ascent), below = cv2.getTextSize("Ag", self.face, self.scale, self.weight)
        self.pad = max(2, round(self.ascent * 0.35))
        self.tag_height = self.ascent + below // 2 + 2 * self.pad

    def place(
        self, rect: Rect, text: str, thickness: int, boxes: np.ndarray, tags: np.ndarray
    ) -> Rect | None:
        """Where the label of the box `rect` hides least: above, below, inside or beside it.

        boxes: [n, 4] all boxes.  tags: [m, 4] labels placed already, never overlapped.
        Always inside the picture; None when there is no room.
        """
        (text_width, _), _ = self.cv2.getTextSize(text, self.face, self.scale, self.weight)
        w, h = text_width + 2 * self.pad, self.tag_height
        if w > self.width or h > self.height:
            return None
        edge = thickness // 2 + 1
        left, top, right, bottom = rect[0] - edge, rect[1] - edge, rect[2] + edge, rect[3] + edge
        corners = np.array(
            [
                (left, top - h + 1),
                (right - w + 1, top - h + 1),
                (left, bottom),
                (right - w + 1, bottom),
                (left, top),
                (right, top),
                (left - w + 1, top),
            ]
        )
        corners = np.clip(corners, 0, (self.width - w, self.height - h))
        spots = np.hstack([corners, corners + np.array([w, h])])
        area = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1)
        # share of every box that a spot hides; the order above decides between much the same
        cost = (_overlap(spots, boxes) / area).sum(axis=1) + 0.05 * np.arange(len(spots))
        cost[_overlap(spots, tags).any(axis=1)] = np.inf
        best = int(cost.argmin())
        if not np.isfinite(cost[best]):
            return None
        x1, y1, x2, y2 = (int(v) for v in spots[best])
        return x1, y1, x2, y2

    def write(self, canvas: np.ndarray, tag: Rect, text: str, color: Color) -> None:
        """Fill the tag and write on it in dark or light letters, whichever reads better on `color`."""
        self.cv2.rectangle(canvas, tag[:2], (tag[2] - 1, tag[3] - 1), color, self.cv2.FILLED)
        ink = ink_color(color)
        at = (tag[0] + self.pad, tag[1] + self.pad + self.ascent)
        self.cv2.putText(canvas, text, at, self.face, self.scale, ink, self.weight, self.cv2.LINE_AA)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Common area of every pair of [n, 4] and [m, 4] rectangles: [n, m]."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    common: np.ndarray = np.prod(np.maximum(high - low, 0), axis=2)
    return common
