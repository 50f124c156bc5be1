"""Convolution that skips pruned weights (kernels/block_conv) beside the dense libraries, on the layers of YOLO-lite.

    python benchmarks/sparse_kernels.py [--side 320] [--rounds 15] [--threads 1] [--sparsity 0 0.5 0.75 0.9] [--layers 3x3]

Ours: weights punched in blocks of 8 filters x 4 channels (`block`, float32 and int8), and N:M with 1 of 2, 1 of 4 or 1 of
10 channels kept per filter (`nm`, float32). Layers that no method prunes (the stem of 3 channels, head outputs) stay
dense. Libraries: ONNX Runtime, LiteRT (XNNPACK) and OpenVINO as edgekit runs them, dense weights: none of them has a
sparse convolution that these layers could use (XNNPACK's sparse inference takes 1x1 convolutions between
channel-first neighbours only, in a graph that is pruned from its second layer on; OpenVINO decompresses sparse
weights of MatMul).

Float: NCHW in and out (LiteRT NHWC, its own). INT8: uint8 codes in and out (LiteRT int8), one scale per filter. Times of a
layer hold what a call costs: our copies of the input, the libraries' reorders. One JSON line per layer, then one for the
network: each library's own whole network beside the sum of our layers (`count` times each; joins and
upsampling, which the libraries' times hold, are not in the sum). Rounds are interleaved, every round calls everything once;
`ms` is the median over rounds, `spread` (third - first quartile) / median; `speedup`: the
library's time / ours, median of each round's quotient (network: of medians); `cpu_speedup`: by CPU time of the
process, which other work on the machine disturbs less.
`sparse_gain`: our own dense CPU time / ours. `difference`: ours dense against ONNX Runtime, relative to the largest value
(float), or the largest difference of codes (int8). `same_bits`: 1, 2 and 3 threads give the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit  # noqa: E402
from benchmarks.overhead import machine  # noqa: E402
from edgekit.backends.base import LoadOptions, half  # noqa: E402
from edgekit.backends.litert.lower import INTEGER_IO  # noqa: E402
from edgekit.kernels import block_conv  # noqa: E402
from edgekit.kernels.block_conv import BlockConv, BlockConv8  # noqa: E402
from edgekit.manifest import Variant  # noqa: E402
from edgekit.quant.calibrate import calibrate  # noqa: E402
from edgekit.quant.placement import place  # noqa: E402
from edgekit.quant.rules import rules_for  # noqa: E402
from edgekit.target import Target  # noqa: E402

HOST = Target.load("host")
LIBRARIES = ("onnxruntime", "litert", "openvino")
INNER_S = 1e-3
"""A call is repeated within a round until it takes about this long."""
NM = {0.5: (1, 2), 0.75: (1, 4), 0.9: (1, 10)}
Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """A convolution of the network. size: rows and columns of its input."""

    channels: int
    outputs: int
    kernel: int
    stride: int
    size: tuple[int, int]
    relu: bool

    @property
    def name(self) -> str:
        stride = "" if self.stride == 1 else f"/{self.stride}"
        return f"{self.channels}->{self.outputs} {self.kernel}x{self.kernel}{stride} @{self.size[0]}x{self.size[1]}"

    @property
    def prunable(self) -> bool:
        return self.channels % 4 == 0 and self.outputs % 8 == 0

    @property
    def macs(self) -> int:
        return (
            self.channels
            * self.outputs
            * self.kernel**2
            * (self.size[0] // self.stride)
            * (self.size[1] // self.stride)
        )


def network(side: int) -> tuple[Any, dict[Layer, int]]:
    """(YOLO-lite of three classes in torch, its layers and how often each is there)."""
    import torch
    from torch import nn

    from edgekit.models.yolo_lite import YoloLite

    torch.manual_seed(0)
    model = YoloLite(3).eval()
    found: Counter[Layer] = Counter()
    plain = {id(c) for head in model.heads for c in (head.box, head.objectness, head.classes)}

    def note(part: Any, inputs: Any, _: Any) -> None:
        size = tuple(inputs[0].shape[2:])
        kernel, stride = part.kernel_size[0], part.stride[0]
        layer = Layer(part.in_channels, part.out_channels, kernel, stride, size, id(part) not in plain)
        found[layer] += 1

    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    return model, dict(found)


# --- libraries ---------------------------------------------------------------------------------


def opened(backend: str, data: bytes, kind: str, options: dict[str, Any], threads: int) -> Any:
    """A binding of the library's."""
    fmt = "tflite" if backend == "litert" else "onnx"
    variant = Variant("layer", backend, kind, fmt, "", len(data), "", options)
    return half(backend, "engine").load(memoryview(data), variant, LoadOptions(threads=threads)).bind()


def filled(binding: Any, values: np.ndarray) -> Any:
    (target,) = binding.inputs.values()
    np.copyto(
        target, values if target.dtype == values.dtype else (values.astype(np.int16) - 128).astype(np.int8)
    )
    return binding


def float_graph(layer: Layer, weight: np.ndarray, bias: np.ndarray) -> ir.Model:
    pads = [layer.kernel // 2] * 4
    last = "c" if layer.relu else "y"
    nodes = [helper.make_node("Conv", ["x", "w", "b"], [last], pads=pads, strides=[layer.stride] * 2)]
    if layer.relu:
        nodes.append(helper.make_node("Relu", ["c"], ["y"]))
    weights = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    return _model(nodes, weights, TensorProto.FLOAT, (1, layer.channels, *layer.size))


def _model(nodes: list[Any], weights: list[Any], kind: int, shape: tuple[int, ...]) -> ir.Model:
    from edgekit.passes.graph import infer

    ports = [helper.make_tensor_value_info(n, kind, s) for n, s in (("x", shape), ("y", None))]
    graph = helper.make_graph(nodes, "layer", ports[:1], ports[1:], weights)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9))
    infer(model)
    return model


@dataclass(frozen=True)
class Codes:
    """A layer in integers: weight int8, bias int32 in units of x_scale * w_scale, zero points of uint8 codes."""

    weight: np.ndarray
    w_scale: np.ndarray
    bias: np.ndarray
    x_scale: float
    x_zero: int
    y_scale: float
    y_zero: int


def coded(layer: Layer, weight: np.ndarray, bias: np.ndarray, x: np.ndarray, y: np.ndarray) -> Codes:
    largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    w_scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    low, high = min(0.0, float(x.min())), float(x.max())
    x_scale = (high - low) / 255
    y_low, y_high = min(0.0, float(y.min())), float(y.max())
    y_scale = max(y_high - y_low, 1e-6) / 255
    return Codes(
        np.clip(np.rint(weight / w_scale), -127, 127).astype(np.int8), w_scale.reshape(-1),
        np.rint(bias / (x_scale * w_scale.reshape(-1))).astype(np.int32), x_scale, round(-low / x_scale),
        y_scale, round(-y_low / y_scale),
    )  # fmt: skip


def int8_graph(layer: Layer, c: Codes) -> ir.Model:
    """Q/DQ with uint8 codes in and out."""
    f4 = lambda v, n: numpy_helper.from_array(np.asarray(v, np.float32), n)  # noqa: E731
    u1 = lambda v, n: numpy_helper.from_array(np.asarray(v, np.uint8), n)  # noqa: E731
    weights = [
        f4(c.x_scale, "xs"), u1(c.x_zero, "xz"), f4(c.y_scale, "ys"), u1(c.y_zero, "yz"), f4(c.w_scale, "ws"),
        f4(c.x_scale * c.w_scale, "bs"), numpy_helper.from_array(c.weight, "w"), numpy_helper.from_array(c.bias, "b"),
    ]  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bf"], axis=0),
        helper.make_node(
            "Conv", ["xf", "wf", "bf"], ["c"], pads=[layer.kernel // 2] * 4, strides=[layer.stride] * 2
        ),
    ]
    if layer.relu:
        nodes.append(helper.make_node("Relu", ["c"], ["r"]))
    nodes.append(helper.make_node("QuantizeLinear", ["r" if layer.relu else "c", "ys", "yz"], ["y"]))
    return _model(nodes, weights, TensorProto.UINT8, (1, layer.channels, *layer.size))


def placed(model: ir.Model, backend: str, feed: dict[str, np.ndarray]) -> ir.Model:
    return place(model, calibrate(model, [feed]), rules_for(backend, HOST))


def layer_calls(
    layer: Layer, sparsities: list[float], threads: int
) -> tuple[dict[str, Call], dict[str, Any]]:
    """Everything that is timed on a layer, by name `who/precision[/sparsity]`, and what was checked before."""
    rng = np.random.default_rng(layer.macs)
    shape = (layer.outputs, layer.channels, layer.kernel, layer.kernel)
    weight = (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    bias = (rng.normal(size=layer.outputs) / 10).astype(np.float32)
    x = np.maximum(rng.normal(size=(layer.channels, *layer.size)), 0).astype(np.float32)
    how: Any = {
        "size": layer.size, "stride": (layer.stride,) * 2, "padding": (layer.kernel // 2,) * 4, "relu": layer.relu,
    }  # fmt: skip
    calls: dict[str, Call] = {}
    dense = BlockConv(weight, bias, **how)
    y = dense(x)
    codes = coded(layer, weight, bias, x, y)
    x8 = np.clip(np.rint(x / codes.x_scale) + codes.x_zero, 0, 255).astype(np.uint8)
    graphs = {"float32": float_graph(layer, weight, bias), "int8": int8_graph(layer, codes)}
    bindings = {}
    for backend in LIBRARIES:
        for kind, graph in graphs.items():
            if backend == "litert":
                source = graphs["float32"]
                if kind == "int8":
                    source = placed(source, backend, {"x": x[None]})
                    source.metadata_props[INTEGER_IO] = "x,y"
                (payload,) = half(backend, "lower").lower(source, HOST, kind)
                made = opened(backend, payload.data, kind, dict(payload.options), threads)
            else:
                data = ir.to_proto(graph).SerializeToString()
                made = opened(backend, data, kind, {}, threads)
            bindings[backend, kind] = filled(made, (x if kind == "float32" else x8)[None])
            calls[f"{backend}/{kind}"] = made.run
    facts: dict[str, Any] = {}
    same = []
    for sparsity in sparsities if layer.prunable else [0.0]:
        mask = np.ones(shape, bool)
        if sparsity:
            grid = rng.random((layer.outputs // 8, layer.channels // 4, *shape[2:]))
            kept = grid >= np.quantile(grid, sparsity)
            mask = kept.repeat(8, 0).repeat(4, 1)
        pruned = BlockConv(weight * mask, bias, **how)
        pruned8 = BlockConv8(
            codes.weight * mask, codes.bias, (codes.x_scale * codes.w_scale / codes.y_scale).astype(np.float32),
            codes.x_zero, codes.y_zero, **how,
        )  # fmt: skip
        out, out8 = pruned(x, threads=1), pruned8(x8, threads=1)
        same += [
            np.array_equal(pruned(x, threads=n), out) and np.array_equal(pruned8(x8, threads=n), out8)
            for n in (2, 3)
        ]
        calls[f"block/float32/{sparsity:g}"] = lambda c=pruned, o=out: c(x, o, threads=threads)
        calls[f"block/int8/{sparsity:g}"] = lambda c=pruned8, o=out8: c(x8, o, threads=threads)
        if sparsity == 0:
            for kind, ours in (("float32", out), ("int8", out8)):
                theirs = bindings["onnxruntime", kind]
                theirs.run()
                (found,) = theirs.outputs.values()
                gap = float(np.abs(found[0].astype(np.float64) - ours).max())
                facts[f"difference_{kind}"] = float(
                    f"{gap / (np.abs(ours).max() if kind == 'float32' else 1):.2g}"
                )
        elif sparsity in NM:
            n, m = NM[sparsity]
            per_filter = np.zeros((layer.outputs, -(-layer.channels // m) * m, *shape[2:]), bool)
            groups = per_filter.reshape(layer.outputs, -1, m, *shape[2:])
            chosen = rng.random(groups.shape).argsort(axis=2) < n
            groups[:] = chosen
            single = BlockConv(weight * per_filter[:, : layer.channels], bias, block=1, **how)
            calls[f"nm/float32/{sparsity:g}"] = lambda c=single, o=out: c(x, o, threads=threads)
    facts["same_bits"] = all(same)
    return calls, facts


# --- timing ------------------------------------------------------------------------------------


Times = dict[str, list[float]]


def timed(calls: dict[str, Call], rounds: int) -> tuple[Times, Times]:
    """ms of each call, round by round: by the clock, and of CPU time."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.process_time()
        call()
        repeats[name] = max(1, min(200, int(INNER_S / max(time.process_time() - start, 1e-7))))
    wall: Times = {name: [] for name in calls}
    cpu: Times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, begin = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                call()
            cpu[name].append((time.process_time() - begin) * 1e3 / repeats[name])
            wall[name].append((time.perf_counter() - start) * 1e3 / repeats[name])
    return wall, cpu


def spread(values: list[float]) -> float:
    first, middle, third = statistics.quantiles(values, n=4)
    return round((third - first) / middle, 3)


def digits(value: float) -> float:
    return float(f"{value:.4g}")


def speedup(times: Times, theirs: str, ours: str) -> float:
    pairs = zip(times[theirs], times[ours], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 2)


def speedups(times: Times) -> dict[str, dict[str, float]]:
    """{ours: {library: quotient}}."""
    ours = [name for name in times if name.count("/") == 2]
    return {
        name: {lib: speedup(times, f"{lib}/{name.split('/')[1]}", name) for lib in LIBRARIES} for name in ours
    }


def whole_networks(model: Any, side: int, threads: int, folder: Path) -> dict[str, Call]:
    """The libraries' own dense networks."""
    from edgekit.frontends.onnx import load
    from edgekit.models.yolo_lite import export_onnx
    from edgekit.passes import prepare

    path = folder / "yolo_lite.onnx"
    export_onnx(model, path, side, side)
    network = prepare(load(path)).model
    (port,) = network.graph.inputs
    feed = {str(port.name): np.random.default_rng(0).uniform(0, 255, (1, 3, side, side)).astype(np.float32)}
    calls = {}
    for backend in LIBRARIES:
        for kind in ("float32", "int8"):
            graph = placed(network, backend, feed) if kind == "int8" else network
            (payload,) = half(backend, "lower").lower(graph, HOST, kind)
            made = opened(backend, payload.data, kind, dict(payload.options), threads)
            (target,) = made.inputs.values()
            np.copyto(target, feed[str(port.name)])
            calls[f"{backend}/{kind}"] = made.run
    return calls


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.0, 0.5, 0.75, 0.9])
    parser.add_argument("--layers", default="", help="only layers whose name has this, and no network line")
    args = parser.parse_args()
    sparsities = sorted({0.0, *args.sparsity})
    model, layers = network(args.side)
    about = {
        "threads": args.threads, "rounds": args.rounds, "isa": (block_conv.isas() or ["numpy"])[0],
        "machine": machine(), "commit": commit(),
    }  # fmt: skip
    totals: Counter[str] = Counter()
    cpu_totals: Counter[str] = Counter()
    for layer, count in layers.items():
        if args.layers not in layer.name:
            continue
        calls, facts = layer_calls(layer, sparsities, args.threads)
        times, cpu = timed(calls, args.rounds)
        ms = {name: statistics.median(values) for name, values in times.items()}
        cpu_ms = {name: statistics.median(values) for name, values in cpu.items()}
        gains = {
            name: speedup(cpu, f"block/{name.split('/')[1]}/0", name)
            for name in times
            if name.count("/") == 2 and not name.endswith("/0")
        }
        for kind in ("float32", "int8"):
            for sparsity in sparsities:
                name = f"block/{kind}/{sparsity:g}"
                totals[name] += count * ms.get(name, ms[f"block/{kind}/0"])
                cpu_totals[name] += count * cpu_ms.get(name, cpu_ms[f"block/{kind}/0"])
        line = {
            "benchmark": "sparse_kernels", "layer": layer.name, "count": count, "mmacs": digits(layer.macs / 1e6),
            "ms": {k: digits(v) for k, v in ms.items()}, "spread": {k: spread(v) for k, v in times.items()},
            "speedup": speedups(times), "cpu_ms": {k: digits(v) for k, v in cpu_ms.items()},
            "cpu_speedup": speedups(cpu), "sparse_gain": gains, **facts, **about,
        }  # fmt: skip
        print(json.dumps(line), flush=True)
    if args.layers:
        return
    with tempfile.TemporaryDirectory() as name:
        times, cpu = timed(whole_networks(model, args.side, args.threads, Path(name)), args.rounds)
    ms = {name: statistics.median(values) for name, values in times.items()}
    cpu_ms = {name: statistics.median(values) for name, values in cpu.items()}

    def against(theirs: dict[str, float], ours: Counter[str]) -> dict[str, dict[str, float]]:
        return {
            name: {lib: round(theirs[f"{lib}/{name.split('/')[1]}"] / total, 2) for lib in LIBRARIES}
            for name, total in ours.items()
        }

    line = {
        "benchmark": "sparse_kernels", "network": f"yolo_lite {args.side}x{args.side}",
        "mmacs": digits(sum(n * layer.macs for layer, n in layers.items()) / 1e6),
        "ms": {k: digits(v) for k, v in ms.items()}, "spread": {k: spread(v) for k, v in times.items()},
        "sum_of_layers_ms": {k: digits(v) for k, v in totals.items()}, "speedup": against(ms, totals),
        "cpu_ms": {k: digits(v) for k, v in cpu_ms.items()},
        "sum_of_layers_cpu_ms": {k: digits(v) for k, v in cpu_totals.items()},
        "cpu_speedup": against(cpu_ms, cpu_totals), **about,
    }  # fmt: skip
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
