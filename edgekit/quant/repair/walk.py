"""Goes through a network once, node by node, all pictures side by side, while its weights still change.

A repair that treats layers in order needs each one's input as it is behind the layers already repaired.
Between two layers only the values that later nodes read are kept, quantized ones as their int8 codes, and
what does not fit in memory lies in a temporary file. So every node runs once per picture (a measured one
twice), whatever the number of layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.errors import CalibrationError
from edgekit.passes import exact
from edgekit.passes.graph import constant, shape
from edgekit.quant.annotate import quant
from edgekit.quant.placement import prepared
from edgekit.quant.repair import Feed
from edgekit.quant.simulate import fake_quantized

Change = Callable[[np.ndarray], np.ndarray]
KEPT_BYTES = 96 << 20
"""Values kept in memory; the rest goes to a temporary file."""


class Walk:
    """One way through a network, from its first node to the last one that is asked for.

    A context manager: what it keeps is dropped at the end. Values have the names of the annotated model.
    """

    def __init__(
        self, model: ir.Model, feeds: Sequence[Feed], *, quantized: bool, limit: int = KEPT_BYTES
    ) -> None:
        """quantized: walk what the annotations mean; else the floats. `feeds` are read once.

        Raises: CalibrationError without pictures or for a picture that lacks an input.
        """
        self._marks = (
            {str(v.name) for n in model.graph for v in n.outputs if quant(v)} if quantized else set()
        )
        self._inputs = {str(v.name) for v in model.graph.inputs if quantized and quant(v)}
        self._model = fake_quantized(model) if quantized else prepared(model)
        self._nodes = list(self._model.graph)
        self._index = {str(v.name): i for i, n in enumerate(self._nodes) for v in n.outputs}
        self._values = {str(v.name): v for n in self._nodes for v in n.outputs}
        self._at = 0
        self._limit = limit
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self._kept: dict[str, list[_Kept]] = {str(v.name): [] for v in self._model.graph.inputs}
        for feed in feeds:
            for name, rows in self._kept.items():
                if name not in feed:
                    raise CalibrationError(
                        f"picture: lacks input {name}, got {', '.join(feed)}. Feed every input"
                    )
                rows.append(self._keep(np.asarray(feed[name])))
        self.pictures = max((len(rows) for rows in self._kept.values()), default=0)
        if not self.pictures:
            raise CalibrationError(
                "repair: there are no pictures, expected at least one. Give calibration data"
            )

    def __enter__(self) -> Walk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def read(self, value: ir.Value) -> str:
        """What to call a value of the annotated model as its readers see it, rounded to codes."""
        name = str(value.name)
        return f"{name}.real" if name in self._inputs else name

    def computed(self, value: ir.Value) -> str:
        """What to call a value of the annotated model before it is rounded."""
        name = str(value.name)
        return f"{name}.exact" if name in self._marks else name

    def has(self, name: str, sizes: tuple[int, ...] | None) -> bool:
        """Whether some node computes `name`, of shape `sizes` (a split one has other channels)."""
        return name in self._index and shape(self._values[name]) == sizes

    def position(self, name: str) -> int:
        """The number of the node that computes `name`, in the order of the walk."""
        return self._index[name]

    def readers(self, name: str) -> list[str]:
        """The results of the nodes that read the value `name`, in order."""
        found = {
            str(n.outputs[0].name): None
            for n in self._nodes
            for v in n.inputs
            if v is not None and v.name == name
        }
        return list(found)

    def advance(self, name: str) -> None:
        """Go on until the node that computes `name` is next. What lies behind cannot change any more."""
        goal = self._index[name]
        if goal <= self._at:
            return
        later = [v for n in self._nodes[goal:] for v in n.inputs if v is not None]
        needed = {str(v.name) for v in (_codes(v) for v in later) if self._made_before(v, goal)}
        fresh = [n for n in needed if n not in self._kept]
        gathered: dict[str, list[_Kept]] = {n: [] for n in fresh}
        for row in self.values(sorted(fresh, key=lambda n: self._index[n])):
            for n, array in row.items():
                gathered[n].append(self._keep(array))
        for gone in [n for n in self._kept if n not in needed]:
            for kept in self._kept.pop(gone):
                self._drop(kept)
        self._kept.update(gathered)
        self._at = goal

    def values(
        self, names: Sequence[str], replaced: Mapping[str, Change] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The values called `names`, one dict per picture, with the weights as they are now.

        replaced: functions that change values kept here before nodes read them.
        """
        if not names:
            return
        session, sources = None, set(names)
        if any(n not in self._kept for n in names):
            session, sources = self._session(names)
        for picture in range(self.pictures):
            held = {n: self._kept[n][picture].array() for n in sources if n in self._kept}
            for name, change in (replaced or {}).items():
                held[name] = change(held[name])
            if session is not None:
                wanted = [n for n in names if n not in self._kept]
                feed = {i.name: held[i.name] for i in session.get_inputs()}
                held.update(zip(wanted, session.run(wanted, feed), strict=True))
            yield {n: held[n] for n in names}

    def set_weight(self, name: str, numbers: np.ndarray) -> None:
        """Replace an initialiser that only nodes still ahead read."""
        self._model.graph.initializers[name].const_value = ir.tensor(numbers, name=name)

    def set_bias(self, output: str, numbers: np.ndarray) -> None:
        """Give the node that computes `output` another bias."""
        node = self._nodes[self._index[output]]
        name = f"{output}.repaired"
        value = self._model.graph.initializers.get(name)
        if value is None:
            value = ir.Value(name=name, shape=ir.Shape(numbers.shape), type=ir.TensorType(ir.DataType.FLOAT))
            value.const_value = ir.tensor(numbers.astype(np.float32), name=name)
            self._model.graph.register_initializer(value)
        value.const_value = ir.tensor(numbers.astype(np.float32), name=name)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)

    def _made_before(self, value: ir.Value, goal: int) -> bool:
        name = str(value.name)
        return name in self._kept or self._index.get(name, goal) < goal

    def _session(self, names: Sequence[str]) -> tuple[Any, set[str]]:
        """(session that computes those of `names` that are not kept, all kept values that it reads or that
        are asked for)."""
        stack = [self._values[n] for n in names if n not in self._kept]
        nodes: dict[int, ir.Node] = {}
        sources: dict[str, ir.Value] = {}
        weights: dict[str, ir.Value] = {}
        while stack:
            node = stack.pop().producer()
            assert node is not None
            at = self._index[str(node.outputs[0].name)]
            if at in nodes:
                continue
            nodes[at] = node
            for value in node.inputs:
                if value is None:
                    continue
                name = str(value.name)
                if constant(value) is not None:
                    weights[name] = value
                elif name in self._kept:
                    sources[name] = value
                else:
                    stack.append(value)
        outputs = [self._values[n] for n in names if n not in self._kept]
        ordered = [nodes[i] for i in sorted(nodes)]
        session = _session(self._model, ordered, weights, list(sources.values()), outputs)
        return session, {*sources, *(n for n in names if n in self._kept)}

    def _keep(self, array: np.ndarray) -> _Kept:
        if array.nbytes <= self._limit:
            self._limit -= array.nbytes
            return _Kept(np.ascontiguousarray(array), None, array.shape, array.dtype)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="edgekit-repair-")
        self._files += 1
        path = Path(self._folder.name) / str(self._files)
        np.ascontiguousarray(array).tofile(path)
        return _Kept(None, path, array.shape, array.dtype)

    def _drop(self, kept: _Kept) -> None:
        if kept.memory is not None:
            self._limit += kept.memory.nbytes
        elif kept.path is not None:
            kept.path.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class _Kept:
    memory: np.ndarray | None
    path: Path | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def array(self) -> np.ndarray:
        if self.memory is not None:
            return self.memory
        assert self.path is not None
        return np.fromfile(self.path, self.dtype).reshape(self.shape)


def _codes(value: ir.Value) -> ir.Value:
    """The int8 codes behind a value, where it has some: a quarter of the bytes."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return value
    return value if constant(node.inputs[0]) is not None else node.inputs[0]


def _session(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    weights: dict[str, ir.Value],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> Any:
    """An ONNX Runtime session of some nodes, without graph optimization and on one thread."""
    import onnx

    part = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.graph.opset_imports.items():
        part.opset_import.append(onnx.helper.make_opsetid(domain, version))
    part.graph.name = "part"
    part.graph.node.extend(ir.serde.serialize_node(node) for node in nodes)
    for name, value in weights.items():
        assert value.const_value is not None
        tensor = ir.serde.serialize_tensor(value.const_value)
        tensor.name = name
        part.graph.initializer.append(tensor)
    part.graph.input.extend(ir.serde.serialize_value(v) for v in inputs)
    part.graph.output.extend(ir.serde.serialize_value(v) for v in outputs)
    with exact.refused():
        return exact.open_session(part.SerializeToString(), "repair a quantized network", arena=False)
