"""Repairs of quantized networks: known answers on tiny graphs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import CalibrationError, UsageError
from edgekit.passes.graph import constant, infer
from edgekit.quant import repair, simulate
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.calibrate import calibrate
from edgekit.quant.placement import Choices, place, prepared
from edgekit.quant.ranges import params
from edgekit.quant.repair import adaround, bias_correction, clip_search, layers, split_channels
from edgekit.quant.repair.walk import Walk
from edgekit.quant.rules import rules_for
from edgekit.quant.weights import codes, weight_params
from edgekit.spec import DType, QuantParams
from edgekit.target import Target


def network(
    nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], weights: dict[str, np.ndarray]
) -> ir.Model:
    values = {v.name: v for n in nodes for v in n.inputs if v is not None}
    for name, numbers in weights.items():
        values[name].const_value = ir.tensor(numbers.astype(np.float32), name=name)
        values[name].shape = ir.Shape(numbers.shape)
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=[values[n] for n in weights],
        opset_imports={"": 19},
        name="g",
    )
    model = ir.Model(graph, ir_version=9)
    infer(model)
    return model


def value(name: str, *sizes: int) -> ir.Value:
    return ir.Value(
        name=name, shape=ir.Shape(sizes) if sizes else None, type=ir.TensorType(ir.DataType.FLOAT)
    )


def conv(
    x: ir.Value,
    name: str,
    weights: dict[str, np.ndarray],
    w: np.ndarray,
    b: np.ndarray | None,
    **attributes: object,
) -> ir.Value:
    weights[f"{name}.w"] = w
    inputs = [x, value(f"{name}.w")]
    if b is not None:
        weights[f"{name}.b"] = b
        inputs.append(value(f"{name}.b"))
    return ir.node("Conv", inputs, attributes, outputs=[value(name)]).outputs[0]


def chain(*outputs: ir.Value) -> list[ir.Node]:
    return [v.producer() for v in outputs]  # type: ignore[misc]


def depthwise_net(
    rng: np.random.Generator, *, bias: bool = True
) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    """1x1, depthwise 3x3 with stride, grouped 3x3, pooled product: every kind of product."""
    weights: dict[str, np.ndarray] = {}
    x = value("x", 1, 4, 12, 12)
    offset = (lambda n: rng.normal(size=n) * 0.2) if bias else (lambda n: None)
    a = conv(x, "a", weights, rng.normal(size=(8, 4, 1, 1)) * 0.5, offset(8))
    r = ir.node("Relu", [a], outputs=[value("r")]).outputs[0]
    d = conv(
        r, "d", weights, rng.normal(size=(8, 1, 3, 3)) * 0.3, offset(8), group=8, strides=[2, 2], pads=[1] * 4
    )
    s = ir.node("Relu", [d], outputs=[value("s")]).outputs[0]
    e = conv(s, "e", weights, rng.normal(size=(6, 4, 3, 3)) * 0.2, offset(6), group=2, pads=[1, 1, 1, 1])
    p = ir.node("GlobalAveragePool", [e], outputs=[value("p")]).outputs[0]
    f = ir.node("Flatten", [p], outputs=[value("f")]).outputs[0]
    weights["y.w"] = rng.normal(size=(6, 5))
    y = ir.node("Gemm", [f, value("y.w")], outputs=[value("y")]).outputs[0]
    model = network(chain(a, r, d, s, e, p, f, y), [x], [y], weights)
    feeds = [{"x": rng.normal(size=(1, 4, 12, 12)).astype(np.float32)} for _ in range(12)]
    return prepared(model), feeds


def placed(model: ir.Model, feeds: list[dict[str, np.ndarray]], **choices: object) -> ir.Model:
    rules = rules_for("onnxruntime", Target.load("rpi5"))
    return place(model, calibrate(model, feeds), rules, Choices(**choices))  # type: ignore[arg-type]


def bits(model: ir.Model) -> bytes:
    marks = {
        str(v.name): repr(quant(v)) for n in model.graph for v in (*n.inputs, *n.outputs) if v is not None
    }
    return ir.to_proto(model).SerializeToString(deterministic=True) + repr(sorted(marks.items())).encode()


# --- adaptive rounding ---------------------------------------------------------------------------


def norm(w: np.ndarray, q: np.ndarray, scale: np.ndarray, h: np.ndarray) -> np.ndarray:
    e = w.astype(np.float64) - q * scale.astype(np.float64)
    return np.einsum("gnk,gkl,gnl->gn", e, h.astype(np.float64), e)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), groups=st.integers(1, 3), rows=st.integers(1, 5), length=st.integers(1, 70),
    limit=st.sampled_from([127, 64]), wide=st.booleans(), steep=st.floats(0, 3),
)  # fmt: skip
def test_rounding_is_never_worse_than_nearest_and_stays_around_the_weight(
    seed: int, groups: int, rows: int, length: int, limit: int, wide: bool, steep: float
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, 2 * length, length)) + steep * rng.normal(size=(groups, 2 * length, 1))
    h = (x.transpose(0, 2, 1) @ x / (2 * length) + 0.01 * np.eye(length)).astype(
        np.float64 if wide else np.float32
    )
    w = rng.normal(size=(groups, rows, length)).astype(np.float32)
    scale = (np.abs(w).max(axis=2, keepdims=True) * 0.8 / limit).astype(np.float32)  # some are clipped
    q = adaround.solve(w, scale, h, limit)
    nearest = np.clip(np.rint(w / scale), -limit, limit)
    assert q.dtype == np.int8 and np.abs(q.astype(int)).max() <= limit
    assert (np.abs(q - np.clip(w / scale, -limit, limit)) < 1 + 1e-4).all()
    assert (norm(w, q, scale, h) <= norm(w, nearest, scale, h) * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("seed", range(6))
def test_rounding_comes_near_the_best_of_all_roundings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = 12
    x = rng.normal(size=(40, length)) + 2 * rng.normal(size=(40, 1))
    h = (x.T @ x / 40)[None]
    w = rng.normal(size=(1, 8, length)).astype(np.float32)
    scale = np.full((1, 8, 1), 0.5, np.float32)
    low = np.floor(w / scale)
    every = np.array(list(itertools.product([0, 1], repeat=length)))
    best = np.array(
        [norm(w[:, [i]].repeat(len(every), 1), low[:, [i]] + every, scale[:, [i]], h).min() for i in range(8)]
    )
    found, nearest = (norm(w, q, scale, h)[0] for q in (adaround.solve(w, scale, h), np.rint(w / scale)))
    assert (found >= best - 1e-9).all()
    # a local minimum of every row: most of the way from nearest rounding to the best one
    assert (nearest - found).sum() > 0.9 * (nearest - best).sum() > 0
    assert (np.isclose(found, best)).sum() >= 2


def test_rounding_of_independent_inputs_is_to_nearest() -> None:
    w = np.random.default_rng(0).normal(size=(2, 3, 9)).astype(np.float32)
    scale = np.full((2, 3, 1), 0.1, np.float32)
    h = np.stack([np.diag(np.arange(1.0, 10)), np.eye(9)])
    np.testing.assert_array_equal(adaround.solve(w, scale, h), np.rint(w / scale))


def test_moments_are_those_of_the_products() -> None:
    """Every Conv and Gemm: rows of weights times patches is what ONNX Runtime computes."""
    model, feeds = depthwise_net(np.random.default_rng(1))
    extra: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(2)
    x = value("x", 2, 3, 9, 8)
    c = conv(
        x,
        "c",
        extra,
        rng.normal(size=(4, 3, 3, 2)),
        None,
        dilations=[2, 1],
        pads=[2, 0, 1, 1],
        strides=[1, 2],
    )
    u = conv(x, "u", extra, rng.normal(size=(4, 3, 3, 3)), None, auto_pad="SAME_UPPER", strides=[2, 2])
    o = conv(x, "o", extra, rng.normal(size=(4, 3, 2, 2)), None, auto_pad="SAME_LOWER")
    other = network(chain(c, u, o), [x], [c, u, o], extra)
    for net, feed in ((model, feeds[0]), (other, {"x": rng.normal(size=(2, 3, 9, 8)).astype(np.float32)})):
        for node in net.graph:
            if not layers.has_rows(node):
                continue
            source, output = node.inputs[0], str(node.outputs[0].name)
            seen = next(simulate.run(net, [feed], [v for v in (source.name, output) if v != "x"])) | feed
            rows = layers.to_rows(node, constant(node.inputs[1]))
            offset = (
                constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(rows.shape[0] * rows.shape[1])
            )
            for want in (7, 10**6):
                x_, at = layers.patches(node, seen[source.name], want, 0)
                assert len(at) == min(want, seen[output].size // (rows.shape[0] * rows.shape[1]))
                found = np.einsum("gnk,gok->gno", x_, rows) + offset.reshape(len(rows), 1, -1)
                np.testing.assert_allclose(found, layers.outputs_at(node, seen[output], at), atol=2e-5)
            back = layers.from_rows(node, rows, constant(node.inputs[1]))
            np.testing.assert_array_equal(back, constant(node.inputs[1]))


@pytest.mark.parametrize("compensate", [False, True])
def test_adaround_lowers_the_error_on_new_pictures_and_writes_exact_codes(compensate: bool) -> None:
    model, feeds = depthwise_net(np.random.default_rng(3))
    before = placed(model, feeds)
    for node in before.graph:  # 5 bits, where rounding matters
        if layers.has_rows(node):
            old = quant(node.inputs[1])
            numbers = constant(node.inputs[1])
            coarse = weight_params(numbers, old.axis, "minmax", limit=15)
            set_quant(node.inputs[1], coarse)
    untouched = bits(before)
    again = [
        repair.apply("adaround", before, model, feeds[:8], check=feeds[8:], compensate=compensate)
        for _ in "ab"
    ]
    after, gain = again[0]
    assert bits(before) == untouched
    assert bits(after) == bits(again[1][0]), "the same inputs give the same bits"
    assert gain.decibels > 1, gain
    assert gain.changed == 4 and gain.paper == adaround.PAPER
    originals = {str(n.outputs[0].name): constant(n.inputs[1]) for n in model.graph if layers.has_rows(n)}
    for node in after.graph:
        if layers.has_rows(node):
            numbers, found = constant(node.inputs[1]), quant(node.inputs[1])
            shape = [-1 if i == found.axis else 1 for i in range(numbers.ndim)]
            scale = np.asarray(found.scale, np.float32).reshape(shape)
            np.testing.assert_array_equal(codes(numbers, found) * scale, numbers)
            if not compensate:
                assert (np.abs(numbers - originals[node.outputs[0].name]) < scale * 1.001).all()


def test_adaround_keeps_seven_bits_and_shared_weights() -> None:
    rng = np.random.default_rng(5)
    weights: dict[str, np.ndarray] = {}
    x = value("x", 1, 4, 8, 8)
    a = conv(x, "a", weights, rng.normal(size=(4, 4, 3, 3)), rng.normal(size=4))
    shared = a.producer().inputs
    b = ir.node("Conv", [a, shared[1], shared[2]], outputs=[value("b")]).outputs[0]
    model = prepared(network(chain(a, b), [x], [b], weights))
    feeds = [{"x": rng.normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(4)]
    annotated = placed(model, feeds)
    tensor = annotated.graph.initializers["a.w"]
    set_quant(tensor, seven := weight_params(tensor.const_value.numpy(), 0, "minmax", limit=64))
    scale = np.asarray(seven.scale, np.float32).reshape(-1, 1, 1, 1)
    tensor.const_value = ir.tensor(np.rint(tensor.const_value.numpy() / scale) * scale, name="a.w")
    after = adaround.run(annotated, model, feeds)
    assert [n.inputs[1].name for n in after.graph] == ["a.w", "a.w"]
    found = codes(constant(after.graph.initializers["a.w"]), seven)
    assert np.abs(found.astype(int)).max() <= 64
    assert (found != codes(constant(tensor), seven)).any()


# --- bias correction -----------------------------------------------------------------------------


def test_bias_correction_takes_out_a_planted_shift_once() -> None:
    """A shift in the first layer passes through two others: each is corrected for its own only."""
    rng = np.random.default_rng(7)
    weights: dict[str, np.ndarray] = {}
    x = value("x", 1, 3, 8, 8)
    a = conv(x, "a", weights, rng.normal(size=(4, 3, 1, 1)), rng.normal(size=4))
    b = conv(a, "b", weights, rng.normal(size=(4, 4, 1, 1)), None)
    c = conv(b, "c", weights, rng.normal(size=(4, 4, 1, 1)), rng.normal(size=4))
    model = prepared(network(chain(a, b, c), [x], [c], weights))
    feeds = [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(3)]
    shifted = model.clone()
    planted = np.array([1.0, -2.0, 0.0, 0.5], np.float32)
    bias = shifted.graph.initializers["a.b"]
    bias.const_value = ir.tensor(bias.const_value.numpy() + planted, name="a.b")
    after = bias_correction.run(shifted, model, feeds)
    found = [constant(n.inputs[2]) if len(n.inputs) > 2 else np.zeros(4) for n in after.graph]
    np.testing.assert_allclose(found[0], weights["a.b"], atol=1e-5)
    np.testing.assert_allclose(found[1], 0, atol=1e-5)
    np.testing.assert_allclose(found[2], weights["c.b"], atol=1e-5)
    assert repair.measure("x", "", shifted, after, model, feeds).after > 80
    # limited to one node, its own output is right again and the one before keeps its shift
    only = bias_correction.run(shifted, model, feeds, nodes=["b"])
    means = [next(simulate.run(m, feeds[:1], ["a", "b"])) for m in (model, only)]
    gap = [(means[0][n] - means[1][n]).mean(axis=(0, 2, 3)) for n in ("a", "b")]
    np.testing.assert_allclose(gap[0], -planted, atol=1e-5)
    np.testing.assert_allclose(gap[1], 0, atol=1e-5)


def test_bias_correction_leaves_what_is_noise() -> None:
    rng = np.random.default_rng(8)
    noise = rng.normal(size=(16, 200))
    steady = np.concatenate([noise, np.full((16, 1), 3.0) + 0.1 * rng.normal(size=(16, 1))], axis=1)
    found = bias_correction.shrunk(steady)
    assert found[-1] == pytest.approx(3.0, abs=0.1)
    mean = noise.mean(axis=0)
    assert (found[:-1] ** 2).sum() < 0.35 * (mean**2).sum()
    assert (np.abs(found) <= np.abs(steady.mean(axis=0)) + 1e-12).all()
    np.testing.assert_array_equal(bias_correction.shrunk(steady[:1]), steady[0])


def test_bias_correction_helps_a_depthwise_net_and_is_repeatable() -> None:
    model, feeds = depthwise_net(np.random.default_rng(9), bias=False)
    before = placed(model, feeds, weights="minmax")
    for node in before.graph:
        if node.outputs[0].name in ("a", "d", "e"):
            set_quant(node.inputs[1], weight_params(constant(node.inputs[1]), 0, "minmax", limit=7))
    first, gain = repair.apply("bias_correction", before, model, feeds[:8], check=feeds[8:])
    assert gain.decibels > 1, gain
    assert bits(first) == bits(bias_correction.run(before, model, feeds[:8]))


# --- channel splitting ---------------------------------------------------------------------------


def outlier_net(rng: np.random.Generator) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    weights: dict[str, np.ndarray] = {}
    x = value("x", 1, 3, 8, 8)
    w, b = rng.normal(size=(6, 3, 3, 3)) * 0.2, rng.normal(size=6) * 0.1
    w[2] *= 32
    b[2] *= 32
    a = conv(x, "a", weights, w, b, pads=[1, 1, 1, 1])
    r = ir.node("Relu", [a], outputs=[value("r")]).outputs[0]
    m = ir.node("MaxPool", [r], {"kernel_shape": [2, 2], "strides": [2, 2]}, outputs=[value("m")]).outputs[0]
    w = rng.normal(size=(5, 6, 3, 3)) * 0.2
    w[:, 2] /= 32
    y = conv(m, "y", weights, w, rng.normal(size=5), pads=[1, 1, 1, 1])
    z = conv(m, "z", weights, w[:4, :, :1, :1], None)
    model = prepared(network(chain(a, r, m, y, z), [x], [y, z], weights))
    return model, [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]


def test_split_channels_is_exact_and_halves_the_range() -> None:
    model, feeds = outlier_net(np.random.default_rng(11))
    before = placed(model, feeds, scheme="minmax")
    splits = split_channels.plan(before, model, feeds, granularity=7)
    assert [s.conv for s in splits] == ["a"]
    assert sorted(splits[0].copies) == [(0, 1), (1, 1), (2, 0.5), (2, 0.5), (3, 1), (4, 1), (5, 1)]
    wider = split_channels.split(model, splits)
    for a, b in zip(simulate.run(model, feeds), simulate.run(wider, feeds), strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5)
    after, gain = repair.apply("split_channels", before, model, feeds, granularity=7)
    assert gain.decibels > 2, gain  # a bit of range is 6 dB; weights and outputs keep their errors
    old, new = ({str(v.name): quant(v) for n in m.graph for v in n.outputs} for m in (before, after))
    for name in ("r", "m"):
        assert new[name].scale[0] == pytest.approx(old[name].scale[0] / 2, rel=0.02)
    assert new["r"] == new["m"], "values of one scale keep one scale"
    # weights keep their codes: factors are powers of two
    first = next(n for n in after.graph if n.outputs[0].name == "a")
    at = [c for c, _ in splits[0].copies]
    np.testing.assert_array_equal(
        codes(constant(first.inputs[1]), quant(first.inputs[1])),
        codes(constant(model.graph.initializers["a.w"]), quant(before.graph.initializers["a.w"]))[at],
    )


def test_split_channels_uses_the_room_there_is() -> None:
    model, feeds = outlier_net(np.random.default_rng(12))
    before = placed(model, feeds, scheme="minmax")
    assert not split_channels.plan(before, model, feeds, granularity=6)
    assert not split_channels.plan(before, model, feeds, granularity=8, nodes=["y"])
    (wide,) = split_channels.plan(before, model, feeds, granularity=16)
    halves = [f for c, f in wide.copies if c == 2]
    assert sum(halves) == 1 and len(wide.copies) <= 16 and min(halves) <= 0.125
    # repairs that come after it see layers of another width
    after = split_channels.run(before, model, feeds, granularity=16)
    both = bias_correction.run(adaround.run(after, model, feeds), model, feeds)
    assert repair.measure("x", "", before, both, model, feeds).decibels > 6


@pytest.mark.parametrize("spoil", ["clip", "output", "depthwise"])
def test_split_channels_leaves_what_it_cannot_do_exactly(spoil: str) -> None:
    rng = np.random.default_rng(13)
    weights: dict[str, np.ndarray] = {}
    x = value("x", 1, 3, 6, 6)
    w = rng.normal(size=(6, 3, 1, 1))
    w[0] *= 50
    a = conv(x, "a", weights, w, None)
    made = [a]
    if spoil == "clip":
        weights["six"] = np.float32(6)
        weights["none"] = np.float32(0)
        made.append(ir.node("Clip", [a, value("none"), value("six")], outputs=[value("k")]).outputs[0])
    if spoil == "depthwise":
        made.append(conv(a, "d", weights, rng.normal(size=(6, 1, 1, 1)), None, group=6))
    made.append(conv(made[-1], "y", weights, rng.normal(size=(4, 6, 1, 1)), None))
    outputs = [made[-1], a] if spoil == "output" else [made[-1]]
    model = prepared(network(chain(*made), [x], outputs, weights))
    feeds = [{"x": rng.normal(size=(1, 3, 6, 6)).astype(np.float32)}]
    before = placed(model, feeds)
    assert not [s for s in split_channels.plan(before, model, feeds) if s.conv == "a"]


# --- clipping search -----------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["readers", "outputs"])
def test_clip_search_ignores_an_outlier_that_no_reader_minds(by: str) -> None:
    """A saturating reader: what lies beyond its ends may be clipped, whatever the value's own error says."""
    rng = np.random.default_rng(15)
    weights: dict[str, np.ndarray] = {"lo": np.float32(-1), "hi": np.float32(1)}
    x = value("x", 1, 4, 8, 8)
    a = conv(x, "a", weights, rng.normal(size=(4, 4, 1, 1)), None)
    k = ir.node("Clip", [a, value("lo"), value("hi")], outputs=[value("k")]).outputs[0]
    model = prepared(network(chain(a, k), [x], [k], weights))
    feeds = [{"x": (rng.normal(size=(1, 4, 8, 8)) * rng.choice([0.5, 20], (1, 1, 8, 8))).astype(np.float32)}]
    annotated = model.clone()
    stats = calibrate(model, feeds)
    node = next(iter(annotated.graph))
    set_quant(node.outputs[0], params(stats["a"].low, stats["a"].high))
    found = clip_search.search(annotated, model, feeds, stats, ["a"], by=by)
    low, high = found["a"]
    assert stats["a"].low < low < 0 < high < stats["a"].high
    # where the range is as good as any, nothing is proposed
    set_quant(node.outputs[0], params(low, high))
    assert clip_search.search(annotated, model, feeds, stats, ["a"], by=by) == {}


def test_clip_search_moves_values_of_one_scale_together() -> None:
    model, feeds = outlier_net(np.random.default_rng(16))
    annotated = placed(model, feeds, scheme="minmax", ranges=(("r", (0.0, 0.5)),))
    stats = calibrate(model, feeds)
    found = clip_search.search(annotated, model, feeds, stats, ["r"], by="outputs")
    rules = rules_for("onnxruntime", Target.load("rpi5"))
    again = place(model, stats, rules, Choices(scheme="minmax", ranges=tuple(found.items())))
    assert repair.measure("clip_search", clip_search.PAPER, annotated, again, model, feeds).decibels > 3
    marks = {str(v.name): quant(v) for n in again.graph for v in n.outputs}
    assert marks["r"] == marks["m"]


# --- the walk and the frame ----------------------------------------------------------------------


def test_walk_sees_what_simulation_sees_also_from_files() -> None:
    model, feeds = depthwise_net(np.random.default_rng(17))
    annotated = placed(model, feeds)
    fake = simulate.fake_quantized(annotated)
    names = [n.outputs[0] for n in annotated.graph if n.op_type in ("Conv", "Gemm")]
    for limit in (0, 5000, 1 << 30):
        with Walk(annotated, feeds, quantized=True, limit=limit) as walk:
            for output in names:
                walk.advance(walk.computed(output))
                read = walk.read(output.producer().inputs[0])
                seen = list(walk.values([walk.computed(output), read]))
                expected = list(simulate.run(fake, feeds, [walk.computed(output), read]))
                for a, b in zip(seen, expected, strict=True):
                    for name in a:
                        np.testing.assert_array_equal(a[name], b[name])
            folder = walk._folder
            assert (folder is None) == (limit == 1 << 30)
        assert folder is None or not Path(folder.name).exists()


def test_refusals_name_what_is_wrong() -> None:
    model, feeds = depthwise_net(np.random.default_rng(18))
    annotated = placed(model, feeds)
    with pytest.raises(UsageError, match=r"repair 'adarond': unknown. Did you mean 'adaround'"):
        repair.apply("adarond", annotated, model, feeds)
    for name in repair.NAMES:
        with pytest.raises(CalibrationError, match="no pictures"):
            repair.apply(name, annotated, model, [])
        with pytest.raises(UsageError, match="node 'dd': not in this network"):
            repair.apply(name, annotated, model, feeds, nodes=["dd"])
    with pytest.raises(UsageError, match="value 'rr': is not quantized"):
        clip_search.search(annotated, model, feeds, calibrate(model, feeds), ["rr"])
    with pytest.raises(CalibrationError, match="lacks input x"):
        adaround.run(annotated, model, [{"y": feeds[0]["x"]}])


def test_every_repair_names_its_paper() -> None:
    for name in (*repair.NAMES, "clip_search"):
        module = __import__(f"edgekit.quant.repair.{name}", fromlist=["PAPER"])
        assert "20" in module.PAPER and ":" in module.PAPER
    assert QuantParams(DType.int8, (1.0,), (0,)) == clip_search.params(-127, 127, True)
