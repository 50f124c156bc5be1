"""Methods that make weights sparse, on a network of a few channels: the pattern holds, is kept by what trains later, and a
training that was cut off goes on as if it had not been."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgekit.compression import patterns, sparse
from edgekit.compression.methods import block_punch, nm, sparsify
from edgekit.compression.patterns import Ratio
from edgekit.compression.problem import Problem, modules, zeros
from edgekit.compression.work import Hook, Work, begin
from edgekit.errors import UsageError


class Net(nn.Module):
    """Every kind of layer that is skipped, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.thin = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 16, 1)
        self.odd = nn.Conv2d(16, 6, 1)
        self.join = nn.Linear(6, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.wide(torch.relu(self.thin(x)) + x))
        x = torch.relu(self.point(x) + x)
        x = torch.relu(self.odd(x)).mean((2, 3))
        found: torch.Tensor = self.head(torch.relu(self.join(x)))
        return found


def problem() -> Problem:
    torch.manual_seed(0)
    net = Net()
    teach = torch.randn(3 * 64, 4)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        return x, (x.flatten(1) @ teach).argmax(1)

    return Problem(
        "tiny",
        net,
        torch.zeros(1, 3, 8, 8),
        batch,
        nn.functional.cross_entropy,
        lambda _: {"top1": 0.0},
        lambda *_: None,
        frozenset({"head"}),
        lr=1e-2,
    )


def work(**options: Any) -> Work:
    return begin(problem(), **options)


def weights(made: Work) -> dict[str, torch.Tensor]:
    return {name.removesuffix(".weight"): dict(made.model.named_parameters())[name] for name in made.masks}


def test_layers_are_skipped_with_a_reason() -> None:
    made = work()
    nm.run(made, nm.Options(pattern="2:4", scheme="one-shot", steps=0))
    assert set(weights(made)) == {"wide", "point", "odd"}
    assert made.facts["step"]["skipped"] == {
        "stem": "the first layer",
        "thin": "depthwise",
        "join": "6 input channels do not divide by 4",
        "head": "a head",
    }


def test_what_is_skipped_by_default_can_be_chosen() -> None:
    made = work()
    where = {"first": True, "depthwise": True, "heads": True, "exclude": ("point",)}
    sparsify.run(made, sparsify.Options(**where, scheme="one-shot", scope="layer", steps=0))
    assert set(weights(made)) == {"stem", "thin", "wide", "odd", "join", "head"}
    assert made.facts["step"]["skipped"] == {"point": "excluded"}


def test_a_module_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"exclude 'wid': .* Did you mean 'wide'"):
        sparsify.run(work(), sparsify.Options(exclude=("wid",)))
    with pytest.raises(UsageError, match="no layer can take the pattern"):
        nm.run(work(), nm.Options(pattern="1:64"))


@pytest.mark.parametrize("scope", ["layer", "global", "lamp"])
@pytest.mark.parametrize("scheme", ["one-shot", "gradual", "admm"])
@pytest.mark.parametrize("control", ["none", "random"])
def test_unstructured_reaches_its_sparsity(scheme: Any, scope: Any, control: Any) -> None:
    made = work()
    sparsify.run(made, sparsify.Options(sparsity=0.8, scheme=scheme, scope=scope, control=control, steps=6))
    found = weights(made)
    total = sum(w.numel() for w in found.values())
    assert sum(int((w == 0).sum()) for w in found.values()) == pytest.approx(0.8 * total, abs=5)
    assert made.facts["step"]["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert zeros(made.model) > 0.6


def test_random_control_does_not_look_at_weights() -> None:
    masks = []
    for scale in (1, -3):
        made = work(seed=7)
        for layer in modules(made.model, nn.Conv2d).values():
            layer.weight.data.mul_(scale).add_(0.1)
        nm.run(made, nm.Options(control="random", steps=0, scheme="one-shot"))
        masks.append(made.masks)
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])
    other = work(seed=8)
    nm.run(other, nm.Options(control="random", steps=0, scheme="one-shot"))
    assert not torch.equal(masks[0]["wide.weight"], other.masks["wide.weight"])


@pytest.mark.parametrize("scheme", ["one-shot", "gradual", "admm"])
@pytest.mark.parametrize("pattern", ["block", "kernel"])
def test_patterned(scheme: Any, pattern: Any) -> None:
    made = work()
    block_punch.run(made, block_punch.Options(sparsity=0.6, scheme=scheme, pattern=pattern, steps=12))
    found = weights(made)
    reasons = made.facts["step"]["skipped"]
    if pattern == "kernel":
        assert set(found) == {"wide"}
        assert reasons["point"] == "no 3x3 kernels"
        kept = (found["wide"] != 0).flatten(2).sum(2)
        assert set(kept.flatten().tolist()) == {0, 5}
    else:
        assert set(found) == {"wide", "point"}
        assert reasons["odd"] == "6 filters of 16 input channels do not divide into 8 x 4"
        for weight in found.values():
            tiles = (weight != 0).reshape(weight.shape[0] // 8, 8, weight.shape[1] // 4, 4, -1)
            assert (tiles == tiles[:, :1, :, :1]).all()
    assert made.facts["step"]["sparsity"] == pytest.approx(0.6, abs=0.04)


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "one-shot"},
        {"scheme": "sr-ste"},
        {"scheme": "maxq"},
        {"scheme": "maxq", "soft": False, "schedule": "linear"},
        {"scheme": "maxq", "control": "random"},
    ],
)
def test_n_of_m_holds_and_is_kept_by_later_trainings(pattern: str, options: dict[str, Any]) -> None:
    made = work()
    nm.run(made, nm.Options(pattern=pattern, steps=6, **options))
    made.train(3)
    assert weights(made)
    for weight in weights(made).values():
        assert patterns.keeps(weight, Ratio.parse(pattern))
        assert weight.count_nonzero() > 0


def test_a_fold_computes_what_the_masked_network_did() -> None:
    """The forward pass of the last step, on dense weights behind masks, and the folded network agree."""
    made = work()
    options = nm.Options(pattern="2:4", scheme="maxq", tau=0.1)
    hook = nm.StraightThrough({"wide.weight": made.model.wide.weight}, options, Ratio(2, 4))
    dense = made.model.wide.weight.data.clone()
    hook.before(made.model, 100, 100)
    x = torch.randn(2, 3, 8, 8)
    seen = made.model(x)
    made.model.wide.weight.grad = torch.zeros_like(dense)
    hook.gradients(made.model, 100, 100)
    assert torch.equal(made.model.wide.weight, dense)
    hook.fold()
    assert torch.equal(made.model(x), seen)
    assert (made.model.wide.weight.abs() > dense.abs()).any(), "soft masks are folded too"


def test_straight_through_gradients_are_dense_and_decay_what_is_masked() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[4.0, -3, 2, -1]])
    hook = nm.StraightThrough({"w": layer.weight}, nm.Options(scheme="sr-ste", decay=0.5), Ratio(2, 4))
    hook.before(layer, 0, 1)
    assert layer.weight.tolist() == [[4, -3, 0, 0]]
    layer(torch.ones(1, 4)).sum().backward()
    hook.gradients(layer, 0, 1)
    assert layer.weight.tolist() == [[4, -3, 2, -1]]
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1, 1, 1 + 0.5 * 2, 1 - 0.5 * 1]]


def test_gradual_zeros_rise_by_the_cubic_and_stay() -> None:
    made = work()
    seen = []

    class Look(Hook):
        def after(self, model: nn.Module, step: int, steps: int) -> None:
            seen.append(model.point.weight == 0)

    made.hooks = []
    weight = {"point.weight": made.model.point.weight}
    hook = sparse.Rising(
        weight, lambda w, s: {n: patterns.magnitude(x, s) for n, x in w.items()}, 0.75, 0.5, 1
    )
    made.train(20, hooks=[hook, Look()])
    assert all((later | ~earlier).all() for earlier, later in pairwise(seen))
    shares = [float(zero.float().mean()) for zero in seen]
    assert shares[4] == pytest.approx(0.75 * (1 - 0.5**3), abs=0.01)
    assert shares[9:] == [0.75] * 11


def test_admm_draws_weights_to_the_pattern() -> None:
    distances = []
    for rho in (1e-7, 1e-2):
        made = work()
        weight = {"wide.weight": made.model.wide.weight}
        make = lambda w, s: {n: patterns.block_punched(x, s) for n, x in w.items()}  # noqa: E731
        hook = sparse.Admm(weight, make, 0.5, rho, 5)
        before = hook.distance()
        made.train(40, lr=1e-2, hooks=[hook])
        distances.append(hook.distance() / before)
    assert distances[1] < 0.2
    assert distances[1] < 0.5 * distances[0]


RUNS = {
    "gradual": (sparsify, sparsify.Options(steps=9, scheme="gradual", every=2)),
    "admm": (block_punch, block_punch.Options(steps=9, scheme="admm", rise=0.7, every=2)),
    "maxq": (nm, nm.Options(scheme="maxq", steps=9, rise=0.5)),
    "random": (nm, nm.Options(steps=9, control="random")),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_that_was_cut_off_ends_the_same(name: str, stop: int, tmp_path: Path) -> None:
    method, options = RUNS[name]

    class Stop(Exception):
        pass

    class Cut(Hook):
        left = stop

        def before(self, model: nn.Module, step: int, steps: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise Stop

    def train(made: Work) -> Work:
        inner = made.train
        made.train = lambda steps, **more: inner(steps, **more, save_every=1)  # type: ignore[method-assign]
        method.run(made, options)
        return made

    whole = train(work())
    cut = work(folder=tmp_path)
    cut.hooks.append(Cut())
    with pytest.raises(Stop):
        train(cut)
    again = work(folder=tmp_path)
    again.hooks.append(Hook())  # in the place of what cut it off
    train(again)
    state = again.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.model.state_dict().items())
    assert all(torch.equal(mask, again.masks[key]) for key, mask in whole.masks.items())
    once_more = train(work_of(tmp_path))
    assert all(torch.equal(v, once_more.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def work_of(folder: Path) -> Work:
    made = work(folder=folder)
    made.hooks.append(Hook())
    return made


@pytest.mark.parametrize(("given", "expected"), [(None, 5e-3), (1e-4, 1e-4)])
@pytest.mark.parametrize("name", RUNS)
def test_the_learning_rate_is_half_of_the_problems_or_what_was_said(
    name: str, given: float | None, expected: float
) -> None:
    method, options = RUNS[name]
    made = work()
    seen: list[float] = []
    made.train = lambda steps, *, lr=None, **more: seen.append(lr)  # type: ignore[method-assign, misc]
    method.run(made, replace(options, lr=given))
    assert set(seen) == {expected}


def test_zeros_of_earlier_steps_stay() -> None:
    made = work()
    sparsify.run(made, sparsify.Options(sparsity=0.5, scheme="one-shot", steps=2))
    before = copy.deepcopy(made.masks)
    made.stage = "second"
    nm.run(made, nm.Options(pattern="2:4", scheme="maxq", steps=6))
    assert all((~made.masks[n] | before[n]).all() for n in before)
    for name, weight in weights(made).items():
        assert not weight[~made.masks[f"{name}.weight"]].any()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (sparsify.Options, {"sparsity": 1.0}, "between 0 and 1"),
        (sparsify.Options, {"scope": "all"}, "layer, global or lamp"),
        (sparsify.Options, {"scheme": "none"}, "gradual, admm or one-shot"),
        (sparsify.Options, {"steps": 0}, "at least 1"),
        (sparsify.Options, {"rise": 1.0}, "rise must be"),
        (sparsify.Options, {"lr": 0.0}, "lr must be"),
        (block_punch.Options, {"pattern": "tile"}, "block or kernel"),
        (block_punch.Options, {"pattern": "kernel", "sparsity": 0.4}, "at least 4/9"),
        (block_punch.Options, {"patterns": 0}, "between 1 and 70"),
        (nm.Options, {"pattern": "4:2"}, "N:M"),
        (nm.Options, {"scheme": "best"}, "one-shot, sr-ste or maxq"),
        (nm.Options, {"control": "zero"}, "none or random"),
        (nm.Options, {"schedule": "cos"}, "cubic, linear or none"),
        (nm.Options, {"decay": -1.0}, "must be positive"),
    ],
)
def test_options_that_make_no_sense(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
