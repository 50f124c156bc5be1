"""Bundle -> Engine -> Session: what runs on the device.

An engine is a loaded bundle, immutable and shareable between threads. A session is one thread's
preallocated buffers on it. The engine executes the bundle's plan and knows no model by name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.backends.base import Executable, LoadOptions
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, UsageError
from edgekit.host import matches
from edgekit.manifest import KernelStep, Manifest, Segment, Variant
from edgekit.runtime import variants
from edgekit.runtime.session import Session
from edgekit.target import Target

if TYPE_CHECKING:
    from edgekit.tasks import Pipeline

__all__ = ["Engine", "Session", "foreign_target", "load"]

Progress = Callable[[float, str], None]


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

    bundle: a path, which the engine opens and closes, or an open bundle, which stays the caller's.
    threads: CPU threads of the inference library, 0 = its own choice.
    variant: name of the payload to use; by default the fastest that passes its self-test.
    self_test: golden input -> golden output within tolerance, no NaN, plausible latency.
    cache_dir: where engines compiled on the device are kept (default: the user's cache folder).
    progress: called as progress(done in 0..1, text) while something long runs.

    Raises: BundleError for a damaged bundle or one that cannot run on this machine, SelfTestError
    when it runs wrong, MissingExtraError when its library is not installed, UsageError for an
    unknown variant or a negative number of threads.
    """
    if threads < 0:
        raise UsageError(f"threads {threads}: expected 0 (the library's choice) or more")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    try:
        return Engine(opened, threads, variant, self_test, cache_dir, progress, owner=opened is not bundle)
    except BaseException:
        if opened is not bundle:
            opened.close()
        raise


class Engine:
    """A loaded bundle. Use `session()` or `pipeline()` per thread, or `predict` for one picture.

    variants: segment -> the payload in use. refused: "<segment>/<variant>" -> why it is not used.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 0,
        variant: str | None = None,
        self_test: bool = True,
        cache_dir: Path | None = None,
        progress: Progress | None = None,
        *,
        owner: bool = False,
    ) -> None:
        """As `load`; with `owner`, closing the engine closes the bundle."""
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.variants: dict[str, Variant] = {}
        self.refused: dict[str, str] = {}
        self._owner = owner
        self._executables: dict[str, Executable] = {}
        self._pipelines = threading.local()
        segments = _segments(bundle)
        variants.check_wanted(self.manifest, variant)
        options = LoadOptions(threads, cache_dir, progress=progress)
        loaded: dict[str, list[variants.Candidate]] = {}
        chosen: dict[str, variants.Candidate] = {}
        try:
            for segment in segments:
                loaded[segment.name] = variants.load_variants(bundle, segment, options, variant, self.refused)
            chosen = variants.choose(bundle, loaded, self_test, threads, self.refused)
        finally:
            variants.close([c for cs in loaded.values() for c in cs if c is not chosen.get(c.segment)])
        self.variants = {name: candidate.variant for name, candidate in chosen.items()}
        self._executables = {name: candidate.executable for name, candidate in chosen.items()}

    @property
    def task(self) -> str:
        return self.manifest.task

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, where the task has some."""
        names = self.manifest.pipeline.get("labels")
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def session(self) -> Session:
        """Buffers for one thread of work. Raises: UsageError when the engine is closed."""
        self._check_open()
        return Session(self.manifest, self._executables)

    def pipeline(self) -> Pipeline:
        """A session with the task's preprocessing and decoding around it, for one thread.

        Raises: BundleError for a task this edgekit has no pipeline for, or when the bundle's
        pipeline does not fit its network; UsageError when the engine is closed.
        """
        self._check_open()
        from edgekit import tasks

        if self.task not in tasks.TASKS:
            raise BundleError(f"bundle {self.bundle.path}: task {self.task!r} is not known. Upgrade edgekit")
        task = tasks.task(self.task)
        return task.open_pipeline(task.read_spec(self.manifest), self.session())

    def predict(self, image: np.ndarray, *, score_threshold: float | None = None) -> Any:
        """The task's result for one picture, uint8 [H, W, 3] in BGR order (as cv2 reads it): Detections or
        Classification.

        Every thread that calls it gets buffers of its own, which live as long as the thread.
        Raises: UsageError for anything that is no such picture, or when the engine is closed.
        """
        self._check_open()
        pipeline: Pipeline | None = getattr(self._pipelines, "pipeline", None)
        if pipeline is None:
            pipeline = self._pipelines.pipeline = self.pipeline()
        return pipeline(image, score_threshold=score_threshold)

    def describe(self) -> dict[str, Any]:
        """What runs here, per segment: payload, library, version, threads (JSON values)."""
        return {
            name: {"variant": v.name, "precision": v.precision, **self._executables[name].describe()}
            for name, v in self.variants.items()
            if name in self._executables
        }

    def close(self) -> None:
        """Release the payloads, and the bundle if the engine opened it. Closing twice is fine.

        Sessions still in use keep what they need (see Session).
        """
        self._pipelines = threading.local()
        executables, self._executables = self._executables, {}
        for executable in executables.values():
            executable.close()
        if self._owner:
            self.bundle.close()

    def _check_open(self) -> None:
        if not self._executables:
            raise UsageError(f"engine of {self.bundle.path}: is closed. Load the bundle again")

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _segments(bundle: Bundle) -> list[Segment]:
    """The plan's segments. Raises: BundleError for a plan that this edgekit cannot execute."""
    manifest, segments, read = bundle.manifest, [], set()
    for step in manifest.plan:
        if isinstance(step, KernelStep):
            raise BundleError(
                f"bundle {bundle.path}: step {step.name} needs kernel {step.kernel!r}, "
                "which this edgekit does not have. Upgrade edgekit"
            )
        segments.append(step)
        read |= set(step.inputs)
    if manifest.states:
        raise BundleError(
            f"bundle {bundle.path}: keeps state {manifest.states[0].name!r} between runs, "
            "which this edgekit cannot do. Upgrade edgekit"
        )
    for name in manifest.inputs:
        if name not in read:
            raise BundleError(
                f"bundle {bundle.path}: no step of its plan reads input {name!r}. Build it again"
            )
    return segments


def foreign_target(bundle: Bundle) -> str:
    """What to know when this machine is not the board that the bundle was built for; "" when it is."""
    if bundle.manifest.target not in Target.names():
        return f"built for {bundle.manifest.target}, a board that is not known here"
    backends = sorted({variant.backend for _, variant in bundle.manifest.variants()})
    return matches(Target.load(bundle.manifest.target), backends)[1]
