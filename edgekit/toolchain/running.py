"""A payload at work on the build machine, beside the float network it came from."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from edgekit.backends.base import Binding, LoadOptions, Payload, half
from edgekit.manifest import Variant
from edgekit.tasks import Pipeline, Spec, open_pipeline


@dataclass(frozen=True)
class Running:
    """A payload and its I/O on this machine's ONNX Runtime."""

    payload: Payload
    binding: Binding


def run_here(payload: Payload) -> Running:
    """Open a payload on this machine's ONNX Runtime, whatever backend it is for (all are ONNX).

    Raises: BundleError when ONNX Runtime refuses it.
    """
    # the Q/DQ of other libraries (float16 scales) has no kernels here, and stands for what theirs compute
    options = {"keep_qdq": payload.backend != "onnxruntime"}
    size = len(payload.data)
    variant = Variant("build", "onnxruntime", payload.precision, payload.format, "", size, "", options)
    executable = half("onnxruntime", "engine").load(memoryview(payload.data), variant, LoadOptions())
    return Running(payload, executable.bind())


@dataclass(frozen=True)
class Subject:
    """What a build proves: `candidate`, against the float network `reference`."""

    spec: Spec
    reference: Running
    candidate: Running

    @property
    def simulated(self) -> bool:
        """The candidate did not run on the library it is for."""
        return self.candidate.payload.backend != "onnxruntime"

    @property
    def run_by(self) -> str:
        """What the evidence was measured with, in words."""
        import onnxruntime

        payload = self.candidate.payload
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
