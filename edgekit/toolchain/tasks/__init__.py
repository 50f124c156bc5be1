"""What only a build asks of a task: one file a task, found by its name (see edgekit.tasks)."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgekit.errors import ModelError, UsageError, did_you_mean
from edgekit.schema import printable
from edgekit.spec import DType
from edgekit.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from edgekit.passes import Prepared
    from edgekit.project import ModelEntry
    from edgekit.tasks.preprocess import ImagePreprocess


STREET = "synthetic://street?seed=20000&frames=16&size=640x360"


class ToolchainTask(Protocol):
    """The functions of `toolchain/tasks/<task>.py`."""

    SEGMENT: str
    """Name of the one segment of a bundle's plan."""
    NO_LABELS: str
    """Why accuracy was not measured where no labelled pictures were given."""
    CLIPS: bool
    """What it is proven on are clips: frames in time order, state reset at the start of each."""
    DEFAULT_SOURCE: str
    """Of pictures where none are given, for error figures and samples only; never for an accuracy claim."""

    def prepare_options(self, entry: ModelEntry) -> dict[str, Any]:
        """Arguments of `passes.prepare` beside the task."""
        ...

    def make_spec(self, entry: ModelEntry, prepared: Prepared) -> tuple[Any, str, str]:
        """(spec, where its input rule comes from, where its labels come from).

        Raises: UsageError when something that no graph tells is not declared.
        """
        ...

    def head_facts(self, spec: Any) -> dict[str, Any]:
        """What the evidence says about the network's head; `family` is there always."""
        ...


def half(name: str) -> ToolchainTask:
    """The toolchain half of a task. Raises: UsageError for an unknown one."""
    if name not in TASKS:
        raise UsageError(f"task {name!r}: unknown. {did_you_mean(name, TASKS)}")
    return cast("ToolchainTask", importlib.import_module(f"edgekit.toolchain.tasks.{name}"))


def declared_rule(entry: ModelEntry, model: ir.Model) -> ImagePreprocess:
    """The rule of a network whose graph says nothing about it: its size; all else is the project's.

    Raises: UsageError unless resize, color, mean and std are declared.
    """
    from edgekit.passes.graph import input_size
    from edgekit.tasks.preprocess import ImagePreprocess

    missing = [name for name in ("resize", "color", "mean", "std") if getattr(entry.preprocess, name) is None]
    if missing:
        options = " ".join(f"--{name}" for name in missing)
        raise UsageError(
            f"model {entry.name}: its input rule is not known, expected {', '.join(missing)} in [model.preprocess] of "
            f"an edgekit.toml, or {options}. Write one with 'edgekit init'"
        )
    height, width = input_size(model)
    return ImagePreprocess(width, height)


def picture_rule(entry: ModelEntry, prepared: Prepared) -> tuple[ImagePreprocess, str]:
    """(rule, where it comes from) of a network for one colour picture: as declared; what the graph normalises
    itself need not be declared. Raises: ModelError, UsageError."""
    import onnx_ir as ir

    from edgekit.passes.graph import shape
    from edgekit.passes.states import picture

    value = picture(prepared.model)
    sizes = shape(value) or ()
    last = len(sizes) == 4 and sizes[1] != 3 and sizes[3] == 3
    if len(sizes) != 4 or (sizes[1] != 3 and not last):
        raise ModelError(
            f"model {entry.name}: expected a colour picture [1, 3, H, W] or [1, H, W, 3] as its input, got "
            f"{printable(value.name or '')} {list(sizes)}"
        )
    why = "input rule: declared in the project"
    found: dict[str, Any] = {}
    if prepared.preprocess is not None:
        found = {"mean": prepared.preprocess.mean, "std": prepared.preprocess.std}
        why += "; " + prepared.notes[-1].removeprefix("input rule: ").partition(",")[0]
    if last:
        found["layout"] = "NHWC"
    if value.dtype == ir.DataType.UINT8:  # such a graph normalises inside, if at all
        found |= {"dtype": DType.uint8, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    known = {k: v for k, v in found.items() if getattr(entry.preprocess, k) is None}
    hint = dataclasses.replace(entry.preprocess, **known)
    rule = declared_rule(dataclasses.replace(entry, preprocess=hint), prepared.model)
    if hint.layout == "NHWC":
        rule = dataclasses.replace(rule, height=sizes[1], width=sizes[2])
    try:
        return hint.apply(rule), why
    except ValueError as error:
        raise UsageError(f"model {entry.name}: preprocess: {error}") from None


# --- networks that answer with one vector of classes ------------------------------------------------


def class_output(entry: ModelEntry, outputs: Sequence[ir.Value], expected: str, hint: str) -> tuple[str, int]:
    """(name of the output, classes). Raises: ModelError unless `outputs` is one vector."""
    from edgekit.passes.graph import listed, shape

    sizes = shape(outputs[0]) if len(outputs) == 1 else None
    count = 0 if sizes is None else math.prod(sizes)
    if sizes is None or count < 2 or max(sizes) != count:
        raise ModelError(f"model {entry.name}: expected {expected}, got {listed(outputs)}. {hint}")
    name = outputs[0].name
    assert name is not None, "the frontend names every output"
    return name, count


def class_labels(
    entry: ModelEntry,
    count: int,
    where: Path | str | None,
    class_names: Callable[[Path | str], tuple[str, ...]],
) -> tuple[tuple[str, ...], str]:
    """(names, where they come from): the names given, else those of the evaluation set at `where` (`class_names` of
    the task) if it has as many, else class_0 and on. Raises: UsageError."""
    if entry.classes:
        return entry.labels(count)
    names = () if where is None else class_names(where)
    if len(names) == count:
        said = where.name if isinstance(where, Path) else str(where)
        return names, f"no class names given: taken from {printable(said)}, in its order"
    names = tuple(f"class_{i}" for i in range(count))
    return names, f"no class names given: called {names[0]} to {names[-1]}"


def class_facts(spec: Any) -> dict[str, Any]:
    """`head_facts` of such a network."""
    return {"family": "classes", "activation": spec.activation, "classes": len(spec.labels)}
