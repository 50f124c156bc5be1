"""Labelled moments of a rig: synthetic ones, nuScenes-style info files, KITTI folders.

    synthetic://street-rig?frames=200&seed=10000&worlds=25&gap=25&size=256x144      the defaults
    infos.json                      as mmdetection3d writes them, or a folder with one; pictures and points beside it
    training/                       KITTI's object benchmark: velodyne/, calib/, label_2/, image_2/

Synthetic moments are of `worlds` streets, seeds `seed`, `seed` + 1, ..; each another rig, hour and weather. They are
`gap` tenths of a second apart and come from the streets in turn.

KITTI's labels cover what its camera sees: boxes found elsewhere do not count (`Moments.labelled_in`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgekit.errors import UsageError, printable
from edgekit.rig import RigFrame, Truth
from edgekit.rig_files import KITTI_CLASSES, read_kitti, read_kitti_info, read_nuscenes
from edgekit.tasks.world_query import picture_size, read_query, whole

MAX_MOMENTS = 1_000_000
_MAX_INFO_BYTES = 1 << 28
_URI = re.compile(r"synthetic:/{1,2}(?P<world>[^?]*)(\?(?P<query>.*))?")
"""A path has one of the slashes only."""
_DEFAULTS = {"frames": "200", "seed": "10000", "worlds": "25", "gap": "25", "size": "256x144"}


@dataclass(frozen=True, eq=False)
class Moments:
    """Labelled moments, classes as the model numbers them; `images` are their numbers.

    take: moment i as its source has it.  identity: what it is, in words that change when it does, where that is known
    without reading it all.  labelled_in: the cameras that labels cover, () = everything around.
    """

    task: ClassVar[str] = "fusion"

    name: str
    labels: tuple[str, ...]
    count: int
    take: Callable[[int], RigFrame] = field(repr=False)
    identity: str = ""
    labelled_in: tuple[str, ...] = ()

    @property
    def images(self) -> range:
        return range(self.count)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> RigFrame:
        """Moment `index`, as a pipeline takes it. Raises: UsageError for files that cannot be read."""
        frame = self.take(index)
        if frame.truth is None:
            raise UsageError(f"moments {self.name}: moment {index} has no labels. Leave it out")
        return replace(frame, truth=numbered(frame.truth, self.labels))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all moments and labels. Of a synthetic set, of its settings and first moment. Raises: as `read`."""
        state = hashlib.sha256(repr((self.identity, self.labels, self.count, self.labelled_in)).encode())
        for index in range(1 if self.identity else self.count):
            state.update(content(self.read(index)))
        return state.hexdigest()


def content(frame: RigFrame) -> bytes:
    """SHA-256 of what a moment shows, how its rig is mounted, and of its labels."""
    state = hashlib.sha256(frame.rig.digest().encode())
    for array in (frame.points, *(a for shot in frame.shots.values() for a in (shot.image, shot.motion))):
        state.update(
            b"none" if array is None else repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()
        )
    state.update(
        repr([(name, shot.taken_ns - frame.taken_ns) for name, shot in frame.shots.items()]).encode()
    )
    if frame.truth is not None:
        for array in (frame.truth.boxes, frame.truth.classes, frame.truth.points):
            state.update(array.tobytes())
    return state.digest()


def numbered(truth: Truth, labels: tuple[str, ...]) -> Truth:
    """`truth` with its classes counted in `labels`, which are matched without regard to case; those of other names are
    left out."""
    if truth.names == labels:
        return truth
    places = {name.casefold(): i for i, name in enumerate(labels)}
    number = np.array([places.get(name.casefold(), -1) for name in truth.names], np.int32)
    classes = number[truth.classes] if len(truth) else truth.classes
    known = classes >= 0
    return replace(truth[known], classes=classes[known], names=labels)


def read_set(
    data: Path, images: Path | None, *, limit: int | None = None, labels: tuple[str, ...] = ()
) -> Moments:
    """Labelled moments (see the module's text); a synthetic set is named by its URI.

    images: not used, as pictures lie where the labels say. limit: only the first moments. labels: the model's class
    names; classes of the set that are none of them are left out. Empty = the set's own names.

    Raises: UsageError in one line for anything that cannot be read, or that has none of the model's classes.
    """
    what = f"moments {printable(data)}"
    if limit is not None and limit < 1:
        raise UsageError(f"{what}: limit {limit} gives none, expected at least 1")
    uri = _URI.fullmatch(str(data))
    if uri is not None:
        return _synthetic(uri["world"], uri["query"] or "", limit, labels)
    if images is not None and images != data:
        raise UsageError(f"{what}: say themselves where pictures are. Leave --images {printable(images)} out")
    if data.is_dir() and (data / "velodyne").is_dir():
        return _kitti(data, what, limit, labels)
    if data.is_dir():
        found = sorted(data.glob("*.json"))
        if len(found) != 1:
            raise UsageError(
                f"{what}: expected velodyne/ and label_2/ in it, or one info file (.json), got {len(found)} of these"
            )
        data = found[0]
    if data.suffix.lower() == ".json" and data.is_file():
        return _infos(data, what, limit, labels)
    problem = "not labelled moments" if data.exists() else "no such file or folder"
    raise UsageError(
        f"{what}: {problem}, expected a KITTI folder, an info file (.json) or synthetic://street-rig?frames=200"
    )


def _name(data: Path) -> str:
    return printable(f"{data.parent.name}/{data.name}" if data.parent.name else data.name)


def _known(names: tuple[str, ...], labels: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The classes to number by. Raises: UsageError where the set has none of the model's."""
    if labels and not {name.casefold() for name in names} & {label.casefold() for label in labels}:
        raise UsageError(
            f"{what}: has none of the model's classes {', '.join(labels)}, but {', '.join(map(printable, names))}"
        )
    return labels or names


# --- files ---------------------------------------------------------------------------------------


def _kitti(data: Path, what: str, limit: int | None, labels: tuple[str, ...]) -> Moments:
    names = [path.stem for path in sorted((data / "label_2").glob("*.txt"))]
    names = [name for name in names if (data / "velodyne" / f"{name}.bin").is_file()][:limit]
    if not names:
        raise UsageError(f"{what}: no scan of velodyne/ has labels in label_2/")
    known = _known(KITTI_CLASSES, labels, what)
    return Moments(
        _name(data), known, len(names), lambda i: read_kitti(data, names[i]), labelled_in=("image_2",)
    )


def _infos(data: Path, what: str, limit: int | None, labels: tuple[str, ...]) -> Moments:
    try:
        if data.stat().st_size > _MAX_INFO_BYTES:
            raise ValueError(f"larger than {_MAX_INFO_BYTES >> 20} MiB")
        tree = json.loads(data.read_bytes())
        frames = tree["data_list"]
        total, kitti = len(frames), "CAM2" in frames[0]["images"]
        known = tree["metainfo"].get("categories", {"Pedestrian": 0, "Cyclist": 1, "Car": 2})
        names = tuple(map(str, known))
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror}. Check the path") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{what}: not an info file as mmdetection3d writes it ({type(error).__name__}), expected data_list with "
            "at least one frame, and metainfo"
        ) from None
    count = total if limit is None else min(total, limit)
    read = read_kitti_info if kitti else read_nuscenes
    return Moments(
        _name(data), _known(names, labels, what), count, lambda i: read(data, i),
        labelled_in=("image_2",) if kitti else (),
    )  # fmt: skip


# --- the synthetic street ------------------------------------------------------------------------


def _synthetic(world: str, query: str, limit: int | None, labels: tuple[str, ...]) -> Moments:
    from edgekit.synth.solids import CLASSES
    from edgekit.synth.street_rig import RigWorld

    what = f"moments synthetic://{printable(world)}"
    if world != "street-rig":
        raise UsageError(f"{what}: no rig sees it, expected synthetic://street-rig?frames=200")
    values = read_query(query, {**_DEFAULTS, "count": ""}, what)
    if "count=" in query:  # as a build takes it: each moment is of a street of its own
        values["frames"] = values["count"]
        values["worlds"] = values["worlds"] if "worlds=" in query else values["count"]
    width, height = picture_size(what, values, "256x144")
    frames = whole(what, values, "frames", 1, MAX_MOMENTS)
    count = frames if limit is None else min(frames, limit)
    seed = whole(what, values, "seed", 0, 2**62)
    worlds = whole(what, values, "worlds", 1, MAX_MOMENTS)
    gap = whole(what, values, "gap", 1, 10_000)
    RigWorld(seed, width=width, height=height)  # refuses a size that it cannot draw

    def take(index: int) -> RigFrame:
        street, number = index % worlds, index // worlds
        return RigWorld(seed + street, width=width, height=height).frame(gap * (number + 1))

    name = f"street-rig?frames={count}&seed={seed}&worlds={worlds}&gap={gap}&size={width}x{height}"
    return Moments(name, _known(CLASSES, labels, what), count, take, identity=name)
