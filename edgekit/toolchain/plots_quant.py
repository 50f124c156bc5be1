"""Plots about a quantized network, as inline SVG: the path of the search, and the layers.

As in `plots`: widths in percent, so that text keeps its size on a phone, and the numbers stand in a table beside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.toolchain.page import Markup, el, plain

PATH_HEIGHT = 190.0
SQNR_HEIGHT, SHARE_HEIGHT = 130.0, 64.0
EXACT_DB = 100.0
"""What the record says of a layer without error."""


@dataclass(frozen=True)
class Step:
    """A point of the search: error of the outputs (> 0), and what became of it: kept, left or refused."""

    error: float
    fate: str
    title: str


@dataclass(frozen=True)
class Layer:
    """A weighted layer. sqnr in dB and share of the error 0..1, None where not known."""

    sqnr: float | None
    share: float | None
    integer: bool
    title: str


def search_path(steps: Sequence[Step]) -> Markup:
    """Error of each step, logarithmic, in the order tried; the line joins those that were kept."""
    errors = [step.error for step in steps]
    low, high = math.log10(min(errors)) - 0.08, math.log10(max(errors)) + 0.08

    def y(error: float) -> float:
        return 8 + PATH_HEIGHT * (high - math.log10(error)) / (high - low)

    def x(i: int) -> str:
        return f"{100 * (i + 0.5) / len(steps):.3f}%"

    shapes = []
    for tick in log_ticks(10**low, 10**high):
        shapes += [
            el("line", class_="grid", x1="0", x2="100%", y1=y(tick), y2=y(tick)),
            el("text", plain(tick), x=-8, y=y(tick) + 4, text_anchor="end"),
        ]
    last: int | None = None
    for i, step in enumerate(steps):
        if last is not None:
            kind = "path" if step.fate == "kept" else "path left"
            shapes.append(
                el("line", class_=kind, x1=x(last), x2=x(i), y1=y(steps[last].error), y2=y(step.error))
            )
        if step.fate == "kept":
            last = i
    for i, step in enumerate(steps):
        dot = el("circle", class_=f"step {step.fate}", cx=x(i), cy=y(step.error), r=5)
        shapes += [
            el("g", el("title", step.title), dot),
            el("text", str(i + 1), x=x(i), y=PATH_HEIGHT + 28, text_anchor="middle"),
        ]
    return _axes(PATH_HEIGHT + 34, "Error of the outputs at each step of the search", shapes)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high` for a logarithmic axis: 1, 2, 5 times powers of ten, at most seven."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 2, 5), (1,)):
        found = [d * 10.0**p for p in range(first, last + 1) for d in digits if low <= d * 10.0**p <= high]
        if len(found) <= 7:
            return found
    return found[:: -(-len(found) // 7)]


def layers(rows: Sequence[Layer]) -> Markup:
    """SQNR of each layer upwards, its share of the error downwards; float layers stand on a band."""
    known = [r.sqnr for r in rows if r.sqnr is not None and r.sqnr < EXACT_DB]
    top = 10 * max(1, math.ceil(max(known, default=40.0) / 10))
    most = max((r.share or 0.0 for r in rows), default=0.0)
    base, width = 8 + SQNR_HEIGHT, 100 / max(1, len(rows))
    shapes = []
    for db in range(0, top + 1, 10 if top <= 40 else 20):
        y = base - SQNR_HEIGHT * db / top
        shapes += [
            el("line", class_="grid", x1="0", x2="100%", y1=y, y2=y),
            el("text", f"{db} dB", x=-8, y=y + 4, text_anchor="end"),
        ]
    if most > 0:
        shapes.append(el("text", f"{100 * most:.2g} %", x=-8, y=base + SHARE_HEIGHT + 4, text_anchor="end"))
    for i, row in enumerate(rows):
        place = {"x": f"{i * width + width * 0.1:.3f}%", "width": f"{width * 0.8:.3f}%"}
        parts = [el("title", row.title)]
        if not row.integer:
            parts.append(
                el("rect", class_="band", x=f"{i * width:.3f}%", width=f"{width:.3f}%", y=8, height=SQNR_HEIGHT + SHARE_HEIGHT)
            )  # fmt: skip
        if row.sqnr is not None:
            tall = max(1.5, SQNR_HEIGHT * min(1.0, max(0.0, row.sqnr / top)))
            tone = "fill" if row.integer else "float"
            parts.append(el("rect", class_=tone, y=base - tall, height=tall, **place))
        if row.share is not None and row.share > 0:
            parts.append(
                el(
                    "rect",
                    class_="share",
                    y=base + 1,
                    height=SHARE_HEIGHT * min(1.0, row.share / most),
                    **place,
                )
            )
        shapes.append(el("g", *parts))
    shapes.append(el("line", class_="axis", x1="0", x2="100%", y1=base, y2=base))
    return _axes(
        base + SHARE_HEIGHT + 10, "Signal to noise of each layer, and its share of the error", shapes
    )


def _axes(height: float, label: str, shapes: Sequence[Markup]) -> Markup:
    """A plot with room for the axis' words on the left (css: padding)."""
    return el(
        "svg", *shapes, class_="plot axes", width="100%", height=height, role="img", aria_label=label,
    )  # fmt: skip
