"""Writes a graph in few bytes: what the device does not need is left out, nothing computed changes."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_LETTERS = string.ascii_letters + string.digits


def compact_bytes(model: ir.Model) -> bytes:
    """`model` as a compact ONNX file; equal models give equal bytes.

    Inner values get short names, nodes none; documentation, value types and attributes equal to their
    default go. Names, types and shapes of graph inputs and outputs stay.
    """
    import onnx
    import onnx_ir as ir

    source = ir.to_proto(model)
    proto = onnx.ModelProto()
    # 8 is the last version before local functions and overloads, which no payload holds
    proto.ir_version = min(source.ir_version or 8, 8)
    opset = next(o.version for o in source.opset_import if o.domain in ("", "ai.onnx"))
    proto.opset_import.add().version = opset
    graph, old = proto.graph, source.graph
    graph.name = "g"
    kept = {v.name for v in (*old.input, *old.output)}
    names = _Names(kept)
    for ours, theirs in ((graph.input, old.input), (graph.output, old.output)):
        for info in theirs:
            made = ours.add()
            made.name = info.name
            made.type.CopyFrom(info.type)
    _initializers(old, graph, names)
    for node in old.node:
        made = graph.node.add()
        made.op_type = node.op_type
        if node.domain not in ("", "ai.onnx"):
            made.domain = node.domain
        made.input.extend(names[n] for n in node.input)
        made.output.extend(names[n] for n in node.output)
        made.attribute.extend(a for a in node.attribute if not _is_default(node, a, opset))
    for domain in sorted({n.domain for n in graph.node} - {""}):
        entry = proto.opset_import.add()
        entry.domain, entry.version = domain, model.opset_imports.get(domain, 1)
    return bytes(proto.SerializeToString(deterministic=True))


class _Names:
    """Short names in order of first use; reserved ones stay as they are, "" is an absent operand."""

    def __init__(self, reserved: set[str]) -> None:
        self._short = {name: name for name in reserved | {""}}
        self._fresh = self._count(reserved)

    @staticmethod
    def _count(reserved: set[str]) -> Iterator[str]:
        for length in itertools.count(1):
            for letters in itertools.product(_LETTERS, repeat=length):
                if (name := "".join(letters)) not in reserved:
                    yield name

    def __getitem__(self, name: str) -> str:
        if name not in self._short:
            self._short[name] = next(self._fresh)
        return self._short[name]


def _initializers(old: onnx.GraphProto, graph: onnx.GraphProto, names: _Names) -> None:
    """Copies initialisers as raw bytes; equal ones are written once."""
    from onnx import numpy_helper

    outputs = {v.name for v in old.output}
    seen: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    for tensor in old.initializer:
        raw = tensor.raw_data or numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        key = (tensor.data_type, tuple(tensor.dims), raw)
        if key in seen and tensor.name not in outputs:
            names._short[tensor.name] = seen[key]
            continue
        made = graph.initializer.add()
        made.name = seen[key] = names[tensor.name]
        made.data_type = tensor.data_type
        made.dims.extend(tensor.dims)
        made.raw_data = raw


def _is_default(node: onnx.NodeProto, attr: onnx.AttributeProto, opset: int) -> bool:
    """Whether leaving `attr` out means the same (ONNX operator specification)."""
    from onnx import defs, helper

    pooling = node.op_type in ("MaxPool", "AveragePool", "LpPool")
    if node.op_type in ("Conv", "ConvTranspose") or pooling:
        # defaults that depend on the rank are not in the schema
        if attr.name in ("dilations", "strides"):
            return all(v == 1 for v in attr.ints)
        if attr.name in ("pads", "output_padding"):
            return not any(attr.ints)
        if attr.name == "kernel_shape" and not pooling:
            return True  # the weights say it
    try:
        known = defs.get_schema(node.op_type, opset, node.domain).attributes.get(attr.name)
    except defs.SchemaError:
        return False
    if known is None or known.required or known.default_value.type == onnx_undefined():
        return False
    return bool(helper.get_attribute_value(known.default_value) == helper.get_attribute_value(attr))


def onnx_undefined() -> int:
    """Type of an attribute that has no default."""
    from onnx import AttributeProto

    return int(AttributeProto.UNDEFINED)
