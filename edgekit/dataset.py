"""Pictures to calibrate on and to judge by: folders, labels, synthetic sources, named sets.

A named set is one file, `calibration/<name>.toml` (docs/projects.md). Whatever is said about
pictures, in a project or on the command line, becomes a `DataSet` here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgekit import content
from edgekit.errors import CalibrationError, UsageError, did_you_mean
from edgekit.files import read_toml
from edgekit.schema import printable

MAX_PICTURES = 1_000_000
DIGEST_PICTURES = 8

Purpose = Literal["calibration", "evaluation", "training"]


@dataclass(frozen=True)
class DataSet:
    """Pictures to calibrate or to judge on: a folder, labels or a synthetic source.

    Either `images` (a folder, with its labels in `data`, COCO json, when they are known), or `data`
    alone where that says itself where its pictures are (see `stands_alone`; `images` may help), or
    `source` (a URI; picture i is drawn from seed `seed + i`, i < `count`). For a folder,
    `count` = at most that many pictures. `name`: the named set it came from, if any.
    `sha256`: see `picture_digest`.
    """

    images: Path | None = None
    data: Path | None = None
    source: str = ""
    count: int | None = None
    seed: int = 0
    name: str = ""
    sha256: str = ""

    @property
    def seeds(self) -> range:
        """Seeds of the pictures of a synthetic set; empty for a folder."""
        return range(self.seed, self.seed + (self.count or 0)) if self.source else range(0)

    def indices(self, total: int) -> tuple[int, ...]:
        """Which of `total` pictures in name order belong to the set: `count` of them, evenly spaced."""
        n = total if self.count is None else min(self.count, total)
        return tuple(i * total // n for i in range(n)) if n else ()


@dataclass(frozen=True)
class NamedSet:
    """A synthetic set in `calibration/<name>.toml`, shared by projects.

    Pictures are raw 8-bit frames; the model's own preprocessing rule is applied to them.
    `sha256`: `picture_digest` of its first pictures, so that a changed generator does not pass unseen.
    """

    purpose: Purpose
    title: str
    source: str
    count: int
    seed: int
    sha256: str = ""

    def __post_init__(self) -> None:
        _check_source(self.source, self.count, self.seed)
        if self.sha256 and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 must be 64 hexadecimal digits, got {self.sha256[:70]!r}")


@dataclass(frozen=True)
class DataTable:
    """`[model.calibration]` or `[model.evaluation]` as written in a project."""

    set: str | None = None
    data: str | None = None
    images: str | None = None
    source: str | None = None
    count: int | None = None
    seed: int | None = None


def named_sets() -> tuple[str, ...]:
    """Names of the sets in calibration/, sorted."""
    return tuple(sorted({p.stem for folder in content.folders("calibration") for p in folder.glob("*.toml")}))


def named_set(name: str) -> NamedSet:
    """The set `calibration/<name>.toml`. Raises: UsageError for an unknown name or a faulty file."""
    if name not in named_sets():
        raise UsageError(f"set {name!r}: unknown. {did_you_mean(name, named_sets())}")
    path = content.find("calibration", f"{name}.toml")
    assert path is not None
    return read_toml(NamedSet, path, f"set {path}")


def picture_digest(pictures: Sequence[Any]) -> str:
    """What `sha256` of a set states: SHA-256 over the pictures of its first 8 seeds, in order.

    pictures: numpy uint8 arrays [H, W, 3], BGR as sources give them; of each, the text "HxWx3:"
    and its bytes in C order. Those after the eighth do not count.
    """
    import numpy as np

    digest = hashlib.sha256()
    for picture in pictures[:DIGEST_PICTURES]:
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        digest.update(("x".join(map(str, picture.shape)) + ":").encode())
        digest.update(np.ascontiguousarray(picture).tobytes())
    return digest.hexdigest()


def check_digest(data: DataSet, pictures: Sequence[Any]) -> None:
    """Compare the pictures of the first 8 seeds with the digest that the set was recorded with, if it has one.

    Raises: CalibrationError when they differ: the generator has changed since.
    """
    if not data.sha256:
        return
    got = picture_digest(pictures)
    if got != data.sha256:
        raise CalibrationError(
            f"set {data.name or data.source}: its pictures have changed, expected sha256 {data.sha256}, got {got}. "
            "Measure anew and record the new sha256"
        )


def resolve(table: DataTable, root: Path, purpose: Purpose, where: str) -> DataSet:
    """What `table` says, paths relative to `root`; `where` names it in errors. Raises: UsageError."""
    kinds = [k for k in ("set", "source", "images") if getattr(table, k) is not None]
    alone = table.data is not None and stands_alone(root / table.data)
    if len(kinds) != 1 and not (alone and not kinds):
        got = " and ".join(kinds) if kinds else "none"
        known = "source or images" if purpose == "training" else "set, source or images"
        raise UsageError(f"{where}: expected one of {known}, got {got}")
    if table.data is not None and table.images is None and not (alone and not kinds):
        raise UsageError(f"{where}.data: expected with images, the folder of the pictures")
    if table.set is not None:
        if table.seed is not None:
            raise UsageError(f"{where}.seed: a named set has its own seed. Leave it out, or write source")
        found = named_set(table.set)
        if found.purpose != purpose:
            raise UsageError(
                f"{where}.set: {table.set!r} is for {found.purpose}, expected a set for {purpose}"
            )
        count = found.count if table.count is None else table.count
        if not 1 <= count <= found.count:
            raise UsageError(f"{where}.count: expected 1 to {found.count} (set {table.set}), got {count}")
        return DataSet(source=found.source, count=count, seed=found.seed, name=table.set, sha256=found.sha256)
    if table.source is not None:
        try:
            _check_source(table.source, table.count, table.seed or 0)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
        return DataSet(source=table.source, count=table.count, seed=table.seed or 0)
    if table.seed is not None:
        raise UsageError(f"{where}.seed: goes with source, a folder has none")
    if table.count is not None and not 1 <= table.count <= MAX_PICTURES:
        raise UsageError(f"{where}.count: expected 1 to {MAX_PICTURES}, got {table.count}")
    images = None if table.images is None else root / table.images
    if images is not None and not os.path.isdir(images):
        raise UsageError(f"{where}.images: no such folder {str(images)!r}")
    data = None if table.data is None else root / table.data
    if data is not None and not (os.path.isfile(data) or (alone and os.path.isdir(data))):
        raise UsageError(f"{where}.data: no such file {str(data)!r}")
    if data is None and purpose != "calibration":
        raise UsageError(
            f'{where}: pictures without labels, expected data = "instances.json" (COCO) beside images, '
            'or for a classifier data = a folder per class, "labels.csv" or "data.npz"'
        )
    return DataSet(images=images, data=data, count=table.count)


def stands_alone(data: Path | str) -> bool:
    """Whether labels at `data` say themselves where their pictures are: a folder per class, a table of
    files (.csv, .jsonl), an array file (.npz) or a synthetic source. COCO json needs the folder of its pictures."""
    return is_uri(data) or os.path.isdir(data) or Path(data).suffix.lower() in (".csv", ".jsonl", ".npz")


def check_pair(data: Path | None, images: Path | None, options: str = "--data and --images") -> None:
    """Labels and their pictures, of `options`. Raises: UsageError for one without the other that it needs."""
    if (data is None and images is not None) or (
        data is not None and images is None and not stands_alone(data)
    ):
        raise UsageError(f"options {options}: expected both or neither. Give the labels and their folder")


def from_option(text: str) -> DataSet:
    """`--calibration FOLDER|SET`. Raises: UsageError."""
    what = f"option --calibration {printable(text, 200)}"
    if is_uri(text):
        found = from_uri(text)
        if found.count is None:
            raise UsageError(f"{what}: how many? Say it, as in synthetic://gestures?clips=32&seed=1000000")
        return found
    if os.path.isfile(text) and stands_alone(text):
        return resolve(DataTable(data=text), Path(), "calibration", what)
    if os.path.isdir(Path(text)):
        return resolve(DataTable(images=text), Path(), "calibration", what)
    if text in named_sets():
        return resolve(DataTable(set=text), Path(), "calibration", what)
    raise UsageError(
        f"{what}: neither a folder of pictures nor a named set. {did_you_mean(text, named_sets())}"
    )


def from_uri(text: str) -> DataSet:
    """`synthetic://gestures?clips=600&seed=10000&size=64x64`: as a path may have spelt it, with one slash. How many
    and from which seed are the set's, the rest its source; `count` None where it says no number.

    Raises: UsageError.
    """
    scheme, _, query = text.partition("?")
    world = scheme.removeprefix("synthetic:").lstrip("/")
    count: int | None = None
    seed, rest = 0, []
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        own = ("clips", "count", "seed", *(("frames",) if world == "street-rig" else ()))
        if key not in own:
            rest.append(part)
            continue
        if not (value.isascii() and value.isdecimal() and len(value) < 11):
            raise UsageError(
                f"source {printable(text, 200)}: {key} {printable(value)[:40]!r}: expected a number"
            )
        count, seed = (count, int(value)) if key == "seed" else (int(value), seed)
    source = f"synthetic://{world}" + (f"?{'&'.join(rest)}" if rest else "")
    try:
        _check_source(source, 1 if count is None else count, seed)
    except ValueError as error:
        raise UsageError(f"source {printable(text, 200)}: {error}") from None
    return DataSet(source=source, count=count, seed=seed)


def is_uri(data: Path | str) -> bool:
    return str(data).startswith("synthetic:")


def check_disjoint(
    a: DataSet | None, b: DataSet | None, where: str, purpose: Purpose = "calibration"
) -> None:
    """Calibrating or training on what is judged flatters the result; refuse it as far as it can be seen here.

    Raises: UsageError when `a`, which is for `purpose`, and evaluation `b` share seeds, labels or their folder.
    """
    if a is None or b is None:
        return
    if a.source.partition("?")[0] == b.source.partition("?")[0]:
        low, high = max(a.seed, b.seed), min(a.seeds.stop, b.seeds.stop) - 1
        if a.source and low <= high:
            raise UsageError(
                f"{where}: {purpose} and evaluation share the seeds {low} to {high}, "
                "expected none in common. Change one of the seeds"
            )
    same_data = a.data is not None and b.data is not None and _same_place(a.data, b.data)
    same_images = a.images is not None and b.images is not None and _same_place(a.images, b.images)
    # a folder per class is labels and pictures in one
    crossed = a.images is not None and a.data is None and b.data is not None and _same_place(a.images, b.data)
    if (same_data and not _has_parts(b.data)) or (same_images and a.data is None) or crossed:
        raise UsageError(f"{where}: {purpose} and evaluation are the same pictures. Give {purpose} its own")


def picture_files(data: DataSet) -> list[Path]:
    """The picture files of a set that is not synthetic: those its labels list, else all in its folder, in
    name order; those in subfolders where it holds none itself (a folder per class). None of arrays.

    Raises: UsageError for labels that are neither COCO json nor a classifier's.
    """
    from edgekit.picture import SUFFIXES

    if data.data is not None and stands_alone(data.data):
        from edgekit.tasks.classify.dataset import listed_files

        return [] if data.data.suffix.lower() == ".npz" else listed_files(data.data, data.images)
    if data.images is None:
        return []
    if data.data is None:
        for found in (data.images.iterdir(), data.images.rglob("*")):
            files = [p for p in found if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file()]
            if files:
                return sorted(files)
        return []
    try:
        listed = [image["file_name"] for image in json.loads(data.data.read_bytes())["images"]]
        return sorted({data.images / str(name) for name in listed})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"annotations {printable(str(data.data))}: not COCO instances: {type(error).__name__} {printable(str(error))[:80]}"
        ) from None


def check_files(
    calibration: Sequence[Path], evaluation: Sequence[Path], where: str, purpose: Purpose = "calibration"
) -> None:
    """Refuse calibration (or what else `purpose` says) on pictures that are judged, whatever they are called. Only files
    of equal size are read.

    Raises: CalibrationError with the number of files whose bytes are in both.
    """
    sizes: dict[int, list[Path]] = {}
    for path in evaluation:
        with contextlib.suppress(OSError):
            sizes.setdefault(path.stat().st_size, []).append(path)
    digests: dict[Path, bytes] = {}

    def digest(path: Path) -> bytes:
        if path not in digests:
            with path.open("rb") as file:
                state = hashlib.sha256()
                while block := file.read(1 << 20):
                    state.update(block)
            digests[path] = state.digest()
        return digests[path]

    shared = []
    for path in calibration:
        with contextlib.suppress(OSError):
            rivals = sizes.get(path.stat().st_size, [])
            if any(digest(path) == digest(rival) for rival in rivals):
                shared.append(path)
    if shared:
        raise CalibrationError(
            f"{where}: {len(shared)} of {len(calibration)} {purpose} pictures are evaluation pictures too, "
            f"expected none, the first is {printable(shared[0].name)[:80]}. Give {purpose} its own"
        )


def _check_source(source: str, count: int | None, seed: int) -> None:
    scheme, _, query = source.partition("?")
    if not re.fullmatch(r"synthetic://[a-z0-9_-]+", scheme):
        raise ValueError(f"source {source[:80]!r} must look like synthetic://street?size=640x360")
    own = {"seed", "count", "clips"}
    if scheme != "synthetic://gestures":  # there it is the length of a clip
        own.add("frames")
    if own & {part.partition("=")[0] for part in query.split("&")}:
        raise ValueError("source: seed and count (frames, clips) are keys of their own, not part of the URI")
    if count is None or not 1 <= count <= MAX_PICTURES:
        raise ValueError(f"count must be between 1 and {MAX_PICTURES}, got {count}")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be between 0 and {2**31 - 1}, got {seed}")


def _has_parts(data: Path | None) -> bool:
    """An array file with a training part, to calibrate on, and another to judge on."""
    if data is None or data.suffix.lower() != ".npz":
        return False
    try:
        with zipfile.ZipFile(data) as archive:
            names = {Path(name).stem for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return False  # its reader says what is wrong
    return "x_train" in names and bool(names & {"x_test", "x_val"})


def _same_place(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)
