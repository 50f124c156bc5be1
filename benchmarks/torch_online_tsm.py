"""The online TSM as its public demo runs it, in torch: one frame and a list of shift buffers in, both out.

After the description of the demo (Lin et al. 2019, section 4.2 and the authors' online demo), in our own words:
MobileNetV2 whose shifted blocks each take the buffer that they left behind on the frame before. A picture,
uint8 RGB, becomes a tensor as torchvision's `ToTensor` and `Normalize` make one; the network is called
eagerly, frame by frame, batch norms and all, under `torch.inference_mode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHIFTED = (2, 4, 5, 7, 8, 9, 11, 12, 14, 15)
"""Inverted residual blocks, from 0, that keep their size and expand: these shift."""
SHARE = 8
ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip
"""Expansion, channels, repeats, stride (Sandler et al. 2018, table 2)."""


def rounded(channels: float) -> int:
    """To a multiple of 8, at most a tenth less."""
    result = max(8, int(channels + 4) // 8 * 8)
    return result + 8 if result < 0.9 * channels else result


def convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """Inverted residual. With `shifted`, forward takes and returns a buffer."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int, shifted: bool) -> None:
        super().__init__()
        hidden = inputs * expand
        self.shifted, self.residual = shifted, stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [*convolution(inputs, hidden, 1, 1), nn.ReLU6(inplace=True)]
        layers += [*convolution(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*layers, *convolution(hidden, outputs, 1, 1))

    def forward(self, x: Tensor, buffer: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if not self.shifted:
            y = self.conv(x)
            return (x + y if self.residual else y), None
        fold = x.size(1) // SHARE
        first, rest = x[:, :fold], x[:, fold:]
        return x + self.conv(torch.cat((buffer, rest), 1)), first


class OnlineMobileNetV2(nn.Module):
    """image [1, 3, H, W] and ten buffers [1, C/8, h, w] -> logits [1, K] and the next ten buffers."""

    def __init__(self, classes: int = 27, width: float = 1.0) -> None:
        super().__init__()
        channels = rounded(32 * width)
        layers: list[nn.Module] = [nn.Sequential(*convolution(3, channels, 3, 2), nn.ReLU6(inplace=True))]
        for expand, wanted, repeats, stride in ROWS:
            for i in range(repeats):
                outputs, number = rounded(wanted * width), len(layers) - 1
                step = stride if i == 0 else 1
                layers.append(Block(channels, outputs, step, expand, number in SHIFTED))
                channels = outputs
        last = rounded(1280 * max(1.0, width))
        layers.append(nn.Sequential(*convolution(channels, last, 1, 1), nn.ReLU6(inplace=True)))
        self.features = nn.ModuleList(layers)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor, buffers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        after: list[Tensor] = []
        for layer in self.features:
            if not isinstance(layer, Block):
                x = layer(x)
            elif layer.shifted:
                x, kept = layer(x, buffers[len(after)])
                after.append(kept)
            else:
                x, _ = layer(x)
        return self.classifier(x.mean(3).mean(2)), after

    def buffers(self, size: int) -> list[Tensor]:
        """Zeros for a stream of size x size pictures."""
        found: list[Tensor] = []
        with torch.no_grad():
            x = next(self.parameters()).new_zeros(1, 3, size, size)
            for layer in self.features:
                if isinstance(layer, Block) and layer.shifted:
                    found.append(torch.zeros_like(x[:, : x.size(1) // SHARE]))
                x = layer(x, found[-1] if found else None)[0] if isinstance(layer, Block) else layer(x)
        return found


class TorchOnline:
    """The demo's loop on one stream: pictures in, logits out."""

    def __init__(self, net: OnlineMobileNetV2, size: int) -> None:
        self.net = net.eval()
        self._zeros = net.buffers(size)
        self.reset()

    def reset(self) -> None:
        self.buffers = list(self._zeros)

    def picture(self, rgb: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] RGB -> float32 [1, 3, H, W]: /255 and per channel (x - mean) / std."""
        x = torch.from_numpy(rgb).permute(2, 0, 1).contiguous().float().div(255)
        for channel, mean, std in zip(x, MEAN, STD, strict=True):
            channel.sub_(mean).div_(std)
        return x[None]

    @torch.inference_mode()
    def network(self, x: Tensor) -> np.ndarray:
        """One step on a tensor; logits [1, K]."""
        logits, self.buffers = self.net(x, self.buffers)
        return logits.numpy()

    @torch.inference_mode()
    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """One step on a picture, uint8 [H, W, 3] RGB; logits [1, K]."""
        return self.network(self.picture(rgb))


def with_weights(classes: int, width: float, weights: Sequence[Tensor]) -> OnlineMobileNetV2:
    """The network with parameters and statistics of another MobileNetV2, in that one's order of layers.

    Raises: ValueError when their number or a shape differs.
    """
    net = OnlineMobileNetV2(classes, width)
    own = net.state_dict()
    if [tuple(v.shape) for v in own.values()] != [tuple(v.shape) for v in weights]:
        raise ValueError(
            f"weights: {len(weights)} tensors, not those of a MobileNetV2 x {width:g} with {classes} classes"
        )
    net.load_state_dict(dict(zip(own, weights, strict=True)))
    return net.eval()
