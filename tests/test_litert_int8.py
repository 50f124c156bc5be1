"""LiteRT in integers: codes against a numpy simulation, operator by operator, and what the delegate takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from edgekit.backends.litert.emitter import whole_rows
from edgekit.backends.litert.lower import INTEGER_IO, lower
from edgekit.backends.litert.plan import SIGMOID, make
from edgekit.errors import LoweringError, UsageError
from edgekit.passes import probe
from edgekit.passes.graph import constant
from edgekit.quant.annotate import quant, set_quant
from edgekit.spec import DType, QuantParams
from tests.litert_graphs import HOST, affine, annotate, codes, fake, feeds, graph, open_payload, run

node = helper.make_node
few = settings(max_examples=20, deadline=None)


def values(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def simulated(model: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The graph in floats with every annotated value rounded to codes, node by node."""
    known: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        params = quant(value)
        known[str(value.name)] = (
            inputs[str(value.name)] if params is None else fake(inputs[str(value.name)], params)
        )
    for one in model.graph:
        reads = {}
        for value in one.inputs:
            if value is None:
                continue
            data = constant(value)
            if data is None:
                reads[str(value.name)] = known[str(value.name)]
            elif (params := quant(value)) is not None:
                scale = np.array(params.scale, np.float32)
                scale = scale.reshape([-1 if i == params.axis else 1 for i in range(data.ndim)])
                reads[str(value.name)] = (np.clip(np.rint(data / scale), -127, 127) * scale).astype(
                    np.float32
                )
            else:
                reads[str(value.name)] = data
        single = ir.Model(
            ir.Graph(
                [ir.Value(name=n, shape=ir.Shape(v.shape), type=ir.TensorType(ir.tensor(v).dtype)) for n, v in reads.items()],
                [], nodes=[], opset_imports={"": 19}, name="one",
            ),
            ir_version=9,
        )  # fmt: skip
        by_name = {v.name: v for v in single.graph.inputs}
        ins = [None if v is None else by_name[v.name] for v in one.inputs]
        outs = [ir.Value(name=v.name) for v in one.outputs]
        copy = ir.Node("", one.op_type, ins, one.attributes.values(), outputs=outs)
        single.graph.append(copy)
        for made, old in zip(copy.outputs, one.outputs, strict=True):
            made.type, made.shape = old.type, old.shape
            single.graph.outputs.append(made)
        for name, got in probe.evaluate(single, reads).items():
            value = next(v for v in one.outputs if v.name == name)
            params = quant(value)
            known[name] = got if params is None else fake(got, params)
    return {str(v.name): known[str(v.name)] for v in model.graph.outputs}


def check(
    model: ir.Model, off: int = 1, low: float = -2.0, high: float = 2.0
) -> tuple[ir.Model, dict[str, Any]]:
    """Annotate with ranges, run in integers: one partition, codes within `off` of the simulation."""
    annotated = annotate(model, [feeds(model, seed, low, high) for seed in (1, 2)])
    inputs = feeds(model, 1, low, high)
    got, facts = run(annotated, inputs, "int8")
    assert facts["partitions"] == 1, facts
    assert facts["delegated"] == facts["operators"], facts
    for name, want in simulated(annotated, inputs).items():
        value = next(v for v in annotated.graph.outputs if v.name == name)
        params = quant(value)
        assert params is not None
        difference = np.abs(codes(got[name], params) - codes(want, params))
        assert difference.max() <= off, (
            f"{name}: {difference.max()} codes, {np.mean(difference > 0):.3f} differ"
        )
    return annotated, facts


@few
@given(
    st.sampled_from([(3, 1), (4, 4), (4, 2), (8, 1), (1, 1)]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2),
    st.tuples(*[st.integers(0, 2)] * 4), st.sampled_from(["", "Relu"]), st.integers(4, 9),
)  # fmt: skip
def test_conv(kind: tuple[int, int], kh: int, kw: int, stride: int, pads: Any, act: str, size: int) -> None:
    channels, group = kind
    conv = node(
        "Conv", ["x", "w", "b"], ["t" if act else "y"], strides=[stride] * 2, pads=list(pads), group=group
    )
    weights = {"w": values(2 * group, channels // group, kh, kw), "b": values(2 * group)}
    nodes = [conv, node("Relu", ["t"], ["y"])] if act else [conv]
    model = graph(nodes, {"x": (1, channels, size, 2 * size)}, weights)
    annotated = annotate(model, [feeds(model, 1)], skip=["t"] if act else [])
    inputs = feeds(model, 1)
    got, facts = run(annotated, inputs, "int8")
    assert facts["partitions"] == 1
    params = quant(annotated.graph.outputs[0])
    assert params is not None
    assert np.abs(codes(got["y"], params) - codes(simulated(annotated, inputs)["y"], params)).max() <= 1


NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
TWICE = {"s": np.array([1, 1, 2, 2], np.float32)}
ONE, THREE, FOUR, TWO = (np.array([i]) for i in (1, 3, 4, 2))
SINGLE: dict[str, tuple[str, list[str], dict[str, Any], dict[str, np.ndarray]]] = {
    # name: operator, inputs after x, attributes, constants
    "transposed conv": (
        "ConvTranspose",
        ["w", "b"],
        {"strides": [2, 2]},
        {"w": values(4, 3, 2, 2), "b": values(3)},
    ),
    "cut transposed conv": (
        "ConvTranspose",
        ["w"],
        {"strides": [2, 2], "pads": [1, 1, 0, 0]},
        {"w": values(4, 3, 3, 3)},
    ),
    "add a constant": ("Add", ["w"], {}, {"w": values(4, 1, 1)}),
    "times a number": ("Mul", ["w"], {}, {"w": np.float32(-0.3)}),
    "sub": ("Sub", ["w"], {}, {"w": values(1, 1, 6, 6)}),
    "sigmoid": ("Sigmoid", [], {}, {}),
    "tanh": ("Tanh", [], {}, {}),
    "leaky": ("LeakyRelu", [], {"alpha": 0.1}, {}),
    "relu": ("Relu", [], {}, {}),
    "max pool": ("MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2]}, {}),
    "same pool": ("MaxPool", [], {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]}, {}),
    "mean pool": ("AveragePool", [], {"kernel_shape": [2, 2], "strides": [2, 2]}, {}),
    "global mean": ("GlobalAveragePool", [], {}, {}),
    "reduce max": ("ReduceMax", ["a"], {"keepdims": 0}, {"a": np.array([2, 3])}),
    "pad": ("Pad", ["p"], {}, {"p": np.array([0, 0, 1, 2, 0, 0, 1, 0])}),
    "slice": ("Slice", ["a", "b", "c"], {}, {"a": ONE, "b": THREE, "c": ONE}),
    "every other": ("Slice", ["a", "b", "c", "s"], {}, {"a": ONE, "b": FOUR, "c": ONE, "s": TWO}),
    "double": ("Resize", ["", "s"], NEAREST, TWICE),
    "bilinear": ("Resize", ["", "s"], {"mode": "linear"}, TWICE),
    "depth to space": ("DepthToSpace", [], {"blocksize": 2}, {}),
    "flatten": ("Flatten", [], {}, {}),
    "hard swish": ("HardSwish", [], {}, {}),
    "hard sigmoid": ("HardSigmoid", [], {"alpha": 1 / 6}, {}),
}


@pytest.mark.parametrize("name", SINGLE)
def test_operator(name: str) -> None:
    op, more, attributes, weights = SINGLE[name]
    # the middle step of a hard swish rounds once more, at 1/255 of up to 4; the scale of a sigmoid is not the range's
    off = 4 if name == "hard swish" else 2 if name in ("tanh", "sigmoid") else 1
    model = graph([node(op, ["x", *more], ["y"], **attributes)], {"x": (1, 4, 6, 6)}, weights)
    check(model, off=off, low=-4, high=4)


@pytest.mark.parametrize(
    ("codes_shape", "result", "want"),
    [
        ((1, 1, 1, 16), (1, 208, 208, 16), (1, 1, 208, 16)),
        ((1, 1, 1, 256), (1, 8, 8, 256), (1, 1, 1, 256)),  # wide enough as it is
        ((1, 1, 1, 100), (1, 8, 200, 100), (1, 1, 1, 100)),  # a row would take much of the file
        ((1, 1, 1, 1), (1, 6, 6, 4), (1, 1, 1, 1)),
        ((1, 6, 6, 1), (1, 6, 6, 1), (1, 6, 6, 1)),
    ],
)
def test_narrow_constants_are_repeated_for_a_row(codes_shape: Any, result: Any, want: Any) -> None:
    given = np.random.default_rng(1).integers(-127, 127, codes_shape).astype(np.int8)
    rows = whole_rows(given, result)
    assert rows.shape == want
    assert (np.broadcast_to(rows, result) == np.broadcast_to(given, result)).all()


def test_matrix_products() -> None:
    check(
        graph(
            [node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
            {"x": (3, 16)},
            {"w": values(8, 16), "b": values(8)},
        )
    )
    check(graph([node("MatMul", ["x", "w"], ["y"])], {"x": (2, 3, 16)}, {"w": values(16, 8)}))


def silu_block() -> ir.Model:
    """conv - SiLU - [conv - SiLU, pooled] - concat, as detectors have it."""
    weights = {"w0": values(8, 3, 3, 3), "b0": values(8), "w1": values(8, 8, 1, 1) / 3, "b1": values(8)}
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Sigmoid", ["a"], ["g"]), node("Mul", ["a", "g"], ["s"]),
        node("Conv", ["s", "w1", "b1"], ["c"]), node("Sigmoid", ["c"], ["h"]), node("Mul", ["c", "h"], ["t"]),
        node("MaxPool", ["s"], ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Concat", ["t", "p"], ["y"], axis=1),
    ]  # fmt: skip
    return graph(nodes, {"x": (1, 3, 16, 16)}, weights)


@pytest.mark.parametrize("gate", [True, False])
def test_silu_block(gate: bool) -> None:
    model = silu_block()
    samples = [feeds(model, seed) for seed in (1, 2)]
    annotated = annotate(model, samples, skip=[] if gate else ["g", "h"])
    plan = make(annotated, True)
    assert all(unit.integer for unit in plan.units)
    assert [plan.params[u.outputs[0]] for u in plan.units if u.op == "Sigmoid"] == [SIGMOID] * 2
    got, facts = run(annotated, feeds(model, 1), "int8")
    assert facts["partitions"] == 1
    want = probe.evaluate(model, feeds(model, 1))["y"]
    assert np.abs(got["y"] - want).max() < 0.03 * np.abs(want).max()


def test_a_value_only_read_at_another_scale_is_written_at_it() -> None:
    """`t` is read by the Concat alone and needs no requantization; `s` has other readers, so its pooled copy does."""
    model = silu_block()
    annotated = annotate(model, [feeds(model, 1)])
    by_name = {str(v.name): v for unit in make(annotated, True).units for v in unit.outputs}
    params = make(annotated, True).params
    names = {str(v.name): p for v, p in params.items()}
    assert names["t"] == names["y"]
    assert names["p"] == names["s"] != names["y"]
    assert quant(by_name["t"]) != names["t"]


def test_floats_between_integers() -> None:
    """What carries nothing is computed in floats; a value between two float nodes is not rounded."""
    weights = {"w": values(4, 4, 1, 1), "v": values(4, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]), node("Exp", ["a"], ["e"]), node("Log", ["e"], ["l"]), node("Conv", ["l", "v"], ["y"]),
    ]  # fmt: skip
    model = graph(nodes, {"x": (1, 4, 5, 5)}, weights)
    annotated = annotate(model, [feeds(model, 1)])
    plan = make(annotated, True)
    assert [u.integer for u in plan.units] == [True, False, False, True]
    assert {str(v.name) for v in plan.params} == {"x", "a", "l", "y"}
    for name in ("w", "v"):
        set_quant(next(v for v in annotated.graph.initializers.values() if v.name == name), None)
    assert make(annotated, True).params == {}
    with pytest.raises(UsageError, match="no quantization parameters"):
        lower(annotated, HOST, "int8")


def test_annotated_and_joined_constants() -> None:
    weights = {"k": values(4, 1, 1), "c": values(1, 2, 5, 5)}
    nodes = [node("Add", ["x", "k"], ["a"]), node("Concat", ["a", "c"], ["y"], axis=1)]
    model = graph(nodes, {"x": (1, 4, 5, 5)}, weights)
    annotated = annotate(model, [feeds(model, 1)])
    constants = annotated.graph.initializers
    set_quant(constants["k"], QuantParams(DType.int8, (0.5,), (3,)))
    got, facts = run(annotated, feeds(model, 1), "int8")
    assert (facts["partitions"], facts["operators"]) == (1, 4)
    x, out = quant(annotated.graph.inputs[0]), quant(annotated.graph.outputs[0])
    assert x is not None and out is not None
    total = fake(feeds(model, 1)["x"], x) + fake(weights["k"], QuantParams(DType.int8, (0.5,), (3,)))
    want = np.concatenate([total, weights["c"]], axis=1)
    assert np.abs(codes(got["y"], out) - codes(want, out)).max() <= 1


def test_a_value_of_floats_read_by_integers_is_read_as_codes_by_all() -> None:
    nodes = [node("Exp", ["x"], ["e"]), node("Conv", ["e", "w"], ["y"]), node("Neg", ["e"], ["n"])]
    model = graph(nodes, {"x": (1, 2, 3, 3)}, {"w": values(2, 2, 1, 1)}, ["y", "n"])
    annotated = annotate(model, [feeds(model, 1)], skip=["n", "x"])
    got, _ = run(annotated, feeds(model, 1), "int8")
    np.testing.assert_allclose(got["n"], simulated(annotated, feeds(model, 1))["n"], atol=1e-6)


def test_integer_states_keep_their_codes_and_say_their_scale() -> None:
    model = graph([node("Conv", ["s", "w"], ["t"])], {"s": (1, 4, 5, 6)}, {"w": values(4, 4, 1, 1)}, ["t"])
    annotated = annotate(model, [feeds(model, 1)])
    annotated.metadata_props[INTEGER_IO] = "s,t"
    (payload,) = lower(annotated, HOST, "int8")
    (state,), (after,) = payload.inputs, payload.outputs
    assert (state.dtype, state.quant) == (DType.int8, quant(annotated.graph.inputs[0]))
    assert (after.dtype, after.quant) == (DType.int8, quant(annotated.graph.outputs[0]))
    _, binding = open_payload(payload)
    x = feeds(model, 1)["s"]
    assert state.quant is not None and after.quant is not None
    binding.inputs["s"][...] = codes(x, state.quant).astype(np.int8)
    binding.run()
    want = codes(simulated(annotated, {"s": x})["t"], after.quant)
    assert np.abs(binding.outputs["t"].astype(int) - want).max() <= 1


def test_first_layer_reads_pairs_of_columns() -> None:
    """416 x 416 x 3 is read as 416 x 208 x 6: the same memory, half as many windows."""
    weights = {"w": values(8, 3, 6, 6), "b": values(8)}
    model = graph(
        [node("Conv", ["x", "w", "b"], ["y"], strides=[2, 2], pads=[2, 2, 2, 2])],
        {"x": (1, 3, 16, 16)},
        weights,
    )
    annotated, facts = check(model)
    assert facts["operators"] == 3  # QUANTIZE, CONV_2D, DEQUANTIZE: no RESHAPE
    (payload,) = lower(annotated, HOST, "int8")
    assert payload.options["inputs"] == [["x", [0, 2, 3, 1], [1, 16, 16, 3]]]
    executable, _ = open_payload(payload)
    assert executable.inputs[0].shape == (1, 3, 16, 16)


def test_weights_with_a_zero_point_are_refused() -> None:
    model = graph([node("Conv", ["x", "w"], ["y"])], {"x": (1, 4, 5, 5)}, {"w": values(4, 4, 1, 1)})
    annotated = annotate(model, [feeds(model, 1)])
    weight = next(iter(annotated.graph.initializers.values()))
    set_quant(weight, QuantParams(DType.int8, (0.1,) * 4, (3,) * 4, 0))
    with pytest.raises(LoweringError, match="zero point"):
        lower(annotated, HOST, "int8")


def test_dynamic_weights_are_codes() -> None:
    weights = {"w": values(64, 32, 3, 3), "d": values(64, 1, 3, 3), "f": values(10, 64)}
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]), node("Conv", ["a", "d"], ["b"], group=64),
        node("GlobalAveragePool", ["b"], ["p"]), node("Flatten", ["p"], ["q"]), node("Gemm", ["q", "f"], ["y"], transB=1),
    ]  # fmt: skip
    model = graph(nodes, {"x": (1, 32, 9, 9)}, weights)
    got, facts = run(model, feeds(model, 1), "dynamic")
    assert facts["partitions"] == 1
    want = probe.evaluate(model, feeds(model, 1))["y"]
    assert np.abs(got["y"] - want).max() < 0.02 * np.abs(want).max()
    (payload,) = lower(model, HOST, "dynamic")
    assert len(payload.data) < 64 * 32 * 9 + 64 * 10 + 2 * 64 * 9 + 6000


def test_the_same_bytes_twice() -> None:
    model = silu_block()
    annotated = annotate(model, [feeds(model, 1)])
    for precision in ("float32", "float16", "int8", "dynamic"):
        assert lower(annotated, HOST, precision) == lower(annotated.clone(), HOST, precision)


def test_lowering_leaves_the_graph_as_it_was() -> None:
    annotated = annotate(silu_block(), [feeds(silu_block(), 1)])
    before = ir.to_proto(annotated).SerializeToString(deterministic=True)
    lower(annotated, HOST, "int8")
    assert ir.to_proto(annotated).SerializeToString(deterministic=True) == before


def test_affine_covers_zero() -> None:
    assert affine(1.0, 3.0).zero_point == (-128,)
