"""Labelled pictures in COCO's "instances" format."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgekit.errors import UsageError, printable
from edgekit.picture import read_picture
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

    task: ClassVar[str] = "detect"

    name: str
    labels: tuple[str, ...]
    images: tuple[Picture, ...]
    truths: tuple[Truth, ...]
    digest: str

    def read(self, index: int) -> np.ndarray:
        """Picture `index`, uint8 [H, W, 3] BGR. Raises: UsageError for a file that is no picture."""
        return read_picture(self.images[index].path)


def read_coco(
    instances: Path, folder: Path, *, limit: int | None = None, labels: tuple[str, ...] = ()
) -> CocoSet:
    """Read `instances` (COCO json) and check that the pictures are in `folder`.

    limit: only the first pictures, in the file's order. labels: the model's class names; the
    file's categories are matched to them by name (case, `_` and darknet's names of COCO classes
    aside), or by order of id when there are as many of them and the names of one side say nothing
    (class_0 ...). Empty = the file's own categories in order of id.

    Raises: UsageError in one line for a file that cannot be read, is not COCO json, names missing
    pictures or categories the model does not have.
    """
    what = f"annotations {printable(instances)}"
    if limit is not None and limit < 1:
        raise UsageError(f"{what}: limit {limit} gives no pictures, expected at least 1")
    tree = _read(instances, what)
    images, notes, categories = (_table(tree, key, what) for key in ("images", "annotations", "categories"))
    try:
        listed = [(int(c["id"]), str(c["name"])) for c in categories]
        found = [_picture(i, folder, what) for i in images]
        rows = [(int(a["image_id"]), int(a["category_id"]), _box(a["bbox"]), a) for a in notes]
        sizes = [_area(a, box) for _, _, box, a in rows]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise UsageError(f"{what}: not COCO instances: {_reason(error)}") from None
    if not found:
        raise UsageError(f"{what}: lists no pictures")
    names, ids = dict(listed), {p.id for p in found}
    for kind, total, distinct in (("picture", len(found), len(ids)), ("category", len(listed), len(names))):
        if distinct < total:
            raise UsageError(f"{what}: not COCO instances: {total - distinct} {kind} ids are there twice")
    for kind, used, known in (
        ("picture", {r[0] for r in rows}, ids),
        ("category", {r[1] for r in rows}, set(names)),
    ):
        if used - known:
            raise UsageError(
                f"{what}: boxes name {len(used - known)} {kind} ids that the file does not list, "
                f"the first is {min(used - known)}"
            )
    found = found if limit is None else found[:limit]
    wanted = {p.id for p in found}
    index = _match(names, {r[1] for r in rows}, labels, what)
    truths = tuple(
        Truth(image, index[category], box, size, bool(note.get("iscrowd", 0)))
        for (image, category, box, note), size in zip(rows, sizes, strict=True)
        if image in wanted
    )
    # not Path.is_file: it raises for a name that is too long
    missing = [p.path for p in found if not os.path.isfile(p.path)]
    if missing:
        raise UsageError(
            f"{what}: {len(missing)} of {len(found)} pictures are not in {printable(folder)}, the first is "
            f"{printable(missing[0].name)[:80]}. Give their folder with --images"
        )
    return CocoSet(
        printable(f"{instances.parent.name}/{instances.name}" if instances.parent.name else instances.name),
        labels or tuple(names[i] for i in sorted(names)),
        tuple(found),
        truths,
        _digest(found, truths),
    )


def _picture(entry: Any, folder: Path, what: str) -> Picture:
    path = folder / _safe(str(entry["file_name"]), what)
    picture = Picture(int(entry["id"]), path, int(entry["width"]), int(entry["height"]))
    if picture.width < 1 or picture.height < 1:
        raise ValueError(f"picture {picture.id} of {picture.width}x{picture.height} pixels")
    return picture


def _reason(error: Exception) -> str:
    text = str(error)[:120]
    if isinstance(error, KeyError):
        return f"key {text} is missing"
    return f"a value is of the wrong kind ({text})" if isinstance(error, TypeError) else text


def _read(path: Path, what: str) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{what}: not a file, expected COCO json")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UsageError(f"{what}: larger than {MAX_JSON_BYTES >> 20} MiB")
        return json.loads(path.read_text(encoding="utf-8-sig"))
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
    if not all(map(math.isfinite, (x, y, w, h))) or w < 0 or h < 0:
        raise ValueError(f"a bbox of {x:g}, {y:g}, {w:g}, {h:g}, expected finite x y width height")
    return x, y, w, h


def _area(note: Any, box: tuple[float, float, float, float]) -> float:
    """Of the object's outline where the file has one: it decides between small, medium and large."""
    area = float(note.get("area", box[2] * box[3]))
    if not (math.isfinite(area) and area >= 0):
        raise ValueError(f"an area of {area:g}")
    return area


def _match(names: dict[int, str], used: set[int], labels: tuple[str, ...], what: str) -> dict[int, int]:
    """Category id -> class index of the model. Categories without a box need no class."""
    ordered = sorted(names)
    if not labels:
        return {category: i for i, category in enumerate(ordered)}
    position = {_plain(label): i for i, label in enumerate(labels)}
    unknown = [names[c] for c in ordered if c in used and _plain(names[c]) not in position]
    if not unknown:
        return {c: position[_plain(names[c])] for c in ordered if _plain(names[c]) in position}
    # only names that say nothing may be matched by order: two lists of one length prove nothing
    if len(ordered) == len(labels) and (_say_nothing(labels) or _say_nothing(tuple(names.values()))):
        return {category: i for i, category in enumerate(ordered)}
    close = difflib.get_close_matches(_plain(unknown[0]), position, n=1)
    some = ", ".join(repr(printable(label)[:40]) for label in labels[:3])
    rest = ", ..." if len(labels) > 3 else ""
    hint = f"Did you mean {close[0]!r}?" if close else f"The model has {some}{rest}."
    raise UsageError(
        f"{what}: category {unknown[0][:60]!r} is not a class of the model ({len(ordered)} categories, "
        f"{len(labels)} classes). {hint} Give the model's names with --classes"
    )


def _say_nothing(names: tuple[str, ...]) -> bool:
    """Placeholders: class_0, label 1, 2, ..."""
    return all(re.fullmatch(r"(class|cls|label|category|object|id)?[ _-]?[0-9]+", n.lower()) for n in names)


def _plain(name: str) -> str:
    """Spelling that does not matter: case, `_` for a space, darknet's names of six COCO classes."""
    name = name.strip().lower().replace("_", " ")
    return COCO_ALIASES.get(name, name)


def _digest(pictures: list[Picture], truths: tuple[Truth, ...]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.id} {picture.width} {picture.height} ".encode())
        try:
            digest.update(hashlib.sha256(picture.path.read_bytes()).digest())
        except OSError as error:
            raise UsageError(f"picture {printable(picture.path)}: {error.strerror}. Check the file") from None
    for truth in truths:
        digest.update(repr(truth).encode())
    return digest.hexdigest()
