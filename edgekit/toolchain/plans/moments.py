"""What a plan of rigs is calibrated and judged on: moments (tasks.fusion.dataset), each a `rig.RigFrame`.

`source = "synthetic://street-rig?size=256x144"` with seed and count: moment i is of the street `seed + i`, so another street,
hour, weather and mounting each. `data = "folder"`: the frames of nuScenes-style infos or of KITTI, evenly spaced.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from edgekit.dataset import DIGEST_PICTURES, DataSet, check_digest
from edgekit.errors import CalibrationError
from edgekit.project import ModelEntry
from edgekit.rig import RigFrame, mosaic
from edgekit.tasks.fusion.dataset import Moments as Source
from edgekit.tasks.fusion.dataset import content, read_set

CALIBRATION_MOMENTS = 48
"""Taken of a folder when the project says no count."""
KEPT_BYTES = 256 << 20
"""Moments that are read again and again stay in memory up to this size."""
LOSSES = ("", "lidar", "cameras")
"""What a rig may lose as a whole: results are looked at without it, too."""
LOST = ("", "", "lidar", "cameras")
"""What moment i is seen without in calibration, in turn: a network that serves a rig which lost a sensor has to have
seen that in integers, too."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Some moments of a source, in order; an evaluation set (`tasks.EvaluationSet`) where they are `labelled`.

    chosen: their numbers in the source.  digest: equal ones mean equal moments.
    """

    task: ClassVar[str] = "fusion"

    source: Source
    chosen: Sequence[int]
    name: str
    digest: str
    labelled: bool
    _kept: dict[int, RigFrame] = field(default_factory=dict)
    _bytes: list[int] = field(default_factory=lambda: [0])

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[RigFrame]:
        return (self.read(i) for i in range(len(self)))

    @property
    def labels(self) -> tuple[str, ...]:
        return self.source.labels

    @property
    def labelled_in(self) -> tuple[str, ...]:
        """Cameras that labels cover, () = everything around."""
        return self.source.labelled_in

    @property
    def images(self) -> range:
        return range(len(self))

    @property
    def provenance(self) -> dict[str, Any]:
        return {"moments": self.name, "digest": self.digest, "count": len(self)}

    def read(self, index: int) -> RigFrame:
        """Moment `index`. Raises: UsageError for a file that cannot be read, or without labels where they are needed."""
        found = self._kept.get(index)
        if found is None:
            number = self.chosen[index]
            found = self.source.read(number) if self.labelled else self.source.take(number)
            size = sum(shot.image.nbytes for shot in found.shots.values())
            size += 0 if found.points is None else found.points.nbytes
            if self._bytes[0] + size <= KEPT_BYTES:
                self._bytes[0] += size
                self._kept[index] = found
        return found


def without(frame: RigFrame, lost: str) -> RigFrame:
    """The moment with a kind of sensor missing: "lidar", "cameras", or "" for none."""
    if lost == "lidar":
        return dataclasses.replace(frame, points=None, rings=None)
    return dataclasses.replace(frame, shots={}) if lost == "cameras" else frame


def moments(
    data: DataSet, labels: tuple[str, ...] = (), *, labelled: bool = False, limit: int | None = None
) -> Moments:
    """The moments of a data set, at most `limit`. Raises: UsageError for one that is no rig's, CalibrationError when its
    recorded digest does not hold."""
    if data.source:
        found, count = _synthetic(data, data.count or 1, labels), data.count
        if data.sha256:
            first = _synthetic(data, DIGEST_PICTURES, ())
            check_digest(data, [mosaic(first.take(i)) for i in range(DIGEST_PICTURES)])
    else:
        folder = data.data or data.images
        assert folder is not None, "a data set is a source or a folder"
        found = read_set(folder, None, labels=labels)
        count = data.count or (None if labelled else CALIBRATION_MOMENTS)
    chosen = DataSet(count=count).indices(len(found))[:limit]
    if labelled and chosen == tuple(range(len(found))):
        digest = found.digest  # as `edgekit verify` has it
    else:
        state = hashlib.sha256(repr((found.identity, found.labels if labelled else (), chosen)).encode())
        for number in (
            chosen[:1] if found.identity else chosen
        ):  # of a generator, one tells its versions apart
            state.update(content(found.take(number)))
        digest = state.hexdigest()
    return Moments(found, chosen, data.name or found.name, digest, labelled)


def _synthetic(data: DataSet, count: int, labels: tuple[str, ...]) -> Source:
    """`count` moments of the set's seeds, each of a street of its own unless the source says otherwise."""
    uri = f"{data.source}{'&' if '?' in data.source else '?'}frames={count}&seed={data.seed}"
    if "worlds=" not in data.source:
        uri += f"&worlds={count}"
    return read_set(Path(uri), None, labels=labels)


def calibration_moments(entry: ModelEntry) -> Moments:
    """Raises: CalibrationError when the project gives none; UsageError."""
    if entry.calibration is None:
        raise CalibrationError(
            f"model {entry.name}: int8 needs moments of a rig to calibrate on, got none. Give [model.calibration] with source = "
            '"synthetic://street-rig", seed and count, or data = a folder of frames'
        )
    return moments(entry.calibration)


def evaluation_moments(entry: ModelEntry, labels: tuple[str, ...], limit: int | None) -> Moments | None:
    """Labelled moments, None where the project gives none. Raises: UsageError."""
    if entry.evaluation is None:
        return None
    return moments(entry.evaluation, labels, labelled=True, limit=limit)
