"""Structured pruning: groups, importance, cost, and the method that puts them together."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit import frontends
from edgekit.compression import importance, latency, surgery
from edgekit.compression.batchnorm import recalibrate
from edgekit.compression.groups import Group, groups, remove, silenced, tensors
from edgekit.compression.methods import prune
from edgekit.compression.onnx_module import from_onnx
from edgekit.compression.problem import Problem, macs, macs_of
from edgekit.compression.shapes_problem import ShapesNet
from edgekit.compression.work import Work, begin
from edgekit.models import blocks
from edgekit.models.exporting import write_onnx
from edgekit.models.yolo_lite import Layout, YoloLite
from edgekit.target import Target


def conv(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class MobileBlock(nn.Module):
    """MobileNetV2's inverted residual, with a stem and a Linear behind the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, stride=2)
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depthwise = conv(24, 24, groups=24)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class Flat(nn.Module):
    """Concatenation, a transposed convolution, Linear behind flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 8, stride=2), conv(3, 8, stride=2)
        self.up = nn.ConvTranspose2d(16, 6, 2, 2)
        self.head = nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.cat([self.left(x), self.right(x)], 1))
        found: Tensor = self.head(x.flatten(1))
        return found


def of_blocks(kind: str) -> nn.Module:
    return nn.Sequential(
        blocks.conv(3, 16, stride=2),
        blocks.residual(kind, 16),
        blocks.block(kind, 16, 32, stride=2),
        nn.Conv2d(32, 5, 1),
    )


NETWORKS: dict[str, tuple[Any, int, set[str]]] = {
    "shapes": (lambda: ShapesNet(0.25), 16, {"head"}),
    "yolo": (lambda: YoloLite(2, Layout(stem=(8, 16), widths=(16, 32, 32), neck=16)), 64, set()),
    "mobile": (MobileBlock, 16, {"head"}),
    "flat": (Flat, 8, {"head"}),
    "grouped": (lambda: of_blocks("group4"), 16, set()),
    "ghost": (lambda: of_blocks("ghost2"), 16, set()),
    "excited": (lambda: of_blocks("inverted2+se"), 16, set()),
}


def made(name: str) -> tuple[nn.Module, Tensor, set[str]]:
    """A network whose batch norms have seen something, and an input."""
    make, side, head = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
            nn.init.normal_(part.running_mean, 0, 0.3)
    return model.eval(), torch.rand(1, 3, side, side), head


def tiny(width: float = 0.25) -> Problem:
    """A ShapesNet that tells which third of a picture is bright; untrained."""
    torch.manual_seed(0)
    model = ShapesNet(width)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(step)
        kinds = torch.randint(0, 10, (16,), generator=draw)
        pictures = torch.rand(16, 3, 16, 16, generator=draw)
        for picture, kind in zip(pictures, kinds.tolist(), strict=True):
            picture[kind % 3, (kind // 3) * 4 : (kind // 3) * 4 + 4] += 1.5
        return pictures, kinds

    def evaluate(network: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            pictures, kinds = batch(10_000)
            return {"top1": float((network.eval()(pictures).argmax(1) == kinds).float().mean())}

    def write(network: nn.Module, path: Path) -> None:
        write_onnx(network, path, (torch.zeros(1, 3, 16, 16),), ["images"], ["logits"])

    loss = nn.functional.cross_entropy
    return Problem(
        "tiny", model, torch.zeros(1, 3, 16, 16), batch, loss, evaluate, write, frozenset({"head"}), lr=5e-3
    )


# ---- groups


@pytest.mark.parametrize("name", NETWORKS)
def test_cutting_is_what_silencing_gives(name: str) -> None:
    model, example, head = made(name)
    found = groups(model, example, head)
    assert found
    rng = np.random.default_rng(1)
    leaving = [(g, sorted(rng.permutation(g.units)[: g.units // 3].tolist())) for g in found]
    with torch.no_grad():
        whole = tensors(model(example))
        with silenced(model, leaving):
            want = tensors(model(example))
        remove(model, leaving)
        got = tensors(model(example))
    for a, b, c in zip(want, got, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(a, c, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_but_those_of_the_outputs_are_in_a_group(name: str) -> None:
    model, example, head = made(name)
    left: dict[str, str] = {}
    found = groups(model, example, head, left)
    makers = {slot.module for group in found for slot in group.having("out")}
    dense = [
        n for n, p in model.named_modules() if isinstance(p, surgery.MIXING) and not surgery.depthwise(p)
    ]
    outputs = {n for n in dense if n.split(".")[-1] in ("head", "box", "objectness", "classes") or n == "3"}
    assert makers == set(dense) - outputs
    assert set(left) == outputs


def test_what_meets_in_an_addition_is_one_group_and_depthwise_follows() -> None:
    model, example, head = made("mobile")
    stem, expand = groups(model, example, head)
    assert (stem.name, stem.units, expand.name, expand.units) == ("stem.0", 8, "expand.0", 24)
    assert {s.module for s in stem.having("out")} == {"stem.0", "project.0"}
    assert {(s.module, s.side) for s in stem.having("in")} == {("expand.0", "in"), ("head", "in")}
    assert {s.module for s in expand.having("both")} == {"expand.1", "depthwise.0", "depthwise.1"}


def test_a_head_that_is_named_stays_though_others_read_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    left: dict[str, str] = {}
    assert [g.name for g in groups(model, torch.zeros(1, 3, 4, 4), {"0"}, left)] == ["2"]
    assert left["0"] == "head 0"


def test_what_mixes_channels_on_the_way_is_left_alone() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.b(self.a(x).sort(1).values)
            return found

    left: dict[str, str] = {}
    assert groups(Sorted(), torch.zeros(1, 3, 4, 4), (), left) == []
    assert "mixed" in left["a"]


def test_what_is_shuffled_keeps_its_width() -> None:
    """Torch-Pruning pairs other channels than a shuffle does: the proof tells. The branches narrow."""
    left: dict[str, str] = {}
    found = groups(of_blocks("shuffle"), torch.zeros(1, 3, 16, 16), (), left)
    assert [g.name for g in found] == ["1.branch.0.0", "2.left.1.0", "2.right.0.0", "2.right.2.0"]
    assert set(left) == {"0.0", "3"}


def test_groups_of_a_convolution_lose_the_same_places() -> None:
    stem, reduce = groups(of_blocks("group4"), torch.zeros(1, 3, 16, 16))[:2]
    assert (stem.units, stem.per_unit, reduce.units, reduce.per_unit) == (4, 4, 2, 4)
    (reader,) = (slot for slot in reduce.having("in") if slot.module == "1.expand.0")
    assert reader.channels == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_an_onnx_network_has_the_groups_of_its_source(tmp_path: Path) -> None:
    model, example, head = made("mobile")
    write_onnx(model, tmp_path / "m.onnx", (example,), ["images"], ["logits"])
    module = from_onnx(frontends.load(tmp_path / "m.onnx"))
    found = groups(module, example)
    assert [(g.units, g.per_unit) for g in found] == [
        (g.units, g.per_unit) for g in groups(model, example, head)
    ]
    before = macs(module, example)
    with torch.no_grad(), silenced(module, [(g, range(4)) for g in found]):
        want = module(example)
    remove(module, [(g, range(4)) for g in found])
    torch.testing.assert_close(module(example), want, rtol=1e-4, atol=1e-5)
    assert macs(module, example) < before


def test_masks_are_cut_along() -> None:
    model, example, head = made("mobile")
    stem, expand = groups(model, example, head)
    masks = {n: (torch.rand(p.shape) > 0.5).float() for n, p in model.named_parameters() if p.ndim > 1}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).copy_(mask * (1 + torch.arange(mask.numel()).view_as(mask)))
    remove(model, [(stem, [1, 2]), (expand, [0, 7, 23])], masks)
    assert masks["depthwise.0.weight"].shape == (21, 1, 3, 3)
    assert masks["project.0.weight"].shape == (6, 21, 1, 1)
    for name, mask in masks.items():
        torch.testing.assert_close((model.get_parameter(name) != 0).float(), mask)


def test_grouped_convolutions_lose_equal_shares_or_refuse() -> None:
    part = nn.Conv2d(8, 6, 1, groups=2)
    model = nn.ModuleDict({"c": part})
    x = torch.rand(1, 8, 3, 3)
    with pytest.raises(ValueError, match="unequal"):
        surgery.cut(copy.deepcopy(model), {("c", "in"): [0, 1]})
    with pytest.raises(ValueError, match="last channel"):
        surgery.cut(copy.deepcopy(model), {("c", "out"): range(6)})
    want = part(x.index_fill(1, torch.tensor([1, 6]), 0))[:, [0, 2, 3, 4]]
    surgery.cut(model, {("c", "in"): [1, 6], ("c", "out"): [1, 5]})
    torch.testing.assert_close(part(x[:, [0, 2, 3, 4, 5, 7]]), want)
    assert (part.in_channels, part.out_channels, part.groups) == (6, 4, 2)


# ---- importance


def shapes_groups() -> tuple[nn.Module, list[Group]]:
    model, example, head = made("shapes")
    return model, groups(model, example, head)


@pytest.mark.parametrize("kind", ["l1", "l2", "fpgm", "slimming", "group_l2"])
def test_importance_of_weights_against_numpy(kind: str) -> None:
    model, found = shapes_groups()
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def of(name: str) -> np.ndarray:
        w = state[f"{name}.weight"]
        filters = w.reshape(len(w), -1)
        if kind == "l1":
            return np.abs(filters).sum(1)
        if kind == "l2":
            return np.sqrt((filters**2).sum(1))
        assert kind == "fpgm"
        return np.array([sum(np.linalg.norm(a - b) for b in filters) for a in filters])

    stem, last = found[0], found[-1]
    assert (stem.name, last.name) == ("stem.0", "stage2.0")
    if kind == "slimming":
        want, want_last = (
            np.abs(state["stem.1.weight"]),
            (np.abs(state["stage2.1.weight"]) + np.abs(state["stage3.1.weight"])) / 2,
        )
    elif kind == "group_l2":
        squares = (state["stem.0.weight"] ** 2).sum((1, 2, 3)) + (state["stage1.0.weight"] ** 2).sum(
            (0, 2, 3)
        )
        want = np.sqrt(squares + state["stem.1.weight"] ** 2 + state["stem.1.bias"] ** 2)
        squares = sum((state[f"stage{n}.0.weight"] ** 2).sum((1, 2, 3)) for n in (2, 3))
        squares += sum(state[f"stage{n}.1.{k}"] ** 2 for n in (2, 3) for k in ("weight", "bias"))
        squares += (state["stage3.0.weight"] ** 2).sum((0, 2, 3)) + (state["head.weight"] ** 2).sum(0)
        want_last = np.sqrt(squares)
    else:
        want, want_last = of("stem.0"), (of("stage2.0") + of("stage3.0")) / 2
    np.testing.assert_allclose(importance.score(model, stem, kind).numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(importance.score(model, last, kind).numpy(), want_last, rtol=1e-6)


def test_taylor_and_fisher_against_gates_behind_the_batch_norms() -> None:
    """Molchanov's gates, multiplied in behind the norms, one example at a time."""
    problem = tiny()
    model = problem.model.eval()
    found = groups(model, problem.example, problem.head)
    batches = [problem.batch(i) for i in range(2)]
    measured = importance.Gates(model, found, problem.loss, batches)
    assert all(p.grad is None for p in model.parameters())
    for group in (found[0], found[-1]):
        each = []
        for inputs, targets in batches:
            for x, y in zip(inputs, targets, strict=True):
                gate = torch.ones(group.units, requires_grad=True)

                def shut(part: nn.Module, _: Any, out: Tensor, gate: Tensor = gate) -> Tensor:
                    return out * gate[None, :, None, None]

                norms = [model.get_submodule(s.module) for s in group.having("both")]
                hooks = [norm.register_forward_hook(shut) for norm in norms]
                problem.loss(model(x[None]), y[None]).backward()
                assert gate.grad is not None
                each.append(gate.grad.double())
                for hook in hooks:
                    hook.remove()
        gates = torch.stack(each)
        torch.testing.assert_close(measured.taylor(group), gates.abs().mean(0), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(measured.fisher(group), gates.square().mean(0) / 2, rtol=1e-3, atol=1e-9)


def test_taylor_is_the_derivative_of_closing_a_unit() -> None:
    problem = tiny()
    model = problem.model.eval()
    group = groups(model, problem.example, problem.head)[1]
    pictures, kinds = problem.batch(0)
    batch = pictures[:1], kinds[:1]
    got = importance.Gates(model, [group], problem.loss, [batch]).taylor(group)
    reader = model.get_submodule(next(group.having("in")).module)
    weight = reader.get_parameter("weight")
    changes = []
    with torch.no_grad():
        for unit in range(group.units):
            losses = []
            for factor in (0.98, 1.02):
                kept = weight.clone()
                weight[:, unit] *= factor
                losses.append(problem.loss(model(batch[0]), batch[1]).double())
                weight.copy_(kept)
            changes.append(abs(losses[1] - losses[0]) / 0.04)
    torch.testing.assert_close(got, torch.stack(changes), rtol=0.05, atol=2e-4)


def test_slimming_pulls_factors_towards_zero() -> None:
    problem = tiny()
    sums = []
    for strength in (0.0, 0.05):
        work = begin(problem)
        found = groups(work.model, problem.example, problem.head)
        work.train(10, lr=5e-3, hooks=[importance.Slimming(found, strength)])
        sums.append(float(importance.score(work.model, found[0], "slimming").sum()))
    assert sums[1] < 0.98 * sums[0]


def test_slimming_without_batch_norms_is_refused() -> None:
    from edgekit.errors import UsageError

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    (group,) = groups(model, torch.zeros(1, 3, 4, 4))
    with pytest.raises(UsageError, match="no batch norm behind 0"):
        importance.score(model, group, "slimming")


# ---- batch norms


def test_recalibrated_statistics_are_the_average_over_batches() -> None:
    norm = nn.BatchNorm2d(3, momentum=0.03)
    model = nn.Sequential(norm, nn.Dropout(0.5)).train()
    batches = [torch.rand(4, 3, 5, 5) * k for k in (1.0, 2.0, 3.0)]
    recalibrate(model, batches)
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))
    assert norm.momentum == 0.03 and norm.training and model[1].training


# ---- cost


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_of_fewer_channels_are_those_of_the_pruned_network(name: str) -> None:
    model, example, head = made(name)
    found = groups(model, example, head)
    cost = latency.Macs(model, found, example)
    assert cost([g.units for g in found]) == pytest.approx(macs(model, example))
    kept = [g.units - g.units // 3 for g in found]
    remove(model, [(g, range(g.units // 3)) for g in found])
    assert cost(kept) == pytest.approx(macs(model, example))


@pytest.mark.parametrize(("name", "board"), [("shapes", "rpi5"), ("mobile", "jetson-orin")])
def test_estimated_seconds_are_those_of_the_pruned_network(name: str, board: str) -> None:
    model, example, head = made(name)
    found = groups(model, example, head)

    def write(network: nn.Module, path: Path) -> None:
        write_onnx(network, path, (example,), ["images"], ["logits"])

    target = Target.load(board)
    cost = latency.Estimated(model, found, write, target, "int8")
    kept = [g.units - g.units // 4 for g in found]
    full, small = cost([g.units for g in found]), cost(kept)
    remove(model, [(g, range(g.units // 4)) for g in found])
    again = latency.Estimated(model, groups(model, example, head), write, target, "int8")
    assert small < full
    assert small == pytest.approx(again(kept), rel=1e-6)


def test_measured_seconds_tell_what_a_layer_costs() -> None:
    """Of a machine on which one layer takes ten times as long per product."""
    model, example, head = made("shapes")
    found = groups(model, example, head)

    def truth(network: nn.Module) -> float:
        each = macs_of(network, example)
        return 1e-3 + 1e-8 * sum(n * (10 if name == "stage1.0" else 1) for name, n in each.items())

    cost = latency.Measured(model, found, example, lambda networks: [truth(make()) for make in networks])
    full = [g.units for g in found]
    assert cost(full) == pytest.approx(truth(model))
    saved = [
        cost(full) - cost([n // 2 if i == g else n for i, n in enumerate(full)]) for g in range(len(found))
    ]
    kept = [n - n // 4 for n in full]
    remove(model, [(g, range(g.units // 4)) for g in found])
    assert cost(kept) == pytest.approx(truth(model), rel=0.1)
    assert saved == pytest.approx([cost.measured[0] - t for t in cost.measured[1:]], rel=0.3)


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "float32"), ("litert", "int8")])
def test_pruning_by_measured_seconds(backend: str, precision: str, tmp_path: Path) -> None:
    options = prune.Options(
        importance="l2",
        speedup=1.02,
        measured=True,
        backend=backend,
        steps=0,
        batches=1,
        granularity=2,
        minimum=2,
    )
    host = Target.load("host")
    work = pruned(options, target=host, precision=precision, folder=tmp_path)
    seconds = json.loads((tmp_path / "0.prune.seconds.0.json").read_text())
    assert len(seconds) == 1 + 3 and min(seconds) > 0
    facts = work.facts["0.prune"]
    assert facts["cost_unit"] == "s" and facts["cost"][0] == pytest.approx(seconds[0])
    assert facts["cost"][1] <= facts["cost"][0] / 1.02
    again = pruned(options, target=host, precision=precision, folder=tmp_path)
    assert again.facts == work.facts


def test_boards_and_precisions_say_the_granularity() -> None:
    assert latency.granularity(Target.load("jetson-orin"), "int8") == 32
    assert latency.granularity(Target.load("rpi5"), "int8") == 16
    assert latency.granularity(Target.load("rpi5"), "float32") == 8
    assert latency.granularity(None, "int8") == 8


def test_greedy_takes_what_saves_most_per_importance() -> None:
    class Plain:
        unit, together = "s", np.eye(2, dtype=bool)

        def __call__(self, kept: Any) -> float:
            return 10.0 * kept[0] + kept[1]

    (group,) = groups(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.zeros(1, 3, 4, 4)
    )
    both = [group, group]
    cost = Plain()
    scores = [torch.ones(8, dtype=torch.float64), torch.full((8,), 0.5, dtype=torch.float64)]
    rank = latency.per_saved(cost, scores)
    assert latency.choose(both, [2, 2], [4, 2], rank, lambda k: cost(k) <= 70, cost.together) == [6, 8]
    assert latency.choose(both, [2, 2], [4, 2], rank, lambda k: cost(k) <= 45, cost.together) == [4, 4]
    assert latency.choose(both, [2, 2], [4, 2], rank, lambda k: cost(k) <= 41, cost.together) is None
    # the seconds do not matter to one threshold, importance not to equal shares
    least = latency.least_important(scores)
    assert latency.choose(both, [2, 2], [2, 2], least, lambda k: sum(k) <= 12) == [8, 4]
    assert latency.choose(both, [2, 2], [2, 2], latency.evenly(both), lambda k: sum(k) <= 12) == [6, 6]
    assert latency.choose(both, [3, 3], [3, 3], latency.evenly(both), lambda k: sum(k) <= 12) == [6, 6]


# ---- the method


def pruned(options: prune.Options, **of_work: Any) -> Work:
    work = begin(of_work.pop("problem", None) or tiny(), **of_work)
    work.enter("0.prune")
    prune.run(work, options)
    return work


@pytest.mark.parametrize("kind", importance.IMPORTANCES)
def test_every_importance_reaches_its_speedup(kind: str) -> None:
    work = pruned(
        prune.Options(importance=kind, speedup=1.6, by="macs", steps=2, granularity=2, minimum=2, batches=2)
    )
    facts = work.facts["0.prune"]
    assert facts["macs"][0] / facts["macs"][1] >= 1.6
    assert facts["macs"][1] == macs(work.model, work.problem.example) == pytest.approx(facts["cost"][1])
    assert facts["channels"]["head"] == [10, 10]
    assert all(now % 2 == 0 and now >= 2 for now in (n for _, n in facts["channels"].values()))
    json.dumps(facts)


def test_what_is_trained_matters_more_than_chance() -> None:
    """One shot at a tiny network that was trained for a moment: loss after the norms were counted anew. Norms of filters ahead
    of a batch norm say nothing about their size behind it: l1, l2 and fpgm are no better than chance here."""
    problem = tiny()
    trained = begin(problem)
    trained.train(60, lr=1e-2)
    problem = dataclasses.replace(problem, model=trained.model)
    judged = [problem.batch(20_000 + i) for i in range(8)]

    def loss(kind: str, seed: int = 0) -> float:
        options = prune.Options(
            importance=kind, ratio=0.5, by="uniform", steps=0, granularity=2, minimum=2, batches=4
        )
        model = pruned(options, problem=problem, seed=seed).model
        with torch.no_grad():
            return float(np.mean([float(problem.loss(model(x), y)) for x, y in judged]))

    chance = float(np.mean([loss("random", seed) for seed in range(5)]))
    for kind in ("slimming", "group_l2", "taylor", "fisher"):
        assert loss(kind) < 0.93 * chance, kind


def test_rounds_approach_the_goal_and_shares_are_kept() -> None:
    said: list[Any] = []
    options = prune.Options(
        importance="l2",
        ratio=0.5,
        by="uniform",
        rounds=2,
        steps=1,
        finish_steps=1,
        granularity=2,
        minimum=2,
        batches=1,
    )
    work = pruned(options, say=said.append)
    rounds = [line["macs"] for line in said if "round" in line]
    assert len(rounds) == 2 and rounds[0] > rounds[1]
    channels = work.facts["0.prune"]["channels"]
    assert all(n == [was, was // 2] for name, n in channels.items() if name != "head" for was in n[:1])
    assert [line["of"] for line in said if "training" in line] == [1, 2]


def test_latency_picks_cheaper_layers_than_equal_shares() -> None:
    """Estimated seconds on a board at the same share of channels."""
    torch.manual_seed(0)
    model, example = ShapesNet().eval(), torch.zeros(1, 3, 32, 32)
    found = groups(model, example, {"head"})

    def write(network: nn.Module, path: Path) -> None:
        write_onnx(network, path, (example,), ["images"], ["logits"])

    cost = latency.Estimated(model, found, write, Target.load("rpi5"), "int8")
    scores = [importance.normalised(importance.score(model, g, "l2")) for g in found]
    seconds = []
    for rank in (latency.per_saved(cost, scores), latency.evenly(found)):
        kept = latency.choose(found, [8] * len(found), [8] * len(found), rank, lambda k: sum(k) <= 120)
        assert kept is not None and sum(kept) == 120
        seconds.append(cost(kept))
    assert seconds[0] < 0.96 * seconds[1]


def test_a_run_that_is_cut_off_goes_on_to_the_same_network(tmp_path: Path) -> None:
    options = prune.Options(speedup=1.5, by="macs", rounds=2, steps=4, granularity=2, minimum=2, batches=2)
    whole = pruned(options)

    class Stop(Exception):
        pass

    def stop(name: str, step: int, of: int) -> None:
        if name == "0.prune.1" and step == 2:
            raise Stop

    with pytest.raises(Stop):
        pruned(options, folder=tmp_path, progress=stop)
    again = pruned(options, folder=tmp_path)
    assert whole.facts == again.facts
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(value, again.model.state_dict()[name])


def test_masks_hold_through_pruning_and_training() -> None:
    work = begin(tiny())
    work.enter("0.prune")
    work.masks = {
        "stage1.0.weight": (torch.rand(work.model.get_parameter("stage1.0.weight").shape) > 0.5).float()
    }
    prune.run(work, prune.Options(speedup=1.5, by="macs", steps=3, granularity=2, minimum=2, batches=2))
    weight, mask = work.model.get_parameter("stage1.0.weight"), work.masks["stage1.0.weight"]
    assert weight.shape == mask.shape and bool((weight[mask == 0] == 0).all())
    assert 0 < float(mask.mean()) < 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"importance": "magic", "speedup": 2.0}, "importance must be one of"),
        ({"speedup": 2.0, "ratio": 0.5}, "either speedup or ratio"),
        ({}, "either speedup or ratio"),
        ({"speedup": 0.5}, "above 1"),
        ({"ratio": 1.0}, "shares"),
        ({"speedup": 2.0, "rounds": 0}, "rounds must be at least 1"),
        ({"speedup": 2.0, "by": "feeling"}, "by must be one of"),
    ],
)
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prune.Options(**options)


def test_goals_out_of_reach_are_refused() -> None:
    from edgekit.errors import UsageError

    with pytest.raises(UsageError, match="speedup 50 cannot be reached"):
        pruned(prune.Options(speedup=50.0, by="macs", steps=0, batches=1))
    with pytest.raises(UsageError, match="no target"):
        pruned(prune.Options(speedup=2.0, by="latency", steps=0, batches=1))
