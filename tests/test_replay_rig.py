"""A recorded rig played again: the same moments to the last bit, and one line for whatever is damaged."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mcap", reason="needs the package mcap (edgekit[mcap])")

import edgekit
from edgekit.rig import RigFrame
from edgekit.runtime import recording_rig
from edgekit.runtime.recording_rig import Moment, moment_json
from edgekit.runtime.sinks import open_sink
from edgekit.runtime.sinks.mcap import McapSink
from tests import bevfusion_nets as nets
from tests import fusion_plans as plans
from tests.recordings import played, replay
from tests.rig_items import rig_items


def record(path: Path, count: int = 3, **options: Any) -> Path:
    with McapSink(path, **options) as sink:
        for item in rig_items()[:count]:
            sink.write(item)
    return sink.path


def same(a: RigFrame, b: RigFrame, shift: int = 0) -> None:
    assert a.rig == b.rig
    assert a.taken_ns == b.taken_ns + shift
    assert a.index == b.index
    assert np.array_equal(a.pose, b.pose)
    assert (a.points is None) == (b.points is None)
    if a.points is not None:
        assert a.points.dtype == np.float32
        assert a.points.tobytes() == b.points.tobytes()
        assert np.array_equal(a.rings, b.rings)
    assert list(a.shots) == list(b.shots)
    for name, shot in a.shots.items():
        assert np.array_equal(shot.image, b.shots[name].image)
        assert shot.taken_ns == b.shots[name].taken_ns + shift
        assert shot.motion.tobytes() == b.shots[name].motion.tobytes()


@pytest.mark.parametrize("cut", [0, 9000])
def test_moments_are_the_same_to_the_last_bit(tmp_path, cut):
    """Also of a file without an end, which a power failure leaves."""
    path = record(tmp_path / "a.mcap")
    if cut:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - 200])
    frames = played(path)
    items = rig_items()
    assert len(frames) == 3
    for frame, item in zip(frames, items, strict=True):
        same(frame.rig, item.frame.rig)
        assert (frame.seq, frame.pts_ns, frame.camera) == (item.frame.seq, item.frame.pts_ns, "rig")
        assert frame.clock == "media"
        assert frame.image.shape == item.frame.image.shape
    assert frames[0].rig.rig is frames[1].rig.rig, "what is made from a calibration stays"


def test_jpeg_gives_near_pictures_and_the_same_points(tmp_path):
    with replay(record(tmp_path / "a.mcap", images="jpeg")) as source:
        frames = list(source)
    theirs = rig_items()[0].frame.rig
    assert frames[0].rig.points.tobytes() == theirs.points.tobytes()
    for name, shot in frames[0].rig.shots.items():
        assert 0 < np.abs(shot.image.astype(int) - theirs.shots[name].image).mean() < 12


def test_round_and_round(tmp_path):
    with replay(record(tmp_path / "a.mcap"), "?loop=1", limit=7) as source:
        frames = list(source)
    assert [frame.seq for frame in frames] == list(range(7))
    steps = np.diff([frame.rig.taken_ns for frame in frames])
    assert (steps == np.diff([frame.pts_ns for frame in frames])).all(), (
        "a moment's time goes with its frame's"
    )
    assert (steps > 0).all()


def test_in_real_time_its_clock_is_ours(tmp_path):
    with replay(record(tmp_path / "a.mcap"), "?speed=1") as source:
        frames = list(source)
    for frame, item in zip(frames, rig_items()[-len(frames) :], strict=True):
        assert frame.clock == "monotonic"
        assert abs(frame.rig.taken_ns - time.monotonic_ns()) < 60e9
        same(frame.rig, item.frame.rig, frame.pts_ns - item.frame.pts_ns)


@pytest.mark.parametrize("apart", [False, True])
def test_the_same_results_bit_for_bit(tmp_path, apart):
    bundle = plans.write(tmp_path / "tiny.host.edge", tolerance=1e-3)
    whole = "synthetic://street-rig?seed=3&size=64x64&frames=3"
    names = (*nets.TINY.camera.names[:4], "lidar")  # some are missing
    source: Any = {name: f"{whole}&sensor={name}" for name in names} if apart else whole
    path = tmp_path / "a.mcap"
    with edgekit.load(bundle, threads=1, self_test=False) as engine:
        with edgekit.stream(engine, source, sinks=[open_sink(path)], score_threshold=0.02) as stream:
            first = [item.result.to_json() for item in stream]
        with edgekit.stream(engine, f"replay:{path}", score_threshold=0.02) as stream:
            second = [item.result.to_json() for item in stream]
    assert len(first) == 3
    assert sum(len(found["boxes"]) for found in first) > 10
    for a, b in zip(first, second, strict=True):
        a.pop("taken_ns"), b.pop("taken_ns")
        assert a == b


def test_a_part_that_is_lost_costs_that_moment(tmp_path, monkeypatch):
    """As if the chunk with one picture of the second moment had been damaged."""
    path = record(tmp_path / "a.mcap")
    real = Moment.frame

    def frame(self: Moment, points: Any, images: Any, rings: Any) -> RigFrame:
        if self.taken_ns == rig_items()[1].frame.rig.taken_ns:
            images = {name: image for name, image in images.items() if name != "CAM_BACK"}
        return real(self, points, images, rings)

    monkeypatch.setattr(Moment, "frame", frame)
    with replay(path) as source:
        assert [found.seq for found in source] == [0, 2]
    ((_, told),) = source.skipped
    assert "picture of CAM_BACK is missing" in told


def test_without_pictures_there_is_nothing_to_play(tmp_path):
    path = record(tmp_path / "a.mcap", images="none")
    with pytest.raises(edgekit.errors.UsageError, match="holds no picture"):
        played(path)


# --- what a file may say ---


def test_a_moment_survives_json():
    for item in rig_items():
        rig = item.frame.rig
        moment = Moment.from_json(json.dumps(moment_json(rig)).encode())
        same(moment.frame(rig.points, {name: shot.image for name, shot in rig.shots.items()}, rig.rings), rig)
    bare = replace(rig_items()[0].frame.rig, pose=None, points=None, shots={})
    same_again = Moment.from_json(json.dumps(moment_json(bare)).encode()).frame(None, {})
    assert same_again.pose is None
    assert same_again.shots == {}


def damage(values: dict[str, Any], change: str) -> None:
    name = next(iter(values["shots"]))
    if change == "camera":
        values["shots"]["nobody"] = values["shots"][name]
    elif change == "matrix":
        values["shots"][name]["motion"] = [[1, 2], [3, 4]]
    elif change == "infinite":
        values["pose"][0][0] = float("inf")
    elif change == "text":
        values["pose"][0][0] = "1"
    elif change == "time":
        values["taken_ns"] = 1.5
    elif change == "huge":
        values["taken_ns"] = 2**70
    elif change == "rig":
        values["rig"]["cameras"][name]["fx"] = -1
    elif change == "shots":
        values["shots"] = []


@pytest.mark.parametrize("change", ["camera", "matrix", "infinite", "text", "time", "huge", "rig", "shots"])
def test_a_moment_that_says_nonsense_is_refused(change):
    values = moment_json(rig_items()[0].frame.rig)
    Moment.from_json(json.dumps(values).encode())
    damage(values, change)
    with pytest.raises(ValueError, match=r"."):
        Moment.from_json(json.dumps(values).encode())


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["rig", "shots", "pose", "taken_ns", "a"]), inner),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_bytes_that_are_no_moment_are_a_value_error(data):
    for read in (Moment.from_json, lambda raw: recording_rig.read_points(memoryview(raw))):
        try:
            read(data)
        except ValueError:
            continue
        assert read is not Moment.from_json


def test_a_damaged_file_never_ends_in_a_trace(tmp_path):
    path = record(tmp_path / "a.mcap", images="jpeg")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(25):
        data = bytearray(whole)
        for spot in rng.integers(60, len(data), 3):
            data[spot] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(data))
        try:
            frames = played(path)
        except edgekit.errors.UsageError:
            continue
        assert len(frames) <= 3
