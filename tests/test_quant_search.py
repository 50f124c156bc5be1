"""The search on networks with planted faults: what it tries, keeps, gives back to float and records."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.backends.onnxruntime.lower import lower
from edgekit.quant import search as s
from edgekit.quant.annotate import quant
from edgekit.quant.calibrate import calibrate
from edgekit.quant.placement import Choices, place
from edgekit.quant.rules import Rules, rules_for
from edgekit.quant.sensitivity import output_error
from edgekit.quant.simulate import fake_quantized, run
from edgekit.target import Target
from tests.quant_graphs import params
from tests.tensorrt_graphs import graph
from tests.test_quant_placement import ARM, ORT, ORT_ARM, TRT

SHAPE = (1, 16, 8, 8)
PADS = "<pads=[1,1,1,1]>"
NATIVE = rules_for("native", Target.load("rpi5"))
LOUD = 3
"""The channel whose range is a hundred times that of the others."""
REPAIRABLE = (
    f"a = Conv {PADS} (x, w1, b1) \n g = Sigmoid(a) \n v = Mul(a, g) \n b = Conv {PADS} (v, w2, b2) \n "
    f"h = Sigmoid(b) \n w = Mul(b, h) \n y = Conv {PADS} (w, w3, b3)"
)
HOPELESS = (  # what is loud is read by an Add: nobody behind it can turn it down
    f"a = Conv {PADS} (x, w1, b1) \n v = Add(a, x) \n b = Conv {PADS} (v, w2, b2) \n r = Relu(b) \n "
    f"y = Conv {PADS} (r, w3, b3)"
)


def network(body: str, loud: float = 100.0) -> ir.Model:
    """Convolutions from x to y; channel LOUD of the first is `loud` times the others, and read as much softer."""
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": (rng.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32) for i in (1, 2, 3)}
    arrays |= {f"b{i}": (rng.standard_normal(16) / 4).astype(np.float32) for i in (1, 2, 3)}
    arrays["w1"][LOUD] *= loud
    arrays["b1"][LOUD] *= loud
    arrays["w2"][:, LOUD] /= loud
    made = graph(body, {"x": SHAPE}, {"y": SHAPE}, arrays, opset=19)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True))


def pictures(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(count)]


def passes(_: ir.Model) -> s.Look:
    return s.Look(True, 0.5, 0.0)


def refuses(_: ir.Model) -> s.Look:
    return s.Look(False, 0.1, 0.4, "AP dropped by 0.4")


class Counted:
    """A gate that remembers what it was asked."""

    def __init__(self, gate: Callable[[ir.Model], s.Look]) -> None:
        self.gate, self.asked = gate, list[ir.Model]()

    def __call__(self, model: ir.Model) -> s.Look:
        self.asked.append(model)
        return self.gate(model)


def problem(model: ir.Model, gate: Callable[[ir.Model], s.Look], rules: Rules = ORT) -> s.Problem:
    feeds = pictures(6, 1)

    def restat(changed: ir.Model, names: object) -> dict:
        return dict(calibrate(changed, feeds, only=set(names)))  # type: ignore[call-overload]

    return s.Problem(
        model, calibrate(model, feeds), rules, feeds[:4], feeds[4:], restat, gate, cost=lambda _: 0.25
    )


def quiet(what: str, done: int, of: int) -> None:
    assert what and 0 <= done <= of


def error_of(exact: ir.Model, model: ir.Model) -> float:
    """Output error on pictures that no search has seen."""
    feeds = pictures(4, 99)
    pairs = zip(run(exact, feeds), run(fake_quantized(model), feeds), strict=True)
    return float(np.mean([output_error(a, b) for a, b in pairs]))


def within(exact: ir.Model, limit: float) -> Callable[[ir.Model], s.Look]:
    def gate(model: ir.Model) -> s.Look:
        error = error_of(exact, model)
        return s.Look(error <= limit, 1 - error, error, f"error {error:.2g}")

    return gate


@functools.lru_cache(maxsize=1)
def repaired() -> tuple[s.Quantized, int]:
    """The search of the network that can be repaired, by a gate that passes; and how often that was asked."""
    gate = Counted(passes)
    return s.search(problem(network(REPAIRABLE), gate), quiet), len(gate.asked)


# --- repairs -------------------------------------------------------------------------------------


def test_a_loud_channel_is_equalized() -> None:
    model = network(REPAIRABLE)
    found, _ = repaired()
    assert any(step.startswith("equalize v (node 3 of 7, SiLU)") for step in found.steps), found.steps
    plain = place(model, calibrate(model, pictures(6, 1)), ORT, Choices())
    assert error_of(model, found.model) < error_of(model, plain) / 4
    # float twins: the exact network computes what the given one does
    for a, b in zip(run(model, pictures(2, 5)), run(found.exact, pictures(2, 5)), strict=True):
        np.testing.assert_allclose(b["y"], a["y"], atol=1e-5 * np.abs(a["y"]).max())
    assert not found.choices.float_nodes


def test_a_network_without_a_fault_is_not_equalized() -> None:
    found = s.search(problem(network(REPAIRABLE, loud=1.0), passes), quiet)
    assert not [step for step in found.steps if step.startswith("equalize")]


def test_every_step_kept_lowered_the_error() -> None:
    found, _ = repaired()
    kept = [t for t in found.trials if t.kept]
    assert len(kept) >= 3
    errors = [t.error for t in kept[:-1]]  # the last is the look of the gate at what was found before
    assert all(b < a * (1 - s.CLEARLY) for a, b in itertools.pairwise(errors))
    assert kept[-1].error == found.error == errors[-1]
    for trial in found.trials:
        if not trial.kept and not trial.label.startswith("in integers"):
            assert trial.error >= min(errors) * (1 - s.CLEARLY)


# --- the gate ------------------------------------------------------------------------------------


def test_a_gate_that_passes_is_asked_once() -> None:
    found, asked = repaired()
    assert asked == 1
    assert found.look == s.Look(True, 0.5, 0.0)
    last = found.trials[-1]
    assert (last.passed, last.metric, last.drop, last.kept) == (True, 0.5, 0.0, True)
    assert [t for t in found.trials if t.passed is not None] == [last]
    assert found.ranked and found.ranked == tuple(sorted(found.ranked, key=lambda r: -r[1]))


def sums_are_rounded(model: ir.Model) -> bool:
    return any(quant(v) is not None for v in (model.graph.node(i).outputs[0] for i in (0, 3)))


@pytest.mark.parametrize("allowed", [True, False])
def test_curves_stay_only_where_tables_cost_too_much(allowed: bool) -> None:
    """By rules that know both. A gate that does not allow it is asked once more, and the result is the one before."""
    gate = Counted(lambda m: s.Look(allowed or not sums_are_rounded(m), 0.5, 0.0))
    found = s.search(problem(network(REPAIRABLE, loud=1.0), gate, NATIVE), quiet)
    curves, *_, tables = [t for t in found.trials if t.label in ("activations straight from sums", s.TABLES)]
    assert curves.kept and tables.label == s.TABLES and tables.kept == tables.passed == allowed
    assert len(gate.asked) == 2 and tables.error < s.NOISY
    assert found.choices.curves != allowed and sums_are_rounded(found.model) == allowed
    assert found.look.passed and found.ranked


def test_without_a_verdict_nothing_goes_back_to_float() -> None:
    gate = Counted(lambda _: s.Look(None, reason="no labels"))
    found = s.search(problem(network(HOPELESS), gate), quiet)
    assert len(gate.asked) == 1 and found.look.passed is None and not found.choices.float_nodes


def test_what_nothing_repairs_goes_back_to_float() -> None:
    model = network(HOPELESS)
    whole = s.search(problem(model, passes), quiet)
    gate = Counted(within(model, error_of(model, whole.model) / 5))
    found = s.search(problem(model, gate), quiet)
    assert found.look.passed is True
    assert found.choices.float_nodes
    marked = params(found.model)
    assert "a" not in marked, "the value that was loud is float"
    assert {"r", "y"} <= set(marked), "and not everything is"
    assert any("nodes in float" in step for step in found.steps)
    assert found.ranked[0][0] in ("v", "a")
    last = found.trials[-1]
    assert last.passed is True and last.integer_share is not None and last.integer_share < 1
    assert len([t for t in found.trials if t.passed is not None]) == len(gate.asked) <= 2 + len(s.ISLANDS)
    assert error_of(model, found.model) <= error_of(model, whole.model) / 5


def test_a_gate_that_always_refuses_leaves_a_result_that_did_not_pass() -> None:
    gate = Counted(refuses)
    found = s.search(problem(network(REPAIRABLE), gate), quiet)
    assert found.look == refuses(found.model)
    looked = [t for t in found.trials if t.passed is not None]
    assert len(looked) == len(gate.asked) >= 3
    assert not any(t.passed for t in looked)
    assert all(t.integer_share for t in found.trials if t.kept), (
        "a network without integers is none to look at"
    )
    shares = [t.integer_share for t in looked if t.integer_share is not None]
    assert shares == sorted(shares, reverse=True), "more and more goes back to float"
    assert "most of the error comes from" in s.blame(found)


def test_plain_is_one_scheme_and_one_look() -> None:
    gate = Counted(refuses)
    found = s.plain(problem(network(REPAIRABLE), gate), "minmax")
    assert len(gate.asked) == 1 and found.look.passed is False
    assert found.steps == ("minmax ranges",) and found.choices == Choices(scheme="minmax", weights="minmax")
    (trial,) = found.trials
    assert trial.label == "minmax ranges" and trial.passed is False and trial.drop == 0.4
    # the loud channel is to blame, where it stands before or behind its activation
    assert {name for name, _ in found.ranked[:2]} & {"a", "v"}
    line = s.blame(found)
    assert "(node 1 of 7, Conv 3x3 16>16)" in line or "(node 3 of 7, SiLU)" in line
    assert "\n" not in line and "%" in line
    assert s.blame(replace(found, ranked=())) == "no single value stands out"


# --- other libraries -----------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [ORT_ARM, TRT, rules_for("litert", ARM)], ids=["arm", "tensorrt", "litert"])
def test_a_search_by_other_rules(rules: Rules) -> None:
    model = network(REPAIRABLE)
    found = s.search(problem(model, passes, rules), quiet)
    plain = place(model, calibrate(model, pictures(6, 1)), rules, Choices(scheme="minmax"))
    assert error_of(model, found.model) < error_of(model, plain)
    assert any(step.startswith("equalize") for step in found.steps)


def test_carried_to_other_rules_ranges_and_repairs_stay() -> None:
    found, _ = repaired()
    carried = s.carry(found, ORT_ARM)
    assert params(carried) == params(found.model), "the rules differ in how codes are stored only"
    for name, value in found.model.graph.initializers.items():
        if quant(value) is not None and quant(value).axis is not None:  # type: ignore[union-attr]
            other = carried.graph.initializers[name]
            assert other.const_value.numpy().tobytes() == value.const_value.numpy().tobytes()
    before = params(found.model)
    s.carry(found, TRT)
    assert params(found.model) == before, "what was found is not changed"


def test_carried_to_seven_bits_weights_have_seven_bits() -> None:
    """Without VNNI two products meet in 16 bits: codes of 127 that a search for another library chose overflow."""
    found, _ = repaired()
    small = replace(ORT, weight_limit=64)
    carried = s.carry(found, small)
    seen = 0
    for value in carried.graph.initializers.values():
        chosen = quant(value)
        if chosen is None or chosen.axis is None:
            continue
        scale = np.asarray(chosen.scale).reshape([-1 if i == chosen.axis else 1 for i in range(4)])
        codes = np.rint(value.const_value.numpy() / scale)
        assert np.abs(codes).max() <= 64
        seen += 1
    assert seen == 3
    assert error_of(network(REPAIRABLE), carried) < 100 * found.error


# --- records, determinism ------------------------------------------------------------------------


def test_two_searches_give_the_same_bytes() -> None:
    target = Target.load("rpi5")
    first, _ = repaired()
    again = s.search(problem(network(REPAIRABLE), passes), quiet)
    payloads = [lower(found.model, target, "int8")[0].data for found in (first, again)]
    assert payloads[0] == payloads[1]
    assert (first.steps, first.choices, first.trials, first.ranked) == (
        again.steps,
        again.choices,
        again.trials,
        again.ranked,
    )


def test_two_searches_down_to_islands_give_the_same_bytes() -> None:
    found = [s.search(problem(network(HOPELESS), refuses), quiet) for _ in range(2)]
    payloads = [lower(f.model, ARM, "int8")[0].data for f in found]
    assert payloads[0] == payloads[1] and found[0].trials == found[1].trials


def test_trials_are_json_rows_of_all_that_was_looked_at() -> None:
    found, _ = repaired()
    rows = s.summary(found.trials)
    assert json.loads(json.dumps(rows)) == rows
    labels = [row["label"] for row in rows]
    assert labels[:3] == ["mse ranges", "percentile:99.99 ranges", "minmax ranges"]
    assert "ranges that know their SiLU" in labels
    assert {"adaround", "bias_correction"} <= set(labels)
    for row in rows:
        assert row["error"] >= 0 and isinstance(row["kept"], bool)
        assert None not in row.values()
        assert (row.get("seconds") == 0.25) is row["kept"]
        assert ("integer_share" in row) is row["kept"]


def test_values_are_called_by_number_and_kind() -> None:
    model = network(REPAIRABLE)
    assert s.describe(model, "a") == "a (node 1 of 7, Conv 3x3 16>16)"
    assert s.describe(model, "v") == "v (node 3 of 7, SiLU)"
    assert s.describe(model, "g") == "g (node 2 of 7, Sigmoid)"
    assert s.describe(model, "x") == "x (network input)"
    assert s.describe(model, "unknown") == "unknown"
