"""Bundle -> Engine -> Session: what runs on the device.

An engine is a loaded bundle, immutable and shareable between threads. A session is one thread's
preallocated buffers on it. The engine executes the bundle's plan and knows no model by name.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from edgekit import timebase
from edgekit.backends.base import Executable, LoadOptions
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, UsageError, did_you_mean
from edgekit.host import matches
from edgekit.manifest import Manifest, Variant
from edgekit.runtime import tuning, variants
from edgekit.runtime.session import Session
from edgekit.runtime.slots import Streams, StreamSlot
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
    tune: bool = True,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Open a bundle and make it ready to run.

    bundle: a path, which the engine opens and closes, or an open bundle, which stays the caller's.
    threads: CPU threads of the inference library and of kernels, 0 = their own choice; in a plan with branches that
        run at the same time, each branch's share of the cores.
    variant: name of the payload to use; by default the fastest that passes its self-test.
    self_test: golden input -> golden output within tolerance, no NaN, plausible latency.
    tune: where several variants pass, run the fastest: as recorded on this device, else timed now (at
        most 1.5 s on top of loading and testing them) and recorded. False, or EDGEKIT_TUNE=off in the
        environment, takes the first one that passes.
    cache_dir: where engines compiled on the device and records of timings are kept (default: the
        user's cache folder).
    progress: called as progress(done in 0..1, text) while something long runs.

    Raises: BundleError for a damaged bundle or one that cannot run on this machine, SelfTestError
    when it runs wrong, MissingExtraError when its library is not installed, UsageError for an
    unknown variant or a negative number of threads.
    """
    if threads < 0:
        raise UsageError(f"threads {threads}: expected 0 (the library's choice) or more")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    try:
        return Engine(
            opened, threads, variant, self_test, cache_dir, progress, tune=tune, owner=opened is not bundle
        )
    except BaseException:
        if opened is not bundle:
            opened.close()
        raise


class Engine:
    """A loaded bundle. Use `session()` or `pipeline()` per thread, or `predict` for one picture.

    variants: segment -> the payload in use, why: segment -> the reason in words.
    refused: "<segment>/<variant>" -> why it is not used. tuning: what was timed, here or at an
    earlier load; None when there was nothing to choose.
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
        tune: bool = True,
        owner: bool = False,
    ) -> None:
        """As `load`; with `owner`, closing the engine closes the bundle."""
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self._owner = owner
        self._pipelines = threading.local()
        effort = None if not tune or tuning.switched_off() else tuning.AT_LOAD
        segments = variants.segments(bundle)
        options = LoadOptions(threads, cache_dir, progress=progress)
        kernels = variants.load_kernels(bundle, options)
        selected = variants.select(
            bundle,
            segments,
            options,
            wanted=variant,
            test=self_test,
            effort=effort,
            kernels=kernels,
        )
        self.refused: dict[str, str] = selected.refused
        self.why: dict[str, str] = selected.why
        self.tuning: tuning.Record | None = selected.record
        self.variants: dict[str, Variant] = {name: c.variant for name, c in selected.chosen.items()}
        self._executables: dict[str, Executable] = {
            **kernels,
            **{name: c.executable for name, c in selected.chosen.items()},
        }

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

    def streams(self) -> Streams:
        """One session, and with it one set of buffers, for any number of streams that each have their own
        state. For one thread. Raises: UsageError when the engine is closed.
        """
        return Streams(self.session())

    def pipeline(self, *, stepping: timebase.Policy | None = None) -> Pipeline:
        """A session with the task's preprocessing and decoding around it, for one thread.

        It takes one picture a call. Of a bundle built for a batch it uses one lane and computes the others in vain.
        stepping: what a network that keeps state does about frames that are missing or early
        (timebase.stepping); by default as its bundle says.

        Raises: BundleError for a task this edgekit has no pipeline for, or when the bundle's
        pipeline does not fit its network; UsageError when the engine is closed, or for `stepping` with a
        network that keeps no state.
        """
        self._check_open()
        from edgekit import tasks

        if self.task not in tasks.TASKS:
            raise BundleError(f"bundle {self.bundle.path}: task {self.task!r} is not known. Upgrade edgekit")
        task = tasks.task(self.task)
        spec = task.read_spec(self.manifest)
        if self.manifest.states and not hasattr(spec, "stepping"):
            raise BundleError(
                f"bundle {self.bundle.path}: its network keeps state, but the task {self.task} has one pipeline for all "
                "cameras, which would share it. Build it with --task video"
            )
        if stepping is not None:
            if not hasattr(spec, "stepping"):
                raise UsageError(
                    f"stepping {stepping!r}: bundle {self.bundle.path} keeps no state, its task is {self.task}. "
                    "Leave it out"
                )
            if stepping not in get_args(timebase.Policy):
                raise UsageError(
                    f"stepping {stepping!r}: unknown. {did_you_mean(stepping, get_args(timebase.Policy))}"
                )
            spec = dataclasses.replace(spec, stepping=stepping)
        session = self.session()
        streams = Streams(session)
        runnable = session if streams.lanes == 1 else StreamSlot(streams, "", owner=True)
        return task.open_pipeline(spec, runnable)

    def predict(
        self,
        image: np.ndarray,
        *,
        score_threshold: float | None = None,
        taken_ns: int | None = None,
        epoch: int = 0,
    ) -> Any:
        """The task's result for one picture, uint8 [H, W, 3] in BGR order (as cv2 reads it): Detections,
        Classification or VideoResult.

        taken_ns, epoch: when it was taken, for a network that keeps state from call to call (tasks.Pipeline); such a
        one serves one camera per thread. `pipeline()` gives as many as there are cameras.
        Every thread that calls it gets buffers of its own, which live as long as the thread.
        Raises: UsageError for anything that is no such picture, or when the engine is closed.
        """
        self._check_open()
        pipeline: Pipeline | None = getattr(self._pipelines, "pipeline", None)
        if pipeline is None:
            pipeline = self._pipelines.pipeline = self.pipeline()
        return pipeline(image, score_threshold=score_threshold, taken_ns=taken_ns, epoch=epoch)

    def describe(self) -> dict[str, Any]:
        """What runs here and why, per step: of segments payload, library, version, threads; of kernels that they are,
        library and threads (JSON values)."""

        def facts(name: str) -> dict[str, Any]:
            said = self._executables[name].describe()
            used = self.variants.get(name)
            if used is None:  # told alike, so that reports need no second form
                return {"variant": said["kernel"], "why": "a kernel of edgekit", **said}
            return {"variant": used.name, "precision": used.precision, "why": self.why[name], **said}

        return {step.name: facts(step.name) for step in self.manifest.plan if step.name in self._executables}

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


def foreign_target(bundle: Bundle) -> str:
    """What to know when this machine is not the board that the bundle was built for; "" when it is."""
    if bundle.manifest.target not in Target.names():
        return f"built for {bundle.manifest.target}, a board that is not known here"
    backends = sorted({variant.backend for _, variant in bundle.manifest.variants()})
    return matches(Target.load(bundle.manifest.target), backends)[1]
