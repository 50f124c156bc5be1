"""Weighted nodes as matrix products: rows of weights, columns of inputs, and the moments of those columns."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, integer, ints, new_weight, number
from edgekit.quant.annotate import node_id
from edgekit.quant.rules import bias, weight

WIDE = 1024
"""Rows longer than this have their moments in float32: 4608 products take 85 MB then."""


def has_rows(node: ir.Node) -> bool:
    """Whether `node` is a product of constant rows with patches of its input that this module knows."""
    tensor = weight(node)
    if tensor is None or constant(tensor) is None:
        return False
    if node.op_type == "Conv":
        return True
    if node.op_type == "Gemm":
        plain = number(node, "alpha", 1.0) == 1 and number(node, "beta", 1.0) == 1
        return plain and not integer(node, "transA", 0)
    return node.op_type == "MatMul" and len(tensor.shape or ()) == 2


def groups_of(node: ir.Node) -> int:
    return integer(node, "group", 1) if node.op_type == "Conv" else 1


def to_rows(node: ir.Node, weights: np.ndarray) -> np.ndarray:
    """Weights of `node` as [groups, output channels of a group, products]."""
    if node.op_type == "Conv":
        g = groups_of(node)
        return weights.reshape(g, weights.shape[0] // g, -1)
    transposed = node.op_type == "Gemm" and integer(node, "transB", 0)
    return (weights if transposed else weights.T)[None]


def from_rows(node: ir.Node, rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The inverse of `to_rows`; `like`: an array of the shape of the weights."""
    if node.op_type == "Conv":
        return rows.reshape(like.shape)
    transposed = node.op_type == "Gemm" and integer(node, "transB", 0)
    return np.ascontiguousarray(rows[0] if transposed else rows[0].T)


def products(node: ir.Node) -> int:
    """Products that one output element sums."""
    numbers = constant(weight(node))
    assert numbers is not None
    return int(to_rows(node, numbers).shape[2])


def patches(node: ir.Node, source: np.ndarray, want: int, picture: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [groups, n, products], positions int64 [n]): the inputs of `want` output positions at most.

    Positions count through batch and space of the output. They are drawn without repetition by a seed made
    of the node's name and the number of the picture.
    """
    if node.op_type != "Conv":
        flat = source.reshape(-1, source.shape[-1])
        at = _drawn(len(flat), want, node, picture)
        return np.ascontiguousarray(flat[at], np.float32)[None], at
    numbers = constant(weight(node))
    assert numbers is not None
    kernel = numbers.shape[2:]
    rank = len(kernel)
    strides = ints(node, "strides", (1,) * rank)
    dilations = ints(node, "dilations", (1,) * rank)
    pads = _pads(node, source.shape[2:], kernel, strides, dilations)
    padded = np.pad(source, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    spatial = tuple(range(2, 2 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, spatial)
    steps: list[Any] = [slice(None, None, s) for s in (1, 1, *strides, *dilations)]
    windows = windows[tuple(steps)]
    batch, channels, *places = windows.shape[: 2 + rank]
    at = _drawn(batch * int(np.prod(places)), want, node, picture)
    first, *rest = np.unravel_index(at, (batch, *places))
    taken = windows[(first, slice(None), *rest)]  # [n, channels, *kernel]
    g = groups_of(node)
    rows = taken.reshape(len(at), g, channels // g * int(np.prod(kernel)))
    return np.ascontiguousarray(rows.transpose(1, 0, 2), np.float32), at


def outputs_at(node: ir.Node, result: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What `node` computed at the positions of `patches`: [groups, n, output channels of a group]."""
    if node.op_type == "Conv":
        rows = np.moveaxis(result, 1, -1).reshape(-1, result.shape[1])[at]
    else:
        rows = result.reshape(-1, result.shape[-1])[at]
    g = groups_of(node)
    return np.ascontiguousarray(rows.reshape(len(at), g, -1).transpose(1, 0, 2))


def _drawn(total: int, want: int, node: ir.Node, picture: int) -> np.ndarray:
    if total <= want:
        return np.arange(total)
    seed = np.random.default_rng((zlib.crc32(node_id(node).encode()), picture))
    return np.sort(seed.choice(total, want, replace=False))


def _pads(
    node: ir.Node,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, ...]:
    attribute = node.attributes.get("auto_pad")
    auto = "NOTSET" if attribute is None else attribute.as_string()
    if auto == "NOTSET":
        return ints(node, "pads", (0,) * 2 * len(kernel))
    if auto == "VALID":
        return (0,) * 2 * len(kernel)
    begin, end = [], []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        less, more = total // 2, total - total // 2
        begin.append(less if auto == "SAME_UPPER" else more)
        end.append(more if auto == "SAME_UPPER" else less)
    return (*begin, *end)


@dataclass
class Moments:
    """Sums over the patches x of a node, and with them over y, what the node should compute there."""

    groups: int
    length: int
    count: int = 0
    square: np.ndarray = field(init=False)
    """Sum of x x^T, [groups, products, products]."""
    mean: np.ndarray = field(init=False)
    """Sum of x, float64 [groups, products]."""
    cross: np.ndarray | None = None
    """Sum of y x^T, [groups, output channels of a group, products]."""
    target: np.ndarray | None = None
    """Sum of y, float64 [groups, output channels of a group]."""

    def __post_init__(self) -> None:
        kind = np.float64 if self.length <= WIDE else np.float32
        self.square = np.zeros((self.groups, self.length, self.length), kind)
        self.mean = np.zeros((self.groups, self.length))

    def add(self, x: np.ndarray, y: np.ndarray | None = None) -> None:
        """x: float32 [groups, n, products]; y: float32 [groups, n, output channels of a group]."""
        for square, rows in zip(self.square, x, strict=True):
            for start in range(0, self.length, WIDE):  # a product at a time, not a second matrix
                part = slice(start, start + WIDE)
                square[part] += rows[:, part].T @ rows
        self.mean += x.sum(axis=1, dtype=np.float64)
        self.count += x.shape[1]
        if y is None:
            return
        found = y.transpose(0, 2, 1) @ x
        total = y.sum(axis=1, dtype=np.float64)
        self.cross = found.astype(self.square.dtype) if self.cross is None else self.cross + found
        self.target = total if self.target is None else self.target + total


def add_bias(graph: ir.Graph, node: ir.Node, shift: np.ndarray) -> np.ndarray:
    """`shift` (float64 [output channels]) on top of the bias of `node`, in an initialiser of its own (others
    may share the old one). Returns the new bias, float32."""
    old = constant(bias(node))
    base = np.zeros(shift.shape) if old is None else np.broadcast_to(old.reshape(-1), shift.shape)
    numbers: np.ndarray = (base + shift).astype(np.float32)
    value = new_weight(graph, f"{node_id(node)}.bias", numbers)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)
    drop_unused(graph)
    return numbers


def drop_unused(graph: ir.Graph) -> None:
    """Remove initialisers that nothing reads any more."""
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
