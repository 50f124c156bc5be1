"""Many streams on one session: each has its own recurrent state, all share the buffers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from types import TracebackType

import numpy as np

from edgekit.errors import UsageError
from edgekit.runtime.session import Session

_NOBODY = object()


class Streams:
    """The states of many streams, one of which is in the session at a time. For one thread, as a session.

    A stream begins with its first `step` (or `restore`, or `stream`) and ends with `drop`; what it
    computes is bit for bit what a session of its own would. `inputs` and `outputs` are the session's:
    the next step, of whichever stream, overwrites them.

    A step of another stream than the last one copies both streams' states, `bytes_per_switch` in all; steps
    of one stream in a row copy nothing.
    """

    def __init__(self, session: Session) -> None:
        """Takes over `session`, which is closed with it."""
        self._session = session
        self.inputs: Mapping[str, np.ndarray] = session.inputs
        self.outputs: Mapping[str, np.ndarray] = session.outputs
        self.bytes_per_switch = 2 * sum(array.nbytes for array in session.states.values())
        session.reset()
        self._initial = session.snapshot()
        self._slots: dict[Hashable, dict[str, np.ndarray]] = {}
        self._resident: Hashable = _NOBODY  # whose state is in the session; its slot is out of date

    def step(self, key: Hashable, inputs: Mapping[str, np.ndarray] | None = None) -> Mapping[str, np.ndarray]:
        """Run once for the stream `key`. inputs: copied to the session's; None = already written there.

        Returns `outputs`, which the next step overwrites. When it fails, the stream's state stays as it was.
        Raises: UsageError for inputs that are not the network's; StreamError as Session.run.
        """
        if inputs is not None:
            self._check(inputs)
        self._enter(key)
        if inputs is not None:
            for name, array in inputs.items():
                np.copyto(self.inputs[name], array)
        self._session.run()
        return self.outputs

    def _check(self, inputs: Mapping[str, np.ndarray]) -> None:
        if inputs.keys() != self.inputs.keys():
            raise UsageError(f"step: expected inputs {sorted(self.inputs)}, got {sorted(map(str, inputs))}")
        for name, array in inputs.items():
            want, got = self.inputs[name], np.asarray(array)
            if (want.dtype, want.shape) != (got.dtype, got.shape):
                raise UsageError(
                    f"step: input {name}: expected {want.dtype} {want.shape}, got {got.dtype} {got.shape}"
                )

    def stream(self, key: Hashable) -> StreamSlot:
        """The stream `key` as something with `inputs`, `outputs` and `run()`, as pipelines want it."""
        self._slot(key)
        return StreamSlot(self, key)

    def reset(self, key: Hashable) -> None:
        """The stream's state to its initial values. Raises: UsageError for an unknown stream."""
        self._known(key)
        self._write(key, self._initial)

    def drop(self, key: Hashable) -> None:
        """Forget the stream. Raises: UsageError for an unknown one."""
        self._known(key)
        del self._slots[key]
        if self._resident == key:
            self._resident = _NOBODY

    def snapshot(self, key: Hashable) -> dict[str, np.ndarray]:
        """Copies of the stream's states, by name. Raises: UsageError for an unknown stream."""
        self._known(key)
        if self._resident == key:
            return self._session.snapshot()
        return {name: array.copy() for name, array in self._slots[key].items()}

    def restore(self, key: Hashable, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go on from a snapshot, of this stream, another one or a session; the stream begins if it is new.

        Raises: UsageError as Session.restore.
        """
        self._park()
        self._session.restore(snapshot)  # checks everything before it changes anything
        self._slot(key)
        self._resident = key

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
        if self._resident == key:
            self._session.restore(values)
            return
        for name, array in self._slots[key].items():
            np.copyto(array, values[name])

    def _park(self) -> None:
        """Take the state that is in the session back to its stream."""
        if self._resident is not _NOBODY:
            for name, array in self._session.states.items():
                np.copyto(self._slots[self._resident][name], array)
            self._resident = _NOBODY

    def _enter(self, key: Hashable) -> None:
        """Bring the stream's state into the session."""
        slot = self._slot(key)
        if self._resident == key:
            return
        self._park()
        self._session.restore(slot)
        self._resident = key


class StreamSlot:
    """One of many streams, run like a session. Closing it is the `Streams`' affair."""

    def __init__(self, streams: Streams, key: Hashable) -> None:
        self._streams = streams
        self.key = key
        self.inputs = streams.inputs
        self.outputs = streams.outputs

    def run(self) -> None:
        """One step of this stream on what is in `inputs`. Raises: StreamError as Session.run."""
        self._streams.step(self.key)

    def reset(self) -> None:
        """The stream's state to its initial values."""
        self._streams.reset(self.key)
