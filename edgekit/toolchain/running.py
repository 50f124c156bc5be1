"""A payload at work on the build machine, beside the float network it came from.

It runs in a session, as on the device: recurrent states go round inside and are neither among its inputs nor
among its outputs. Footage to prove on are stills, uint8 [H, W, 3], or clips, sequences of these in time order
before the first of which every state is at its initial value.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekit.backends.base import Binding, Executable, LoadOptions, Payload, half
from edgekit.manifest import Variant
from edgekit.runtime.session import Session
from edgekit.spec import StateSpec
from edgekit.tasks import Pipeline, Spec, open_pipeline
from edgekit.toolchain import recurrent


@dataclass(frozen=True)
class Running:
    """A payload and its I/O on this machine."""

    payload: Payload
    binding: Binding
    facts: dict[str, Any] = field(default_factory=dict)
    """What the engine says of itself (Executable.describe)."""
    states: tuple[StateSpec, ...] = ()
    """Those of the graph."""

    @property
    def session(self) -> Session:
        """What `binding` is where there are states to look at."""
        assert isinstance(self.binding, Session)
        return self.binding

    def reset(self) -> None:
        """Every state to its initial value."""
        if isinstance(self.binding, Session):
            self.binding.reset()


OWN = ("onnxruntime", "litert", "openvino", "native")
"""Libraries that run on any machine: their payloads are proven on them."""


def run_here(payload: Payload, states: Sequence[StateSpec] = (), threads: int = 0) -> Running:
    """Open a payload on its own library where that runs here, else on ONNX Runtime (TensorRT's ONNX file).

    states: those of its graph. Raises: BundleError when the library refuses it; LoweringError where the
    payload does not hold the states.
    """
    executable = executable_here(payload, threads)
    plan = recurrent.plan(payload, recurrent.held(states, payload), "build")
    return Running(payload, Session(plan, {"build": executable}), executable.describe(), tuple(states))


def executable_here(payload: Payload, threads: int = 0) -> Executable:
    """The payload loaded, as `run_here` does it. Raises: BundleError when the library refuses it."""
    own = payload.backend in OWN
    backend = payload.backend if own else "onnxruntime"
    # the Q/DQ of other libraries (float16 scales) has no kernels here, and stands for what theirs compute
    options = dict(payload.options) if own else {"keep_qdq": True}
    size = len(payload.data)
    variant = Variant("build", backend, payload.precision, payload.format, "", size, "", options)
    found: Executable = half(backend, "engine").load(
        memoryview(payload.data), variant, LoadOptions(threads=threads)
    )
    return found


def run_by(payload: Payload, facts: Mapping[str, Any]) -> str:
    """What a payload was measured with here, in words. facts: `Executable.describe`."""
    library = f"{facts.get('library', payload.backend)} {facts.get('version', '')}".strip()
    here = f"{library} on the build machine's CPU ({platform.machine()})"
    if payload.backend in OWN:
        return here
    return f"{here}, running the {payload.precision} graph that {payload.backend} compiles on the board"


Still = Any
"""One of them: a still uint8 [H, W, 3], a moment of a rig (rig.RigFrame), or a clip (a sequence of stills)."""
Footage = Sequence[Still]
"""Stills or clips."""


def frames(pictures: Footage) -> Iterator[tuple[Any, bool]]:
    """(picture [H, W, 3] or moment, whether state begins anew with it) of stills and clips, in order."""
    for picture in pictures:
        clip: Sequence[Any] = picture if isinstance(picture, Sequence) else [picture]
        for number, frame in enumerate(clip):
            yield frame, number == 0


def results(pipelines: Sequence[Pipeline], pictures: Footage) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(picture, what each of `pipelines` finds in it), each with its own state."""
    for picture, begins in frames(pictures):
        if begins:
            for pipeline in pipelines:
                restart(pipeline)
        yield picture, tuple(pipeline(picture) for pipeline in pipelines)


def restart(pipeline: Pipeline) -> None:
    """Begin anew where the pipeline has anything that goes on from one picture to the next."""
    reset = getattr(pipeline, "reset", None)
    if reset is not None:
        reset()


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
        return run_by(self.candidate.payload, self.candidate.facts)

    def pipelines(self) -> tuple[Pipeline, Pipeline]:
        """Of the reference and of the candidate."""
        return (
            open_pipeline(self.spec, self.reference.binding),
            open_pipeline(self.spec, self.candidate.binding),
        )
