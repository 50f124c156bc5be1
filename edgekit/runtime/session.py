"""One thread's buffers on a loaded plan."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import numpy as np

from edgekit.backends.base import Binding, Executable
from edgekit.errors import StreamError
from edgekit.manifest import Manifest


class Session:
    """Preallocated, named I/O of one thread. Write `inputs`, `run()`, read `outputs`.

    The arrays stay the same for the life of the session and are overwritten by the next run. A
    session keeps what it runs on alive: on a CPU it may outlive its engine; on a GPU closing the
    engine ends it, and a run then raises StreamError.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __init__(self, manifest: Manifest, executables: Mapping[str, Executable]) -> None:
        """Buffers for every step of the plan; `executables` by step name.

        Raises: StreamError when a device has no memory left for them.
        """
        self._bindings: list[Binding] = []
        try:
            for step in manifest.plan:
                self._bindings.append(executables[step.name].bind())
        except BaseException:
            self.close()
            raise
        inputs: dict[str, np.ndarray] = {}
        produced: dict[str, np.ndarray] = {}
        copies: list[tuple[tuple[np.ndarray, np.ndarray], ...]] = []
        for step, binding in zip(manifest.plan, self._bindings, strict=True):
            moves = []
            for name in step.inputs:
                source = produced.get(name, inputs.get(name))
                if source is None:  # an input of the plan, read for the first time: the user writes here
                    inputs[name] = binding.inputs[name]
                else:
                    moves.append((binding.inputs[name], source))
            copies.append(tuple(moves))
            produced.update({name: binding.outputs[name] for name in step.outputs})
        self.inputs = {name: inputs[name] for name in manifest.inputs}
        self.outputs = {name: produced[name] for name in manifest.outputs}
        self.bytes_copied_per_run = sum(target.nbytes for moves in copies for target, _ in moves)
        """Copies between the steps of the plan, made by the CPU."""
        self._steps = tuple(zip([binding.run for binding in self._bindings], copies, strict=True))
        if len(self._steps) == 1 and not copies[0]:
            self.run = self._bindings[0].run  # type: ignore[method-assign]  # no hop for the common case

    def run(self) -> None:
        """Run the whole plan once. Raises: StreamError when an engine fails or the session is closed."""
        if not self._steps:
            raise StreamError("session: closed. Make another with engine.session()")
        for run, moves in self._steps:
            for target, source in moves:
                np.copyto(target, source)
            run()

    def close(self) -> None:
        """Free what the session holds on its device; its arrays stay readable. Closing twice is fine."""
        for binding in self._bindings:
            binding.close()
        self._bindings = []
        self._steps = ()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
