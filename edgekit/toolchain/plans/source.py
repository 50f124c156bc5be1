"""A plan read and prepared once: every target is lowered from it."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import frontends
from edgekit.errors import ModelError, UsageError
from edgekit.kernels.steps import pack
from edgekit.manifest import KernelStep, kernel_path
from edgekit.passes import PassRecord, prepare
from edgekit.passes.graph import shape
from edgekit.passes.graph_facts import facts
from edgekit.project import ModelEntry
from edgekit.schema import printable
from edgekit.spec import DType, TensorSpec
from edgekit.toolchain import cache
from edgekit.toolchain.plans.files import PlanFile, PlanStep, read_plan

MAX_WEIGHTS = 10_000


@dataclass(frozen=True)
class Network:
    """A network of a plan, prepared. Shapes of `model` are those of one run: batch 1 where it is repeated."""

    step: PlanStep
    model: ir.Model
    log: tuple[PassRecord, ...]
    facts: dict[str, Any]
    digest: str
    """Of the file that it was read from."""

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run of the plan."""
        return int(self.facts["macs"]) * self.step.repeat


@dataclass(frozen=True)
class PlanSource:
    """kernels: by step name, as a manifest has them.  files: what those need in the bundle, by path.
    tensors: of the whole plan by name, inputs first."""

    entry: ModelEntry
    file: PlanFile
    networks: Mapping[str, Network]
    kernels: Mapping[str, KernelStep]
    tensors: Mapping[str, TensorSpec]
    digest: str
    """Of all that the folder's plan says and names."""
    files: Mapping[str, bytes] = field(default_factory=dict)


def read(entry: ModelEntry) -> PlanSource:
    """Read the plan of `entry`, prepare its networks by the passes and lay out the weights of its kernels.

    Raises: UsageError for a faulty plan.json, ModelError for what its files hold.
    """
    file = read_plan(entry.source)
    if entry.task != file.task:
        raise UsageError(
            f"{file.what}: is for the task {file.task}, expected {entry.task} as the project says"
        )
    networks: dict[str, Network] = {}
    kernels: dict[str, KernelStep] = {}
    files: dict[str, bytes] = {}
    state = hashlib.sha256(file.path.read_bytes())
    for step in file.steps:
        name = step.model or step.weights
        data = b"" if name is None else file.file(name).read_bytes()
        state.update(len(data).to_bytes(8, "little") + data)
        if step.model is not None:
            networks[step.name] = _network(file, step, hashlib.sha256(data).hexdigest())
            for tensor in networks[
                step.name
            ].model.graph.initializers.values():  # weights may lie in files of their own
                state.update(repr(tensor.name).encode())
                state.update(b"" if tensor.const_value is None else tensor.const_value.tobytes())
        else:
            kernels[step.name], more = _kernel(file, step, data)
            files.update(more)
    tensors = _tensors(file, networks)
    return PlanSource(entry, file, networks, kernels, tensors, state.hexdigest(), files)


def _network(file: PlanFile, step: PlanStep, digest: str) -> Network:
    assert step.model is not None
    path = file.file(step.model)
    try:
        prepared = prepare(frontends.load(path), task=file.task)
    except ModelError as error:  # a pass sees a graph, not the file it came from
        if not str(error).startswith("model: "):
            raise
        raise ModelError(
            f"model {printable(str(path), 200)}: {str(error).removeprefix('model: ')}"
        ) from error
    model = prepared.model
    for side, names, values in (
        ("inputs", step.inputs, model.graph.inputs),
        ("outputs", step.outputs, model.graph.outputs),
    ):
        there = {str(v.name) for v in values}
        if there != set(names):
            raise ModelError(
                f"{file.what}: step {step.name}: {side} of {printable(step.model)} are {_listed(there)}, expected "
                f"{_listed(set(names))}"
            )
        for value in values:
            sizes = shape(value)
            if sizes is None or value.dtype != ir.DataType.FLOAT or (step.repeat > 1 and sizes[:1] != (1,)):
                batch = " with a first axis of 1, as it is repeated" if step.repeat > 1 else ""
                raise ModelError(
                    f"{file.what}: step {step.name}: tensor {printable(str(value.name))} is {value.dtype} {list(sizes or ())}, "
                    f"expected float32 of a fixed shape{batch}"
                )
    return Network(step, model, prepared.log, facts(model), digest)


def _kernel(file: PlanFile, step: PlanStep, data: bytes) -> tuple[KernelStep, dict[str, bytes]]:
    """The step of a manifest and the files that it needs: weights one after the other, little-endian float32."""
    assert step.kernel is not None
    options = dict(step.options)
    if "weights" in options:
        raise UsageError(
            f"{file.what}: step {step.name}: options.weights is written by the build. Leave it out"
        )
    paths: dict[str, str] = {}
    files: dict[str, bytes] = {}
    if step.weights is not None:
        arrays = _arrays(file, step, data)
        paths["weights"] = kernel_path(step.name, "weights")
        options["weights"], files[paths["weights"]] = pack(arrays)
    made = KernelStep(step.name, step.kernel, step.inputs, step.outputs, options, when=step.when, files=paths)
    return made, files


def _arrays(file: PlanFile, step: PlanStep, data: bytes) -> dict[str, np.ndarray]:
    """By name, sorted. Raises: ModelError."""
    what = f"{file.what}: step {step.name}: weights {printable(step.weights or '')}"
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            names = sorted(archive.files)[: MAX_WEIGHTS + 1]
            found = {name: np.ascontiguousarray(archive[name]) for name in names}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{what}: not an .npz file of arrays: {' '.join(str(error).split())[:120]}"
        ) from None
    if not found or len(found) > MAX_WEIGHTS:
        raise ModelError(f"{what}: {len(found)} arrays, expected 1 to {MAX_WEIGHTS}")
    for name, array in found.items():
        if array.dtype != np.float32 or not array.size or not np.isfinite(array).all():
            raise ModelError(
                f"{what}: array {printable(name)} is {array.dtype} {list(array.shape)}, expected finite float32"
            )
    return found


def _tensors(file: PlanFile, networks: Mapping[str, Network]) -> dict[str, TensorSpec]:
    """Every tensor of the plan: inputs are declared, what networks read and write says its shape itself.

    Raises: ModelError where two disagree, or nobody says it.
    """
    found = {tensor.name: tensor for tensor in file.inputs}
    for network in networks.values():
        graph = network.model.graph
        for value in (*graph.inputs, *graph.outputs):
            sizes = shape(value)
            assert sizes is not None, "checked when it was read"
            sizes = (network.step.repeat, *sizes[1:]) if network.step.repeat > 1 else sizes
            tensor = TensorSpec(str(value.name), DType.float32, sizes, "NCHW" if len(sizes) == 4 else "")
            known = found.setdefault(tensor.name, tensor)
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise ModelError(
                    f"{file.what}: step {network.name}: tensor {printable(tensor.name)} is float32 {list(sizes)}, but elsewhere "
                    f"{known.dtype.value} {list(known.shape)}"
                )
            found[tensor.name] = replace(known, layout=known.layout or tensor.layout)
    ordered = {}
    for name in (*(t.name for t in file.inputs), *(n for step in file.steps for n in step.outputs)):
        if name not in found:
            raise ModelError(
                f"{file.what}: tensor {printable(name)}: its shape is not known. A network must read what a kernel writes"
            )
        ordered[name] = found[name]
    return ordered


def key(source: PlanSource, *parts: Any) -> str:
    """Of a cache entry: the plan's content, the tools, and `parts`."""
    return cache.digest(source.digest, cache.tools(), cache.sources("passes", "frontends"), *parts)


def _listed(names: set[str]) -> str:
    return ", ".join(printable(name) for name in sorted(names)) or "none"
