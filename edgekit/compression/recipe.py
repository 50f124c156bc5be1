"""Recipes: which methods change a network, in which order, with which options.

    recipe = read_recipe("quick")                       # calibration/recipes/quick.toml
    recipe = read_recipe(Path("mine.toml"))
    recipe = read_recipe({"name": "mine", "step": [{"method": "finetune", "steps": 500}]})

    name = "mine"
    seed = 0

    [[step]]
    method = "finetune"
    steps = 500

A method is a file of `methods/`, found by listing that folder; its `Options` say the keys of a step. Reading is
strict: an unknown method or key, a wrong type or value is one line that names the key.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgekit import content
from edgekit.errors import MissingExtraError, UsageError, did_you_mean, printable
from edgekit.files import read_toml
from edgekit.schema import SchemaError, from_json, to_json

if TYPE_CHECKING:
    from edgekit.compression.work import Work

MAX_SEED = 2**31 - 1
MAX_SCALE = 1000.0


@dataclass(frozen=True)
class Step:
    """options: the `Options` of the method's file."""

    method: str
    options: Any

    @property
    def run(self) -> Callable[[Work, Any], None]:
        found: Callable[[Work, Any], None] = method(self.method).run
        return found

    @property
    def needs_target(self) -> bool:
        """Whether it cannot run without a board to be fast on."""
        asks: Callable[[Any], bool] = getattr(method(self.method), "needs_target", lambda _: False)
        return asks(self.options)


@dataclass(frozen=True)
class Recipe:
    """steps: in the order they are taken. seed: of all that is drawn at random."""

    name: str
    steps: tuple[Step, ...]
    seed: int = 0
    title: str = ""

    def table(self) -> dict[str, Any]:
        """As in a file, with every option written out."""
        steps = [{"method": s.method, **to_json(s.options)} for s in self.steps]
        title = {"title": self.title} if self.title else {}
        return {"name": self.name, **title, "seed": self.seed, "step": steps}

    def stages(self) -> tuple[str, ...]:
        """A name for each step, different from all others and fit for a file's name: 1-prune, 2-finetune, ..."""
        return tuple(f"{i}-{step.method}" for i, step in enumerate(self.steps, 1))

    def check(self, target: Any) -> None:
        """Raises: UsageError where a step needs a target and there is none: before the steps ahead of it are run."""
        for i, step in enumerate(self.steps):
            if target is None and step.needs_target:
                raise UsageError(
                    f"recipe {self.name}: step[{i}]: {step.method} goes by the time on a board, but none was named. "
                    "Give --target"
                )

    @property
    def batches(self) -> int:
        """Of all trainings, as far as the options say."""
        total = 0
        for step in self.steps:
            for name, value in _lengths(step.options).items():
                total += value * (getattr(step.options, "rounds", 1) if name == "steps" else 1)
        return total

    def scaled(self, scale: float) -> Recipe:
        """With `scale` times as many batches in every training, at least 1 where there were any. Raises: UsageError."""
        if not 0 < scale <= MAX_SCALE:
            raise UsageError(
                f"scale of steps {scale:g}: expected a number above 0, at most {MAX_SCALE:g}, as 0.1"
            )

        def change(step: Step) -> Step:
            found = {name: max(1, round(value * scale)) for name, value in _lengths(step.options).items()}
            return Step(step.method, dataclasses.replace(step.options, **found))

        try:
            return dataclasses.replace(self, steps=tuple(map(change, self.steps)))
        except ValueError as error:  # what an Options says of itself
            raise UsageError(f"recipe {self.name} with {scale:g} times its steps: {error}") from None

    def seeded(self, seed: int) -> Recipe:
        """With another seed. Raises: UsageError."""
        if not 0 <= seed <= MAX_SEED:
            raise UsageError(f"seed {seed}: expected a whole number from 0 to {MAX_SEED}")
        return dataclasses.replace(self, seed=seed)


@dataclass(frozen=True)
class _File:
    """A recipe as written."""

    name: str
    step: tuple[dict[str, Any], ...]
    seed: int = 0
    title: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise ValueError(
                f"name {self.name[:70]!r} must be letters, digits, '.', '_' or '-', at most 64 of them"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be between 0 and {MAX_SEED}, got {self.seed}")
        if not self.step:
            raise ValueError("step: no step, expected at least one [[step]] table")


def _lengths(options: Any) -> dict[str, int]:
    """Options that count batches: those called `steps` or `..._steps`."""
    names = [f.name for f in dataclasses.fields(options) if f.name == "steps" or f.name.endswith("_steps")]
    found = {name: getattr(options, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, int) and value > 0}


def methods() -> tuple[str, ...]:
    """Names of the methods, sorted: the files of `methods/`, with '-' for '_'."""
    folder = Path(__file__).parent / "methods"
    return tuple(sorted(p.stem.replace("_", "-") for p in folder.glob("*.py") if p.stem[0] != "_"))


def method(name: str) -> ModuleType:
    """The file of a method. Raises: UsageError for an unknown one, MissingExtraError where its library is not there."""
    if name not in methods():
        raise UsageError(f"method {printable(name)[:60]!r}: unknown. {did_you_mean(name[:60], methods())}")
    return importlib.import_module(f"edgekit.compression.methods.{name.replace('-', '_')}")


def named_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that ship, calibration/recipes/<name>.toml; the first on the content path wins."""
    found: dict[str, Path] = {}
    for folder in content.folders("calibration"):
        for path in sorted((folder / "recipes").glob("*.toml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def read_recipe(given: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from its file, its name (calibration/recipes), or a mapping with the keys of a file.

    Raises: UsageError, one line with the key path, for anything that is not right.
    """
    if isinstance(given, Recipe):
        return given
    if isinstance(given, Mapping):
        try:
            file = from_json(_File, to_json(given), "@")
        except SchemaError as error:
            raise UsageError(f"recipe: {str(error).removeprefix('@').lstrip('.: ')}") from None
        return _resolve(file, f"recipe {file.name}")
    text = str(given)
    if not text.strip():
        raise UsageError("recipe '': empty, expected a .toml file or the name of a recipe")
    path = Path(text)
    if path.suffix.lower() != ".toml" and not os.path.exists(path):
        known = named_recipes()
        if text not in known:
            raise UsageError(
                f"recipe {printable(text)[:80]!r}: neither a .toml file nor a recipe that ships. {did_you_mean(text[:80], known)}"
            )
        path = known[text]
    what = f"recipe {printable(path)}"
    if os.path.isdir(path):
        raise UsageError(f"{what}: is a folder, expected a .toml file. Name the file in it")
    return _resolve(read_toml(_File, path, what), what)


def _resolve(file: _File, what: str) -> Recipe:
    steps = []
    for i, table in enumerate(file.step):
        where = f"{what}: step[{i}]"
        name = table.get("method")
        if not isinstance(name, str):
            problem = "missing" if name is None else "not a string"
            raise UsageError(f"{where}: method is {problem}. {did_you_mean('', methods())}")
        try:
            options = method(name).Options
        except MissingExtraError:
            raise
        except UsageError as error:
            raise UsageError(f"{where}.{error}") from None
        given = {key: value for key, value in table.items() if key != "method"}
        try:
            steps.append(Step(name, from_json(options, given, "@")))
        except SchemaError as error:
            raise UsageError(f"{where}{str(error).removeprefix('@')}") from None
    return Recipe(file.name, tuple(steps), file.seed, file.title)
