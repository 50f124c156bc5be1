"""The pictures a build is proven on: labelled ones where given, else real-looking unlabelled ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.errors import UsageError
from edgekit.project import DataSet, ModelEntry
from edgekit.runtime.sources import open_source
from edgekit.tasks.detect.dataset import CocoSet, read_coco
from edgekit.tasks.detect.spec import DetectSpec
from edgekit.toolchain import cache

Progress = Callable[[str, int, int], None]

DEFAULT_SOURCE = "synthetic://street?seed=20000&frames=16&size=640x360"
"""Used only for error figures and samples when no data is given; never for an accuracy claim."""


@dataclass(frozen=True)
class Pictures:
    """labelled: set for the task metric, or None with the reason in `why_unlabelled`."""

    labelled: CocoSet | None
    what: str
    source: str
    why_unlabelled: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def unlabelled(self, count: int) -> list[np.ndarray]:
        """The first `count` pictures, uint8 [H, W, 3] BGR."""
        if self.labelled is not None:
            import cv2

            found = [cv2.imread(str(item.path), cv2.IMREAD_COLOR) for item in self.labelled.images[:count]]
            return [image for image in found if image is not None]
        with open_source(self.source, limit=count) as source:
            return [np.array(frame.image) for frame in source]


def pictures(entry: ModelEntry, spec: DetectSpec, progress: Progress) -> Pictures:
    """Resolve the entry's evaluation set. Raises: UsageError when it cannot be used with the model."""
    data = entry.evaluation
    if data is None:
        return Pictures(
            None,
            f"{DEFAULT_SOURCE} (no pictures were given)",
            DEFAULT_SOURCE,
            "no labelled pictures were given (--data instances.json --images DIR)",
        )
    labelled = resolve(data, spec, progress)
    return Pictures(
        labelled, labelled.name, "", provenance={"evaluation": labelled.name, "digest": labelled.digest}
    )


def resolve(data: DataSet, spec: DetectSpec, progress: Progress) -> CocoSet:
    """Annotated pictures of a data set; synthetic ones are rendered once into the cache."""
    if data.instances is not None:
        assert data.images is not None, "checked by the project reader"
        return read_coco(data.instances, data.images, limit=data.count, labels=spec.labels)
    if data.source is None or not data.source.startswith("synthetic://"):
        raise UsageError(f"evaluation {data}: expected instances and images, or a synthetic:// source")
    return render(data.source, spec, progress)


def render(uri: str, spec: DetectSpec, progress: Progress) -> CocoSet:
    raise UsageError(f"evaluation {uri}: rendering is not wired yet")
