"""Accuracy against cost over the steps of a recipe, as a PNG file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.archive import write_atomic
from edgekit.optional import load_cv2

if TYPE_CHECKING:
    from edgekit.compression.run import Point

WIDTH, HEIGHT = 620, 460
"""Of one panel, pixels."""
LEFT, RIGHT, TOP, BOTTOM = 84, 30, 64, 66
SPAN = 0.02
"""Of a metric, at least: what is less apart looks level."""
INK, FAINT, GRID, LINE, END = (40, 40, 40), (110, 110, 110), (230, 230, 230), (180, 120, 40), (50, 90, 200)
"""Colours, BGR."""


@dataclass(frozen=True)
class Axis:
    """Round numbers from `low` to `high`, `step` apart."""

    low: float
    high: float
    step: float

    @property
    def ticks(self) -> list[float]:
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def label(self, value: float) -> str:
        return f"{value:.{max(0, -math.floor(math.log10(self.step) + 1e-9))}f}"


def axis(low: float, high: float, wanted: int = 5) -> Axis:
    """About `wanted` round steps that cover both numbers."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = power * next(f for f in (1, 2, 5, 10) if span / wanted <= f * power * (1 + 1e-9))
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step)


def write_plot(path: Path, title: str, metric: str, points: Sequence[Point], target: str | None) -> None:
    """Panels of `metric` over MACs, over weights that are not zero, and over the estimated time where there is one.

    Raises: MissingExtraError without OpenCV, OutputError.
    """
    cv2 = load_cv2("draw accuracy against cost")
    values = [p.metric for p in points]
    names = [p.stage for p in points]
    panels = [
        ("million multiply-accumulates", [p.macs / 1e6 for p in points]),
        ("thousand weights that are not zero", [p.parameters * (1 - p.zeros) / 1e3 for p in points]),
    ]
    times = [p.latency_s for p in points if p.latency_s is not None]
    if len(times) == len(points):
        panels.append((f"estimated ms on {target}", [1e3 * t for t in times]))
    picture = np.full((HEIGHT, WIDTH * len(panels), 3), 255, np.uint8)
    for i, (across, costs) in enumerate(panels):
        view = picture[:, i * WIDTH : (i + 1) * WIDTH]
        panel = np.ascontiguousarray(view)
        _panel(cv2, panel, across, metric, costs, values, names)
        view[:] = panel
    _text(cv2, picture, title, (LEFT, 28), 0.62, INK)
    ok, data = cv2.imencode(".png", picture)
    assert ok, "a valid picture encodes"
    write_atomic(path, [data.tobytes()], "plot")


def _panel(
    cv2: Any, picture: np.ndarray, across: str, metric: str, costs: Sequence[float], values: Sequence[float],
    names: Sequence[str],
) -> None:  # fmt: skip
    middle, half = (min(values) + max(values)) / 2, max(SPAN, max(values) - min(values)) / 2
    x_axis, y_axis = axis(0.0, max(costs)), axis(middle - half, middle + half)

    def x(value: float) -> int:
        return round(LEFT + x_axis.share(value) * (WIDTH - LEFT - RIGHT))

    def y(value: float) -> int:
        return round(HEIGHT - BOTTOM - y_axis.share(value) * (HEIGHT - TOP - BOTTOM))

    for tick in x_axis.ticks:
        cv2.line(picture, (x(tick), TOP), (x(tick), HEIGHT - BOTTOM), GRID, 1)
        _text(cv2, picture, x_axis.label(tick), (x(tick), HEIGHT - BOTTOM + 20), 0.45, FAINT, 0.5)
    for tick in y_axis.ticks:
        cv2.line(picture, (LEFT, y(tick)), (WIDTH - RIGHT, y(tick)), GRID, 1)
        _text(cv2, picture, y_axis.label(tick), (LEFT - 10, y(tick) + 5), 0.45, FAINT, 1.0)
    _text(cv2, picture, across, ((LEFT + WIDTH - RIGHT) // 2, HEIGHT - 18), 0.5, INK, 0.5)
    _text(cv2, picture, metric, (LEFT, TOP - 12), 0.5, INK)
    places = [(x(cost), y(value)) for cost, value in zip(costs, values, strict=True)]
    for a, b in itertools.pairwise(places):
        cv2.line(picture, a, b, LINE, 2, cv2.LINE_AA)
    taken: list[tuple[int, int]] = []
    for i, (place, name) in enumerate(zip(places, names, strict=True)):
        last = i == len(places) - 1
        cv2.circle(picture, place, 7 if last else 5, END if last else LINE, -1, cv2.LINE_AA)
        left = place[0] > (LEFT + WIDTH) / 2  # the label lies towards the middle, free of those before it
        at = (place[0] + (-12 if left else 12), place[1] + 5)
        while any(abs(at[0] - a) < 130 and abs(at[1] - b) < 17 for a, b in taken):
            at = (at[0], at[1] + 17)
        taken.append(at)
        _text(cv2, picture, name, at, 0.45, END if last else INK, 1.0 if left else 0.0)


def _text(
    cv2: Any, picture: np.ndarray, text: str, at: tuple[int, int], size: float, color: tuple[int, int, int],
    anchor: float = 0.0,
) -> None:  # fmt: skip
    """anchor: which share of the text lies left of `at`. OpenCV draws ASCII only."""
    plain = text.encode("ascii", "replace").decode()
    (width, _), _ = cv2.getTextSize(plain, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
    place = (round(at[0] - anchor * width), at[1])
    cv2.putText(picture, plain, place, cv2.FONT_HERSHEY_SIMPLEX, size, color, 1, cv2.LINE_AA)
