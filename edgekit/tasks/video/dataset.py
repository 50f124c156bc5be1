"""Labelled clips: a folder per class, arrays, or the synthetic gestures.

    val/wave/1.mp4 val/wave/2/000.jpg ...   a folder per class; in it a clip is a video or a folder of pictures
    data.npz                                clips uint8 [N, T, H, W, 3] RGB, labels [N], and names [C] if known
    synthetic://gestures?clips=600&seed=10000&size=64x64&frames=8       the defaults

A label is a class name, or a number that counts from 0 in the network's order.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgekit.errors import UsageError, printable
from edgekit.optional import load_cv2, quiet
from edgekit.picture import SUFFIXES, VIDEO_SUFFIXES, read_picture
from edgekit.tasks.classify.dataset import class_array, class_folders, class_numbers, open_npz, read_array
from edgekit.tasks.world_query import picture_size, read_query, whole

if TYPE_CHECKING:
    from edgekit.synth.gestures import GestureWorld

MAX_CLIPS = 1_000_000
MAX_CLIP_BYTES = 1 << 30
"""Of one clip's frames, decoded."""
_URI = re.compile(r"synthetic:/{1,2}(?P<world>[^?]*)(\?(?P<query>.*))?")
"""A path has one of the slashes only."""
_DEFAULTS = {"clips": "600", "seed": "10000", "size": "64x64", "frames": "8"}


@dataclass(frozen=True)
class Clip:
    """One clip: a video file, a folder of pictures, or number `index` of the arrays or of the world. cls: its class, as
    the model counts."""

    cls: int
    path: Path | None = None
    index: int = 0


@dataclass(frozen=True)
class Frames:
    """A clip's frames in order, uint8 [H, W, 3] BGR each. step_s: seconds from one to the next; None where
    that is not known: then it is the step the network was trained for."""

    images: Sequence[np.ndarray]
    step_s: float | None = None

    def played(self, dt_s: float | None) -> Sequence[np.ndarray]:
        """The frames in steps of `dt_s` seconds: the nearest of each moment. All as they are where either step
        is not known."""
        if self.step_s is None or dt_s is None:
            return self.images
        last = len(self.images) - 1
        count = max(1, round(len(self.images) * self.step_s / dt_s))
        return [self.images[min(last, round(i * dt_s / self.step_s))] for i in range(count)]


@dataclass(frozen=True)
class VideoSet:
    """Labelled clips, classes as the model numbers them; `images` are the clips.

    digest: sha256 over the classes and the clips' bytes, so that equal digests mean equal evaluations.
    """

    task: ClassVar[str] = "video"

    name: str
    labels: tuple[str, ...]
    images: tuple[Clip, ...]
    digest: str
    arrays: np.ndarray | None = field(default=None, repr=False, compare=False)
    """uint8 [N, T, H, W, 3] RGB, for a set out of an .npz file."""
    world: GestureWorld | None = field(default=None, repr=False, compare=False)
    length: int = 0
    """Frames of a clip of the world."""

    def clip(self, index: int) -> Frames:
        """The frames of clip `index`. Raises: UsageError for a file that is no video or picture."""
        clip = self.images[index]
        if clip.path is not None:
            return _pictures(clip.path) if os.path.isdir(clip.path) else _video(clip.path)
        if self.arrays is not None:
            return Frames(list(np.ascontiguousarray(self.arrays[clip.index][..., ::-1])))
        assert self.world is not None, "a clip is a file, a row of the arrays or one of the world's"
        return Frames(list(self.world.clip(clip.index, self.length)[0]))

    def read(self, index: int) -> np.ndarray:
        """The picture in the middle of clip `index`, uint8 [H, W, 3] BGR. Raises: as `clip`."""
        images = self.clip(index).images
        return np.ascontiguousarray(images[len(images) // 2])


def read_set(
    data: Path, images: Path | None, *, limit: int | None = None, labels: tuple[str, ...] = ()
) -> VideoSet:
    """Read labelled clips (see the module's text); a synthetic set is named by its URI.

    images: not used, as the clips lie where the labels are. limit: only the first clips; of a folder per class, taken
    from the classes in turn. labels: the model's class names, matched as those of a classifier
    (tasks.classify.dataset.read_set). Empty = the set's own names in order.

    Raises: UsageError in one line for anything that cannot be read or does not fit the model.
    """
    what = f"clips {printable(data)}"
    if limit is not None and limit < 1:
        raise UsageError(f"{what}: limit {limit} gives no clips, expected at least 1")
    uri = _URI.fullmatch(str(data))
    if uri is not None:
        return _synthetic(uri["world"], uri["query"] or "", limit, labels)
    if images is not None and images != data:
        raise UsageError(f"{what}: says itself where its clips are. Leave --images {printable(images)} out")
    if os.path.isdir(data):
        return _folder(data, what, limit, labels)
    if data.suffix.lower() == ".npz" and os.path.isfile(data):
        return _npz(data, what, limit, labels)
    problem = "not labelled clips" if os.path.exists(data) else "no such file or folder"
    raise UsageError(
        f"{what}: {problem}, expected a folder with one folder of clips per class, an .npz file or "
        "synthetic://gestures?clips=600"
    )


def class_names(data: Path | str) -> tuple[str, ...]:
    """Class names that a set states in its own order: the folders', the array `names`, the world's; () where it has
    none. data: as for `read_set`. Raises: UsageError for a file that cannot be read."""
    uri = _URI.fullmatch(str(data))
    if uri is not None:
        from edgekit.synth.gestures import GESTURES

        return GESTURES if uri["world"] == "gestures" else ()
    path = Path(data)
    if os.path.isdir(path):
        return tuple(class_folders(path))
    if path.suffix.lower() == ".npz":
        with open_npz(path, f"clips {printable(path)}") as file:
            return class_array(file, f"clips {printable(path)}", "names")
    return ()


def _name(data: Path) -> str:
    return printable(f"{data.parent.name}/{data.name}" if data.parent.name else data.name)


# --- a folder per class --------------------------------------------------------------------------


def _folder(data: Path, what: str, limit: int | None, labels: tuple[str, ...]) -> VideoSet:
    names = tuple(class_folders(data))
    if not names:
        raise UsageError(f"{what}: holds no folders, expected one folder of clips per class")
    rows: list[tuple[int, int, Path]] = []
    for cls, name in enumerate(names):
        try:
            found = sorted(p for p in (data / name).iterdir() if not p.name.startswith("."))
        except OSError as error:
            raise UsageError(f"{what}: {printable(name)}: {error.strerror}") from None
        clips = [p for p in found if p.is_dir() or p.suffix.lower() in VIDEO_SUFFIXES]
        if not clips and any(p.suffix.lower() in SUFFIXES for p in found):
            raise UsageError(
                f"{what}: {printable(name)}: holds pictures, expected clips: videos, or a folder of pictures each"
            )
        rows += [(number, cls, path) for number, path in enumerate(clips)]
    if not rows:
        raise UsageError(
            f"{what}: holds no clips, expected <class>/<clip> with videos or folders of pictures"
        )
    if len(rows) > MAX_CLIPS:
        raise UsageError(f"{what}: {len(rows)} clips, expected at most {MAX_CLIPS}")
    rows.sort()  # the classes in turn: the first n clips are of all of them
    rows = rows[:limit]
    numbers = class_numbers([names[cls] for _, cls, _ in rows], names, labels, what)
    clips_found = tuple(Clip(number, path) for number, (_, _, path) in zip(numbers, rows, strict=True))
    digest = hashlib.sha256()
    for clip in clips_found:
        assert clip.path is not None
        digest.update(f"{clip.cls} ".encode())
        for path in _files(clip.path) if os.path.isdir(clip.path) else [clip.path]:
            try:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                raise UsageError(f"clip {printable(path)}: {error.strerror}. Check the file") from None
    return VideoSet(_name(data), labels or names, clips_found, digest.hexdigest())


def _files(folder: Path) -> list[Path]:
    """The pictures of a clip in order; numbers by value, so that 10.jpg comes after 9.jpg."""
    try:
        files = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "."]
    except OSError as error:
        raise UsageError(f"clip {printable(folder)}: {error.strerror}. Check the folder") from None
    if not files:
        raise UsageError(f"clip {printable(folder)}: holds no pictures ({' '.join(SUFFIXES)})")
    return sorted(
        files, key=lambda p: [(0, int(t), "") if t.isdecimal() else (1, 0, t) for t in _PARTS.findall(p.stem)]
    )


_PARTS = re.compile(r"[0-9]+|[^0-9]+")


def _pictures(folder: Path) -> Frames:
    images: list[np.ndarray] = []
    size = 0
    for path in _files(folder):
        images.append(read_picture(path))
        size += images[-1].nbytes
        _check_size(folder, size)
    return Frames(images)


def _video(path: Path) -> Frames:
    """All frames of a video file, decoded by OpenCV."""
    cv2 = load_cv2("read videos")
    name = printable(path)
    images: list[np.ndarray] = []
    size = 0
    with quiet(cv2):
        # absolute, so that no name is taken for a protocol; by FFmpeg, as other readers guess from the name
        capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
        try:
            fps = float(capture.get(cv2.CAP_PROP_FPS)) if capture.isOpened() else 0.0
            while True:
                ok, image = capture.read()
                if not ok:
                    break
                images.append(np.asarray(image))
                size += image.nbytes
                _check_size(path, size)
        except cv2.error as error:
            raise UsageError(f"clip {name}: cannot be decoded: {printable(error)[:120]}") from None
        finally:
            capture.release()
    if not images:
        raise UsageError(f"clip {name}: no frame can be decoded. Give a video that other players open")
    return Frames(images, 1 / fps if math.isfinite(fps) and 0 < fps <= 1000 else None)


def _check_size(path: Path, size: int) -> None:
    if size > MAX_CLIP_BYTES:
        raise UsageError(
            f"clip {printable(path)}: its frames are over {MAX_CLIP_BYTES >> 20} MiB. Cut it into shorter clips"
        )


# --- arrays --------------------------------------------------------------------------------------


def _npz(data: Path, what: str, limit: int | None, labels: tuple[str, ...]) -> VideoSet:
    with open_npz(data, what) as file:
        missing = [key for key in ("clips", "labels") if key not in file.files]
        if missing:
            some = ", ".join(printable(n)[:20] for n in file.files[:8]) or "nothing"
            raise UsageError(f"{what}: expected the arrays clips and labels, got {some}")
        clips = read_array(data, file, "clips", what)
        given = read_array(data, file, "labels", what)
        names = class_array(file, what, "names")
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[4] != 3 or 0 in clips.shape:
        raise UsageError(
            f"{what}: array clips: expected uint8 [N, T, H, W, 3] in RGB order, got {clips.dtype} {list(clips.shape)}"
        )
    if given.dtype.kind not in "iu" or given.shape != clips.shape[:1]:
        raise UsageError(
            f"{what}: array labels: expected {len(clips)} whole numbers, got {given.dtype} {list(given.shape)}"
        )
    numbers = class_numbers([int(v) for v in given[:limit]], names, labels, what)
    items = tuple(Clip(cls, None, index) for index, cls in enumerate(numbers))
    digest = hashlib.sha256(f"{clips.shape[1:]} ".encode())
    for item in items:
        digest.update(f"{item.cls} ".encode())
        digest.update(hashlib.sha256(np.ascontiguousarray(clips[item.index]).tobytes()).digest())
    known = labels or names or tuple(f"class_{i}" for i in range(max(numbers) + 1))
    return VideoSet(_name(data), known, items, digest.hexdigest(), arrays=clips)


# --- the synthetic world -------------------------------------------------------------------------


def _synthetic(world: str, query: str, limit: int | None, labels: tuple[str, ...]) -> VideoSet:
    from edgekit.synth.gestures import GESTURES, GestureWorld

    what = f"clips synthetic://{printable(world)}"
    if world != "gestures":
        raise UsageError(f"{what}: has no labelled clips, expected synthetic://gestures?clips=600")
    values = read_query(query, _DEFAULTS, what)
    width, height = picture_size(what, values, "64x64 (or 64)")
    count = whole(what, values, "clips", 1, MAX_CLIPS)
    count = count if limit is None else min(count, limit)
    frames = whole(what, values, "frames", 1, 1000)
    seed = whole(what, values, "seed", 0, 2**63 - 1)
    drawn = GestureWorld(seed, width, height)
    numbers = class_numbers([GESTURES[i % len(GESTURES)] for i in range(count)], GESTURES, labels, what)
    items = tuple(Clip(cls, None, index) for index, cls in enumerate(numbers))
    digest = hashlib.sha256(f"gestures {seed} {width}x{height} {frames} {numbers}".encode())
    for index in range(min(count, len(GESTURES))):  # a changed generator does not pass unseen
        digest.update(drawn.clip(index, frames)[0].tobytes())
    name = f"gestures?clips={count}&seed={seed}&size={width}x{height}&frames={frames}"
    return VideoSet(name, labels or GESTURES, items, digest.hexdigest(), world=drawn, length=frames)
