"""Moves explicit zero padding into the convolution that follows.

    Conv(Pad(x, p_pad, value 0), pads = p_conv)   ->   Conv(x, pads = p_pad + p_conv)

Pattern: Pad (constant mode, value 0, spatial axes only, no cropping) read by one Conv.
Explicit padding is what exporters write for asymmetric ("same") padding; runtimes run it as a copy.
auto_pad is made explicit first. Source: onnxscript's pad rules, whose algebra this restates.
"""

from __future__ import annotations

import onnx_ir as ir

from edgekit.passes.graph import clean, constant, ints, only_user, scalar, shape

TOLERANCE = 1e-5


def run(model: ir.Model) -> int:
    """In place. Returns the number of fused Pad nodes and rewritten auto_pad attributes."""
    graph = model.graph
    count = sum(_explicit(node) for node in graph if node.op_type == "Conv")
    for node in list(graph):
        if node.op_type == "Pad" and _fuse(node):
            graph.remove(node, safe=True)
            count += 1
    clean(model)
    return count


def _explicit(node: ir.Node) -> bool:
    """auto_pad SAME_UPPER / SAME_LOWER / VALID as pads, by the ONNX Conv rule."""
    auto = node.attributes.get("auto_pad")
    sizes, kernel = shape(node.inputs[0]), shape(node.inputs[1])
    if auto is None or sizes is None or kernel is None:
        return False
    mode = auto.as_string()
    spatial = len(sizes) - 2
    strides = ints(node, "strides", [1] * spatial)
    dilations = ints(node, "dilations", [1] * spatial)
    begin, end = [0] * spatial, [0] * spatial
    if mode.startswith("SAME"):
        for i in range(spatial):
            size, stride = sizes[2 + i], strides[i]
            reach = (kernel[2 + i] - 1) * dilations[i] + 1
            total = max(0, (-(-size // stride) - 1) * stride + reach - size)
            small, large = total // 2, total - total // 2
            begin[i], end[i] = (small, large) if mode == "SAME_UPPER" else (large, small)
    del node.attributes["auto_pad"]
    if mode != "NOTSET":
        node.attributes["pads"] = ir.AttrInt64s("pads", begin + end)
    return mode != "NOTSET"


def _fuse(pad: ir.Node) -> bool:
    conv = only_user(pad.outputs[0])
    source = pad.inputs[0]
    sizes = shape(source)
    pads = constant(pad.inputs[1])
    if conv is None or conv.op_type != "Conv" or conv.inputs[0] is not pad.outputs[0] or source is None:
        return False
    mode = pad.attributes.get("mode")
    if sizes is None or pads is None or (mode is not None and mode.as_string() != "constant"):
        return False
    fill = pad.inputs[2] if len(pad.inputs) > 2 else None
    if fill is not None and scalar(fill) != 0.0:
        return False
    rank = len(sizes)
    axes = list(range(rank))
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        given = constant(pad.inputs[3])
        if given is None:
            return False
        axes = [int(a) % rank for a in given]
    amounts = [int(p) for p in pads]
    begin = dict(zip(axes, amounts[: len(axes)], strict=True))
    end = dict(zip(axes, amounts[len(axes) :], strict=True))
    if min(amounts) < 0 or any(begin.get(a, 0) or end.get(a, 0) for a in (0, 1)):
        return False
    old = ints(conv, "pads", [0] * 2 * (rank - 2))
    both = [begin.get(a, 0) for a in range(2, rank)] + [end.get(a, 0) for a in range(2, rank)]
    conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(old, both, strict=True)])
    conv.replace_input_with(0, source)
    return True
