"""Toolchain half: an ONNX file for ONNX Runtime's CPU provider.

float32: the graph as it is. float16: weights stored in half precision and widened by a Cast that
ONNX Runtime folds when it loads the file: half the bytes, float32 arithmetic. int8: the annotated
graph in Q/DQ form, activations uint8 on x86 and int8 on ARM; states are codes, pictures of them channels last, as
the integer kernels have them: what joins and splits them then moves codes, and nothing is transposed.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgekit.backends.base import TO_FIRST, TO_LAST, Payload, Ports
from edgekit.backends.onnxruntime.wire import align_weights
from edgekit.errors import LoweringError, UsageError
from edgekit.passes import compact
from edgekit.passes.graph import shape
from edgekit.quant import qdq
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.rules import rules_for
from edgekit.spec import DType, TensorSpec
from edgekit.target import Target

PRECISIONS = ("float32", "float16", "int8")
MIN_HALF_ELEMENTS = 64
"""Smaller initialisers (biases of a few channels, shapes, scales) are not worth a Cast node."""
HALF_MAX = float(np.finfo(np.float16).max)


def lower(model: ir.Model, target: Target, precision: str) -> tuple[Payload, ...]:
    """One ONNX payload. int8 takes a model annotated by `quant.placement.place`.

    Raises: UsageError for a precision this backend cannot store, and for int8 without annotations;
    LoweringError when a weight does not fit in float16.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision}: onnxruntime payloads are built in {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}. "
            f"Choose one of these for {target.name}"
        )
    turned: list[str] = []
    if precision == "int8":
        model = qdq.lowered(model, rules_for("onnxruntime", target), target.name)
        turned = _turn_codes(model)
    else:
        model = model.clone()
    if precision == "float16":
        _halve_weights(model)
    compact.run(model)
    sides = model.graph.inputs, model.graph.outputs
    codes = {str(v.name): params for side in sides for v in side if (params := quant(v)) is not None}
    ports = Ports(frozenset(turned), codes)
    inputs, outputs = (tuple(ports.shown(tensor_spec(value)) for value in side) for side in sides)
    data = ir.to_proto(model).SerializeToString(deterministic=True)
    options = ports.to_options()
    return (Payload("onnxruntime", precision, "onnx", align_weights(data), inputs, outputs, options),)


def _turn_codes(model: ir.Model) -> list[str]:
    """Inputs and outputs that are pictures of codes become [N, H, W, C], in place. Returns: their names."""
    graph = model.graph
    turned = []
    for side in (graph.inputs, graph.outputs):
        for i, value in enumerate(side):
            sizes = shape(value)
            if quant(value) is None or sizes is None or len(sizes) != 4:
                continue
            outer = ir.Value(
                name=value.name, shape=ir.Shape([sizes[axis] for axis in TO_LAST]), type=value.type
            )
            set_quant(outer, quant(value))
            set_quant(value, None)
            turned.append(str(value.name))
            value.name = f"{value.name}.first"
            if side is graph.inputs:
                node = ir.node("Transpose", [outer], {"perm": TO_FIRST})
                made = node.outputs[0]
                made.shape, made.type = value.shape, value.type
                side[i] = outer
                value.replace_all_uses_with(made)
                graph.insert_before(graph[0], node)
            else:
                node = ir.node("Transpose", [value], {"perm": TO_LAST}, outputs=[outer])
                side[i] = outer
                graph.append(node)
    return turned


def _halve_weights(model: ir.Model) -> None:
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if (
            tensor is None
            or tensor.dtype != ir.DataType.FLOAT
            or math.prod(tensor.shape.numpy()) < MIN_HALF_ELEMENTS
        ):
            continue
        array = tensor.numpy()
        if float(np.abs(array).max()) > HALF_MAX:
            raise LoweringError(
                f"initialiser {value.name}: {np.abs(array).max():.3g} does not fit in float16 "
                f"(at most {HALF_MAX:.0f}). Build with --precision float32"
            )
        half = ir.Value(
            name=f"{value.name}.half",
            type=ir.TensorType(ir.DataType.FLOAT16),
            shape=value.shape,
            const_value=ir.tensor(array.astype(np.float16), name=f"{value.name}.half"),
        )
        cast = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)})
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[str(value.name)]
        graph.register_initializer(half)
        graph.insert_before(graph[0], cast)


def tensor_spec(value: ir.Value) -> TensorSpec:
    """TensorSpec of a graph input or output of a Q/DQ file, with static shape."""
    assert value.name is not None and value.shape is not None and value.dtype is not None
    sizes = tuple(int(d) for d in value.shape.numpy())
    layout = "NCHW" if len(sizes) == 4 else ""
    return TensorSpec(value.name, DType(value.dtype.numpy().name), sizes, layout)
