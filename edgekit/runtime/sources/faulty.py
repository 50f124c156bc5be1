"""`faulty:PLAN|SOURCE`: any live source, with faults put in on purpose, to see what a program makes of them."""

from __future__ import annotations

import contextlib
import heapq
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from edgekit.errors import UsageError, did_you_mean, printable
from edgekit.pixels import Pixels
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.frames import Frame
from edgekit.runtime.sources.base import Source


@dataclass(frozen=True)
class Kind:
    """amount: what a fault of this kind takes if nothing is said. counts: what the watchdog should count."""

    what: str
    amount: float
    counts: tuple[str, ...]


KINDS = {
    "unplug": Kind("gone for that many seconds; cannot be opened meanwhile", 2, ("lost",)),
    "stall": Kind("no frames for that many seconds, or until opened again", 3, ("stalled",)),
    "freeze": Kind("the same picture for that many seconds, or until opened again", 5, ("frozen",)),
    "slow": Kind("a third of the rate for that many seconds", 4, ("slow",)),
    "burst": Kind("frames held back for that many seconds, then all at once", 0.5, ()),
    "drop": Kind("so many frames are lost by the driver", 5, ("dropped",)),
    "corrupt": Kind("so many frames are marked as damaged", 3, ("corrupt",)),
    "jump": Kind(
        "timestamps jump by so many seconds (also negative), until opened again", 5, ("clock-jump",)
    ),
    "format": Kind(
        "gone for that many seconds, comes back with half the rows (the next time with all)",
        0.5,
        ("lost", "format-changed"),
    ),
    "hang": Kind("a read does not return for that many seconds, whatever its timeout", 5, ("hung",)),
}
_TIMED = ("hang", "stall", "burst", "slow", "freeze")
_COUNTED = ("drop", "corrupt")
RANDOM_KINDS = ("unplug", "stall", "freeze", "slow", "burst", "drop", "corrupt", "jump", "format")
_NEWEST = 10_000
_REST = 60
"""Frames between the end of a random fault and the next: shorter, and two count as one."""


@dataclass(frozen=True, order=True)
class Planned:
    """A fault of `kind` before frame number `frame`, counted from the first over all reconnects."""

    frame: int
    kind: str
    amount: float


def random_faults(
    seed: int,
    every: float,
    start: int = 0,
    kinds: Iterable[str] = RANDOM_KINDS,
    amounts: dict[str, float] | None = None,
) -> Iterator[Planned]:
    """Faults without end, `every` so many frames on average; the same ones for the same arguments."""
    chance, names, at = random.Random(seed), tuple(kinds), float(start)
    while True:
        at += _REST + chance.expovariate(1 / max(1e-9, every - _REST))
        kind = chance.choice(names)
        amount = (amounts or {}).get(kind, KINDS[kind].amount)
        yield Planned(round(at), kind, -amount if kind == "jump" and chance.random() < 0.5 else amount)


class Injector:
    """A device with a plan of faults. It outlives the sources opened on it, as a camera does its driver's handles.

    injected: faults so far by the name under which a watchdog counts them, `driver` and `damaged` frames.
    began: the newest of them, with `time.monotonic()` of when they began.
    replugged: for each time it was gone (the newest), how long from its return to the first frame, seconds.
    """

    def __init__(
        self, open_: Callable[[], Source], plan: Iterable[Planned], rest: int = 0, name: str = "faulty:"
    ) -> None:
        """open_: opens the source underneath. plan: in order of frames; an iterator may be endless. One fault
        at a time: those that fall due during another, or fewer than `rest` frames after it, wait. name: what sources on
        it are called in messages."""
        self.name = name
        self._open = open_
        self._plan = iter(plan)
        self._rest = rest
        self._not_before = 0
        self._active = False
        self._due = next(self._plan, None)
        self.frames = 0
        self.injected: Counter[str] = Counter()
        self.began: deque[tuple[float, Planned]] = deque(maxlen=_NEWEST)
        self.replugged: deque[float] = deque(maxlen=_NEWEST)
        self.halved = False
        self.gone_until: float | None = None

    @property
    def quiet(self) -> bool:
        """Whether all is well, and has been for `rest` frames."""
        return not self._active and self.frames >= self._not_before

    @property
    def finished(self) -> bool:
        """Whether the plan is at its end, and all is well again."""
        return self._due is None and self.quiet

    def open(self) -> FaultySource:
        """Open it again. Raises: SourceLost while it is gone; what opening the source underneath raises."""
        self.check_there()
        return FaultySource(self.name, injector=self)

    def open_inner(self) -> Source:
        self.check_there()
        return self._open()

    def check_there(self) -> None:
        if self.gone_until is not None and time.monotonic() < self.gone_until:
            raise SourceLost("source faulty: unplugged on purpose. Wait for it")

    def next_fault(self) -> Planned | None:
        """The fault to begin now, if one is due."""
        fault = self._due
        if fault is None or self.frames < max(fault.frame, self._not_before):
            return None
        self._due = next(self._plan, None)
        self.injected.update(KINDS[fault.kind].counts)
        self._active = True
        self.began.append((time.monotonic(), fault))
        return fault

    def over(self) -> None:
        """The fault has ended."""
        self._active = False
        self._not_before = self.frames + self._rest

    def unplug(self, seconds: float, other_format: bool = False) -> None:
        self.gone_until = time.monotonic() + seconds
        self.halved ^= other_format

    def delivered(self) -> None:
        self.frames += 1
        if self.gone_until is not None:
            self.replugged.append(time.monotonic() - self.gone_until)
            self.gone_until = None


class FaultySource(Source):
    """`faulty:unplug@100,2;freeze@300|synthetic://street?live=1`: faults at frame numbers, then the source.

    A fault is `KIND@FRAME` or `KIND@FRAME,AMOUNT`, kinds and their amounts as in `KINDS`. `random@FRAME,EVERY`
    or `random@FRAME,EVERY,SEED` puts in one of any kind about every so many frames. `again` opens the same
    device with the plan where it is; a new source from the URI begins anew.

    Raises: UsageError for a plan that cannot be read; what opening the source behind the bar raises.
    """

    live = True

    def __init__(self, uri: str, limit: int | None = None, *, injector: Injector | None = None) -> None:
        super().__init__(uri, limit)
        if injector is None:
            plan, rest, inner = parse(uri)
            from edgekit.runtime.sources import open_source  # it imports us by name

            injector = Injector(lambda: open_source(inner), plan, rest, _name(uri))
            self.uri = injector.name
        self._device = injector
        self.again = injector.open
        self._inner = injector.open_inner()
        self.live = self._inner.live
        self.fps, self.size, self.spare = self._inner.fps, self._inner.size, self._inner.spare
        if injector.halved and self.size:
            self.size = (self.size[0], _half(self.size[1]))
        self._fault: Planned | None = None
        self._until = 0.0
        self._left = 0
        self._kept: Frame | None = None
        self._held: list[Frame] = []
        self._offset_ns = 0
        self._renumbered = 0
        self._not_before_ns = 0
        self._dead = False

    def _read(self, timeout_s: float | None) -> Frame | None:
        if self._dead:
            raise SourceLost(f"source {self.uri}: unplugged on purpose. Open it again")
        if self._fault is None and (fault := self._device.next_fault()) is not None:
            self._begin(fault)
        kind = self._fault.kind if self._fault else ""
        left = self._until - time.monotonic()
        if kind == "hang":
            time.sleep(max(0.0, left))
        elif kind == "stall" and left > 0:
            time.sleep(left if timeout_s is None else min(left, timeout_s))
            raise TimeoutError
        elif kind == "burst":
            self._hold(timeout_s)
        if kind in _TIMED and time.monotonic() >= self._until:
            self._end()
        if self._held:
            frame: Frame | None = self._held.pop(0)
            assert frame is not None
            frame.captured_ns = time.monotonic_ns()
        else:
            frame = self._next(timeout_s)
        return None if frame is None else self._marked(frame)

    def _begin(self, fault: Planned) -> None:
        """Start a fault; those without a length take effect at once. Raises: SourceLost where it is that."""
        self._fault = fault
        self._until = time.monotonic() + fault.amount
        self._left = int(fault.amount)
        if fault.kind in ("unplug", "format"):
            self._device.unplug(fault.amount, other_format=fault.kind == "format")
            self._dead = True
            self._end()
            raise SourceLost(f"source {self.uri}: unplugged on purpose. Open it again")
        if fault.kind == "jump":
            self._offset_ns += round(fault.amount * 1e9)
            self._end()

    def _end(self) -> None:
        if self._fault is not None:
            self._fault = None
            self._device.over()
        if self._kept is not None:
            self._kept.release()
            self._kept = None

    def _next(self, timeout_s: float | None) -> Frame | None:
        """A frame of the source underneath, less those that a fault takes away."""
        while (frame := self._inner.read(timeout_s)) is not None:
            kind = self._fault.kind if self._fault else ""
            if kind == "drop":  # leaves a gap in the numbers
                self._device.injected["driver"] += 1
                self._left -= 1
                if self._left <= 0:
                    self._end()
            elif kind == "slow" and frame.taken_ns < self._not_before_ns:  # leaves none: it was never taken
                self._renumbered += 1
            else:
                self._not_before_ns = frame.taken_ns + round(2.9e9 / (self.fps or 30))
                frame.seq -= self._renumbered
                return frame
            frame.release()
        return None

    def _hold(self, timeout_s: float | None) -> None:
        """Take frames in and give none out while a burst gathers; what no buffer is left for is lost.

        Raises: TimeoutError until it is over."""
        until = self._until if timeout_s is None else min(self._until, time.monotonic() + timeout_s)
        room = 8 if self._inner.spare is None else max(1, self._inner.spare - 2)
        while (left := until - time.monotonic()) > 0:
            if len(self._held) == room:
                time.sleep(left)
                break
            with contextlib.suppress(TimeoutError):
                frame = self._next(left)
                if frame is None:
                    self._until = 0.0
                    return
                self._held.append(frame)
        if time.monotonic() < self._until:
            raise TimeoutError

    def _marked(self, frame: Frame) -> Frame:
        """The frame as the faults of now make it."""
        kind = self._fault.kind if self._fault else ""
        if self._device.halved:
            frame.pixels = _upper_half(frame.pixels)
        if kind == "freeze":
            if self._kept is None:
                self._kept = frame.share()
            else:
                same = self._kept.share()
                same.seq, same.pts_ns, same.captured_ns = frame.seq, frame.pts_ns, frame.captured_ns
                frame.release()
                frame = same
        elif kind == "corrupt":
            frame.corrupt = True
            self._device.injected["damaged"] += 1
            self._left -= 1
            if self._left <= 0:
                self._end()
        if frame.clock != "none":
            frame.pts_ns += self._offset_ns
        self._device.delivered()
        return frame

    def close(self) -> None:
        if not self._closed:
            self._end()
            while self._held:
                self._held.pop().release()
            self._inner.close()
        super().close()


def _half(rows: int) -> int:
    return max(2, rows // 4 * 2)


def _upper_half(pixels: Pixels) -> Pixels:
    """The upper half of a picture, in the same buffer."""
    layout = replace(pixels.layout, height=_half(pixels.layout.height))
    planes = tuple(p[: s[0]] for p, s in zip(pixels.planes, layout.plane_shapes, strict=True))
    return Pixels(planes, layout)


def _name(uri: str) -> str:
    """A URI for messages: its plan may have thousands of faults."""
    plan, _, inner = uri.partition("|")
    return f"{plan if len(plan) <= 60 else plan[:57] + '...'}|{inner}"


def parse(uri: str) -> tuple[Iterator[Planned], int, str]:
    """The plan of a URI `faulty:PLAN|SOURCE`, the frames of rest after each fault, and SOURCE.

    Raises: UsageError."""
    text = uri.removeprefix("faulty:")
    plan, bar, inner = text.partition("|")
    if not bar or not inner:
        raise UsageError(
            f"source {printable(uri)}: names no source, expected faulty:KIND@FRAME,AMOUNT;...|SOURCE. "
            "Write the source after a bar"
        )
    fixed: list[Planned] = []
    endless: list[Iterator[Planned]] = []
    for item in filter(None, plan.split(";")):
        match = re.fullmatch(r"([a-z]+)@([0-9]{1,9})((?:,-?[0-9]{1,9}(?:\.[0-9]{1,3})?){0,2})", item)
        if not match:
            raise UsageError(f"source {uri}: fault {item!r} not understood, expected KIND@FRAME,AMOUNT")
        kind, frame = match[1], int(match[2])
        numbers = [float(n) for n in match[3].split(",")[1:]]
        if kind == "random":
            if not numbers or not numbers[0] > _REST:
                raise UsageError(f"source {uri}: random faults every how many frames? Expected above {_REST}")
            endless.append(random_faults(int(numbers[1]) if numbers[1:] else 0, numbers[0], frame))
            continue
        if kind not in KINDS:
            raise UsageError(
                f"source {uri}: unknown fault {kind!r}. {did_you_mean(kind, [*KINDS, 'random'])}"
            )
        amount = numbers[0] if numbers else KINDS[kind].amount
        if len(numbers) > 1 or (kind != "jump" and amount <= 0) or (kind in _COUNTED and amount % 1):
            raise UsageError(f"source {uri}: fault {item!r}: amount not usable, expected {KINDS[kind].what}")
        fixed.append(Planned(frame, kind, amount))
    return heapq.merge(sorted(fixed), *endless), _REST if endless else 0, inner
