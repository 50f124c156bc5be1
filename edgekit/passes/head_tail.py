"""The part of a detector behind its head convolutions: where it starts and what it does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.errors import ModelError
from edgekit.passes.graph import constant, input_size, ints, op_counts, shape

SHAPE_ONLY = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast"}
MOVES = SHAPE_ONLY | {"Concat", "Split", "Slice", "Gather"}
_UNARY = SHAPE_ONLY | {"Sigmoid", "Softmax", "Tanh", "HardSigmoid", "Exp"}


@dataclass(frozen=True, eq=False)
class Branch:
    """One head convolution: its raw output [1, channels, H / stride, W / stride].

    `next_ops`: operators that read it, looking through pure reshapes; "output" for a graph output.
    """

    value: ir.Value
    channels: int
    next_ops: frozenset[str]


@dataclass(frozen=True, eq=False)
class Tail:
    """`levels`: stride -> branches in graph order. `region`: nodes fed by this one convolution only.

    `bins`: size of a DFL expectation, None without one. `other`: other weighted operators that feed
    the outputs directly, so no known head. `ops`: operator counts of the whole tail.
    """

    size: tuple[int, int]
    levels: dict[int, tuple[Branch, ...]]
    nodes: tuple[ir.Node, ...]
    region: dict[ir.Value, tuple[ir.Node, ...]]
    bins: int | None
    other: tuple[str, ...]
    ops: dict[str, int]

    def describe(self) -> str:
        """One line for error messages, e.g. `stride 8: 64+80 channels; stride 16: ...`."""
        parts = [f"stride {s}: {'+'.join(str(b.channels) for b in bs)}" for s, bs in self.levels.items()]
        parts += self.other
        return ("head channels " if self.levels else "") + ("; ".join(parts) or "no convolution")

    def order(self, branches: tuple[Branch, ...]) -> tuple[Branch, ...] | None:
        """The branches in the order in which one Concat joins exactly them, None without such."""
        for node in self.nodes:
            if node.op_type != "Concat" or len(node.inputs) != len(branches):
                continue
            found = [next((b for b in branches if b.value is _root(v)), None) for v in node.inputs]
            joined = tuple(b for b in found if b is not None)
            if len(set(joined)) == len(branches):
                return joined
        return None


def find_tail(model: ir.Model) -> Tail:
    """Walk up from the outputs. Raises: ModelError for no picture input or a wrong DFL expectation."""
    height, width = input_size(model)
    nodes, heads, other, bins = _walk_up(model)
    levels: dict[int, list[Branch]] = {}
    for node in model.graph:
        if node not in heads:
            continue
        value = node.outputs[0]
        sizes = shape(value)
        stride = _stride((height, width), sizes) if sizes is not None else None
        if stride is None or sizes is None:
            other.append(f"{node.op_type} with output {list(sizes or ())}")
            continue
        levels.setdefault(stride, []).append(Branch(value, sizes[1], frozenset(_next_ops(value))))
    ordered = tuple(n for n in model.graph if n in nodes)
    return Tail(
        size=(height, width),
        levels={s: tuple(levels[s]) for s in sorted(levels)},
        nodes=ordered,
        region=_regions(ordered, heads),
        bins=bins,
        other=tuple(other),
        ops=op_counts(ordered),
    )


def _stride(picture: tuple[int, int], sizes: tuple[int, ...]) -> int | None:
    """Input pixels per cell: a power of two with ceil(picture / stride) cells along both axes.

    Rounded up because padded strided convolutions do so (NanoDet-Plus: 416 / 64 -> 7 cells).
    """
    if len(sizes) != 4 or sizes[0] != 1:
        return None
    fitting = [
        s
        for s in (2**k for k in range(12))
        if all(-(-p // s) == n for p, n in zip(picture, sizes[2:], strict=True))
    ]
    return fitting[0] if fitting else None


def _walk_up(model: ir.Model) -> tuple[set[ir.Node], set[ir.Node], list[str], int | None]:
    """(tail nodes, head convolutions, other weighted feeders, DFL bins)."""
    nodes: set[ir.Node] = set()
    heads: set[ir.Node] = set()
    other: list[str] = []
    bins: int | None = None
    stack = [v.producer() for v in model.graph.outputs]
    while stack:
        node = stack.pop()
        if node is None or node in nodes or node in heads:
            continue
        found = _expectation_bins(node)
        if found is not None:
            if bins not in (None, found):
                raise ModelError(f"model: two DFL sizes in one head, {bins} and {found}, expected one.")
            bins = found
        elif node.op_type == "Conv":
            heads.add(node)
            continue
        elif node.op_type in ("ConvTranspose", "Gemm", "MatMul") and any(
            constant(v) is not None for v in node.inputs
        ):
            other.append(f"{node.op_type} feeding an output")
            continue
        nodes.add(node)
        stack += [v.producer() for v in node.inputs if v is not None]
    return nodes, heads, other, bins


def _expectation_bins(node: ir.Node) -> int | None:
    """k when `node` is the product of a Softmax with a constant vector of k values 0 .. k-1.

    Raises: ModelError when it is such a product but with other values: the decoder could not know.
    """
    if node.op_type not in ("Conv", "MatMul", "Mul", "Gemm") or len(node.inputs) < 2:
        return None
    weight = constant(node.inputs[1])
    source = _root(node.inputs[0], stop="Softmax")
    softmax = source.producer() if source is not None else None
    if weight is None or softmax is None or softmax.op_type != "Softmax":
        return None
    sizes = shape(softmax.outputs[0])
    if sizes is None:
        return None
    attribute = softmax.attributes.get("axis")
    bins = sizes[attribute.as_int() if attribute is not None else -1]
    if weight.size != bins or bins < 2:
        return None
    if not np.allclose(weight.reshape(-1), np.arange(bins), rtol=0, atol=1e-4):
        shown = ", ".join(f"{v:g}" for v in weight.reshape(-1)[:4])
        raise ModelError(
            f"model: its DFL expectation is unusual, expected weights 0, 1, ..., {bins - 1}, "
            f"got {shown}, .... Declare the output instead: --head rows --columns cx,cy,w,h,cls*."
        )
    return int(bins)


def _root(value: ir.Value | None, stop: str = "") -> ir.Value | None:
    """Up through one-input operators (reshapes, activations) to the value they start from."""
    while value is not None:
        node = value.producer()
        if node is None or node.op_type not in _UNARY or node.op_type == stop:
            return value
        value = node.inputs[0]
    return None


def _next_ops(value: ir.Value) -> Iterator[str]:
    if value.is_graph_output():
        yield "output"
    for node, _ in value.uses():
        if node.op_type in SHAPE_ONLY:
            yield from _next_ops(node.outputs[0])
        else:
            yield node.op_type


def _regions(nodes: tuple[ir.Node, ...], heads: set[ir.Node]) -> dict[ir.Value, tuple[ir.Node, ...]]:
    """Head output -> the tail nodes that depend on no other head convolution."""
    sources: dict[ir.Value, frozenset[ir.Value]] = {n.outputs[0]: frozenset(n.outputs) for n in heads}
    regions: dict[ir.Value, list[ir.Node]] = {n.outputs[0]: [] for n in heads}
    for node in nodes:  # graph order: producers first
        merged: frozenset[ir.Value] = frozenset()
        for value in node.inputs:
            if value is not None:
                merged |= sources.get(value, frozenset())
        for output in node.outputs:
            sources[output] = merged
        if len(merged) == 1:
            regions[next(iter(merged))].append(node)
    return {value: tuple(found) for value, found in regions.items()}


def reaches(value: ir.Value, op: str) -> bool:
    """Whether `op` reads `value` after nothing but moves of data (reshape, concat, split, slice)."""
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, _ in current.uses():
            if node.op_type == op:
                return True
            if node.op_type in MOVES:
                stack += node.outputs
    return False


def first_split(value: ir.Value) -> tuple[int, ...] | None:
    """Channel counts of the first division of [1, C, h, w] (or [1, C, n]) along C, None without."""
    sizes = shape(value)
    if sizes is None:
        return None
    cuts = {0, sizes[1]}
    for node, _ in value.uses():
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if node.op_type == "Split" and axis in (1, 1 - len(sizes)):
            parts = [shape(o) for o in node.outputs]
            return tuple(p[1] for p in parts if p is not None) if all(parts) else None
        if node.op_type == "Slice":
            starts, ends, axes = (constant(v) for v in node.inputs[1:4])
            if starts is not None and ends is not None and axes is not None and list(axes) == [1]:
                cuts |= {min(int(starts[0]), sizes[1]), min(int(ends[0]), sizes[1])}
        if node.op_type in ("Reshape", "Flatten"):
            after = shape(node.outputs[0])
            if after is not None and len(after) > 1 and after[1] == sizes[1]:
                return first_split(node.outputs[0])
        if node.op_type == "Transpose":
            return _split_after_transpose(node, sizes)
    ordered = sorted(cuts)
    found = tuple(b - a for a, b in itertools.pairwise(ordered))
    return found if len(found) > 1 else None


def _split_after_transpose(node: ir.Node, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    perm = ints(node, "perm", range(len(sizes))[::-1])
    axis = list(perm).index(1)
    for user, _ in node.outputs[0].uses():
        given = user.attributes["axis"].as_int() if "axis" in user.attributes else 0
        if user.op_type == "Split" and given % len(sizes) == axis:
            parts = [shape(o) for o in user.outputs]
            return tuple(p[axis] for p in parts if p is not None) if all(parts) else None
    return None
