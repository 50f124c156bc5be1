"""Weights that a storage codec can hold to the bit: after training too, with masks, through the export, and resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgekit import codecs as stored
from edgekit.compression import codecs
from edgekit.compression.methods import codebook
from edgekit.compression.methods.codebook import Options
from edgekit.compression.problem import Problem, modules
from edgekit.compression.shapes_problem import conv
from edgekit.compression.work import Hook, Work, begin
from edgekit.models.exporting import write_onnx

CODECS = ("kmeans-4", "kmeans-16", "ternary", "ternary-2", "binary", "pow2-4", "int3", "int4")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.more = conv(3, 8), conv(8, 16), conv(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.more(self.wide(self.stem(x))).mean((2, 3)))
        return found


def problem() -> Problem:
    torch.manual_seed(0)
    net = Net()
    textures = torch.randn(4, 3, 8, 8)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(step)
        labels = torch.randint(4, (32,), generator=rng)
        return textures[labels] + torch.randn(32, 3, 8, 8, generator=rng), labels

    return Problem(
        "tiny", net, torch.zeros(1, 3, 8, 8), batch, nn.functional.cross_entropy, lambda _: {"top1": 0.0},
        lambda net, path: write_onnx(net, path, (torch.zeros(1, 3, 8, 8),), ["x"], ["y"]), frozenset({"head"}), lr=1e-2,
    )  # fmt: skip


def weights(work: Work) -> dict[str, np.ndarray]:
    found = modules(work.model, nn.Conv2d, nn.Linear)
    return {name: part.weight.detach().numpy() for name, part in found.items()}  # type: ignore[operator, union-attr]


def on_set(weight: np.ndarray, name: str) -> bool:
    """Counted, not by the encoder."""
    rows = weight.reshape(len(weight), -1)
    if name.startswith("kmeans"):
        return len(np.unique(weight)) <= int(name.split("-")[1])
    for row in rows:
        values = np.unique(row)
        if name == "binary" and len(np.unique(np.abs(row))) > 1:
            return False
        if name.startswith("ternary") and not (
            len(values) <= 3 and (name[-1] == "2" or len(set(np.abs(values)) - {0}) <= 1)
        ):
            return False
        if name == "pow2-4":
            shifts = np.log2(np.abs(row).max() / np.abs(row))
            if (shifts != shifts.round()).any() or shifts.max() > 7:
                return False
        if name.startswith("int") and len(values) > 2 ** int(name[3:]) - 1:
            return False
    return True


@pytest.mark.parametrize("steps", [0, 12])
@pytest.mark.parametrize("name", CODECS)
def test_weights_end_on_the_set(name: str, steps: int) -> None:
    work = begin(problem())
    before = {k: v.copy() for k, v in weights(work).items()}
    codebook.run(work, Options(codec=name, steps=steps))
    after = weights(work)
    assert not on_set(before["wide.0"], name)
    for layer in ("wide.0", "more.0"):
        assert on_set(after[layer], name), layer
        assert np.array_equal(codecs.quantized(after[layer], name), after[layer])
    facts = work.facts["step"]
    assert facts["skipped"] == {"stem.0": "the first layer", "head": "a head"}
    assert facts["bytes"] == sum(codecs.encode(after[k], name).nbytes for k in ("wide.0", "more.0"))
    assert facts["of"] == 4 * (8 * 16 + 16 * 16) * 9
    if not steps and not name.startswith("kmeans"):
        assert np.array_equal(after["wide.0"], codecs.quantized(before["wide.0"], name))
        assert np.array_equal(after["head"], before["head"])


@pytest.mark.parametrize("name", [c for c in CODECS if not c.startswith("kmeans")])
def test_what_trains_is_what_is_stored(name: str) -> None:
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    how = codecs.scheme(name)
    for masked in (None, mask):
        start = weight if masked is None else weight * masked
        found = codebook.project(start, how, masked).numpy()
        want = codecs.quantized(start.numpy(), codebook.stored_as(how, masked is not None))
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["kmeans-4", "ternary", "pow2-4"])
def test_masked_weights_stay_zero(name: str) -> None:
    work = begin(problem())
    weight = dict(work.model.named_parameters())["wide.0.weight"]
    work.masks["wide.0.weight"] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.6
    weight.data.mul_(work.masks["wide.0.weight"])
    codebook.run(work, Options(codec=name, steps=5))
    found = weights(work)["wide.0"]
    zero = ~work.masks["wide.0.weight"].numpy()
    assert not found[zero].any()
    assert np.array_equal(codecs.quantized(found, f"sparse+{name}"), found)
    assert np.count_nonzero(found) > 0.5 * np.count_nonzero(~zero)


@pytest.mark.parametrize("name", ["kmeans-8", "ternary", "binary", "pow2-4"])
def test_the_exported_file_is_on_the_set_too(name: str, tmp_path: Path) -> None:
    """Batch norms are folded into the weights there."""
    work = begin(problem())
    codebook.run(work, Options(codec=name, steps=8))
    work.problem.write(work.model, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    found = [numpy_helper.to_array(i) for i in model.graph.initializer if len(i.dims) == 4]
    assert len(found) == 3
    for weight in found[1:]:
        assert on_set(weight, name)
        assert np.array_equal(stored.decode(codecs.encode(weight, name)), weight)


def test_a_centroid_moves_by_the_sum_of_its_members() -> None:
    weight = nn.Parameter(torch.tensor([[-1.0, -1.1, 0.9, 1.0, 1.1]]))
    hook = codebook.Centroids({"w": weight}, {}, 2, None)
    assert weight.tolist() == [[pytest.approx(v) for v in (-1.05, -1.05, 1.0, 1.0, 1.0)]]
    weight.grad = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    hook.gradients(nn.Module(), 0, 1)
    (book,) = hook.parameters()
    assert book.grad is not None
    assert book.grad.tolist() == [3.0, 28.0]
    assert weight.grad is None


def test_training_recovers_what_is_lost_at_once() -> None:
    losses = {}
    made = problem()
    trained = begin(made)
    trained.train(60, lr=1e-2)
    for steps in (0, 40):
        work = begin(dataclasses.replace(made, model=trained.model))
        codebook.run(work, Options(codec="binary", steps=steps, lr=3e-3))
        x, y = made.batch(10_000)
        with torch.no_grad():
            losses[steps] = float(made.loss(work.model(x), y))
    assert losses[40] < 0.8 * losses[0]


class Cut(Exception):
    pass


@pytest.mark.parametrize("name", ["kmeans-4", "ternary"])
def test_a_training_that_was_cut_off_goes_on(name: str, tmp_path: Path) -> None:
    class Stop(Hook):
        def after(self, model: nn.Module, step: int, steps: int) -> None:
            if step == 7:
                raise Cut

    class Often(Work):
        def train(self, steps: int, **options: Any) -> None:
            super().train(steps, **{**options, "save_every": 3})

    def made(folder: Path | None) -> Work:
        work = begin(problem(), folder=folder)
        work.__class__ = Often
        return work

    whole = made(None)
    codebook.run(whole, Options(codec=name, steps=10))
    part = made(tmp_path)
    part.hooks.append(Stop())
    with pytest.raises(Cut):
        codebook.run(part, Options(codec=name, steps=10))
    again = made(tmp_path)
    again.hooks.append(Hook())
    codebook.run(again, Options(codec=name, steps=10))
    for layer, weight in weights(whole).items():
        assert np.array_equal(weight, weights(again)[layer]), layer


@pytest.mark.parametrize(
    ("options", "says"),
    [({"codec": "huffman"}, "unknown"), ({"codec": "2:4+int8"}, "codec must be"), ({"codec": "float16"}, "codec must be"),
     ({"codec": "ternary", "control": "random"}, "control"), ({"steps": -1}, "steps"), ({"lr": 0.0}, "lr")],
)  # fmt: skip
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Options(**options)
