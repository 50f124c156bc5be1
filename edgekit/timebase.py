"""Time of recurrent state: how many steps lie between two frames, and when state ends.

Pure rules on timestamps: nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgekit.errors import BundleError, UsageError
from edgekit.spec import MAX_SECONDS, StateSpec, is_duration

MAX_RUNS = 16
"""Runs for one frame at most, however long the gap: a live stream must not work off a pause."""

Policy = Literal["plain", "hold", "resample", "reset"]


@dataclass(frozen=True)
class Advance:
    """What one frame means for the state.

    action: `reset` = time broke before this frame (`reason` in words): start at the initial values.
    steps: nominal steps that fall between the frame before and this one; 0 = it came before the next
    one is due. 1 for the first frame, after a reset, and where no nominal step is known.
    """

    action: Literal["continue", "reset"]
    steps: int
    reason: str = ""


class StateClock:
    """Decides frame by frame whether state goes on, and how many nominal steps have passed.

    Time breaks where the epoch changes (reconnect, jump of the clock: frames.Frame.epoch), where a
    timestamp lies before the last one, and after a gap of more than `reset_after_s`. Steps are counted on
    a grid from the first frame after a break: step k is due at k * nominal_dt_s and belongs to the
    frame nearest to it, so that jitter does not add up and the sum of `steps` is the elapsed time over
    `nominal_dt_s`, rounded, whatever the frame rate.
    """

    def __init__(self, nominal_dt_s: float | None = None, reset_after_s: float | None = None) -> None:
        """None: every frame is one step; no gap is too long."""
        for name, seconds in (("nominal_dt_s", nominal_dt_s), ("reset_after_s", reset_after_s)):
            if seconds is not None and not is_duration(seconds):
                raise UsageError(
                    f"state clock: {name} {seconds!r}: expected seconds above 0 and at most {MAX_SECONDS:g}, or None"
                )
        self._dt_ns = None if nominal_dt_s is None else max(1, round(nominal_dt_s * 1e9))
        self._limit_ns = None if reset_after_s is None else round(reset_after_s * 1e9)
        self.forget()

    @classmethod
    def of(cls, states: Sequence[StateSpec]) -> StateClock:
        """The clock of a network: the shortest `reset_after_s` of its states counts for all, as they
        belong together. Raises: BundleError when they were trained for different steps."""
        nominal = {s.nominal_dt_s for s in states if s.nominal_dt_s is not None}
        if len(nominal) > 1:
            listed = ", ".join(f"{s.name} {s.nominal_dt_s}" for s in states if s.nominal_dt_s is not None)
            raise BundleError(
                f"states: nominal_dt_s differs ({listed}), expected one. Build the bundle again"
            )
        limits = [s.reset_after_s for s in states if s.reset_after_s is not None]
        return cls(next(iter(nominal), None), min(limits, default=None))

    def forget(self) -> None:
        """The next frame is the first one: it goes on with the state as it is then."""
        self._epoch: int | None = None
        self._first_ns = self._last_ns = self._counted = 0

    def follow(self, other: StateClock) -> None:
        """Go on after the last frame of `other`, on its grid where both have one step, else on one from that frame."""
        self._epoch, self._last_ns = other._epoch, other._last_ns
        same = self._dt_ns == other._dt_ns
        self._first_ns, self._counted = (other._first_ns, other._counted) if same else (other._last_ns, 0)

    def advance(self, taken_ns: int, epoch: int = 0) -> Advance:
        """Take note of a frame. `taken_ns`: when it was taken (frames.Frame.taken_ns), nanoseconds."""
        if self._epoch is None:
            self._begin(taken_ns, epoch)
            return Advance("continue", 1)
        gap = taken_ns - self._last_ns
        if epoch != self._epoch:
            reason = f"epoch {self._epoch} ended"
        elif gap < 0:
            reason = f"the clock went back {-gap / 1e9:.3f} s"
        elif self._limit_ns is not None and gap > self._limit_ns:
            reason = f"a gap of {gap / 1e9:.3f} s, over {self._limit_ns / 1e9:g} s"
        else:
            self._last_ns = taken_ns
            if self._dt_ns is None:
                return Advance("continue", 1)
            # round half up in integers: exact after any number of days
            due = (2 * (taken_ns - self._first_ns) + self._dt_ns) // (2 * self._dt_ns)
            steps, self._counted = due - self._counted, due
            return Advance("continue", steps)
        self._begin(taken_ns, epoch)
        return Advance("reset", 1, reason)

    def _begin(self, taken_ns: int, epoch: int) -> None:
        self._epoch, self._first_ns, self._last_ns, self._counted = epoch, taken_ns, taken_ns, 0


@dataclass(frozen=True)
class Stepping:
    """What to do with a frame: `reset` the state first or not; then one run per entry of `at`.

    at: the moments of these runs between the frame before (0) and this one (1); the last is 1. Run each
    with this frame, or with a mixture of both. Empty: do not run; the last result still holds.
    """

    reset: bool
    at: tuple[float, ...]

    @property
    def runs(self) -> int:
        return len(self.at)


def stepping(policy: Policy, advance: Advance, max_runs: int = MAX_RUNS) -> Stepping:
    """How a network trained for one nominal step per run is run for a frame that came sooner or later.

    plain: one run a frame, whatever the time. The other policies do not run for a frame that comes
    before its step is due, and differ where steps were missed:
    hold: one run; the state is held over what was missed.
    resample: one run per nominal step, at most `max_runs`, so that state keeps the time base.
    reset: the state is not used across what was missed.
    A break of time (`advance.action`) resets under every policy. Raises: UsageError for another policy.
    """
    if policy not in ("plain", "hold", "resample", "reset"):
        raise UsageError(f"policy {policy!r}: unknown, expected plain, hold, resample or reset")
    if max_runs < 1:
        raise UsageError(f"max_runs {max_runs}: expected at least 1")
    if advance.action == "reset":
        return Stepping(True, (1.0,))
    if policy == "plain":
        return Stepping(False, (1.0,))
    if advance.steps < 1:
        return Stepping(False, ())
    if policy == "reset":
        return Stepping(advance.steps > 1, (1.0,))
    runs = min(advance.steps, max_runs) if policy == "resample" else 1
    return Stepping(False, tuple((i + 1) / runs for i in range(runs)))
