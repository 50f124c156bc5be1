"""Which values' rounding does the damage: the network's error with one of them rounded, all others exact.

One model serves every measurement: behind each rounded value stands a Where whose condition is an input of the
model, so that rounding is switched per run, not per model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.passes.states import answers
from edgekit.quant.simulate import Feed, fake_quantized, open_session

Progress = Callable[[str, int, int], None]
_SWITCH = "round "


def output_error(exact: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> float:
    """Noise over variance, averaged over the outputs: 0 for equal ones, 1 for outputs that carry nothing.

    The variance, not the mean square: a constant offset in an output carries no information to lose.
    """
    errors = []
    for name, x in exact.items():
        noise = float(np.mean((np.asarray(got[name], np.float64) - x) ** 2))
        errors.append(noise / max(float(np.var(x, dtype=np.float64)), 1e-30))
    return float(np.mean(errors))


class Probe:
    """An annotated model whose roundings can be switched.

    values: names of the annotated activations, and of constants with one scale. `error(names)` is the output
    error with just those rounded; `error()` with all of them. Weights and biases are always rounded: the
    errors are those of activations alone. States, whose feeds are given, count by what they do to other outputs.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Feed]) -> None:
        switched = fake_quantized(model)
        self.values = _add_switches(switched)
        self._feeds = list(feeds)
        self._session = open_session(switched)
        self._names = answers(switched)
        self._exact = [self._run(feed, ()) for feed in self._feeds]

    def error(self, names: Collection[str] | None = None) -> float:
        """Output error (see `output_error`), averaged over the feeds."""
        chosen = self.values if names is None else names
        runs = (
            output_error(exact, self._run(f, chosen))
            for f, exact in zip(self._feeds, self._exact, strict=True)
        )
        return float(np.mean(list(runs)))

    def rank(
        self, names: Sequence[str] | None = None, progress: Progress | None = None
    ) -> list[tuple[str, float]]:
        """(value, output error when it alone is rounded), the worst first."""
        found = []
        wanted = list(self.values if names is None else names)
        for i, name in enumerate(wanted):
            if progress is not None:
                progress("rank values by error", i, len(wanted))
            found.append((name, self.error((name,))))
        return sorted(found, key=lambda item: (-item[1], item[0]))

    def _run(self, feed: Feed, names: Collection[str]) -> dict[str, np.ndarray]:
        switches = {_SWITCH + name: np.array(name in names) for name in self.values}
        return dict(zip(self._names, self._session.run(self._names, {**feed, **switches}), strict=True))


def _add_switches(model: ir.Model) -> tuple[str, ...]:
    """Put a Where behind every Q/DQ pair of an activation in `model` (of `fake_quantized`); the values' names."""
    graph = model.graph
    found = []
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        source = node.inputs[0]
        quantize = source.producer() if source is not None else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        exact, rounded = quantize.inputs[0], node.outputs[0]
        assert exact is not None
        # of a graph input or an inner value: the name that both forms share without their suffix
        name = str(exact.name).removesuffix(".exact")
        switch = ir.Value(name=_SWITCH + name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(()))
        graph.inputs.append(switch)
        where = ir.node("Where", [switch, rounded, exact], name=f"switch {name}")
        graph.insert_after(node, where)
        output = where.outputs[0]
        output.shape, output.type = rounded.shape, rounded.type
        label = rounded.name
        rounded.name, output.name = f"{label}.rounded", label
        rounded.replace_all_uses_with(output, replace_graph_outputs=True)
        where.replace_input_with(1, rounded)
        found.append(name)
    return tuple(found)
