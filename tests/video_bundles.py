"""A stream network made by hand, in a bundle of task `video`, and a session whose outputs a test writes down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle import Bundle, write_bundle
from edgekit.schema import to_json
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.tasks.video.spec import EventRule, VideoSpec
from tests import state_bundles

LABELS = ("nothing", "wave", "push", "turn", "shake")
RULE = ImagePreprocess(state_bundles.SIZE, state_bundles.SIZE, resize="stretch", std=(255.0,) * 3)


def spec(**fields: Any) -> VideoSpec:
    return VideoSpec(
        **{
            "preprocess": RULE,
            "output": "logits",
            "labels": LABELS,
            "background": "nothing",
            "events": EventRule(min_on=2),
        }
        | fields
    )


class Script:
    """A session whose runs give the rows of `logits` [N, C] one after the other; `seen` are its inputs."""

    def __init__(
        self,
        logits: Sequence[Sequence[float]] | np.ndarray | Callable[[int], Any],
        classes: int = len(LABELS),
    ) -> None:
        self.inputs = {"image": np.zeros((1, 3, RULE.height, RULE.width), np.float32)}
        self.outputs = {"logits": np.zeros((1, classes), np.float32)}
        self.logits = logits
        self.runs = self.resets = 0
        self.seen: list[np.ndarray] = []

    def run(self) -> None:
        self.seen.append(self.inputs["image"].copy())
        row = self.logits(self.runs) if callable(self.logits) else self.logits[self.runs]
        self.outputs["logits"][...] = row
        self.runs += 1

    def reset(self) -> None:
        self.resets += 1


def picture(level: int = 100, side: int = 12) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


def write(path: Path, *, reset_after_s: float | None = 0.5, seed: int = 0, **fields: Any) -> Path:
    """A bundle of the network `state_bundles.shifted`: two states, trained for 0.1 s a step."""
    return write_as(path, "video", spec(**{"dt_s": 0.1} | fields), reset_after_s, seed)


def write_as(path: Path, task: str, pipeline: Any, reset_after_s: float | None = 0.5, seed: int = 0) -> Path:
    """The same network with the `pipeline` of any task."""
    model = state_bundles.shifted(seed)
    states = state_bundles.with_fields(state_bundles.STATES, reset_after_s=reset_after_s)
    plain = path.with_suffix(".plain.edge")
    state_bundles.write(plain, {"float": state_bundles.onnx_payload(model)}, model, states=states)
    with Bundle.open(plain) as bundle:
        manifest = dataclasses.replace(bundle.manifest, task=task, pipeline=to_json(pipeline))
        files = {name: bytes(bundle.read(name)) for name in bundle.manifest.files}
    plain.unlink()
    write_bundle(path, dataclasses.replace(manifest, files={}), files, {})
    return path
