"""The probe: one model whose roundings are switched says what separate models would."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.placement import prepared
from edgekit.quant.rules import Rules
from edgekit.quant.sensitivity import Probe, output_error
from edgekit.quant.simulate import fake_quantized, run
from tests import quant_graphs
from tests.quant_graphs import BETWEEN, between, network, pictures
from tests.test_quant_placement import ORT, TRT

TWO = (
    "a = Conv <pads=[1,1,1,1]> (x, w1, b1) \n r = Relu(a) \n y = Conv <pads=[1,1,1,1]> (r, w2, b2) \n "
    "z = Conv <pads=[1,1,1,1]> (r, w3, b3)"
)
SHAPES = {"y": (1, 16, 8, 8), "z": (1, 16, 8, 8)}


def only(model: ir.Model, names: Collection[str]) -> ir.Model:
    """A copy in which nothing but `names` carries params: no weight either."""
    model = prepared(model)
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.name not in names:
            set_quant(value, None)
    for value in model.graph.initializers.values():
        if value.name not in names:
            set_quant(value, None)
    return model


def annotated(model: ir.Model) -> list[str]:
    """Names of what carries one scale: activations and constants, no weights."""
    return [name for name, params in quant_graphs.params(model).items() if params.axis is None]


def switched(probe: Probe, feed: dict[str, np.ndarray], names: Collection[str]) -> dict[str, np.ndarray]:
    return probe._run(feed, names)


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("rules", [ORT, TRT], ids=["ort", "tensorrt"])
@pytest.mark.parametrize("name", BETWEEN)
def test_all_on_is_the_simulation_and_all_off_the_float_network(name: str, rules: Rules) -> None:
    exact = between(name)
    model = quant_graphs.annotated(exact, rules)
    feeds = pictures(2, seed=7)
    probe = Probe(model, feeds)
    assert sorted(probe.values) == sorted(annotated(model))
    for feed, expected in zip(feeds, run(fake_quantized(model), feeds), strict=True):
        assert_same_bits(switched(probe, feed, probe.values), expected)
    unweighted = only(model, set(probe.values))  # weights and biases are rounded in every case
    probe = Probe(unweighted, feeds)
    for feed, expected in zip(feeds, run(exact, feeds), strict=True):
        assert_same_bits(switched(probe, feed, ()), expected)


@pytest.mark.parametrize("name", ["SiLU", "Concat", "Add", "MaxPool", "AddConstant"])
def test_one_on_is_the_network_with_that_value_annotated(name: str) -> None:
    model = only(
        quant_graphs.annotated(between(name), ORT), annotated(quant_graphs.annotated(between(name), ORT))
    )
    feeds = pictures(2, seed=7)
    probe = Probe(model, feeds)
    assert len(probe.values) >= 3
    for value in probe.values:
        alone = only(model, {value})
        assert annotated(alone) == [value]
        for feed, expected in zip(feeds, run(fake_quantized(alone), feeds), strict=True):
            assert_same_bits(switched(probe, feed, {value}), expected)


def test_two_outputs_of_which_one_is_read_on() -> None:
    model = quant_graphs.annotated(network(TWO, outputs=SHAPES), ORT)
    probe = Probe(model, pictures(2))
    assert {"x", "r", "y", "z"} == set(probe.values)
    for feed, expected in zip(pictures(2), run(fake_quantized(model), pictures(2)), strict=True):
        assert_same_bits(switched(probe, feed, probe.values), expected)
    assert probe.error({"y"}) > 0 and probe.error({"z"}) > 0
    both = switched(probe, pictures(1)[0], {"y"})
    neither = switched(probe, pictures(1)[0], ())
    assert both["z"].tobytes() == neither["z"].tobytes() and both["y"].tobytes() != neither["y"].tobytes()


def test_errors_are_against_rounded_weights_and_exact_activations() -> None:
    model = quant_graphs.annotated(between("SiLU"), ORT)
    feeds = pictures(3, seed=7)
    probe = Probe(model, feeds)
    assert probe.error(()) == 0
    everything = [switched(probe, feed, probe.values) for feed in feeds]
    nothing = [switched(probe, feed, ()) for feed in feeds]
    expected = np.mean([output_error(x, y) for x, y in zip(nothing, everything, strict=True)])
    assert probe.error() == probe.error(probe.values) == pytest.approx(float(expected))
    assert expected > 0


def test_ranking() -> None:
    model = quant_graphs.annotated(between("SiLU"), ORT)
    params = quant(next(v for n in model.graph for v in n.outputs if v.name == "b"))
    assert params is not None
    # one value with a scale fifty times too coarse is the first to blame
    for node in model.graph:
        for value in node.outputs:
            if value.name == "b":
                set_quant(value, type(params)(params.dtype, (params.scale[0] * 50,), params.zero_point))
    probe = Probe(model, pictures(2))
    steps: list[tuple[str, int, int]] = []
    ranked = probe.rank(progress=lambda *step: steps.append(step))
    assert ranked[0][0] == "b" and ranked[0][1] > 10 * ranked[1][1]
    assert {name for name, _ in ranked} == set(probe.values)
    assert ranked == [(n, probe.error((n,))) for n, _ in ranked]
    assert [e for _, e in ranked] == sorted((e for _, e in ranked), reverse=True)
    assert [done for _, done, _ in steps] == list(range(len(probe.values)))
    assert [n for n, _ in probe.rank(["x", "b"])] == ["b", "x"]
    assert probe.rank() == Probe(model, pictures(2)).rank(), "again the same"


def test_output_error_by_hand() -> None:
    x = {"y": np.array([0.0, 2.0], np.float32), "z": np.array([5.0, 5.0], np.float32)}
    assert output_error(x, x) == 0
    # of y: noise 0.5 over variance 1; z stays
    assert output_error(x, {**x, "y": np.array([1.0, 2.0], np.float32)}) == pytest.approx(0.25)
    mean = {"y": np.array([1.0, 1.0], np.float32), "z": x["z"]}
    assert output_error(x, mean) == pytest.approx(0.5), "an output that says nothing counts 1"
    moved = {"y": x["y"] + 100}
    assert output_error({"y": moved["y"]}, {"y": moved["y"] + 1}) == pytest.approx(
        output_error({"y": x["y"]}, {"y": x["y"] + 1})
    )


def test_the_model_is_not_changed_and_a_float_one_has_nothing_to_switch() -> None:
    model = quant_graphs.annotated(between("Relu"), ORT)
    before = ir.to_proto(model).SerializeToString(), quant_graphs.params(model)
    Probe(model, pictures(1)).error()
    assert (ir.to_proto(model).SerializeToString(), quant_graphs.params(model)) == before
    probe = Probe(between("Relu"), pictures(1))
    assert probe.values == () and probe.error() == 0 and probe.rank() == []
