"""ONNX networks as torch modules: the same numbers, gradients, other sizes, pruning, and back to ONNX."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgekit import frontends
from edgekit.compression.onnx_module import (
    OnnxModule,
    from_onnx,
    heads,
    to_onnx,
    unfold_batchnorm,
    unprunable,
)
from edgekit.errors import ModelError
from edgekit.models.exporting import write_onnx
from edgekit.passes import fuse_batchnorm, prepare
from edgekit.passes.exact import open_session
from tests.helpers import ROOT, shared_data

APPS = {
    "detect/yolo_lite.onnx": "detect", "gesture/tsm_gesture.onnx": "video", "bevfusion/plan/lift.onnx": "",
    "bevfusion/plan/camera.onnx": "", "bevfusion/plan/lidar.onnx": "", "bevfusion/plan/fusion.onnx": "",
}  # fmt: skip
SHARED = ("yolox_nano/yolox_nano.onnx", "fastestdet/FastestDet.onnx", "cifar10_resnet8/resnet8_cifar10.onnx")


def inputs(module: OnnxModule, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Coarse noise: smooth, as pictures are."""
    rng = np.random.default_rng(0)
    found = []
    for shape in module.input_shapes:
        x = torch.from_numpy((rng.random(shape) * scale).astype(np.float32))
        if len(shape) == 4 and min(shape[2:]) >= 32:
            small = x[:, :, :9, :13].contiguous()
            x = nn.functional.interpolate(small, size=shape[2:], mode="bilinear", align_corners=False)
        found.append(x)
    return tuple(found)


def several(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def runtime(model: ir.Model, names: tuple[str, ...], feeds: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    session = open_session(ir.to_proto(model).SerializeToString(), "test", arena=False)
    found: list[np.ndarray] = session.run(None, dict(zip(names, [f.numpy() for f in feeds], strict=True)))
    return found


def apart(model: ir.Model, scale: float = 1.0) -> float:
    """Largest relative difference of an output to ONNX Runtime's."""
    module = from_onnx(model)
    feeds = inputs(module, scale)
    with torch.no_grad():
        got = several(module(*feeds))
    want = runtime(model, module.input_names, feeds)
    return max(float(np.abs(w - g.numpy()).max() / np.abs(w).max()) for w, g in zip(want, got, strict=True))


@pytest.mark.parametrize("name", APPS)
def test_apps_compute_the_same(name: str) -> None:
    model = frontends.load(ROOT / "apps" / name)
    assert apart(model) <= 1e-5
    if APPS[name]:
        assert apart(prepare(model, task=APPS[name], check=False).model) <= 1e-5


@pytest.mark.shared
@pytest.mark.parametrize("name", SHARED)
def test_real_networks_compute_the_same(name: str) -> None:
    model = frontends.load(shared_data() / "models" / name)
    assert apart(model, 255.0 if "yolox" in name else 1.0) <= 1e-5


class Mixed(nn.Module):
    """Branches, a shuffle, a depthwise and a transposed convolution, pooling, resizing, and a head in rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.inner = nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.last = nn.Conv2d(12, 10, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.stem(x))
        y = nn.functional.silu(self.norm(self.depth(self.inner(x))))
        b, c, h, w = x.shape
        mixed = torch.stack((x, y), 2).reshape(b, 2 * c, h, w)
        small = nn.functional.max_pool2d(mixed[:, :c] + mixed[:, c:], 2)
        wide = nn.functional.interpolate(small, scale_factor=2, mode="nearest")
        found = self.last(torch.cat([wide, self.up(small)], 1))
        return found.reshape(b, 10, -1).permute(0, 2, 1).softmax(-1), y.mean((2, 3))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, Mixed]:
    torch.manual_seed(0)
    net = Mixed().eval()
    with torch.no_grad():
        net.norm.running_var.fill_(0.3)
    path = tmp_path_factory.mktemp("mixed") / "mixed.onnx"
    write_onnx(net, path, (torch.zeros(1, 3, 16, 16),), ["pixels"], ["rows", "means"])
    return frontends.load(path), net


def test_gradients_are_those_of_the_source(mixed: tuple[ir.Model, Mixed]) -> None:
    model, net = mixed
    module = from_onnx(model)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def score(found: Any) -> torch.Tensor:
        return (found[0] ** 2).sum() + found[1].sin().sum()

    score(module(x)).backward()
    net.zero_grad()
    score(net(x)).backward()
    names = {o.weight.split("_bias")[0]: child for child, o in module.origins.items()}
    assert len(names) == 5
    assert module.stem_Conv.weight.grad is not None
    assert torch.allclose(module.stem_Conv.weight.grad, net.stem.weight.grad, rtol=1e-4, atol=1e-6)
    assert torch.allclose(module.up_ConvTranspose.bias.grad, net.up.bias.grad, rtol=1e-4, atol=1e-6)


def test_other_batches_and_sizes(mixed: tuple[ir.Model, Mixed]) -> None:
    model, net = mixed
    module = from_onnx(model)
    x = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for got, want in zip(module(x), net(x), strict=True):
            assert torch.allclose(got, want, atol=1e-5)


def test_copies_and_states(mixed: tuple[ir.Model, Mixed]) -> None:
    module = from_onnx(mixed[0])
    other = copy.deepcopy(module)
    x = inputs(module)
    with torch.no_grad():
        other.stem_Conv.weight.mul_(0.5)
        assert not torch.equal(module(*x)[0], other(*x)[0])
        other.load_state_dict(module.state_dict())
        assert torch.equal(module(*x)[0], other(*x)[0])


def test_back_to_onnx(mixed: tuple[ir.Model, Mixed], tmp_path: Path) -> None:
    module = from_onnx(mixed[0])
    to_onnx(module, tmp_path / "again.onnx")
    again = frontends.load(tmp_path / "again.onnx")
    feeds = inputs(module)
    with torch.no_grad():
        want = module(*feeds)
    for got, w in zip(runtime(again, module.input_names, feeds), want, strict=True):
        assert np.abs(got - w.numpy()).max() <= 1e-5
    assert [v.name for v in again.graph.outputs] == ["rows", "means"]


def test_unfolded_norms_undo_themselves(mixed: tuple[ir.Model, Mixed], tmp_path: Path) -> None:
    module = from_onnx(mixed[0])
    feeds = inputs(module)
    with torch.no_grad():
        want = module(*feeds)
    count = unfold_batchnorm(module, [(feeds[0], torch.zeros(1)), (feeds[0] * 0.5, torch.zeros(1))])
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert count == len(norms) == 5
    with torch.no_grad():
        for got, w in zip(module(*feeds), want, strict=True):
            assert torch.allclose(got, w, atol=1e-5)
    assert all(n.running_var.std() > 0 for n in norms)
    module.train()
    batch = torch.cat([feeds[0], feeds[0] * 0.5])
    with torch.no_grad():  # the batch that was measured: its own statistics are the stored ones
        trained = module(batch)
        exact = module.eval()(batch)
    assert torch.allclose(trained[0], exact[0], atol=1e-2)
    to_onnx(module, tmp_path / "folded.onnx")
    folded = frontends.load(tmp_path / "folded.onnx")
    fuse_batchnorm.run(folded)  # the exporter leaves those behind transposed convolutions
    assert all(n.op_type != "BatchNormalization" for n in folded.graph)


def test_pruned_by_dependency_groups() -> None:
    import torch_pruning as tp

    model = frontends.load(ROOT / "apps/detect/yolo_lite.onnx")
    module = from_onnx(model)
    fixed = heads(module)
    assert len(fixed) == 9 and not unprunable(module)
    before = sum(p.numel() for p in module.parameters())
    tp.pruner.MagnitudePruner(
        module, module.example()[0], importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        round_to=4, ignored_layers=[getattr(module, n) for n in fixed],
    ).step()  # fmt: skip
    assert sum(p.numel() for p in module.parameters()) < 0.3 * before
    found = module(torch.rand(2, 3, 96, 128))
    assert found.shape == (2, 12 * 16 + 6 * 8 + 3 * 4, 10)


@pytest.mark.shared
def test_shuffles_keep_their_channels() -> None:
    import torch_pruning as tp

    module = from_onnx(frontends.load(shared_data() / "models/fastestdet/FastestDet.onnx"))
    fixed = heads(module) | unprunable(module)
    before = sum(p.numel() for p in module.parameters())
    tp.pruner.MagnitudePruner(
        module, module.example()[0], importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        round_to=4, ignored_layers=[getattr(module, n) for n in fixed],
    ).step()  # fmt: skip
    assert sum(p.numel() for p in module.parameters()) < 0.6 * before
    assert module(torch.rand(2, 3, 96, 128)).shape == (2, 85, 6, 8)


def test_all_unknown_operators_in_one_line() -> None:
    x = ir.Value(name="x", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    first = ir.node("Sinh", [x])
    last = ir.node("Cosh", [first.outputs[0]])
    for node, name in ((first, "a"), (last, "b")):
        node.outputs[0].name = name
        node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
    graph = ir.Graph([x], [last.outputs[0]], nodes=[first, last], opset_imports={"": 19}, name="g")
    with pytest.raises(ModelError, match="Cosh, Sinh") as error:
        from_onnx(ir.Model(graph, ir_version=9))
    assert "\n" not in str(error.value)
