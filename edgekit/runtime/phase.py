"""What the times of one sensor tell: its period, its phase against the moments, its clock against ours.

Numbers in, numbers out: no clock, no thread, bounded memory. Times in nanoseconds.
"""

from __future__ import annotations

import cmath
import math
from collections import deque
from statistics import median

KEPT = 15
"""Newest values that period and phase are taken of: an odd number, so that the median is one of them."""
_FEW = 5
_ALIKE = 0.8
"""Resultant length from which on phases count as locked: below, camera and LiDAR run freely of each other."""
_BUCKET, _BUCKETS = 64, 16


class Period:
    """The time from one part to the next: the median of the newest steps that are about as long as the shorter ones, so
    that lost parts do not count, were it a third of them."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._steps: deque[int] = deque(maxlen=KEPT)
        self._value: int | None = None

    def add(self, taken_ns: int) -> None:
        if self._last is not None and taken_ns > self._last:
            self._steps.append(taken_ns - self._last)
            if len(self._steps) >= 3:
                short = sorted(self._steps)[len(self._steps) // 4]
                self._value = round(median(s for s in self._steps if 0.67 * short <= s <= 1.5 * short))
        self._last = taken_ns

    def forget(self) -> None:
        """The clock changed: the next step is none."""
        self._last = None

    def value(self) -> int | None:
        """None before three steps are known."""
        return self._value


class Phase:
    """How far from where it is expected a periodic sensor takes its pictures, as an angle of its own period.

    A mean of angles, so that a camera that drifts through a whole period is followed without a jump in between;
    what lies far off the mean (of the rest) is left out of it.
    """

    def __init__(self) -> None:
        self._values: deque[int] = deque(maxlen=KEPT)
        self.locked = False
        self.value_ns = 0
        """Mean, between minus and plus half a period; 0 unless locked."""
        self.spread_ns = 0
        """Median distance from it."""

    def add(self, residual_ns: int, period_ns: int) -> None:
        self._values.append(residual_ns)
        self.locked, self.value_ns = False, 0
        if len(self._values) < _FEW:
            return
        turn = 2j * math.pi / period_ns
        angles = [cmath.exp(turn * value) for value in self._values]
        mean = sum(angles)
        far = sorted(abs(cmath.phase(angle / mean)) if mean else math.pi for angle in angles)
        limit = max(3 * far[len(far) // 2], 1e-3)
        kept = [a for a in angles if mean and abs(cmath.phase(a / mean)) <= limit]
        mean = sum(kept) / len(kept) if kept else 0j
        self.spread_ns = round(far[len(far) // 2] / (2 * math.pi) * period_ns)
        self.locked = len(kept) * 4 >= len(angles) * 3 and abs(mean) >= _ALIKE
        if self.locked:
            self.value_ns = round(cmath.phase(mean) / (2 * math.pi) * period_ns)

    def forget(self) -> None:
        self._values.clear()
        self.locked, self.value_ns, self.spread_ns = False, 0, 0


class Delay:
    """Least time from a part's timestamp to its arrival: transport at its fastest, plus what the sensor's clock is
    behind ours. One way, so the two cannot be told apart; a change of it is the clock's (or the cable's).

    Minimum filter over the newest 64 to 128 parts; the drift is the median slope (Theil-Sen) of such minima.
    """

    def __init__(self) -> None:
        self._now: tuple[int, int] | None = None
        """(when, minimum) of the bucket that fills."""
        self._count = 0
        self._minima: deque[tuple[int, int]] = deque(maxlen=_BUCKETS)

    def add(self, taken_ns: int, arrived_ns: int) -> None:
        delay = arrived_ns - taken_ns
        if self._now is None or delay < self._now[1]:
            self._now = (arrived_ns, delay)
        self._count += 1
        if self._count == _BUCKET:
            self._minima.append(self._now)
            self._now, self._count = None, 0

    def floor_ns(self) -> int | None:
        """None before the first part."""
        newest = [self._minima[-1]] if self._minima else []
        if self._now is not None:
            newest.append(self._now)
        return min(delay for _, delay in newest) if newest else None

    def drift_ppm(self) -> float | None:
        """Millionths that the sensor's clock is slow; None before some hundred parts."""
        if len(self._minima) < 4:
            return None
        points = list(self._minima)
        slopes = [
            (d1 - d0) / (t1 - t0)
            for i, (t0, d0) in enumerate(points)
            for t1, d1 in points[i + 1 :]
            if t1 > t0
        ]
        return median(slopes) * 1e6 if slopes else None

    def forget(self) -> None:
        self._now, self._count = None, 0
        self._minima.clear()
