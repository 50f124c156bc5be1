"""Labelled pictures of a classifier: a folder per class, a table of files, or arrays.

    val/cat/1.jpg val/dog/2.jpg        a folder per class, as torchvision's ImageFolder
    labels.csv, labels.jsonl           a row `file,label` or {"file": ..., "label": ...} per picture; files
                                       are relative to --images, else to the table's own folder
    data.npz                           images uint8 [N, H, W, 3] RGB and labels [N] (whole numbers); or
                                       x_train, y_train, x_test, y_test (as Keras names them); and
                                       classes [C] (their names), if they are known

A label is a class name, or a number that counts from 0 in the network's order.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from edgekit.errors import UsageError, printable
from edgekit.picture import SUFFIXES, read_picture

MAX_TABLE_BYTES = 1 << 28
MAX_ARRAY_BYTES = 8 << 30
MAX_PICTURES = 1_000_000

Split = Literal["evaluation", "calibration", "training"]
_SPLITS: dict[Split, tuple[str, ...]] = {
    "evaluation": ("test", "val"),
    "calibration": ("train",),
    "training": ("train",),
}
_FILE_KEYS, _LABEL_KEYS = ("file", "file_name", "filename", "path", "image"), ("label", "class", "category")


@dataclass(frozen=True)
class Item:
    """One picture: a file, or the row `index` of the arrays. cls: its class, as the model counts."""

    cls: int
    path: Path | None = None
    index: int = 0


@dataclass(frozen=True)
class ClassSet:
    """Labelled pictures, classes as the model numbers them.

    digest: sha256 over the classes and the pictures' bytes, so that equal digests mean equal evaluations.
    """

    task: ClassVar[str] = "classify"

    name: str
    labels: tuple[str, ...]
    images: tuple[Item, ...]
    digest: str
    arrays: np.ndarray | None = field(default=None, repr=False, compare=False)
    """uint8 [N, H, W, 3] RGB, for a set out of an .npz file."""

    def read(self, index: int) -> np.ndarray:
        """Picture `index`, uint8 [H, W, 3] BGR. Raises: UsageError for a file that is no picture."""
        return _pixels(self.images[index], self.arrays)


@dataclass(frozen=True)
class _Found:
    """What a file or folder lists. `labels`: one per picture, None where it has none; `classes`: all
    class names that it knows, in its own order."""

    items: list[tuple[Path | None, int]]
    labels: list[int | str] | None
    classes: tuple[str, ...] = ()
    arrays: np.ndarray | None = None


def read_set(
    data: Path,
    images: Path | None,
    *,
    limit: int | None = None,
    labels: tuple[str, ...] = (),
    split: Split = "evaluation",
) -> ClassSet:
    """Read labelled pictures (see the module's text) and check that they are there.

    limit: only the first pictures; of a folder per class, taken from the classes in turn. labels: the
    model's class names, matched by name (case and `_` aside), or by order where one side's names say
    nothing (class_0, n01440764) and there are as many. Empty = the set's own names in order. split: which part
    of an .npz file.

    Raises: UsageError in one line for anything that cannot be read or does not fit the model.
    """
    what = f"labels {printable(data)}"
    if limit is not None and limit < 1:
        raise UsageError(f"{what}: limit {limit} gives no pictures, expected at least 1")
    found = _find(data, images, what, split)
    if found.labels is None:
        raise UsageError(f"{what}: holds pictures but no labels, expected the array labels or y_test")
    names = labels or found.classes
    classes = class_numbers(found.labels, found.classes, labels, what)
    items = tuple(
        Item(cls, path, index) for cls, (path, index) in zip(classes, found.items[:limit], strict=False)
    )
    if not names:
        names = tuple(f"class_{i}" for i in range(max(classes) + 1))
    missing = [i.path for i in items if i.path is not None and not os.path.isfile(i.path)]
    if missing:
        raise UsageError(
            f"{what}: {len(missing)} of {len(items)} pictures are not there, the first is "
            f"{printable(missing[0])[:120]}. Give their folder with --images"
        )
    name = printable(f"{data.parent.name}/{data.name}" if data.parent.name else data.name)
    return ClassSet(name, names, items, _digest(items, found.arrays), found.arrays)


def class_names(data: Path | str) -> tuple[str, ...]:
    """Class names that a set states in its own order: the folders' or the array `classes`; () where it has none.

    Raises: UsageError for a file that cannot be read.
    """
    path = Path(data)
    if os.path.isdir(path):
        return tuple(class_folders(path))
    if path.suffix.lower() == ".npz":
        with open_npz(path, f"labels {printable(path)}") as file:
            return class_array(file, f"labels {printable(path)}")
    return ()


def listed_files(data: Path, images: Path | None) -> list[Path]:
    """The picture files of a folder per class or of a table; labels do not matter. Raises: UsageError."""
    return [path for path, _ in _find(data, images, f"labels {printable(data)}", "calibration").items if path]


def arrays(data: Path, split: Split) -> np.ndarray:
    """The pictures of an .npz file, uint8 [N, H, W, 3] RGB, of its part for `split`. Raises: UsageError."""
    found = _find(data, None, f"pictures {printable(data)}", split).arrays
    assert found is not None, "an .npz file"
    return found


def _pixels(item: Item, arrays: np.ndarray | None) -> np.ndarray:
    if item.path is not None:
        return read_picture(item.path)
    assert arrays is not None, "an item without a file is a row of the arrays"
    return np.ascontiguousarray(arrays[item.index][:, :, ::-1])


def _find(data: Path, images: Path | None, what: str, split: Split) -> _Found:
    suffix = data.suffix.lower()
    if os.path.isdir(data):
        found = _read_folder(data, what)
    elif not os.path.exists(data):
        raise UsageError(f"{what}: no such file or folder")
    elif suffix == ".npz":
        found = _read_npz(data, what, split)
    elif suffix in (".csv", ".jsonl"):
        found = _read_table(data, images or data.parent, what)
    else:
        raise UsageError(
            f"{what}: not for a classifier, expected a folder with one folder per class, .csv, .jsonl or .npz, "
            f"got {suffix or 'a name without a suffix'}"
        )
    if not found.items:
        raise UsageError(f"{what}: lists no pictures")
    if len(found.items) > MAX_PICTURES:
        raise UsageError(f"{what}: {len(found.items)} pictures, expected at most {MAX_PICTURES}")
    return found


# --- a folder per class --------------------------------------------------------------------------


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted as torchvision sorts them; numbers by value."""
    try:
        names = [e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise UsageError(f"folder {printable(folder)}: {error.strerror}. Check the path") from None
    return sorted(names, key=int) if all(map(_is_index, names)) else sorted(names)


def _read_folder(folder: Path, what: str) -> _Found:
    names = class_folders(folder)
    if not names:
        raise UsageError(f"{what}: holds no folders, expected one folder of pictures per class")
    rows: list[tuple[int, int, Path]] = []
    for cls, name in enumerate(names):
        try:
            files = sorted(
                p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
            )
        except OSError as error:
            raise UsageError(f"{what}: {printable(name)}: {error.strerror}") from None
        rows += [(number, cls, path) for number, path in enumerate(files) if not path.name.startswith(".")]
    rows.sort()  # the classes in turn: the first n pictures are of all of them
    labels: list[int | str] = [names[cls] for _, cls, _ in rows]
    return _Found([(path, 0) for _, _, path in rows], labels, tuple(names))


# --- tables --------------------------------------------------------------------------------------


def _read_table(path: Path, folder: Path, what: str) -> _Found:
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise UsageError(f"{what}: larger than {MAX_TABLE_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{what}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{what}: not UTF-8 text") from None
    rows = _json_rows(text, what) if path.suffix.lower() == ".jsonl" else _csv_rows(text, what)
    items: list[tuple[Path | None, int]] = []
    labels: list[int | str] = []
    for line, file, label in rows:
        if not file or "\x00" in file or label == "":
            raise UsageError(f"{what}: line {line}: expected a file and a label")
        items.append((folder / file, 0))
        labels.append(label)
    if all(isinstance(label, int) or _is_index(label) for label in labels):
        labels = [int(label) for label in labels]
    else:
        labels = [str(label) for label in labels]
    return _Found(items, labels)


def _csv_rows(text: str, what: str) -> list[tuple[int, str, int | str]]:
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise UsageError(f"{what}: not CSV: {error}") from None
    file, label = 0, 1
    if rows:
        head = [cell.lower() for cell in rows[0][1]]
        columns = [next((head.index(k) for k in keys if k in head), -1) for keys in (_FILE_KEYS, _LABEL_KEYS)]
        if min(columns) >= 0:
            file, label = columns
            rows = rows[1:]
    short = next((line for line, row in rows if len(row) <= max(file, label)), None)
    if short is not None:
        raise UsageError(f"{what}: line {short}: expected 'file,label'")
    return [(line, row[file], row[label]) for line, row in rows]


def _json_rows(text: str, what: str) -> list[tuple[int, str, int | str]]:
    rows: list[tuple[int, str, int | str]] = []
    for line, entry in enumerate(text.splitlines(), 1):
        if not entry.strip():
            continue
        try:
            value = json.loads(entry)
        except (ValueError, RecursionError):
            raise UsageError(f"{what}: line {line}: not JSON") from None
        table = value if isinstance(value, dict) else {}
        file = next((table[k] for k in _FILE_KEYS if k in table), None)
        label = next((table[k] for k in _LABEL_KEYS if k in table), None)
        if not isinstance(file, str) or not isinstance(label, (int, str)) or isinstance(label, bool):
            raise UsageError(f'{what}: line {line}: expected {{"file": "a.jpg", "label": "cat"}}')
        rows.append((line, file, label))
    return rows


# --- arrays --------------------------------------------------------------------------------------


def open_npz(path: Path, what: str) -> Any:
    """An .npz file, to be closed. Raises: UsageError where it is none."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{what}: not an .npz file: {str(error).splitlines()[0][:120]}") from None


def split_of(names: Sequence[str], split: Split) -> tuple[str, str]:
    """Which arrays of an .npz file hold the pictures and labels for `split`; "" for what is not there."""
    for part in _SPLITS[split]:
        if f"x_{part}" in names:
            return f"x_{part}", f"y_{part}" if f"y_{part}" in names else ""
    return "images" if "images" in names else "", "labels" if "labels" in names else ""


def _read_npz(path: Path, what: str, split: Split) -> _Found:
    with open_npz(path, what) as file:
        x, y = split_of(file.files, split)
        if not x:
            some = ", ".join(printable(n)[:20] for n in file.files[:8]) or "nothing"
            raise UsageError(
                f"{what}: no pictures in it, expected the arrays images and labels (or x_test and y_test), got {some}"
            )
        images = read_array(path, file, x, what)
        labels = None if not y else read_array(path, file, y, what).reshape(-1)
        classes = class_array(file, what)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise UsageError(
            f"{what}: array {x}: expected uint8 [N, H, W, 3] in RGB order, got {images.dtype} {list(images.shape)}"
        )
    if labels is not None and (labels.dtype.kind not in "iu" or len(labels) != len(images)):
        raise UsageError(
            f"{what}: array {y}: expected {len(images)} whole numbers, got {labels.dtype} [{len(labels)}]"
        )
    items: list[tuple[Path | None, int]] = [(None, i) for i in range(len(images))]
    return _Found(items, None if labels is None else [int(v) for v in labels], classes, images)


def read_array(path: Path, file: Any, name: str, what: str) -> np.ndarray:
    """One array, its size looked at before it is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(f"{name}.npy").file_size
        if size > MAX_ARRAY_BYTES:
            raise UsageError(
                f"{what}: array {name}: {size >> 20} MiB, expected at most {MAX_ARRAY_BYTES >> 20}"
            )
        return np.asarray(file[name])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{what}: array {name}: damaged: {str(error).splitlines()[0][:120]}") from None


def class_array(file: Any, what: str, key: str = "classes") -> tuple[str, ...]:
    """The names in the array `key`; () where it is not there. Raises: UsageError."""
    if key not in file.files:
        return ()
    try:
        names = np.asarray(file[key])
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{what}: array {key}: {str(error).splitlines()[0][:120]}") from None
    if names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) != len(names):
        raise UsageError(f"{what}: array {key}: expected different texts, one per class")
    return tuple(names.tolist())


# --- classes ---------------------------------------------------------------------------------------


def class_numbers(
    given: Sequence[int | str], names: tuple[str, ...], labels: tuple[str, ...], what: str
) -> list[int]:
    """Class number of each picture, as the model counts. given: one label per picture; names: of the set's classes,
    in its order; labels: the model's. Raises: UsageError for a label that the model has not."""
    if given and isinstance(given[0], int):
        numbers = [int(v) for v in given]
        # an array file's numbers count its own names: the model may have them in another order
        whose, count = ("its own names", len(names)) if names else ("the model", len(labels) or MAX_PICTURES)
        wrong = next((v for v in numbers if not 0 <= v < count), None)
        if wrong is not None:
            raise UsageError(f"{what}: label {wrong}: expected a class of {whose}, 0 to {count - 1}")
        if labels and names:
            index = _by_name(names, labels, what)
            return [index[names[v]] for v in numbers]
        return numbers
    texts = [str(v) for v in given]
    own = names or tuple(sorted(set(texts)))
    index = _by_name(own, labels or own, what)
    return [index[text] for text in texts]


def _by_name(names: Sequence[str], labels: tuple[str, ...], what: str) -> dict[str, int]:
    """name -> class number of the model."""
    position = {_plain(label): i for i, label in enumerate(labels)}
    unknown = [name for name in names if _plain(name) not in position]
    if not unknown:
        return {name: position[_plain(name)] for name in names}
    if all(map(_is_index, names)) and max(map(int, names)) < len(labels):
        return {name: int(name) for name in names}
    # only names that say nothing may be matched by order: two lists of one length prove nothing
    if len(names) == len(labels) and (_say_nothing(labels) or _say_nothing(names)):
        return {name: i for i, name in enumerate(names)}
    close = difflib.get_close_matches(_plain(unknown[0]), position, n=1)
    some = ", ".join(repr(printable(label)[:40]) for label in labels[:3])
    hint = (
        f"Did you mean {close[0]!r}?"
        if close
        else f"The model has {some}{', ...' if len(labels) > 3 else ''}."
    )
    raise UsageError(
        f"{what}: {printable(unknown[0])[:60]!r} is not a class of the model ({len(names)} names, {len(labels)} "
        f"classes). {hint} Give the model's names with --classes"
    )


def _say_nothing(names: Sequence[str]) -> bool:
    """Placeholders (class_0, label 1, 2) and WordNet ids (n01440764)."""
    return all(
        re.fullmatch(r"((class|cls|label|category|id)?[ _-]?[0-9]+|n[0-9]{8})", n.lower()) for n in names
    )


def _plain(name: str) -> str:
    """Spelling that does not matter: case, `_` for a space."""
    return name.strip().lower().replace("_", " ")


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 7


def _digest(items: Sequence[Item], arrays: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.cls} ".encode())
        if item.path is None:
            assert arrays is not None
            picture = arrays[item.index]
            digest.update(f"{picture.shape} ".encode())
            digest.update(hashlib.sha256(np.ascontiguousarray(picture).tobytes()).digest())
            continue
        try:
            digest.update(hashlib.sha256(item.path.read_bytes()).digest())
        except OSError as error:
            raise UsageError(f"picture {printable(item.path)}: {error.strerror}. Check the file") from None
    return digest.hexdigest()
