"""Graphs become programs of the native engine: operator by operator equal to what the annotations mean."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.backends.base import Payload
from edgekit.backends.native import layers, pointwise
from edgekit.backends.native import lower as lower_module
from edgekit.backends.native.engine import NativeExecutable
from edgekit.backends.native.format import decode
from edgekit.backends.native.lower import lower
from edgekit.errors import LoweringError, UsageError
from edgekit.host import backend_problem
from edgekit.passes.states import set_states
from edgekit.quant import simulate
from edgekit.quant.annotate import node_id, quant
from edgekit.quant.calibrate import calibrate
from edgekit.quant.lint import integer_share, lint
from edgekit.quant.placement import Choices, place
from edgekit.quant.rules import rules_for
from edgekit.spec import DType, QuantParams, StateSpec
from edgekit.target import Target
from tests.quant_graphs import BETWEEN, annotated, between, network, pictures, produced
from tests.tensorrt_graphs import graph

pytestmark = pytest.mark.skipif(bool(backend_problem("native")), reason="libedgekit.so was not built")

HOST = Target.load("host")
RULES = rules_for("native", HOST)
REFUSED = {"GlobalAveragePool", "Pad", "Transpose", "Expand", "Tile", "DepthToSpace"}
"""Operators between two convolutions that the engine has nothing for."""


def lowered(model: ir.Model, precision: str = "int8") -> Payload:
    (payload,) = lower(model, HOST, precision)
    return payload


def steps(payload: Payload) -> Counter[str]:
    return Counter(op.type.name for op in decode(payload.data).ops)


def run(payload: Payload, feed: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    engine = NativeExecutable(payload.data, **options)
    binding = engine.bind()
    for name, array in feed.items():
        binding.inputs[name][...] = array
    binding.run()
    return {name: np.array(array) for name, array in binding.outputs.items()}


@pytest.mark.parametrize("curves", [False, True])
@pytest.mark.parametrize("name", sorted(set(BETWEEN) - REFUSED))
def test_every_operator_gives_the_codes_that_the_annotations_mean(name: str, curves: bool) -> None:
    model = annotated(between(name), RULES, curves=curves)
    found = list(layers.check(model, pictures()[0]))
    assert len(found) >= 3
    for layer in found:
        most = 1 if layer.type not in ("softmax_f32", "dequantize") else 1e-5
        # a curve is not exact; numbers between two codes, which halves are, may round either way in the graph's floats
        share = 0.15 if layer.act == "curve" or layer.type == "bilinear" else 0.002
        assert layer.most <= most and layer.differing <= share * layer.elements + 1, layer


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_engine_cannot_take_is_refused_by_name(name: str) -> None:
    with pytest.raises(LoweringError, match="native: cannot take"):
        lowered(annotated(between(name), RULES))


@pytest.mark.parametrize("name", ["SiLU", "LeakyRelu", "AddRelu", "Concat", "AveragePool", "ResizeLinear"])
@pytest.mark.parametrize("precision", ["float32", "dynamic"])
def test_floats_are_those_of_the_graph(name: str, precision: str) -> None:
    model, feed = between(name), pictures()[0]
    (wanted,) = simulate.run(model, [feed])
    found = run(lowered(model, precision), feed)
    for output, numbers in wanted.items():
        reach = float(np.abs(numbers).max())
        assert np.abs(found[output] - numbers).max() <= reach * (1e-5 if precision == "float32" else 0.03)


def test_an_activation_is_a_part_of_its_convolution() -> None:
    for name, act in (("SiLU", "table"), ("HardSwish", "table"), ("Relu", ""), ("Clip", "")):
        payload = lowered(annotated(between(name), RULES))
        assert steps(payload) == {"quantize": 1, "conv": 2}, name
        first = next(op for op in decode(payload.data).ops if op.type.name == "conv")
        assert (first.act.name if first.act else "") == act
    curved = lowered(annotated(between("SiLU"), RULES, curves=True))
    assert [op.act.name for op in decode(curved.data).ops if op.type.name == "conv"] == ["curve", "none"]


@pytest.mark.parametrize("form", ["SiLU", "LeakyRelu"])
def test_a_value_that_stays_real_costs_no_step_of_its_own(form: str) -> None:
    """Its writer computes the activation in floats; who reads it writes codes again."""
    acts = {
        "SiLU": "{0}s = Sigmoid({0}) \n {1} = Mul({0}, {0}s) \n ",
        "LeakyRelu": "{1} = LeakyRelu <alpha=0.1> ({0}) \n ",
    }
    body = "a = Conv <pads=[1,1,1,1]> (x, w1, b1) \n " + acts[form].format("a", "b")
    body += "c = Conv <pads=[1,1,1,1], group=16> (b, d2, b2) \n " + acts[form].format("c", "d")
    model = network(body + "y = Conv <pads=[1,1,1,1]> (d, w3, b3)")
    placed = annotated(model, RULES, float_nodes=frozenset({node_id(produced(model, "c"))}))
    payload = lowered(placed)
    assert steps(payload) == {"quantize": 1, "conv": 2, "conv_f32": 1}
    wanted = "silu" if form == "SiLU" else "leaky_relu"
    assert [op.act.name for op in decode(payload.data).ops] == ["none", wanted, wanted, "none"]
    assert all(layer.differing <= 1 for layer in layers.check(placed, pictures()[0]))


def test_an_addition_is_a_part_of_the_later_convolution() -> None:
    for name in ("Add", "AddRelu"):
        ops = [
            op for op in decode(lowered(annotated(between(name), RULES)).data).ops if op.type.name == "conv"
        ]
        assert [len(op.inputs) for op in ops] == [1, 2, 1], name


def test_what_is_joined_is_written_where_it_belongs() -> None:
    """Concat and the slice of its channels move nothing."""
    assert steps(lowered(annotated(between("Concat"), RULES))) == {"quantize": 1, "conv": 3}


def test_larger_pools_go_on_from_smaller_ones() -> None:
    body = "".join(
        f"{v} = MaxPool <kernel_shape=[{k},{k}], pads=[{k // 2},{k // 2},{k // 2},{k // 2}]> (a) \n "
        for v, k in (("p", 5), ("q", 9), ("r", 13))
    )
    first, last = "a = Conv <pads=[1,1,1,1]> (x, w1, b1) \n ", "y = Conv <pads=[1,1,1,1]> (b, w2, b2)"
    model = annotated(network(f"{first}{body}m = Add(p, q) \n b = Add(m, r) \n {last}"), RULES)
    ops = [op for op in decode(lowered(model).data).ops if op.type.name == "max_pool"]
    assert [op.kernel for op in ops] == [(5, 5)] * 3
    assert all(
        layer.differing == 0 for layer in layers.check(model, pictures()[0]) if layer.type == "max_pool"
    )


def test_results_of_the_network_are_not_rounded() -> None:
    model = annotated(between("SiLU"), RULES)
    (output,) = model.graph.outputs
    assert quant(output) is None
    assert integer_share(lint(model, RULES)) == 1
    assert steps(lowered(model))["dequantize"] == 0


@pytest.mark.parametrize("isa", ["scalar", None])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_on_every_way(isa: str | None, threads: int) -> None:
    payload, feed = lowered(annotated(between("SiLU"), RULES, curves=True)), pictures()[0]
    first, second = run(payload, feed, isa="scalar"), run(payload, feed, isa=isa, threads=threads)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_precisions() -> None:
    with pytest.raises(UsageError, match="native payloads are built in float32, int8, dynamic"):
        lowered(between("Relu"), "float16")
    with pytest.raises(UsageError, match="no quantization parameters"):
        lowered(between("Relu"))


@pytest.mark.parametrize(("low", "high"), [(-0.28, 6.0), (-0.28, 160.0), (-0.28, 0.7)])
def test_curves_round_once(low: float, high: float) -> None:
    scale = (high - low) / 255
    params = QuantParams(DType.int8, (scale,), (round(-low / scale) - 128,))

    def silu(x: np.ndarray) -> np.ndarray:
        return np.asarray(x / (1 + np.exp(-np.clip(x, -80, 80))))

    x = np.linspace(-2 * high, 2 * high, 100_001)
    found = pointwise.curve_codes(x, pointwise.curve(silu, params, 1e4))
    apart = np.abs(found.astype(int) - pointwise.codes(silu(x), params))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.1


def moving(kernel: int) -> ir.Model:
    """A state that a convolution reads beside the rest of its picture: image, state -> logits, next."""
    rng = np.random.default_rng(3)

    def weights(*shape: int) -> np.ndarray:
        return rng.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype(np.float32)

    values = {
        "w0": weights(16, 3, 3, 3), "w1": weights(8, 16, kernel, kernel), "w2": weights(5, 8, 1, 1), "axis": np.array([1]),
        "zero": np.array([0]), "fold": np.array([2]), "end": np.array([16]),
    }  # fmt: skip
    body = f"""c = Conv <pads=[1,1,1,1]> (image, w0)
        a = Relu(c)
        state_next = Slice(a, zero, fold, axis)
        rest = Slice(a, fold, end, axis)
        joined = Concat <axis=1> (state, rest)
        d = Conv <pads=[{", ".join(str(kernel // 2) for _ in range(4))}]> (joined, w1)
        f = Relu(d)
        logits = Conv(f, w2)"""
    shapes: dict[str, tuple[int, ...]] = {"image": (1, 3, 8, 8), "state": (1, 2, 8, 8)}
    outputs: dict[str, tuple[int, ...]] = {"logits": (1, 5, 8, 8), "state_next": (1, 2, 8, 8)}
    model = ir.from_proto(graph(body, shapes, outputs, values, opset=19))
    set_states(model, [StateSpec("s", DType.float32, (1, 2, 8, 8), "state", "state_next")])
    return model


@pytest.mark.parametrize("kernel", [1, 3])
def test_states_are_codes_that_go_round(kernel: int) -> None:
    """A pointwise convolution reads its state where it lies; the next one is what the graph says, frame by frame."""
    model, rng = moving(kernel), np.random.default_rng(5)
    feeds = [
        {
            "image": rng.standard_normal((1, 3, 8, 8)).astype(np.float32),
            "state": abs(rng.standard_normal((1, 2, 8, 8))),
        }
        for _ in range(3)
    ]
    feeds = [{n: np.asarray(a, np.float32) for n, a in feed.items()} for feed in feeds]
    placed = place(model, calibrate(model, feeds), RULES, Choices(scheme="minmax"))
    payload = lowered(placed)
    found = decode(payload.data)
    assert steps(payload)["table"] == (
        1 if kernel == 1 else 3
    )  # the next state; else also both parts of the joined one
    assert [p.state for p in found.ports if p.name == "state"] == [3]
    assert [t.dtype for t in payload.inputs] == [DType.float32, DType.uint8]
    engine = NativeExecutable(payload.data)
    bindings = engine.bind_turns({"state": "state_next"})
    reference = simulate.fake_quantized(placed)
    params = quant(next(v for v in placed.graph.inputs if v.name == "state"))
    assert params is not None
    bindings[0].inputs["state"][...] = pointwise.codes(np.zeros(1), params)
    state = np.zeros((1, 2, 8, 8), np.float32)
    for i, feed in enumerate(feeds):
        bindings[i % 2].inputs["image"][...] = feed["image"]
        bindings[i % 2].run()
        (wanted,) = simulate.run(reference, [{"image": feed["image"], "state": state}])
        state = wanted["state_next"]
        assert (
            np.abs(pointwise.real(bindings[i % 2].outputs["state_next"], params) - state).max()
            <= params.scale[0] * 1.01
        )
        reach = np.abs(wanted["logits"]).max()
        assert np.abs(bindings[i % 2].outputs["logits"] - wanted["logits"]).max() <= 0.03 * reach


def test_shuffled_channels_are_gathered_once() -> None:
    """Reshape, Transpose and Reshape, then halves: two gathers, written where they are read."""
    values = {
        **{f"w{i}": np.random.default_rng(i).normal(0, 0.3, (8, c, 1, 1)).astype(np.float32) for i, c in ((0, 3), (1, 4), (2, 12))},
        "five": np.array([1, 2, 4, 6, 6]), "four": np.array([1, 8, 6, 6]),
    }  # fmt: skip
    body = """a = Conv(x, w0)
        b = Reshape(a, five)
        c = Transpose <perm=[0,2,1,3,4]> (b)
        d = Reshape(c, four)
        e, f = Split <axis=1, num_outputs=2> (d)
        g = Conv(e, w1)
        h = Concat <axis=1> (f, g)
        y = Conv(h, w2)"""
    model = ir.from_proto(graph(body, {"x": (1, 3, 6, 6)}, {"y": (1, 8, 6, 6)}, values, opset=19))
    feed = {"x": np.random.default_rng(9).standard_normal((1, 3, 6, 6)).astype(np.float32)}
    placed = place(model, calibrate(model, [feed]), RULES, Choices(scheme="minmax"))
    assert steps(lowered(placed)) == {"quantize": 1, "conv": 3, "gather": 2}
    assert all(layer.differing == 0 for layer in layers.check(placed, feed) if layer.type == "gather")
    (wanted,) = simulate.run(simulate.fake_quantized(placed), [feed])
    assert np.abs(run(lowered(placed), feed)["y"] - wanted["y"]).max() <= 0.02 * np.abs(wanted["y"]).max()


def shuffled(more: dict[str, tuple[int, ...]]) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Two units of a ShuffleNet and what follows, and a feed. more: values that are outputs, too."""
    rng = np.random.default_rng(4)
    sizes = {
        "w0": (4, 3, 1, 1), "w1": (4, 3, 1, 1), "w2": (4, 4, 1, 1), "w3": (4, 4, 3, 3), "w4": (8, 1, 3, 3), "w5": (5, 8, 1, 1),
        "w6": (6, 8, 1, 1),
    }  # fmt: skip
    values = {
        **{name: rng.normal(0, 0.4, size).astype(np.float32) for name, size in sizes.items()},
        "b0": rng.normal(0, 0.3, 4).astype(np.float32),
        "five": np.array([1, 2, 4, 6, 6]), "four": np.array([1, 8, 6, 6]),
    }  # fmt: skip
    body = """a = Conv(x, w0, b0)
        ar = Relu(a)
        b = Conv(x, w1)
        c = Concat <axis=1> (ar, b)
        c5 = Reshape(c, five)
        ct = Transpose <perm=[0,2,1,3,4]> (c5)
        d = Reshape(ct, four)
        e, f = Split <axis=1, num_outputs=2> (d)
        g = Conv(f, w2)
        gs = Sigmoid(g)
        gm = Mul(g, gs)
        h = Conv <pads=[1,1,1,1]> (gm, w3)
        i = Concat <axis=1> (e, h)
        i5 = Reshape(i, five)
        it = Transpose <perm=[0,2,1,3,4]> (i5)
        j = Reshape(it, four)
        k = Conv <group=8, pads=[1,1,1,1]> (j, w4)
        kr = Relu(k)
        y = Conv(kr, w5)
        z = Conv(j, w6)"""
    outputs = {"y": (1, 5, 6, 6), "z": (1, 6, 6, 6), **more}
    model = ir.from_proto(graph(body, {"x": (1, 3, 6, 6)}, outputs, values, opset=19))
    feed = {"x": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)}
    return place(model, calibrate(model, [feed]), RULES, Choices(scheme="minmax")), feed


def test_shuffled_channels_are_the_order_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """One half of the second unit is gathered, all else lies as it is read."""
    placed, feed = shuffled({})
    assert steps(lowered(placed)) == {"quantize": 1, "conv": 7, "gather": 1}
    assert all(layer.differing == 0 for layer in layers.check(placed, feed))
    got = run(lowered(placed), feed)
    monkeypatch.setattr(lower_module, "arrange", lambda model: None)
    assert steps(lowered(placed)) == {"quantize": 1, "conv": 7, "gather": 3}
    wanted = run(lowered(placed), feed)
    assert all(np.array_equal(got[name], wanted[name]) for name in ("y", "z"))


@pytest.mark.parametrize(
    "more", [{"d": (1, 8, 6, 6)}, {"e": (1, 4, 6, 6)}, {"j": (1, 8, 6, 6)}], ids=lambda m: next(iter(m))
)
def test_shuffled_channels_that_are_outputs_stay_in_order(
    more: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed, feed = shuffled(more)
    got = run(lowered(placed), feed)
    monkeypatch.setattr(lower_module, "arrange", lambda model: None)
    wanted = run(lowered(placed), feed)
    assert got.keys() == wanted.keys() and all(np.array_equal(got[name], wanted[name]) for name in wanted)
