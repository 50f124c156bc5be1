"""Steps that do not wait for each other, on a few threads of one session's own.

The caller works too; helpers sleep on a condition variable between runs and while there is nothing to do. What has
nothing beside it runs in the caller's thread: a library's own workers that are to help with it are awake sooner for a
thread that they know (ONNX Runtime: half the time for a network on two cores).
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Collection, Sequence

from edgekit.errors import StreamError

MAX_HELPERS = 7


class Crew:
    """Runs the numbers 0..n-1, each after those in `after[i]`, all of which are smaller.

    helpers: threads beside the caller's. They are started by the first run and end with `close`.
    late: numbers that wait while others are ready.
    """

    def __init__(self, after: Sequence[Collection[int]], helpers: int, late: Collection[int] = ()) -> None:
        self._order = [(i in late, i) for i in range(len(after))]
        self._counts = [len(before) for before in after]
        self._followers: list[list[int]] = [[] for _ in after]
        for i, before in enumerate(after):
            for j in before:
                self._followers[j].append(i)
        self._helpers = min(helpers, MAX_HELPERS)
        self._wake = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False
        # of the run in progress
        self._work: Callable[[int], None] | None = None
        self._ready: list[tuple[bool, int]] = []
        self._waits: list[int] = []
        self._left = 0
        self._active = 0
        self._error: BaseException | None = None

    def run(self, work: Callable[[int], None]) -> None:
        """Call `work` with every number; returns when all are done. One run at a time.

        Raises: the first exception of `work`, when what was running beside it has ended; no other work is begun then.
        StreamError when closed.
        """
        with self._wake:
            if self._closed:
                raise StreamError("session: closed. Make another with engine.session()")
            self._start()
            self._work, self._waits, self._left = work, list(self._counts), len(self._counts)
            self._ready = [order for order, count in zip(self._order, self._counts, strict=True) if not count]
            heapq.heapify(self._ready)
            try:
                self._wake.notify(len(self._ready) - 1)
                while self._left and self._error is None:
                    if self._ready:
                        self._one()
                    else:
                        self._wake.wait()
            except BaseException as interrupt:  # noqa: BLE001 - while it waited; raised below
                self._error = self._error or interrupt
            finally:
                self._ready = []
                while self._active:  # nobody may write to the session's arrays when this returns
                    self._wake.wait()
                self._work = None
                error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # a frame that holds its own exception is a cycle

    def _start(self) -> None:
        while len(self._threads) < self._helpers:
            thread = threading.Thread(
                target=self._help, name=f"edgekit-plan-{len(self._threads) + 1}", daemon=True
            )
            try:
                thread.start()
            except (
                RuntimeError
            ):  # no more threads to be had: those that there are, and the caller, do the work
                self._helpers = len(self._threads)
                return
            self._threads.append(thread)

    def _help(self) -> None:
        with self._wake:
            while not self._closed:
                if self._active + len(self._ready) > 1 and self._ready:
                    self._one()
                else:
                    self._wake.wait()

    def _one(self) -> None:
        """Take the first that is ready; the lock is held on entry and on return, not during the work."""
        (_, number), work = heapq.heappop(self._ready), self._work
        assert work is not None
        self._active += 1
        self._wake.release()
        failure: BaseException | None = None
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - the caller of `run` gets it
            failure = error
        finally:
            self._wake.acquire()
        del work
        self._active -= 1
        if failure is not None:
            self._error = self._error or failure
            self._ready = []
            failure = None
        elif self._error is None:
            self._left -= 1
            for follower in self._followers[number]:
                self._waits[follower] -= 1
                if not self._waits[follower]:
                    heapq.heappush(self._ready, self._order[follower])
        alone = not self._active and len(self._ready) == 1
        if not self._left or self._error is not None or alone:
            self._wake.notify_all()  # the caller among them
        elif len(self._ready) > 1:
            self._wake.notify(len(self._ready) - 1)

    def close(self) -> None:
        """End the helpers and wait for them. Closing twice is fine."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads = []
