"""What `edgekit compress MODEL` works on: a Problem made of a project's entry, by its task.

A task that can be trained has a file `<task>_entry.py` here with

    def opened(entry: ModelEntry, module: nn.Module | None, seed: int, steps: int) -> Opened

module: the torch module of an entry that names one; None: the ONNX network of `entry.source`. steps: batches that
will be drawn, where a recipe says so.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from edgekit.compression.problem import Problem
from edgekit.dataset import DataSet, check_files, picture_files
from edgekit.errors import UsageError, printable
from edgekit.frontends.torch_module import load_module
from edgekit.project import ModelEntry
from edgekit.project.training import TrainHint
from edgekit.tasks import TASKS


@dataclass(frozen=True)
class Opened:
    """problem: to be compressed. entry: what the result is to be built with, its source aside; None where nobody said
    what the network is for. scratch: batches that train it first. facts: of the data, for people."""

    problem: Problem
    entry: ModelEntry | None = None
    scratch: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def trainable() -> tuple[str, ...]:
    """Tasks whose networks can be compressed."""
    return tuple(task for task in TASKS if (Path(__file__).parent / f"{task}_entry.py").is_file())


def open_problem(
    entry: ModelEntry, *, module: nn.Module | None = None, seed: int = 0, steps: int = 0
) -> Opened:
    """The problem that `entry` states. module: in place of what the entry's function makes. seed: of the batches.
    steps: how many will be drawn.

    The function of an entry may also give a Problem: then nothing but it counts.
    Raises: UsageError, ModelError, CalibrationError, MissingExtraError.
    """
    if entry.module is not None and module is None:
        made = load_module(entry.module, f"model {entry.name}")
        if isinstance(made, Problem):
            return Opened(made)
        if not isinstance(made, nn.Module):
            raise UsageError(
                f"model {entry.name}: {printable(entry.module.factory)} gives a {type(made).__name__}, expected a "
                "torch.nn.Module (or an edgekit.compression.problem.Problem)"
            )
        module = made
    if entry.task not in trainable():
        raise UsageError(
            f"model {entry.name}: networks of the task {entry.task} are not trained by edgekit, expected one of "
            f"{', '.join(trainable())}. Name a function that makes a Problem: edgekit compress package.module:function"
        )
    found = importlib.import_module(f"edgekit.compression.{entry.task}_entry")
    return cast(Opened, found.opened(entry, module, seed, steps))


def training_pictures(entry: ModelEntry) -> TrainHint:
    """[model.train]. Raises: UsageError where there is none, CalibrationError where it has pictures that are judged."""
    if entry.train is None:
        raise UsageError(
            f"model {entry.name}: no pictures to train on. Give --train LABELS, or [model.train] in edgekit.toml"
        )
    if entry.evaluation is not None and not (entry.train.data.source or entry.evaluation.source):
        check_files(
            picture_files(entry.train.data),
            picture_files(entry.evaluation),
            f"model {entry.name}",
            "training",
        )
    return entry.train


def labelled(entry: ModelEntry) -> DataSet:
    """[model.evaluation]. Raises: UsageError where there is none."""
    if entry.evaluation is None:
        raise UsageError(
            f"model {entry.name}: no labelled pictures to judge it by. Give --data LABELS, or [model.evaluation] in "
            "edgekit.toml"
        )
    return entry.evaluation


def finished(opened: Opened, onnx: Path) -> ModelEntry | None:
    """The entry to build the result with. onnx: the network that came out."""
    if opened.entry is None:
        return None
    train = opened.entry.train
    if train is not None:
        train = dataclasses.replace(train, steps=0)
    return dataclasses.replace(opened.entry, source=onnx, module=None, train=train)
