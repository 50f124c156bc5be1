"""A placed graph that trains: rounding on exactly the values that the plan of a target annotates, with learned steps.

Learned step size (Esser et al., "Learned Step Size Quantization", 2020): x' = s * clip(round(x / s)), whose gradient
goes straight through the rounding where nothing is clipped, and to the step s as

    dx'/ds = round(x / s) - x / s   inside, the clipped code outside,

scaled by 1 / sqrt(n * q), n values a step serves and q its largest code. Steps begin where the search or the range
scheme put them and are learned as exponents, so that a step of the optimizer changes each by a share of itself.
What must not move does not: zero points, steps of pictures and of constants, steps that a library prescribes, and the
one step that several values share stays one. `learned` puts what was found back onto the graph, for the same lowering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgekit.compression.onnx_module import OnnxModule, from_onnx
from edgekit.passes.graph import constant
from edgekit.passes.states import states
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.placement import prepared
from edgekit.quant.qdq import integer_operands
from edgekit.quant.rules import COPIES, Rules, data_inputs
from edgekit.quant.weights import TINY, exact_in_float16
from edgekit.spec import DType, QuantParams

PACE, GAIN_PACE = 0.1, 0.02
"""Exponents move steps of activations, and of weights, by these shares per unit, while weights move by codes: one learning
rate, of about a hundredth, serves all. A weight's step is a gain of its channel, which much depends on; an
activation's is but a resolution."""
INPUT_CODES = 7.0
"""What a bias moves by per unit, in products of an input's step and a weight's."""


class _Round(torch.autograd.Function):
    """(x, step, zero, low, high, gradient scale) -> step * (clip(round(x / step) + zero) - zero)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, zero: float, low: float, high: float, scale: float
    ) -> Tensor:
        ratio = x / step
        codes = (ratio.round() + zero).clamp_(low, high)
        ctx.save_for_backward(ratio, step)
        ctx.limits = zero, low, high, scale
        return codes.sub_(zero).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        ratio, step = ctx.saved_tensors
        zero, low, high, scale = ctx.limits
        codes = ratio.round() + zero
        inside = (codes >= low) & (codes <= high)
        x_gradient = gradient * inside
        found = codes.clamp_(low, high).sub_(zero).sub_(ratio * inside).mul_(gradient)
        dims = [i for i in range(found.dim()) if step.dim() == 0 or step.shape[i] == 1]
        step_gradient = found.sum(dims, keepdim=step.dim() > 0) if dims else found
        return x_gradient, step_gradient.reshape(step.shape) * scale, None, None, None, None


def fake(x: Tensor, step: Tensor, zero: float, low: float, high: float, scale: float) -> Tensor:
    """`_Round`, without its graph where no gradient is wanted."""
    if torch.is_grad_enabled():
        found: Tensor = _Round.apply(x, step, zero, low, high, scale)  # type: ignore[no-untyped-call]
        return found
    return ((x / step).round_() + zero).clamp_(low, high).sub_(zero).mul_(step)


@dataclass(frozen=True)
class _Weight:
    """name: of its initialiser; axis: of output channels in the child's weight; limit: largest code; step: number of
    its exponents, shared where the initialiser is."""

    name: str
    axis: int
    limit: int
    step: int


class FakeQuantized(nn.Module):
    """`model`, annotated by `quant.placement.place` and perhaps repaired, as a network that learns its weights and steps.

    forward(*inputs), or of one tuple -> outputs of the graph: what `simulate.fake_quantized` of `learned()` computes.
    weight_bits: codes reach 2^(bits-1) - 1, at most the rules' limit; payloads hold int8 all the same. network: the
    OnnxModule inside, frozen; what is learned is how far each weight is from it, in codes (`weight_delta`), so that one
    learning rate fits channels of any size, and biases likewise. rounding: False computes in floats.
    """

    def __init__(self, model: ir.Model, rules: Rules, weight_bits: int = 8) -> None:
        super().__init__()
        self.model = prepared(model)
        self.rules = rules
        self.limit = min(rules.weight_limit, 2 ** (weight_bits - 1) - 1)
        self.network: OnnxModule = from_onnx(self.model).requires_grad_(False)
        self.rounding = True
        self.watched: tuple[str, ...] = ()
        """Names of inner values that `seen` holds of the last run."""
        self.seen: dict[str, Tensor] = {}
        params = _annotations(self.model)
        skipped = _unchanged(self.model)
        fixed = _fixed(self.model, rules)
        groups: dict[QuantParams, int] = {}
        for found in params.values():
            if found.axis is None and found not in groups:
                groups[found] = len(groups)
        self._group = {name: groups[p] for name, p in params.items() if p.axis is None}
        """Number of the step of each annotated activation."""
        self._zero = [float(p.zero_point[0]) for p in groups]
        self._taps = {n for n in self._group if n not in skipped}
        held = {self._group[n] for n in fixed}
        start = torch.tensor([p.scale[0] for p in groups], dtype=torch.float32)
        self.register_buffer("step", start)
        self.register_buffer("free", torch.tensor([float(i not in held) for i in range(len(groups))]))
        capped = {self._group[n] for n in _capped(self.model)}
        most = torch.tensor([0.0 if i in capped else torch.inf for i in range(len(groups))])
        self.register_buffer("most", most)
        self.exponent = nn.Parameter(torch.zeros(len(groups)))
        self._weights: dict[str, _Weight] = {}
        self._biases: dict[str, str] = {}
        """Child -> value name of its input, where its bias becomes int32."""
        self._plan_weights(params)

    def _plan_weights(self, params: Mapping[str, QuantParams]) -> None:
        nodes = {str(n.outputs[0].name): n for n in self.model.graph}
        numbers: dict[str, int] = {}
        self._frozen: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.weight_exponent, self.weight_delta = nn.ParameterList(), nn.ParameterList()
        self.bias_delta = nn.ParameterDict()
        for child, origin in self.network.origins.items():
            found = params.get(origin.weight)
            if found is None or found.axis is None:
                continue
            if origin.weight not in numbers:
                numbers[origin.weight] = len(numbers)
                self.register_buffer(f"weight_step_{len(numbers) - 1}", torch.tensor(found.scale))
                self.weight_exponent.append(nn.Parameter(torch.zeros(len(found.scale))))
                weight = getattr(self.network, child).weight
                self.weight_delta.append(nn.Parameter(torch.zeros_like(weight)))
            axis = 1 - found.axis if origin.transposed else found.axis
            self._weights[child] = _Weight(origin.weight, axis, self.limit, numbers[origin.weight])
            node = nodes[origin.node]
            if self.rules.int32_bias and origin.bias and integer_operands(node) is not None:
                source = str(node.inputs[0].name)  # type: ignore[union-attr]
                bias = getattr(self.network, child).bias
                if bias is not None and bias.numel() == len(found.scale):
                    self._biases[child] = source
            self._plan_bias(child, str(node.inputs[0].name))  # type: ignore[union-attr]
        if self.limit < 127:
            self._coarsen()

    def _plan_bias(self, child: str, source: str) -> None:
        layer, plan = getattr(self.network, child), self._weights[child]
        if layer.bias is None:
            return
        weight = self.get_buffer(f"weight_step_{plan.step}")
        unit = weight * INPUT_CODES * (self.step_of(source) if source in self._group else 1 / INPUT_CODES)
        if unit.numel() != layer.bias.numel():  # groups of a transposed convolution
            unit = unit.mean().expand(layer.bias.numel()).clone()
        self.register_buffer(f"bias_unit_{child}", unit)
        self.bias_delta[child] = nn.Parameter(torch.zeros_like(layer.bias))

    def step_of(self, name: str) -> float:
        """Where the step of an activation began."""
        return float(self.get_buffer("step")[self._group[name]])

    def train(self, mode: bool = True) -> FakeQuantized:
        """Norms that are left inside keep their statistics."""
        super().train(mode)
        self.network.eval()
        if not mode:
            self._freeze()
        return self

    @torch.no_grad()
    def _freeze(self) -> None:
        """Weights as an export shall write them, computed ahead of its trace."""
        activations = self.activation_steps()
        self._frozen = {}
        for child in self._weights:
            weight = self.rounded_weight(child, self.weight_step(child, activations))
            bias = self.bias(child)
            self._frozen[child] = weight.clone(), None if bias is None else bias.clone()

    def _exported(self, name: str, child: nn.Module, x: Tensor) -> Tensor:
        if name not in self._frozen:
            found: Tensor = child(x)
            return found
        return _apply(child, x, *self._frozen[name])

    # --- weights ---

    def codes(self, child: str) -> Tensor:
        """What is rounded to a weight's codes: those it began with, and what was learned."""
        base: Tensor = getattr(self.network, child).weight
        plan = self._weights[child]
        start = self._along(plan, self.get_buffer(f"weight_step_{plan.step}"), base.dim())
        found: Tensor = base / start + self.weight_delta[plan.step]
        return found

    def bias(self, child: str) -> Tensor | None:
        base: Tensor | None = getattr(self.network, child).bias
        if base is None or child not in self.bias_delta:
            return base
        found: Tensor = base + self.get_buffer(f"bias_unit_{child}") * self.bias_delta[child]
        return found

    @staticmethod
    def _along(plan: _Weight, step: Tensor, rank: int) -> Tensor:
        shape = [1] * rank
        shape[plan.axis] = -1
        return step.reshape(shape)

    def masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of the network's parameters (Work.masks) as masks of what is learned here: zeros stay zeros."""
        found = {}
        for name, mask in masks.items():
            child, _, kind = name.rpartition(".")
            if kind == "weight" and child in self._weights:
                found[f"weight_delta.{self._weights[child].step}"] = mask
            elif kind == "bias" and child in self.bias_delta:
                found[f"bias_delta.{child}"] = mask
        return found

    def _coarsen(self) -> None:
        """Where weights still have codes beyond the limit (a plan for 8 bits), the steps that lose least at it."""
        from edgekit.quant.weights import codes, weight_params

        for child, plan in self._weights.items():
            weight = getattr(self.network, child).weight.detach().numpy()
            step = getattr(self, f"weight_step_{plan.step}")
            known = QuantParams(DType.int8, tuple(step.tolist()), (0,) * len(step), plan.axis)
            if np.abs(codes(weight, known)).max() > self.limit:
                found = weight_params(
                    weight, plan.axis, "mse", limit=self.limit, float16_scales=self.rules.float16_scales
                )
                step.copy_(torch.tensor(found.scale))

    # --- steps ---

    def activation_steps(self) -> Tensor:
        """[groups], those that may not move as they were."""
        free, most = self.get_buffer("free"), self.get_buffer("most")
        moved = torch.exp(torch.minimum(PACE * self.exponent * free, most))
        return self._stored(self.get_buffer("step") * moved)

    def weight_step(self, child: str, activations: Tensor) -> Tensor:
        """[output channels]; none so small that the int32 bias would overflow."""
        plan = self._weights[child]
        start = self.get_buffer(f"weight_step_{plan.step}")
        found = (start * torch.exp(GAIN_PACE * self.weight_exponent[plan.step])).clamp_min(TINY)
        source = self._biases.get(child)
        if source is not None:
            bias = self.bias(child)
            assert bias is not None
            least = bias.detach().abs() / activations[self._group[source]].detach() / 2.0**30
            found = torch.maximum(found, least)
        return self._stored(found)

    def _stored(self, step: Tensor) -> Tensor:
        if not self.rules.float16_scales:
            return step
        exact = torch.from_numpy(exact_in_float16(step.detach().cpu().numpy())).to(step.device)
        return step + (exact - step).detach()

    def rounded_weight(self, child: str, step: Tensor) -> Tensor:
        """Step times codes: a step that moves takes the codes along, so that it is a gain of its channel."""
        plan = self._weights[child]
        codes = self.codes(child)
        limit = float(plan.limit)
        part = (codes.numel() / step.shape[0] * limit) ** -0.5
        rounded = fake(codes, torch.ones(()), 0.0, -limit, limit, 0.0)
        scaled = step * part + (step * (1 - part)).detach()
        return rounded * self._along(plan, scaled if torch.is_grad_enabled() else step, codes.dim())

    # --- running ---

    def forward(self, *inputs: Any) -> Any:
        given = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)) else inputs
        if not self.rounding:
            return self.network.run(given)
        if torch.onnx.is_in_onnx_export():  # a float file: who builds it places its scales
            return self.network.run(given, layer=self._exported)
        steps = self.activation_steps()

        watched, self.seen = set(self.watched), {}

        def tap(name: str, x: Tensor) -> Tensor:
            if name in self._taps:
                number = self._group[name]
                scale = (x[:1].numel() * 127) ** -0.5
                x = fake(x, steps[number], self._zero[number], -128.0, 127.0, scale)
            if name in watched:
                self.seen[name] = x
            return x

        def layer(name: str, child: nn.Module, x: Tensor) -> Tensor:
            if name not in self._weights:
                found: Tensor = child(x)
                return found
            step = self.weight_step(name, steps)
            source = self._biases.get(name)
            activation = None if source is None else steps[self._group[source]]
            return self._call(name, child, x, step, activation)

        return self.network.run(given, tap, layer)

    def _call(
        self, name: str, child: nn.Module, x: Tensor, step: Tensor, activation: Tensor | None
    ) -> Tensor:
        bias = self.bias(name)
        if bias is not None and activation is not None:
            bias = _int32(bias, activation, step)
        return _apply(child, x, self.rounded_weight(name, step), bias)

    # --- and back ---

    @torch.no_grad()
    def learned(self) -> ir.Model:
        """A copy of the annotated graph with the learned steps on its values and weights that are their codes' numbers."""
        model = self.model.clone()
        activations = self.activation_steps()
        steps = activations.tolist()
        values = [
            *model.graph.inputs,
            *model.graph.initializers.values(),
            *(v for n in model.graph for v in n.outputs),
        ]
        by_name = {str(v.name): v for v in values}
        for name, number in self._group.items():
            params = quant(by_name[name])
            assert params is not None
            set_quant(by_name[name], replace(params, scale=(steps[number],)))
        for child, origin in self.network.origins.items():
            layer = getattr(self.network, child)
            if origin.op == "BatchNormalization":
                continue
            weight, bias = layer.weight, self.bias(child)
            if child in self._weights:
                step = self.weight_step(child, activations)
                weight = self.rounded_weight(child, step)
                params = quant(by_name[origin.weight])
                assert params is not None
                set_quant(by_name[origin.weight], replace(params, scale=tuple(step.tolist())))
            _store(by_name[origin.weight], weight.mT if origin.transposed else weight)
            if origin.bias and bias is not None:
                _store(by_name[origin.bias], bias)
        return model


def _apply(child: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer with another weight and bias."""
    if isinstance(child, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    if isinstance(child, nn.ConvTranspose2d):
        return nn.functional.conv_transpose2d(
            x, weight, bias, child.stride, child.padding, child.output_padding, child.groups, child.dilation  # type: ignore[arg-type]
        )  # fmt: skip
    assert isinstance(child, nn.Conv2d)
    return nn.functional.conv2d(
        x, weight, bias, child.stride, child.padding, child.dilation, child.groups  # type: ignore[arg-type,unused-ignore]
    )  # fmt: skip


def _int32(bias: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
    """Rounded to codes of int32 at step(activation) * step(weight); straight through."""
    with torch.no_grad():
        step = activation * weight
        limit = 2.0**31
        rounded = (bias.double() / step.double()).round_().clamp_(-limit, limit - 1).float() * step
        moved = rounded - bias
    return bias + moved


def _store(value: ir.Value, numbers: Tensor) -> None:
    before = constant(value)
    assert before is not None
    if numbers.numel() != before.size:  # a bias that was broadcast
        numbers = numbers.reshape(-1)[: before.size]
    found = np.ascontiguousarray(numbers.detach().cpu().numpy().reshape(before.shape), np.float32)
    value.const_value = ir.tensor(found, name=value.name)


def _annotations(model: ir.Model) -> dict[str, QuantParams]:
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
    return {str(v.name): p for v in values if (p := quant(v)) is not None}


def _unchanged(model: ir.Model) -> set[str]:
    """Values that are codes of their own scale before they are rounded: moved about, not computed."""
    found = set()
    for node in model.graph:
        mode = node.attributes.get("mode")
        if node.op_type not in COPIES or (
            node.op_type == "Resize" and mode is not None and mode.as_string() != "nearest"
        ):
            continue
        params = [quant(v) for v in data_inputs(node)]
        for value in node.outputs:
            if params and all(p is not None and p == quant(value) for p in params):
                found.add(str(value.name))
    return found


def _fixed(model: ir.Model, rules: Rules) -> set[str]:
    """Annotated values whose step must stay: pictures, constants, what a library prescribes."""
    graph = model.graph
    carried = {state.input for state in states(model)}
    found = {str(v.name) for v in graph.inputs if quant(v) is not None and v.name not in carried}
    for value in graph.initializers.values():
        params = quant(value)
        if params is not None and params.axis is None:
            found.add(str(value.name))
    for node in graph:
        if node.op_type in rules.fixed:
            found |= {str(v.name) for v in node.outputs if quant(v) is not None}
    return found


def _capped(model: ir.Model) -> set[str]:
    """Results of a Clip: their codes must end no further than it does, or it could not be left out."""
    return {
        str(n.outputs[0].name) for n in model.graph if n.op_type == "Clip" and quant(n.outputs[0]) is not None
    }
