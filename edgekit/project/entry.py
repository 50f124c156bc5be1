"""What a project says: its models, and for each what its head means, what it is calibrated and judged on, its limits."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from edgekit.backends.base import BACKENDS
from edgekit.dataset import (
    DataSet,
)
from edgekit.errors import UsageError, did_you_mean
from edgekit.project.training import (
    ModuleSource,
    TrainHint,
)
from edgekit.spec import MAX_SECONDS, DType, is_duration
from edgekit.tasks.detect.coco import COCO_CLASSES
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.tasks.video.spec import MAX_WINDOW, EventRule, Fill, Smoothing
from edgekit.timebase import Policy

AnySpec = TypeVar("AnySpec", bound=Any)

FILE_NAME = "edgekit.toml"
PLAN_NAME = "plan.json"
"""What a folder holds whose networks and kernels make one plan (toolchain.plans)."""

TaskName = Literal["detect", "classify", "video", "fusion"]
HeadFamily = Literal["auto", "yolox", "yolov5", "yolov8", "nanodet", "fastestdet", "rows"]
Precision = Literal["auto", "float32", "float16", "int8", "dynamic"]
RESIZES = ("stretch", "crop", "crop-bottom", "letterbox", "letterbox-center")
PLANNED: tuple[TaskName, ...] = ("fusion",)
"""Tasks whose source is a plan folder."""
HEADS: tuple[str, ...] = get_args(HeadFamily)
PRECISIONS: tuple[str, ...] = get_args(Precision)
SEARCHES = ("search", "search+qat", "qat")
"""How int8 is searched for within the accuracy budget: without training; with training (compression/learn_steps.py)
where the budget is missed otherwise, before anything goes back to float; with training in any case."""
QUANTIZATIONS = (*SEARCHES, "minmax", "percentile", "entropy", "mse")
"""How int8 is found: one of SEARCHES, or one plain range scheme without any repair."""
COLUMNS = ("x1", "y1", "x2", "y2", "cx", "cy", "w", "h", "obj", "score", "class", "cls*")


def set_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not None."""
    items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    return {name: item for name, item in items if item is not None}


def safe_name(text: str, default: str = "model") -> str:
    """`text` as a project or model name: other characters become '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:64] or default


def check_name(name: str) -> None:
    # it becomes part of file names: <model>.<target>.edge
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"name {name[:70]!r} must be letters, digits, '.', '_' or '-', at most 64 of them")


@dataclass(frozen=True)
class HeadHint:
    """What the file says about the network's head; `auto` = found by structure.

    `columns`, `normalized` describe a `rows` head (tasks.detect.spec.DetectHead).
    """

    family: HeadFamily = "auto"
    columns: tuple[str, ...] = ()
    normalized: bool = False

    def __post_init__(self) -> None:
        unknown = [c for c in self.columns if c not in COLUMNS]
        if unknown:
            raise ValueError(f"unknown column {unknown[0]!r}. {did_you_mean(unknown[0], COLUMNS)}")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError("columns must differ from each other")
        if self.family == "rows" and not self.columns:
            raise ValueError('family \'rows\' needs columns, e.g. ["x1", "y1", "x2", "y2", "score", "class"]')
        if self.family != "rows" and (self.columns or self.normalized):
            raise ValueError('columns and normalized need family = "rows"')


@dataclass(frozen=True)
class PreprocessHint:
    """Fields of ImagePreprocess that replace the rule of the head family; None = the family's own.

    A classifier has no family: resize, color, mean and std are needed.
    """

    resize: Literal["letterbox", "letterbox-center", "stretch", "crop", "crop-bottom"] | None = None
    shorter_side: int | None = None
    scaled_width: int | None = None
    pad_value: int | None = None
    color: Literal["bgr", "rgb"] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    layout: Literal["NCHW", "NHWC"] | None = None
    dtype: DType | None = None
    interpolation: Literal["bilinear", "area"] | None = None

    def __post_init__(self) -> None:
        ImagePreprocess(width=1, height=1, **set_fields(self))  # its checks, now rather than in the build

    def apply(self, rule: ImagePreprocess) -> ImagePreprocess:
        """`rule` with the fields given here."""
        return dataclasses.replace(rule, **set_fields(self))


@dataclass(frozen=True)
class VideoHint:
    """`[model.video]`: what a network that watches a stream was trained for, and what is made of its answers.

    dt_s: seconds between two frames of its training clips; frames: of a clip, needed where neither the
    network nor anything else says it. reset_after_s: a longer gap ends state (default: 5 times dt_s).
    allow_bidirectional: build a network with shifts from the future all the same (passes.streamify).
    The rest as in tasks.video.spec.VideoSpec; None = its default.
    """

    dt_s: float | None = None
    frames: int | None = None
    reset_after_s: float | None = None
    allow_bidirectional: bool = False
    stepping: Policy | None = None
    fill: Fill | None = None
    background: str | None = None
    smoothing: Smoothing | None = None
    events: EventRule | None = None

    def __post_init__(self) -> None:
        for name in ("dt_s", "reset_after_s"):
            seconds = getattr(self, name)
            if seconds is not None and not is_duration(seconds):
                raise ValueError(f"{name} must be above 0 seconds and at most {MAX_SECONDS:g}, got {seconds}")
        if self.frames is not None and not 1 <= self.frames <= MAX_WINDOW:
            raise ValueError(f"frames must be between 1 and {MAX_WINDOW}, got {self.frames}")

    def fields(self) -> dict[str, Any]:
        """Those given here that a VideoSpec has under the same name."""
        return {k: v for k, v in set_fields(self).items() if k not in ("frames", "allow_bidirectional")}


@dataclass(frozen=True)
class Thresholds:
    """Fields of the task's spec, without `_threshold` (DetectSpec, ClassifySpec); None = its default."""

    score: float | None = None
    iou: float | None = None
    max_detections: int | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name in ("score", "iou"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if self.max_detections is not None and not 1 <= self.max_detections <= 100_000:
            raise ValueError(f"max_detections must be between 1 and 100000, got {self.max_detections}")
        if self.top_k is not None and not 1 <= self.top_k <= 1000:
            raise ValueError(f"top_k must be between 1 and 1000, got {self.top_k}")

    def over(self, base: Thresholds) -> Thresholds:
        """These, and `base` where nothing is given here."""
        return dataclasses.replace(base, **set_fields(self))

    def apply(self, spec: AnySpec) -> AnySpec:
        """`spec`, of any task, with the thresholds given here. Raises: UsageError for one that its task has not."""
        given = {
            {"score": "score_threshold", "iou": "iou_threshold"}.get(k, k): v
            for k, v in set_fields(self).items()
        }
        known = {f.name for f in dataclasses.fields(spec)}
        for name in given:
            if name not in known:
                raise UsageError(
                    f"thresholds.{name.removesuffix('_threshold')}: the task {spec.task} has none. Leave it out"
                )
        return dataclasses.replace(spec, **given)


@dataclass(frozen=True)
class Accept:
    """Limits that a build must meet, else it fails with exit code 1.

    max_drop: largest absolute drop of the task's metric (detect: AP, classify: top1; 0..1) against the
        float model.
    min_metric: smallest metric of the built model itself.
    max_score_shift: largest difference of a score against the float model: of a matched box, or of the
        best class.
    max_confidence_loss: by how much the scores of what both networks find may fall on average. A quantized
        detector may keep its AP and still have every score pressed down below the threshold of its user.
    """

    max_drop: float = 0.01
    min_metric: float | None = None
    max_score_shift: float | None = None
    max_confidence_loss: float = 0.05

    def __post_init__(self) -> None:
        for name, value in set_fields(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")


@dataclass(frozen=True)
class TargetOverride:
    """What one target does differently: `[model.target.<name>]`."""

    precision: Precision | None = None
    backends: tuple[str, ...] = ()
    """Backends to build for it, in order of preference; empty = the target's own."""
    thresholds: Thresholds = Thresholds()

    def __post_init__(self) -> None:
        for name in self.backends:
            if name not in BACKENDS:
                raise ValueError(f"unknown backend {name!r}. {did_you_mean(name, BACKENDS)}")


@dataclass(frozen=True)
class ModelEntry:
    """One network, or plan of several, to build. All paths are ready to open; `classes` is empty when none were given.

    source: the ONNX file, or the plan.json of a plan folder. module: in place of a file; `source` is then its name only,
    until `frontends.torch_module.exported` has written it.
    """

    name: str
    source: Path
    task: TaskName = "detect"
    head: HeadHint = HeadHint()
    classes: tuple[str, ...] = ()
    preprocess: PreprocessHint = PreprocessHint()
    thresholds: Thresholds = Thresholds()
    calibration: DataSet | None = None
    evaluation: DataSet | None = None
    accept: Accept = Accept()
    target: dict[str, TargetOverride] = field(default_factory=dict)
    video: VideoHint = VideoHint()
    batch: int = 1
    """Streams that one run takes (passes.lanes)."""
    module: ModuleSource | None = None
    train: TrainHint | None = None

    @property
    def is_plan(self) -> bool:
        return self.source.name == PLAN_NAME

    def on(self, target: str) -> TargetOverride:
        """The settings for one target: its overrides, with the model's thresholds filled in."""
        override = self.target.get(target, TargetOverride())
        return dataclasses.replace(override, thresholds=override.thresholds.over(self.thresholds))

    def labels(self, count: int) -> tuple[tuple[str, ...], str]:
        """Names of the network's `count` classes, and a note on where they come from ("" = as given).

        Raises: UsageError when the given names are not `count` many.
        """
        if self.classes:
            if len(self.classes) != count:
                raise UsageError(
                    f"model {self.name}: {len(self.classes)} class names for a network with {count} classes. "
                    f"Give a classes file with {count} lines"
                )
            return self.classes, ""
        if count == len(COCO_CLASSES):
            return COCO_CLASSES, "no class names given, 80 classes: taken as COCO's"
        names = tuple(f"class_{i}" for i in range(count))
        return names, f"no class names given: called {names[0]} to {names[-1]}"


@dataclass(frozen=True)
class Project:
    """The models of one `edgekit.toml`; `path` is None for a bare network."""

    name: str
    models: tuple[ModelEntry, ...]
    path: Path | None = None

    def model(self, name: str) -> ModelEntry:
        """The model called `name`. Raises: UsageError with a suggestion."""
        for entry in self.models:
            if entry.name == name:
                return entry
        known = [m.name for m in self.models]
        raise UsageError(f"model {name!r}: not in project {self.name}. {did_you_mean(name, known)}")
