"""What the evidence says about a plan of several steps, as rows of text for `build` and `inspect`.

Evidence is a stranger's: values of a wrong type read as absent, and whoever prints a row escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.toolchain.page import Facts, as_text, number

MAX_ROWS = 64


def steps(evidence: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(step, what, precision, size, work, error of the plan's outputs by its rounding, milliseconds) of each step."""
    e = Facts(dict(evidence))
    times = e.at("timing", "steps")
    rows: list[tuple[str, ...]] = []
    for step in e.tables("plan", MAX_ROWS):
        name, kernel, repeat = step.text("name", 80), step.text("kernel", 40), step.number("repeat") or 1
        size, macs, error = step.number("bytes"), step.number("macs"), step.number("error")
        ms = times.at(name).number("alone_ms")
        rows.append(
            (
                name,
                f"kernel {kernel} ({step.text('runs_on', 20)})"
                if kernel
                else "network" + (f" x {repeat:.0f}" if repeat > 1 else ""),
                step.text("precision", 20),
                "" if not size else _few(size / 2**20, 2) + " MiB",
                "" if not macs else _few(macs / 1e6, 0) + " M products",
                "" if error is None else f"error {number(error)}",
                "" if ms is None else f"{ms:.3f} ms",
            )
        )
    return rows


def _few(value: float, digits: int) -> str:
    """With so many digits after the point; of what would be nothing then, one that tells."""
    return f"{value:.{digits}f}" if value >= 10**-digits else f"{value:.1g}"


def path(evidence: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(what, value) about how the networks came to their precision."""
    e = Facts(dict(evidence))
    known, key = e.at("segments"), e.at("metric").text("name", 20) or "metric"
    rows: list[tuple[str, ...]] = []
    for look in known.tables("looks", MAX_ROWS):
        floats, partly = ", ".join(look.texts("float")), ", ".join(look.texts("partly"))
        metric, drop = look.number("metric"), look.number("drop")
        said = look.text("reason", 160) if metric is None else f"{key} {metric:.4f}, drop {drop or 0.0:+.4f}"
        passed = look.flag("passed")
        verdict = "" if passed is None else (", within budget" if passed else ", over budget")
        where = [
            f"float: {floats}" if floats else "all in int8",
            *([f"partly float: {partly}"] if partly else []),
        ]
        rows.append(("; ".join(where), said + verdict))
    for name in list(known.at("networks").value)[:MAX_ROWS]:
        network = known.at("networks", name)
        why = network.text("why", 200)
        rows.append(
            (
                as_text(name, 80),
                f"float, {why}" if why else "; ".join(network.at("quantization").texts("steps", 20)),
            )
        )
    for mode in list(e.at("modes").value)[:8]:
        m = e.at("modes", mode)
        got, drop = m.number("payload"), m.number("drop")
        if got is not None:
            rows.append((as_text(mode, 40), f"{key} {got:.4f}, drop {drop or 0.0:+.4f}"))
    rows += [
        (as_text(k, 80), f"left out, {as_text(v, 160)}")
        for k, v in list(known.at("left_out").value.items())[:16]
    ]
    rows += [
        (as_text(k, 80), f"not lowered, {as_text(v, 160)}")
        for k, v in list(known.at("not_lowered").value.items())[:16]
    ]
    return rows
