"""From what a command was given to a project: a file, a folder, a bare network, and the options over it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from edgekit import content
from edgekit.dataset import (
    DataTable,
    check_disjoint,
    check_pair,
    from_option,
    from_uri,
    is_uri,
    resolve,
)
from edgekit.errors import UsageError
from edgekit.files import read_text
from edgekit.project.entry import (
    FILE_NAME,
    PLAN_NAME,
    HeadHint,
    ModelEntry,
    PreprocessHint,
    Project,
    TaskName,
    VideoHint,
    safe_name,
    set_fields,
)
from edgekit.project.reading import load_project, read_classes
from edgekit.project.training import (
    ModuleSource,
    TrainHint,
    check_input,
    is_factory,
)
from edgekit.schema import SchemaError, from_json, parse_json, printable, to_json
from edgekit.spec import MAX_LANES


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


def bare_project(onnx: Path) -> Project:
    """A project of one network and no file. Raises: UsageError for a missing file."""
    what = f"model {printable(str(onnx), 200)}"
    if os.path.isdir(onnx):
        raise UsageError(f"{what}: is a folder, expected an ONNX file. Name the file in it")
    if not os.path.exists(onnx):
        raise UsageError(f"{what}: no such file. Give the path of an .onnx file")
    if not os.path.isfile(onnx):
        raise UsageError(f"{what}: not a regular file, expected an ONNX file")
    name = safe_name(onnx.stem)
    return Project(name, (ModelEntry(name=name, source=onnx),))


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
        table = set_fields(project.models[0].preprocess)
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
            table = {**set_fields(project.models[0].video), **video}
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
