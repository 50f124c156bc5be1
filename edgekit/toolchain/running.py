"""A payload at work on the build machine, beside the float network it came from."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

from edgekit.backends.base import Binding, LoadOptions, Payload, half
from edgekit.manifest import Variant
from edgekit.tasks import Pipeline, Spec, open_pipeline


@dataclass(frozen=True)
class Running:
    """A payload and its I/O on this machine."""

    payload: Payload
    binding: Binding
    facts: dict[str, Any] = field(default_factory=dict)
    """What the engine says of itself (Executable.describe)."""


OWN = ("onnxruntime", "litert", "openvino")
"""Libraries that run on any machine: their payloads are proven on them."""


def run_here(payload: Payload, threads: int = 0) -> Running:
    """Open a payload on its own library where that runs here, else on ONNX Runtime (TensorRT's ONNX file).

    Raises: BundleError when the library refuses it.
    """
    own = payload.backend in OWN
    backend = payload.backend if own else "onnxruntime"
    # the Q/DQ of other libraries (float16 scales) has no kernels here, and stands for what theirs compute
    options = dict(payload.options) if own else {"keep_qdq": True}
    size = len(payload.data)
    variant = Variant("build", backend, payload.precision, payload.format, "", size, "", options)
    given = LoadOptions(threads=threads)
    executable = half(backend, "engine").load(memoryview(payload.data), variant, given)
    return Running(payload, executable.bind(), executable.describe())


@dataclass(frozen=True)
class Subject:
    """What a build proves: `candidate`, against the float network `reference`."""

    spec: Spec
    reference: Running
    candidate: Running

    @property
    def simulated(self) -> bool:
        """The candidate did not run on the library it is for."""
        return self.candidate.payload.backend not in OWN

    @property
    def run_by(self) -> str:
        """What the evidence was measured with, in words."""
        payload, facts = self.candidate.payload, self.candidate.facts
        library = f"{facts.get('library', payload.backend)} {facts.get('version', '')}".strip()
        here = f"{library} on the build machine's CPU ({platform.machine()})"
        if self.simulated:
            return (
                f"{here}, running the {payload.precision} graph that {payload.backend} compiles on the board"
            )
        return here

    def pipelines(self) -> tuple[Pipeline, Pipeline]:
        """Of the reference and of the candidate."""
        return (
            open_pipeline(self.spec, self.reference.binding),
            open_pipeline(self.spec, self.candidate.binding),
        )
