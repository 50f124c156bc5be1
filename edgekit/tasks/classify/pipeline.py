"""Picture in, classes out: the task's preprocessing and scoring around a session."""

from __future__ import annotations

import time

import numpy as np

from edgekit.manifest import Manifest
from edgekit.pixels import Pixels, as_pixels
from edgekit.tasks import Runnable, spec_in
from edgekit.tasks.classes import best, check_output, softmax
from edgekit.tasks.classify.classification import Classification
from edgekit.tasks.classify.spec import ClassifySpec
from edgekit.tasks.picture_input import PictureInput, only_input


def read_spec(manifest: Manifest) -> ClassifySpec:
    """The classifier's spec in a manifest. Raises: BundleError when it is not one."""
    return spec_in(manifest, ClassifySpec)


class ClassifyPipeline:
    """One thread's classifier. Calling it with a picture gives a Classification.

    Raises: BundleError when `spec` does not fit the session's tensors.
    stage_ns: (preprocess, engine, decode) of the last call, nanoseconds of wall time.
    """

    def __init__(self, spec: ClassifySpec, session: Runnable) -> None:
        array, quant = only_input(session, "a classifier has one input")
        check_output(session, spec.output, len(spec.labels))
        self._input = PictureInput(spec.preprocess, array, quant)
        self.spec = spec
        self.session = session
        self.stage_ns = (0, 0, 0)

    def __call__(
        self,
        image: np.ndarray | Pixels,
        *,
        score_threshold: float | None = None,
        top_k: int | None = None,
        taken_ns: int | None = None,
        epoch: int = 0,
    ) -> Classification:
        """Classify a picture, uint8 [H, W, 3] in BGR order or Pixels of any format.

        score_threshold, top_k: which classes are listed; by default the bundle's. taken_ns, epoch: not used.
        Raises: UsageError for anything that is no such picture, StreamError when the engine fails.
        """
        pixels = as_pixels(image)
        start = time.perf_counter_ns()
        self._input.place(pixels)
        placed = time.perf_counter_ns()
        self.session.run()
        ran = time.perf_counter_ns()
        result = self._score(score_threshold, top_k)
        self.stage_ns = (placed - start, ran - placed, time.perf_counter_ns() - ran)
        return result

    def _score(self, score_threshold: float | None, top_k: int | None) -> Classification:
        spec = self.spec
        values = self.session.outputs[spec.output].reshape(-1).astype(np.float32)
        scores = softmax(values) if spec.activation == "softmax" else values
        least = spec.score_threshold if score_threshold is None else score_threshold
        classes = best(scores, spec.top_k if top_k is None else top_k, least)
        return Classification(classes, scores[classes], scores, spec.labels)
