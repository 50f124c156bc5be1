"""The latency estimate: layers as libraries fuse them, the cost of precisions and conversions, boards and modes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import shapes
from benchmarks.shapes.net import Net
from edgekit.errors import ModelError, UsageError
from edgekit.passes.graph import infer, shape
from edgekit.quant.annotate import set_quant
from edgekit.spec import DType, QuantParams
from edgekit.target import Target
from edgekit.toolchain import cost
from edgekit.toolchain.estimate import (
    FLOAT,
    PRECISIONS,
    RUNTIMES,
    Estimate,
    Estimator,
    annotated,
    by_time,
    estimate,
    machine,
)
from edgekit.toolchain.layers import Layer, conversions, layers
from tests.cli_runs import cli, refusal

BOARDS = [name for name in Target.names() if name != "host"]


def silu_block() -> ir.Model:
    """conv, SiLU, conv + residual, ReLU; then a pool and a concatenation."""
    n = Net(32, 32)
    x = n.conv(n.input, 16, 3, act="silu")
    y = n.add(x, n.conv(x, 16, 3, act=None), "relu")
    return n.model([n.cat(n.pool(y, 3, 1), y)])


def ops(model: ir.Model, whole: bool) -> list[str]:
    return [layer.op for layer in layers(model, whole)]


# ---- layers


def test_a_gpu_fuses_activation_and_residual() -> None:
    assert ops(silu_block(), whole=True) == ["Conv+Sigmoid+Mul", "Conv+Add+Relu", "MaxPool", "Concat"]


def test_a_cpu_runs_silu_and_residual_as_passes_of_their_own() -> None:
    assert ops(silu_block(), whole=False) == ["Conv", "Sigmoid+Mul", "Conv", "Add+Relu", "MaxPool", "Concat"]


def test_a_branch_or_output_in_between_is_not_fused_away() -> None:
    n = Net(8, 8)
    x = n.conv(n.input, 8, 3, act=None)
    y = n.act(x, "relu")
    model = n.model([x, y])
    assert ops(model, whole=True) == ["Conv", "Relu"]


def test_a_sum_waits_for_its_later_operand() -> None:
    """The addition runs with the convolution that comes last: the first has nothing to add yet."""
    n = Net(8, 8)
    a, b = n.conv(n.input, 8, 3, act=None), n.conv(n.input, 8, 1, act=None)
    assert ops(n.model([n.add(a, b)]), whole=True) == ["Conv", "Conv+Add"]


def test_what_a_layer_moves_and_multiplies() -> None:
    first, second, *_ = layers(silu_block(), whole=True)
    assert first.macs == 32 * 32 * 16 * 3 * 9
    assert (first.rows, first.depth, first.columns) == (1024, 27, 16)
    assert first.weights == 16 * 3 * 9 + 16
    assert sum(n for _, n in first.reads) == 3 * 32 * 32
    assert sum(n for _, n in second.reads) == 16 * 32 * 32  # the input is the residual too
    assert second.writes[0][1] == 16 * 32 * 32


def test_reshapes_are_free_and_seen_through() -> None:
    n = Net(8, 8)
    x = n.conv(n.input, 8, 3)
    y = n.softmax(n.reshape(x, 1, 8, 64))
    found = layers(n.model([y]), whole=True)
    assert [layer.op for layer in found] == ["Conv+Relu", "Softmax"]
    assert found[1].reads[0][0] == found[0].writes[0][0]


PUBLISHED = {
    # million parameters and (where stated for that size) GMACs of the papers, torchvision and Ultralytics
    "resnet18": (11.69, 1.81), "resnet50": (25.56, 4.09), "resnext50_32x4d": (25.03, 4.23), "vgg16": (138.36, 15.47),
    "mobilenet_v1": (4.23, 0.569), "mobilenet_v2": (3.50, 0.301), "mobilenet_v3_large": (5.48, 0.217),
    "mobilenet_v3_small": (2.54, 0.057), "efficientnet_b0": (5.29, 0.386), "efficientnet-lite0": (4.65, 0.385),
    "efficientnet-lite4": (13.01, None), "squeezenet1_1": (1.235, 0.349), "googlenet": (6.62, 1.50),
    "shufflenet_v2": (2.28, 0.145), "regnetY400": (4.34, 0.402), "yolov5s": (7.23, 8.25), "yolov8n": (3.15, 4.37),
    "yolov8x": (68.2, 128.9), "yolo11n": (2.62, 3.25), "yolo11m": (20.1, 34.0), "yolo26n": (2.4, 2.7),
    "yolo26x": (55.7, 97.0), "yolox_s": (8.97, 13.4), "yolov3-tiny": (8.85, None), "yolov4-tiny": (6.06, None),
    "yolov7-tiny": (6.23, 6.9),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_size(name: str) -> None:
    size = (640, 640) if name.startswith("yolo") else (224, 224)
    net = Net(*size)
    shapes.NETWORKS[name](net)
    parameters, gmacs = PUBLISHED[name]
    assert net.parameters() / 1e6 == pytest.approx(parameters, rel=0.02)
    if gmacs:
        found = layers(shapes.build(name, size), whole=True)
        assert sum(layer.macs for layer in found) / 1e9 == pytest.approx(gmacs, rel=0.03)


@pytest.mark.parametrize("name", ["yolo26n", "mobilenet_v3_small", "googlenet", "shufflenet_v2", "yolov5n"])
def test_networks_are_valid_graphs(name: str) -> None:
    """Shapes written by hand agree with onnx's inference."""
    model = shapes.build(name, (320, 320))
    stated = {v.name: shape(v) for node in model.graph for v in node.outputs}
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    infer(model)
    assert {v.name: shape(v) for node in model.graph for v in node.outputs} == stated


def test_open_sizes_are_refused() -> None:
    model = silu_block()
    model.graph.inputs[0].shape = ir.Shape((1, 3, "h", "w"))
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    with pytest.raises(ModelError, match="static shapes"):
        estimate(model, Target.load("rpi5"))


# ---- precision


@pytest.fixture(scope="module")
def orin() -> Estimator:
    return Estimator(silu_block(), Target.load("jetson-orin"))


@pytest.fixture(scope="module")
def pi() -> Estimator:
    return Estimator(silu_block(), Target.load("rpi5"))


def converted(found: Estimate) -> list[tuple[str, str]]:
    return [(c.node_id, c.op) for c in found.layers if c.op.startswith("convert ")]


def test_int8_quantizes_the_input_and_restores_the_output(pi: Estimator) -> None:
    out = pi.layers[-1].writes[0][0]
    assert converted(pi("int8")) == [("image", "convert float32>int8"), (out, "convert int8>float32")]
    assert converted(pi("float32")) == []


def test_every_change_of_precision_counts_once_per_value(pi: Estimator) -> None:
    """Conv 2 in float between int8: its input (read by the addition in int8 too) is restored, its output
    quantized."""
    conv1, silu, conv2, add, pool, cat = pi.layers
    found = pi({layer.node_id: "int8" for layer in (conv1, silu, add, pool, cat)} | {conv2.node_id: "float"})
    assert converted(found) == [
        ("image", "convert float32>int8"),
        (silu.writes[0][0], "convert int8>float32"),
        (conv2.writes[0][0], "convert float32>int8"),
        (cat.writes[0][0], "convert int8>float32"),
    ]
    assert found.total_s > pi("int8").total_s


def test_what_the_mapping_leaves_out_follows_what_it_reads(pi: Estimator) -> None:
    weighted = [layer.node_id for layer in pi.layers if layer.macs]
    assert pi(dict.fromkeys(weighted, "int8")).layers == pi("int8").layers
    assert pi({weighted[1]: "int8"}).layers[3].precision == "float32"  # the addition reads a float too
    assert pi({}).layers == pi("float32").layers


def test_a_mapping_may_name_any_node_of_a_fused_layer(orin: Estimator) -> None:
    _, mul = orin.layers[0].nodes[0], orin.layers[0].nodes[-1]
    assert orin({mul: "int8"}).layers[0].precision == "int8"
    assert orin({}).layers[0].precision == "float16"


def test_dynamic_pays_at_every_weighted_layer(pi: Estimator) -> None:
    n = sum(1 for layer in pi.layers if layer.macs)
    assert len(converted(pi("dynamic"))) >= 2 * n - 1
    assert pi("int8").total_s < pi("dynamic").total_s


def test_float16_on_a_cpu_computes_in_float32(pi: Estimator) -> None:
    assert pi("float16").total_s == pi("float32").total_s


def test_annotated_graphs_tell_their_precisions() -> None:
    model = silu_block()
    params = QuantParams(DType.int8, (0.1,), (0,))
    conv = next(iter(model.graph))
    assert set(annotated(model).values()) == {FLOAT}
    set_quant(model.graph.inputs[0], params)
    assert annotated(model)[conv.outputs[0].name] == FLOAT  # weights are float yet
    set_quant(conv.inputs[1], params)
    assert annotated(model)[conv.outputs[0].name] == "int8"
    found = estimate(model, Target.load("jetson-orin"), annotated(model))
    assert [c.precision for c in found.layers][:2] == ["int8", "float16"]


@pytest.mark.parametrize("name", BOARDS)
def test_int8_is_estimated_faster_than_float_everywhere(name: str) -> None:
    found = Estimator(shapes.build("mobilenet_v2", (224, 224)), Target.load(name))
    assert found("int8").total_s < found("float32").total_s


# ---- sums, ranges, boards, modes


@pytest.mark.parametrize("name", BOARDS)
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "dynamic"])
def test_layers_add_up(name: str, precision: str) -> None:
    target = Target.load(name)
    found = estimate(silu_block(), target, precision)
    unit = "gpu" if found.backend == "tensorrt" else "cpu"
    once = cost.fitted()[unit]["once_us"] * 1e-6
    assert found.total_s == pytest.approx(sum(c.seconds for c in found.layers) + once)
    assert 0 < found.low_s < found.total_s < found.high_s
    assert all(c.seconds > 0 and math.isfinite(c.seconds) and c.bytes > 0 for c in found.layers)
    assert {c.bound for c in found.layers} <= {"compute", "memory", "start"}
    assert [c.seconds for c in by_time(found.layers)] == sorted(
        (c.seconds for c in found.layers), reverse=True
    )


def big(**changes: object) -> float:
    options = {"power": None, "target": "jetson-orin", "precision": "float16", **changes}
    model = shapes.build("resnet50", (448, 448))
    return estimate(
        model, Target.load(str(options["target"])), str(options["precision"]), options["power"],  # type: ignore[arg-type]
        threads=options.get("threads"),  # type: ignore[arg-type]
        backend=options.get("backend"),  # type: ignore[arg-type]
    ).total_s  # fmt: skip


def test_power_modes_cap_clock_and_multiprocessors() -> None:
    full, capped, low = (big(power=p) for p in ("MAXN", "50W", "30W"))
    assert big() == full
    assert full < capped < low
    # 8 of 16 multiprocessors at 612 of 1300 MHz: compute-bound work takes up to 4.2 times as long
    assert 2.5 < low / full < 1300 / 612 * 2


def test_a_slower_memory_clock_counts() -> None:
    orin = Target.load("jetson-orin")
    mode = dataclasses.replace(orin.power_modes[0], name="slow", emc_clock_hz=3199e6 / 2)
    slow = dataclasses.replace(orin, power_modes=(*orin.power_modes, mode))
    assert machine(slow, "tensorrt", "slow").bytes_per_s == pytest.approx(204.8e9 / 2)
    assert machine(slow, "tensorrt", "MAXN").bytes_per_s == 204.8e9


def test_more_threads_help_less_and_less() -> None:
    one, two, four = (big(target="rpi5", precision="float32", threads=n) for n in (1, 2, 4))
    assert one > two > four
    assert one / two < 2
    assert two / four < one / two * 1.01
    assert big(target="rpi5", precision="float32") == four


def test_power_modes_cap_cpu_cores() -> None:
    where = machine(Target.load("jetson-orin"), "onnxruntime", "15W")
    assert (where.units, where.clock_hz) == (4, 1.11e9)


def test_little_cores_are_left_alone() -> None:
    assert machine(Target.load("android-arm64"), "onnxruntime").units == 4


def test_a_case_of_letters_is_no_other_mode() -> None:
    assert big(power="maxn") == big(power="MAXN")


def test_gpus_before_tensor_cores_have_none() -> None:
    orin = Target.load("jetson-orin")
    assert orin.gpu is not None
    old = dataclasses.replace(
        orin, gpu=dataclasses.replace(orin.gpu, compute_capability="5.3", int8_tops=None)
    )
    assert machine(old, "tensorrt").matrix == frozenset()
    assert machine(old, "tensorrt").macs_per_s["int8"] == machine(old, "tensorrt").macs_per_s["float16"]
    assert machine(orin, "tensorrt").macs_per_s["float32"] == pytest.approx(42.6e12 / 4)  # TF32


# ---- refusals


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"power": "31W"}, "Did you mean '30W'"),
        ({"precision": "int88"}, "Did you mean 'int8'"),
        ({"target": "rpi5", "power": "MAXN"}, "Leave --power out"),
        ({"backend": "tensort"}, "Did you mean 'tensorrt'"),
        ({"precision": "dynamic"}, "for CPUs only"),
        ({"target": "host"}, "edgekit bench"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, object], needle: str) -> None:
    with pytest.raises(UsageError) as caught:
        big(**options)
    assert needle in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_nodes_in_a_mapping(pi: Estimator) -> None:
    with pytest.raises(UsageError, match="not in this graph"):
        pi({"nothing": "int8"})


# ---- coefficients


def test_the_coefficients_that_ship() -> None:
    root = Path(__file__).resolve().parent.parent
    priors = json.loads((root / "benchmarks/priors.json").read_text())
    shipped = cost.fitted()
    assert "Fitted by benchmarks/estimate_accuracy.py --fit" in shipped["note"]
    for unit in ("gpu", "cpu"):
        assert shipped[unit].keys() == priors[unit].keys()
        assert all(v > 0 for v in shipped[unit].values())
        # nothing ran away from what is plausible: the prior holds what the rows do not say
        assert all(0.2 < shipped[unit][k] / priors[unit][k] < 10 for k in priors[unit])
    for low, high in shipped["spread"].values():
        assert 0.2 < low < 1 < high < 5
    assert set(RUNTIMES.values()) <= set(cost.RUNTIMES)


def test_costing_many_networks_at_once_is_the_same() -> None:
    where = machine(Target.load("rpi5"), "onnxruntime")
    found = layers(silu_block(), whole=False)
    one = cost.work(found, ["int8"] * len(found), [], where)
    two = cost.join([one, one])
    c = cost.fitted()["cpu"]
    np.testing.assert_array_equal(cost.seconds(two, "cpu", c)[0], np.tile(cost.seconds(one, "cpu", c)[0], 2))


def test_conversions_by_hand() -> None:
    def layer(name: str, reads: str, out: str) -> Layer:
        return Layer(name, "Conv", "conv", (name,), ((reads, 10),), ((out, 20),))

    chain = (layer("a", "in", "x"), layer("b", "x", "y"), layer("c", "x", "z"))
    found = list(conversions(chain, ["int8", "float16", "float16"], {"in": 10}))
    assert found == [
        ("in", 10, "float32", "int8"),
        ("x", 10, "int8", "float16"),  # once, though two read it
        ("y", 20, "float16", "float32"),
        ("z", 20, "float16", "float32"),
    ]


# ---- command line


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("estimate") / "net.onnx"
    n = Net(32, 32)
    x = n.conv(n.conv(n.input, 8, 3, act="silu"), 8, 3)
    model = n.model([n.fc(n.mean(x), 10)])
    ir.save(model, path)
    return path


def test_cli_table(onnx_file: Path) -> None:
    ran = cli("estimate", onnx_file, "--target", "jetson-orin", "--power", "30W", "--precision", "int8")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "net.onnx on jetson-orin: tensorrt, int8, GPU, mode 30W"
    assert "about " in lines[1] and " within " in lines[1]
    assert lines[3].split()[:2] == ["LAYER", "OPERATORS"]
    assert "conversions between precisions: " in ran.out
    assert "not a measurement" in ran.out


def test_cli_json_says_the_same(onnx_file: Path) -> None:
    found = json.loads(cli("estimate", onnx_file, "--target", "rpi5", "--threads", "1", "--json").out)
    assert found["measured"] is False
    assert (found["precision"], found["threads"], found["backend"]) == ("float32", 1, "onnxruntime")
    assert found["low_s"] < found["total_s"] < found["high_s"]
    assert {"node_id", "op", "seconds", "bound", "bytes", "macs", "precision"} == found["layers"][0].keys()


def test_the_own_engine_is_said_to_be_taken_for_another(onnx_file: Path) -> None:
    """It takes the SiLU into its convolution, where XNNPACK has a pass of its own."""
    costs = {}
    for backend in ("litert", "native"):
        words = ("--target", "rpi5", "--precision", "int8", "--threads", "1", "--backend", backend)
        costs[backend] = json.loads(cli("estimate", onnx_file, *words, "--json").out)
    assert "XNNPACK" in costs["native"]["note"] and "XNNPACK" not in costs["litert"]["note"]
    ops = {backend: [layer["op"] for layer in found["layers"]] for backend, found in costs.items()}
    assert "Conv+Sigmoid+Mul" in ops["native"] and "Conv+Sigmoid+Mul" not in ops["litert"]
    assert costs["native"]["total_s"] < costs["litert"]["total_s"]


def test_cli_lists_the_slowest_or_all(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.cli.estimate.SHOWN", 2)
    few, every = (cli("estimate", onnx_file, "--target", "rpi5", *more).out for more in ((), ("--all",)))
    assert "more, " in few and "(--all shows them)" in few
    assert "(--all shows them)" not in every
    assert len(every.splitlines()) > len(few.splitlines())


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (("--target", "jetson-oron"), "did you mean 'jetson-orin'"),
        (("--target", "jetson-orin", "--power", "5W"), "power mode '5W'"),
        (("--target", "rpi5", "--precision", "int9"), "did you mean 'int8'"),
        (("--target", "rpi5", "--backend", "onnx"), "not available there"),
        (("--target", "rpi5", "--threads", "0"), "from 1 to"),
        (("--target", "host"), "edgekit bench"),
    ],
)
def test_cli_refuses_in_one_line(words: tuple[str, ...], needle: str, onnx_file: Path) -> None:
    refusal(cli("estimate", onnx_file, *words), 2, needle)


def test_cli_refuses_a_missing_file() -> None:
    refusal(cli("estimate", "no.onnx", "--target", "rpi5"), 2, "no.onnx")
