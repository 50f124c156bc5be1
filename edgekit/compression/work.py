"""What the steps of a recipe share: the network as it is now, how it trains, and what must be remembered.

A run is resumed by doing it again: structural changes are computed anew, trainings that ended are replaced by the
weights they ended with, and what cannot be computed twice with the same result (a measured time) is written down.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.compression.problem import Problem
from edgekit.models import training
from edgekit.target import Target

CLIP_NORM = 10.0


class Hook:
    """What a method does inside a training. Every part is optional; `step` of `steps` counts from 0."""

    def before(self, model: nn.Module, step: int, steps: int) -> None:
        """Before the forward pass."""

    def loss(self, inputs: Tensor, outputs: Any, targets: Any) -> Tensor | None:
        """A term that is added to the loss."""
        return None

    def task_weight(self) -> float:
        """What the task's own loss is multiplied by."""
        return 1.0

    def gradients(self, model: nn.Module, step: int, steps: int) -> None:
        """After the backward pass, before the optimizer's step."""

    def after(self, model: nn.Module, step: int, steps: int) -> None:
        """After the optimizer's step, without gradients: projections, masks."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """More to train (adapters of a distillation)."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training must have back: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state


@dataclass
class Work:
    """model: changed by steps. teacher: the network as it came, frozen, in evaluation mode. hooks: of every later training
    (distillation, masks that must hold). masks: weights that are zero and stay so, by parameter name (1 = kept):
    whoever changes weights later keeps them. target: the board to be fast on. folder: of the run, None = nothing is kept.
    say: one JSON line of the log. facts: what steps have to tell, for the summary.
    """

    problem: Problem
    model: nn.Module
    teacher: nn.Module
    target: Target | None = None
    precision: str = "int8"
    seed: int = 0
    folder: Path | None = None
    say: Callable[[Mapping[str, Any]], None] = lambda _: None
    progress: Callable[[str, int, int], None] = lambda *_: None
    hooks: list[Hook] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    stage: str = "step"
    """Name of the recipe step at work: unique, part of file names."""
    _trainings: int = 0
    _trained_steps: int = 0

    def train(
        self, steps: int, *, lr: float | None = None, hooks: Sequence[Hook] = (), warmup: int | None = None,
        floor: float = 0.02, save_every: int = 200, optimizer: Callable[[Sequence[nn.Parameter], float], Any] | None = None,
    ) -> None:  # fmt: skip
        """Train `model` for `steps` batches by AdamW with a cosine (models.training), with the hooks of this Work and these.

        lr: at its peak, a tenth of the problem's where not said. Batches go on from where the last training of this
        run ended. Ends in evaluation mode. Raises: FloatingPointError where the loss is no number.
        """
        name = f"{self.stage}.{self._trainings}"
        self._trainings += 1
        first, self._trained_steps = self._trained_steps, self._trained_steps + steps
        hooks = [*self.hooks, *hooks]
        problem, model = self.problem, self.model
        peak = problem.lr / 10 if lr is None else lr
        extra = [p for hook in hooks for p in hook.parameters()]
        weights = [p for p in [*model.parameters(), *extra] if p.requires_grad]
        make = optimizer or (lambda w, rate: training.adamw(w, rate, problem.weight_decay))
        stepper = make(weights, peak)
        held = {f"hook{i}": hook for i, hook in enumerate(hooks)}
        parts: dict[str, Any] = {"model": model, "optimizer": stepper, **held}
        path = None if self.folder is None else self.folder / f"{name}.pt"
        done = 0
        if path is not None and path.is_file():
            done = _load(path, parts)
        model.train()
        warm = min(50, steps // 10 + 1) if warmup is None else warmup
        for step, (inputs, targets) in training.ahead(problem.batch, first + done, first + steps):
            at = step - first
            training.set_rate(stepper, peak * training.cosine(at, steps, warm, floor))
            for hook in hooks:
                hook.before(model, at, steps)
            outputs = model(inputs)
            loss = problem.loss(outputs, targets)
            for hook in hooks:
                loss = loss * hook.task_weight()
            for hook in hooks:
                term = hook.loss(inputs, outputs, targets)
                loss = loss if term is None else loss + term
            if not torch.isfinite(loss):
                raise FloatingPointError(f"training {name}: the loss is {loss.item()} at step {at}")
            stepper.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for hook in hooks:
                hook.gradients(model, at, steps)
            torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
            stepper.step()
            with torch.no_grad():
                apply_masks(model, self.masks)
                for hook in hooks:
                    hook.after(model, at, steps)
            if (at + 1) % 20 == 0 or at + 1 == steps:
                self.say({"training": name, "step": at + 1, "of": steps, "loss": round(loss.item(), 5)})
            self.progress(name, at + 1, steps)
            if path is not None and ((at + 1) % save_every == 0 or at + 1 == steps):
                _save(path, parts, at + 1)
        model.eval()

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time (JSON): for what a repetition would not give again, or is slow to."""
        if self.folder is None:
            return make()
        path = self.folder / f"{self.stage}.{key}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        found = make()
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
        return json.loads(json.dumps(found))

    def metric(self, key: str) -> dict[str, float]:
        """The metrics of `model` as it is now, measured once a run."""
        found: dict[str, float] = self.remember(f"metric.{key}", lambda: self.problem.evaluate(self.model))
        self.say({"stage": self.stage, "metric": key, **found})
        return found


def begin(problem: Problem, **options: Any) -> Work:
    """A Work on a copy of the problem's network. options: fields of Work."""
    teacher = copy.deepcopy(problem.model).eval().requires_grad_(False)
    torch.manual_seed(options.get("seed", 0))
    return Work(problem, copy.deepcopy(problem.model).eval(), teacher, **options)


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero what is masked. Masks of parameters that are gone must have been dropped by who removed them."""
    named = dict(model.named_parameters())
    for name, mask in masks.items():
        named[name].data.mul_(mask)


def digest(model: nn.Module) -> str:
    """sha256 of names, shapes and values."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _save(path: Path, parts: Mapping[str, Any], step: int) -> None:
    part = path.with_name(path.name + ".part")
    torch.save({"step": step, **{name: each.state_dict() for name, each in parts.items()}}, part)
    os.replace(part, path)


def _load(path: Path, parts: Mapping[str, Any]) -> int:
    state = torch.load(path, weights_only=True)
    for name, each in parts.items():
        each.load_state_dict(state[name])
    return int(state["step"])
