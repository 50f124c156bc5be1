"""What training any of these networks needs: a schedule, checkpoints, twins for shards of a batch."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the learning rate at `step` of `steps`: linear warm-up, then a cosine down to `floor`
    (Loshchilov & Hutter, "SGDR", 2017, without restarts)."""
    if step < warmup:
        return (step + 1) / warmup
    turn = (step - warmup) / max(steps - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * turn))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    import torch

    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def twin(model: Any) -> Any:
    """A model with the same parameters (shared) and batch norm statistics of its own (thrown away)."""
    other = copy.deepcopy(model)
    for mine, its in zip(model.modules(), other.modules(), strict=True):
        for name in mine._parameters:
            its._parameters[name] = mine._parameters[name]
    return other
