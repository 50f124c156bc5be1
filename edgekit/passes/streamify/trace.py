"""Where every element of a tensor comes from, through operators that only move data.

Such a region of the graph is run once on numbers that name elements instead of on data: a region's
input gets the numbers 0, 1, 2, .. and constants get negative codes. What comes out says exactly which
frame and place each element was taken from, whatever chain of Reshape, Slice, Split, Pad, Concat,
Transpose, Gather or ScatterND an exporter has written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import ModelError
from edgekit.passes import exact
from edgekit.passes.graph import constant, shape

MOVES: dict[str, tuple[int, ...] | None] = {
    "Reshape": (0,),
    "Flatten": (0,),
    "Squeeze": (0,),
    "Unsqueeze": (0,),
    "Identity": (0,),
    "Transpose": (0,),
    "Slice": (0,),
    "Split": (0,),
    "Concat": None,
    "Pad": (0, 2),
    "Expand": (0,),
    "Tile": (0,),
    "Gather": (0,),
    "GatherND": (0,),
    "GatherElements": (0,),
    "ScatterND": (0, 2),
    "ScatterElements": (0, 2),
    "Where": (1, 2),
}
"""Operators that copy elements, and their inputs that hold data (None: all); the others say where to."""

MAX_NUMBERS = 2**31 - 1


def data_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """(position, value) of the inputs of a moving operator that hold data."""
    places = MOVES[node.op_type]
    wanted = range(len(node.inputs)) if places is None else places
    return [(i, v) for i in wanted if i < len(node.inputs) and (v := node.inputs[i]) is not None]


def is_move(node: ir.Node) -> bool:
    """It copies elements, and where to is known."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in MOVES:
        return False
    data = {i for i, _ in data_inputs(node)}
    for name in ("reduction", "mode"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.as_string() not in ("none", "constant"):
            return False
    return all(v is None or i in data or constant(v) is not None for i, v in enumerate(node.inputs))


@dataclass
class Origin:
    """Numbers of the elements of some values. `first[root]`: the number of that root's element 0;
    negative numbers -1-k stand for the constant `constants[k]`."""

    arrays: dict[ir.Value, np.ndarray]
    first: dict[ir.Value, int]
    constants: list[float] = field(default_factory=list)


def trace(model: ir.Model, wanted: Sequence[ir.Value], stop: set[ir.Value]) -> Origin:
    """Numbers of the elements of `wanted`, each made by moving operators from values in `stop` and constants.

    Every output that a moving operator makes of a value outside `stop` is followed up.
    Raises: ModelError when onnxruntime cannot run the region or it is too large.
    """
    nodes: list[ir.Node] = []
    first: dict[ir.Value, int] = {}
    seen: set[ir.Value] = set()
    total = 0

    def visit(value: ir.Value) -> None:
        nonlocal total
        if value in seen:
            return
        seen.add(value)
        if value in stop:
            first[value] = total
            total += int(np.prod(_sizes(value)))
            return
        node = value.producer()
        assert node is not None and is_move(node), "the caller knows what is a region"
        for _, source in data_inputs(node):
            if constant(source) is None:
                visit(source)
        if node not in nodes:
            nodes.append(node)

    for value in wanted:
        visit(value)
    if total > MAX_NUMBERS:
        raise ModelError(
            f"model: {total} elements are moved at once, expected at most {MAX_NUMBERS}. Export a shorter clip."
        )
    codes = _Codes()
    graph_nodes = [_numbered(node, codes) for node in nodes]
    feeds = {
        str(v.name): np.arange(start, start + int(np.prod(_sizes(v))), dtype=np.int32).reshape(_sizes(v))
        for v, start in first.items()
    }
    results = {v: feeds[str(v.name)] for v in wanted if v in first}
    made = [v for v in wanted if v not in first]
    if made:
        graph = helper.make_graph(
            graph_nodes,
            "region",
            [helper.make_tensor_value_info(n, TensorProto.INT32, a.shape) for n, a in feeds.items()],
            [helper.make_tensor_value_info(str(v.name), TensorProto.INT32, _sizes(v)) for v in made],
            [numpy_helper.from_array(data, name) for name, data in codes.tensors.items()],
        )
        version = model.graph.opset_imports.get("", 19)
        proto = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", version)], ir_version=min(model.ir_version or 9, 10)
        )
        results |= dict(zip(made, _run(proto, feeds), strict=True))
    return Origin(results, first, codes.constants)


class _Codes:
    """Constants of the region: what says where to as it is, data as codes."""

    def __init__(self) -> None:
        self.constants: list[float] = [0.0]
        self.tensors: dict[str, np.ndarray] = {"0#code": np.array(-1, np.int32)}

    def data(self, name: str, values: np.ndarray) -> str:
        flat, where = np.unique(values.reshape(-1).astype(np.float64), return_inverse=True)
        codes = np.empty(len(flat), np.int32)
        for i, number in enumerate(flat.tolist()):
            if number not in self.constants:
                self.constants.append(number)
            codes[i] = -1 - self.constants.index(number)
        self.tensors[f"{name}#code"] = codes[where].reshape(values.shape)
        return f"{name}#code"

    def place(self, name: str, values: np.ndarray) -> str:
        self.tensors[f"{name}#place"] = values
        return f"{name}#place"


def _numbered(node: ir.Node, codes: _Codes) -> onnx.NodeProto:
    """The same operator on numbers."""
    data = {i for i, _ in data_inputs(node)}
    names = []
    for i, value in enumerate(node.inputs):
        values = constant(value)
        name = "" if value is None else str(value.name)
        if values is not None:
            name = codes.data(name, values) if i in data else codes.place(name, values)
        names.append(name)
    if node.op_type == "Pad":
        names += [""] * (3 - len(names))
        names[2] = names[2] or "0#code"
    proto = ir.serde.serialize_node(node)
    del proto.input[:]
    proto.input.extend(names)
    return proto


def _run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    with exact.refused("follow its data"):
        session = exact.open_session(proto.SerializeToString(), "follow data through the graph")
        return [np.asarray(r) for r in session.run(None, feeds)]


def _sizes(value: ir.Value) -> tuple[int, ...]:
    sizes = shape(value)
    assert sizes is not None, "checked when the value was bound"
    return sizes


@dataclass(frozen=True)
class Delays:
    """For each place of a frame (row-major): how many frames late its element is, and what stands
    there before the first one. `late` is NEVER where it is a constant at all times; `code` is 0 where
    nothing stands in, else a number of Origin.constants."""

    late: np.ndarray
    code: np.ndarray


NEVER = np.iinfo(np.int32).max


def delays(moved: np.ndarray, base: np.ndarray, frames: int) -> Delays | None:
    """How `moved` [frames, places] is `base` [>= frames, places] with each place shifted in time.

    None when it is not: another place's element, a frame used twice, a jump in time, an edge that is
    not one constant.
    """
    if moved.shape[0] != frames or moved.shape[1] != base.shape[1]:
        return None
    known = moved >= 0
    row = np.full(int(max(base.max(initial=0), moved.max(initial=0))) + 1, -1, np.int32)
    place = row.copy()
    # a base that is itself made of pieces holds codes too: those name nothing
    index, column = np.nonzero(base >= 0)
    row[base[index, column]] = index
    place[base[index, column]] = column
    numbers = np.where(known, moved, 0)
    came, at = row[numbers], place[numbers]
    if (known & ((came < 0) | (came >= frames) | (at != np.arange(moved.shape[1])))).any():
        return None
    late = np.arange(frames, dtype=np.int32)[:, None] - came
    low = np.where(known, late, NEVER).min(axis=0)
    high = np.where(known, late, -NEVER).max(axis=0)
    never = ~known.any(axis=0)
    if (low != high)[~never].any():
        return None
    low[never] = NEVER
    time = np.arange(frames)[:, None]
    outside = np.where(low > 0, time < low, time >= frames + np.minimum(low, 0))
    if (known == outside).any():
        return None
    code = np.where(known, np.iinfo(np.int32).min, moved).max(axis=0)
    if ((moved != code) & ~known).any():
        return None
    return Delays(low, np.where(code == np.iinfo(np.int32).min, 0, code))
