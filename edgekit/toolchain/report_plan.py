"""The part of the report about a plan of several steps: what each is, in what precision, what its rounding costs, its time."""

from __future__ import annotations

from edgekit.toolchain.page import (
    Facts,
    Markup,
    as_text,
    count,
    el,
    fixed,
    join,
    number,
    pairs,
    scaled,
    signed,
    table,
)
from edgekit.toolchain.report_sections import Subject, sentence

MAX_STEPS, MAX_LOOKS = 200, 64


def concerns(s: Subject) -> bool:
    """Whether the bundle's evidence tells of several steps."""
    return bool(s.evidence.tables("plan", MAX_STEPS))


def plan(s: Subject) -> Markup:
    parts = [_steps(s), _times(s), _modes(s)]
    known = s.evidence.at("segments")
    if known:
        parts += [_path(s, known), _networks(known)]
    return join(parts)


def _steps(s: Subject) -> Markup:
    rows = []
    for step in s.evidence.tables("plan", MAX_STEPS):
        kernel, repeat = step.text("kernel", 60), step.number("repeat")
        what = (
            f"kernel {kernel} on the {step.text('runs_on', 20) or 'CPU'}"
            if kernel
            else step.text("network", 80)
        )
        if repeat is not None and repeat > 1:
            what += f", {count(repeat)} times"
        joined = f"{', '.join(step.texts('inputs'))} → {', '.join(step.texts('outputs'))}"
        size, macs, error = step.number("bytes"), step.number("macs"), step.number("error")
        rows.append(
            [
                join([el("b", step.text("name", 80)), el("div", joined, class_="note")]),
                what,
                step.text("precision", 20),
                scaled(size, "B") if size else "–",
                scaled(macs, "MAC") if macs else "–",
                number(error, 2) if error is not None else "–",
                step.text("when", 80) or "always",
            ]
        )
    head = ["Step", "What", "Precision", "Size", "Work", "Error", "Runs when"]
    legend = (
        "Error: noise over variance of the outputs of the whole plan when this network alone is rounded. Work: products of one "
        "run of the plan, all slices of a repeated network together. Runs when: a step is left out where this input is zeros."
    )
    return join([table(head, rows, "wide", "   nnn "), el("p", legend, class_="legend")])


def _times(s: Subject) -> Markup:
    t = s.evidence.at("timing")
    rows = [
        [
            as_text(name, 80),
            fixed(t.at("steps", name).number("alone_ms"), 3),
            fixed(t.at("steps", name).number("overlapped_ms"), 3),
        ]
        for name in list(t.at("steps").value)[:MAX_STEPS]
    ]
    if not rows:
        return Markup("")
    serial, overlapped = t.number("serial_ms"), t.number("overlapped_ms")
    rows.append([el("b", "from the first start to the last end"), fixed(serial, 3), fixed(overlapped, 3)])
    ratio = f" Overlapped takes {overlapped / serial:.2f} of it." if serial and overlapped is not None else ""
    legend = f"Median of {count(t.number('runs'))} runs, one step after the other, and with independent steps side by side.{ratio}"
    return join(
        [
            el("h3", "Milliseconds of each step"),
            table(["Step", "One after the other", "Overlapped"], rows, "", " nn"),
            el("p", legend, class_="legend"),
        ]
    )


def _modes(s: Subject) -> Markup:
    """The metric where sensors are lost."""
    known, key = s.evidence.at("modes"), s.evidence.at("metric").text("name", 20) or "Metric"
    rows = []
    for name in list(known.value)[:8]:
        m = known.at(name)
        low_high = m.interval("drop_interval95")
        between = f"{signed(low_high[0], 4)} to {signed(low_high[1], 4)}" if low_high else "–"
        rows.append(
            [
                as_text(name, 40),
                fixed(m.number("reference"), 3),
                fixed(m.number("payload"), 3),
                signed(m.number("drop"), 4),
                between,
            ]
        )
    if not rows:
        return Markup("")
    head = ["", f"{key}, float", "Payloads", "Drop", "95 % of the drop"]
    return join([el("h3", "With sensors lost"), table(head, rows, "", " nnnn")])


def _path(s: Subject, known: Facts) -> Markup:
    """How the metric was asked, and what went back to float."""
    rows = []
    for look in known.tables("looks", MAX_LOOKS):
        floats, passed = look.texts("float"), look.flag("passed")
        floats += [f"{name} in part" for name in look.texts("partly") if name not in floats]
        rows.append(
            [
                ", ".join(floats) or "none",
                fixed(look.number("metric"), 4),
                signed(look.number("drop"), 4),
                "not judged" if passed is None else ("within budget" if passed else "over budget"),
            ]
        )
    name = s.evidence.at("metric").text("name", 20) or "Metric"
    calibration = known.at("calibration")
    facts = pairs(
        [
            (
                "Calibrated on",
                f"{count(calibration.number('count'))} moments, {calibration.text('moments', 200)}",
            ),
            (
                "Left out",
                "; ".join(
                    f"{as_text(k, 60)}: {as_text(v, 200)}" for k, v in known.at("left_out").value.items()
                ),
            ),
        ]
    )
    shown = table(["Networks in float", name, "Drop", "Verdict"], rows, "", " nn ") if rows else Markup("")
    return join([el("h3", "INT8 of the whole plan"), facts, shown])


def _networks(known: Facts) -> Markup:
    rows = []
    for name in list(known.at("networks").value)[:MAX_STEPS]:
        network = known.at("networks", name)
        q = network.at("quantization")
        shares = [q.at("integer", b).number("mac_share") for b in q.at("integer").value]
        share = next((v for v in shares if v is not None), None)
        why = network.text("why", 300)
        rows.append(
            [
                as_text(name, 80),
                network.text("precision", 20),
                number(network.number("error"), 2) if network.number("error") is not None else "–",
                f"{100 * share:.1f} %" if share is not None else "–",
                join(el("span", step, class_="hop") for step in q.texts("steps", 20))
                if not why
                else sentence(why),
            ]
        )
    head = ["Network", "Precision", "Error", "MACs in integers", "How"]
    return join([el("h3", "Networks"), table(head, rows, "wide", "  nn ")])
