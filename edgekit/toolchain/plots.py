"""Plots as inline SVG. Widths are in percent of the cell, so that text keeps its size on a phone.

Every plot stands beside the numbers it shows (in a table), so it is decoration to a screen reader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekit.toolchain.page import Markup, el, number, plain


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def _svg(height: int, *shapes: Markup, class_: str = "bar") -> Markup:
    return el(
        "svg", *shapes, class_=class_, width="100%", height=height, aria_hidden="true", focusable="false"
    )


def bar(share: float, class_: str = "fill", height: int = 8) -> Markup:
    """A bar that fills `share` (0..1) of the cell."""
    return _svg(
        height,
        el("rect", class_="track", width="100%", height=height, rx=2),
        el("rect", class_=class_, width=_percent(share), height=height, rx=2),
    )


def bar_interval(share: float, low: float | None, high: float | None, class_: str = "fill") -> Markup:
    """A bar with the whisker of an interval, all as shares 0..1."""
    shapes = [
        el("rect", class_="track", y=3, width="100%", height=8, rx=2),
        el("rect", class_=class_, y=3, width=_percent(share), height=8, rx=2),
    ]
    if low is not None and high is not None:
        shapes += [
            el("line", class_=kind, x1=_percent(low), x2=_percent(high), y1=7, y2=7)
            for kind in ("halo", "whisker")
        ]
        shapes += [
            el("line", class_="whisker", x1=_percent(v), x2=_percent(v), y1=3, y2=11) for v in (low, high)
        ]
    return _svg(14, *shapes)


LOG_LOW = -9
"""Left end of the error axis: 10^-9 of the output's range."""


def error_bar(rms: float | None, worst: float | None) -> Markup:
    """rms as a bar and the largest error as a mark, logarithmic from 10^-9 to 1."""

    def share(value: float) -> float:
        return 0.0 if value <= 0 else (math.log10(value) - LOG_LOW) / -LOG_LOW

    ticks = [
        el("line", class_="grid", x1=_percent(i / -LOG_LOW), x2=_percent(i / -LOG_LOW), y1=0, y2=14)
        for i in range(0, 1 - LOG_LOW, 3)
    ]
    shapes = [el("rect", class_="track", y=3, width="100%", height=8, rx=2), *ticks]
    if rms:
        shapes.append(el("rect", class_="fill", y=3, width=_percent(share(rms)), height=8, rx=2))
    if worst:
        shapes.append(
            el("line", class_="mark", x1=_percent(share(worst)), x2=_percent(share(worst)), y1=1, y2=13)
        )
    return _svg(14, *shapes)


def range_line(median: float, p95: float | None, p99: float | None, scale: float) -> Markup:
    """Time from 0 to `scale`: a bar to the median, a line on to p95 and p99."""
    end = max(v for v in (median, p95, p99) if v is not None)
    shapes = [
        el("rect", class_="track", y=3, width="100%", height=8, rx=2),
        el("rect", class_="fill", y=3, width=_percent(median / scale), height=8, rx=2),
        el("line", class_="whisker", x1=_percent(median / scale), x2=_percent(end / scale), y1=7, y2=7),
    ]
    shapes += [
        el("line", class_="whisker", x1=_percent(v / scale), x2=_percent(v / scale), y1=low, y2=14 - low)
        for v, low in ((p95, 4), (p99, 2))
        if v is not None
    ]
    return _svg(14, *shapes)


def drop_line(drop: float, limit: float) -> Markup:
    """Where the drop lies between "better than float" (left) and the limit (right), drawn to scale."""
    reach = 1.25 * max(abs(drop), limit, 1e-6)

    def at(value: float) -> str:
        return _percent((value + reach) / (2 * reach))

    inside = drop <= limit
    return _svg(
        46,
        el("rect", class_="track", y=12, width="100%", height=8, rx=2),
        el(
            "rect",
            class_="beyond",
            x=at(limit),
            y=12,
            width=_percent((reach - limit) / (2 * reach)),
            height=8,
        ),
        el("line", class_="axis", x1=at(0), x2=at(0), y1=8, y2=24),
        el("line", class_="limit", x1=at(limit), x2=at(limit), y1=8, y2=24),
        el("circle", class_="dot" if inside else "dot bad", cx=at(drop), cy=16, r=6),
        el("text", "0", x=at(0), y=40, text_anchor="middle"),
        el("text", f"limit {plain(limit)}", x=at(limit), y=40, text_anchor="middle"),
        class_="plot",
    )


def scatter(
    points: Sequence[tuple[float, float]],
    across: str = "score of the float network",
    label: str = "Score of each matched box: payload over float network",
) -> Markup:
    """Score of the payload over score of the float network, both 0..1, with the diagonal of equal scores."""
    left, top, size = 34.0, 8.0, 250.0

    def x(v: float) -> float:
        return left + size * min(1.0, max(0.0, v))

    def y(v: float) -> float:
        return top + size * (1 - min(1.0, max(0.0, v)))

    shapes = []
    for i in range(5):
        v = i / 4
        shapes += [
            el("line", class_="grid", x1=x(v), x2=x(v), y1=y(0), y2=y(1)),
            el("line", class_="grid", x1=x(0), x2=x(1), y1=y(v), y2=y(v)),
            el("text", f"{v:g}", x=x(v), y=y(0) + 15, text_anchor="middle"),
            el("text", f"{v:g}", x=left - 6, y=y(v) + 4, text_anchor="end"),
        ]
    shapes.append(el("line", class_="axis", x1=x(0), y1=y(0), x2=x(1), y2=y(1)))
    shapes += [el("circle", class_="point", cx=x(a), cy=y(b), r=2.6) for a, b in points]
    shapes.append(el("text", across, x=x(0.5), y=y(0) + 33, text_anchor="middle"))
    return el(
        "svg", *shapes, class_="plot square", viewBox="0 0 292 296", role="img",
        aria_label=label,
    )  # fmt: skip


def histogram(
    values: Sequence[float], bins: int = 21, across: str = "score difference, payload − float"
) -> Markup:
    """How the score differences are spread, symmetric about 0."""
    reach = max(abs(v) for v in values) or 1e-9
    counts = [0] * bins
    for v in values:
        counts[min(bins - 1, int((v + reach) / (2 * reach) * bins))] += 1
    left, top, width, height = 6.0, 8.0, 280.0, 250.0
    step, most = width / bins, max(counts)
    shapes = [el("line", class_="grid", x1=left + width / 2, x2=left + width / 2, y1=top, y2=top + height)]
    for i, count in enumerate(counts):
        tall = height * count / most
        shapes.append(
            el(
                "rect",
                class_="fill",
                x=left + i * step + 1,
                y=top + height - tall,
                width=step - 2,
                height=tall,
            )
        )
    shapes.append(el("line", class_="axis", x1=left, x2=left + width, y1=top + height, y2=top + height))
    label = number(reach, 2)
    for text, x, anchor in (
        (f"−{label}", left, "start"),
        ("0", left + width / 2, "middle"),
        (f"+{label}", left + width, "end"),
    ):
        shapes.append(el("text", text, x=x, y=top + height + 15, text_anchor=anchor))
    shapes.append(
        el(
            "text",
            across,
            x=left + width / 2,
            y=top + height + 33,
            text_anchor="middle",
        )
    )
    return el(
        "svg", *shapes, class_="plot square", viewBox="0 0 292 296", role="img",
        aria_label="Histogram of the score differences",
    )  # fmt: skip
