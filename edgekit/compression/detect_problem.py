"""A YOLO-lite and its labelled pictures as a Problem: the losses of YOLOX, the project's own average precision.

entry = open_project(Path("apps/detect")).models[0]
problem = detect_problem(entry, rendered(Path("runs/street"), 1000, 14, 384, 2), Batching(steps=6000))
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.compression.distillation import imitation
from edgekit.compression.problem import Batch, Problem
from edgekit.models.detect_data import Batching, Labelled, make_batch
from edgekit.models.yolo_lite import YoloLite, cells, export_onnx, load_onnx, remeasure
from edgekit.models.yolox_loss import losses
from edgekit.project import ModelEntry
from edgekit.tasks.detect.dataset import CocoSet

MEASURED = 4
"""Batches that a folded network's batch norms get their statistics from."""
PICTURES = 512

Targets = tuple[Tensor, Tensor, bool]
"""Boxes [B, G, 4] in input pixels, classes [B, G] (-1: none), whether boxes are also learned by L1."""


def detect_problem(
    entry: ModelEntry, data: Labelled, options: Batching, *, model: YoloLite | None = None, lr: float = 1.5e-3,
    pictures: int = PICTURES, identity: Mapping[str, Any] | None = None, bf16: bool = True,
) -> Problem:  # fmt: skip
    """`model`, or the network of `entry.source` (models.yolo_lite.load_onnx), to be compressed on `data`.

    entry: of a project, with an evaluation set: the metrics AP50 and AP (COCO) are those of the network as ONNX,
    behind the passes and in the pipeline of a build, on its first `pictures` pictures. options: crops first, whole
    pictures and an L1 box loss for the last `tail` of `steps` batches, counted over all trainings of a run.
    identity: what says which data these are. bf16: trainings compute in bfloat16.
    """
    network = model or load_onnx(entry.source)
    if model is None:
        # whole pictures with the augmentation of training, from the end of the schedule
        remeasure(
            network, (_inputs(make_batch(data, options, options.steps + i)[0]) for i in range(MEASURED))
        )

    def batch(step: int) -> Batch:
        images, truth, kinds = make_batch(data, options, step)
        return _inputs(images), (truth, kinds, options.whole(step))

    def write(found: nn.Module, path: Path) -> None:
        assert isinstance(found, YoloLite)
        export_onnx(found, path, options.height, options.width)

    facts = {
        "data": entry.name,
        **dataclasses.asdict(options),
        "pictures": len(data[0]),
        "bf16": bf16,
        **(identity or {}),
    }
    return Problem(
        entry.name, network, torch.zeros(1, 3, options.height, options.width), batch, yolox_loss,
        average_precision(entry, write, pictures), write, head(network), imitation, facts, lr, 0.03, bf16,
    )  # fmt: skip


def head(model: nn.Module) -> frozenset[str]:
    """Names of the convolutions whose outputs are boxes, objectness and classes."""
    last = ("box", "objectness", "classes")
    return frozenset(name for name, _ in model.named_modules() if name.split(".")[-1] in last)


def yolox_loss(levels: Any, targets: Targets) -> Tensor:
    """The losses of YOLOX on raw levels, summed. Their size is that of the finest level times its stride."""
    truth, kinds, l1 = targets
    height, width = (8 * n for n in levels[0][0].shape[2:])
    grid, stride = cells(height, width)
    parts = losses(levels, truth, kinds, grid, stride, (height, width), l1)
    return torch.stack(list(parts.values())).sum()


def average_precision(
    entry: ModelEntry, write: Callable[[nn.Module, Path], None], pictures: int
) -> Callable[[nn.Module], dict[str, float]]:
    """Problem.evaluate of detectors: {"AP50", "AP"} of the network as a float build of `entry` runs it."""
    known: list[CocoSet] = []

    def evaluate(network: nn.Module) -> dict[str, float]:
        with tempfile.TemporaryDirectory(prefix="edgekit-detect-") as folder:
            path = Path(folder) / "network.onnx"
            write(network, path)
            return measured(dataclasses.replace(entry, source=path), pictures, known)

    return evaluate


def measured(entry: ModelEntry, pictures: int, known: list[CocoSet] | None = None) -> dict[str, float]:
    """AP50 and AP of a detector's float build on ONNX Runtime. known: keeps the pictures' labels between calls."""
    from edgekit.backends.base import half
    from edgekit.target import Target
    from edgekit.tasks import open_pipeline
    from edgekit.tasks.detect.evaluate import evaluate_pipeline
    from edgekit.toolchain import build, data
    from edgekit.toolchain.running import run_here

    source = build.read(entry, build.Options(Path()), lambda *_: None)
    known = [] if known is None else known
    if not known:
        assert entry.evaluation is not None, "a detector is judged on labelled pictures"
        chosen = (
            dataclasses.replace(entry.evaluation, count=pictures)
            if entry.evaluation.source
            else entry.evaluation
        )
        known.append(data.labelled_set(chosen, source.spec, pictures, lambda *_: None))  # type: ignore[arg-type]
    (payload,) = half("onnxruntime", "lower").lower(source.prepared.model, Target.load("host"), "float32")
    running = run_here(payload)
    found, _ = evaluate_pipeline(open_pipeline(source.spec, running.binding), known[0])  # type: ignore[arg-type]
    return {"AP50": found["AP50"] or 0.0, "AP": found["AP"] or 0.0}


def _inputs(images: Tensor) -> Tensor:
    return images.float().contiguous(memory_format=torch.channels_last)
