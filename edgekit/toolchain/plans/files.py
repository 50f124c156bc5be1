"""A plan folder as written: `plan.json`, ONNX files of its networks, `.npz` files of its kernels' weights.

    {"format": "edgekit-plan-1", "task": "fusion",
     "inputs": {"points": ["float32", [40000, 5]], ...}, "outputs": ["heat_0", ...],
     "steps": [{"name": "camera", "model": "camera.onnx", "inputs": ["images"], "outputs": ["pyramid"],
                "repeat": 6, "when": "cameras"},
               {"name": "encoder", "kernel": "lidar_encoder", "weights": "encoder.npz", "options": {...},
                "inputs": ["points", "point_count"], "outputs": ["lidar_grid"], "when": "lidar"}, ...],
     "pipeline": {...}}

Steps run in order; names join them. What a plan may say is checked here, what its files hold in `source`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgekit.errors import UsageError, did_you_mean
from edgekit.manifest import MAX_TENSOR_BYTES, NAME
from edgekit.project import PLAN_NAME
from edgekit.schema import SchemaError, from_json, parse_json, printable
from edgekit.spec import DType, TensorSpec
from edgekit.tasks import TASKS

FORMAT = "edgekit-plan-1"
MAX_BYTES = 4 << 20
MAX_REPEAT = 64


@dataclass(frozen=True)
class PlanStep:
    """One step: `model` is the ONNX file of a network, or `kernel` the name of a kernel, with its `weights` and `options`.

    repeat: > 1 for a network of batch 1 that is run once per slice of its tensors' first axis.  when: a plan input; the
    step is left out where it is all zeros (a repeated one slice by slice).
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    model: str | None = None
    kernel: str | None = None
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    repeat: int = 1
    when: str | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name {printable(self.name)!r} must be letters, digits, '.', '_' or '-'")
        if (self.model is None) == (self.kernel is None):
            raise ValueError(f"step {self.name}: expected either model or kernel")
        if self.model is not None and (self.weights is not None or self.options):
            raise ValueError(f"step {self.name}: weights and options belong to kernels")
        if self.kernel is not None and self.repeat != 1:
            raise ValueError(f"step {self.name}: repeat belongs to networks")
        if not 1 <= self.repeat <= MAX_REPEAT:
            raise ValueError(
                f"step {self.name}: repeat must be between 1 and {MAX_REPEAT}, got {self.repeat}"
            )
        if not self.inputs or not self.outputs:
            raise ValueError(f"step {self.name}: expected at least one input and one output")
        for label, value in (("model", self.model), ("weights", self.weights)):
            if value is not None and not _plain(value):
                raise ValueError(
                    f"step {self.name}: {label} {printable(value)!r} must name a file in the folder"
                )


@dataclass(frozen=True)
class _File:
    format: str
    task: str
    inputs: dict[str, Any]
    outputs: tuple[str, ...]
    steps: tuple[PlanStep, ...]
    pipeline: dict[str, Any]


@dataclass(frozen=True)
class PlanFile:
    """`plan.json`, with its folder. `inputs`: of the plan, in order."""

    path: Path
    task: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    steps: tuple[PlanStep, ...]
    pipeline: dict[str, Any]

    def file(self, name: str) -> Path:
        return self.path.parent / name

    @property
    def what(self) -> str:
        return f"plan {printable(str(self.path), 200)}"


def read_plan(source: Path) -> PlanFile:
    """Read the plan in the folder `source`, or the file itself.

    Raises: UsageError, one line, for a file that cannot be read, an unknown key, a wrong type, files that are missing,
    and steps that cannot run in their order.
    """
    path = source / PLAN_NAME if source.is_dir() else source
    what = f"plan {printable(str(path), 200)}"
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{what}: cannot be read: {error.strerror}") from None
    try:
        tree = parse_json(data, "@", MAX_BYTES)
        if isinstance(tree, dict) and tree.get("format", FORMAT) != FORMAT:
            raise SchemaError(f"@.format: expected {FORMAT!r}, got {printable(str(tree['format']))!r}")
        file = from_json(_File, tree, "@")
        plan = PlanFile(path, file.task, _inputs(file.inputs), file.outputs, file.steps, file.pipeline)
        _check(plan)
    except SchemaError as error:
        message = str(error).removeprefix("@").removeprefix(".").removeprefix(": ")
        raise UsageError(f"{what}: {message}") from None
    return plan


def _inputs(table: dict[str, Any]) -> tuple[TensorSpec, ...]:
    found = []
    for name, entry in table.items():
        where = f"input {printable(name)!r}"
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)):
            raise SchemaError(f'{where}: expected [type, shape], as ["float32", [1, 2]]')
        kind, sizes = entry
        if kind not in {t.value for t in DType}:
            raise SchemaError(
                f"{where}: unknown type. {did_you_mean(str(kind)[:40], [t.value for t in DType])}"
            )
        if not sizes or not all(type(n) is int and n >= 1 for n in sizes):
            raise SchemaError(f"{where}: expected sizes of at least 1, got {printable(str(sizes))}")
        spec = TensorSpec(name, DType(kind), tuple(sizes))
        if spec.nbytes > MAX_TENSOR_BYTES:
            raise SchemaError(
                f"{where}: {printable(str(sizes))} is too large, expected at most {MAX_TENSOR_BYTES} bytes"
            )
        found.append(spec)
    return tuple(found)


def _check(plan: PlanFile) -> None:
    """Raises: SchemaError."""
    if plan.task not in TASKS:
        raise SchemaError(f"task {printable(plan.task)!r}: unknown. {did_you_mean(plan.task[:40], TASKS)}")
    if not plan.inputs or not plan.outputs or not plan.steps:
        raise SchemaError("expected at least one input, one output and one step")
    given = sorted(t.name for t in plan.inputs)
    ready, names = set(given), set()
    for step in plan.steps:
        what = f"step {step.name}"
        if step.name in names:
            raise SchemaError(f"{what}: there twice. Give each step its own name")
        names.add(step.name)
        if step.when is not None and step.when not in given:
            hint = did_you_mean(step.when[:80], given)
            raise SchemaError(f"{what}: when {printable(step.when)!r} is no input of the plan. {hint}")
        for name in step.inputs:
            if name not in ready:
                hint = did_you_mean(name[:80], sorted(ready))
                raise SchemaError(f"{what}: input {printable(name)!r} is not there before it. {hint}")
        for name in step.outputs:
            if name in ready:
                raise SchemaError(f"{what}: output {printable(name)!r} is written twice")
            ready.add(name)
        for file in (step.model, step.weights):
            if file is not None and not plan.file(file).is_file():
                raise SchemaError(
                    f"{what}: no file {printable(file)!r} in the folder. Put it there or change the name"
                )
    made = sorted(ready - set(given))
    for name in plan.outputs:
        if name not in made:
            raise SchemaError(
                f"output {printable(name)!r}: no step makes it. {did_you_mean(name[:80], made)}"
            )


def _plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (
        bool(name)
        and "\\" not in name
        and not name.startswith("/")
        and ".." not in parts
        and len(name) <= 200
    )
