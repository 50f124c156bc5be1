"""The pictures a build is proven on: labelled ones where given, else real-looking unlabelled ones."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import tasks as device_tasks
from edgekit.dataset import DIGEST_PICTURES, DataSet, check_digest
from edgekit.errors import OutputError, UsageError
from edgekit.project import ModelEntry
from edgekit.runtime.sources import open_source
from edgekit.synth import coco as synth_coco
from edgekit.synth.street import StreetWorld
from edgekit.tasks import EvaluationSet, Spec
from edgekit.toolchain import cache, tasks

Progress = Callable[[str, int, int], None]

DEFAULT_SOURCE = "synthetic://street?seed=20000&frames=16&size=640x360"
"""Used only for error figures and samples when no data is given; never for an accuracy claim."""


FRAME = 45
"""Frame of each street in a labelled synthetic set: the drive is under way."""


@dataclass(frozen=True)
class Pictures:
    """labelled: set for the task metric, or None with the reason in `why_unlabelled`."""

    labelled: EvaluationSet | None
    what: str
    source: str
    """Path or URI of the unlabelled ones."""
    why_unlabelled: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def unlabelled(self, count: int) -> list[np.ndarray]:
        """The first `count` pictures, uint8 [H, W, 3] BGR; at least one."""
        if self.labelled is not None:
            return [self.labelled.read(i) for i in range(min(count, len(self.labelled.images)))]
        with open_source(self.source, limit=count) as source:
            found = [np.array(frame.image) for frame in source]
        if not found:
            raise UsageError(f"pictures {self.source}: there are none. Give a folder with pictures")
        return found


def pictures(entry: ModelEntry, spec: Spec, limit: int | None, progress: Progress) -> Pictures:
    """Resolve the entry's evaluation set. Raises: UsageError when it cannot be used with the model."""
    if entry.evaluation is None:
        why = tasks.half(spec.task).NO_LABELS
        given = entry.calibration
        if given is None:
            return Pictures(None, f"{DEFAULT_SOURCE} (no pictures were given)", DEFAULT_SOURCE, why)
        if given.images is not None:
            return Pictures(None, given.images.name, str(given.images), why)
        source = f"{given.source}{'&' if '?' in given.source else '?'}seed={given.seed}"
        return Pictures(None, given.name or source, source, why)
    labelled = labelled_set(entry.evaluation, spec, limit, progress)
    provenance = {"evaluation": labelled.name, "digest": labelled.digest, "pictures": len(labelled.images)}
    return Pictures(labelled, labelled.name, "", provenance=provenance)


def labelled_set(data: DataSet, spec: Spec, limit: int | None, progress: Progress) -> EvaluationSet:
    """Annotated pictures of a data set; synthetic ones are rendered once into the cache."""
    counts = [n for n in (data.count, limit) if n is not None]
    count = min(counts) if counts else None
    task = device_tasks.of(spec)
    if data.source:
        if spec.task != "detect":
            raise UsageError(
                f"source {data.source}: its pictures have boxes, which the task {spec.task} cannot be judged by"
            )
        instances, images = render(dataclasses.replace(data, count=count), progress)
        return task.read_set(instances, images, limit=count, labels=spec.labels)
    assert data.data is not None, "checked by the project reader"
    return task.read_set(data.data, data.images, limit=count, labels=spec.labels)


def render(data: DataSet, progress: Progress) -> tuple[Path, Path]:
    """Pictures and annotations of a synthetic set, drawn once into the cache: (instances.json, folder).

    Picture i is frame FRAME of the street `data.seed + i`: a new street, weather and light each.
    Raises: UsageError for a source that is not a street, CalibrationError when the set's recorded
    digest does not hold, OutputError when neither the cache nor the folder for temporary files can be written.
    """
    with open_source(data.source) as source:  # checks the query
        size = source.size
    assert size is not None, "a synthetic street has one size"
    if data.sha256:
        first = range(data.seed, data.seed + DIGEST_PICTURES)
        check_digest(data, [StreetWorld(seed, *size).frame(FRAME).image for seed in first])
    key = cache.digest(data.source, data.seed, data.count, FRAME, cache.sources("synth"))
    folder = cache.cache_dir() / "street" / key
    if (folder / "instances.json").is_file():
        return folder / "instances.json", folder

    def seeds() -> Iterator[int]:
        for i, seed in enumerate(data.seeds):
            progress("draw labelled streets", i, len(data.seeds))
            yield seed

    try:
        return synth_coco.export_coco(folder, seeds(), [FRAME], *size), folder
    except OutputError:  # a cache that cannot be written: draw for this process only
        folder = Path(tempfile.mkdtemp(prefix="edgekit-street-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return synth_coco.export_coco(folder, seeds(), [FRAME], *size), folder
