"""Running recipes: what a run leaves, and that an interrupted one ends with the same bits."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgekit.compression import run, work
from edgekit.compression.plot import axis
from edgekit.compression.recipe import method, methods, read_recipe
from edgekit.compression.run import Compressed, compress
from edgekit.compression.work import Average, Hook, TrainingError, Work, begin, digest, mask_gradients
from edgekit.errors import UsageError
from edgekit.target import Target
from tests.compression_nets import NEEDED, TinyNet, tiny_problem

FINETUNE = {"name": "r", "step": [{"method": "finetune", "steps": 4}]}


class Interrupt:
    """A progress that raises KeyboardInterrupt at its call number `at` (0 is the first), and counts calls."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.calls = at, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def _saved_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SAVE_SECONDS", -1.0)


# --- interrupted = uninterrupted -----------------------------------------------------------------


class Growing(Hook):
    """Masks a weight more a step, adds noise, trains a weight of its own, and remembers a number."""

    def __init__(self, owner: Work) -> None:
        self.work, self.sum = owner, 0.0
        self.mine = nn.Parameter(torch.ones(1))

    def loss(self, inputs: Tensor, outputs: Any, targets: Any) -> Tensor:
        return 0.1 * (self.mine * torch.rand(()) - outputs.mean()).square() * (1 + self.sum)

    def parameters(self) -> list[nn.Parameter]:
        return [self.mine]

    def after(self, model: nn.Module, step: int, steps: int) -> None:
        self.work.masks["stem.0.weight"].view(-1)[step] = 0
        self.sum += float(torch.rand(()))
        self.work.facts.setdefault(self.work.stage, {}).setdefault("sums", []).append(self.sum)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "mine": self.mine.detach()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sum = state["sum"]
        with torch.no_grad():
            self.mine.copy_(state["mine"])


def program(folder: Path | None, interrupt: Interrupt) -> dict[str, Any]:
    """A run by hand with all that steps may do: dropout, masks that grow, other modules between trainings, draws."""
    owner = begin(tiny_problem(), folder=folder, seed=3, progress=interrupt)
    owner.enter("1-mask")
    owner.masks["stem.0.weight"] = torch.ones_like(owner.model.stem[0].weight)
    hook = Growing(owner)
    owner.train(5, lr=1e-2, hooks=[hook], ema=0.8)
    owner.enter("2-widen")
    chosen = owner.remember("drawn", lambda: [float(torch.rand(())), hook.sum])
    body = owner.model.body[0]
    wide = nn.Conv2d(16, 24, 3, padding=1, bias=False)  # initialised from torch's generator
    with torch.no_grad():
        wide.weight[:16] = body.weight * chosen[0]
    owner.model.body = nn.Sequential(wide, nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 1))
    owner.train(3, lr=1e-2)
    noise = torch.rand(2).tolist()
    owner.train(3, lr=1e-2, optimizer=lambda w, rate: torch.optim.SGD(w, rate, momentum=0.9))
    return {
        "weights": digest(owner.model),
        "noise": noise,
        "facts": owner.facts,
        "masks": float(owner.masks["stem.0.weight"].sum()),
        "sum": hook.sum,
        "mine": hook.mine.item(),
        "chosen": chosen,
        "metric": owner.metric("end"),
    }


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Any], int]:
    """What the program gives in one go, without a folder, and its number of batches."""
    counted = Interrupt()
    return program(None, counted), counted.calls


def test_the_program_does_what_it_should(whole: tuple[dict[str, Any], int]) -> None:
    found, batches = whole
    assert batches == 11
    assert found["masks"] == 16 * 27 - 5
    assert found["mine"] != 1.0
    assert len(found["facts"]["1-mask"]["sums"]) == 5


@pytest.mark.usefixtures("_saved_always")
@pytest.mark.parametrize("at", range(11))
def test_interrupted_at_any_batch(tmp_path: Path, whole: tuple[dict[str, Any], int], at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        program(tmp_path, Interrupt(at))
    torch.rand(7)  # whatever the process does in between
    assert program(tmp_path, Interrupt()) == whole[0]
    assert program(tmp_path, Interrupt()) == whole[0], "and again, of a run that ended"


@settings(max_examples=4)
@given(places=st.lists(st.integers(0, 12), min_size=2, max_size=4), often=st.booleans())
def test_interrupted_several_times(
    places: list[int],
    often: bool,
    whole: tuple[dict[str, Any], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "SAVE_SECONDS", -1.0 if often else 1e9)  # or only trainings that ended
        for at in places:
            try:
                program(folder, Interrupt(at))
            except KeyboardInterrupt:
                continue
        assert program(folder, Interrupt()) == whole[0]


def outcome(done: Compressed) -> dict[str, Any]:
    """What has to be the same: everything but times."""
    facts = copy.deepcopy(done.summary["facts"])
    return {
        "onnx": done.onnx.read_bytes(),
        "weights": done.summary["weights"],
        "facts": facts,
        "points": [(p.stage, p.metrics, p.parameters, p.macs, p.zeros) for p in done.points],
    }


@pytest.mark.usefixtures("_saved_always")
@pytest.mark.parametrize("name", [m for m in methods() if m != "finetune"])
def test_every_method_goes_on_with_the_same_bits(tmp_path: Path, name: str) -> None:
    options = {"steps": 3} if hasattr(method(name).Options, "steps") else {}
    first = {"method": name, **options, **NEEDED.get(name, {})}
    recipe = read_recipe({"name": "r", "step": [first, {"method": "finetune", "steps": 3, "ema": 0.5}]})
    recipe = recipe.scaled(1e-3 if recipe.batches > 100 else 1)
    counted = Interrupt()
    wanted = outcome(compress(tiny_problem(), recipe, tmp_path / "whole", progress=counted))
    assert all(0 < macs <= wanted["points"][0][3] for _, _, _, macs, _ in wanted["points"])
    assert all(0 < size <= wanted["points"][0][2] for _, _, size, _, _ in wanted["points"])
    for at in (counted.calls // 3, 2 * counted.calls // 3):
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_problem(), recipe, tmp_path / "part", progress=Interrupt(at))
    assert outcome(compress(tiny_problem(), recipe, tmp_path / "part")) == wanted


# --- trainings -----------------------------------------------------------------------------------


def test_the_moving_average() -> None:
    net = nn.Linear(1, 1, bias=False)
    average = Average(net, 0.9)
    values, expected = [3.0, 5.0, -2.0], float(net.weight.detach())
    for step, value in enumerate(values):
        with torch.no_grad():
            net.weight.fill_(value)
        average.update(net, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    average.store(net)
    assert float(net.weight.detach()) == pytest.approx(expected, rel=1e-6)


def test_masks_hold_in_averages_and_do_not_count_where_gradients_are_clipped() -> None:
    owner = begin(tiny_problem())
    mask = torch.ones_like(owner.model.head.weight)
    mask[:, ::2] = 0
    owner.masks["head.weight"] = mask
    owner.train(3, lr=1e-2, ema=0.9)
    assert (owner.model.head.weight[:, ::2] == 0).all()
    assert (owner.model.head.weight[:, 1::2] != 0).all()
    owner.model.head.weight.grad = torch.full_like(mask, 2.0)
    mask_gradients(owner.model, owner.masks)
    assert torch.equal(owner.model.head.weight.grad, 2 * mask)


def test_a_training_ends_clean() -> None:
    owner = begin(tiny_problem())
    owner.train(2)
    assert not owner.model.training
    assert all(p.grad is None for p in owner.model.parameters())
    assert not any(p.requires_grad for p in owner.teacher.parameters())


def test_clip_bounds_the_step() -> None:
    def moved(clip: float) -> float:
        owner = begin(tiny_problem())
        before = torch.cat([p.detach().flatten() for p in owner.model.parameters()])
        owner.train(1, lr=1.0, warmup=0, clip=clip, optimizer=lambda w, rate: torch.optim.SGD(w, rate))
        return float((torch.cat([p.detach().flatten() for p in owner.model.parameters()]) - before).norm())

    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)
    assert moved(0.02) == pytest.approx(0.02, rel=1e-3)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    problem = tiny_problem(loss=lambda outputs, targets: outputs.sum() * float("nan"))
    with pytest.raises(TrainingError, match=r"training 1-finetune.0: the loss is nan at step 0"):
        compress(problem, read_recipe(FINETUNE), tmp_path / "run")


def test_what_is_remembered_is_json_and_once_a_stage(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        owner = begin(tiny_problem(), folder=folder)
        state = torch.get_rng_state()
        assert owner.remember("pair", lambda: (1, float(torch.rand(()) * 0 + 2))) == [1, 2.0]
        assert torch.equal(torch.get_rng_state(), state), "draws inside change nothing outside"
        with pytest.raises(AssertionError, match=r"step\.pair"):
            owner.remember("pair", lambda: 0)
        owner.enter("other")
        assert owner.remember("pair", lambda: 5) == 5
    (tmp_path / "step.pair.json").write_text("[1,")
    with pytest.raises(UsageError, match=r"damaged.*Delete it"):
        begin(tiny_problem(), folder=tmp_path).remember("pair", lambda: 1)


# --- checkpoints that do not fit -------------------------------------------------------------------


def refused(folder: Path, model: nn.Module | None = None, steps: int = 3, **options: Any) -> str:
    owner = begin(tiny_problem(model), folder=folder)
    before = digest(owner.model)
    with pytest.raises(UsageError) as failed:
        owner.train(steps, **options)
    assert digest(owner.model) == before or "another training" in str(failed.value)
    assert "\n" not in str(failed.value)
    return str(failed.value)


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    begin(tiny_problem(), folder=tmp_path).train(3)
    path = tmp_path / "step.0.pt"
    message = refused(tmp_path, TinyNet(24))
    assert (
        f"checkpoint {path}: of another structure, expected stem.0.weight [24, 3, 3, 3], got [16, 3, 3, 3]"
        in message
    )
    assert "of a longer training, expected at most 2 steps, got 3" in refused(tmp_path, steps=2)
    hooked = begin(tiny_problem())
    assert "of another training: 'hook0'" in refused(tmp_path, hooks=[Growing(hooked)])
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in refused(tmp_path)
    path.write_bytes(b"no checkpoint")
    assert "damaged" in refused(tmp_path)


def test_an_ended_training_keeps_no_optimizer(tmp_path: Path) -> None:
    begin(tiny_problem(), folder=tmp_path).train(3)
    assert "optimizer" not in torch.load(tmp_path / "step.0.pt", weights_only=True)


# --- runs ----------------------------------------------------------------------------------------


def test_what_a_run_leaves(tmp_path: Path) -> None:
    problem = tiny_problem()
    state = torch.get_rng_state()
    recipe = read_recipe(
        {
            "name": "r",
            "step": [
                {"method": "sparsify", "steps": 3, "sparsity": 0.5},
                {"method": "finetune", "steps": 22},
            ],
        }
    )
    done = compress(problem, recipe, tmp_path / "run", Target.load("rpi5"), precision="int8")
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is not the run's"
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "summary.json", "tiny.onnx", "accuracy.png", "log.jsonl", "steps"}
    assert [p.stage for p in done.points] == ["start", "1-sparsify", "2-finetune"]
    assert done.before.zeros == 0 < 0.3 < done.after.zeros
    assert done.after.latency_s is not None and done.after.latency_s > 0
    assert done.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert done.summary["metric"] == "top1"
    assert done.summary["facts"]["1-sparsify"]
    assert digest(done.module) == done.summary["weights"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"begun", "done"} <= {line.get("event") for line in lines}
    assert any(line.get("training") == "2-finetune.1" and line["step"] == 20 for line in lines)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(done.onnx), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    with torch.no_grad():
        wanted = done.module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run(None, {"images": x})[0], wanted, atol=1e-5)


def test_the_host_has_no_estimate_and_says_so(tmp_path: Path) -> None:
    done = compress(tiny_problem(), read_recipe(FINETUNE), tmp_path / "run", Target.load("host"))
    assert done.after.latency_s is None
    assert "nothing can be estimated" in done.summary["facts"]["latency"]["not_estimated"]


def test_scratch_trains_the_teacher_too(tmp_path: Path) -> None:
    done = compress(tiny_problem(), read_recipe(FINETUNE), tmp_path / "run", scratch=60)
    raw = tiny_problem()
    assert done.before.metrics["loss"] < raw.evaluate(raw.model)["loss"] - 0.1


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"recipe": {**FINETUNE, "seed": 1}}, "recipe.seed is 0 there, 1 here"),
        ({"recipe": {"name": "r", "step": [{"method": "finetune", "steps": 5}]}}, "recipe.step[0].steps is 4 there, 5 here"),
        ({"problem": {"identity": {"data": "other"}}}, "problem.data is quarters there, other here"),
        ({"problem": {"model": TinyNet(24)}}, "weights is "),
        ({"target": Target.load("rpi5")}, "target is not set there, rpi5 here, and 1 more differ"),
        ({"scratch": 3}, "scratch is 0 there, 3 here"),
    ],
)  # fmt: skip
def test_another_run_in_the_folder(tmp_path: Path, change: dict[str, Any], needle: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    identity = {
        "problem": {"name": "tiny", "data": "quarters"}, "weights": digest(tiny_problem().model),
        "recipe": read_recipe(FINETUNE).table(), "target": None, "precision": None, "scratch": 0, "tools": run.tools(),
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(identity))
    problem = tiny_problem(**change.get("problem", {}))
    with pytest.raises(UsageError) as failed:
        compress(
            problem, read_recipe(change.get("recipe", FINETUNE)), out, change.get("target"),
            scratch=change.get("scratch", 0),
        )  # fmt: skip
    assert f"folder {out}: holds another run: {needle}" in str(failed.value)
    assert [p.name for p in out.iterdir()] == ["run.json"], "nothing was touched"


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "edgekit.toml").write_text("[project]\nname = 'mine'\n")
    with pytest.raises(UsageError, match="holds something else than a run"):
        compress(tiny_problem(), read_recipe(FINETUNE), tmp_path)
    (tmp_path / "edgekit.toml").unlink()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run\.json is damaged"):
        compress(tiny_problem(), read_recipe(FINETUNE), tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    with run._alone(tmp_path / "steps"), pytest.raises(UsageError, match="another process runs a recipe there"), \
            run._alone(tmp_path / "steps"):  # fmt: skip
        pass
    with run._alone(tmp_path / "steps"):
        pass


def test_the_plot(tmp_path: Path) -> None:
    points = [
        run.Point("start", {"top1": 0.95}, 1000, 2_000_000, 0.0, 0.004),
        run.Point("1-prune", {"top1": 0.91}, 500, 900_000, 0.5, 0.002),
    ]
    run.write_plot(tmp_path / "a.png", "net: recipe", "top1", points, "rpi5")
    run.write_plot(
        tmp_path / "b.png", "net: recipe", "top1", [dataclasses.replace(points[0], latency_s=None)] * 2, None
    )
    a, b = (cv2.imread(str(tmp_path / name)) for name in ("a.png", "b.png"))
    assert (a.shape[1], b.shape[1]) == (3 * 620, 2 * 620)
    marks = (a.reshape(-1, 3) == (50, 90, 200)).all(1).sum()
    assert marks >= 3 * 100, "the last point of each panel"


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6))
def test_axes_are_round_and_cover(low: float, span: float) -> None:
    found = axis(low, low + span)
    room = 1e-6 * max(abs(low), span)
    assert found.low <= low + room
    assert found.high >= low + span - room
    assert 1 <= len(found.ticks) <= 12
    mantissa = found.step / 10.0 ** np.floor(np.log10(found.step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6
