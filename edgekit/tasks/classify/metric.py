"""Top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from edgekit.tasks.classify.dataset import ClassSet
from edgekit.tasks.classify.pipeline import ClassifyPipeline

ROUNDS = 1000
CONFUSIONS = 20

Answer = tuple[int, int]
"""(best class, rank of the true class: 0 = best)"""


def evaluate(
    pipeline: ClassifyPipeline, data: ClassSet, *, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Any], list[Answer]]:
    """Accuracy of `pipeline` on `data`, and the answer per picture.

    Returns: top1 and top5 (None with fewer than 6 classes), 0..1; per_class (label -> share of its
    pictures that are answered right); confusions (the most frequent wrong answers).
    """
    answers: list[Answer] = []
    for i, item in enumerate(data.images):
        answers.append(judge(pipeline(data.read(i)).all_scores, item.cls))
        if progress is not None:
            progress(i + 1, len(data.images))
    return accuracy(data, answers), answers


def judge(scores: np.ndarray, cls: int) -> Answer:
    """The answer that scores [C] are, where `cls` is true. Of equal scores the lower number counts as better, as in
    the results."""
    own = scores[cls]
    return int(np.argmax(scores)), int((scores > own).sum() + (scores[:cls] == own).sum())


class _Item(Protocol):
    @property
    def cls(self) -> int: ...


class Labelled(Protocol):
    """A set whose items (pictures, clips) have one class each."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def images(self) -> Sequence[_Item]: ...


def accuracy(data: Labelled, answers: Sequence[Answer]) -> dict[str, Any]:
    """The metric of answers, one per picture of `data`."""
    truth = np.array([item.cls for item in data.images])
    best, rank = np.array(answers).T
    right = rank == 0
    wrong: dict[tuple[int, int], int] = {}
    for t, b in zip(truth[~right].tolist(), best[~right].tolist(), strict=True):
        wrong[t, b] = wrong.get((t, b), 0) + 1
    ranked = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
    return {
        "top1": round(float(right.mean()), 6),
        "top5": round(float((rank < 5).mean()), 6) if len(data.labels) > 5 else None,
        "per_class": {data.labels[c]: round(float(right[truth == c].mean()), 4) for c in np.unique(truth)},
        "confusions": [
            {"truth": data.labels[t], "answer": data.labels[b], "pictures": n} for (t, b), n in ranked
        ],
    }


def bootstrap(
    data: Labelled,
    results: Sequence[Answer],
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float | None]:
    """top1 of `rounds` samples of the pictures with repetition (Efron 1979), paired as detect's."""
    right = np.array([rank == 0 for _, rank in results], np.float64)
    rng = np.random.default_rng(seed)
    values: list[float | None] = []
    for number in range(rounds):
        if progress is not None and number % 100 == 0:
            progress(number, rounds)
        values.append(round(float(right[rng.integers(0, len(right), len(right))].mean()), 6))
    return values
