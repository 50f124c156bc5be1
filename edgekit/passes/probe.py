"""Pictures to compare two graphs on, and the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.passes import exact
from edgekit.passes.graph import shape


def natural_picture(sizes: Sequence[int], seed: int = 0, peak: float = 255.0) -> np.ndarray:
    """Seeded float32 noise with the spectrum of photographs, values 0..`peak`, of the given shape.

    Amplitude falls as 1/f (Field 1987); channels share 80 % of their signal, as colours do.
    Only for comparing two graphs, never for calibration.
    """
    rng = np.random.default_rng(seed)
    *lead, height, width = (1, 1, *sizes) if len(sizes) < 2 else sizes
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    spectrum = 1.0 / np.maximum(np.hypot(fy, fx), 1.0 / max(height, width))
    noise = rng.standard_normal((int(np.prod(lead)), height, width))
    noise = np.fft.ifft2(np.fft.fft2(noise) * spectrum).real
    noise = 0.2 * noise + 0.8 * noise.mean(axis=0)
    low, high = noise.min(), noise.max()
    scaled = (noise - low) / max(high - low, 1e-12) * peak
    picture: np.ndarray = scaled.astype(np.float32).reshape(tuple(sizes))
    return picture


def pictures(model: ir.Model, peak: float = 255.0) -> dict[str, np.ndarray]:
    """One natural picture per graph input."""
    feeds = {}
    for i, value in enumerate(model.graph.inputs):
        sizes = shape(value)
        assert sizes is not None
        assert value.name is not None
        feeds[value.name] = natural_picture(sizes, seed=i, peak=peak)
    return feeds


def finite_pictures(model: ir.Model) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(pictures, outputs): values 0..255, or 0..1 where those overflow (an exp in a decode)."""
    feeds = pictures(model)
    outputs = evaluate(model, feeds)
    if not all(np.isfinite(o).all() for o in outputs.values() if o.dtype.kind == "f"):
        feeds = pictures(model, peak=1.0)
        outputs = evaluate(model, feeds)
    return feeds, outputs


def evaluate(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name, run as written (no graph optimisation) on one CPU thread by onnxruntime.

    Raises: ModelError when onnxruntime cannot run the graph; MissingExtraError without it.
    """
    names = [str(o.name) for o in model.graph.outputs]
    data = ir.serde.serialize_model(model).SerializeToString()
    with exact.refused():
        results = exact.open_session(data, "check the passes").run(names, dict(feeds))
    return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}


def largest_difference(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> tuple[float, float, str]:
    """(largest |a - b|, largest |a - b| / max(1, max |a|), name of the worst output) over shared names.

    Infinite for a missing output, another shape, or a NaN/Inf where there was none.
    """
    worst = (0.0, 0.0, "")
    for name, a in before.items():
        b = after.get(name)
        if b is None or a.shape != b.shape:
            return float("inf"), float("inf"), name
        if a.size == 0:
            continue
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
            return float("inf"), float("inf"), name
        diff = float(np.abs(x[finite] - y[finite]).max(initial=0.0))
        relative = diff / max(1.0, float(np.abs(x[finite]).max(initial=0.0)))
        if relative > worst[1] or not worst[2]:
            worst = (max(diff, worst[0]), relative, name)
        else:
            worst = (max(diff, worst[0]), worst[1], worst[2])
    return worst
