"""Well-known networks as torch definitions, exported to ONNX: shapes and operators are theirs, weights are random.

    python benchmarks/torch_networks.py [NAME ...] [--folder DIR]        writes the files and prints their paths

Weights are seeded; BatchNorm statistics are then settled on synthetic street pictures, so that every
layer sees activations of ordinary size and shape. What such a network says means nothing; how fast it runs,
and how well a quantizer keeps what it says, means as much as with trained weights of that shape.
Files lie in edgekit's cache, named by the content of this file and the versions that wrote them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.synth.street import StreetWorld
from edgekit.toolchain.cache import cache_dir

SEED = 20
SETTLE = tuple(range(9000, 9008))
"""Seeds of the streets that BatchNorm is settled on; benchmarks calibrate and judge on others."""
FRAME = 45
PICTURE = (640, 360)


# --- YOLOv8n: Ultralytics' yolov8.yaml at depth 0.33, width 0.25 -----------------------------------


class ConvSilu(nn.Sequential):
    def __init__(self, cin: int, cout: int, k: int = 1, s: int = 1) -> None:
        super().__init__(
            nn.Conv2d(cin, cout, k, s, k // 2, bias=False), nn.BatchNorm2d(cout, eps=1e-3), nn.SiLU()
        )


class Bottleneck(nn.Module):
    def __init__(self, c: int, add: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = ConvSilu(c, c, 3), ConvSilu(c, c, 3), add

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C2f(nn.Module):
    def __init__(self, cin: int, cout: int, n: int, add: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvSilu(cin, cout), ConvSilu((2 + n) * (cout // 2), cout)
        self.m = nn.ModuleList([Bottleneck(cout // 2, add) for _ in range(n)])

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            y.append(block(y[-1]))
        out: Tensor = self.cv2(torch.cat(y, 1))
        return out


class Sppf(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.pool = ConvSilu(c, c // 2), ConvSilu(2 * c, c), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        for _ in range(3):
            y.append(self.pool(y[-1]))
        out: Tensor = self.cv2(torch.cat(y, 1))
        return out


class Detect(nn.Module):
    """Anchor-free head with distribution focal loss, decoded in the graph as Ultralytics exports it:
    [1, 4 + classes, N], boxes cx cy w h in pixels, scores through Sigmoid."""

    BINS = 16

    def __init__(self, channels: tuple[int, ...], size: int, classes: int) -> None:
        super().__init__()
        c2, c3 = max(16, channels[0] // 4, 4 * self.BINS), max(channels[0], min(classes, 100))
        self.classes = classes
        self.cv2, self.cv3 = (
            nn.ModuleList(
                [
                    nn.Sequential(ConvSilu(c, mid, 3), ConvSilu(mid, mid, 3), nn.Conv2d(mid, out, 1))
                    for c in channels
                ]
            )
            for mid, out in ((c2, 4 * self.BINS), (c3, classes))
        )
        self.dfl = nn.Conv2d(self.BINS, 1, 1, bias=False)
        self.dfl.weight.data = torch.arange(float(self.BINS)).view(1, self.BINS, 1, 1)
        points, strides = [], []
        for stride in (8, 16, 32):
            n = size // stride
            ys, xs = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
            points.append(torch.stack((xs, ys), -1).reshape(-1, 2) + 0.5)
            strides.append(torch.full((n * n,), float(stride)))
        self.register_buffer("anchors", torch.cat(points).T[None])
        self.register_buffer("strides", torch.cat(strides)[None])

    def forward(self, features: list[Tensor]) -> Tensor:
        joined = [
            torch.cat((box(f), cls(f)), 1) for box, cls, f in zip(self.cv2, self.cv3, features, strict=True)
        ]
        rows = torch.cat([j.view(1, 4 * self.BINS + self.classes, -1) for j in joined], 2)
        box, cls = rows.split((4 * self.BINS, self.classes), 1)
        distance = self.dfl(box.view(1, 4, self.BINS, -1).transpose(2, 1).softmax(1)).view(1, 4, -1)
        lt, rb = distance.chunk(2, 1)
        x1y1, x2y2 = self.anchors - lt, self.anchors + rb
        boxes = torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), 1) * self.strides
        return torch.cat((boxes, cls.sigmoid()), 1)


class YoloV8n(nn.Module):
    def __init__(self, size: int = 640, classes: int = 80) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvSilu(3, 16, 3, 2), ConvSilu(16, 32, 3, 2), C2f(32, 32, 1, True), ConvSilu(32, 64, 3, 2)
        )
        self.p3 = C2f(64, 64, 2, True)
        self.p4 = nn.Sequential(ConvSilu(64, 128, 3, 2), C2f(128, 128, 2, True))
        self.p5 = nn.Sequential(ConvSilu(128, 256, 3, 2), C2f(256, 256, 1, True), Sppf(256))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.n4, self.n3 = C2f(384, 128, 1, False), C2f(192, 64, 1, False)
        self.d3, self.o4 = ConvSilu(64, 64, 3, 2), C2f(192, 128, 1, False)
        self.d4, self.o5 = ConvSilu(128, 128, 3, 2), C2f(384, 256, 1, False)
        self.head = Detect((64, 128, 256), size, classes)

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat((self.up(p5), p4), 1))
        n3 = self.n3(torch.cat((self.up(n4), p3), 1))
        o4 = self.o4(torch.cat((self.d3(n3), n4), 1))
        o5 = self.o5(torch.cat((self.d4(o4), p5), 1))
        out: Tensor = self.head([n3, o4, o5])
        return out


# --- MobileNetV2 1.0 (Sandler et al. 2018, table 2) and ResNet-18 (He et al. 2016, table 1) --------


class InvertedResidual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden, self.add = cin * expand, stride == 1 and cin == cout
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(cin, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)]
        layers += [nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, cout, 1, bias=False), nn.BatchNorm2d(cout)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.add else y


def mobilenet_v2(classes: int = 1000) -> nn.Module:
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    before = 32
    for expand, width, count, stride in rows:
        for i in range(count):
            layers.append(InvertedResidual(before, width, stride if i == 0 else 1, expand))
            before = width
    layers += [nn.Conv2d(before, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))


class BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU()
        self.down: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.down = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + self.down(x))
        return out


def resnet18(classes: int = 1000) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    before = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(before, width, stride), BasicBlock(width, width, 1)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


# --- a detector of NanoDet-m's shape: ShuffleNetV2 1.0 (Ma et al. 2018, table 5) with LeakyReLU, a light PAN, 5x5 heads ---


def leaky(cin: int, cout: int, k: int = 1, s: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, k, s, k // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout),
        nn.LeakyReLU(0.1),
    )


def depthwise(c: int, k: int = 3, s: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, c, k, s, k // 2, groups=c, bias=False), nn.BatchNorm2d(c))


class ShuffleUnit(nn.Module):
    """Two branches, concatenated, channels of the two in turn."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        half = cout // 2
        self.split = stride == 1
        self.left: nn.Module = nn.Identity()
        if not self.split:
            self.left = nn.Sequential(depthwise(cin, 3, stride), leaky(cin, half))
        self.right = nn.Sequential(
            leaky(half if self.split else cin, half), depthwise(half, 3, stride), leaky(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.split else (x, x)
        y = torch.cat((self.left(left), self.right(right)), 1)
        n, c, h, w = y.shape
        shuffled: Tensor = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return shuffled


class ShuffleDet(nn.Module):
    def __init__(self, classes: int = 80, width: int = 96) -> None:
        super().__init__()
        self.stem = nn.Sequential(leaky(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1))
        stages, before = [], 24
        for channels, count in ((116, 4), (232, 8), (464, 4)):
            units = [
                ShuffleUnit(before if i == 0 else channels, channels, 2 if i == 0 else 1)
                for i in range(count)
            ]
            stages.append(nn.Sequential(*units))
            before = channels
        self.stages = nn.ModuleList(stages)
        self.into = nn.ModuleList([leaky(c, width) for c in (116, 232, 464)])
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.heads = nn.ModuleList(
            [
                nn.Sequential(
                    *(
                        nn.Sequential(depthwise(width, 5), nn.LeakyReLU(0.1), leaky(width, width))
                        for _ in range(2)
                    ),
                    nn.Conv2d(width, classes + 32, 1),
                )
                for _ in range(3)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        levels = []
        for stage, into in zip(self.stages, self.into, strict=True):
            x = stage(x)
            levels.append(into(x))
        levels[1] = levels[1] + self.up(levels[2])
        levels[0] = levels[0] + self.up(levels[1])
        outs = [head(level).flatten(2) for head, level in zip(self.heads, levels, strict=True)]
        return torch.cat(outs, 2).permute(0, 2, 1)


# --- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Definition:
    """mean, std: input rule in 8-bit levels, RGB; the picture is stretched to size x size."""

    make: Callable[[], nn.Module]
    size: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)


IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

NETWORKS = {
    "yolov8n": Definition(YoloV8n, 640),
    "mobilenetv2": Definition(mobilenet_v2, 224, IMAGENET_MEAN, IMAGENET_STD),
    "resnet18": Definition(resnet18, 224, IMAGENET_MEAN, IMAGENET_STD),
    "shuffledet": Definition(ShuffleDet, 320, IMAGENET_MEAN, IMAGENET_STD),
}
DETECTORS = ("yolov8n", "shuffledet")


def network_input(definition: Definition, image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] BGR -> float32 [1, 3, size, size] RGB, normalised."""
    import cv2

    small = cv2.resize(image, (definition.size, definition.size), interpolation=cv2.INTER_LINEAR)
    x = (small[:, :, ::-1].astype(np.float32) - definition.mean) / np.float32(definition.std)
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None], np.float32)


def initialise(net: nn.Module, seed: int = SEED) -> None:
    """Seeded weights: convolutions by fan-in (He et al. 2015), BatchNorm scales and shifts spread as
    training leaves them, last layers with biases that keep most class scores low."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    for name, module in net.named_modules():
        if name.endswith("dfl"):
            continue  # a fixed expectation, not a weight
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0].numel()
            module.weight.data = normal(module.weight.shape, (2 / fan) ** 0.5)
            if module.bias is not None:  # a head: box bins of unit spread, few classes above 1 in 1000
                module.weight.data *= 0.5
                module.bias.data = normal(module.bias.shape, 0.5) - (7.0 if ".cv3." in name else 0.0)
        elif isinstance(module, nn.Linear):
            module.weight.data = normal(module.weight.shape, (1 / module.in_features) ** 0.5)
            module.bias.data.zero_()
        elif isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.weight.data = 0.5 + torch.rand(n, generator=generator)
            module.bias.data = normal(torch.Size([n]), 0.3)


def settle(net: nn.Module, inputs: list[np.ndarray]) -> None:
    """BatchNorm statistics = plain averages over `inputs`; meanwhile each picture is normalised by its own."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    net.train()
    with torch.no_grad():
        for x in inputs:
            net(torch.from_numpy(x))
    net.eval()


def build(name: str) -> nn.Module:
    """The settled network, in eval mode."""
    definition = NETWORKS[name]
    net = definition.make()
    initialise(net)
    images = [StreetWorld(seed, *PICTURE).frame(FRAME).image for seed in SETTLE]
    settle(net, [network_input(definition, image) for image in images])
    return net


def export(name: str, folder: Path | None = None) -> Path:
    """The network as ONNX (opset 17, input `images` [1, 3, size, size], output `output`), from the cache
    where this very file wrote it before."""
    key = hashlib.sha256(Path(__file__).read_bytes() + f"{torch.__version__} {np.__version__}".encode())
    folder = folder or cache_dir() / "networks"
    path = folder / f"{name}-{key.hexdigest()[:12]}.onnx"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: the same file every time
    try:
        net = build(name)
        x = torch.zeros(1, 3, NETWORKS[name].size, NETWORKS[name].size)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                net,
                (x,),
                str(partial),
                opset_version=17,
                dynamo=False,
                input_names=["images"],
                output_names=["output"],
            )
        partial.replace(path)
    finally:
        torch.set_num_threads(threads)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NETWORKS)} (all)")
    parser.add_argument("--folder", type=Path, help="where to write (edgekit's cache)")
    args = parser.parse_args()
    unknown = set(args.names) - set(NETWORKS)
    if unknown:
        sys.exit(f"network {sorted(unknown)[0]}: unknown, expected one of {', '.join(NETWORKS)}")
    for name in args.names or NETWORKS:
        print(export(name, args.folder))


if __name__ == "__main__":
    main()
