"""Labelled pictures in COCO's "instances" format."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError, did_you_mean, printable
from edgekit.tasks.detect.coco import COCO_ALIASES

MAX_JSON_BYTES = 1 << 30


@dataclass(frozen=True)
class Picture:
    """One picture; `id` is the annotation file's."""

    id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class Truth:
    """One annotated object: box x y w h in pixels, `cls` an index into `CocoSet.labels`."""

    image_id: int
    cls: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool


@dataclass(frozen=True)
class CocoSet:
    """Labelled pictures, classes as the model numbers them.

    digest: sha256 over the annotations used and the pictures' bytes, so that equal digests mean
    equal evaluations.
    """

    name: str
    labels: tuple[str, ...]
    images: tuple[Picture, ...]
    truths: tuple[Truth, ...]
    digest: str


def read_coco(
    instances: Path, folder: Path, *, limit: int | None = None, labels: tuple[str, ...] = ()
) -> CocoSet:
    """Read `instances` (COCO json) and check that the pictures are in `folder`.

    limit: only the first pictures, in the file's order. labels: the model's class names; the
    file's categories are matched to them by name, or by order of id when there are as many of
    them and the names say nothing (class_0 ...). Empty = the file's own categories in order of id.

    Raises: UsageError in one line for a file that cannot be read, is not COCO json, names missing
    pictures or categories the model does not have.
    """
    what = f"annotations {printable(instances)}"
    tree = _read(instances, what)
    images, notes, categories = (_table(tree, key, what) for key in ("images", "annotations", "categories"))
    try:
        names = {int(c["id"]): str(c["name"]) for c in categories}
        found = [
            Picture(
                int(i["id"]), folder / _safe(str(i["file_name"]), what), int(i["width"]), int(i["height"])
            )
            for i in images
        ]
        ids = {p.id for p in found}
        found = found if limit is None else found[:limit]
        index = _match(names, labels, what)
        wanted = {p.id for p in found}
        truths = tuple(
            Truth(
                int(a["image_id"]),
                index[int(a["category_id"])],
                _box(a["bbox"]),
                float(a.get("area", float(a["bbox"][2]) * float(a["bbox"][3]))),
                bool(a.get("iscrowd", 0)),
            )
            for a in notes
            if int(a["image_id"]) in wanted
        )
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        detail = f"key {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{what}: not COCO instances: {detail} is missing or of the wrong kind") from None
    if not found:
        raise UsageError(f"{what}: lists no pictures")
    strays = {int(a["image_id"]) for a in notes} - ids
    if strays:
        raise UsageError(
            f"{what}: {len(strays)} picture ids have boxes but no picture, the first is {min(strays)}"
        )
    if len(wanted) != len(found):
        raise UsageError(f"{what}: {len(found) - len(wanted)} picture ids are there twice")
    missing = [p.path for p in found if not p.path.is_file()]
    if missing:
        raise UsageError(
            f"{what}: {len(missing)} of {len(found)} pictures are not in {folder}, the first is "
            f"{printable(missing[0].name)}. Give their folder with --images"
        )
    return CocoSet(
        f"{instances.parent.name}/{instances.name}" if instances.parent.name else instances.name,
        labels or tuple(names[i] for i in sorted(names)),
        tuple(found),
        truths,
        _digest(found, truths),
    )


def _read(path: Path, what: str) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UsageError(f"{what}: larger than {MAX_JSON_BYTES >> 20} MiB")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{what}: no such file") from None
    except OSError as error:
        raise UsageError(f"{what}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: not JSON: {str(error).splitlines()[0][:120]}") from None


def _table(tree: Any, key: str, what: str) -> list[Any]:
    value = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(value, list):
        raise UsageError(f"{what}: not COCO instances: expected a list {key!r}")
    return value


def _safe(name: str, what: str) -> str:
    if not name or name.startswith(("/", "\\")) or ".." in Path(name).parts:
        raise UsageError(f"{what}: file_name {name[:80]!r} leads out of the picture folder")
    return name


def _box(value: Any) -> tuple[float, float, float, float]:
    x, y, w, h = (float(v) for v in value)
    if not all(map(math.isfinite, (x, y, w, h))):
        raise ValueError("a bbox with numbers that are not finite")
    return x, y, w, h


def _match(names: dict[int, str], labels: tuple[str, ...], what: str) -> dict[int, int]:
    """Category id -> class index of the model."""
    ordered = sorted(names)
    if not labels:
        return {category: i for i, category in enumerate(ordered)}
    position = {_plain(label): i for i, label in enumerate(labels)}
    unknown = [names[c] for c in ordered if _plain(names[c]) not in position]
    if not unknown:
        return {c: position[_plain(names[c])] for c in ordered}
    if len(ordered) == len(labels) and len(unknown) == len(ordered):
        return {category: i for i, category in enumerate(ordered)}
    raise UsageError(
        f"{what}: category {unknown[0]!r} is not a class of the model ({len(ordered)} categories, "
        f"{len(labels)} classes). {did_you_mean(unknown[0], labels)} Give the model's names with --classes"
    )


def _plain(name: str) -> str:
    """Spelling that does not matter: case, `_` for a space, darknet's names of six COCO classes."""
    name = name.strip().lower().replace("_", " ")
    return COCO_ALIASES.get(name, name)


def _digest(pictures: list[Picture], truths: tuple[Truth, ...]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.id} {picture.width} {picture.height} ".encode())
        digest.update(hashlib.sha256(picture.path.read_bytes()).digest())
    for truth in truths:
        digest.update(repr(truth).encode())
    return digest.hexdigest()
