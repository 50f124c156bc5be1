"""Distillation: golden values, identities, detectors' heads, and the hook inside trainings."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.compression import distillation as d
from edgekit.compression.methods import distil, finetune
from edgekit.compression.problem import Problem
from edgekit.compression.work import Work, begin, frozen
from edgekit.errors import UsageError
from edgekit.models.exporting import write_onnx
from edgekit.models.yolo_lite import STRIDES, cells, decode

ZT, ZS = torch.tensor([[2.0, 1.0, 0.5, -1.0]]), torch.tensor([[1.0, 1.5, 0.0, -0.5]])


def test_golden_values_of_decoupled_distillation():
    tckd, nckd, p = d.dkd_terms(ZS, ZT, torch.tensor([0]), 4.0)
    assert p.item() == pytest.approx(0.340315, abs=1e-5)
    assert tckd.item() == pytest.approx(0.009335, abs=1e-5)
    assert nckd.item() == pytest.approx(0.006965, abs=1e-5)
    assert d.kd(ZS, ZT, 4.0).item() == pytest.approx(0.22287, abs=1e-5)
    assert d.dkd(ZS, ZT, torch.tensor([0]), 1, 0, 4.0).item() == pytest.approx(0.14935, abs=1e-5)
    assert d.dkd(ZS, ZT, torch.tensor([0]), 0, 1, 4.0).item() == pytest.approx(0.11144, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9), st.floats(0.5, 6), st.floats(0.1, 12))
def test_kd_is_what_decoupling_says(seed, classes, temperature, scale):
    """KL = TCKD + (1 - p) NCKD, for sure teachers, too."""
    rng = np.random.default_rng(seed)
    student, teacher = torch.from_numpy(rng.normal(0, scale, (2, 5, classes)))
    targets = torch.from_numpy(rng.integers(0, classes, 5))
    tckd, nckd, p = d.dkd_terms(student, teacher, targets, temperature)
    whole = d.kd(student, teacher, temperature) / temperature**2
    torch.testing.assert_close((tckd + (1 - p) * nckd).mean(), whole, atol=1e-9, rtol=1e-7)


def test_golden_distances_of_relations():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 0.0]])
    found = d.distances(rows)
    expected = torch.tensor([[0, 0.9375, 1.125], [0.9375, 0, 0.9375], [1.125, 0.9375, 0]])
    torch.testing.assert_close(found, expected)
    other = torch.tensor([[0.0], [1.0], [5.0]])  # 1, 5, 4 -> mean 10/3
    want = torch.nn.functional.smooth_l1_loss(d.distances(other), expected)
    assert d.rkd_distance(other, rows).item() == pytest.approx(want.item())
    assert d.rkd_distance(rows * 7, rows).item() == pytest.approx(0, abs=1e-9)  # scale does not count


def test_angles_of_relations():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    found = d.angles(rows)
    assert found[0, 1, 2].item() == pytest.approx(0)  # a right angle at the first row
    assert found[1, 0, 2].item() == pytest.approx(1 / 5**0.5)
    turned = rows @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) * 3 + 1
    assert d.rkd_angle(turned, rows).item() == pytest.approx(0, abs=1e-6)
    assert d.rkd_angle(rows[[1, 0, 2]], rows).item() > 0.01


def test_relations_of_equal_rows_have_finite_gradients():
    rows = torch.ones(4, 3, requires_grad=True)
    loss = d.rkd_distance(rows, torch.randn(4, 3)) + d.rkd_angle(rows, torch.randn(4, 3))
    loss.backward()
    assert rows.grad is not None and bool(torch.isfinite(rows.grad).all())


def test_hint_does_not_depend_on_the_scale_of_a_layer():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mean = teacher.mean((0, 2, 3), keepdim=True).expand_as(teacher)
    assert d.hint(mean, teacher).item() == pytest.approx(1, abs=0.02)
    assert d.hint(teacher, teacher).item() == 0
    assert d.hint(student * 100, teacher * 100).item() == pytest.approx(d.hint(student, teacher).item())
    mask = torch.zeros(2, 1, 4, 4)
    assert d.hint(student, teacher, mask).item() == 0
    mask[0, 0, 1, 2] = 1
    student[1] = 1e6  # not where it counts
    assert d.hint(student, teacher, mask).item() < 100


def levels(seed: int, classes: int = 3, size: int = 64):
    """Raw heads where the teacher sees something in one cell of the finest level."""
    rng = np.random.default_rng(seed)
    made = []
    for stride in STRIDES:
        n = size // stride
        parts = [rng.normal(0, 0.3, (2, c, n, n)).astype(np.float32) for c in (4, 1, classes)]
        parts[1] -= 6
        made.append(tuple(torch.from_numpy(p) for p in parts))
    made[0][1][0, 0, 3, 4] = 5 - seed
    made[0][2][0, 1, 3, 4] = 4
    return made


def test_a_detector_that_equals_its_teacher_has_nothing_to_learn():
    same, other = levels(0), levels(1)
    assert d.imitation(same, same, None).item() == pytest.approx(0, abs=1e-5)
    assert d.imitation(other, same, None).item() > 0.05


def test_classes_and_boxes_are_imitated_only_where_the_teacher_sees_something():
    student, teacher = levels(1), levels(0)
    for part in (p for level in student for p in level):
        part.requires_grad_()
    d.imitation(student, teacher, None).backward()
    box, objectness, classes = (part.grad for part in student[0])
    assert box is not None and objectness is not None and classes is not None
    seen = torch.zeros(2, 8, 8, dtype=torch.bool)
    seen[0, 3, 4] = True
    assert bool(((box.abs().sum(1) > 0) == seen).all())
    assert bool(((classes.abs().sum(1) > 0) == seen).all())
    assert bool((objectness != 0).all())
    assert float(student[2][0].grad.abs().sum()) == 0


def test_a_box_better_than_the_teachers_is_left_alone():
    student, teacher = levels(1), levels(0)
    grid, stride = cells(64, 64)
    rows = [
        torch.cat([level[0].flatten(2) for level in each], 2).transpose(1, 2) for each in (student, teacher)
    ]
    mine, its = (decode(row, grid, stride)[:, 3 * 8 + 4] for row in rows)
    only_box = d.YoloxImitation(objectness=0, classes=0)
    kinds = torch.tensor([[1, -1], [-1, -1]])

    def loss(truth):
        return only_box(student, teacher, (torch.stack([truth, truth * 0], 1), kinds)).item()

    assert loss(mine) == 0  # the student is already right
    assert loss(its) > 0  # the teacher is
    assert loss(its + 500) == 0  # the teacher's box is of no use
    empty = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64)
    assert only_box(student, teacher, empty).item() == 0


def test_foreground_is_where_the_teacher_sees_something():
    fine, *rest = d.imitation.foreground(levels(0))
    assert fine.shape == (2, 1, 8, 8) and int((fine > 0).sum()) == 1 and float(fine[0, 0, 3, 4]) > 0.9
    assert all(float(mask.sum()) == 0 for mask in rest)


def test_activated_outputs_are_imitated_as_maps_and_as_rows():
    torch.manual_seed(0)

    def maps(seed):
        generator = torch.Generator().manual_seed(seed)
        raw = torch.randn(2, 8, 4, 4, generator=generator)
        raw[:, 0] -= 4
        raw[0, 0, 1, :] = 4 + seed
        return torch.cat([raw[:, :1].sigmoid(), raw[:, 1:5], raw[:, 5:].softmax(1)], 1)

    as_maps = d.MapImitation(((0, 1), (5, 8)))
    teacher, student = maps(0), maps(1).requires_grad_()
    assert as_maps(teacher, teacher).item() == pytest.approx(0, abs=1e-5)
    as_maps(student, teacher).backward()
    seen = torch.zeros(2, 4, 4, dtype=torch.bool)
    seen[0, 1] = True
    assert bool(((student.grad[:, 1:].abs().sum(1) > 0) == seen).all())
    assert bool((student.grad[:, 0] != 0).all())
    assert int((as_maps.foreground(teacher)[0] > 0).sum()) == 4
    as_rows = d.MapImitation(((0, 1), (5, 8)), axis=2)
    rows = [x.detach().flatten(2).transpose(1, 2) for x in (student, teacher)]
    assert as_rows(*rows).item() == pytest.approx(as_maps(student, teacher).item(), rel=1e-5)
    assert as_rows.foreground(rows[1]) == []


# --- in trainings -----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(inplace=True))
        self.b = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x):
        return self.head(self.b(self.a(x)).mean((2, 3)))


def problem(width: int = 4, seed: int = 0, **options) -> Problem:
    torch.manual_seed(seed)

    def batch(step):
        rng = np.random.default_rng([9, step])
        return torch.from_numpy(rng.random((8, 3, 8, 8), np.float32)), torch.from_numpy(rng.integers(0, 3, 8))

    return Problem(
        "tiny", Net(width), torch.zeros(1, 3, 8, 8), batch, nn.functional.cross_entropy, lambda _: {"top1": 0.5},
        lambda *_: None, frozenset({"head"}), lr=1e-2, **options,
    )  # fmt: skip


def work(teacher: nn.Module | None = None, made: Problem | None = None, **options) -> Work:
    found = begin(made or problem(), **options)
    if teacher is not None:
        found.teacher = frozen(teacher)
    return found


def apart(found: Work) -> float:
    """How far the student's logits are from the teacher's on pictures of no training."""
    x = found.problem.batch(10_000)[0]
    with torch.no_grad():
        return d.kd(found.model(x), found.teacher(x)).item()


@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_a_student_comes_nearer_to_its_teacher_than_without_one(loss):
    torch.manual_seed(5)
    big = Net(8)
    for p in big.parameters():
        p.data *= 1.5
    with_teacher, without = (work(big) for _ in range(2))
    distil.run(with_teacher, distil.Options(loss=loss, steps=25, lr=1e-2))
    distil.run(without, distil.Options(loss="none", steps=25, lr=1e-2))
    assert apart(with_teacher) < 0.6 * apart(without)


def test_a_hook_takes_part_in_later_trainings():
    found = [work(Net(8)) for _ in range(2)]
    distil.run(found[0], distil.Options(loss="kd", alpha=1.0))
    assert len(found[0].hooks) == 1
    for each in found:
        finetune.run(each, finetune.Options(steps=20, lr=1e-2))
    assert apart(found[0]) < apart(found[1])


def test_controls_need_no_teacher():
    class Refuses(nn.Module):
        def forward(self, x):
            raise AssertionError("the teacher was asked")

    plain, none, smooth = work(), work(), work()
    for each in (none, smooth):
        each.teacher = Refuses()
    finetune.run(plain, finetune.Options(steps=3))
    distil.run(none, distil.Options(loss="none", steps=3))
    distil.run(smooth, distil.Options(loss="smooth", steps=3))
    weights = [each.model.head.weight for each in (plain, none, smooth)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_hints_are_matched_by_size_and_adapters_are_dropped():
    found = work(Net(8))
    names = set(found.model.state_dict())
    distil.run(found, distil.Options(loss="none", hint=5.0, steps=1))
    assert found.facts["step"]["pairs"] == [["a", "a"], ["b", "b"]]
    hook = distil.Teacher(found, found.teacher, distil.Options(loss="none", hint=5.0))

    def far() -> float:
        x = found.problem.batch(10_000)[0]
        with torch.no_grad():
            return d.hint(
                hook.adapters["1"](found.model.b(found.model.a(x))), found.teacher.b(found.teacher.a(x))
            ).item()

    hook.parameters()
    before = far()
    found.train(40, lr=2e-2, hooks=[hook])
    assert far() < 0.7 * before
    assert [tuple(p.shape) for p in hook.parameters()][:1] == [(8, 4, 1, 1)]
    assert set(found.model.state_dict()) == names
    assert not any(part._forward_hooks for net in (found.model, found.teacher) for part in net.modules())


def test_adapters_follow_a_student_whose_channels_change():
    found = work(Net(8))
    hook = distil.Teacher(found, found.teacher, distil.Options(loss="none", hint=1.0, layers=("a", "b=b.0")))
    first = list(hook.parameters())
    assert [id(p) for p in hook.parameters()] == [id(p) for p in first]  # nothing changed: the same go on
    found.model = Net(3)
    assert [tuple(p.shape) for p in hook.parameters() if p.ndim == 4] == [(8, 3, 1, 1), (16, 6, 1, 1)]
    found.train(1, hooks=[hook])
    found.model = Net(8)
    assert hook.parameters() == []  # of the teacher's size: compared as they are


def test_relations_bring_pictures_into_the_teachers_order():
    torch.manual_seed(3)
    found, without = work(Net(8)), work(Net(8))
    distil.run(found, distil.Options(loss="none", relations=1.0, steps=30, lr=1e-2))
    distil.run(without, distil.Options(loss="none", steps=30, lr=1e-2))
    x = found.problem.batch(10_000)[0]

    def far(each):
        with torch.no_grad():
            mine, its = (net.b(net.a(x)).mean((2, 3)) for net in (each.model, found.teacher))
            return (d.rkd_distance(mine, its) + 2 * d.rkd_angle(mine, its)).item()

    assert far(found) < 0.7 * far(without)


def test_a_detector_is_imitated_by_what_its_problem_says():
    asked = []

    class Says:
        def __call__(self, student, teacher, targets):
            asked.append((student.shape, teacher.requires_grad, targets.shape))
            return ((student - teacher) ** 2).mean()

        def foreground(self, teacher):
            mask = torch.zeros(len(teacher), 1, 8, 8)
            mask[:, :, 2, 2] = 1
            return [mask]

    found = work(Net(4), problem(imitate=Says()))
    distil.run(found, distil.Options(hint=1.0, steps=2))
    assert found.facts["step"]["loss"] == "imitate" and asked == [((8, 3), False, (8,))] * 2
    mask = distil._mask(Says().foreground(torch.zeros(1, 3)), torch.zeros(1, 5, 4, 4))
    assert mask is not None and mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_an_interrupted_distillation_ends_with_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    def go(folder, stop: bool):
        made = work(Net(8), folder=folder)

        def progress(name, done, of):
            if stop and done == 3:
                raise Stop

        made.progress = progress
        torch.manual_seed(1)
        hook = distil.Teacher(made, made.teacher, distil.Options(loss="kd", hint=1.0))
        made.train(6, lr=1e-2, hooks=[hook], save_every=3)
        return made.model.state_dict()

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    teacher_seed = torch.get_rng_state()
    whole = go(tmp_path / "whole", False)
    torch.set_rng_state(teacher_seed)
    with pytest.raises(Stop):
        go(tmp_path / "cut", True)
    torch.set_rng_state(teacher_seed)
    again = go(tmp_path / "cut", False)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_teachers_from_a_file_and_from_a_function(tmp_path, monkeypatch):
    torch.manual_seed(2)
    big = Net(8).eval()
    write_onnx(big, tmp_path / "teacher.onnx", (torch.zeros(1, 3, 8, 8),), ["images"], ["logits"])
    torch.save(big.state_dict(), tmp_path / "big.pt")
    (tmp_path / "teachers_of_a_test.py").write_text(
        "import sys, torch\nfrom pathlib import Path\n\n"
        "def big():\n"
        "    net = sys.modules['test_compression_distil_net'].Net(8)\n"
        "    net.load_state_dict(torch.load(Path(__file__).parent / 'big.pt'))\n"
        "    return net\n"
    )
    monkeypatch.setitem(sys.modules, "test_compression_distil_net", sys.modules[Net.__module__])
    monkeypatch.chdir(tmp_path)
    heads = []
    for name in ("", "teacher.onnx", "teachers_of_a_test:big"):
        found = work(big)
        distil.run(found, distil.Options(teacher=name, loss="kd", steps=4, lr=1e-2))
        heads.append(found.model.head.weight.detach())
    torch.testing.assert_close(heads[0], heads[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(heads[0], heads[2], atol=0, rtol=0)


def test_losses_are_computed_in_full_precision_beside_bfloat16():
    found = work(Net(8), problem(bf16=True))
    asked = []

    def imitate(student, teacher, targets):
        asked.append((student.dtype, teacher.dtype, (student @ teacher.T).dtype))
        return ((student - teacher) ** 2).mean()

    found.problem = dataclasses.replace(found.problem, imitate=imitate)
    distil.run(found, distil.Options(hint=1.0, relations=1.0, steps=2))
    assert asked == [(torch.float32,) * 3] * 2


def test_what_cannot_be_done_is_one_line():
    with pytest.raises(UsageError, match=r"layer 'stage9': not in the network"):
        distil.run(work(Net(8)), distil.Options(hint=1.0, layers=("stage9",)))
    with pytest.raises(UsageError, match=r"layers 'a=b': sizes .* differ in more than channels"):
        distil.run(work(Net(8)), distil.Options(hint=1.0, layers=("a=b",)))
    with pytest.raises(UsageError, match=r"loss 'imitate': problem tiny does not say"):
        distil.run(work(), distil.Options(loss="imitate"))
    with pytest.raises(UsageError, match=r"teacher: gives \(8, 16\), expected \(8, 3\)"):
        distil.run(
            work(nn.Sequential(Net(8).a, Net(8).b, nn.AdaptiveAvgPool2d(1), nn.Flatten())),
            distil.Options(steps=1),
        )
    with pytest.raises(UsageError, match="teacher 'nowhere'"):
        distil.run(work(), distil.Options(teacher="nowhere"))
    for wrong in ({"loss": "fit"}, {"alpha": 2.0}, {"temperature": 0.0}, {"hint": -1.0}, {"lr": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            distil.Options(**wrong)
