"""The pictures a build is proven on: labelled ones where given, else real-looking unlabelled ones."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekit import tasks as device_tasks
from edgekit.dataset import DIGEST_PICTURES, DataSet, check_digest, check_files, picture_files
from edgekit.errors import CalibrationError, OutputError, UsageError
from edgekit.kernels.letterbox import letterbox
from edgekit.picture import read_picture
from edgekit.project import ModelEntry
from edgekit.runtime.sources import open_source
from edgekit.runtime.sources.pictures import natural_key
from edgekit.schema import printable, to_json
from edgekit.synth import coco as synth_coco
from edgekit.synth.street import StreetWorld
from edgekit.tasks import EvaluationSet, Spec
from edgekit.tasks.preprocess import ImagePreprocess
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


# --- calibration -------------------------------------------------------------------------------

CALIBRATION_PICTURES = 256
"""Taken of a folder, evenly spaced in name order, when the project says no count."""


class HasPreprocess(Protocol):
    """The part of a task's spec used here."""

    @property
    def preprocess(self) -> ImagePreprocess: ...


Reader = Callable[[], np.ndarray]
"""Reads one picture, uint8 [H, W, 3] BGR."""


@dataclass(frozen=True)
class Feeds:
    """Pictures as a network is fed with them on the device, one at a time; may be gone through again.

    Iterating gives dicts with one array, [1, C, H, W] or [1, H, W, C] by the input rule.
    digest: of the pictures, the rule and the code that applies it. provenance: for the evidence.
    """

    readers: tuple[Reader, ...]
    rule: ImagePreprocess
    input_name: str
    digest: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.readers)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for read in self.readers:
            yield {self.input_name: fed(read(), self.rule)}


def fed(image: np.ndarray, rule: ImagePreprocess) -> np.ndarray:
    """A picture, uint8 [H, W, 3] BGR, as the network's input of batch 1."""
    sizes = (3, rule.height, rule.width) if rule.layout == "NCHW" else (rule.height, rule.width, 3)
    array = np.empty((1, *sizes), rule.dtype.value)
    letterbox(image, rule, array)
    return array


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
    data = entry.calibration
    if data is None:
        raise CalibrationError(
            f"model {entry.name}: int8 needs pictures to calibrate on, got none. Give --calibration FOLDER with "
            "about 100 pictures like those its camera will see, or [model.calibration] in edgekit.toml"
        )
    chosen = _chosen(data, limit, progress)
    if entry.evaluation is not None and not entry.evaluation.source:
        _check_apart(chosen, entry.evaluation, f"model {entry.name}")
    return _feeds(chosen, spec.preprocess, input_name, _name(data))


def evaluation_feeds(
    entry: ModelEntry, spec: HasPreprocess, count: int, *, input_name: str, progress: Progress
) -> Feeds | None:
    """At most `count` pictures of what `entry` is judged on, to compare calibration with; None without any."""
    data = entry.evaluation
    if data is None:
        return None
    return _feeds(_chosen(data, count, progress), spec.preprocess, input_name, _name(data))


Stored = Path | Reader
"""A picture in a file, or in an array."""


def _chosen(data: DataSet, limit: int | None, progress: Progress) -> list[Stored]:
    """The pictures of a set, at most `limit`, evenly spaced; synthetic ones are drawn into the cache."""
    if data.source:
        count = min(n for n in (data.count, limit) if n is not None)
        _, folder = render(dataclasses.replace(data, count=count), progress)
        return [*sorted(folder.glob("*.png"))]
    count = min(n for n in (data.count or CALIBRATION_PICTURES, limit) if n is not None)
    found = _stored(data)
    if not found:
        raise UsageError(f"pictures {_name(data)}: there are none. Give a folder of pictures")
    return [found[i] for i in dataclasses.replace(data, count=count).indices(len(found))]


def _stored(data: DataSet) -> list[Stored]:
    """All pictures of a set that is not synthetic."""
    place = data.data if data.data is not None else data.images
    assert place is not None, "checked by the project reader"
    if place.is_dir() or place.suffix.lower() == ".json":
        return [*sorted(picture_files(data), key=natural_key)]
    tables: Any = importlib.import_module("edgekit.tasks.classify.dataset")  # tables of files and arrays
    return list(tables.pictures(place, data.images))


def _check_apart(chosen: list[Stored], evaluation: DataSet, where: str) -> None:
    """Raises: CalibrationError when a picture is in both sets: by its file's bytes, or its pixels where
    either set is no set of files."""
    judged = _stored(evaluation)
    files = [p for p in chosen if isinstance(p, Path)], [p for p in judged if isinstance(p, Path)]
    if len(files[0]) == len(chosen) and len(files[1]) == len(judged):
        check_files(*files, where)
        return
    known = {_pixels(item) for item in judged}
    shared = sum(_pixels(item) in known for item in chosen)
    if shared:
        raise CalibrationError(
            f"{where}: {shared} of {len(chosen)} calibration pictures are evaluation pictures too, "
            "expected none. Give calibration its own"
        )


def _pixels(item: Stored) -> str:
    image = read_picture(item) if isinstance(item, Path) else item()
    return cache.digest(list(image.shape), image.tobytes())


def _name(data: DataSet) -> str:
    place = data.data or data.images
    return data.name or data.source or (printable(place.name) if place is not None else "")


def _feeds(chosen: list[Stored], rule: ImagePreprocess, input_name: str, what: str) -> Feeds:
    state = hashlib.sha256()
    for item in chosen:
        try:
            content = item.read_bytes() if isinstance(item, Path) else _pixels(item).encode()
        except OSError as error:
            raise CalibrationError(
                f"picture {printable(str(item))}: {error.strerror}. Check the set"
            ) from None
        state.update(hashlib.sha256(content).digest())
    code = cache.sources("kernels/letterbox"), cache.tools()["opencv-python-headless"]
    digest = cache.digest(state.hexdigest(), to_json(rule), *code)
    provenance = {"calibration": what, "digest": state.hexdigest(), "pictures": len(chosen)}
    readers = tuple(functools.partial(read_picture, i) if isinstance(i, Path) else i for i in chosen)
    return Feeds(readers, rule, input_name, digest, provenance)
