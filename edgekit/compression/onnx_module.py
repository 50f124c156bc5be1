"""An ONNX network as a torch module: it trains, is pruned, factorised and quantized without its source.

Conv, ConvTranspose, Gemm, MatMul and BatchNormalization with constant weights become children (nn.Conv2d,
nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d) that are called as their nodes are; everything else is a function of
torch (onnx_ops.py), differentiable where that means anything. Sizes in the graph (of Reshape, Resize, Split, ..) are
read as relations to the sizes that come in (onnx_sizes.py): another batch, another picture size or fewer channels
go through where the network allows them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgekit.compression.onnx_ops import CHECKS, OPS, Value, call, same_pads
from edgekit.compression.onnx_sizes import Sizes
from edgekit.errors import ModelError
from edgekit.passes import fold_shuffle
from edgekit.passes.graph import clean, constant, integer, ints, number, shape

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
Tap = Callable[[str, Tensor], Tensor]
"""tap(value name, tensor) -> what its readers get."""
Layer = Callable[[str, nn.Module, Tensor], Tensor]
"""layer(child name, child, its input) -> its output."""


@dataclass(frozen=True)
class Origin:
    """Where a child comes from. node: name of the node's first output; weight, bias: names of initialisers, ""
    where there is none; transposed: the weight of the graph is the child's, transposed."""

    op: str
    node: str
    weight: str
    bias: str
    transposed: bool = False


@dataclass(frozen=True)
class Step:
    """One node. inputs: value names, "" for one left out; child: of LAYERS, "" for a function; pads: of a child,
    (left, right, top, bottom) ahead of it where its own padding cannot say them; binds: (output, axis, number) of
    sizes that later nodes refer to."""

    op: str
    node: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    child: str = ""
    pads: tuple[int, ...] = ()
    binds: tuple[tuple[int, int, int], ...] = ()


class OnnxModule(nn.Module):
    """Made by `from_onnx`. forward(*inputs) -> the output, or a tuple of them in the order of the graph.

    input_names, output_names, input_shapes: as in the graph. origins: child name -> Origin. constants: float
    initialisers that functions read are buffers; integers are sizes and indices, not learned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: tuple[Step, ...] = ()
        self.input_names: tuple[str, ...] = ()
        self.output_names: tuple[str, ...] = ()
        self.input_shapes: tuple[tuple[int, ...], ...] = ()
        self.origins: dict[str, Origin] = {}
        self.metadata: dict[str, str] = {}
        self.sizes = Sizes()
        self.integers: dict[str, np.ndarray] = {}
        self.buffer_of: dict[str, str] = {}
        """Value name of a float constant -> name of its buffer."""
        self._last_use: dict[int, tuple[str, ...]] = {}

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(inputs)

    def run(self, inputs: Sequence[Tensor], tap: Tap | None = None, layer: Layer | None = None) -> Any:
        """`forward`; each value that is made goes through `tap`, inputs and float constants included, each child is
        called by `layer`."""
        if len(inputs) != len(self.input_names):
            raise ModelError(
                f"network: called with {len(inputs)} tensors, expected {len(self.input_names)}: "
                f"{', '.join(self.input_names)}. Give them in this order"
            )
        known: dict[str, Value] = dict(self.integers)
        for name, buffer in self.buffer_of.items():
            value = getattr(self, buffer)
            known[name] = value if tap is None else tap(name, value)
        sizes: dict[int, int] = {}
        for name, tensor in zip(self.input_names, inputs, strict=True):
            for axis, number_ in self.sizes.free(name):
                sizes[number_] = int(tensor.shape[axis])
            known[name] = tensor if tap is None else tap(name, tensor)
        for index, step in enumerate(self.steps):
            found = self._step(step, [known[n] if n else None for n in step.inputs], sizes, layer)
            for name, value in zip(step.outputs, found, strict=False):
                if name:
                    known[name] = value if tap is None or not isinstance(value, Tensor) else tap(name, value)
            for output, axis, number_ in step.binds:
                made = found[output]
                if isinstance(made, Tensor) and axis < made.dim():
                    sizes[number_] = int(made.shape[axis])
            for name in self._last_use.get(index, ()):
                del known[name]
        results = tuple(known[n] for n in self.output_names)
        return results[0] if len(results) == 1 else results

    def _step(
        self, step: Step, values: list[Value | None], sizes: dict[int, int], layer: Layer | None
    ) -> Sequence[Value]:
        if not step.child:
            return call(step.op, step.attributes, values, lambda v: self.sizes.shape(step.outputs[v], sizes))
        child = getattr(self, step.child)
        x = values[0]
        assert isinstance(x, Tensor)
        if any(step.pads):
            x = nn.functional.pad(x, step.pads)
        return (child(x) if layer is None else layer(step.child, child, x),)

    def set_steps(self, steps: Iterable[Step]) -> None:
        self.steps = tuple(steps)
        last: dict[str, int] = {}
        for index, step in enumerate(self.steps):
            last.update(dict.fromkeys((n for n in (*step.inputs, *step.outputs) if n), index))
        kept = {*self.output_names, *self.integers, *self.buffer_of}
        found: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in kept:
                found.setdefault(index, []).append(name)
        self._last_use = {index: tuple(names) for index, names in found.items()}

    def example(self) -> tuple[Tensor, ...]:
        """Zeros of the graph's input sizes."""
        return tuple(torch.zeros(s) for s in self.input_shapes)


def from_onnx(model: ir.Model) -> OnnxModule:
    """`model` (normal form of frontends.load, or prepared) as a module in evaluation mode; the model stays as it is.

    Channel shuffles are read as strided slices, Identity and Dropout as nothing. Raises: ModelError, one line with
    every operator that has no counterpart here.
    """
    from edgekit.quant.placement import prepared
    from edgekit.quant.qdq import MIN_OPSET, raise_opset

    model = raise_opset(prepared(model), MIN_OPSET)
    if fold_shuffle.run(model):
        model = prepared(model)
    clean(model)
    graph = model.graph
    _check(graph)
    made = OnnxModule()
    made.input_names = tuple(str(v.name) for v in graph.inputs)
    made.output_names = tuple(str(v.name) for v in graph.outputs)
    made.input_shapes = tuple(shape(v) or () for v in graph.inputs)
    made.metadata = dict(model.metadata_props)
    made.sizes = Sizes.of(graph)
    parts: dict[str, nn.Parameter] = {}
    steps = []
    for node in graph:
        inputs = tuple("" if v is None else str(v.name) for v in node.inputs)
        outputs = tuple(str(v.name) if v.uses() or v.is_graph_output() else "" for v in node.outputs)
        child = ""
        pads: tuple[int, ...] = ()
        if _is_layer(node):
            layer, pads = _layer(node, parts)
            child = _name(made, node)
            made.add_module(child, layer)
            made.origins[child] = Origin(
                node.op_type, str(node.outputs[0].name), inputs[1],
                inputs[2] if len(inputs) > 2 else "", _transposed(node),
            )  # fmt: skip
            inputs = inputs[:1]
        else:
            for value in node.inputs:
                _keep(made, value)
        binds = made.sizes.binds(node)
        attributes, node_name = _attributes(node, made.sizes), str(node.outputs[0].name)
        steps.append(Step(node.op_type, node_name, inputs, outputs, attributes, child, pads, binds))
    for value in graph.outputs:
        _keep(made, value)
    made.set_steps(steps)
    return made.eval()


def to_onnx(module: OnnxModule, path: Path, *, sizes: Sequence[tuple[int, ...]] | None = None) -> None:
    """Write the network as ONNX under the names of the graph that it came from; BatchNorms are folded.

    sizes: of the inputs, the graph's where not given. Written whole or not at all.
    """
    from edgekit.models.exporting import write_onnx

    example = module.example() if sizes is None else tuple(torch.zeros(s) for s in sizes)
    inputs = [
        f"input_{i}" for i in range(len(module.input_names))
    ]  # the exporter refuses names such as "758"
    outputs = [f"output_{i}" for i in range(len(module.output_names))]
    part = path.with_name(path.name + ".traced")
    try:
        write_onnx(module, part, example, inputs, outputs)
        model = ir.load(part)
    finally:
        part.unlink(missing_ok=True)
    model.metadata_props.update(module.metadata)
    wanted = dict(zip([*inputs, *outputs], [*module.input_names, *module.output_names], strict=True))
    for value in [*model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]:
        if value.name in module.output_names:
            value.name = f"{value.name}.inner"
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.name = wanted[str(value.name)]
    whole = path.with_name(path.name + ".part")
    ir.save(model, whole)
    whole.replace(path)


def heads(module: OnnxModule) -> frozenset[str]:
    """Children whose output channels are channels of an output of the network: no method changes their number."""
    found = set()
    for component in _components(module):
        if component.values & set(module.output_names):
            found |= component.layers
    return frozenset(found)


def unprunable(module: OnnxModule) -> frozenset[str]:
    """Children whose output channels Torch-Pruning cannot follow to their readers: they pass through a strided slice
    (the channel shuffle of ShuffleNetV2) or a Reshape that mixes axes. Given to a pruner beside `heads`."""
    found = set()
    for component in _components(module):
        if component.odd:
            found |= component.layers
    return frozenset(found)


@dataclass
class _Component:
    """Values whose channels are tied to each other, the children that write them, and whether an operator among them is
    odd."""

    values: set[str]
    layers: set[str]
    odd: bool = False


def _components(module: OnnxModule) -> list[_Component]:
    known: dict[str, _Component] = {}
    constants = {*module.integers, *module.buffer_of}
    for step in module.steps:
        child = getattr(module, step.child) if step.child else None
        ends = isinstance(child, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
        if isinstance(child, nn.Conv2d) and child.groups == child.in_channels == child.out_channels > 1:
            ends = False
        made = _Component({n for n in step.outputs if n}, {step.child} if step.child else set())
        if not ends:
            for name in step.inputs:
                other = known.get(name)
                if other is not None and name not in constants and other is not made:
                    made.values |= other.values
                    made.layers |= other.layers
                    made.odd |= other.odd
        made.odd |= _odd(module, step)
        known.update(dict.fromkeys(made.values, made))
    return list({id(c): c for c in known.values()}.values())


def _odd(module: OnnxModule, step: Step) -> bool:
    if step.op == "Slice" and len(step.inputs) > 3:
        axes, steps = (module.integers.get(n) for n in (*step.inputs[3:], "")[:2])
        if axes is None or 1 not in {int(a) % len(step.attributes["edgekit.before"]) for a in axes}:
            return False
        return steps is not None and any(int(n) != 1 for n in steps)
    if step.op in ("Reshape", "Gather", "DepthToSpace", "SpaceToDepth"):
        return (
            module.sizes.rank(step.inputs[0]) == 5
            or module.sizes.rank(step.outputs[0]) == 5
            or step.op != "Reshape"
        )
    return False


def unfold_batchnorm(module: OnnxModule, batches: Iterable[Any]) -> int:
    """Put a BatchNorm2d behind each convolution that has none, so that a folded network trains as it once did.

    batches: inputs, or (inputs, targets) as of Problem.batch, or tuples of inputs. The statistics are those of the
    convolutions' outputs on them; gamma and beta undo them, so that the network computes what it did. A channel that is
    constant on the data keeps the variance 1. Returns how many were put in; `fold` comes with the export.
    """
    read: dict[str, str] = {}
    for step in module.steps:
        if step.op == "BatchNormalization":
            read[step.inputs[0]] = step.node
    wanted = [
        s for s in module.steps if s.child and s.op in ("Conv", "ConvTranspose") and s.outputs[0] not in read
    ]
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    names = {s.child for s in wanted}

    def layer(name: str, child: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = child(x)
        if name in names:
            rows = y.detach().double().movedim(1, 0).flatten(1)
            found = rows.sum(1), rows.square().sum(1), rows.shape[1]
            known = sums.get(name)
            sums[name] = (
                found if known is None else (known[0] + found[0], known[1] + found[1], known[2] + found[2])
            )
        return y

    seen = 0
    with torch.no_grad():
        for batch in batches:
            seen += 1
            module.run(_inputs(batch), layer=layer)
    if not seen:
        raise ValueError("unfold_batchnorm: no batches, expected some inputs to measure on")
    steps = []
    for step in module.steps:
        if step.child not in names:
            steps.append(step)
            continue
        total, squares, count = sums[step.child]
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        variance = torch.where(variance > 1e-12, variance, torch.ones_like(variance))
        norm = nn.BatchNorm2d(len(mean))
        with torch.no_grad():
            norm.running_mean = mean.float()
            norm.running_var = variance.float()
            norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean)
        name = f"{step.child}_bn"
        while hasattr(module, name):
            name += "_"
        module.add_module(name, norm.train(module.training))
        inner = f"{step.outputs[0]}.conv"
        steps.append(Step(step.op, step.node, step.inputs, (inner,), step.attributes, step.child, step.pads))
        steps.append(Step("BatchNormalization", step.node, (inner,), step.outputs, {}, name, (), step.binds))
    module.set_steps(steps)
    return len(names)


def _inputs(batch: Any) -> tuple[Tensor, ...]:
    if isinstance(batch, Tensor):
        return (batch,)
    first = batch[0]
    if (
        isinstance(first, Tensor)
        and len(batch) == 2
        and not (isinstance(batch[1], Tensor) and batch[1].dim() == first.dim())
    ):
        return (first,)
    return tuple(batch) if isinstance(first, Tensor) else tuple(first)


def _check(graph: ir.Graph) -> None:
    """Raises: ModelError naming all that cannot be a module."""
    known = {*OPS, *LAYERS}
    unknown = sorted({n.op_type for n in graph if n.op_type not in known or n.domain not in ("", "ai.onnx")})
    odd = []
    for node in graph:
        if node.op_type in unknown:
            continue
        if node.op_type in LAYERS and node.op_type != "MatMul" and not _is_layer(node):
            odd.append(
                f"{node.op_type} {node.outputs[0].name}: its weight is computed, or it is not of pictures"
            )
        elif node.op_type in CHECKS and (why := CHECKS[node.op_type](_attributes(node))):
            odd.append(f"{node.op_type} {node.outputs[0].name}: {why}")
    if unknown or odd:
        what = [f"operator {', '.join(unknown)}"] if unknown else []
        raise ModelError(
            f"network: cannot be trained: {'; '.join([*what, *odd])}: no counterpart in torch here, expected "
            f"operators of compression/onnx_ops.py. Compress the torch module that it was exported from"
        )


def _is_layer(node: ir.Node) -> bool:
    if node.op_type not in LAYERS:
        return False
    weights = [constant(v) for v in node.inputs[1:] if v is not None]
    if not weights or any(w is None or w.dtype != np.float32 for w in weights):
        return False
    first = weights[0]
    assert first is not None
    if node.op_type in ("Conv", "ConvTranspose"):
        return first.ndim == 4 and "output_shape" not in node.attributes
    if node.op_type == "Gemm":
        plain = number(node, "alpha", 1.0) == 1 and number(node, "beta", 1.0) == 1
        return plain and not integer(node, "transA", 0)
    if node.op_type == "MatMul":
        return first.ndim == 2
    return not any(o.uses() or o.is_graph_output() for o in node.outputs[1:])


def _transposed(node: ir.Node) -> bool:
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not integer(node, "transB", 0))


def _layer(node: ir.Node, parts: dict[str, nn.Parameter]) -> tuple[nn.Module, tuple[int, ...]]:
    """(child, pads ahead of it). Nodes that share an initialiser share the parameter."""
    weight, offset = (constant(v) if v is not None else None for v in (*node.inputs[1:3], None, None)[:2])
    assert weight is not None
    made: nn.Module
    pads: tuple[int, ...] = ()
    if node.op_type == "BatchNormalization":
        gamma, beta, mean, variance = (torch.tensor(constant(v)) for v in node.inputs[1:5])
        rank = len(shape(node.inputs[0]) or (0,) * 4)
        kind = nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d
        made = kind(len(gamma), eps=number(node, "epsilon", 1e-5))
        made.weight, made.bias = nn.Parameter(gamma), nn.Parameter(beta)
        made.running_mean, made.running_var = mean, variance
        return made, ()
    if node.op_type in ("Gemm", "MatMul"):
        weight = weight.T if _transposed(node) else weight
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=offset is not None)
    else:
        group, kernel = integer(node, "group", 1), (weight.shape[2], weight.shape[3])
        stride, dilation = _pair(node, "strides", 1), _pair(node, "dilations", 1)
        given = same_pads(node.attributes, shape(node.inputs[0]) or (), kernel, stride, dilation)
        top, left, bottom, right = given or ints(node, "pads", (0, 0, 0, 0))
        if node.op_type == "ConvTranspose":
            made = nn.ConvTranspose2d(
                weight.shape[0], weight.shape[1] * group, kernel, stride, (top, left),
                _pair(node, "output_padding", 0), group, offset is not None, dilation,
            )  # fmt: skip
        else:
            padding = (top, left)
            if (top, left) != (bottom, right):
                padding, pads = (0, 0), (left, right, top, bottom)
            made = nn.Conv2d(
                weight.shape[1] * group, weight.shape[0], kernel, stride, padding, dilation, group,
                offset is not None,
            )  # fmt: skip
    key = f"{node.inputs[1].name} {_transposed(node)}"  # type: ignore[union-attr]
    made.weight = parts.setdefault(key, nn.Parameter(torch.tensor(np.ascontiguousarray(weight))))
    if offset is not None:
        key = f"{node.inputs[2].name} bias"  # type: ignore[union-attr]
        outputs = made.weight.shape[0] if not isinstance(made, nn.ConvTranspose2d) else made.out_channels
        full = np.broadcast_to(offset.reshape(-1), (outputs,)).copy()
        made.bias = parts.setdefault(key, nn.Parameter(torch.tensor(full)))
    return made, pads


def _pair(node: ir.Node, name: str, default: int) -> tuple[int, int]:
    first, second = ints(node, name, (default, default))
    return first, second


def _name(module: nn.Module, node: ir.Node) -> str:
    """After the node, or its output where it has no name; what Python and torch allow."""
    found = re.sub(r"\W+", "_", node.name or str(node.outputs[0].name)).strip("_") or "node"
    if found[0].isdigit():
        found = f"{node.op_type}_{found}"
    while hasattr(module, found):
        found += "_"
    return found


def _keep(module: OnnxModule, value: ir.Value | None) -> None:
    """A constant as a buffer (floats) or as it is (integers: sizes and places)."""
    numbers = constant(value)
    if numbers is None or value is None:
        return
    name = str(value.name)
    if name in module.buffer_of or name in module.integers:
        return
    if numbers.dtype.kind != "f":
        module.integers[name] = numbers
        return
    buffer = "constant_" + re.sub(r"\W+", "_", name).strip("_")
    while hasattr(module, buffer):
        buffer += "_"
    module.register_buffer(buffer, torch.tensor(numbers))
    module.buffer_of[name] = buffer


def _attributes(node: ir.Node, sizes: Sizes | None = None) -> dict[str, Any]:
    """Values by name, and what functions need of the graph besides: "edgekit.before", the file's sizes of an input that
    others may come in for; "edgekit.outputs"; "edgekit.whole", whether a Resize repeats whole pixels."""
    found: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        if isinstance(value, (ir.TensorProtocol, np.ndarray)):
            value = value.numpy() if not isinstance(value, np.ndarray) else value
        found[name] = list(value) if isinstance(value, tuple) else value
    before = shape(node.inputs[0]) if node.inputs else None
    if node.op_type == "Slice" and before is not None:
        found["edgekit.before"] = list(before)
        if sizes is not None:
            found["edgekit.channels"] = sorted(sizes.counts_channels(str(node.inputs[0].name)))  # type: ignore[union-attr]
    if node.op_type == "Split":
        found["edgekit.outputs"] = len(node.outputs)
    if node.op_type == "Resize" and before is not None:
        after = shape(node.outputs[0])
        if len(node.inputs) > 3 and constant(node.inputs[3]) is not None:  # else the graph computes them
            found["edgekit.before"] = list(before[2:])
        if after is not None and len(before) == 4:
            found["edgekit.whole"] = all(a % b == 0 for a, b in zip(after[2:], before[2:], strict=True))
    return found
