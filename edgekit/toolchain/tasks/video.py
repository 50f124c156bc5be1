"""What a build asks of the task `video` (see edgekit.toolchain.tasks.ToolchainTask)."""

from __future__ import annotations

from typing import Any, cast

from edgekit.errors import UsageError
from edgekit.passes import Prepared
from edgekit.passes.states import answer_values, states
from edgekit.project import HeadHint, ModelEntry
from edgekit.tasks.video.dataset import class_names
from edgekit.tasks.video.spec import Activation, VideoSpec
from edgekit.toolchain import recurrent
from edgekit.toolchain.tasks import class_facts, class_labels, class_output, picture_rule

SEGMENT = "video"
NO_LABELS = "no labelled clips were given (--data FOLDER of <class>/<clip>, or data.npz)"
CLIPS = True
DEFAULT_SOURCE = "synthetic://gestures?size=64x64"
head_facts = class_facts


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
    output, count = class_output(
        entry,
        answer_values(prepared.model),
        "one output [1, classes] beside its states",
        "Export a network that gives every frame one row of scores",
    )
    rule, why = picture_rule(entry, prepared)
    data = entry.evaluation
    where = None if data is None else data.source or data.data or data.images
    labels, note = class_labels(entry, count, where, class_names)
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
        spec = VideoSpec(rule, output, labels, cast("Activation", prepared.activation), **given)
    except ValueError as error:
        raise UsageError(f"model {entry.name}: video: {error}. Change [model.video]") from None
    return spec, why, note
