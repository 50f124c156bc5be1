"""One thread's buffers on a loaded plan."""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType, TracebackType

import numpy as np

from edgekit.backends.base import Executable
from edgekit.errors import StreamError, UsageError, did_you_mean
from edgekit.host import usable_cores
from edgekit.input_codes import input_codes
from edgekit.manifest import Manifest
from edgekit.runtime.crew import Crew
from edgekit.runtime.plan import Copies, Job, Layout, Part, beside, lay_out, units
from edgekit.runtime.state import held_as, initial_value
from edgekit.spec import QuantParams, StateSpec

_ALL = slice(None)


class Session:
    """Preallocated, named I/O of one thread. Write `inputs`, `run()`, read `outputs`.

    The arrays stay the same for the life of the session and are overwritten by the next run. A
    session keeps what it runs on alive: on a CPU it may outlive its engine; on a GPU closing the
    engine ends it, and a run then raises StreamError.

    It owns the recurrent state of its plan, which is in neither of them: what a run writes to a state's
    output is what the next run reads. `states` are the values that the next run reads, by name.
    A run that fails leaves the state as it was.

    Steps of the plan that do not wait for each other run at the same time, on a few threads of the session's own
    that sleep between runs, and so do slices of a repeated step where its library can; results are the same bits.
    `overlap = False` runs them one after the other.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    buffers: Mapping[str, np.ndarray]
    """Every tensor of the plan where its producer writes it, inputs and outputs included; states that take turns are
    not among them (`states`)."""

    def __init__(self, manifest: Manifest, executables: Mapping[str, Executable]) -> None:
        """Buffers for every step of the plan; `executables` by step name. States are at their initial values.

        Raises: StreamError when a device has no memory left for them.
        """
        self.executables: Mapping[str, Executable] = MappingProxyType(dict(executables))
        layout = self._layout = Layout()
        self._crew: Crew | None = None
        try:
            lay_out(manifest, executables, layout)
        except BaseException:
            self.close()
            raise
        buffers, turned = layout.buffers, layout.turned
        away = {name for s in manifest.states if s.input in turned for name in (s.input, s.output)}
        self.inputs = {name: buffers[name] for name in manifest.inputs}
        self.outputs = {name: buffers[name] for name in manifest.outputs}
        self.buffers = MappingProxyType({name: a for name, a in buffers.items() if name not in away})
        self.codes: Mapping[str, QuantParams] = input_quants(manifest, executables, self.inputs)
        """Inputs that take codes, as the payload in use wants them, where the manifest has real numbers: by name their
        parameters. `write` makes codes; pipelines write them straight from the camera's bytes."""

        self._returns: Copies = tuple(
            (buffers[s.input], buffers[s.output]) for s in manifest.states if s.input not in turned
        )
        self.bytes_copied_per_run = layout.copied + sum(target.nbytes for target, _ in self._returns)
        """Copies between the steps of the plan, and from a run to the next, made by the CPU."""
        self.state_specs: tuple[StateSpec, ...] = tuple(held_as(s, buffers[s.input]) for s in manifest.states)
        """The states as this session holds them: a payload may hold one as codes that another holds as reals."""
        self._initial = {spec.name: initial_value(spec) for spec in self.state_specs}
        self._states: tuple[Mapping[str, np.ndarray], ...] = tuple(
            {s.name: arrays[s.input] for s in manifest.states} for arrays in (buffers, {**buffers, **turned})
        )
        self._views = tuple(
            MappingProxyType({name: _read_only(array) for name, array in arrays.items()})
            for arrays in self._states
        )
        # states that stay on a device
        self._pulls, self._pushes = (
            tuple(
                tuple(getattr(pair[turn], move) for pair in layout.pairs if hasattr(pair[turn], move))
                for turn in (0, 1)
            )
            for move in ("pull", "push")
        )
        self._jobs: tuple[Job, ...] = tuple(layout.jobs)
        self._numbers = {job.name: i for i, job in enumerate(self._jobs)}
        self._times: dict[str, tuple[int, int]] = {}
        helpers = min(max(beside(manifest)), max(2, usable_cores())) - 1
        self.overlap = helpers > 0
        """Whether steps may run at the same time; never so where the plan has none that could."""
        if self.overlap:
            self._units, after = units(self._jobs)
            # slices fill the time that whole steps, which cannot be shared out, leave on the cores
            slices = [place for place, (_, part) in enumerate(self._units) if part is not None]
            self._crew = Crew(after, helpers, slices)
            weakref.finalize(self, self._crew.close)  # for sessions that nobody closes
        self._turn = 0
        self.lanes: int = manifest.lanes
        """Streams that one run takes (slots)."""
        first = self._jobs[0]
        if manifest.states:
            try:
                self.reset()
            except BaseException:
                self.close()
                raise
        elif len(self._jobs) == len(first.parts) == 1 and first.when is None and not layout.copied:
            self.run = first.parts[0].runs[0]  # type: ignore[assignment,method-assign]  # no hop for the common case

    def write(self, name: str, values: np.ndarray) -> None:
        """Real numbers into an input, whatever the payload in use takes: where that is codes, they are made here (`codes`)."""
        fill(self.inputs[name], values, self.codes.get(name))

    @property
    def step_ns(self) -> Mapping[str, tuple[int, int]]:
        """By step: when it began and ended in the last run (time.perf_counter_ns). Empty for a plan of one step, where
        it would cost more than it says."""
        return MappingProxyType(self._times)

    def run(self, done: Collection[str] = ()) -> None:
        """Run the whole plan once.

        done: steps whose outputs are in `buffers` already; these are not run. What `when` switches off of them is set to
        zeros all the same, so that the rest sees what a whole run would give.
        Raises: StreamError when an engine fails or the session is closed; UsageError for an unknown step.
        """
        if not self._jobs:
            raise StreamError("session: closed. Make another with engine.session()")
        skip = {self._number(name) for name in done} if done else ()
        self._times = {}  # whoever holds those of an earlier run keeps them
        if self._crew is not None and self.overlap:
            self._side_by_side(self._crew, skip)
        else:
            for number, job in enumerate(self._jobs):
                self._times[job.name] = self._do(number, None, number in skip)
        for target, source in self._returns:
            np.copyto(target, source)
        self._turn ^= 1

    def slots(self, step: str) -> int:
        """How many slots `run_slot` takes of a step: its slices, one of a step that is not repeated; 0 where it takes none.

        Those are unknown steps, such that read what another one writes, and all of a plan with state.
        """
        job = next((job for job in self._jobs if job.name == step), None)
        return 0 if job is None or job.after or self.state_specs else len(job.parts)

    def run_slot(self, step: str, slot: int) -> None:
        """Run one slice of a repeated step now (slot 0 of another is all of it), in this thread, from the plan's inputs as
        they are; its outputs are in that slice of `buffers`. What `when` says does not matter.

        Raises: StreamError as `run`; UsageError for an unknown step, or a slot that is none of its `slots`.
        """
        if not self._jobs:
            raise StreamError("session: closed. Make another with engine.session()")
        job = self._jobs[self._number(step)]
        if not 0 <= slot < self.slots(step):
            raise UsageError(
                f"run_slot: step {step!r}, slot {slot}: expected a step that reads inputs of the plan only, and one of "
                f"its {len(job.parts)} slots"
            )
        _run(job.parts[slot], self._turn)

    def _number(self, step: str) -> int:
        if step not in self._numbers:
            raise UsageError(
                f"step {step!r}: not in this plan. {did_you_mean(str(step)[:80], self._numbers)}"
            )
        return self._numbers[step]

    def _side_by_side(self, crew: Crew, skip: Collection[int]) -> None:
        times = [(0, 0)] * len(self._units)

        def work(place: int) -> None:
            number, part = self._units[place]
            times[place] = self._do(number, part, number in skip)

        crew.run(work)
        for (number, _), (begin, end) in zip(self._units, times, strict=True):
            name = self._jobs[number].name
            first, last = self._times.get(name, (begin, end))
            self._times[name] = min(first, begin), max(last, end)

    def _do(self, number: int, one: int | None, done: bool) -> tuple[int, int]:
        """A step, all of it or one part: what its `when` does not switch off. Returns when it began and ended."""
        job, turn = self._jobs[number], self._turn
        begin = time.perf_counter_ns()
        for i in range(len(job.parts)) if one is None else (one,):
            if job.when is not None and not job.when[i].any():
                for array in job.parts[i].outputs:
                    array.fill(0)
            elif not done:
                _run(job.parts[i], turn)
        return begin, time.perf_counter_ns()

    @property
    def states(self) -> Mapping[str, np.ndarray]:
        """State by name, as the next run reads it: read-only views, good until the next run.

        Raises: StreamError where state is on a device, and this fails or the session is closed.
        """
        for pull in self._pulls[self._turn]:
            pull()
        return self._views[self._turn]

    def reset(self) -> None:
        """Every state to its initial value, as in a new session. Raises: StreamError as `states`."""
        self._write(self._initial)

    def _write(self, values: Mapping[str, np.ndarray]) -> None:
        for name, array in self._states[self._turn].items():
            np.copyto(array, values[name])
        for push in self._pushes[self._turn]:
            push()

    def write_rows(self, rows: Sequence[tuple[slice, Mapping[str, np.ndarray]]]) -> None:
        """Write some rows of every state along its first axis and leave the others: (which, value by state name).

        Nothing is checked. Raises: StreamError as `states`.
        """
        if any(part != _ALL for part, _ in rows):
            for pull in self._pulls[self._turn]:
                pull()
        for part, values in rows:
            for name, array in self._states[self._turn].items():
                np.copyto(array[part], values[name])
        for push in self._pushes[self._turn]:
            push()

    def snapshot(self) -> dict[str, np.ndarray]:
        """Copies of all states, by name: what `restore` takes. Raises: StreamError as `states`."""
        return {name: np.array(array, order="C") for name, array in self.states.items()}

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go on from a snapshot of this bundle and payload; `state.carry_over` fits those of another.

        Raises: UsageError, and nothing is changed, unless it has exactly these states, shapes and types;
        StreamError as `states`.
        """
        check_snapshot(snapshot, self._states[self._turn])
        self._write(snapshot)

    def close(self) -> None:
        """Free what the session holds on its device; its arrays stay readable. Closing twice is fine."""
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()
        self._layout.close()
        self._jobs = ()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def input_quants(
    manifest: Manifest, executables: Mapping[str, Executable], inputs: Mapping[str, np.ndarray]
) -> dict[str, QuantParams]:
    """Of the plan's inputs, those that a step takes as codes where the manifest says real numbers."""
    return {
        spec.name: spec.quant
        for executable in executables.values()
        for spec in executable.inputs
        if spec.quant is not None
        and spec.name in inputs
        and inputs[spec.name].dtype != manifest.tensor(spec.name).dtype.value
    }


def fill(array: np.ndarray, values: np.ndarray, quant: QuantParams | None) -> None:
    """Real numbers into an input; `quant`: into one that takes codes."""
    np.copyto(array, values if quant is None else input_codes(np.asarray(values), quant))


def check_snapshot(snapshot: Mapping[str, np.ndarray], states: Mapping[str, np.ndarray]) -> None:
    """Raises: UsageError unless `snapshot` has exactly these `states`, of their shapes and types."""
    for name in snapshot:
        if name not in states:
            raise UsageError(
                f"snapshot: state {str(name)[:80]!r} is not one of this network, "
                f"expected {', '.join(states) or 'none'}. Take it with session.snapshot()"
            )
    for name, array in states.items():
        if name not in snapshot:
            raise UsageError(f"snapshot: state {name!r} is missing. Take it with session.snapshot()")
        value = np.asarray(snapshot[name])
        if (value.dtype, value.shape) != (array.dtype, array.shape):
            raise UsageError(
                f"snapshot: state {name!r}: expected {array.dtype} {array.shape}, got {value.dtype} "
                f"{value.shape}. A snapshot of another payload goes through state.carry_over()"
            )


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _run(part: Part, turn: int) -> None:
    for target, source in part.before:
        np.copyto(target, source)
    part.runs[turn]()
    for target, source in part.after:
        np.copyto(target, source)
