"""A plan laid out in memory: who runs what, in whose arrays, and what has to be copied between.

Where a step can work in arrays that it is given (`backends.base.Fitting`), it gets those of its neighbours, and
nothing is copied. Pure bookkeeping; `session` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.backends.base import TO_LAST, Binding, Executable, zeros
from edgekit.manifest import KernelStep, Manifest, Segment
from edgekit.runtime.state import private_states

Copies = tuple[tuple[np.ndarray, np.ndarray], ...]
"""(target, source), in order."""


@dataclass(frozen=True)
class Part:
    """One run of a step: all of it, or a slice of a repeated one. `runs`: for odd and for even runs of the plan."""

    before: Copies
    runs: tuple[Callable[[], None], Callable[[], None]]
    after: Copies
    outputs: tuple[np.ndarray, ...]
    """What is set to zeros where it is skipped."""


@dataclass(frozen=True)
class Job:
    """A step, ready to run. `when`: one array per part, of which all zeros mean that the part is skipped."""

    name: str
    parts: tuple[Part, ...]
    when: tuple[np.ndarray, ...] | None
    after: tuple[int, ...]
    """Jobs whose results it reads."""
    split: bool = False
    """Its parts have working memory of their own each: they may run at the same time."""


@dataclass
class Layout:
    """jobs: in the order of the plan. buffers: of every tensor, where its producer (of an input: the user) writes it.
    turned: inputs that the even runs read elsewhere. pairs: bindings of the steps that are not repeated, for odd and for
    even runs; bindings: all there are."""

    jobs: list[Job] = field(default_factory=list)
    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    turned: dict[str, np.ndarray] = field(default_factory=dict)
    pairs: list[tuple[Binding, Binding]] = field(default_factory=list)
    bindings: list[Binding] = field(default_factory=list)

    @property
    def copied(self) -> int:
        """Bytes that a run copies between steps."""
        parts = (part for job in self.jobs for part in job.parts)
        return sum(target.nbytes for part in parts for target, _ in (*part.before, *part.after))

    def close(self) -> None:
        for binding in self.bindings:
            binding.close()
        self.jobs, self.pairs, self.bindings = [], [], []


def repeats(step: Segment | KernelStep) -> int:
    return step.repeat if isinstance(step, Segment) else 1


def dependencies(manifest: Manifest) -> list[tuple[int, ...]]:
    """By step: the steps whose results it reads, by number."""
    producer = {name: i for i, step in enumerate(manifest.plan) for name in step.outputs}
    return [
        tuple(sorted({producer[name] for name in step.inputs if name in producer})) for step in manifest.plan
    ]


def beside(manifest: Manifest, light: Sequence[str] = ()) -> list[int]:
    """By step: how many steps, it included, may be running at a time while it does.

    light: kernels that do not count, as they take hardly any time. An estimate from the plan alone: of what neither
    leads to a step nor follows from it, the most that lie at one depth.
    """
    after = dependencies(manifest)
    before: list[int] = []  # by step, as bits: all that it waits for
    depth: list[int] = []
    for i in range(len(after)):
        bits, deep = 0, 0
        for j in after[i]:
            bits |= before[j] | 1 << j
            deep = max(deep, depth[j] + 1)
        before.append(bits)
        depth.append(deep)
    heavy = [not (isinstance(step, KernelStep) and step.kernel in light) for step in manifest.plan]
    found = []
    for i in range(len(after)):
        levels: dict[int, int] = {}
        for j in range(len(after)):
            if heavy[j] and j != i and not before[i] >> j & 1 and not before[j] >> i & 1:
                levels[depth[j]] = levels.get(depth[j], 0) + 1
        found.append(1 + max(levels.values(), default=0))
    return found


Unit = tuple[int, int | None]
"""What is run in one go: a job by its number, all of it, or one part."""


def units(jobs: Sequence[Job]) -> tuple[list[Unit], list[list[int]]]:
    """The units of a run in the order of the plan, and by unit those whose results it reads, by place."""
    found: list[Unit] = []
    after: list[list[int]] = []
    places: list[list[int]] = []  # by job
    for number, job in enumerate(jobs):
        mine: list[int | None] = list(range(len(job.parts))) if job.split else [None]
        places.append(list(range(len(found), len(found) + len(mine))))
        found += [(number, part) for part in mine]
        after += [[place for other in job.after for place in places[other]] for _ in mine]
    return found, after


def lay_out(manifest: Manifest, executables: Mapping[str, Executable], layout: Layout) -> None:
    """Bind every step and fill `layout`, which the caller closes, also when this raises.

    `executables` by step name. Raises: StreamError when a device has no memory left.
    """
    fixed = _bind_fixed(manifest, executables, layout)
    turnable = {name for each in executables.values() for name in getattr(each, "turnable", ())}
    _choose(manifest, fixed, turnable, layout.buffers)
    for step, after in zip(manifest.plan, dependencies(manifest), strict=True):
        make = _slices if repeats(step) > 1 else _whole
        parts = make(step, executables[step.name], fixed.get(step.name), layout)
        when = None
        if step.when is not None:
            array = _given(manifest, step.when, layout.buffers)
            when = tuple(array[i : i + 1] for i in range(len(parts))) if len(parts) > 1 else (array,)
        split = len(parts) > 1 and bool(getattr(executables[step.name], "reentrant", False))
        layout.jobs.append(Job(step.name, parts, when, after, split))
    for name in manifest.inputs:
        _given(manifest, name, layout.buffers)


Pair = tuple[Binding, Binding]


def _bind_fixed(manifest: Manifest, executables: Mapping[str, Executable], layout: Layout) -> dict[str, Pair]:
    """The bindings of steps that bring their own arrays. A step whose states take turns does, too."""
    found: dict[str, Pair] = {}
    for step in manifest.plan:
        executable = executables[step.name]
        states = {state.input: state.output for state in private_states(manifest, step)}
        if states and hasattr(executable, "bind_turns"):
            first, second = executable.bind_turns(states)
            layout.bindings += (first, second)
            for name in states:
                if second.inputs[name] is not first.inputs[name]:
                    layout.turned[name] = second.inputs[name]
            found[step.name] = first, second
        elif not hasattr(executable, "bind_to"):
            binding = executable.bind()
            layout.bindings.append(binding)
            found[step.name] = binding, binding
    return found


def _choose(
    manifest: Manifest, fixed: Mapping[str, Pair], turnable: Collection[str], buffers: dict[str, np.ndarray]
) -> None:
    """Tensors live where a step that brings its own arrays writes them, else where one reads them: its neighbours
    can work there, if they lie as anybody would expect, or as their producer can turn them."""
    own = [(step, fixed[step.name][0]) for step in manifest.plan if step.name in fixed and repeats(step) == 1]
    for step, binding in own:
        buffers.update({name: binding.outputs[name] for name in step.outputs})
    for step, binding in own:
        for name in step.inputs:
            array = binding.inputs[name]
            turned = name in turnable and array.ndim == 4 and array.transpose(TO_LAST).flags.c_contiguous
            if name not in buffers and (turned or array.flags.c_contiguous):
                buffers[name] = array


def _given(manifest: Manifest, name: str, buffers: dict[str, np.ndarray]) -> np.ndarray:
    """The array of an input that no step may have brought one for."""
    if name not in buffers:
        spec = manifest.tensor(name)
        buffers[name] = zeros(spec.shape, spec.dtype.value)
    return buffers[name]


def _whole(
    step: Segment | KernelStep, executable: Any, pair: Pair | None, layout: Layout
) -> tuple[Part, ...]:
    buffers = layout.buffers
    if pair is None:
        names = (*step.inputs, *step.outputs)
        binding = executable.bind_to({name: buffers[name] for name in names if name in buffers})
        layout.bindings.append(binding)
        pair = binding, binding
    layout.pairs.append(pair)
    for names, arrays in ((step.inputs, pair[0].inputs), (step.outputs, pair[0].outputs)):
        for name in names:
            buffers.setdefault(name, arrays[name])
    return (_part(step, pair, buffers),)


def _slices(
    step: Segment | KernelStep, executable: Any, pair: Pair | None, layout: Layout
) -> tuple[Part, ...]:
    """A binding per slice where the executable works in given arrays, which share its working memory unless it is
    reentrant; else one for all."""
    buffers, n, names = layout.buffers, repeats(step), (*step.inputs, *step.outputs)
    missing = [name for name in names if name not in buffers]
    if missing:
        like = pair[0] if pair else executable.bind_to({})
        for name in missing:
            plain = pair is not None and name in step.outputs  # is copied anyway: as what reads it wants it
            array = like.outputs[name] if name in step.outputs else like.inputs[name]
            buffers[name] = _stacked(array, n, plain)
        if not pair:
            like.close()
    parts: list[Part] = []
    first: Binding | None = None
    for i in range(n):
        slices = {name: buffers[name][i : i + 1] for name in names}
        if pair is None:
            binding = executable.bind_to(slices, None if getattr(executable, "reentrant", False) else first)
            layout.bindings.append(binding)
            first = first or binding
            parts.append(_part(step, (binding, binding), slices))
        else:
            parts.append(_part(step, pair, slices))
    return tuple(parts)


def _stacked(array: np.ndarray, n: int, plain: bool) -> np.ndarray:
    """Memory for n of these along the first axis, whose other axes lie in the same order; `plain`: C-contiguous."""
    axes = [0, *range(1, array.ndim)]
    if not plain and not array.flags.c_contiguous:
        axes[1:] = sorted(axes[1:], key=lambda axis: -array.strides[axis])
    memory = zeros([n, *(array.shape[axis] for axis in axes[1:])], array.dtype.name)
    return memory.transpose([axes.index(axis) for axis in range(array.ndim)])


def _part(step: Segment | KernelStep, pair: Pair, arrays: Mapping[str, np.ndarray]) -> Part:
    binding = pair[0]
    return Part(
        before=tuple(
            (binding.inputs[name], arrays[name])
            for name in step.inputs
            if binding.inputs[name] is not arrays[name]
        ),
        runs=(pair[0].run, pair[1].run),
        after=tuple(
            (arrays[name], binding.outputs[name])
            for name in step.outputs
            if binding.outputs[name] is not arrays[name]
        ),
        outputs=tuple(arrays[name] for name in step.outputs),
    )
