"""The motion set: exact, the same every time, and unreadable from single frames."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.runtime.sources import open_source
from edgekit.synth import gestures
from edgekit.synth.gestures import CLIP, EVENT, GESTURES, STILL, GestureWorld, _stamp, clip, poses
from edgekit.synth.sprites import SIDE, load_pictures, mipmap, sprite, street_object
from tests.helpers import shared_data

PARTS = ("x", "y", "size", "angle")


def path(label, key, frames=CLIP):
    return poses(np.random.default_rng([label, key]), label, frames)


# --- what moves ---


@given(st.integers(0, len(GESTURES) - 1), st.integers(0, 10**6), st.integers(4, 20))
def test_each_class_moves_its_own_part_its_own_way(label, key, frames):
    p = path(label, key, frames)
    step = {name: np.diff(getattr(p, name)) for name in PARTS}
    moving = {name for name in PARTS if np.abs(step[name]).max() > 1e-9}
    name = GESTURES[label]
    wanted = {
        "still": set(), "left": {"x"}, "right": {"x"}, "up": {"y"}, "down": {"y"}, "zoom in": {"size"},
        "zoom out": {"size"}, "turn clockwise": {"angle"}, "turn counter-clockwise": {"angle"},
        "approach and recede": {"size"}, "recede and approach": {"size"}, "shake": {"x", "y"},
    }[name]  # fmt: skip
    assert moving == wanted
    one_way = {
        "left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1), "zoom in": ("size", 1),
        "zoom out": ("size", -1), "turn clockwise": ("angle", 1), "turn counter-clockwise": ("angle", -1),
    }  # fmt: skip
    if name in one_way:
        part, sign = one_way[name]
        assert (step[part] * sign > 0).all()
    if "recede" in name:
        sign = 1 if name.startswith("approach") else -1
        assert step["size"][0] * sign > 0 > step["size"][-1] * sign
        assert (
            np.count_nonzero(np.diff(np.sign(step["size"]))) <= 2
        )  # one turning point, perhaps between frames


def rank_distance(a, b):
    """Kolmogorov-Smirnov: the greatest distance between two empirical distribution functions."""
    values = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(v), values, "right") / len(v) for v in (a, b)]
    return np.abs(below[0] - below[1]).max()


def test_poses_in_single_frames_have_the_same_distribution_in_every_class():
    """One frame at random of each of n clips: x, y, size, angle and products of them, against `still`."""
    n = 3000
    pick = np.random.default_rng(5).integers(0, CLIP, (len(GESTURES), n))
    found = np.empty((len(GESTURES), 4, n))
    for label in range(len(GESTURES)):
        for key in range(n):
            p = path(label, key)
            found[label, :, key] = [getattr(p, name)[pick[label, key]] for name in PARTS]
    found[:, 3] %= 2 * np.pi
    # Smirnov: P(distance > c sqrt(2 / n)) = 2 exp(-2 c^2); 11 x 14 comparisons, 1 in 1000 for all of them
    limit = np.sqrt(-np.log(0.001 / 154 / 2) / 2) * np.sqrt(2 / n)
    centred = found - found.mean((0, 2), keepdims=True)
    for label in range(1, len(GESTURES)):
        for part in range(4):
            assert rank_distance(found[0, part], found[label, part]) < limit, (GESTURES[label], PARTS[part])
        for a, b in itertools.combinations_with_replacement(range(4), 2):
            assert rank_distance(centred[0, a] * centred[0, b], centred[label, a] * centred[label, b]) < limit


# --- pixels ---


def change(a, b):
    """How much the tenth of the pixels that differ most differ, less the brightness."""
    a, b = (v.astype(np.float32).mean(-1) for v in (a, b))
    found = np.sort(np.abs(a * (b.mean() / a.mean()) - b), None)
    return found[-found.size // 10 :].mean()


@pytest.fixture
def tripod(monkeypatch):
    """A camera that does not shake."""
    monkeypatch.setattr(gestures, "_JITTER", 0.0)


def features(images):
    """Statistics of single frames [n, d]: mean colours of a 4 x 4 grid, its gradients, spread of colours."""
    grid = images.reshape(len(images), 4, 8, 4, 8, 3).mean((2, 4)).reshape(len(images), -1) / 128 - 1
    contrast = images.astype(np.float32).std((1, 2)) / 64
    edges = [np.abs(np.diff(images.astype(np.float32), axis=axis)).mean((1, 2, 3)) / 16 for axis in (1, 2)]
    flat = np.concatenate([grid, contrast, np.stack(edges, 1)], 1)
    return np.concatenate([flat, flat**2, np.ones((len(flat), 1))], 1)


def linear_accuracy(x, labels, clips):
    """Ridge regression to one-hot labels on the first half of the clips, accuracy on the others."""
    train = clips < clips.max() // 2
    wanted = np.eye(len(GESTURES))[labels]
    weights = np.linalg.solve(x[train].T @ x[train] + 3 * np.eye(x.shape[1]), x[train].T @ wanted[train])
    return ((x[~train] @ weights).argmax(1) == labels[~train]).mean()


@pytest.fixture(scope="module")
def drawn():
    """720 small clips: uint8 [n, T, 32, 32, 3], labels [n]."""
    world = GestureWorld(11, 32, 32)
    found = [world.clip(i) for i in range(720)]
    return np.stack([images for images, _ in found]), np.array([label for _, label in found])


def test_statistics_of_single_frames_do_not_tell_the_class(drawn):
    images, labels = drawn
    clips = np.arange(len(labels))
    each = features(images.reshape(-1, 32, 32, 3)).reshape(len(labels), CLIP, -1)
    middle = linear_accuracy(each[:, 3], labels, clips)
    pooled = linear_accuracy(each.mean(1), labels, clips)
    assert middle < 1 / 12 + 0.05
    assert pooled < 1 / 12 + 0.05


def test_the_order_of_frames_shows_motion(tripod):
    world = GestureWorld(11, 32, 32)
    found = np.empty((len(GESTURES), 10))
    for i in range(found.size):
        images, label = world.clip(i)
        found[label, i // len(GESTURES)] = np.median(
            list(itertools.starmap(change, itertools.pairwise(images)))
        )
    for label in range(1, len(GESTURES)):
        assert np.median(found[label]) > 1.5 * np.median(found[STILL])


def test_pixels_are_where_the_pose_says():
    """A sprite on black: its centre moves with x, y; its spread with the size; its axis with the angle."""
    square = np.zeros((SIDE, SIDE, 4), np.float32)
    square[16:48, 8:56] = (255, 255, 255, 1)
    levels = mipmap(square)
    for size, x, y, angle in ((40, 50, 45, 0.0), (24, 40.5, 61, 0.4), (70, 48, 48, 1.9), (11, 20, 30, 0.8)):
        image = np.zeros((96, 96, 3), np.float32)
        _stamp(image, levels, x, y, size, angle)
        weight = image[..., 0] / 255
        rows, columns = np.indices(weight.shape) + 0.5
        area = weight.sum()
        assert area == pytest.approx(size**2 * 48 * 32 / SIDE**2, rel=0.04)
        cx, cy = (weight * columns).sum() / area, (weight * rows).sum() / area
        assert (cx, cy) == pytest.approx((x, y), abs=0.05)
        dx, dy = columns - cx, rows - cy
        long = 0.5 * np.arctan2(2 * (weight * dx * dy).sum(), (weight * (dx**2 - dy**2)).sum())
        assert np.mod(long - angle + np.pi / 2, np.pi) - np.pi / 2 == pytest.approx(0, abs=0.03)


def test_stamps_are_cut_at_the_edge():
    levels = mipmap(np.pad(np.ones((60, 60, 4), np.float32), ((2, 2), (2, 2), (0, 0))))
    whole = np.zeros((120, 120, 3), np.float32)
    _stamp(whole, levels, 70, 52, 40, 0.3)
    part = np.zeros((40, 32, 3), np.float32)
    _stamp(part, levels, 70 - 48, 52 - 50, 40, 0.3)
    np.testing.assert_allclose(part, whole[50:90, 48:80], atol=1e-4)
    outside = np.zeros((40, 32, 3), np.float32)
    _stamp(outside, levels, 200, 20, 40, 0.3)
    assert not outside.any()


def test_sprites_are_empty_at_their_border():
    for draw in (sprite, street_object):
        for key in range(40):
            texels = draw(np.random.default_rng(key))
            assert texels.shape == (SIDE, SIDE, 4)
            assert texels.dtype == np.float32
            border = np.concatenate([texels[0], texels[-1], texels[:, 0], texels[:, -1]])
            assert not border.any()
            assert texels[..., 3].sum() > 0.02 * SIDE**2
            assert (texels[..., :3] <= 256 * texels[..., 3:] + 1e-3).all()


# --- the same every time ---


def test_clips_are_exact():
    images, label = clip(3, 17)
    assert images.shape == (CLIP, 64, 64, 3)
    assert images.dtype == np.uint8
    assert label == 17 % 12
    world = GestureWorld(3)
    world.clip(4)
    world.frame(100)
    again, _ = world.clip(17)
    assert np.array_equal(images, again)
    assert not np.array_equal(images, clip(4, 17)[0])
    assert not np.array_equal(images, clip(3, 17 + 12)[0])


def test_a_lead_shows_the_object_at_rest(tripod):
    world = GestureWorld(3, 64, 64)
    plain, label = world.clip(29)
    images, again = world.clip(29, lead=4)
    assert (len(images), label) == (CLIP + 4, again)
    assert max(itertools.starmap(change, itertools.pairwise(images[:5]))) < min(
        itertools.starmap(change, itertools.pairwise(images[4:]))
    )
    assert np.abs(images[4:].astype(int) - plain).mean() < 6  # light and noise are drawn anew
    path, longer = world.poses(29), world.poses(29, lead=4)
    for name in PARTS:
        assert np.array_equal(getattr(longer, name)[4:], getattr(path, name))
        assert (getattr(longer, name)[:4] == getattr(path, name)[0]).all()


def test_poses_are_those_of_the_pictures():
    world = GestureWorld(6, 96, 96)
    for index in (1, 4):  # left, down
        images, _ = world.clip(index)
        path = world.poses(index)
        a, b = images[0].astype(int), images[-1].astype(int)
        y, x = np.nonzero(np.abs(a - b).max(-1) > 40)
        box = [(48 + 96 * (at - path.size[0] / 2), 48 + 96 * (at + path.size[0] / 2)) for at in (
            min(path.x[0], path.x[-1]), min(path.y[0], path.y[-1]), max(path.x[0], path.x[-1]), max(path.y[0], path.y[-1])
        )]  # fmt: skip
        assert x.min() >= box[0][0] - 8 and y.min() >= box[1][0] - 8
        assert x.max() <= box[2][1] + 8 and y.max() <= box[3][1] + 8


def test_sizes_show_the_same_scene():
    small, large = (clip(5, 3, size=size)[0][0].astype(float) for size in (64, 128))
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).mean() < 8


@settings(max_examples=30)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_events_lie_within_their_object(seed, number):
    event = GestureWorld(seed, 32, 32).event(number)
    assert number * EVENT < event.start
    assert event.stop < (number + 1) * EVENT
    assert event.stop - event.start == CLIP
    assert event.label in range(1, len(GESTURES))


def test_stream_stands_still_but_for_its_events(tripod):
    world = GestureWorld(2, 64, 64)
    frames = [world.frame(i) for i in range(6 * EVENT)]
    order = [100, 3, 64, 3]
    for i in order:
        assert np.array_equal(GestureWorld(2, 64, 64).frame(i).image, frames[i].image)
    for i, frame in enumerate(frames):
        assert frame.index == i
        assert frame.event == world.event(i // EVENT)
        inside = frame.event.start <= i < frame.event.stop
        assert frame.label == (frame.event.label if inside else STILL)
        assert frame.pts_ns == i * 100_000_000
    # what moves is seen from the second frame of the event on; jitter, light and noise are smaller
    for number in range(6):
        event = world.event(number)
        first = number * EVENT
        changes = [change(frames[i - 1].image, frames[i].image) for i in range(first + 1, first + EVENT)]
        moving = [i in range(event.start + 1, event.stop) for i in range(first + 1, first + EVENT)]
        calm = [c for c, m in zip(changes, moving, strict=True) if not m]
        busy = [c for c, m in zip(changes, moving, strict=True) if m]
        assert np.median(busy) > 1.2 * max(calm), (GESTURES[event.label], number)


def test_refusals():
    for arguments, says in (
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"width": 31}, "size 31x64"),
        ({"height": 5000}, "64x5000"),
    ):
        with pytest.raises(UsageError, match=says):
            GestureWorld(**arguments)
    for ask in (GestureWorld().frame, GestureWorld().clip, GestureWorld().event):
        with pytest.raises(UsageError, match="out of range"):
            ask(-1)


def test_needs_numpy_only():
    code = (
        "import sys\nfrom edgekit.synth.gestures import clip\nclip(0, 0)\n"
        "print([m for m in ('cv2', 'torch', 'onnx') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


# --- real pictures ---


def test_pictures_give_objects_and_backdrops(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "some.npz", images=rng.integers(0, 256, (5, 32, 32, 3), np.uint8), labels=np.arange(5)
    )
    pictures = load_pictures(tmp_path)
    assert len(pictures) == 5
    assert len(load_pictures(tmp_path, limit=2)) == 2
    with np.load(tmp_path / "some.npz") as arrays:
        assert np.array_equal(pictures[1], arrays["images"][1, :, :, ::-1])
    plain, real = (
        np.stack([clip(1, i, size=32, pictures=p)[0] for i in range(12)]).astype(float)
        for p in ((), pictures)
    )
    rough = [np.abs(np.diff(images, axis=3)).mean((1, 2, 3, 4)).max() for images in (plain, real)]
    assert rough[1] > 1.5 * rough[0]  # noise pictures are rougher than any texture
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no pictures"):
        load_pictures(tmp_path / "empty")
    with pytest.raises(UsageError, match="not a folder"):
        load_pictures(tmp_path / "nothing")


def test_photos_and_cifar_pictures():
    for folder in ("photos", "cifar10_mini"):
        pictures = load_pictures(shared_data() / folder, limit=50)
        images, _ = clip(0, 5, pictures=pictures)
        assert images.shape == (CLIP, 64, 64, 3)


# --- as a source ---


def test_gestures_as_a_source():
    uri = "synthetic://gestures?seed=4&frames=30&size=64x96"
    world = GestureWorld(4, 64, 96)
    with open_source(uri) as source:
        frames = list(source)
    assert len(frames) == 30
    for i in (0, 13, 29):
        assert np.array_equal(frames[i].image, world.frame(i).image)
        assert frames[i].pts_ns == world.frame(i).pts_ns
    with open_source("synthetic://gestures") as source:
        assert (source.size, source.fps) == ((224, 224), 10.0)


def test_gestures_as_a_live_camera():
    world = GestureWorld(4, 64, 64)
    with open_source("synthetic://gestures?seed=4&live=1&size=64x64&fps=50&frames=12") as source:
        for frame in source:
            assert np.array_equal(frame.image, world.frame(frame.seq).image)


def test_source_keys_of_one_world(tmp_path):
    with pytest.raises(UsageError, match="the street has no pictures"):
        open_source(f"synthetic://street?pictures={tmp_path}")
    with pytest.raises(UsageError, match="no pictures in it"):
        open_source(f"synthetic://gestures?pictures={tmp_path}")
    with pytest.raises(UsageError, match="Did you mean 'gestures'"):
        open_source("synthetic://gesture")


def test_a_stream_is_seen_between_its_frames_too():
    world, other = GestureWorld(5, 64, 64), GestureWorld(5, 64, 64)
    event = world.event(1)
    for moment in (event.start - 3, event.start, event.start + 2, EVENT, 0):
        assert np.array_equal(world.seen(float(moment)), other.frame(moment).image)


def test_between_two_frames_the_object_goes_from_one_place_to_the_next(tripod):
    for number in range(3):
        world = GestureWorld(5, 64, 64)
        event = world.event(number)
        steps = np.zeros(4)
        for at in range(event.start, event.stop - 1):
            before, after = world.frame(at).image, world.frame(at + 1).image
            early, late = world.seen(at + 0.05), world.seen(at + 0.95)
            steps += [
                change(before, early), change(late, after), change(before, late), change(before, after)
            ]  # fmt: skip
        assert max(steps[:2]) < 0.95 * min(steps[2:]), (GESTURES[event.label], steps)
        middle = world.seen(event.start + 0.5)
        assert np.array_equal(GestureWorld(5, 64, 64).seen(event.start + 0.5), middle)
        assert not np.array_equal(world.seen(event.start + 0.25), middle)


def test_a_motion_looked_at_twice_as_often_is_the_same_motion():
    for label in range(1, len(GESTURES)):
        whole = poses(np.random.default_rng(label), label)
        fine = poses(np.random.default_rng(label), label, at=np.arange(2 * CLIP) / 2)
        for name in ("x", "y", "size", "angle"):
            np.testing.assert_array_equal(getattr(fine, name)[::2], getattr(whole, name))
