"""The manifest of a bundle: what is inside, how it is joined and what it means (docs/bundle.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from edgekit.spec import StateSpec, TensorSpec

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
    """A network: the device keeps the fastest of `variants` that passes its self-test."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    variants: tuple[Variant, ...]
    kind: Literal["segment"] = "segment"


@dataclass(frozen=True)
class KernelStep:
    """A kernel of edgekit's own, run between segments."""

    name: str
    kernel: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    kind: Literal["kernel"] = "kernel"


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

    def variants(self) -> Iterator[tuple[Segment, Variant]]:
        for step in self.plan:
            if isinstance(step, Segment):
                for variant in step.variants:
                    yield step, variant
