"""How long a network would take on a board that is not at hand: an estimate, with its range, never a measurement.

    estimate(model, target, "int8") -> Estimate(total_s, low_s, high_s, layers, ...)

The search for a placement asks it for many assignments of precision to nodes; `Estimator` reads the graph once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.errors import ModelError, UsageError, did_you_mean, printable
from edgekit.passes.graph import infer, shape
from edgekit.quant.annotate import node_id, quant
from edgekit.target import Cpu, PowerMode, Target
from edgekit.toolchain import cost
from edgekit.toolchain.cost import BYTES, Machine
from edgekit.toolchain.layers import WEIGHTED, conversions, layers

PRECISIONS = ("float32", "float16", "int8", "dynamic")
FLOAT = "float"
"""In a mapping: the float that the backend prefers on that board."""
RUNTIMES = {
    "tensorrt": "tensorrt",
    "onnxruntime": "onnxruntime",
    "litert": "xnnpack",
    "openvino": "openvino",
    "native": "xnnpack",  # whose kernels are the nearest; nothing was published of it
}
"""Backend -> the library whose coefficients are used."""
WHOLE = ("tensorrt", "native")
"""Backends that take any activation and a residual addition into the convolution in front of them."""


@dataclass(frozen=True)
class LayerCost:
    """One launch. `node_id`: its first node (quant.annotate), or the value that a conversion converts.

    op: the fused operators, or "convert float32>int8". bound: "compute", "memory" or "start".
    bytes: activations and weights moved once. macs: multiply-accumulates.
    """

    node_id: str
    op: str
    seconds: float
    bound: str
    bytes: int
    macs: int
    precision: str


@dataclass(frozen=True)
class Estimate:
    """`low_s` to `high_s` holds four of five published measurements of boards or networks unseen by the fit.

    layers in graph order, conversions after the layers. The rest of `total_s` is the fixed cost of one inference.
    """

    total_s: float
    low_s: float
    high_s: float
    layers: tuple[LayerCost, ...]
    target: str
    backend: str
    power: str
    threads: int
    """0 on a GPU."""


def estimate(
    model: ir.Model,
    target: Target,
    precision: str | Mapping[str, str] = "float32",
    power: str | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> Estimate:
    """Latency of one picture, network only (no pre- or postprocessing), of a prepared graph.

    precision: one of PRECISIONS for every layer that can run in it, or node_id -> precision or FLOAT. A fused
    layer takes that of its first node that the mapping holds. Layers that it leaves out are int8 when all they
    read is int8 and they only move, pool, add or look up; else they are in the backend's preferred float.
    power: a power mode of the board, None for no cap. backend: one of the target's (its first).
    threads: CPU threads, None for all of the big cores.
    Raises: ModelError for a graph with open sizes; UsageError for an unknown mode, precision, backend or node,
    or a board whose facts do not allow an estimate (`host`: its bandwidth is not known; time the bundle there).
    """
    return Estimator(model, target, power, backend=backend, threads=threads)(precision)


class Estimator:
    """`estimate` for one model and board, for many precisions; see there for arguments and errors."""

    def __init__(
        self,
        model: ir.Model,
        target: Target,
        power: str | None = None,
        *,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.target, self.power = target.name, power or ""
        self.backend = backend or target.backend
        if self.backend not in target.backends:
            raise UsageError(
                f"backend {self.backend!r} of {target.name}: not available there. "
                + did_you_mean(self.backend, target.backends)
            )
        self.machine = machine(target, self.backend, power, threads)
        if any(shape(v) is None for node in model.graph for v in node.outputs):
            model = model.clone()
            infer(model)
        unknown = [v.name for node in model.graph for v in node.outputs if shape(v) is None]
        if unknown:
            raise ModelError(
                f"model: the size of '{printable(unknown[0] or '')}' is not known, expected static shapes. "
                "Give --shape for open inputs, or export it with fixed sizes"
            )
        self.layers = layers(model, whole=self.backend in WHOLE)
        self.inputs = {v.name or "": int(np.prod(shape(v) or ())) for v in model.graph.inputs}
        self.nodes = {node_id(node) for node in model.graph if node.outputs}
        self.coefficients: Mapping[str, float] = cost.fitted()[self.machine.unit]

    def __call__(self, precision: str | Mapping[str, str]) -> Estimate:
        chosen = [self._computed(p) for p in self.precisions(precision)]
        converted = self._conversions(chosen)
        done = cost.work(self.layers, chosen, [c[1:] for c in converted], self.machine)
        times, compute, memory = cost.seconds(done, self.machine.unit, self.coefficients)
        costs = []
        names = [(layer.node_id, layer.op, p) for layer, p in zip(self.layers, chosen, strict=True)]
        names += [(name, f"convert {a}>{b}", b) for name, _, a, b in converted]
        moved = done.moved + done.weight_bytes
        for i, (name, op, p) in enumerate(names):
            bound = "start" if max(compute[i], memory[i]) < times[i] / 2 else "compute"
            bound = "memory" if bound != "start" and memory[i] > compute[i] else bound
            costs.append(LayerCost(name, op, float(times[i]), bound, int(moved[i]), int(done.macs[i]), p))
        total = float(times.sum()) + self.coefficients["once_us"] * 1e-6
        low, high = cost.fitted()["spread"][cost.group(self.machine, chosen)]
        threads = 0 if self.machine.unit == "gpu" else self.machine.units
        return Estimate(
            total, total * low, total * high, tuple(costs), self.target, self.backend, self.power, threads
        )

    def work(self, precision: str, where: Machine) -> cost.Work:
        """The layers as they would run on another machine of the same unit (for fitting)."""
        chosen = self.precisions(precision)
        return cost.work(self.layers, chosen, [c[1:] for c in self._conversions(chosen)], where)

    def _check(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise UsageError(
                f"precision {precision!r}: unknown, expected one of {', '.join(PRECISIONS)}. "
                + did_you_mean(precision, PRECISIONS)
            )
        if precision == "dynamic" and self.machine.unit == "gpu":
            raise UsageError("precision 'dynamic': for CPUs only, expected float32, float16 or int8")

    def _computed(self, precision: str) -> str:
        """CPU backends here store float16 weights and compute in float32."""
        return "float32" if precision == "float16" and self.machine.unit == "cpu" else precision

    def _conversions(self, chosen: list[str]) -> list[tuple[str, int, str, str]]:
        """CPU libraries keep float16 tensors and casts inside their kernels; int8 needs a pass everywhere."""
        every = self.machine.unit == "gpu"
        return [c for c in conversions(self.layers, chosen, self.inputs) if every or "int8" in c[2:]]

    def precisions(self, precision: str | Mapping[str, str]) -> list[str]:
        """The precision of every layer. Raises: UsageError for an unknown precision or node."""
        floats = "float16" if self.machine.unit == "gpu" else "float32"
        if isinstance(precision, str):
            self._check(precision)
            # dynamic: weights and products in int8, activations travel in float and are converted at every layer
            if precision in ("int8", "dynamic"):
                return [
                    "int8" if layer.int8 and (layer.macs or precision == "int8") else floats
                    for layer in self.layers
                ]
            return [precision for _ in self.layers]
        for name, value in precision.items():
            if value != FLOAT:
                self._check(value)
            if name not in self.nodes:
                raise UsageError(f"node {name!r}: not in this graph. {did_you_mean(name, self.nodes)}")
        found: list[str] = []
        have: dict[str, str] = {}
        for layer in self.layers:
            given = [precision[n] for n in layer.nodes if n in precision]
            reads = {have.get(name, "float32") for name, _ in layer.reads}
            if given:
                chosen = {"dynamic": "int8", FLOAT: floats}.get(given[0], given[0])
            elif layer.int8 and not layer.macs and reads == {"int8"}:
                chosen = "int8"
            else:
                chosen = floats
            found.append(chosen)
            have.update((name, chosen) for name, _ in layer.writes)
        return found


def annotated(model: ir.Model) -> dict[str, str]:
    """node_id -> "int8" for nodes whose activations (and weights) carry quantization params, else FLOAT."""
    found = {}
    for node in model.graph:
        activations = [v for v in node.inputs if v is not None and v.const_value is None]
        weights = node.inputs[1:2] if node.op_type in WEIGHTED else ()
        weights = [v for v in weights if v is not None and v.const_value is not None]
        if not node.outputs or not activations:
            continue
        inside = all(quant(v) is not None for v in (*activations, *weights))
        if node.op_type not in WEIGHTED:
            inside = inside and quant(node.outputs[0]) is not None
        found[node_id(node)] = "int8" if inside else FLOAT
    return found


def power_mode(target: Target, name: str | None) -> PowerMode | None:
    """The mode called `name`, None for None. Raises: UsageError."""
    if name is None:
        return None
    for mode in target.power_modes:
        if mode.name.lower() == name.lower():
            return mode
    modes = [m.name for m in target.power_modes]
    hint = did_you_mean(name, modes) if modes else "Leave --power out"
    raise UsageError(f"power mode {name!r} of {target.name}: unknown. {hint}")


def machine(
    target: Target,
    backend: str,
    power: str | None = None,
    threads: int | None = None,
    runtime: str | None = None,
) -> Machine:
    """What of the board runs the network. runtime: another library's coefficients (benchmarks only).

    Raises: UsageError for an unknown mode, or where the board's facts do not allow an estimate.
    """
    mode = power_mode(target, power)
    if target.dram_bytes_per_s is None:
        raise UsageError(
            f"target {target.name}: its memory bandwidth is not known, so nothing can be estimated. "
            "Name a board, or build and time the bundle here: edgekit bench"
        )
    bandwidth = target.dram_bytes_per_s
    fastest = max((m.emc_clock_hz or 0 for m in target.power_modes), default=0)
    if mode is not None and mode.emc_clock_hz and fastest:
        bandwidth *= mode.emc_clock_hz / max(fastest, target.emc_clock_hz or 0)
    runtime = runtime or RUNTIMES.get(backend)
    if runtime is None:
        raise UsageError(f"backend {backend!r}: has no cost model. {did_you_mean(backend, RUNTIMES)}")
    if backend == "tensorrt":
        return _gpu(target, mode, bandwidth, runtime)
    return _cpu(target, mode, bandwidth, runtime, threads)


def _gpu(target: Target, mode: PowerMode | None, bandwidth: float, runtime: str) -> Machine:
    gpu = target.gpu
    if gpu is None or gpu.fp32_tflops is None:
        raise UsageError(
            f"target {target.name}: the facts of its GPU are not known, so nothing can be estimated there"
        )
    sms, clock = gpu.sms, gpu.clock_hz
    if mode is not None:
        sms, clock = mode.gpu_sms or sms, mode.gpu_clock_hz or clock
    scale = sms / gpu.sms * clock / gpu.clock_hz * 1e12 / 2
    half = gpu.fp16_tflops or gpu.fp32_tflops
    single = gpu.fp32_tflops
    generation = int(gpu.compute_capability.split(".")[0])
    matrix = {"float16", "int8"} if generation >= 7 else set()
    if generation >= 8:  # TF32 on tensor cores
        single = max(single, half / 2)
        matrix.add("float32")
    peak = {"float32": single, "float16": half, "int8": gpu.int8_tops or half}
    return Machine(
        "gpu",
        runtime,
        sms,
        clock,
        {name: value * scale for name, value in peak.items()},
        gpu.fp32_tflops * scale,
        bandwidth,
        gpu.l2_bytes or 524_288,
        frozenset(matrix),
    )


def _cpu(
    target: Target, mode: PowerMode | None, bandwidth: float, runtime: str, threads: int | None
) -> Machine:
    cores: list[tuple[float, Cpu]] = []
    for cpu in target.cpus:
        if cpu.clock_hz is None or cpu.simd_bits is None:
            raise UsageError(
                f"target {target.name}: clock or vector width of its {cpu.name} are not known, so nothing can be "
                "estimated there. Name a board, or build and time the bundle here: edgekit bench"
            )
        clock = min(cpu.clock_hz, mode.cpu_clock_hz or cpu.clock_hz) if mode else cpu.clock_hz
        cores += [(clock, cpu)] * cpu.cores
    cores.sort(key=lambda c: -c[0] * (c[1].simd_bits or 0))
    big = [
        c for c in cores if c[0] * (c[1].simd_bits or 0) >= 0.4 * cores[0][0] * (cores[0][1].simd_bits or 0)
    ]
    limit = mode.cpu_cores if mode and mode.cpu_cores else len(cores)
    used = cores[: min(threads or len(big), limit)]
    peak = {p: sum(clock * _macs_per_cycle(cpu, p) for clock, cpu in used) for p in BYTES}
    dot = bool({"dotprod", "i8mm", "avx512_vnni", "avx_vnni"} & set(used[0][1].isa))
    caches = {id(cpu): (cpu.l2_bytes or 262_144) * cpu.cores / cpu.l2_cores for _, cpu in used}
    cache = sum(caches.values()) + max(cpu.l3_bytes or 0 for cpu in target.cpus)
    return Machine(
        "cpu", runtime, len(used), float(np.mean([c for c, _ in used])), peak, peak["float32"], bandwidth, cache,
        frozenset({"int8"} if "i8mm" in used[0][1].isa else ()), dot,
        float(np.mean([cpu.simd_bits or 0 for _, cpu in used])),
    )  # fmt: skip


def _macs_per_cycle(cpu: Cpu, precision: str) -> float:
    lanes = (cpu.simd_bits or 0) / 32
    if precision == "float16":
        return lanes * 2 if "fp16" in cpu.isa else lanes
    if precision == "int8":
        return lanes * 4 if {"dotprod", "avx512_vnni", "avx_vnni"} & set(cpu.isa) else lanes * 2
    return lanes


def by_time(costs: Sequence[LayerCost]) -> list[LayerCost]:
    """The slowest first."""
    return sorted(costs, key=lambda c: -c.seconds)
