"""tasks/fusion/pipeline.py on the session of a plan: whole moments, sensors as they arrive, missing ones, other rigs."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BundleError, UsageError
from edgekit.kernels.letterbox import to_bgr
from edgekit.models.bevfusion.head import pipeline as spec_of
from edgekit.models.bevfusion.segments import Segments
from edgekit.pixels import PixelLayout
from edgekit.rig import Camera, Rig, RigFrame
from edgekit.runtime.session import Session
from edgekit.schema import from_json, to_json
from edgekit.synth.formats import convert
from edgekit.synth.street_rig import RigWorld
from edgekit.tasks import open_pipeline, task
from edgekit.tasks.fusion.boxes import Boxes3D
from edgekit.tasks.fusion.calibration import Calibration, fit
from edgekit.tasks.fusion.pipeline import LIDAR, FusionPipeline, Seen, read_spec
from edgekit.tasks.fusion.spec import FusionSpec
from tests import bevfusion_nets as nets
from tests import fusion_plans as plans
from tests import fusion_rigs as rigs

NAMES = nets.TINY.camera.names
LOW = 0.02


@pytest.fixture(scope="module")
def session():
    made, files = plans.manifest()
    with Session(made, plans.executables(made, files)) as opened:
        yield opened


@pytest.fixture
def look(session) -> FusionPipeline:
    made = open_pipeline(spec_of(nets.TINY), session)
    assert isinstance(made, FusionPipeline) and made.takes_rigs
    return made


def moment(seed: int = 1) -> RigFrame:
    """As many points as the plan of the tests has room for."""
    frame = nets.frame(seed)
    return dataclasses.replace(frame, points=frame.points[:: 1 + len(frame.points) // plans.POINTS])


def without(frame: RigFrame, *names: str) -> RigFrame:
    shots = {name: shot for name, shot in frame.shots.items() if name not in names}
    return dataclasses.replace(frame, shots=shots, points=None if LIDAR in names else frame.points)


def same(a: Boxes3D, b: Boxes3D) -> bool:
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in ((a.boxes, b.boxes), (a.scores, b.scores), (a.classes, b.classes))
    )


def test_the_session_of_a_bundle_gives_what_the_reference_gives(look) -> None:
    frame = moment()
    mine = look(frame, score_threshold=LOW)
    theirs = FusionPipeline(spec_of(nets.TINY), Segments(rigs.folder()))
    other = theirs(frame, score_threshold=LOW)
    assert len(mine) > 20 and mine.missing == () and mine.taken_ns == frame.taken_ns
    for name, value in look.session.outputs.items():
        assert nets.difference(value, theirs.session.outputs[name]) < 1e-5
    assert np.allclose(mine.scores[:20], other.scores[:20], atol=1e-5)
    assert set(look.step_ns) == {"camera", "depth_raster", "lift", "pool", "encoder", "lidar", "fusion"}
    assert len(look.stage_ns) == 3 and all(ns > 0 for ns in look.stage_ns)
    spec = from_json(FusionSpec, to_json(spec_of(nets.TINY)), "spec")
    assert spec == spec_of(nets.TINY) and task("fusion").METRIC == "mAP"


@pytest.mark.parametrize(
    "lost", [(), ("CAM_BACK",), ("CAM_FRONT", "CAM_BACK_LEFT"), (LIDAR,), NAMES, (*NAMES[1:], LIDAR)]
)
def test_cameras_as_they_arrive_give_the_bits_of_a_whole_moment(look, lost) -> None:
    frame, other = without(moment(), *lost), moment(2)
    whole = look(frame, score_threshold=LOW)
    outputs = {name: value.copy() for name, value in look.session.outputs.items()}
    assert whole.missing == tuple(name for name in (*NAMES, LIDAR) if name in lost)
    present = list(frame.shots)
    for early in (present, present[::2]):  # the others are processed at the end
        look(other)  # leaves its tensors behind
        seen = {name: look.camera(name, frame.shots[name].image) for name in reversed(early)}
        for name in early[:1]:
            look.camera(name, other.shots[name].image)  # a later picture of the same camera does not harm
        found = look.finish(frame, seen, score_threshold=LOW)
        assert same(found, whole) and found.missing == whole.missing
        for name, value in outputs.items():
            assert np.array_equal(look.session.outputs[name], value)
        assert all(min(one.stage_ns) > 0 for one in seen.values())


def test_a_camera_that_is_missing_leaves_nothing_behind(look) -> None:
    """Whatever was seen before."""
    frame = without(moment(), "CAM_FRONT")
    first = look(frame, score_threshold=LOW)
    look(moment(3))
    assert same(look(frame, score_threshold=LOW), first)
    assert not same(look(moment(), score_threshold=LOW), first)


class _NotAsked:
    """A session of a plan that does not ask which cameras are there: all of them are run."""

    def __init__(self, base: Session) -> None:
        self.base = base
        self.inputs = {name: array for name, array in base.inputs.items() if name != "cameras"}
        self.outputs, self.buffers = base.outputs, base.buffers

    step_ns = property(lambda self: self.base.step_ns)

    def run(self, done=()) -> None:
        self.base.inputs["cameras"][...] = 1
        self.base.run(done)

    def run_slot(self, step: str, slot: int) -> None:
        self.base.run_slot(step, slot)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_plan_that_does_not_ask_who_is_there_sees_no_old_picture(session, one_by_one) -> None:
    def seen(frame: RigFrame) -> dict[str, Seen]:
        return {name: look.camera(name, shot.image) for name, shot in frame.shots.items() if one_by_one}

    look = FusionPipeline(spec_of(nets.TINY), _NotAsked(session))
    frame = without(moment(), "CAM_FRONT")
    session.inputs["images"][...] = session.buffers["pyramid"][...] = 0
    first = look.finish(frame, seen(frame), score_threshold=LOW)
    assert first.missing == ("CAM_FRONT",)
    other = moment(3)
    look.finish(other, seen(other), score_threshold=LOW)
    assert same(look.finish(frame, seen(frame), score_threshold=LOW), first)


def test_what_another_camera_or_pipeline_has_seen_is_refused(look) -> None:
    """Not taken for this one's: its buffers hold something else."""
    frame = moment()
    other = FusionPipeline(look.spec, look.session)
    front = other.camera("CAM_FRONT", frame.shots["CAM_FRONT"].image)
    with pytest.raises(UsageError, match="camera 'CAM_FRONT': was seen by another pipeline"):
        look.finish(frame, {"CAM_FRONT": front})
    with pytest.raises(UsageError, match=r"camera 'CAM_BACK': expected what .* got 'CAM_FRONT'"):
        other.finish(frame, {"CAM_BACK": front})
    with pytest.raises(UsageError, match=r"camera 'CAM_BACK': expected what .* got 'int'"):
        other.finish(frame, {"CAM_BACK": 1})
    assert len(other.finish(frame, {"CAM_FRONT": front}, score_threshold=LOW))


@pytest.mark.parametrize(("column", "value"), [(0, np.nan), (2, np.inf), (3, np.nan), (4, -np.inf)])
def test_points_that_are_no_numbers_do_not_blind_the_rest(look, column, value) -> None:
    """One of them in a cell would make all that the convolutions reach no number, and its boxes vanish."""
    frame = moment()
    points = frame.points.copy()
    points[::50, column] = value
    clean = dataclasses.replace(frame, points=np.delete(points, np.s_[::50], axis=0))
    wanted = look(clean, score_threshold=LOW)
    found = look(dataclasses.replace(frame, points=points), score_threshold=LOW)
    assert same(found, wanted) and len(found)
    count = len(points[::50])
    said = (f"lidar: {count} points left out, their intensity or time is no finite number",)
    assert found.notes == (said if column > 2 else ()) and not wanted.notes


def test_no_sensor_at_all_is_no_error(look) -> None:
    nothing = without(moment(), *NAMES, LIDAR)
    found = look(nothing)
    assert len(found) == 0 and found.missing == (*NAMES, LIDAR) and found.taken_ns == nothing.taken_ns
    assert found.labels == nets.TINY.head.labels
    assert len(look(moment(), score_threshold=LOW)) > 0  # and it goes on


def test_a_sweep_without_points_is_a_sweep(look) -> None:
    empty = dataclasses.replace(moment(), points=np.zeros((0, 5), np.float32))
    assert look(empty).missing == ()
    broken = dataclasses.replace(moment(), points=np.zeros((4, 4), np.float32))
    with pytest.raises(UsageError, match=r"expected points float32 \[n, 5\], got float32 \[4, 4\]"):
        look(broken)
    with pytest.raises(UsageError, match="expected a frame of a rig, got ndarray"):
        look(np.zeros((4, 4, 3), np.uint8))


def test_another_rig_is_another_calibration_and_the_first_comes_back(look) -> None:
    frame = moment()
    turned = Rig(
        frame.rig.name, frame.rig.lidar, dict(zip(NAMES, reversed(frame.rig.cameras.values()), strict=True))
    )
    first = look(frame, score_threshold=LOW)
    before = {
        name: look.session.inputs[name].copy() for name in ("intrinsics", "camera_to_lidar", "projections")
    }
    for future in look.prepare(turned):
        future.result(timeout=60)
    swapped = look(dataclasses.replace(frame, rig=turned), score_threshold=LOW)
    for name, value in before.items():
        assert not np.array_equal(look.session.inputs[name], value)
    assert not same(swapped, first)
    again = dataclasses.replace(frame, rig=dataclasses.replace(frame.rig))  # equal, another object
    assert same(look(again, score_threshold=LOW), first)


def test_a_rig_with_fewer_or_other_cameras_serves_what_it_has(look) -> None:
    frame = moment()
    few = {name: camera for name, camera in frame.rig.cameras.items() if name != "CAM_BACK"}
    rig = Rig("five", frame.rig.lidar, {**few, "CAM_EXTRA": frame.rig.cameras["CAM_BACK"]})
    shots = {**frame.shots, "CAM_EXTRA": frame.shots["CAM_BACK"]}
    found = look(dataclasses.replace(frame, rig=rig, shots=shots), score_threshold=LOW)
    assert found.missing == ("CAM_BACK",)
    five = look(without(frame, "CAM_BACK"), score_threshold=LOW)
    assert same(found, five)
    seen = {name: look.camera(name, shot.image) for name, shot in frame.shots.items()}
    six = look.finish(frame, seen, score_threshold=LOW)
    seen = {name: look.camera(name, shot.image) for name, shot in frame.shots.items()}
    assert same(look.finish(dataclasses.replace(frame, rig=rig), seen, score_threshold=LOW), five)
    assert same(
        look.finish(frame, seen, score_threshold=LOW), six
    )  # the one that did not count is still good
    with pytest.raises(UsageError, match=r"camera 'CAM_FRON': not one of this network.*CAM_FRONT"):
        look.camera("CAM_FRON", shots["CAM_FRONT"].image)


def test_pictures_of_any_format_and_size_but_of_the_rigs_shape(look) -> None:
    frame = moment()
    yuyv = {name: convert(shot.image, "yuyv") for name, shot in frame.shots.items()}
    bgr = {name: dataclasses.replace(shot, image=to_bgr(yuyv[name])) for name, shot in frame.shots.items()}
    wanted = look(dataclasses.replace(frame, shots=bgr), score_threshold=LOW)
    seen = {name: look.camera(name, pixels) for name, pixels in yuyv.items()}
    assert seen["CAM_FRONT"].size == (64, 40) and yuyv["CAM_FRONT"].layout == PixelLayout("yuyv", 64, 40)
    assert same(look.finish(frame, seen, score_threshold=LOW), wanted)
    double = {name: np.repeat(np.repeat(shot.image, 2, 0), 2, 1) for name, shot in bgr.items()}
    large = {name: dataclasses.replace(shot, image=double[name]) for name, shot in bgr.items()}
    assert same(look(dataclasses.replace(frame, shots=large), score_threshold=LOW), wanted)
    wide = dataclasses.replace(frame.shots["CAM_BACK"], image=frame.shots["CAM_BACK"].image[:20])
    with pytest.raises(
        UsageError, match="camera CAM_BACK: a picture of 64x20 pixels, but the rig says 64x40"
    ):
        look(dataclasses.replace(frame, shots={**frame.shots, "CAM_BACK": wide}))


def test_more_points_than_there_is_room_for_are_thinned_to_the_nearest(look) -> None:
    frame = nets.frame(1)
    assert len(frame.points) > plans.POINTS
    found = look(frame, score_threshold=LOW)
    assert found.notes == (
        f"lidar: {len(frame.points) - plans.POINTS} points beyond the {plans.POINTS} there is room for",
    )
    assert look.counts == {"thinned": 1} and found.to_json()["notes"] == list(found.notes)
    away = np.hypot(*frame.points[:, :2].T)
    near = frame.points[away <= np.sort(away)[plans.POINTS - 1]]
    assert same(look(dataclasses.replace(frame, points=near), score_threshold=LOW), found)


def test_points_beyond_the_reach_do_not_count(session) -> None:
    look = FusionPipeline(dataclasses.replace(spec_of(nets.TINY), reach=12.0), session)
    frame = moment()
    near = frame.points[(np.abs(frame.points[:, :2]) < 12).all(1)]
    assert 0 < len(near) < len(frame.points)
    assert same(
        look(frame, score_threshold=LOW), look(dataclasses.replace(frame, points=near), score_threshold=LOW)
    )


def test_memory_of_seen_cameras_comes_back(look) -> None:
    image = moment().shots["CAM_FRONT"].image
    slot = NAMES.index("CAM_FRONT")
    seen = look.camera("CAM_FRONT", image)
    assert seen.tensors is None  # the session's own buffers hold it
    values = look.session.buffers["pyramid"][slot].copy()
    look.camera("CAM_BACK", image)
    assert seen.tensors is None
    other = look.camera("CAM_FRONT", moment(2).shots["CAM_FRONT"].image)
    kept = seen.tensors["pyramid"]
    assert np.array_equal(kept[0], values) and not np.shares_memory(kept, look.session.buffers["pyramid"])
    look(moment(3))
    assert not np.shares_memory(kept, other.tensors["pyramid"]) and np.array_equal(kept[0], values)
    address = kept.__array_interface__["data"][0]
    del seen, kept
    gc.collect()
    again = [look.camera("CAM_FRONT", image) for _ in range(2)]
    assert again[0].tensors["pyramid"].__array_interface__["data"][0] == address
    many = [look.camera("CAM_FRONT", image) for _ in range(40)]
    del many
    gc.collect()
    assert len(look._spare) <= 4 * len(NAMES)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pictures_seen_in_any_order_give_what_whole_moments_give(session, wholes, data) -> None:
    """Cameras of three moments arrive in any order, with moments finished in between, some without the sweep."""
    look = FusionPipeline(spec_of(nets.TINY), session)
    seen: dict[int, dict[str, object]] = {1: {}, 2: {}, 3: {}}
    for _ in range(data.draw(st.integers(1, 14))):
        seed = data.draw(st.sampled_from((1, 2, 3)))
        if data.draw(st.integers(0, 2)):
            name = data.draw(st.sampled_from(NAMES))
            seen[seed][name] = look.camera(name, moment(seed).shots[name].image)
            continue
        lost = data.draw(st.sampled_from(((), ("CAM_BACK",), (LIDAR,))))
        had = {name: one for name, one in seen[seed].items() if name not in lost}
        found = look.finish(without(moment(seed), *lost), had, score_threshold=LOW)
        assert same(found, wholes[seed, lost]) and found.missing == lost


@pytest.fixture(scope="module")
def wholes(session) -> dict[tuple[int, tuple[str, ...]], Boxes3D]:
    look = FusionPipeline(spec_of(nets.TINY), session)
    return {
        (seed, lost): look(without(moment(seed), *lost), score_threshold=LOW)
        for seed in (1, 2, 3)
        for lost in ((), ("CAM_BACK",), (LIDAR,))
    }


def test_a_plan_without_a_network_of_its_own_for_a_camera_keeps_pictures(session) -> None:
    look = FusionPipeline(dataclasses.replace(spec_of(nets.TINY), camera_step=""), session)
    frame = moment()
    whole = look(frame, score_threshold=LOW)
    seen = {name: look.camera(name, shot.image) for name, shot in frame.shots.items()}
    look.camera("CAM_FRONT", moment(2).shots["CAM_FRONT"].image)
    assert seen["CAM_FRONT"].tensors.keys() == {"images"}
    assert same(look.finish(frame, seen, score_threshold=LOW), whole)


def test_a_result_draws_its_moment(look) -> None:
    pytest.importorskip("cv2")
    frame = moment()
    found = look(frame, score_threshold=LOW)
    image = found.draw(np.zeros((8, 8, 3), np.uint8))
    assert image.dtype == np.uint8 and image.shape[1] > 3 * 256 and image.shape[2] == 3
    nothing = dataclasses.replace(
        found, boxes=found.boxes[:0], scores=found.scores[:0], classes=found.classes[:0]
    )
    assert not np.array_equal(nothing.draw(image), image)  # boxes are seen
    plain = dataclasses.replace(found, moment=None)
    picture = np.full((40, 120, 3), 50, np.uint8)
    drawn = plain.draw(picture)
    assert drawn.shape == picture.shape and not np.array_equal(drawn, picture) and (picture == 50).all()


# --- what does not fit ----------------------------------------------------------------------------


class Fake:
    """The tensors of a session, nothing else."""

    def __init__(self, base, **changed) -> None:
        inputs = {
            **base.inputs,
            **{name: a for name, a in changed.items() if name not in base.buffers or name in base.inputs},
        }
        self.inputs = {name: a for name, a in inputs.items() if a is not None}
        self.outputs, self.buffers, self.step_ns = base.outputs, {**base.buffers, **changed}, {}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"images": np.zeros((6, 3, 40, 60), np.float32)},
            r"input 'images': expected float32 \[6, 3, 40, 64\]",
        ),
        ({"images": None}, "6 cameras, but its plan has no input 'images'"),
        ({"points": np.zeros((10, 4), np.float32)}, r"input 'points': expected float32 \['n', 5\]"),
        ({"point_count": np.zeros(1, np.int64)}, "input 'point_count': expected int32"),
        ({"point_count": None}, "a plan with 'points' has 'point_count' too"),
        ({"cameras": np.zeros(5, np.float32)}, "input 'cameras'"),
        ({"speed": np.zeros(1, np.float32)}, "input 'speed' of its plan means nothing"),
        ({"pyramid": np.zeros((5, 2), np.float32)}, "its pipeline keeps 'pyramid' of each camera"),
    ],
)
def test_tensors_that_do_not_fit_are_named(session, changed, said) -> None:
    with pytest.raises(BundleError, match=said):
        FusionPipeline(spec_of(nets.TINY), Fake(session, **changed))


@pytest.mark.parametrize("step", ["nothing", "lift", "encoder"])
def test_a_step_that_is_no_cameras_own_is_refused_at_once(session, step) -> None:
    """Not when the first picture of a stream arrives."""
    with pytest.raises(
        BundleError, match=f"camera_step '{step}' of its pipeline: expected a step .* 6 times"
    ):
        FusionPipeline(dataclasses.replace(spec_of(nets.TINY), camera_step=step), session)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cameras": ("a", "a")}, "cameras must differ"),
        ({"cameras": ("lidar",)}, "none is called 'lidar'"),
        ({"reach": -1.0}, "reach must be 0 or more"),
        ({"reach": float("nan")}, "reach must be 0 or more"),
        ({"lidar_budget_ms": 0.0}, "lidar_budget_ms must be above 0"),
        ({"lidar_budget_ms": 3.0, "voxels": None}, "needs voxels"),
        ({"ranges": {"van": 3.0}}, "expected one of the labels"),
        ({"ranges": {"car": 0.0}}, "above 0 metres"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(changed, said) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(spec_of(nets.TINY), **changed)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_strangers_spec_is_refused_or_works(session, data) -> None:
    """Any value anywhere in the pipeline of a bundle: BundleError or a pipeline, nothing else."""
    tree = to_json(spec_of(nets.TINY))
    place, key = tree, data.draw(st.sampled_from(sorted(tree)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    number = st.sampled_from([0, -1, 1e308, 5e-324, 2**31, 2**62, 0.1])
    place[key] = data.draw(number if isinstance(place[key], int | float) else _JSON)
    said = None
    try:
        look = FusionPipeline(read_spec(SimpleNamespace(pipeline=tree)), session)
    except BundleError as error:
        said = str(error)
    assert said is None or ("\n" not in said and len(said) < 600)
    if said is None:
        with contextlib.suppress(UsageError):  # a camera's picture, say, in another shape than it takes
            assert isinstance(look(moment()), Boxes3D)


# --- calibration ----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 50), index=st.integers(0, 60), size=st.sampled_from([(64, 40), (96, 54), (128, 96)])
)
def test_projections_are_where_the_rig_sees_points_in_the_networks_picture(seed, index, size) -> None:
    frame = RigWorld(seed, width=size[0], height=size[1]).frame(
        index, {"lidar", "CAM_FRONT", "CAM_BACK_LEFT"}
    )
    rule = spec_of(nets.TINY).preprocess
    told = Calibration(frame.rig, NAMES, rule)
    points = frame.points[::200]
    for i, name in enumerate(NAMES):
        uv, depth = frame.project(name, points)
        matrix = told.projections(frame)[i].astype(np.float64)
        x, y, z = matrix[:, :3] @ points[:, :3].T.astype(np.float64) + matrix[:, 3:]
        ahead = depth > 1
        assert np.allclose(z[ahead], depth[ahead], atol=1e-3)
        mapped = fit(rule, *size) @ np.stack([*uv[ahead].T, np.ones(ahead.sum())])
        assert np.allclose(np.stack([x, y])[:, ahead] / z[ahead], mapped[:2], atol=0.05)


def test_motion_of_the_vehicle_is_in_projections_and_not_in_the_table() -> None:
    on = np.eye(4)
    on[0, 3] = -0.4  # what was ahead is 40 cm nearer
    frame = moment()
    frame = dataclasses.replace(
        frame, shots={name: dataclasses.replace(shot, motion=on) for name, shot in frame.shots.items()}
    )
    still = {name: dataclasses.replace(shot, motion=np.eye(4)) for name, shot in frame.shots.items()}
    rule = spec_of(nets.TINY).preprocess
    told = Calibration(frame.rig, NAMES, rule)
    moved, stood = told.projections(frame), told.projections(dataclasses.replace(frame, shots=still))
    i = NAMES.index("CAM_FRONT")
    assert moved[i, 2, 3] - stood[i, 2, 3] == pytest.approx(
        -0.4, abs=0.02
    )  # depth, with the mounting's small angles
    lost = dataclasses.replace(frame, shots={})
    assert np.array_equal(told.projections(lost), stood)
    camera: Camera = frame.rig.cameras["CAM_FRONT"]
    assert np.allclose(told.camera_to_lidar[i], frame.rig.lidar.from_ego @ camera.to_ego, atol=1e-6)
    assert np.allclose(told.intrinsics[i], fit(rule, 64, 40) @ camera.matrix, rtol=1e-6)
    assert told.known.all()
