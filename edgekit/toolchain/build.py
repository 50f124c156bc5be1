"""The main path: a model file goes in, a proven bundle comes out. Read from `build` down."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import __version__, frontends
from edgekit.backends.base import Payload, half
from edgekit.bundle import Bundle, make_variant, write_bundle
from edgekit.errors import ModelError, UsageError, printable
from edgekit.host import board
from edgekit.manifest import SCHEMA_VERSION, Golden, Manifest, Segment
from edgekit.passes import Prepared, prepare
from edgekit.passes.graph_facts import facts
from edgekit.project import ModelEntry
from edgekit.schema import to_json
from edgekit.signing import check_private_key
from edgekit.target import Target
from edgekit.tasks import Spec
from edgekit.toolchain import cache, evidence, tasks
from edgekit.toolchain.accuracy import metric
from edgekit.toolchain.data import Pictures, pictures
from edgekit.toolchain.running import Running, Subject, run_here

Progress = Callable[[str, int, int], None]
"""progress(what, done, of)"""

AGREEMENT_IMAGES = 16
SAMPLE_IMAGES = 3
TIMING_WARMUP, TIMING_RUNS = 10, 100


@dataclass(frozen=True)
class Options:
    """What the caller of a build may choose beyond the model entry.

    precision: `auto` takes the target's default. sign_key: PEM file of an Ed25519 private key.
    allow_drop: write the bundle, marked, even when it misses its accuracy budget.
    """

    out: Path
    precision: str = "auto"
    sign_key: Path | None = None
    allow_drop: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Sizes for inputs that the file leaves open, by input name."""
    limit: int | None = None
    """Prove on at most this many labelled pictures."""


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


@dataclass(frozen=True)
class Proof:
    """What was found out about a payload: the evidence, and the files that belong to it."""

    record: dict[str, Any]
    golden: Golden
    files: dict[str, bytes]


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

    Raises: ModelError, LoweringError, UsageError, EvidenceError, OutputError.
    """
    names = [target.name for target in targets]
    if len(set(names)) != len(names) or not names:  # they would write the same file
        raise UsageError(f"targets {', '.join(names) or 'none'}: expected at least one, each once")
    plans = [plan(entry, target, options.precision) for target in targets]  # refuse before working
    if options.sign_key is not None:
        check_private_key(options.sign_key)
    source = read(entry, options, progress)
    lowered = []
    for number, (target, (backend, precision)) in enumerate(zip(targets, plans, strict=True)):
        progress(f"{target.name}: lower to {backend} {precision}", number, len(targets))
        lowered.append(lower(source, backend, target, precision))
    data = pictures(entry, source.spec, options.limit, progress)
    images = data.unlabelled(AGREEMENT_IMAGES)
    reference = run_here(lower(source, "onnxruntime", targets[0], "float32"))
    built = []
    for target, payload in zip(targets, lowered, strict=True):
        proof = prove(source, target, payload, reference, data, images, options, progress)
        built.append(write(source, target, payload, data, proof, options, progress))
    progress("done", len(targets), len(targets))
    return built


def plan(entry: ModelEntry, target: Target, precision: str) -> tuple[str, str]:
    """(backend, precision) for a target: the caller's choice, else the project's, else the board's default.

    Raises: UsageError for a precision that the board's backends cannot run.
    """
    override = entry.on(target.name)
    backends = override.backends or target.backends
    wanted: str = precision if precision != "auto" else (override.precision or "auto")
    for backend in backends:
        able = target.precisions.get(backend, ())
        if wanted == "auto" and able:
            return backend, able[0]
        if wanted in able:
            return backend, wanted
    known = sorted({p for b in backends for p in target.precisions.get(b, ())})
    if wanted == "int8":
        raise UsageError(
            f"precision int8 for {target.name}: not available in this version of edgekit, "
            f"expected one of {', '.join(known)} or auto. Use float16"
        )
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
    digest = hashlib.sha256(entry.source.read_bytes()).hexdigest()
    known = {"source": printable(entry.source.name), "sha256": digest, **facts(prepared.model)}
    return Source(entry, prepared, spec, why, note or "class names as given", digest, known)


def lower(source: Source, backend: str, target: Target, precision: str) -> Payload:
    """The prepared network as `backend` wants it."""
    payloads: tuple[Payload, ...] = half(backend, "lower").lower(source.prepared.model, target, precision)
    (payload,) = payloads
    return payload


def prove(
    source: Source,
    target: Target,
    payload: Payload,
    reference: Running,
    data: Pictures,
    images: Sequence[np.ndarray],
    options: Options,
    progress: Progress,
) -> Proof:
    """Run the payload beside the float network and judge it.

    Raises: EvidenceError when it misses its limits, unless options.allow_drop.
    """

    def report(what: str, done: int, of: int) -> None:
        progress(f"{target.name}: {what}", done, of)

    entry = source.entry
    spec = entry.on(target.name).thresholds.apply(source.spec)
    subject = Subject(spec, reference, run_here(payload))
    errors = evidence.output_errors(subject, images, report)
    float_pipeline, pipeline = subject.pipelines()
    agreement = evidence.agreement([(float_pipeline(image), pipeline(image)) for image in images])
    if data.labelled is None:
        found: dict[str, Any] = {"not_measured": data.why_unlabelled}
    else:
        found = metric(subject, data.labelled, report)
    verdict = evidence.check_accept(found, agreement, entry.accept, spec.score_threshold)
    verdict = evidence.require(verdict, entry.name, target.name, options.allow_drop)
    report("golden values and samples", 0, 1)
    golden, files = evidence.golden(subject, images[0])
    samples, pictures_ = evidence.samples(subject, images[:SAMPLE_IMAGES])
    timing = time_here(subject, images[0], report) if is_here(target) and not subject.simulated else None
    record = {
        "model": source.facts,
        "graph": {
            "passes": [to_json(r) for r in source.prepared.log],
            "head": {**tasks.half(spec.task).head_facts(spec), "outputs": [o.name for o in payload.outputs]},
            "input_rule": source.input_rule,
            "labels": source.labels,
            "notes": list(source.prepared.notes[:-1]),  # the last is the input rule
        },
        "payloads": {
            variant_name(payload): {
                **evidence.payload_facts(payload),
                "outputs": errors,
                "images": len(images),
                "pictures": data.what,
                "run_by": subject.run_by,
                "simulated": subject.simulated,
            }
        },
        "agreement": agreement,
        "metric": found,
        "timing": timing or {"not_measured": f"the bundle was not built on that board ({target.title})"},
        "accept": verdict,
        "limits": evidence.limits(target, subject, found, verdict, timing is not None),
        "samples": samples,
    }
    return Proof(record, golden, {**files, **pictures_})


def write(
    source: Source,
    target: Target,
    payload: Payload,
    data: Pictures,
    proof: Proof,
    options: Options,
    progress: Progress,
) -> Built:
    """Write the bundle, whole or not at all. Raises: OutputError."""
    entry = source.entry
    spec = entry.on(target.name).thresholds.apply(source.spec)
    segment, payload_files = pack(payload, tasks.half(entry.task).SEGMENT)
    accept = proof.record["accept"]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=entry.name,
        task=entry.task,
        target=target.name,
        inputs=segment.inputs,
        outputs=segment.outputs,
        tensors=(*payload.inputs, *payload.outputs),
        plan=(segment,),
        pipeline=to_json(spec),
        payload_digest="",
        golden=proof.golden,
        files={},
        provenance={
            "edgekit": __version__,
            "model_sha256": source.sha256,
            "data": data.provenance,
            "recipe": [r.name for r in source.prepared.log],
            "tools": cache.tools(),
            **({"missed_limits": accept["reason"]} if accept["passed"] is False else {}),
        },
    )
    path = options.out / f"{entry.name}.{target.name}.edge"
    progress(f"{target.name}: write {path}", 0, 1)
    write_bundle(path, manifest, {**proof.files, **payload_files}, proof.record, sign_key=options.sign_key)
    with Bundle.open(path, verify=False) as written:
        digest = written.payload_digest
    return Built(path, target.name, entry.name, digest, path.stat().st_size, proof.record)


def variant_name(payload: Payload) -> str:
    return f"{payload.backend}-{payload.precision}"


def pack(payload: Payload, name: str) -> tuple[Segment, dict[str, bytes]]:
    """The one segment of a bundle, and its payload file."""
    variant = make_variant(name, variant_name(payload), payload)
    inputs, outputs = (tuple(t.name for t in tensors) for tensors in (payload.inputs, payload.outputs))
    return Segment(name, inputs, outputs, (variant,)), {variant.path: payload.data}


def is_here(target: Target) -> bool:
    """This machine is the target: what is timed here is true of it."""
    here = board()
    return target.name == "host" or (here is not None and here.name == target.name)


def time_here(subject: Subject, image: np.ndarray, progress: Progress) -> dict[str, Any]:
    """Stage times of the payload on this machine (only used when this machine is the target)."""
    from edgekit.runtime.bench import machine, run_once, summarize

    _, pipeline = subject.pipelines()
    progress("time", 0, 1)  # not once a run: drawing it would be timed too
    samples = [run_once(pipeline, image) for _ in range(TIMING_WARMUP + TIMING_RUNS)]
    return {
        "machine": machine(0),
        "payload": variant_name(subject.candidate.payload),
        "stages": summarize(np.array(samples[TIMING_WARMUP:])),
        "image": list(image.shape[1::-1]),
    }
