"""Super-nets: sub-nets are exact, share their weights, learn from the largest, and need statistics of their own."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit.compression.batchnorm import recalibrate
from edgekit.compression.problem import Problem, macs, parameters
from edgekit.compression.shapes_problem import ShapesNet
from edgekit.compression.supernet import Sandwich, Space, SuperNet, imitate_logits
from edgekit.compression.work import begin
from edgekit.models.yolo_lite import Layout, YoloLite
from tests.small_nets import EXAMPLE, Net, Placed, problem_of

KINDS = ("plain", "separable", "inverted2", "group2", "plain+se", "ghost")


def batches(count: int = 4, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.rand(16, 3, 8, 8, generator=random) for _ in range(count)]


def supernet(kind: str = "plain", **options: object) -> SuperNet:
    torch.manual_seed(0)
    return SuperNet(Net(kind), EXAMPLE, {"head"}, multiple=4, shares=(0.25, 0.5, 0.75), **options)  # type: ignore[arg-type]


def test_the_space_is_widths_and_depths() -> None:
    space = supernet().space
    assert dict(space.axes) == {
        "width stem": (0.5, 1.0),  # of 8 channels in fours: 4 or 8
        "width stage": (0.25, 0.5, 0.75, 1.0),
        "depth stage": (0, 1, 2),
    }
    assert space.size == 24
    wide = SuperNet(
        Net(channels=32), EXAMPLE, {"head"}
    ).space  # of 32 channels in eights: what they are shares of
    assert wide.axes["width stage"] == (0.25, 0.5, 0.75, 1.0)
    assert space.of(space.named(space.largest())) == space.largest() == (1.0, 1.0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_extracted_is_what_the_super_net_computes(kind: str) -> None:
    """In training mode both normalise by the same batch; in evaluation by the same statistics."""
    net = supernet(kind)
    rng = np.random.default_rng(1)
    for choice in [net.smallest(), net.largest(), *(net.space.random(rng) for _ in range(4))]:
        small = net.extract(choice)
        inputs = batches(1)[0]
        net.model.train()
        small.train()
        with torch.no_grad():
            assert torch.equal(net.forward(choice, inputs), small(inputs)), choice
        recalibrate(small, batches())
        if choice != net.largest():
            inner, _ = net._layout(choice)
            inner.load_state_dict(small.state_dict())
            with torch.no_grad():
                net.model.eval()
                assert torch.equal(net.forward(choice, inputs), small.eval()(inputs)), choice


def test_channels_that_stay_are_the_ones_that_matter() -> None:
    torch.manual_seed(0)
    model = Net()
    weight = model.stem[0].weight
    with torch.no_grad():
        weight[[1, 6]] *= 100
    net = SuperNet(model, EXAMPLE, {"head"}, multiple=2, shares=(0.25,))
    small = net.extract(net.space.of({"width stem": 0.25, "width stage": 1.0, "depth stage": 2}))
    assert torch.equal(small.stem[0].weight, weight[[1, 6]])


def test_depth_skips_the_last_blocks() -> None:
    net = supernet()
    one = net.extract((1.0, 1.0, 1))
    wanted = copy.deepcopy(net.model)
    wanted.stage[2] = nn.Identity()
    inputs = batches(1)[0]
    assert torch.equal(one.eval()(inputs), wanted.eval()(inputs))
    assert parameters(one) < parameters(net.model)
    assert macs(net.extract(net.smallest()), EXAMPLE) < macs(one, EXAMPLE) / 5


def test_gradients_reach_the_shared_weights_of_the_sub_net_alone() -> None:
    net = supernet()
    net.model.train()
    choice = (0.5, 0.5, 1)
    net.forward(choice, batches(1)[0]).square().sum().backward()
    model = net.model
    assert int(model.stem[0].weight.grad.flatten(1).any(1).sum()) == 4
    assert int(model.stage[0][0].weight.grad.flatten(1).any(1).sum()) == 8
    assert all(p.grad is None for p in model.stage[2].parameters())
    small = net.extract(choice)
    small.train()
    small(batches(1)[0]).square().sum().backward()
    kept = model.stage[0][0].weight.grad.flatten(1).any(1)
    columns = model.stem[0].weight.grad.flatten(1).any(1)
    assert torch.allclose(small.stage[0][0].weight.grad, model.stage[0][0].weight.grad[kept][:, columns])


def test_resolution_is_part_of_what_is_extracted(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    problem = problem_of(Placed())
    net = SuperNet(problem.model, EXAMPLE, problem.head, multiple=4, shares=(0.5,), resolutions=(0.5,))
    assert net.space.axes["resolution"] == (0.5, 1.0)
    choice = net.smallest()
    inputs = batches(1)[0]
    net.model.train()
    small = net.extract(choice).train()
    with torch.no_grad():
        assert torch.equal(net.forward(choice, inputs), small(inputs))
        assert macs(small, EXAMPLE) < macs(net.extract((*choice[:-1], 1.0)), EXAMPLE) / 3
        problem.write(copy.deepcopy(small.eval()), tmp_path / "small.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": inputs[:1].numpy()})
        assert np.allclose(found, small(inputs[:1]).numpy(), atol=1e-4)


def test_a_detector_has_no_resolutions_to_choose() -> None:
    layout = Layout((8, 8), (16, 16, 16), (0, 0, 0), neck=16)
    with pytest.raises(ValueError, match="outputs change with the resolution"):
        SuperNet(YoloLite(2, layout), torch.zeros(1, 3, 64, 64), resolutions=(0.5,))


def test_masks_are_cut_along() -> None:
    net = supernet()
    masks = {
        name: (torch.rand_like(p) > 0.5).float() for name, p in net.model.named_parameters() if p.ndim == 4
    }
    kept = dict(masks)
    small = net.extract((0.5, 0.5, 1), kept)
    named = dict(small.named_parameters())
    assert 0 < len(kept) < len(masks)
    assert all(named[name].shape == mask.shape for name, mask in kept.items())


def test_sub_nets_of_the_detector_and_of_the_benchmark() -> None:
    torch.manual_seed(0)
    layout = Layout((8, 8), (16, 16, 16), (1, 1, 1), ("plain", "separable", "plain"), 16)
    for model, example, head, depths in (
        (YoloLite(2, layout), torch.zeros(1, 3, 32, 32), {f"heads.{i}.{n}" for i in range(3) for n in ("box", "objectness", "classes")}, 3),
        (ShapesNet(0.25), torch.zeros(1, 3, 32, 32), {"head"}, 0),
    ):  # fmt: skip
        net = SuperNet(model, example, head, shares=(0.5,))
        small = net.extract(net.smallest())
        assert sum(name.startswith("depth") for name in net.space.axes) == depths
        assert macs(small, example) < 0.6 * macs(model, example)
        inputs = torch.rand(2, *example.shape[1:])
        net.model.train()
        for got, want in zip(
            _flat(net.forward(net.smallest(), inputs)), _flat(small.train()(inputs)), strict=True
        ):
            assert torch.equal(got, want)


@pytest.fixture(scope="module")
def trained() -> tuple[Problem, SuperNet]:
    """A super-net of flattened places trained by the sandwich for a few steps."""
    torch.manual_seed(0)
    problem = problem_of(Placed())
    work = begin(problem)
    net = SuperNet(work.model, EXAMPLE, problem.head, multiple=4, shares=(0.25, 0.5, 0.75))
    work.train(80, lr=problem.lr, hooks=[Sandwich(net, problem, count=1)])
    return problem, net


def test_every_sub_net_learns_and_is_nothing_without_its_own_statistics(
    trained: tuple[Problem, SuperNet],
) -> None:
    problem, net = trained
    assert problem.evaluate(net.model)["top1"] > 0.9
    rng = np.random.default_rng(0)
    drops = []
    for choice in (net.smallest(), *(net.space.random(rng) for _ in range(3))):
        small = net.extract(choice)
        without = problem.evaluate(small)["top1"]
        recalibrate(small, (problem.batch(step)[0] for step in range(4)))
        assert problem.evaluate(small)["top1"] > 0.9
        drops.append(problem.evaluate(small)["top1"] - without)
    assert min(drops) >= 0
    assert drops[0] > 0.2


def test_in_place_distillation_follows_the_largest(trained: tuple[Problem, SuperNet]) -> None:
    _, net = trained
    problem = problem_of(net.model)
    hook = Sandwich(net, problem, count=2, seed=3)
    images, labels = problem.batch(0)
    net.model.train()
    losses = []
    for step in (0, 0, 1):
        hook.before(net.model, step, 2)
        outputs = net.model(images)
        term = hook.loss(images, outputs, labels)
        assert term is not None
        losses.append(term.item())
    assert losses[0] == losses[1] != losses[2]  # a step's sub-nets depend on seed and step alone
    outputs.retain_grad()
    term.backward()
    assert outputs.grad is None  # the largest learns from the labels alone
    log = outputs.detach().log_softmax(1)
    entropy = -(log.exp() * log).sum(1).mean().item()
    assert imitate_logits(outputs, outputs.detach(), labels).item() == pytest.approx(entropy)
    assert losses[2] > 3 * entropy


def test_nothing_to_choose() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    with pytest.raises(ValueError, match="nothing can be chosen"):
        SuperNet(model, EXAMPLE, {"3"})


def test_uniform_scaling_of_a_space() -> None:
    space = Space({"width a": (0.25, 0.5, 1.0), "width b": (0.5, 1.0), "depth a": (0, 1)})
    found = [space.uniform(share) for share in (0.25, 0.5, 0.75, 1)]
    assert found == [(0.25, 0.5, 1), (0.5, 0.5, 1), (0.5, 0.5, 1), (1.0, 1.0, 1)]


def _flat(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    assert isinstance(outputs, (list, tuple))
    return [t for each in outputs for t in _flat(each)]
