"""From the raw maps of a head that predicts centres to boxes in metres."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekit.errors import BundleError
from edgekit.kernels.boxes3d import nms_circle, nms_rotated
from edgekit.kernels.decode.reference import exp
from edgekit.kernels.peaks import Peaks, peaks
from edgekit.tasks.detect.spec import Channels
from edgekit.tasks.fusion.boxes import FIELDS, Boxes3D
from edgekit.tasks.fusion.outputs import check_channels
from edgekit.tasks.fusion.queries import QueryDecoder
from edgekit.tasks.fusion.spec import CenterGroup, CenterHead, FusionSpec, QueryHead

REGRESSION = 8
"""offset 2, height 1, size 3, rotation 2: values of a peak before the velocity."""


def decoder(spec: FusionSpec, outputs: Mapping[str, np.ndarray]) -> CenterDecoder | QueryDecoder:
    """What decodes the outputs of a network with that head. Raises: BundleError when they do not fit it."""
    return (QueryDecoder if isinstance(spec.head, QueryHead) else CenterDecoder)(spec, outputs)


class CenterDecoder:
    """`FusionSpec` with a `CenterHead` at work; keeps nothing between calls.

    outputs: the engine's outputs by name, or arrays like them: what they are is checked here, once.
    Raises: BundleError when a tensor is missing, is not float32 [1, channels, rows, columns], or has too few channels.
    """

    def __init__(self, spec: FusionSpec, outputs: Mapping[str, np.ndarray]) -> None:
        assert isinstance(spec.head, CenterHead), "queries have a decoder of their own"
        self.spec, self.head = spec, spec.head
        for group in self.head.groups:
            cells = None
            for name, place, count in _channels(group):
                what = f"pipeline: {name} of group {group.labels[0]!r}"
                size = check_channels(outputs, place, count, what, ("rows", "columns"))
                if size != (cells or size):
                    raise BundleError(
                        f"{what}: output {place.tensor!r}: expected cells {list(cells or ())}, got {list(size)}"
                    )
                cells = size

    def __call__(
        self,
        outputs: Mapping[str, np.ndarray],
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        missing: tuple[str, ...] = (),
        taken_ns: int = 0,
    ) -> Boxes3D:
        """The boxes of one moment. Among equal scores the group that comes first does, then the order of `peaks`.

        A box with a value that is not finite is dropped. Same outputs, same boxes, whatever kernels run; but yaw is
        numpy's arctan2, which rounds as the platform's libm does.
        """
        spec = self.spec
        threshold = spec.score_threshold if score_threshold is None else score_threshold
        most = spec.max_detections if max_detections is None else max_detections
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        first = 0
        for group in self.head.groups:
            heat, *maps = (_view(outputs, place, count) for _, place, count in _channels(group))
            windows = group.windows or (3,) * len(group.labels)
            best = peaks(heat, maps, threshold=threshold, limit=spec.candidates, window=windows)
            boxes, keep = self._boxes(best)
            boxes, scores, classes = boxes[keep], best.scores[keep], best.cells[keep, 0]
            kept = _suppress(group, boxes, scores, classes, spec.per_group)
            found.append((boxes[kept], scores[kept], classes[kept] + np.int32(first)))
            first += len(group.labels)
        boxes, scores, classes = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(-scores, kind="stable")[:most]
        return Boxes3D(boxes[order], scores[order], classes[order], spec.labels, missing, taken_ns)

    def _boxes(self, best: Peaks) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, 9], and which of them are boxes."""
        head, values = self.head, best.values.astype(np.float64)
        along_y, along_x = (1, 2) if head.rows == "y" else (2, 1)
        boxes = np.full((len(best), len(FIELDS)), np.nan, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            boxes[:, 0] = head.low_x + (best.cells[:, along_x] + values[:, 0]) * head.cell_x
            boxes[:, 1] = head.low_y + (best.cells[:, along_y] + values[:, 1]) * head.cell_y
            boxes[:, 2] = values[:, 2]
            sizes = exp(values[:, 3:6]) if head.log_sizes else values[:, 3:6]
            boxes[:, 3:6] = sizes if head.sizes == "lwh" else sizes[:, [1, 0, 2]]
            boxes[:, 6] = np.arctan2(values[:, 6], values[:, 7])
            boxes[:, 7 : 7 + values.shape[1] - REGRESSION] = values[:, REGRESSION:]
        known = boxes[:, : 7 + values.shape[1] - REGRESSION]
        keep: np.ndarray = np.all(np.isfinite(known), axis=1) & np.all(boxes[:, 3:6] > 0, axis=1)
        if head.bounds:
            low, high = np.array(head.bounds[:3]), np.array(head.bounds[3:])
            keep = keep & np.all((boxes[:, :3] >= low) & (boxes[:, :3] <= high), axis=1)
        return boxes, keep


def _channels(group: CenterGroup) -> list[tuple[str, Channels, int]]:
    """(name, where, how many channels), heat first, then in the order of a peak's values."""
    parts = [
        ("heat", group.heat, len(group.labels)),
        ("offset", group.offset, 2),
        ("height", group.height, 1),
        ("size", group.size, 3),
        ("rotation", group.rotation, 2),
    ]
    return parts if group.velocity is None else [*parts, ("velocity", group.velocity, 2)]


def _view(outputs: Mapping[str, np.ndarray], place: Channels, count: int) -> np.ndarray:
    result: np.ndarray = outputs[place.tensor][0, place.start : place.start + count]
    return result


def _suppress(
    group: CenterGroup, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, most: int
) -> np.ndarray:
    """Indices of the boxes that stay, best first."""
    if group.suppress == "none":
        return np.arange(min(len(boxes), most))
    if group.across:
        classes = np.zeros_like(classes)
    limit = group.limits[0] if len(group.limits) == 1 else group.limits
    run = nms_circle if group.suppress == "circle" else nms_rotated
    return run(np.ascontiguousarray(boxes[:, :7]), scores, np.ascontiguousarray(classes), limit, most)
