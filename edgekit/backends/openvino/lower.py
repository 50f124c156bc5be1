"""Toolchain half: the Q/DQ file of ONNX Runtime on the same CPU, with the codes inside activations left out.

Both libraries read unsigned activations and signed weights per channel. ONNX Runtime needs codes before and
after every operator. OpenVINO computes an activation inside the convolution in front of it, on the sums and
in float32; codes between the two make it write and read once more. Without them YOLOv8n and YOLOX-nano
ran 1.2 and 1.7 times as fast, and nearer to the float network (docs/peers.md).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from edgekit.backends.base import Payload
from edgekit.backends.onnxruntime import lower as onnxruntime
from edgekit.errors import UsageError
from edgekit.quant.annotate import quant, set_quant
from edgekit.target import Target

PRECISIONS = ("float32", "int8")
"""float16 weights would be widened when the model is compiled: nothing is gained over ONNX Runtime's file."""

ARCHITECTURE = "x86_64"

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FUSED = ("Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Elu", "Gelu", "Mish")
"""Activations of one operator that OpenVINO's CPU plugin computes inside a convolution; SiLU is Sigmoid and Mul."""


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
    if precision == "int8":
        model = model.clone()
        free_activations(model)
    payloads = onnxruntime.lower(model, target, precision)
    return tuple(dataclasses.replace(payload, backend="openvino") for payload in payloads)


def free_activations(model: ir.Model) -> int:
    """Take the codes off what lies between a weighted operator and the output of its activation, in place.

    That is where a quantized product feeds nothing but the activation, and the activation's result has codes.
    Returns: how many activations.
    """
    freed = 0
    for node in model.graph:
        if node.op_type not in _PRODUCTS or quant(node.inputs[0]) is None:
            continue
        inside = _inside(node.outputs[0])
        if inside:
            freed += 1
            for value in inside:
                set_quant(value, None)
    return freed


def _inside(value: ir.Value) -> tuple[ir.Value, ...]:
    """The values that an activation on `value` keeps to itself, `value` first; () if there is none."""
    users = tuple(user for user, _ in value.uses())
    if value.is_graph_output() or quant(value) is None or not users:
        return ()
    if len(users) == 1 and users[0].op_type in _FUSED and quant(users[0].outputs[0]) is not None:
        return (value,)
    gates = [user for user in users if user.op_type == "Sigmoid"]
    products = [user for user in users if user.op_type == "Mul"]
    if len(users) != 2 or not gates or not products:
        return ()
    gate, product = gates[0].outputs[0], products[0]
    if set(product.inputs) != {value, gate} or len(gate.uses()) != 1 or gate.is_graph_output():
        return ()
    return (value, gate) if quant(product.outputs[0]) is not None else ()
