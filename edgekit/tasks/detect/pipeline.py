"""Picture in, boxes out: the task's preprocessing and decoding around a session."""

from __future__ import annotations

import time

import numpy as np

from edgekit.errors import UsageError
from edgekit.manifest import Manifest
from edgekit.pixels import Pixels, as_pixels
from edgekit.tasks import Runnable, spec_in
from edgekit.tasks.detect.decode import Postprocess
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.spec import DetectSpec
from edgekit.tasks.picture_input import PictureInput, only_input, unfit
from edgekit.tasks.preprocess import place


def read_spec(manifest: Manifest) -> DetectSpec:
    """The detector's spec in a manifest. Raises: BundleError when it is not one."""
    return spec_in(manifest, DetectSpec)


class DetectPipeline:
    """One thread's detector. Calling it with a picture gives Detections; nothing else is kept per call.

    Raises: BundleError when `spec` does not fit the session's tensors.
    stage_ns: (preprocess, engine, decode) of the last call, nanoseconds of wall time.
    """

    def __init__(self, spec: DetectSpec, session: Runnable) -> None:
        self.spec = spec
        self.session = session
        self._input = PictureInput(spec.preprocess, *only_input(session, "a detector has one input"))
        try:
            self._postprocess = Postprocess(spec)
            # one pixel through this end too: what does not fit is found now, and buffers get their size
            self._postprocess(session.outputs, place(spec.preprocess, 1, 1), (1, 1))
        except UsageError as error:
            raise unfit(error) from None
        self.stage_ns = (0, 0, 0)

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
        placement = self._input.place(pixels)
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
