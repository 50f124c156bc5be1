"""Results with boxes in space for the tests of sinks: of a synthetic rig, whole and with sensors missing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from edgekit.pixels import Pixels
from edgekit.rig import RigFrame, mosaic
from edgekit.runtime.frames import Frame
from edgekit.runtime.results import StreamResult
from edgekit.synth.street_rig import RigWorld
from edgekit.tasks.fusion.boxes import Boxes3D, no_boxes

START_NS = 5_000_000_000_000


@cache
def _moment() -> RigFrame:
    return RigWorld(7, width=128, height=72).frame(3)


def boxes(rig: RigFrame, missing: tuple[str, ...] = ()) -> Boxes3D:
    """The moment's own labels as a result, one without a velocity, and one more that is nowhere."""
    assert rig.truth is not None
    found = rig.truth.boxes.copy()
    found[1, 7:9] = np.nan
    nowhere = np.full((1, 9), np.nan, np.float32)
    n = len(found)
    return Boxes3D(
        np.concatenate([found, nowhere]),
        np.linspace(0.9, 0.3, n + 1).astype(np.float32),
        np.append(rig.truth.classes, 0).astype(np.int32),
        rig.truth.names,
        missing,
        rig.taken_ns,
    )


def rig_items(camera: str = "rig") -> list[StreamResult]:
    """Three moments: whole; with nothing found; without CAM_FRONT and LiDAR."""
    whole = _moment()
    few = {name: shot for name, shot in whole.shots.items() if name != "CAM_FRONT"}
    blind = replace(whole, points=None, rings=None, shots=few)
    items = []
    for i, rig in enumerate((whole, whole, blind)):
        at = START_NS + i * 100_000_000
        rig = rig.shifted(at - rig.taken_ns)
        result = (
            no_boxes(whole.truth.names, (), at) if i == 1 else boxes(rig, ("CAM_FRONT", "lidar") if i else ())
        )  # type: ignore[union-attr]
        frame = Frame(
            Pixels.bgr(mosaic(rig)), i, at, at + 6_000_000, "synthetic://street-rig", clock="monotonic",
            camera=camera, rig=rig,
        )  # fmt: skip
        stages = {"transport": 6_000_000, "engine": 30_000_000}
        items.append(StreamResult(frame, result, 40_000_000, stages, "bev"))
    return items
