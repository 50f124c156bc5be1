"""Picture in, boxes out: the task's preprocessing and decoding around a session."""

from __future__ import annotations

import time

import numpy as np

from edgekit.errors import BundleError, UsageError
from edgekit.kernels.letterbox import LetterboxPlan, letterbox, plan
from edgekit.manifest import Manifest
from edgekit.pixels import PixelLayout, Pixels, as_pixels
from edgekit.schema import SchemaError, from_json
from edgekit.tasks import Runnable
from edgekit.tasks.detect.decode import Postprocess
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.spec import DetectSpec


def read_spec(manifest: Manifest) -> DetectSpec:
    """The detector's spec in a manifest. Raises: BundleError when it is not one."""
    try:
        return from_json(DetectSpec, manifest.pipeline, "manifest pipeline")
    except SchemaError as error:
        raise BundleError(f"bundle: {error}") from None


class DetectPipeline:
    """One thread's detector. Calling it with a picture gives Detections; nothing else is kept per call.

    Raises: BundleError when `spec` does not fit the session's tensors.
    stage_ns: (preprocess, engine, decode) of the last call, nanoseconds of wall time.
    """

    def __init__(self, spec: DetectSpec, session: Runnable) -> None:
        if len(session.inputs) != 1:
            raise BundleError(f"bundle: a detector has one input, got {len(session.inputs)}")
        self.spec = spec
        self.session = session
        (self._input,) = session.inputs.values()
        try:
            self._postprocess = Postprocess(spec)
            # one pixel through both ends: what does not fit is found now, and buffers get their size
            placement = letterbox(np.zeros((1, 1, 3), np.uint8), spec.preprocess, self._input)
            self._postprocess(session.outputs, placement, (1, 1))
        except UsageError as error:
            raise BundleError(f"bundle: its pipeline does not fit its network: {error}") from None
        self.stage_ns = (0, 0, 0)
        self._layout: PixelLayout | None = None
        self._plan: LetterboxPlan

    def __call__(
        self,
        image: np.ndarray | Pixels,
        *,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        for_metric: bool = False,
        taken_ns: int | None = None,
        epoch: int = 0,
    ) -> Detections:
        """Detect on a picture, uint8 [H, W, 3] in BGR order or Pixels of any format; boxes in its pixels.

        Thresholds default to the bundle's. for_metric: see Postprocess. taken_ns, epoch: not used.

        Raises: UsageError for anything that is no such picture, StreamError when the engine fails.
        """
        pixels = as_pixels(image)
        start = time.perf_counter_ns()
        # the input is this pipeline's own: the padding of a picture of the same size is still there
        padded = pixels.layout == self._layout
        if not padded:
            self._layout, self._plan = None, plan(self.spec.preprocess, pixels.layout)
        placement = self._plan.run(pixels, self._input, padded)
        self._layout = pixels.layout  # not after an error: its padding may not be there
        placed = time.perf_counter_ns()
        self.session.run()
        ran = time.perf_counter_ns()
        detections = self._postprocess(
            self.session.outputs,
            placement,
            (pixels.layout.height, pixels.layout.width),
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            for_metric=for_metric,
        )
        self.stage_ns = (placed - start, ran - placed, time.perf_counter_ns() - ran)
        return detections
