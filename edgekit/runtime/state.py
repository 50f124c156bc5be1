"""Recurrent state: its values, and what moves them between payloads. When it ends: edgekit.timebase.

Everything here is a pure rule on arrays; `session` applies it to a loaded plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgekit.errors import BundleError, UsageError
from edgekit.manifest import KernelStep, Manifest, Segment
from edgekit.spec import DType, QuantParams, StateSpec

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
