"""A frame: pixels with a timestamp, leased from its source."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgekit.pixels import Pixels, ReleasedPixels

if TYPE_CHECKING:
    from edgekit.rig import RigFrame

Clock = Literal["monotonic", "media", "none"]
Exposure = Literal["start", "end", "unknown"]


@dataclass(frozen=True)
class Hop:
    """One line of the copy ledger: a step of a frame's way from the sensor to the engine.

    by: who moved the bytes: `CPU`, `DMA`, `GPU`, `driver`.
    copied: bytes that were moved unchanged, which a better way would not move.
    written: bytes that a kernel or decoder had to produce.
    """

    name: str
    by: str
    copied: int = 0
    written: int = 0


class Lease:
    """Counts the holders of a buffer; the last one to let go gives it back. Safe between threads."""

    __slots__ = ("_give_back", "_holders", "_lock")

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back
        self._holders = 1
        self._lock = threading.Lock()

    def share(self) -> None:
        with self._lock:
            assert self._holders > 0, "the buffer was given back already"
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last:
            self._give_back()


@dataclass(eq=False)
class Frame:
    """One picture from a source. Give it back with `release()` or a `with` block.

    pixels: the picture, in the source's own buffer and format.
    seq: position in the source, from 0; a gap means that frames are missing.
    pts_ns: when it was taken, in the clock that `clock` names: `monotonic` = this machine's
        `time.monotonic_ns()` (cameras: the driver's timestamp), `media` = from the start of a file or
        stream, `none` = no clock (pictures; pts_ns 0).
    captured_ns: `time.monotonic_ns()` when we got it.
    source: the file or URI it came from.
    exposure: which moment a camera's timestamp marks: `start` or `end` of the frame's exposure or readout.
    camera: short name of the source where a stream has several.
    epoch: counts reconnects and jumps of the clock: state carried from frame to frame ends where it changes.
    corrupt: the driver marked the buffer as damaged.
    hops: copy ledger so far.
    lease: gives the buffer back; None where the frame owns its pixels (files).
    rig: where the source is a rig or one sensor of it: all that was measured, with calibration. Its arrays are
        not leased.

    A frame is one handle on its buffer. `share()` gives another for another reader; each is released
    once, and the buffer returns to its source after the last. After `release()` a leased frame's pixels
    raise UsageError; an array that was taken from it before may be overwritten. `detach()` makes a frame that stays.
    """

    pixels: Pixels
    seq: int
    pts_ns: int
    captured_ns: int
    source: str
    clock: Clock = "none"
    exposure: Exposure = "unknown"
    camera: str = ""
    epoch: int = 0
    corrupt: bool = False
    hops: tuple[Hop, ...] = ()
    lease: Lease | None = field(default=None, repr=False)
    rig: RigFrame | None = field(default=None, repr=False)
    _bgr: np.ndarray | None = field(default=None, repr=False, init=False)

    @property
    def image(self) -> np.ndarray:
        """uint8 [height, width, 3] BGR: the pixels themselves where they are that, else converted once."""
        if self.pixels.layout.format == "bgr":
            return self.pixels.planes[0]
        if self._bgr is None:
            from edgekit.kernels.letterbox import to_bgr

            self._bgr = to_bgr(self.pixels)
        return self._bgr

    @property
    def width(self) -> int:
        return self.pixels.layout.width

    @property
    def height(self) -> int:
        return self.pixels.layout.height

    @property
    def taken_ns(self) -> int:
        """When the picture was taken, on `time.monotonic_ns()`; when we got it where no such clock is known."""
        return self.pts_ns if self.clock == "monotonic" else self.captured_ns

    def age_ms(self) -> float:
        """Milliseconds since it was taken."""
        return (time.monotonic_ns() - self.taken_ns) / 1e6

    def share(self) -> Frame:
        """Another handle on the same buffer, to be released on its own."""
        if self.lease is not None:
            self.lease.share()
        other = replace(self)
        other._bgr = self._bgr
        return other

    def detach(self) -> Frame:
        """A frame with pixels of its own, which stays when this one is released; the copy is in its ledger."""
        if self.lease is None:
            return self.share()
        copied = self.pixels.copy()
        hop = Hop("kept", "CPU", copied=self.pixels.layout.nbytes)
        return replace(self, pixels=copied, lease=None, hops=(*self.hops, hop))

    def release(self) -> None:
        """End the lease. Calling it again does nothing."""
        lease, self.lease = self.lease, None
        if lease is not None:
            # no view stays: a driver's memory is unmapped, and its device free, when the last one is gone
            self.pixels = ReleasedPixels(self.pixels.layout)
            lease.release()

    def without_pixels(self) -> Frame:
        """All but the picture, holding nothing: for readers that only name the frame."""
        return replace(self, pixels=ReleasedPixels(self.pixels.layout), lease=None, rig=None)

    def __enter__(self) -> Frame:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
