"""YOLO-lite: a small anchor-free detector that quantizes well (plain 3x3 and 1x1 convolutions, ReLU).

The raw head is YOLOX's (Ge et al. 2021, arXiv:2107.08430): per level (strides 8, 16, 32) three
convolutions give box (4), objectness (1) and classes (C). Boxes decode as
xy = (t_xy + cell) * stride, wh = exp(t_wh) * stride; score = sigmoid(obj) * sigmoid(cls).

Widths, depths and kinds of blocks are data (`Layout`); the default is the network that ships.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekit.models.blocks import block, conv, residual
from edgekit.models.exporting import write_onnx

STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class Layout:
    """How wide and deep the parts are and what blocks they are made of; the default is the network that ships.

    stem: channels behind its first and its other two convolutions. widths, depths, blocks: of the stages at strides 8,
    16 and 32: channels, residuals behind the block that halves the picture, and kind of both (models.blocks).
    neck: channels of the neck and heads. neck_block, head_block: kind of their 3x3 blocks; 1x1 convolutions stay.
    """

    stem: tuple[int, int] = (16, 32)
    widths: tuple[int, int, int] = (64, 128, 128)
    depths: tuple[int, int, int] = (2, 2, 1)
    blocks: tuple[str, str, str] = ("plain", "plain", "plain")
    neck: int = 64
    neck_block: str = "plain"
    head_block: str = "plain"

    @classmethod
    def scaled(cls, kind: str = "plain", width: float = 1.0) -> Layout:
        """One kind of block everywhere but in the stem, and widths times `width` in multiples of 8."""

        def channels(count: int) -> int:
            return max(8, round(count * width / 8) * 8)

        base = cls()
        a, b = base.stem
        c8, c16, c32 = base.widths
        return cls(
            (channels(a), channels(b)), (channels(c8), channels(c16), channels(c32)), base.depths,
            (kind, kind, kind), channels(base.neck), kind, kind,
        )  # fmt: skip


DEFAULT = Layout()


class Head(nn.Module):
    """Decoupled head of one level: raw (box [B,4,H,W], objectness [B,1,H,W], classes [B,C,H,W])."""

    def __init__(self, channels: int, num_classes: int, kind: str = "plain") -> None:
        super().__init__()
        self.box_tower = block(kind, channels, channels)
        self.class_tower = block(kind, channels, channels)
        self.box = nn.Conv2d(channels, 4, 1)
        self.objectness = nn.Conv2d(channels, 1, 1)
        self.classes = nn.Conv2d(channels, num_classes, 1)
        prior = -math.log(
            (1 - 0.01) / 0.01
        )  # start near "nothing here", so that the first steps do not explode
        nn.init.constant_(self.objectness.bias, prior)  # type: ignore[arg-type]
        nn.init.constant_(self.classes.bias, prior)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        box, kind = self.box_tower(x), self.class_tower(x)
        return self.box(box), self.objectness(box), self.classes(kind)


class YoloLite(nn.Module):
    """Detector of `num_classes`; input float32 [B, 3, H, W], BGR 0..255, H and W multiples of 32.

    `forward` returns the raw head, per level (box, objectness, classes), finest level first. width: of neck and heads, in
    place of the layout's. Raises: UsageError for a kind of block that there is not.
    """

    def __init__(self, num_classes: int, layout: Layout = DEFAULT, *, width: int | None = None) -> None:
        super().__init__()
        layout = layout if width is None else replace(layout, neck=width)
        self.num_classes, self.layout = num_classes, layout
        a, b = layout.stem
        c8, c16, c32 = layout.widths
        channels, neck = layout.neck, layout.neck_block

        def stage(level: int, inputs: int, outputs: int) -> nn.Sequential:
            kind = layout.blocks[level]
            deeper = (residual(kind, outputs) for _ in range(layout.depths[level]))
            return nn.Sequential(block(kind, inputs, outputs, 2), *deeper)

        self.stem = nn.Sequential(conv(3, a, stride=2), conv(a, b, stride=2), conv(b, b))
        self.stage8, self.stage16, self.stage32 = stage(0, b, c8), stage(1, c8, c16), stage(2, c16, c32)
        self.side8, self.side16, self.side32 = (
            conv(c8, channels, 1),
            conv(c16, channels, 1),
            conv(c32, channels, 1),
        )
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge16, self.merge8 = (
            block(neck, 2 * channels, channels),
            nn.Sequential(conv(2 * channels, channels, 1), block(neck, channels, channels)),
        )
        self.down16, self.down32 = block(neck, channels, channels, 2), block(neck, channels, channels, 2)
        self.join16, self.join32 = conv(2 * channels, channels, 1), conv(2 * channels, channels, 1)
        self.heads = nn.ModuleList(Head(channels, num_classes, layout.head_block) for _ in STRIDES)

    def forward(self, image: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        c8 = self.stage8(self.stem(image))
        c16 = self.stage16(c8)
        c32 = self.stage32(c16)
        p32 = self.side32(c32)
        p16 = self.merge16(torch.cat([self.side16(c16), self.up(p32)], 1))
        p8 = self.merge8(torch.cat([self.side8(c8), self.up(p16)], 1))
        p16 = self.join16(torch.cat([self.down16(p8), p16], 1))
        p32 = self.join32(torch.cat([self.down32(p16), p32], 1))
        return [head(level) for head, level in zip(self.heads, (p8, p16, p32), strict=True)]


class Export(nn.Module):
    """The graph as YOLOX exports it: [1, N, 5 + C] rows of raw box, sigmoid(obj), sigmoid(cls)."""

    def __init__(self, model: YoloLite, height: int, width: int) -> None:
        super().__init__()
        self.model = model
        self.rows = [
            (height // s) * (width // s) for s in STRIDES
        ]  # static, so that no shape arithmetic is traced

    def forward(self, image: Tensor) -> Tensor:
        levels = [torch.cat([box, obj.sigmoid(), cls.sigmoid()], 1) for box, obj, cls in self.model(image)]
        flat = [
            level.reshape(1, 5 + self.model.num_classes, n)
            for level, n in zip(levels, self.rows, strict=True)
        ]
        return torch.cat(flat, 2).permute(0, 2, 1)


def cells(height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Grid of all levels for an input of height x width: cell indices x, y [N, 2] and stride [N]."""
    grids, strides = [], []
    for stride in STRIDES:
        h, w = height // stride, width // stride
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        grids.append(torch.stack([x, y], -1).reshape(-1, 2))
        strides.append(torch.full((h * w,), stride, device=device))
    return torch.cat(grids).float(), torch.cat(strides).float()


def decode(raw_boxes: Tensor, grid: Tensor, stride: Tensor) -> Tensor:
    """Raw boxes [..., N, 4] to x1 y1 x2 y2 in input pixels (YOLOX, `decode_outputs`)."""
    centre = (raw_boxes[..., :2] + grid) * stride[:, None]
    half = raw_boxes[..., 2:].clamp(max=8.0).exp() * stride[:, None] / 2
    return torch.cat([centre - half, centre + half], -1)


def export_onnx(model: YoloLite, path: Path, height: int, width: int, opset: int = 17) -> None:
    """Write `model` as float32 ONNX: input `images` [1, 3, height, width], output `output` [1, N, 5 + C].

    Batch norms are folded by the exporter. The file is written whole or not at all.
    """
    wrapped = Export(model, height, width)
    write_onnx(wrapped, path, (torch.zeros(1, 3, height, width),), ["images"], ["output"], opset=opset)


def load_onnx(path: Path) -> YoloLite:
    """The network of a file that `export_onnx` wrote, of any widths and depths (compressed ones too), to be trained again.

    Convolutions are matched in the order in which they run. The batch norms, which the file holds folded, are
    identities but for the bias: `remeasure` gives them statistics. Raises: ValueError for another network.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:  # the exporter stores equal values once
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
    convs = [
        node
        for node in graph.node
        if node.op_type == "Conv" and all(name in values for name in node.input[1:])
    ]
    found = [[values[name] for name in node.input[1:]] for node in convs]
    strides = [next((a.ints[0] for a in node.attribute if a.name == "strides"), 1) for node in convs]
    depths = _depths([(weights[0].shape[-1], stride) for weights, stride in zip(found, strides, strict=True)])
    columns = [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim][-1:]
    model = YoloLite(max([1, *(n - 5 for n in columns)]), Layout(depths=depths)).eval()
    order: list[nn.Conv2d] = []
    parts = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    hooks = [part.register_forward_pre_hook(lambda part, _: order.append(part)) for part in parts]
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    norms = dict(_norms(model))
    shapes = [(tuple(p.kernel_size), tuple(p.stride)) for p in order]
    if len(found) != len(order) or any(
        w[0].shape[2:] != k or len(w) != 2 for w, (k, _) in zip(found, shapes, strict=True)
    ):
        raise ValueError(f"model {path}: expected a YOLO-lite of plain blocks, as export_onnx writes it")
    for part, (weight, bias) in zip(order, found, strict=True):
        part.out_channels, part.in_channels = weight.shape[:2]
        part.weight = nn.Parameter(weight)
        norm = norms.get(part)
        if norm is None:
            part.bias = nn.Parameter(bias)
            continue
        norm.num_features = len(weight)
        norm.weight = nn.Parameter(torch.full_like(bias, math.sqrt(1 + norm.eps)))
        norm.bias = nn.Parameter(bias)
        norm.running_mean, norm.running_var = torch.zeros_like(bias), torch.ones_like(bias)
    return model


def _depths(convs: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    """Residuals (a 1x1, then a 3x3) of each stage, from (kernel, stride) of all convolutions as they run."""
    at, depths = 3, [0, 0, 0]
    for stage in range(3):
        at += 1
        while list(convs[at : at + 2]) == [(1, 1), (3, 1)]:
            depths[stage] += 1
            at += 2
    return depths[0], depths[1], depths[2]


def with_classes(model: YoloLite, num_classes: int) -> YoloLite:
    """`model` in place, with new outputs for `num_classes` classes: to be trained on other things."""
    model.num_classes = num_classes
    for head in model.heads:
        assert isinstance(head, Head)
        head.classes = nn.Conv2d(head.classes.in_channels, num_classes, 1)
        nn.init.normal_(head.classes.weight, std=0.01)
        nn.init.constant_(head.classes.bias, -math.log((1 - 0.01) / 0.01))  # type: ignore[arg-type]
    return model


def _norms(model: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions with the batch norms behind them."""
    blocks = [part for part in model.modules() if isinstance(part, nn.Sequential) and len(part) > 1]
    return [(b[0], b[1]) for b in blocks if isinstance(b[0], nn.Conv2d) and isinstance(b[1], nn.BatchNorm2d)]


@torch.no_grad()
def remeasure(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give the batch norms the statistics of `batches` without changing what the network computes in evaluation mode:
    factor and bias make up for them. A folded network can then be trained as if it had never been folded."""
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    sums = {part: (torch.zeros(part.num_features, dtype=torch.float64),) * 2 for part in norms}
    counts = dict.fromkeys(norms, 0)

    def see(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(part, nn.BatchNorm2d)
        x = inputs[0].double()
        total, squares = sums[part]
        sums[part] = total + x.sum((0, 2, 3)), squares + (x * x).sum((0, 2, 3))
        counts[part] += x.numel() // x.shape[1]

    hooks = [part.register_forward_pre_hook(see) for part in norms]
    training = model.training
    model.eval()
    for batch in batches:
        model(batch)
    model.train(training)
    for hook in hooks:
        hook.remove()
    for part in norms:
        mean = sums[part][0] / counts[part]
        variance = (sums[part][1] / counts[part] - mean * mean).clamp(min=0)
        assert part.running_mean is not None and part.running_var is not None
        factor = part.weight.double() / (part.running_var.double() + part.eps).sqrt()
        bias = part.bias.double() + factor * (mean - part.running_mean.double())
        part.weight.copy_(factor * (variance + part.eps).sqrt())
        part.bias.copy_(bias)
        part.running_mean.copy_(mean)
        part.running_var.copy_(variance)
