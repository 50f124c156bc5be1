"""The benchmark that methods are compared on: pictures of shapes (synth/shapes.py) and a small convolutional network.

problem = shapes_problem(cache=Path("runs/compression"))     # trained within minutes once, then kept
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.compression.problem import Batch, Problem
from edgekit.models.exporting import write_onnx
from edgekit.synth.shapes import CLASSES, SIDE, shapes

TRAIN, TEST = 8000, 2000
TEST_SEED = 1_000_000
BATCH = 64
STEPS = 1500
Data = tuple[Tensor, Tensor]


def _data(seed: int, count: int) -> Data:
    """float32 [n, 3, 32, 32] in 0..1 and int64 [n]."""
    images, labels = shapes(seed, count)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous(), torch.from_numpy(
        labels
    )


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class ShapesNet(nn.Module):
    """Four stages of 3x3 convolutions (32, 64, 128, 128 at width 1), one residual, mean over places, one Linear.

    Input float32 [B, 3, 32, 32] in 0..1; output logits [B, 10].
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        a, b, c = (max(8, round(n * width / 8) * 8) for n in (32, 64, 128))
        self.stem = conv(3, a)
        self.stage1 = conv(a, b, 2)
        self.stage2 = conv(b, c, 2)
        self.stage3 = conv(c, c)
        self.head = nn.Linear(c, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(images)))
        x = x + self.stage3(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def shapes_problem(
    model: nn.Module | None = None, *, seed: int = 0, width: float = 1.0, steps: int = STEPS,
    cache: Path | None = None, train: int = TRAIN, test: int = TEST,
) -> Problem:  # fmt: skip
    """`model`, or a ShapesNet trained for `steps` batches from `seed` (kept in `cache` by its options).

    Batches are drawn with the seed and mirrored at random; loss is the cross-entropy, the metric `top1` on test
    pictures that no training saw.
    """
    images, labels = _data(seed, train)
    test_images, test_labels = _data(TEST_SEED, test)

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([seed, 5, step])
        pick = torch.from_numpy(rng.integers(0, train, BATCH))
        found = images[pick]
        return (found.flip(3) if rng.random() < 0.5 else found), labels[pick]

    def evaluate(network: nn.Module) -> dict[str, float]:
        before = network.training
        network.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, test, 500):
                found = network(test_images[start : start + 500]).argmax(1)
                right += int((found == test_labels[start : start + 500]).sum())
        network.train(before)
        return {"top1": right / test}

    def write(network: nn.Module, path: Path) -> None:
        write_onnx(network, path, (torch.zeros(1, 3, SIDE, SIDE),), ["images"], ["logits"])

    made = model or ShapesNet(width)
    identity: dict[str, Any] = {"data": "shapes", "seed": seed, "train": train, "test": test, "batch": BATCH}
    problem = Problem(
        "shapes", made, torch.zeros(1, 3, SIDE, SIDE), batch,
        nn.functional.cross_entropy, evaluate, write, frozenset({"head"}), identity=identity, lr=2e-3,
    )  # fmt: skip
    if model is None:
        _train(problem, seed, steps, cache and cache / f"shapes-{seed}-{width:g}-{steps}-{train}.pt", width)
    return problem


def _train(problem: Problem, seed: int, steps: int, path: Path | None, width: float) -> None:
    from edgekit.compression.work import Work

    if path is not None and path.is_file():
        problem.model.load_state_dict(torch.load(path, weights_only=True))
        problem.model.eval()
        return
    torch.manual_seed(seed)
    with torch.no_grad():
        problem.model.load_state_dict(ShapesNet(width).state_dict())
    Work(problem, problem.model, problem.model, seed=seed).train(steps, lr=problem.lr)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save(problem.model.state_dict(), part)
        part.replace(path)
