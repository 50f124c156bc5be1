"""The main path: a model file goes in, a proven bundle comes out. Read from `build` down."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import __version__, frontends
from edgekit.backends.base import Payload, half
from edgekit.bundle import Bundle, make_variant, write_bundle
from edgekit.errors import ModelError, UsageError, printable
from edgekit.manifest import SCHEMA_VERSION, Manifest, Segment
from edgekit.passes import Prepared, prepare
from edgekit.passes.find_input_rule import find_input_rule
from edgekit.passes.graph import input_size
from edgekit.passes.graph_facts import facts
from edgekit.project import ModelEntry
from edgekit.schema import to_json
from edgekit.target import Target
from edgekit.tasks.detect.spec import DetectSpec
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.toolchain import cache, evidence
from edgekit.toolchain.data import Pictures, pictures

Progress = Callable[[str, int, int], None]
"""progress(what, done, of)"""

SEGMENT = "detector"
AGREEMENT_IMAGES = 16
SAMPLE_IMAGES = 3


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
    spec: DetectSpec
    input_rule: str
    sha256: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Built:
    path: Path
    target: str
    model: str
    payload_digest: str
    bytes: int
    evidence: dict[str, Any]


def build(entry: ModelEntry, targets: Sequence[Target], options: Options, progress: Progress) -> list[Built]:
    """Build one bundle per target. Raises: ModelError, LoweringError, UsageError, EvidenceError, OutputError."""
    plans = [plan(entry, target, options.precision) for target in targets]  # refuse before working
    source = read(entry, options, progress)
    lowered = []
    for number, (target, (backend, precision)) in enumerate(zip(targets, plans, strict=True)):
        progress(f"{target.name}: lower to {backend} {precision}", number, len(targets))
        lowered.append(half(backend, "lower").lower(source.prepared.model, target, precision))
    data = pictures(entry, source.spec, options.limit, progress)
    built = [
        bundle(source, target, payloads, data, options, progress)
        for target, payloads in zip(targets, lowered, strict=True)
    ]
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
    hint = entry.head
    try:
        prepared = prepare(
            model,
            task=entry.task,
            head=None if hint.family == "auto" else hint.family,
            num_classes=len(entry.classes) or None,
            columns=hint.columns or None,
            normalized=hint.normalized,
        )
    except ModelError as error:  # a pass sees a graph, not the file it came from
        if not str(error).startswith("model: "):
            raise
        raise ModelError(f"model {entry.source}: {str(error).removeprefix('model: ')}") from error
    assert prepared.head is not None, "the task detect has a head"
    rule, why = find_input_rule(prepared.model, prepared.head)
    if rule is None:
        rule, why = declared_rule(entry, prepared.model), "declared in the project"
    labels, note = entry.labels(prepared.head.num_classes)
    spec = entry.thresholds.apply(DetectSpec(entry.preprocess.apply(rule), prepared.head, labels))
    progress(f"{entry.name}: read and prepare", 1, 1)
    digest = hashlib.sha256(entry.source.read_bytes()).hexdigest()
    return Source(entry, prepared, spec, "; ".join(filter(None, (why, note))), digest, facts(prepared.model))


def declared_rule(entry: ModelEntry, model: ir.Model) -> ImagePreprocess:
    """The rule of a network whose family says nothing about it. Raises: UsageError unless it is declared."""
    missing = [name for name in ("resize", "color", "mean", "std") if getattr(entry.preprocess, name) is None]
    if missing:
        raise UsageError(
            f"model {entry.name}: its input rule is not known, expected {', '.join(missing)} in [model.preprocess] of "
            "an edgekit.toml. Write one with 'edgekit init'"
        )
    height, width = input_size(model)
    return ImagePreprocess(width, height)


def bundle(
    source: Source,
    target: Target,
    payloads: Sequence[Payload],
    data: Pictures,
    options: Options,
    progress: Progress,
) -> Built:
    """Prove the payloads and write the bundle."""
    entry = source.entry
    spec = entry.on(target.name).thresholds.apply(source.spec)
    (reference_payload,) = half("onnxruntime", "lower").lower(source.prepared.model, target, "float32")
    subject = evidence.Subject(
        spec,
        payloads[0],
        evidence.open_payload(reference_payload),
        evidence.open_payload(payloads[0]),
        simulated(payloads[0]),
    )
    images = data.unlabelled(AGREEMENT_IMAGES)
    progress(f"{target.name}: prove outputs", 0, 1)
    errors = evidence.output_errors(subject, images)
    reference, candidate = subject.pipelines()
    agreement = evidence.agreement([(reference(image), candidate(image)) for image in images])
    if data.labelled is None:
        found: dict[str, Any] = {"not_measured": data.why_unlabelled}
    else:
        key = cache.digest(source.sha256, to_json(spec), data.labelled.digest, versions())
        found = evidence.metric(subject, data.labelled, key, progress)
    verdict = evidence.check_accept(found, agreement, entry.accept)
    if not options.allow_drop:
        evidence.require(verdict, entry.name, target.name)
    golden, files = evidence.golden(subject, images[0])
    entries, pictures_ = evidence.samples(subject, images[:SAMPLE_IMAGES])
    timing = time_here(subject, images[0]) if target.name == "host" and not subject.simulated else None
    segment, payload_files = pack(payloads)
    files.update(payload_files)
    files.update(pictures_)
    record = {
        "model": {"source": printable(entry.source.name), "sha256": source.sha256, **source.facts},
        "graph": {
            "passes": [to_json(r) for r in source.prepared.log],
            "head": {"family": spec.head.family, "outputs": [o.name for o in payloads[0].outputs]},
            "input_rule": source.input_rule,
        },
        "payloads": {
            v.name: {
                "backend": p.backend,
                "precision": p.precision,
                "bytes": len(p.data),
                "outputs": errors,
                "images": len(images),
                "pictures": data.what,
            }
            for v, p in zip(segment.variants, payloads, strict=True)
        },
        "agreement": agreement,
        "metric": found,
        "timing": timing or {"not_measured": f"this machine is not a {target.title}"},
        "accept": verdict,
        "limits": evidence.limits(target, subject, found, timing is not None),
        "samples": entries,
    }
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model=entry.name,
        task=entry.task,
        target=target.name,
        inputs=segment.inputs,
        outputs=segment.outputs,
        tensors=(*payloads[0].inputs, *payloads[0].outputs),
        plan=(segment,),
        pipeline=to_json(spec),
        payload_digest="",
        golden=golden,
        files={},
        provenance={
            "edgekit": __version__,
            "model_sha256": source.sha256,
            "data": data.provenance,
            "recipe": [r.name for r in source.prepared.log],
            "tools": versions(),
        },
    )
    path = options.out / f"{entry.name}.{target.name}.edge"
    progress(f"{target.name}: write {path}", 0, 1)
    write_bundle(path, manifest, files, record, sign_key=options.sign_key)
    with Bundle.open(path, verify=False) as written:
        return Built(path, target.name, entry.name, written.payload_digest, path.stat().st_size, record)


def simulated(payload: Payload) -> str | None:
    """Why running `payload` on this machine's ONNX Runtime is not the real thing, or None."""
    if payload.backend == "onnxruntime":
        return None
    return (
        f"its {payload.precision} {payload.backend} graph was run by onnxruntime on the build machine's CPU"
    )


def pack(payloads: Sequence[Payload]) -> tuple[Segment, dict[str, bytes]]:
    """The one segment of a detector, and its payload files."""
    variants = tuple(make_variant(SEGMENT, f"{p.backend}-{p.precision}", p) for p in payloads)
    first = payloads[0]
    segment = Segment(
        SEGMENT, tuple(t.name for t in first.inputs), tuple(t.name for t in first.outputs), variants
    )
    return segment, {v.path: p.data for v, p in zip(variants, payloads, strict=True)}


def time_here(subject: evidence.Subject, image: np.ndarray) -> dict[str, Any]:
    """Stage times of the payload on this machine (only used when this machine is the target)."""
    from edgekit.runtime.bench import machine, run_once, summarize

    _, pipeline = subject.pipelines()
    for _ in range(10):
        run_once(pipeline, image)
    samples = np.array([run_once(pipeline, image) for _ in range(100)])
    return {"machine": machine(0), "stages": summarize(samples), "image": list(image.shape[1::-1])}


def versions() -> dict[str, str]:
    """The tools whose version may change a result."""
    from importlib.metadata import version

    names = ("numpy", "onnx", "onnx-ir", "onnxscript", "onnxslim", "onnxruntime", "opencv-python-headless")
    return {"edgekit": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}
