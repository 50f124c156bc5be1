"""The answer on a frame: labels with score bars above, below a strip of the last seconds with its events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.optional import load_cv2
from edgekit.tasks.detect.draw import class_color, ink_color

if TYPE_CHECKING:
    from edgekit.tasks.video.result import VideoResult

MIN_WIDTH = 320
"""Smaller pictures are enlarged by a whole factor: letters need room."""
LINE, LETTERS = 20, 0.45
MAX_LINES = 3
STRIP, EVENTS, GAP = 10, 18, 2
"""Pixels: height of the strip of answers, of the row of events above it, and around both."""
_SHADE, _NOTHING, _WHITE, _TICK = (48, 48, 48), (155, 148, 141), (255, 255, 255), (40, 40, 40)


def draw(image: np.ndarray, result: VideoResult) -> np.ndarray:
    """A copy with the best classes in the top left corner, and the history along the lower edge.

    The strip's right end is this frame, its left `history.seconds` before, with a tick every second: each answer in its
    class's colour, dark where there was none. Above it events from start to end, labelled; one that goes
    on reaches the right end. The answer that holds is marked by '>' where it is listed.

    image: uint8 BGR [height, width, 3]; one narrower than 320 pixels comes back enlarged. Raises:
    MissingExtraError without OpenCV; ValueError for another array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected a uint8 picture [height, width, 3], got {image.dtype} {image.shape}")
    factor = -(-MIN_WIDTH // image.shape[1])
    canvas = np.ascontiguousarray(image.repeat(factor, 0).repeat(factor, 1))
    cv2 = load_cv2("draw answers")
    _lines(cv2, canvas, result)
    if canvas.shape[0] >= 4 * (STRIP + EVENTS):
        _history(cv2, canvas, result)
    return canvas


def _lines(cv2: Any, canvas: np.ndarray, result: VideoResult) -> None:
    height, width = canvas.shape[:2]
    lines = result.best()[: max(1, min(MAX_LINES, height // (3 * LINE)))]
    if result.answer not in [cls for cls, _, _ in lines]:  # smoothing may hold one that scores low
        lines = [
            (result.answer, float(result.all_scores[result.answer]), result.label(result.answer)),
            *lines,
        ]
        lines = lines[: max(1, len(lines) - 1)] if len(lines) > MAX_LINES else lines
    ground = canvas[: min(height, LINE * len(lines) + 4)]
    ground[...] = ground // 3  # dark enough for white letters on any picture
    for i, (cls, score, label) in enumerate(lines):
        bottom = LINE * (i + 1)
        share = min(max(score, 0.0), 1.0) if np.isfinite(score) else 0.0
        end = (round(share * (width - 1)), bottom + 1)
        color = _NOTHING if cls == result.background else class_color(cls)
        cv2.rectangle(canvas, (0, bottom - 1), end, color, -1)
        shown = f"{_printable(label)} {score:.0%}" if np.isfinite(score) else _printable(label)
        _write(cv2, canvas, f"> {shown}" if cls == result.answer else f"  {shown}", (4, bottom - 6), _WHITE)


def _history(cv2: Any, canvas: np.ndarray, result: VideoResult) -> None:
    height, width = canvas.shape[:2]
    history = result.history
    span = max(1, round(history.seconds * 1e9))
    begin = history.until_ns - span

    def x(ns: int) -> int:
        return int(np.clip((ns - begin) * width // span, 0, width))

    top = height - STRIP - EVENTS - 2 * GAP
    ground = canvas[top:]
    ground[...] = ground // 4
    upper, lower = top + EVENTS + GAP, height - GAP
    ends = [ns for ns, _ in history.answers[1:]] + [history.until_ns]
    for (ns, cls), until in zip(history.answers, ends, strict=True):
        color = _SHADE if cls < 0 else _NOTHING if cls == result.background else class_color(cls)
        canvas[upper:lower, x(ns) : max(x(until), x(ns) + 1)] = color
    for second in range(1, int(history.seconds) + 1):
        at = x(history.until_ns - second * 1_000_000_000)
        canvas[lower - 3 : lower, at : at + 1] = _TICK
    events = result.events()
    for i, (cls, label, start, end) in enumerate(events):
        left, right = x(start), width if end is None else max(x(end), x(start) + 2)
        color = class_color(cls)
        canvas[top + GAP : top + EVENTS, left:right] = color
        canvas[top + GAP : lower, left : left + 2] = _WHITE  # its edges, through both rows
        if end is not None:
            canvas[top + GAP : lower, right - 1 : right] = _WHITE
        after = x(events[i + 1][2]) if i + 1 < len(events) else width
        inside, beside = right - left - 8, after - right - 6
        text = _printable(label)
        if _width(cv2, text) <= inside or inside >= beside:
            _write(cv2, canvas, _fit(cv2, text, inside), (left + 5, top + EVENTS - 5), ink_color(color))
        else:
            _write(cv2, canvas, _fit(cv2, text, beside), (right + 3, top + EVENTS - 5), _WHITE)


def _write(cv2: Any, canvas: np.ndarray, text: str, at: tuple[int, int], ink: tuple[int, int, int]) -> None:
    cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, LETTERS, ink, 1, cv2.LINE_AA)


def _width(cv2: Any, text: str) -> int:
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, LETTERS, 1)
    return int(width)


def _fit(cv2: Any, text: str, room: int) -> str:
    """As much of the text as there is room for; nothing where that says nothing."""
    if _width(cv2, text) <= room:
        return text
    while text and _width(cv2, f"{text}..") > room:
        text = text[:-1]
    return f"{text}.." if len(text) > 1 else ""


def _printable(label: str) -> str:
    """The font of older OpenCV has ASCII only."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in label)[:40]
