"""What the steps of a recipe share: the network as it is now, how it trains, and what must be remembered.

A run is resumed by doing it again: structural changes are computed anew, trainings that ended are replaced by the
weights they ended with, and what cannot be computed twice with the same result (a measured time) is written down.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.archive import write_atomic
from edgekit.compression.problem import Problem
from edgekit.errors import EdgekitError, UsageError
from edgekit.models import training
from edgekit.target import Target

CLIP_NORM = 10.0
SAVE_SECONDS = 30.0
"""A training is saved that often at least: what an interrupt may cost."""


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
        """After the backward pass, before the optimizer's step. Gradients of masked weights are zeroed afterwards."""

    def after(self, model: nn.Module, step: int, steps: int) -> None:
        """After the optimizer's step and the masks, without gradients: projections, changes of `Work.masks`."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """More to train (adapters of a distillation)."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training must have back: tensors and plain values. Masks and facts of the Work are kept anyway."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state


@dataclass
class Work:
    """model: changed by steps. teacher: the network as it came, frozen, in evaluation mode. hooks: of every later training
    (distillation, masks that must hold). masks: weights that are zero and stay so, by parameter name (1 = kept):
    whoever changes weights later keeps them. target: the board to be fast on. folder: of the run, None = nothing is kept.
    say: one JSON line of the log. facts: what steps have to tell, for the summary (JSON).

    What a step draws from torch's generator is the same in a resumed run: `enter` seeds it, every batch of a training
    does, and so does the end of one. Generators of its own a step seeds from `seed`.
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
    _remembered: set[str] = field(default_factory=set)

    def enter(self, stage: str) -> None:
        """Begin a step of the recipe: its name in files, and what torch's generator gives in it."""
        self.stage = stage
        self._draw(stage)

    def train(
        self, steps: int, *, lr: float | None = None, hooks: Sequence[Hook] = (), warmup: int | None = None,
        floor: float = 0.02, save_every: int = 200, optimizer: Callable[[Sequence[nn.Parameter], float], Any] | None = None,
        ema: float = 0.0, clip: float = CLIP_NORM,
    ) -> None:  # fmt: skip
        """Train `model` for `steps` batches by AdamW with a cosine (models.training), with the hooks of this Work and these.

        lr: at its peak, a tenth of the problem's where not said. Batches go on from where the last training of this
        run ended. ema: end with the moving average of the weights of that decay (`Average`), 0 = with the last. clip:
        largest norm of a gradient. Ends in evaluation mode.
        Raises: TrainingError where the loss is no number, UsageError for a checkpoint that does not fit.
        """
        name = f"{self.stage}.{self._trainings}"
        self._trainings += 1
        first, self._trained_steps = self._trained_steps, self._trained_steps + steps
        hooks = [*self.hooks, *hooks]
        problem, model = self.problem, self.model
        peak = problem.lr / 10 if lr is None else lr
        extra = [p for hook in hooks for p in hook.parameters()]
        # each once: a hook may train what the network has, too
        weights = list({id(p): p for p in [*model.parameters(), *extra] if p.requires_grad}.values())
        make = optimizer or (lambda w, rate: training.adamw(w, rate, problem.weight_decay))
        stepper = make(weights, peak)
        average = Average(model, ema) if ema else None
        kept = {"model": model, "masks": _Masks(self.masks), "facts": _Facts(self.facts)}
        kept |= {f"hook{i}": hook for i, hook in enumerate(hooks)}
        parts: dict[str, Any] = {**kept, "optimizer": stepper, **({"average": average} if average else {})}
        path = None if self.folder is None else self.folder / f"{name}.pt"
        done = _load(path, kept, parts, steps) if path is not None and path.is_file() else 0
        model.train()
        warm = min(50, steps // 10 + 1) if warmup is None else warmup
        saved = time.monotonic()
        for step, (inputs, targets) in training.ahead(problem.batch, first + done, first + steps):
            at = step - first
            self._draw(name, at)
            training.set_rate(stepper, peak * training.cosine(at, steps, warm, floor))
            for hook in hooks:
                hook.before(model, at, steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=problem.bf16):
                outputs = model(inputs)
                loss = problem.loss(outputs, targets)
                for hook in hooks:
                    loss = loss * hook.task_weight()
                for hook in hooks:
                    term = hook.loss(inputs, outputs, targets)
                    loss = loss if term is None else loss + term
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"training {name}: the loss is {loss.item()} at step {at}, expected a number. Lower lr"
                )
            stepper.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for hook in hooks:
                hook.gradients(model, at, steps)
            mask_gradients(model, self.masks)
            torch.nn.utils.clip_grad_norm_(weights, clip)
            stepper.step()
            with torch.no_grad():
                apply_masks(model, self.masks)
                for hook in hooks:
                    hook.after(model, at, steps)
                if average:
                    average.update(model, at)
            last = at + 1 == steps
            if last and average:
                average.store(model)
                apply_masks(model, self.masks)  # those of now: the average remembers earlier ones
            if (at + 1) % 20 == 0 or last:
                self.say({"training": name, "step": at + 1, "of": steps, "loss": round(loss.item(), 5)})
            if path is not None and (
                last or (at + 1) % save_every == 0 or time.monotonic() > saved + SAVE_SECONDS
            ):
                _save(path, kept if last else parts, at + 1)
                saved = time.monotonic()
            self.progress(name, at + 1, steps)
        for weight in weights:
            weight.grad = None
        model.eval()
        self._draw(name, steps)

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time (JSON): for what a repetition would not give again, or is slow to.

        key: once a stage, since a resumed run could not tell two apart. What `make` draws from torch's generator
        changes nothing outside of it.
        """
        assert re.fullmatch(r"[\w.-]+", key), key
        whole = f"{self.stage}.{key}"
        assert whole not in self._remembered, f"remembered twice: {whole}"
        self._remembered.add(whole)
        path = None if self.folder is None else self.folder / f"{whole}.json"
        if path is not None and path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UsageError(
                    f"file {path}: damaged: {error}. Delete it, and it is found out again"
                ) from None
        with torch.random.fork_rng(devices=[]):
            text = json.dumps(make(), indent=1) + "\n"
        if path is not None:
            write_atomic(path, [text.encode()], "run")
        return json.loads(text)

    def metric(self, key: str) -> dict[str, float]:
        """The metrics of `model` as it is now, measured once a run. key: once a stage."""

        def measure() -> dict[str, float]:
            found = self.problem.evaluate(self.model)
            self.say({"stage": self.stage, "metric": key, **found})
            return found

        known: dict[str, float] = self.remember(f"metric.{key}", measure)
        return known

    def _draw(self, *what: Any) -> None:
        """Seed torch's generator from the run's seed and a place in it."""
        found = hashlib.sha256(json.dumps([self.seed, *what]).encode()).digest()
        torch.default_generator.manual_seed(int.from_bytes(found[:7], "little"))


class TrainingError(EdgekitError, FloatingPointError):
    """A training whose loss is no number any more."""


class Average:
    """The moving average of a network's weights and statistics (Polyak & Juditsky 1992), of `decay` after a warm-up in
    which it forgets its beginning: min(decay, (1 + step) / (10 + step)). Of what is no float, the last value."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def update(self, model: nn.Module, step: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            held = self.values.get(name)
            if held is not None and held.shape == value.shape and held.is_floating_point():
                held.lerp_(value.detach(), share)
            else:
                self.values[name] = value.detach().clone()

    def store(self, model: nn.Module) -> None:
        model.load_state_dict(self.values)

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = dict(state)


class _Masks:
    """The masks of a Work in a checkpoint: a hook may have changed them in a training."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks

    def state_dict(self) -> dict[str, Any]:
        return self.masks

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in [n for n in self.masks if n not in state]:
            del self.masks[name]
        for name, mask in state.items():
            held = self.masks.get(name)
            if held is not None and held.shape == mask.shape and held.dtype == mask.dtype:
                held.copy_(mask)  # in place: a hook may hold the same tensor
            else:
                self.masks[name] = mask


class _Facts:
    """The facts of a Work in a checkpoint."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def state_dict(self) -> dict[str, Any]:
        return {"json": json.dumps(self.facts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _merge(self.facts, json.loads(state["json"]))


def _merge(held: dict[str, Any], found: dict[str, Any]) -> None:
    """`found` into `held`, in place: a method may hold a table of them."""
    for key, value in found.items():
        mine = held.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            _merge(mine, value)
        elif isinstance(mine, list) and isinstance(value, list):
            mine[:] = value
        else:
            held[key] = value


def begin(problem: Problem, **options: Any) -> Work:
    """A Work on a copy of the problem's network. options: fields of Work."""
    work = Work(problem, copy.deepcopy(problem.model).eval(), frozen(problem.model), **options)
    work.enter(work.stage)
    return work


def frozen(model: nn.Module) -> nn.Module:
    """A copy that nothing trains, in evaluation mode: a teacher."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero what is masked. Masks of parameters that are gone must have been dropped by who removed them."""
    if masks:
        named = dict(model.named_parameters())
        for name, mask in masks.items():
            named[name].data.mul_(mask)


def mask_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """No gradient for what is masked: it does not train, so it must not count where gradients are clipped."""
    if masks:
        named = dict(model.named_parameters())
        for name, mask in masks.items():
            gradient = named[name].grad
            if gradient is not None:
                gradient.mul_(mask)


def digest(model: nn.Module) -> str:
    """sha256 of names, shapes and values."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _save(path: Path, parts: Mapping[str, Any], step: int) -> None:
    """Write it whole or not at all. Raises: OutputError."""
    data = io.BytesIO()
    torch.save({"step": step, **{name: each.state_dict() for name, each in parts.items()}}, data)
    write_atomic(path, [data.getbuffer()], "checkpoint")


def _load(path: Path, kept: Mapping[str, Any], parts: Mapping[str, Any], steps: int) -> int:
    """Load what a training has reached, and return its steps; of one that ended, only what outlives it (`kept`).

    Raises: UsageError, before anything is changed where the network differs.
    """
    what = f"checkpoint {path}"
    step = "Use a new folder, or delete this one"
    try:
        state = torch.load(path, weights_only=True)
        done = int(state["step"])
        saved = {
            name: tuple(value.shape) for name, value in state["model"].items() if isinstance(value, Tensor)
        }
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise UsageError(
            f"{what}: damaged: {str(error).splitlines()[0][:120]}. Delete it to train anew"
        ) from None
    here = {
        name: tuple(value.shape)
        for name, value in parts["model"].state_dict().items()
        if isinstance(value, Tensor)
    }
    wrong = [n for n in {**here, **saved} if here.get(n) != saved.get(n)]
    if wrong or done > steps:
        first = wrong[0] if wrong else ""
        problem = (
            f"of another structure, expected {first} {_size(here.get(first))}, got {_size(saved.get(first))} "
            f"({len(wrong)} differ)"
            if wrong
            else f"of a longer training, expected at most {steps} steps, got {done}"
        )
        raise UsageError(f"{what}: {problem}. {step}")
    wanted = kept if done == steps else parts
    try:
        for name, each in wanted.items():
            each.load_state_dict(state[name])
    except (KeyError, ValueError, RuntimeError, TypeError, AssertionError) as error:
        text = " ".join(str(error).split())[:120] or type(error).__name__
        raise UsageError(f"{what}: of another training: {text}. {step}") from None
    return done


def _size(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(list(shape))
