"""The simulation is what the annotations mean, and what the integer kernels compute."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.backends.onnxruntime.lower import lower
from edgekit.errors import UsageError
from edgekit.quant import qdq
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.simulate import batches, fake_quantized, run, sqnr
from edgekit.spec import DType, QuantParams
from tests.quant_graphs import BETWEEN, annotated, between, network, params, pictures, session
from tests.test_quant_placement import ARM, CONV, ORT, ORT_ARM, TRT, X86

STEPS = {"Softmax": 1}
"""Codes by which an integer kernel may differ from the float computation; 0 for all others."""


@pytest.mark.parametrize("arm", [False, True], ids=["x86", "arm"])
@pytest.mark.parametrize("name", BETWEEN)
def test_integer_kernels_compute_what_the_simulation_says(name: str, arm: bool) -> None:
    model = annotated(between(name), ORT_ARM if arm else ORT)
    running = session(lower(model, ARM if arm else X86, "int8")[0].data, arm=arm)
    (step,) = quant(model.graph.outputs[0]).scale
    feeds = pictures(3, seed=7)
    for feed, expected in zip(feeds, run(fake_quantized(model), feeds), strict=True):
        (found,) = running.run(None, feed)
        codes = np.rint((found - expected["y"]) / step)
        assert np.abs(codes).max() <= STEPS.get(name, 0)
        assert np.abs(found).max() > 10 * step


@pytest.mark.parametrize("name", BETWEEN)
def test_the_tensorrt_graph_before_float16_is_the_simulation(name: str) -> None:
    model = annotated(between(name), TRT)
    file = qdq.lowered(model, TRT, "orin")
    feeds = pictures(2, seed=7)
    reference = run(fake_quantized(model, int32_bias=False), feeds)
    for expected, found in zip(reference, run(file, feeds), strict=True):
        assert np.abs(found["y"] - expected["y"]).max() <= 1e-5 * np.abs(expected["y"]).max()


def test_by_hand() -> None:
    """One convolution by the formulas of annotate.py, in numpy."""
    model = network("y = Conv (x, w1, b1)", outputs={"y": (1, 16, 6, 6)})
    x, w, y = (
        QuantParams(DType.int8, (0.03,), (5,)),
        QuantParams(DType.int8, tuple(0.01 + 0.001 * i for i in range(16)), (0,) * 16, 0),
        QuantParams(DType.int8, (0.05,), (-7,)),
    )
    set_quant(model.graph.inputs[0], x)
    set_quant(model.graph.initializers["w1"], w)
    set_quant(model.graph.outputs[0], y)
    feed = pictures(1)[0]
    scales = np.array(w.scale)[:, None, None, None]
    weights = model.graph.initializers["w1"].const_value.numpy()
    bias = model.graph.initializers["b1"].const_value.numpy()
    xq = np.clip(np.rint(feed["x"][0] / 0.03) + 5, -128, 127) - 5
    wq = np.clip(np.rint(weights / scales), -127, 127)
    windows = np.lib.stride_tricks.sliding_window_view(xq, (3, 3), axis=(1, 2))
    total = np.einsum("cijkl,ockl->oij", windows, wq)
    total += np.rint(bias / (0.03 * np.array(w.scale)))[:, None, None]
    real = total * 0.03 * scales[:, 0]
    expected = (np.clip(np.rint(real / 0.05) - 7, -128, 127) + 7) * 0.05
    (found,) = run(fake_quantized(model), [feed])
    off = np.rint((found["y"][0] - expected) / 0.05)
    assert np.abs(off).max() <= 1, "a tie may round the other way in float32"
    assert (off != 0).mean() < 1e-3
    assert ((expected <= -6.0) | (expected >= 6.0)).any(), "the ends of the range are reached"


def test_values_keep_their_names_and_the_model_its_interface() -> None:
    model = annotated(between("SiLU"), ORT)
    made = fake_quantized(model)
    assert [v.name for v in made.graph.inputs] == ["x"]
    assert [v.name for v in made.graph.outputs] == ["y"]
    (feed,) = pictures(1)
    (values,) = run(made, [feed], ["a", "a.exact", "g"])
    (step,) = quant(next(n for n in model.graph if n.outputs[0].name == "a").outputs[0]).scale
    assert np.allclose(np.rint(values["a"] / step), values["a"] / step, atol=1e-4)
    assert np.abs(values["a"] - values["a.exact"]).max() > 0.4 * step
    assert params(made) == {}
    assert "a" in params(model), "the annotated model is not changed"


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(UsageError, match="value 'aa': not in this network"):
        list(run(between("Add"), pictures(1), ["aa"]))


def test_values_come_in_bounded_groups() -> None:
    model = between("SiLU")
    size = 4 * 16 * 8 * 8
    names = ["a", "g", "b", "y"]
    assert list(batches(model, names, 2 * size)) == [["a", "g"], ["b", "y"]]
    assert list(batches(model, names, size - 1)) == [["a"], ["g"], ["b"], ["y"]]
    assert list(batches(model, names)) == [names]


def test_sqnr_per_value() -> None:
    model = between("SiLU")
    feeds = pictures(2)
    fine = annotated(model, ORT)
    found = sqnr(model, fake_quantized(fine), feeds, ["a", "b", "y"])
    assert all(20 < v < 60 for v in found.values())
    coarse = annotated(model, ORT, ranges=(("a", (-80.0, 80.0)),))
    assert sqnr(model, fake_quantized(coarse), feeds, ["a"])["a"] < found["a"] - 6
    assert sqnr(model, model, feeds, ["a"])["a"] == np.inf
    values = next(run(model, feeds[:1], ["a"]))["a"], next(run(fake_quantized(fine), feeds[:1], ["a"]))["a"]
    by_hand = 10 * np.log10((values[0] ** 2).sum() / ((values[0] - values[1]) ** 2).sum())
    assert sqnr(model, fake_quantized(fine), feeds[:1], ["a"])["a"] == pytest.approx(by_hand, abs=1e-3)


def test_older_opsets_are_raised_with_their_annotations() -> None:
    model = annotated(between("Add"), ORT)
    expected = next(run(fake_quantized(model), pictures(1)))["y"]
    old = model.clone()
    old.graph.opset_imports[""] = 11  # nothing in this network changed since
    assert np.array_equal(next(run(fake_quantized(old), pictures(1)))["y"], expected)
    assert fake_quantized(old).graph.opset_imports[""] >= 13


def test_a_float_network_simulates_itself() -> None:
    model = network(f"a = {CONV} (x, w1, b1) \n y = Relu(a)")
    (feed,) = pictures(1)
    assert np.array_equal(next(run(model, [feed]))["y"], next(run(fake_quantized(model), [feed]))["y"])
    assert isinstance(fake_quantized(model), ir.Model)
