"""The load-time self-test: what it refuses, what it lets pass, and when it says nothing about speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgekit
from edgekit.backends.onnxruntime.wire import align_weights
from edgekit.bundle import Bundle
from edgekit.errors import SelfTestError
from edgekit.manifest import GoldenTensor
from edgekit.runtime import selftest
from edgekit.runtime.selftest import check_golden, check_latency, conditions, recorded_latency
from tests.bundle_samples import files_of
from tests.helpers import ROOT
from tests.plan_bundles import Step, altered, network, replace_evidence, replace_file, write


@pytest.fixture(scope="module", params=["float32", "float16"])
def detector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped detector for this machine."""
    out = tmp_path_factory.mktemp("detector")
    (bundle,) = edgekit.build(ROOT / "apps" / "detect", "host", precision=request.param, out=out, limit=2)
    bundle.close()
    return bundle.path


def _payload(path: Path) -> tuple[str, onnx.ModelProto]:
    with Bundle.open(path) as bundle:
        ((_, variant),) = bundle.manifest.variants()
        return variant.path, onnx.load_from_string(bytes(bundle.read(variant.path)))


def _large(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Convolution weights, in graph order."""
    return [t for t in model.graph.initializer if len(t.dims) == 4 and math.prod(t.dims) > 500]


def _set(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _permute_inputs(model: onnx.ModelProto) -> None:
    tensor = _large(model)[3]
    w = numpy_helper.to_array(tensor)
    _set(tensor, w[:, ::-1] if w.shape[1] > 1 else w[::-1])


def _zero_a_layer(model: onnx.ModelProto) -> None:
    tensor = _large(model)[len(_large(model)) // 2]
    _set(tensor, np.zeros_like(numpy_helper.to_array(tensor)))


def _flip_a_kernel(model: onnx.ModelProto) -> None:
    tensor = next(t for t in _large(model) if t.dims[2] == 3)
    _set(tensor, numpy_helper.to_array(tensor)[:, :, :, ::-1])


def _swap_classes(model: onnx.ModelProto) -> None:
    """The last convolution of every output: its last two channels change places."""
    made = {node.output[0]: node for node in model.graph.node}
    weights = {t.name: t for t in model.graph.initializer}
    for output in model.graph.output:
        node = made[output.name]
        while node.op_type != "Conv":
            node = made[node.input[-1]]  # the classes come last
        for name in node.input[1:]:
            while name not in weights:
                name = made[name].input[0]
            w = numpy_helper.to_array(weights[name]).copy()
            if len(w) >= 2:
                w[[-1, -2]] = w[[-2, -1]]
                _set(weights[name], w)


def _forget_a_bias(model: onnx.ModelProto) -> None:
    weights = {t.name: t for t in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    convs = [n for n in model.graph.node if n.op_type == "Conv" and len(n.input) == 3]
    name = convs[len(convs) // 2].input[2]
    while name not in weights:
        name = made[name].input[0]
    _set(weights[name], 0 * numpy_helper.to_array(weights[name]))


def _one_nan(model: onnx.ModelProto) -> None:
    tensor = _large(model)[-1]
    w = numpy_helper.to_array(tensor).copy()
    w.flat[0] = np.nan
    _set(tensor, w)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_permute_inputs, "differ from the golden ones"),
        (_zero_a_layer, "differ from the golden ones"),
        (_flip_a_kernel, "differ from the golden ones"),
        (_swap_classes, "differ from the golden ones"),
        (_forget_a_bias, "differ from the golden ones"),
        (_one_nan, "computed values are NaN or infinite"),
    ],
)
def test_a_forged_payload_is_refused(
    detector: Path, tmp_path: Path, edit: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    name, model = _payload(detector)
    before = model.SerializeToString()
    edit(model)
    assert model.SerializeToString() != before
    forged = replace_file(detector, tmp_path / "f.edge", name, align_weights(model.SerializeToString()))
    with Bundle.open(forged) as bundle:
        bundle.verify_files()  # every digest fits
    with pytest.raises(SelfTestError, match=rf"f\.edge: self-test output .*{reason}"):
        edgekit.load(forged)
    edgekit.load(forged, self_test=False).close()


def test_the_honest_payload_passes_also_with_other_threads(detector: Path) -> None:
    for threads in (0, 1, 2):
        with edgekit.load(detector, threads=threads) as engine:
            assert not engine.refused


def test_the_golden_rule_leaves_room_for_another_libraries_rounding(detector: Path) -> None:
    """Weights rounded to half precision: a float32 bundle must see it as noise beyond its last digits only
    if it is; a float16 bundle was built with exactly that."""
    with Bundle.open(detector) as bundle:
        (rule,) = {(g.atol > 0, g.allow > 0) for g in bundle.manifest.golden.outputs}
        ((_, variant),) = bundle.manifest.variants()
        spans = [
            (g.atol, float(np.abs(np.frombuffer(bundle.read(g.path), np.float32)).max()))
            for g in bundle.manifest.golden.outputs
        ]
    assert rule == (True, variant.precision == "float16")
    limit = 2e-3 if variant.precision == "float32" else 0.05
    assert all(atol < limit * span for atol, span in spans), (
        "a tolerance of the size of the values tests nothing"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_wrong_golden_values_are_refused(tmp_path: Path, value: float) -> None:
    path = write(tmp_path / "a.edge", [Step("net", {"a": network("x", "y")})])
    with Bundle.open(path) as bundle:
        (output,) = bundle.manifest.golden.outputs
        values = np.frombuffer(bundle.read(output.path), np.float32).copy()
    values[5] = value
    bad = replace_file(path, tmp_path / "b.edge", output.path, values.tobytes())
    reason = "1 of 136 values differ" if value == 0 else "1 of 136 golden values are NaN or infinite"
    with pytest.raises(SelfTestError, match=reason):
        edgekit.load(bad)


def test_allowed_share_of_outliers() -> None:
    want = np.zeros(1000, np.float32)
    got = want.copy()
    got[:2] = 1
    rule = GoldenTensor("y", "golden/y", atol=0.5, allow=0.002)
    check_golden("b", rule, want, got)
    got[2] = 1
    with pytest.raises(SelfTestError, match=r"3 of 1000 values .* in all but 0\.002 of them"):
        check_golden("b", rule, want, got)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_, np.float16])
def test_golden_values_of_any_type(dtype: Any) -> None:
    want = np.array([0, 1, 1], dtype)
    rule = GoldenTensor("y", "golden/y")
    check_golden("b", rule, want, want.copy())
    with pytest.raises(SelfTestError, match="1 of 3 values differ"):
        check_golden("b", rule, want, np.array([1, 1, 1], dtype))


# --- latency -----------------------------------------------------------------------------------


def timing(median_ms: Any, **machine: Any) -> dict[str, Any]:
    stages = {"engine": {"median_ms": median_ms}}
    return {"timing": {"machine": {**conditions(0), "os": "any", **machine}, "stages": stages}}


def test_latency_far_beyond_the_recorded_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "LATENCY_SECONDS", 0.01)
    steps = [Step("net", {"a": network("x", "y")})]
    slow = write(tmp_path / "slow.edge", steps, evidence=timing(1e-7))
    with pytest.raises(SelfTestError, match=r"self-test latency: .* ms at best of \d+ runs, .*1e-07 ms"):
        edgekit.load(slow)
    edgekit.load(slow, self_test=False).close()
    edgekit.load(write(tmp_path / "fine.edge", steps, evidence=timing(1e4))).close()
    # another CPU, board, number of cores or threads: nothing can be said
    for other in ({"cpu": "Z80"}, {"arch": "riscv64"}, {"cores": 4096}, {"threads": 3}):
        edgekit.load(write(tmp_path / "other.edge", steps, evidence=timing(1e-7, **other))).close()
    edgekit.load(slow, threads=conditions(0)["cores"] + 1).close()


def test_latency_counts_for_the_payload_it_was_measured_with() -> None:
    evidence = timing(2.0)
    assert recorded_latency(evidence, ["a"], 0) == 2.0
    evidence["timing"]["payload"] = "a"
    assert recorded_latency(evidence, ["a"], 0) == 2.0
    assert recorded_latency(evidence, ["b"], 0) is None
    assert recorded_latency(evidence, ["a", "b"], 0) is None


def test_one_fast_run_among_slow_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0, "runs": 0}
    monkeypatch.setattr(selftest.time, "perf_counter", lambda: clock["now"])

    def run() -> None:  # 100 ms a run; the eighth takes 5 ms
        clock["runs"] += 1
        clock["now"] += 0.005 if clock["runs"] == 8 else 0.1

    check_latency("b", 1.0, run)
    assert clock["runs"] == 8
    clock.update(now=0.0, runs=8)
    with pytest.raises(SelfTestError, match=r"100 ms at best of 1\d runs"):
        check_latency("b", 1.0, run)


@pytest.mark.parametrize(
    "evidence",
    [
        {},
        {"timing": None},
        {"timing": "fast"},
        {"timing": {"not_measured": "elsewhere"}},
        {"timing": {"machine": [], "stages": 3}},
        {"timing": {"machine": {}, "stages": {"engine": 4}}},
        timing("2 ms"),
        timing(True),
        timing(None),
    ],
)
def test_evidence_of_any_shape_is_no_crash(tmp_path: Path, evidence: dict[str, Any]) -> None:
    assert recorded_latency(evidence, ["a"], 0) is None
    path = write(tmp_path / "a.edge", [Step("net", {"a": network("x", "y")})])
    edgekit.load(replace_evidence(path, tmp_path / "b.edge", lambda _: evidence)).close()


def test_a_build_records_the_latency_that_the_self_test_looks_for(host_bundle: str, tmp_path: Path) -> None:
    with Bundle.open(host_bundle) as bundle:
        ((_, variant),) = bundle.manifest.variants()
        assert recorded_latency(bundle.evidence, [variant.name], 0) is not None

    def tiny(tree: dict[str, Any]) -> None:
        tree["timing"]["stages"]["engine"]["median_ms"] = 1e-6

    forged = replace_evidence(Path(host_bundle), tmp_path / "f.edge", tiny)
    with pytest.raises(SelfTestError, match="latency"):
        edgekit.load(forged)


def test_altered_weights_of_a_plan_step_are_refused(tmp_path: Path) -> None:
    first, second = network("x", "mid", 1), network("mid", "y", 2)
    path = write(tmp_path / "a.edge", [Step("first", {"a": first}), Step("second", {"a": second})])
    name = "segments/first/a.onnx"
    assert name in files_of(path)
    bad = altered(first, lambda w: np.roll(w, 1, axis=0))
    forged = replace_file(path, tmp_path / "b.edge", name, align_weights(bad.SerializeToString()))
    with pytest.raises(SelfTestError, match="output y"):
        edgekit.load(forged)
