"""Sizes of a graph as relations: which size of a result is which size of what came in, or a part or product of some.

Each axis of each value is a product of numbers. A number is fixed (2 groups of a shuffle), or free: learned while the
network runs from the value it appears in first (a batch, rows, channels of a convolution), or a share of a free one.
So Reshape [1, 48, 44, 44] -> [24, 2, 1936] becomes [B * C/2, 2, H * W].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from edgekit.passes.graph import constant, integer, ints, shape

Dims = tuple[tuple[int, ...], ...]
"""Per axis the numbers whose product it is."""

_SAME = {
    "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Clip", "Softmax", "LogSoftmax", "HardSigmoid", "HardSwish", "Softplus",
    "Gelu", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Reciprocal", "Floor", "Ceil", "Round", "Cast", "Identity", "Dropout",
    "BatchNormalization", "LayerNormalization", "InstanceNormalization", "Mish", "PRelu", "Not", "Sin", "Cos",
}  # fmt: skip
_POINTWISE = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Max",
    "Min",
    "Where",
    "Equal",
    "Greater",
    "Less",
    "And",
    "Or",
}


@dataclass
class Sizes:
    """values: value name -> Dims. size: of each number in the file. parts: number -> (number, divisor) of a share."""

    values: dict[str, Dims] = field(default_factory=dict)
    size: list[int] = field(default_factory=list)
    parts: dict[int, tuple[int, int]] = field(default_factory=dict)
    frees: set[int] = field(default_factory=set)
    channels: set[int] = field(default_factory=set)
    """Numbers that count channels of convolutions."""
    made: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """value name -> (axis, number) of the free numbers that it teaches."""

    @staticmethod
    def of(graph: ir.Graph) -> Sizes:
        found = Sizes()
        for value in graph.inputs:
            found._fresh(value)
        for node in graph:
            for index, value in enumerate(node.outputs):
                found._output(node, value, index)
        return found

    def free(self, name: str) -> list[tuple[int, int]]:
        return self.made.get(name, [])

    def binds(self, node: ir.Node) -> tuple[tuple[int, int, int], ...]:
        return tuple(
            (i, axis, number)
            for i, value in enumerate(node.outputs)
            for axis, number in self.free(str(value.name))
        )

    def shape(self, name: str, known: Mapping[int, int]) -> tuple[int, ...] | None:
        """The value's sizes with the free numbers `known`, None where they were not understood."""
        dims = self.values.get(name)
        if dims is None:
            return None
        return tuple(math.prod(self._number(n, known) for n in axis) for axis in dims)

    def rank(self, name: str) -> int | None:
        dims = self.values.get(name)
        return None if dims is None else len(dims)

    def _number(self, number: int, known: Mapping[int, int]) -> int:
        if number in self.parts:
            whole, divisor = self.parts[number]
            return self._number(whole, known) // divisor
        return known.get(number, self.size[number])

    def _new(self, size: int) -> int:
        self.size.append(size)
        return len(self.size) - 1

    def _fresh(self, value: ir.Value, known: Sequence[tuple[int, ...] | None] = ()) -> None:
        """Dims of `value`: those `known`, a free number for each axis that is not."""
        sizes = shape(value)
        if sizes is None:
            return
        dims = []
        for axis, size in enumerate(sizes):
            given = known[axis] if axis < len(known) else None
            if given is None or math.prod(self.size[n] for n in given) != size:
                number = self._new(size)
                self.frees.add(number)
                self.made.setdefault(str(value.name), []).append((axis, number))
                given = (number,)
            dims.append(given)
        self.values[str(value.name)] = tuple(dims)

    def _output(self, node: ir.Node, value: ir.Value, index: int) -> None:
        sources = [self.values.get(str(v.name)) if v is not None else None for v in node.inputs]
        first = sources[0] if sources else None
        sizes = shape(value)
        op = node.op_type
        if sizes is None:
            return
        if op in _POINTWISE:
            self._fresh(value, [self._widest(node, sources, axis - len(sizes)) for axis in range(len(sizes))])
        elif first is None:
            self._fresh(value)
        elif op in _SAME:
            self._fresh(value, first)
        elif op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            self._reshape(node, value, first, sizes)
        elif op == "Transpose":
            order = ints(node, "perm", range(len(first))[::-1])
            self._fresh(value, [first[i] for i in order])
        elif op in ("Conv", "ConvTranspose", "Gemm"):
            self._fresh(value, first[:1])
            self.channels.update(self.values[str(value.name)][1])
        elif op == "MatMul":
            self._fresh(value, first[:-1])
        elif op in ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"):
            self._fresh(value, first[:2])
        elif op in ("Concat", "Split"):
            axis = integer(node, "axis", 0) % len(first)
            self._fresh(value, [None if i == axis else d for i, d in enumerate(first)])
            self._inherit(value, first, {axis})
        elif op in ("Slice", "Pad", "Resize", "Expand", "Tile") and len(first) == len(sizes):
            before = shape(node.inputs[0]) or ()
            touched = _sliced(node, len(first)) if op == "Slice" else set()
            self._fresh(
                value,
                [
                    d if before[i] == sizes[i] and i not in touched and (op != "Resize" or i < 2) else None
                    for i, d in enumerate(first)
                ],
            )
            self._inherit(value, first, touched)
        elif op.startswith("Reduce") and len(first) == len(sizes):
            self._fresh(value, [d if d and sizes[i] > 1 else None for i, d in enumerate(first)])
        elif op == "Gather":
            axis = integer(node, "axis", 0) % len(first)
            inner = len(sizes) - len(first) + 1
            self._fresh(value, [*first[:axis], *[None] * inner, *first[axis + 1 :]])
        else:
            self._fresh(value)

    def _inherit(self, value: ir.Value, source: Dims, axes: set[int]) -> None:
        """Parts of channels are channels."""
        for axis in axes:
            if set(source[axis]) & self.channels:
                self.channels.update(self.values[str(value.name)][axis])

    def counts_channels(self, name: str) -> set[int]:
        """Axes of a value that count channels of a convolution."""
        return {i for i, dims in enumerate(self.values.get(name, ())) if set(dims) & self.channels}

    def _widest(self, node: ir.Node, sources: Sequence[Dims | None], axis: int) -> tuple[int, ...] | None:
        """Numbers of the operand that decides the size of `axis` (from the end) of an elementwise result."""
        best: tuple[int, ...] | None = None
        for value, dims in zip(node.inputs, sources, strict=True):
            if dims is None or constant(value) is not None or len(dims) < -axis:
                continue
            found = dims[axis]
            if best is None or math.prod(self.size[n] for n in found) > math.prod(self.size[n] for n in best):
                best = found
        return best

    def _reshape(self, node: ir.Node, value: ir.Value, source: Dims, sizes: tuple[int, ...]) -> None:
        """Numbers in order are dealt out to the new axes; one that has to be cut leaves its smaller side fixed, or the
        side that the exporter did not call -1."""
        wanted = constant(node.inputs[1]) if node.op_type == "Reshape" else None
        open_axes = set() if wanted is None else {i for i, n in enumerate(wanted.reshape(-1)) if n == -1}
        left = [n for axis in source for n in axis]
        dims: list[tuple[int, ...]] = []
        for axis, size in enumerate(sizes):
            taken: list[int] = []
            need = size
            if need == 1 and left and self.size[left[0]] == 1:
                taken.append(left.pop(0))
            while need > 1 and left:
                number = left.pop(0)
                have = self.size[number]
                if need % have == 0:
                    taken.append(number)
                    need //= have
                elif have % need == 0:
                    outer, inner = need, have // need
                    outer_open = outer > inner if len(open_axes) != 1 else axis in open_axes
                    a, b = self._new(outer), self._new(inner)
                    if outer_open:
                        self.parts[a] = (number, inner)
                    else:
                        self.parts[b] = (number, outer)
                    taken.append(a)
                    left.insert(0, b)
                    need = 1
                else:
                    return self._fresh(value)
            if need > 1:
                return self._fresh(value)
            dims.append(tuple(taken))
        if dims:
            dims[-1] += tuple(left)  # sizes of 1
        if math.prod(self.size[n] for n in left) != 1:
            return self._fresh(value)
        self.values[str(value.name)] = tuple(dims)
        return None


def _sliced(node: ir.Node, rank: int) -> set[int]:
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return set(range(rank)) if axes is None else {int(a) % rank for a in axes.reshape(-1)}
