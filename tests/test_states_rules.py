"""What decides about state: the clock that ends it, the policies that step it, and how its values convert."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import BundleError, UsageError
from edgekit.runtime.state import carry_over, convert, initial_value
from edgekit.spec import DType, QuantParams, StateSpec
from edgekit.timebase import MAX_RUNS, Advance, StateClock, Stepping, stepping

MS = 1_000_000
LONG_AGO = 7 * 10**18  # some clocks count from 1970 in nanoseconds: more than a double holds


def spec(dtype: DType = DType.float32, quant: QuantParams | None = None, **fields: object) -> StateSpec:
    values = {"shape": (1, 3, 4), "input": "i", "output": "o", **fields}
    return StateSpec("s", dtype, quant=quant, **values)  # type: ignore[arg-type]


PER_TENSOR = QuantParams(DType.int8, (0.05,), (-7,))
PER_CHANNEL = QuantParams(DType.int8, (0.05, 0.1, 0.2), (0, 3, -128), axis=1)
UNSIGNED = QuantParams(DType.uint8, (0.04,), (128,))


# --- the clock ---------------------------------------------------------------------------------


@given(
    st.integers(1, 200 * MS),
    st.lists(st.integers(0, 500 * MS), max_size=60),
    st.integers(-LONG_AGO, LONG_AGO),
)
def test_the_sum_of_steps_is_the_elapsed_time_to_half_a_step(dt_ns: int, gaps: list[int], start: int) -> None:
    clock = StateClock(dt_ns / 1e9)
    assert clock.advance(start) == Advance("continue", 1)
    total, now = 0, start
    for gap in gaps:
        now += gap
        step = clock.advance(now)
        assert step.action == "continue"
        assert step.steps >= 0
        total += step.steps
        assert abs(total - Fraction(now - start, dt_ns)) <= Fraction(1, 2)


@given(st.integers(20, 200), st.lists(st.integers(-400, 400), min_size=1, max_size=50))
def test_jitter_below_half_a_step_is_no_drop(dt_ms: int, jitter: list[int]) -> None:
    """Frames that come up to 0.4 steps early or late are one step each."""
    clock = StateClock(dt_ms / 1e3)
    clock.advance(0)
    for i, part in enumerate(jitter, start=1):
        taken = (i * 1000 + part) * dt_ms * MS // 1000
        assert clock.advance(taken) == Advance("continue", 1)


@given(
    st.lists(st.tuples(st.integers(-300, 600), st.sampled_from([0, 0, 0, 0, 1])), max_size=40),
    st.one_of(st.none(), st.integers(1, 500)),
)
def test_time_breaks_on_a_gap_a_new_epoch_and_a_clock_that_goes_back(
    events: list[tuple[int, int]], limit_ms: int | None
) -> None:
    clock = StateClock(0.1, None if limit_ms is None else limit_ms / 1e3)
    now, epoch = 10**12, 3
    clock.advance(now, epoch)
    first = now
    for gap_ms, change in events:
        now, epoch = now + gap_ms * MS, epoch + change
        broken = bool(change) or gap_ms < 0 or (limit_ms is not None and gap_ms > limit_ms)
        step = clock.advance(now, epoch)
        assert step.action == ("reset" if broken else "continue")
        assert bool(step.reason) == broken
        if broken:
            assert step.steps == 1
            first = now
        again = StateClock(0.1)  # a clock that begins at the break counts the same
        again.advance(first, epoch)
    if events:
        after = clock.advance(now + 100 * MS, epoch)
        if after.action == "continue":
            again.advance(now, epoch)
            assert again.advance(now + 100 * MS, epoch).steps == after.steps


def test_reasons_say_what_broke() -> None:
    clock = StateClock(0.1, 0.5)
    clock.advance(0, 0)
    assert clock.advance(500 * MS, 0) == Advance("continue", 5)
    assert clock.advance(1001 * MS, 0) == Advance("reset", 1, "a gap of 0.501 s, over 0.5 s")
    assert clock.advance(1000 * MS, 0) == Advance("reset", 1, "the clock went back 0.001 s")
    assert clock.advance(1100 * MS, 1) == Advance("reset", 1, "epoch 0 ended")
    assert clock.advance(1100 * MS, 1) == Advance("continue", 0)
    clock.forget()
    assert clock.advance(5, 9) == Advance("continue", 1)


def test_without_a_nominal_step_every_frame_is_one() -> None:
    clock = StateClock()
    assert [clock.advance(t).steps for t in (0, 0, 1, 10**15)] == [1, 1, 1, 1]


def test_the_clock_of_a_network() -> None:
    states = [spec(nominal_dt_s=0.1, reset_after_s=2.0), spec(reset_after_s=0.5), spec(nominal_dt_s=0.1)]
    clock = StateClock.of(states)
    clock.advance(0)
    assert clock.advance(300 * MS) == Advance("continue", 3)
    assert clock.advance(900 * MS).action == "reset"
    assert StateClock.of([]).advance(0) == Advance("continue", 1)
    with pytest.raises(BundleError, match=r"nominal_dt_s differs \(s 0.1, s 0.2\)"):
        StateClock.of([spec(nominal_dt_s=0.1), spec(nominal_dt_s=0.2)])


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_of_a_clock_are_positive(seconds: float) -> None:
    with pytest.raises(UsageError, match="nominal_dt_s"):
        StateClock(seconds)
    with pytest.raises(UsageError, match="reset_after_s"):
        StateClock(0.1, seconds)


# --- policies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "plain", "hold", "resample", "reset"),
    [
        (0, (False, 1), (False, 0), (False, 0), (False, 0)),
        (1, (False, 1), (False, 1), (False, 1), (False, 1)),
        (2, (False, 1), (False, 1), (False, 2), (True, 1)),
        (5, (False, 1), (False, 1), (False, 5), (True, 1)),
        (1000, (False, 1), (False, 1), (False, MAX_RUNS), (True, 1)),
    ],
)
def test_policies(
    steps: int,
    plain: tuple[bool, int],
    hold: tuple[bool, int],
    resample: tuple[bool, int],
    reset: tuple[bool, int],
) -> None:
    want = {"plain": plain, "hold": hold, "resample": resample, "reset": reset}
    for policy, expected in want.items():
        step = stepping(policy, Advance("continue", steps))  # type: ignore[arg-type]
        assert (step.reset, step.runs) == expected, policy
        assert stepping(policy, Advance("reset", 1, "why")) == Stepping(True, (1.0,))  # type: ignore[arg-type]


@given(st.integers(1, 100), st.integers(1, 20))
def test_resampled_moments_are_even_and_end_at_the_frame(steps: int, most: int) -> None:
    at = stepping("resample", Advance("continue", steps), most).at
    assert len(at) == min(steps, most)
    assert at[-1] == 1.0
    np.testing.assert_allclose(np.diff([0.0, *at]), 1 / len(at))


def test_policies_are_checked() -> None:
    with pytest.raises(UsageError, match="policy 'skip': unknown, expected plain, hold, resample or reset"):
        stepping("skip", Advance("continue", 1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_runs 0"):
        stepping("resample", Advance("continue", 1), 0)


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "value"),
    [
        (spec(initial=0.25), 0.25),
        (spec(DType.float16, initial=-2.0), -2.0),
        (spec(DType.int8, PER_TENSOR), -7),
        (spec(DType.int8, PER_TENSOR, initial=1.0), 13),
        (spec(DType.int8, PER_TENSOR, initial=100.0), 127),
        (spec(DType.float32, PER_TENSOR, initial=1.0), 1.0),
        (spec(DType.int32, initial=-3.0), -3),
        (spec(DType.bool, initial=1.0), True),
    ],
)
def test_initial_values(state: StateSpec, value: float) -> None:
    array = initial_value(state)
    assert (array.dtype, array.shape) == (state.dtype.value, state.shape)
    assert array.flags.c_contiguous
    assert (array == value).all()


def test_initial_values_are_quantized_along_the_axis() -> None:
    array = initial_value(spec(DType.int8, PER_CHANNEL, initial=1.0))
    np.testing.assert_array_equal(array[0, :, 0], [20, 13, -123])


@pytest.mark.parametrize(
    "state",
    [
        spec(DType.int32, initial=0.5),
        spec(DType.uint8, initial=-1.0),
        spec(DType.int8, initial=128.0),
        spec(DType.bool, initial=2.0),
        spec(DType.float16, initial=70000.0),
        spec(DType.float32, initial=float("nan")),
        spec(DType.int8, PER_TENSOR, initial=float("inf")),
    ],
)
def test_initial_values_that_the_type_does_not_have(state: StateSpec) -> None:
    with pytest.raises(BundleError, match=r"state s: initial value .* is not one of"):
        initial_value(state)


@given(st.sampled_from([PER_TENSOR, PER_CHANNEL, UNSIGNED]), st.integers(0, 2**32 - 1))
def test_codes_become_reals_and_back_without_a_change(params: QuantParams, seed: int) -> None:
    codes, reals = spec(params.dtype, params), spec()
    limits = np.iinfo(params.dtype.value)
    rng = np.random.default_rng(seed)
    value = rng.integers(limits.min, limits.max, codes.shape, params.dtype.value, endpoint=True)
    real = convert(value, codes, reals)
    shape = (1, -1, 1)
    scale, zero = (np.reshape(np.float64(v), shape) for v in (params.scale, params.zero_point))
    np.testing.assert_array_equal(real, ((value.astype(np.float64) - zero) * scale).astype(np.float32))
    np.testing.assert_array_equal(convert(real, reals, codes), value)


@given(st.sampled_from([PER_TENSOR, PER_CHANNEL, UNSIGNED]), st.integers(0, 2**32 - 1))
def test_reals_become_the_nearest_code(params: QuantParams, seed: int) -> None:
    codes, reals = spec(params.dtype, params), spec()
    value = np.random.default_rng(seed).normal(0, 3, reals.shape).astype(np.float32)
    got = convert(convert(value, reals, codes), codes, reals)
    limits = np.iinfo(params.dtype.value)
    scale, zero = (np.reshape(np.float64(v), (1, -1, 1)) for v in (params.scale, params.zero_point))
    near = np.clip(value, (limits.min - zero) * scale, (limits.max - zero) * scale)
    assert (np.abs(got - near) <= scale / 2 * (1 + 1e-5) + 1e-6).all()


def test_between_two_scales_the_real_value_stays() -> None:
    value = np.full((1, 3, 4), 13, np.int8)  # 1.0
    got = convert(value, spec(DType.int8, PER_TENSOR), spec(DType.int8, PER_CHANNEL))
    np.testing.assert_array_equal(got[0, :, 0], [20, 13, -123])


def test_what_is_held_alike_is_copied_bit_for_bit() -> None:
    value = np.array([np.nan, np.inf, -0.0, 1e-45] * 3, np.float32).reshape(1, 3, 4)
    got = convert(value, spec(), spec(quant=PER_TENSOR))
    assert got.tobytes() == value.tobytes()
    assert not np.shares_memory(got, value)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (spec(), spec(shape=(1, 3, 5)), r"shape differs, expected \(1, 3, 5\)"),
        (spec(DType.int8), spec(), "int8 cannot become float32, as the int8 side states no scale"),
        (spec(), spec(DType.int8), "as the int8 side states no scale. Reset"),
        (spec(DType.int8, PER_TENSOR), spec(DType.int8), "states no scale"),
        (spec(DType.float16), spec(), "element type differs, expected float16, got float32"),
    ],
)
def test_what_cannot_be_converted(source: StateSpec, target: StateSpec, message: str) -> None:
    value = np.zeros(source.shape, np.float32 if source.dtype == DType.float16 else source.dtype.value)
    with pytest.raises(UsageError, match=message):
        convert(value, source, target)


def test_a_hot_swap_keeps_what_fits_and_says_what_does_not() -> None:
    def named(name: str, state: StateSpec) -> StateSpec:
        return StateSpec(name, state.dtype, state.shape, name, name, state.initial, quant=state.quant)

    source = [named("a", spec()), named("b", spec())]
    target = [
        named("a", spec(DType.int8, PER_TENSOR)),
        named("b", spec(shape=(1, 6, 4), initial=0.5)),
        named("c", spec()),
    ]
    snapshot = {name: np.ones((1, 3, 4), np.float32) for name in "ab"}
    carried = carry_over(snapshot, source, target)
    assert carried.kept == ("a",)
    assert set(carried.reset) == {"b", "c"}
    assert "shape differs" in carried.reset["b"]
    assert "not in the snapshot" in carried.reset["c"]
    assert (carried.values["a"] == 13).all()
    assert (carried.values["b"] == 0.5).all()
    assert (carried.values["c"] == 0).all()
