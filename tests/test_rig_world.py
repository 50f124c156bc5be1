"""The rig in the synthetic street: the same world for every sensor, exact labels, motion during a sweep."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.rig import inside, inverse, moved
from edgekit.synth import cast, rig_view, solids, sweep
from edgekit.synth.cast import GROUND, SKY, PartsBuilder, Scene
from edgekit.synth.rig_scene import REACH, RigStreet
from edgekit.synth.scene import stream
from edgekit.synth.street_rig import CLASSES, RANGE, RigWorld, street_rig
from edgekit.synth.sweep import Spinner

EXACT = Spinner(noise=0.0, lost=0.0)


def same(a, b):
    return (
        np.array_equal(a.points, b.points)
        and np.array_equal(a.rings, b.rings)
        and np.array_equal(a.truth.boxes, b.truth.boxes)
        and np.array_equal(a.truth.points, b.truth.points)
        and all(np.array_equal(a.shots[n].image, b.shots[n].image) for n in a.shots)
        and a.rig == b.rig
    )


def still(seed_from=0):
    """The first seed whose vehicle waits, and the first whose vehicle drives faster than 8 m/s."""
    waits = drives = None
    for seed in range(seed_from, seed_from + 60):
        street = RigStreet(seed, False).street
        waits = seed if waits is None and street.waiting else waits
        drives = seed if drives is None and street.speed > 8 else drives
    return waits, drives


WAITS, DRIVES = still()


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_frames_do_not_depend_on_the_order_asked(seed):
    forward, backward = RigWorld(seed, width=64, height=36), RigWorld(seed, width=64, height=36)
    first = {i: forward.frame(i) for i in (4, 31)}
    second = {i: backward.frame(i) for i in (31, 4)}
    assert all(same(first[i], second[i]) for i in first)
    assert same(forward.frame(4), first[4])
    assert not same(first[4], first[31])
    assert not same(first[4], RigWorld(seed ^ 1, width=64, height=36).frame(4))


def test_frame_contract():
    found = np.zeros(len(CLASSES), int)
    for seed in range(6):
        world = RigWorld(seed)
        for index in (0, 45):
            frame = world.frame(index)
            n, k = len(frame.points), len(frame.truth)
            assert frame.points.shape == (n, 5)
            assert (frame.points.dtype, frame.rings.dtype) == (np.float32, np.int16)
            assert frame.points.flags.c_contiguous
            assert np.isfinite(frame.points).all()
            assert 5000 < n <= 32 * 720
            assert ((frame.points[:, 3] >= 0) & (frame.points[:, 3] <= 1)).all()
            assert ((frame.points[:, 4] <= 0) & (frame.points[:, 4] >= -0.05)).all()
            assert frame.rings.min() >= 0
            assert frame.rings.max() < 32
            assert frame.truth.boxes.shape == (k, 9)
            assert frame.truth.boxes.dtype == np.float32
            assert {a.dtype for a in (frame.truth.classes, frame.truth.points, frame.truth.pixels)} == {
                np.dtype("int32")
            }
            assert (np.hypot(*frame.truth.boxes[:, :2].T) < RANGE).all()
            assert ((frame.truth.points > 0) | (frame.truth.pixels > 0)).all()
            assert frame.taken_ns == round((index / 10 + 0.05) * 1e9)
            assert list(frame.shots) == list(frame.rig.cameras)
            for name, shot in frame.shots.items():
                assert shot.image.shape == (144, 256, 3)
                assert shot.image.dtype == np.uint8
                assert shot.taken_ns - frame.taken_ns == round(frame.rig.cameras[name].offset_ms * 1e6)
                assert -0.05e9 <= shot.taken_ns - frame.taken_ns <= 0
            found += np.bincount(frame.truth.classes, minlength=len(CLASSES))
    assert (found > 2).all(), dict(zip(CLASSES, found, strict=True))


def test_every_seed_is_mounted_a_little_differently():
    nominal, a, b = street_rig(), street_rig(1), street_rig(2)
    assert a != b
    assert street_rig(1) == a
    assert RigWorld(1).rig == a
    for name, camera in a.cameras.items():
        off = np.array(camera.position) - nominal.cameras[name].position
        assert np.abs(off).max() <= 0.04
        turned = camera.to_ego[:3, :3] @ nominal.cameras[name].to_ego[:3, :3].T
        assert 0 < np.degrees(np.arccos(min(1.0, (np.trace(turned) - 1) / 2))) < 2.5


@pytest.mark.parametrize("seed", [WAITS, DRIVES])
def test_a_camera_sees_what_the_lidar_hits(seed):
    """Nothing is seen through: where a ray ended on a surface, a camera sees that surface or something nearer."""
    world = RigWorld(seed, spinner=EXACT)
    frame, objects, points, views = world.observe(12)
    speeds = np.array([np.hypot(p.vx, p.vy) for p in objects])
    compared = 0
    for name, camera in frame.rig.cameras.items():
        # what moves is elsewhere when the camera looks; only standing things must agree to the pixel
        standing = np.where(points.owner >= 0, speeds[points.owner], 0.0) == 0
        uv, depth = frame.project(name, points.points[standing])
        owner = points.owner[standing]
        inner = (depth > 0.5) & (uv[:, 0] > 1) & (uv[:, 0] < camera.width - 1) & (uv[:, 1] > 1)
        inner &= uv[:, 1] < camera.height - 1
        column, row = uv[inner].astype(int).T
        owner, depth = owner[inner], depth[inner]
        around = np.stack([views[name].depth[row + y, column + x] for y in (-1, 0, 1) for x in (-1, 0, 1)])
        whose = np.stack([views[name].owner[row + y, column + x] for y in (-1, 0, 1) for x in (-1, 0, 1)])
        beyond = around.min(0) > depth * 1.02 + 0.1
        assert beyond.mean() < 0.002, name
        # seen by both: the same object, or a neighbouring pixel of it
        both = np.abs(views[name].depth[row, column] - depth) < 0.02 * depth + 0.05
        agree = (whose == owner).any(0)
        assert agree[both].mean() > 0.995, name
        compared += int(both.sum())
    assert compared > 5000


def test_points_on_an_object_lie_in_its_box():
    """And the points in a box are its object's: no other thing stands in it. Moving things smear during the sweep."""
    checked = 0
    for seed in (WAITS, DRIVES, 5, 6):
        world = RigWorld(seed, spinner=EXACT)
        frame, objects, found, _ = world.observe(20)
        to_lidar = frame.rig.lidar.from_ego @ inverse(frame.pose)
        for number, thing in enumerate(objects):
            mine = found.owner == number
            if thing.solid.label < 0 or not mine.any():
                continue
            row = (
                thing.x,
                thing.y,
                thing.solid.size[2] / 2,
                *thing.solid.size,
                thing.yaw,
                thing.vx,
                thing.vy,
            )
            box = moved(np.array([row]), to_lidar)[0]
            # where the object was when each point was measured; the sensor's tilt is not in a box
            points = found.points[mine].copy()
            points[:, :2] -= points[:, 4:5] * box[7:9]
            tilt = 0.02 * np.hypot(*box[:2]) * 0.6 + 0.02
            assert inside(points, box, tilt).all(), (seed, thing.key)
            within = inside(found.points, box, -0.03)
            within &= found.points[:, 2] > box[2] - box[5] / 2 + 0.15 + tilt
            if thing.vx == thing.vy == 0:
                assert (found.owner[within] == number).all(), (seed, thing.key)
            checked += 1
    assert checked > 40


def test_boxes_are_as_large_as_what_stands_in_them():
    for make in (solids.car, solids.truck, solids.bus, solids.bicycle):
        for seed in range(20):
            solid = make(stream(seed, 1))
            parts = solid.parts[solid.parts[:, cast.GHOST] == 0]
            low = np.minimum(parts[:, [cast.X0, cast.Y0]], parts[:, [cast.TX0, cast.TY0]]).min(0)
            high = np.maximum(parts[:, [cast.X1, cast.Y1]], parts[:, [cast.TX1, cast.TY1]]).max(0)
            assert np.allclose((high - low) / solid.size[:2], 1.0, atol=0.12), make
            assert np.allclose((high + low) / 2, 0, atol=0.1), make
            assert parts[:, cast.Z0].min() >= 0
            assert parts[:, cast.Z1].max() == pytest.approx(solid.size[2], abs=1e-4)


def test_labelled_things_stand_apart_and_not_in_the_vehicle():
    for seed in range(25):
        world = RigStreet(seed, False)
        for t in (0.0, 6.3):
            x0, y0, yaw = world.ego(t)
            things = [p for p in world.objects(t) if p.solid.label >= 0]
            assert all(abs(p.x - world.position(t)) < REACH for p in things)
            at = np.array([(p.x - x0, p.y - y0) for p in things])
            ahead, left = at @ (np.cos(yaw), np.sin(yaw)), at @ (-np.sin(yaw), np.cos(yaw))
            half = np.array([p.solid.size[1] / 2 for p in things])
            assert not ((ahead > -0.9 - half) & (ahead < 3.7 + half) & (np.abs(left) < 0.9 + half)).any(), (
                seed,
                t,
            )
            gaps = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)) - (half[:, None] + half[None])
            assert gaps[~np.eye(len(at), dtype=bool)].min() > 0


def test_velocities_are_how_things_move():
    world = RigStreet(DRIVES, False)
    now, later = ({p.key: p for p in world.objects(t)} for t in (3.0, 3.02))
    common = [key for key in now if key in later]
    assert len(common) > 20
    assert any(abs(now[key].vx) > 3 for key in common)
    for key in common:
        a, b = now[key], later[key]
        assert (b.x - a.x) / 0.02 == pytest.approx(a.vx, abs=0.05)
        assert (b.y - a.y) / 0.02 == pytest.approx(a.vy, abs=0.05)
        speed = np.hypot(a.vx, a.vy)
        if speed > 2:
            assert np.cos(a.yaw) * a.vx + np.sin(a.yaw) * a.vy > 0.95 * speed  # things go where they head


def ring_of_poles(vx=0.0):
    """Twelve poles of radius 0.1 m and 4 m height, 8 m around the vehicle, that all move ahead with vx."""
    m = PartsBuilder()
    m.round(0, 0, 0.1, (0, 4), (1, 2, 3), reflect=0.9)
    turn = np.arange(12) * np.pi / 6 + 0.1
    poses = np.stack([8 * np.cos(turn), 8 * np.sin(turn), 0 * turn, 0 * turn + vx, 0 * turn], 1)
    return Scene.of([m.build()] * 12, poses, np.arange(12)), poses


@pytest.mark.parametrize("vx", [0.0, 9.0])
def test_the_vehicles_motion_is_taken_out_of_a_sweep_that_of_others_is_not(vx):
    scene, poses = ring_of_poles(vx)
    lidar = street_rig(4).lidar
    found = sweep.sweep(
        Spinner(noise=0.0, lost=0.0), lidar, scene, lambda dt: (14.0 * dt, 1.0 * dt, 0.6 * dt),
        lambda x, y: np.full(x.shape, 0.3, np.float32), np.random.default_rng(0),
    )  # fmt: skip
    on = found.owner >= 0
    assert set(found.owner[on].tolist()) == set(range(12))
    ego = found.points[on, :3] @ lidar.to_ego[:3, :3].T + lidar.to_ego[:3, 3]
    dt, pole = found.points[on, 4], poses[found.owner[on]]
    off = np.hypot(ego[:, 0] - pole[:, 0] - vx * dt, ego[:, 1] - pole[:, 1]) - 0.1
    assert np.abs(off).max() < 2e-3
    assert np.ptp(dt) > 0.04
    ground = found.points[~on, :3] @ lidar.to_ego[:3, :3].T + lidar.to_ego[:3, 3]
    assert np.abs(ground[:, 2]).max() < 1e-3


def test_pictures_and_sweeps_know_how_the_vehicle_moved():
    world = RigWorld(DRIVES, width=64, height=36)
    frame = world.frame(15)
    for name, shot in frame.shots.items():
        dt = frame.rig.cameras[name].offset_ms / 1e3
        x, y, yaw = world.street.ego(1.5 + dt)
        then = frame.pose @ inverse(shot.motion)  # ego when the picture was taken, in the world
        assert np.allclose(then[:2, 3], (x, y), atol=1e-9)
        assert np.arctan2(then[1, 0], then[0, 0]) == pytest.approx(yaw)
        assert shot.motion[0, 3] == pytest.approx(-dt * world.street.street.speed, rel=0.2, abs=0.02)


def test_earlier_sweeps_lie_on_the_same_things():
    one = RigWorld(DRIVES, spinner=EXACT).frame(15)
    three, objects, *_ = RigWorld(DRIVES, spinner=EXACT, sweeps=3).observe(15)
    assert np.array_equal(three.points[: len(one.points)], one.points)
    dt = three.points[:, 4]
    assert dt.min() < -0.14
    assert dt.min() >= -0.15
    counts = np.histogram(dt, [-0.15, -0.1, -0.05, 0.0])[0]
    assert counts.min() > 0.8 * counts.max()
    old = three.points[len(one.points) :]
    world = frame_to_world(three, old)
    off = []
    for thing in objects:
        trunk = thing.solid.parts[thing.solid.parts[:, cast.SHAPE] == cast.CYLINDER]
        if thing.solid.label < 0 and len(trunk) == 1 and trunk[0, cast.Z1] > 2:
            radius = float(trunk[0, cast.X1])
            far = np.hypot(world[:, 0] - thing.x, world[:, 1] - thing.y)
            off.append(far[(far < radius + 0.3) & (np.abs(world[:, 2] - 1.0) < 0.5)] - radius)
    off = np.concatenate(off)
    assert len(off) > 20
    assert np.median(np.abs(off)) < 0.005
    assert np.mean(np.abs(off) < 0.01) > 0.8  # the others stand beside a pole


def frame_to_world(frame, points):
    matrix = frame.pose @ frame.rig.lidar.to_ego
    return points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]


def test_a_sweep_has_the_same_noise_whichever_frame_it_is_part_of():
    world = RigWorld(DRIVES, sweeps=3, width=64, height=36)
    before, after = world.frame(14), world.frame(15)
    mine, theirs = after.points[after.points[:, 4] < -0.1], before.points[before.points[:, 4] > -0.05]
    assert len(mine) == len(theirs)
    assert np.array_equal(mine[:, 3], theirs[:, 3])
    assert np.allclose(frame_to_world(after, mine), frame_to_world(before, theirs), atol=1e-3)


def test_range_noise_and_lost_returns():
    exact = RigWorld(3, spinner=EXACT).frame(5)
    noisy = RigWorld(3, spinner=Spinner(noise=0.05, lost=0.0)).frame(5)
    assert len(exact.points) == len(noisy.points)
    difference = np.linalg.norm(noisy.points[:, :3], axis=1) - np.linalg.norm(exact.points[:, :3], axis=1)
    assert difference.std() == pytest.approx(0.05, rel=0.1)
    lossy = RigWorld(3, spinner=Spinner(noise=0.0, lost=0.3)).frame(5)
    assert len(lossy.points) == pytest.approx(0.7 * len(exact.points), rel=0.03)
    far = np.linalg.norm(exact.points[:, :3], axis=1)
    assert far.max() < 90


def test_a_sensor_alone_is_what_it_is_in_the_whole():
    world = RigWorld(8, width=64, height=36)
    whole = world.frame(3)
    lidar, back = world.frame(3, ("lidar",)), world.frame(3, ("CAM_BACK",))
    assert np.array_equal(lidar.points, whole.points)
    assert lidar.shots == {}
    assert lidar.truth is None
    assert back.points is None
    assert np.array_equal(back.shots["CAM_BACK"].image, whole.shots["CAM_BACK"].image)
    assert list(back.shots) == ["CAM_BACK"]


@given(st.integers(0, 10**6), st.integers(0, 200))
@settings(max_examples=6, deadline=None)
def test_windows_leave_nothing_out(seed, index):
    """Trying every part on every ray finds nothing else than trying each where its bounding box is."""
    spinner = Spinner(rings=10, azimuths=48, noise=0.0, lost=0.0)
    rig = street_rig(seed, 64, 36)
    few = {name: rig.cameras[name] for name in ("CAM_FRONT_LEFT", "CAM_BACK")}
    world = RigWorld(seed, dataclasses.replace(rig, cameras=few), spinner=spinner)
    quick = world.observe(index)
    narrow, wide = sweep._windows, rig_view._windows
    try:
        sweep._windows = lambda s, scene, *rest: np.tile((0, s.rings, 0, s.azimuths), (len(scene.parts), 1))
        rig_view._windows = lambda c, corner: np.tile((0, c.height, 0, c.width), (len(corner), 1))
        slow = world.observe(index)
    finally:
        sweep._windows, rig_view._windows = narrow, wide
    assert np.array_equal(quick[2].owner, slow[2].owner)
    assert np.array_equal(quick[0].points, slow[0].points)
    for name, view in quick[3].items():
        assert np.array_equal(view.owner, slow[3][name].owner)
        assert np.array_equal(view.depth, slow[3][name].depth)


def one_solid(shape, yaw=0.4):
    """A scene of one part around (10, 2, 1), 4 long, 2 wide, 2 high."""
    m = PartsBuilder()
    m.block((-2, 2), (-1, 1), (0, 2), (1, 2, 3), shape=shape)
    return Scene.of([m.build()], np.array([[10.0, 2.0, yaw, 0.0, 0.0]]), np.array([7]))


@given(st.sampled_from([cast.BLOCK, cast.CYLINDER, cast.ELLIPSOID]), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_rays_end_where_they_first_enter_a_solid(shape, seed):
    """Against small steps along each ray."""
    rng = np.random.default_rng(seed)
    scene = one_solid(shape)
    start = np.array([*rng.uniform(-2, 2, 2), rng.uniform(0.2, 4)])
    aim = np.array([10.0, 2.0, 1.0]) + rng.uniform(-3, 3, (60, 3)) * (1, 1, 0.5) - start
    aim /= np.linalg.norm(aim, axis=1)[:, None]
    cos, sin = np.cos(0.4), np.sin(0.4)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    origin = turn @ (start - (10, 2, 0))
    direction = aim @ turn.T
    rays = np.arange(60, dtype=np.int32)
    hits = cast.nearest(
        scene, np.zeros(60, np.int32), rays, tuple(np.full(60, v, np.float32) for v in origin),
        tuple(direction.T.astype(np.float32)), np.full(60, np.inf, np.float32), 0.1,
    )  # fmt: skip
    steps = np.arange(0, 20, 0.005)
    path = origin + steps[:, None, None] * direction
    x, y, z = path[..., 0] / 2, path[..., 1], path[..., 2] - 1
    within = np.abs(z) <= 1
    if shape == cast.BLOCK:
        within &= (np.abs(x) <= 1) & (np.abs(y) <= 1)
    else:
        within &= x * x + y * y + (z * z if shape == cast.ELLIPSOID else 0) <= 1
    touched = within.any(0)
    first = steps[within.argmax(0)]
    grazing = np.count_nonzero(within, axis=0) < 4
    assert ((hits.part == 0) == touched)[~grazing].all()
    both = touched & ~grazing
    assert np.allclose(hits.t[both], first[both], atol=0.006)
    spot = (start + hits.t[:, None] * aim)[both].astype(np.float32)
    local, normal = cast.surface(scene, hits.part[both], hits.face[both], spot)
    assert np.allclose(local, (spot - (10, 2, 0)) @ turn.T, atol=1e-4)
    assert np.allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-5)
    assert (np.einsum("ij,ij->i", normal, aim[both]) < 1e-3).all()  # it is the side that the ray came from


def test_nearer_things_hide_farther_ones_and_shadows_are_no_obstacles():
    m = PartsBuilder()
    m.block((-2, 2), (-2, 2), (0.0, 0.012), (0, 0, 0), solids.SHADOW, ghost=True)
    shadow = m.build()
    far, near = one_solid(cast.BLOCK).parts, one_solid(cast.ELLIPSOID).parts
    poses = np.array([[30.0, 0, 0, 0, 0], [12.0, 0, 0, 0, 0], [5.0, 0, 0, 0, 0]])
    scene = Scene.of([far, near, shadow], poses, np.array([0, 1, 2]))
    rig = street_rig(None, 64, 36)
    world = RigWorld(0, rig, time="day")
    flat = np.zeros((36, 64, 3), np.int16)
    seen = rig_view.view(
        rig.cameras["CAM_FRONT"], scene, world.look, lambda x, y: np.zeros(x.shape, int), 0.0, flat
    )
    assert 1 in seen.owner
    assert 0 not in seen.owner[:, 31:33]
    assert 2 not in seen.owner
    assert {SKY, GROUND} <= set(np.unique(seen.owner).tolist())
    found = sweep.sweep(EXACT, rig.lidar, scene, lambda dt: (0.0, 0.0, 0.0), lambda x, y: np.full(x.shape, 0.3, np.float32),
                        np.random.default_rng(0))  # fmt: skip
    assert set(np.unique(found.owner).tolist()) == {GROUND, 1} | ({0} if 0 in found.owner else set())
    assert (found.owner == 1).sum() > 10


def test_wrong_values_are_refused():
    for options, said in (
        ({"seed": -1}, "seed -1"),
        ({"width": 63}, "size 63x144"),
        ({"sweeps": 0}, "0 sweeps"),
    ):
        with pytest.raises(UsageError, match=said):
            RigWorld(**options)
    with pytest.raises(UsageError, match="frame -1"):
        RigWorld(0).frame(-1)


def test_a_rig_of_ones_own_is_used():
    rig = street_rig(None, 96, 54)
    only = dataclasses.replace(rig, cameras={"only": rig.cameras["CAM_BACK"]})
    frame = RigWorld(4, only).frame(2)
    assert list(frame.shots) == ["only"]
    assert frame.shots["only"].image.shape == (54, 96, 3)
