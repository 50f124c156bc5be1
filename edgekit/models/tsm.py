"""TSM: a 2-D network that sees motion because channels are shifted in time (Lin et al. 2019, arXiv:1811.08383).

Before the first convolution of a residual branch (`place='blockres'` of the paper's code) an eighth of
the channels is replaced by those of a neighbouring frame; the identity branch is not touched. The shift
has no weights and costs no arithmetic, so one set of weights runs in three modes:

- `offline`: the first eighth comes from frame t+1, the second from t-1 (needs the whole clip);
- `online`: the first eighth comes from frame t-1 (causal: one frame in, one answer out, see `OnlineTSM`);
- `none`: no shift, the frames are judged one by one (TSN, the control that cannot see motion).

Beyond either end of a clip there are zeros. An offline checkpoint is no online one: its first eighth was
trained on the future. Input is RGB, (level / 255 - MEAN) / STD.

Which blocks are shifted: MobileNetV2 (Sandler et al. 2018), those that are residual and expand, 10 of 17;
ResNet (He et al. 2016), every block. Parameter names are those of torchvision's models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from edgekit.errors import ModelError, UsageError, did_you_mean
from edgekit.models.exporting import write_onnx

Mode = Literal["offline", "online", "none"]
Shift = Callable[[Tensor], Tensor]
"""Makes the input of a residual branch [N, C, h, w] from the block's input, of the same shape."""

SHARE = 8
"""One channel in this many moves each way."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""MobileNetV2, table 2: expansion, channels, repeats, stride."""


def shift(x: Tensor, mode: Mode) -> Tensor:
    """Shift x [N, T, C, h, w] in time: slices and concats of fixed sizes, so that it exports as such.

    offline: y[t, :f] = x[t+1, :f], y[t, f:2f] = x[t-1, f:2f]; online: y[t, :f] = x[t-1, :f]; f = C // 8;
    the rest is x, frames outside the clip are zero.
    """
    if mode == "none":
        return x
    f = x.shape[2] // SHARE
    none = x.new_zeros((int(x.shape[0]), 1, f, *(int(size) for size in x.shape[3:])))
    if mode == "online":
        past = torch.cat([none, x[:, :-1, :f]], 1)
        return torch.cat([past, x[:, :, f:]], 2)
    ahead = torch.cat([x[:, 1:, :f], none], 1)
    past = torch.cat([none, x[:, :-1, f : 2 * f]], 1)
    return torch.cat([ahead, past, x[:, :, 2 * f :]], 2)


def _divisible(value: float) -> int:
    """Channels as a multiple of 8, at most a tenth below `value` (MobileNetV2's rule)."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * value else rounded + 8


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expand, 3x3 depthwise, 1x1 project; `shifted` if residual and expanding."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.shifted = self.residual and expand != 1
        layers: list[nn.Module] = [_conv(inputs, hidden, 1)] if expand != 1 else []
        layers += [_conv(hidden, hidden, 3, stride, hidden), nn.Conv2d(hidden, outputs, 1, bias=False)]
        self.conv = nn.Sequential(*layers, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor, move: Shift) -> Tensor:
        y: Tensor = self.conv(move(x) if self.shifted else x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Backbone and classifier: [N, 3, H, W] -> [N, K]; `width` multiplies the channels of every layer."""

    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels = _divisible(32 * width)
        features: list[nn.Module] = [_conv(3, channels, 3, 2)]
        for expand, wanted, repeats, stride in _SETTINGS:
            for i in range(repeats):
                outputs = _divisible(wanted * width)
                features.append(InvertedResidual(channels, outputs, stride if i == 0 else 1, expand))
                channels = outputs
        last = _divisible(1280 * max(1.0, width))
        self.features = nn.ModuleList([*features, _conv(channels, last, 1)])
        self.classifier = nn.Sequential(
            nn.Identity(), nn.Linear(last, num_classes)
        )  # as torchvision numbers them

    def forward(self, x: Tensor, move: Shift) -> Tensor:
        for part in self.features:
            x = part(x, move) if isinstance(part, InvertedResidual) else part(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class Residual(nn.Module):
    """ResNet's basic block (two 3x3) or, with `deep`, its bottleneck (1x1, 3x3, 1x1 to 4 x planes)."""

    shifted = True

    def __init__(self, inputs: int, planes: int, stride: int, deep: bool) -> None:
        super().__init__()
        outputs = planes * 4 if deep else planes
        plan = (
            ((1, planes, 1), (3, planes, stride), (1, outputs, 1))
            if deep
            else ((3, planes, stride), (3, planes, 1))
        )
        channels = inputs
        self.depth = len(plan)
        for i, (kernel, after, step) in enumerate(plan, 1):
            self.add_module(f"conv{i}", nn.Conv2d(channels, after, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
            channels = after
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor, move: Shift) -> Tensor:
        y = move(x)
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            y = self.relu(y) if i < self.depth else y
        same: Tensor = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(same + y)
        return out


class ResNet(nn.Module):
    """Backbone and classifier: [N, 3, H, W] -> [N, K]; `width` multiplies the channels of every layer."""

    def __init__(self, num_classes: int, blocks: tuple[int, ...], deep: bool, width: float = 1.0) -> None:
        super().__init__()
        base = _divisible(64 * width)
        self.conv1 = nn.Conv2d(3, base, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = base
        for stage, count in enumerate(blocks):
            planes, layer = base << stage, nn.ModuleList()
            for i in range(count):
                layer.append(Residual(channels, planes, 2 if stage and i == 0 else 1, deep))
                channels = planes * (4 if deep else 1)
            self.add_module(f"layer{stage + 1}", layer)
        self.stages = len(blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor, move: Shift) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            for block in self.get_submodule(f"layer{stage + 1}").children():
                x = block(x, move)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


BACKBONES: dict[str, Callable[[int, float], nn.Module]] = {
    "mobilenet_v2": MobileNetV2,
    "resnet18": lambda classes, width: ResNet(classes, (2, 2, 2, 2), False, width),
    "resnet50": lambda classes, width: ResNet(classes, (3, 4, 6, 3), True, width),
}


class TSM(nn.Module):
    """A clip model: float32 clip [T, 3, H, W] -> logits [T, K], or a batch [N, T, 3, H, W] -> [N, T, K].

    One row per frame; the clip's answer is the mean of the rows (segment consensus), taken by the caller.
    backbone: a key of `BACKBONES`.  mode: where the shifted channels come from (module docstring).  width:
    multiplier of the channels.
    Raises: UsageError for an unknown backbone or mode.
    """

    def __init__(
        self, backbone: str, num_classes: int, mode: Mode = "online", width: float = 1.0
    ) -> None:  # fmt: skip
        super().__init__()
        if backbone not in BACKBONES:
            raise UsageError(f"backbone {backbone!r}: unknown. {did_you_mean(backbone, BACKBONES)}")
        if mode not in get_args(Mode):
            raise UsageError(f"TSM mode {mode!r}: unknown. {did_you_mean(mode, get_args(Mode))}")
        self.mode: Mode = mode
        self.net = BACKBONES[backbone](num_classes, width)
        for part in self.net.modules():  # He et al. 2015
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")

    @property
    def shifted(self) -> int:
        """How many blocks shift; the number of states of the one-frame model."""
        blocks = sum(getattr(part, "shifted", False) for part in self.net.modules())
        return 0 if self.mode == "none" else blocks

    def forward(self, clip: Tensor) -> Tensor:
        frames, batched = int(clip.shape[-4]), clip.dim() == 5
        images = clip.flatten(0, 1) if batched else clip

        def move(x: Tensor) -> Tensor:
            if self.mode == "none":
                return x
            sizes = [int(size) for size in x.shape]  # plain numbers, so that no shape arithmetic is traced
            return shift(x.reshape(sizes[0] // frames, frames, *sizes[1:]), self.mode).reshape(sizes)

        logits: Tensor = self.net(images, move)
        return logits.reshape(-1, frames, logits.shape[-1]) if batched else logits


class OnlineTSM(nn.Module):
    """The one-frame model of an online `TSM`, sharing its weights: (image, *states) -> (logits, *next states).

    image [1, 3, H, W], states [1, C // 8, h, w] in the order of the blocks, zeros at the start
    (`zero_states`). Branch input = concat(state, x[C/8:]), next state = x[:C/8]. Fed frame by frame its
    logits [1, K] are the rows of the clip model. A model without shift has no states.
    Raises: ModelError for a bi-directional model, which needs frames that have not been taken yet.
    """

    def __init__(self, model: TSM) -> None:
        super().__init__()
        if model.mode == "offline":
            raise ModelError(
                "TSM model: shifts in both directions, expected uni-directional to run frame by frame, got mode "
                "'offline'. Train it with mode='online'"
            )
        self.model = model
        self.train(model.training)

    def forward(self, image: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        assert len(states) == self.model.shifted, f"{len(states)} states, expected {self.model.shifted}"
        given, after = iter(states), []

        def move(x: Tensor) -> Tensor:
            if self.model.mode == "none":
                return x
            f = x.shape[1] // SHARE
            after.append(x[:, :f])
            return torch.cat([next(given), x[:, f:]], 1)

        logits: Tensor = self.model.net(image, move)
        return (logits, *after)

    def zero_states(self, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """States at the start of a stream of size = (height, width) images."""
        found: list[Tensor] = []

        def move(x: Tensor) -> Tensor:
            if self.model.mode != "none":
                found.append(torch.zeros_like(x[:, : x.shape[1] // SHARE]))
            return x

        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self.model.net(next(self.model.parameters()).new_zeros(1, 3, *size), move)
        self.model.train(training)
        return tuple(found)


def export_clip(model: TSM, path: Path, frames: int, size: tuple[int, int], opset: int = 17) -> None:
    """Write the clip model as float32 ONNX: input `clip` [frames, 3, H, W], output `logits` [frames, K].

    size = (height, width). Batch norms are folded; the file is written whole or not at all.
    """
    _export(model, path, (torch.zeros(frames, 3, *size),), ["clip"], ["logits"], [], opset)


def export_online(
    model: TSM, path: Path, size: tuple[int, int], nominal_dt_s: float | None = None, opset: int = 17
) -> None:
    """Write the one-frame model as float32 ONNX: `image` and `state_0`.. in, `logits` and `state_0_next`.. out.

    size = (height, width).  nominal_dt_s: seconds between the frames it was trained on, where that is known.
    The pairs are listed in the metadata `edgekit.states`. A model without shift is written with no states.
    Raises: ModelError for a bi-directional model.
    """
    online = OnlineTSM(model)
    states = online.zero_states(size)
    names = [f"state_{i}" for i in range(len(states))]
    pairs: list[dict[str, object]] = [
        {"name": name, "input": name, "output": f"{name}_next", "initial": 0.0, "nominal_dt_s": nominal_dt_s}
        for name in names
    ]
    outputs = ["logits", *(f"{name}_next" for name in names)]
    _export(online, path, (torch.zeros(1, 3, *size), *states), ["image", *names], outputs, pairs, opset)


def _export(
    model: nn.Module, path: Path, example: tuple[Tensor, ...], inputs: list[str], outputs: list[str],
    states: list[dict[str, object]], opset: int,
) -> None:  # fmt: skip
    metadata = {"edgekit.states": json.dumps(states)} if states else None
    write_onnx(model, path, example, inputs, outputs, metadata, opset)
