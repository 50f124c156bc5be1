"""A recipe, what it is for and with what: all that `edgekit compress` was told, read and checked.

job = plan_job("my-app", "finetune", "rpi5", steps_scale=0.1)
done = job.run(Path("runs/mine"), progress)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from edgekit.compression import run
from edgekit.compression.problem import Problem, macs, parameters
from edgekit.compression.problems import Opened, finished, open_problem
from edgekit.compression.recipe import Recipe, read_recipe
from edgekit.errors import UsageError, did_you_mean, printable
from edgekit.project import ModelEntry, Project, open_project, safe_name, with_options
from edgekit.project.training import ModuleSource
from edgekit.project.writing import write_entry
from edgekit.target import Target
from edgekit.tasks import TASKS


@dataclass(frozen=True)
class Job:
    """scratch: batches that train the network before the recipe."""

    opened: Opened
    recipe: Recipe
    target: Target | None
    precision: str | None
    scratch: int

    def run(self, out: Path, progress: run.Progress) -> run.Compressed:
        """Run it in the folder `out`, and put an edgekit.toml there for what came out."""
        problem = self.opened.problem
        done = run.compress(
            problem, self.recipe, out, self.target, precision=self.precision, scratch=self.scratch, progress=progress
        )  # fmt: skip
        entry = finished(self.opened, done.onnx)
        if entry is not None:
            write_entry(entry, out, f"{entry.name} after the recipe {self.recipe.name}: edgekit compress")
        return done

    def table(self) -> dict[str, Any]:
        """What would be done, as JSON values."""
        problem = self.opened.problem
        return {
            "name": problem.name,
            "parameters": parameters(problem.model),
            "macs": macs(problem.model, problem.example),
            "input": list(problem.example.shape),
            "recipe": self.recipe.table(),
            "target": None if self.target is None else self.target.name,
            "precision": self.precision,
            "scratch": self.scratch,
            "data": self.opened.facts,
        }


def plan_job(
    model: str | Path | nn.Module | Problem, recipe: str | Path | Mapping[str, Any] | Recipe,
    target: str | Target | None = None, *, only: str | None = None, precision: str | None = None,
    steps_scale: float = 1.0, seed: int | None = None, task: str | None = None, classes: str | Path | None = None,
    preprocess: Mapping[str, Any] | None = None, input: Sequence[int] = (), train: str | Path | None = None,
    train_images: str | Path | None = None, data: str | Path | None = None, images: str | Path | None = None,
) -> Job:  # fmt: skip
    """The job that the arguments of `edgekit.compress` state.

    Raises: UsageError and whatever the reading of networks and pictures raises.
    """
    read = read_recipe(recipe)
    if steps_scale != 1:
        read = read.scaled(steps_scale)
    if seed is not None:
        read = read.seeded(seed)
    board = Target.load(target) if isinstance(target, str) else target
    read.check(board)
    if precision is not None:
        if board is None:
            raise UsageError(f"precision {precision!r}: of a target, but none was named. Give --target")
        if precision not in board.precisions[board.backend]:
            hint = did_you_mean(precision, board.precisions[board.backend])
            raise UsageError(f"precision {precision!r} for {board.name}: not available there. {hint}")
    if board is not None:
        precision = precision or board.precisions[board.backend][0]
    if isinstance(model, Problem):
        return Job(Opened(model), read, board, precision, 0)
    if task is not None and task not in TASKS:
        raise UsageError(f"task {task!r}: unknown. {did_you_mean(task, TASKS)}")
    project, module = _project(model)
    project = Project(project.name, (_chosen(project, only),), project.path)
    project = with_options(
        project,
        classes=Path(classes) if classes else None,
        data=Path(data) if data else None,
        images=Path(images) if images else None,
        task=task,
        preprocess=preprocess,
        train=Path(train) if train else None,
        train_images=Path(train_images) if train_images else None,
        input=tuple(input),
    )
    (entry,) = project.models
    opened = open_problem(entry, module=module, seed=read.seed, steps=read.batches)
    scratch = max(1, round(opened.scratch * steps_scale)) if opened.scratch else 0
    return Job(opened, read, board, precision, scratch)


def _project(model: str | Path | nn.Module) -> tuple[Project, nn.Module | None]:
    """(the project, the module where one was given)."""
    if not isinstance(model, nn.Module):
        return open_project(Path(model)), None
    name = type(model).__name__
    source = ModuleSource(name)
    return Project(name, (ModelEntry(safe_name(name), Path(name), module=source),)), model


def _chosen(project: Project, only: str | None) -> ModelEntry:
    if only is not None:
        return project.model(only)
    if len(project.models) > 1:
        names = ", ".join(m.name for m in project.models)
        raise UsageError(
            f"project {printable(project.name)}: has several models, expected one. Give --model, one of {names}"
        )
    return dataclasses.replace(project.models[0])
