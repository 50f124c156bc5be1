"""Distillation: the network learns from a teacher, by default from what it was before the recipe changed it.

Without `steps` it takes part in all later trainings (of pruning, quantization-aware training, ...), with `steps` it
trains by itself. It pays where labels are few or the student is much smaller than its teacher, and it never costs
anything at run time. Losses and papers: compression/distillation.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit import frontends
from edgekit.compression import distillation
from edgekit.compression.problem import Problem
from edgekit.compression.work import Hook, Work, frozen
from edgekit.errors import UsageError, did_you_mean
from edgekit.frontends.torch_module import load_module
from edgekit.project.training import ModuleSource, is_factory

Loss = Literal["auto", "kd", "dkd", "imitate", "smooth", "none"]


@dataclass(frozen=True)
class Options:
    """teacher: "" = the network as it came, an .onnx file, or "package.module:function" that makes a torch network.

    loss: kd ((1 - alpha) of the task's own, alpha of the teacher's logits at `temperature`), dkd (added to the task's,
    tckd and nckd its weights), imitate (what the problem says of detectors, added, times `weight`), auto = imitate where
    there is one, else kd. Controls: smooth (labels smoothed by `smoothing`, no teacher), none.
    hint: weight of features (FitNets; for detectors where the teacher sees something), 1x1 adapters are dropped at the
    end. relations: weight of distances and angles between the pictures of a batch (RKD). layers: names, or
    "student=teacher", of what is compared; none = the last of each picture size (relations: the last).
    steps: 0 = later trainings; lr: None = a tenth of what suits from scratch.
    """

    teacher: str = ""
    loss: Loss = "auto"
    weight: float = 1.0
    temperature: float = 4.0
    alpha: float = 0.9
    tckd: float = 1.0
    nckd: float = 8.0
    hint: float = 0.0
    relations: float = 0.0
    layers: tuple[str, ...] = ()
    smoothing: float = 0.1
    steps: int = 0
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {', '.join(get_args(Loss))}, got {self.loss!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature:g}")
        for name in ("alpha", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name):g}")
        for name in ("weight", "tckd", "nckd", "hint", "relations", "steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name):g}")
        if self.lr is not None and not 0 < self.lr <= 10:
            raise ValueError(f"lr must be above 0 and at most 10, got {self.lr:g}")


def run(work: Work, options: Options) -> None:
    """Train with the teacher, or have later trainings do so. Raises: UsageError for a teacher that is not there, layers
    that are not in the networks, or a loss that does not fit the outputs."""
    teacher = _teacher(options.teacher) if options.teacher else work.teacher
    hook = Teacher(work, teacher, options)
    work.facts[work.stage] = {
        "teacher": options.teacher or "as it came",
        "loss": hook.loss_name,
        "pairs": hook.pair(),
    }
    if options.steps:
        work.train(options.steps, lr=options.lr, hooks=[hook])
    else:
        work.hooks.append(hook)


class Teacher(Hook):
    """Adds what the teacher says to the loss. It looks at the student anew at each training: steps in between may
    change its layers."""

    def __init__(self, work: Work, teacher: nn.Module, options: Options) -> None:
        self.work, self.teacher, self.options = work, teacher, options
        name = options.loss
        self.loss_name = name if name != "auto" else ("imitate" if work.problem.imitate else "kd")
        if self.loss_name == "imitate" and work.problem.imitate is None:
            raise UsageError(
                f"loss 'imitate': problem {work.problem.name} does not say how its outputs are imitated. Use kd or a hint"
            )
        self.pairs: list[tuple[str, str]] = []
        self.adapters = nn.ModuleDict()
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._handles: list[Any] = []
        self._ramp = 1.0

    def pair(self) -> list[list[str]]:
        """Find the layers to compare and make adapters that fit them, keeping those that still do."""
        o = self.options
        if not o.hint and not o.relations:
            return []
        sizes = [_sizes(model, self.work.problem.example) for model in (self.work.model, self.teacher)]
        self.pairs = _named(o.layers, *sizes) if o.layers else _matched(self.work.problem, *sizes)
        made = nn.ModuleDict()
        for i, (mine, its) in enumerate(self.pairs if o.hint else ()):
            a, b = sizes[0][mine], sizes[1][its]
            if len(a) != len(b) or a[2:] != b[2:]:
                raise UsageError(
                    f"layers '{mine}={its}': sizes {a[1:]} and {b[1:]} differ in more than channels. Name others"
                )
            inputs, outputs = (a[1], b[1]) if len(a) == 4 else (a[-1], b[-1])
            if inputs == outputs:
                continue
            old = dict(self.adapters.items()).get(str(i))
            if isinstance(old, nn.Conv2d if len(a) == 4 else nn.Linear) and old.weight.shape[:2] == (
                outputs,
                inputs,
            ):
                made[str(i)] = old
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.work.seed + i)
                made[str(i)] = nn.Conv2d(inputs, outputs, 1) if len(a) == 4 else nn.Linear(inputs, outputs)
        self.adapters = made
        return [list(names) for names in self.pairs]

    def parameters(self) -> Sequence[nn.Parameter]:
        self.pair()
        return list(self.adapters.parameters())

    def state_dict(self) -> dict[str, Any]:
        return self.adapters.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.adapters.load_state_dict(state)

    def before(self, model: nn.Module, step: int, steps: int) -> None:
        self._ramp = min(1.0, 12 * (step + 1) / steps)
        if self.options.hint or self.options.relations:
            for at, (part, names) in enumerate(
                zip((model, self.teacher), zip(*self.pairs, strict=True), strict=True)
            ):
                for name in dict.fromkeys(names):
                    see = _keep(self._seen[at], name)
                    self._handles.append(part.get_submodule(name).register_forward_hook(see))

    def task_weight(self) -> float:
        return {"kd": 1 - self.options.alpha, "smooth": 0.0}.get(self.loss_name, 1.0)

    def loss(self, inputs: Tensor, outputs: Any, targets: Any) -> Tensor | None:
        known = None
        if self._handles or self.loss_name in ("kd", "dkd", "imitate"):
            with torch.no_grad():
                known = self.teacher(inputs)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        features = [(_full(self._seen[0][a]), _full(self._seen[1][b])) for a, b in self.pairs]
        for seen in self._seen:
            seen.clear()
        with torch.autocast(inputs.device.type, enabled=False):  # differences want all digits
            terms = self._terms(_full(outputs), _full(known), targets, features)
        return torch.stack(terms).sum() if terms else None

    def _terms(
        self, outputs: Any, known: Any, targets: Any, features: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        o = self.options
        terms: list[Tensor] = []
        if self.loss_name == "imitate":
            assert self.work.problem.imitate is not None
            terms.append(o.weight * self.work.problem.imitate(outputs, known, targets))
        elif self.loss_name == "smooth":
            self._logits(outputs)
            terms.append(functional.cross_entropy(outputs, targets, label_smoothing=o.smoothing))
        elif self.loss_name in ("kd", "dkd"):
            self._logits(outputs)
            if outputs.shape != known.shape:
                raise UsageError(
                    f"teacher: gives {tuple(known.shape)}, expected {tuple(outputs.shape)} as the network. Take one of the same classes"
                )
            if self.loss_name == "kd":
                terms.append(o.alpha * distillation.kd(outputs, known, o.temperature))
            else:
                terms.append(
                    o.weight
                    * self._ramp
                    * distillation.dkd(outputs, known, targets, o.tckd, o.nckd, o.temperature)
                )
        if o.hint:
            found = getattr(self.work.problem.imitate, "foreground", None)
            masks = found(known) if found else []
            for i, (mine, its) in enumerate(features):
                if str(i) in self.adapters:
                    mine = self.adapters[str(i)](mine)
                terms.append(o.hint / len(features) * distillation.hint(mine, its, _mask(masks, its)))
        if o.relations:
            for mine, its in features if o.layers else features[-1:]:
                mine, its = (x.flatten(2).mean(2) if x.ndim > 2 else x for x in (mine, its))
                both = 25 * distillation.rkd_distance(mine, its) + 50 * distillation.rkd_angle(mine, its)
                terms.append(o.relations * both)
        return terms

    def _logits(self, outputs: Any) -> None:
        if not isinstance(outputs, Tensor) or outputs.ndim < 2:
            raise UsageError(
                f"loss {self.loss_name!r}: is for logits [B, C], this network gives {type(outputs).__name__}. Use imitate or a hint"
            )


def _full(found: Any) -> Any:
    """Tensors of half precision, however nested, in float32."""
    if isinstance(found, Tensor):
        return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found
    return type(found)(map(_full, found)) if isinstance(found, list | tuple) else found


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        seen[name] = output

    return keep


def _sizes(model: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Output size of every module that gives a tensor [B, C, ...], in the order of their ends."""
    found: dict[str, tuple[int, ...]] = {}

    def see(name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim >= 2:
                found.pop(name, None)
                found[name] = tuple(output.shape)

        return keep

    handles = [part.register_forward_hook(see(name)) for name, part in model.named_modules() if name]
    before = [(part, part.training) for part in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for part, training in before:
            part.training = training
    return found


def _named(
    layers: Sequence[str], mine: Mapping[str, tuple[int, ...]], its: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str]]:
    pairs = []
    for each in layers:
        a, _, b = each.partition("=")
        for name, known, which in ((a, mine, "network"), (b or a, its, "teacher")):
            if name not in known:
                raise UsageError(f"layer {name!r}: not in the {which}. {did_you_mean(name, known)}")
        pairs.append((a, b or a))
    return pairs


def _matched(
    problem: Problem, mine: Mapping[str, tuple[int, ...]], its: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str]]:
    """The last layer of each picture size that both have, heads apart: (student's, teacher's)."""
    # of heads.0.box all of "heads." is left out: what comes before the heads is to be imitated
    heads = tuple(name.partition(".")[0] for name in problem.head)

    def last(sizes: Mapping[str, tuple[int, ...]]) -> dict[tuple[int, ...], str]:
        return {
            size[2:]: name
            for name, size in sizes.items()
            if len(size) == 4 and name.partition(".")[0] not in heads
        }

    a, b = last(mine), last(its)
    pairs = [(name, b[size]) for size, name in a.items() if size in b]
    if not pairs:
        raise UsageError(
            'layers: network and teacher have no feature maps of one size. Name layers, as "stage3=stage4"'
        )
    return pairs


def _mask(masks: Sequence[Tensor], feature: Tensor) -> Tensor | None:
    """Where the teacher sees something, one cell wider, in the feature's size [B, 1, H, W]; None without masks."""
    if not masks or feature.ndim != 4:
        return None
    size = feature.shape[2:]
    best = next((m for m in masks if m.shape[2:] == size), None)
    if best is None:
        fine = max(masks, key=lambda m: m.shape[2] * m.shape[3])
        smaller = size[0] <= fine.shape[2] and size[1] <= fine.shape[3]
        best = functional.adaptive_max_pool2d(fine, size) if smaller else functional.interpolate(fine, size)
    return functional.max_pool2d(best, 3, 1, 1)


def _teacher(name: str) -> nn.Module:
    """A network from an ONNX file or a factory, frozen. Raises: UsageError, ModelError."""
    if name.endswith(".onnx"):
        from edgekit.compression.onnx_module import from_onnx

        return frozen(from_onnx(frontends.load(Path(name))))
    if is_factory(name):
        made = load_module(ModuleSource(name, root=Path.cwd()), "teacher")
        if not isinstance(made, nn.Module):
            raise UsageError(f"teacher {name!r}: gives a {type(made).__name__}, expected a torch.nn.Module")
        return frozen(made)
    raise UsageError(f"teacher {name!r}: expected an .onnx file or package.module:function")
