"""A network that trains in milliseconds, with all that a resumed training must have back, as a Problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.compression.problem import Batch, Problem
from edgekit.models.exporting import write_onnx

SIDE, CLASSES, BATCH = 8, 4, 8


class TinyNet(nn.Module):
    """Two convolutions with batch norms and a residual, dropout, one Linear. [B, 3, 8, 8] -> [B, 4]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = self._conv(3, width, 2)
        self.body = self._conv(width, width, 1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, CLASSES)

    @staticmethod
    def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.body(x)
        found: Tensor = self.head(self.drop(x.mean((2, 3))))
        return found


def pictures(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 8, 8, 3] of noise with a bright quarter, and which quarter it is."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, SIDE, SIDE, 3)).astype(np.uint8)
    labels = rng.integers(0, CLASSES, count)
    for image, label in zip(images, labels, strict=True):
        top, left = divmod(int(label), 2)
        image[4 * top : 4 * top + 4, 4 * left : 4 * left + 4, label % 3] += 100
    return images, labels


def tiny_problem(model: nn.Module | None = None, **changes: Any) -> Problem:
    """TinyNet on such pictures; the metrics are `top1` and the loss."""
    torch.manual_seed(0)
    images, labels = pictures(0, 96)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    y = torch.from_numpy(labels)

    def batch(step: int) -> Batch:
        pick = torch.from_numpy(np.random.default_rng([7, step]).integers(0, 64, BATCH))
        return x[pick], y[pick]

    def evaluate(network: nn.Module) -> dict[str, float]:
        before = network.training
        network.eval()
        with torch.no_grad():
            outputs = network(x[64:])
        network.train(before)
        top1 = float((outputs.argmax(1) == y[64:]).float().mean())
        return {"top1": top1, "loss": float(nn.functional.cross_entropy(outputs, y[64:]))}

    def write(network: nn.Module, path: Path) -> None:
        write_onnx(network, path, (torch.zeros(1, 3, SIDE, SIDE),), ["images"], ["logits"])

    values: dict[str, Any] = {
        "name": "tiny",
        "model": (model or TinyNet()).eval(),
        "example": torch.zeros(1, 3, SIDE, SIDE),
        "batch": batch,
        "loss": nn.functional.cross_entropy,
        "evaluate": evaluate,
        "write": write,
        "head": frozenset({"head"}),
        "identity": {"data": "quarters"},
        "lr": 1e-2,
    }
    return Problem(**{**values, **changes})


NEEDED: dict[str, dict[str, Any]] = {
    "prune": {"ratio": 0.3, "by": "macs", "granularity": 4, "minimum": 4},
    "search": {"by": "macs", "evaluations": 4, "population": 2, "batches": 1, "tune_steps": 3},
}
"""Options that a method does not go without, or not on a network this small."""
