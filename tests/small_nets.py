"""A network of two stages with residuals, and a problem that it learns within a hundred batches."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from edgekit.compression.problem import Problem
from edgekit.models.blocks import block, conv, residual
from edgekit.models.exporting import write_onnx

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Two stages with residuals and a classifier."""

    def __init__(self, kind: str = "plain", channels: int = 16) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.stage = nn.Sequential(
            block(kind, 8, channels, 2), residual(kind, channels), residual(kind, channels)
        )
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.stage(self.stem(x)).mean((2, 3)))
        return found


class Placed(Net):
    """Keeps four places, so that quarters can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(nn.functional.adaptive_avg_pool2d(self.stage(self.stem(x)), 2).flatten(1))
        return found


def problem_of(net: nn.Module) -> Problem:
    """Which quarter of a picture is bright."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(step)
        images, labels = torch.rand(64, 3, 8, 8, generator=random), torch.randint(4, (64,), generator=random)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, label // 2 * 4 :, label % 2 * 4 :][:, :4, :4] += 0.3
        return images, labels

    def evaluate(network: nn.Module) -> dict[str, float]:
        images, labels = batch(10**6)
        with torch.no_grad():
            return {"top1": float((network.eval()(images).argmax(1) == labels).float().mean())}

    def write(network: nn.Module, path: Path) -> None:
        write_onnx(network, path, (EXAMPLE,), ["images"], ["logits"])

    return Problem(
        "quarters",
        net,
        EXAMPLE,
        batch,
        nn.functional.cross_entropy,
        evaluate,
        write,
        frozenset({"head"}),
        lr=5e-3,
    )
