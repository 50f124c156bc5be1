"""Tasks: what a network is for. One package a task; what the core asks of each is listed here.

    tasks/<task>/task.py             the functions of `Task`: both halves use them, so standard library and numpy only
    toolchain/tasks/<task>.py        what only a build asks (`toolchain.tasks.ToolchainTask`)

A task's spec, evaluation set and result carry its name in `task`, so whoever holds one of them
finds the rest with `of`. Adding a task: these two files, and its name in `TASKS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from edgekit.errors import BundleError, UsageError, did_you_mean
from edgekit.schema import SchemaError, from_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from edgekit.manifest import Manifest
    from edgekit.tasks.preprocess import ImagePreprocess

TASKS = ("detect", "classify", "video", "fusion")

_Spec = TypeVar("_Spec")


class Runnable(Protocol):
    """The part of a session (or of one backend's binding) that a pipeline uses.

    State that a network carries from run to run is in neither of the two; one that has some has a method
    `reset()`, which begins anew. One of which some inputs take codes has `codes`: their parameters by name.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def run(self) -> None: ...


class Spec(Protocol):
    """The `pipeline` table of a bundle: a frozen dataclass that `schema` reads and writes."""

    @property
    def task(self) -> str: ...
    @property
    def preprocess(self) -> ImagePreprocess: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def score_threshold(self) -> float: ...


class Result(Protocol):
    """What one picture gives. `len` counts what the task finds (boxes, classes)."""

    @property
    def task(self) -> str: ...
    def __len__(self) -> int: ...

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts: a line of a .jsonl sink."""
        ...

    def draw(self, image: np.ndarray) -> np.ndarray:
        """A copy of the picture, uint8 BGR [H, W, 3], that shows the result."""
        ...

    def caption(self) -> str:
        """A few words for below a picture."""
        ...


class Pipeline(Protocol):
    """One thread's way from a picture, uint8 [H, W, 3] BGR or Pixels, to a result; one whose class says `takes_rigs = True`
    takes a `rig.RigFrame` instead.

    stage_ns: (preprocess, engine, decode) of the last call, nanoseconds of wall time.

    taken_ns, epoch: when the picture was taken, as in `runtime.frames.Frame`; a task whose pictures stand alone
    ignores both. Without `taken_ns` a call is one nominal step. One that carries state from call to call serves
    one camera, and has a method `reset()` that forgets it.
    """

    session: Runnable
    stage_ns: tuple[int, int, int]

    def __call__(
        self,
        image: Any,
        *,
        score_threshold: float | None = None,
        taken_ns: int | None = None,
        epoch: int = 0,
    ) -> Any: ...


class EvaluationSet(Protocol):
    """Labelled pictures, classes as the model numbers them. Equal digests mean equal evaluations."""

    @property
    def task(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def images(self) -> Sequence[Any]: ...
    @property
    def digest(self) -> str: ...

    def read(self, index: int) -> Any:
        """Picture `index`, uint8 [H, W, 3] BGR, or a `rig.RigFrame` for a task that takes these. Raises: UsageError for a
        file that is no picture."""
        ...


class Task(Protocol):
    """The functions of `tasks/<task>/task.py`."""

    METRIC: str
    """Key of the metric that the accuracy budget is about, 0..1, larger is better."""
    UNIT: str
    """What `len` of a result counts, plural."""
    LABELLED: str
    """What an evaluation set has labels of, plural: pictures or clips."""

    def read_spec(self, manifest: Manifest) -> Any:
        """The task's spec in a manifest. Raises: BundleError when it is not one."""
        ...

    def open_pipeline(self, spec: Any, session: Runnable) -> Pipeline:
        """Raises: BundleError when `spec` does not fit the session's tensors."""
        ...

    def read_set(
        self, data: Path, images: Path | None, *, limit: int | None = None, labels: tuple[str, ...] = ()
    ) -> EvaluationSet:
        """Labelled pictures; `labels`: the model's class names. Raises: UsageError."""
        ...

    def evaluate(
        self, pipeline: Any, data: Any, *, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, Any], Any]:
        """The metric of `pipeline` on `data` (METRIC and others, `per_class`), and what it was computed from."""
        ...

    def bootstrap(
        self, data: Any, results: Any, *, progress: Callable[[int, int], None] | None = None
    ) -> list[float | None]:
        """METRIC of resampled pictures; round i draws the same pictures for every `results` of one `data`."""
        ...

    def agreement(self, pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
        """How far results of (float network, payload) agree, per picture.

        Keys: images, unit, and with that unit <unit>_reference (how many the float network has) and
        <unit>_matched (how many of those the payload has too); score_shift_mean, score_shift_max (of
        the matched), lost_score_max (score of the best that was not matched) or None each; pairs
        (a sample of [score of the float network, score of the payload]).
        """
        ...


def task(name: str) -> Task:
    """The functions of a task. Raises: UsageError for an unknown one."""
    if name not in TASKS:
        raise UsageError(f"task {name!r}: unknown. {did_you_mean(name, TASKS)}")
    return cast("Task", importlib.import_module(f"edgekit.tasks.{name}.task"))


def spec_in(manifest: Manifest, kind: type[_Spec]) -> _Spec:
    """The `pipeline` table of a manifest as a task's spec. Raises: BundleError when it is not one."""
    try:
        return from_json(kind, manifest.pipeline, "manifest pipeline")
    except SchemaError as error:
        raise BundleError(f"bundle: {error}") from None


def of(thing: Any) -> Task:
    """The task of a spec, an evaluation set or a result."""
    return task(thing.task)


def open_pipeline(spec: Any, session: Runnable) -> Pipeline:
    """The pipeline of the spec's task around a session. Raises: BundleError when they do not fit."""
    return of(spec).open_pipeline(spec, session)
