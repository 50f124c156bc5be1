"""A classifier and its labelled pictures as a Problem: cross-entropy, top-1 accuracy, plain augmentations.

Pictures go through the input rule of the project, as a bundle applies it on the device; in training they are cut,
mirrored and brightened at random before it ([model.train]: zoom, mirror, color).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit import frontends
from edgekit.compression.onnx_module import OnnxModule, from_onnx, heads, to_onnx, unfold_batchnorm
from edgekit.compression.problem import Batch, Problem
from edgekit.compression.problems import Opened, labelled, training_pictures
from edgekit.frontends.torch_module import export
from edgekit.models.exporting import write_onnx
from edgekit.passes import Prepared, prepare
from edgekit.passes.graph import shape
from edgekit.project import ModelEntry, PreprocessHint
from edgekit.project.training import TrainHint
from edgekit.schema import to_json
from edgekit.tasks.classify.dataset import ClassSet, read_set
from edgekit.tasks.classify.metric import judge
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.toolchain import tasks
from edgekit.toolchain.data import fed

KEPT_BYTES = 1 << 29
"""Pictures up to so many bytes are kept in memory, of each set."""
EVALUATED = 64
"""Pictures a batch when judging."""
UNFOLD = 8
"""Batches that the statistics of batch norms are found on, where a network came without any."""
LR = 1e-3


def opened(entry: ModelEntry, module: nn.Module | None, seed: int, steps: int) -> Opened:
    """`module`, or the ONNX network of `entry`, to be trained on [model.train] and judged on [model.evaluation].

    Raises: UsageError, ModelError, CalibrationError (pictures in both sets).
    """
    train, judged = training_pictures(entry), labelled(entry)
    path = entry.source
    if module is not None:
        assert entry.module is not None
        path = export(module, entry.module, f"model {entry.name}")
    prepared = prepare(frontends.load(path), task="classify", check=False)
    spec, *_ = tasks.half("classify").make_spec(
        dataclasses.replace(entry, source=path, module=None), prepared
    )
    assert judged.data is not None, "checked by the project reader"
    assert train.data.data is not None, "checked by the project reader"
    test = read_set(judged.data, judged.images, limit=judged.count, labels=spec.labels)
    data = read_set(
        train.data.data, train.data.images, limit=train.data.count, labels=spec.labels, split="training"
    )
    rule: ImagePreprocess = spec.preprocess
    batches = Batches(data, train, rule, seed)
    network, head = (module, _last(module)) if module is not None else _network(prepared, batches)
    sizes = shape(prepared.model.graph.inputs[0]) or ()
    example = torch.zeros((1, *sizes[1:]), dtype=batches(0)[0].dtype)
    scores = prepared.activation == "none" or _adds_up(network, example)

    def write(found: nn.Module, file: Path) -> None:
        if isinstance(found, OnnxModule):
            to_onnx(found, file)
        else:
            write_onnx(found, file, (example,), ["input"], ["output"])

    identity = {
        "task": "classify", "data": data.digest, "evaluation": test.digest, "rule": to_json(rule), "seed": seed,
        "batch": train.batch, "mirror": train.mirror, "zoom": train.zoom, "color": train.color, "lr": train.lr,
    }  # fmt: skip
    if module is None:  # the rule may have been found in a graph that looks otherwise when it is written
        fields = {f.name: getattr(rule, f.name) for f in dataclasses.fields(PreprocessHint)}
        entry = dataclasses.replace(entry, preprocess=PreprocessHint(**fields))
    made = Problem(
        entry.name, network, example, batches, _loss(scores), _top(test, rule), write, head,
        identity=identity, lr=train.lr or LR,
    )  # fmt: skip
    what = {"pictures": len(data.images), "classes": len(data.labels), "judged_on": len(test.images)}
    return Opened(made, entry, train.steps if module is not None else 0, what)


def _network(prepared: Prepared, batches: Batches) -> tuple[nn.Module, frozenset[str]]:
    """The graph as a torch module, with batch norms again where a build had folded them."""
    network = from_onnx(prepared.model)
    unfold_batchnorm(network, (batches(step)[0] for step in range(UNFOLD)))
    return network, heads(network)


def _last(module: nn.Module) -> frozenset[str]:
    """The layer that gives the classes: the last with weights that runs."""
    names = [n for n, part in module.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    return frozenset(names[-1:])


def _adds_up(network: nn.Module, example: Tensor) -> bool:
    """Whether the outputs are probabilities already."""
    with torch.no_grad():
        found = network(example).flatten().double()
    return bool(found.min() >= 0) and abs(float(found.sum()) - 1) < 1e-4


def _loss(scores: bool) -> Callable[[Any, Any], Tensor]:
    """Cross-entropy of outputs [B, C, ...] and classes [B]. scores: the outputs are no logits but 0..1."""

    def loss(outputs: Tensor, classes: Tensor) -> Tensor:
        flat = outputs.flatten(1)
        if scores:
            flat = flat.clamp_min(1e-7).log()  # cross_entropy makes them add up to 1
        return nn.functional.cross_entropy(flat, classes)

    return loss


def _top(data: ClassSet, rule: ImagePreprocess) -> Callable[[nn.Module], dict[str, float]]:
    """Problem.evaluate: {"top1"}, and "top5" of more than 5 classes, as the classifier's evidence counts them."""
    kept: list[Tensor] = []
    keep = len(data.images) * rule.width * rule.height * 12 <= KEPT_BYTES

    def inputs(number: int) -> Tensor:
        if number < len(kept):
            return kept[number]
        first = number * EVALUATED
        last = min(first + EVALUATED, len(data.images))
        made = torch.from_numpy(np.concatenate([fed(data.read(i), rule) for i in range(first, last)]))
        if keep:
            kept.append(made)
        return made

    def evaluate(network: nn.Module) -> dict[str, float]:
        before = {part: part.training for part in network.modules()}
        network.eval()
        ranks: list[int] = []
        with torch.no_grad():
            for number in range(-(-len(data.images) // EVALUATED)):
                outputs = network(inputs(number)).flatten(1).numpy()
                items = data.images[number * EVALUATED :]
                ranks += [judge(row, item.cls)[1] for row, item in zip(outputs, items, strict=False)]
        for part, was in before.items():
            part.training = was
        found = np.array(ranks)
        top = {"top1": round(float((found == 0).mean()), 6)}
        return {**top, "top5": round(float((found < 5).mean()), 6)} if len(data.labels) > 5 else top

    return evaluate


class Batches:
    """Problem.batch of a classifier: batch `step` depends on the seed and the step alone."""

    def __init__(self, data: ClassSet, train: TrainHint, rule: ImagePreprocess, seed: int) -> None:
        self.data, self.train, self.rule, self.seed = data, train, rule, seed
        self._pictures: dict[int, np.ndarray] = {}
        self._bytes = 0
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> Batch:
        inputs, classes = [], []
        for slot in range(self.train.batch):
            epoch, at = divmod(step * self.train.batch + slot, len(self.data.images))
            number = int(self._order(epoch)[at])
            rng = np.random.default_rng([self.seed, 2, step, slot])
            inputs.append(fed(self._varied(self._picture(number), rng), self.rule))
            classes.append(self.data.images[number].cls)
        return torch.from_numpy(np.concatenate(inputs)), torch.tensor(classes)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, 1, epoch]).permutation(
                len(self.data.images)
            )
        return self._orders[epoch]

    def _picture(self, number: int) -> np.ndarray:
        found = self._pictures.get(number)
        if found is None:
            found = self.data.read(number)
            if self._bytes + found.nbytes <= KEPT_BYTES:
                self._pictures[number] = found
                self._bytes += found.nbytes
        return found

    def _varied(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A cut-out of the picture, mirrored half of the time, in other light."""
        h, w = picture.shape[:2]
        if self.train.zoom < 1:
            height, width = (max(1, round(n * rng.uniform(self.train.zoom, 1))) for n in (h, w))
            top, left = rng.integers(0, h - height + 1), rng.integers(0, w - width + 1)
            picture = picture[top : top + height, left : left + width]
        if self.train.mirror and rng.random() < 0.5:
            picture = picture[:, ::-1]
        if self.train.color:
            contrast, light = 1 + self.train.color * rng.uniform(-1, 1, 2)
            levels = (np.arange(256) - 128) * contrast + 128 * light
            picture = np.clip(levels, 0, 255).astype(np.uint8)[picture]
        return np.ascontiguousarray(picture)
