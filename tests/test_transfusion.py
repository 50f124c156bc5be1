"""TransFusion's head: torch against torch's own layers and the kernels, exported and decoded, and whatever queries may say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit import schema
from edgekit.errors import BundleError
from edgekit.kernels.peaks import peaks
from edgekit.models.bevfusion.config import FULL_QUERIES, QueryConfig
from edgekit.models.bevfusion.export import export_segments
from edgekit.models.bevfusion.head import output_names, pipeline
from edgekit.models.bevfusion.model import BEVFusion, collate
from edgekit.models.bevfusion.segments import Segments
from edgekit.models.bevfusion.transfusion import Attention, DecoderLayer, TransFusionHead
from edgekit.tasks.detect.spec import Channels
from edgekit.tasks.fusion.decode import decoder
from edgekit.tasks.fusion.pipeline import FusionPipeline
from edgekit.tasks.fusion.queries import QueryDecoder
from edgekit.tasks.fusion.spec import FusionSpec, QueryHead
from edgekit.toolchain.tasks.fusion import head_facts
from tests import bevfusion_nets as nets

QUERIES = QueryConfig(count=24, hidden=16, heads=4, feedforward=24, still=("pedestrian",))
TINY = dataclasses.replace(
    nets.TINY, name="queries", head=dataclasses.replace(nets.TINY.head, queries=QUERIES)
)


def lively(model: BEVFusion) -> BEVFusion:
    """Last layers that say something, so that peaks stand out."""
    head = model.head
    assert isinstance(head, TransFusionHead)
    generator = torch.Generator().manual_seed(3)
    for branch in (head.heat, *head.says.values()):
        last = branch[-1]
        last.weight.data = torch.randn(last.weight.shape, generator=generator) * 0.4
    return model


@pytest.fixture(scope="module")
def model() -> BEVFusion:
    torch.manual_seed(1)
    made = BEVFusion(TINY)
    made.train()
    with torch.no_grad():  # the figures of batch norms are those of the frame
        for part in made.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.momentum = 1.0
        made(collate([nets.sample(TINY)], TINY))
    return lively(made).eval()


@pytest.fixture(scope="module")
def folder(model: BEVFusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("queries")
    export_segments(model, where, score_threshold=0.0)
    return where


def test_attention_is_torchs_own():
    torch.manual_seed(0)
    ours = Attention(24, 4)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    with torch.no_grad():
        assert torch.allclose(ours(query, key, value), theirs(query, key, value)[0], atol=1e-6)


def test_the_decoder_layer_is_torchs_own_where_nothing_has_a_place():
    torch.manual_seed(0)
    ours = DecoderLayer(QUERIES).eval()
    for position in (ours.own_position, ours.cross_position):
        nn.init.zeros_(position.net[-1].weight)
        nn.init.zeros_(position.net[-1].bias)
    theirs = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True).eval()
    parts = {
        "self_attn": ours.own, "multihead_attn": ours.cross, "linear1": ours.feed[0], "linear2": ours.feed[2],
        "norm1": ours.norms[0], "norm2": ours.norms[1], "norm3": ours.norms[2],
    }  # fmt: skip
    for name, part in parts.items():
        theirs.get_submodule(name).load_state_dict(part.state_dict())
    query, seen = torch.randn(2, 7, 16), torch.randn(2, 30, 16)
    at = torch.rand(2, 7, 2), torch.rand(1, 30, 2)
    with torch.no_grad():
        assert torch.allclose(ours(query, seen, *at), theirs(query, seen), atol=1e-5)
        ours.cross_position.net[-1].bias.fill_(1.0)
        assert not torch.allclose(ours(query, seen, *at), theirs(query, seen), atol=1e-2)


def test_queries_begin_at_the_peaks_that_the_kernel_finds(model):
    with torch.no_grad():
        out = model(collate([nets.sample(TINY)], TINY))
    heat = np.ascontiguousarray(out["heat"][0].numpy())
    windows = [1 if label in QUERIES.still else 3 for label in TINY.head.labels]
    found = peaks(heat, [], threshold=0.0, limit=QUERIES.count, window=windows)
    prior, kind = out["queries"][0].numpy()
    assert np.array_equal(kind, found.cells[:, 0])
    assert np.allclose(prior, found.scores, atol=1e-6)
    assert len(set(kind)) > 1
    assert (np.diff(prior) <= 0).all()
    # what a query says of its centre is told from its own cell on
    moved = out["boxes"][0, :2].numpy().T - (found.cells[:, [2, 1]] + 0.5)
    assert np.abs(moved).max() < 5
    assert np.abs(out["boxes"][0, :2].numpy().T - found.cells[:, [1, 2]]).max() > 5


def boxes_of(spec: FusionSpec, said: dict[str, np.ndarray]) -> list[tuple[float, list[float], int]]:
    """The rule of mmdetection3d's TransFusionBBoxCoder, a query at a time: (score, box, class), best first."""
    found = []
    for q in range(said["boxes"].shape[2]):
        prior, kind = said["queries"][0, :, q]
        own = said["classes"][0, int(kind), q]
        x, y, z, log_l, log_w, log_h, sin, cos, vx, vy = (float(v) for v in said["boxes"][0, :, q])
        box = [
            spec.head.low_x + x * spec.head.cell_x, spec.head.low_y + y * spec.head.cell_y, z,
            math.exp(log_l), math.exp(log_w), math.exp(log_h), math.atan2(sin, cos), vx, vy,
        ]  # fmt: skip
        found.append((float(prior) / (1 + math.exp(-float(own))), box, int(kind)))
    return sorted(found, key=lambda each: -each[0])


def test_exported_and_decoded_it_says_what_torch_says(model, folder):
    with torch.no_grad():
        out = {name: value.numpy() for name, value in model(collate([nets.sample(TINY)], TINY)).items()}
    session = Segments(folder)
    spec = schema.from_json(FusionSpec, session.plan["pipeline"], "pipeline")
    assert spec == pipeline(TINY, 0.0)
    assert list(session.outputs) == output_names(TINY) == ["classes", "boxes", "queries"]
    height, width = TINY.camera.image
    found = FusionPipeline(spec, session)(nets.frame(1, width, height))
    for name, value in session.outputs.items():
        assert np.allclose(value, out[name], rtol=1e-3, atol=2e-4), name
    wanted = boxes_of(spec, out)
    assert len(found) == len(wanted) == QUERIES.count
    assert np.allclose(found.scores, [score for score, _, _ in wanted], atol=1e-5)
    assert found.classes.tolist() == [kind for _, _, kind in wanted]
    assert np.allclose(found.boxes, [box for _, box, _ in wanted], rtol=1e-3, atol=2e-3)


def test_sensors_may_be_missing(folder):
    session = Segments(folder)
    run = FusionPipeline(schema.from_json(FusionSpec, session.plan["pipeline"], "pipeline"), session)
    height, width = TINY.camera.image
    frame = nets.frame(1, width, height)
    blind = run(dataclasses.replace(frame, shots={}))
    assert blind.missing == TINY.camera.names
    assert len(blind) == QUERIES.count
    assert run(dataclasses.replace(frame, points=None)).missing == ("lidar",)
    assert len(run(dataclasses.replace(frame, points=None, shots={}))) == 0


def test_without_velocity_and_with_a_map_of_the_ground(tmp_path):
    head = dataclasses.replace(nets.OTHER.head, queries=QUERIES)
    config = dataclasses.replace(nets.OTHER, name="other-queries", head=head)
    torch.manual_seed(0)
    net = lively(BEVFusion(config).eval())
    export_segments(net, tmp_path, score_threshold=0.0)
    session = Segments(tmp_path)
    assert list(session.outputs) == ["classes", "boxes", "queries", "segments"]
    assert session.outputs["boxes"].shape[1] == 8
    height, width = config.camera.image
    found = FusionPipeline(pipeline(config, 0.0), session)(nets.frame(1, width, height))
    assert len(found) > 0
    assert np.isnan(found.boxes[:, 7:]).all()
    assert np.isfinite(found.boxes[:, :7]).all()


def test_the_published_size():
    head = TransFusionHead(8, dataclasses.replace(FULL_QUERIES)).eval()
    assert (head.classes, head.settings.count, head.cells_at.shape[1]) == (10, 200, 180 * 180)
    spec = pipeline(FULL_QUERIES)
    assert isinstance(spec.head, QueryHead)
    assert schema.from_json(FusionSpec, json.loads(json.dumps(schema.to_json(spec))), "spec") == spec
    assert head_facts(spec) == {"family": "queries", "classes": 10}
    assert (spec.head.low_x, spec.head.cell_x) == (-54.0, 0.6)


# --- decoding ---

PLACES = (Channels("classes"), Channels("queries"), *(Channels("boxes", start) for start in (0, 2, 3, 6)))


def spec_of(**rule: object) -> FusionSpec:
    head = QueryHead(*PLACES, -10.0, -20.0, 0.5, 0.25, velocity=Channels("boxes", 8), **rule)  # type: ignore[arg-type]
    return FusionSpec(head, ("car", "pedestrian"), 0.1)


def said(count: int = 3) -> dict[str, np.ndarray]:
    """`count` cars 4 x 2 x 1.5 m, side by side along x."""
    boxes = np.zeros((1, 10, count), np.float32)
    boxes[0, 0] = 4 * np.arange(count)
    boxes[0, 3:6] = np.log([[4.0], [2.0], [1.5]])
    boxes[0, 7] = 1
    queries = np.stack([np.full(count, 0.8), np.zeros(count)])[None].astype(np.float32)
    classes = np.full((1, 2, count), 2.0, np.float32) + np.arange(count, dtype=np.float32)
    return {"boxes": boxes, "queries": queries, "classes": classes}


def test_a_box_by_hand():
    tensors = said(1)
    tensors["boxes"][0, :, 0] = [6, 12, -0.5, math.log(4), math.log(2), math.log(1.5), 1, 0, 3, -1]
    run = decoder(spec_of(), tensors)
    assert isinstance(run, QueryDecoder)
    found = run(tensors, missing=("lidar",), taken_ns=5)
    assert np.allclose(found.boxes[0], [-7, -17, -0.5, 4, 2, 1.5, math.pi / 2, 3, -1], atol=1e-6)
    assert found.scores[0] == pytest.approx(0.8 / (1 + math.exp(-2)))
    assert (found.missing, found.taken_ns, found.labels) == (("lidar",), 5, ("car", "pedestrian"))
    tensors["queries"][0, 1] = 1  # found as the other class: its own score counts
    tensors["classes"][0, 1] = -1
    found = run(tensors)
    assert found.classes[0] == 1
    assert found.scores[0] == pytest.approx(0.8 / (1 + math.e))
    wide = decoder(spec_of(sizes="wlh", log_sizes=False, bounds=(-8, -18, -3, 0, 0, 3)), tensors)
    tensors["boxes"][0, 3:6, 0] = 2, 4, 1.5
    assert wide(tensors).boxes[0, 3:6].tolist() == [4, 2, 1.5]
    tensors["boxes"][0, 2] = 5
    assert len(wide(tensors)) == 0


def test_best_first_and_no_more_than_asked_for():
    tensors = said(5)
    run = decoder(spec_of(), tensors)
    found = run(tensors)
    assert found.boxes[:, 0].tolist() == [-2.0, -4.0, -6.0, -8.0, -10.0]
    assert len(run(tensors, score_threshold=0.77)) == 3  # sigmoid(4) * 0.8 = 0.786, sigmoid(3) * 0.8 = 0.762
    assert run(tensors, max_detections=3).boxes[:, 0].tolist() == [-2.0, -4.0, -6.0]
    tensors["classes"][:] = 2
    assert run(tensors).boxes[:, 0].tolist() == [-10.0, -8.0, -6.0, -4.0, -2.0], (
        "equal scores: as queries come"
    )


def test_suppression_where_it_is_asked_for():
    tensors = said(5)
    assert len(decoder(spec_of(suppress="circle", limits=(2.5,)), tensors)(tensors)) == 3
    assert len(decoder(spec_of(suppress="circle", limits=(0.5, 2.5)), tensors)(tensors)) == 5
    assert len(decoder(spec_of(suppress="rotated", limits=(0.2,)), tensors)(tensors)) == 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_queries_say_boxes_are_boxes(data):
    numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)
    tensors = said(4)
    for name, tensor in tensors.items():
        for _ in range(data.draw(st.integers(0, 6))):
            spot = data.draw(st.integers(0, tensor.size - 1), name)
            tensor.reshape(-1)[spot] = data.draw(numbers)
    found = decoder(spec_of(), tensors)(tensors)
    assert np.isfinite(found.boxes).all()
    assert (found.boxes[:, 3:6] > 0).all()
    assert np.isfinite(found.scores).all()
    assert (found.scores >= 0.1).all()
    assert set(found.classes) <= {0, 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("queries"), "no output 'queries'"),
        (lambda t: t.update(classes=t["classes"][:, :1]), "channels 0..1"),
        (lambda t: t.update(boxes=t["boxes"].astype(np.float64)), "expected float32"),
        (lambda t: t.update(boxes=t["boxes"][0]), "expected float32"),
        (lambda t: t.update(queries=t["queries"][:, :, :2]), "expected 3 queries, got 2"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, words):
    tensors = said()
    change(tensors)
    with pytest.raises(BundleError, match=words):
        decoder(spec_of(), tensors)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"suppress": "all"}, "unknown"),
        ({"limits": (-1.0,)}, "limits"),
        ({"limits": (1.0, 1.0, 1.0)}, "one per label"),
        ({"suppress": "rotated", "limits": (2.0,)}, "limits"),
        ({"bounds": (0.0, 1.0)}, "bounds"),
    ],
)
def test_specs_that_are_wrong(rule, words):
    with pytest.raises(ValueError, match=words):
        spec_of(**rule)


def test_heads_of_both_kinds_are_told_apart_in_a_manifest():
    for config in (TINY, nets.TINY):
        spec = pipeline(config)
        again = schema.from_json(FusionSpec, json.loads(json.dumps(schema.to_json(spec))), "pipeline")
        assert again == spec
    broken = schema.to_json(pipeline(TINY))
    del broken["head"]["center"]
    with pytest.raises(schema.SchemaError, match="center"):
        schema.from_json(FusionSpec, broken, "pipeline")
