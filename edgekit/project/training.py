"""What a project says of training: networks that are torch modules, and the pictures they learn from."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.dataset import DataSet, DataTable, resolve
from edgekit.errors import UsageError


@dataclass(frozen=True)
class ModuleSource:
    """A torch module that a function makes: `module`, `weights` and `input` of a [[model]].

    factory: "package.module:function", looked for in `root` first. input: sizes of its one input, [1, ...]; () where
    nothing says it. weights: a file of torch.save with its state_dict.
    """

    factory: str
    input: tuple[int, ...] = ()
    weights: Path | None = None
    root: Path | None = None


@dataclass(frozen=True)
class TrainHint:
    """`[model.train]`: what `edgekit compress` trains the network on, and how (docs/compression.md).

    steps: batches that train it before anything else, for a network that comes without weights. lr: at its peak, from
    scratch; None = the task's own. mirror: pictures are mirrored at random. zoom: they are cut at random to no less than
    this share of each side. color: by how much brightness and contrast vary.
    """

    data: DataSet
    steps: int = 0
    batch: int = 32
    lr: float | None = None
    mirror: bool = True
    zoom: float = 0.8
    color: float = 0.2


@dataclass(frozen=True)
class TrainTable:
    """`[model.train]` as written: a DataTable, and the fields of TrainHint."""

    data: str | None = None
    images: str | None = None
    source: str | None = None
    count: int | None = None
    seed: int | None = None
    steps: int = 0
    batch: int = 32
    lr: float | None = None
    mirror: bool = True
    zoom: float = 0.8
    color: float = 0.2

    def __post_init__(self) -> None:
        for name, low, high in (("steps", 0, 10**8), ("batch", 1, 4096)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {getattr(self, name)}")
        if self.lr is not None and not 0 < self.lr <= 10:
            raise ValueError(f"lr must be above 0 and at most 10, got {self.lr}")
        if not 0.1 <= self.zoom <= 1:
            raise ValueError(f"zoom must be between 0.1 and 1, got {self.zoom}")
        if not 0 <= self.color <= 0.9:
            raise ValueError(f"color must be between 0 and 0.9, got {self.color}")

    def resolve(self, root: Path, where: str) -> TrainHint:
        names = [f.name for f in dataclasses.fields(DataTable) if f.name != "set"]
        table = DataTable(**{name: getattr(self, name) for name in names})
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in names}
        return TrainHint(resolve(table, root, "training", where), **rest)


def is_factory(text: str) -> bool:
    """Whether `text` names a function, as "package.module:function"."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text) is not None


def module_source(
    factory: str, weights: str | None, sizes: Sequence[int], root: Path, where: str
) -> ModuleSource:
    """`module`, `weights` and `input` of a table; paths relative to `root`. Raises: UsageError."""
    file = None if weights is None else root / weights
    if file is not None and not os.path.isfile(file):
        raise UsageError(f"{where}.weights: no such file {str(file)!r}. Put it there or change the path")
    found = check_input(sizes, f"{where}.input") if sizes else ()
    return ModuleSource(factory, found, file, root)


def check_input(sizes: Sequence[int], where: str) -> tuple[int, ...]:
    found = tuple(sizes)
    if not 2 <= len(found) <= 8 or not all(1 <= n <= 65536 for n in found):
        raise UsageError(f"{where}: expected the sizes of the input, as 1, 3, 224, 224, got {list(found)}")
    return found
