"""The report's section about INT8: variants, the path of the search, layers, scores. See `quantize` for its record."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgekit.toolchain import plots, plots_quant
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
    plain,
    scaled,
    signed,
    table,
)
from edgekit.toolchain.report_sections import Subject, absent, scores, sentence

QUANTIZED = frozenset({"int8", "dynamic"})
MAX_LAYERS, MAX_TRIALS, MAX_FLOAT = 2000, 60, 5000
WORST = 10
"""Layers named in the open table; all of them stand behind a fold."""


def concerns(s: Subject) -> bool:
    """Whether the bundle has anything to say here: it is in integers, or its build tried."""
    return bool(s.evidence.at("quantization")) or bool(QUANTIZED & set(s.precision.split(", ")))


def quantization(s: Subject) -> Markup:
    q = s.evidence.at("quantization")
    parts = [facts(s, q), variants(s, q)]
    if not q:
        parts.append(absent(s.why_not("quantization")))
    else:
        parts += [path(s, q), layers(q), floats(q), worst(q)]
    parts.append(shift(s))
    return join(parts)


# --- what was done, and what it cost -------------------------------------------------------------


def facts(s: Subject, q: Facts) -> Markup:
    scheme, rules = q.text("scheme", 40), q.text("searched_for", 40)
    how = {
        "search": "search within the accuracy budget",
        "search+qat": "search within the accuracy budget, training where it is missed",
        "qat": "search and training within the accuracy budget",
    }.get(scheme, f"plain {scheme} ranges, no repairs")
    error, looks = q.number("output_error"), q.number("metric_looks")
    steps = join((el("span", step, class_="hop") for step in q.texts("steps", MAX_TRIALS)), " → ")
    times = "" if looks is None else f"{count(looks)} time" + ("" if looks == 1 else "s")
    rows = pairs(
        [
            ("Scheme", how + (f", by the rules of {rules}" if rules else "") if scheme else ""),
            ("Steps kept", steps),
            ("Calibrated on", _calibration(q.at("calibration"))),
            ("Accuracy", _accuracy(s)),
            ("Drop", _drop(s)),
            (
                "Metric asked",
                f"{times} on the way, on the pictures that it is reported on" if times else "",
            ),
            ("Error of the outputs", f"{number(error)} of their variance" if error is not None else ""),
        ]
    )
    warned = [el("li", sentence(text)) for text in q.texts("warnings", 40)]
    shown = el("div", el("b", "Warnings of the calibration"), el("ul", join(warned)), class_="warned")
    return join([rows, shown]) if warned else rows


def _calibration(known: Facts) -> Markup:
    name, digest, pictures = (
        known.text("calibration", 120),
        known.text("digest", 80),
        known.number("pictures"),
    )
    parts = [f"{count(pictures)} pictures" if pictures is not None else "", name]
    code = [el("code", digest[:16] + "…", title=digest)] if digest else []
    return join([*filter(None, parts), *code], ", ")


def _accuracy(s: Subject) -> str:
    m = s.evidence.at("metric")
    key = m.text("name", 20) or "AP"
    got, base = m.at("payload").number(key), m.at("reference").number(key)
    if got is None:
        return s.why_not("metric") and f"not measured: {s.why_not('metric')}"
    spread = m.interval("interval95")
    return (
        f"{key} {fixed(got, 4)}"
        + (f", 95 % between {fixed(spread[0], 3)} and {fixed(spread[1], 3)}" if spread else "")
        + (f"; float {fixed(base, 4)}" if base is not None else "")
    )


def _drop(s: Subject) -> str:
    m, limit = s.evidence.at("metric"), s.evidence.at("accept").number("max_drop")
    drop, paired = m.number("drop"), m.interval("drop_interval95")
    if drop is None:
        return ""
    return (
        signed(drop, 4)
        + (f", paired 95 % between {signed(paired[0], 4)} and {signed(paired[1], 4)}" if paired else "")
        + (f"; accepted up to {plain(limit)}" if limit is not None else "")
    )


# --- variants ------------------------------------------------------------------------------------


def variants(s: Subject, q: Facts) -> Markup:
    """The float network, what is shipped, what was left out and why."""
    known = s.evidence.at("payloads")
    found = [(as_text(name, 80), known.at(name)) for name in list(known.value)[:16]]
    times = [p.at("speed").number(k) for _, p in found for k in ("ms", "float_ms")]
    slowest = max([t for t in times if t is not None], default=0.0)
    key = s.evidence.at("metric").text("name", 20) or "AP"
    timed = [ms for _, p in found if (ms := p.at("speed").number("ms")) is not None]
    best = min(timed) if len(timed) > 1 else None
    rows = [_float_row(s, found, key, slowest), *(_variant_row(n, p, key, slowest, best) for n, p in found)]
    rows += [
        _left_row(as_text(backend, 60), as_text(reason), q, what)
        for what, where in (("left out", "left_out"), ("not lowered", "not_lowered"))
        for backend, reason in list(q.at(where).value.items())[:16]
        if what == "left out" or backend not in q.at("left_out").value
    ]
    head = ["Variant", "Size", key, "Drop", "ms", "Against float", "Integer MACs"]
    threads = sorted({t for _, p in found if (t := p.at("speed").number("threads")) is not None})
    legend = "Drop: float minus variant. Integer MACs: share of the multiplications that runs in integers."
    if slowest:
        on = ", ".join(f"{count(t)} thread" + ("" if t == 1 else "s") for t in threads)
        legend += f" ms: network and conversions alone{', ' + on if on else ''}, median with quartiles, interleaved."
    return join(
        [
            el("h3", "Variants"),
            cards(head, [r for r in rows if r], "mnnnwnn"),
            el("p", legend, class_="legend"),
        ]
    )


def cards(head: Sequence[str], rows: Sequence[Sequence[str]], kinds: str) -> Markup:
    """A table whose rows become cards on a phone; the first cell of a row with fewer cells spans what is missing.

    kinds: a character a column, 'n' right, 'l' and 'm' words (long, less so), 'w' a plot.
    """
    classes = {"n": "n", "l": "long", "m": "long less", "w": "wideplot"}

    def row(cells: Sequence[str]) -> Markup:
        span = len(head) - len(cells) + 1
        places = [(head[0], kinds[0]), *zip(head[span:], kinds[span:], strict=True)]
        parts = []
        for i, (cell, (name, kind)) in enumerate(zip(cells, places, strict=True)):
            tone = "empty" if cell == "–" and kind not in "lm" else classes.get(kind)
            wide = span if i == 0 and span > 1 else None
            parts.append(el("td", cell, class_=tone, data_label=name or None, colspan=wide))
        return el("tr", *parts)

    top = el("tr", join(el("th", n, class_=classes.get(k)) for n, k in zip(head, kinds, strict=True)))
    return el("table", el("thead", top), el("tbody", join(map(row, rows))), class_="cards")


def _float_row(s: Subject, found: Sequence[tuple[str, Facts]], key: str, slowest: float) -> list[str]:
    base = s.evidence.at("metric", "reference").number(key)
    ms = next((v for _, p in found if (v := p.at("speed").number("float_ms")) is not None), None)
    if base is None and ms is None:
        return []
    name = join([el("b", "float32"), el("div", "the network before, onnxruntime", class_="note")])
    return [name, "–", fixed(base, 4), "–", _time(ms, None, slowest, "base"), "1 ×" if ms else "–", "–"]


def _variant_row(name: str, p: Facts, key: str, slowest: float, best: float | None) -> list[str]:
    measured, speed, share = p.at("metric"), p.at("speed"), p.at("integer").number("mac_share")
    ratio, ms = speed.number("ratio"), speed.number("ms")
    mark = [el("div", "fastest here", class_="pill good")] if best is not None and ms == best else []
    return [
        join([el("b", name), *mark, *(el("div", line, class_="note") for line in engine_lines(p))]),
        scaled(p.number("bytes"), "B"),
        fixed(measured.number(key), 4),
        signed(measured.number("drop"), 4),
        _time(ms, speed.interval("quartiles"), slowest, "fill"),
        f"{ratio:.2f} ×" if ratio is not None else "–",
        percent(share),
    ]


def engine_lines(p: Facts) -> list[str]:
    """Library, and what it made of the file: operators it took, in how many runs."""
    e = p.at("engine")
    library = " ".join(filter(None, [e.text("library", 40), e.text("version", 40)]))
    operators, taken, runs = (e.number(k) for k in ("operators", "delegated", "partitions"))
    lines = [library]
    if operators is not None and taken is not None:
        where = f" in {count(runs)} partition" + ("" if runs == 1 else "s") if runs is not None else ""
        lines.append(f"{count(taken)} of {count(operators)} operators delegated{where}")
    precision = e.text("float_precision", 20)
    lines.append(f"float parts in {precision}" if precision else "")
    return [line for line in lines if line]


def _left_row(backend: str, reason: str, q: Facts, what: str) -> list[str]:
    share = q.at("integer", backend).number("mac_share")
    why = el("div", f"{what}: {reason}" if reason else what, class_="note")
    name = join([el("span", backend, class_="soft"), why])
    return [name, percent(share)]


def _time(ms: float | None, quartiles: tuple[float, float] | None, slowest: float, tone: str) -> str:
    if ms is None or slowest <= 0:
        return "–"
    low, high = (v / slowest for v in quartiles) if quartiles else (None, None)
    spread = f" [{number(quartiles[0])} … {number(quartiles[1])}]" if quartiles else ""
    text = el("span", el("b", number(ms)), el("span", spread, class_="soft"), class_="line")
    return join([text, plots.bar_interval(ms / slowest, low, high, tone)])


def percent(share: float | None) -> str:
    """100 % only when it is all of it."""
    if share is None:
        return "–"
    shown = f"{100 * share:.1f}"
    return "100 %" if share == 1 else f"{'>99.9' if shown == '100.0' else shown} %"


# --- the path of the search ----------------------------------------------------------------------


def fate(t: Facts) -> str:
    """What became of a trial: kept, left (no better) or refused (by the accuracy budget)."""
    if t.flag("passed") is False:
        return "refused"
    return "kept" if t.flag("kept") else "left"


FATES = {"kept": "kept", "left": "no better", "refused": "over budget"}


def path(s: Subject, q: Facts) -> Markup:
    trials = [t for t in q.tables("trials", MAX_TRIALS) if t.number("error") is not None]
    if not trials:
        return Markup("")
    key = s.evidence.at("metric").text("name", 20) or "AP"
    dots = [
        plots_quant.Step(max(t.number("error") or 0.0, 1e-12), fate(t), f"{i}. {t.text('label')}: {number(t.number('error'))}")
        for i, t in enumerate(trials, 1)
    ]  # fmt: skip
    seconds = any(t.number("seconds") is not None for t in trials)
    metric = any(t.number("metric") is not None for t in trials)
    head = [
        "",
        "Trial",
        "Error",
        "Integer MACs",
        *["ms on target"] * seconds,
        *[key, "Drop"] * metric,
        "Verdict",
    ]
    rows = []
    for i, t in enumerate(trials, 1):
        s_ = t.number("seconds")
        end = fate(t)
        word = "within budget" if t.flag("passed") else FATES[end]
        rows.append(
            [
                el("i", str(i), class_=f"nr {end}"),
                value_name(t.text("label", 160)),
                number(t.number("error")),
                percent(t.number("integer_share")),
                *[number(1e3 * s_) if s_ is not None else "–"] * seconds,
                *[fixed(t.number("metric"), 4), signed(t.number("drop"), 4)] * metric,
                el("span", word, class_="pill " + ("good" if t.flag("passed") else {"refused": "bad"}.get(end, "soft"))),
            ]
        )  # fmt: skip
    kinds = " lnn" + "n" * seconds + "nn" * metric + " "
    legend = [
        el("span", el("i", class_="dotkey kept"), "kept"),
        el("span", el("i", class_="dotkey left"), "no better, left"),
        el("span", el("i", class_="dotkey refused"), "over the accuracy budget"),
    ]
    note = "Error: noise over variance, averaged over the outputs; 1 means nothing is left of them."
    if seconds:
        note += " ms on target: by the cost model, not measured."
    return join(
        [
            el("h3", "The path of the search" if len(dots) > 1 else "What was tried"),
            plots_quant.search_path(dots) if len(dots) > 1 else "",
            el("p", join(legend), class_="legend") if len(dots) > 1 else "",
            cards(head, rows, kinds),
            el("p", note, class_="legend"),
        ]
    )


def value_name(text: str) -> Markup:
    """A value as the search describes it, `name (node 3 of 346, Conv ...)`: the words in brackets stand back."""
    found = re.fullmatch(r"(.*?) (\((?:node \d+ of \d+, .*|network input)\))", text)
    return join([found[1], " ", el("span", found[2], class_="soft")]) if found else join([text])


# --- layers --------------------------------------------------------------------------------------


def layers(q: Facts) -> Markup:
    known = q.tables("layers", MAX_LAYERS)
    if not known:
        return Markup("")
    shares = [row.number("share") for row in known]
    bars = [
        plots_quant.Layer(row.number("sqnr_db"), share, row.text("precision") != "float", _title(row))
        for row, share in zip(known, shares, strict=True)
    ]
    order = sorted(range(len(known)), key=lambda i: -(shares[i] or 0.0))
    most = max((v for v in shares if v is not None), default=0.0) or 1.0
    floats_ = sum(not bar.integer for bar in bars)
    legend = [
        el("span", el("i", class_="key"), "SQNR of the result"),
        el("span", el("i", class_="key share"), "share of the error that enters there"),
    ]
    if floats_:
        legend.append(el("span", el("i", class_="key float"), f"stays float ({floats_})"))
    head = ["Layer", "Precision", "SQNR", "", "Share of error", "MACs"]
    rows = [_layer_row(known[i], most) for i in order]
    parts = [
        el("h3", f"{len(known)} layers with weights, first to last"),
        plots_quant.layers(bars),
        el("p", join(legend), class_="legend"),
        el("h3", "Where most of the error enters"),
        cards(head, rows[:WORST], "l nwnn"),
    ]
    if len(rows) > WORST:
        whole = [_layer_row(row, most) for row in known]
        parts.append(
            el("details", el("summary", f"All {len(rows)} layers, in order"), cards(head, whole, "l nwnn"))
        )
    return join(parts)


def _title(row: Facts) -> str:
    reason = row.text("reason")
    shown = [
        row.text("op") or row.text("id"),
        f"SQNR {number(row.number('sqnr_db'))} dB",
        percent(row.number("share")),
    ]
    return ", ".join([*shown, *([f"float: {reason}"] if row.text("precision") == "float" else [])])


def _layer_row(row: Facts, most: float) -> list[str]:
    share, db, kind = row.number("share"), row.number("sqnr_db"), row.text("precision", 20)
    reason = el("div", row.text("reason"), class_="note") if row.text("reason") else ""
    exact = db is not None and db >= plots_quant.EXACT_DB
    return [
        join([value_name(row.text("op", 160) or row.text("id", 120)), reason]),
        el("span", kind, class_="pill warn" if kind == "float" else "soft"),
        "exact" if exact else (f"{db:.1f} dB".replace("-", "−") if db is not None else "–"),
        plots.bar((share or 0.0) / most, "share"),
        percent(share),
        scaled(row.number("macs"), ""),
    ]


def floats(q: Facts) -> Markup:
    """What stays float in each library, and why; nodes of one reason together."""
    parts = []
    for backend in list(q.at("integer").value)[:16]:
        known = q.at("integer", backend)
        rows: dict[str, list[Facts]] = {}
        for row in known.tables("float", MAX_FLOAT):
            rows.setdefault(row.text("reason") or "no reason recorded", []).append(row)
        if not rows:
            continue
        total, whole = known.number("nodes"), known.number("integer_nodes")
        left = (
            f"{count(total - whole)} of {count(total)} nodes"
            if total is not None and whole is not None
            else ""
        )
        parts.append(el("h3", f"In float on {as_text(backend, 60)}: {left or 'some nodes'}"))
        lines = [
            [
                reason,
                _names(nodes),
                count(len(nodes)),
                scaled(sum(r.number("macs") or 0.0 for r in nodes), ""),
            ]
            for reason, nodes in sorted(
                rows.items(), key=lambda kv: -sum(r.number("macs") or 0.0 for r in kv[1])
            )
        ]
        parts.append(cards(["Why", "Which", "Nodes", "MACs"], lines, "l nn"))
    if not parts and q.at("integer"):
        names = ", ".join(as_text(b, 60) for b in list(q.at("integer").value)[:16])
        return el("p", f"No node stays float ({names}).", class_="legend")
    return join(parts)


def _names(nodes: Sequence[Facts], limit: int = 8) -> Markup:
    shown = [
        join([el("code", r.text("id", 80)), " ", el("span", r.text("op", 40), class_="soft")])
        for r in nodes[:limit]
    ]
    more = f" and {len(nodes) - limit} more" if len(nodes) > limit else ""
    return join([join(shown, ", "), more])


def worst(q: Facts) -> Markup:
    """Values whose rounding alone does most damage."""
    known = [
        (w.text("value", 160), e)
        for w in q.tables("worst_values", 40)
        if (e := w.number("error")) is not None
    ]
    if not known:
        return Markup("")
    most = max(e for _, e in known) or 1.0
    rows = [[value_name(name), plots.bar(e / most, "share"), number(e)] for name, e in known]
    note = "Error of the outputs when this one value is rounded and all others are exact."
    return join(
        [
            el("h3", "Values whose rounding does most damage"),
            cards(["Value", "", "Error"], rows, "lwn"),
            el("p", note, class_="legend"),
        ]
    )


# --- scores --------------------------------------------------------------------------------------


BANDS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0001))


def shift(s: Subject) -> Markup:
    """Confidence compression: what happens to the scores, stated and plotted."""
    a = s.evidence.at("agreement")
    mean, worst_ = a.number("score_shift_mean"), a.number("score_shift_max")
    points = a.points("pairs")
    if mean is None:
        return Markup("")
    accept = s.evidence.at("accept")
    fall, largest = accept.number("max_confidence_loss"), accept.number("max_score_shift")
    if abs(mean) < 5e-5:
        said = "Scores are as high as the float network's on average"
    else:
        side = "lower" if mean < 0 else "higher"
        said = f"Scores are {number(abs(mean), 2)} {side} than the float network's on average"
        said += " (confidence compression)" if mean < 0 else ""
    said += f", by {number(worst_, 2)} at most" if worst_ is not None else ""
    limits = [
        f"a mean fall of {plain(fall)}" if fall is not None else "",
        f"a shift of {plain(largest)}" if largest is not None else "",
    ]
    accepted = " and ".join(filter(None, limits))
    said += f"; accepted up to {accepted}." if accepted else "; no limit was set."
    rows = []
    for low, high in BANDS:
        inside = [got - ref for ref, got in points if low <= ref < high]
        if inside:
            rows.append(
                [f"{low:g} to {min(high, 1):g}", count(len(inside)), signed(sum(inside) / len(inside), 4)]
            )
    bands = (
        table(["Score in float", s.unit.capitalize(), "Mean shift"], rows, "", " nn") if len(rows) > 1 else ""
    )
    return join([el("h3", "Scores against the float network"), el("p", said), bands, scores(s)])
