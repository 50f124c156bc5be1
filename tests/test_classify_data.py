"""Labelled pictures of a classifier in all their forms, and the crop that its pictures go through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.letterbox import LetterboxPlan, letterbox
from edgekit.kernels.letterbox import reference as kernel
from edgekit.pixels import PixelLayout
from edgekit.tasks.classify.dataset import ClassSet, class_names, read_set
from edgekit.tasks.preprocess import ImagePreprocess, place
from tests.classifiers import COLORS, folder_per_class, pictures

IMAGES, CLASSES = pictures(9)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The same nine pictures as a folder per class, .csv, .jsonl and .npz."""
    folder_per_class(tmp_path / "val", IMAGES, CLASSES)
    files = [f"{COLORS[c]}/{i:04d}.png" for i, c in enumerate(CLASSES)]
    rows = list(zip(files, CLASSES.tolist(), strict=True))
    (tmp_path / "plain.csv").write_text("".join(f"val/{f},{COLORS[c]}\n" for f, c in rows))
    (tmp_path / "head.csv").write_text(
        "split,label,file\r\n" + "".join(f'x,{c},"{f}"\r\n' for f, c in rows), encoding="utf-8-sig"
    )
    lines = [json.dumps({"file": f, "label": COLORS[c]}) for f, c in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=CLASSES.astype(np.uint8))
    np.savez_compressed(
        tmp_path / "k.npz",
        x_test=IMAGES,
        y_test=CLASSES[:, None],
        x_train=IMAGES[:1],
        classes=np.array(COLORS),
    )
    return tmp_path


FORMS = [
    ("val", None),
    ("plain.csv", None),
    ("head.csv", "val"),
    ("rows.jsonl", "val"),
    ("a.npz", None),
    ("k.npz", None),
]


@pytest.mark.parametrize(("name", "images"), FORMS)
def test_every_form_gives_the_same_pictures_and_classes(root: Path, name: str, images: str | None) -> None:
    folder = root / images if images else None
    data = read_set(root / name, folder, labels=COLORS)
    assert data.labels == COLORS and data.name.endswith(name) and len(data.images) == 9
    # a folder per class gives the classes in turn, in the order of the folders' names
    order = [2, 1, 0, 5, 4, 3, 8, 7, 6] if name == "val" else list(range(9))
    assert classes(data) == CLASSES[order].tolist()
    for i, row in enumerate(order):
        got = data.read(i)
        assert np.array_equal(got, IMAGES[row][:, :, ::-1]) and got.flags.c_contiguous
    part = read_set(root / name, folder, limit=4, labels=COLORS)
    assert classes(part) == classes(data)[:4]


def test_a_limit_takes_from_the_classes_in_turn(root: Path) -> None:
    assert sorted(i.cls for i in read_set(root / "val", None, limit=3, labels=COLORS).images) == [0, 1, 2]


def test_the_digest_is_of_classes_and_pixels(root: Path) -> None:
    first = read_set(root / "val", None, labels=COLORS)
    assert (
        read_set(root / "head.csv", root / "val").digest
        == read_set(root / "rows.jsonl", root / "val", labels=COLORS).digest
    )
    assert read_set(root / "val", None, labels=COLORS[::-1]).digest != first.digest
    assert read_set(root / "val", None, limit=8, labels=COLORS).digest != first.digest
    (root / "val" / "red" / "0000.png").write_bytes((root / "val" / "red" / "0003.png").read_bytes())
    assert read_set(root / "val", None, labels=COLORS).digest != first.digest


# --- whose numbers -------------------------------------------------------------------------------


def classes(data: ClassSet) -> list[int]:
    return [item.cls for item in data.images]


def test_names_are_matched_by_name(root: Path) -> None:
    labels = ("Blue", "none", "GREEN", "red")
    assert classes(read_set(root / "val", None, labels=labels)) == [0, 2, 3] * 3
    for name in ("plain.csv", "k.npz"):
        assert classes(read_set(root / name, None, labels=labels)) == [3, 2, 0] * 3, name
    # numbers without names are the model's own
    assert classes(read_set(root / "a.npz", None, labels=labels)) == [0, 1, 2] * 3


def test_names_that_say_nothing_are_matched_by_order(root: Path) -> None:
    placeholders = ("class_0", "class_1", "class_2")
    assert classes(read_set(root / "val", None, labels=placeholders)) == [0, 1, 2] * 3
    # folders in alphabetical order: blue, green, red
    assert {p.path.parent.name: p.cls for p in read_set(root / "val", None, labels=placeholders).images if p.path} == {
        "blue": 0, "green": 1, "red": 2,
    }  # fmt: skip
    for i, color in enumerate(sorted(COLORS)):
        (root / "val" / color).rename(root / "val" / f"n0000000{i}")
    found = read_set(root / "val", None, labels=("tench", "goldfish", "shark")).images
    assert {p.path.parent.name: p.cls for p in found if p.path} == {f"n0000000{i}": i for i in range(3)}


def test_folders_named_by_number(root: Path) -> None:
    for number, color in zip((10, 2, 0), COLORS, strict=True):
        (root / "val" / color).rename(root / "val" / str(number))
    labels = tuple(f"name {i}" for i in range(11))
    assert sorted(set(classes(read_set(root / "val", None, labels=labels)))) == [0, 2, 10]


def test_class_names_of_a_set(root: Path) -> None:
    assert class_names(root / "val") == ("blue", "green", "red")
    assert class_names(root / "k.npz") == COLORS
    assert class_names(root / "a.npz") == class_names(root / "plain.csv") == ()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", "lists no pictures"),
        ("x.csv", "a.png\n", "line 1: expected 'file,label'"),
        ("x.csv", "a.png,red\nb.png,\n", "line 2: expected a file and a label"),
        ("x.csv", 'a.png,"red\n', "not CSV"),
        ("x.csv", "val/red/0000.png,crimson\n", "'crimson' is not a class of the model"),
        ("x.csv", "val/red/0000.png,3\n", "label 3: expected a class of the model, 0 to 2"),
        ("x.csv", "nowhere.png,red\n", "1 of 1 pictures are not there, the first is .*nowhere.png"),
        ("x.csv", b"\xff\xfe\x00", "not UTF-8"),
        ("x.jsonl", "{]\n", "line 1: not JSON"),
        ("x.jsonl", '{"file": "a"}\n', "line 1: expected"),
        ("x.jsonl", '{"file": "a", "label": true}\n', "line 1: expected"),
        ("x.jsonl", "[1]\n", "line 1: expected"),
        ("x.npz", "not a zip", "not an .npz file"),
        ("x.json", "{}", "not for a classifier, expected a folder with one folder per class"),
        ("absent.csv", None, "no such file or folder"),
    ],
)
def test_bad_files(root: Path, name: str, text: str | bytes | None, message: str) -> None:
    path = root / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message) as caught:
        read_set(path, None, labels=COLORS)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": IMAGES}, "no pictures in it, expected the arrays images and labels .*got pixels"),
        ({"images": IMAGES}, "holds pictures but no labels"),
        ({"images": IMAGES.astype(np.float32), "labels": CLASSES}, "expected uint8 .*got float32"),
        ({"images": IMAGES[..., 0], "labels": CLASSES}, r"got uint8 \[9, 16, 16\]"),
        ({"images": IMAGES[:0], "labels": CLASSES[:0]}, "got uint8"),
        ({"images": IMAGES, "labels": CLASSES[:4]}, r"expected 9 whole numbers, got int64 \[4\]"),
        ({"images": IMAGES, "labels": CLASSES / 2}, "whole numbers, got float64"),
        ({"images": IMAGES, "labels": CLASSES - 1}, "label -1"),
        ({"images": IMAGES, "labels": CLASSES + 1}, "label 3: expected a class of the model, 0 to 2"),
        (
            {"images": IMAGES, "labels": CLASSES, "classes": np.array(COLORS[:2])},
            "label 2: expected a class of its own names, 0 to 1",
        ),
        ({"images": IMAGES, "labels": CLASSES, "classes": np.array(["a", "a"])}, "different texts"),
        ({"images": IMAGES, "labels": CLASSES, "classes": np.array(["a", "b", "c"])}, "'a' is not a class"),
        ({"images": np.array([object()]), "labels": CLASSES}, "array images: damaged"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        read_set(tmp_path / "x.npz", None, labels=COLORS)


def test_an_array_that_lies_about_its_size_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.tasks.classify import dataset

    np.savez_compressed(tmp_path / "x.npz", images=IMAGES, labels=CLASSES)
    monkeypatch.setattr(dataset, "MAX_ARRAY_BYTES", 1 << 10)
    with pytest.raises(UsageError, match="expected at most"):
        read_set(tmp_path / "x.npz", None, labels=COLORS)


def test_a_folder_without_class_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one folder of pictures per class"):
        read_set(tmp_path, None)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="lists no pictures"):
        read_set(tmp_path, None)


# --- the crop --------------------------------------------------------------------------------------


def by_hand(image: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """torchvision's Resize(side) and CenterCrop(size), on cv2's bilinear resize; RGB, uint8."""
    height, width = image.shape[:2]
    short = min(height, width)
    w, h = int(width * side / short), int(height * side / short)
    resized = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
    left, top = round((w - size[0]) / 2.0), round((h - size[1]) / 2.0)
    return resized[top : top + size[1], left : left + size[0], ::-1]


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    more=st.integers(0, 20), seed=st.integers(0, 9),
)  # fmt: skip
def test_crop_is_resize_and_centre_crop(
    height: int, width: int, size: tuple[int, int], more: int, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    side = max(size) + more
    spec = ImagePreprocess(*size, resize="crop", shorter_side=side, color="rgb")
    out = np.full((1, 3, size[1], size[0]), np.nan, np.float32)
    letterbox(image, spec, out)
    want = by_hand(image, size, side)
    assert np.abs(out[0].transpose(1, 2, 0) - want).max() <= 1
    plan = LetterboxPlan(spec, PixelLayout("bgr", width, height))
    again = np.full_like(out, np.nan)
    kernel.letterbox(image, plan._tables, plan.placement, again, False)
    np.testing.assert_array_equal(again, out)


def test_a_crop_without_a_side_just_fills_the_input() -> None:
    spec = ImagePreprocess(20, 10, resize="crop")
    for size in ((100, 100), (40, 10), (7, 3), (1, 50)):
        p = place(spec, *size)
        assert p.width >= 20 and p.height >= 10 and (p.width == 20 or p.height == 10)
        assert -p.left in (p.width - 20) // 2 + np.arange(2) and -p.top in (p.height - 10) // 2 + np.arange(2)
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    out = np.full((1, 10, 20, 3), np.nan, np.float32)
    letterbox(image, ImagePreprocess(20, 10, resize="crop", layout="NHWC"), out)
    assert np.isfinite(out).all()


def test_a_side_that_does_not_fill_the_input_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter_side 20 must be between"):
        ImagePreprocess(24, 8, resize="crop", shorter_side=20)
    with pytest.raises(ValueError, match="goes with resize 'crop'"):
        ImagePreprocess(24, 8, resize="stretch", shorter_side=32)
