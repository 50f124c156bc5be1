"""Small detectors of each family, as their authors' heads are wired, for tests of the importer.

Random weights, a few thousand parameters: what matters is the graph that an exporter writes.
`export(family, variant, path)` writes one; `VARIANTS` lists them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

CLASSES = 5
SIZE = (128, 96)
"""Height, width: unequal, so that a mix-up shows."""


class ConvBlock(nn.Sequential):
    def __init__(self, cin: int, cout: int, k: int = 3, s: int = 1, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__(nn.Conv2d(cin, cout, k, s, k // 2, bias=False), nn.BatchNorm2d(cout), act())


class Focus(nn.Module):
    def __init__(self, cout: int) -> None:
        super().__init__()
        self.conv = ConvBlock(12, cout)

    def forward(self, x: Tensor) -> Tensor:
        parts = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(parts, 1))


class Backbone(nn.Module):
    """Features at strides 8, 16, 32 (and 64), `width` channels each, with a top-down sum."""

    def __init__(self, levels: int, width: int = 8, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or ConvBlock(3, width, s=2)
        self.down = nn.ModuleList([ConvBlock(width, width, s=2) for _ in range(levels + 1)])
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.down[0](self.stem(x))
        features = []
        for block in self.down[1:]:
            x = block(x)
            features.append(x)
        features[0] = features[0] + self.up(features[1])
        return features


def _grid(h: int, w: int) -> Tensor:
    ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack((xs, ys), 2).float()


class YoloX(nn.Module):
    """YOLOX head (Ge et al. 2021): decoupled, sigmoid in the graph; `decode` adds grid and exp."""

    def __init__(self, decode: bool, classes: int = CLASSES) -> None:
        super().__init__()
        self.decode = decode
        self.backbone = Backbone(3, stem=Focus(8))
        self.stems = nn.ModuleList([ConvBlock(8, 8, 1) for _ in range(3)])
        self.cls_convs = nn.ModuleList([ConvBlock(8, 8) for _ in range(3)])
        self.reg_convs = nn.ModuleList([ConvBlock(8, 8) for _ in range(3)])
        self.cls, self.reg, self.obj = (
            nn.ModuleList([nn.Conv2d(8, n, 1) for _ in range(3)]) for n in (classes, 4, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs, sizes = [], []
        for i, feature in enumerate(self.backbone(x)):
            feature = self.stems[i](feature)
            cls, reg = self.cls_convs[i](feature), self.reg_convs[i](feature)
            joined = (self.reg[i](reg), self.obj[i](reg).sigmoid(), self.cls[i](cls).sigmoid())
            outputs.append(torch.cat(joined, 1))
            sizes.append(outputs[-1].shape[-2:])
        out = torch.cat([o.flatten(start_dim=2) for o in outputs], dim=2).permute(0, 2, 1)
        if not self.decode:
            return out
        grids = torch.cat([_grid(int(h), int(w)).view(1, -1, 2) for h, w in sizes], 1)
        strides = torch.cat(
            [torch.full((1, int(h) * int(w), 1), 8.0 * 2**i) for i, (h, w) in enumerate(sizes)], 1
        )
        return torch.cat(
            [(out[..., 0:2] + grids) * strides, torch.exp(out[..., 2:4]) * strides, out[..., 4:]], -1
        )


class YoloV5(nn.Module):
    """YOLOv5 head: anchors in the graph for `decode` "split" (v6 and later) or "slice" (earlier);
    "raw" ends at [1, 3, h, w, 5 + C] per level, "conv" at the convolutions."""

    def __init__(self, decode: str, classes: int = CLASSES) -> None:
        super().__init__()
        self.decode, self.no = decode, classes + 5
        self.backbone = Backbone(3)
        self.m = nn.ModuleList([nn.Conv2d(8, 3 * self.no, 1) for _ in range(3)])
        # not the COCO ones, so that a fallback shows
        anchors = torch.tensor(
            [[11, 14, 15, 31, 34, 22], [31, 60, 61, 44, 58, 118], [115, 91, 155, 199, 372, 327]]
        )
        self.register_buffer("anchors", anchors.float().view(3, 1, 3, 1, 1, 2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        raw, decoded = [], []
        for i, feature in enumerate(self.backbone(x)):
            y = self.m[i](feature)
            stride = 8.0 * 2**i
            if self.decode == "conv":
                raw.append(y)
                continue
            b, _, h, w = y.shape
            y = y.view(b, 3, self.no, h, w).permute(0, 1, 3, 4, 2).contiguous()
            raw.append(y)
            grid = _grid(int(h), int(w)).view(1, 1, int(h), int(w), 2)
            if self.decode == "split":
                anchor = self.anchors[i].expand(1, 3, int(h), int(w), 2)
                xy, wh, conf = y.sigmoid().split((2, 2, self.no - 4), 4)
                xy = (xy * 2 + (grid - 0.5)) * stride
                wh = (wh * 2) ** 2 * anchor
                decoded.append(torch.cat((xy, wh, conf), 4).view(b, -1, self.no))
            elif self.decode == "slice":
                s = y.sigmoid()
                xy = (s[..., 0:2] * 2.0 - 0.5 + grid) * stride
                wh = (s[..., 2:4] * 2) ** 2 * self.anchors[i]
                decoded.append(torch.cat((xy, wh, s[..., 4:]), -1).view(b, -1, self.no))
        if self.decode in ("split", "slice"):
            return torch.cat(decoded, 1)
        return tuple(raw)


class Dfl(nn.Module):
    def __init__(self, bins: int, weights: Tensor | None = None) -> None:
        super().__init__()
        self.bins = bins
        self.conv = nn.Conv2d(bins, 1, 1, bias=False)
        values = torch.arange(bins).float() if weights is None else weights
        self.conv.weight.data[:] = values.view(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.bins, a).transpose(2, 1).softmax(1)).view(b, 4, a)


class DflMatmul(Dfl):
    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        y = x.view(b, 4, self.bins, a).permute(0, 1, 3, 2).softmax(3)
        return y.matmul(self.conv.weight.view(self.bins, 1)).squeeze(3)


class YoloV8(nn.Module):
    """YOLOv8/YOLO11 head: `style` "joined" concatenates box and class per level (to 2025),
    "separate" keeps them apart, "raw" ends at the joined levels, "open" computes the cell points from
    the picture's size in the graph. Output [1, 4 + C, N], cx cy w h."""

    def __init__(
        self, style: str, classes: int = CLASSES, bins: int = 16, dfl: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.style, self.nc, self.bins = style, classes, bins
        self.backbone = Backbone(3)
        self.cv2 = nn.ModuleList(
            [nn.Sequential(ConvBlock(8, 8), nn.Conv2d(8, 4 * bins, 1)) for _ in range(3)]
        )
        self.cv3 = nn.ModuleList([nn.Sequential(ConvBlock(8, 8), nn.Conv2d(8, classes, 1)) for _ in range(3)])
        self.dfl = dfl or Dfl(bins)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = self.backbone(x)
        boxes = [m(f) for m, f in zip(self.cv2, features, strict=True)]
        scores = [m(f) for m, f in zip(self.cv3, features, strict=True)]
        if self.style == "raw":
            return tuple(torch.cat(pair, 1) for pair in zip(boxes, scores, strict=True))
        if self.style in ("joined", "open"):
            pairs = [torch.cat(pair, 1) for pair in zip(boxes, scores, strict=True)]
            joined = torch.cat([p.view(p.shape[0], 4 * self.bins + self.nc, -1) for p in pairs], 2)
            box, cls = joined.split((4 * self.bins, self.nc), 1)
        else:
            box = torch.cat([b.view(b.shape[0], 4 * self.bins, -1) for b in boxes], 2)
            cls = torch.cat([c.view(c.shape[0], self.nc, -1) for c in scores], 2)
        points, strides = [], []
        for i, f in enumerate(features):
            h, w = f.shape[-2], f.shape[-1]
            if self.style != "open":  # a traced size stays open, an int becomes a constant
                h, w = int(h), int(w)
            points.append(_grid(h, w).view(-1, 2) + 0.5)
            strides.append(torch.full((h * w, 1), 8.0 * 2**i))
        anchors, stride = torch.cat(points).T.unsqueeze(0), torch.cat(strides).T
        lt, rb = self.dfl(box).chunk(2, 1)
        x1y1, x2y2 = anchors - lt, anchors + rb
        dbox = torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), 1) * stride
        return torch.cat((dbox, cls.sigmoid()), 1)


class NanoDet(nn.Module):
    """NanoDet(-Plus) head, bins = reg_max + 1 = 8. style: "plus" (four levels, one output),
    "three" (the same with three), "apart" (NanoDet's first exports: two outputs per level),
    "two" (separate convolutions), "logits" (no sigmoid)."""

    def __init__(self, style: str, classes: int = CLASSES) -> None:
        super().__init__()
        self.style, self.nc = style, classes
        self.levels = 4 if style in ("plus", "logits") else 3
        self.backbone = Backbone(self.levels)
        n = self.levels
        self.towers = nn.ModuleList([ConvBlock(8, 8, 5 if n == 4 else 3, act=nn.LeakyReLU) for _ in range(n)])
        out = classes if style == "two" else classes + 32
        self.gfl_cls = nn.ModuleList([nn.Conv2d(8, out, 1) for _ in range(n)])
        self.gfl_reg = nn.ModuleList([nn.Conv2d(8, 32, 1) for _ in range(n)]) if style == "two" else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        rows, cls_out, reg_out = [], [], []
        for i, feature in enumerate(self.backbone(x)):
            feature = self.towers[i](feature)
            if self.gfl_reg is not None:
                cls, reg = self.gfl_cls[i](feature), self.gfl_reg[i](feature)
            elif self.style == "logits":
                rows.append(self.gfl_cls[i](feature).flatten(start_dim=2))
                continue
            else:
                cls, reg = self.gfl_cls[i](feature).split([self.nc, 32], dim=1)
            if self.style in ("apart", "two"):
                cls_out.append(cls.sigmoid().flatten(2).permute(0, 2, 1))
                reg_out.append(reg.flatten(2).permute(0, 2, 1))
            else:
                rows.append(torch.cat([cls.sigmoid(), reg], dim=1).flatten(start_dim=2))
        if rows:
            return torch.cat(rows, dim=2).permute(0, 2, 1)
        return (*cls_out, *reg_out)


class FastestDet(nn.Module):
    """FastestDet head: one level at stride 16, [1, 5 + C, h, w] of sigmoid, raw box, softmax."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvBlock(3, 8, s=2, act=nn.ReLU), *(ConvBlock(8, 8, s=2, act=nn.ReLU) for _ in range(3))
        )
        self.obj, self.reg, self.cls = (
            nn.Sequential(ConvBlock(8, 8, 5, act=nn.ReLU), nn.Conv2d(8, n, 1)) for n in (1, 4, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        f = self.stem(x)
        return torch.cat((self.obj(f).sigmoid(), self.reg(f), self.cls(f).softmax(dim=1)), 1)


class InputNorm(nn.Module):
    """(x / 255 - mean) / std before a detector: what some exporters put into the graph."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        out: Tensor | tuple[Tensor, ...] = self.net((x / 255 - self.mean) / self.std)
        return out


VARIANTS: dict[tuple[str, str], Callable[[], nn.Module]] = {
    ("yolox", "plain"): lambda: YoloX(False),
    ("yolox", "decode"): lambda: YoloX(True),
    ("yolox", "one class"): lambda: YoloX(True, 1),
    ("yolox", "four classes"): lambda: YoloX(False, 4),
    ("yolov5", "split"): lambda: YoloV5("split"),
    ("yolov5", "slice"): lambda: YoloV5("slice"),
    ("yolov5", "raw"): lambda: YoloV5("raw"),
    ("yolov5", "conv"): lambda: YoloV5("conv"),
    ("yolov5", "conv 80 classes"): lambda: YoloV5("conv", 80),
    ("yolov8", "joined"): lambda: YoloV8("joined"),
    ("yolov8", "separate"): lambda: YoloV8("separate"),
    ("yolov8", "64 classes"): lambda: YoloV8("joined", 64),
    ("yolov8", "64 classes separate"): lambda: YoloV8("separate", 64),
    ("yolov8", "matmul"): lambda: YoloV8("separate", dfl=DflMatmul(16)),
    ("yolov8", "open"): lambda: YoloV8("open"),
    ("yolov8", "raw"): lambda: YoloV8("raw"),
    ("nanodet", "plus"): lambda: NanoDet("plus"),
    ("nanodet", "three"): lambda: NanoDet("three"),
    ("nanodet", "apart"): lambda: NanoDet("apart"),
    ("nanodet", "two"): lambda: NanoDet("two"),
    ("nanodet", "logits"): lambda: NanoDet("logits"),
    ("fastestdet", "plain"): lambda: FastestDet(),
}


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and BatchNorm statistics that keep activations near unit size, head outputs spread."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.weight.data = torch.rand(n, generator=generator) + 0.5
            module.bias.data = torch.randn(n, generator=generator) * 0.3
            module.running_mean = torch.randn(n, generator=generator) * 0.2
            module.running_var = torch.rand(n, generator=generator) + 0.5
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.data = torch.randn(module.out_channels, generator=generator) * 0.5
    return net.eval()


def export(
    net: nn.Module,
    path: Path,
    *,
    opset: int = 17,
    dynamo: bool = False,
    dynamic: tuple[int, ...] = (),
    size: tuple[int, int] = SIZE,
) -> Path:
    """Write `net` as ONNX with input `images` [1, 3, *size]; `dynamic` lists its open axes."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, *size)
    extra: dict[str, object] = {}
    if dynamic:
        extra["dynamic_axes"] = {"images": {axis: f"axis{axis}" for axis in dynamic}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (x,), str(path), opset_version=opset, dynamo=dynamo, input_names=["images"], **extra
        )
    return path


def append_nms(path: Path) -> Path:
    """Append NonMaxSuppression to a decoded [1, N, 5 + C] export, as deployment scripts do."""
    model = onnx.load(path)
    graph = model.graph
    rows = graph.output[0].name
    ints = {"zero": [0], "four": [4], "five": [5], "end": [9999], "axis2": [2], "max": [100]}
    for name, value in ints.items():
        graph.initializer.append(helper.make_tensor(f"nms_{name}", TensorProto.INT64, [1], value))
    for name, number in (("iou", 0.45), ("score", 0.1)):
        graph.initializer.append(helper.make_tensor(f"nms_{name}", TensorProto.FLOAT, [1], [number]))
    graph.node.extend(
        [
            helper.make_node("Slice", [rows, "nms_zero", "nms_four", "nms_axis2"], ["nms_boxes"]),
            helper.make_node("Slice", [rows, "nms_four", "nms_five", "nms_axis2"], ["nms_obj"]),
            helper.make_node("Slice", [rows, "nms_five", "nms_end", "nms_axis2"], ["nms_cls"]),
            helper.make_node("Mul", ["nms_obj", "nms_cls"], ["nms_prod"]),
            helper.make_node("Transpose", ["nms_prod"], ["nms_scores"], perm=[0, 2, 1]),
            helper.make_node(
                "NonMaxSuppression",
                ["nms_boxes", "nms_scores", "nms_max", "nms_iou", "nms_score"],
                ["selected"],
                center_point_box=1,
            ),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("selected", TensorProto.INT64, ["n", 3]))
    onnx.save(model, path)
    return path
