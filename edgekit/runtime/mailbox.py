"""Hand-over between threads that never queues without bound: the newest of each sender, or a full stop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_S = 0.1
"""No thread waits longer than this without looking at the stop event."""


class Closed(Exception):
    """Nothing will come any more."""


class Mailbox(Generic[T]):
    """Items of several senders (cameras, engines) for one reader, who takes the sender that waits longest.

    newest: keep only the latest items of each sender (live sensors); otherwise a sender waits until one
    of its places is free (files, where nothing may be lost), or `stop` is set.
    capacity: places of a sender, or of each by name; by default 1 for the newest, else 2.
    """

    def __init__(
        self,
        senders: Iterable[str],
        *,
        newest: bool,
        capacity: int | Mapping[str, int] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._newest = newest
        self._stop = stop
        self._items: dict[str, deque[T]] = {sender: deque() for sender in senders}
        usual = capacity if isinstance(capacity, int) else 1 if newest else 2
        given = capacity if isinstance(capacity, Mapping) else {}
        self._capacity = {sender: given.get(sender, usual) for sender in self._items}
        self._turn: deque[str] = deque()
        """Senders with items, in the order of their oldest."""
        self._open = set(self._items)
        self._closed = False
        self._change = threading.Condition()

    def put(self, sender: str, item: T) -> T | None:
        """Leave an item. Returns the one that it replaces, or `item` itself when it is not wanted any more: the
        mailbox is closed, or no place was free until the stop. Either is the caller's to release."""
        with self._change:
            queue = self._items[sender]
            places = self._capacity[sender]
            while not self._newest and len(queue) >= places and self._wanted(sender):
                if self._stop is not None and self._stop.is_set():
                    return item
                self._change.wait(POLL_S)  # take, close and the sender's end wake it; a stop is looked for
            if not self._wanted(sender):
                return item
            replaced = queue.popleft() if len(queue) >= places else None
            if not queue and replaced is None:
                self._turn.append(sender)
            queue.append(item)
            self._change.notify_all()
            return replaced

    def take(self, timeout_s: float | None = None, *, only: Callable[[str], bool] | None = None) -> T | None:
        """The next item, or None when none came in time. only: which senders' items are wanted now.

        Raises: Closed when closed, or when all senders have ended and nothing is left.
        """
        with self._change:
            if not self._change.wait_for(lambda: self._ready(only), timeout_s):
                return None
            if self._closed or not self._turn:
                raise Closed
            sender = next(s for s in self._turn if only is None or only(s))
            self._turn.remove(sender)
            queue = self._items[sender]
            item = queue.popleft()
            if queue:
                self._turn.append(sender)
            self._change.notify_all()
            return item

    def over(self, sender: str) -> bool:
        """Whether nothing of that sender waits, or will come."""
        with self._change:
            return sender not in self._open and not self._items[sender]

    def _wanted(self, sender: str) -> bool:
        return not self._closed and sender in self._open

    def _ready(self, only: Callable[[str], bool] | None) -> bool:
        if self._closed or (not self._open and not self._turn):
            return True
        return bool(self._turn) if only is None else any(map(only, self._turn))

    def end(self, sender: str) -> None:
        """`sender` leaves nothing more."""
        with self._change:
            self._open.discard(sender)
            self._change.notify_all()

    def close(self) -> list[T]:
        """Wake everyone for good. Returns what was left inside, which is the caller's to release."""
        with self._change:
            self._closed = True
            left = [item for queue in self._items.values() for item in queue]
            for queue in self._items.values():
                queue.clear()
            self._turn.clear()
            self._change.notify_all()
            return left
