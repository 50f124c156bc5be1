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


def run_here(payload: Payload) -> Running:
    """Open a payload here: an ONNX file on ONNX Runtime, whatever backend it is for, any other on its own library.

    Raises: BundleError when the library refuses it.
    """
    size = len(payload.data)
    if payload.format != "onnx":
        given = dict(payload.options)
        variant = Variant("build", payload.backend, payload.precision, payload.format, "", size, "", given)
        own = half(payload.backend, "engine").load(memoryview(payload.data), variant, LoadOptions())
        return Running(payload, own.bind(), own.describe())
    # the Q/DQ of other libraries (float16 scales) has no kernels here, and stands for what theirs compute
    options = {"keep_qdq": payload.backend != "onnxruntime"}
    variant = Variant("build", "onnxruntime", payload.precision, payload.format, "", size, "", options)
    executable = half("onnxruntime", "engine").load(memoryview(payload.data), variant, LoadOptions())
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
        payload = self.candidate.payload
        return payload.format == "onnx" and payload.backend != "onnxruntime"

    @property
    def run_by(self) -> str:
        """What the evidence was measured with, in words."""
        import onnxruntime

        payload, facts = self.candidate.payload, self.candidate.facts
        if payload.format != "onnx":
            library = f"{facts.get('library', payload.backend)} {facts.get('version', '')}"
            return f"{library} on the build machine's CPU ({platform.machine()})"
        here = f"onnxruntime {onnxruntime.__version__} on the build machine's CPU ({platform.machine()})"
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
