"""Ranges for what feeds a SiLU, chosen by the error behind it.

silu(x) = x * sigmoid(x) is nearly flat below about -6: codes spent there are lost, and clipping there costs
nothing. Minimising the error of x itself (scheme "mse") does not see that; this minimises
E[(silu(q(x)) - silu(x))**2] over the histogram, for both ends. The idea of judging a quantizer by what its
consumer makes of it: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.1.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from edgekit.quant.ranges import activation_range, params
from edgekit.quant.stats import Stats, TensorStats

PAPER = "Nagel et al. 2021 (white paper), section 3.1"
LOWS = -np.geomspace(1.0, 16.0, 17)
"""Candidate low ends; the seen one and that of scheme "mse" join them. silu(-16) = -2e-6."""
HIGHS = np.linspace(0.3, 1.0, 15)
"""Candidate high ends, as shares of the largest value seen; that of scheme "mse" joins them."""
GAIN = 0.01
"""Clip the high end only where that lowers the error by more than this share: unseen data is larger."""


def silu_inputs(model: ir.Model) -> list[ir.Value]:
    """Values that only a SiLU (Sigmoid and Mul of the same value) reads."""
    found = []
    for node in model.graph:
        if node.op_type != "Sigmoid" or node.inputs[0] is None:
            continue
        value = node.inputs[0]
        users = [user for user, _ in value.uses()]
        if value.is_graph_output() or len(users) != 2:
            continue
        mul = next((u for u in users if u.op_type == "Mul"), None)
        if mul is not None and node.outputs[0] in mul.inputs:
            found.append(value)
    return found


def silu_ranges(model: ir.Model, stats: Stats) -> dict[str, tuple[float, float]]:
    """(low, high) for every value of `silu_inputs` that has statistics."""
    names = [str(v.name) for v in silu_inputs(model)]
    return {name: silu_range(stats[name]) for name in names if name in stats}


@functools.lru_cache(maxsize=8192)
def silu_range(stats: TensorStats) -> tuple[float, float]:
    """The range with the least expected squared error behind a SiLU; within what was seen, zero included."""
    used = np.flatnonzero(stats.counts)
    centres = np.clip(stats.bin_low + stats.bin_width * (used + 0.5), stats.low, stats.high)
    counts = stats.counts[used].astype(np.float64)
    exact = _silu(centres)
    seen = min(stats.low, 0.0), max(stats.high, 0.0)
    mse = activation_range(stats, "mse")  # among the candidates: the result is no worse
    lows = sorted({seen[0], mse[0], *(float(x) for x in LOWS if x > seen[0])})
    highs = sorted({mse[1], *(seen[1] * float(share) for share in HIGHS)} - {seen[1]})

    def error(low: float, high: float) -> float:
        found = params(low, high)
        (scale,), (zero,) = found.scale, found.zero_point
        codes = np.clip(np.rint(centres / scale) + zero, -128, 127)
        return float(counts @ (_silu((codes - zero) * scale) - exact) ** 2)

    best = min((error(low, seen[1]), low) for low in lows)
    low, high = best[1], seen[1]
    limit = best[0] * (1 - GAIN)
    for end in highs:
        for candidate in lows:
            found = error(candidate, end)
            if found < limit:
                limit, low, high = found, candidate, end
    return low, high


def _silu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1 + np.exp(-np.clip(x, -60, 60))))
