"""Quantization-aware training of a placed graph, with nothing but pictures: it learns to imitate the float network.

Any network that was quantized after training can go on from there: the teacher is the float graph it came from, so no
labels, no loss and no source are needed. Pictures are cut and mirrored where the graph takes other sizes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgekit.compression.fake_quant import FakeQuantized
from edgekit.compression.onnx_module import OnnxModule, from_onnx
from edgekit.compression.problem import Batch, Problem
from edgekit.compression.work import Work
from edgekit.quant.rules import Rules
from edgekit.tasks.detect.spec import Channels, DetectHead, HeadLevel

Progress = Callable[[str, int, int], None]
CUT = 32
"""Sides of cut pictures are multiples of this: of the largest stride."""
LEAST_VARIANCE = 1e-12
SAVE_EVERY = 50


@dataclass(frozen=True)
class Lesson:
    """steps: batches of `batch` pictures. lr: peak, in codes a step (fake_quant.PACE for steps). crop: side of the squares
    cut from pictures, 0 takes them whole: slower, but what repairs fitted to whole pictures is not undone.
    weight_bits: see FakeQuantized. inner: weight of what layers read, imitated as outputs are: every layer is told what
    it should give, which short trainings need. views: whole pictures are also shown near, four at a time and mirrored."""

    steps: int = 300
    lr: float = 0.02
    batch: int = 4
    crop: int = 0
    weight_bits: int = 8
    inner: float = 5.0
    views: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 10**6:
            raise ValueError(f"steps must be between 1 and 1000000, got {self.steps}")
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr must be above 0 and at most 1, got {self.lr:g}")
        if not 1 <= self.batch <= 4096:
            raise ValueError(f"batch must be between 1 and 4096, got {self.batch}")
        if self.crop < 0 or self.crop % CUT:
            raise ValueError(f"crop must be 0 or a multiple of {CUT}, got {self.crop}")
        if not self.inner >= 0:
            raise ValueError(f"inner must not be negative, got {self.inner:g}")
        if not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be between 2 and 8, got {self.weight_bits}")


def learn(
    placed: ir.Model, exact: ir.Model, rules: Rules, feeds: Iterable[Mapping[str, np.ndarray]], lesson: Lesson, *,
    loss: Callable[[Any, Any], Tensor] | None = None, folder: Path | None = None, progress: Progress = lambda *_: None,
    say: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> ir.Model:  # fmt: skip
    """`placed` (annotated, perhaps repaired) with learned weights and steps, that imitates `exact`, the float graph.

    feeds: inputs by name, of batch 1; of a network with states, these with the float network's. loss: (its outputs, the
    teacher's) -> scalar, `imitation` where not given. folder: where an
    feeds: inputs by name, of batch 1; of a network with states, these with the float network's. loss: (its outputs, the
    teacher's) -> scalar, `imitation` where not given. folder: where an
    interrupted training goes on from. Weights that are zero in `exact` stay so: they were pruned. The same inputs give
    the same graph. Raises: TrainingError where the error is no number.
    """
    student = FakeQuantized(placed, rules, lesson.weight_bits)
    teacher = from_onnx(exact).requires_grad_(False)
    student.watched = inner(teacher, student.network) if lesson.inner else ()
    batches = Batches(teacher, feeds, lesson, student.watched)
    last = loss or imitation

    def whole(outputs: Any, targets: Any) -> Tensor:
        wanted, values = targets
        found: Tensor = last(outputs, wanted)
        if not values:
            return found
        return found + lesson.inner * imitation(
            tuple(student.seen[n] for n in values), tuple(values.values())
        )

    problem = Problem(
        "qat", student, batches(0)[0][0][:1], batches, whole, lambda _: {}, lambda *_: None, lr=lesson.lr,
        weight_decay=0.0,
    )  # fmt: skip
    work = Work(
        problem, student, teacher, seed=lesson.seed, folder=folder, say=say, stage="qat",
        progress=lambda _, done, of: progress("learn steps and weights", done, of),
        masks=student.masks(pruned(teacher)),
    )  # fmt: skip
    torch.manual_seed(lesson.seed)
    _drop_damaged(folder)
    work.train(lesson.steps, lr=lesson.lr, floor=0.02, save_every=SAVE_EVERY)
    return student.learned()


def pruned(network: OnnxModule) -> dict[str, Tensor]:
    """Masks of the weights that are exactly zero in floats, by parameter name."""
    found = {}
    for child, origin in network.origins.items():
        weight = getattr(network, child).weight
        if origin.op != "BatchNormalization" and bool((weight == 0).any()):
            found[f"{child}.weight"] = (weight != 0).to(weight.dtype)
    return found


def inner(teacher: OnnxModule, student: OnnxModule) -> tuple[str, ...]:
    """Values that layers read and both networks compute: what is imitated beside the outputs."""
    outer = {*student.input_names, *student.output_names, *student.buffer_of}
    known = {name for step in teacher.steps for name in step.outputs}
    read = [step.inputs[0] for step in student.steps if step.child]
    return tuple(dict.fromkeys(n for n in read if n in known and n not in outer))


def imitation(student: Any, teacher: Any) -> Tensor:
    """Noise over variance of each output, averaged (quant.sensitivity.output_error): 0 for equal ones."""
    found, wanted = (v if isinstance(v, tuple) else (v,) for v in (student, teacher))
    errors = [
        (s - t).square().mean() / t.var(correction=0).clamp_min(LEAST_VARIANCE)
        for s, t in zip(found, wanted, strict=True)
    ]
    return torch.stack(errors).mean()


def _drop_damaged(folder: Path | None) -> None:
    """A checkpoint that cannot be read counts as none."""
    for path in () if folder is None else folder.glob("*.pt"):
        try:
            torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError):
            path.unlink(missing_ok=True)


FOREGROUND = 0.05
"""Score of the teacher from which a place counts as one where something is."""


@dataclass(frozen=True)
class ImitateDetections:
    """`imitation` of a detector's raw outputs, and on top of it what its boxes are made of, where the teacher sees any:
    objectness everywhere and classes there as KL of Bernoullis, boxes there by squared error over their variance, each per
    place of the foreground. head: whose scores are sigmoids (not fastestdet, rows); names: of the outputs, in order."""

    head: DetectHead
    names: tuple[str, ...]

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        found, wanted = (
            dict(zip(self.names, v if isinstance(v, tuple) else (v,), strict=True))
            for v in (student, teacher)
        )
        loss = imitation(student, teacher)
        parts: list[tuple[Tensor, ...]] = []
        for level in self.head.levels:
            for anchor in range(max(1, len(level.anchors))):
                shift = anchor * (5 + self.head.num_classes)
                parts.append(tuple(p for v in (found, wanted) for p in self._rows(level, v, shift)))
        box, obj, cls, box_t, obj_t, cls_t = (torch.cat(p) for p in zip(*parts, strict=True))
        score = obj_t.sigmoid() * cls_t.sigmoid().amax(1)
        front = score > FOREGROUND
        count = int(front.sum())
        if not count:
            return loss
        variance = box_t[front].var(0, correction=0)
        error = (box[front] - box_t[front]).square() / (variance + 1e-2 * variance.mean() + LEAST_VARIANCE)
        seen = (score[front, None] * error).mean(1).sum()
        seen = seen + _kl(cls[front], cls_t[front]).sum()
        if self.head.levels[0].objectness is not None:
            seen = seen + _kl(obj, obj_t).sum()
        return loss + seen / count

    def _rows(self, level: HeadLevel, outputs: Mapping[str, Tensor], shift: int) -> tuple[Tensor, ...]:
        """(box [N, 4 bins], objectness [N], classes [N, C]) of one anchor; without objectness, certain."""

        def run(channels: Channels, count: int) -> Tensor:
            start = channels.start + shift
            found = outputs[channels.tensor][:, start : start + count]
            return found.movedim(1, -1).reshape(-1, count)

        box, cls = run(level.box, 4 * max(1, self.head.bins)), run(level.classes, self.head.num_classes)
        certain = torch.full((len(box),), 30.0)
        return box, certain if level.objectness is None else run(level.objectness, 1)[:, 0], cls


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Between Bernoullis given as logits, per element."""
    wanted = teacher.sigmoid()
    floor = nn.functional.binary_cross_entropy_with_logits(teacher, wanted, reduction="none")
    return nn.functional.binary_cross_entropy_with_logits(student, wanted, reduction="none") - floor


def imitate(spec: Any, names: Sequence[str]) -> Callable[[Any, Any], Tensor]:
    """What suits a task (tasks.Spec): detectors whose scores are sigmoids by what they see, all others by `imitation`."""
    head = getattr(spec, "head", None)
    if isinstance(head, DetectHead) and head.family in ("yolox", "yolov5", "yolov8", "nanodet"):
        return ImitateDetections(head, tuple(names))
    return imitation


class Batches:
    """step -> (inputs, what the teacher makes of them: (outputs, watched values by name)), by the step alone."""

    def __init__(
        self, teacher: OnnxModule, feeds: Iterable[Mapping[str, np.ndarray]], lesson: Lesson,
        watched: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.teacher, self.lesson = teacher, lesson
        self._watched = set(watched)
        self._pool: list[np.ndarray] = [
            np.concatenate(values) for values in zip(*([_small(f[n]) for n in teacher.input_names] for f in feeds), strict=True)
        ]  # fmt: skip
        if not self._pool:
            raise ValueError("qat: no pictures, expected some to learn on")
        sizes = self._pool[0].shape
        self._pictures = len(self._pool) == 1 and len(sizes) == 4 and sizes[1] in (1, 3)
        self._crop = self._cut()

    def _cut(self) -> int:
        """Side of the squares that the graph takes, 0 where it takes its own size only."""
        sizes = self._pool[0].shape
        if not self._pictures or not self.lesson.crop:
            return 0
        side = min(self.lesson.crop, *(int(n) // CUT * CUT for n in sizes[2:]))
        if side < CUT or side >= max(sizes[2:]):
            return 0
        try:
            with torch.no_grad():
                self.teacher(torch.zeros(1, sizes[1], side, side))
        except RuntimeError:  # a size that the graph has built in
            return 0
        return side

    def _view(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Of the size that the network takes: a square cut, or all of it, near or with three others; half of them mirrored.

        The teacher says what every view shows, so that a few pictures teach as many.
        """
        if self._crop:
            found = _cut(picture, (self._crop, self._crop), rng)
        elif not self.lesson.views:
            return picture
        elif (kind := rng.random()) < MOSAICS:
            others = self._pool[0][rng.integers(0, len(self._pool[0]), 3)]
            found = _mosaic((picture, *others), rng)
        elif kind < MOSAICS + NEAR:
            found = _part(picture, rng.uniform(0.5, 1.0), rng)
        else:
            found = picture
        return found[:, :, ::-1] if rng.random() < 0.5 else found

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.lesson.seed, 11, step])
        count = len(self._pool[0])
        which = rng.choice(count, self.lesson.batch, replace=count < self.lesson.batch)
        inputs = [pool[which] for pool in self._pool]
        if self._pictures:
            inputs = [np.stack([self._view(picture, rng) for picture in inputs[0]])]
        tensors = tuple(torch.from_numpy(np.ascontiguousarray(v)).float() for v in inputs)
        values: dict[str, Tensor] = {}

        def tap(name: str, x: Tensor) -> Tensor:
            if name in self._watched:
                values[name] = x
            return x

        with torch.no_grad():
            return tensors, (self.teacher.run(tensors, tap), values)  # type: ignore[return-value]


MOSAICS, NEAR = 0.4, 0.3
"""Shares of the views that are four pictures, and that are a part of one."""


def _cut(picture: np.ndarray, sizes: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """[C, H, W] -> [C, *sizes], somewhere in it."""
    top, left = (int(rng.integers(0, n - size + 1)) for n, size in zip(picture.shape[1:], sizes, strict=True))
    return picture[:, top : top + sizes[0], left : left + sizes[1]]


def _part(picture: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A part of `share` of each side, somewhere, in the size of the whole."""
    sizes = picture.shape[1:]
    return _resized(_cut(picture, [max(1, round(n * share)) for n in sizes], rng), sizes)


def _mosaic(pictures: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Four whole pictures around a point near the middle."""
    rows, columns = pictures[0].shape[1:]
    y, x = (int(n * rng.uniform(0.35, 0.65)) for n in (rows, columns))
    found = np.empty_like(pictures[0])
    corners = ((0, y, 0, x), (0, y, x, columns), (y, rows, 0, x), (y, rows, x, columns))
    for picture, (top, bottom, left, right) in zip(pictures, corners, strict=True):
        found[:, top:bottom, left:right] = _resized(picture, (bottom - top, right - left))
    return found


def _resized(picture: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """[C, H, W] -> [C, *sizes], averaged where it shrinks; type and range stay."""
    x = torch.from_numpy(np.ascontiguousarray(picture)).float()[None]
    y = nn.functional.interpolate(x, tuple(sizes), mode="bilinear", align_corners=False, antialias=True)
    found = y[0].numpy()
    return found.round().clip(0, 255).astype(np.uint8) if picture.dtype == np.uint8 else found


def _small(array: np.ndarray) -> np.ndarray:
    """Pixels as bytes, where they are."""
    if array.size and array.min() >= 0 and array.max() <= 255 and not (array % 1).any() and array.max() > 1:
        return array.astype(np.uint8)
    return array
