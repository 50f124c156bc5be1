"""Toolchain half: the ONNX file that OpenVINO runs is the one made for ONNX Runtime on the same CPU.

Both read Q/DQ with unsigned activations and signed weights per channel, and OpenVINO is fastest on the
placement that suits ONNX Runtime there (docs/peers.md), so there is one file and one proof of it.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from edgekit.backends.base import Payload
from edgekit.backends.onnxruntime import lower as onnxruntime
from edgekit.errors import UsageError
from edgekit.target import Target

PRECISIONS = ("float32", "int8")
"""float16 weights would be widened when the model is compiled: nothing is gained over ONNX Runtime's file."""

ARCHITECTURE = "x86_64"


def lower(model: ir.Model, target: Target, precision: str) -> tuple[Payload, ...]:
    """One ONNX payload. Raises: UsageError for a precision this backend is not given, or a target that
    is no x86 machine; what ONNX Runtime's lowering raises."""
    if target.arch != ARCHITECTURE:
        raise UsageError(
            f"target {target.name}: OpenVINO payloads are for {ARCHITECTURE}, got {target.arch}. "
            "Choose onnxruntime for it"
        )
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision}: openvino payloads are built in {' or '.join(PRECISIONS)}. "
            f"Choose one of these for {target.name}"
        )
    payloads = onnxruntime.lower(model, target, precision)
    return tuple(dataclasses.replace(payload, backend="openvino") for payload in payloads)
