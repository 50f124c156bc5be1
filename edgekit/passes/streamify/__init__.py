"""A clip model becomes a one-frame model: one frame in, one answer out, what it remembers in states.

    clip [T, 3, H, W]  -> logits [T, K]            one run for T frames
    image [1, 3, H, W], state_i -> logits [1, K], state_i_next        one run a frame, nothing computed twice

A temporal shift (TSM, Lin et al. 2019) puts some channels of the frame before in place of a frame's own.
For one frame at a time those channels of the frame before are a state:

    branch input = Concat(state, x[f:])      state_next = x[:f]

No form of writing the shift is expected: regions of the graph that only move data are followed element
by element (trace.py), and what is a shift in time with a constant edge becomes a state, whatever operators
an exporter wrote it with. A convolution over time, padded at the start alone, keeps the frames before as
its state. A mean over time goes: frames have outputs, and their mean is the clip's. Every other operator
must keep frames apart, or is refused by name (rules.py). The result is checked against the clip model.

Sources: TSM section 4.2 (online model, zeros before the first frame); docs/streamify.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.errors import ModelError, UsageError
from edgekit.passes import PassError, fold_constants, remove_identity
from edgekit.passes.graph import clean, infer, listed, shape
from edgekit.passes.states import KEY, set_states, states
from edgekit.passes.streamify.convert import Converter
from edgekit.passes.streamify.verify import differences, random_clip, stream
from edgekit.passes.streamify.writer import Shift
from edgekit.schema import printable
from edgekit.spec import StateSpec

__all__ = [
    "KEY",
    "TOLERANCE",
    "Shift",
    "Streamified",
    "random_clip",
    "set_states",
    "states",
    "stream",
    "streamify",
    "verify",
]

TOLERANCE = 1e-5
"""Largest difference of an output, clip against stream, as a fraction of its largest magnitude (at least 1)."""


@dataclass(frozen=True)
class Streamified:
    """A one-frame model. `states` and `shifts` in the order of the graph; `frames`: T of the clip model, along
    `axis` of its input; `outputs`: axis of the frames in each output of the clip model, None where the clip
    model takes their mean. `exact`: it computes what the clip model does; False where a fold from the future was
    changed. `difference`: of the check against the clip model (TOLERANCE's unit); with `exact` False it
    says how far the change moves the outputs on noise, nothing about accuracy."""

    model: ir.Model
    states: tuple[StateSpec, ...]
    shifts: tuple[Shift, ...]
    frames: int
    axis: int
    outputs: Mapping[str, int | None]
    exact: bool
    difference: float
    notes: tuple[str, ...] = ()


def streamify(
    model: ir.Model,
    *,
    frames: int | None = None,
    allow_bidirectional: bool = False,
    nominal_dt_s: float | None = None,
) -> Streamified:
    """The one-frame form of the clip model `model`, which stays as it is.

    frames: T, needed where the first axis of the input does not say it ([1, C, T]); checked if given.
    allow_bidirectional: a fold from the future takes the present frame; without it, ModelError.
    nominal_dt_s: seconds between the frames that the network was trained on, for the states.
    Raises: ModelError: operators that mix frames in other ways (all in one line), bi-directional shifts,
    an input that is no clip; PassError when the result does not equal the clip model; UsageError.
    """
    if nominal_dt_s is not None and not (math.isfinite(nominal_dt_s) and nominal_dt_s > 0):
        raise UsageError(
            f"nominal_dt_s: expected positive seconds, got {nominal_dt_s}. Give the trained step."
        )
    clip, model = model, model.clone()
    fold_constants.run(model)
    remove_identity.run(model)
    axis, count = _clip_axis(model, frames)
    work = Converter(model, axis, count, allow_bidirectional, nominal_dt_s)
    made = work.run()
    clean(made)
    infer(made)
    fold_constants.run(made)
    remove_identity.run(made)
    made.metadata_props.update(model.metadata_props)
    set_states(made, work.states)
    exact = not work.both_ways
    result = Streamified(
        made,
        states(made),
        tuple(work.shifts),
        count,
        axis,
        work.outputs,
        exact,
        0.0,
        tuple(_notes(work)),
    )
    return _checked(clip, result)


def verify(clip: ir.Model, made: Streamified, feeds: Mapping[str, np.ndarray] | None = None) -> float:
    """Largest difference of an output, in TOLERANCE's unit: the clip model's rows against the frames' outputs.

    feeds: {input name: clip}; None takes seeded noise. Frame t is computed from frames up to t alone.
    Raises: PassError where an exact conversion differs by more than TOLERANCE; ModelError.
    """
    found = differences(clip, made, feeds)
    name, worst = max(found.items(), key=lambda item: item[1])
    if made.exact and not worst <= TOLERANCE:
        raise PassError(
            f"pass streamify: output '{printable(name)}' of the one-frame model differs from the clip model's by "
            f"{worst:.2e} of its range, expected at most {TOLERANCE:.0e}. Report it with the model."
        )
    return worst


def _checked(clip: ir.Model, made: Streamified) -> Streamified:
    import onnx.checker

    try:
        onnx.checker.check_model(ir.serde.serialize_model(made.model), full_check=True)
    except Exception as error:  # noqa: BLE001 - the checker raises several kinds; all mean a broken graph
        text = " ".join(str(error).split())[:200]
        raise PassError(f"pass streamify: left an invalid graph: {text}. Report it with the model.") from None
    return dataclasses.replace(made, difference=verify(clip, made))


def _clip_axis(model: ir.Model, frames: int | None) -> tuple[int, int]:
    """(axis of the frames in the one input, T)"""
    inputs = model.graph.inputs
    sizes = shape(inputs[0]) if len(inputs) == 1 else None
    if sizes is None or not sizes:
        raise ModelError(
            f"model: expected one input, a clip [T, 3, H, W] of static shape, got {listed(inputs)}. Export a clip model."
        )
    axis = 0
    if sizes[0] == 1 and frames != 1:
        fitting = [i for i, s in enumerate(sizes) if i and s == frames]
        if len(sizes) == 5 and frames in (None, sizes[1]):
            axis = 1
        elif len(fitting) == 1:
            axis = fitting[0]
    count = sizes[axis]
    if count < 2 or frames not in (None, count):
        wanted = "at least 2 frames" if frames is None else f"{frames} frames"
        raise ModelError(
            f"model: expected a clip of {wanted} along the first axis, got {listed(inputs)}. "
            "Export it with a clip [T, 3, H, W], give its frames, or all sizes where it leaves them open (--shape)."
        )
    return axis, count


def _notes(work: Converter) -> list[str]:
    notes = []
    if work.both_ways:
        count = sum(s.future for s in work.both_ways)
        notes.append(
            f"{len(work.both_ways)} bi-directional shifts: {count} channels came from the frame after and now take "
            "the present one; the network was not trained for that, measure the drop"
        )
    averaged = sorted(name for name, axis in work.outputs.items() if axis is None)
    if averaged:
        names = ", ".join(printable(n) for n in averaged)
        notes.append(f"the mean over frames was taken off {names}: outputs are those of one frame")
    return notes
