"""What the evidence says about INT8, as rows of text for `build` and `inspect`.

Evidence is a stranger's: values of a wrong type read as absent, and whoever prints a row escapes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.toolchain.page import Facts, as_text, number

MAX_ROWS = 60
FLOATS = 12
"""Float nodes named for each library."""
MAX_NODES = 5000


def aligned(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Rows as lines with equal columns; `right`: columns that are aligned to the right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    lines = (
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False)))
        for row in rows
    )  # fmt: skip
    return [line.rstrip() for line in lines]


def trials(evidence: Mapping[str, Any]) -> list[str]:
    """The Pareto that the search saw: a line each, kept ones marked; columns that nobody filled are left out."""
    e = Facts(dict(evidence))
    key = e.at("metric").text("name", 20) or "AP"
    rows = [["", "trial", "error", "integer", "est. ms", key, "drop", ""]]
    for t in e.at("quantization").tables("trials", MAX_ROWS):
        seconds, passed = t.number("seconds"), t.flag("passed")
        kept = t.flag("kept") is True and passed is not False
        rows.append(
            [
                "*" if kept else "",
                t.text("label", 100),
                _digits(t.number("error")),
                percent(t.number("integer_share")),
                "" if seconds is None else f"{1e3 * seconds:.4g}",
                _fixed(t.number("metric")),
                _signed(t.number("drop")),
                "" if passed is None else ("within budget" if passed else "over budget"),
            ]
        )
    if len(rows) == 1:
        return []
    used = [i for i in range(8) if i in (0, 1, 2) or any(row[i] for row in rows[1:])]
    right = frozenset(n for n, i in enumerate(used) if i in (2, 3, 4, 5, 6))
    return aligned([[row[i] for i in used] for row in rows], right)


def variants(evidence: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(name, size, metric, speed, integer share, operators) of each variant; empty columns are left out."""
    e = Facts(dict(evidence))
    key = e.at("metric").text("name", 20) or "AP"
    rows: list[tuple[str, ...]] = []
    for name in list(e.at("payloads").value)[:16]:
        p = e.at("payloads", name)
        size, share = p.number("bytes"), p.at("integer").number("mac_share")
        rows.append(
            (
                as_text(name, 80),
                "" if size is None else f"{size / 2**20:.2f} MiB",
                _metric(p.at("metric"), key),
                _speed(p.at("speed")),
                "" if share is None else f"{percent(share)} of MACs in integers",
                _operators(p.at("engine")),
            )
        )
    used = [i for i in range(6) if any(row[i] for row in rows)]
    return [tuple(row[i] for i in used) for row in rows]


def left_out(evidence: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(library, why it is not in the bundle)."""
    q = Facts(dict(evidence)).at("quantization")
    reasons = {**q.at("not_lowered").value, **q.at("left_out").value}
    return [(as_text(backend, 60), as_text(why, 160)) for backend, why in list(reasons.items())[:16]]


def floats(evidence: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(library, what, share of the MACs, why) of what stays float: nodes with weights one by one, the most
    expensive first, others counted by operator and reason."""
    q = Facts(dict(evidence)).at("quantization")
    whole = sum(row.number("macs") or 0.0 for row in q.tables("layers", MAX_NODES))
    rows: list[tuple[str, ...]] = []
    for name in list(q.at("integer").value)[:16]:
        backend = as_text(name, 60)
        heavy, others = [], Counter[tuple[str, str]]()
        for r in q.at("integer", name).tables("float", MAX_NODES):
            macs, op, reason = r.number("macs") or 0.0, r.text("op", 40), r.text("reason", 160)
            if macs > 0:
                heavy.append((macs, f"{op} {r.text('id', 80)}", reason))
            else:
                others[op, reason] += 1
        heavy.sort(key=lambda item: -item[0])
        rows += [
            (backend, what, percent(macs / whole) + " of MACs" if whole else "", why)
            for macs, what, why in heavy[:FLOATS]
        ]
        if len(heavy) > FLOATS:
            rows.append((backend, f"and {len(heavy) - FLOATS} more with weights", "", "--json shows them"))
        rows += [
            (backend, op if n == 1 else f"{n} x {op}", "", why) for (op, why), n in others.most_common(FLOATS)
        ]
    return rows


def summary(evidence: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(what, value) about the search."""
    q = Facts(dict(evidence)).at("quantization")
    known, looks, error = q.at("calibration"), q.number("metric_looks"), q.number("output_error")
    pictures = known.number("pictures")
    steps = q.texts("steps", MAX_ROWS)
    rows = [("scheme", q.text("scheme", 40)), ("searched for", q.text("searched_for", 40))]
    rows += [("step kept", step) for step in steps]
    rows += [
        (
            "calibration",
            known.text("calibration", 120) + ("" if pictures is None else f", {pictures:.0f} pictures"),
        ),
        ("output error", _digits(error)),
        ("looks at the metric", "" if looks is None else f"{looks:.0f}"),
    ]
    rows += [("warning", text) for text in q.texts("warnings", 40)]
    rows += [
        (f"integer share, {as_text(backend, 60)}", percent(share))
        for backend in list(q.at("integer").value)[:16]
        if (share := q.at("integer", backend).number("mac_share")) is not None
    ]
    return [row for row in rows if row[1]]


def percent(share: float | None) -> str:
    """100 % only when it is all of it."""
    if share is None:
        return ""
    shown = f"{100 * share:.1f}"
    return "100 %" if share == 1 else f"{'>99.9' if shown == '100.0' else shown} %"


def _metric(m: Facts, key: str) -> str:
    got, drop = m.number(key), m.number("drop")
    if got is None:
        return ""
    return f"{key} {got:.4f}" + ("" if drop is None else f" (drop {drop:+.4f})")


def _speed(s: Facts) -> str:
    ms, ratio, threads = s.number("ms"), s.number("ratio"), s.number("threads")
    if ms is None:
        return ""
    on = "" if threads is None else f" on {threads:.0f} thread" + ("" if threads == 1 else "s")
    return f"{ms:.4g} ms" + ("" if ratio is None else f", {ratio:.2f} x float") + on


def _operators(e: Facts) -> str:
    operators, taken, runs = (e.number(k) for k in ("operators", "delegated", "partitions"))
    if operators is None or taken is None:
        return ""
    where = "" if runs is None else f" in {runs:.0f} partition" + ("" if runs == 1 else "s")
    return f"{taken:.0f} of {operators:.0f} operators delegated{where}"


def _digits(value: float | None) -> str:
    return "" if value is None else number(value)


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"
