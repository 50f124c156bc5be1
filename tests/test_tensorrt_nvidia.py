"""Parse and build for real through NVIDIA's ahead-of-time builder, which needs no GPU (`make test-nvidia`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from onnx import numpy_helper

from edgekit.backends.tensorrt import operators
from edgekit.backends.tensorrt.compile import compile_engine
from edgekit.backends.tensorrt.lint import dtype_name, lint
from edgekit.backends.tensorrt.lower import lower
from edgekit.backends.tensorrt.plan import BuildPlan, Hardware, Io
from edgekit.errors import LoweringError
from edgekit.passes.states import set_states
from edgekit.quant import sparsity
from edgekit.quant.annotate import REAL_STATES
from edgekit.quant.rules import rules_for
from edgekit.target import Target
from tests.helpers import ROOT
from tests.quant_graphs import BETWEEN, between, unmeasured
from tests.sparse_graphs import folded, network, stored
from tests.state_bundles import STATES, shifted
from tests.tensorrt_graphs import BAD, build, qdq, random_network

trt = pytest.importorskip("tensorrt_rtx", reason="needs NVIDIA's builder: make test-nvidia")
pytestmark = pytest.mark.nvidia

ORIN = Target.load("jetson-orin")
CAPABILITIES = ("8.6", "12.0")


def payload(seed: int = 3, precision: str = "float16") -> tuple[bytes, BuildPlan]:
    model, _ = random_network(seed)
    (made,) = lower(ir.from_proto(model), ORIN, precision)
    return made.data, BuildPlan.from_options(dict(made.options))


def operators_of(seed: int) -> set[str]:
    return {n.op_type for n in random_network(seed)[0].graph.node}


def plan_of(model: ir.Model) -> BuildPlan:
    """A plan for a graph that `lower` would refuse."""

    def sides(values):
        return tuple(
            Io(str(v.name), "float32", tuple(d for d in v.shape if isinstance(d, int))) for v in values
        )

    return BuildPlan(sides(model.graph.inputs), sides(model.graph.outputs), 1 << 30, Hardware("Orin", "8.7"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("seed", range(6))
def test_what_lower_writes_is_accepted(seed: int, precision: str, capability: str) -> None:
    data, plan = payload(seed, precision)
    built = compile_engine(trt, data, plan, compute_capability=capability)
    assert len(bytes(built.engine)) == built.nbytes > 0  # as `engine` copies it into its cache


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", BETWEEN)
def test_int8_payloads_are_accepted(name: str, capability: str) -> None:
    """Each operator between two quantized convolutions."""
    (made,) = lower(unmeasured(between(name), rules_for("tensorrt", ORIN)), ORIN, "int8")
    plan = BuildPlan.from_options(dict(made.options))
    assert compile_engine(trt, made.data, plan, compute_capability=capability).nbytes > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_sparse_payloads_are_accepted(precision: str, capability: str) -> None:
    """Weights of 2:4, by a plan with the flag for sparse weights. That it takes them says nothing of what it gains."""
    model = folded(network())
    (made,) = lower(
        unmeasured(model, rules_for("tensorrt", ORIN)) if precision == "int8" else model,
        ORIN,
        precision,
    )
    plan = BuildPlan.from_options(dict(made.options))
    assert plan.sparse_weights
    assert all(sparsity.holds(w) for w in stored(made))
    assert compile_engine(trt, made.data, plan, compute_capability=capability).nbytes > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("real", [False, True])
def test_states_as_codes_and_as_reals_are_accepted(real: bool, capability: str) -> None:
    model = shifted()
    set_states(model, STATES)
    made = unmeasured(model, rules_for("tensorrt", ORIN))
    if real:
        made.metadata_props[REAL_STATES] = "1"
    (payload_,) = lower(made, ORIN, "int8")
    plan = BuildPlan.from_options(dict(payload_.options))
    types = {io.name: io.dtype for io in (*plan.inputs, *plan.outputs)}
    assert types["state_0"] == types["state_0_next"] == ("float32" if real else "int8")
    assert types["state_1"] == types["state_1_next"] == "float32"  # read by a convolution too thin for INT8
    assert compile_engine(trt, payload_.data, plan, compute_capability=capability).nbytes > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("seed", [s for s in range(12) if "Conv" in operators_of(s)])
def test_int8_random_networks_are_accepted(seed: int, capability: str) -> None:
    """All convolutions quantized, however thin."""
    model, _ = random_network(seed)
    rules = replace(rules_for("tensorrt", ORIN), skinny=False)
    (made,) = lower(unmeasured(ir.from_proto(model), rules), ORIN, "int8")
    plan = BuildPlan.from_options(dict(made.options))
    assert compile_engine(trt, made.data, plan, compute_capability=capability).nbytes > 0


@pytest.mark.parametrize("name", sorted(n for n in BAD if BAD[n].refused_by_nvidia))
def test_what_the_lint_calls_refused_is_refused(name: str) -> None:
    model = build(BAD[name])
    assert lint(model, BAD[name].tensorrt, BAD[name].compute_capability)
    plan = plan_of(model)
    with pytest.raises(LoweringError) as caught:
        compile_engine(trt, BAD[name].model.SerializeToString(), plan, compute_capability="8.6")
    message = str(caught.value)
    assert "\n" not in message
    assert "expected [(" not in message, "refused for its plan, not for its fault"


def test_quantized_convolution_as_the_lint_wants_it_is_accepted() -> None:
    model = build(replace(BAD["uint8"], model=qdq()))
    assert lint(model) == ()
    compile_engine(trt, qdq().SerializeToString(), plan_of(model), compute_capability="8.6")


def test_progress_rises_from_0_to_1() -> None:
    data, plan = payload()
    seen: list[float] = []
    compile_engine(trt, data, plan, progress=lambda d, _: seen.append(d), compute_capability="8.6")
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 1)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_progress_callback_can_stop_the_build(stop: type[BaseException]) -> None:
    data, plan = payload()

    def progress(done: float, text: str) -> None:
        raise stop

    with pytest.raises(stop):
        compile_engine(trt, data, plan, progress=progress, compute_capability="8.6")
    compile_engine(trt, data, plan, compute_capability="8.6")


def test_monitor_cancels_nvidias_build() -> None:
    """The builder itself stops when the monitor says so."""
    from edgekit.backends.tensorrt import compile as module

    data, _ = payload()
    monitor = module.Monitor()
    monitor.cancelled = True
    log = module.Log()
    sink = module.logger(trt, log)
    builder = trt.Builder(sink)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, sink)
    assert parser.parse(data)
    config = builder.create_builder_config()
    config.progress_monitor = module._monitor(trt, monitor)
    with pytest.raises(LoweringError, match=r"[Cc]ancel"):
        module._build(builder, network, config, monitor, None, log)


def test_ctrl_c_ends_a_build_process() -> None:
    """A real SIGINT in a loop of builds: the process ends by KeyboardInterrupt, not by a crash."""
    code = (
        "import signal, sys, tensorrt_rtx as trt\n"
        # a shell starts what runs in its background with Ctrl-C ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.test_tensorrt_nvidia import payload, compile_engine\n"
        "data, plan = payload()\n"
        "print('ready', flush=True)\n"
        "while True: compile_engine(trt, data, plan, compute_capability='8.6')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(
    ("data", "says"), [(b"", "no outputs"), (b"not ONNX at all", "parse"), (payload()[0][:200], "parse")]
)
def test_damaged_files_are_refused(data: bytes, says: str) -> None:
    with pytest.raises(LoweringError, match=says):
        compile_engine(trt, data, payload()[1], compute_capability="8.6")


def test_another_network_than_the_plan_is_refused() -> None:
    data, plan = payload()
    with pytest.raises(LoweringError, match="of its plan"):
        compile_engine(trt, data, replace(plan, inputs=()), compute_capability="8.6")


@pytest.mark.parametrize("capability", ["8.7", "1.0"])
def test_capabilities_that_it_cannot_build_for(capability: str) -> None:
    data, plan = payload()
    with pytest.raises(LoweringError, match=f"cannot build for compute capability {capability}"):
        compile_engine(trt, data, plan, compute_capability=capability)


def test_timing_cache_calls_exist() -> None:
    """This builder keeps no timings and warns so, but takes the calls as TensorRT 10 does."""
    data, plan = payload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        first = compile_engine(trt, data, plan, timing_cache=b"", compute_capability="8.6")
        assert first.timing_cache
        again = compile_engine(trt, data, plan, timing_cache=first.timing_cache, compute_capability="8.6")
        damaged = compile_engine(trt, data, plan, timing_cache=b"damaged" * 9, compute_capability="8.6")
    assert again.nbytes == first.nbytes
    assert any("timing cache" in w for w in damaged.warnings)


def test_two_builds_are_equal_in_size_and_config_is_taken() -> None:
    data, plan = payload()
    sizes = {compile_engine(trt, data, plan, compute_capability="8.6").nbytes for _ in range(2)}
    assert len(sizes) == 1
    other = replace(plan, optimization_level=0, sparse_weights=True, tf32=not plan.tf32)
    assert compile_engine(trt, data, other, compute_capability="8.6").nbytes > 0


NOT_IN_CASES = {
    "ConstantOfShape": "its input is a shape",
    "Range": "its inputs are a shape",
    "DequantizeLinear": "dequantizes a network input, which has to be quantized first; has a test of its own",
    "Attention": "refuses ONNX's own small cases for reasons of their shapes",
    "TensorScatter": "takes only 4D caches in linear mode, which is no case",
}


def frozen(test: Any) -> onnx.ModelProto:
    """One of ONNX's own cases with all inputs but the first made constants, as exporters write them."""
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    # ONNX's cases follow its newest opset, one that TensorRT does not know yet
    model.opset_import[0].version = min(model.opset_import[0].version, operators.opsets((10, 15))[1])
    (values, _), *_ = test.data_sets
    rest = list(model.graph.input)[1:]
    for info, value in zip(rest, values[1:], strict=True):
        model.graph.input.remove(info)
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value))
        model.graph.initializer.add().CopyFrom(tensor)
        model.graph.initializer[-1].name = info.name
    return model


@pytest.mark.slow
def test_every_operator_of_the_table_is_taken() -> None:
    """Of ONNX's own cases, those that the lint passes: the builder takes at least one of each operator."""
    case = pytest.importorskip("onnx.backend.test.case.node")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # making the cases overflows on purpose
        cases = sorted(case.collect_testcases(None), key=lambda c: c.name)
    taken: dict[str, str] = {}
    for test in cases:
        nodes = test.model.graph.node if test.model is not None else ()
        op = nodes[0].op_type if len(nodes) == 1 else ""
        if op not in operators.TYPES or op in NOT_IN_CASES or taken.get(op) == "":
            continue
        try:
            proto = frozen(test)
        except (TypeError, ValueError, NotImplementedError):  # sequences and optional values
            continue
        model = common.ShapeInferencePass()(ir.from_proto(proto)).model
        if lint(model, "10.15") or not model.graph.inputs:
            continue
        sides = [
            tuple(Io(str(v.name), dtype_name(v), tuple(v.shape.numpy())) for v in values)
            for values in (model.graph.inputs, model.graph.outputs)
        ]
        try:
            compile_engine(
                trt,
                proto.SerializeToString(),
                BuildPlan(*sides, 1 << 30, Hardware("Orin", "8.7")),
                compute_capability="8.6",
            )
            taken[op] = ""
        except LoweringError as error:
            taken[op] = str(error)
    refused = {op: reason for op, reason in taken.items() if reason}
    assert not refused, "\n".join(f"{op}: {reason}" for op, reason in refused.items())
    # the others have no case that fits: dynamic shapes, control flow, boolean inputs, plugins
    assert len(taken) >= 125
