"""From a row of outputs per step to one answer: see spec.Smoothing for the options."""

from __future__ import annotations

from collections import deque

import numpy as np

from edgekit.tasks.classes import softmax
from edgekit.tasks.video.spec import VideoSpec


class Smoother:
    """The windows and votes of one stream. `scores` after every step, then `answer`; `reset` where time breaks."""

    def __init__(self, spec: VideoSpec) -> None:
        number = {label: i for i, label in enumerate(spec.labels)}
        smoothing = spec.smoothing
        self._softmax = spec.activation == "softmax"
        self._votes = smoothing.votes
        self._outputs: deque[np.ndarray] = deque(maxlen=smoothing.window)
        self._masked = frozenset(number[label] for label in smoothing.masked)
        self._counts_as = np.arange(len(spec.labels), dtype=np.int32)
        for label, into in smoothing.merged.items():
            self._counts_as[number[label]] = number[into]
        self._merges = bool(smoothing.merged)
        self._first = number[spec.background] if spec.background else None
        self._before: tuple[int | None, int | None] = (self._first, self._first)

    def reset(self) -> None:
        """Nothing was seen before the next step: the answer before it was `background`, where there is one."""
        self._outputs.clear()
        self._before = (self._first, self._first)

    def activate(self, output: np.ndarray) -> np.ndarray:
        """Scores [C] of an output [C]."""
        return softmax(output) if self._softmax else output

    def scores(self, output: np.ndarray) -> np.ndarray:
        """Take a step's output, float32 [C], into the window. Returns: the window's scores, float32 [C]."""
        self._outputs.append(output)
        if len(self._outputs) == 1:
            return self.activate(output)
        # summed anew each time, in float64: a running sum would drift away from what the window holds
        mean = np.asarray(np.mean(np.stack(self._outputs), axis=0, dtype=np.float64), np.float32)
        return self.activate(mean)

    def grouped(self, scores: np.ndarray) -> np.ndarray:
        """Scores [C] where what is merged into a label is added to its own, and has none itself."""
        if not self._merges:
            return scores
        return np.bincount(self._counts_as, scores, len(scores)).astype(np.float32)

    def answer(self, scores: np.ndarray) -> int:
        """The class that the step says, after masks, merging and votes; of equal scores the lower number."""
        older, last = self._before
        best = int(np.argmax(scores))
        if best in self._masked:
            best = self._best_allowed(scores) if last is None else last
        best = int(self._counts_as[best])
        if self._votes and last is not None and best != last and older != last:
            best = last
        self._before = (last, best)
        return best

    def _best_allowed(self, scores: np.ndarray) -> int:
        """Where no answer was before a masked one."""
        order = np.argsort(-scores, kind="stable")
        return next((int(c) for c in order if int(c) not in self._masked), int(order[0]))
