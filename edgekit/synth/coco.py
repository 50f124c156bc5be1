"""Write street pictures with their boxes as a COCO data set."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import MissingExtraError, OutputError
from edgekit.synth.street import CLASSES, StreetWorld


def export_coco(
    folder: str | os.PathLike[str],
    seeds: Iterable[int],
    frames: Sequence[int],
    width: int = 640,
    height: int = 360,
) -> Path:
    """Draw frames number `frames` of every street in `seeds` into `folder`; returns `instances.json`.

    Pictures are lossless PNG files `<seed>_<frame>.png` beside `instances.json` (COCO "instances":
    category id = class index + 1, box = [x, y, width, height] in pixels; `visibility` is kept as an
    extra field). Same arguments, same files. The json is written last: a folder without it is
    incomplete. Needs OpenCV to write PNG (extra `camera`).
    Raises OutputError when a file cannot be written.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError("opencv", "camera", "write PNG pictures") from error
    root = Path(folder)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    try:
        root.mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            world = StreetWorld(seed, width, height)
            for index in frames:
                frame = world.frame(index)
                name = f"{seed:06d}_{index:06d}.png"
                done, data = cv2.imencode(".png", frame.image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
                assert done, "PNG encoding of an 8-bit picture cannot fail"
                (root / name).write_bytes(data.tobytes())
                number = len(images) + 1
                images.append({"id": number, "file_name": name, "width": width, "height": height})
                for box, kind, visibility in zip(
                    frame.boxes.tolist(), frame.classes.tolist(), frame.visibility.tolist(), strict=True
                ):
                    x0, y0, x1, y1 = box
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": number,
                            "category_id": kind + 1,
                            "bbox": [x0, y0, x1 - x0, y1 - y0],
                            "area": (x1 - x0) * (y1 - y0),
                            "iscrowd": 0,
                            "visibility": round(visibility, 4),
                        }
                    )
        path = root / "instances.json"
        part = root / "instances.json.part"
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        info = {"description": "procedural street pictures", "version": "1"}
        part.write_text(
            json.dumps({"info": info, "images": images, "annotations": annotations, "categories": categories})
        )
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"folder {root}: cannot be written, {error.strerror or error}. Choose another folder"
        ) from error
    return path
