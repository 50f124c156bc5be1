"""One thread's buffers on a loaded plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType

import numpy as np

from edgekit.backends.base import Binding, Executable
from edgekit.errors import StreamError, UsageError
from edgekit.manifest import Manifest
from edgekit.runtime.state import held_as, initial_value, private_states
from edgekit.spec import StateSpec

Copies = tuple[tuple[np.ndarray, np.ndarray], ...]
"""(target, source), in order."""

_ALL = slice(None)


class Session:
    """Preallocated, named I/O of one thread. Write `inputs`, `run()`, read `outputs`.

    The arrays stay the same for the life of the session and are overwritten by the next run. A
    session keeps what it runs on alive: on a CPU it may outlive its engine; on a GPU closing the
    engine ends it, and a run then raises StreamError.

    It owns the recurrent state of its plan, which is in neither of them: what a run writes to a state's
    output is what the next run reads. `states` are the values that the next run reads, by name.
    A run that fails leaves the state as it was.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __init__(self, manifest: Manifest, executables: Mapping[str, Executable]) -> None:
        """Buffers for every step of the plan; `executables` by step name. States are at their initial values.

        Raises: StreamError when a device has no memory left for them.
        """
        self._bindings: list[Binding] = []
        pairs: list[tuple[Binding, Binding]] = []  # for odd and for even runs, the same one mostly
        turned: dict[str, np.ndarray] = {}  # state input -> what the second of its pair reads
        try:
            for step in manifest.plan:
                private = private_states(manifest, step)
                pair = _bind(executables[step.name], {s.input: s.output for s in private})
                self._bindings += dict.fromkeys(pair)
                pairs.append(pair)
                for name in (s.input for s in private):
                    if pair[1].inputs[name] is not pair[0].inputs[name]:
                        turned[name] = pair[1].inputs[name]
        except BaseException:
            self.close()
            raise
        inputs: dict[str, np.ndarray] = {}
        produced: dict[str, np.ndarray] = {}
        copies: list[Copies] = []
        for step, (binding, _) in zip(manifest.plan, pairs, strict=True):
            moves = []
            for name in step.inputs:
                source = produced.get(name, inputs.get(name))
                if source is None:  # of the plan or of a state, read for the first time: it is written here
                    inputs[name] = binding.inputs[name]
                else:
                    moves.append((binding.inputs[name], source))
            copies.append(tuple(moves))
            produced.update({name: binding.outputs[name] for name in step.outputs})
        self.inputs = {name: inputs[name] for name in manifest.inputs}
        self.outputs = {name: produced[name] for name in manifest.outputs}

        self._returns: Copies = tuple(
            (inputs[s.input], produced[s.output]) for s in manifest.states if s.input not in turned
        )
        self.bytes_copied_per_run = sum(
            target.nbytes for moves in (*copies, self._returns) for target, _ in moves
        )
        """Copies between the steps of the plan, and from a run to the next, made by the CPU."""
        self.state_specs: tuple[StateSpec, ...] = tuple(held_as(s, inputs[s.input]) for s in manifest.states)
        """The states as this session holds them: a payload may hold one as codes that another holds as reals."""
        self._initial = {spec.name: initial_value(spec) for spec in self.state_specs}
        self._states: tuple[Mapping[str, np.ndarray], ...] = tuple(
            {s.name: arrays[s.input] for s in manifest.states} for arrays in (inputs, {**inputs, **turned})
        )
        self._views = tuple(
            MappingProxyType({name: _read_only(array) for name, array in arrays.items()})
            for arrays in self._states
        )
        # states that stay on a device
        self._pulls, self._pushes = (
            tuple(
                tuple(getattr(pair[turn], move) for pair in pairs if hasattr(pair[turn], move))
                for turn in (0, 1)
            )
            for move in ("pull", "push")
        )
        self._turns = tuple(
            tuple(zip([pair[turn].run for pair in pairs], copies, strict=True)) for turn in (0, 1)
        )
        self._turn = 0
        if manifest.states:
            try:
                self.reset()
            except BaseException:
                self.close()
                raise
        elif len(pairs) == 1 and not copies[0]:
            self.run = self._bindings[0].run  # type: ignore[method-assign]  # no hop for the common case

    def run(self) -> None:
        """Run the whole plan once. Raises: StreamError when an engine fails or the session is closed."""
        if not self._turns:
            raise StreamError("session: closed. Make another with engine.session()")
        for run, moves in self._turns[self._turn]:
            for target, source in moves:
                np.copyto(target, source)
            run()
        for target, source in self._returns:
            np.copyto(target, source)
        self._turn ^= 1

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
        for binding in self._bindings:
            binding.close()
        self._bindings = []
        self._turns = ()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _bind(executable: Executable, states: Mapping[str, str]) -> tuple[Binding, Binding]:
    """The bindings for odd and for even runs: two that have the buffers of states (input -> output) swapped
    where the backend can (`base.Turning`), else the same one twice."""
    bind_turns = getattr(executable, "bind_turns", None)
    if states and bind_turns is not None:
        first, second = bind_turns(states)
        return first, second
    binding = executable.bind()
    return binding, binding
