"""Quantization-aware training inside a build: its data, its cache, and the record of it. torch only where it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgekit.errors import MissingExtraError
from edgekit.quant.annotate import quant
from edgekit.quant.rules import Rules
from edgekit.schema import to_json
from edgekit.toolchain import cache

if TYPE_CHECKING:
    from edgekit.quant.search import Quantized
    from edgekit.toolchain.quantize import Calibrated

Progress = Callable[[str, int, int], None]


@dataclass
class Trainer:
    """Goes on from what a search found: called with it, gives the annotated graph that was learned.

    The pictures are those of the calibration, without labels: the float network is what it learns to imitate. A training is
    kept in the cache by its content, finished or not. record: what was learned on, for the evidence.
    """

    known: Calibrated
    rules: Rules
    steps: int
    progress: Progress
    record: dict[str, Any] = field(default_factory=dict)

    def __call__(self, found: Quantized) -> ir.Model:
        from edgekit.compression.learn_steps import Lesson, learn

        lesson = Lesson(self.steps)
        folder = _folder(found, self.rules, self.known.feeds.digest, to_json(lesson))
        self.record = {
            "imitates": "the float network",
            "data": dict(self.known.feeds.provenance),
            **dataclasses.asdict(lesson),
        }
        return learn(
            found.model,
            found.exact,
            self.rules,
            self.known.feeds,
            lesson,
            folder=folder,
            progress=self.progress,
        )


def trainer(known: Calibrated, rules: Rules, steps: int, progress: Progress) -> Trainer:
    """Raises: MissingExtraError without torch, now rather than after the search."""
    if find_spec("torch") is None:
        raise MissingExtraError("torch", "torch", "train a quantized network")
    return Trainer(known, rules, steps, progress)


def _folder(found: Quantized, rules: Rules, data: str, lesson: Any) -> Path | None:
    """Where a training of exactly this is kept; None where the cache cannot be written."""
    from importlib.metadata import version

    marks = {
        str(v.name): to_json(params)
        for m in (found.model,)
        for v in (*m.graph.inputs, *m.graph.initializers.values(), *(o for n in m.graph for o in n.outputs))
        if (params := quant(v)) is not None
    }
    models = [ir.to_proto(m).SerializeToString(deterministic=True) for m in (found.model, found.exact)]
    code = cache.sources("compression", "models/training.py", "passes", "quant")
    key = cache.digest(*models, marks, repr(rules), data, lesson, code, version("torch"), version("numpy"))
    folder = cache.cache_dir() / "qat" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder
