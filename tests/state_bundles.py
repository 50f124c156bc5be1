"""Bundles that keep state, made by hand: a small network of shifted channels and its payloads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import helper

from edgekit.backends.base import Payload
from edgekit.backends.onnxruntime.wire import align_weights
from edgekit.bundle import golden_bytes, golden_path, make_variant, write_bundle
from edgekit.manifest import Golden, GoldenTensor, Manifest, Segment
from edgekit.passes import probe
from edgekit.passes.graph import shape
from edgekit.spec import DType, StateSpec, TensorSpec
from tests.litert_graphs import graph

SIZE = 8
SHAPES = {"image": (1, 3, SIZE, SIZE), "state_0": (1, 2, SIZE, SIZE), "state_1": (1, 8, SIZE, SIZE)}
CLASSES = 5
STATES = tuple(
    StateSpec(
        f"state_{i}", DType.float32, SHAPES[f"state_{i}"], f"state_{i}", f"state_{i}_next", nominal_dt_s=0.1
    )
    for i in (0, 1)
)


def shifted(seed: int = 0) -> ir.Model:
    """image, state_0, state_1 -> logits, state_0_next, state_1_next: two convolutions whose first channels
    are those of the frame before."""
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return rng.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype(np.float32)

    values: dict[str, np.ndarray] = {
        "w0": weights(16, 3, 3, 3),
        "w1": weights(16, 16, 3, 3),
        "w2": weights(CLASSES, 16, 3, 3),
        "axis": np.array([1]),
        "zero": np.array([0]),
        "end": np.array([16]),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["c0"], pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["x0"]),
    ]
    for i, channels in enumerate((2, 8)):
        values[f"fold{i}"] = np.array([channels])
        nodes += [
            helper.make_node("Slice", [f"x{i}", "zero", f"fold{i}", "axis"], [f"state_{i}_next"]),
            helper.make_node("Slice", [f"x{i}", f"fold{i}", "end", "axis"], [f"rest{i}"]),
            helper.make_node("Concat", [f"state_{i}", f"rest{i}"], [f"joined{i}"], axis=1),
            helper.make_node("Conv", [f"joined{i}", f"w{i + 1}"], [f"c{i + 1}"], pads=[1] * 4),
        ]
        if i == 0:
            nodes += [helper.make_node("Relu", ["c1"], ["x1"])]
    nodes += [
        helper.make_node("GlobalAveragePool", ["c2"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    return graph(nodes, SHAPES, values, ("logits", "state_0_next", "state_1_next"))


def onnx_payload(model: ir.Model, backend: str = "onnxruntime") -> Payload:
    data = ir.to_proto(model).SerializeToString()
    if backend == "onnxruntime":
        data = align_weights(data)
    return Payload(backend, "float32", "onnx", data, (), ())


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """float32 [count, 1, 3, SIZE, SIZE]."""
    return np.random.default_rng(seed).normal(size=(count, *SHAPES["image"])).astype(np.float32)


def reference(
    model: ir.Model, frames: np.ndarray, states: Mapping[str, np.ndarray] | None = None
) -> list[dict[str, np.ndarray]]:
    """All outputs, frame by frame, by handing each state's output to the next frame's input."""
    held = dict(states or {s.input: np.full(s.shape, s.initial, np.float32) for s in STATES})
    results = []
    for frame in frames:
        results.append(probe.evaluate(model, {"image": frame, **held}))
        held = {s.input: results[-1][s.output] for s in STATES}
    return results


def write(
    path: Path,
    payloads: Mapping[str, Payload],
    model: ir.Model,
    *,
    states: Sequence[StateSpec] = STATES,
    golden_states: Mapping[str, np.ndarray] | None = None,
    outputs: Sequence[str] = ("logits",),
    tolerance: float = 1e-4,
    evidence: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A bundle of one segment with these payloads; golden values are those of `model`, in floats.

    golden_states: values of state inputs, in the manifest's types, which then have golden outputs too;
    None = the bundle has golden values for plan inputs and outputs only.
    A model of several lanes (passes.lanes) takes states of as many.
    """
    lanes = (shape(model.graph.inputs[0]) or (1,))[0]
    frame = np.concatenate(pictures(lanes, seed=5))
    values: dict[str, np.ndarray] = {"image": frame, **(golden_states or {})}
    start = {str(v.name): np.zeros(shape(v) or (), np.float32) for v in model.graph.inputs}
    values |= probe.evaluate(model, {**start, **values})
    contents: dict[str, bytes] = dict(files or {})
    variants = []
    for name, payload in payloads.items():
        variants.append(make_variant("net", name, payload))
        contents[variants[-1].path] = payload.data
    sides = (["image", *(golden_states or ())], [*outputs, *(s.output for s in states if golden_states)])
    golden: list[list[GoldenTensor]] = []
    for side, names in zip(("input", "output"), sides, strict=True):
        atol = tolerance if side == "output" else 0.0
        unique = enumerate(dict.fromkeys(names))
        golden.append([GoldenTensor(name, golden_path(side, i), atol=atol) for i, name in unique])
    for tensor in (*golden[0], *golden[1]):
        contents[tensor.path] = golden_bytes(values[tensor.tensor])
    tensors = [
        TensorSpec("image", DType.float32, frame.shape),
        TensorSpec("logits", DType.float32, (lanes, CLASSES)),
    ]
    tensors += [TensorSpec(name, s.dtype, s.shape) for s in states for name in (s.input, s.output)]
    manifest = Manifest(
        schema_version=1,
        model="shifted",
        task="none",
        target="host",
        inputs=("image",),
        outputs=tuple(outputs),
        tensors=tuple(tensors),
        plan=(
            Segment(
                "net",
                ("image", *(s.input for s in states)),
                ("logits", *(s.output for s in states)),
                tuple(variants),
            ),
        ),
        pipeline={},
        payload_digest="",
        golden=Golden(tuple(golden[0]), tuple(golden[1])),
        files={},
        provenance={},
        states=tuple(states),
    )
    write_bundle(path, manifest, contents, evidence or {})
    return path


def with_fields(states: Sequence[StateSpec], **changes: Any) -> tuple[StateSpec, ...]:
    return tuple(dataclasses.replace(state, **changes) for state in states)
