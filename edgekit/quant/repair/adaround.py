"""Adaptive rounding: each weight goes up or down so that the layer's output, not the weight, errs least.

For one output channel with weights w and rounded weights v, E[((w - v) x)^2] = (w - v)^T H (w - v) with
H = E[x x^T] over the layer's inputs. Every weight has two choices: a quadratic binary problem, which
the paper relaxes and trains; here it is descended coordinate by coordinate, for all channels at once, from
the better of rounding to nearest and rounding one weight after the other with the error so far passed
on (Frantar et al.: GPTQ, ICLR 2023). No step may raise the error, so it ends at or below nearest rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, shape
from edgekit.quant.annotate import quant
from edgekit.quant.repair import Feed, Progress, checked, chosen
from edgekit.quant.repair.layers import (
    Moments,
    add_bias,
    drop_unused,
    from_rows,
    groups_of,
    has_rows,
    outputs_at,
    patches,
    products,
    to_rows,
)
from edgekit.quant.repair.walk import Walk
from edgekit.quant.rules import bias, weight, weight_axis
from edgekit.spec import QuantParams

PAPER = (
    "Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for Post-Training "
    "Quantization, ICML 2020"
)
DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it: directions that the pictures hardly show keep near
their nearest rounding."""
RIDGE = 3.0
"""The same for `compensate`, towards the original weights. Far more: with 0.1 a ResNet8 lost on new pictures
three quarters of what rounding gains."""
STEPS = 24
"""Of conjugate gradients, for `compensate`."""
SWEEPS = 12
ROWS = (4096, 16384)
"""Least and most positions that H is measured on, in between four per product."""
BLOCK = 64
LONG = 2304
"""Longer rows start from nearest rounding: a second matrix of their size would take memory for little."""
PAIRED = 256
"""Rows up to this length also try two flips at once, which costs the square of it per channel."""


def run(
    model: ir.Model,
    float_model: ir.Model,
    feeds: Sequence[Feed],
    *,
    progress: Progress | None = None,
    nodes: Collection[str] | None = None,
    compensate: bool = False,
) -> ir.Model:
    """An annotated copy of `model` with the quantized weights of Conv, Gemm and MatMul rounded anew.

    Weights become codes * scale, so rounding them to nearest gives the same codes; the params stay. Their
    originals are those of `float_model` where it has an initialiser of the same name. A mean error that
    rounding leaves goes into the bias of a node that has one, and does not count in H. Weights of exactly 0 (pruned
    ones) stay 0. compensate: the
    target is the float network's output, E[(y - v x)^2] (the paper's asymmetric reconstruction), so weights
    also move against the error of their inputs. ConvTranspose keeps its rounding.

    Raises: CalibrationError without pictures, UsageError for an unknown node.
    """
    checked(feeds)
    result = model.clone()
    originals = {str(n): v for n, v in float_model.graph.initializers.items()}
    layers = _layers(result, originals, nodes)
    with ExitStack() as stack:
        rounded = stack.enter_context(Walk(result, feeds, quantized=True))
        exact = stack.enter_context(Walk(float_model, feeds, quantized=False)) if compensate else None
        for done, layer in enumerate(layers):
            if progress:
                progress("adaptive rounding", done, len(layers))
            _round(result.graph, layer, _measure(rounded, exact, layer), rounded)
    drop_unused(result.graph)
    if progress:
        progress("adaptive rounding", len(layers), len(layers))
    return result


@dataclass(frozen=True)
class _Layer:
    """A weight and the nodes that share it."""

    weight: ir.Value
    nodes: tuple[ir.Node, ...]
    original: np.ndarray
    params: QuantParams
    limit: int
    """Largest code."""


def _layers(model: ir.Model, originals: dict[str, ir.Value], nodes: Collection[str] | None) -> list[_Layer]:
    users: dict[ir.Value, list[ir.Node]] = {}
    for node in chosen(model, nodes):
        tensor = weight(node)
        if tensor is not None and quant(tensor) is not None and has_rows(node):
            users.setdefault(tensor, []).append(node)
    layers = []
    for tensor, readers in users.items():
        if len(readers) != len(tensor.uses()) or len({_kind(n) for n in readers}) > 1:
            continue  # something else reads it too
        numbers, params = constant(tensor), quant(tensor)
        assert numbers is not None and params is not None
        before = constant(originals.get(str(tensor.name)))
        if params.axis is not None and params.axis != weight_axis(readers[0]):
            continue
        limit = code_limit(readers[0], numbers, params)
        if before is None or before.shape != numbers.shape:
            before = numbers
        layers.append(_Layer(tensor, tuple(readers), before, params, limit))
    return layers


def _kind(node: ir.Node) -> tuple[str, int, bool]:
    return node.op_type, groups_of(node), "transB" in node.attributes


def code_limit(node: ir.Node, numbers: np.ndarray, params: QuantParams) -> int:
    """7 or 64 for weights that are codes up to that times scale already (4 bits; a target without wide sums), else 127."""
    scale = _scales(node, params, numbers)
    codes = np.rint(to_rows(node, numbers) / scale)
    on_grid = np.array_equal((codes * scale).astype(np.float32), to_rows(node, numbers))
    reach = np.abs(codes).max(initial=0) if on_grid else np.inf
    return next((limit for limit in (7, 64) if reach <= limit), 127)


def _scales(node: ir.Node, params: QuantParams, numbers: np.ndarray) -> np.ndarray:
    """float32 [groups, output channels of a group, 1]."""
    scale = np.asarray(params.scale, np.float32)
    g, outputs, _ = to_rows(node, numbers).shape
    return np.broadcast_to(scale, g * outputs).reshape(g, outputs, 1)


def _measure(rounded: Walk, exact: Walk | None, layer: _Layer) -> Moments:
    """Moments of the inputs of `layer` behind what is rounded already, with `exact` of the float outputs too."""
    first = layer.nodes[0]
    found = Moments(groups_of(first), products(first))
    rounded.advance(rounded.computed(first.outputs[0]))
    sources = [v for n in layer.nodes if (v := n.inputs[0]) is not None]
    reads = [rounded.read(v) for v in sources]
    outputs = [str(n.outputs[0].name) for n in layer.nodes]
    targets: Iterator[dict[str, np.ndarray]] = iter([{}] * rounded.pictures)
    if exact is not None and all(exact.has(str(v.name), shape(v)) for n in layer.nodes for v in n.outputs):
        exact.advance(outputs[0])
        targets = exact.values(outputs)
    total = min(max(4 * found.length, ROWS[0]), ROWS[1])
    share = -(-total // (rounded.pictures * len(layer.nodes)))
    values = rounded.values(list(dict.fromkeys(reads)))
    for picture, (seen, target) in enumerate(zip(values, targets, strict=True)):
        for node, read, output in zip(layer.nodes, reads, outputs, strict=True):
            x, at = patches(node, seen[read], share, picture)
            y = None
            if target:
                y = outputs_at(node, target[output], at)
                offset = constant(bias(node))
                if offset is not None:
                    y = y - offset.reshape(y.shape[0], 1, -1)
            found.add(x, y)
    return found


def _round(graph: ir.Graph, layer: _Layer, moments: Moments, walk: Walk) -> None:
    node = layer.nodes[0]
    w = to_rows(node, layer.original)
    scale = _scales(node, layer.params, layer.original)
    n = max(moments.count, 1)
    h, mean = moments.square, moments.mean / n
    h /= n
    centred = all(bias(r) is not None for r in layer.nodes) and len(layer.nodes) == 1
    if centred:
        for square, m in zip(h, mean.astype(h.dtype), strict=True):
            square -= np.outer(m, m)
    diagonal = np.einsum("gii->gi", h)  # a view
    level = diagonal.mean(axis=1, keepdims=True)
    target = w
    if moments.cross is not None and moments.target is not None:
        target = _target(w, h, mean, level, moments, n, centred)
    diagonal += np.where(level > 0, DAMPING * level, 1.0)
    codes = solve(target, scale, h, layer.limit)
    found = codes.astype(np.float32) * scale
    if centred:
        shift = np.einsum("gok,gk->go", w.astype(np.float64) - found, mean)
        if moments.target is not None:
            shift = moments.target / n - np.einsum("gok,gk->go", found.astype(np.float64), mean)
        walk.set_bias(walk.computed(node.outputs[0]), add_bias(graph, node, shift.reshape(-1)))
    numbers = from_rows(node, found, layer.original)
    walk.set_weight(str(layer.weight.name), numbers)
    layer.weight.const_value = ir.tensor(numbers, name=layer.weight.name)


def _target(
    w: np.ndarray, h: np.ndarray, mean: np.ndarray, level: np.ndarray, moments: Moments, n: int, centred: bool
) -> np.ndarray:
    """The real weights that compute y from the quantized inputs best, near to `w` by the ridge; zeros stay zero."""
    assert moments.cross is not None and moments.target is not None
    cross = moments.cross / n
    if centred:
        cross -= moments.target[:, :, None] / n * mean[:, None, :]
    found = np.array(w)
    for i in range(len(h)):
        ridge = RIDGE * float(level[i, 0]) or 1.0
        found[i] += _conjugate_gradients(h[i], ridge, cross[i] - w[i] @ h[i], w[i] != 0).astype(np.float32)
    return found


def _conjugate_gradients(h: np.ndarray, ridge: float, right: np.ndarray, free: np.ndarray) -> np.ndarray:
    """x [n, K] with x (h + ridge I) = right where `free`, and 0 elsewhere, every row by itself, without another matrix of
    the size of h."""
    x = np.zeros_like(right)
    rest = right * free
    way = rest.copy()
    square = (rest**2).sum(axis=1, keepdims=True)
    enough = 1e-8 * square
    for _ in range(STEPS):
        if (square <= enough).all():
            break
        through = (way @ h + ridge * way) * free
        curve = (way * through).sum(axis=1, keepdims=True)
        step = np.divide(square, curve, out=np.zeros_like(square), where=curve > 0)
        x += step * way
        rest -= step * through
        new = (rest**2).sum(axis=1, keepdims=True)
        way *= np.divide(new, square, out=np.zeros_like(square), where=square > 0)
        way += rest
        square = new
    return x


# --- the binary problem --------------------------------------------------------------------------


def solve(w: np.ndarray, scale: np.ndarray, h: np.ndarray, limit: int = 127) -> np.ndarray:
    """Codes that minimise (w - s q)^T h (w - s q) for each row, each code one of the two around w / s.

    w: float32 [g, n, K]; scale: float32 [g, n, 1]; h: positive definite [g, K, K]. Returns int8 [g, n, K] in
    [-limit, limit], never worse than rounding to nearest in this norm.
    """
    kind = h.dtype
    ratio = w.astype(kind) / scale
    low = np.clip(np.floor(ratio), -limit, limit)
    high = np.clip(np.ceil(ratio), -limit, limit)
    nearest = np.clip(np.rint(ratio), -limit, limit)
    step = scale[..., 0].astype(kind)
    start = nearest
    if h.shape[1] <= LONG:
        start = _passed_on(ratio, low, high, h)
        worse = _error(start - ratio, step, h) > _error(nearest - ratio, step, h)
        start[worse] = nearest[worse]
    return _descend(start, ratio, low, high, h).astype(np.int8)


def _error(e: np.ndarray, step: np.ndarray, h: np.ndarray) -> np.ndarray:
    """[g, n]: the error of each row, `e` in codes."""
    found: np.ndarray = ((e @ h) * e).sum(axis=2) * step**2
    return found


def _passed_on(ratio: np.ndarray, low: np.ndarray, high: np.ndarray, h: np.ndarray) -> np.ndarray:
    """One weight after the other, the largest of h's diagonal first, each rounded to the nearest of its two
    codes to what makes up best for the errors so far.

    With h = L L^T in the order of rounding reversed, |L^T (v - w)|^2 is minimised from its last row up.
    """
    result = np.empty_like(ratio)
    if h.shape[1] <= BLOCK and len(h) > 1:
        return _passed_on_grouped(ratio, low, high, h)
    for i in range(len(h)):
        order = np.argsort(np.diagonal(h[i]), kind="stable")
        factor = _cholesky(h[i][np.ix_(order, order)])
        w, a, b = (m[i][:, order] for m in (ratio, low, high))
        e = np.zeros_like(w)
        for end in range(w.shape[1], 0, -BLOCK):
            begin = max(end - BLOCK, 0)
            carried = e[:, end:] @ factor[end:, begin:end]
            for j in range(end - 1, begin - 1, -1):
                push = carried[:, j - begin] + e[:, j + 1 : end] @ factor[j + 1 : end, j]
                e[:, j] = _nearer(w[:, j] - push / factor[j, j], a[:, j], b[:, j]) - w[:, j]
        result[i][:, order] = np.rint(e + w)
    return result


def _passed_on_grouped(ratio: np.ndarray, low: np.ndarray, high: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The same for many groups with few products (depthwise), all groups at once."""
    order = np.argsort(np.einsum("gii->gi", h), axis=1, kind="stable")
    factor = _cholesky(np.take_along_axis(np.take_along_axis(h, order[:, :, None], 1), order[:, None, :], 2))
    w, a, b = (np.take_along_axis(m, order[:, None, :], 2) for m in (ratio, low, high))
    e = np.zeros_like(w)
    for j in range(w.shape[2] - 1, -1, -1):
        push = np.einsum("gnk,gk->gn", e[:, :, j + 1 :], factor[:, j + 1 :, j])
        e[:, :, j] = _nearer(w[:, :, j] - push / factor[:, j, j, None], a[:, :, j], b[:, :, j]) - w[:, :, j]
    result = np.empty_like(ratio)
    np.put_along_axis(result, np.broadcast_to(order[:, None, :], e.shape), np.rint(e + w), 2)
    return result


def _nearer(wanted: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.where(wanted - low <= high - wanted, low, high)


def _cholesky(h: np.ndarray) -> np.ndarray:
    """The lower factor of h, of h with a larger diagonal (in place) where rounding made it indefinite."""
    extra = 0.0
    diagonal = np.einsum("...ii->...i", h)  # a view
    largest = diagonal.max(axis=-1, keepdims=True)
    while True:
        try:
            return np.linalg.cholesky(h)
        except np.linalg.LinAlgError:
            extra = max(10 * extra, 1e-6)
            assert extra < 1e3, "h has no positive diagonal"
            diagonal += (extra * largest).astype(h.dtype)


def _descend(
    codes: np.ndarray, ratio: np.ndarray, low: np.ndarray, high: np.ndarray, h: np.ndarray
) -> np.ndarray:
    """Flip one weight of every row where that lowers its error, over and over, until none does; with few
    products also two weights at once."""
    state = _State(codes, low + high, codes - ratio, h)
    state.flip_all()
    if h.shape[1] <= PAIRED:
        while state.flip_pairs() and state.sweeps < SWEEPS:
            state.flip_all()
    return codes


class _State:
    """Codes on the way down. `both`: the sum of the two codes that each may have."""

    def __init__(self, codes: np.ndarray, both: np.ndarray, e: np.ndarray, h: np.ndarray) -> None:
        self.codes, self.both, self.h = codes, both, h
        self.gradient = e @ h
        self.diagonal = np.einsum("gii->gi", h)
        self.sweeps = 0
        # rounding errors of the gradient must not send a weight to and fro
        self.least = -1e-9 if h.dtype == np.float64 else -1e-5

    def flip_all(self) -> None:
        flipped = True
        while flipped and self.sweeps < SWEEPS:
            flipped = False
            self.sweeps += 1
            for j in range(self.h.shape[1]):
                d = self.both[:, :, j] - 2 * self.codes[:, :, j]
                curve = self.diagonal[:, j, None]
                change = d * (2 * self.gradient[:, :, j] + d * curve)
                g, n = np.nonzero(change < self.least * curve)
                flipped |= self._move(g, n, j)

    def flip_pairs(self) -> bool:
        """For each weight j of a row, with the best other one: whether any row gained."""
        flipped = False
        for j in range(self.h.shape[1]):
            d = self.both - 2 * self.codes
            change = d * (2 * self.gradient + d * self.diagonal[:, None])
            pair = change + change[:, :, j, None] + 2 * d[:, :, j, None] * d * self.h[:, None, j]
            pair[:, :, j] = np.inf
            partner = pair.argmin(axis=2)
            least = np.take_along_axis(pair, partner[:, :, None], 2)[:, :, 0]
            g, n = np.nonzero(least < self.least * self.diagonal[:, j, None])
            k = partner[g, n]
            flipped |= self._move(g, n, j)
            self._move(g, n, k)
        return flipped

    def _move(self, g: np.ndarray, n: np.ndarray, j: int | np.ndarray) -> bool:
        if not g.size:
            return False
        move = self.both[g, n, j] - 2 * self.codes[g, n, j]
        self.codes[g, n, j] += move
        # with one group and one j no row of h is copied
        rows = self.h[0, j] if len(self.h) == 1 and not isinstance(j, np.ndarray) else self.h[g, j]
        self.gradient[g, n] += move[:, None] * rows
        return bool(move.any())
