"""What a build asks of the task `video` (see edgekit.toolchain.tasks.ToolchainTask)."""

from __future__ import annotations

import math
from typing import Any, cast

from edgekit.errors import ModelError, UsageError
from edgekit.passes import Prepared
from edgekit.passes.graph import listed, shape
from edgekit.passes.states import answer_values, states
from edgekit.project import HeadHint, ModelEntry
from edgekit.schema import printable
from edgekit.tasks.video.dataset import class_names
from edgekit.tasks.video.spec import Activation, VideoSpec
from edgekit.toolchain import recurrent
from edgekit.toolchain.tasks import picture_rule

SEGMENT = "video"
NO_LABELS = "no labelled clips were given (--data FOLDER of <class>/<clip>, or data.npz)"
CLIPS = True
DEFAULT_SOURCE = "synthetic://gestures?size=64x64"


def prepare_options(entry: ModelEntry) -> dict[str, Any]:
    """How a clip model becomes a one-frame model. Raises: UsageError for a detector's head, which it has not."""
    if entry.head != HeadHint():
        raise UsageError(
            f"model {entry.name}: head {entry.head.family!r} is a detector's, but the task is video. Leave the head out"
        )
    hint = entry.video
    return {
        "frames": hint.frames,
        "allow_bidirectional": hint.allow_bidirectional,
        "nominal_dt_s": hint.dt_s,
    }


def make_spec(entry: ModelEntry, prepared: Prepared) -> tuple[VideoSpec, str, str]:
    """The spec of a network with one vector of classes beside its states. Raises: ModelError, UsageError."""
    found = answer_values(prepared.model)
    sizes = shape(found[0]) if len(found) == 1 else None
    count = 0 if sizes is None else math.prod(sizes)
    if sizes is None or count < 2 or max(sizes) != count:
        raise ModelError(
            f"model {entry.name}: expected one output [1, classes] beside its states, got {listed(found)}. "
            "Export a network that gives every frame one row of scores"
        )
    rule, why = picture_rule(entry, prepared)
    labels, note = _labels(entry, count)
    given = entry.video.fields()
    frames = entry.video.frames
    if frames is None and prepared.streamed is not None:
        frames = prepared.streamed.frames
    timed = recurrent.timed(states(prepared.model), entry.video.dt_s, entry.video.reset_after_s)
    if timed:
        given |= {"dt_s": timed[0].nominal_dt_s, "reset_after_s": timed[0].reset_after_s}
    if frames is not None:
        given["frames"] = frames
    try:
        spec = VideoSpec(rule, str(found[0].name), labels, cast("Activation", prepared.activation), **given)
    except ValueError as error:
        raise UsageError(f"model {entry.name}: video: {error}. Change [model.video]") from None
    return spec, why, note


def head_facts(spec: VideoSpec) -> dict[str, Any]:
    return {"family": "classes", "activation": spec.activation, "classes": len(spec.labels)}


def _labels(entry: ModelEntry, count: int) -> tuple[tuple[str, ...], str]:
    """The names given, else those of the evaluation set where it has as many, else class_0 and on."""
    if entry.classes:
        return entry.labels(count)
    data = entry.evaluation
    where = None if data is None else data.source or data.data or data.images
    found = () if where is None else class_names(where)
    if len(found) == count:
        return found, f"no class names given: taken from {printable(str(where))}, in its order"
    names = tuple(f"class_{i}" for i in range(count))
    return names, f"no class names given: called {names[0]} to {names[-1]}"
