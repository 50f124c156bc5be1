"""Small bundles that really run, of any plan, for the tests of the engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgekit.backends.base import Payload
from edgekit.backends.onnxruntime.wire import align_weights
from edgekit.bundle import golden_bytes, golden_path, make_variant, write_bundle
from edgekit.manifest import Golden, GoldenTensor, KernelStep, Manifest, Segment
from edgekit.spec import DType, TensorSpec
from tests.bundle_samples import files_of, forge

WIDTH = 136
"""Of every tensor, [1, WIDTH]; weights of 72 KiB, so that bundles are mapped."""


def network(source: str, result: str, seed: int = 0, extra: str = "") -> onnx.ModelProto:
    """result = tanh(source @ W + b), seeded; with `extra`, (source + extra) @ W."""
    rng = np.random.default_rng(seed)
    w = rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32)
    b = rng.normal(0, 0.2, (1, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("Add", [source, extra], ["sum"]) if extra else None,
        helper.make_node("MatMul", ["sum" if extra else source, "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["biased"]),
        helper.make_node("Tanh", ["biased"], [result]),
    ]
    graph = helper.make_graph(
        [node for node in nodes if node],
        "net",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, WIDTH]) for n in (source, extra) if n],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, [1, WIDTH])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def altered(model: onnx.ModelProto, edit: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """The model with its weight matrix changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    w = edit(numpy_helper.to_array(copy.graph.initializer[0]).copy())
    copy.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(w), "w"))
    return copy


def slowed(model: onnx.ModelProto, times: int) -> onnx.ModelProto:
    """The same values, with `times` idle multiplications of a larger matrix beside them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, size = copy.graph, 400
    graph.initializer.append(numpy_helper.from_array(np.zeros((WIDTH, size), np.float32), "idle_in"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((size, size), np.float32), "idle"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((size, WIDTH), np.float32), "idle_out"))
    result = graph.output[0].name
    graph.node[-1].output[0] = "fast"
    nodes = [helper.make_node("MatMul", [graph.input[0].name, "idle_in"], ["idle_0"])]
    nodes += [helper.make_node("MatMul", [f"idle_{i}", "idle"], [f"idle_{i + 1}"]) for i in range(times)]
    nodes += [helper.make_node("MatMul", [f"idle_{times}", "idle_out"], ["nothing"])]
    graph.node.extend([*nodes, helper.make_node("Add", ["fast", "nothing"], [result])])
    return copy


@dataclasses.dataclass(frozen=True)
class Step:
    """A segment and its variants, the first of which gives the golden values."""

    name: str
    variants: Mapping[str, onnx.ModelProto]


def _names(values: Any) -> tuple[str, ...]:
    return tuple(value.name for value in values)


def write(
    path: Path,
    steps: Sequence[Step],
    *,
    outputs: Sequence[str] = (),
    evidence: Mapping[str, Any] | None = None,
    golden: GoldenTensor | None = None,
    kernel: KernelStep | None = None,
    **changes: Any,
) -> Path:
    """Write the plan of `steps` as a bundle. `golden`: its tolerances for every output; `changes`: to the manifest."""
    rng = np.random.default_rng(11)
    values: dict[str, np.ndarray] = {}
    inputs: list[str] = []
    files: dict[str, bytes] = {}
    plan: list[Segment | KernelStep] = []
    for step in steps:
        model = next(iter(step.variants.values()))
        for name in _names(model.graph.input):
            if name not in values:
                inputs.append(name)
                values[name] = rng.normal(size=(1, WIDTH)).astype(np.float32)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        got = session.run(None, {name: values[name] for name in _names(model.graph.input)})
        values.update(zip(_names(model.graph.output), got, strict=True))
        variants = []
        for name, network_ in step.variants.items():
            data = align_weights(network_.SerializeToString())
            variants.append(
                make_variant(step.name, name, Payload("onnxruntime", "float32", "onnx", data, (), ()))
            )
            files[variants[-1].path] = data
        plan.append(
            Segment(step.name, _names(model.graph.input), _names(model.graph.output), tuple(variants))
        )
    if kernel is not None:
        plan.append(kernel)
        values.update({name: np.zeros((1, WIDTH), np.float32) for name in kernel.outputs})
    outputs = outputs or plan[-1].outputs
    rule = golden or GoldenTensor("", "", atol=1e-5, rtol=1e-4)
    sources = [GoldenTensor(name, golden_path("input", i)) for i, name in enumerate(inputs)]
    results = [
        dataclasses.replace(rule, tensor=name, path=golden_path("output", i))
        for i, name in enumerate(outputs)
    ]
    for tensor in (*sources, *results):
        files[tensor.path] = golden_bytes(values[tensor.tensor])
    manifest = Manifest(
        schema_version=1,
        model="plan",
        task="none",
        target="host",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        tensors=tuple(TensorSpec(name, DType.float32, (1, WIDTH)) for name in values),
        plan=tuple(plan),
        pipeline={},
        payload_digest="",
        golden=Golden(tuple(sources), tuple(results)),
        files={},
        provenance={},
    )
    write_bundle(path, dataclasses.replace(manifest, **changes), files, evidence or {})
    return path


def replace_file(path: Path, target: Path, name: str, data: bytes) -> Path:
    """A copy of a bundle with one file exchanged and every digest made to fit, as a forger would."""
    from hashlib import sha256

    files = {**files_of(path), name: data}
    digest = sha256(data).hexdigest()

    def edit(tree: Any) -> None:
        tree["files"][name] = {"bytes": len(data), "sha256": digest}
        for step in tree["plan"]:
            for variant in step.get("variants", ()):
                if variant["path"] == name:
                    variant.update(bytes=len(data), digest=f"sha256:{digest}")

    target.write_bytes(forge(files, edit))
    return target


def replace_evidence(path: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a bundle with its evidence edited."""
    tree = json.loads(files_of(path)["evidence.json"])
    changed = edit(tree)
    text = json.dumps(
        tree if changed is None else changed, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return replace_file(path, target, "evidence.json", text.encode())
