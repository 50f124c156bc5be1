"""Quantization-aware training: the network learns its weights and scales behind the rounding of the target's own plan.

The network is written as ONNX, placed by the rules of the library that runs int8 on the target (quant/placement.py), repaired
as a build repairs it, and trained from there with learned step sizes (fake_quant.py): by the problem's loss, and by
imitation of itself in floats. It comes out as a network that rounds: metrics of later steps are those of the integers. It
is the last step that trains. `weight_bits` below 8 keeps int8 payloads with fewer codes, which storage codecs pack.

Networks whose training outputs are not those of the file (detectors that decode on export) learn in the build instead:
`edgekit build --quantization qat`, which needs no labels and no source.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit import frontends
from edgekit.compression.fake_quant import FakeQuantized
from edgekit.compression.learn_steps import imitation, pruned
from edgekit.compression.onnx_module import OnnxModule, from_onnx
from edgekit.compression.work import Hook, Work
from edgekit.errors import UsageError
from edgekit.passes import AFTER_SPLIT, run_passes
from edgekit.quant import search
from edgekit.quant.calibrate import calibrate
from edgekit.quant.rules import PREFERENCE, rules_for
from edgekit.target import Target

CHECKED = 0.25
"""Share of the calibration inputs that repairs are measured on."""


@dataclass(frozen=True)
class Options:
    """steps: batches. lr: peak, in codes a step. start: `search` (all that a build tries in integers) or a range scheme.
    calibration: inputs that ranges come from. imitate: weight of the float network's answers beside the problem's loss.
    backend: whose rules; "" = the first of the target's that runs int8, ONNX Runtime without a target.
    """

    steps: int = 300
    lr: float = 0.02
    weight_bits: int = 8
    start: str = "search"
    calibration: int = 64
    imitate: float = 1.0
    backend: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 10**6:
            raise ValueError(f"steps must be between 1 and 1000000, got {self.steps}")
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr must be above 0 and at most 1, got {self.lr:g}")
        if not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be between 2 and 8, got {self.weight_bits}")
        if self.start not in ("search", "minmax", "percentile", "entropy", "mse"):
            raise ValueError(f"start must be search, minmax, percentile, entropy or mse, got {self.start!r}")
        if self.calibration < 2:
            raise ValueError(f"calibration must be at least 2, got {self.calibration}")
        if self.imitate < 0:
            raise ValueError(f"imitate must not be negative, got {self.imitate:g}")
        if self.backend and self.backend not in PREFERENCE:
            raise ValueError(f"backend must be one of {', '.join(PREFERENCE)}, got {self.backend!r}")


class Imitate(Hook):
    """Adds the noise of the outputs over their variance (learn_steps.imitation)."""

    def __init__(self, teacher: OnnxModule, weight: float) -> None:
        self.teacher, self.weight = teacher, weight

    def loss(self, inputs: Tensor, outputs: Any, targets: Any) -> Tensor | None:
        if not self.weight:
            return None
        with torch.no_grad():
            wanted = self.teacher(inputs)
        return self.weight * imitation(outputs, wanted)


def run(work: Work, options: Options) -> None:
    problem = work.problem
    target = work.target or Target.load("host")
    able = [b for b in PREFERENCE if b in target.backends and "int8" in target.precisions.get(b, ())]
    rules = rules_for(options.backend or (able or ["onnxruntime"])[0], target)
    limit = min(rules.weight_limit, 2 ** (options.weight_bits - 1) - 1)
    rules = dataclasses.replace(rules, weight_limit=limit)
    with tempfile.TemporaryDirectory(prefix="edgekit-qat-") as folder:
        path = Path(folder) / "network.onnx"
        problem.write(work.model, path)
        model, _ = run_passes(frontends.load(path), AFTER_SPLIT)
    _check(work.model, from_onnx(model), problem.example, work.stage)
    name = str(model.graph.inputs[0].name)
    feeds: list[dict[str, np.ndarray]] = []
    while len(feeds) < options.calibration:
        inputs, _ = problem.batch(len(feeds))
        feeds += [{name: np.ascontiguousarray(x[None].numpy())} for x in inputs[: options.calibration]]
    feeds = feeds[: options.calibration]
    held = max(1, round(CHECKED * len(feeds)))
    task = search.Problem(
        model, calibrate(model, feeds), rules, feeds[held:], feeds[:held],
        lambda changed, only: calibrate(changed, feeds, only=only), lambda _: search.Look(None),
    )  # fmt: skip
    found = (
        search.integers(task, work.progress)
        if options.start == "search"
        else search.plain(task, options.start)
    )
    student = FakeQuantized(found.model, rules, options.weight_bits)
    teacher = from_onnx(found.exact).requires_grad_(False)
    work.model, work.masks = student, student.masks(pruned(teacher) if work.masks else {})
    work.problem = dataclasses.replace(problem, bf16=False)  # codes need all bits of a float32
    try:
        work.train(options.steps, lr=options.lr, hooks=[Imitate(teacher, options.imitate)])
    finally:
        work.problem = problem
    learned = student.learned()
    work.facts[work.stage] = {
        "rules": rules.name, "weight_bits": options.weight_bits, "start": list(found.steps),
        "output_error": {"ptq": found.error, "qat": search.error_of(task, learned)},
    }  # fmt: skip


def _check(model: nn.Module, written: OnnxModule, example: Tensor, stage: str) -> None:
    """Raises: UsageError for a network that trains with other outputs than its file has."""
    model.train()
    try:
        with torch.no_grad():
            training, file = model(torch.cat([example, example])), written(torch.cat([example, example]))
    finally:
        model.eval()
    shapes = [
        [tuple(v.shape) for v in (found if isinstance(found, tuple) else (found,))]
        if isinstance(found, (Tensor, tuple))
        and all(isinstance(v, Tensor) for v in (found if isinstance(found, tuple) else ()))
        else []
        for found in (training, file)
    ]
    if not shapes[0] or shapes[0] != shapes[1]:
        raise UsageError(
            f"step {stage}: the network trains with other outputs than its ONNX file has, expected the same. Leave "
            "this step out and build the file with --quantization qat"
        )
