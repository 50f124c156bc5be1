"""`edgekit.toml`: which models to build, what their heads mean, what to calibrate and to judge them on.

    project = open_project(None)                       # ./edgekit.toml, else the shipped detector
    project = open_project(Path("model.onnx"))         # a bare network: everything found or given
    project = load_project(Path("apps/detect"))        # a folder that holds an edgekit.toml

Keys are described in docs/projects.md. Paths in the file are relative to the file. Reading is
strict: an unknown key, a wrong type or a missing file is a one-line UsageError.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from edgekit import content
from edgekit.backends.base import BACKENDS
from edgekit.dataset import (
    DataSet,
    DataTable,
    Purpose,
    check_disjoint,
    check_pair,
    from_option,
    from_uri,
    is_uri,
    resolve,
)
from edgekit.errors import UsageError, did_you_mean
from edgekit.files import read_text, read_toml
from edgekit.project_train import (
    ModuleSource,
    TrainHint,
    TrainTable,
    check_input,
    is_factory,
    module_source,
)
from edgekit.schema import SchemaError, from_json, parse_json, printable, to_json
from edgekit.spec import MAX_LANES, MAX_SECONDS, DType, is_duration
from edgekit.target import Target
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


def _given(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not None."""
    items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    return {name: item for name, item in items if item is not None}


# --- what a project says (the tables of the file, and what the rest of the toolchain reads) ------


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
        ImagePreprocess(width=1, height=1, **_given(self))  # its checks, now rather than in the build

    def apply(self, rule: ImagePreprocess) -> ImagePreprocess:
        """`rule` with the fields given here."""
        return dataclasses.replace(rule, **_given(self))


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
        return {k: v for k, v in _given(self).items() if k not in ("frames", "allow_bidirectional")}


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
        return dataclasses.replace(base, **_given(self))

    def apply(self, spec: AnySpec) -> AnySpec:
        """`spec`, of any task, with the thresholds given here. Raises: UsageError for one that its task has not."""
        given = {
            {"score": "score_threshold", "iou": "iou_threshold"}.get(k, k): v for k, v in _given(self).items()
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
        for name, value in _given(self).items():
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


# --- opening one -------------------------------------------------------------------------------


def open_project(argument: Path | None) -> Project:
    """What `edgekit build [ARGUMENT]` means: a network, a plan folder, a project (file or folder) or, with no argument,
    ./edgekit.toml or else the shipped detector. Raises: UsageError."""
    if argument is None:
        here = Path(FILE_NAME)
        return load_project(here if os.path.isfile(here) else default_app())
    if argument.suffix.lower() == ".onnx":
        return bare_project(argument)
    if argument.name == PLAN_NAME or (
        os.path.isfile(argument / PLAN_NAME) and not os.path.isfile(argument / FILE_NAME)
    ):
        return bare_plan(argument)
    if os.path.isdir(argument) or argument.suffix.lower() == ".toml":
        return load_project(argument)
    what = f"model {printable(str(argument), 200)}"
    if is_factory(str(argument)) and not os.path.exists(argument):
        return bare_module(str(argument))
    if not os.path.exists(argument):
        raise UsageError(
            f"{what}: no such file. Give an .onnx file, an {FILE_NAME} or a folder that holds one"
        )
    hints = {
        ".edge": "It is a bundle already: see edgekit inspect and edgekit run",
        ".pt": "Export it with torch.onnx.export",
        ".pth": "Export it with torch.onnx.export",
    }
    raise UsageError(
        f"{what}: expected an .onnx file, an {FILE_NAME} or a folder that holds one, got "
        f"{argument.suffix or 'a name without a suffix'}. "
        + hints.get(argument.suffix.lower(), "Name the right file, or export the model to ONNX")
    )


def default_app() -> Path:
    """Folder of the detector that ships with edgekit. Raises: UsageError without the content folders."""
    found = content.find("apps", "detect")
    if found is None:
        raise UsageError(
            "app detect: not found on the content path, expected apps/detect. "
            "Name a model (edgekit build model.onnx) or set EDGEKIT_PATH"
        )
    return found


def load_project(path: Path) -> Project:
    """Read `path`, an `edgekit.toml` or a folder that holds one.

    Raises: UsageError, one line with the key path, for anything that is not right.
    """
    if os.path.isdir(path):
        if not os.path.isfile(path / FILE_NAME):
            raise UsageError(
                f"folder {printable(str(path), 200)}: holds no {FILE_NAME}. Write one with edgekit init"
            )
        path = path / FILE_NAME
    what = f"project {printable(str(path), 200)}"
    file = read_toml(_ProjectFile, path, what)
    if not file.model:
        raise UsageError(f"{what}: no model, expected at least one [[model]] table")
    models: list[ModelEntry] = []
    for i, table in enumerate(file.model):
        entry = _resolve(table, path.parent, f"{what}: model[{i}]")
        if any(m.name == entry.name for m in models):
            raise UsageError(
                f"{what}: model[{i}].name: {entry.name!r} is there twice. Give each model its own name"
            )
        models.append(entry)
    return Project(file.project.name, tuple(models), path)


def bare_project(
    onnx: Path,
    *,
    head: str | None = None,
    columns: Sequence[str] = (),
    classes: Path | None = None,
    calibration: str | None = None,
    data: Path | None = None,
    images: Path | None = None,
) -> Project:
    """A project of one network and no file. Raises: UsageError for a missing file or a wrong option."""
    what = f"model {printable(str(onnx), 200)}"
    if os.path.isdir(onnx):
        raise UsageError(f"{what}: is a folder, expected an ONNX file. Name the file in it")
    if not os.path.exists(onnx):
        raise UsageError(f"{what}: no such file. Give the path of an .onnx file")
    if not os.path.isfile(onnx):
        raise UsageError(f"{what}: not a regular file, expected an ONNX file")
    name = safe_name(onnx.stem)
    project = Project(name, (ModelEntry(name=name, source=onnx),))
    return with_options(
        project,
        head=head,
        columns=columns,
        classes=classes,
        calibration=calibration,
        data=data,
        images=images,
    )


def bare_module(factory: str) -> Project:
    """A project of one torch module, "package.module:function", and no file."""
    name = safe_name(factory.rpartition(":")[2])
    return Project(name, (ModelEntry(name, Path(factory), module=ModuleSource(factory, root=Path.cwd())),))


def bare_plan(source: Path) -> Project:
    """A project of one plan folder (or its plan.json) and no file. Raises: UsageError."""
    path = source / PLAN_NAME if os.path.isdir(source) else source
    what = f"plan {printable(str(path), 200)}"
    try:
        tree = parse_json(read_text(path, what).encode(), "@")
    except SchemaError as error:
        raise UsageError(f"{what}: {str(error).removeprefix('@: ')}") from None
    known: dict[Any, TaskName] = {name: name for name in get_args(TaskName)}
    given = tree.get("task") if isinstance(tree, dict) else None
    task = known.get(given) if isinstance(given, str) else None
    if task is None:
        raise UsageError(f"{what}: its task is {printable(str(given))!r}, expected one of {', '.join(known)}")
    name = safe_name(path.resolve().parent.name, "plan")
    return Project(name, (ModelEntry(name, path, task),))


def with_options(
    project: Project,
    *,
    head: str | None = None,
    columns: Sequence[str] = (),
    classes: Path | None = None,
    calibration: str | None = None,
    data: Path | None = None,
    images: Path | None = None,
    task: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    video: Mapping[str, Any] | None = None,
    batch: int | None = None,
    train: Path | None = None,
    train_images: Path | None = None,
    input: Sequence[int] = (),
) -> Project:
    """`project` with the options of the command line, which win over the file.

    head, columns, classes: only for a project of one model. calibration: a folder of pictures or
    the name of a set in calibration/. data, images: labelled pictures; COCO json needs their folder.
    task: what the network is for. preprocess, video: fields of PreprocessHint and VideoHint, over those of
    the file. batch: streams a run. train, train_images: labelled pictures to train on, as data and images. input:
    sizes of the input of a torch module. Raises: UsageError.
    """
    if (head or columns or classes or task or preprocess or video or train or input) and len(
        project.models
    ) != 1:
        raise UsageError(
            f"project {project.name}: --task, --head, --columns, --classes, the input rule and what is for video fit one model, "
            f"got {len(project.models)} models. Write them into {FILE_NAME}"
        )
    changes: dict[str, Any] = {}
    if batch is not None:
        if isinstance(batch, bool) or not 1 <= batch <= MAX_LANES:
            raise UsageError(f"batch {batch!r}: expected a whole number from 1 to {MAX_LANES}")
        changes["batch"] = batch
    if task:
        changes["task"] = task
    if preprocess:
        table = _given(project.models[0].preprocess)
        if "resize" in preprocess:  # a crop's size goes with it
            table.pop("shorter_side", None)
            table.pop("scaled_width", None)
        try:
            changes["preprocess"] = from_json(PreprocessHint, to_json({**table, **preprocess}), "input rule")
        except SchemaError as error:
            raise UsageError(str(error)) from None
    if video:
        if (task or project.models[0].task) != "video":
            raise UsageError(
                f"options {', '.join('--' + k.replace('_', '-') for k in video)}: for the task video. Give --task video"
            )
        try:
            table = {**_given(project.models[0].video), **video}
            changes["video"] = from_json(VideoHint, to_json(table), "video")
        except SchemaError as error:
            raise UsageError(str(error)) from None
    if head or columns:
        table = {"family": head or "rows", "columns": list(columns)}
        try:
            changes["head"] = from_json(HeadHint, table, "--head")
        except SchemaError as error:
            raise UsageError(str(error)) from None
    if classes:
        changes["classes"] = read_classes(classes)
    if calibration:
        changes["calibration"] = from_option(calibration)
    check_pair(data, images)
    if data is not None and is_uri(data):
        changes["evaluation"] = from_uri(str(data))
        if changes["evaluation"].count is None:
            raise UsageError(f"option --data {printable(str(data), 200)}: how many? Add clips=600 to it")
    elif data is not None:
        given = DataTable(data=str(data), images=None if images is None else str(images))
        changes["evaluation"] = resolve(given, Path(), "evaluation", "options --data and --images")
    check_pair(train, train_images, "--train and --train-images")
    if train is not None:
        given = DataTable(data=str(train), images=None if train_images is None else str(train_images))
        found = resolve(given, Path(), "training", "options --train and --train-images")
        known = project.models[0].train
        changes["train"] = TrainHint(found) if known is None else dataclasses.replace(known, data=found)
    if input:
        module = project.models[0].module
        if module is None:
            raise UsageError("option --input: for a torch module, an ONNX file knows its sizes. Leave it out")
        changes["module"] = dataclasses.replace(module, input=check_input(input, "option --input"))
    models = tuple(dataclasses.replace(m, **changes) for m in project.models)
    for m in models:
        check_disjoint(m.calibration, m.evaluation, f"model {m.name}")
        check_disjoint(None if m.train is None else m.train.data, m.evaluation, f"model {m.name}", "training")
    return dataclasses.replace(project, models=models)


# --- class names -------------------------------------------------------------------------------


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line, in the order of the network's outputs.

    Raises: UsageError for a file that is missing, binary, empty, or has an empty or a repeated line.
    """
    what = f"classes file {printable(str(path), 200)}"
    text = read_text(path, what).removeprefix("\ufeff")
    return _check_classes([line.strip() for line in text.rstrip().splitlines()], what, "line")


# --- the file's own tables ---------------------------------------------------------------------


@dataclass(frozen=True)
class _ModelTable:
    """One `[[model]]` as written."""

    name: str
    source: str | None = None
    task: TaskName = "detect"
    head: HeadHint = HeadHint()
    classes: str | tuple[str, ...] = ()
    preprocess: PreprocessHint = PreprocessHint()
    thresholds: Thresholds = Thresholds()
    calibration: DataTable | None = None
    evaluation: DataTable | None = None
    accept: Accept = Accept()
    target: dict[str, TargetOverride] = field(default_factory=dict)
    video: VideoHint | None = None
    batch: int = 1
    module: str | None = None
    weights: str | None = None
    input: tuple[int, ...] = ()
    train: TrainTable | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        if (self.source is None) == (self.module is None):
            raise ValueError(
                "expected one of source (a file) and module (a function that makes a torch module)"
            )
        if self.module is None and (self.weights is not None or self.input):
            raise ValueError("weights and input go with module, a file has its own")
        if self.module is not None and not is_factory(self.module):
            raise ValueError(f"module {self.module[:80]!r} must look like 'package.module:function'")
        if self.module is not None and self.task in PLANNED:
            raise ValueError(f"module: for one network, but the task {self.task} takes a plan folder")
        if self.weights is not None and self.train is not None and self.train.steps:
            raise ValueError(
                "train.steps: trains a network from nothing, but it has weights. Leave one of them out; "
                "a recipe's finetune step trains on"
            )
        if not 1 <= self.batch <= MAX_LANES:
            raise ValueError(f"batch must be between 1 and {MAX_LANES}, got {self.batch}")
        if self.video is not None and self.task != "video":
            raise ValueError(f'video: a table for task = "video", got task = "{self.task}"')


@dataclass(frozen=True)
class _ProjectTable:
    name: str

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True)
class _ProjectFile:
    project: _ProjectTable
    model: tuple[_ModelTable, ...] = ()


def safe_name(text: str, default: str = "model") -> str:
    """`text` as a project or model name: other characters become '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:64] or default


def _check_name(name: str) -> None:
    # it becomes part of file names: <model>.<target>.edge
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"name {name[:70]!r} must be letters, digits, '.', '_' or '-', at most 64 of them")


def _check_classes(names: Sequence[str], what: str, unit: str) -> tuple[str, ...]:
    if not names or names == [""]:
        raise UsageError(f"{what}: empty, expected one class name a line")
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise UsageError(f"{what}: {unit} {number} is empty, expected a class name")
        if not name.isprintable() or len(name) > 200:
            raise UsageError(f"{what}: {unit} {number} is not a printable name of at most 200 characters")
        if name in first:
            raise UsageError(f"{what}: {name!r} is there twice, in {unit} {first[name]} and {unit} {number}")
        first[name] = number
    return tuple(names)


def _resolve(table: _ModelTable, root: Path, where: str) -> ModelEntry:
    module = (
        None if table.module is None else module_source(table.module, table.weights, table.input, root, where)
    )
    source = (
        Path(str(table.module)) if table.source is None else _source(table.source, table.task, root, where)
    )
    if isinstance(table.classes, str):
        classes = read_classes(root / table.classes)
    else:
        names = [name.strip() for name in table.classes]
        classes = _check_classes(names, f"{where}.classes", "entry") if names else ()
    for name in table.target:
        if name not in Target.names():
            raise UsageError(f"{where}.target: unknown target {name!r}. {did_you_mean(name, Target.names())}")

    def pictures(given: DataTable | None, purpose: Purpose) -> DataSet | None:
        return None if given is None else resolve(given, root, purpose, f"{where}.{purpose}")

    entry = ModelEntry(
        name=table.name,
        source=source,
        task=table.task,
        head=table.head,
        classes=classes,
        preprocess=table.preprocess,
        thresholds=table.thresholds,
        calibration=pictures(table.calibration, "calibration"),
        evaluation=pictures(table.evaluation, "evaluation"),
        accept=table.accept,
        target=table.target,
        video=table.video or VideoHint(),
        batch=table.batch,
        module=module,
        train=None if table.train is None else table.train.resolve(root, f"{where}.train"),
    )
    check_disjoint(entry.calibration, entry.evaluation, where)
    check_disjoint(None if entry.train is None else entry.train.data, entry.evaluation, where, "training")
    return entry


def _source(given: str, task: TaskName, root: Path, where: str) -> Path:
    """The network's file."""
    source = root / given
    if os.path.isdir(source) and os.path.isfile(source / PLAN_NAME):
        source = source / PLAN_NAME
    if not os.path.isfile(source):
        what = (
            f"folder {str(source)!r} holds no {PLAN_NAME}"
            if os.path.isdir(source)
            else f"no such file {str(source)!r}"
        )
        raise UsageError(f"{where}.source: {what}. Put the network there or change the path")
    if (source.name == PLAN_NAME) != (task in PLANNED):
        raise UsageError(
            f"{where}.source: {given!r} is {'a plan' if source.name == PLAN_NAME else 'no plan folder'}, which does not "
            f"fit task = {task!r}. Change one of them"
        )
    return source
