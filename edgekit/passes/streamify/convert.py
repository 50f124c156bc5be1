"""Builds the one-frame graph from a clip model's, operator by operator. See `edgekit.passes.streamify`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from edgekit.errors import ModelError
from edgekit.passes.graph import constant, ints, shape
from edgekit.passes.streamify.moved import Mover, rows
from edgekit.passes.streamify.rules import ELEMENTWISE, WINDOWED, Bound, Refuse, reduced_axes, result_axis
from edgekit.passes.streamify.trace import data_inputs, is_move, trace
from edgekit.passes.streamify.writer import Shift
from edgekit.passes.streamify.writer import sizes as _sizes
from edgekit.schema import printable

LISTED = 8
"""Operators named in one message."""


class Converter(Mover):
    """One conversion: reads the clip model, writes `graph`, `states`, `shifts`."""

    def __init__(self, model: ir.Model, axis: int, frames: int, bidirectional: bool, step: float | None):
        super().__init__(model, axis, frames, step)
        self.bidirectional = bidirectional
        self.version = model.graph.opset_imports.get("", 19)
        self.outputs: dict[str, int | None] = {}
        self.refused: list[str] = []
        self.broken: set[ir.Value] = set()

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
        self._judge()
        return ir.Model(self.graph, ir_version=self.model.ir_version)

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
            self._keep(self._cut(value, tuple(window), axis, 1, span + 1) if span > 1 else base.value)
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
                moved, rest = rows(origin.arrays[value], axis), rows(origin.arrays[base], bound.axis)
                left = len(moved) - self.frames
                if left <= 0 or not np.array_equal(moved[left:], rest):
                    continue
                if (moved[:left] >= 0).any() or (moved[:left] != moved[0, 0]).any():
                    continue
                sizes = tuple(1 if i == axis else s for i, s in enumerate(_sizes(value)))
                made = self._reshape(bound.value, bound.sizes, sizes)
                return Bound(made, axis, sizes, self.frames), left, origin.constants[-1 - int(moved[0, 0])]
        return None

    @property
    def both_ways(self) -> list[Shift]:
        """Shifts that took channels from the future."""
        return [s for s in self.shifts if s.future]

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

    def _judge(self) -> None:
        if self.both_ways and not self.bidirectional:
            s = self.both_ways[0]
            raise ModelError(
                f"model: {len(self.both_ways)} shifts are bi-directional ('{printable(s.value)}': {s.future} of {s.channels} "
                f"channels from the future, {s.past} from the past), expected the past alone: a one-frame model would take "
                "the fold from the future from the present frame, which the network was not trained for. Train it with the "
                "uni-directional shift, or give allow_bidirectional and measure the drop."
            )
