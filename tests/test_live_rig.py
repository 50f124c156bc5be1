"""The live page of a rig: one picture of all sensors, boxes as lines over it, and what was missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import cv2
import numpy as np
import pytest

from edgekit.rig import Rig, RigFrame
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.sinks.live import LiveSink
from edgekit.runtime.sinks.live.rig_picture import TILE, compose, describe
from tests.rig_items import rig_items
from tests.test_live import page


@pytest.fixture
def sink() -> Iterator[LiveSink]:
    with LiveSink(":0") as sink:
        sink.start(Metrics())
        yield sink


def test_a_page_gets_sensors_boxes_and_what_is_missing(sink):
    with page(sink) as reader:
        reader.next("state")
        whole, _, blind = rig_items()
        sink.write(whole)
        message, jpeg = reader.next("picture")
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape[:2] == (message["height"], message["width"])
        assert (message["task"], message["missing"], message["notes"]) == ("fusion", [], [])
        assert len(message["found"]) == len(whole.result) - 1, "what is nowhere cannot be shown"
        for thing in message["found"]:
            ends = np.array(thing["lines"]).reshape(-1, 4)
            assert len(ends) >= 1
            assert (ends >= 0).all()
            assert (ends[:, [0, 2]] <= message["width"]).all()
            assert (ends[:, [1, 3]] <= message["height"]).all()
        assert any(thing["at"] for thing in message["found"])
        sink._due.clear()
        sink.write(blind)
        message, _ = reader.next("picture")
        assert message["missing"] == ["CAM_FRONT", "lidar"]
        assert "without CAM_FRONT, lidar" in message["caption"]


def test_boxes_lie_where_their_points_are():
    """Every labelled box is drawn where the rig projects its centre, in the view from above and on the pictures."""
    item = rig_items()[0]
    rig = item.frame.rig
    place = compose(rig)
    values = describe(item, rig, place)
    left, size = place.above
    to_ego = rig.rig.lidar.to_ego
    names = 0
    for thing, box in zip(values["found"], item.result.boxes[:-1], strict=True):
        ends = np.array(thing["lines"]).reshape(-1, 2)
        ego = to_ego[:3, :3] @ box[:3] + to_ego[:3, 3]
        spot = np.array([left + size / 2 - ego[1] * size / 100, size / 2 - ego[0] * size / 100])
        if (spot > (left, 0)).all() and (spot < (left + size, size)).all():
            above = ends[ends[:, 0] > left]
            assert np.abs(above - spot).max() < 0.75 * np.hypot(*box[3:5]) * size / 100 + 1
        if thing["at"] is not None:
            x1, y1, x2, y2 = thing["at"]
            middle = np.array([(x1 + x2) / 2, (y1 + y2) / 2])
            for name, tile in place.tiles.items():
                low, high = tile.placed(np.array([0, 0, 128, 72.0])).reshape(2, 2)
                if not ((low + 1 < (x1, y1)).all() and ((x2, y2) < high - 1).all()):
                    continue  # in another camera, or cut at the edge
                uv, _ = rig.project(name, box[None, :3])
                assert (
                    np.abs(tile.placed(np.tile(uv[0], 2))[:2] - middle).max() < 0.2 * (x2 - x1 + y2 - y1) + 2
                )
                names += 1
    assert names > 3


def test_the_picture_shows_the_cameras_as_they_are():
    rig = rig_items()[0].frame.rig
    place = compose(rig)
    assert place.canvas.shape[1] == place.above[0] + place.above[1]
    for name, tile in place.tiles.items():
        image = cv2.resize(
            rig.shots[name].image, (TILE, round(72 * TILE / 128)), interpolation=cv2.INTER_AREA
        )
        shown = place.canvas[tile.top + 30 : tile.top + image.shape[0], tile.left : tile.left + TILE]
        assert np.array_equal(shown, image[30:])
    bare = compose(replace(rig, points=None, shots={}))
    assert bare.canvas.shape == place.canvas.shape
    assert bare.canvas.std() < 20


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_other_rigs_have_a_picture_too(count):
    rig = rig_items()[0].frame.rig
    few = dict(list(rig.rig.cameras.items())[:count])
    other = RigFrame(Rig("r", rig.rig.lidar, few), rig.taken_ns, rig.points, {})
    place = compose(other)
    assert len(place.tiles) == count
    values = describe(rig_items()[0], other, place)
    assert json.loads(json.dumps(values, allow_nan=False))["width"] == place.canvas.shape[1]


def test_a_moment_that_was_not_kept_is_told_of_all_the_same(sink):
    item = rig_items()[0]
    with page(sink) as reader:
        reader.next("state")
        sink.write(replace(item, frame=replace(item.frame, rig=None)))
        message, _ = reader.next("picture")
    assert message["task"] == "fusion"
    assert all(thing["box"] is None and "lines" not in thing for thing in message["found"])
    assert (message["width"], message["height"]) == (item.frame.width, item.frame.height)
