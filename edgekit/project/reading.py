"""Reading an `edgekit.toml`: strict, each mistake one line with the path of its key."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.dataset import (
    DataSet,
    DataTable,
    Purpose,
    check_disjoint,
    resolve,
)
from edgekit.errors import UsageError, did_you_mean
from edgekit.files import read_text, read_toml
from edgekit.project.entry import (
    FILE_NAME,
    PLAN_NAME,
    PLANNED,
    Accept,
    HeadHint,
    ModelEntry,
    PreprocessHint,
    Project,
    TargetOverride,
    TaskName,
    Thresholds,
    VideoHint,
    check_name,
)
from edgekit.project.training import (
    TrainTable,
    is_factory,
    module_source,
)
from edgekit.schema import printable
from edgekit.spec import MAX_LANES
from edgekit.target import Target


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


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one a line, in the order of the network's outputs.

    Raises: UsageError for a file that is missing, binary, empty, or has an empty or a repeated line.
    """
    what = f"classes file {printable(str(path), 200)}"
    text = read_text(path, what).removeprefix("\ufeff")
    return _check_classes([line.strip() for line in text.rstrip().splitlines()], what, "line")


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
        check_name(self.name)
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
        check_name(self.name)


@dataclass(frozen=True)
class _ProjectFile:
    project: _ProjectTable
    model: tuple[_ModelTable, ...] = ()


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
