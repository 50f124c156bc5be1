"""A comparison (`toolchain.compare`) as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.archive import write_atomic
from edgekit.optional import load_cv2
from edgekit.toolchain import plots
from edgekit.toolchain.compare import Comparison, Shown
from edgekit.toolchain.page import Markup, count, el, fixed, join, number, pairs, scaled, signed, table
from edgekit.toolchain.report import document, section
from edgekit.toolchain.report_sections import absent

WIDTH = 640
JPEG_QUALITY = 82
MAX_ROWS = 80
"""Layers and classes in a table: those that differ most."""


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page to `path`. Raises: OutputError, MissingExtraError without OpenCV."""
    write_atomic(path, [render(comparison).encode("utf-8")], "comparison")
    return path


def render(comparison: Comparison) -> str:
    """The page as text."""
    r = comparison.record
    a, b = r["a"], r["b"]
    title = f"{_title(b)} against {_title(a)}"
    content = el(
        "article",
        join(
            [
                el("p", "edgekit comparison", class_="eyebrow"),
                el("h1", title),
                el("p", f"{r['task']} · {r['pictures']['count']} pictures · both run on this machine", class_="lead"),
                _tiles(r),
                _notes(r),
                section("The two", "A is what B is compared with.", _sides(r)),
                section("Outputs", "Raw outputs of B against those of A, same pictures.", _outputs(r)),
                section("Results", "What comes out after decoding, A against B.", _results(r)),
                section("Pictures", "Where the two differ most.", _pictures(comparison.shown)),
                section("Accuracy", "The task's own metric on labelled pictures.", _metric(r)),
                section("Time", "Turn by turn on this machine, so that load hits both.", _time(r)),
                section("Layers", "What the evidence of each says about its layers.", _layers(r)),
            ]
        ),
    )  # fmt: skip
    return document(title, content, "Written by edgekit {}. Measured on the machine that wrote this page.")


def _title(side: Mapping[str, Any]) -> str:
    target = f" for {side['target']}" if side["target"] else ""
    return f"{side['model']}{target} ({side['variant']})"


def _tiles(r: Mapping[str, Any]) -> Markup:
    metric, found, latency, size = r["metric"], r["results"], r["latency"], r["size"]
    speed = latency.get("total", {}).get("ratio")
    key = metric.get("name", "Accuracy")
    measured = "not_measured" not in metric and metric["difference"] is not None
    shift = found["score_shift_max"]
    return el(
        "div",
        _tile(
            f"{key}, B − A",
            signed(metric["difference"], 4) if measured else "",
            f"{fixed(metric['a'][key], 3)} → {fixed(metric['b'][key], 3)}" if measured else "",
        ),
        _tile(
            f"{found['unit'].capitalize()} of A in B",
            f"{found['matched']} of {found['a']}",
            f"{found['new']} new" + (f", scores within {number(shift, 2)}" if shift is not None else ""),
        ),
        _tile(
            "Time, B / A",
            f"{speed:.2f} ×" if speed is not None else "",
            f"network alone {latency['engine']['ratio']:.2f} ×" if speed is not None else "",
        ),
        _tile(
            "Payload, B / A",
            f"{size['ratio']:.2f} ×" if size["ratio"] is not None else "",
            f"{scaled(size['a_bytes'], 'B')} → {scaled(size['b_bytes'], 'B')}",
        ),
        class_="tiles",
    )


def _tile(what: str, value: str, more: str) -> Markup:
    shown = el("b", value) if value else el("b", "not measured", class_="none")
    return el("div", el("div", what, class_="what"), shown, el("div", more, class_="more"), class_="tile")


def _notes(r: Mapping[str, Any]) -> Markup:
    lines = [*r["notes"]]
    lines += [
        f"{letter}: {r[key]['warning']}." for key, letter in (("a", "A"), ("b", "B")) if r[key]["warning"]
    ]
    if "not_measured" in r["metric"]:
        lines.append(f"Accuracy was not measured: {r['metric']['not_measured']}.")
    if not lines:
        return Markup("")
    items = el("ul", join(el("li", line) for line in lines))
    return el("div", el("h2", "To know before reading on"), items, class_="missing")


def _sides(r: Mapping[str, Any]) -> Markup:
    def block(letter: str, side: Mapping[str, Any]) -> Markup:
        size = side["bundle_bytes"]
        rows = [
            ("File", Path(side["path"]).name),
            ("Model", side["model"]),
            ("Target", side["target"]),
            ("Runs", side["variant"]),
            ("Why", side["why"]),
            ("Precision", side["precision"]),
            ("Library", side["library"]),
            ("Bundle", scaled(size, "B") if size is not None else ""),
            ("Digest", el("code", side["payload_digest"][:26] + "…") if side["payload_digest"] else ""),
        ]
        return el("div", el("h3", letter), pairs(rows))

    return el("div", block("A", r["a"]), block("B", r["b"]), class_="split")


def _outputs(r: Mapping[str, Any]) -> Markup:
    if "not_compared" in r["outputs"]:
        return absent(r["outputs"]["not_compared"])
    rows = []
    for t in r["outputs"]["tensors"]:
        span = t["range"]
        width = span[1] - span[0] if span else 0.0
        shares = [t[k] / width if t[k] is not None and width > 0 else None for k in ("rms", "max_abs")]
        exact = t["max_abs"] == 0
        rows.append(
            [
                el("code", t["tensor"]),
                plots.error_bar(*shares),
                "exact" if exact else number(t["mean_abs"], 2),
                "exact" if exact else number(t["max_abs"], 2),
                "∞" if exact else (f"{number(t['sqnr_db'], 3)} dB" if t["sqnr_db"] is not None else "–"),
                f"{number(span[0], 3)} … {number(span[1], 3)}" if span else "–",
            ]
        )
    head = ["Output", "Difference / range, 10⁻⁹ to 1", "Mean", "Largest", "SQNR", "Range in A"]
    bad = sum(t["not_finite"] for t in r["outputs"]["tensors"])
    legend = "Bar: rms difference as a share of the output's range, logarithmic; mark: the largest."
    if bad:
        legend += f" {bad} values are NaN or infinite on one side and left out."
    return join([table(head, rows, "", " bnnnn"), el("p", legend, class_="legend")])


def _results(r: Mapping[str, Any]) -> Markup:
    found = r["results"]
    unit, shift = found["unit"], found["score_shift_mean"]
    facts = pairs(
        [
            ("Pictures", f"{r['pictures']['count']}, {r['pictures']['what']}"),
            ("In A", f"{count(found['a'])} {unit}"),
            ("In B", f"{count(found['b'])} {unit}"),
            ("Matched", f"{count(found['matched'])}, {found['lost']} of A lost, {found['new']} new in B"),
            (
                "Score shift",
                f"mean {signed(shift, 4)}, largest {number(found['score_shift_max'], 2)}"
                if shift is not None
                else "",
            ),
            ("Best that is lost", fixed(found["lost_score_max"], 3) if found["lost_score_max"] else ""),
        ]
    )
    points = [(p[0], p[1]) for p in found["pairs"] or []]
    if not points:
        return join([facts, el("p", "Nothing matched to plot.", class_="legend")])
    shifts = [y - x for x, y in points]
    right = (
        plots.histogram(shifts, across="score difference, B − A")
        if any(shifts)
        else el("p", f"All {len(shifts)} plotted scores are equal to four decimals.", class_="absent")
    )
    left = plots.scatter(points, "score in A (across), in B (up)", "Score of each match: B over A")
    return join(
        [
            facts,
            el("h3", f"Scores of {len(points)} matches"),
            el("div", el("figure", left), el("figure", right), class_="split"),
        ]
    )


def _metric(r: Mapping[str, Any]) -> Markup:
    m = r["metric"]
    if "not_measured" in m:
        return absent(m["not_measured"])
    rows = []
    for name in dict.fromkeys([*m["a"], *m["b"]]):
        a, b = m["a"].get(name), m["b"].get(name)
        if not all(isinstance(v, float) and 0 <= v <= 1 for v in (a, b)):
            continue
        bars = el("div", plots.bar(a, "base", 5), plots.bar(b, height=5), class_="two")
        rows.append([name, bars, fixed(a, 4), fixed(b, 4), signed(b - a, 4)])
    legend = [el("span", el("i", class_="key base"), "A"), el("span", el("i", class_="key"), "B")]
    paired = m["difference_interval95"]
    if paired:
        low, high = (signed(v, 4) for v in paired)
        legend.append(
            el("span", f"95 % of the {m['name']} difference, over resampled {m['of']}: {low} to {high}")
        )
    parts = [
        pairs([(m["of"].capitalize(), f"{count(m['images'])} · {m['data']}")]),
        table(["", "", "A", "B", "B − A"], rows, "", " bnnn"),
        el("p", join(legend), class_="legend"),
    ]
    known = [(n, a, b) for n, (a, b) in m["per_class"].items() if a is not None and b is not None]
    changed = sorted(
        (row for row in known if round(row[2] - row[1], 3)), key=lambda row: (row[2] - row[1], row[0])
    )
    equal = len(known) - len(changed)
    if changed:
        shown = [
            [
                n,
                el("div", plots.bar(a, "base", 5), plots.bar(b, height=5), class_="two"),
                fixed(a, 3),
                fixed(b, 3),
                signed(b - a, 3),
            ]
            for n, a, b in changed[:MAX_ROWS]
        ]
        parts += [el("h3", f"{m['name']} of the classes that changed, largest loss first")]
        parts += [table(["Class", "", "A", "B", "B − A"], shown, "tight", " bnnn")]
    if equal:
        parts.append(
            el("p", f"{equal} of {len(known)} classes are equal to three decimals.", class_="legend")
        )
    return join(parts)


def _time(r: Mapping[str, Any]) -> Markup:
    latency = r["latency"]
    if "not_measured" in latency:
        return absent(latency["not_measured"])
    rows = []
    parts = (("engine", "Network alone"), ("total", "Picture to result"))
    scale = max(
        max(latency[k][f"{s}_quartiles_ms"][1], latency[k][f"{s}_ms"]) for k, _ in parts for s in "ab"
    )
    for key, name in parts:
        for side in "ab":
            t = latency[key]
            low, high = t[f"{side}_quartiles_ms"]
            rows.append(
                [
                    f"{name}, {side.upper()}",
                    plots.range_line(t[f"{side}_ms"], high, None, scale),
                    fixed(t[f"{side}_ms"], 3),
                    f"{fixed(low, 3)} … {fixed(high, 3)}",
                    f"{t['ratio']:.2f} ×" if side == "b" else "",
                ]
            )
    machine = latency["machine"]
    threads = machine["threads"] or "the library's choice"
    return join(
        [
            pairs(
                [("Machine", machine["cpu"]), ("Cores", count(machine["cores"])), ("Threads", str(threads))]
            ),
            el("h3", "Milliseconds"),
            table(["", "", "Median", "Quartiles", "B / A"], rows, "", " bnnn"),
            el(
                "p",
                "B / A: median of the rounds' own ratios. Where this machine is not the target, it says nothing of the target.",
                class_="legend",
            ),
        ]
    )


def _layers(r: Mapping[str, Any]) -> Markup:
    layers = r["layers"]
    if "not_compared" in layers:
        return absent(layers["not_compared"])

    def loss(row: Mapping[str, Any]) -> float:
        a, b = ((row[side] or {}).get("sqnr_db") for side in "ab")
        return b - a if a is not None and b is not None else (b if b is not None else 999.0)

    def share(row: Mapping[str, Any]) -> float:
        return max((row[side] or {}).get("share") or 0.0 for side in "ab")

    ranked = sorted(layers["layers"], key=lambda row: (-share(row), loss(row), row["id"]))
    rows = []
    for row in ranked[:MAX_ROWS]:
        ends = [row[side] or {} for side in "ab"]
        a, b = (end.get("sqnr_db") for end in ends)
        rows.append(
            [
                el("code", row["id"][-60:]),
                row["op"],
                *(end.get("precision") or "–" for end in ends),
                fixed(a, 1),
                fixed(b, 1),
                signed(b - a, 1) if a is not None and b is not None else "–",
                f"{100 * (ends[1].get('share') or 0):.1f} %" if ends[1].get("share") is not None else "–",
            ]
        )
    head = ["Layer", "Operator", "A", "B", "SQNR A", "SQNR B", "B − A", "Share in B"]
    note = f"SQNR in dB. Share: of the output's error, by the layer. {layers['note']}"
    if len(ranked) > MAX_ROWS:
        note += f" {len(ranked) - MAX_ROWS} more layers are in the JSON."
    return join([table(head, rows, "wide", "    nnnn"), el("p", note, class_="legend")])


def _pictures(shown: Sequence[Shown]) -> Markup:
    rows = []
    for one in shown:
        figures = [
            el(
                "figure",
                el("img", src=_jpeg(result.draw(one.image)), alt=f"{letter}: {result.caption()}"),
                el("figcaption", el("b", letter), f": {result.caption()}" + (f" · {one.caption}" if letter == "B" else "")),
            )
            for letter, result in zip("AB", one.results, strict=True)
        ]  # fmt: skip
        rows.append(el("div", *figures, class_="split pair"))
    return join(rows)


def _jpeg(image: np.ndarray) -> str:
    cv2 = load_cv2("draw the comparison's pictures")
    if image.shape[1] > WIDTH:
        height = max(1, round(image.shape[0] * WIDTH / image.shape[1]))
        image = cv2.resize(image, (WIDTH, height), interpolation=cv2.INTER_AREA)
    ok, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert ok, "a valid picture encodes"
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode('ascii')}"
