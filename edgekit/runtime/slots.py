"""Many streams on one session: each has its own recurrent state, all share the buffers.

A network built for a batch (passes.lanes) takes as many streams a run as it has lanes; any other, one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from edgekit.errors import UsageError
from edgekit.runtime.session import Session, check_snapshot, fill
from edgekit.spec import StateSpec

Arrays = Mapping[str, np.ndarray]
Key = TypeVar("Key", bound=Hashable)


class Streams:
    """The states of many streams, of which a few are in the session at a time. For one thread, as a session.

    A stream begins with its first step (or `restore`, or `stream`) and ends with `drop`; what it
    computes does not depend on the others. `inputs` and `outputs` are those of one stream, in the
    session's memory: the next step, of whichever stream, overwrites them. codes: as of the session.

    lanes: streams that one run takes: the leading size that every input, output and state has in common, else 1.
    A stream's state stays in its lane, and nothing is copied, while it is stepped again and again beside
    others that are too; `bytes_per_switch` are copied when one takes another's place. `bytes_moved`: all of it so far.
    """

    def __init__(self, session: Session) -> None:
        """Takes over `session`, which is closed with it."""
        self._session = session
        session.reset()
        states = session.states
        self.lanes = session.lanes
        self._rows = [slice(i, i + 1) for i in range(self.lanes)] if self.lanes > 1 else [slice(None)]
        self._inputs: Sequence[Arrays] = [_part(session.inputs, rows) for rows in self._rows]
        self._outputs: Sequence[Arrays] = [_part(session.outputs, rows) for rows in self._rows]
        self.inputs: Arrays = self._inputs[0]
        self.outputs: Arrays = self._outputs[0]
        self.codes = session.codes
        self._initial = {
            name: np.array(array, order="C") for name, array in _part(states, self._rows[0]).items()
        }
        self.state_specs: tuple[StateSpec, ...] = tuple(
            replace(spec, shape=self._initial[spec.name].shape) for spec in session.state_specs
        )
        """The states of one stream."""
        self._state_bytes = sum(array.nbytes for array in self._initial.values())
        self.bytes_per_switch = 2 * self._state_bytes
        self.bytes_moved = 0
        self._slots: dict[Hashable, dict[str, np.ndarray]] = {}
        self._lane_of: dict[
            Hashable, int
        ] = {}  # streams whose state is in the session: their slot is out of date

    def step(self, key: Hashable, inputs: Arrays | None = None) -> Arrays:
        """Run once for the stream `key` alone. inputs: copied to `inputs`; None = already written there.

        Returns `outputs`, which the next step overwrites. When it fails, the stream's state stays as it was.
        Raises: UsageError for inputs that are not the network's; StreamError as Session.run.
        """
        if inputs is not None:
            self._check("step", inputs)
        self._place({key: 0})
        if inputs is not None:
            self._fill(0, inputs)
        self._session.run()
        return self.outputs

    def step_many(self, inputs: Mapping[Key, Arrays | None]) -> dict[Key, Arrays]:
        """One step of every stream in `inputs`, `lanes` of them a run; lanes that are left over compute in vain.

        inputs: by stream, each as for `step`; None = written where `seat` said, which needs all in one run.
        Returns the outputs by stream, good until the next step. When a run fails, its streams and those of
        the runs that were to follow keep their states, and no outputs are returned.
        Raises: UsageError, before anything runs, for inputs that are not the network's; StreamError as Session.run.
        """
        for key, arrays in inputs.items():
            if arrays is not None:
                self._check(f"step_many: stream {key!r}", arrays)
            elif key not in self._lane_of or len(inputs) > self.lanes:
                raise UsageError(f"step_many: stream {key!r}: nothing was written for it. Call seat() first")
        order = sorted(inputs, key=lambda key: key not in self._lane_of)  # who is there need not leave
        results: dict[Key, Arrays] = {}
        for start in range(0, len(order), self.lanes):
            members = order[start : start + self.lanes]
            lanes = self._free_lanes(members)
            self._place(lanes)
            for key, lane in lanes.items():
                self._fill(lane, inputs[key] or {})
            self._session.run()
            last = start + self.lanes >= len(order)
            for key, lane in lanes.items():
                found = self._outputs[lane]
                results[key] = found if last else {name: array.copy() for name, array in found.items()}
        return {key: results[key] for key in inputs}

    def seat(self, keys: Iterable[Key]) -> dict[Key, Arrays]:
        """Bring up to `lanes` streams into the session: where to write the inputs of each, for the
        `step_many(dict.fromkeys(keys))` that comes next. Saves a copy of every input.

        Raises: UsageError for more streams than lanes.
        """
        members = list(dict.fromkeys(keys))
        if len(members) > self.lanes:
            raise UsageError(f"seat: {len(members)} streams, expected at most {self.lanes} (lanes)")
        lanes = self._free_lanes(members)
        self._place(lanes)
        return {key: self._inputs[lane] for key, lane in lanes.items()}

    def _check(self, what: str, inputs: Arrays) -> None:
        if inputs.keys() != self.inputs.keys():
            raise UsageError(f"{what}: expected inputs {sorted(self.inputs)}, got {sorted(map(str, inputs))}")
        for name, array in inputs.items():
            want, got = self.inputs[name], np.asarray(array)
            real = name in self.codes and got.dtype == np.float32  # made codes of
            if (want.dtype, want.shape) != (want.dtype if real else got.dtype, got.shape):
                raise UsageError(
                    f"{what}: input {name}: expected {want.dtype} {want.shape}, got {got.dtype} {got.shape}"
                )

    def _fill(self, lane: int, inputs: Arrays) -> None:
        for name, array in inputs.items():
            place, given = self._inputs[lane][name], np.asarray(array)
            fill(place, given, None if given.dtype == place.dtype else self.codes.get(name))

    def stream(self, key: Hashable) -> StreamSlot:
        """The stream `key` as something with `inputs`, `outputs` and `run()`, as pipelines want it."""
        return StreamSlot(self, key)

    def reset(self, key: Hashable) -> None:
        """The stream's state to its initial values. Raises: UsageError for an unknown stream."""
        self._known(key)
        self._write(key, self._initial)

    def drop(self, key: Hashable) -> None:
        """Forget the stream. Raises: UsageError for an unknown one."""
        self._known(key)
        del self._slots[key]
        self._lane_of.pop(key, None)

    def snapshot(self, key: Hashable) -> dict[str, np.ndarray]:
        """Copies of the stream's states, by name. Raises: UsageError for an unknown stream."""
        self._known(key)
        lane = self._lane_of.get(key)
        held = self._slots[key] if lane is None else _part(self._session.states, self._rows[lane])
        return {name: np.array(array, order="C") for name, array in held.items()}

    def restore(self, key: Hashable, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go on from a snapshot, of this stream, another one or a session; the stream begins if it is new.

        Raises: UsageError as Session.restore.
        """
        check_snapshot(snapshot, self._initial)
        self._slot(key)
        self._write(key, snapshot)

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(tuple(self._slots))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._slots

    def close(self) -> None:
        """Close the session. Closing twice is fine."""
        self._session.close()

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _known(self, key: Hashable) -> None:
        if key not in self._slots:
            raise UsageError(f"stream {key!r}: unknown. It begins with its first step")

    def _slot(self, key: Hashable) -> dict[str, np.ndarray]:
        if key not in self._slots:
            self._slots[key] = {name: array.copy() for name, array in self._initial.items()}
        return self._slots[key]

    def _write(self, key: Hashable, values: Mapping[str, np.ndarray]) -> None:
        lane = self._lane_of.get(key)
        if lane is not None:
            self._session.write_rows([(self._rows[lane], values)])
            return
        for name, array in self._slots[key].items():
            np.copyto(array, values[name])

    def _free_lanes(self, members: Sequence[Key]) -> dict[Key, int]:
        """A lane for each; who has one keeps it."""
        taken = {self._lane_of[key] for key in members if key in self._lane_of}
        free = iter([lane for lane in range(self.lanes) if lane not in taken])
        return {key: self._lane_of[key] if key in self._lane_of else next(free) for key in members}

    def _place(self, wanted: Mapping[Any, int]) -> None:
        """Bring the states of these streams into these lanes. All others leave: the run writes every lane.

        Where it fails, no state is lost.
        """
        leaving = [key for key, lane in self._lane_of.items() if wanted.get(key) != lane]
        if leaving:
            states = self._session.states
            for key in leaving:
                rows = self._rows[self._lane_of[key]]
                for name, array in self._slots[key].items():
                    np.copyto(array, states[name][rows])
            for key in leaving:
                del self._lane_of[key]
        entering = [key for key in wanted if key not in self._lane_of]
        if entering:
            self._session.write_rows([(self._rows[wanted[key]], self._slot(key)) for key in entering])
            self._lane_of.update({key: wanted[key] for key in entering})
        self.bytes_moved += self._state_bytes * (len(leaving) + len(entering))


class StreamSlot:
    """One of many streams, run like a session. Closing it is the `Streams`' affair, unless it is the `owner`."""

    def __init__(self, streams: Streams, key: Hashable, *, owner: bool = False) -> None:
        streams._slot(key)  # it has begun: it may be reset before its first step
        self._streams = streams
        self._owner = owner
        self.key = key
        self.inputs = streams.inputs
        self.outputs = streams.outputs
        self.codes = streams.codes
        self.state_specs = streams.state_specs

    def run(self) -> None:
        """One step of this stream on what is in `inputs`. Raises: StreamError as Session.run."""
        self._streams.step(self.key)

    def reset(self) -> None:
        """The stream's state to its initial values."""
        self._streams.reset(self.key)

    def snapshot(self) -> dict[str, np.ndarray]:
        """Copies of the stream's states, by name."""
        return self._streams.snapshot(self.key)

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go on from a snapshot. Raises: UsageError as Session.restore."""
        self._streams.restore(self.key, snapshot)

    def close(self) -> None:
        """Close the `Streams` if they are nobody else's."""
        if self._owner:
            self._streams.close()


def _part(arrays: Arrays, rows: slice) -> Arrays:
    return arrays if rows == slice(None) else {name: array[rows] for name, array in arrays.items()}
