"""Leaves only what decides the result: the file becomes little more than its weights.

Short names in graph order (inputs and outputs of the graph keep theirs), no node names, no doc
strings, no metadata (but which outputs are states), no shapes of inner tensors, no attributes equal to their default, equal
constants stored once. Exact, and the same graph gives the same bytes.
`edgekit.passes.graph.infer` brings the shapes back.
"""

from __future__ import annotations

import string
from collections.abc import Iterator

import onnx
import onnx.defs
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgekit.passes.graph import clean, shape
from edgekit.passes.states import KEY as STATES

TOLERANCE = 0.0

_FIRST = string.ascii_letters
_REST = string.ascii_letters + string.digits
_WINDOWED = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"}


def run(model: ir.Model) -> int:
    """In place. Returns the number of dropped attributes and renamed values."""
    graph = model.graph
    common.DeduplicateInitializersPass()(model)
    clean(model)
    count = sum(_drop_defaults(node, graph.opset_imports.get("", 0)) for node in graph)
    model.producer_name = model.producer_version = model.domain = model.doc_string = None
    model.model_version = None
    for key in [k for k in model.metadata_props if k != STATES]:
        del model.metadata_props[key]
    graph.name, graph.doc_string = "g", None
    graph.metadata_props.clear()
    kept = {*graph.inputs, *graph.outputs}
    taken = {v.name for v in kept}
    names = (name for name in _names() if name not in taken)
    inner = []
    for node in graph:
        node.name, node.doc_string = None, None
        node.metadata_props.clear()
        for value in (*node.inputs, *node.outputs):
            if value is not None and value not in kept:
                kept.add(value)
                inner.append(value)
    weights = [v for v in inner if v.is_initializer()]
    for value in weights:
        tensor = value.const_value
        assert value.name is not None and tensor is not None
        del graph.initializers[value.name]
        # renaming a value renames its tensor, which clones of the model share
        value.const_value = ir.tensor(tensor.numpy())
    # two rounds: an old name may be another value's new one
    for value in inner:
        value.name = None
    for value in inner:
        value.name = next(names)
        value.metadata_props.clear()
        value.doc_string = None
        value.shape, value.type = None, None  # of weights too: the tensors themselves state both
    for value in weights:
        graph.register_initializer(value)
    return count + len(inner)


def _names() -> Iterator[str]:
    """a, b, ... Z, aa, ab, ...: letters first, as ONNX asks for C identifiers."""
    level = list(_FIRST)
    while True:
        yield from level
        level = [head + tail for head in level for tail in _REST]


def _drop_defaults(node: ir.Node, opset: int) -> int:
    """Remove attributes that say what the operator does anyway."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return 0
    dropped = 0
    for name, attribute in list(node.attributes.items()):
        known = schema.attributes.get(name)
        default = known.default_value if known is not None else None
        same = (
            default is not None
            and default.name == name
            and ir.serde.deserialize_attribute(default).value == attribute.value
        )
        if same or _is_implied(node, name, attribute):
            del node.attributes[name]
            dropped += 1
    return dropped


def _is_implied(node: ir.Node, name: str, attribute: ir.Attr) -> bool:
    """Defaults that the operator's text states but its schema does not."""
    if node.op_type not in _WINDOWED:
        return False
    if name in ("strides", "dilations"):
        return set(attribute.as_ints()) == {1}
    if name in ("pads", "output_padding"):
        return set(attribute.as_ints()) == {0}
    if name == "kernel_shape" and node.op_type in ("Conv", "ConvTranspose"):
        weight = shape(node.inputs[1])
        return weight is not None and tuple(attribute.as_ints()) == weight[2:]
    return False
