"""What a layer costs on a machine: a roofline per layer (Williams et al. 2009) with fitted efficiencies.

    seconds = start + ((macs / rate)^2 + (bytes / bandwidth)^2)^(1/2)

`rate` is the machine's peak at that precision times an efficiency that falls with thin matrix products (few
channels), depthwise kernels and idle multiprocessors. The coefficients are few, belong to a class of machines
and to a library, never to a board, and are fitted on published latencies (benchmarks/estimate_accuracy.py --fit).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import numpy as np

from edgekit.toolchain.layers import KINDS, Layer

BYTES = {"float32": 4, "float16": 2, "int8": 1}
PRECISIONS = tuple(BYTES)
RUNTIMES = ("tensorrt", "xnnpack", "onnxruntime", "openvino", "ncnn", "mnn", "tflite_old")
"""Libraries that have coefficients: those of edgekit's backends, and others that published latencies are of.
tflite_old: TensorFlow Lite before XNNPACK."""
WINOGRAD = ("ncnn", "mnn", "openvino")
"""Libraries that run float 3x3 convolutions by Winograd's algorithm (Lavin and Gray 2016)."""
Coefficients = Mapping[str, float]


@dataclass(frozen=True)
class Machine:
    """The part of a board that runs the network, in one power mode.

    unit: "gpu" or "cpu". runtime: one of RUNTIMES. units: multiprocessors, or CPU threads.
    macs_per_s: peak multiply-accumulates per precision, all units together; vector_macs_per_s: of what runs
    outside matrix units, float32. cache_bytes: the last-level cache of that part.
    matrix: precisions whose products have matrix instructions (tensor cores; i8mm). int8_dot: a CPU has dot
    products of int8. simd_bits: vector width of one CPU core, 0 on a GPU.
    """

    unit: str
    runtime: str
    units: int
    clock_hz: float
    macs_per_s: Mapping[str, float]
    vector_macs_per_s: float
    bytes_per_s: float
    cache_bytes: float
    matrix: frozenset[str] = frozenset()
    int8_dot: bool = True
    simd_bits: float = 0


@dataclass(frozen=True)
class Work:
    """Layers as columns, each with the machine it runs on, so that many networks are costed at once."""

    kind: np.ndarray
    macs: np.ndarray
    depth: np.ndarray
    columns: np.ndarray
    groups: np.ndarray
    winograd: np.ndarray
    weight_bytes: np.ndarray
    moved: np.ndarray
    """Activation bytes read and written."""
    written: np.ndarray
    """Elements written."""
    smooth: np.ndarray
    precision: np.ndarray
    """Index into PRECISIONS."""
    peak: np.ndarray
    vector: np.ndarray
    units: np.ndarray
    clock: np.ndarray
    bandwidth: np.ndarray
    cache: np.ndarray
    runtime: np.ndarray
    """Index into RUNTIMES."""
    dot: np.ndarray
    wide: np.ndarray
    """Vector width of one core as a multiple of 256 bits, at least 1."""
    matrix: np.ndarray

    def among(self, *kinds: str) -> np.ndarray:
        return np.isin(self.kind, [KINDS.index(k) for k in kinds])


def work(
    found: Sequence[Layer],
    precisions: Sequence[str],
    converted: Sequence[tuple[int, str, str]],
    machine: Machine,
) -> Work:
    """Layers with a precision each, then conversions as (elements, from, to)."""
    here = (
        machine.vector_macs_per_s, machine.units, machine.clock_hz, machine.bytes_per_s, machine.cache_bytes,
        RUNTIMES.index(machine.runtime), machine.int8_dot, max(machine.simd_bits / 256, 1),
    )  # fmt: skip
    rows: list[tuple[float, ...]] = []
    for layer, precision in zip(found, precisions, strict=True):
        size = BYTES[precision]
        moved = size * (sum(n for _, n in layer.reads) + sum(n for _, n in layer.writes))
        winograd = layer.kind == "conv" and layer.taps == 9 and layer.stride == 1 and layer.groups == 1
        written = sum(n for _, n in layer.writes)
        rows.append(
            (KINDS.index(layer.kind), layer.macs, layer.depth, layer.columns, layer.groups,
             winograd and precision != "int8", layer.weights * size, moved, written, layer.smooth,
             PRECISIONS.index(precision), machine.macs_per_s[precision], *here, precision in machine.matrix)
        )  # fmt: skip
    for elements, source, target in converted:
        moved = elements * (BYTES[source] + BYTES[target])
        peak = machine.macs_per_s[target]
        rows.append((KINDS.index("convert"), 0, 0, 0, 1, 0, 0, moved, elements, 0, 0, peak, *here, 0))
    return Work(*(np.array(column, dtype=float) for column in zip(*rows, strict=True)))


def join(parts: Sequence[Work]) -> Work:
    """All of `parts` one after the other."""
    return Work(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Work)))


def seconds(w: Work, unit: str, c: Coefficients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(seconds, of which compute, of which memory) of every layer."""
    compute, memory, start = (_gpu if unit == "gpu" else _cpu)(w, c)
    return start + np.hypot(compute, memory), compute, memory


def _pick(w: Work, c: Coefficients, prefix: str) -> np.ndarray:
    """`c[prefix + precision]` of every layer."""
    found: np.ndarray = np.array([c[prefix + p] for p in PRECISIONS])[w.precision.astype(int)]
    return found


def _per_runtime(w: Work, c: Coefficients, prefix: str) -> np.ndarray:
    """`c[prefix + runtime]` of every layer, 1 for libraries without such a coefficient."""
    found: np.ndarray = np.array([c.get(prefix + r, 1.0) for r in RUNTIMES])[w.runtime.astype(int)]
    return found


def _gpu(w: Work, c: Coefficients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # a tensor core takes the same bytes per cycle at any precision: half the bytes, twice the depth to fill it
    fill = np.array([0.5, 1.0, 2.0])[w.precision.astype(int)]
    depth, columns = np.maximum(w.depth, 1), np.maximum(w.columns, 1)
    deep = w.peak * np.where(
        w.matrix > 0,
        _pick(w, c, "eff_") * depth / (depth + c["half_depth"] * fill),
        c["eff_vector"] * depth / (depth + c["half_vector"]) * np.where(w.winograd > 0, c["winograd"], 1.0),
    )
    half = np.where(w.matrix > 0, c["half_columns"], c["half_vector"])
    compute = w.macs / (deep * columns / (columns + half))
    # a tile of 128 x 64 outputs on one multiprocessor takes its time however few there are
    compute = compute + np.where(w.macs > 0, c["tile"] * 128 * 64 * depth / (deep / w.units), 0)
    compute = np.where(w.among("depthwise"), w.macs / (w.vector * c["eff_depthwise"]), compute)
    share = np.where(w.among("copy"), c["copy"], 1.0)
    near = np.minimum(w.moved, w.cache) * c["cached"]
    memory = ((w.moved - near) * share + w.weight_bytes) / (w.bandwidth * c["bandwidth"])
    return compute, memory, c["start_us"] * 1e3 / w.clock


def _cpu(w: Work, c: Coefficients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    int8 = w.precision == PRECISIONS.index("int8")
    half = w.precision == PRECISIONS.index("float16")
    size = np.array(list(BYTES.values()))[w.precision.astype(int)]
    parallel = w.units ** (c["threads"] - 1)
    library = _per_runtime(w, c, "runtime_")
    efficiency = np.where(w.among("pointwise", "gemm"), c["eff_pointwise"], c["eff_conv"])
    winograd = np.isin(w.runtime, [RUNTIMES.index(r) for r in WINOGRAD]) & (w.winograd > 0)
    efficiency = np.where(winograd, efficiency * c["winograd"], efficiency)
    efficiency = np.where(half, efficiency * c["half"], efficiency)
    dot = np.where(w.dot > 0, c["int8_dot"] * np.where(w.matrix > 0, c["int8_matrix"], 1.0), c["int8_plain"])
    efficiency = np.where(int8, efficiency * dot * _per_runtime(w, c, "int8_"), efficiency)
    depth, columns = np.maximum(w.depth, 1), np.maximum(w.columns, 1)
    efficiency = efficiency * depth / (depth + c["half_depth"]) * columns / (columns + c["half_columns"])
    # depthwise kernels are bound by loads: what counts is the vector width in bytes
    thin = np.where(size < 4, c["depthwise_thin"], 1.0)
    efficiency = np.where(w.among("depthwise"), c["eff_depthwise"] * w.vector / w.peak * thin, efficiency)
    efficiency = efficiency * library
    efficiency = np.where(winograd, efficiency, np.minimum(efficiency, 0.95))  # nothing else beats the peak
    rate = w.peak * efficiency * w.wide ** -c["wide"] * parallel
    cycles = w.clock * w.units * parallel
    compute = w.macs / rate + w.smooth * w.written * c["cycles_smooth"] * size / 4 / (cycles * library)
    near = np.minimum(w.moved, w.cache)
    # the bus, and what the cores in use can draw from it
    far = 1 / (w.bandwidth * c["bandwidth"]) + 1 / (w.units * c["core_gb_per_s"] * 1e9)
    memory = near / (cycles * c["bytes_per_cycle"]) + (w.moved - near + w.weight_bytes) * far
    return compute, memory, c["start_us"] * 1e3 / w.clock * _per_runtime(w, c, "start_")


def group(machine: Machine, precisions: Collection[str]) -> str:
    """The class whose spread of errors an estimate has: "gpu" (on tensor cores), "gpu-plain", "cpu-float", "cpu-int8"."""
    if machine.unit == "gpu":
        return "gpu" if machine.matrix.issuperset(precisions) else "gpu-plain"
    return "cpu-int8" if "int8" in precisions else "cpu-float"


@functools.cache
def fitted() -> dict[str, Any]:
    """The coefficients that ship: per unit, with the spread of their errors and how they were fitted."""
    text = resources.files("edgekit.toolchain").joinpath("coefficients.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
