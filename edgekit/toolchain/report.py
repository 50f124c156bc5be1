"""One self-contained HTML page about a bundle, or about several side by side.

Nothing is loaded from anywhere: styles, plots (SVG) and pictures (data URIs) are inside, and a
content security policy forbids the rest. The page shows what the bundle's evidence says and, as
plainly, what was not measured; it computes no figure of its own beyond differences, their means and shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import __version__
from edgekit.archive import write_atomic
from edgekit.toolchain import report_plan
from edgekit.toolchain.page import (
    Facts,
    Markup,
    count,
    el,
    esc,
    fixed,
    join,
    number,
    plain,
    scaled,
    signed,
    table,
)
from edgekit.toolchain.report_quant import concerns, quantization
from edgekit.toolchain.report_sections import (
    Subject,
    agreement,
    built,
    graph,
    metric,
    outputs,
    provenance,
    samples,
    sentence,
    timing,
)
from edgekit.toolchain.report_states import states

if TYPE_CHECKING:
    from edgekit.bundle import Bundle

NOT_MEASURED = "not measured"


# --- the page ----------------------------------------------------------------------------------


def write_report(bundle: Bundle, path: Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write the page about one bundle to `path`. `extra` replaces parts of the evidence, e.g. a new `timing`.

    Raises: OutputError when it cannot be written, BundleError for a damaged bundle.
    """
    write_atomic(path, [render([bundle], extra).encode("utf-8")], "report")
    return path


def write_comparison(bundles: Sequence[Bundle], path: Path) -> Path:
    """Write one page about several bundles, a table that compares them on top. Raises as `write_report`."""
    write_atomic(path, [render(bundles).encode("utf-8")], "report")
    return path


def render(bundles: Sequence[Bundle], extra: Mapping[str, Any] | None = None) -> str:
    """The page as text; equal bundles give equal text."""
    subjects = [Subject(b, Facts({**b.evidence, **(extra or {})})) for b in bundles]
    if len(subjects) == 1:
        title = f"{subjects[0].bundle.manifest.model} for {subjects[0].title}"
        content = article(subjects[0], "h1", "b1")
    else:
        title = f"{len(subjects)} bundles compared"
        articles = join(article(s, "h2", f"b{i}") for i, s in enumerate(subjects, 1))
        content = join([comparison(subjects, title), articles])
    return document(title, content, "Written by edgekit {} from the evidence inside the bundle.")


def document(title: str, content: Markup, foot: str) -> str:
    """A whole page: styles inside, nothing loaded from anywhere. `{}` in `foot`: edgekit's version."""
    style = Markup(files("edgekit.toolchain").joinpath("report.css").read_text(encoding="utf-8"))
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = join(
        [
            el("meta", charset="utf-8"),
            el("meta", http_equiv="Content-Security-Policy", content=policy),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("meta", name="color-scheme", content="light dark"),
            el("title", f"{title} · edgekit report"),
            el("style", style),
        ]
    )
    page = el(
        "html",
        el("head", head),
        el("body", el("main", content, el("footer", foot.format(__version__)))),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def comparison(subjects: Sequence[Subject], title: str) -> Markup:
    """The summary table of several bundles."""
    rows = []
    for i, s in enumerate(subjects, 1):
        measured, timed = s.evidence.at("metric"), s.evidence.at("timing")
        key = measured.text("name") or "AP"
        word, tone, _ = verdict(s)
        cpu = timed.at("machine").text("cpu", 60)
        median = timed.at("stages", "total").number("median_ms")
        rows.append(
            [
                join(
                    [
                        el("a", s.bundle.manifest.model, href=f"#b{i}"),
                        el("div", s.bundle.manifest.target, class_="note"),
                    ]
                ),
                el("span", word, class_=f"pill {tone}"),
                s.precision,
                scaled(s.payload_bytes, "B"),
                _or_dash(fixed(measured.at("payload").number(key), 3), key),
                signed(measured.number("drop"), 4),
                el("span", f"{number(median)} ms", title=cpu or None) if median is not None else "–",
            ]
        )
    head = ["Model", "Verdict", "Precision", "Payload", "Metric", "Drop", "Median"]
    machines = sorted({s.evidence.at("timing", "machine").text("cpu") for s in subjects} - {""})
    notes = ["Drop: float model minus payload, on the same pictures; – means not measured."]
    if machines:
        notes.append("Times were taken on " + ", ".join(machines) + ".")
    if len({s.evidence.at("metric").text("data") for s in subjects if not s.why_not("metric")}) > 1:
        notes.append("The metrics were taken on different pictures and do not compare.")
    return join(
        [
            el("p", "edgekit report", class_="eyebrow"),
            el("h1", title),
            el(
                "div",
                table(head, rows, "wide", "   nnnn"),
                el("p", " ".join(notes), class_="note"),
                class_="compare",
            ),
        ]
    )


def _or_dash(value: str, name: str) -> str:
    return value if value == "–" else f"{name} {value}"


def article(s: Subject, level: str, anchor: str) -> Markup:
    """All about one bundle."""
    m = s.bundle.manifest
    word, tone, reason = verdict(s)
    note = "What runs in integers, how the build got there, and what it cost."
    planned = report_plan.concerns(s)
    quantized = [section("Quantization", note, quantization(s))] if concerns(s) and not planned else []
    if planned:
        note = (
            "Networks and the kernels between them: what each costs, and what its precision costs the whole."
        )
        quantized.append(section("Plan", note, report_plan.plan(s)))
    note = "What the network remembers from one frame to the next, and what becomes of the error on the way."
    recurrent = [section("States", note, states(s))] if m.states else []
    mark = {"good": "✓", "warn": "!", "bad": "✕"}[tone]
    parts = [
        el("p", "edgekit report" if level == "h1" else s.bundle.path.name, class_="eyebrow"),
        el(level, m.model, style="font-size:30px" if level == "h2" else None),
        el("p", f"{m.task} · {s.title} · {s.precision}", class_="lead"),
        el("div", mark, " ", el("b", word), el("span", reason), class_=f"verdict {tone}"),
        tiles(s),
        missing(s),
        section("What was built", "The network, the board it is for, and what the bundle carries.", built(s)),
        section(
            "Graph", "What the build changed before lowering, each step checked on real input.", graph(s)
        ),
        *quantized,
        *recurrent,
        section("Outputs", "Raw outputs of the payload against the float network, same input.", outputs(s)),
        section(
            s.unit.capitalize(),
            "What comes out after decoding, against the float network.",
            agreement(s, plotted_elsewhere=bool(quantized) and not planned),
        ),
        section("Accuracy", "The task's own metric on labelled pictures.", metric(s)),
        section("Time", "One picture at a time, stage by stage.", timing(s)),
        section("Pictures", "What the payload finds.", samples(s)),
        section("Provenance", "What it was made from, and how to recognise it.", provenance(s)),
    ]
    return el("article", join(parts), id=anchor)


def section(title: str, note: str, body: Markup) -> Markup:
    return el("section", el("header", el("h2", title), el("p", note, class_="note")), el("div", body))


# --- the head of the page ----------------------------------------------------------------------


def verdict(s: Subject) -> tuple[str, str, str]:
    """(word, tone, reason): whether the build met its limits."""
    accept = s.evidence.at("accept")
    passed, reason = accept.flag("passed"), accept.text("reason")
    drop, limit = s.evidence.at("metric").number("drop"), accept.number("max_drop")
    if passed is True:
        if drop is not None and limit is not None:
            pictures = s.evidence.at("metric").number("images")
            unit = s.evidence.at("metric").text("of", 20) or "pictures"
            on = f" on {count(pictures)} {unit}" if pictures is not None else ""
            reason = f"drop {signed(drop, 4)}{on}, limit {plain(limit)}"
        return "Accepted", "good", reason
    if passed is False:
        return "Outside its limits", "bad", reason
    return "Not proven", "warn", reason or s.why_not("metric") or "no limits were checked"


def tiles(s: Subject) -> Markup:
    """The four figures that people ask for first."""
    measured, agreed, timed = (s.evidence.at(k) for k in ("metric", "agreement", "timing"))
    key = measured.text("name", 20) or "AP"
    got, base = measured.at("payload").number(key), measured.at("reference").number(key)
    total = timed.at("stages", "total")
    matched, wanted = agreed.number(f"{s.unit}_matched"), agreed.number(f"{s.unit}_reference")
    weights = [Facts(p).number("weight_bytes") for p in s.evidence.at("payloads").value.values()]
    known = [w for w in weights if w]
    return el(
        "div",
        _tile(
            key,
            fixed(got, 3) if got is not None else "",
            f"float {fixed(base, 3)}" if base is not None else "",
        ),
        _tile(
            f"Median per {s.input}",
            f"{number(total.number('median_ms'))} ms" if total.number("median_ms") is not None else "",
            f"p99 {number(total.number('p99_ms'))} ms" if total.number("p99_ms") is not None else "",
        ),
        _tile(
            "Payload",
            scaled(s.payload_bytes, "B"),
            f"weights {scaled(sum(known), 'B')}" if known else s.precision,
        ),
        _tile(
            f"{s.unit.capitalize()} found again",
            f"{matched:.0f} of {wanted:.0f}" if matched is not None and wanted is not None else "",
            _within(agreed.number("score_shift_max")) if agreed.number("score_shift_max") is not None else "",
        ),
        class_="tiles",
    )


def _tile(what: str, value: str, more: str) -> Markup:
    shown = el("b", value) if value else el("b", NOT_MEASURED, class_="none")
    return el("div", el("div", what, class_="what"), shown, el("div", more, class_="more"), class_="tile")


def _within(shift: float | None) -> str:
    return "scores equal" if shift == 0 else f"scores within {number(shift, 2)}"


PARTS = {
    "metric": "Accuracy on labelled pictures",
    "timing": "Time on the device",
    "agreement": "Agreement of results",
    "payloads": "Error of the raw outputs",
}


def missing(s: Subject) -> Markup:
    """What this page does not show, first thing after the figures."""
    lines: list[Markup] = []
    said = " ".join(s.evidence.texts("limits"))
    for key, name in PARTS.items():
        reason = s.why_not(key)
        if reason and reason.rstrip(".") not in said:
            lines.append(join([el("b", f"{name}: "), sentence(reason)]))
    lines += [esc(sentence(text)) for text in s.evidence.texts("limits", 40)]
    if not lines:
        return Markup("")
    return el(
        "div",
        el("h2", "What was not measured"),
        el("ul", join(el("li", line) for line in dict.fromkeys(lines))),
        class_="missing",
    )
