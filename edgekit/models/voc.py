"""Pascal VOC folders (Annotations/*.xml, ImageSets/Main/*.txt, JPEGImages) as COCO instances, which everything else reads.

python -m edgekit.models.voc FOLDER train OUT.json       # the pictures stay in FOLDER/JPEGImages
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from edgekit.archive import write_atomic
from edgekit.errors import EdgekitError, UsageError, printable


def instances(folder: Path, split: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """COCO instances of the pictures that ImageSets/Main/<split>.txt lists.

    Boxes are x, y, width, height from VOC's xmin, ymin, xmax, ymax, taken as edges; objects of no size are left out,
    difficult ones are crowds, which neither count nor are learned. names: the classes in order of id (from 1);
    otherwise those found in all of Annotations, sorted. Raises: UsageError.
    """
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        stems = [line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(
            f"split {printable(listed)}: cannot be read, {error.strerror}. Give a folder in the format of Pascal VOC"
        ) from None
    classes = list(names) or sorted(
        {o.findtext("name", "") for path in (folder / "Annotations").glob("*.xml") for o in _objects(path)[1]}
    )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, stem in enumerate(stems, 1):
        root, objects = _objects(folder / "Annotations" / f"{stem}.xml")
        name = root.findtext("filename") or f"{stem}.jpg"
        if not (folder / "JPEGImages" / name).is_file():
            name = f"{stem}.jpg"
        size = {key: int(root.findtext(f"size/{key}", "0")) for key in ("width", "height")}
        images.append({"id": number, "file_name": name, **size})
        for each in objects:
            x0, y0, x1, y1 = (
                float(each.findtext(f"bndbox/{k}", "0")) for k in ("xmin", "ymin", "xmax", "ymax")
            )
            kind = each.findtext("name", "")
            if kind not in classes:
                raise UsageError(
                    f"annotation {printable(stem)}: class {printable(kind)!r} is not one of {', '.join(classes)}"
                )
            if x1 <= x0 or y1 <= y0:
                continue
            box = [x0, y0, x1 - x0, y1 - y0]
            crowd = int(each.findtext("difficult", "0") == "1")
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": classes.index(kind) + 1,
                    "bbox": box, "area": box[2] * box[3], "iscrowd": crowd,
                }
            )  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _objects(path: Path) -> tuple[ElementTree.Element, list[ElementTree.Element]]:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UsageError(f"annotation {printable(path)}: cannot be read, {error}") from None
    return root, root.findall("object")


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if len(given) != 3:
        print("usage: python -m edgekit.models.voc FOLDER SPLIT OUT.json", file=sys.stderr)
        return 2
    try:
        made = instances(Path(given[0]), given[1])
        write_atomic(Path(given[2]), [json.dumps(made).encode()], "annotations")
    except EdgekitError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given[2]}: {len(made['images'])} pictures, {len(made['annotations'])} objects")
    return 0


if __name__ == "__main__":
    sys.exit(main())
