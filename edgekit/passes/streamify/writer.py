"""The one-frame graph as it is written: its nodes, weights and states."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import new_weight, shape
from edgekit.passes.streamify.rules import Refuse
from edgekit.spec import DType, StateSpec


@dataclass(frozen=True)
class Shift:
    """One place where the network looks at other frames.

    value: the clip model's tensor that is looked back at. kind: "shift", or the operator with a window in time.
    channels: its size along the shifted axis; past and future: how many of them came from an earlier and a later frame.
    delay: of the oldest frame, in frames. states: names of the states that carry it.
    """

    value: str
    kind: str
    channels: int
    past: int
    future: int
    delay: int
    states: tuple[str, ...]


class Writer:
    """`graph` reads the frame; `states` are its states in the order of `graph.inputs[1:]` and `next`."""

    def __init__(self, model: ir.Model, axis: int, step: float | None) -> None:
        self.step = step
        self.states: list[StateSpec] = []
        self.shifts: list[Shift] = []
        self.next: list[ir.Value] = []
        self.copied: dict[ir.Value, ir.Value] = {}
        self.taken = {str(v.name) for node in model.graph for v in node.outputs}
        self.taken |= {*model.graph.initializers, *(str(v.name) for v in model.graph.outputs)}
        clip = model.graph.inputs[0]
        full = sizes(clip)
        frame = (*full[:axis], 1, *full[axis + 1 :])
        picture = frame if len(full) != 5 else (1, *(s for i, s in enumerate(frame) if i not in (0, axis)))
        name = self._name("image" if len(picture) == 4 else str(clip.name))
        image = ir.Value(name=name, shape=ir.Shape(picture), type=clip.type)
        opsets = dict(model.graph.opset_imports)
        self.graph = ir.Graph([image], [], nodes=[], opset_imports=opsets, name="one_frame")
        self.first = self._reshape(image, picture, frame)
        self.frame = frame

    def _drop_unread(self) -> None:
        """States that no output needs go (tried on the way, or of dead code); the rest is numbered."""
        sources = dict(zip(self.graph.inputs[1:], self.next, strict=True))
        needed: set[ir.Value] = set()
        queue = [v for v in self.graph.outputs if v not in self.next]
        while queue:
            value = queue.pop()
            if value in needed:
                continue
            needed.add(value)
            node = value.producer()
            queue += [] if node is None else [v for v in node.inputs if v is not None]
            queue += [sources[value]] if value in sources else []
        kept: list[StateSpec] = []
        names: dict[str, str] = {}
        for spec, (before, after) in zip(self.states, sources.items(), strict=True):
            if before not in needed:
                self.graph.inputs.remove(before)
                self.graph.outputs.remove(after)
                continue
            name = names[spec.name] = f"state_{len(kept)}"
            before.name, after.name = self._name(name), self._name(f"{name}_next")
            kept.append(dataclasses.replace(spec, name=name, input=str(before.name), output=str(after.name)))
        self.states = kept
        self.shifts = [
            dataclasses.replace(s, states=tuple(names[n] for n in s.states))
            for s in self.shifts
            if all(n in names for n in s.states)
        ]

    def _state(self, sizes: tuple[int, ...], initial: float) -> tuple[str, ir.Value]:
        name, after = self._name("late"), self._name("late_next")  # _drop_unread gives the names
        state = ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.inputs.append(state)
        self.states.append(StateSpec(name, DType.float32, sizes, name, after, initial, self.step))
        return name, state

    def _keep(self, value: ir.Value) -> None:
        """`value` is what the newest state becomes."""
        spec = self.states[-1]
        made = self._node("Identity", [value], [spec.shape], names=[spec.output])[0]
        self.next.append(made)

    def _cut(self, value: ir.Value, sizes: tuple[int, ...], axis: int, start: int, end: int) -> ir.Value:
        bounds = [self._weight("bound", [n]) for n in (start, end, axis)]
        kept = (*sizes[:axis], end - start, *sizes[axis + 1 :])
        return self._node("Slice", [value, *bounds], [kept])[0]

    def _reshape(self, value: ir.Value, before: Sequence[int], after: Sequence[int]) -> ir.Value:
        if tuple(before) == tuple(after):
            return value
        target = self._weight("shape", after)
        made = self._node("Reshape", [value, target], [tuple(after)])[0]
        made.type = value.type
        return made

    def _weight(self, like: str, numbers: Iterable[int]) -> ir.Value:
        return new_weight(self.graph, self._name(f"stream_{like}"), np.array(list(numbers), np.int64))

    def _constant(self, value: ir.Value | None) -> ir.Value | None:
        if value is None or value in self.copied:
            return None if value is None else self.copied[value]
        if value.is_graph_input() or value.const_value is None:
            raise Refuse("reads another input than the clip")
        made = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
        self.graph.register_initializer(made)
        self.copied[value] = made
        return made

    def _copy(
        self,
        node: ir.Node,
        inputs: Sequence[ir.Value | None],
        sizes: Sequence[tuple[int, ...]],
        changed: dict[str, list[int]] | None = None,
    ) -> list[ir.Value]:
        attributes = {k: a for k, a in node.attributes.items() if isinstance(a, ir.Attr)}
        attributes |= {k: ir.AttrInt64s(k, v) for k, v in (changed or {}).items()}
        # a graph output's name is for the output itself
        names = [self._name(str(o.name)) if o.is_graph_output() else str(o.name) for o in node.outputs]
        made = self._node(node.op_type, inputs, sizes, list(attributes.values()), names, node.name)
        for new, old in zip(made, node.outputs, strict=True):
            new.type = old.type
        return made

    def _node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        sizes: Sequence[tuple[int, ...]],
        attributes: Sequence[ir.Attr] = (),
        names: Sequence[str] = (),
        name: str | None = None,
    ) -> list[ir.Value]:
        node = ir.Node("", op, inputs, attributes, num_outputs=len(sizes), name=name)
        for i, (output, size) in enumerate(zip(node.outputs, sizes, strict=True)):
            output.name = names[i] if names else self._name(f"stream_{op.lower()}")
            output.shape, output.type = ir.Shape(size), ir.TensorType(ir.DataType.FLOAT)
        self.graph.append(node)
        return list(node.outputs)

    def _name(self, like: str) -> str:
        name, i = like, 0
        while name in self.taken:
            i += 1
            name = f"{like}_{i}"
        self.taken.add(name)
        return name


def sizes(value: ir.Value | None) -> tuple[int, ...]:
    """Static shape. Raises: Refuse."""
    found = shape(value)
    if found is None:
        raise Refuse("has an input of open shape")
    return found
