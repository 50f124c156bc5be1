"""The main path for a plan folder: networks and kernels go in, one proven bundle per target comes out. Read from `build`
down."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit import __version__
from edgekit.backends.base import Payload
from edgekit.bundle import Bundle, write_bundle
from edgekit.dataset import DataSet
from edgekit.errors import UsageError
from edgekit.manifest import Golden
from edgekit.project import SEARCHES, ModelEntry
from edgekit.quant.search import Look
from edgekit.schema import to_json
from edgekit.target import Target
from edgekit.toolchain import cache, evidence, tasks
from edgekit.toolchain.build import Built, Options, plan
from edgekit.toolchain.plans import encoder, prove, quantize
from edgekit.toolchain.plans.moments import calibration_moments, evaluation_moments, moments
from edgekit.toolchain.plans.prove import Ground, Judged
from edgekit.toolchain.plans.quantize import Bench, Quantization
from edgekit.toolchain.plans.running import Payloads, PlanRunning, Workshop, manifest
from edgekit.toolchain.plans.source import PlanSource, read
from edgekit.toolchain.timing import is_here

Progress = Callable[[str, int, int], None]

AGREEMENT_MOMENTS = 18
DEFAULT = DataSet(source="synthetic://street-rig", seed=20_000, count=AGREEMENT_MOMENTS)
"""Of moments where the project gives none, for error figures and samples only; never for an accuracy claim."""


@dataclass
class Work:
    """What the targets of one build share; calibration and searches are added when the first needs them."""

    source: PlanSource
    shop: Workshop
    plain: Workshop
    """With all kernels in float32, where networks are searched."""
    ground: Ground
    options: Options
    encoders: Mapping[str, dict[str, Any]]
    """What was found out about sparse encoders that are to be INT8."""
    bench: Bench | None = None


def build(entry: ModelEntry, targets: Sequence[Target], options: Options, progress: Progress) -> list[Built]:
    """Build one bundle per target of a plan folder; as `toolchain.build.build`, which calls it.

    Raises: ModelError, CalibrationError, LoweringError, UsageError, EvidenceError, OutputError.
    """
    if entry.batch > 1 or options.shapes:
        raise UsageError(
            f"model {entry.name}: is a plan, whose shapes are fixed. Leave batch and --shape out"
        )
    plans = [plan(entry, target, options.precision) for target in targets]  # refuse before working
    progress(f"{entry.name}: read and prepare", 0, 1)
    source = read(entry)
    shop = plain = Workshop(encoder.in_float(source))
    floats = plain.open(quantize.floats(source, targets[0]))
    try:
        ground = grounds(entry, floats, options)
        encoders: dict[str, dict[str, Any]] = {}
        if encoder.wanted(source):
            progress(f"{entry.name}: sparse encoder in int8", 0, 1)
            source = encoder.calibrated(source, lambda: calibration_moments(entry))
            source, encoders = encoder.judged(source, floats, ground.frames)
            shop = Workshop(source)
        work = Work(source, shop, plain, ground, options, encoders)
        built = []
        for target, (backends, precision) in zip(targets, plans, strict=True):

            def report(what: str, done: int, of: int, name: str = target.name) -> None:
                progress(f"{name}: {what}", done, of)

            built.append(one(work, target, backends, precision, report))
        progress("done", len(targets), len(targets))
        return built
    finally:
        floats.session.close()
        for one_of in (shop, plain):
            one_of.close()


def grounds(entry: ModelEntry, floats: PlanRunning, options: Options) -> Ground:
    """What to prove on: the labelled moments, else those for calibration, else synthetic ones."""
    labelled = evaluation_moments(entry, floats.spec.labels, options.limit)
    if labelled is not None:
        found, what, why = labelled, labelled.name, ""
    else:
        why = tasks.half(entry.task).NO_LABELS
        given = entry.calibration
        found = moments(given or DEFAULT)
        what = found.name if given is not None else f"{found.name} (no moments were given)"
    count = min(AGREEMENT_MOMENTS, len(found))
    frames = tuple(found.read(i) for i in range(count))
    provenance = (
        {}
        if labelled is None
        else {"evaluation": labelled.name, "digest": labelled.digest, "moments": len(labelled)}
    )
    return Ground(floats, frames, what, labelled, why, provenance)


def one(work: Work, target: Target, backends: Sequence[str], precision: str, progress: Progress) -> Built:
    """Lower, prove and write for one target."""
    if precision == "int8":
        made, columns = quantized(work, target, backends, progress)
    else:
        made = None
        networks = work.source.networks
        payloads = {n: quantize.lowered(w, backends[0], target, precision) for n, w in networks.items()}
        columns = [prove.judge(work.shop, work.ground, payloads, precision, progress)]
    columns, left_out = passing(columns)
    shop, ground, first = work.shop, work.ground, columns[0]
    blame = f" (worst: {quantize.worst(made)})" if made is not None and quantize.worst(made) else ""
    verdict = evidence.require(
        first.verdict, work.source.entry.name, target.name, work.options.allow_drop, blame
    )
    first = dataclasses.replace(first, verdict=verdict)
    progress("golden values and samples", 0, 1)
    columns = [first, *columns[1:]]
    golden, files = prove.golden(shop, ground, [c.payloads for c in columns])
    samples, pictures = prove.samples(shop, ground, first.payloads, precision)
    modes = prove.modes(shop, ground, first.payloads, precision, progress)
    timed = is_here(target) and not first.simulated
    timing = prove.timing(shop, ground, first.payloads, progress) if timed else None
    record = facts(work, target, columns, made, left_out, timing, modes)
    record["samples"] = samples
    return write(work, target, columns, golden, {**files, **pictures}, record, progress)


def quantized(
    work: Work, target: Target, backends: Sequence[str], progress: Progress
) -> tuple[Quantization, list[Judged]]:
    """INT8 within the accuracy budget, as far as one was found: what was done, and each library's payloads judged.

    The preferred library decides which networks go back to float; the others follow it.
    """
    shop, ground = work.shop, work.ground
    if work.bench is None:
        data = calibration_moments(work.source.entry)
        work.bench = Bench.of(work.plain, ground.floats, data, work.options.quantization, progress)
    made = quantize.search(work.bench, target, backends, progress)
    order = list(made.columns)

    known: dict[tuple[bytes, ...], Judged] = {}

    def judged(payloads: Payloads) -> Judged:
        key = tuple(hashlib.sha256(payload.data).digest() for payload in payloads.values())
        if key not in known:
            known[key] = found = prove.judge(shop, ground, payloads, "int8", progress)
            part = {"float": sorted(made.given_back), "partly": sorted(made.tightened)}
            made.looks.append({**part, **to_json(found.look)})
        return known[key]

    while True:
        found = judged(made.columns[order[0]])
        name = quantize.worst(made)
        if found.verdict["passed"] is not False or name is None:
            break
        if name not in made.tightened and work.options.quantization in SEARCHES:
            column = made.columns[order[0]]

            def gate(payload: Payload, name: str = name, column: Payloads = column) -> Look:
                return judged({**column, name: payload}).look

            quantize.tighten(made, work.bench, target, name, gate, progress)
        else:
            quantize.give_back(
                made, work.bench, target, name, f"gave back to float: {found.verdict['reason']}"
            )
    others = [prove.judge(shop, ground, made.columns[b], f"int8 {b}", progress) for b in order[1:]]
    return made, [found, *others]


def passing(columns: Sequence[Judged]) -> tuple[list[Judged], dict[str, str]]:
    """Those within the limits, at least the first, and why the others are left out, by library."""
    kept = [c for c in columns if c.verdict["passed"] is not False] or list(columns[:1])
    left = {_library(c): c.verdict["reason"] for c in columns if c not in kept}
    return kept, left


def _library(column: Judged) -> str:
    return next(iter(column.payloads.values())).backend


def facts(
    work: Work, target: Target, columns: Sequence[Judged], made: Quantization | None, left_out: Mapping[str, str],
    timing: dict[str, Any] | None, modes: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The evidence, samples aside."""
    source, first = work.source, columns[0]
    networks, spec = source.networks.values(), work.shop.spec
    names = [step.kernel for step in source.kernels.values()]
    record: dict[str, Any] = {
        "model": {
            "source": source.file.path.resolve().parent.name,
            "sha256": source.digest,
            "parameters": sum(int(n.facts["parameters"]) for n in networks),
            "weight_bytes": sum(int(n.facts["weight_bytes"]) for n in networks)
            + sum(map(len, source.files.values())),
            "macs": sum(n.macs for n in networks),
            "nodes": sum(int(n.facts["nodes"]) for n in networks),
            "ops": _summed([n.facts["ops"] for n in networks]),
        },
        "graph": {
            "passes": [
                {**to_json(r), "name": f"{n.name}: {r.name}"} for n in networks for r in n.log if r.changed
            ],
            "head": {**tasks.half(spec.task).head_facts(spec), "outputs": list(source.file.outputs)},
            "input_rule": "input rule: as the plan says",
            "labels": "class names of the plan",
            "notes": [
                f"{name} stays float: {why}" for name, why in (made.given_back.items() if made else ())
            ],
        },
        "plan": [_step(work, step.name, columns, made) for step in source.file.steps],
        "payloads": {_column_name(column): _column(work, column) for column in columns},
        "agreement": first.agreement,
        "metric": first.metric,
        **({"modes": modes} if modes else {}),
        "timing": timing or {"not_measured": f"the bundle was not built on that board ({target.title})"},
        "accept": first.verdict,
        "limits": [
            *prove.limits(target, first, timing is not None, names),
            *prove.mode_limits(modes, source.entry.accept),
        ],
    }
    if made is not None:
        record["segments"] = segments(work, made, left_out, columns)
    return record


def _column_name(column: Judged) -> str:
    """`litert-int8`: the library, and the least precision of its payloads."""
    precisions = {payload.precision for payload in column.payloads.values()}
    return f"{_library(column)}-{next(p for p in ('int8', 'float16', 'float32') if p in precisions)}"


def _column(work: Work, column: Judged) -> dict[str, Any]:
    """What the evidence says of all payloads of one library together."""
    known = [evidence.payload_facts(payload) for payload in column.payloads.values()]
    name = column.metric.get("name")
    return {
        "backend": _library(column),
        "precision": _column_name(column).rpartition("-")[2],
        "bytes": sum(k["bytes"] for k in known),
        "weight_bytes": sum(k["weight_bytes"] for k in known),
        "outputs": column.outputs,
        "images": len(work.ground.frames),
        "pictures": work.ground.what,
        "run_by": column.run_by,
        "simulated": column.simulated,
        **({"metric": {name: column.metric["payload"][name], "drop": column.metric["drop"]}} if name else {}),
    }


def segments(
    work: Work, made: Quantization, left_out: Mapping[str, str], columns: Sequence[Judged]
) -> dict[str, Any]:
    """How the networks of the plan came to their precision."""
    bench = work.bench
    assert bench is not None
    return {
        "calibration": bench.moments.provenance,
        "max_error": quantize.MAX_ERROR,
        "looks": made.looks,
        "left_out": dict(left_out),
        "not_lowered": made.not_lowered,
        "columns": {
            _library(c): {**to_json(c.look), "drop_interval95": c.metric.get("drop_interval95")}
            for c in columns
        },
        "networks": {
            name: {
                "precision": "float" if name in made.given_back else "int8",
                "error": made.effects.get(name),
                **({"why": made.given_back[name]} if name in made.given_back else {}),
                **({"quantization": made.found[name].record} if name in made.found else {}),
            }
            for name in work.source.networks
        },
    }


def _step(work: Work, name: str, columns: Sequence[Judged], made: Quantization | None) -> dict[str, Any]:
    """A step as the evidence shows it."""
    source = work.source
    step = next(s for s in source.file.steps if s.name == name)
    shown: dict[str, Any] = {"name": name, "inputs": list(step.inputs), "outputs": list(step.outputs)}
    if step.when is not None:
        shown["when"] = step.when
    if step.kernel is not None:
        size = sum(len(source.files[path]) for path in source.kernels[name].files.values())
        known = {
            "precision": source.kernels[name].options.get("precision", "float32"),
            **work.encoders.get(name, {}),
        }
        return {**shown, "kernel": step.kernel, **known, "bytes": size, "runs_on": "CPU"}
    network = source.networks[name]
    first = columns[0].payloads[name]
    more = {"error": made.effects[name]} if made is not None and name in made.effects else {}
    return {
        **shown,
        "network": step.model,
        "repeat": step.repeat,
        "macs": network.macs,
        "parameters": network.facts["parameters"],
        "precision": first.precision,
        "bytes": len(first.data),
        "variants": list(dict.fromkeys(c.payloads[name].variant for c in columns)),
        **more,
    }


def _summed(tables: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for table in tables:
        for op, count in table.items():
            total[op] = total.get(op, 0) + count
    return dict(sorted(total.items()))


def write(
    work: Work, target: Target, columns: Sequence[Judged], golden: Golden, files: Mapping[str, bytes],
    record: dict[str, Any], progress: Progress,
) -> Built:  # fmt: skip
    """Write the bundle, whole or not at all. Raises: OutputError."""
    source, options = work.source, work.options
    entry, accept = source.entry, record["accept"]
    variants = {name: _distinct([c.payloads for c in columns], name) for name in source.networks}
    spec = entry.on(target.name).thresholds.apply(work.shop.spec)
    made, payload_files = manifest(source, variants, target.name, spec)
    data = dict(work.ground.provenance)
    if work.bench is not None and "segments" in record:
        data.update(work.bench.moments.provenance)
    made = dataclasses.replace(
        made,
        golden=golden,
        provenance={
            "edgekit": __version__,
            "model_sha256": source.digest,
            "data": data,
            "recipe": list(dict.fromkeys(r.name for n in source.networks.values() for r in n.log)),
            "tools": cache.tools(),
            **({"missed_limits": accept["reason"]} if accept["passed"] is False else {}),
        },
    )
    path = options.out / f"{entry.name}.{target.name}.edge"
    progress(f"write {path}", 0, 1)
    write_bundle(path, made, {**files, **payload_files}, record, sign_key=options.sign_key)
    with Bundle.open(path, verify=False) as written:
        digest = written.payload_digest
    return Built(path, target.name, entry.name, digest, path.stat().st_size, record)


def _distinct(columns: Sequence[Payloads], name: str) -> tuple[Payload, ...]:
    """The payloads of a network, one per library and precision, in the columns' order."""
    found: dict[str, Payload] = {}
    for payloads in columns:
        found.setdefault(payloads[name].variant, payloads[name])
    return tuple(found.values())
