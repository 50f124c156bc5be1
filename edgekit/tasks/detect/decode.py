"""Raw outputs of a detector -> boxes in the picture: decode, suppress, map back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekit.errors import UsageError
from edgekit.kernels.decode import Decoder, reference
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.spec import DetectSpec
from edgekit.tasks.preprocess import Placement


class Postprocess:
    """One session's decoder with its buffers; for one thread at a time.

    Raises: UsageError for a head that lacks something.
    """

    def __init__(self, spec: DetectSpec) -> None:
        self.spec = spec
        self._decoder = Decoder(spec.head, spec.preprocess.width, spec.preprocess.height)
        self._placement: Placement | None = None
        self._image_size = (0, 0)
        self._mapping: np.ndarray

    def __call__(
        self,
        outputs: Mapping[str, np.ndarray],
        placement: Placement,
        image_size: tuple[int, int],
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        for_metric: bool = False,
    ) -> Detections:
        """Boxes of a picture of `image_size` (height, width) that lies at `placement` in the input.

        outputs: the engine's raw outputs by name, float32 [1, C, H, W] (family rows: [1, N, D]).
        The thresholds default to the spec's. One box per cell at most, that of its best class, clipped
        to the picture. `for_metric`: one box for every class above the threshold, not clipped, as the
        detectors' own evaluation scripts judge a network (clipping alone would raise AP by up to 0.01).
        Raises: UsageError for outputs that do not fit the head or thresholds out of range.
        """
        score = self.spec.score_threshold if score_threshold is None else score_threshold
        iou = self.spec.iou_threshold if iou_threshold is None else iou_threshold
        limit = self.spec.max_detections if max_detections is None else max_detections
        if not 0 <= score <= 1 or not 0 <= iou <= 1 or limit < 1:
            raise UsageError(
                f"detections: expected thresholds in 0..1 and max_detections at least 1, "
                f"got score {score}, IoU {iou}, max_detections {limit}."
            )
        # a camera's pictures all lie alike: the kernel then returns the very same placement
        if placement is not self._placement or image_size != self._image_size:
            self._placement, self._image_size = placement, image_size
            self._mapping = _mapping(placement, image_size)
        boxes, scores, classes = self._decoder.detect(
            outputs, score, iou, limit, self._mapping, clip=not for_metric, all_classes=for_metric
        )
        return Detections(boxes, scores, classes, self.spec.labels)


def _mapping(placement: Placement, image_size: tuple[int, int]) -> np.ndarray:
    """Offset, scale and limit of x1 y1 x2 y2: float32 [3, 4]."""
    p, (height, width) = placement, image_size
    return np.array(
        ((p.left, p.top) * 2, (p.scale_x, p.scale_y) * 2, (width, height) * 2),
        np.float32,
    )


def to_picture(
    boxes: np.ndarray, placement: Placement, image_size: tuple[int, int], clip: bool = True
) -> np.ndarray:
    """Boxes float32 [n, 4] from network-input pixels to pixels of the picture, in place.

    The inverse of the letterbox: x = (x_in - left) / scale_x, likewise y.
    """
    return reference.to_picture(boxes, _mapping(placement, image_size), clip)
