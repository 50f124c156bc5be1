"""Bundle -> Engine -> Session: what runs on the device.

An engine is a loaded bundle, immutable and shareable between threads. A session is one thread's
preallocated buffers on it. The engine executes the bundle's plan and knows no model by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.backends.base import Binding, Executable, LoadOptions, half
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, EdgekitError, UsageError
from edgekit.host import backend_problem, matches
from edgekit.manifest import Manifest, Segment, Variant
from edgekit.runtime.selftest import check_golden, check_latency
from edgekit.target import Target

if TYPE_CHECKING:
    from edgekit.tasks.detect.detections import Detections
    from edgekit.tasks.detect.pipeline import DetectPipeline

Progress = Callable[[float, str], None]

RACE_RUNS = 5
"""Runs by which the fastest of several variants is chosen at load."""


def load(
    bundle: str | Path | Bundle,
    *,
    threads: int = 0,
    variant: str | None = None,
    self_test: bool = True,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Open a bundle and make it ready to run.

    threads: CPU threads of the inference library, 0 = its own choice.
    variant: name of the payload to use; by default the fastest that passes its self-test.
    self_test: golden input -> golden output within tolerance, no NaN, plausible latency.
    cache_dir: where engines compiled on the device are kept (default: the user's cache folder).
    progress: called as progress(done in 0..1, text) while something long runs.

    Raises: BundleError for a damaged bundle or one that cannot run on this machine, SelfTestError
    when it runs wrong, MissingExtraError when its library is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    try:
        return Engine(opened, threads, variant, self_test, cache_dir, progress)
    except BaseException:
        if opened is not bundle:
            opened.close()
        raise


class Engine:
    """A loaded bundle. Use `session()` per thread, or `predict` for one picture."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int,
        variant: str | None,
        self_test: bool,
        cache_dir: Path | None,
        progress: Progress | None,
    ) -> None:
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.refused: dict[str, str] = {}
        """Variants that were not used, with the reason."""
        self._executables: dict[str, Executable] = {}
        self._pipeline: DetectPipeline | None = None
        self.variants: dict[str, Variant] = {}
        """Segment name -> the payload in use."""
        options = LoadOptions(threads, cache_dir, progress=progress)
        try:
            for step in self.manifest.plan:
                if not isinstance(step, Segment):
                    raise BundleError(
                        f"bundle {bundle.path}: step {step.name} needs kernel {step.kernel!r}, "
                        "which this edgekit does not have. Upgrade edgekit"
                    )
                self._load_segment(step, options, variant)
            if self_test:
                self._self_test()
        except BaseException:
            self.close()
            raise

    @property
    def task(self) -> str:
        return self.manifest.task

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.manifest.pipeline.get("labels", ()))

    def session(self) -> Session:
        """Buffers for one thread of work."""
        return Session(self.manifest, self._executables)

    def pipeline(self) -> DetectPipeline:
        """A session with the task's preprocessing and decoding around it, for one thread.

        Raises: BundleError for a task this edgekit has no pipeline for.
        """
        if self.task != "detect":
            raise BundleError(f"bundle {self.bundle.path}: task {self.task!r} is not known. Upgrade edgekit")
        from edgekit.tasks.detect.pipeline import DetectPipeline, read_spec

        return DetectPipeline(read_spec(self.manifest), self.session())

    def predict(self, image: np.ndarray, *, score_threshold: float | None = None) -> Detections:
        """Detect on one picture, uint8 [H, W, 3] in BGR order (as cv2 reads it).

        Convenient, not for several threads at once: those use `pipeline()` each.
        """
        if self._pipeline is None:
            self._pipeline = self.pipeline()
        return self._pipeline(image, score_threshold=score_threshold)

    def describe(self) -> dict[str, Any]:
        """What runs here: payload, library, version, threads (JSON values)."""
        return {
            name: {"variant": v.name, "precision": v.precision, **self._executables[name].describe()}
            for name, v in self.variants.items()
        }

    def close(self) -> None:
        for executable in self._executables.values():
            executable.close()
        self._executables = {}
        self._pipeline = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load_segment(self, segment: Segment, options: LoadOptions, wanted: str | None) -> None:
        names = [v.name for v in segment.variants]
        if wanted is not None and wanted not in names:
            raise UsageError(f"variant {wanted!r}: not in this bundle, it has {', '.join(names)}")
        loaded: list[tuple[Variant, Executable]] = []
        failure: EdgekitError | None = None
        for variant in segment.variants:
            if wanted is not None and variant.name != wanted:
                continue
            try:
                problem = backend_problem(variant.backend)
                if problem:
                    raise BundleError(f"bundle {self.bundle.path}: cannot run on this machine: {problem}")
                data = self.bundle.read(variant.path)
                executable = half(variant.backend, "engine").load(
                    data, variant, replace(options, cache_key=variant.digest)
                )
                loaded.append((variant, executable))
                self._check_io(segment, variant, executable)
            except EdgekitError as error:
                self.refused[variant.name] = str(error)
                failure = failure or error
        if not loaded:
            assert failure is not None, "a segment has at least one variant"
            raise failure
        keep = min(range(len(loaded)), key=lambda i: _race(loaded[i][1])) if len(loaded) > 1 else 0
        for i, (variant, executable) in enumerate(loaded):
            if i != keep:
                executable.close()
                self.refused[variant.name] = f"slower here than {loaded[keep][0].name}"
        self.variants[segment.name], self._executables[segment.name] = loaded[keep]

    def _check_io(self, segment: Segment, variant: Variant, executable: Executable) -> None:
        for kind, names, specs in (
            ("input", segment.inputs, executable.inputs),
            ("output", segment.outputs, executable.outputs),
        ):
            found = {s.name: s for s in specs}
            for name in names:
                want, got = self.manifest.tensor(name), found.get(name)
                if got is None or got.shape != want.shape or got.dtype != want.dtype:
                    shown = f"{got.dtype.value} {list(got.shape)}" if got else "nothing"
                    raise BundleError(
                        f"payload {variant.name}: {kind} {name}: expected {want.dtype.value} "
                        f"{list(want.shape)}, got {shown}. Build the bundle again"
                    )

    def _self_test(self) -> None:
        session = self.session()
        try:
            for tensor in self.manifest.golden.inputs:
                spec = self.manifest.tensor(tensor.tensor)
                values = np.frombuffer(self.bundle.read(tensor.path), spec.dtype.value).reshape(spec.shape)
                np.copyto(session.inputs[tensor.tensor], values)
            session.run()
            for tensor in self.manifest.golden.outputs:
                spec = self.manifest.tensor(tensor.tensor)
                golden = np.frombuffer(self.bundle.read(tensor.path), spec.dtype.value).reshape(spec.shape)
                check_golden(str(self.bundle.path), tensor, golden, session.outputs[tensor.tensor])
            check_latency(str(self.bundle.path), self.bundle.evidence, session.run)
        finally:
            session.close()


class Session:
    """Preallocated, named I/O of one thread. Write `inputs`, `run()`, read `outputs`.

    The arrays stay the same for the life of the session and are overwritten by the next run.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __init__(self, manifest: Manifest, executables: Mapping[str, Executable]) -> None:
        self._bindings: list[Binding] = [executables[step.name].bind() for step in manifest.plan]
        produced: dict[str, np.ndarray] = {}
        inputs: dict[str, np.ndarray] = {}
        copies: list[list[tuple[np.ndarray, np.ndarray]]] = []
        for step, binding in zip(manifest.plan, self._bindings, strict=True):
            moves = []
            for name in step.inputs:
                if name in produced:
                    moves.append((binding.inputs[name], produced[name]))
                elif name in inputs:
                    moves.append((binding.inputs[name], inputs[name]))
                else:
                    inputs[name] = binding.inputs[name]
            copies.append(moves)
            produced.update({name: binding.outputs[name] for name in step.outputs})
        self.inputs = {name: inputs[name] for name in manifest.inputs}
        self.outputs = {name: produced[name] for name in manifest.outputs}
        self.bytes_copied_per_run = sum(dst.nbytes for moves in copies for dst, _ in moves)
        """Copies between the steps of the plan, made by the CPU."""
        self._steps = [
            (binding.run, tuple(moves)) for binding, moves in zip(self._bindings, copies, strict=True)
        ]
        if len(self._steps) == 1 and not copies[0]:
            self.run = self._bindings[0].run  # type: ignore[method-assign]  # no hop for the common case

    def run(self) -> None:
        """One step of the whole plan. Raises: StreamError when an engine fails."""
        for run, moves in self._steps:
            for target, source in moves:
                np.copyto(target, source)
            run()

    def close(self) -> None:
        for binding in self._bindings:
            binding.close()
        self._bindings = []

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _race(executable: Executable) -> float:
    """Best of a few runs, seconds."""
    binding = executable.bind()
    try:
        best = float("inf")
        for _ in range(RACE_RUNS):
            start = time.perf_counter()
            binding.run()
            best = min(best, time.perf_counter() - start)
        return best
    finally:
        binding.close()


def foreign_target(bundle: Bundle) -> str:
    """What to know when this machine is not the board that the bundle was built for; "" when it is."""
    if bundle.manifest.target not in Target.names():
        return f"built for {bundle.manifest.target}, a board that is not known here"
    backends = sorted({variant.backend for _, variant in bundle.manifest.variants()})
    return matches(Target.load(bundle.manifest.target), backends)[1]
