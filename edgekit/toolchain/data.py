"""The pictures a build is proven on: labelled ones where given, else real-looking unlabelled ones."""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekit import tasks as device_tasks
from edgekit.archive import write_atomic
from edgekit.dataset import DIGEST_PICTURES, DataSet, Purpose, check_digest, check_files, picture_files
from edgekit.errors import CalibrationError, OutputError, UsageError
from edgekit.kernels.letterbox import letterbox
from edgekit.picture import read_picture
from edgekit.project import ModelEntry
from edgekit.runtime.sources import open_source
from edgekit.runtime.sources.pictures import is_picture, natural_key
from edgekit.schema import printable, to_json
from edgekit.synth import coco as synth_coco
from edgekit.synth.street import StreetWorld
from edgekit.tasks import EvaluationSet, Spec
from edgekit.tasks.classify import dataset as classify_dataset
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.toolchain import cache, tasks
from edgekit.toolchain.clips import Clips, clips_of, labelled_clips, unlabelled_clips
from edgekit.toolchain.running import Footage

Progress = Callable[[str, int, int], None]

DEFAULT_CLIPS = 4

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
    stored: DataSet | None = None
    """The unlabelled ones where no source opens them: labels, or folders in a folder."""
    clips: Clips | None = None
    """In place of pictures, for a task that sees clips."""

    def unlabelled(self, count: int) -> Footage:
        """`count` pictures, uint8 [H, W, 3] BGR, the first ones; or as many clips; at least one."""
        if self.clips is not None:
            return self.clips.of(count)
        if self.labelled is not None:
            return [self.labelled.read(i) for i in range(min(count, len(self.labelled.images)))]
        if self.stored is not None:
            found = [read_picture(p) for p in calibration_files(self.stored, count, lambda *_: None)]
        else:
            with open_source(self.source, limit=count) as source:
                found = [np.array(frame.image) for frame in source]
        if not found:
            raise UsageError(f"pictures {self.source}: there are none. Give a folder with pictures")
        return found


def pictures(entry: ModelEntry, spec: Spec, limit: int | None, progress: Progress) -> Pictures:
    """Resolve the entry's evaluation set. Raises: UsageError when it cannot be used with the model."""
    task = tasks.half(spec.task)
    if task.CLIPS:
        return _clips(entry, spec, limit, progress)
    if entry.evaluation is None:
        why = task.NO_LABELS
        given = entry.calibration
        if given is None:
            source = task.DEFAULT_SOURCE
            return Pictures(None, f"{source} (no pictures were given)", source, why)
        path = given.data or given.images
        if path is not None and (given.data is not None or not any(map(is_picture, path.iterdir()))):
            return Pictures(None, path.name, str(path), why, stored=given)
        if given.images is not None:
            return Pictures(None, given.images.name, str(given.images), why)
        source = f"{given.source}{'&' if '?' in given.source else '?'}seed={given.seed}"
        return Pictures(None, given.name or source, source, why)
    labelled = labelled_set(entry.evaluation, spec, limit, progress)
    provenance = {"evaluation": labelled.name, "digest": labelled.digest, "pictures": len(labelled.images)}
    return Pictures(labelled, labelled.name, "", provenance=provenance)


def _clips(entry: ModelEntry, spec: Any, limit: int | None, progress: Progress) -> Pictures:
    """The clips to prove on: labelled ones, else those for calibration, else synthetic ones."""
    progress("read clips", 0, 1)
    if entry.evaluation is not None:
        data = labelled_clips(entry.evaluation, spec.labels, limit)
        provenance = {"evaluation": data.name, "digest": data.digest, "clips": len(data.images)}
        clips = clips_of(data, spec)
        return Pictures(data, data.name, "", provenance=provenance, clips=clips)
    task = tasks.half(spec.task)
    if entry.calibration is None:
        source = task.DEFAULT_SOURCE
        default = DataSet(source=source, count=DEFAULT_CLIPS)
        what = f"{source} (no clips were given)"
        return Pictures(None, what, source, task.NO_LABELS, clips=clips_of(unlabelled_clips(default), spec))
    found = unlabelled_clips(entry.calibration)
    what = entry.calibration.name or found.name
    return Pictures(None, what, what, task.NO_LABELS, clips=clips_of(found, spec))


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


# --- calibration -------------------------------------------------------------------------------

CALIBRATION_PICTURES = 256
"""Taken of a folder, evenly spaced in name order, when the project says no count."""


class HasPreprocess(Protocol):
    """The part of a task's spec used here."""

    @property
    def preprocess(self) -> ImagePreprocess: ...


@dataclass(frozen=True)
class Feeds:
    """Pictures as a network is fed with them on the device, one at a time; may be gone through again.

    Iterating gives dicts with one array, [1, C, H, W] or [1, H, W, C] by the input rule.
    digest: of the pictures, the rule and the code that applies it. provenance: for the evidence.
    """

    paths: tuple[Path, ...]
    rule: ImagePreprocess
    input_name: str
    what: str
    digest: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for path in self.paths:
            yield {self.input_name: fed(read_picture(path), self.rule)}

    def spread(self, count: int, skip: Collection[int] = ()) -> list[int]:
        """At most `count` positions in this sequence, evenly spaced over those not in `skip`."""
        known = [i for i in range(len(self.paths)) if i not in skip]
        return [known[i] for i in DataSet(count=count).indices(len(known))]

    def pick(self, which: Collection[int]) -> dict[int, dict[str, np.ndarray]]:
        """The feeds at these positions."""
        return {i: feed for i, feed in enumerate(self) if i in which}

    def first(self, count: int) -> Feeds:
        """Of `count` pictures, evenly spaced."""
        chosen = tuple(self.paths[i] for i in DataSet(count=count).indices(len(self.paths)))
        return _feeds(chosen, self.rule, self.input_name, self.what)


def fed(image: np.ndarray, rule: ImagePreprocess) -> np.ndarray:
    """A picture, uint8 [H, W, 3] BGR, as the network's input of batch 1."""
    sizes = (3, rule.height, rule.width) if rule.layout == "NCHW" else (rule.height, rule.width, 3)
    array = np.empty((1, *sizes), rule.dtype.value)
    letterbox(image, rule, array)
    return array


def calibration_set(entry: ModelEntry) -> DataSet:
    """What int8 of `entry` is calibrated on. Raises: CalibrationError when the project gives nothing."""
    if entry.calibration is None:
        raise CalibrationError(
            f"model {entry.name}: int8 needs pictures to calibrate on, got none. Give --calibration FOLDER with "
            "about 100 pictures like those its camera will see, or [model.calibration] in edgekit.toml"
        )
    return entry.calibration


def calibration_feeds(
    entry: ModelEntry,
    spec: HasPreprocess,
    limit: int | None = None,
    *,
    input_name: str,
    progress: Progress,
) -> Feeds:
    """What to calibrate `entry` on: its own pictures through its own input rule, at most `limit`.

    Raises: CalibrationError when the project gives none, or pictures that it also evaluates on;
    UsageError for a folder without pictures.
    """
    data = calibration_set(entry)
    paths = calibration_files(data, limit, progress)
    if entry.evaluation is not None:
        check_files(paths, picture_files(entry.evaluation), f"model {entry.name}")
        if is_arrays(entry.evaluation):
            check_arrays(paths, entry.evaluation, f"model {entry.name}")
    path = data.data if data.images is None else data.images
    where = data.name or data.source or (path.name if path is not None else "")
    return _feeds(tuple(paths), spec.preprocess, input_name, where)


def evaluation_feeds(
    entry: ModelEntry, spec: HasPreprocess, count: int, *, input_name: str, progress: Progress
) -> Feeds | None:
    """At most `count` pictures of what `entry` is judged on, to compare calibration with; None without any."""
    data = entry.evaluation
    if data is None:
        return None
    paths = calibration_files(data, count, progress, "evaluation")
    return _feeds(tuple(paths), spec.preprocess, input_name, data.name or "evaluation")


def calibration_files(
    data: DataSet, limit: int | None, progress: Progress, split: Purpose = "calibration"
) -> list[Path]:
    """The files of a set, at most `limit`, evenly spaced; synthetic ones are drawn into the cache, and the
    chosen pictures of an array file are written there, of its part for `split`.

    Raises: UsageError, CalibrationError.
    """
    count = min(n for n in (data.count or CALIBRATION_PICTURES, limit) if n is not None)
    if data.source:
        _, folder = render(dataclasses.replace(data, count=count), progress)
        return sorted(folder.glob("*.png"))
    if is_arrays(data):
        return unpack(dataclasses.replace(data, count=count), split)
    found = picture_files(data)
    if data.data is None:
        found = sorted((p for p in found if is_picture(p)), key=natural_key)
    if not found:
        where = data.data if data.images is None else data.images
        raise UsageError(f"folder {printable(str(where))}: holds no picture. Give a folder of pictures")
    return [found[i] for i in dataclasses.replace(data, count=count).indices(len(found))]


def is_arrays(data: DataSet) -> bool:
    """An .npz file, whose pictures are no files."""
    return data.data is not None and data.data.suffix.lower() == ".npz"


def unpack(data: DataSet, split: Purpose) -> list[Path]:
    """`data.count` pictures of an array file, evenly spaced, as PNG files named by their pixels in the cache.

    Raises: UsageError, OutputError when neither the cache nor the folder for temporary files can be written.
    """
    from edgekit.optional import load_cv2

    assert data.data is not None, "is_arrays"
    images = classify_dataset.arrays(data.data, split)
    folder = cache.cache_dir() / "arrays"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a cache that cannot be written: for this process only
        folder = Path(tempfile.mkdtemp(prefix="edgekit-arrays-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = []
    for index in data.indices(len(images)):
        picture = np.ascontiguousarray(images[index][:, :, ::-1])
        path = folder / f"{_pixels(picture)}.png"
        if not path.is_file():
            ok, encoded = load_cv2("unpack pictures").imencode(".png", picture)
            assert ok, "a valid picture encodes"
            write_atomic(path, [encoded.tobytes()], "cache")
        paths.append(path)
    return list(dict.fromkeys(paths))  # equal pictures are one


def check_arrays(paths: Sequence[Path], evaluation: DataSet, where: str) -> None:
    """Refuse to calibrate on pictures of the array file that is judged on. Raises: CalibrationError."""
    assert evaluation.data is not None, "is_arrays"
    judged = {_pixels(p[:, :, ::-1]) for p in classify_dataset.arrays(evaluation.data, "evaluation")}
    shared = [path for path in paths if _pixels(read_picture(path)) in judged]
    if shared:
        raise CalibrationError(
            f"{where}: {len(shared)} of {len(paths)} calibration pictures are evaluation pictures too, "
            f"expected none, the first is {printable(shared[0].name)[:80]}. Give calibration its own"
        )


def _pixels(picture: np.ndarray) -> str:
    """Digest of uint8 [H, W, 3]."""
    state = hashlib.sha256(f"{picture.shape}".encode())
    state.update(np.ascontiguousarray(picture).tobytes())
    return state.hexdigest()


def _feeds(paths: tuple[Path, ...], rule: ImagePreprocess, input_name: str, what: str) -> Feeds:
    state = hashlib.sha256()
    for path in paths:
        try:
            state.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise CalibrationError(
                f"picture {printable(str(path))}: {error.strerror}. Check the folder"
            ) from None
    pictures_ = state.hexdigest()
    code = cache.sources("kernels/letterbox"), cache.tools()["opencv-python-headless"]
    digest = cache.digest(pictures_, to_json(rule), *code)
    provenance = {"calibration": what, "digest": pictures_, "pictures": len(paths)}
    return Feeds(paths, rule, input_name, what, digest, provenance)
