"""A YOLO-lite of a project as a Problem (detect_problem.py): its network, and the pictures of [model.train]."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch import nn

from edgekit import frontends
from edgekit.compression.detect_problem import detect_problem
from edgekit.compression.problems import Opened, labelled, training_pictures
from edgekit.errors import ModelError, UsageError
from edgekit.models.detect_data import Batching, Labelled, pictures, rendered
from edgekit.models.yolo_lite import Head, YoloLite, load_onnx
from edgekit.passes.graph import input_size
from edgekit.project import ModelEntry
from edgekit.project.training import TrainHint
from edgekit.tasks.detect.dataset import read_coco
from edgekit.toolchain import cache

FRAMES = 14
"""Pictures of each synthetic street."""
JUDGED = 512
CROP = (128, 256)
LR = 1.5e-3
OTHER = "Of another detector, name a function that makes a Problem: edgekit compress package.module:function"


def opened(entry: ModelEntry, module: nn.Module | None, seed: int, steps: int) -> Opened:
    """`module`, or the network of `entry.source`, a YOLO-lite both times; anything else needs its own losses.

    Raises: UsageError, CalibrationError (pictures in both sets).
    """
    train, judged = training_pictures(entry), labelled(entry)
    what = f"model {entry.name}"
    if module is None:
        height, width = input_size(frontends.load(entry.source))
        try:
            network = load_onnx(entry.source)
        except (ValueError, IndexError, KeyError) as error:
            raise UsageError(
                f"{what}: its network is no YOLO-lite, whose losses are known here. {OTHER}"
            ) from error
    else:
        assert entry.module is not None
        sizes = entry.module.input
        if not isinstance(module, YoloLite):
            raise UsageError(
                f"{what}: its module is a {type(module).__name__}, expected edgekit.models.yolo_lite.YoloLite. {OTHER}"
            )
        if len(sizes) != 4:
            raise UsageError(
                f"{what}: the sizes of its input are not known. Give input = [1, 3, 224, 384], or --input"
            )
        network, (height, width) = module, sizes[2:]
    classes = next(part.classes.out_channels for part in network.modules() if isinstance(part, Head))
    data, identity = _pictures(train, entry.labels(classes)[0], (height, width), what)
    options = Batching(
        steps=max(steps, 1), batch=train.batch, width=width, height=height, crop_width=min(CROP[1], width),
        crop_height=min(CROP[0], height), seed=seed,
    )  # fmt: skip
    count = judged.count or JUDGED
    made = detect_problem(
        entry, data, options, model=None if module is None else network, lr=train.lr or LR, pictures=count,
        identity={**identity, "judged_on": count},
    )  # fmt: skip
    facts = {"pictures": len(data[0]), "classes": classes, "judged_on": count}
    return Opened(made, entry, train.steps if module is not None else 0, facts)


def _pictures(
    train: TrainHint, labels: tuple[str, ...], size: tuple[int, int], what: str
) -> tuple[Labelled, dict[str, Any]]:
    """(labelled pictures, what decides them)."""
    given = train.data
    if given.source:
        if given.source.partition("?")[0] != "synthetic://street" or given.seed:
            raise UsageError(
                f"{what}: train.source {given.source!r} from seed {given.seed}: expected synthetic://street from seed 0. "
                "Leave seed out"
            )
        streets = given.count or 0
        with contextlib.redirect_stdout(sys.stderr):  # its progress bar
            data = rendered(cache.cache_dir() / "training", streets, FRAMES, size[1], 0)
        if data[0][0].shape[0] > size[0]:
            raise ModelError(
                f"{what}: its input {size[1]}x{size[0]} is lower than a street, expected 16 to 9"
            )
        return data, {"streets": streets, "frames": FRAMES}
    assert given.data is not None and given.images is not None, "checked by the project reader"
    found = read_coco(given.data, given.images, limit=given.count, labels=labels)
    return pictures(found, size), {"digest": found.digest}
