"""Equalization: the float network stays equal, whatever reads the tensor, and refuses what cannot absorb it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.quant import equalize as eq
from edgekit.quant.annotate import quant
from edgekit.quant.calibrate import calibrate
from edgekit.quant.simulate import run
from edgekit.quant.stats import Accumulator, TensorStats
from tests.tensorrt_graphs import graph

CHANNELS = 8
SHAPE = (1, CHANNELS, 6, 6)

ACTIVATIONS = {
    "none": ("", "a"),
    "Relu": ("v = Relu(a)", "v"),
    "LeakyRelu": ("v = LeakyRelu <alpha=0.1> (a)", "v"),
    "SiLU": ("g = Sigmoid(a) \n v = Mul(a, g)", "v"),
}
PADS = "<pads=[1,1,1,1]>"
READERS = {
    "conv": f"y = Conv {PADS} (V, w2, b2)",
    "conv without bias": f"y = Conv {PADS} (V, w2)",
    "depthwise": "y = Conv <group=8, pads=[1,1,1,1]> (V, d2, b2)",
    "grouped": "y = Conv <group=2, pads=[1,1,1,1]> (V, h2, b2)",
    "wide depthwise": "y = Conv <group=8, pads=[1,1,1,1]> (V, m2)",
    "MaxPool": f"p = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (V) \n y = Conv {PADS} (p, w2, b2)",
    "AveragePool": f"p = AveragePool <kernel_shape=[2,2], strides=[2,2]> (V) \n y = Conv {PADS} (p, w2, b2)",
    "GlobalAveragePool": "p = GlobalAveragePool(V) \n y = Conv <pads=[1,1,1,1]> (p, w2, b2)",
    "Resize": f'p = Resize <mode="linear"> (V, , scales) \n y = Conv {PADS} (p, w2, b2)',
    "Relu twice": f"p = Relu(V) \n q = Relu(p) \n y = Conv {PADS} (q, w2, b2)",
    "Concat": f"o = Conv {PADS} (x, w3, b3) \n n = Concat <axis=1> (o, V) \n y = Conv {PADS} (n, c2, b2)",
    "Concat of pools": f"p = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (V) \n n = Concat <axis=1> (V, p) \n "
    f"y = Conv {PADS} (n, c2, b2)",
    "two readers": f"z = Conv {PADS} (V, w2, b2) \n u = Conv <group=8, pads=[1,1,1,1]> (V, d2, b2) \n y = Add(z, u)",
    "a weight for two": f"z = Conv {PADS} (V, w2, b2) \n u = Conv {PADS} (x, w2, b2) \n y = Add(z, u)",
}
REFUSED = {
    "Add": f"s = Add(V, x) \n y = Conv {PADS} (s, w2, b2)",
    "output": f"y = Conv {PADS} (V, w2, b2)",
    "Sigmoid": f"s = Sigmoid(V) \n y = Conv {PADS} (s, w2, b2)",
    "Concat with itself": f"n = Concat <axis=1> (V, V) \n y = Conv {PADS} (n, c2, b2)",
    "Concat over rows": f"n = Concat <axis=2> (V, V) \n y = Conv {PADS} (n, w2, b2)",
    "one of two": f"z = Conv {PADS} (V, w2, b2) \n y = Add(z, V)",
    "behind a pool": f"p = MaxPool <kernel_shape=[1,1]> (V) \n z = Conv {PADS} (p, w2, b2) \n y = Add(z, p)",
    "as a weight": "y = Conv (k, V)",
}


def weights(seed: int) -> dict[str, np.ndarray]:
    """w: whole, d: depthwise, m: depthwise with two results, h: in halves, c: over 16 channels, b: biases."""
    rng = np.random.default_rng(seed)
    spread = 10.0 ** rng.uniform(-2, 1, (CHANNELS, 1, 1, 1))
    sizes = {"w": (8, 8), "d": (8, 1), "m": (16, 1), "h": (8, 4), "c": (8, 16)}
    found: dict[str, np.ndarray] = {
        f"{kind}{i}": rng.standard_normal((*size, 3, 3)).astype(np.float32) / 3
        for kind, size in sizes.items()
        for i in (1, 2, 3)
    }
    found |= {f"b{i}": rng.standard_normal(CHANNELS).astype(np.float32) for i in (1, 2, 3)}
    found["w1"] = (found["w1"] * spread).astype(np.float32)
    found["b1"] = (found["b1"] * spread.reshape(-1)).astype(np.float32)
    found["d1"] = (found["d1"] * spread).astype(np.float32)
    return found | {
        "scales": np.array([1, 1, 2, 2], np.float32),
        "k": rng.standard_normal((1, 8, 6, 6)).astype(np.float32),
    }


def network(body: str, seed: int = 0, outputs: Sequence[str] = ("y",)) -> ir.Model:
    body = "\n".join(line for line in body.splitlines() if line.strip())
    words = set(body.replace(",", " ").replace("(", " ").replace(")", " ").split())
    kept = {name: array for name, array in weights(seed).items() if name in words}
    made = graph(body, {"x": SHAPE}, dict.fromkeys(outputs, SHAPE), kept, opset=19)
    for value in made.graph.output:
        value.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True))


def chain(activation: str, reader: str, *, depthwise: bool = False, seed: int = 0) -> ir.Model:
    """x -> conv `a` -> activation -> what `reader` says -> y."""
    line, value = ACTIVATIONS[activation]
    first = "a = Conv <group=8, pads=[1,1,1,1]> (x, d1, b1)" if depthwise else f"a = Conv {PADS} (x, w1, b1)"
    outputs = ["y", value] if reader == "output" else ["y"]
    text = {**READERS, **REFUSED}[reader].replace("V", value)
    return network(f"{first} \n {line} \n {text}", seed, outputs)


def pictures(count: int = 3, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(count)]


def assert_equal_networks(before: ir.Model, after: ir.Model) -> None:
    """Equal but for float32 rounding, on pictures of several sizes."""
    feeds = [{"x": feed["x"] * scale} for feed in pictures(2, seed=9) for scale in (0.1, 1.0, 10.0)]
    for a, b in zip(run(before, feeds), run(after, feeds), strict=True):
        for name, expected in a.items():
            assert np.abs(b[name] - expected).max() <= 2e-6 * max(np.abs(expected).max(), 1e-3) * 8


def equalized(
    model: ir.Model, names: Sequence[str] | None = None
) -> tuple[ir.Model, dict[str, str], list[eq.Candidate]]:
    stats = calibrate(model, pictures())
    chosen = [c for c in eq.candidates(model, stats) if names is None or c.conv in names]
    return (*eq.equalize(model, chosen, stats), chosen)


# --- the network stays equal ---------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_float_network_stays_equal_and_channels_get_alike(activation: str, reader: str) -> None:
    model = chain(activation, reader)
    before = ir.to_proto(model).SerializeToString()
    stats = calibrate(model, pictures())
    after, _changed, chosen = equalized(model, ["a"])
    assert ir.to_proto(model).SerializeToString() == before, "the model itself is not changed"
    assert [c.conv for c in chosen] == ["a"]
    assert (chosen[0].gate is not None) is (activation == "SiLU")
    assert_equal_networks(model, after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    value = chosen[0].value
    now = calibrate(after, pictures(), only={value})[value]
    assert eq.imbalance(now) < 0.6 * eq.imbalance(stats[value]), "the wide spread is gone"


@settings(max_examples=60, deadline=None)
@given(
    activation=st.sampled_from(list(ACTIVATIONS)),
    reader=st.sampled_from(list(READERS)),
    depthwise=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_equality_on_random_networks(activation: str, reader: str, depthwise: bool, seed: int) -> None:
    model = chain(activation, reader, depthwise=depthwise, seed=seed)
    after, changed, chosen = equalized(model)  # whatever can be, all of it at once
    assert "a" in {c.conv for c in chosen}
    assert_equal_networks(model, after)
    # exactly those values hold other numbers whose statistics are asked for again
    names = [str(o.name) for node in after.graph for o in node.outputs]
    assert set(changed) <= set(names)
    known = {str(o.name) for node in model.graph for o in node.outputs}
    kept = [n for n in names if n in known and n not in changed]
    feed = pictures(1, seed=4)
    for a, b in zip(run(model, feed, kept), run(after, feed, kept), strict=True):
        for name in kept:
            assert np.abs(a[name] - b[name]).max() <= 1e-5 * max(np.abs(a[name]).max(), 1e-3), name


@pytest.mark.parametrize("activation", ["SiLU", "Relu"])
def test_two_equalized_tensors_in_one_concat(activation: str) -> None:
    line, _value = ACTIVATIONS[activation]
    other = line.replace("v =", "t =").replace("g =", "h =").replace("(a", "(o").replace(" g)", " h)")
    model = network(
        f"a = Conv {PADS} (x, w1, b1) \n o = Conv {PADS} (x, d9, b1) \n {line} \n {other} \n "
        f"n = Concat <axis=1> (t, v) \n y = Conv {PADS} (n, c2, b2)".replace(
            f"{PADS} (x, d9", "<group=8, pads=[1,1,1,1]> (x, d1"
        )
    )
    after, changed, chosen = equalized(model)
    assert {c.conv for c in chosen} == {"a", "o"}
    assert {"a", "o", "v", "t", "n"} <= set(changed)
    assert_equal_networks(model, after)
    # one after the other gives the same network as both at once
    both = calibrate(after, pictures(), only={"n"})["n"]
    single = [calibrate(equalized(model, [name])[0], pictures(), only={"n"})["n"] for name in "ao"]
    np.testing.assert_allclose(both.channel_high[8:], single[0].channel_high[8:], rtol=1e-5)
    np.testing.assert_allclose(both.channel_high[:8], single[1].channel_high[:8], rtol=1e-5)


def test_a_chain_of_equalized_tensors() -> None:
    model = network(
        f"a = Conv {PADS} (x, w1, b1) \n g = Sigmoid(a) \n v = Mul(a, g) \n o = Conv {PADS} (v, w3, b3) \n "
        f"r = Relu(o) \n y = Conv {PADS} (r, w2, b2)"
    )
    after, _, chosen = equalized(model)
    assert {c.conv for c in chosen} == {"a", "o"}
    assert_equal_networks(model, after)


def test_nothing_chosen_is_the_network_itself() -> None:
    model = chain("SiLU", "conv")
    after, changed = eq.equalize(model, [], {})
    assert changed == {} and len(after.graph) == len(model.graph)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", REFUSED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_reader_that_cannot_multiply_back_is_refused(activation: str, reader: str) -> None:
    model = chain(activation, reader)
    found = {c.conv for c in eq.candidates(model, calibrate(model, pictures()))}
    if (activation, reader) == ("none", "Sigmoid"):  # a Sigmoid alone is no SiLU
        assert found == set()
    assert "a" not in found


def test_a_convolution_that_others_see_before_its_activation_is_refused() -> None:
    body = f"a = Conv {PADS} (x, w1, b1) \n {ACTIVATIONS['SiLU'][0]} \n y = Conv {PADS} (v, w2, b2)"
    for outputs in (["y", "a"], ["y", "g"], ["y", "v"]):
        model = network(body, outputs=outputs)
        assert eq.candidates(model, calibrate(model, pictures())) == [], outputs
    model = network(body)
    assert [c.conv for c in eq.candidates(model, calibrate(model, pictures()))] == ["a"]


def test_computed_weights_and_biases_are_refused() -> None:
    tail = f"r = Relu(a) \n y = Conv {PADS} (r, w2, b2)"
    for first in (f"u = Neg(w1) \n a = Conv {PADS} (x, u, b1)", f"u = Neg(b1) \n a = Conv {PADS} (x, w1, u)"):
        model = network(f"{first} \n {tail}")
        assert eq.candidates(model, calibrate(model, pictures())) == [], first
    model = network(
        f"a = Conv {PADS} (x, w1, b1) \n r = Relu(a) \n u = Neg(w2) \n y = Conv {PADS} (r, u, b2)"
    )
    assert eq.candidates(model, calibrate(model, pictures())) == []


def test_a_tensor_without_statistics_is_no_candidate() -> None:
    model = chain("Relu", "conv")
    stats = calibrate(model, pictures())
    assert eq.candidates(model, {name: s for name, s in stats.items() if name != "v"}) == []


# --- candidates ----------------------------------------------------------------------------------


def test_candidates_come_with_the_largest_gain_first() -> None:
    lines, spreads = [], (0.1, 3.0, 1.0, 0.1)
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    source = "x"
    for i, spread in enumerate(spreads):
        factor = np.exp(spread * rng.standard_normal((8, 1, 1, 1)))
        arrays[f"w{i}"] = (rng.standard_normal((8, 8, 3, 3)) / 8 * factor).astype(np.float32)
        lines.append(f"a{i} = Conv {PADS} ({source}, w{i}) \n r{i} = Relu(a{i})")
        source = f"r{i}"
    arrays["w9"] = arrays["w0"]
    lines.append(f"y = Conv {PADS} ({source}, w9)")
    made = graph(" \n ".join(lines), {"x": SHAPE}, {"y": SHAPE}, arrays, opset=19)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(made))
    stats = calibrate(model, pictures())
    found = eq.candidates(model, stats)
    assert {c.value for c in found} == {"r0", "r1", "r2", "r3"}
    assert found[0].value == "r1"
    assert [c.gain for c in found] == sorted((c.gain for c in found), reverse=True)
    for c in found:
        assert c.gain == eq.imbalance(stats[c.value])
    assert found == eq.candidates(model, dict(reversed(stats.items()))), "the order of statistics is nothing"


def test_imbalance_by_hand() -> None:
    array = np.zeros((1, 4, 1, 2), np.float32)
    array[0, :, 0] = [[-1, 1], [0, 4], [-50, 50], [1, 3]]
    # spans with zero included: 2, 4, 100, 3; their median is 3.5
    assert eq.imbalance(statistics(array)) == pytest.approx(100 / 3.5)


# --- factors -------------------------------------------------------------------------------------


def statistics(array: np.ndarray) -> TensorStats:
    gathered = Accumulator()
    assert gathered.add(array)
    return gathered.stats()


def random_stats(seed: int) -> TensorStats:
    rng = np.random.default_rng(seed)
    channels = int(rng.integers(1, 24))
    reach = 10.0 ** rng.uniform(-3, 2, (channels, 2))
    reach[rng.random((channels, 2)) < 0.1] = 0
    array = np.stack([-reach[:, 0], reach[:, 1]], axis=1) * np.where(rng.random() < 0.2, [0, 1], [1, 1])
    return statistics(array.reshape(1, channels, 1, 2).astype(np.float32))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10_000), gated=st.booleans())
def test_factors_are_exact_in_int8(seed: int, gated: bool) -> None:
    found = eq.factors(random_stats(seed), random_stats(seed), gated)
    assert found.dtype == np.float32
    scale = float(found.max()) / eq.STEPS
    assert math.frexp(scale)[0] == 0.5, "the unit is a power of two"
    codes = np.rint(found / scale)
    assert codes.min() >= 1 and codes.max() == 127
    assert np.array_equal((codes.astype(np.int8) * np.float32(scale)).astype(np.float32), found)


@pytest.mark.parametrize("seed", range(4))
def test_the_gate_constant_is_its_codes(seed: int) -> None:
    after, _, (candidate,) = equalized(chain("SiLU", "conv", seed=seed))
    (factor,) = (v for name, v in after.graph.initializers.items() if name.endswith("_factor"))
    params = quant(factor)
    assert params is not None and params.axis is None and params.zero_point == (0,)
    numbers = factor.const_value.numpy()
    codes = np.rint(numbers / np.float32(params.scale[0])).astype(np.int8)
    assert np.array_equal(codes * np.float32(params.scale[0]), numbers)
    assert np.array_equal(eq.factors_of(after)[candidate.conv], numbers.reshape(-1))


def cheapest(stats: TensorStats, gated: bool) -> tuple[float, list[int]]:
    """(mean squared ratio of scales, units) of the best shape, channel by channel, one unit at a time."""
    lows = [
        max(min(-float(v), eq.GATE) if gated else -float(v), 1e-12) for v in np.minimum(stats.channel_low, 0)
    ]
    highs = [max(float(v), 1e-12) for v in np.maximum(stats.channel_high, 0)]
    best: tuple[float, list[int]] = (math.inf, [])
    for ratio in eq.SHAPES:
        # the range [-ratio * top, top] holds the neediest channel undivided: 127 units
        top = max(max(low / ratio, high) for low, high in zip(lows, highs, strict=True))
        units, cost = [], 0.0
        for low, high in zip(lows, highs, strict=True):
            unit = next(
                n
                for n in itertools.count(1)
                if max(low / ratio, high) <= n / 127 * top * (1 + 1e-6 / n) or n == 127
            )
            units.append(unit)
            cost += (unit / 127 * top * (1 + ratio) / (low + high)) ** 2 / len(lows)
        if cost < best[0]:
            best = cost, units
    return best


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), gated=st.booleans())
def test_the_shape_of_the_range_is_the_best_of_all(seed: int, gated: bool) -> None:
    stats = random_stats(seed)
    _, units = cheapest(stats, gated)
    found = eq.factors(stats, stats, gated)
    assert np.array_equal(found / found.max() * 127, np.asarray(units, np.float32)) or np.allclose(
        found / found.max() * 127, units, atol=0.01
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_divided_channels_fit_a_range_that_wastes_less(seed: int) -> None:
    stats = random_stats(seed)
    scale = eq.factors(stats, stats, False)
    low, high = np.minimum(stats.channel_low, 0), np.maximum(stats.channel_high, 0)
    own = np.maximum(high - low, 1e-9)

    def noise(divided_by: np.ndarray) -> float:
        """Mean over channels of (its step / the step of a range of its own) squared."""
        span = (high / divided_by).max() - (low / divided_by).min()
        return float(np.mean((span * divided_by / own) ** 2))

    # powers of 127 at most: a channel that is nothing at all cannot be served
    live = own > own.max() / 100
    if live.all():
        assert noise(scale) <= noise(np.ones_like(scale)) * (1 + 1e-5)


def test_a_gate_needs_no_range_below_its_reach() -> None:
    # of channel 0 nothing below -8 matters: its low side is as small as that of channel 1
    array = np.array([[-400.0, 4.0], [-8.0, 4.0]], np.float32).reshape(1, 2, 1, 2)
    assert np.ptp(eq.factors(statistics(array), statistics(array), True)) == 0
    assert np.ptp(eq.factors(statistics(array), statistics(array), False)) > 0


def test_gated_range_by_hand() -> None:
    before = statistics(np.array([[-100.0, 6.0], [-2.0, 20.0]], np.float32).reshape(1, 2, 1, 2))
    scale = np.array([2.0, 4.0], np.float32)
    after = statistics(np.array([[-50.0, 3.0], [-0.5, 5.0]], np.float32).reshape(1, 2, 1, 2))
    assert eq.gated_range(before, scale, after) == (-4.0, 5.0)


def test_a_gate_of_the_networks_own_is_not_taken_for_one_of_ours() -> None:
    """Networks name values as they like: a Mul by a constant that writes "..._gate" is no equalization."""
    model = network(f"a = Conv {PADS} (x, w1, b1) \n a_gate = Mul(a, k) \n y = Conv {PADS} (a_gate, w2, b2)")
    assert eq.factors_of(model) == {}
    after, _, _ = equalized(chain("SiLU", "conv"))
    assert list(eq.factors_of(after)) == ["a"]
    body = f"a = Conv {PADS} (x, w1, b1) \n {ACTIVATIONS['SiLU'][0]} \n a_gate = Conv {PADS} (v, w2, b2)"
    model = network(f"{body} \n y = Conv {PADS} (a_gate, w3, b3)")
    after, changed, _ = equalized(model)
    assert [name for name, kind in changed.items() if kind == "gate"] == ["a_gate_"]
    assert_equal_networks(model, after)


@pytest.mark.parametrize("activation", ["Relu", "SiLU"])
def test_rows_instead_of_pictures(activation: str) -> None:
    line, value = ACTIVATIONS[activation]
    rng = np.random.default_rng(0)
    arrays = {
        name: (rng.standard_normal((8, 8, 3)) * 10 ** rng.uniform(-1, 1, (8, 1, 1))).astype(np.float32)
        for name in ("w1", "w2")
    }
    body = f"a = Conv <pads=[1,1]> (x, w1) \n {line} \n y = Conv <pads=[1,1]> ({value}, w2)"
    made = graph(body, {"x": (1, 8, 12)}, {"y": (1, 8, 12)}, arrays, opset=19)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(made))
    feeds = [{"x": rng.standard_normal((1, 8, 12)).astype(np.float32)} for _ in range(2)]
    stats = calibrate(model, feeds)
    chosen = eq.candidates(model, stats)
    assert [c.conv for c in chosen] == ["a"]
    after, _ = eq.equalize(model, chosen, stats)
    for a, b in zip(run(model, feeds), run(after, feeds), strict=True):
        assert a["y"].shape == b["y"].shape
        np.testing.assert_allclose(b["y"], a["y"], atol=2e-6 * np.abs(a["y"]).max() * 8)
