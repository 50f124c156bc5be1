"""The main path: a model file goes in, a proven bundle comes out. Read from `build` down."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from edgekit import __version__, frontends
from edgekit.backends.base import Payload
from edgekit.bundle import Bundle, make_variant, write_bundle
from edgekit.errors import ModelError, UsageError, printable
from edgekit.frontends import torch_module
from edgekit.manifest import SCHEMA_VERSION, Golden, Manifest, Segment
from edgekit.passes import Prepared, prepare
from edgekit.passes.graph_facts import facts
from edgekit.passes.states import states as graph_states
from edgekit.project import SEARCHES, ModelEntry
from edgekit.quant.search import Look, Quantized
from edgekit.schema import to_json
from edgekit.signing import check_private_key
from edgekit.spec import StateSpec
from edgekit.target import Target
from edgekit.tasks import Spec
from edgekit.toolchain import arm_count, batch, cache, evidence, packing, quantize, recurrent, tasks
from edgekit.toolchain.accuracy import lost_by_conversion, metric
from edgekit.toolchain.data import Pictures, calibration_set, pictures
from edgekit.toolchain.lowering import of_pictures
from edgekit.toolchain.running import Footage, Running, Subject, frames, results, run_here
from edgekit.toolchain.timing import compare_here, fastest, is_here, time_here

Progress = Callable[[str, int, int], None]
"""progress(what, done, of)"""

AGREEMENT_IMAGES = 16
SAMPLE_IMAGES = 3


@dataclass(frozen=True)
class Options:
    """What the caller of a build may choose beyond the model entry.

    precision: `auto` takes the target's default. sign_key: PEM file of an Ed25519 private key.
    allow_drop: write the bundle, marked, even when it misses its accuracy budget.
    quantization: for int8, one of project.QUANTIZATIONS: a search, or a plain range scheme without repairs.
    qat_steps: batches of a training, where the search has one.
    weights_codec: of compression/codecs.py, "" = none: float32 weights are stored in few bits (toolchain/packing.py).
    """

    out: Path
    precision: str = "auto"
    sign_key: Path | None = None
    allow_drop: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Sizes for inputs that the file leaves open, by input name."""
    limit: int | None = None
    """Prove on at most this many labelled pictures."""
    quantization: str = "search"
    qat_steps: int = 300
    weights_codec: str = ""


@dataclass(frozen=True)
class Source:
    """A model read and prepared once; every target is lowered from it."""

    entry: ModelEntry
    prepared: Prepared
    spec: Spec
    input_rule: str
    """Where the input rule comes from, for the reader of the evidence."""
    labels: str
    """Likewise for the class names."""
    sha256: str
    facts: dict[str, Any]
    states: tuple[StateSpec, ...] = ()
    """Recurrent tensors of the prepared network, with their time."""
    ahead: ir.Model | None = None
    """The clip model, where it looks ahead and the prepared network does not: another network, to compare with."""


@dataclass(frozen=True)
class Proof:
    """What was found out about the payloads that passed: the evidence, and the files that belong to it."""

    payloads: tuple[Payload, ...]
    record: dict[str, Any]
    golden: Golden
    files: dict[str, bytes]
    lanes: int = 1
    made: quantize.Int8 | None = None
    """What the INT8 payloads were made of; with those of a second search, where there was one."""


@dataclass(frozen=True)
class Built:
    path: Path
    target: str
    model: str
    payload_digest: str
    bytes: int
    evidence: dict[str, Any]


def build(entry: ModelEntry, targets: Sequence[Target], options: Options, progress: Progress) -> list[Built]:
    """Build one bundle per target; a bundle that fails leaves those before it in place, and nothing of its own.

    Raises: ModelError, CalibrationError, LoweringError, UsageError, EvidenceError, OutputError.
    """
    names = [target.name for target in targets]
    if len(set(names)) != len(names) or not names:  # they would write the same file
        raise UsageError(f"targets {', '.join(names) or 'none'}: expected at least one, each once")
    if options.sign_key is not None:
        check_private_key(options.sign_key)
    if entry.is_plan:
        if options.weights_codec:
            raise UsageError("weights codec: not for plans of several networks. Build without it")
        from edgekit.toolchain.plans.build import (
            build as build_plan,  # goes down this path with what a plan adds
        )

        return build_plan(entry, targets, options, progress)
    plans = [plan(entry, target, options.precision) for target in targets]  # refuse before working
    if options.weights_codec:
        packing.check_codec(options.weights_codec, [precision for _, precision in plans], entry.batch)
    entry = torch_module.exported(entry)
    source = read(entry, options, progress)
    coded = packing.coded(source.prepared.model, options.weights_codec) if options.weights_codec else None
    shipped = source if coded is None else with_model(source, coded)
    lowered: dict[str, Payload] = {}
    for number, (target, (backends, precision)) in enumerate(zip(targets, plans, strict=True)):
        if precision != "int8":  # int8 is lowered by its search, which takes minutes
            progress(f"{target.name}: lower to {backends[0]} {precision}", number, len(targets))
            lowered[target.name] = lower(shipped, backends[0], target, precision)
    data = pictures(entry, source.spec, options.limit, progress)
    images = data.unlabelled(AGREEMENT_IMAGES)
    reference = run_here(lower(source, "onnxruntime", targets[0], "float32"), source.states)
    work = Work(source, reference, data, images, options, converted(source, reference, data, progress))
    built = []
    for target, (backends, _) in zip(targets, plans, strict=True):
        if target.name in lowered:
            proof = prove(work, target, (lowered[target.name],), progress)
        else:
            made = quantized(work, target, backends, progress)
            proof = prove(work, target, made.payloads, progress, made)
        count_instructions(work, target, proof, progress)
        if entry.batch > 1:
            proof = in_lanes(work, target, proof, progress)
        if coded is not None:
            (payload,) = proof.payloads
            small, proof.record["weights"] = packing.stored(payload, coded)
            proof = replace(proof, payloads=(small,))
        built.append(write(work, target, proof, work.options, progress))
    progress("done", len(targets), len(targets))
    return built


@dataclass
class Work:
    """What the targets of one build share; calibration and searches are added when the first needs them."""

    source: Source
    reference: Running
    data: Pictures
    images: Footage
    options: Options
    conversion: dict[str, Any] = field(default_factory=dict)
    """What it cost to make a one-frame network of a clip model that looks ahead; {} where nothing had to change."""
    calibrated: quantize.Calibrated | None = None
    searches: dict[str, Quantized] = field(default_factory=dict)

    def spec(self, target: Target) -> Spec:
        return self.source.entry.on(target.name).thresholds.apply(self.source.spec)


def quantized(work: Work, target: Target, backends: Sequence[str], progress: Progress) -> quantize.Int8:
    """INT8 payloads for `target` within the accuracy budget, as far as one was found."""

    def report(what: str, done: int, of: int) -> None:
        progress(f"{target.name}: {what}", done, of)

    def gate(payload: Payload) -> Look:
        subject = Subject(work.spec(target), work.reference, run_here(payload, work.source.states))
        found, _, verdict = judge(work, subject, report)
        name = found.get("name")
        metric_ = None if name is None else found["payload"][name]
        return Look(verdict["passed"], metric_, found.get("drop"), verdict["reason"])

    entry = work.source.entry
    if work.calibrated is None:
        source = work.source
        work.calibrated = quantize.calibrated(
            entry, source.spec, source.prepared.model, source.states, report
        )
    scheme = work.options.quantization
    return quantize.quantize(
        work.calibrated,
        target,
        backends,
        gate,
        scheme,
        work.searches,
        report,
        qat_steps=work.options.qat_steps,
        spec=work.source.spec,
        make=of_pictures,
    )


def judge(
    work: Work, subject: Subject, report: Progress
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(metric, agreement with the float network, verdict on both) of one payload."""
    pairs = [(pair[0], pair[1]) for _, pair in results(subject.pipelines(), work.images)]
    agreement = evidence.agreement(pairs)
    if work.data.labelled is None:
        found: dict[str, Any] = {"not_measured": work.data.why_unlabelled}
    else:
        found = metric(subject, work.data.labelled, report)
    accept = work.source.entry.accept
    return (
        found,
        agreement,
        evidence.check_accept(found, agreement, accept, subject.spec.score_threshold),
    )


def plan(entry: ModelEntry, target: Target, precision: str) -> tuple[tuple[str, ...], str]:
    """(backends, precision) for a target: the caller's choice, else the project's, else the board's default.

    One backend, except for int8: there every CPU library that can run it here competes; a GPU's goes alone.

    Raises: UsageError for a precision that the board's backends cannot run, CalibrationError for int8 without
    pictures to calibrate on.
    """
    override = entry.on(target.name)
    backends = override.backends or target.backends
    wanted: str = precision if precision != "auto" else (override.precision or "auto")
    able = {backend: target.precisions.get(backend, ()) for backend in backends}
    if wanted == "int8":
        capable = tuple(b for b in backends if "int8" in able[b])
        if capable:
            calibration_set(entry)
            return (("tensorrt",) if "tensorrt" in capable else capable), "int8"
    for backend in backends:
        if wanted == "auto" and able[backend]:
            return (backend,), able[backend][0]
        if wanted in able[backend]:
            return (backend,), wanted
    known = sorted({p for b in backends for p in able[b]})
    raise UsageError(
        f"precision {wanted} for {target.name}: not available there, expected one of {', '.join(known)} or auto"
    )


def read(entry: ModelEntry, options: Options, progress: Progress) -> Source:
    """Load the model, run the prepare passes, split the head, settle labels and input rule."""
    progress(f"{entry.name}: read and prepare", 0, 1)
    model = frontends.load(entry.source, shapes=options.shapes)
    task = tasks.half(entry.task)
    try:
        prepared = prepare(model, task=entry.task, **task.prepare_options(entry))
    except ModelError as error:  # a pass sees a graph, not the file it came from
        if not str(error).startswith("model: "):
            raise
        raise ModelError(f"model {printable(entry.source)}: {str(error).removeprefix('model: ')}") from error
    spec, why, note = task.make_spec(entry, prepared)
    spec = entry.thresholds.apply(spec)
    progress(f"{entry.name}: read and prepare", 1, 1)
    hint = entry.video
    states = recurrent.timed(graph_states(prepared.model), hint.dt_s, hint.reset_after_s)
    digest = hashlib.sha256(entry.source.read_bytes()).hexdigest()
    known = {"source": printable(entry.source.name), "sha256": digest, **facts(prepared.model)}
    ahead = None if prepared.streamed is None or prepared.streamed.exact else model
    return Source(entry, prepared, spec, why, note or "class names as given", digest, known, states, ahead)


def converted(source: Source, reference: Running, data: Pictures, progress: Progress) -> dict[str, Any]:
    """The drop of accuracy against a clip model that looks ahead (`accuracy.lost_by_conversion`), or why not."""
    made = source.prepared.streamed
    if source.ahead is None or made is None:
        return {}
    if data.labelled is None:
        return {"not_measured": data.why_unlabelled}
    return lost_by_conversion(source.ahead, made, reference, source.spec, data.labelled, progress)


def with_model(source: Source, coded: packing.Coded) -> Source:
    """The source with other weights in its prepared network."""
    return replace(source, prepared=replace(source.prepared, model=coded.model))


def lower(source: Source, backend: str, target: Target, precision: str) -> Payload:
    """The prepared network as `backend` wants it."""
    return of_pictures(source.prepared.model, backend, target, precision)


class Judged(NamedTuple):
    """A payload that ran beside the float network: errors of its outputs, and what `judge` found."""

    subject: Subject
    errors: dict[str, Any]
    metric: dict[str, Any]
    agreement: dict[str, Any]
    verdict: dict[str, Any]

    @property
    def payload(self) -> Payload:
        return self.subject.candidate.payload


def judged(work: Work, target: Target, payloads: Sequence[Payload], report: Progress) -> list[Judged]:
    found = []
    for payload in payloads:
        subject = Subject(work.spec(target), work.reference, run_here(payload, work.source.states))
        errors = evidence.carried_errors(subject, work.images, report)
        found.append(Judged(subject, errors, *judge(work, subject, report)))
    return found


def within_limits(work: Work, found: Sequence[Judged]) -> list[Judged]:
    """Those within the limits whose states fit those before them; the first one, if none is."""
    kept: list[Judged] = []
    for j in [j for j in found if j.verdict["passed"] is not False] or found[:1]:
        why = recurrent.misfit(work.source.states, [k.payload for k in kept], j.payload)
        if why:
            j.verdict["reason"] = why
        else:
            kept.append(j)
    return kept


def searched_again(
    work: Work, target: Target, made: quantize.Int8, found: list[Judged], progress: Progress
) -> tuple[quantize.Int8, list[Judged]]:
    """Where one of several libraries is within the limits, and the others missed them by the choices that were made for it: its
    payload, and theirs by a search of their own, so that a device without that library can run the bundle. Else as given."""
    kept = within_limits(work, found)
    missed = [j.payload.backend for j in found if j is not kept[0]]
    searches = work.options.quantization in SEARCHES
    if len(kept) > 1 or not missed or not searches or kept[0].verdict["passed"] is not True:
        return made, found

    def report(what: str, done: int, of: int) -> None:
        progress(f"{target.name}: {what}", done, of)

    more = quantized(work, target, missed, progress)
    joined = quantize.joined(made, kept[0].payload.backend, more)
    return joined, [kept[0], *judged(work, target, more.payloads, report)]


def prove(
    work: Work,
    target: Target,
    payloads: Sequence[Payload],
    progress: Progress,
    made: quantize.Int8 | None = None,
) -> Proof:
    """Run the payloads beside the float network and judge them; those that fail are left out if others pass.

    All that pass are kept, in the order given: which of them is fastest depends on the machine and the moment,
    so the device finds out (runtime.tuning), and two builds give the same bundle. Speeds are evidence only.

    Raises: EvidenceError when none is within the limits, unless options.allow_drop.
    """

    def report(what: str, done: int, of: int) -> None:
        progress(f"{target.name}: {what}", done, of)

    source, options, data = work.source, work.options, work.data
    entry, spec = source.entry, work.spec(target)
    found = judged(work, target, payloads, report)
    if made is not None:
        made, found = searched_again(work, target, made, found, progress)
    kept = within_limits(work, found)
    left_out = dict(made.record["not_lowered"]) if made is not None else {}
    left_out |= {j.payload.backend: j.verdict["reason"] for j in found if all(j is not k for k in kept)}
    subjects = [j.subject for j in kept]
    subject, _, metric_, agreement, verdict = kept[0]
    timed = is_here(target) and not subject.simulated
    speed = compare_here(subjects, work.images[0], report) if timed else {}
    blame = f" ({made.blame})" if made is not None and verdict["passed"] is False else ""
    verdict = evidence.require(verdict, entry.name, target.name, options.allow_drop, blame)
    report("golden values and samples", 0, 1)
    states = recurrent.agreed(source.states, [j.payload for j in kept])
    golden, files = evidence.golden(subjects, work.images[0], states, own=bool(work.options.weights_codec))
    samples, pictures_ = evidence.samples(subject, work.images[:SAMPLE_IMAGES])
    timing = time_here(fastest(subjects, speed), work.images[0], report) if timed else None
    record: dict[str, Any] = {
        "model": source.facts,
        "graph": {
            "passes": [to_json(r) for r in source.prepared.log],
            "head": {
                **tasks.half(spec.task).head_facts(spec),
                "outputs": list(recurrent.ports(subject.candidate.payload, source.states)[1]),
            },
            "input_rule": source.input_rule,
            "labels": source.labels,
            "notes": list(source.prepared.notes[:-1]),  # the last is the input rule
        },
        "payloads": {
            j.payload.variant: {
                **evidence.payload_facts(j.payload),
                **j.errors,
                "images": sum(1 for _ in frames(work.images)),
                "pictures": data.what,
                "run_by": j.subject.run_by,
                "simulated": j.subject.simulated,
                **evidence.variant_facts(j.subject, j.metric, made, speed),
            }
            for j in kept
        },
        **({"states": state_facts(work, states)} if states else {}),
        "agreement": agreement,
        "metric": metric_,
        "timing": timing or {"not_measured": f"the bundle was not built on that board ({target.title})"},
        "accept": verdict,
        "limits": [
            *evidence.conversion_limits(work.conversion),
            *evidence.limits(target, subject, metric_, verdict, timing is not None),
        ],
        "samples": samples,
    }
    if made is not None:
        record["quantization"] = {**made.record, "left_out": left_out}
        record["graph"]["notes"] += made.record["warnings"]
    return Proof(tuple(j.payload for j in kept), record, golden, {**files, **pictures_}, made=made)


def count_instructions(work: Work, target: Target, proof: Proof, progress: Progress) -> None:
    """For an ARM CPU: instructions per inference on the emulated board, into the evidence of each payload."""

    def unsigned(folder: Path) -> Path:
        progress(f"{target.name}: count instructions on the emulated board", 0, 1)
        options = replace(work.options, out=folder, sign_key=None)
        return write(work, target, proof, options, lambda *_: None).path

    precisions = {p.variant: p.precision for p in proof.payloads}
    found = arm_count.record(target, work.source.facts["macs"], precisions, unsigned)
    for name, row in found.items():
        proof.record["payloads"][name]["instructions"] = row


def in_lanes(work: Work, target: Target, proof: Proof, progress: Progress) -> Proof:
    """The proven payloads for `entry.batch` streams a run. Times are of a run, whatever the streams in it.

    Raises: ModelError for a network that cannot take lanes; LoweringError when a lane computes something else.
    """
    source, count = work.source, work.source.entry.batch
    progress(f"{target.name}: {count} lanes", 0, 1)
    made = proof.made
    graphs = {} if made is None else {id(p): m for p, m in zip(made.payloads, made.models, strict=True)}
    pairs = [(payload, graphs.get(id(payload), source.prepared.model)) for payload in proof.payloads]
    found = batch.batched(pairs, source.states, proof.golden, proof.files, count, target)
    names = [payload.variant for payload in found.payloads]
    record = {**proof.record, "batch": batch.record(count, dict(zip(names, found.differences, strict=True)))}
    record["payloads"] = {
        name: {**proof.record["payloads"][name], **evidence.payload_facts(payload)}
        for name, payload in zip(names, found.payloads, strict=True)
    }
    timed = proof.record["timing"].get("payload")
    if timed is not None:
        payload = found.payloads[names.index(timed)]
        running = batch.one_lane(payload, found.states)
        record["timing"] = time_here(
            Subject(work.spec(target), work.reference, running), work.images[0], progress
        )
        running.binding.close()
    return Proof(found.payloads, record, proof.golden, found.files, count, made)


def write(work: Work, target: Target, proof: Proof, options: Options, progress: Progress) -> Built:
    """Write the bundle, whole or not at all. Raises: OutputError."""
    source = work.source
    entry, spec = source.entry, work.spec(target)
    segment, payload_files = pack(proof.payloads, tasks.half(entry.task).SEGMENT)
    accept = proof.record["accept"]
    first = proof.payloads[0]
    states = recurrent.agreed(batch.wide(source.states, proof.lanes), proof.payloads)
    inputs, outputs = recurrent.ports(first, states)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=entry.name,
        task=entry.task,
        target=target.name,
        inputs=inputs,
        outputs=outputs,
        tensors=recurrent.tensors(first, states),
        plan=(segment,),
        pipeline=to_json(spec),
        payload_digest="",
        golden=proof.golden,
        files={},
        provenance={
            "edgekit": __version__,
            "model_sha256": source.sha256,
            "data": {**work.data.provenance, **proof.record.get("quantization", {}).get("calibration", {})},
            "recipe": [r.name for r in source.prepared.log],
            "tools": cache.tools(),
            **({"missed_limits": accept["reason"]} if accept["passed"] is False else {}),
        },
        states=states,
    )
    path = options.out / f"{entry.name}.{target.name}.edge"
    progress(f"{target.name}: write {path}", 0, 1)
    write_bundle(path, manifest, {**proof.files, **payload_files}, proof.record, sign_key=options.sign_key)
    with Bundle.open(path, verify=False) as written:
        digest = written.payload_digest
    return Built(path, target.name, entry.name, digest, path.stat().st_size, proof.record)


def state_facts(work: Work, states: Sequence[StateSpec]) -> dict[str, Any]:
    """What the evidence says of recurrent states: sizes, time, and how a clip model became this network."""
    made, images = work.source.prepared.streamed, work.images
    found: dict[str, Any] = {
        "count": len(states),
        "elements": sum(s.elements for s in states),
        "float32_bytes": sum(4 * s.elements for s in states),
        "nominal_dt_s": states[0].nominal_dt_s,
        "reset_after_s": states[0].reset_after_s,
        "clips": len(images),
        "frames": sum(1 for _ in frames(images)),
    }
    if made is not None:
        found["clip_model"] = {"frames": made.frames, "exact": made.exact, "difference": made.difference}
        if work.conversion:
            found["clip_model"]["metric"] = work.conversion
    return found


def pack(payloads: Sequence[Payload], name: str) -> tuple[Segment, dict[str, bytes]]:
    """The one segment of a bundle, and its payload files."""
    variants = tuple(make_variant(name, payload.variant, payload) for payload in payloads)
    first = payloads[0]
    inputs, outputs = (tuple(t.name for t in tensors) for tensors in (first.inputs, first.outputs))
    files = {v.path: payload.data for v, payload in zip(variants, payloads, strict=True)}
    return Segment(name, inputs, outputs, variants), files
