"""What moves channels, or nothing at all: joined and split pictures, shuffles, reshapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.backends.lowering import Unsupported
from edgekit.backends.native import pointwise
from edgekit.backends.native.emitter import Emitter, full_shape, picture, picture_of
from edgekit.backends.native.format import Dtype, OpType
from edgekit.backends.native.plan import MOVES, PARTS, SHUFFLE, Unit, concat_axis, deferred
from edgekit.passes.graph import constant, integer, ints
from edgekit.quant.annotate import quant


def first(unit: Unit) -> ir.Value:
    value = unit.node.inputs[0]
    assert value is not None
    return value


def concat(e: Emitter, unit: Unit) -> None:
    """Channels of one picture, which most of its inputs have been written to already."""
    values = [v for v in unit.node.inputs if v is not None]
    if concat_axis(unit) != 1:
        raise Unsupported("Concat of other than channels")
    if any(constant(v) is not None for v in values):
        raise Unsupported("Concat with a constant")
    if unit.apart:
        e.apart[unit.out] = tuple(values)
        return
    params = quant(unit.out) if unit.integer else None
    dtype = Dtype.f32 if params is None else Dtype.u8
    whole = e.put(unit.out, params)
    offset = 0
    for value in values:
        count = picture_of(value)[3]
        if not e.is_there(value):
            tensor = e.as_real(value) if params is None else e.as_codes(value)
            buffer, start, pitch = e.home(unit.out, dtype)
            if not e.same_place(tensor, (buffer, start + offset, pitch)):
                e.move(tensor, e.channels(whole, offset, count), str(value.name))
        offset += count


def part(e: Emitter, unit: Unit) -> None:
    """Slice and Split of channels: a view where they lie together, else a gather. Gather of channels."""
    x = first(unit)
    for value, which in taken(unit.node):
        if not value.uses() and not value.is_graph_output():
            continue
        if x in e.shuffled:
            source, channels = e.shuffled[x]
            _gathered(e, source, value, [channels[i] for i in which])
        elif isinstance(which, range) and which.step == 1:
            _seen(e, x, value, which)
        else:
            _gathered(e, x, value, which)


def taken(node: ir.Node) -> list[tuple[ir.Value, Sequence[int]]]:
    """What a Slice, Split or Gather makes: (value, its channels in what the node reads). Raises: Unsupported."""
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    sizes = full_shape(x)
    if node.op_type == "Slice":
        return [(out, _sliced(node, sizes))]
    if integer(node, "axis", 0) % len(sizes) != 1:
        raise Unsupported(f"{node.op_type} of other than channels")
    if node.op_type == "Gather":
        which = constant(node.inputs[1])
        if which is None or which.ndim != 1:
            raise Unsupported("Gather of other than channels")
        return [(out, [int(i) % sizes[1] for i in which])]
    found: list[tuple[ir.Value, Sequence[int]]] = []
    start = 0
    for value in node.outputs:
        count = full_shape(value)[1]
        found.append((value, range(start, start + count)))
        start += count
    return found


def _sliced(node: ir.Node, sizes: tuple[int, ...]) -> range:
    """The channels that a Slice takes, of whole pictures."""
    given = [constant(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] is not None else None for i in range(1, 5)]  # fmt: skip
    starts, ends, axes, steps = given
    if starts is None or ends is None:
        raise Unsupported("Slice with computed bounds")
    names = range(len(starts)) if axes is None else [int(a) % len(sizes) for a in axes]
    strides = np.ones(len(starts), np.int64) if steps is None else steps
    found = range(sizes[1])
    for axis, a, b, s in zip(names, starts.tolist(), ends.tolist(), strides.tolist(), strict=True):
        taken = range(*slice(a, b, s).indices(sizes[axis]))
        if axis == 1:
            found = taken
        elif taken != range(sizes[axis]):
            raise Unsupported("Slice of other than channels")
    return found


def shuffle(e: Emitter, unit: Unit) -> None:
    """Channels in another order."""
    if deferred(unit):
        e.shuffled[unit.out] = first(unit), unit.channels
    else:
        _gathered(e, first(unit), unit.out, unit.channels)


def _gathered(e: Emitter, x: ir.Value, out: ir.Value, which: Sequence[int]) -> None:
    before, params = quant(x), quant(out)
    if before is None or params is None:
        params = None
    tensor = e.as_real(x) if params is None else e.as_codes(x)
    constants: list[np.ndarray | None] = [np.asarray(which, np.int32)]
    if params is not None and before is not None and before != params:
        constants.append(pointwise.table(before, (), params))
    e.op(OpType.gather, [tensor], e.put(out, params), str(out.name), constants=constants)


def _seen(e: Emitter, x: ir.Value, out: ir.Value, which: range) -> None:
    params = quant(out) if quant(out) is not None and quant(x) is not None else None
    tensor = e.as_codes(x) if params is not None else e.as_real(x)
    held = e.codes if params is not None else e.reals
    view = e.channels(tensor, which.start, len(which))
    if params is not None and quant(x) != params:
        e.move(view, e.put(out, params), str(out.name))
        return
    held[out] = view


def move(e: Emitter, unit: Unit) -> None:
    """Reshape and its like: nothing moves, or nothing that the engine could do."""
    x, out = first(unit), unit.out
    before, after = full_shape(x), full_shape(out)
    op = unit.node.op_type
    readers = [user for user, _ in out.uses()]
    flattens = len(after) == 2 and len(before) == 4 and before[0] == after[0] and op != "Transpose"
    if (
        flattens
        and readers
        and not out.is_graph_output()
        and all(r.op_type in ("Gemm", "MatMul") and r.inputs[0] is out for r in readers)
    ):
        e.flat[out] = x
        for held in (e.codes, e.reals):
            if x in held:
                held[out] = held[x]
        return
    if len(after) > 4 or len(before) > 4:
        raise Unsupported(f"{list(before)} as {list(after)}")
    places = np.arange(np.prod(before)).reshape(before)
    result = places.transpose(_perm(unit.node, len(before))) if op == "Transpose" else places
    if not np.array_equal(_as_it_lies(places), _as_it_lies(result.reshape(after))):
        raise Unsupported(f"{list(before)} as {list(after)} would move numbers")
    for held in (e.codes, e.reals):
        if x in held:
            sizes = picture(after)
            tensor = held[x]
            if sizes[3] != e.made.tensors[tensor].shape[3]:
                tensor = e.dense(tensor, str(out.name))
            held[out] = e.seen_as(tensor, sizes)
    if quant(out) is not None and quant(x) != quant(out):
        source = e.codes.pop(out, None)
        if source is not None:
            e.move(source, e.put(out, quant(out)), str(out.name))


def _perm(node: ir.Node, rank: int) -> tuple[int, ...]:
    return ints(node, "perm", tuple(reversed(range(rank))))


def _as_it_lies(places: np.ndarray) -> np.ndarray:
    if places.ndim in (3, 4):
        places = np.moveaxis(places, 1, -1)
    return places.reshape(-1)


HANDLERS: dict[str, Callable[[Emitter, Unit], None]] = {
    "Concat": concat,
    **dict.fromkeys(PARTS, part),
    SHUFFLE: shuffle,
    **dict.fromkeys(MOVES, move),
}
