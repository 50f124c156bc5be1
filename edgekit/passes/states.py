"""What travels with a one-frame model: which outputs are the next value of which inputs.

`metadata_props["edgekit.states"]` holds a JSON list, one entry a state:
{"name", "input", "output", "initial", "nominal_dt_s"}; shapes and types are those of the graph.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import onnx_ir as ir

from edgekit.errors import ModelError
from edgekit.manifest import NAME
from edgekit.passes.graph import listed, shape
from edgekit.schema import SchemaError, parse_json, printable
from edgekit.spec import DType, StateSpec, is_duration

KEY = "edgekit.states"
_FIELDS = {"name", "input", "output", "initial", "nominal_dt_s"}


def states(model: ir.Model) -> tuple[StateSpec, ...]:
    """The recurrent tensors of a one-frame model, in order; () for a model without any.

    Raises: ModelError for entries that do not fit the graph.
    """
    text = model.metadata_props.get(KEY)
    if text is None:
        return ()
    try:
        entries = parse_json(text.encode(), "text")
    except SchemaError as error:
        raise _fault(str(error)) from None
    if not isinstance(entries, list):
        raise _fault(f"expected a list, got {type(entries).__name__}")
    inputs = {v.name: v for v in model.graph.inputs}
    outputs = {v.name: v for v in model.graph.outputs}
    found: list[StateSpec] = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"name", "input", "output"} <= set(entry) <= _FIELDS:
            raise _fault(
                f"expected entries with {', '.join(sorted(_FIELDS))}, got {printable(str(entry))[:80]}"
            )
        name, source, target = (entry[k] for k in ("name", "input", "output"))
        initial, step = entry.get("initial", 0.0), entry.get("nominal_dt_s")
        if not all(isinstance(v, str) for v in (name, source, target)):
            raise _fault("names must be text")
        if not NAME.fullmatch(name):
            raise _fault(
                f"state '{printable(name)[:80]}': expected a name of 1 to 80 letters, digits, '.', '_' or '-'"
            )
        if not _finite(initial) or not (step is None or (_finite(step) and is_duration(step))):
            raise _fault(
                f"state '{printable(name)}': initial must be finite and nominal_dt_s positive or null"
            )
        before, after = inputs.get(source), outputs.get(target)
        if before is None or after is None or source == target:
            raise _fault(
                f"state '{printable(name)}': the graph has no pair of an input '{printable(source)}' and an output '{printable(target)}'"
            )
        sizes = shape(before)
        if sizes is None or sizes != shape(after) or before.dtype is None or before.dtype != after.dtype:
            raise _fault(
                f"state '{printable(name)}': input and output differ: {before.shape} and {after.shape}"
            )
        try:
            kind = DType(before.dtype.numpy().name)
        except (TypeError, ValueError):
            raise _fault(f"state '{printable(name)}': cannot be of type {before.dtype.name}") from None
        found.append(StateSpec(name, kind, sizes, source, target, float(initial), step))
    for what in ("name", "input", "output"):
        used = [getattr(s, what) for s in found]
        if len(set(used)) != len(used):
            raise _fault(f"two states share one {what}")
    return tuple(found)


def picture(model: ir.Model) -> ir.Value:
    """The one input that is no state. Raises: ModelError."""
    held = {s.input for s in states(model)}
    found = [v for v in model.graph.inputs if v.name not in held]
    if len(found) != 1:
        wanted, step = "expected one picture input [1, C, H, W]", "Export it with batch 1."
        if KEY in model.metadata_props:
            wanted, step = f"{wanted} beside its {len(held)} states", f"Name all of them in {KEY}."
        raise ModelError(f"model: {wanted}, got {listed(found)}. {step}")
    return found[0]


def answer_values(model: ir.Model) -> list[ir.Value]:
    """The outputs that are no state's next value, in order."""
    inner = {s.output for s in states(model)}
    return [v for v in model.graph.outputs if v.name not in inner]


def answers(model: ir.Model) -> list[str]:
    """Their names."""
    return [str(v.name) for v in answer_values(model)]


def set_states(model: ir.Model, found: Sequence[StateSpec]) -> None:
    """Write the entries that `states` reads. In place."""
    model.metadata_props[KEY] = json.dumps(
        [
            {
                "name": s.name,
                "input": s.input,
                "output": s.output,
                "initial": s.initial,
                "nominal_dt_s": s.nominal_dt_s,
            }
            for s in found
        ]
    )


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fault(problem: str) -> ModelError:
    return ModelError(f"model: its states ({KEY}): {problem}. Make the model with streamify again.")
