"""Recurrent states of a build: from the graph's contract to how payloads hold them and what the manifest says.

The graph's states are float32 and named (passes.states); every payload keeps the names. One of them may hold
a state as codes, another as floats: the manifest gives the reals, and the scale where any of them has codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from edgekit.backends.base import Payload
from edgekit.errors import LoweringError
from edgekit.manifest import Golden, Manifest, Segment
from edgekit.runtime.state import same_codes
from edgekit.spec import DType, QuantParams, StateSpec, TensorSpec

RESET_STEPS = 5
"""Nominal steps without a frame after which state ends, where the project says nothing."""

FLOATS = (DType.float32, DType.float16, DType.bfloat16)


def timed(
    states: Sequence[StateSpec], dt_s: float | None, reset_after_s: float | None
) -> tuple[StateSpec, ...]:
    """`states` with their time: `dt_s` over what the graph says, state ends after `reset_after_s`, by default
    RESET_STEPS nominal steps. Without any step, every frame is one and no gap is too long."""
    found = []
    for state in states:
        step = dt_s if dt_s is not None else state.nominal_dt_s
        limit = reset_after_s
        if limit is None and step is not None:
            limit = RESET_STEPS * step
        found.append(dataclasses.replace(state, nominal_dt_s=step, reset_after_s=limit))
    return tuple(found)


def held(states: Sequence[StateSpec], payload: Payload) -> tuple[StateSpec, ...]:
    """`states` as `payload` holds them: floats of its type, or float32 with the scale of its codes.

    Raises: LoweringError when the payload lacks one, or reads and writes it differently.
    """
    inputs = {tensor.name: tensor for tensor in payload.inputs}
    outputs = {tensor.name: tensor for tensor in payload.outputs}
    found = []
    for state in states:
        before, after = inputs.get(state.input), outputs.get(state.output)
        if before is None or after is None or not _alike(before, after, state):
            raise LoweringError(
                f"payload {payload.backend} {payload.precision}: state {state.name}: expected an input "
                f"{state.input} and an output {state.output} of {list(state.shape)}, of one type and scale, got "
                f"{_shown(before)} and {_shown(after)}. Report it with the model"
            )
        quant = None if before.dtype in FLOATS else before.quant
        dtype = before.dtype if quant is None else DType.float32
        found.append(dataclasses.replace(state, dtype=dtype, quant=quant))
    return tuple(found)


def agreed(states: Sequence[StateSpec], payloads: Sequence[Payload]) -> tuple[StateSpec, ...]:
    """What the manifest says of `states`: as the first payload holds them, with the scale of the first that has
    codes. Raises: LoweringError as `held`, and where two payloads do not fit (`misfit`)."""
    problem = next((why for i, p in enumerate(payloads) if (why := misfit(states, payloads[:i], p))), "")
    if problem:
        raise LoweringError(problem)
    rows = [held(states, payload) for payload in payloads]
    found = []
    for i, state in enumerate(rows[0]):
        quant = next((row[i].quant for row in rows if row[i].quant is not None), None)
        found.append(dataclasses.replace(state, quant=quant))
    return tuple(found)


def misfit(states: Sequence[StateSpec], others: Sequence[Payload], payload: Payload) -> str:
    """Why `payload` cannot stand in one bundle beside `others`, "" if it can: a state's codes must mean the same
    in all of them, and its floats have one type."""
    for state, *known in zip(held(states, payload), *(held(states, other) for other in others), strict=True):
        for other in known:
            both = state.quant is not None and other.quant is not None
            if both and not same_codes(_params(state), _params(other)):
                return (
                    f"payload {payload.backend} {payload.precision}: state {state.name} has another scale than in "
                    f"the payloads before it: {_params(state).scale[0]:.6g}, expected {_params(other).scale[0]:.6g}"
                )
            if not both and state.dtype != other.dtype:
                return (
                    f"payload {payload.backend} {payload.precision}: state {state.name} is {state.dtype.value}, "
                    f"expected {other.dtype.value} as in the payloads before it"
                )
    return ""


def tensors(payload: Payload, states: Sequence[StateSpec]) -> tuple[TensorSpec, ...]:
    """The named tensors of a manifest: those of `payload`, states as `states` says."""
    types = {name: state for state in states for name in (state.input, state.output)}
    return tuple(
        dataclasses.replace(tensor, dtype=types[tensor.name].dtype, quant=None)
        if tensor.name in types
        else tensor
        for tensor in (*payload.inputs, *payload.outputs)
    )


def ports(payload: Payload, states: Sequence[StateSpec]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the inputs and of the outputs that are no states."""
    inside = {name for state in states for name in (state.input, state.output)}
    inputs, outputs = (
        tuple(tensor.name for tensor in side if tensor.name not in inside)
        for side in (payload.inputs, payload.outputs)
    )
    return inputs, outputs


def plan(payload: Payload, states: Sequence[StateSpec], name: str) -> Manifest:
    """A manifest of this one payload, to open a session on; nothing in it is meant to be written."""
    inputs, outputs = ports(payload, states)
    segment = Segment(name, tuple(t.name for t in payload.inputs), tuple(t.name for t in payload.outputs), ())
    return Manifest(
        schema_version=0,
        model="",
        task="",
        target="",
        inputs=inputs,
        outputs=outputs,
        tensors=tensors(payload, states),
        plan=(segment,),
        pipeline={},
        payload_digest="",
        golden=Golden((), ()),
        files={},
        provenance={},
        states=tuple(states),
    )


def _alike(before: TensorSpec, after: TensorSpec, state: StateSpec) -> bool:
    if not before.shape == after.shape == state.shape or before.dtype != after.dtype:
        return False
    if before.dtype in FLOATS:
        return True
    return before.quant is not None and after.quant is not None and same_codes(before.quant, after.quant)


def _params(state: StateSpec) -> QuantParams:
    assert state.quant is not None, "asked for codes only"
    return state.quant


def _shown(tensor: TensorSpec | None) -> str:
    if tensor is None:
        return "none"
    scale = "" if tensor.quant is None else f" by {tensor.quant.scale[0]:.6g}"
    return f"{tensor.dtype.value} {list(tensor.shape)}{scale}"
