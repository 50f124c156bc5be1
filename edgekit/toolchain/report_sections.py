"""The sections of a bundle's report; each is a function of the bundle and its evidence."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgekitError
from edgekit.target import Target
from edgekit.toolchain import plots
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

if TYPE_CHECKING:
    from edgekit.bundle import Bundle
    from edgekit.spec import TensorSpec

STAGES = ("preprocess", "engine", "decode", "total")
MAX_SAMPLES = 24
MAX_SAMPLE_BYTES = 4 << 20


@dataclass(frozen=True)
class Subject:
    """A bundle and its evidence, with what the caller added."""

    bundle: Bundle
    evidence: Facts

    @property
    def target(self) -> Target | None:
        """The board's facts; None when it is not known here, or is whatever machine built the bundle."""
        name = self.bundle.manifest.target
        return Target.load(name) if name != "host" and name in Target.names() else None

    @property
    def title(self) -> str:
        name = self.bundle.manifest.target
        if name == "host":
            return "the machine that built it"
        return self.target.title if self.target else name

    @property
    def precision(self) -> str:
        return ", ".join(sorted({v.precision for _, v in self.bundle.manifest.variants()}))

    @property
    def payload_bytes(self) -> int:
        return sum(v.bytes for _, v in self.bundle.manifest.variants())

    @property
    def input(self) -> str:
        """What the network answers, singular."""
        return "moment" if self.bundle.manifest.task == "fusion" else "picture"

    @property
    def unit(self) -> str:
        """What the task's agreement counts, plural."""
        return self.evidence.at("agreement").text("unit", 20) or "boxes"

    def why_not(self, key: str) -> str:
        """Why a part of the evidence is missing, or "" when it is there."""
        found = self.evidence.at(key)
        if "not_measured" in found.value:
            return found.text("not_measured") or "the build recorded no reason"
        return "" if found else "the build recorded nothing about it"


def absent(reason: str) -> Markup:
    """In place of a section's content: not measured, and why."""
    return el("p", el("b", "Not measured."), " ", sentence(reason), class_="absent")


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", "…")) else ".")


def built(s: Subject) -> Markup:
    m, model = s.bundle.manifest, s.evidence.at("model")
    macs, parameters = model.number("macs"), model.number("parameters")
    network = pairs(
        [
            ("Network", model.text("source") or m.model),
            ("Parameters", scaled(parameters, "") if parameters is not None else ""),
            (f"Work per {s.input}", scaled(macs, "MAC") if macs is not None else ""),
            ("ONNX opset", model.text("opset")),
            ("Input", join((_tensor(m.tensor(name)) for name in m.inputs), ", ")),
            *_pipeline(Facts(m.pipeline)),
        ]
    )
    payloads = s.evidence.at("payloads")
    several = len(m.plan) > 1  # then they are the sums of a library's payloads
    rows = []
    for segment, v in m.variants():
        weights = None if several else payloads.at(v.name).number("weight_bytes")
        share = f", {v.bytes / weights:.3f} × its weights" if weights else ""
        rows.append(
            [
                f"{segment.name}/{v.name}",
                v.backend,
                v.precision,
                scaled(v.bytes, "B") + share,
                el("code", v.digest[:19] + "…"),
            ]
        )
    return join(
        [
            el(
                "div",
                el("div", el("h3", "Model"), network),
                el("div", el("h3", "Target"), _board(s)),
                class_="split",
            ),
            el("h3", "Payloads"),
            table(["Payload", "Backend", "Precision", "Size", "Digest"], rows),
        ]
    )


def _tensor(t: TensorSpec) -> Markup:
    shape = " × ".join(map(str, t.shape))
    return join([el("code", t.name), f" {shape} {t.dtype.value}" + (f" {t.layout}" if t.layout else "")])


def _pipeline(p: Facts) -> list[tuple[str, str]]:
    """What the task does around the network."""
    rule, labels = p.at("preprocess"), p.texts("labels", 10_000)
    names = ", ".join(labels[:6]) + (f" and {len(labels) - 6} more" if len(labels) > 6 else "")
    kept = [(p.number("score_threshold"), "score ≥ {}"), (p.number("iou_threshold"), "NMS IoU {}")]
    mean, std = ("/".join(rule.texts(k)) for k in ("mean", "std"))
    side, best = rule.number("shorter_side"), p.number("top_k")
    activation = p.text("activation", 20).replace("none", "as the network gives them")
    steps = [
        rule.text("resize", 40) + (f" of {plain(side)}" if side is not None else ""),
        rule.text("color", 10),
        f"mean {mean}" if mean else "",
        f"std {std}" if std else "",
    ]
    return [
        ("Preprocessing", ", ".join(filter(None, steps))),
        ("Decoding", p.at("head").text("family", 40)),
        ("Scores", activation),
        (
            "Classes listed" if best is not None else "Boxes kept",
            ", ".join(
                [f"best {plain(best)}"] * (best is not None)
                + [t.format(plain(v)) for v, t in kept if v is not None]
            ),
        ),
        (f"{len(labels)} classes", names),
    ]


def _board(s: Subject) -> Markup:
    name, board = s.bundle.manifest.target, s.target
    if board is None:
        cpu = s.evidence.at("timing", "machine").text("cpu")
        why = (
            "The machine that built the bundle."
            if name == "host"
            else "Facts of this board are not known here."
        )
        return pairs([("Name", name), ("CPU", cpu), ("", why)])
    gpu, software = board.gpu, board.software[0] if board.software else None
    rates = [(gpu.int8_tops, "int8 TOPS"), (gpu.fp16_tflops, "fp16 TFLOPS")] if gpu is not None else []
    return pairs(
        [
            ("Board", board.title),
            ("CPU", ", ".join(f"{c.cores} × {c.name}{_clock(c.clock_hz)}" for c in board.cpus)),
            ("GPU", f"{gpu.name}, {gpu.sms} SMs, compute {gpu.compute_capability}" if gpu else ""),
            ("Dense peak", ", ".join(f"{number(v)} {unit}" for v, unit in rates if v)),
            ("Memory", f"{board.dram_bytes / 2**30:.3g} GiB, {scaled(board.dram_bytes_per_s, 'B/s')}"),
            ("Software", " · ".join(filter(None, [
                software.os,
                f"JetPack {software.jetpack}" if software.jetpack else "",
                f"TensorRT {software.tensorrt}" if software.tensorrt else "",
                f"CUDA {software.cuda}" if software.cuda else "",
            ])) if software else ""),
        ]
    )  # fmt: skip


def _clock(hertz: float | None) -> str:
    return f" at {hertz / 1e9:.2g} GHz" if hertz else ""


def graph(s: Subject) -> Markup:
    found, model = s.evidence.at("graph"), s.evidence.at("model")
    passes, ops, head = found.tables("passes"), model.numbers("ops"), found.at("head")
    if not passes and not ops and not head:
        return absent(s.why_not("graph"))
    parts: list[str] = []
    outputs_ = ", ".join(head.texts("outputs"))
    facts = [
        ("Head found", head.text("found") or head.text("family")),
        ("Its outputs", outputs_),
        ("Input rule", found.text("input_rule").removeprefix("input rule: ")),
        ("Class names", found.text("labels")),
        ("Assumed", "; ".join(found.texts("notes"))),
    ]
    if any(value for _, value in facts):
        parts.append(pairs(facts))
    if passes:
        most = max([p.number("nodes_before") or 0 for p in passes] + [1])
        rows = [
            [
                join(
                    [p.text("name", 80), el("div", p.text("note"), class_="note") if p.text("note") else ""]
                ),
                plots.bar(
                    (p.number("nodes_after") or 0) / most,
                    "base" if p.flag("changed") is False or p.number("changed") == 0 else "fill",
                ),
                f"{count(p.number('nodes_before'))} → {count(p.number('nodes_after'))}",
                number(p.number("max_abs_diff"), 2),
            ]
            for p in passes
        ]
        parts += [
            el("h3", "Passes"),
            table(["Pass", "Nodes left", "Before → after", "Max diff"], rows, "", " bnn"),
        ]
        parts.append(
            el(
                "p",
                "Max diff: largest difference of any output, before against after the pass; – means not compared.",
                class_="legend",
            )
        )
    if ops:
        ranked = sorted(ops.items(), key=lambda item: (-item[1], item[0]))
        top, rest = ranked[:10], ranked[10:]
        most = max(1.0, ranked[0][1])
        lines = [[el("code", k[:60]), plots.bar(v / most), count(v)] for k, v in top]
        title = f"Operators ({count(sum(ops.values()))} nodes)"
        parts += [el("h3", title), table(["Operator", "", "Nodes"], lines, "tight", " bn")]
        if rest:
            parts.append(
                el("p", "And " + ", ".join(f"{k[:60]} {count(v)}" for k, v in rest[:60]), class_="legend")
            )
    return join(parts)


def outputs(s: Subject) -> Markup:
    reason = s.why_not("payloads")
    if reason:
        return absent(reason)
    parts: list[Markup] = []
    for name in list(s.evidence.at("payloads").value)[:16]:
        known = s.evidence.at("payloads", name)
        rows = []
        for t in known.tables("outputs"):
            span = t.interval("range")
            width = span[1] - span[0] if span else 0.0
            rms, worst = t.number("rms"), t.number("max_abs")
            shares = [v / width if v is not None and width > 0 else None for v in (rms, worst)]
            sqnr = t.number("sqnr_db")
            exact = worst == 0
            rows.append(
                [
                    el("code", t.text("tensor", 120)),
                    plots.error_bar(*shares),
                    "exact" if exact else number(rms, 2),
                    "exact" if exact else number(worst, 2),
                    "∞" if exact else (f"{number(sqnr, 3)} dB" if sqnr is not None else "–"),
                    f"{number(span[0], 3)} … {number(span[1], 3)}" if span else "–",
                ]
            )
        title = " · ".join(
            filter(None, [as_text(name, 80), known.text("backend", 40), known.text("precision", 40)])
        )
        images, what = known.number("images"), known.text("pictures")
        parts.append(el("h3", title))
        if rows:
            parts.append(
                table(
                    ["Output", "Error / range, 10⁻⁹ to 1", "rms", "Largest", "SQNR", "Range"],
                    rows,
                    "",
                    " bnnnn",
                )
            )
        else:
            parts.append(absent("the build recorded no output errors for this payload"))
        if images:
            parts.append(
                el(
                    "p",
                    f"Over {images:.0f} {s.input}s" + (f": {what}" if what else "") + ".",
                    class_="legend",
                )
            )
    legend = "Bar: rms error as a share of the output's range, logarithmic; mark: the largest error."
    return join([*parts, el("p", legend, class_="legend")])


def agreement(s: Subject, plotted_elsewhere: bool = False) -> Markup:
    reason = s.why_not("agreement")
    if reason:
        return absent(reason)
    a = s.evidence.at("agreement")
    points = a.points("pairs")
    unit = s.unit
    wanted, matched, own = (a.number(f"{unit}_{k}") for k in ("reference", "matched", "payload"))
    facts = pairs(
        [
            ("Pictures", count(a.number("images"))),
            ("Float network", f"{count(wanted)} {unit}"),
            ("Payload", f"{count(own)} {unit}" if own is not None else ""),
            ("Found again", f"{count(matched)} {unit}" + (f" ({100 * matched / wanted:.1f} %)" if wanted and matched is not None else "")),
            ("Score difference", f"mean {_number_signed(a.number('score_shift_mean'))}, largest {number(a.number('score_shift_max'), 2)}"
             if a.number("score_shift_max") is not None else ""),
        ]
    )  # fmt: skip
    if not points:
        return join([facts, el("p", f"No matched {unit} to plot.", class_="legend")])
    return join([facts, Markup("") if plotted_elsewhere else scores(s)])


def scores(s: Subject) -> Markup:
    """Scores of the payload over those of the float network, and how far they moved."""
    points = s.evidence.at("agreement").points("pairs")
    if not points:
        return Markup("")
    shifts = [b - a for a, b in points]
    right = (
        plots.histogram(shifts)
        if any(shifts)
        else el("p", f"All {len(shifts)} plotted scores are equal to four decimals.", class_="absent")
    )
    title = f"Scores of {len(points)} " + ("matched boxes" if s.unit == "boxes" else "pictures")
    figures = el("div", el("figure", plots.scatter(points)), el("figure", right), class_="split")
    return join([el("h3", title), figures])


def _number_signed(value: float | None) -> str:
    shown = number(value, 2)
    return f"+{shown}" if value is not None and value > 0 else shown


def metric(s: Subject) -> Markup:
    reason = s.why_not("metric")
    if reason:
        return absent(reason)
    m, accept = s.evidence.at("metric"), s.evidence.at("accept")
    key, unit = m.text("name", 20) or "AP", m.text("of", 20) or "pictures"
    reference, payload = m.numbers("reference", 20), m.numbers("payload", 20)
    low_high = m.interval("interval95")
    rows = []
    for name in [key, *(k for k in {**reference, **payload} if k != key)]:
        base, got = reference.get(name), payload.get(name)
        low, high = low_high if low_high and name == key else (None, None)
        rows.append(
            [
                name[:40],
                el(
                    "div",
                    plots.bar(base or 0, "base", 5),
                    plots.bar_interval(got or 0, low, high),
                    class_="two",
                ),
                fixed(base, 3),
                fixed(got, 3),
                signed(got - base, 4) if got is not None and base is not None else "–",
            ]
        )
    legend = [
        el("span", el("i", class_="key base"), "float network"),
        el("span", el("i", class_="key"), "payload"),
    ]
    if low_high:
        legend.append(
            el("span", f"whisker: 95 % of {key}, {fixed(low_high[0], 3)} to {fixed(low_high[1], 3)}")
        )
    parts: list[Markup] = [
        pairs(
            [
                (unit.capitalize(), " · ".join(filter(None, [count(m.number("images")), m.text("data")]))),
                ("Measured by", m.text("measured_by")),
            ]
        ),
        el("h3", "Float network and payload"),
        table(["", "", "Float", "Payload", "Change"], rows, "", " bnnn"),
        el("p", join(legend), class_="legend"),
    ]
    drop, limit = m.number("drop"), accept.number("max_drop")
    if drop is not None and limit is not None:
        parts += [
            el("h3", f"Drop of {key}: {signed(drop, 4)}, accepted up to {plain(limit)}"),
            plots.drop_line(drop, limit),
        ]
        paired = m.interval("drop_interval95")
        if paired is not None:
            text = (
                f"95 % of the drop, over resampled {unit}: {signed(paired[0], 4)} to {signed(paired[1], 4)}."
            )
            parts.append(el("p", text, class_="legend"))
    wrong = [
        [t.text("truth", 60), t.text("answer", 60), count(t.number("pictures"))]
        for t in m.tables("confusions", 10)
    ]
    if wrong:
        parts += [
            el("h3", "Most frequent mistakes, payload"),
            table(["Truth", "Answer", unit.capitalize()], wrong, "tight", "  n"),
        ]
    classes = sorted(m.numbers("per_class", 400).items(), key=lambda item: (-item[1], item[0]))
    if classes:
        lines = (
            el(
                "div",
                el("span", name[:60], title=name[:200]),
                plots.bar(v),
                el("span", fixed(v, 3)),
                class_="row",
            )
            for name, v in classes
        )
        parts += [el("h3", f"{key} of each class, payload"), el("div", join(lines), class_="classes")]
    return join(parts)


def timing(s: Subject) -> Markup:
    reason = s.why_not("timing")
    if reason:
        return absent(reason)
    t = s.evidence.at("timing")
    machine, stages = t.at("machine"), t.at("stages")
    order = [k for k in STAGES if k in stages.value]
    known = [(k, stages.at(k)) for k in [*order, *(k for k in stages.value if k not in STAGES)][:20]]
    values = [
        v
        for _, stage in known
        for k in ("median_ms", "p95_ms", "p99_ms")
        if (v := stage.number(k)) is not None
    ]
    scale = max(values, default=0.0)
    if scale <= 0:
        return absent("the build recorded no stage times")
    rows = []
    for name, stage in known:
        median, p95, p99 = (stage.number(k) for k in ("median_ms", "p95_ms", "p99_ms"))
        rows.append(
            [
                name[:40],
                plots.range_line(median, p95, p99, scale) if median is not None else "",
                fixed(median, 3),
                fixed(p95, 3),
                fixed(p99, 3),
                count(stage.number("runs")),
            ]
        )
    cores, threads = machine.number("cores"), machine.number("threads")
    return join(
        [
            pairs(
                [
                    ("Machine", machine.text("cpu")),
                    ("Cores", count(cores) if cores is not None else ""),
                    ("Threads", ("chosen by the library" if threads == 0 else count(threads)) if threads is not None else ""),
                    ("System", machine.text("os")),
                    ("Picture", " × ".join(t.texts("image"))),
                ]
            ),
            el("h3", "Milliseconds per picture"),
            table(["Stage", "", "Median", "p95", "p99", "Runs"], rows, "", " bnnnn"),
            el("p", f"Bar: median; line: on to p95 and p99. Full width is {number(scale)} ms. {t.text('note')}", class_="legend"),
        ]
    )  # fmt: skip


def samples(s: Subject) -> Markup:
    shown = [_sample(s.bundle, f) for f in s.evidence.tables("samples", MAX_SAMPLES)]
    if not shown:
        return el("p", "The build recorded no pictures.", class_="absent")
    return el("div", join(shown), class_="split")


def _sample(bundle: Bundle, sample: Facts) -> Markup:
    name, caption = sample.text("file"), sample.text("caption")
    try:
        data = bundle.read(name)
    except EdgekitError as error:
        return el("p", el("b", "Picture missing. "), str(error), class_="absent")
    kind = _picture_type(bytes(data[:12]))
    if kind is None or len(data) > MAX_SAMPLE_BYTES:
        return el(
            "p", el("b", "Picture left out. "), f"{name} is not a JPEG or PNG of a fit size.", class_="absent"
        )
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return el("figure", el("img", src=source, alt=caption or "sample picture"), el("figcaption", caption))


def _picture_type(head: bytes) -> str | None:
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "png" if head.startswith(b"\x89PNG\r\n\x1a\n") else None


def provenance(s: Subject) -> Markup:
    m = s.bundle.manifest
    rows = [("Bundle", s.bundle.path.name), ("Payload digest", el("code", m.payload_digest))]
    rows += [(k, el("code", v)) for k, v in _flat(m.provenance)]
    entries = sorted(m.files.items())[:200]
    table_ = table(
        ["File", "Bytes", "SHA-256"],
        [[el("code", name), f"{entry.bytes:,}", el("code", entry.sha256)] for name, entry in entries],
        "wide",
        " n ",
    )
    return join([pairs(rows), el("h3", "Files"), table_])


def _flat(value: Any, prefix: str = "", depth: int = 4) -> list[tuple[str, str]]:
    """A JSON tree as rows of text, at most 200."""
    if isinstance(value, Mapping) and depth:
        rows = [row for k, v in value.items() for row in _flat(v, f"{prefix} {k}".strip()[:80], depth - 1)]
        return rows[:200]
    if isinstance(value, (list, tuple)):
        return [(prefix, ", ".join(filter(None, map(as_text, value[:40]))))]
    return [(prefix, as_text(value))]
