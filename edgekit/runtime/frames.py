"""A frame: pixels with a timestamp, leased from its source."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture from a source. Give it back with `release()` or a `with` block.

    image: uint8 [height, width, 3], channels as `format` says.
    seq: position in the source, from 0; a gap means that frames are missing.
    pts_ns: when the frame was taken, in the source's own clock; 0 where it has none (pictures).
    captured_ns: `time.monotonic_ns()` when we got it; the age of a result counts from here.
    source: the file or URI it came from.
    on_release: gives the buffer back to the source; None where the frame owns its pixels (files).

    After `release()` the pixels may be overwritten by the source: copy what must stay.
    """

    image: np.ndarray
    seq: int
    pts_ns: int
    captured_ns: int
    source: str
    format: str = "bgr"
    on_release: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def width(self) -> int:
        return int(self.image.shape[1])

    @property
    def height(self) -> int:
        return int(self.image.shape[0])

    def age_ms(self) -> float:
        """Milliseconds since it was captured."""
        return (time.monotonic_ns() - self.captured_ns) / 1e6

    def release(self) -> None:
        """End the lease. Calling it again does nothing."""
        give_back = self.on_release
        if give_back is not None:
            object.__setattr__(self, "on_release", None)
            give_back()

    def __enter__(self) -> Frame:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
