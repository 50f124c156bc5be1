"""The lint: what of a network runs in integers, in words; on the real detectors too."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit import frontends
from edgekit.backends.onnxruntime.lower import lower
from edgekit.backends.tensorrt.lower import lower as tensorrt_lower
from edgekit.passes import prepare
from edgekit.passes.graph import constant, input_size
from edgekit.quant.annotate import node_id, set_quant
from edgekit.quant.calibrate import calibrate
from edgekit.quant.lint import NodeReport, integer_share, lint
from edgekit.quant.placement import Choices, place
from edgekit.quant.stats import Stats
from edgekit.spec import DType, QuantParams
from tests.helpers import shared_data
from tests.quant_graphs import annotated, between, executed, network, produced
from tests.test_quant_placement import ARM, CONV, ORIN, ORT, ORT_ARM, TRT, X86


def why(model: ir.Model, rules=ORT) -> dict[str, str]:
    return {r.id: r.reason for r in lint(model, rules)}


def test_a_report_per_node() -> None:
    reports = lint(annotated(between("SiLU"), ORT), ORT)
    assert [(r.id, r.op) for r in reports] == [("a", "Conv"), ("g", "Sigmoid"), ("b", "Mul"), ("y", "Conv")]
    assert all(r.integer and not r.reason for r in reports)
    assert [r.macs for r in reports] == [64 * 16 * 144, 0, 0, 64 * 16 * 144]
    assert integer_share(reports) == 1.0


def test_share_is_by_multiplications() -> None:
    reports = lint(annotated(between("Add"), ORT, float_nodes=frozenset({"a"})), ORT)
    assert integer_share(reports) == pytest.approx(2 / 3)
    assert integer_share([]) == 0
    assert integer_share([NodeReport("a", "Relu", True, "", 0)]) == 0


@pytest.mark.parametrize(
    ("choices", "node", "reason"),
    [
        ({"float_nodes": frozenset({"a"})}, "a", "the plan leaves it in float: its weight is not quantized"),
        ({"float_nodes": frozenset({"g"})}, "b", "its input g is not quantized"),
        ({"float_nodes": frozenset({"g"})}, "g", "its output g is not quantized"),
    ],
)
def test_reasons_of_a_plan(choices: dict, node: str, reason: str) -> None:
    assert why(annotated(between("SiLU"), ORT, **choices))[node] == reason


def test_reasons_of_the_library() -> None:
    assert why(annotated(between("Tanh"), ORT))["b"] == "Tanh runs in float on ONNX Runtime on x86"
    assert (
        why(annotated(between("ResizeLinear"), ORT))["b"]
        == "linear interpolation runs in float on ONNX Runtime on x86"
    )
    tail = network(f"a = {CONV} (x, w1, b1) \n y = Sigmoid(a)")
    assert why(annotated(tail, ORT))["y"] == "nothing behind it computes in integers"
    assert why(annotated(between("SiLU"), TRT), TRT)["g"] == "Sigmoid runs in float on TensorRT"
    computed = network(f"a = {CONV} (x, w1, b1) \n n = Slice(w2, s0, s16, s1) \n y = {CONV} (a, n, b2)")
    assert why(annotated(computed, ORT))["y"] == "its weight is computed, not constant"


def test_an_activation_behind_a_float_layer() -> None:
    found = why(annotated(between("Relu"), ORT, float_nodes=frozenset({"a"})))
    assert found["b"] == "what feeds it runs in float"


def test_a_plan_for_another_target() -> None:
    """TensorRT's annotations lack the outputs that ONNX Runtime needs, and zero points break TensorRT's."""
    assert why(annotated(between("SiLU"), TRT))["a"] == "its output a is not quantized"
    assert why(annotated(between("SiLU"), ORT), TRT)["a"] == "its input has a zero point other than 0"


def test_two_scales_around_a_move(tmp_path: Path) -> None:
    model = annotated(between("MaxPool"), ORT)
    set_quant(produced(model, "b").outputs[0], QuantParams(DType.int8, (0.1,), (3,)))
    assert why(model)["b"] == "the scales of its input and output differ"
    ran = executed(lower(model, X86, "int8")[0].data, tmp_path)
    assert (ran["NhwcMaxPool"], ran["QuantizeLinear"]) == (0, 2)


# --- the real detectors ---------------------------------------------------------------------------


@functools.cache
def detector(name: str) -> tuple[ir.Model, Stats]:
    files = {"yolox_nano": "yolox_nano/yolox_nano.onnx", "fastestdet": "fastestdet/FastestDet.onnx"}
    model = prepare(frontends.load(shared_data() / "models" / files[name]), check=False).model
    height, width = input_size(model)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1, 3, height, width)).astype(np.float32)
    return model, calibrate(model, [{str(model.graph.inputs[0].name): picture}])


@pytest.mark.parametrize("name", ["yolox_nano", "fastestdet"])
@pytest.mark.parametrize("arm", [False, True], ids=["x86", "arm"])
def test_detectors_on_onnxruntime(name: str, arm: bool, tmp_path: Path) -> None:
    model, stats = detector(name)
    rules, target = (ORT_ARM, ARM) if arm else (ORT, X86)
    plan = place(model, stats, rules, Choices(scheme="minmax"))
    reports = lint(plan, rules)
    assert all(r.integer for r in reports)
    data = lower(plan, target, "int8")[0].data
    assert len(data) <= {"yolox_nano": 1.1e6, "fastestdet": 0.35e6}[name]
    ran = executed(data, tmp_path, arm=arm)
    integer = Counter(r.op for r in reports if r.integer)
    assert ran["QLinearConv"] == integer["Conv"] == {"yolox_nano": 113, "fastestdet": 70}[name]
    for op in ("Sigmoid", "Mul", "Add", "Concat", "AveragePool"):
        assert ran[f"QLinear{op}"] == integer[op]
    assert not ran["Conv"] + ran["Relu"] + ran["Sigmoid"] + ran["Mul"] + ran["Concat"]
    assert ran["QuantizeLinear"] == 1
    assert ran["DequantizeLinear"] == len(model.graph.outputs)


def test_islands_in_a_detector(tmp_path: Path) -> None:
    """A third of the convolutions left in float are float when it runs, and the rest is not."""
    model, stats = detector("yolox_nano")
    chosen = [node_id(n) for n in model.graph if n.op_type == "Conv"][::3]
    plan = place(model, stats, ORT, Choices(scheme="minmax", float_nodes=frozenset(chosen)))
    integer = Counter(r.op for r in lint(plan, ORT) if r.integer)
    assert integer["Conv"] == 113 - len(chosen)
    ran = executed(lower(plan, X86, "int8")[0].data, tmp_path)
    assert (ran["QLinearConv"], ran["Conv"]) == (113 - len(chosen), len(chosen))
    assert {op: ran[f"QLinear{op}"] for op in ("Sigmoid", "Mul", "Add", "Concat")} == {
        op: integer[op] for op in ("Sigmoid", "Mul", "Add", "Concat")
    }


@pytest.mark.parametrize("name", ["yolox_nano", "fastestdet"])
def test_detectors_on_tensorrt(name: str) -> None:
    model, stats = detector(name)
    plan = place(model, stats, TRT, Choices(scheme="minmax"))
    reports = lint(plan, TRT)
    assert 0.99 < integer_share(reports) < 1.0
    floats = {r.reason for r in reports if r.op == "Conv" and not r.integer}
    assert floats == {
        f"{ {'yolox_nano': 64, 'fastestdet': 96}[name] } input and {n} output channels are too few to gain"
        for n in (1, 4)
    }
    (payload,) = tensorrt_lower(plan, ORIN, "int8")
    found = ir.from_proto(__import__("onnx").load_from_string(payload.data))
    both = sum(n.op_type == "Conv" and all(_dequantized(v) for v in n.inputs[:2]) for n in found.graph)
    assert both == sum(r.integer for r in reports if r.op == "Conv")
    whole = replace(TRT, skinny=False)
    assert integer_share(lint(place(model, stats, whole, Choices(scheme="minmax")), whole)) == 1.0


def _dequantized(value: ir.Value | None) -> bool:
    producer = None if value is None or constant(value) is not None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
