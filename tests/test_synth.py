"""The procedural street: the same frame every time, boxes that fit the pixels."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import OutputError, UsageError
from edgekit.synth import objects, vehicles
from edgekit.synth.coco import export_coco
from edgekit.synth.mesh import MeshBuilder
from edgekit.synth.raster import covered, paint, paint_rising, spans
from edgekit.synth.scene import Thing, stream
from edgekit.synth.street import CLASSES, MIN_LONG_SIDE, MIN_SHORT_SIDE, MIN_VISIBILITY, StreetWorld


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("image", "boxes", "classes", "visibility")
    )


@pytest.mark.parametrize("seed", [0, 3, 12])
def test_frames_do_not_depend_on_the_order_asked(seed):
    forward, backward = StreetWorld(seed), StreetWorld(seed)
    asked = [4, 900, 31]
    first = {i: forward.frame(i) for i in asked}
    second = {i: backward.frame(i) for i in reversed(asked)}
    assert all(same(first[i], second[i]) for i in asked)
    assert same(forward.frame(4), first[4])
    assert not np.array_equal(first[4].image, first[31].image)


def test_seeds_are_different_streets():
    pictures = [StreetWorld(seed, 320, 180).frame(10).image for seed in range(6)]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a.astype(int) - b.astype(int)).mean() > 5


def test_frame_contract():
    seen = np.zeros(len(CLASSES), int)
    for seed in [*range(9), 2**63 - 1]:
        world = StreetWorld(seed)
        for index in (0, 250):
            frame = world.frame(index)
            n = len(frame.boxes)
            assert frame.image.shape == (360, 640, 3)
            assert frame.image.dtype == np.uint8
            assert frame.boxes.shape == (n, 4)
            assert (frame.boxes.dtype, frame.classes.dtype, frame.visibility.dtype) == (
                np.float32,
                np.int32,
                np.float32,
            )
            assert frame.classes.shape == frame.visibility.shape == (n,)
            assert frame.pts_ns == round(index / 30 * 1e9)
            assert (frame.boxes[:, :2] >= 0).all()
            assert (frame.boxes[:, 2:] <= (640, 360)).all()
            sides = frame.boxes[:, 2:] - frame.boxes[:, :2]
            assert (sides.min(1, initial=1e9) >= MIN_SHORT_SIDE).all()
            assert (sides.max(1, initial=0) >= MIN_LONG_SIDE).all() or n == 0
            assert ((frame.visibility >= MIN_VISIBILITY) & (frame.visibility <= 1)).all()
            seen += np.bincount(frame.classes, minlength=len(CLASSES))
    assert (seen > 2).all(), dict(zip(CLASSES, seen, strict=True))


def only(world, *things):
    """The world with nothing in it but `things`, without lens blur (it spreads edges by a pixel)."""
    world.street.things = lambda t: iter(things)
    world.look = dataclasses.replace(world.look, blur=False)
    return world


def extent(a, b):
    """Tight box of the pixels in which two pictures differ."""
    y, x = np.nonzero((a != b).any(-1))
    return [x.min(), y.min(), x.max() + 1, y.max() + 1], len(x)


def at(world, mesh, ahead, y, z, label):
    x = world.street.position(0) + ahead
    return Thing(mesh, x, y, z, x, label)


@pytest.mark.parametrize("seed", [1, 6, 10])
def test_box_is_the_extent_of_the_pixels(seed):
    world = StreetWorld(seed, time="day", rain=0, fog=0)
    sign = at(world, objects.sign(stream(seed, 5)), 9.0, 1.0, 1.9, objects.SIGN)
    empty = at(world, objects.pole(0.01), 160.0, 0.0, 0.0, -1)
    without = only(world, empty).frame(0)
    frame = only(world, empty, sign).frame(0)
    assert len(without.boxes) == 0
    box, count = extent(frame.image, without.image)
    assert frame.boxes.tolist() == [box]
    assert frame.visibility.tolist() == [1.0]
    assert count > 100
    # and where the pinhole camera puts the plate
    low, high = sign.mesh.corners[..., 1].min(), sign.mesh.corners[..., 1].max()
    middle = (box[0] + box[2]) / 2
    expected = 320 - world.focal * (1.0 + (low + high) / 2) / 9.0
    assert abs(middle - expected) < 1.5
    assert abs((box[2] - box[0]) - world.focal * (high - low) / 9.0) <= 1


def test_hidden_parts_are_outside_the_box_and_counted():
    world = StreetWorld(2, time="day", rain=0, fog=0)
    near = at(world, vehicles.truck(stream(2, 6), 0), 12.0, -0.6, 0.0, objects.TRUCK)
    rear, _, _, left = near.mesh.footprint
    edge = (left - 0.6) * 20.0 / (12.0 + rear)  # where the truck's left edge falls, 20 m away
    far = at(world, objects.sign(stream(2, 5)), 20.0, edge + 0.1, 1.7, objects.SIGN)
    alone = only(world, far).frame(0)
    truck = only(world, near).frame(0)
    both = only(world, far, near).frame(0)
    shown, pixels = extent(both.image, truck.image)
    assert both.classes.tolist() == [objects.SIGN, objects.TRUCK]
    assert both.boxes[0].tolist() == shown
    whole = alone.boxes[0]
    assert (shown[2] - shown[0]) < (whole[2] - whole[0])
    empty = only(world, at(world, objects.pole(0.01), 160.0, 0.0, 0.0, -1)).frame(0)
    _, all_pixels = extent(alone.image, empty.image)
    assert both.visibility[0] == pytest.approx(pixels / all_pixels, abs=0.02)
    assert 0.25 <= both.visibility[0] < 0.95


@pytest.mark.parametrize(("part", "labelled"), [(0.18, False), (0.32, True)])
def test_mostly_hidden_things_are_not_labelled(part, labelled):
    """A square plate, 0.8 m, of which only `part` sticks out to the left of a truck."""
    world = StreetWorld(2, time="day", rain=0, fog=0)
    near = at(world, vehicles.truck(stream(2, 6), 0), 8.0, -0.6, 0.0, objects.TRUCK)
    rear, _, _, left = near.mesh.footprint
    edge = (left - 0.6) * 12.0 / (8.0 + rear)
    plate = MeshBuilder()
    plate.rect(0, 0.0, (-0.4, -0.4), (0.4, 0.4), (200, 40, 40))
    far = at(world, plate.build(), 12.0, edge - 0.4 + 0.8 * part, 1.6, objects.SIGN)
    frame = only(world, far, near).frame(0)
    assert frame.classes.tolist() == ([objects.SIGN] if labelled else []) + [objects.TRUCK]
    if labelled:
        assert frame.visibility[0] == pytest.approx(part, abs=0.04)


def test_things_persist_and_move():
    world = StreetWorld(11)
    assert world.street.speed > 0
    kept, moved, total = 0, 0, 0
    before = world.frame(100)
    for index in range(101, 106):
        now = world.frame(index)
        for box, kind in zip(before.boxes, before.classes, strict=True):
            low = np.maximum(now.boxes[:, :2], box[:2])
            high = np.minimum(now.boxes[:, 2:], box[2:])
            inter = np.prod(np.maximum(high - low, 0), 1)
            area = np.prod(now.boxes[:, 2:] - now.boxes[:, :2], 1) + np.prod(box[2:] - box[:2])
            overlap = (inter / (area - inter)) * (now.classes == kind)
            total += 1
            kept += overlap.max(initial=0) > 0.5
            moved += 0.5 < overlap.max(initial=0) < 1
        before = now
    assert total > 10
    assert kept > 0.85 * total
    assert moved > 0.3 * total


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"seed": -1}, "street seed -1"), ({"seed": 2**63}, "seed"), ({"width": 10}, "street size 10x360")],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(UsageError, match=text):
        StreetWorld(**arguments)


def test_wrong_frame_number():
    with pytest.raises(UsageError, match="street frame -1"):
        StreetWorld(0).frame(-1)


def test_hour_and_weather_can_be_chosen():
    bright = StreetWorld(4, time="day", rain=0, fog=0)
    dark = StreetWorld(4, time="night", rain=1, fog=0)
    assert bright.street.position(3.0) == dark.street.position(3.0)
    assert dark.frame(30).image.mean() < 0.6 * bright.frame(30).image.mean()


def test_other_sizes():
    small, large = StreetWorld(5, 320, 180).frame(60), StreetWorld(5, 1280, 720).frame(60)
    assert small.image.shape == (180, 320, 3)
    assert large.image.shape == (720, 1280, 3)
    assert abs(len(small.boxes) - len(large.boxes)) <= 3


def test_needs_numpy_only():
    code = (
        "import sys\nfrom edgekit.synth.street import StreetWorld\nStreetWorld(0).frame(0)\n"
        "print([m for m in ('cv2', 'torch', 'onnx', 'PIL', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_export_coco(tmp_path):
    import cv2

    path = export_coco(tmp_path / "a", [10_000, 10_001], [5, 95])
    again = export_coco(tmp_path / "b", [10_000, 10_001], [5, 95])
    assert path.read_bytes() == again.read_bytes()
    data = json.loads(path.read_text())
    assert data["images"][0]["file_name"] == "010000_000005.png"
    assert [entry["name"] for entry in data["categories"]] == list(CLASSES)
    frame = StreetWorld(10_001).frame(95)
    entry = data["images"][3]
    assert np.array_equal(cv2.imread(str(tmp_path / "a" / entry["file_name"])), frame.image)
    mine = [a for a in data["annotations"] if a["image_id"] == entry["id"]]
    boxes = np.array([a["bbox"] for a in mine])
    boxes[:, 2:] += boxes[:, :2]
    assert np.array_equal(boxes, frame.boxes)
    assert [a["category_id"] - 1 for a in mine] == frame.classes.tolist()


def test_export_coco_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        export_coco(tmp_path / "file", [0], [0])


# --- rasteriser ---

coordinate = st.floats(-30, 60, width=32)


@st.composite
def convex(draw):
    """A convex quad: four points of an ellipse in order, with an affine turn."""
    angles = sorted(draw(st.lists(st.floats(0, 6.28), min_size=4, max_size=4)))
    cx, cy = draw(coordinate), draw(coordinate)
    rx, ry = draw(st.floats(0.2, 40)), draw(st.floats(0.2, 40))
    lean = draw(st.floats(-1, 1))
    return [(cx + rx * np.cos(a) + lean * ry * np.sin(a), cy + ry * np.sin(a)) for a in angles]


def inside(quad, width, height, slack):
    """Pixels whose centre is inside by more than `slack` pixels (cross products), by brute force."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    result = np.ones((height, width), bool)
    for a, b in zip(quad, np.roll(quad, -1, 0), strict=True):
        length = max(float(np.hypot(*(b - a))), 1e-9)
        if length < 1e-6:
            continue
        distance = ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])) / length
        result &= distance > slack
    return result


@settings(max_examples=150, deadline=None)
@given(convex())
def test_spans_hold_the_pixel_centres_inside(points):
    quad = np.array(points, np.float32)
    width, height = 37, 29
    number, row, start, stop = spans(quad[None], width, height)
    assert (number == 0).all()
    mask = np.zeros((height, width), bool)
    for at_row, a, b in zip(row, start, stop, strict=True):
        assert 0 <= a < b <= width
        mask[at_row, a:b] = True
    area = 0.5 * abs(
        np.dot(quad[:, 0], np.roll(quad[:, 1], -1)) - np.dot(quad[:, 1], np.roll(quad[:, 0], -1))
    )
    if area > 0.5:
        assert (mask | ~inside(quad.astype(float), width, height, 0.01)).all()
        assert (~mask | inside(quad.astype(float), width, height, -0.01)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(convex(), min_size=1, max_size=12))
def test_scattered_painting_equals_painting_in_order(quads):
    table = np.array(quads, np.float32)
    number, row, start, stop = spans(table * 3, 120, 90)
    a, b = np.zeros((90, 120), np.uint16), np.zeros((90, 120), np.uint16)
    paint(a, row, start, stop, number + 1)
    paint_rising(b, row, start, stop, number + 1)
    assert np.array_equal(a, b)
    assert covered(row, start, stop) == np.count_nonzero(a)
