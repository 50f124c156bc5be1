"""What a page shows of a rig: all cameras and the view from above in one picture, and the boxes as lines over it.

Boxes are not in the picture: the page draws them, so that it can also leave them out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgekit.rig import RigFrame
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.live.picture import MAX_BOXES, color_of
from edgekit.runtime.sinks.rigs import clipped, lines_above, lines_in, outline_in, shown

Array = np.ndarray

TILE = 340
"""Pixels of a camera's width."""
REACH_M = 50.0
"""How far the view from above goes."""

NAMED = 26.0
"""Pixels of height from which on a box has its name on the picture."""


@dataclass(frozen=True)
class Tile:
    """A camera's place in the picture: left, top, and pixels there per pixel of the camera, across and down."""

    left: int
    top: int
    scale: tuple[float, float]

    def placed(self, lines: Array) -> Array:
        """Lines or a rectangle, [..., 4] x1 y1 x2 y2, of the camera's picture in the composed one."""
        result: Array = lines * np.array(self.scale * 2) + np.array([self.left, self.top] * 2)
        return result


@dataclass(frozen=True)
class Composed:
    """canvas: uint8 [H, W, 3] BGR.  tiles: by camera.  above: left and size of the view from above, which starts at the top."""

    canvas: Array
    tiles: dict[str, Tile]
    above: tuple[int, int]


def compose(rig: RigFrame) -> Composed:
    """The sensors of a moment, without boxes. Raises: MissingExtraError without OpenCV."""
    from edgekit.tasks.fusion.draw import bird_view, camera_view

    rig = replace(rig, truth=None)
    cameras = rig.rig.cameras
    grid = _rows(list(cameras))
    views = {name: camera_view(rig, name, width=TILE, points=False) for name in cameras}
    tall = max((view.shape[0] for view in views.values()), default=0)
    size = max(tall * len(grid), TILE)
    left = TILE * max(map(len, grid), default=0)
    canvas = np.full((size, left + size, 3), 24, np.uint8)
    tiles = {}
    for row, names in enumerate(grid):
        for column, name in enumerate(names):
            view = views[name]
            tile = tiles[name] = Tile(
                column * TILE, row * tall, (TILE / cameras[name].width, view.shape[0] / cameras[name].height)
            )  # fmt: skip
            canvas[tile.top : tile.top + view.shape[0], tile.left : tile.left + TILE] = view
    canvas[:size, left:] = bird_view(rig, size=size, reach_m=REACH_M)
    return Composed(canvas, tiles, (left, size))


def _rows(names: list[str]) -> list[list[str]]:
    """In pairs, ahead and back first, then left beside right; so that the view from above beside them is large."""
    order = ("FRONT", "BACK", "FRONT_LEFT", "FRONT_RIGHT", "BACK_LEFT", "BACK_RIGHT")
    known = {name.upper().removeprefix("CAM_"): name for name in names}
    if len(known) == len(names) and set(known) <= set(order):
        names = [known[key] for key in order if key in known]
    wide = 2 if len(names) > 2 else 1
    return [names[i : i + wide] for i in range(0, len(names), wide)]


def describe(item: StreamResult, rig: RigFrame, place: Composed) -> dict[str, Any]:
    """As picture.describe, with each thing's `lines`, [x1, y1, x2, y2, ...] in pixels of the composed picture, and `at`,
    where its name goes: where it is largest on a camera's picture. missing, notes: of the result."""
    things = []
    for each in shown(item.result)[:MAX_BOXES]:
        parts, at, most = [_above(rig, each.box, place)], None, NAMED
        for name, tile in place.tiles.items():
            lines = lines_in(rig, name, each.box)
            if not len(lines):
                continue
            parts.append(tile.placed(lines))
            around = tile.placed(outline_in(rig, name, each.box))
            if around[3] - around[1] > most:
                most, at = float(around[3] - around[1]), [round(float(v), 1) for v in around]
        lines = np.concatenate(parts)
        things.append(
            {
                "label": each.label[:60],
                "score": round(each.score, 4),
                "color": color_of(each.cls),
                "box": None,
                "lines": [round(v, 1) for v in lines.reshape(-1).tolist()],
                "at": at,
            }
        )
    height, width = place.canvas.shape[:2]
    return {
        "camera": item.camera,
        "engine": item.engine,
        "seq": item.frame.seq,
        "width": width,
        "height": height,
        "age_ms": round(item.age_ms, 2),
        "task": item.result.task,
        "caption": item.result.caption(),
        "found": things,
        "missing": [str(name)[:60] for name in item.result.missing],
        "notes": [str(note)[:200] for note in getattr(item.result, "notes", ())],
    }


def _above(rig: RigFrame, box: Array, place: Composed) -> Array:
    """A box in the view from above: the ego's x is up, its y left."""
    left, size = place.above
    scale = size / (2 * REACH_M)
    metres = lines_above(rig, box)
    lines = np.stack([size / 2 - metres[:, i] * scale for i in (1, 0, 3, 2)], 1)
    result: Array = clipped(lines, size, size) + np.array([left, 0, left, 0])
    return result
