"""What is compressed: a network, the data it learns from, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Any]
"""(inputs [B, ...], targets of any kind): what `Problem.loss` takes."""


def no_imitation(student: Any, teacher: Any, targets: Any) -> Tensor:
    raise NotImplementedError


@dataclass(frozen=True)
class Problem:
    """A network and everything a recipe must know of it.

    model: float32; a recipe works on a copy. example: one input [1, ...] of the size that is shipped.
    batch: the batch of a step, which depends on its argument alone (runs are resumed and compared).
    loss: (outputs, targets) -> scalar, averaged over the batch. evaluate: metrics of a network, the first is the one
    that counts, 0 to 1, higher is better; it leaves the network's mode as it was. write: the network as ONNX, whole or
    not at all (models.exporting.write_onnx). head: names of modules whose output channels mean something (logits, boxes): no
    method changes their number. imitate: (student outputs, teacher outputs, targets) -> scalar, what distillation
    minimises where the task knows better than logits [B, C] (detectors). identity: JSON facts that decide the result
    (data, seeds, digests), for caches and resumed runs. lr: the peak learning rate (AdamW) that suits it from scratch.
    """

    name: str
    model: nn.Module
    example: Tensor
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Any], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    write: Callable[[nn.Module, Path], None]
    head: frozenset[str] = frozenset()
    imitate: Callable[[Any, Any, Any], Tensor] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    weight_decay: float = 0.02
    bf16: bool = False
    """Trainings compute convolutions and products in bfloat16 (torch.autocast)."""


def modules(model: nn.Module, *kinds: type[nn.Module]) -> dict[str, nn.Module]:
    """Modules of these kinds by name, in the order of definition."""
    return {name: part for name, part in model.named_modules() if isinstance(part, kinds)}


def parameters(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of Conv, ConvTranspose and Linear for `example`."""
    return sum(macs_of(model, example).values())


def macs_of(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Multiply-accumulates by layer; a layer that runs several times counts as often."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    found = dict.fromkeys(modules(model, *kinds), 0)
    names = {part: name for name, part in model.named_modules()}

    def count(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = part.weight
        assert isinstance(weight, Tensor)
        if isinstance(part, nn.ConvTranspose2d):
            found[names[part]] += inputs[0][0].numel() * weight[0].numel()
        else:
            places = output[0].numel() // weight.shape[0]
            found[names[part]] += places * weight.numel()

    hooks = [part.register_forward_hook(count) for part in modules(model, *kinds).values()]
    training = {part: part.training for part in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for part, before in training.items():
            part.training = before
    return found


def zeros(model: nn.Module) -> float:
    """Share of zeros in the weights of Conv and Linear."""
    weights = [part.weight for part in modules(model, nn.Conv2d, nn.ConvTranspose2d, nn.Linear).values()]
    count = sum(int((w == 0).sum()) for w in weights if isinstance(w, Tensor))
    return count / max(sum(w.numel() for w in weights if isinstance(w, Tensor)), 1)
