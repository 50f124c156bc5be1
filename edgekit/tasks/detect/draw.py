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
    """BGR colour of a class: always the same, different for classes that are near in number."""
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
        cv2.rectangle(canvas, rect[:2], rect[2:], (24, 24, 24), thickness + 2)
        cv2.rectangle(canvas, rect[:2], rect[2:], class_color(cls), thickness)
    font = _Font(cv2, width, height)
    tags: list[Rect] = []
    texts = []
    # the best choose their place first ...
    for rect, score, cls, label in reversed(shown):
        text = f"{_printable(label)} {score:.0%}" if np.isfinite(score) else _printable(label)
        tag = font.place(rect, text, thickness, tags)
        if tag is not None:
            tags.append(tag)
            texts.append((tag, text, class_color(cls)))
    # ... and are drawn last, so that no label covers a better one
    for tag, text, color in reversed(texts):
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
        self.scale = max(0.4, min(width, height) / 1000)
        self.weight = max(1, round(self.scale * 1.6))
        (_, self.ascent), below = cv2.getTextSize("Ag", self.face, self.scale, self.weight)
        self.pad = max(2, round(self.ascent * 0.35))
        self.tag_height = self.ascent + below // 2 + 2 * self.pad

    def place(self, rect: Rect, text: str, thickness: int, tags: list[Rect]) -> Rect | None:
        """The first free place above, inside or below the box `rect`, always inside the picture.

        None when the picture is too small for words.
        """
        (text_width, _), _ = self.cv2.getTextSize(text, self.face, self.scale, self.weight)
        w, h = text_width + 2 * self.pad, self.tag_height
        if w > self.width or h > self.height:
            return None
        edge = thickness // 2 + 1
        lefts = (rect[0] - edge, rect[2] + edge - w)
        tops = (rect[1] - edge - h + 1, rect[1] - edge, rect[3] + edge, rect[3] + edge - h)
        corners = [
            (min(max(x, 0), self.width - w), min(max(y, 0), self.height - h)) for x in lefts for y in tops
        ]
        spots = [(x, y, x + w, y + h) for x, y in corners]
        return next((s for s in spots if not any(_overlap(s, t) for t in tags)), spots[0])

    def write(self, canvas: np.ndarray, tag: Rect, text: str, color: Color) -> None:
        """Fill the tag and write on it in dark or light letters, whichever reads better on `color`."""
        self.cv2.rectangle(canvas, tag[:2], (tag[2] - 1, tag[3] - 1), color, self.cv2.FILLED)
        ink = ink_color(color)
        at = (tag[0] + self.pad, tag[1] + self.pad + self.ascent)
        self.cv2.putText(canvas, text, at, self.face, self.scale, ink, self.weight, self.cv2.LINE_AA)


def _overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
