"""BEVFusion as a whole: sensors that are missing, what is learnt, and the exported parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.models.bevfusion.config import LITE
from edgekit.models.bevfusion.export import export_segments
from edgekit.models.bevfusion.head import BOX, output_names, pipeline
from edgekit.models.bevfusion.loss import (
    box_loss,
    bump_radius,
    depth_bins,
    heat_loss,
    loss,
    segment_loss,
    targets,
)
from edgekit.models.bevfusion.model import BEVFusion, collate
from edgekit.models.bevfusion.segments import Segments
from edgekit.schema import from_json
from edgekit.tasks.fusion.decode import CenterDecoder
from edgekit.tasks.fusion.pipeline import FusionPipeline
from edgekit.tasks.fusion.spec import FusionSpec
from tests import bevfusion_nets as nets


def outputs(model: BEVFusion, batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = model(batch)
    return {name: found[name].numpy() for name in output_names(model.config)}


@pytest.mark.parametrize("config", [nets.TINY, nets.OTHER], ids=lambda c: c.name)
def test_what_a_missing_sensor_holds_does_not_matter(config) -> None:
    model, given = nets.network(config), collate([nets.sample(config)], config)
    whole = outputs(model, given)
    five = torch.ones(1, 6)
    five[0, 2] = 0
    for cameras, lidar in ((five, None), (torch.zeros(1, 6), None), (None, torch.zeros(1))):
        less = given.without(cameras, lidar)
        plain = outputs(model, less)
        images, depth, values = less.images.clone(), less.depth_images, less.cloud.values
        if cameras is not None:
            images[cameras[0] == 0] = 7
        if lidar is not None:
            depth, values = depth * 0 + 3, values + 5
        cloud = dataclasses.replace(less.cloud, values=values)
        other = outputs(model, dataclasses.replace(less, images=images, depth_images=depth, cloud=cloud))
        for name in plain:
            assert np.array_equal(plain[name], other[name])
            assert not np.array_equal(plain[name], whole[name])
    nothing = outputs(model, given.without(torch.zeros(1, 6), torch.zeros(1)))
    assert all(np.isfinite(value).all() for value in nothing.values())


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    model, samples = nets.network(nets.TINY), [nets.sample(nets.TINY, seed) for seed in (1, 2)]
    both = outputs(model, collate(samples, nets.TINY))
    for i, one in enumerate(samples):
        alone = outputs(model, collate([one], nets.TINY))
        for name in both:
            assert nets.difference(both[name][i : i + 1], alone[name]) < 1e-5


def test_the_mean_fuser_takes_a_sensor_alone_as_it_is() -> None:
    fuser = nets.network(nets.TINY).bev.fuser
    a, b = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        cameras, lidar = fuser.cameras(a), fuser.lidar(b)
        assert torch.equal(fuser(a, b, torch.tensor([[1.0, 0.0]])), cameras)
        assert torch.equal(fuser(a, b, torch.tensor([[0.0, 1.0]])), lidar)
        assert torch.allclose(fuser(a, b, torch.ones(1, 2)), (cameras + lidar) / 2)


@pytest.mark.parametrize("config", [LITE, nets.OTHER], ids=lambda c: c.name)
def test_decoding_what_is_to_be_learnt_gives_the_boxes_back(config) -> None:
    truth = nets.frame(1).truth
    reach = config.bev.pool.x[1]
    inside = (np.abs(truth.boxes[:, :2]) < reach).all(1)
    wanted = targets(config, [truth.boxes], [truth.classes])
    perfect = {}
    for g, heat in enumerate(wanted.heat):
        perfect[f"heat_{g}"] = torch.logit(heat.clamp(1e-4, 1 - 1e-4)).numpy()
        count = len(BOX) if config.head.velocity else len(BOX) - 2
        said = np.zeros((1, count, *config.shape), np.float32)
        said.reshape(count, -1)[:, wanted.cells[g].numpy()] = wanted.values[g].numpy()[:, :count].T
        perfect[f"box_{g}"] = said
        kinds = [config.head.labels.index(label) for label in config.head.groups[g]]
        assert len(wanted.cells[g]) == np.isin(truth.classes[inside], kinds).sum()
    found = CenterDecoder(pipeline(config, 0.9), perfect)(perfect)
    assert len(found) >= 0.7 * inside.sum() > 5  # some share a cell or stand beside each other
    for box, _, kind, _ in found:
        mine = truth.boxes[(truth.classes == kind) & inside]
        nearest = mine[np.hypot(*(mine[:, :2] - box[:2]).T).argmin()]
        assert np.allclose(box[:6], nearest[:6], atol=1e-3)
        assert np.cos(box[6] - nearest[6]) > 0.999
        assert np.allclose(box[7:], nearest[7:], atol=1e-3) or not config.head.velocity


def test_bumps_are_one_at_centres_and_as_wide_as_boxes_may_be_off() -> None:
    box = np.array([[0.5, -0.3, -1.0, 4.5, 1.9, 1.5, 0.0, 0, 0]], np.float32)
    (heat, none), *_ = targets(LITE, [box], [np.array([0])]).heat, None
    row, column = int((-0.3 + 32) / 0.8), int((0.5 + 32) / 0.8)
    assert heat[0, 0, row, column] == 1 and (heat == 1).sum() == 1 and not none.any()
    assert torch.isclose(
        heat[0, 0, row, column + 1], torch.tensor(np.exp(-1 / (2 * 0.5**2)), dtype=torch.float32)
    )
    assert heat[0, 0, row, column + 2] == 0
    # a bus has a wider bump than a car, and half as large cells make it wider
    assert int(bump_radius(5.6, 2.4)) == 1 < int(bump_radius(15, 3.6)) < int(bump_radius(30, 7.2))


def test_losses_by_hand() -> None:
    heat = torch.tensor([[[[1.0, 0.5, 0.0]]]])
    logits = torch.logit(torch.tensor([[[[0.6, 0.3, 0.2]]]]))
    wanted = -(np.log(0.6) * 0.4**2 + np.log(0.7) * 0.3**2 * 0.5**4 + np.log(0.8) * 0.2**2)
    assert abs(float(heat_loss(logits, heat)) - wanted) < 1e-6
    said = torch.zeros(1, 10, 1, 3)
    values = torch.tensor([[1.0] * 8 + [2.0, float("nan")]])
    assert abs(float(box_loss(said, torch.tensor([1]), values)) - (8 + 0.2 * 2)) < 1e-6
    certain = torch.tensor([[[[20.0, -20.0]]]])
    assert (
        float(segment_loss(certain, torch.tensor([[[[1.0, 0.0]]]])))
        < 1e-6
        < 1
        < float(segment_loss(-certain, torch.tensor([[[[1.0, 0.0]]]])))
    )


def test_depth_is_learnt_from_the_nearest_point_of_a_block() -> None:
    depth = torch.zeros(1, 1, 144, 256)
    depth[0, 0, 8:10, 16] = torch.tensor([30.2, 12.6])
    depth[0, 0, 0, 0], depth[0, 0, 0, 8] = 0.3, 60.0  # before the first bin and beyond the last
    bins = depth_bins(LITE.camera, depth)
    assert bins.shape == (1, 18, 32) and bins[0, 1, 2] == 12  # 1 + 12 = 13 m is nearest to 12.6
    assert (bins >= 0).sum() == 1


def test_it_learns_a_scene() -> None:
    torch.manual_seed(0)
    config, frame = nets.TINY, nets.frame(1)
    model, given = BEVFusion(config).train(), collate([nets.sample(config)], config)
    wanted = targets(config, [frame.truth.boxes], [frame.truth.classes])
    depth = depth_bins(config.camera, given.depth_images)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    history = []
    for _ in range(25):
        parts = loss(model(given), wanted, depth, config)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in parts.items()})
    assert set(history[0]) == {"heat", "box", "depth"}
    assert all(history[-1][name] < 0.8 * history[0][name] for name in history[0])
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


@pytest.mark.parametrize("config", [LITE, nets.OTHER], ids=lambda c: c.name)
def test_the_exported_plan_gives_what_torch_gives(config, tmp_path) -> None:
    model, sample = nets.network(config), nets.sample(config)
    said = export_segments(model, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == said
    known = set(said["inputs"])
    for step in said["steps"]:  # every tensor was made before it is taken
        assert set(step["inputs"]) <= known and step.get("when", "lidar") in said["inputs"]
        known |= set(step["outputs"])
    assert set(said["outputs"]) <= known
    assert {Path(step["model"]).name for step in said["steps"] if "model" in step} == {
        path.name for path in tmp_path.glob("*.onnx")
    }
    assert not model.training and (tmp_path / "lidar.onnx").exists() == bool(config.lidar.neck)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 12 << 20
    session = Segments(tmp_path)
    spec = from_json(FusionSpec, said["pipeline"], "pipeline")
    assert spec == pipeline(config)
    look = FusionPipeline(spec, session)
    given = collate([sample], config)
    height, width = config.camera.image
    frame = nets.frame(1, width, height)
    one = torch.ones(1, 6)
    one[0, 4] = 0
    lost = {name: shot for name, shot in frame.shots.items() if name != config.camera.names[4]}
    cases = {
        "all": (frame, given),
        "camera lost": (dataclasses.replace(frame, shots=lost), given.without(cameras=one)),
        "no lidar": (dataclasses.replace(frame, points=None), given.without(lidar=torch.zeros(1))),
        "no cameras": (dataclasses.replace(frame, shots={}), given.without(torch.zeros(1, 6))),
    }
    for name, (seen, batch) in cases.items():
        look(seen)
        wanted = outputs(model, batch)
        assert list(session.outputs) == output_names(config)
        for key, value in session.outputs.items():
            assert value.dtype == np.float32
            assert nets.difference(value, wanted[key]) < 1e-4, (name, key)
