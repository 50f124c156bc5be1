"""Small clip models whose temporal shift is written as public projects and our exporter write it (own code)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgekit import frontends

Shift = Callable[[Tensor, int, int, bool], Tensor]
"""(x [T, C, H, W], T, 1/share of the channels, both ways) -> the same shape."""


def ours(x: Tensor, frames: int, share: int = 8, both: bool = False) -> Tensor:
    """Slices along time, a zero frame, concatenation over channels."""
    tc, c, h, w = x.shape
    v = x.reshape(1, frames, c, h, w)
    f = c // share
    zero = torch.zeros(1, 1, f, h, w)
    past = torch.cat([zero, v[:, :-1, :f]], 1)
    if both:
        future = torch.cat([v[:, 1:, :f], zero], 1)
        past = torch.cat([zero, v[:, :-1, f : 2 * f]], 1)
        out = torch.cat([future, past, v[:, :, 2 * f :]], 2)
    else:
        out = torch.cat([past, v[:, :, f:]], 2)
    return out.reshape(tc, c, h, w)


def padded(x: Tensor, frames: int, share: int = 8, both: bool = False) -> Tensor:
    """The zero frame made by padding, without a view: frames are the first axis."""
    f = x.shape[1] // share
    pad = torch.nn.functional.pad
    past = pad(x[:-1, :f], (0, 0, 0, 0, 0, 0, 1, 0))
    if both:
        future = pad(x[1:, :f], (0, 0, 0, 0, 0, 0, 0, 1))
        past = pad(x[:-1, f : 2 * f], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat([future, past, x[:, 2 * f :]], 1)
    return torch.cat([past, x[:, f:]], 1)


def buffer(x: Tensor, frames: int, share: int = 8, both: bool = False) -> Tensor:
    """A buffer of zeros that slices are assigned to (temporal-shift-module, its loop)."""
    nt, c, h, w = x.size()
    v = x.view(nt // frames, frames, c, h, w)
    fold = c // share
    out = torch.zeros_like(v)
    if both:
        out[:, :-1, :fold] = v[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = v[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = v[:, :, 2 * fold :]
    else:
        out[:, 1:, :fold] = v[:, :-1, :fold]
        out[:, :, fold:] = v[:, :, fold:]
    return out.view(nt, c, h, w)


def splits(x: Tensor, frames: int, share: int = 8, both: bool = False) -> Tensor:
    """Split along channels of a 4-D view, zeros joined along time (mmaction2)."""
    n, c, h, w = x.size()
    v = x.view(-1, frames, c, h * w)
    fold = c // share
    if both:
        left, mid, right = v[:, :, :fold, :], v[:, :, fold : 2 * fold, :], v[:, :, 2 * fold :, :]
        blank = torch.zeros_like(left[:, :1])
        left = torch.cat((left[:, 1:], blank), 1)
        blank = torch.zeros_like(mid[:, :1])
        mid = torch.cat((blank, mid[:, :-1]), 1)
        out = torch.cat((left, mid, right), 2)
    else:
        left, right = torch.split(v, [fold, c - fold], 2)
        blank = torch.zeros_like(left[:, :1])
        out = torch.cat((torch.cat((blank, left[:, :-1]), 1), right), 2)
    return out.view(n, c, h, w)


FORMS: dict[str, Shift] = {"ours": ours, "padded": padded, "buffer": buffer, "splits": splits}


class Block(nn.Module):
    """Inverted residual: the shift is on the branch alone."""

    def __init__(self, channels: int, frames: int, shift: Shift | None, share: int, both: bool) -> None:
        super().__init__()
        wide = 2 * channels
        self.frames, self.shift, self.share, self.both = frames, shift, share, both
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.shift is None else self.shift(x, self.frames, self.share, self.both)
        return x + self.layers(y)


class Net(nn.Module):
    """Clip [T, 3, H, W] -> [T, K], or [1, K] with `consensus`."""

    def __init__(
        self,
        frames: int = 4,
        channels: int = 16,
        *,
        shift: Shift | None = ours,
        blocks: int = 2,
        share: int = 8,
        both: bool = False,
        consensus: bool = False,
        classes: int = 5,
    ) -> None:
        super().__init__()
        self.frames, self.consensus = frames, consensus
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(channels, frames, shift, share, both) for _ in range(blocks)))
        self.head = nn.Linear(channels, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.blocks(self.stem(clip)).mean((2, 3))
        logits = self.head(x)
        if self.consensus:
            logits = logits.view((-1, self.frames, *logits.size()[1:])).mean(dim=1, keepdim=True).squeeze(1)
        return logits


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network with seeded weights, its norms away from the identity."""
    torch.manual_seed(seed)
    net = make()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    return net.eval()


def export(
    net: nn.Module, sizes: tuple[int, ...], path: Path, *, opset: int = 17, dynamo: bool = False
) -> ir.Model:
    """The network through torch's exporter and edgekit's frontend."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.randn(sizes),),
            str(path),
            input_names=["clip"],
            output_names=["logits"],
            opset_version=opset,
            dynamo=dynamo,
            external_data=False,
        )
    return frontends.load(path)
