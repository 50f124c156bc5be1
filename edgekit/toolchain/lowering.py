"""Lowering, as builds ask for it."""

from __future__ import annotations

import onnx_ir as ir

from edgekit.backends.base import Payload, half
from edgekit.target import Target


def lowered(model: ir.Model, backend: str, target: Target, precision: str) -> Payload:
    """The payload of a network, as a backend makes it. Raises: LoweringError."""
    payload: Payload
    (payload,) = half(backend, "lower").lower(model, target, precision)
    return payload


def of_pictures(model: ir.Model, backend: str, target: Target, precision: str) -> Payload:
    """The same of a network whose one input beside states is filled by a pipeline: edgekit's own engine takes the picture
    as codes. Raises: LoweringError."""
    if backend != "native":
        return lowered(model, backend, target, precision)
    from edgekit.backends.native.lower import lower

    (payload,) = lower(model, target, precision, pictures=True)
    return payload
