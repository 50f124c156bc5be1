"""`edgekit inspect X`: what a bundle holds, without loading it into an engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from edgekit.bundle import Bundle
from edgekit.cli import plans, quantization
from edgekit.manifest import KernelStep, Segment
from edgekit.schema import printable, to_json
from edgekit.spec import DType, StateSpec, TensorSpec
from edgekit.toolchain.page import Facts, as_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what a bundle holds; every byte of it is checked on the way."
    parser.add_argument("bundle", type=Path, help="bundle file (*.edge) or folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--extract", type=Path, metavar="DIR", help="write the payload files below DIR")


def main(args: argparse.Namespace) -> int:
    """Runs the verb. Raises: BundleError, OutputError."""
    with Bundle.open(args.bundle) as bundle:
        if args.extract is not None:
            written = bundle.extract(args.extract)
            for path in written:
                print(f"wrote {path}", file=sys.stderr)
        if args.json:
            print(json.dumps(describe(bundle), indent=2))
        elif args.extract is None:
            print_human(bundle)
    return 0


def describe(bundle: Bundle) -> dict[str, Any]:
    """The bundle as JSON values; the keys are a contract (docs/bundle.md, "inspect --json")."""
    manifest = bundle.manifest
    return {
        "schema_version": manifest.schema_version,
        "model": manifest.model,
        "task": manifest.task,
        "target": manifest.target,
        "payload_digest": manifest.payload_digest,
        "inputs": [_tensor(manifest.tensor(name)) for name in manifest.inputs],
        "outputs": [_tensor(manifest.tensor(name)) for name in manifest.outputs],
        "states": [_state(state) for state in manifest.states],
        "payloads": [
            {
                "name": f"{segment.name}/{variant.name}",
                "segment": segment.name,
                "variant": variant.name,
                "backend": variant.backend,
                "precision": variant.precision,
                "format": variant.format,
                "path": variant.path,
                "bytes": variant.bytes,
                "digest": variant.digest,
                "options": to_json(variant.options),
            }
            for segment, variant in manifest.variants()
        ],
        "tuned": _tuned(bundle),
        "plan": [
            {
                "name": step.name,
                "kind": step.kind,
                **({"kernel": step.kernel} if isinstance(step, KernelStep) else {}),
                "inputs": list(step.inputs),
                "outputs": list(step.outputs),
            }
            for step in manifest.plan
        ],
        "pipeline": manifest.pipeline,
        "labels": list(_labels(manifest.pipeline)),
        "evidence": bundle.evidence,
        "provenance": manifest.provenance,
        "signature": None if bundle.signature is None else {"signed_by": bundle.signed_by, "checked": False},
        "files": {name: to_json(entry) for name, entry in manifest.files.items()},
        "bytes": bundle.nbytes,
    }


def _tuned(bundle: Bundle) -> list[dict[str, Any]]:
    """What was recorded on this machine about the variants, for each number of threads."""
    if all(len(s.variants) < 2 for s in bundle.manifest.plan if isinstance(s, Segment)):
        return []
    from edgekit.runtime import tuning

    return [
        {
            "threads": threads,
            "segments": {
                name: {"variant": variant, "why": record.why(name)} for name, variant in record.chosen.items()
            },
            "timings": [to_json(timing) for timing in record.timings],
            "refused": record.refused,
        }
        for threads, record in tuning.records(bundle.manifest).items()
    ]


def _here(bundle: Bundle) -> list[tuple[str, ...]]:
    """Rows about what runs on this machine, for bundles that leave a choice."""
    names = [s.name for s in bundle.manifest.plan if isinstance(s, Segment) and len(s.variants) > 1]
    tuned = _tuned(bundle)
    if names and not tuned:
        return [("not timed here yet: the first load does it, or edgekit tune",)]
    return [
        (
            name,
            f"{record['threads'] or 'default'} threads",
            record["segments"][name]["variant"],
            printable(record["segments"][name]["why"], 200),
        )
        for name in names
        for record in tuned
    ]


def _sparse(bundle: Bundle) -> list[tuple[str, ...]]:
    """Which layers of each payload are 2:4, and why others are not."""
    rows: list[tuple[str, ...]] = []
    for _, variant in bundle.manifest.variants():
        known = Facts(to_json(variant.options)).at("plan", "sparse")
        layers, dense = known.texts("layers", 2000), known.at("dense").value
        if not layers:
            continue
        by_reason: dict[str, list[str]] = {}
        for name in list(dense)[:2000]:
            by_reason.setdefault(as_text(dense[name], 80), []).append(name)
        rows.append((variant.path, f"{len(layers)} of {len(layers) + len(dense)} layers", _named(layers)))
        rows += [("", f"{len(names)} not: {why}", _named(names)) for why, names in by_reason.items()]
    return rows


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(printable(name, 40) for name in names[:8]) + more


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    known = to_json(tensor)
    assert isinstance(known, dict)
    return {**known, "elements": tensor.elements}


def _state(state: StateSpec) -> dict[str, Any]:
    known = to_json(state)
    assert isinstance(known, dict)
    return {**known, "elements": state.elements, "bytes": state.elements * state.dtype.itemsize}


def _states(states: Sequence[StateSpec]) -> list[tuple[str, ...]]:
    """One row a state: as the manifest types it, with the codes that a payload may hold instead."""
    return [
        (
            printable(s.name),
            s.dtype.value,
            _shape(s.shape),
            f"{s.elements:,} elements",
            _size(s.elements * s.dtype.itemsize),
            "" if s.quant is None else f"or {_held(s)}",
        )
        for s in states
    ]


def _stream(states: Sequence[StateSpec], lanes: int) -> list[tuple[str, ...]]:
    """What the states of one stream take in each type they may be held in, and when they end."""
    total = sum(s.elements for s in states) // lanes
    rows: list[tuple[str, ...]] = [
        *([("lanes", f"{lanes} streams in one run")] if lanes > 1 else []),
        ("states", str(len(states))),
        ("elements", f"{total:,}"),
        *((f"as {t.value}", _size(total * t.itemsize)) for t in (DType.float32, DType.float16, DType.int8)),
    ]
    steps = [s.nominal_dt_s for s in states if s.nominal_dt_s is not None]
    limits = [s.reset_after_s for s in states if s.reset_after_s is not None]
    rows += [("step", f"{steps[0]:g} s")] if steps else [("step", "every frame")]
    rows += [("ends", f"after {min(limits):g} s without a frame")] if limits else []
    return rows


def _held(state: StateSpec) -> str:
    assert state.quant is not None
    scale, zero = state.quant.scale, state.quant.zero_point
    shown = f"scale {scale[0]:.6g}, zero point {zero[0]}" if len(scale) == 1 else f"{len(scale)} scales"
    return f"{state.quant.dtype.value} codes, {shown}"


def _labels(pipeline: dict[str, Any]) -> tuple[str, ...]:
    labels = pipeline.get("labels", ())
    return tuple(str(label) for label in labels) if isinstance(labels, list) else ()


def print_human(bundle: Bundle, file: TextIO | None = None) -> None:
    """A page of text for people, to `file` (default: stdout)."""
    out = file or sys.stdout
    manifest = bundle.manifest

    def section(title: str, rows: Sequence[tuple[str, ...]]) -> None:
        if not rows:
            return
        print(f"\n{title}", file=out)
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
            print("  " + "  ".join(cells).rstrip(), file=out)

    name, size = printable(bundle.path.name, 200), _size(bundle.nbytes)
    print(f"{name}: {manifest.model} ({manifest.task}) for {manifest.target}, {size}", file=out)
    signed = (
        f"claims key {bundle.signed_by}, check with: edgekit verify --key PUB" if bundle.signed_by else "none"
    )
    section(
        "Identity",
        [
            ("payload digest", manifest.payload_digest),
            ("schema", str(manifest.schema_version)),
            ("signature", signed),
        ],
    )
    section("Inputs", [_row(manifest.tensor(name)) for name in manifest.inputs])
    section("Outputs", [_row(manifest.tensor(name)) for name in manifest.outputs])
    section("States", _states(manifest.states))
    section("State of one stream", _stream(manifest.states, manifest.lanes) if manifest.states else [])
    section("Plan", [_step(i, step.name, step) for i, step in enumerate(manifest.plan, start=1)])
    section(
        "Payloads",
        [
            (variant.path, variant.backend, variant.precision, _size(variant.bytes), variant.digest[:19])
            for _, variant in manifest.variants()
        ],
    )
    section("2:4 sparse weights", _clean(_sparse(bundle)))
    section("On this machine", _here(bundle))
    section("Steps", _clean(plans.steps(bundle.evidence)))
    section("Precision, and without some sensors", _clean(plans.path(bundle.evidence)))
    if "quantization" in bundle.evidence:
        e = bundle.evidence
        section("Variants", _clean(quantization.variants(e)))
        section("Left out", _clean(quantization.left_out(e)))
        section("Quantization", _clean(quantization.summary(e)))
        section("What the search saw, * kept", _clean([(line,) for line in quantization.trials(e)]))
        section("In float", _clean(quantization.floats(e)) or [("no node",)])
    labels = _labels(manifest.pipeline)
    if labels:
        more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
        section("Labels", [(str(len(labels)), ", ".join(printable(name, 40) for name in labels[:8]) + more)])
    shown = {k: v for k, v in bundle.evidence.items() if k not in ("quantization", "plan", "segments")}
    section("Evidence", _flat(shown))
    section("Provenance", _flat(manifest.provenance))


def _clean(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [tuple(printable(cell, 200) for cell in row) for row in rows]


def _step(number: int, name: str, step: Any) -> tuple[str, ...]:
    what = (
        f"kernel {printable(step.kernel)}"
        if isinstance(step, KernelStep)
        else f"network, {len(step.variants)} payload(s)"
    )
    names = [", ".join(printable(n, 40) for n in side) for side in (step.inputs, step.outputs)]
    return (f"{number}. {name}", what, f"{names[0]} -> {names[1]}")


def _row(tensor: TensorSpec) -> tuple[str, ...]:
    row = (printable(tensor.name), tensor.dtype.value, _shape(tensor.shape), printable(tensor.layout))
    if tensor.quant is None:
        return row
    q = tensor.quant
    scales = (
        f"scale {q.scale[0]:.6g}, zero point {q.zero_point[0]}"
        if len(q.scale) == 1
        else f"{len(q.scale)} scales"
    )
    return (*row, f"quantized: {scales}")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _size(count: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def _scalar(value: Any) -> str:
    if value is None:
        return "not known"
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value), 110)


def _flat(tree: dict[str, Any], prefix: str = "", limit: int = 40) -> list[tuple[str, ...]]:
    """Scalars of a table as (dotted key, value) rows; lists by their length."""
    rows: list[tuple[str, ...]] = []
    for key, value in tree.items():
        name = f"{prefix}{printable(str(key), 40)}"
        if isinstance(value, dict):
            rows += _flat(value, name + ".", limit)
        elif isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
            rows.append((name, f"{len(value)} entries (--json shows them)"))
        elif isinstance(value, list):
            text = ", ".join(map(_scalar, value))
            if len(text) <= 90:
                rows.append((name, text))
            else:
                rows += [(name if i == 0 else "", _scalar(item)) for i, item in enumerate(value)]
        else:
            rows.append((name, _scalar(value)))
    if len(rows) > limit:
        rows = [*rows[:limit], ("...", f"{len(rows) - limit} more (--json shows them)")]
    return rows
