"""The one block that all dense parts are made of."""

from __future__ import annotations

from torch import nn

EPS, MOMENTUM = 1e-3, 0.05


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution (same size at stride 1), batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs, EPS, MOMENTUM),
        nn.ReLU(inplace=True),
    )


def initialise(module: nn.Module) -> None:
    """He et al. 2015, for every dense convolution of `module`."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
