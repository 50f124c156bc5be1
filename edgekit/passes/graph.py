"""What every pass needs of an `onnx_ir` graph: constants, shapes, replacing, cleaning up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgekit.errors import ModelError
from edgekit.schema import printable


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initialiser or Constant node, None for anything computed."""
    if value is None or value.is_graph_input() or value.const_value is None:
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The value of a one-element constant."""
    data = constant(value)
    return float(data.reshape(-1)[0]) if data is not None and data.size == 1 else None


def shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Static shape, None when any size is open."""
    if value is None:
        return None
    if value.shape is None:
        return None if value.const_value is None else tuple(value.const_value.shape.numpy())
    dims = tuple(value.shape)
    return (
        tuple(int(d) for d in dims if isinstance(d, int)) if all(isinstance(d, int) for d in dims) else None
    )


def ints(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else tuple(default)


def integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return int(attribute.as_int()) if attribute is not None else default


def number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return float(attribute.as_float()) if attribute is not None else default


def text(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else str(attribute.as_string())


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, None when several do or it is a graph output."""
    uses = tuple(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def new_weight(graph: ir.Graph, like: str, data: np.ndarray) -> ir.Value:
    """A new initialiser whose name starts with `like` and is free."""
    taken = {*graph.initializers, *(v.name for v in graph.inputs)}
    taken |= {o.name for node in graph for o in node.outputs}
    name, i = like, 0
    while name in taken:
        i += 1
        name = f"{like}_{i}"
    tensor = ir.tensor(np.asarray(data, order="C"), name=name)  # keeps scalars scalar
    value = ir.Value(
        name=name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def replace(old: ir.Value, new: ir.Value) -> bool:
    """Every use of `old` reads `new` from now on; graph outputs keep their names.

    False where that cannot be: a graph output fed straight by an input, a weight or another output.
    """
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return True
    if new.is_graph_input() or new.is_graph_output() or new.is_initializer():
        return False
    name = old.name
    old.name = None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = name
    return True


def swap_node(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put the one-output node `new` in the place of `old`."""
    assert len(old.outputs) == len(new.outputs) == 1
    graph.insert_before(old, new)
    source, target = old.outputs[0], new.outputs[0]
    target.name, source.name = source.name, None
    target.shape, target.type = source.shape, source.type
    source.replace_all_uses_with(target, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def clean(model: ir.Model) -> None:
    """Drop nodes, weights and opset imports that nothing uses; put nodes in order."""
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del model.graph.initializers[name]
    model.graph.sort()


def infer(model: ir.Model) -> None:
    """Fill in the shape and type of every value (onnx shape inference with data propagation)."""
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    common.ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)


def listed(values: Sequence[ir.Value]) -> str:
    """Names and shapes for a message, five of them at most."""
    shapes = [printable(str(list(v.shape))) if v.shape is not None else "?" for v in values[:5]]
    shown = [f"{printable(v.name or '')} {s}" for v, s in zip(values, shapes, strict=False)]
    return ", ".join(shown) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def input_size(model: ir.Model) -> tuple[int, int]:
    """(height, width) of the one [1, C, H, W] picture input, states aside. Raises: ModelError."""
    from edgekit.passes.states import picture

    value = picture(model)
    sizes = shape(value)
    if sizes is None or len(sizes) != 4 or sizes[0] != 1:
        raise ModelError(
            f"model: expected one picture input [1, C, H, W], got {listed([value])}. Export it with batch 1."
        )
    return sizes[2], sizes[3]


def op_counts(nodes: Iterable[ir.Node]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))
