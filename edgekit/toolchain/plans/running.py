"""Payloads put together: the manifest of a plan, and the plan at work on the build machine.

Each network runs on its payload's own library where that runs here, else on ONNX Runtime; kernels are the device's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edgekit import tasks
from edgekit.backends.base import Executable, LoadOptions, Payload
from edgekit.bundle import make_variant
from edgekit.errors import LoweringError
from edgekit.kernels import steps as kernel_steps
from edgekit.manifest import SCHEMA_VERSION, Golden, KernelStep, Manifest, Segment
from edgekit.runtime.session import Session
from edgekit.schema import to_json
from edgekit.spec import DType
from edgekit.tasks import Pipeline
from edgekit.toolchain import cache
from edgekit.toolchain.plans.source import PlanSource
from edgekit.toolchain.running import OWN, executable_here, run_by

KEPT = 32
"""Loaded payloads that are kept for the next opening, those used last."""

Payloads = Mapping[str, Payload]
"""One payload for each network of a plan, by its name."""


def manifest(
    source: PlanSource, variants: Mapping[str, Sequence[Payload]], target: str, spec: Any | None = None
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of a bundle with these payloads, without golden values and provenance, and the files that they and
    the kernels need. spec: the pipeline's, that of the plan by default.

    Raises: LoweringError for a payload that wants other tensors than the plan has.
    """
    files = dict(source.files)
    plan: list[Segment | KernelStep] = []
    for step in source.file.steps:
        if step.kernel is not None:
            plan.append(source.kernels[step.name])
            continue
        found = []
        for payload in variants[step.name]:
            _check(source, step.name, step.repeat, payload)
            found.append(make_variant(step.name, payload.variant, payload))
            files[found[-1].path] = payload.data
        plan.append(
            Segment(step.name, step.inputs, step.outputs, tuple(found), repeat=step.repeat, when=step.when)
        )
    made = Manifest(
        schema_version=SCHEMA_VERSION,
        model=source.entry.name,
        task=source.file.task,
        target=target,
        inputs=tuple(t.name for t in source.file.inputs),
        outputs=source.file.outputs,
        tensors=tuple(source.tensors.values()),
        plan=tuple(plan),
        pipeline=source.file.pipeline if spec is None else to_json(spec),
        payload_digest="",
        golden=Golden((), ()),
        files={},
        provenance={},
    )
    return made, files


def _check(source: PlanSource, name: str, repeat: int, payload: Payload) -> None:
    for tensor in (*payload.inputs, *payload.outputs):
        known = source.tensors[tensor.name]
        shape = (1, *known.shape[1:]) if repeat > 1 else known.shape
        if (tensor.dtype, tensor.shape) != (DType.float32, shape):
            raise LoweringError(
                f"network {name}, {payload.variant}: tensor {tensor.name} is {tensor.dtype.value} "
                f"{list(tensor.shape)}, expected float32 {list(shape)}. Report it with the model"
            )


@dataclass(frozen=True)
class PlanRunning:
    """A plan at work. facts: what each step's engine says of itself, by step."""

    payloads: Payloads
    spec: Any
    session: Session
    pipeline: Pipeline
    facts: Mapping[str, Mapping[str, Any]]
    content: tuple[str, ...]
    """All that decides what it computes, the code aside (`accuracy.measured`)."""

    @property
    def simulated(self) -> bool:
        """Some payload did not run on the library that it is for."""
        return any(p.backend not in OWN for p in self.payloads.values())

    @property
    def run_by(self) -> str:
        """What it was measured with, in words."""
        said = [run_by(payload, self.facts[name]) for name, payload in self.payloads.items()]
        return "; ".join(dict.fromkeys(said)) + "; kernels on its CPU"


class Workshop:
    """Opens plans of one source here, sharing what they have in common. threads: of each engine, 0 = its choice."""

    def __init__(self, source: PlanSource, threads: int = 0) -> None:
        self.source, self.threads = source, threads
        self._networks: dict[tuple[str, bytes], Executable] = {}
        self._kernels: dict[str, Executable] = {}
        first, _ = manifest(source, dict.fromkeys(source.networks, ()), "host")
        self.spec = source.entry.thresholds.apply(tasks.task(source.file.task).read_spec(first))
        """Of the pipeline, with the project's thresholds."""

    def open(self, payloads: Payloads, spec: Any | None = None) -> PlanRunning:
        """A session and pipeline of these payloads. Close its session when done.

        Raises: BundleError when a library refuses a payload, a kernel its options or the pipeline the tensors.
        """
        source = self.source
        made, _ = manifest(
            source, {name: (payload,) for name, payload in payloads.items()}, "host", spec or self.spec
        )
        executables: dict[str, Executable] = {}
        options = {
            n: {k: v for k, v in s.options.items() if k != "weights"} for n, s in source.kernels.items()
        }
        content = [source.digest, cache.digest(to_json(options))]
        for step in made.plan:
            if isinstance(step, KernelStep):
                executables[step.name] = self._kernel(step)
                continue
            payload = payloads[step.name]
            key = (payload.backend, hashlib.sha256(payload.data).digest())
            content += [payload.backend, key[1].hex()]
            found = self._networks.pop(key, None) or executable_here(payload, self.threads)
            executables[step.name] = self._networks[key] = found
        while len(self._networks) > KEPT:  # of trials; whoever still runs one keeps it
            del self._networks[next(iter(self._networks))]
        facts = {name: executable.describe() for name, executable in executables.items()}
        session = Session(made, executables)
        try:
            pipeline = tasks.open_pipeline(spec or self.spec, session)
        except BaseException:
            session.close()
            raise
        return PlanRunning(dict(payloads), spec or self.spec, session, pipeline, facts, tuple(content))

    @contextmanager
    def opened(self, payloads: Payloads, spec: Any | None = None) -> Iterator[PlanRunning]:
        """`open`, closed at the end."""
        running = self.open(payloads, spec)
        try:
            yield running
        finally:
            running.session.close()

    def _kernel(self, step: KernelStep) -> Executable:
        if step.name not in self._kernels:
            self._kernels[step.name] = kernel_steps.load(
                step,
                self.source.tensors,
                lambda path: memoryview(self.source.files[path]),
                LoadOptions(threads=self.threads),
            )
        return self._kernels[step.name]

    def close(self) -> None:
        for executable in (*self._networks.values(), *self._kernels.values()):
            executable.close()
        self._networks.clear()
        self._kernels.clear()
