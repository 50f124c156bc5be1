"""Masks of sparse weights: golden values of the reference, and what must hold for any weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.compression.patterns import (
    Ratio,
    block_punched,
    cut,
    keeps,
    kernel_patterns,
    lamp,
    library,
    magnitude,
    maxq,
    n_of_m,
    noise,
    punched_scores,
    risen,
    soft_rows,
)

GOLDEN = torch.tensor([math.sin(i) * (1 + 0.1 * (i % 7)) for i in range(1, 65)])
RATIOS = st.sampled_from([Ratio(2, 4), Ratio(1, 4), Ratio(1, 8), Ratio(3, 8), Ratio(1, 16)])


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_golden_2_of_4() -> None:
    mask = n_of_m(GOLDEN[None], Ratio(2, 4))
    assert (GOLDEN.abs() * mask).sum() / GOLDEN.abs().sum() == pytest.approx(0.6903, abs=1e-4)


def test_golden_lamp() -> None:
    scores = lamp(GOLDEN)
    assert scores.max() == pytest.approx(1.0)
    assert scores.argmin() + 1 == 22


def test_golden_maxq_schedule() -> None:
    times = (0, 1, 3, 5, 10, 15, 20, 30, 60)
    expected = (0, 0.0967, 0.271, 0.4213, 0.7037, 0.875, 0.963, 1, 1)
    assert [risen("cubic", t / 30) for t in times] == pytest.approx(expected, abs=1e-4)
    assert [risen("linear", t / 30) for t in (0, 15, 60)] == [0, 0.5, 1]


def test_golden_maxq_soft_mask() -> None:
    row = torch.arange(1, 9)[None] / 100
    expected = (0, 0, 0, 0, 0.6225, 0.8176, 0.9241, 0.9707)
    assert soft_rows(row, Ratio(2, 4))[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_golden_block_punched() -> None:
    weight = torch.sin(torch.arange(1, 289, dtype=torch.float64)).view(8, 4, 3, 3)
    expected = (7.9491, 8.2458, 7.8295, 7.8795, 8.2543, 7.8920, 7.8191, 8.2420, 7.9627)
    assert punched_scores(weight)[0, 0].tolist() == pytest.approx(expected, abs=1e-4)
    mask = block_punched(weight, 0.5)
    assert (mask == mask[:1, :1]).all()
    assert torch.nonzero(~mask[0, 0].flatten()).flatten().tolist() == [0, 2, 3, 5, 6]


def test_of_equals_the_lower_index_is_kept() -> None:
    same = torch.ones(1, 8, 1, 1)
    assert n_of_m(same, Ratio(2, 4)).flatten().tolist() == [True, True, False, False] * 2
    assert magnitude(same, 0.5).flatten().tolist() == [True] * 4 + [False] * 4
    a, b = cut({"a": same, "b": same}, 0.5).values()
    assert a.all()
    assert not b.any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9999), RATIOS, st.sampled_from([(), (1, 1), (3, 3)]), st.integers(1, 3), st.integers(1, 4)
)
def test_n_of_m_keeps_the_largest_of_each_group(
    seed: int, ratio: Ratio, kernel: tuple[int, ...], groups: int, outputs: int
) -> None:
    weight = drawn(seed, outputs, groups * ratio.m, *kernel)
    mask = n_of_m(weight, ratio)
    assert keeps(weight * mask, ratio)
    for o in range(outputs):
        for start in range(0, weight.shape[1], ratio.m):
            part = (
                weight[o, start : start + ratio.m].flatten(1).T
                if kernel
                else weight[None, o, start : start + ratio.m]
            )
            kept = (
                mask[o, start : start + ratio.m].flatten(1).T
                if kernel
                else mask[None, o, start : start + ratio.m]
            )
            for values, which in zip(part.abs(), kept, strict=True):
                assert which.sum() == ratio.n
                assert values[which].min() >= values[~which].max()


def test_keeps_finds_one_weight_too_many() -> None:
    weight = drawn(0, 4, 8, 3, 3)
    sparse = weight * n_of_m(weight, Ratio(2, 4))
    assert keeps(sparse, Ratio(2, 4))
    at = tuple(torch.nonzero(sparse == 0)[5].tolist())
    sparse[at] = 1e-6
    assert not keeps(sparse, Ratio(2, 4))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), RATIOS, st.sampled_from([(), (1, 1), (3, 3)]), st.floats(0, 1), st.booleans())
def test_maxq_masks(seed: int, ratio: Ratio, kernel: tuple[int, ...], share: float, soft: bool) -> None:
    weight = 0.1 * drawn(seed, 4, 2 * ratio.m, *kernel)
    mask = maxq(weight, ratio, share, soft=soft)
    kept = mask[mask != 0]
    assert kept.min() >= 1
    assert kept.max() <= (3 if kernel == (3, 3) else 2) if soft else (kept == 1).all()
    whole = maxq(weight, ratio, soft=soft)
    assert keeps(weight * whole, ratio)
    assert ((mask != 0) | (whole == 0)).all()  # more blocks are dense, none is sparser
    groups = weight.numel() // ratio.m
    dense = math.floor((1 - share) * groups + 1e-9)
    assert (mask != 0).sum() == groups * ratio.n + dense * (ratio.m - ratio.n)


def test_maxq_leaves_the_blocks_of_smallest_sums_dense() -> None:
    weight = torch.tensor([[4.0, 3, 2, 1], [0.4, 0.3, 0.2, 0.1]])
    assert maxq(weight, Ratio(2, 4), 0.5, soft=False).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_maxq_of_a_3x3_kernel_counts_filter_and_position() -> None:
    weight = 0.05 * drawn(3, 4, 8, 3, 3)
    ratio = Ratio(2, 4)
    filters = torch.stack([soft_rows(w.abs().view(1, -1), ratio)[0].view(w.shape) for w in weight])
    places = torch.zeros_like(weight)
    for i in range(3):
        for j in range(3):
            places[:, :, i, j] = soft_rows(weight[:, :, i, j].abs().reshape(1, -1), ratio).view(4, 8)
    expected = n_of_m(weight, ratio) * (1 + filters + places)
    torch.testing.assert_close(maxq(weight, ratio), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.floats(0, 1))
def test_magnitude_zeroes_the_smallest(seed: int, sparsity: float) -> None:
    weight = drawn(seed, 6, 5)
    mask = magnitude(weight, sparsity)
    assert (~mask).sum() == round(sparsity * 30)
    if mask.any() and not mask.all():
        assert weight.abs()[mask].min() >= weight.abs()[~mask].max()


def test_lamp_keeps_the_largest_of_every_layer() -> None:
    weights = {"small": 1e-3 * drawn(0, 4, 4), "large": drawn(1, 40, 40)}
    assert not cut({n: w.abs() for n, w in weights.items()}, 0.9)["small"].any()
    masks = cut({n: lamp(w) for n, w in weights.items()}, 0.9)
    assert masks["small"].any()
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.9 * 1616)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([0.0, 4 / 9, 0.5, 0.75, 0.9]))
def test_kernel_patterns(seed: int, sparsity: float) -> None:
    weight = drawn(seed, 12, 6, 3, 3)
    patterns = library({"w": weight}, 12)
    assert patterns.shape == (12, 9)
    assert (patterns.sum(1) == 5).all()
    assert patterns[:, 4].all()
    mask = kernel_patterns(weight, patterns, sparsity).flatten(2).flatten(0, 1)
    known = {tuple(p.tolist()) for p in patterns}
    assert all(tuple(row.tolist()) in known or not row.any() for row in mask)
    assert (~mask).float().mean() == pytest.approx(max(sparsity, 4 / 9), abs=0.5 / len(mask))
    for kernel, row in zip(weight.flatten(2).flatten(0, 1), mask, strict=True):
        if row.any():
            assert kernel[row].norm() >= max((kernel * p).norm() for p in patterns) - 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([(), (1, 1), (3, 3)]), st.floats(0, 0.99))
def test_block_punched_shares_its_zeros_and_is_a_projection(
    seed: int, kernel: tuple[int, ...], sparsity: float
) -> None:
    weight = drawn(seed, 24, 12, *kernel)
    mask = block_punched(weight, sparsity)
    tiles = mask.reshape(3, 8, 3, 4, -1)
    assert (tiles == tiles[:, :1, :, :1]).all()
    cells = 9 * math.prod(kernel)
    gone = int((~tiles[:, 0, :, 0]).sum())
    assert abs(gone - sparsity * cells) <= 1
    assert torch.equal(block_punched(weight * mask, sparsity), mask)


def test_noise_is_a_control_of_every_pattern() -> None:
    weight = drawn(0, 16, 16, 3, 3)
    made = [noise(weight, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    for mask in (
        lambda w: magnitude(w, 0.75),
        lambda w: n_of_m(w, Ratio(2, 4)),
        lambda w: block_punched(w, 0.75),
        lambda w: kernel_patterns(w, library({"": weight}), 0.75),
    ):
        of_weight, first, second = (mask(w) for w in (weight, made[0], made[2]))
        assert first.sum() == of_weight.sum()
        assert not torch.equal(first, of_weight)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2-4", "", "2:4:8", "-1:4"])
def test_ratios_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="pattern must be N:M"):
        Ratio.parse(text)


def test_ratio_of_text() -> None:
    assert str(Ratio.parse("1:16")) == "1:16"
