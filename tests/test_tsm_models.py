"""TSM networks: what the shift moves, that one frame at a time equals the clip, and what is exported."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgekit.errors import ModelError, UsageError
from edgekit.models.tsm import BACKBONES, TSM, OnlineTSM, export_clip, export_online, shift

SIZE = (64, 96)


def network(backbone="mobilenet_v2", mode="online", width=0.25, classes=5):
    torch.manual_seed(1)
    model = TSM(backbone, classes, mode, width)
    for part in model.modules():
        if isinstance(
            part, nn.BatchNorm2d
        ):  # near the fitting statistics, so that logits depend on the picture
            part.momentum = 0.5
    with torch.no_grad():
        model(clip(8, seed=9))
    return model.eval()


def clip(frames, size=SIZE, seed=0):
    return torch.randn(frames, 3, *size, generator=torch.Generator().manual_seed(seed))


def run(path, **inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in inputs.items()})


# --- the shift ---


def test_shift_by_hand():
    """Three frames of 16 channels, value 100 t + c; two channels move each way."""
    x = (100 * torch.arange(1, 4)[:, None] + torch.arange(16)).float().reshape(1, 3, 16, 1, 1)
    online, offline = (shift(x, mode).reshape(3, 16).int().tolist() for mode in ("online", "offline"))
    rest = [[100 * t + c for c in range(16)] for t in (1, 2, 3)]
    assert [row[:2] for row in online] == [[0, 0], [100, 101], [200, 201]]
    assert [row[2:] for row in online] == [row[2:] for row in rest]
    assert [row[:2] for row in offline] == [[200, 201], [300, 301], [0, 0]]
    assert [row[2:4] for row in offline] == [[0, 0], [102, 103], [202, 203]]
    assert [row[4:] for row in offline] == [row[4:] for row in rest]
    assert shift(x, "none") is x


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("channels", [7, 8, 24, 31])
def test_shift_is_the_definition(mode, channels):
    x = torch.randn(2, 4, channels, 3, 2)
    wanted, f = x.clone(), channels // 8
    for t in range(4):
        if mode == "online":
            wanted[:, t, :f] = x[:, t - 1, :f] if t else 0.0
        else:
            wanted[:, t, :f] = x[:, t + 1, :f] if t < 3 else 0.0
            wanted[:, t, f : 2 * f] = x[:, t - 1, f : 2 * f] if t else 0.0
    assert torch.equal(shift(x, mode), wanted)


# --- where it is, and how much state that takes ---


def test_mobilenet_shifts_the_blocks_of_the_paper():
    blocks = [part for part in TSM("mobilenet_v2", 27).net.features if hasattr(part, "shifted")]
    assert [i for i, block in enumerate(blocks) if block.shifted] == [2, 4, 5, 7, 8, 9, 11, 12, 14, 15]


def test_parameters_of_the_published_networks():
    """MobileNetV2 has 3.50 M parameters, ResNet-18 11.69 M, ResNet-50 25.56 M at 1000 classes."""
    counts = {name: sum(p.numel() for p in TSM(name, 1000).parameters()) for name in BACKBONES}
    assert counts == {"mobilenet_v2": 3_504_872, "resnet18": 11_689_512, "resnet50": 25_557_032}


@pytest.mark.parametrize(
    ("backbone", "states", "elements"), [("mobilenet_v2", 10, 27_048), ("resnet50", 16, 702_464)]
)
def test_states_at_224(backbone, states, elements):
    model = TSM(backbone, 27)
    found = OnlineTSM(model).zero_states((224, 224))
    assert len(found) == model.shifted == states
    assert sum(state.numel() for state in found) == elements
    assert model.training


def test_state_shapes_of_the_published_demo():
    shapes = [tuple(state.shape) for state in OnlineTSM(TSM("mobilenet_v2", 27)).zero_states((224, 224))]
    wanted = [(3, 56, 56)] + [(4, 28, 28)] * 2 + [(8, 14, 14)] * 3 + [(12, 14, 14)] * 2 + [(20, 7, 7)] * 2
    assert shapes == [(1, *shape) for shape in wanted]


# --- one frame at a time ---


@pytest.mark.parametrize(
    ("backbone", "width"), [("mobilenet_v2", 0.25), ("resnet18", 0.25), ("resnet50", 0.125)]
)
def test_frame_by_frame_equals_the_clip(backbone, width):
    model = network(backbone, width=width).double()
    frames = clip(6).double()
    online = OnlineTSM(model)
    with torch.no_grad():
        wanted = model(frames)
        states = online.zero_states(SIZE)
        for t in range(6):
            logits, *states = online(frames[t : t + 1], *states)
            torch.testing.assert_close(logits, wanted[t : t + 1], rtol=0, atol=1e-6)
    assert (wanted[1:] - wanted[:1]).abs().max() > 1e-3


def test_online_is_causal_and_offline_is_not():
    frames = clip(5)
    other = frames.clone()
    other[3:] += 1.0
    for mode, same in (("online", True), ("offline", False)):
        model = network(mode=mode)
        with torch.no_grad():
            assert torch.equal(model(frames)[:3], model(other)[:3]) is same
    control = network(mode="none")
    with torch.no_grad():
        torch.testing.assert_close(control(frames.flip(0)).flip(0), control(frames))


def test_batches_are_clips_side_by_side():
    model = network(mode="offline")
    clips = torch.stack([clip(4, seed=1), clip(4, seed=2)])
    with torch.no_grad():
        both = model(clips)
        torch.testing.assert_close(
            both, torch.stack([model(clips[0]), model(clips[1])]), rtol=1e-5, atol=1e-5
        )


# --- ONNX ---

PLAIN = {
    "Conv", "Clip", "Relu", "Add", "Slice", "Concat", "Reshape", "ReduceMean", "Gemm", "MaxPool",
    "Constant", "Identity", "Flatten",
}  # fmt: skip


@pytest.mark.parametrize("mode", ["online", "offline", "none"])
@pytest.mark.parametrize(
    ("backbone", "width"), [("mobilenet_v2", 0.25), ("resnet18", 0.25), ("resnet50", 0.125)]
)
def test_clip_export_equals_torch(tmp_path, backbone, width, mode):
    model, path, frames = network(backbone, mode, width), tmp_path / "clip.onnx", clip(4)
    export_clip(model, path, 4, SIZE)
    (logits,) = run(path, clip=frames)
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(frames), rtol=1e-5, atol=1e-5)
    proto = onnx.load(path)
    assert {node.op_type for node in proto.graph.node} <= PLAIN
    moves = [node for node in proto.graph.node if node.op_type == "Concat"]
    assert len(moves) == model.shifted * {"online": 2, "offline": 3, "none": 0}[mode]
    assert sorted(tmp_path.iterdir()) == [path]


def test_shift_views_one_clip_of_frames(tmp_path):
    """Every shift of the graph works on [1, T, C, h, w]."""
    path = tmp_path / "clip.onnx"
    export_clip(network(), path, 4, SIZE)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    views = [shapes[node.output[0]] for node in graph.node if node.op_type == "Concat"]
    assert len(views) == 2 * 10
    assert all(view[:2] == [1, 4] and len(view) == 5 for view in views)


@pytest.mark.parametrize(("backbone", "width"), [("mobilenet_v2", 0.25), ("resnet50", 0.125)])
def test_online_export_equals_the_clip(tmp_path, backbone, width):
    model, path, frames = network(backbone, width=width), tmp_path / "online.onnx", clip(5)
    export_online(model, path, SIZE, nominal_dt_s=0.1)
    proto = onnx.load(path)
    pairs = json.loads({prop.key: prop.value for prop in proto.metadata_props}["edgekit.states"])
    assert [pair["input"] for pair in pairs] == [f"state_{i}" for i in range(model.shifted)]
    assert pairs[0] == {
        "name": "state_0", "input": "state_0", "output": "state_0_next", "initial": 0.0, "nominal_dt_s": 0.1,
    }  # fmt: skip
    assert {node.op_type for node in proto.graph.node} <= PLAIN
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    assert shapes["image"] == [1, 3, *SIZE]
    assert shapes["logits"] == [1, 5]
    states = {}
    for pair in pairs:
        assert shapes[pair["input"]] == shapes[pair["output"]]
        assert math.prod(shapes[pair["input"]]) > 0
        states[pair["input"]] = np.zeros(shapes[pair["input"]], np.float32)
    with torch.no_grad():
        wanted = model(frames)
    for t in range(5):
        logits, *after = run(path, image=frames[t : t + 1], **states)
        np.testing.assert_allclose(logits, wanted[t : t + 1], rtol=1e-5, atol=1e-5)
        states = dict(zip(states, after, strict=True))


def test_a_network_without_shift_has_no_state(tmp_path):
    model, path = network(mode="none"), tmp_path / "frame.onnx"
    export_online(model, path, SIZE)
    proto = onnx.load(path)
    assert [value.name for value in proto.graph.input] == ["image"]
    assert not proto.metadata_props
    (logits,) = run(path, image=clip(1))
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(clip(1)), rtol=1e-5, atol=1e-5)


def test_refusals(tmp_path):
    with pytest.raises(ModelError, match="both directions"):
        export_online(network(mode="offline"), tmp_path / "net.onnx", SIZE)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        TSM("resnet19", 5)
    with pytest.raises(UsageError, match="offline"):
        TSM("resnet18", 5, "of-line")
