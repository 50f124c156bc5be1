"""The manifest of a bundle: what is inside, how it is joined and what it means (docs/bundle.md)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgekit.errors import did_you_mean
from edgekit.schema import LATER, SchemaError, canonical_json
from edgekit.spec import MAX_SECONDS, QuantParams, StateSpec, TensorSpec, is_duration, lanes_of

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Variant:
    """One payload of a segment. `digest` = "sha256:<hex>" of the file at `path`."""

    name: str
    backend: str
    precision: str
    format: str
    path: str
    bytes: int
    digest: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """A network: the device keeps the fastest of `variants` that passes its self-test.

    repeat: above 1, the payloads have 1 along the first axis of all their tensors where the plan's have `repeat`;
    they are run once per slice.
    when: an input of the plan that says whether the step is run: where it is all zeros the step is skipped, and its
    outputs are zeros. Of a repeated step it has one number per slice and decides slice by slice.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    variants: tuple[Variant, ...]
    kind: Literal["segment"] = "segment"
    repeat: int = field(default=1, metadata=LATER)
    when: str | None = field(default=None, metadata=LATER)


@dataclass(frozen=True)
class KernelStep:
    """A kernel of edgekit's own, run between segments (kernels.steps). `inputs` and `outputs` are in its own order.

    when: as of `Segment`. files: role -> path of a file that it needs, `kernels/<step>/<role>.bin`.
    """

    name: str
    kernel: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    kind: Literal["kernel"] = "kernel"
    when: str | None = field(default=None, metadata=LATER)
    files: dict[str, str] = field(default_factory=dict, metadata=LATER)


@dataclass(frozen=True)
class GoldenTensor:
    """Raw little-endian values of `tensor` in the file at `path`.

    For outputs: the engine must come within `atol + rtol * |golden|`, element by element, save a
    fraction `allow` of the elements (rounding near-ties in reduced precision).
    """

    tensor: str
    path: str
    atol: float = 0.0
    rtol: float = 0.0
    allow: float = 0.0


@dataclass(frozen=True)
class Golden:
    inputs: tuple[GoldenTensor, ...]
    outputs: tuple[GoldenTensor, ...]


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. `pipeline` is the task's own table (task `detect`: tasks.detect.spec.DetectSpec).

    `tensors`: every named tensor that steps exchange, plan inputs and outputs included.
    `payload_digest`: over all that decides what the bundle computes; equal for equal builds.
    """

    schema_version: int
    model: str
    task: str
    target: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: tuple[TensorSpec, ...]
    plan: tuple[Segment | KernelStep, ...]
    pipeline: dict[str, Any]
    payload_digest: str
    golden: Golden
    files: dict[str, FileEntry]
    provenance: dict[str, Any]
    states: tuple[StateSpec, ...] = ()

    def tensor(self, name: str) -> TensorSpec:
        return next(t for t in self.tensors if t.name == name)

    @property
    def lanes(self) -> int:
        """Streams that one run takes (runtime.slots); 1 in plans with kernels or repeated steps, whose first
        axes count other things."""
        if any(isinstance(step, KernelStep) or step.repeat > 1 for step in self.plan):
            return 1
        ports = [self.tensor(name).shape for name in (*self.inputs, *self.outputs)]
        return lanes_of([*ports, *(state.shape for state in self.states)])

    def variants(self) -> Iterator[tuple[Segment, Variant]]:
        for step in self.plan:
            if isinstance(step, Segment):
                for variant in step.variants:
                    yield step, variant


# --- names -------------------------------------------------------------------------------------

MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
SIGNATURE = "signature.json"
EVIDENCE = "evidence.json"
OUTSIDE = (MANIFEST, CHECKSUM, SIGNATURE)
"""Files that the table `files` does not list: each of them says something about the manifest."""

MAX_FILES = 10_000
MAX_PATH = 240
MAX_PARTS = 4
MAX_TENSOR_BYTES = 1 << 32
MAX_RANK = 8
MAX_REPEAT = 256
MAX_STEPS = 1000

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


def check_path(path: str) -> None:
    """Raises: SchemaError unless `path` is safe and relative, its parts `[A-Za-z0-9._-]`, no leading dot."""
    if path.startswith("/"):
        raise SchemaError(f"file name {path!r}: absolute path, expected one inside the bundle")
    parts = path.split("/")
    if ".." in parts:
        raise SchemaError(f"file name {path!r}: leads out of the bundle ('..')")
    if len(path) > MAX_PATH or len(parts) > MAX_PARTS:
        raise SchemaError(f"file name {path!r}: longer than {MAX_PATH} characters or {MAX_PARTS} parts")
    if not all(NAME.fullmatch(part) for part in parts):
        raise SchemaError(
            f"file name {path!r}: expected parts of letters, digits, '.', '_' and '-' that begin with no dot"
        )


def check_paths(paths: Collection[str]) -> None:
    """Raises: SchemaError for an unsafe path, or paths that collide on some file system."""
    if len(paths) > MAX_FILES:
        raise SchemaError(f"{len(paths)} files, expected at most {MAX_FILES}")
    folded: set[str] = set()
    for path in paths:
        check_path(path)
        if path.lower() in folded:
            raise SchemaError(f"file name {path!r}: there twice (upper and lower case count as equal)")
        folded.add(path.lower())
    for path in paths:
        parts = path.lower().split("/")
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in folded:
                raise SchemaError(f"file name {path!r}: lies below a file, expected a folder")


def payload_path(segment: str, variant: str, format: str) -> str:
    """Where a bundle keeps the payload: `segments/<segment>/<variant>.<format>`."""
    return f"segments/{segment}/{variant}.{format}"


def kernel_path(step: str, role: str) -> str:
    """Where a bundle keeps a file of a kernel step: `kernels/<step>/<role>.bin`."""
    return f"kernels/{step}/{role}.bin"


# --- digests -----------------------------------------------------------------------------------

DECIDING = ("task", "target", "model", "inputs", "outputs", "tensors", "states", "plan", "pipeline")


def payload_digest(manifest: Mapping[str, Any]) -> str:
    """ "sha256:<hex>" over the canonical JSON of the keys `DECIDING` of a manifest in JSON form.

    They decide what the bundle computes; the payload bytes take part through the digests in
    `plan`, those of kernels' files through the key `kernel_files`: path -> SHA-256, where there are some.
    Evidence, golden values and provenance do not.
    """
    picked = {key: manifest[key] for key in DECIDING if key in manifest}
    files = manifest.get("files")
    if isinstance(files, Mapping):  # else it is no manifest, which `check` says
        entries = {path: entry for path, entry in files.items() if path.startswith("kernels/")}
        if entries:
            picked["kernel_files"] = {
                path: entry.get("sha256") if isinstance(entry, Mapping) else entry
                for path, entry in entries.items()
            }
    return digest(canonical_json(picked, MANIFEST))


def digest(data: bytes | memoryview) -> str:
    """ "sha256:<hex>", the form that manifests use for payloads."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


# --- consistency -------------------------------------------------------------------------------


def check(manifest: Manifest) -> None:
    """All that a manifest promises about itself, files' bytes aside (docs/bundle.md, "Rules").

    Raises: SchemaError, one line, for the first rule that does not hold.
    """
    check_paths(manifest.files.keys() | set(OUTSIDE))
    for path, entry in manifest.files.items():
        if entry.bytes < 0 or not _HEX64.fullmatch(entry.sha256):
            raise SchemaError(f"file {path!r}: entry is malformed, expected bytes >= 0 and 64 hex digits")
    if manifest.files.keys() & set(OUTSIDE):
        raise SchemaError(f"file table: must not list {', '.join(OUTSIDE)}")
    if EVIDENCE not in manifest.files:
        raise SchemaError(f"file table: {EVIDENCE} is missing")
    for label, name in (("model", manifest.model), ("task", manifest.task), ("target", manifest.target)):
        _check_name(label, name)
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", manifest.payload_digest):
        raise SchemaError(
            f"payload_digest: expected 'sha256:' and 64 hex digits, got {manifest.payload_digest!r}"
        )
    tensors = _check_tensors(manifest)
    _check_states(manifest, tensors)
    _check_plan(manifest, tensors)
    referenced = _check_payloads(manifest) | _check_kernel_files(manifest) | _check_golden(manifest, tensors)
    for path in manifest.files:
        if path not in referenced and path != EVIDENCE and not path.startswith("evidence/"):
            raise SchemaError(f"file {path!r}: nothing in the manifest refers to it")


def _check_name(label: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise SchemaError(
            f"{label} {name!r}: expected 1 to 80 letters, digits, '.', '_' or '-', the first one no dot"
        )


def _unique(label: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SchemaError(f"{label} {name!r}: there twice")
        seen.add(name)


def _known(label: str, names: Sequence[str], tensors: Mapping[str, TensorSpec]) -> None:
    _unique(label, names)
    for name in names:
        if name not in tensors:
            raise SchemaError(
                f"{label} {name!r}: no such tensor. {did_you_mean(name[:80], list(tensors)[:200])}"
            )


def _check_tensors(manifest: Manifest) -> dict[str, TensorSpec]:
    _unique("tensor", [t.name for t in manifest.tensors])
    for tensor in manifest.tensors:
        if not 1 <= len(tensor.name) <= 200 or not tensor.name.isprintable():
            raise SchemaError(f"tensor {tensor.name!r}: expected a printable name of 1 to 200 characters")
        if len(tensor.shape) > MAX_RANK or tensor.nbytes > MAX_TENSOR_BYTES:
            raise SchemaError(
                f"tensor {tensor.name!r}: shape {tensor.shape} is too large, "
                f"expected at most {MAX_RANK} axes and {MAX_TENSOR_BYTES} bytes"
            )
        _check_quant(f"tensor {tensor.name!r}", tensor.shape, tensor.quant)
    return {t.name: t for t in manifest.tensors}


def _check_quant(label: str, shape: tuple[int, ...], quant: QuantParams | None) -> None:
    if quant is None:
        return
    if quant.axis is None:
        wanted = 1
    elif 0 <= quant.axis < len(shape):
        wanted = shape[quant.axis]
    else:
        raise SchemaError(f"{label}: quantization axis {quant.axis} is not an axis of shape {shape}")
    if len(quant.scale) != wanted:
        raise SchemaError(f"{label}: expected {wanted} scales, got {len(quant.scale)}")


def _check_states(manifest: Manifest, tensors: Mapping[str, TensorSpec]) -> None:
    _unique("state", [s.name for s in manifest.states])
    _known("state input", [s.input for s in manifest.states], tensors)
    _known("state output", [s.output for s in manifest.states], tensors)
    _unique("state input", [s.input for s in manifest.states])
    _unique("state output", [s.output for s in manifest.states])
    for state in manifest.states:
        _check_name("state", state.name)
        if state.input in manifest.inputs:
            raise SchemaError(f"state {state.name!r}: {state.input!r} is also an input of the plan")
        for name in (state.input, state.output):
            tensor = tensors[name]
            if (tensor.dtype, tensor.shape) != (state.dtype, state.shape):
                raise SchemaError(
                    f"state {state.name!r}: tensor {name!r} is {tensor.dtype.value} {tensor.shape}, "
                    f"expected {state.dtype.value} {state.shape}"
                )
        _check_quant(f"state {state.name!r}", state.shape, state.quant)
        for label, seconds in (("nominal_dt_s", state.nominal_dt_s), ("reset_after_s", state.reset_after_s)):
            if seconds is not None and not is_duration(seconds):
                raise SchemaError(
                    f"state {state.name!r}: {label} must be positive, at most {MAX_SECONDS:g}, got {seconds}"
                )


def _check_plan(manifest: Manifest, tensors: Mapping[str, TensorSpec]) -> None:
    """Steps in order can run: each reads what is there before it, and nothing is written twice."""
    _known("plan input", manifest.inputs, tensors)
    _known("plan output", manifest.outputs, tensors)
    if not manifest.inputs or not manifest.outputs or not manifest.plan:
        raise SchemaError("plan: expected at least one input, one output and one step")
    if len(manifest.plan) > MAX_STEPS:
        raise SchemaError(f"plan: expected at most {MAX_STEPS} steps, got {len(manifest.plan)}")
    _unique("step", [step.name for step in manifest.plan])
    ready = set(manifest.inputs) | {s.input for s in manifest.states}
    produced: set[str] = set()
    for step in manifest.plan:
        _check_name("step", step.name)
        _known(f"input of step {step.name!r}", step.inputs, tensors)
        _known(f"output of step {step.name!r}", step.outputs, tensors)
        if not step.outputs:
            raise SchemaError(f"step {step.name!r}: has no output")
        _check_repeat(manifest, step, tensors)
        for name in step.inputs:
            if name not in ready:
                raise SchemaError(f"step {step.name!r}: input {name!r} is not produced before it")
        for name in step.outputs:
            if name in ready:
                raise SchemaError(f"step {step.name!r}: output {name!r} is written twice")
        ready |= set(step.outputs)
        produced |= set(step.outputs)
    for name in (*manifest.outputs, *(s.output for s in manifest.states)):
        if name not in produced:
            raise SchemaError(f"plan: no step produces {name!r}")


def _check_repeat(manifest: Manifest, step: Segment | KernelStep, tensors: Mapping[str, TensorSpec]) -> None:
    """`repeat` and `when` of a step fit its tensors; neither goes with recurrent state."""
    where = f"step {step.name!r}"
    repeat = step.repeat if isinstance(step, Segment) else 1
    if not 1 <= repeat <= MAX_REPEAT:
        raise SchemaError(f"{where}: expected repeat from 1 to {MAX_REPEAT}, got {repeat}")
    if repeat > 1:
        for name in (*step.inputs, *step.outputs):
            if tensors[name].shape[:1] != (repeat,):
                raise SchemaError(
                    f"{where}: is repeated, but tensor {name!r} has shape {tensors[name].shape}, "
                    f"expected {repeat} along the first axis"
                )
    if step.when is not None:
        if step.when not in manifest.inputs:
            raise SchemaError(
                f"{where}: when {step.when!r}: no input of the plan. "
                f"{did_you_mean(step.when[:80], list(manifest.inputs)[:200])}"
            )
        if repeat > 1 and tensors[step.when].shape != (repeat,):
            raise SchemaError(
                f"{where}: when {step.when!r}: has shape {tensors[step.when].shape}, expected {(repeat,)}"
            )
    if repeat > 1 or step.when is not None:
        for state in manifest.states:
            if state.output in step.outputs or (repeat > 1 and state.input in step.inputs):
                raise SchemaError(
                    f"{where}: is repeated or may be skipped, so it cannot keep state {state.name!r}"
                )


def _check_kernel_files(manifest: Manifest) -> set[str]:
    paths: set[str] = set()
    for step in manifest.plan:
        if isinstance(step, KernelStep):
            _check_name(f"step {step.name!r}: kernel", step.kernel)
            for role, path in step.files.items():
                where = f"step {step.name!r}: file {role!r}"
                _check_name(f"{where}: role", role)
                if path != kernel_path(step.name, role):
                    raise SchemaError(f"{where}: path {path!r}, expected {kernel_path(step.name, role)!r}")
                if path not in manifest.files:
                    raise SchemaError(f"{where}: {path!r} is missing from the file table")
                paths.add(path)
    return paths


def _check_payloads(manifest: Manifest) -> set[str]:
    for step in manifest.plan:
        if isinstance(step, Segment):
            if not step.variants:
                raise SchemaError(f"segment {step.name!r}: has no variant")
            _unique(f"variant of segment {step.name!r}", [v.name for v in step.variants])
    paths: set[str] = set()
    for segment, variant in manifest.variants():
        where = f"variant {segment.name}/{variant.name}"
        for label, name in (("name", variant.name), ("format", variant.format), ("backend", variant.backend)):
            _check_name(f"{where}: {label}", name)
        path = payload_path(segment.name, variant.name, variant.format)
        if variant.path != path:
            raise SchemaError(f"{where}: path {variant.path!r}, expected {path!r}")
        entry = manifest.files.get(path)
        if entry is None:
            raise SchemaError(f"{where}: file {path!r} is missing from the file table")
        if variant.bytes != entry.bytes or variant.bytes < 1:
            raise SchemaError(f"{where}: {variant.bytes} bytes, but the file table says {entry.bytes}")
        if variant.digest != "sha256:" + entry.sha256:
            raise SchemaError(f"{where}: its digest differs from the file table's")
        paths.add(path)
    return paths


def _check_golden(manifest: Manifest, tensors: Mapping[str, TensorSpec]) -> set[str]:
    """Every plan input and output has golden values; states may have (else they start at `initial`)."""
    sides = (
        ("input", manifest.golden.inputs, manifest.inputs, [s.input for s in manifest.states]),
        ("output", manifest.golden.outputs, manifest.outputs, [s.output for s in manifest.states]),
    )
    paths: set[str] = set()
    for side, golden, needed, possible in sides:
        names = [g.tensor for g in golden]
        _known(f"golden {side}", names, tensors)
        for name in names:
            if name not in needed and name not in possible:
                raise SchemaError(f"golden {side} {name!r}: not an {side} of the plan")
        for name in needed:
            if name not in names:
                raise SchemaError(f"golden {side} {name!r}: missing, the bundle could not test itself")
        for g in golden:
            entry = manifest.files.get(g.path)
            if entry is None or not g.path.startswith("golden/"):
                raise SchemaError(
                    f"golden {side} {g.tensor!r}: file {g.path!r} is not in the file table below golden/"
                )
            tensor = tensors[g.tensor]
            if entry.bytes != tensor.nbytes:
                raise SchemaError(
                    f"golden {side} {g.tensor!r}: file has {entry.bytes} bytes, "
                    f"expected {tensor.nbytes} for {tensor.dtype.value} {tensor.shape}"
                )
            if g.atol < 0 or g.rtol < 0 or not 0 <= g.allow < 1:
                raise SchemaError(f"golden {side} {g.tensor!r}: expected atol, rtol >= 0 and 0 <= allow < 1")
            if g.path in paths:
                raise SchemaError(f"golden {side} {g.tensor!r}: file {g.path!r} serves two tensors")
            paths.add(g.path)
    return paths
