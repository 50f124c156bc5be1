"""A model of one picture becomes one of a batch: B lanes side by side, each of which computes what the model does.

    image [1, 3, H, W], state_i [1, C, h, w] -> logits [1, K]    one stream a run
    image [B, 3, H, W], state_i [B, C, h, w] -> logits [B, K]    B streams a run (runtime.slots.Streams.step_many)

The axis of size 1 that the inputs begin with is followed through the graph (rules of passes.streamify: what
keeps frames apart keeps lanes apart), and everything that states its size is written anew: targets of Reshape
and Resize, constants that are joined to a lane. An operator in which lanes would meet is refused by name.
Names, the pairs of states (passes.states) and quantization parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.errors import ModelError, UsageError
from edgekit.passes import PassError, fold_constants, probe
from edgekit.passes.graph import constant, infer, integer, ints, listed, new_weight, shape
from edgekit.passes.streamify.rules import Bound, Refuse, given_axes, result_axis
from edgekit.schema import printable
from edgekit.spec import MAX_LANES

TOLERANCE = 1e-5
"""Largest difference of an output, a lane against the model alone, as a fraction of its range (at least 1)."""

LISTED = 8
"""Operators named in one message."""

_END = 2**31 - 1
"""Slices that end here or later go to the end."""


def lanes(model: ir.Model, count: int) -> ir.Model:
    """`model` with `count` lanes: every input and output [1, ...] becomes [count, ...]. `model` stays as it is.

    Raises: ModelError: inputs or outputs that do not begin with an axis of size 1, operators in which lanes
    would meet (all in one line); PassError when a lane of the result computes something else; UsageError.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_LANES:
        raise UsageError(f"lanes {count!r}: expected a whole number from 1 to {MAX_LANES}")
    made = model.clone()
    if count == 1:
        return made
    fold_constants.run(made)  # shapes that the graph computes of its input become constants
    _Widener(made, count).run()
    _check(model, made, count)
    return made


class _Widener:
    """Changes `model` in place. `bound`: the values that lie in lanes, and along which axis."""

    def __init__(self, model: ir.Model, count: int) -> None:
        self.model, self.graph, self.count = model, model.graph, count
        self.version = model.graph.opset_imports.get("", 19)
        self.bound: dict[ir.Value, Bound] = {}
        self.refused: list[str] = []
        self.broken: set[ir.Value] = set()
        self.changes: list[Callable[[], object]] = []
        """Made when nothing was refused: until then all shapes are those of one lane."""

    def run(self) -> None:
        """Raises: ModelError, all refused operators in one line."""
        for value in self.graph.inputs:
            sizes = shape(value)
            if sizes is None or not sizes or sizes[0] != 1:
                raise ModelError(
                    f"model: input {listed([value])}: expected a leading axis of size 1, one for each "
                    "lane of a batch. Export it with batch 1."
                )
            self.bound[value] = Bound(value, 0, sizes, 1)
        for node in list(self.graph):
            if any(v in self.broken for v in node.inputs if v is not None):
                self.broken.update(node.outputs)
                continue
            bound = {i: self.bound[v] for i, v in enumerate(node.inputs) if v is not None and v in self.bound}
            if not bound:
                continue
            try:
                self._node(node, bound)
            except Refuse as reason:
                self._refuse(node, str(reason).replace("frame", "lane"))
        for output in self.graph.outputs:
            self._output(output)
        if self.refused:
            more = f" and {len(self.refused) - LISTED} more" if len(self.refused) > LISTED else ""
            raise ModelError(
                f"model: cannot be made a batch of {self.count} lanes: "
                f"{'; '.join(self.refused[:LISTED])}{more}. Build it without a batch."
            )
        for change in self.changes:
            change()
        for value in (*self.graph.inputs, *self.graph.outputs):
            value.shape = ir.Shape((self.count, *(shape(value) or ())[1:]))
        infer(self.model)

    def _output(self, output: ir.Value) -> None:
        if output in self.broken:
            return
        found = self.bound.get(output)
        node = output.producer()
        if found is not None and found.axis == 0:
            return
        name = printable(str(output.name))
        where = "" if node is None else f"{node.op_type} "
        problem = (
            "does not depend on an input"
            if found is None
            else f"{list(found.sizes)} does not begin with the batch, expected [1, ...]"
        )
        self.refused.append(f"{where}'{name}', an output, {problem}")

    def _refuse(self, node: ir.Node, reason: str) -> None:
        self.refused.append(f"{node.op_type} '{printable(str(node.outputs[0].name))}' {reason}")
        self.broken.update(node.outputs)

    def _node(self, node: ir.Node, bound: Mapping[int, Bound]) -> None:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise Refuse("holds a graph of its own")
        move = _MOVES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        axis = move(self, node, bound) if move is not None else result_axis(node, bound, self.version)
        if axis is None:
            raise Refuse("takes a mean over the lanes")
        for output in node.outputs:
            sizes = shape(output)
            if sizes is None:
                raise Refuse("has a result of open shape")
            if sizes[axis] != 1:
                raise Refuse(f"makes {sizes[axis]} of one lane")
            self.bound[output] = Bound(output, axis, sizes, 1)
        if node.op_type == "Resize" and len(node.inputs) > 3 and node.inputs[3] is not None:
            axes = ints(node, "axes", range(len(shape(node.outputs[0]) or ())))
            if axis in axes:
                sizes = shape(node.outputs[0]) or ()
                self._constant_later(node, 3, [self.count if a == axis else sizes[a] for a in axes])

    def _constant_later(self, node: ir.Node, place: int, numbers: Sequence[int]) -> None:
        def change() -> None:
            node.replace_input_with(place, new_weight(self.graph, "lane_sizes", np.array(numbers, np.int64)))

        self.changes.append(change)

    # --- operators that move data: the axis of the lanes in their result ---

    def _same(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        return _only(bound)[0]

    def _reshape(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, before = _only(bound)
        after = shape(node.outputs[0])
        if after is None:
            raise Refuse("has a result of open shape")
        ahead = int(np.prod(before[:axis], dtype=np.int64))
        # B goes where the axis of size 1 is: there has to be one with as many elements before it
        fitting = [
            i for i, s in enumerate(after) if s == 1 and int(np.prod(after[:i], dtype=np.int64)) == ahead
        ]
        if not fitting:
            raise Refuse(f"puts the lane of {list(before)} together with other axes, in {list(after)}")
        found = axis if axis in fitting else fitting[0]
        if node.op_type == "Reshape":
            self._constant_later(node, 1, [self.count if i == found else s for i, s in enumerate(after)])
        elif node.op_type == "Flatten" and not (
            found == axis == 0 and integer(node, "axis", 1) % (len(before) + 1)
        ):
            raise Refuse("puts the lane together with other axes")
        return found

    def _squeeze(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, sizes = _only(bound)
        axes = given_axes(node, len(sizes))
        if not axes or axis in axes:
            raise Refuse("takes the axis of the lanes away")
        return axis - sum(a < axis for a in axes)

    def _unsqueeze(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, _ = _only(bound)
        rank = len(shape(node.outputs[0]) or ())
        axes = given_axes(node, rank)
        return [i for i in range(rank) if i not in axes][axis]

    def _transpose(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, sizes = _only(bound)
        return ints(node, "perm", range(len(sizes))[::-1]).index(axis)

    def _slice(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, sizes = _only(bound)
        bounds = node.inputs[1:]
        given = [constant(v) for v in bounds]
        if self.version < 10 or any(d is None and v is not None for d, v in zip(given, bounds, strict=True)):
            raise Refuse("has computed bounds")
        starts, ends, axes, steps = (
            *[None if d is None else d.reshape(-1).tolist() for d in given],
            None,
            None,
        )[:4]
        assert starts is not None and ends is not None, "ONNX asks for both"
        for i, a in enumerate(axes or range(len(starts))):
            step = 1 if steps is None else steps[i]
            if a % len(sizes) == axis and not (starts[i] == 0 and ends[i] >= _END and step == 1):
                raise Refuse("cuts along the lanes")
        return axis

    def _along(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, sizes = _only(bound)
        if integer(node, "axis", 0) % len(sizes) == axis:
            raise Refuse("cuts along the lanes")
        return axis

    def _concat(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        places = {b.axis for b in bound.values()}
        axis = places.pop()
        along = integer(node, "axis", 0) % len(shape(node.outputs[0]) or (1,))
        if places or axis is None or along == axis:
            raise Refuse("joins tensors along the lanes")
        for i, value in enumerate(node.inputs):
            data = constant(value)
            if i in bound:
                continue
            if data is None:
                raise Refuse("joins a tensor that no input makes to the lanes")
            self.changes.append(self._repeated(node, i, data, axis))
        return axis

    def _repeated(self, node: ir.Node, place: int, data: np.ndarray, axis: int) -> Callable[[], object]:
        def change() -> None:
            made = new_weight(self.graph, "lane_constant", np.repeat(data, self.count, axis))
            old = node.inputs[place]
            assert old is not None
            made.meta.update(old.meta)  # its quantization
            node.replace_input_with(place, made)

        return change

    def _pad(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, sizes = _only(bound)
        data = constant(node.inputs[1]) if len(node.inputs) > 1 else np.array(ints(node, "pads", ()))
        if data is None:
            raise Refuse("has computed pads")
        pads = data.reshape(-1).tolist()
        axes = range(len(sizes))
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            chosen = constant(node.inputs[3])
            if chosen is None:
                raise Refuse("has computed axes")
            axes = [int(a) % len(sizes) for a in chosen.reshape(-1)]  # type: ignore[assignment]
        half = len(pads) // 2
        if any(a == axis and (pads[i] or pads[half + i]) for i, a in enumerate(axes)):
            raise Refuse("pads along the lanes")
        return axis

    def _expand(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, sizes = _only(bound)
        if constant(node.inputs[1]) is None:
            raise Refuse("has a computed shape")
        return axis + len(shape(node.outputs[0]) or ()) - len(sizes)  # a target of 1 there takes any size

    def _tile(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        if constant(node.inputs[1]) is None:
            raise Refuse("has computed repeats")
        return _only(bound)[0]  # repeated lanes are seen by the size of the result

    def _gather(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, sizes = _only(bound)
        indices = constant(node.inputs[1])
        along = integer(node, "axis", 0) % len(sizes)
        if indices is None:
            raise Refuse("has computed indices")
        if along == axis:
            raise Refuse("picks along the lanes")
        return axis if axis < along else axis + indices.ndim - 1

    def _quantize(self, node: ir.Node, bound: Mapping[int, Bound]) -> int:
        axis, sizes = _only(bound)
        scale = shape(node.inputs[1])
        if scale is None or (int(np.prod(scale)) > 1 and integer(node, "axis", 1) % len(sizes) == axis):
            raise Refuse("has a scale of its own for every lane")
        return axis


_MOVES: dict[str, Callable[[_Widener, ir.Node, Mapping[int, Bound]], int]] = {
    "Identity": _Widener._same,
    "Reshape": _Widener._reshape,
    "Flatten": _Widener._reshape,
    "Squeeze": _Widener._squeeze,
    "Unsqueeze": _Widener._unsqueeze,
    "Transpose": _Widener._transpose,
    "Slice": _Widener._slice,
    "Split": _Widener._along,
    "Concat": _Widener._concat,
    "Pad": _Widener._pad,
    "Expand": _Widener._expand,
    "Tile": _Widener._tile,
    "Gather": _Widener._gather,
    "QuantizeLinear": _Widener._quantize,
    "DequantizeLinear": _Widener._quantize,
}


def _only(bound: Mapping[int, Bound]) -> tuple[int, tuple[int, ...]]:
    """(axis of the lanes, sizes) of an operator's data, which is its first input."""
    if set(bound) != {0}:
        raise Refuse("moves data by numbers that the input makes")
    axis = bound[0].axis
    assert axis is not None, "no value here is a mean"
    return axis, bound[0].sizes


def _check(model: ir.Model, made: ir.Model, count: int) -> None:
    """A valid graph, each lane of which computes what `model` does: on noise, another one in every lane."""
    import onnx.checker

    try:
        onnx.checker.check_model(ir.serde.serialize_model(made), full_check=True)
    except Exception as error:  # noqa: BLE001 - the checker raises several kinds; all mean a broken graph
        text = " ".join(str(error).split())[:200]
        raise PassError(f"pass lanes: left an invalid graph: {text}. Report it with the model.") from None
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        sizes = (count, *(shape(value) or ())[1:])
        kind = np.float32 if value.dtype is None else value.dtype.numpy()
        noise = rng.standard_normal(sizes)
        feeds[str(value.name)] = (
            noise.astype(kind) if np.dtype(kind).kind == "f" else noise.round().astype(kind)
        )
    together = probe.evaluate(made, feeds)
    for lane in range(count):
        alone = probe.evaluate(model, {name: array[lane : lane + 1] for name, array in feeds.items()})
        found = {name: array[lane : lane + 1] for name, array in together.items()}
        _, worst, name = probe.largest_difference(alone, found)
        if not worst <= TOLERANCE:
            raise PassError(
                f"pass lanes: output '{printable(name)}' of lane {lane} differs from the model's by "
                f"{worst:.2e} of its range, expected at most {TOLERANCE:.0e}. Report it with the model."
            )
