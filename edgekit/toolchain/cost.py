"""What a layer costs on a machine: a roofline per layer (Williams et al. 2009) with fitted efficiencies.

    seconds = start + ((macs / rate)^2 + (bytes / bandwidth)^2)^(1/2)

`rate` is the machine's peak at that precision times an efficiency that falls with thin matrix products (few
channels), depthwise kernels and idle multiprocessors. The coefficients are few, belong to a class of machines
and not to a board, and are fitted on published latencies (benchmarks/estimate_accuracy.py --fit).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from edgekit.toolchain.layers import KINDS, Layer

BYTES = {"float32": 4, "float16": 2, "int8": 1}
Coefficients = Mapping[str, float]


@dataclass(frozen=True)
class Machine:
    """The part of a board that runs the network, in one power mode.

    macs_per_s: peak multiply-accumulates per precision, all cores or multiprocessors together.
    units: multiprocessors, or CPU threads. cache_bytes: last-level cache. runtime: the inference library,
    a key of the coefficients. int8_dot: int8 products have their own instructions.
    """

    unit: str
    runtime: str
    units: int
    clock_hz: float
    macs_per_s: Mapping[str, float]
    vector_macs_per_s: float
    """What runs outside matrix units: depthwise kernels on a GPU."""
    bytes_per_s: float
    cache_bytes: float
    int8_dot: bool = True


@dataclass(frozen=True)
class Work:
    """Layers as columns, so that a whole network is costed at once."""

    kind: np.ndarray
    macs: np.ndarray
    rows: np.ndarray
    depth: np.ndarray
    columns: np.ndarray
    groups: np.ndarray
    winograd: np.ndarray
    weights: np.ndarray
    moved: np.ndarray
    """Activation bytes read and written."""
    written: np.ndarray
    """Elements written."""
    smooth: np.ndarray
    itemsize: np.ndarray
    precision: np.ndarray
    """Index into PRECISIONS."""


PRECISIONS = ("float32", "float16", "int8")


def work(found: Sequence[Layer], precisions: Sequence[str], converted: Sequence[tuple[int, str, str]]) -> Work:
    """Layers with a precision each, then conversions as (elements, from, to)."""
    rows = []
    for layer, precision in zip(found, precisions, strict=True):
        size = BYTES[precision]
        moved = size * (sum(n for _, n in layer.reads) + sum(n for _, n in layer.writes))
        winograd = layer.kind == "conv" and layer.taps == 9 and layer.stride == 1 and layer.groups == 1
        rows.append(
            (KINDS.index(layer.kind), layer.macs, layer.rows, layer.depth, layer.columns, layer.groups, winograd,
             layer.weights, moved, sum(n for _, n in layer.writes), layer.smooth, size, PRECISIONS.index(precision))
        )  # fmt: skip
    for elements, source, target in converted:
        moved = elements * (BYTES[source] + BYTES[target])
        rows.append((KINDS.index("convert"), 0, 0, 0, 0, 1, False, 0, moved, elements, False, BYTES[target], 0))
    columns = [np.array(c, dtype=float) for c in zip(*rows, strict=True)]
    ints = {0, 12}
    return Work(*(c.astype(int) if i in ints else c for i, c in enumerate(columns)))


def seconds(found: Work, machine: Machine, c: Coefficients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(seconds, of which compute, of which memory) of every layer."""
    compute, memory, start = (_gpu if machine.unit == "gpu" else _cpu)(found, machine, c)
    return start + np.hypot(compute, memory), compute, memory


def _is(found: Work, *kinds: str) -> np.ndarray:
    return np.isin(found.kind, [KINDS.index(k) for k in kinds])


def _gpu(found: Work, machine: Machine, c: Coefficients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    peak = np.array([machine.macs_per_s[p] for p in PRECISIONS])[found.precision]
    # a matrix unit takes the same bytes per cycle at any precision: half the bytes, twice the channels to fill it
    fill = np.array([0.5, 1.0, 2.0])[found.precision]
    depth, columns = np.maximum(found.depth, 1), np.maximum(found.columns, 1)
    efficiency = np.array([c["eff_float32"], c["eff_float16"], c["eff_int8"]])[found.precision]
    efficiency = efficiency * depth / (depth + c["half_depth"] * fill)
    efficiency = efficiency * columns / (columns + c["half_columns"])
    rate = peak * efficiency
    # one tile of 128 x 64 outputs on one multiprocessor is the least that a layer takes
    tile = 128 * 64 * depth * found.groups / (rate / machine.units)
    compute = found.macs / rate + np.where(found.macs > 0, c["tile"] * np.minimum(tile, found.macs / rate * machine.units), 0)
    depthwise = _is(found, "depthwise")
    compute = np.where(depthwise, found.macs / (machine.vector_macs_per_s * c["eff_depthwise"]), compute)
    bandwidth = machine.bytes_per_s * c["bandwidth"]
    inside = np.minimum(found.moved, machine.cache_bytes) * c["cached"]
    weight_bytes = found.weights * found.itemsize
    share = np.where(_is(found, "copy"), c["copy"], 1.0)
    memory = (np.maximum(found.moved - inside, 0) * share + weight_bytes) / bandwidth
    return compute, memory, np.full_like(compute, c["start_us"] * 1e-6 * 1e9 / machine.clock_hz)


def _cpu(found: Work, machine: Machine, c: Coefficients) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    int8 = found.precision == PRECISIONS.index("int8")
    threads = machine.units ** c["threads"] / machine.units
    peak = np.array([machine.macs_per_s[p] for p in PRECISIONS])[found.precision] * threads
    runtime = c[f"runtime_{machine.runtime}"]
    efficiency = c["eff_conv"] * np.ones_like(found.macs)
    efficiency = np.where(_is(found, "pointwise"), c["eff_pointwise"], efficiency)
    winograd = c["winograd"] if machine.runtime in WINOGRAD else 1.0
    efficiency = np.where((found.winograd > 0) & ~int8, efficiency * winograd, efficiency)
    efficiency = np.where(found.precision == PRECISIONS.index("float16"), efficiency * c["eff_float16"], efficiency)
    dot = c["eff_int8_dot"] if machine.int8_dot else c["eff_int8"]
    efficiency = np.where(int8, efficiency * dot, efficiency)
    depth, columns = np.maximum(found.depth, 1), np.maximum(found.columns, 1)
    efficiency = efficiency * depth / (depth + c["half_depth"]) * columns / (columns + c["half_columns"])
    efficiency = np.where(_is(found, "depthwise"), c["eff_depthwise"], efficiency)
    compute = found.macs / (peak * efficiency * runtime)
    cycles = machine.clock_hz * machine.units * threads
    compute = compute + found.smooth * found.written * c["cycles_smooth"] / cycles / runtime
    bandwidth = machine.bytes_per_s * c["bandwidth"]
    inside = np.minimum(found.moved, machine.cache_bytes)
    near = cycles * c["bytes_per_cycle"] * np.sqrt(runtime)
    memory = inside / near + (found.moved - inside + found.weights * found.itemsize) / bandwidth
    return compute, memory, np.full_like(compute, c["start_us"] * 1e-6 * 1e9 / machine.clock_hz)


WINOGRAD = ("ncnn", "mnn", "openvino")
"""Libraries that run float 3x3 convolutions by Winograd's algorithm (Lavin and Gray 2016)."""


@functools.cache
def fitted() -> dict[str, Any]:
    """The coefficients that ship: per unit ("gpu", "cpu"), with the spread of their errors and how they were fitted."""
    text = resources.files("edgekit.toolchain").joinpath("coefficients.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
