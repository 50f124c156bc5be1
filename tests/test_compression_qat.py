"""Learned steps on a plan's own places: equal to the simulation, gradients by hand, and better after training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgekit import frontends
from edgekit.backends.onnxruntime.lower import lower
from edgekit.compression import learn_steps
from edgekit.compression.fake_quant import FakeQuantized, fake
from edgekit.compression.learn_steps import Lesson, learn
from edgekit.compression.methods import qat as method
from edgekit.compression.problem import Problem
from edgekit.compression.work import begin
from edgekit.errors import UsageError
from edgekit.models.exporting import write_onnx
from edgekit.passes.graph import constant
from edgekit.quant import search
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.calibrate import calibrate
from edgekit.quant.placement import place, saturates
from edgekit.quant.search import Quantized
from edgekit.quant.sensitivity import output_error
from edgekit.quant.simulate import fake_quantized, run
from edgekit.quant.weights import codes, rounded
from tests.quant_graphs import BETWEEN, annotated, between, pictures, session
from tests.test_quant_placement import ORT, TRT, X86


def outputs(model: FakeQuantized, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        found = model(*(torch.from_numpy(feed[n]) for n in model.network.input_names))
    return [f.numpy() for f in (found if isinstance(found, tuple) else (found,))]


def same(model: FakeQuantized, seed: int = 7) -> None:
    """The torch forward is the simulation of what is put back on the graph, to one code at a tie."""
    learned = model.learned()
    int32 = model.rules.int32_bias
    for feed in pictures(2, seed=seed):
        (expected,) = run(fake_quantized(learned, int32_bias=int32), [feed])
        for name, got in zip(model.network.output_names, outputs(model, feed), strict=True):
            params = quant({v.name: v for v in learned.graph.outputs}[name])
            step = params.scale[0] if params else 1e-5 * np.abs(expected[name]).max()
            codes = np.abs(got - expected[name]) / step
            assert codes.max() <= 1.01
            assert (codes > 0.01).mean() <= 0.01 or params is None


@pytest.mark.parametrize("rules", [ORT, TRT], ids=["outputs", "inputs only"])
@pytest.mark.parametrize("name", sorted(set(BETWEEN) - {"Softmax"}))
def test_the_forward_is_the_simulation(name: str, rules: Any) -> None:
    model = FakeQuantized(annotated(between(name), rules), rules)
    same(model)
    with torch.no_grad():  # and after steps and weights have moved
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))
    same(model)


def test_gradients_by_hand() -> None:
    """Esser et al. 2020, eq. 3 to 5: codes -1.4 and 2.6 inside, 9 and -9 outside of [-4, 3]."""
    x = torch.tensor([-0.7, 1.3, 4.5, -4.5], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    found = fake(x, step, 0.0, -4.0, 3.0, 0.1)
    assert torch.allclose(found, torch.tensor([-0.5, 1.5, 1.5, -2.0]))
    (found * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert x.grad is not None and step.grad is not None
    assert torch.allclose(x.grad, torch.tensor([1.0, 10.0, 0.0, 0.0]))
    assert step.grad.item() == pytest.approx(0.1 * (0.4 + 4.0 + 300 - 4000), rel=1e-5)
    zero = fake(x.detach(), step.detach(), 3.0, -4.0, 3.0, 0.1)  # real 0 is code 3: the range is [-3.5, 0]
    assert torch.allclose(zero, torch.tensor([-0.5, 0.0, 0.0, -3.5]))


def test_what_is_prescribed_stays() -> None:
    """Pictures keep their step, values that share one go on sharing it, and a Clip can still be left out."""
    model = FakeQuantized(annotated(between("Concat"), ORT), ORT)
    before = {str(v.name): quant(v) for v in model.model.graph.inputs}
    with torch.no_grad():
        model.exponent.add_(1.0)
    learned = model.learned()
    assert quant(learned.graph.inputs[0]) == before["x"]
    (node,) = [n for n in learned.graph if n.op_type == "Concat"]
    assert len({quant(v) for v in (*node.inputs, *node.outputs)}) == 1
    assert quant(node.outputs[0]) != quant(
        next(n for n in model.model.graph if n.op_type == "Concat").outputs[0]
    )
    clip = FakeQuantized(annotated(between("Clip"), ORT), ORT)
    with torch.no_grad():
        clip.exponent.add_(1.0)
    (node,) = [n for n in clip.learned().graph if n.op_type == "Clip"]
    found = quant(node.outputs[0])
    assert found is not None and saturates(node, found)


def coarse(name: str = "AddRelu", bits: int = 4) -> tuple[ir.Model, ir.Model, Any]:
    """(float graph, placed with weights of few bits, rules)."""
    exact = between(name)
    rules = dataclasses.replace(ORT, weight_limit=2 ** (bits - 1) - 1)
    return exact, annotated(exact, rules), rules


LESSON = Lesson(steps=30, lr=0.1, batch=4, crop=0, weight_bits=4)


def error(exact: ir.Model, model: ir.Model) -> float:
    feeds = pictures(6, seed=31)
    pairs = zip(run(exact, feeds), run(fake_quantized(model), feeds), strict=True)
    return float(np.mean([output_error(a, b) for a, b in pairs]))


def too_wide() -> tuple[ir.Model, ir.Model]:
    """(float graph, placed in 8 bits with a range as an outlier would have made it)."""
    exact = between("AddRelu")
    placed = annotated(exact, ORT)
    value = next(n for n in placed.graph if n.op_type == "Relu").outputs[0]
    params = quant(value)
    assert params is not None
    set_quant(value, dataclasses.replace(params, scale=(params.scale[0] * 16,)))
    return exact, placed


def test_learning_narrows_a_range_that_is_too_wide() -> None:
    exact, placed = too_wide()
    learned = learn(
        placed, exact, ORT, pictures(16, seed=3), dataclasses.replace(LESSON, lr=0.3, weight_bits=8)
    )
    before, after = (
        next(quant(n.outputs[0]) for n in m.graph if n.op_type == "Relu") for m in (placed, learned)
    )
    assert before is not None and after is not None
    assert after.scale[0] < 0.75 * before.scale[0] and after.zero_point == before.zero_point
    assert error(exact, learned) < 0.6 * error(exact, placed)


def test_four_bits_keep_to_their_codes_and_lower_as_ever() -> None:
    exact, placed, rules = coarse()
    learned = learn(placed, exact, rules, pictures(4, seed=3), dataclasses.replace(LESSON, steps=5))
    for value in learned.graph.initializers.values():
        params, numbers = quant(value), constant(value)
        if params is not None and params.axis is not None:
            assert np.abs(codes(numbers, params)).max() <= 7
            assert np.array_equal(rounded(numbers, params), numbers)
    (payload,) = lower(learned, X86, "int8")  # and the same lowering takes it
    feed = pictures(1, seed=31)[0]
    (got,) = session(payload.data, arm=False).run(None, feed)
    (want,) = run(fake_quantized(learned), [feed])
    (step,) = quant(learned.graph.outputs[0]).scale  # type: ignore[union-attr]
    assert np.abs(got - want["y"]).max() <= 1.01 * step


def test_zeros_stay_zeros() -> None:
    exact, _, rules = coarse()
    weight = exact.graph.initializers["w1"]
    numbers = constant(weight).copy()  # type: ignore[union-attr]
    numbers[:, ::2] = 0
    weight.const_value = ir.tensor(numbers, name="w1")
    learned = learn(annotated(exact, rules), exact, rules, pictures(4), dataclasses.replace(LESSON, steps=5))
    found = constant(learned.graph.initializers["w1"])
    assert found is not None and (found[:, ::2] == 0).all() and (found[:, 1::2] != 0).any()


def test_a_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    exact, placed, rules = coarse()
    lesson = dataclasses.replace(LESSON, steps=6)

    class Stop(Exception):
        pass

    def stop(_: str, done: int, __: int) -> None:
        if done == 4:
            raise Stop

    whole = learn(placed, exact, rules, pictures(4), lesson)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn_steps, "SAVE_EVERY", 2)
        with pytest.raises(Stop):
            learn(placed, exact, rules, pictures(4), lesson, folder=tmp_path, progress=stop)
        steps: list[int] = []
        again = learn(
            placed,
            exact,
            rules,
            pictures(4),
            lesson,
            folder=tmp_path,
            progress=lambda _, n, __: steps.append(n),
        )
    assert steps == [5, 6]
    for name in ("w1", "b1"):
        assert np.array_equal(
            constant(again.graph.initializers[name]), constant(whole.graph.initializers[name])
        )
    (file,) = tmp_path.glob("*.pt")
    file.write_bytes(b"damaged")
    learn(placed, exact, rules, pictures(4), lesson, folder=tmp_path)
    assert file.stat().st_size > 100


def test_the_build_trains_where_the_budget_is_missed() -> None:
    """search+qat asks the gate first; qat trains at once; what was learned goes to other libraries as well."""
    exact, _, rules = coarse()
    feeds = pictures(8, seed=3)
    stats = calibrate(exact, feeds)
    trained: list[Quantized] = []

    def train(found: Quantized) -> ir.Model:
        """Stands for a training that helps: all bits of the weights."""
        trained.append(found)
        return place(exact, stats, ORT, found.choices)

    def problem(passes: list[bool], **options: Any) -> search.Problem:
        return search.Problem(
            exact, stats, rules, feeds[:4], feeds[4:], lambda m, only: calibrate(m, feeds, only=only),
            lambda _: search.Look(passes.pop(0)), learn=train, **options,
        )  # fmt: skip

    def quiet(*_: Any) -> None:
        pass

    found = search.search(problem([True]), quiet)
    assert not trained and search.LEARNED not in found.steps
    found = search.search(problem([False, True]), quiet)
    assert len(trained) == 1 and found.steps[-1] == search.LEARNED and found.error < trained[0].error
    assert found.look.passed
    first = search.search(problem([True], learn_first=True), quiet)
    assert len(trained) == 2 and first.steps[-1] == search.LEARNED
    carried = search.carry(found, dataclasses.replace(ORT, codes="int8"))
    for node, other in zip(found.model.graph, carried.graph, strict=True):
        a, b = quant(node.outputs[0]), quant(other.outputs[0])
        assert (a is None) == (b is None)
        assert a is None or b is None or a.scale[0] == pytest.approx(b.scale[0], rel=1e-3)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.two(torch.relu(self.norm(self.one(x))).mean((2, 3)))
        return found


def tiny(outputs: int = 1) -> Problem:
    torch.manual_seed(0)
    model = Tiny()
    targets = torch.randint(0, 4, (64,))
    images = torch.rand(64, 3, 8, 8)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        pick = np.random.default_rng(step).integers(0, 64, 8)
        return images[pick], targets[pick]

    def evaluate(found: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"top1": float((found(images).argmax(1) == targets).float().mean())}

    def write(found: nn.Module, path: Path) -> None:
        write_onnx(found, path, (torch.zeros(1, 3, 8, 8),), ["x"], ["y"])

    return Problem(
        "tiny", model, torch.zeros(1, 3, 8, 8), batch, nn.functional.cross_entropy, evaluate, write
    )


def test_as_a_step_of_a_recipe(tmp_path: Path) -> None:
    problem = tiny()
    work = begin(problem)
    work.train(5)
    method.run(work, method.Options(steps=10, calibration=16, weight_bits=4))
    assert isinstance(work.model, FakeQuantized)
    facts = work.facts[work.stage]
    assert facts["weight_bits"] == 4 and facts["output_error"]["qat"] < 1
    assert 0 <= problem.evaluate(work.model)["top1"] <= 1
    problem.write(work.model, tmp_path / "after.onnx")  # a float file
    kinds = {n.op_type for n in frontends.load(tmp_path / "after.onnx").graph} - {"Constant"}
    assert kinds == {
        "Conv",
        "Relu",
        "ReduceMean",
        "Gemm",
    }


def test_a_network_that_trains_with_other_outputs_is_refused() -> None:
    problem = tiny()

    class Other(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = super().forward(x)
            return found if not self.training else torch.cat([found, found], 1)

    work = begin(dataclasses.replace(problem, model=Other()))
    with pytest.raises(UsageError, match="--quantization qat"):
        method.run(work, method.Options(steps=1, calibration=4))


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"lr": 2.0}, {"weight_bits": 9}, {"start": "none"}, {"calibration": 1}, {"imitate": -1.0}],
)
def test_options_are_checked(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        method.Options(**options)


class _Blind(nn.Module):
    """A teacher that says what it is shown."""

    input_names = ("x",)

    def run(self, given: Any, tap: Any) -> Any:
        return given


def test_views_show_pictures_whole_near_and_together() -> None:
    """Same size and range, the same by the step, and not only the pictures themselves; without views just these."""
    rng = np.random.default_rng(0)
    shown = [{"x": rng.integers(2, 250, (1, 3, 40, 56)).astype(np.float32)} for _ in range(3)]
    whole = {f["x"].tobytes() for f in shown}

    def draw(views: bool, steps: int = 8) -> list[np.ndarray]:
        batches = learn_steps.Batches(_Blind(), shown, Lesson(batch=3, views=views))  # type: ignore[arg-type]
        return [x.numpy() for step in range(steps) for x in batches(step)[0][0]]

    found = draw(True)
    assert {x.shape for x in found} == {(3, 40, 56)} and min(x.min() for x in found) >= 2
    assert max(x.max() for x in found) < 250
    same = [x for x in found if x[None].tobytes() in whole or x[None, :, :, ::-1].tobytes() in whole]
    assert 0 < len(same) < len(found)
    assert all((a == b).all() for a, b in zip(found, draw(True), strict=True))
    assert {x[None].tobytes() for x in draw(False)} == whole
