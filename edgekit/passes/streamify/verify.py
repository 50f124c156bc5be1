"""Holds a one-frame model against the clip model it was made from: frame by frame, from frames so far alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.passes import exact, probe
from edgekit.passes.graph import shape
from edgekit.spec import StateSpec

if TYPE_CHECKING:
    from edgekit.passes.streamify import Streamified


def stream(model: ir.Model, states: tuple[StateSpec, ...], frames: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Outputs (states left out) of each of `frames` [T, ...], in order, by onnxruntime as written.

    The first input takes the frames, each with an axis of size 1 in front.
    """
    session = _session(model)
    names = [str(o.name) for o in model.graph.outputs]
    image = str(model.graph.inputs[0].name)
    kept = {s.input: np.full(s.shape, s.initial, np.float32) for s in states}
    found = []
    for frame in frames:
        results = dict(zip(names, session.run(names, {image: frame[None], **kept}), strict=True))
        kept = {s.input: results.pop(s.output) for s in states}
        found.append(results)
    return found


def differences(
    clip: ir.Model, made: Streamified, feeds: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """Largest |clip - stream| of each output, as a fraction of the clip output's largest magnitude (at least 1).

    `feeds`: the clip, by its input's name; None takes seeded pictures. Where the clip model takes a mean
    over frames, the mean of the stream's outputs is held against it.
    Raises: ModelError when one of the two does not run or gives other shapes.
    """
    if feeds is None:
        feeds = random_clip(clip)
    whole = probe.evaluate(clip, feeds)
    name = str(clip.graph.inputs[0].name)
    frames = np.moveaxis(feeds[name], made.axis, 0)
    sizes = shape(made.model.graph.inputs[0])
    assert sizes is not None, "made by us"
    results = stream(made.model, made.states, frames.reshape(len(frames), *sizes[1:]))
    found = {}
    for output, axis in made.outputs.items():
        rows = [r[output] for r in results]
        together = np.mean(rows, axis=0) if axis is None else np.concatenate(rows, axis)
        _, found[output], _ = probe.largest_difference({output: whole[output]}, {output: together})
    return found


def random_clip(clip: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded normal noise for the clip input: every frame differs in every channel."""
    value = clip.graph.inputs[0]
    sizes = shape(value)
    assert sizes is not None, "checked by streamify"
    return {str(value.name): np.random.default_rng(seed).standard_normal(sizes).astype(np.float32)}


def _session(model: ir.Model) -> Any:
    data = ir.serde.serialize_model(model).SerializeToString()
    with exact.refused("run its one-frame form", "Report it"):
        return exact.open_session(data, "check the one-frame model")
