"""From what queries say to boxes in metres (TransFusion; after mmdetection3d's TransFusionBBoxCoder)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekit.errors import BundleError
from edgekit.kernels.boxes3d import nms_circle, nms_rotated
from edgekit.kernels.decode.reference import exp, sigmoid
from edgekit.tasks.detect.spec import Channels
from edgekit.tasks.fusion.boxes import FIELDS, Boxes3D
from edgekit.tasks.fusion.outputs import check_channels
from edgekit.tasks.fusion.spec import FusionSpec, QueryHead


class QueryDecoder:
    """`FusionSpec` with a `QueryHead` at work; keeps nothing between calls.

    outputs: the engine's outputs by name, or arrays like them: what they are is checked here, once.
    Raises: BundleError when a tensor is missing, is not float32 [1, channels, queries], or has too few channels.
    """

    def __init__(self, spec: FusionSpec, outputs: Mapping[str, np.ndarray]) -> None:
        assert isinstance(spec.head, QueryHead), "made by decode.decoder"
        self.spec, self.head = spec, spec.head
        queries = None
        for name, (place, count) in self._places().items():
            what = f"pipeline: {name} of queries"
            (size,) = check_channels(outputs, place, count, what, ("queries",))
            if size != (queries or size):
                raise BundleError(f"{what}: output {place.tensor!r}: expected {queries} queries, got {size}")
            queries = size

    def _places(self) -> dict[str, tuple[Channels, int]]:
        head = self.head
        found = {
            "classes": (head.classes, len(self.spec.labels)), "found": (head.found, 2), "center": (head.center, 2),
            "height": (head.height, 1), "size": (head.size, 3), "rotation": (head.rotation, 2),
        }  # fmt: skip
        return found if head.velocity is None else {**found, "velocity": (head.velocity, 2)}

    def __call__(
        self,
        outputs: Mapping[str, np.ndarray],
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        missing: tuple[str, ...] = (),
        taken_ns: int = 0,
    ) -> Boxes3D:
        """The boxes of one moment; among equal scores the query that comes first does.

        A query with a value that is not finite, or a class that there is not, is dropped.
        """
        spec, head = self.spec, self.head
        threshold = spec.score_threshold if score_threshold is None else score_threshold
        most = spec.max_detections if max_detections is None else max_detections
        said = {
            name: outputs[place.tensor][0, place.start : place.start + count]
            for name, (place, count) in self._places().items()
        }
        boxes = np.full((said["found"].shape[1], len(FIELDS)), np.nan, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            center = said["center"].astype(np.float64)
            boxes[:, 0] = head.low_x + center[0] * head.cell_x
            boxes[:, 1] = head.low_y + center[1] * head.cell_y
            boxes[:, 2] = said["height"][0]
            sizes = said["size"].T.astype(np.float64)
            sizes = exp(sizes) if head.log_sizes else sizes
            boxes[:, 3:6] = sizes if head.sizes == "lwh" else sizes[:, [1, 0, 2]]
            boxes[:, 6] = np.arctan2(
                said["rotation"][0].astype(np.float64), said["rotation"][1].astype(np.float64)
            )
            if "velocity" in said:
                boxes[:, 7:] = said["velocity"].T
            prior, kind = said["found"]
            known = boxes if "velocity" in said else boxes[:, :7]
            keep = np.isfinite(known).all(1) & (boxes[:, 3:6] > 0).all(1) & np.isfinite(prior)
            keep &= (kind >= 0) & (kind < len(spec.labels)) & (kind == np.floor(kind))
        classes = np.where(keep, kind, 0).astype(np.int32)
        own = said["classes"][classes, np.arange(len(classes))]
        keep &= np.isfinite(own)
        scores = (sigmoid(np.where(keep, own, 0.0).astype(np.float64)) * np.where(keep, prior, 0.0)).astype(
            np.float32
        )
        if head.bounds:
            low, high = np.array(head.bounds[:3]), np.array(head.bounds[3:])
            keep &= ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(1)
        chosen = np.flatnonzero(keep & (scores >= threshold))
        chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
        if head.suppress != "none":
            limit = head.limits[0] if len(head.limits) == 1 else head.limits
            run = nms_circle if head.suppress == "circle" else nms_rotated
            chosen = chosen[
                run(np.ascontiguousarray(boxes[chosen, :7]), scores[chosen], classes[chosen], limit, most)
            ]
        chosen = chosen[:most]
        return Boxes3D(boxes[chosen], scores[chosen], classes[chosen], spec.labels, missing, taken_ns)
