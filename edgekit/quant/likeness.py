"""Is the calibration data enough, and does it look like the data the network is judged on? Warnings, not errors.

distance: how far the distributions of the first values of the network (its first layers: brightness,
contrast, colour, sharpness as this network sees them) lie apart: for each value the Wasserstein-1
distance of its two histograms over the standard deviation of the calibrated one, averaged. Measured
with YOLOX-nano / FastestDet / the shipped detector:
    alike   COCO photos and others of them 0.02, streets and other streets 0.01, blood cells and others 0.003
    unlike  COCO and rendered streets 0.10 / 0.10 / 0.06, COCO and blood cells 0.11 / 0.15 / 0.20; COCO and
            the same at half brightness 0.10 / 0.12 / 0.11, dark 0.20, blank 0.27 / 0.26 / 0.23; blurred
            0.11, noise 0.23 (YOLOX-nano)
It does not see colour channels in the wrong order (0.03): both sets go through the same input rule.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import clean, infer
from edgekit.passes.states import states
from edgekit.quant.calibrate import Feeds, calibrate, measured
from edgekit.quant.stats import Stats, TensorStats

FEW = 16
"""With fewer pictures, the ranges of a detector on COCO pictures reach less than 0.92 of those of 128."""
GROWTH = 0.08
"""Mean share by which a range grows from half of the pictures to all; COCO pictures: 0.06 for 2, 0.03 for 128."""
FIRST = 20
"""Values of the network's beginning that are compared."""
COMPARED = 16
"""Pictures to compare with: enough for a distance of 0.02 to mean alike."""
UNLIKE = 0.045


def warnings(model: ir.Model, stats: Stats, evaluation: Feeds | None) -> list[str]:
    """What speaks against the calibration `stats` of the network `model`, one sentence each.

    evaluation: a few feeds (COMPARED of them are enough) of what the network is judged on, None = unknown.
    """
    return [text for text in (too_few(stats), unlike(model, stats, evaluation)) if text]


def too_few(stats: Stats) -> str:
    """Why there are too few pictures, "" when there are enough."""
    pictures = max(s.image_low.size for s in stats.values())
    grown = growth(stats)
    if pictures >= FEW and grown <= GROWTH:
        return ""
    reason = (
        f"ranges still grow by {grown:.1%} when the pictures are doubled"
        if pictures > 1
        else "one says nothing"
    )
    wanted = f"at least {FEW}" if pictures < FEW else "more"
    return f"calibration on {pictures} pictures: too few ({reason}). Give {wanted}, better 100"


def growth(stats: Stats) -> float:
    """Mean share by which the range of a value over all pictures exceeds that over every other one, 0..1."""
    found = []
    for s in stats.values():
        full = s.high - s.low
        if s.image_low.size > 1 and full > 0:
            found += [1 - float(s.image_high[i::2].max() - s.image_low[i::2].min()) / full for i in (0, 1)]
    return float(np.mean(found)) if found else 0.0


def unlike(model: ir.Model, stats: Stats, evaluation: Feeds | None) -> str:
    """Why the calibration pictures are unlike those for evaluation, "" when they are alike or unknown."""
    if evaluation is None:
        return ""
    names = first_values(model)
    held = {state.input for state in states(model)}
    inputs = [str(v.name) for v in model.graph.inputs if v.name not in held]
    seen = calibrate(beginning(model, names), evaluation)
    names = [name for name in names if name in stats and name in seen]
    apart = distance(stats, seen, names)
    if apart <= UNLIKE:
        return ""
    why = "; ".join(_described(stats[n], seen[n]) for n in inputs if n in stats and n in seen)
    return (
        f"calibration pictures are unlike those for evaluation: distance {apart:.2f} of the first layers, expected at "
        f"most {UNLIKE} ({why}). Give pictures like those that the network will see"
    )


def _described(a: TensorStats, b: TensorStats) -> str:
    """Brightness, contrast and colour of both sets, in the units of the network's input."""

    def text(s: TensorStats) -> str:
        deviation = max(s.mean_square - s.mean**2, 0.0) ** 0.5
        channels = ", ".join(f"{m:.3g}" for m in s.channel_mean[:4])
        return f"mean {s.mean:.3g}, deviation {deviation:.3g}, channel means {channels}"

    return f"calibration: {text(a)}; evaluation: {text(b)}"


def first_values(model: ir.Model, count: int = FIRST) -> list[str]:
    """The first `count` values that calibration measures, inputs aside."""
    model = model.clone()
    infer(model)  # a pass may leave a value without its type
    inputs = {v.name for v in model.graph.inputs}
    return [name for name in measured(model) if name not in inputs][:count]


def beginning(model: ir.Model, names: list[str]) -> ir.Model:
    """The part of `model` that computes `names`."""
    part = model.clone()
    wanted = set(names)
    part.graph.outputs[:] = [o for node in part.graph for o in node.outputs if o.name in wanted]
    clean(part)
    return part


def distance(a: Mapping[str, TensorStats], b: Mapping[str, TensorStats], names: list[str]) -> float:
    """Mean over `names` of `wasserstein`; 0 for none."""
    return float(np.mean([wasserstein(a[n], b[n]) for n in names])) if names else 0.0


def wasserstein(a: TensorStats, b: TensorStats) -> float:
    """Area between the two distribution functions over the standard deviation of `a`."""
    width = max(a.bin_width, b.bin_width)
    low, high = min(a.low, b.low), max(a.high, b.high)
    x = np.linspace(low, high, max(2, min(8192, int((high - low) / width) + 2)))
    apart = np.abs(_below(a, x) - _below(b, x))
    deviation = max(a.mean_square - a.mean**2, 0.0) ** 0.5
    if deviation < 1e-6 * max(abs(low), abs(high)):  # one number: any other is far away
        return float(apart.max() > 0 and high > low)
    return float(apart[:-1].sum() * (x[1] - x[0]) / deviation)


def _below(s: TensorStats, x: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(s.counts, dtype=np.float64)]) / s.count
    below: np.ndarray = np.interp(x, s.edges, total)
    return below
