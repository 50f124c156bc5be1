"""What a plan of rigs is calibrated and judged on: moments, each a `rig.RigFrame`.

`source = "synthetic://street-rig?size=256x144"` with seed and count: moment i is frame FRAME of the street `seed + i`, so
another street, hour, weather and mounting each. `data = "folder"`: the frames of the info file in it (nuScenes-style,
`rig_files.read_nuscenes`), evenly spaced.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgekit.dataset import DataSet
from edgekit.errors import CalibrationError, UsageError, printable
from edgekit.project import ModelEntry
from edgekit.rig import RigFrame, Truth
from edgekit.rig_files import read_nuscenes
from edgekit.schema import to_json

FRAME = 45
"""Frame of each street: the drive is under way."""
CALIBRATION_MOMENTS = 48
"""Taken of a folder when the project says no count."""
KEPT_BYTES = 256 << 20
"""Moments that are read again and again stay in memory up to this size."""
LOST = ("", "", "lidar", "cameras")
"""What moment i is seen without in calibration, in turn: a network that serves a rig which lost a sensor has to have
seen that in integers, too."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments in order. `what`, `digest`: for the evidence, and for caches; equal digests mean equal moments.

    As an evaluation set (`tasks.EvaluationSet`) the classes of its truth count in `labels`.
    """

    task: ClassVar[str] = "fusion"

    name: str
    digest: str
    count: int
    take: Callable[[int], RigFrame]
    labels: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    _kept: dict[int, RigFrame] = field(default_factory=dict)
    _bytes: list[int] = field(default_factory=lambda: [0])

    def __len__(self) -> int:
        return self.count

    @property
    def images(self) -> range:
        return range(self.count)

    def read(self, index: int) -> RigFrame:
        """Moment `index`. Raises: UsageError for a file that cannot be read."""
        found = self._kept.get(index)
        if found is None:
            found = self.take(index)
            if self.labels and found.truth is not None:
                found = dataclasses.replace(found, truth=numbered(found.truth, self.labels))
            size = sum(shot.image.nbytes for shot in found.shots.values())
            size += 0 if found.points is None else found.points.nbytes
            if self._bytes[0] + size <= KEPT_BYTES:
                self._bytes[0] += size
                self._kept[index] = found
        return found

    def __iter__(self) -> Iterator[RigFrame]:
        return (self.read(i) for i in range(self.count))

    def spread(self, count: int, skip: frozenset[int] = frozenset()) -> list[int]:
        """At most `count` of them, evenly spaced over those not in `skip`."""
        known = [i for i in range(self.count) if i not in skip]
        return [known[i] for i in DataSet(count=count).indices(len(known))]


def numbered(truth: Truth, labels: tuple[str, ...]) -> Truth:
    """`truth` with its classes counted in `labels`; those of other names are left out."""
    if truth.names == labels:
        return truth
    places = {name: i for i, name in enumerate(labels)}
    number = np.array([places.get(name, -1) for name in truth.names] or [-1], np.int32)
    classes = number[truth.classes] if len(truth) else truth.classes
    kept = truth[classes >= 0]
    return dataclasses.replace(kept, classes=classes[classes >= 0], names=labels)


def without(frame: RigFrame, lost: str) -> RigFrame:
    """The moment with a kind of sensor missing: "lidar", "cameras", or "" for none."""
    if lost == "lidar":
        return dataclasses.replace(frame, points=None, rings=None)
    return dataclasses.replace(frame, shots={}) if lost == "cameras" else frame


def moments(data: DataSet, labels: tuple[str, ...] = (), limit: int | None = None) -> Moments:
    """The moments of a data set. Raises: UsageError for one that is no rig's."""
    if data.source:
        return _synthetic(data, labels, limit)
    if data.data is None:
        raise UsageError("moments of a rig: expected source = \"synthetic://street-rig\" with seed and count, or data = a folder")
    return _folder(data, data.data, labels, limit)


def _synthetic(data: DataSet, labels: tuple[str, ...], limit: int | None) -> Moments:
    from edgekit.synth.street_rig import HEIGHT, WIDTH, RigWorld

    world, _, query = data.source.partition("?")
    if world != "synthetic://street-rig":
        raise UsageError(f"source {printable(data.source)}: no rig sees it, expected synthetic://street-rig")
    width, height = WIDTH, HEIGHT
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        sizes = value.split("x")
        if key != "size" or len(sizes) != 2 or not all(s.isascii() and s.isdecimal() and len(s) < 6 for s in sizes):
            raise UsageError(f"source {printable(data.source)}: {printable(part)}: expected size=WIDTHxHEIGHT and nothing else")
        width, height = int(sizes[0]), int(sizes[1])
    assert data.count is not None, "checked where the set was read"
    count = data.count if limit is None else min(data.count, limit)

    @functools.lru_cache(1)
    def first() -> bytes:
        return content(RigWorld(data.seed, width=width, height=height).frame(FRAME))

    def take(index: int) -> RigFrame:
        return RigWorld(data.seed + index, width=width, height=height).frame(FRAME)

    # the generator's code decides the rest: the first moment tells one version of it from the next
    digest = hashlib.sha256(repr((data.source, width, height, data.seed, count, FRAME)).encode() + first()).hexdigest()
    name = data.name or f"{world}?size={width}x{height}&seed={data.seed}"
    return Moments(name, digest, count, take, labels, {"moments": name, "digest": digest, "count": count})


def _folder(data: DataSet, path: Path, labels: tuple[str, ...], limit: int | None) -> Moments:
    info = _info_file(path)
    where = f"moments {printable(info.name)}"
    try:
        tree = json.loads(info.read_bytes())
        total = len(tree["data_list"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{where}: not an info file with data_list: {type(error).__name__}") from None
    chosen = dataclasses.replace(data, count=data.count or CALIBRATION_MOMENTS).indices(total)[:limit]
    if not chosen:
        raise UsageError(f"{where}: holds no frame")
    state = hashlib.sha256()
    for index in chosen:
        state.update(content(read_nuscenes(info, index)))
    digest = state.hexdigest()
    return Moments(
        data.name or path.name, digest, len(chosen), lambda i: read_nuscenes(info, chosen[i]), labels,
        {"moments": data.name or path.name, "digest": digest, "count": len(chosen)},
    )  # fmt: skip


def _info_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.json"))
    if len(found) != 1:
        raise UsageError(f"moments {printable(str(path))}: expected one info file (.json) in the folder, got {len(found)}")
    return found[0]


def content(frame: RigFrame) -> bytes:
    """SHA-256 of what a moment shows and how its rig is mounted; labels do not count."""
    state = hashlib.sha256(frame.rig.digest().encode())
    if frame.points is not None:
        state.update(np.ascontiguousarray(frame.points).tobytes())
    for name, shot in frame.shots.items():
        state.update(f"{name} {shot.taken_ns - frame.taken_ns} {shot.image.shape}".encode())
        state.update(np.ascontiguousarray(shot.image).tobytes())
        state.update(np.ascontiguousarray(shot.motion).tobytes())
    return state.digest()


# --- what a project says ------------------------------------------------------------------------------


def calibration_moments(entry: ModelEntry) -> Moments:
    """Raises: CalibrationError when the project gives none, or such as it is judged on; UsageError."""
    if entry.calibration is None:
        raise CalibrationError(
            f"model {entry.name}: int8 needs moments of a rig to calibrate on, got none. Give [model.calibration] with source = "
            '"synthetic://street-rig", seed and count, or data = a folder of frames'
        )
    return moments(entry.calibration)


def evaluation_moments(entry: ModelEntry, labels: tuple[str, ...], limit: int | None) -> Moments | None:
    """Labelled moments, None where the project gives none. Raises: UsageError."""
    return None if entry.evaluation is None else moments(entry.evaluation, labels, limit)


def facts(found: Moments) -> dict[str, Any]:
    shown: dict[str, Any] = to_json(found.provenance)
    return shown
