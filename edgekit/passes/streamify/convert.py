"""Builds the one-frame graph from a clip model's, operator by operator. See `edgekit.passes.streamify`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.errors import ModelError
from edgekit.passes.graph import constant, integer, ints, new_weight, shape
from edgekit.passes.streamify.rules import (
    ELEMENTWISE,
    WINDOWED,
    Bound,
    Refuse,
    reduced_axes,
    result_axis,
)
from edgekit.passes.streamify.trace import NEVER, Delays, Origin, data_inputs, delays, is_move, trace
from edgekit.schema import printable
from edgekit.spec import DType, StateSpec

LISTED = 8
"""Operators named in one message."""


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


class Converter:
    """One conversion: reads the clip model, writes `graph`, `states`, `shifts`."""

    def __init__(self, model: ir.Model, axis: int, frames: int, bidirectional: bool, step: float | None):
        self.model, self.frames = model, frames
        self.bidirectional, self.step = bidirectional, step
        self.version = model.graph.opset_imports.get("", 19)
        self.states: list[StateSpec] = []
        self.shifts: list[Shift] = []
        self.outputs: dict[str, int | None] = {}
        self.refused: list[str] = []
        self.both_ways: list[Shift] = []
        self.bound: dict[ir.Value, Bound] = {}
        self.moved: set[ir.Value] = set()
        self.broken: set[ir.Value] = set()
        self.unmade: dict[ir.Value, Refuse] = {}
        self.next: list[ir.Value] = []
        self.copied: dict[ir.Value, ir.Value] = {}
        self.taken = {str(v.name) for node in model.graph for v in node.outputs} | set(
            model.graph.initializers
        )
        self.taken |= {str(v.name) for v in model.graph.outputs}
        clip = model.graph.inputs[0]
        sizes = _sizes(clip)
        frame = (*sizes[:axis], 1, *sizes[axis + 1 :])
        picture = frame if len(sizes) != 5 else (1, *(s for i, s in enumerate(frame) if i not in (0, axis)))
        name = self._name("image" if len(picture) == 4 else str(clip.name))
        image = ir.Value(name=name, shape=ir.Shape(picture), type=clip.type)
        self.graph = ir.Graph(
            [image], [], nodes=[], opset_imports=dict(model.graph.opset_imports), name="one_frame"
        )
        self.bound[clip] = Bound(self._reshape(image, picture, frame), axis, frame, frames)

    def run(self) -> ir.Model:
        """The one-frame model. Raises: ModelError, all refused operators in one line."""
        for node in self.model.graph:
            inputs = [v for v in node.inputs if v is not None]
            if any(v in self.broken for v in inputs):
                self.broken.update(node.outputs)
                continue
            timed = {i for i, v in enumerate(node.inputs) if v in self.bound or v in self.moved}
            try:
                if not timed:
                    if node.inputs and any(v.is_graph_input() for v in inputs):
                        raise Refuse("reads another input than the clip")
                    raise Refuse("computes a constant too large to be folded")
                if is_move(node) and timed <= {i for i, _ in data_inputs(node)}:
                    if any(shape(o) is None for o in node.outputs):
                        raise Refuse("has a result of open shape")
                    self.moved.update(node.outputs)
                else:
                    self._compute(node, timed)
            except Refuse as reason:
                self._refuse(node, str(reason))
        for output in self.model.graph.outputs:
            self._output(output)
        self._raise()
        self.graph.outputs.extend(self.next)
        self._drop_unread()
        return ir.Model(self.graph, ir_version=self.model.ir_version)

    # outputs ---------------------------------------------------------------------------------

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
        self.shifts = [self._renamed(s, names) for s in self.shifts if _read(s, names)]
        self.both_ways = [s for s in self.both_ways if _read(s, names)]

    def _renamed(self, shift: Shift, names: dict[str, str]) -> Shift:
        return dataclasses.replace(shift, states=tuple(names[n] for n in shift.states))

    def _output(self, output: ir.Value) -> None:
        if output in self.broken:
            return
        node = output.producer()
        try:
            if output not in self.bound and output not in self.moved:
                raise Refuse("gives an output that does not depend on the clip")
            found = self._resolve(output)
            if found.length != self.frames:
                raise Refuse("gives frames after the end of the clip")
        except Refuse as reason:
            assert node is not None, "an output that is an input is bound"
            self._refuse(node, str(reason))
            return
        name = str(output.name)
        self.outputs[name] = found.axis
        made = self._node("Identity", [found.value], [found.sizes], names=[name])[0]
        made.type = output.type
        self.graph.outputs.append(made)

    # computing operators -----------------------------------------------------------------------

    def _compute(self, node: ir.Node, timed: set[int]) -> None:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise Refuse("holds a graph of its own")
        if node.op_type in WINDOWED and 0 in timed and self._window(node):
            return
        if node.op_type == "GlobalAveragePool" and 0 in timed and node.inputs[0] is not None:
            source = self._resolve(node.inputs[0])
            if source.axis is not None and source.axis >= 2:
                self._mean(node, source, _sizes(node.outputs[0]), range(2, len(source.sizes)))
                return
        bound = {i: self._resolve(v) for i in sorted(timed) if (v := node.inputs[i]) is not None}
        axis = result_axis(node, bound, self.version)
        lengths = {b.length for b in bound.values()}
        if len(lengths) != 1:
            raise Refuse("combines tensors of different numbers of frames")
        length = lengths.pop()
        if length != self.frames and node.op_type not in ELEMENTWISE:
            raise Refuse("reads frames after the end of the clip")
        sizes = []
        for output in node.outputs:
            full = shape(output)
            if full is None:
                raise Refuse("has a result of open shape")
            if axis is not None:
                if full[axis] != length:
                    raise Refuse(f"changes the number of frames from {length} to {full[axis]}")
                full = (*full[:axis], 1, *full[axis + 1 :])
            sizes.append(full)
        if axis is None and any(not b.mean for b in bound.values()):
            self._mean(node, bound[0], sizes[0], reduced_axes(node, len(bound[0].sizes)))
            return
        inputs = [bound[i].value if i in bound else self._constant(v) for i, v in enumerate(node.inputs)]
        if node.op_type == "Resize" and len(inputs) > 3 and inputs[3] is not None:
            wanted = constant(node.inputs[3])
            assert wanted is not None, "checked in result_axis by the static shape"
            partial = "axes" in node.attributes
            target = wanted if partial else np.array([1, *wanted[1:]])
            inputs[3] = self._weight("sizes", target)
        for output, made, size in zip(node.outputs, self._copy(node, inputs, sizes), sizes, strict=True):
            self.bound[output] = Bound(made, axis, size, length)

    def _mean(self, node: ir.Node, source: Bound, sizes: tuple[int, ...], axes: Iterable[int]) -> None:
        """The mean over time is taken over the frames' outputs; what is left of it is over other axes."""
        if source.length != self.frames:
            raise Refuse("reads frames after the end of the clip")
        rest = [a for a in axes if a != source.axis]
        value = source.value
        if rest:
            kept = tuple(1 if a in rest else s for a, s in enumerate(source.sizes))
            keep = ir.AttrInt64("keepdims", 1)
            if self.version < 18:
                value = self._node("ReduceMean", [value], [kept], [ir.AttrInt64s("axes", rest), keep])[0]
            else:
                over = self._weight("mean_axes", rest)
                value = self._node("ReduceMean", [value, over], [kept], [keep])[0]
            source = Bound(value, source.axis, kept, source.length)
        self.bound[node.outputs[0]] = Bound(
            self._reshape(value, source.sizes, sizes), None, sizes, self.frames
        )

    def _window(self, node: ir.Node) -> bool:
        """Operators with a window along time: the state is the frames before this one. False if there is none."""
        source = node.inputs[0]
        assert source is not None
        sizes = _sizes(source)
        rank = len(sizes)
        kernel = ints(
            node, "kernel_shape", (shape(node.inputs[1]) or ())[2:] if node.op_type == "Conv" else ()
        )
        if any(v in self.bound or v in self.moved for v in node.inputs[1:]):
            return False
        found = self._padded(source)
        if found is None:
            return False
        base, left, initial = found
        assert base.axis is not None
        axis, at = base.axis, base.axis - 2
        pads = list(ints(node, "pads", (0,) * 2 * (rank - 2)))
        auto = node.attributes.get("auto_pad")
        if auto is not None and auto.as_string() not in ("NOTSET", "VALID"):
            raise Refuse("pads by itself (auto_pad)")
        stride = ints(node, "strides", (1,) * (rank - 2))[at]
        span = (kernel[at] - 1) * ints(node, "dilations", (1,) * (rank - 2))[at]
        own, right = pads[at], pads[at + rank - 2]
        if node.op_type != "Conv" and kernel[at] == self.frames == sizes[axis] and own == right == 0:
            return self._pooled(node, base)
        if stride != 1:
            raise Refuse(f"steps {stride} frames at a time")
        if own and left:
            raise Refuse("is padded twice along time")
        if (own or right) and span and node.op_type != "Conv":
            raise Refuse("pads along time by itself")
        before = own + left
        if before < span:
            ahead = span - before
            raise Refuse(
                f"looks {ahead} frames ahead: pad it by {span} frames at the start and none at the end"
            )
        if before > span:
            raise Refuse(f"is padded by {before} frames at the start, expected {span}")
        after = list(_sizes(node.outputs[0]))
        assert after[axis] == self.frames + right
        after[axis] = 1
        value, window = base.value, list(base.sizes)
        if span:
            name, state = self._state((*window[:axis], span, *window[axis + 1 :]), initial)
            window[axis] = span + 1
            value = self._node("Concat", [state, base.value], [tuple(window)], [ir.AttrInt64("axis", axis)])[
                0
            ]
            self._keep(self._last(value, tuple(window), axis, 1, span + 1) if span > 1 else base.value)
            channels = base.sizes[1]
            self.shifts.append(Shift(str(source.name), node.op_type, channels, channels, 0, span, (name,)))
        pads[at] = pads[at + rank - 2] = 0
        inputs = [value, *(self._constant(v) for v in node.inputs[1:])]
        made = self._copy(node, inputs, [tuple(after)], {"pads": pads})[0]
        self.bound[node.outputs[0]] = Bound(made, axis, tuple(after), self.frames + right)
        return True

    def _pooled(self, node: ir.Node, base: Bound) -> bool:
        """A pool over the whole clip: its mean is taken over the frames' outputs."""
        assert base.axis is not None
        if node.op_type != "AveragePool":
            raise Refuse("runs over the frames; only a mean can be left to whoever reads the frames' outputs")
        kernel = list(ints(node, "kernel_shape", ()))
        kernel[base.axis - 2] = 1
        sizes = _sizes(node.outputs[0])
        made = self._copy(node, [base.value], [sizes], {"kernel_shape": kernel})[0]
        self.bound[node.outputs[0]] = Bound(made, None, sizes, self.frames)
        return True

    def _padded(self, value: ir.Value) -> tuple[Bound, int, float] | None:
        """(frames, how many constant frames stand before them, their value) along an axis a window runs over."""
        try:
            whole = self._resolve(value)
        except Refuse:
            if value not in self.moved:
                raise
        else:
            if whole.length != self.frames:
                raise Refuse("reads frames after the end of the clip")
            return None if whole.axis is None or whole.axis < 2 else (whole, 0, 0.0)
        for base in self._bases(value):
            origin = trace(self.model, [value, base], self._stop())
            bound = self._resolve(base)
            if bound.axis is None or bound.length != self.frames:
                continue
            for axis in range(2, len(_sizes(value))):
                moved, rest = _rows(origin.arrays[value], axis), _rows(origin.arrays[base], bound.axis)
                left = len(moved) - self.frames
                if left <= 0 or not np.array_equal(moved[left:], rest):
                    continue
                if (moved[:left] >= 0).any() or (moved[:left] != moved[0, 0]).any():
                    continue
                sizes = tuple(1 if i == axis else s for i, s in enumerate(_sizes(value)))
                made = self._reshape(bound.value, bound.sizes, sizes)
                return Bound(made, axis, sizes, self.frames), left, origin.constants[-1 - int(moved[0, 0])]
        return None

    # moved data ----------------------------------------------------------------------------------

    def _resolve(self, value: ir.Value) -> Bound:
        """What `value` is in the one-frame model, its shifts made of states. Raises: Refuse."""
        if value in self.unmade:
            raise self.unmade[value]
        if value not in self.bound:
            try:
                self.bound[value] = self._make(value)
            except Refuse as reason:
                self.unmade[value] = reason
                raise
        return self.bound[value]

    def _make(self, value: ir.Value) -> Bound:
        node = value.producer()
        assert node is not None
        roots = list(self._roots(value))
        if any(self.bound[r].mean for r in roots):
            if not all(self.bound[r].mean for r in roots):
                raise Refuse("joins frames with a mean over frames")
            self._again(node, None, mean=True)
            return self.bound[value]
        bases = [b for b in self._bases(value) if b not in self.moved or _same_count(b, value)]
        for base in bases:
            if base not in self.moved and (found := self._shifted(value, base)) is not None:
                return found
        try:
            self._again(node, self._local_axis(node, value))
            return self.bound[value]
        except Refuse:
            for base in bases:
                if base in self.moved and self._whole(base):
                    found = self._shifted(value, base)
                    if found is not None:
                        return found
        raise Refuse(_OTHERWISE)

    def _bases(self, value: ir.Value) -> list[ir.Value]:
        """What `value` may be a shifted copy of: the computed tensors it is made of, then those in between."""
        found: list[ir.Value] = []
        queue = [value]
        while queue:
            node = queue.pop(0).producer()
            assert node is not None
            for _, source in data_inputs(node):
                if constant(source) is None and source not in found:
                    found.append(source)
                    if source in self.moved:
                        queue.append(source)
        count = math.prod(_sizes(value))
        found.sort(key=lambda v: v in self.moved)
        roots = [v for v in found if v not in self.moved]
        between = [v for v in found if v in self.moved and math.prod(_sizes(v)) <= count]
        return roots + between

    def _roots(self, value: ir.Value) -> set[ir.Value]:
        return {v for v in self._bases(value) if v not in self.moved}

    def _stop(self) -> set[ir.Value]:
        return {v for v in self.bound if v not in self.moved}

    def _whole(self, value: ir.Value) -> bool:
        """Whether `value` can be had frame by frame."""
        try:
            self._resolve(value)
        except Refuse:
            return False
        return True

    def _shifted(self, value: ir.Value, base: ir.Value) -> Bound | None:
        """`value` as `base` with some of its channels from other frames, None if it is not that."""
        source, sizes = self.bound[base], _sizes(value)
        if source.axis is None or math.prod(source.sizes) * self.frames != math.prod(sizes):
            return None
        origin = trace(self.model, [value, base], self._stop())
        rows = _rows(origin.arrays[base], source.axis)
        for axis, size in enumerate(sizes):
            if size != self.frames:
                continue
            found = delays(_rows(origin.arrays[value], axis), rows, self.frames)
            if found is None:
                continue
            made = self._assemble(base, source, found, origin)
            if made is None:
                continue
            target = (*sizes[:axis], 1, *sizes[axis + 1 :])
            return Bound(self._reshape(made, source.sizes, target), axis, target, self.frames)
        return None

    def _assemble(self, base: ir.Value, source: Bound, found: Delays, origin: Origin) -> ir.Value | None:
        """Split, states in place of what is late, Concat. None where that does not go by channels."""
        if not found.late.any() and not found.code.any():
            return source.value
        late, code = found.late.reshape(source.sizes), found.code.reshape(source.sizes)
        along = None
        for axis in sorted(range(late.ndim), key=lambda a: a != 1):  # channels first
            others = tuple(i for i in range(late.ndim) if i != axis)
            flat = (
                late.max(axis=others),
                late.min(axis=others),
                code.max(axis=others),
                code.min(axis=others),
            )
            if (flat[0] == flat[1]).all() and (flat[2] == flat[3]).all():
                along = axis
                break
        if along is None:
            return None
        lates, codes = flat[0].tolist(), flat[2].tolist()
        past = sum(0 < d != NEVER for d in lates)
        future = sum(d < 0 for d in lates)
        before = len(self.states)
        runs: list[tuple[int, int, int]] = []  # (channels, late, code), neighbours alike joined
        for d, c in zip(lates, codes, strict=True):
            here = (0, 0) if d < 0 else (d, c)
            if runs and runs[-1][1:] == here:
                runs[-1] = (runs[-1][0] + 1, *here)
            else:
                runs.append((1, *here))
        pieces = [source.value]
        shapes = [(*source.sizes[:along], n, *source.sizes[along + 1 :]) for n, _, _ in runs]
        if len(runs) > 1:
            parts = self._weight("parts", [n for n, _, _ in runs])
            attributes = [ir.AttrInt64("axis", along)]
            pieces = self._node("Split", [source.value, parts], shapes, attributes)
        made = [
            self._late(piece, size, along, d, origin.constants[-1 - c] if c else 0.0)
            for piece, size, (_, d, c) in zip(pieces, shapes, runs, strict=True)
        ]
        names = tuple(s.name for s in self.states[before:])
        delay = max((abs(d) for d in lates if d != NEVER), default=0)
        shift = Shift(str(base.name), "shift", len(lates), past, future, delay, names)
        if future:
            self.both_ways.append(shift)
        self.shifts.append(shift)
        if len(made) == 1:
            return made[0]
        return self._node("Concat", made, [source.sizes], [ir.AttrInt64("axis", along)])[0]

    def _late(
        self, piece: ir.Value, sizes: tuple[int, ...], along: int, late: int, initial: float
    ) -> ir.Value:
        """`piece` as it was `late` frames ago; `initial` before the first."""
        if late == 0:
            return piece
        if late == NEVER:
            return new_weight(self.graph, self._name("always"), np.full(sizes, initial, np.float32))
        count = sizes[along]
        if late == 1:
            _, state = self._state(sizes, initial)
            self._keep(piece)
            return state
        # older frames wait in the same state, the oldest first
        wide = (*sizes[:along], count * late, *sizes[along + 1 :])
        _, state = self._state(wide, initial)
        attributes = [ir.AttrInt64("axis", along)]
        parts = self._weight("parts", [count, count * (late - 1)])
        rest = (*sizes[:along], count * (late - 1), *sizes[along + 1 :])
        oldest, newer = self._node("Split", [state, parts], [sizes, rest], attributes)
        self._keep(self._node("Concat", [newer, piece], [wide], attributes)[0])
        return oldest

    def _local_axis(self, node: ir.Node, value: ir.Value) -> int | None:
        """Axis of the frames in `value` if `node` leaves every element of its inputs in its frame."""
        sources = [v for _, v in data_inputs(node) if constant(v) is None]
        bounds = [self._resolve(v) for v in dict.fromkeys(sources)]
        if any(b.axis is None or b.length != bounds[0].length for b in bounds):
            return None
        origin = trace(self.model, [value, *dict.fromkeys(sources)], set(sources))
        moved = origin.arrays[value]
        time = np.empty(sum(math.prod(_sizes(v)) for v in origin.first), np.int32)
        for source, b in zip(dict.fromkeys(sources), bounds, strict=True):
            assert b.axis is not None
            along = np.arange(b.length, dtype=np.int32).reshape(-1, *[1] * (len(_sizes(source)) - b.axis - 1))
            start = origin.first[source]
            time[start : start + math.prod(_sizes(source))] = np.broadcast_to(along, _sizes(source)).reshape(
                -1
            )
        frame = np.where(moved >= 0, time[np.maximum(moved, 0)], -1)
        for axis, size in enumerate(moved.shape):
            if size != self.frames:
                continue
            rows, numbers = _rows(frame, axis), _rows(moved, axis)
            fixed = (rows < 0).all(axis=0)
            same = (rows == np.arange(size)[:, None]).all(axis=0) | (
                fixed & (numbers == numbers[0]).all(axis=0)
            )
            if same.all() and not fixed.all():
                return axis
        return None

    def _again(self, node: ir.Node, axis: int | None, mean: bool = False) -> None:
        """A copy of a moving operator; the shapes it was told say one frame. mean: its input is a mean over time."""
        data = dict(data_inputs(node))
        sizes = [_sizes(o) for o in node.outputs]
        axes = [None if mean else self._local_axis(node, o) for o in node.outputs]
        if not mean:
            if axis is None or None in axes or node.op_type in _SCATTERED:
                raise Refuse(_OTHERWISE)
            sizes = [
                tuple(1 if i == a else s for i, s in enumerate(z)) for z, a in zip(sizes, axes, strict=True)
            ]
        inputs: list[ir.Value | None] = []
        length = self.frames
        for i, value in enumerate(node.inputs):
            values = constant(value)
            if value is None or (values is not None and (i not in data or mean)):
                inputs.append(self._constant(value))
            elif values is None:
                source = self._resolve(value)
                length = source.length
                along = integer(node, "axis", 0) if node.op_type == "Gather" and not mean else None
                if along is not None and source.axis == along % len(source.sizes):
                    raise Refuse(_OTHERWISE)
                inputs.append(source.value)
            elif (
                node.op_type == "Concat" and axis is not None
            ):  # the same in every frame: _local_axis saw to it
                inputs.append(new_weight(self.graph, self._name("always"), values.take([0], axis)))
            else:
                inputs.append(self._constant(value))
        if node.op_type in _RESHAPES and inputs[0] is not None:
            before = _sizes(inputs[0])
            made = [self._reshape(inputs[0], before, sizes[0])]
        else:
            if node.op_type == "Expand":
                inputs[1] = self._weight("shape", sizes[0])
            made = self._copy(node, inputs, sizes)
        for output, new, size, a in zip(node.outputs, made, sizes, axes, strict=True):
            self.bound[output] = Bound(new, a, size, length)

    # writing ---------------------------------------------------------------------------------------

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

    def _last(self, value: ir.Value, sizes: tuple[int, ...], axis: int, start: int, end: int) -> ir.Value:
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

    # refusing --------------------------------------------------------------------------------------

    def _refuse(self, node: ir.Node, reason: str) -> None:
        name = printable(str(node.outputs[0].name))
        self.refused.append(f"{node.op_type} '{name}' {reason}")
        self.broken.update(node.outputs)

    def _raise(self) -> None:
        if self.refused:
            more = f" and {len(self.refused) - LISTED} more" if len(self.refused) > LISTED else ""
            raise ModelError(
                f"model: cannot be made a one-frame model: {'; '.join(self.refused[:LISTED])}{more}. "
                "Export the network with temporal shifts, causal convolutions and a mean over time only."
            )
        if self.both_ways and not self.bidirectional:
            s = self.both_ways[0]
            raise ModelError(
                f"model: {len(self.both_ways)} shifts are bi-directional ('{printable(s.value)}': {s.future} of {s.channels} "
                f"channels from the future, {s.past} from the past), expected the past alone: a one-frame model would take "
                "the fold from the future from the present frame, which the network was not trained for. Train it with the "
                "uni-directional shift, or give allow_bidirectional and measure the drop."
            )


_RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_SCATTERED = {"ScatterND", "ScatterElements", "GatherND", "GatherElements", "Where"}
_OTHERWISE = "moves data between frames in another way than a shift in time with a constant edge"


def _read(shift: Shift, names: dict[str, str]) -> bool:
    """Whether its states are in the finished graph; one without any looked ahead only."""
    return all(n in names for n in shift.states)


def _same_count(a: ir.Value, b: ir.Value) -> bool:
    return math.prod(_sizes(a)) == math.prod(_sizes(b))


def _rows(values: np.ndarray, axis: int) -> np.ndarray:
    """[frames, places]"""
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _sizes(value: ir.Value) -> tuple[int, ...]:
    sizes = shape(value)
    if sizes is None:
        raise Refuse("has an input of open shape")
    return sizes
