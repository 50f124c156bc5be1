"""Moved data in the one-frame graph: what comes from other frames is read from states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, integer, new_weight
from edgekit.passes.streamify.rules import Bound, Refuse
from edgekit.passes.streamify.trace import NEVER, Delays, Origin, data_inputs, delays, trace
from edgekit.passes.streamify.writer import Shift, Writer
from edgekit.passes.streamify.writer import sizes as _sizes
from edgekit.schema import printable

_RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_SCATTERED = {"ScatterND", "ScatterElements", "GatherND", "GatherElements", "Where"}


class Mover(Writer):
    """`bound`: clip values that the one-frame graph has; `moved`: those made of them by moving data alone."""

    def __init__(self, model: ir.Model, axis: int, frames: int, step: float | None) -> None:
        super().__init__(model, axis, step)
        self.model, self.frames = model, frames
        self.bound = {model.graph.inputs[0]: Bound(self.first, axis, self.frame, frames)}
        self.moved: set[ir.Value] = set()
        self.unmade: dict[ir.Value, Refuse] = {}
        self.made: dict[tuple[object, ...], ir.Value] = {}

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
        raise _otherwise(value)

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
        count = math.prod(sizes) // self.frames
        if source.axis is None or count > math.prod(source.sizes):
            return None
        origin = trace(self.model, [value, base], self._stop())
        numbers = rows(origin.arrays[base], source.axis)
        for axis, size in enumerate(sizes):
            if size != self.frames:
                continue
            moved, part = rows(origin.arrays[value], axis), None
            if count < math.prod(source.sizes):
                part = _part(moved, numbers, source.sizes)
                if part is None:
                    continue
            found = delays(moved, numbers if part is None else numbers[:, part.places], self.frames)
            if found is None or (part is not None and not found.late.any()):
                continue  # what is a part and no more is copied as it was written
            if part is not None:
                cut = self._cut(source.value, source.sizes, part.axis, part.start, part.end)
                source = Bound(cut, source.axis, part.sizes, source.length)
            made = self._assemble(base, source, found, origin)
            if made is None:
                return None
            target = (*sizes[:axis], 1, *sizes[axis + 1 :])
            return Bound(self._reshape(made, source.sizes, target), axis, target, self.frames)
        return None

    def _assemble(self, base: ir.Value, source: Bound, found: Delays, origin: Origin) -> ir.Value | None:
        """Split, states in place of what is late, Concat. None where that does not go by channels."""
        if not found.late.any() and not found.code.any():
            return source.value
        if source.value.dtype != ir.DataType.FLOAT:
            raise Refuse(f"needs '{printable(str(base.name))}' of other frames, which is not float32")
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
        numbers = [origin.constants[-1 - c] if c else 0.0 for c in codes]
        key = (source.value, along, *lates, *numbers)
        if key in self.made:  # written twice in the clip model: one state serves both
            return self.made[key]
        past = sum(0 < d != NEVER for d in lates)
        future = sum(d < 0 for d in lates)
        before = len(self.states)
        runs: list[tuple[int, int, float]] = []  # (channels, late, initial), neighbours alike joined
        for d, c in zip(lates, numbers, strict=True):
            here = (0, 0.0) if d < 0 else (d, c)
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
            self._late(piece, size, along, d, c)
            for piece, size, (_, d, c) in zip(pieces, shapes, runs, strict=True)
        ]
        names = tuple(s.name for s in self.states[before:])
        delay = max((abs(d) for d in lates if d != NEVER), default=0)
        shift = Shift(str(base.name), "shift", len(lates), past, future, delay, names)
        self.shifts.append(shift)
        if len(made) > 1:
            made = self._node("Concat", made, [source.sizes], [ir.AttrInt64("axis", along)])
        self.made[key] = made[0]
        return made[0]

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
            came, numbers = rows(frame, axis), rows(moved, axis)
            fixed = (came < 0).all(axis=0)
            same = (came == np.arange(size)[:, None]).all(axis=0) | (
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
                raise _otherwise(node.outputs[0])
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
                    raise _otherwise(value)
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


def _otherwise(value: ir.Value) -> Refuse:
    name = printable(str(value.name))
    return Refuse(
        f"needs '{name}', which takes from other frames in another way than a shift in time with a constant edge"
    )


@dataclass(frozen=True)
class _Part:
    """start <= place along `axis` < end, all of the other axes: `places` of a frame, and their shape."""

    axis: int
    start: int
    end: int
    places: np.ndarray
    sizes: tuple[int, ...]


def _part(moved: np.ndarray, base: np.ndarray, sizes: tuple[int, ...]) -> _Part | None:
    """The range of channels of `base` [frames, places of a frame of `sizes`] that `moved` is made of."""
    place = np.full(int(max(base.max(initial=0), moved.max(initial=0))) + 1, -1, np.int64)
    place[base[base >= 0]] = np.nonzero(base >= 0)[1]
    found = np.where(moved >= 0, place[np.maximum(moved, 0)], -1).max(axis=0)
    if not len(found) or (found < 0).any():
        return None
    whole = np.arange(math.prod(sizes)).reshape(sizes)
    for axis, where in enumerate(np.unravel_index(found, sizes)):
        start, end = int(where.min()), int(where.max()) + 1
        part = whole.take(range(start, end), axis)
        if np.array_equal(part.reshape(-1), found):
            return _Part(axis, start, end, found, part.shape)
    return None


def _same_count(a: ir.Value, b: ir.Value) -> bool:
    return math.prod(_sizes(a)) == math.prod(_sizes(b))


def rows(values: np.ndarray, axis: int) -> np.ndarray:
    """[frames, places]"""
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
