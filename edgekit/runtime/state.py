"""Recurrent state: its values, what moves it between payloads, and when it ends.

Everything here is a pure rule on arrays and timestamps; `session` applies it to a loaded plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edgekit.errors import BundleError, UsageError
from edgekit.manifest import KernelStep, Manifest, Segment
from edgekit.spec import DType, QuantParams, StateSpec

# --- values ------------------------------------------------------------------------------------

_FLOATS = (DType.float32, DType.float16, DType.bfloat16)


def codes_of(spec: StateSpec) -> QuantParams | None:
    """The parameters of a state that is held as codes; None where its values are real numbers or plain integers."""
    return None if spec.dtype in _FLOATS else spec.quant


def private_states(manifest: Manifest, step: Segment | KernelStep) -> tuple[StateSpec, ...]:
    """The states that `step` alone reads and writes and that nothing else sees: how its payload holds
    them is its own affair, and their buffers may take turns."""

    def seen(state: StateSpec) -> bool:
        others = [s for s in manifest.plan if s is not step]
        return (
            state.output in manifest.outputs
            or any(state.output in s.inputs for s in manifest.plan)
            or any(state.input in s.inputs for s in others)
        )

    return tuple(
        s for s in manifest.states if s.input in step.inputs and s.output in step.outputs and not seen(s)
    )


def state_dtypes(spec: StateSpec) -> tuple[DType, ...]:
    """Element types that a payload may hold a private state in: codes and reals are the same to a scale."""
    if spec.quant is None:
        return (spec.dtype,)
    codes = _BYTES if spec.quant.dtype in _BYTES else (spec.quant.dtype,)
    return tuple(dict.fromkeys((spec.dtype, spec.quant.dtype, *codes, DType.float32)))


_BYTES = (DType.int8, DType.uint8)


def codes_as(quant: QuantParams, dtype: DType) -> QuantParams:
    """The same scale for codes of `dtype`: uint8 codes and zero point are those of int8 plus 128."""
    if quant.dtype == dtype or {quant.dtype, dtype} != set(_BYTES):
        return quant
    shift = 128 if dtype == DType.uint8 else -128
    return replace(quant, dtype=dtype, zero_point=tuple(zero + shift for zero in quant.zero_point))


def same_codes(first: QuantParams, second: QuantParams) -> bool:
    """Whether codes of the one mean the same in the other; files hold scales in float32."""
    second = codes_as(second, first.dtype)
    return (first.dtype, first.zero_point) == (second.dtype, second.zero_point) and all(
        np.float32(a) == np.float32(b) for a, b in zip(first.scale, second.scale, strict=True)
    )


def held_as(spec: StateSpec, array: np.ndarray) -> StateSpec:
    """`spec` as a payload holds the state in `array`."""
    dtype = DType(array.dtype.name)
    return replace(spec, dtype=dtype, quant=None if spec.quant is None else codes_as(spec.quant, dtype))


def initial_value(spec: StateSpec) -> np.ndarray:
    """`spec.initial` everywhere, as the payload reads it: codes where the state is quantized. C-contiguous.

    Raises: BundleError when the type of the state cannot hold the value.
    """
    value = np.full(spec.shape, spec.initial, np.float64)
    quant = codes_of(spec)
    if quant is not None:
        result = _quantized(value, quant, spec.dtype)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            result = value.astype(spec.dtype.value)
    exact = quant is not None or spec.dtype in _FLOATS or float(spec.initial) == float(result.flat[0])
    if not math.isfinite(spec.initial) or not exact or not np.isfinite(result.flat[0]):
        raise BundleError(
            f"state {spec.name}: initial value {spec.initial!r} is not one of {spec.dtype.value}. "
            "Build the bundle again"
        )
    return result


def convert(value: np.ndarray, source: StateSpec, target: StateSpec) -> np.ndarray:
    """`value`, held as `source` says, as `target` holds it: a new C-contiguous array.

    Between reals and codes by real = scale * (code - zero_point), rounded half to even and clipped;
    between equal types (and, for codes, scales) bit for bit.
    Raises: UsageError where the shapes differ, or the values of one cannot be read as those of the other.
    """
    if source.shape != target.shape or value.shape != source.shape:
        raise UsageError(f"state {target.name}: shape differs, expected {target.shape}, got {value.shape}")
    if value.dtype != source.dtype.value:
        raise UsageError(
            f"state {target.name}: element type differs, expected {source.dtype.value}, got {value.dtype}"
        )
    have, want = codes_of(source), codes_of(target)
    if source.dtype == target.dtype and have == want:
        return np.array(value, order="C")
    for spec, quant in ((source, have), (target, want)):
        if spec.dtype not in _FLOATS and quant is None:
            raise UsageError(
                f"state {target.name}: {source.dtype.value} cannot become {target.dtype.value}, as the "
                f"{spec.dtype.value} side states no scale. Reset the state instead"
            )
    real = value.astype(np.float64)
    if have is not None:
        real = (real - _along(have, have.zero_point, real.ndim)) * _along(have, have.scale, real.ndim)
    if want is not None:
        return _quantized(real, want, target.dtype)
    result: np.ndarray = real.astype(target.dtype.value)
    return result


def _quantized(real: np.ndarray, quant: QuantParams, dtype: DType) -> np.ndarray:
    limits = np.iinfo(dtype.value)
    codes = np.rint(real / _along(quant, quant.scale, real.ndim)) + _along(quant, quant.zero_point, real.ndim)
    clipped: np.ndarray = np.clip(codes, limits.min, limits.max)
    return clipped.astype(dtype.value)


def _along(quant: QuantParams, values: Sequence[float], rank: int) -> np.ndarray:
    """One value per tensor or per slice along the axis, as an array that broadcasts over `rank` axes."""
    shape = [1] * rank
    if quant.axis is not None:
        shape[quant.axis] = len(values)
    return np.array(values, np.float64).reshape(shape)


@dataclass(frozen=True)
class Carried:
    """What `carry_over` made: `values` for `Session.restore`; names of the states `kept` and of those that
    start anew, each with the reason."""

    values: dict[str, np.ndarray]
    kept: tuple[str, ...]
    reset: dict[str, str]


def carry_over(
    snapshot: Mapping[str, np.ndarray], source: Sequence[StateSpec], target: Sequence[StateSpec]
) -> Carried:
    """A snapshot of a session on one bundle, for a session on another (hot swap).

    snapshot, source: `session.snapshot()` and `session.state_specs` of the one; target: `state_specs` of the
    other. States belong together by name. One that has another shape or no common scale starts at `initial`.
    """
    known = {spec.name: spec for spec in source}
    values: dict[str, np.ndarray] = {}
    reset: dict[str, str] = {}
    for spec in target:
        if spec.name not in known or spec.name not in snapshot:
            reset[spec.name] = f"state {spec.name}: not in the snapshot"
        else:
            try:
                values[spec.name] = convert(snapshot[spec.name], known[spec.name], spec)
                continue
            except UsageError as error:
                reset[spec.name] = str(error)
        values[spec.name] = initial_value(spec)
    return Carried(values, tuple(name for name in values if name not in reset), reset)


# --- time --------------------------------------------------------------------------------------

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
            if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
                raise UsageError(f"state clock: {name} {seconds!r}: expected seconds above 0, or None")
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
