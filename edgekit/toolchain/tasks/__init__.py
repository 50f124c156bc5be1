"""What only a build asks of a task: one file a task, found by its name (see edgekit.tasks)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgekit.errors import UsageError, did_you_mean
from edgekit.tasks import TASKS

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgekit.passes import Prepared
    from edgekit.project import ModelEntry
    from edgekit.tasks.preprocess import ImagePreprocess


class ToolchainTask(Protocol):
    """The functions of `toolchain/tasks/<task>.py`."""

    SEGMENT: str
    """Name of the one segment of a bundle's plan."""
    NO_LABELS: str
    """Why accuracy was not measured where no labelled pictures were given."""

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
