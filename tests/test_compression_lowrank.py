"""Low rank: chains against the layers that they stand for, ranks, choices over a network, and the method."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit import frontends
from edgekit.compression import lowrank, lowrank_plan, lowrank_ranks
from edgekit.compression.lowrank import KINDS, decompose, full_ranks
from edgekit.compression.onnx_module import from_onnx, heads, to_onnx
from edgekit.compression.problem import Problem, macs
from edgekit.compression.work import begin
from edgekit.errors import UsageError
from edgekit.models.exporting import write_onnx
from edgekit.target import Target


def moments(layer, inputs):
    return lowrank.observe(nn.Sequential(layer), ["0"], [inputs])["0"]


# --- sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "percent"), [(16, 11.8), (24, 22.4), (32, 36.1), (40, 53.0), (48, 72.9)])
def test_golden_sizes_of_tucker(rank, percent):
    shape = (64, 64, 3, 3)
    assert 100 * lowrank.size("tucker", shape, (rank, rank)) / (64 * 64 * 9) == pytest.approx(
        percent, abs=0.05
    )


def test_golden_break_even():
    assert lowrank.break_even("svd", (512, 512, 1, 1)) == 256
    assert 275 < lowrank.break_even("cp", (64, 64, 3, 3)) < 276
    assert (
        lowrank.size("tucker", (32, 24, 3, 3), (32, 24)) == 8512
    )  # full ranks: larger than the 6912 of the layer
    edge = lowrank.break_even("tucker", (64, 48, 3, 3))
    dense = 64 * 48 * 9
    assert lowrank.size("tucker", (64, 48, 3, 3), (math.floor(edge),) * 2) < dense
    assert lowrank.size("tucker", (64, 48, 3, 3), (math.ceil(edge),) * 2) > dense


# --- chains -----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@example((6, 5), (3, 2), (2, 1), (1, 2), (1, 2), True, "zeros", 0)
@example((6, 5), (2, 3), (1, 2), (2, 0), (2, 1), False, "replicate", 0)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
    st.sampled_from(["zeros", "replicate"]),
    st.integers(0, 1000),
)
def test_full_ranks_compute_what_the_layer_did(channels, kernel, stride, padding, dilation, bias, mode, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(
        channels[1], channels[0], kernel, stride, padding, dilation, bias=bias, padding_mode=mode
    )
    x = torch.randn(2, channels[1], 9, 8)
    for kind in KINDS:
        if lowrank.fits(layer, kind):
            chain = decompose(layer, kind, full_ranks(layer, kind), moments(layer, x))
            torch.testing.assert_close(chain(x), layer(x), atol=2e-5, rtol=2e-5)


def test_full_ranks_with_padding_by_name_and_a_linear_layer():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 5, (3, 5), padding="same", dilation=(2, 1))
    x = torch.randn(2, 4, 9, 9)
    for kind in KINDS:
        chain = decompose(layer, kind, full_ranks(layer, kind), moments(layer, x))
        torch.testing.assert_close(chain(x), layer(x), atol=2e-5, rtol=2e-5)
    flat = nn.Linear(7, 5)
    x = torch.randn(3, 6, 7)
    for kind in ("svd", "data"):
        torch.testing.assert_close(
            decompose(flat, kind, (5,), moments(flat, x))(x), flat(x), atol=1e-5, rtol=1e-5
        )
    assert not lowrank.fits(flat, "tucker") and not lowrank.fits(nn.Conv2d(4, 4, 3, groups=2), "svd")
    assert not lowrank.fits(nn.Conv2d(4, 4, 1), "spatial") and lowrank.fits(nn.Conv2d(4, 4, 1), "svd")


def test_a_chain_has_the_weights_that_were_promised_and_one_bias():
    layer = nn.Conv2d(12, 16, 3, 2, 1)
    for kind, ranks in {"svd": (5,), "spatial": (6,), "tucker": (7, 4), "cp": (9,)}.items():
        chain = decompose(layer, kind, ranks)
        weights = [p for p in chain if p.weight is not None]
        assert sum(p.weight.numel() for p in weights) == lowrank.size(kind, layer.weight.shape, ranks)
        assert [p.bias is not None for p in chain] == [False] * (len(chain) - 1) + [True]
        assert sum(p.numel() for p in lowrank.skeleton(layer, kind, ranks).parameters()) == sum(
            p.numel() for p in chain.parameters()
        )
    with pytest.raises(ValueError, match="ranks of tucker"):
        decompose(layer, "tucker", (17, 4))


def test_spatial_tucker_and_cp_find_what_was_built_of_such_parts():
    torch.manual_seed(0)
    t, s = 8, 6
    spatial = torch.einsum("rsi,rtj->tsij", torch.randn(3, s, 3), torch.randn(3, t, 3))
    tucker = torch.einsum(
        "tr,abij,sb,ra->tsij", torch.randn(t, 3), torch.randn(3, 2, 3, 3), torch.randn(s, 2), torch.eye(3)
    )
    cp = torch.einsum(
        "tr,sr,ir,jr->tsij", torch.randn(t, 2), torch.randn(s, 2), torch.randn(3, 2), torch.randn(3, 2)
    )
    for kind, ranks, weight in (("spatial", (3,), spatial), ("tucker", (3, 2), tucker), ("cp", (2,), cp)):
        layer = nn.Conv2d(s, t, 3)
        layer.weight.data.copy_(weight)
        x = torch.randn(1, s, 6, 6)
        goal = layer(x)
        found = decompose(layer, kind, ranks, rounds=500)(x)
        assert (found - goal).norm() < 2e-3 * goal.norm(), kind
        less = decompose(layer, kind, tuple(r - 1 for r in ranks), rounds=500)(x)
        assert (less - goal).norm() > 0.05 * goal.norm(), kind


def test_rounds_of_tucker_and_cp_only_get_better():
    torch.manual_seed(0)
    weight = torch.randn(10, 8, 3, 3, dtype=torch.float64)

    def lost(left, core, right):
        return (weight - torch.einsum("abij,ta,sb->tsij", core, left, right)).norm().item()

    assert lost(*lowrank.tucker2(weight, (4, 3), rounds=20)) < lost(
        *lowrank.tucker2(weight, (4, 3), rounds=1)
    )
    norms = [lowrank.cp_error(weight, lowrank.cp(weight, 12, rounds)) for rounds in (0, 1, 5, 50)]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.97 * norms[0]


def test_data_aware_factors_are_those_of_the_weighted_matrix():
    """U_r U_r' W of the outputs' moments equals the SVD of W C^1/2 with C^-1/2 undone, and errs less on such inputs."""
    torch.manual_seed(0)
    mixing = torch.randn(6, 6) * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1, 0.05])
    x = torch.randn(4000, 6) @ mixing.T
    x = x - x.mean(0)
    layer = nn.Linear(6, 5, bias=False)
    chain = decompose(layer, "data", (2,), moments(layer, x))
    product = chain[1].weight @ chain[0].weight
    c = (x.T @ x / len(x)).double()
    values, vectors = torch.linalg.eigh(c)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    u, s, v = torch.linalg.svd(layer.weight.detach().double() @ root, full_matrices=False)
    expected = u[:, :2] @ torch.diag(s[:2]) @ v[:2] @ torch.linalg.inv(root)
    torch.testing.assert_close(product.double(), expected, atol=1e-4, rtol=1e-3)
    plain = decompose(layer, "svd", (2,))
    goal = layer(x)
    assert (chain(x) - goal).norm() < 0.9 * (plain(x) - goal).norm()


def test_data_aware_chains_keep_the_mean_of_outputs():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.rand(8, 4, 8, 8) + 2
    found = decompose(layer, "data", (1,), moments(layer, x))(x)
    torch.testing.assert_close(found.mean((0, 2, 3)), layer(x).mean((0, 2, 3)), atol=1e-4, rtol=1e-4)


def test_drawn_factors_know_nothing_but_the_scale():
    layer = nn.Conv2d(32, 32, 3, padding=1)
    x = torch.randn(4, 32, 8, 8)
    chain = decompose(layer, "tucker", (16, 16), random=torch.Generator().manual_seed(0))
    goal, found = layer(x).detach(), chain(x).detach()
    assert 0.5 < float(found.std() / goal.std()) < 2
    assert abs(float(torch.corrcoef(torch.stack([goal.flatten(), found.flatten()]))[0, 1])) < 0.1
    again = decompose(layer, "tucker", (16, 16), random=torch.Generator().manual_seed(0))
    assert torch.equal(chain[0].weight, again[0].weight)


# --- ranks ------------------------------------------------------------------------------------------


def test_energy_keeps_the_fewest_that_hold_the_share():
    values = np.sqrt([5.0, 3.0, 1.0, 1.0])
    assert [lowrank_ranks.energy(values, share) for share in (0.1, 0.5, 0.51, 0.8, 0.9, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        4,
    ]


def test_noise_threshold_of_a_square_matrix():
    rng = np.random.default_rng(0)
    values = np.linalg.svd(rng.normal(0, 1, (60, 60)), compute_uv=False)
    assert lowrank_ranks.threshold(values, (60, 60)) == 0
    values[:3] = 1.1 * 2.86 * np.median(values), 3.0 * np.median(values), 2.8 * np.median(values)
    assert lowrank_ranks.threshold(values, (60, 60)) == 2


def test_variational_bayes_constant():
    """tau of a square matrix is 2.5129 (Nakajima et al. 2013, section 3.2), and nearly that times sqrt(alpha) for others."""
    assert lowrank_ranks._tau(1.0) == pytest.approx(2.5129, abs=1e-4)
    assert lowrank_ranks._tau(0.25) == pytest.approx(2.5129 * 0.5, rel=0.02)


@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (40, 40)])
def test_variational_bayes_finds_a_planted_rank_and_the_noise(shape):
    rng = np.random.default_rng(3)
    signal = rng.normal(size=(shape[0], 4)) @ rng.normal(size=(4, shape[1]))
    u, values, v = np.linalg.svd(signal + rng.normal(0, 0.5, shape), full_matrices=False)
    kept, variance = lowrank_ranks.evbmf(values, shape)
    assert len(kept) == 4 and variance == pytest.approx(0.25, rel=0.12)
    lost = [np.linalg.norm((u[:, :4] * s) @ v[:4] - signal) for s in (kept, values[:4])]
    assert lost[0] < lost[1]  # shrinking brings it nearer to the truth
    nothing, _ = lowrank_ranks.evbmf(np.linalg.svd(rng.normal(0, 0.5, shape), compute_uv=False), shape)
    assert len(nothing) == 0
    assert len(lowrank_ranks.evbmf(np.zeros(min(shape)), shape)[0]) == 0


def test_variational_bayes_is_the_minimum_of_its_free_energy():
    """With the noise known: each kept value solves the stationary condition, and what is dropped lies under the edge."""
    values, variance = np.array([9.0, 6.0, 4.0, 1.5]), 0.09
    kept, _ = lowrank_ranks.evbmf(values, (4, 9), variance)
    tau = lowrank_ranks._tau(4 / 9)
    edge = math.sqrt(9 * variance * (1 + tau) * (1 + 4 / 9 / tau))
    assert len(kept) == int((values > edge).sum()) == 3
    for value, shrunk in zip(values, kept, strict=False):
        # g (g - (1 - (L + M) s2 / v^2) v) + L M s2^2 / v^2 = 0
        assert shrunk * (
            shrunk - (1 - 13 * variance / value**2) * value
        ) + 36 * variance**2 / value**2 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("sizes", [(12, 3, 1), (3, 12, 1), (4, 9, 3)])
def test_spectra_are_singular_values_of_the_matrices_that_are_cut(sizes):
    layer = nn.Conv2d(sizes[1], sizes[0], sizes[2])
    x = torch.randn(2, sizes[1], 6, 6)
    seen = lowrank_plan.Seen(layer, x, moments(layer, x), tuple(x.shape))
    for kind in ("svd", "spatial", "tucker"):
        if lowrank.fits(layer, kind):
            for values, shape in zip(
                lowrank_plan.spectra(seen, kind), lowrank_plan.shapes(layer, kind), strict=True
            ):
                assert values.shape == (min(shape),)
                assert float((values**2).sum()) == pytest.approx(
                    float((layer.weight.detach() ** 2).sum()), rel=1e-5
                )
                lowrank_ranks.evbmf(values, shape)
    assert len(lowrank_plan.spectra(seen, "data")[0]) == full_ranks(layer, "data")[0]


# --- choices ----------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.deep = nn.Conv2d(16, 32, 3, 2, 1)
        self.point = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.point(self.deep(self.stem(x)).relu()).relu().mean((2, 3)))


def problem(seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    model = Small()
    with torch.no_grad():  # weights of nearly low rank, as trained ones are
        for part, rank in ((model.deep, 6), (model.point, 4)):
            weight = part.weight.flatten(1)
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            s[rank:] *= 0.02
            part.weight.copy_((u * s @ v).view_as(part.weight))

    def batch(step):
        rng = np.random.default_rng([7, step])
        return torch.from_numpy(rng.random((8, 3, 12, 12), np.float32)), torch.from_numpy(
            rng.integers(0, 4, 8)
        )

    def evaluate(network):
        return {"top1": 0.5}

    return Problem(
        "small",
        model,
        torch.zeros(1, 3, 12, 12),
        batch,
        nn.functional.cross_entropy,
        evaluate,
        lambda *_: None,
        frozenset({"head"}),
    )


def run(work, **options):
    from edgekit.compression.methods import lowrank as method

    method.run(work, method.Options(**({"granularity": 1, "steps": 0} | options)))
    return work.facts[work.stage]


@pytest.mark.parametrize("kind", [*KINDS, "auto"])
def test_a_speedup_is_reached_and_every_chain_is_cheaper(kind):
    made = problem()
    work = begin(made)
    facts = run(work, kind=kind, speedup=1.3)
    before, after = macs(made.model, made.example), macs(work.model, made.example)
    assert (facts["before"], facts["after"]) == (before, after)
    assert before / after >= 1.3
    assert facts["layers"] and all(c["cost"] < c["dense"] for c in facts["layers"])
    assert isinstance(work.model.head, nn.Linear)
    x, _ = made.batch(0)
    assert work.model(x).shape == (8, 4)


def test_an_error_budget_takes_what_costs_nothing():
    work = begin(problem())
    facts = run(work, kind="data", error=0.02)
    found = {c["layer"]: c for c in facts["layers"]}
    assert set(found) == {"deep", "point"} and all(c["error"] <= 0.02 for c in found.values())
    assert found["point"]["ranks"][0] <= 6
    x, _ = work.problem.batch(3)
    with torch.no_grad():
        goal, got = work.teacher(x), work.model(x)
    assert (got - goal).norm() < 0.1 * (goal - goal.mean(0)).norm() + 0.02 * goal.norm()


def test_random_ranks_save_as_much_and_err_more():
    chosen = run(begin(problem()), speedup=1.5)
    drawn = [run(begin(problem(), seed=seed), ranks="random", speedup=1.5) for seed in range(3)]
    assert all(chosen["after"] * 0.85 < each["after"] <= chosen["before"] / 1.5 for each in drawn)
    lost = [sum(c["error"] for c in each["layers"]) for each in (chosen, *drawn)]
    assert min(lost) == lost[0] and max(lost) > 2 * lost[0]


@pytest.mark.parametrize("ranks", ["energy", "evbmf", "noise", "ratio"])
def test_rules_are_kept_to_break_even(ranks):
    facts = run(begin(problem()), kind="tucker", ranks=ranks, value=0.6)
    assert all(c["cost"] < c["dense"] for c in facts["layers"])
    none = run(begin(problem()), kind="svd", ranks="ratio", value=1.0)
    assert none["layers"] == [] and none["before"] == none["after"]


def test_ranks_are_multiples_of_the_granularity_and_masks_of_what_is_gone_are_dropped():
    work = begin(problem())
    work.masks = {
        name: torch.ones_like(p)
        for name, p in work.model.named_parameters()
        if name in ("deep.weight", "stem.0.weight")
    }
    facts = run(work, kind="tucker", speedup=1.2, granularity=4, layers=("deep",), steps=2)
    assert [c["layer"] for c in facts["layers"]] == ["deep"]
    assert all(r % 4 == 0 for r in facts["layers"][0]["ranks"])
    assert set(work.masks) == {"stem.0.weight"} and facts["masks_dropped"] == ["deep.weight"]


def test_a_run_is_taken_up_where_it_ended(tmp_path):
    states = []
    for _ in range(2):
        work = begin(problem(), folder=tmp_path)
        run(work, kind="auto", speedup=1.3, steps=3)
        states.append({k: v.clone() for k, v in work.model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_cannot_be_done_is_one_line():
    with pytest.raises(UsageError, match=r"speedup 50: .* reaches .* at most"):
        run(begin(problem()), kind="svd", speedup=50)
    with pytest.raises(UsageError, match="layer 'depe': not in the network"):
        run(begin(problem()), layers=("depe",))
    for wrong in ({"kind": "qr"}, {"ranks": "best"}, {"speedup": 0.5}, {"error": 0.0}, {"ranks": "random"}):
        with pytest.raises(ValueError, match="must be"):
            run(begin(problem()), **wrong)


def test_a_speedup_on_a_board_is_that_of_the_exported_network():
    made = problem()
    wide = nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 4, 1)
    )
    made = dataclasses.replace(
        made, model=wide, example=torch.zeros(1, 3, 48, 48), head=frozenset({"4"}),
        write=lambda net, path: write_onnx(net, path, (torch.zeros(1, 3, 48, 48),), ["images"], ["output"]),
    )  # fmt: skip
    work = begin(made, target=Target.load("rpi5"), precision="int8")
    facts = run(work, kind="tucker", speedup=1.2, granularity=0)
    assert facts["unit"] == "s" and 0 < facts["after"] <= facts["before"] / 1.2
    assert facts["layers"] and all(r % 8 == 0 for c in facts["layers"] for r in c["ranks"])


def test_a_network_from_onnx_is_factorised_and_written_again(tmp_path):
    made = problem()
    write_onnx(made.model.eval(), tmp_path / "net.onnx", (made.example,), ["images"], ["logits"])
    network = from_onnx(frontends.load(tmp_path / "net.onnx"))
    work = begin(dataclasses.replace(made, model=network, head=heads(network)))
    facts = run(work, kind="data", error=0.02)
    assert len(facts["layers"]) == 2 and not {c["layer"] for c in facts["layers"]} & heads(network)
    to_onnx(work.model, tmp_path / "small.onnx")
    again = from_onnx(frontends.load(tmp_path / "small.onnx"))
    x = made.batch(0)[0][:1]
    with torch.no_grad():
        torch.testing.assert_close(again(x), work.model(x), atol=1e-5, rtol=1e-4)
    assert macs(again, made.example) == facts["after"]


def test_a_boards_cost_model_says_what_pays():
    board = Target.load("rpi5")
    cost = lowrank_plan.estimated_cost(board, "int8")
    layer = nn.Conv2d(128, 128, 3, padding=1)
    dense = cost(layer, (1, 128, 28, 28))
    assert cost(lowrank.skeleton(layer, "tucker", (32, 32)), (1, 128, 28, 28)) < dense
    tiny = nn.Conv2d(8, 8, 3, padding=1)  # fewer products, but more launches and more to move
    chain = lowrank.skeleton(tiny, "tucker", (4, 4))
    assert macs(chain, torch.zeros(1, 8, 14, 14)) < macs(tiny, torch.zeros(1, 8, 14, 14))
    assert cost(chain, (1, 8, 14, 14)) > cost(tiny, (1, 8, 14, 14))
