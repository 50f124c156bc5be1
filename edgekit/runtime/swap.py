"""Hot swap: another bundle takes over a running stream between two frames, with the state of the one before.

Loading, the self-test and opening the new sessions happen beside the running engine, in the caller's thread. Then
the place is handed over while no frame is in the engine, by whoever comes first: the thread that runs the
engine, before its next frame, or the one that swaps, while the engine waits. No frame is lost or runs twice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.bundle import Bundle
from edgekit.errors import UsageError, did_you_mean, printable
from edgekit.runtime.engine import Engine, load
from edgekit.runtime.frames import Hop
from edgekit.runtime.mailbox import POLL_S
from edgekit.runtime.state import carry_over
from edgekit.timebase import Policy

if TYPE_CHECKING:
    from edgekit.runtime.stream import Stream
    from edgekit.tasks import Pipeline


@dataclass(frozen=True)
class Swapped:
    """engine: its name in the stream. kept: names of the states that went on; reset: of those that start anew,
    each with the reason; states of the old bundle that the new one does not have are in neither."""

    engine: str
    kept: tuple[str, ...] = ()
    reset: Mapping[str, str] = field(default_factory=dict)


class Pipelines:
    """An engine's pipelines: one for all cameras or, where it keeps state, one each."""

    def __init__(self, engine: Engine, stepping: Policy | None = None) -> None:
        """stepping, raises: as engine.pipeline()."""
        self._open = partial(engine.pipeline, stepping=stepping)
        pipeline = self._open()
        self._spare: list[Pipeline] = [pipeline]
        self._one = not hasattr(pipeline, "reset")
        self._of: dict[str, Pipeline] = {}
        session = pipeline.session
        written = sum(array.nbytes for array in session.inputs.values())
        self.hops: tuple[Hop, ...] = (Hop("fused kernel -> engine input", "CPU", written=written),)
        between = getattr(session, "bytes_copied_per_run", 0)
        if between:
            self.hops += (Hop("between plan steps", "CPU", copied=between, written=between),)

    def of(self, camera: str) -> Pipeline:
        """The pipeline of a camera, opened for its first frame."""
        name = "" if self._one else camera
        found = self._of.get(name)
        if found is None:
            found = self._of[name] = self._spare.pop() if self._spare else self._open()
        return found

    @property
    def opened(self) -> tuple[Pipeline, ...]:
        """All that are open."""
        return (*self._of.values(), *self._spare)

    def prepare(self, like: Pipelines) -> None:
        """Open what `take_over` will need, ahead of it."""
        while not self._one and len(self._spare) < len(like._of):
            self._spare.append(self._open())

    def take_over(self, old: Pipelines) -> tuple[tuple[str, ...], dict[str, str]]:
        """State of every camera goes on here, as far as it fits: names kept, names reset with the reason.

        What a task keeps besides (a clock, a history) it takes over itself, by a method `take_over(old pipeline)`.
        """
        kept: tuple[str, ...] = ()
        reset: dict[str, str] = {}
        if self._one != old._one:  # the one goes by camera, the other does not
            specs = getattr(self.of("").session if self._one else self._spare[0].session, "state_specs", ())
            return kept, {s.name: f"state {s.name}: the task kept none per camera before" for s in specs}
        for camera in old._of:
            before, after = old._of[camera], self.of(camera)
            source: Any = before.session
            target: Any = after.session
            specs = getattr(target, "state_specs", ())
            if specs and hasattr(source, "snapshot"):
                carried = carry_over(source.snapshot(), source.state_specs, specs)
                target.restore(carried.values)
                kept, reset = carried.kept, carried.reset
            own = getattr(after, "take_over", None)
            if own is not None and type(after) is type(before):
                own(before)
        return kept, reset

    def close(self) -> None:
        """Close the sessions: a frame that comes all the same raises StreamError."""
        for pipeline in self.opened:
            close = getattr(pipeline.session, "close", None)
            if close is not None:
                close()


class _Offer:
    def __init__(self, new: Pipelines, cancelled: Callable[[], bool]) -> None:
        self.new, self.cancelled = new, cancelled
        self.claim = threading.Lock()
        """Taken once: by who makes the swap, or by who gives it up."""
        self.done = threading.Event()
        self.old: Pipelines | None = None
        self.found: tuple[tuple[str, ...], dict[str, str]] = ((), {})
        self.error: BaseException | None = None


class Holder:
    """The pipelines that a worker runs, of which a swap makes others between two frames."""

    def __init__(self, pipelines: Pipelines) -> None:
        self._pipelines = pipelines
        self._busy = threading.Lock()
        self._offer: _Offer | None = None
        self._closed = False

    @contextlib.contextmanager
    def frame(self) -> Iterator[Pipelines]:
        """The pipelines for one frame: they stay until its end."""
        with self._busy:
            self._hand_over()
            yield self._pipelines

    @property
    def current(self) -> Pipelines:
        return self._pipelines

    def exchange(
        self, new: Pipelines, cancelled: Callable[[], bool]
    ) -> tuple[Pipelines, tuple[tuple[str, ...], dict[str, str]]]:
        """Put `new` in place with the state of those before, which are returned with what `take_over` found.

        Waits for the frame in the engine, as long as not `cancelled`. One at a time.
        Raises: UsageError when cancelled or closed, what `take_over` raises; then nothing has changed.
        """
        offer = self._offer = _Offer(new, cancelled)
        while not offer.done.is_set():
            if self._busy.acquire(timeout=POLL_S):
                try:
                    self._hand_over()
                finally:
                    self._busy.release()
            elif cancelled() and offer.claim.acquire(blocking=False):
                self._offer = None
                raise _ended()
        if offer.error is not None:
            raise offer.error
        assert offer.old is not None
        return offer.old, offer.found

    def _hand_over(self) -> None:
        """Make the swap that is asked for, if there is one. With `_busy`."""
        offer = self._offer
        if offer is None or not offer.claim.acquire(blocking=False):
            return
        self._offer = None
        try:
            if self._closed or offer.cancelled():
                raise _ended()
            offer.found = offer.new.take_over(self._pipelines)
            offer.old, self._pipelines = self._pipelines, offer.new
        except BaseException as error:  # raised to who asked; the frame goes on with the old ones
            offer.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            offer.done.set()

    def close(self) -> None:
        """Close the pipelines; nothing is swapped any more."""
        with self._busy:
            self._closed = True
            self._pipelines.close()


def _ended() -> UsageError:
    return UsageError("swap: the stream has ended. Open another one with the new bundle")


def swap_engine(
    stream: Stream, bundle: str | Path | Bundle | Engine, engine: str | None, variant: str | None
) -> Swapped:
    """See Stream.swap."""
    from edgekit.runtime.rigs import wait_for

    workers = {worker.name: worker for worker in stream._workers}
    if engine is None and len(workers) > 1:
        raise UsageError(f"swap: which engine? Expected one of {', '.join(map(printable, workers))}")
    name = next(iter(workers)) if engine is None else engine
    if name not in workers:
        raise UsageError(f"swap: engine {name!r}: not in this stream. {did_you_mean(name, list(workers))}")

    def ended() -> bool:
        return stream._closed or stream._stop.is_set()

    with stream._swapping:
        if ended():
            raise _ended()
        old = stream.engines[name]
        holder = workers[name].holder
        given = isinstance(bundle, Engine)
        new = bundle if isinstance(bundle, Engine) else load(bundle, threads=stream._threads, variant=variant)
        pipelines = None
        try:
            if new.task != old.task:
                raise UsageError(
                    f"swap: bundle {new.bundle.path}: task {new.task!r}, expected {old.task!r} as before. "
                    "Open another stream for it"
                )
            pipelines = Pipelines(new, stream._policy_of_steps)
            pipelines.prepare(holder.current)
            wait_for(workers[name].prepare(pipelines), stream._stop)
            if not given:
                stream._own_engines.append(new)  # before it is in use: the end of the stream closes it
            before, (kept, reset) = holder.exchange(pipelines, ended)
        except BaseException:
            if pipelines is not None:
                pipelines.close()
            if not given:
                if new in stream._own_engines:
                    stream._own_engines.remove(new)
                new.close()
            raise
        stream.engines[name] = new
        stream._tell_engine(name, new)
        stream.metrics.swapped(name, f"{old.bundle.path.name} -> {new.bundle.path.name}")
        before.close()
        if old in stream._own_engines and old not in stream.engines.values():
            stream._own_engines.remove(old)
            old.close()
    return Swapped(name, kept, reset)


__all__ = ["Holder", "Pipelines", "Swapped", "swap_engine"]
