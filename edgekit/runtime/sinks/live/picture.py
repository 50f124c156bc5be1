"""What a page shows of one result: its picture as a small JPEG, and the result in plain values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import StreamError
from edgekit.optional import load_cv2, quiet
from edgekit.runtime.frames import Frame
from edgekit.runtime.results import StreamResult
from edgekit.tasks.detect.draw import class_color

if TYPE_CHECKING:
    from edgekit.tasks.video.result import VideoResult

MAX_SIDE = 960
"""Pixels of the longer side, at most."""
QUALITY = 78
"""Of the JPEG, 0..100."""
NOTHING = "#8d949b"
"""Colour of the class that means that nothing happens."""
MAX_BOXES = 300
"""Best first; more than anybody can tell apart."""


def encode(frame: Frame) -> bytes:
    """The picture as JPEG, scaled down to `MAX_SIDE`. Raises: StreamError."""
    return encode_image(frame.image)


def encode_image(image: np.ndarray, most: int = MAX_SIDE) -> bytes:
    """A picture uint8 BGR as JPEG, scaled down to `most` pixels of its longer side. Raises: StreamError."""
    cv2 = load_cv2("show pictures on the live page")
    high, wide = image.shape[:2]
    scale = min(1.0, most / max(wide, high))
    size = (max(1, round(wide * scale)), max(1, round(high * scale)))
    with quiet(cv2):
        try:
            if scale != 1:
                image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            ok, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        except cv2.error:
            ok = False
    if not ok:
        raise StreamError(f"live page: {wide}x{high} pixels could not be encoded as JPEG")
    return bytes(data.tobytes())


def describe(item: StreamResult) -> dict[str, Any]:
    """JSON values: task, caption, and of each thing found its label, score, colour and perhaps box.

    Boxes are x1 y1 x2 y2 in pixels of the frame, `width` x `height`. What is not finite is left out. A result with a
    history has it as `history` (see `_history`).
    """
    found = item.result.to_json()
    boxes = found.get("boxes")
    if item.result.task == "fusion":  # boxes in space, of a moment that was not kept
        boxes = [None] * len(found["labels"])
    things = []
    for i, (label, score, cls) in enumerate(
        zip(found.get("labels", ()), found.get("scores", ()), found.get("classes", ()), strict=True)
    ):
        box = boxes[i] if boxes is not None else None
        if not math.isfinite(score) or (box is not None and not all(map(math.isfinite, box))):
            continue
        color = NOTHING if cls == getattr(item.result, "background", None) else color_of(cls)
        things.append({"label": str(label)[:60], "score": score, "color": color, "box": box})
        if len(things) == MAX_BOXES:
            break
    history = {"history": _history(item.result)} if hasattr(item.result, "history") else {}
    return {
        **history,
        "camera": item.camera,
        "engine": item.engine,
        "seq": item.frame.seq,
        "width": item.frame.width,
        "height": item.frame.height,
        "age_ms": round(item.age_ms, 2),
        "task": item.result.task,
        "caption": item.result.caption(),
        "found": things,
    }


def _history(result: VideoResult) -> dict[str, Any]:
    """seconds: how far it goes back; answer: the label that holds; answers: [seconds ago, label, colour or "" where
    nothing was seen], oldest first, each until the next; events: [seconds ago, seconds ago of the end or null where
    it goes on, label, colour]."""
    past = result.history

    def ago(ns: int) -> float:
        return round((past.until_ns - ns) / 1e9, 3)

    return {
        "seconds": past.seconds,
        "answer": result.label(result.answer)[:60],
        "answers": [
            [ago(ns), result.label(cls)[:60], NOTHING if cls == result.background else color_of(cls)]
            if cls >= 0
            else [ago(ns), "", ""]
            for ns, cls in past.answers
        ],
        "events": [
            [ago(start), None if end is None else ago(end), label[:60], color_of(cls)]
            for cls, label, start, end in result.events()
        ],
    }


def color_of(cls: int) -> str:
    b, g, r = class_color(cls)
    return f"#{r:02x}{g:02x}{b:02x}"
