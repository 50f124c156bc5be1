"""The part of the report about recurrent states: sizes, codes, time, and the error that they carry."""

from __future__ import annotations

from edgekit.spec import DType, StateSpec
from edgekit.toolchain.page import Facts, Markup, count, el, join, number, pairs, scaled, table
from edgekit.toolchain.report_sections import Subject

MAX_PAYLOADS = 8


def states(s: Subject) -> Markup:
    """For a bundle that has some."""
    held = s.bundle.manifest.states
    facts = s.evidence.at("states")
    lanes = s.bundle.manifest.lanes
    total = sum(state.elements for state in held) // lanes
    sizes = ", ".join(
        f"{scaled(total * t.itemsize, 'B')} {t.value}" for t in (DType.float32, DType.float16, DType.int8)
    )
    steps = [state.nominal_dt_s for state in held if state.nominal_dt_s is not None]
    limits = [state.reset_after_s for state in held if state.reset_after_s is not None]
    rows = [
        ("States", f"{len(held)}, {count(total)} elements"),
        ("Lanes", f"{lanes} streams in one run" if lanes > 1 else ""),
        ("Of one stream", sizes),
        ("Step", f"{steps[0]:g} s" if steps else "every frame is one step"),
        ("State ends", f"after {min(limits):g} s without a frame" if limits else "at a reset only"),
        *_origin(facts),
    ]
    return join([pairs(rows), _table(s, held), *_carried(s)])


def _origin(facts: Facts) -> list[tuple[str, str]]:
    clip = facts.at("clip_model")
    if not clip:
        return []
    frames, difference = clip.number("frames"), clip.number("difference")
    what = f"a clip model of {count(frames)} frames" if frames is not None else "a clip model"
    exact = "computes what it does" if clip.flag("exact") else "is another network than it"
    rows = [("Made from", f"{what}; the one-frame model {exact}")]
    if difference is not None:
        rows.append(("Largest difference to it", f"{number(difference, 2)} of the output's range"))
    drop = clip.at("metric").number("drop")
    if drop is not None:
        rows.append(("Drop against it", f"{drop:+.4f}"))
    return rows


def _table(s: Subject, held: tuple[StateSpec, ...]) -> Markup:
    """One row a state, with the SQNR of every payload that has some error."""
    payloads = [
        (name, s.evidence.at("payloads", name))
        for name in list(s.evidence.at("payloads").value)[:MAX_PAYLOADS]
    ]
    noisy = []
    for name, known in payloads:
        found = {t.text("tensor", 120): t.number("sqnr_db") for t in known.tables("states")}
        if any(value is not None for value in found.values()):
            noisy.append((name, found))
    rows = []
    for state in held:
        quant = state.quant
        codes = (
            "–"
            if quant is None
            else f"{quant.dtype.value}, scale {number(quant.scale[0], 3)}, zero {quant.zero_point[0]}"
        )
        errors = [
            None if f.get(state.name) is None else f"{number(f.get(state.name), 3)} dB" for _, f in noisy
        ]
        shape = " × ".join(map(str, state.shape))
        rows.append(
            [
                el("code", state.name),
                shape,
                count(state.elements),
                scaled(state.elements * state.dtype.itemsize, "B"),
                codes,
                *(e or "∞" for e in errors),
            ]
        )
    head = [
        "State",
        "Shape",
        "Elements",
        f"As {held[0].dtype.value}",
        "Or as codes",
        *(f"SQNR {name}" for name, _ in noisy),
    ]
    return table(head, rows, "wide", "  nn " + "n" * len(noisy))


def _carried(s: Subject) -> list[Markup]:
    """How the error of the outputs goes with the frames of a clip."""
    lines = []
    for name in list(s.evidence.at("payloads").value)[:MAX_PAYLOADS]:
        rms = [row.number("rms") for row in s.evidence.at("payloads", name).tables("by_frame")]
        if len(rms) > 1 and any(rms):
            shown = ", ".join(number(value, 2) for value in rms[:32])
            lines.append(
                el(
                    "p",
                    el("code", name),
                    f": rms error of the outputs by frame of a clip: {shown}.",
                    class_="legend",
                )
            )
    return lines
