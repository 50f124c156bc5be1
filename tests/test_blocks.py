"""Lightweight blocks: their cost, what they compute, and that the toolchain takes YOLO-lite made of them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from edgekit.compression.problem import macs, parameters
from edgekit.errors import UsageError
from edgekit.models.blocks import KINDS, Ghost, Shuffle, SqueezeExcite, block, parse, residual
from edgekit.models.exporting import write_onnx
from edgekit.models.yolo_lite import Layout, YoloLite, export_onnx, load_onnx
from edgekit.passes import prepare, run_passes
from edgekit.quant.calibrate import calibrate
from edgekit.quant.lint import integer_share, lint
from edgekit.quant.placement import place
from edgekit.quant.rules import rules_for
from edgekit.target import Target
from edgekit.toolchain.estimate import estimate

VARIANTS = (
    *KINDS,
    "inverted2",
    "plain+se",
    "separable+se",
    "inverted+se",
    "group+se",
    "shuffle+se",
    "ghost+se",
)
SHIPPED = "b0de56b4182620aec49dce0c243e975a045d470a11a2721b0677c5b4d0d673e8"
"""sha256 of the names and shapes of the shipped detector's state_dict."""
SIZE = (64, 96)


def statistics(net: nn.Module) -> None:
    """Batch norms away from the identity, so that folding them is tested."""
    random = torch.Generator().manual_seed(3)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.uniform_(-0.3, 0.3, generator=random)
            part.running_var.uniform_(0.5, 1.5, generator=random)


def cost(net: nn.Module, channels: int, side: int = 8) -> int:
    return macs(net, torch.zeros(1, channels, side, side))


def test_the_default_layout_is_the_network_that_ships() -> None:
    net = YoloLite(5)
    text = "\n".join(f"{name} {tuple(value.shape)}" for name, value in net.state_dict().items())
    assert hashlib.sha256(text.encode()).hexdigest() == SHIPPED
    assert net.layout == Layout() == Layout.scaled("plain", 1.0)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_takes_the_place_of_a_convolution(kind: str, stride: int) -> None:
    for outputs in (16, 24):
        made = block(kind, 16, outputs, stride)
        assert made(torch.rand(2, 16, 8, 12)).shape == (2, outputs, 8 // stride, 12 // stride)
    assert residual(kind, 16)(torch.rand(2, 16, 8, 12)).shape == (2, 16, 8, 12)


def test_products_are_those_of_the_formulas() -> None:
    """reference: k k C N of a 3x3; depthwise-separable 1/N + 1/k^2 of it (0.1189 at 128); groups and ghosts divide it."""
    c = 128
    whole = cost(block("plain", c, c), c)
    assert whole == 9 * c * c * 64
    assert (
        cost(block("separable", c, c), c) / whole
        == pytest.approx(1 / c + 1 / 9)
        == pytest.approx(0.1189, abs=1e-4)
    )
    assert cost(block("group4", c, c), c) * 4 == whole
    assert cost(block("inverted6", c, c), c) == (2 * 6 * c * c + 9 * 6 * c) * 64
    assert cost(residual("shuffle", c), c) == (2 * (c // 2) ** 2 + 9 * c // 2) * 64
    assert cost(Ghost(c, c), c) == (c * c // 2 + 9 * c // 2) * 64
    assert parameters(SqueezeExcite(c)) == 2 * c * c // 4 + c + c // 4  # 2 C^2 / r, r = 4, and biases


def test_groups_are_those_that_divide() -> None:
    made = block("group4", 6, 12)
    assert isinstance(made, nn.Sequential) and isinstance(made[0], nn.Conv2d)
    assert made[0].groups == 3


def test_a_shuffle_mixes_the_halves() -> None:
    unit = Shuffle(8)
    unit.branch = nn.Identity()
    found: Tensor = unit(torch.arange(8.0).reshape(1, 8, 1, 1))
    assert found.flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_excitation_is_one_factor_a_channel() -> None:
    part = SqueezeExcite(16)
    x = torch.rand(2, 16, 4, 4) + 0.1
    ratio = part(x) / x
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    mean = x.mean((2, 3))
    hidden = (mean @ part.reduce.weight.flatten(1).T + part.reduce.bias).relu()
    wanted = torch.sigmoid(hidden @ part.expand.weight.flatten(1).T + part.expand.bias)
    assert torch.allclose(ratio[:, :, 0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ghots", "Did you mean 'ghost'"),
        ("plain3", "plain takes no number"),
        ("group0", "a number of 1 to 64"),
        ("shuffle+sx", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_kind_that_there_is_not(kind: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(kind)


@pytest.mark.parametrize("kind", ["shuffle", "ghost"])
def test_halves_need_an_even_number(kind: str) -> None:
    with pytest.raises(UsageError, match="7 channels, expected an even number"):
        block(kind, 8, 7)


def test_shuffles_become_slices(tmp_path: Path) -> None:
    """Two units: each shuffle and split is two strided slices, and nothing else moves data."""
    net = nn.Sequential(residual("shuffle", 16), residual("shuffle+se", 16))
    statistics(net)
    write_onnx(net, tmp_path / "net.onnx", (torch.zeros(1, 16, 8, 8),), ["x"], ["y"])
    model = ir.load(tmp_path / "net.onnx")
    assert {"Reshape", "Transpose"} <= {node.op_type for node in model.graph}
    folded, _ = run_passes(model, ("fold_constants", "remove_identity", "fold_shuffle"))
    ops = [node.op_type for node in folded.graph]
    assert ops.count("Slice") == 4 and not {"Reshape", "Transpose", "Split", "Gather"} & set(ops)


@pytest.mark.parametrize("kind", [*KINDS, "plain+se", "shuffle+se"])
def test_yolo_lite_of_every_kind_is_prepared_estimated_and_quantized(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layout = replace(Layout.scaled(kind, 0.25), depths=(1, 0, 0))
    net = YoloLite(5, layout).eval()
    statistics(net)
    path = tmp_path / "net.onnx"
    export_onnx(net, path, *SIZE)
    found = prepare(ir.load(path), check=kind in ("shuffle", "plain+se"))  # every pass, on a picture
    assert found.head is not None and found.head.family == "yolox"
    ops = {node.op_type for node in found.model.graph}
    excited = {"GlobalAveragePool", "Sigmoid", "Mul"} if kind.endswith("+se") else set()
    assert ops <= {"Conv", "Relu", "Add", "Concat", "Resize", "Slice"} | excited
    assert ("Slice" in ops) == kind.startswith("shuffle")
    boards = [Target.load("rpi5"), Target.load("jetson-orin")]
    assert min(estimate(found.model, board, "int8").total_s for board in boards) > 0
    picture = np.random.default_rng(0).integers(0, 256, (1, 3, *SIZE)).astype(np.float32)
    stats = calibrate(found.model, [{"images": picture}])
    rules = rules_for("litert", boards[0])
    assert integer_share(lint(place(found.model, stats, rules), rules)) == 1


def test_a_shallower_detector_is_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layout = replace(Layout.scaled("plain", 0.25), depths=(1, 0, 2))
    net = YoloLite(3, layout).eval()
    statistics(net)
    export_onnx(net, tmp_path / "net.onnx", *SIZE)
    again = load_onnx(tmp_path / "net.onnx").eval()
    assert again.layout.depths == (1, 0, 2)
    picture = torch.rand(1, 3, *SIZE) * 255
    with torch.no_grad():
        for got, want in zip(again(picture), net(picture), strict=True):
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)
