"""How far two networks agree that find things: which of one the other found again, and at what score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

AGREEMENT_PAIRS = 400


class Found(Protocol):
    """What a network found, best first."""

    @property
    def scores(self) -> np.ndarray: ...
    @property
    def classes(self) -> np.ndarray: ...
    def __len__(self) -> int: ...


F = TypeVar("F", bound="Found")


def found_again(
    pairs: Sequence[tuple[F, F]], closeness: Callable[[F, F], np.ndarray], least: float
) -> tuple[dict[str, Any], list[float]]:
    """The keys of `tasks.Task.agreement` with the unit `boxes`, and how close the matches are.

    pairs: (of the float network, of the payload). closeness: of every two, [n, m]; from `least` on they may be the same
    thing, if the classes are. Each takes the closest one that is free.
    """
    scores: list[list[float]] = []
    close: list[float] = []
    wanted = 0
    lost = 0.0
    for reference, candidate in pairs:
        wanted += len(reference)
        free = np.ones(len(candidate), bool)
        near = closeness(reference, candidate)
        for i in range(len(reference)):
            ok = free & (candidate.classes == reference.classes[i]) & (near[i] >= least)
            if ok.any():
                j = int(np.argmax(np.where(ok, near[i], -np.inf)))
                free[j] = False
                scores.append([float(reference.scores[i]), float(candidate.scores[j])])
                close.append(float(near[i, j]))
            else:
                lost = max(lost, float(reference.scores[i]))
    shift = np.array([got - ref for ref, got in scores])
    return {
        "images": len(pairs),
        "unit": "boxes",
        "boxes_reference": wanted,
        "boxes_matched": len(scores),
        "boxes_payload": sum(len(candidate) for _, candidate in pairs),
        "score_shift_mean": float(shift.mean()) if scores else None,
        "score_shift_max": float(np.abs(shift).max()) if scores else None,
        "lost_score_max": lost if len(scores) < wanted else None,
        "pairs": [[round(a, 4), round(b, 4)] for a, b in scores[:AGREEMENT_PAIRS]],
    }, close
