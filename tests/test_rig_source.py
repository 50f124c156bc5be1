"""`synthetic://street-rig`: a rig as one source, and each of its sensors as one."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.rig import mosaic
from edgekit.runtime.sources import open_source
from edgekit.synth.street_rig import RigWorld

URI = "synthetic://street-rig?seed=3&frames=3&size=64x64"


def test_frames_carry_what_the_rig_saw():
    world = RigWorld(3, width=64, height=64)
    with open_source(URI) as source:
        assert (source.size, source.fps, source.frames) == ((192, 128), 10.0, 3)
        frames = list(source)
    assert [frame.pts_ns for frame in frames] == [50_000_000, 150_000_000, 250_000_000]
    for i, frame in enumerate(frames):
        expected = world.frame(i)
        assert np.array_equal(frame.rig.points, expected.points)
        assert np.array_equal(frame.rig.truth.boxes, expected.truth.boxes)
        assert np.array_equal(frame.image, mosaic(expected))
        assert frame.rig.taken_ns == frame.pts_ns == expected.taken_ns
        assert frame.rig.rig == world.rig
        assert frame.without_pixels().rig is None


@pytest.mark.parametrize("fps", ["10", "25"])
def test_every_sensor_is_a_source_of_its_own(fps):
    """Together they are the whole: what each measured, and when."""
    with open_source(f"{URI}&fps={fps}") as source:
        whole = list(source)
    names = ["lidar", *whole[0].rig.rig.cameras]
    for name in names:
        with open_source(f"{URI}&fps={fps}&sensor={name}") as source:
            frames = list(source)
        assert len(frames) == len(whole)
        for frame, all_of_it in zip(frames, whole, strict=True):
            assert frame.camera == name
            part = {sensor: part for _, sensor, part in all_of_it.rig.parts()}[name]
            taken = part.taken_ns if name == "lidar" else part.shots[name].taken_ns
            assert frame.pts_ns == pytest.approx(taken, abs=2)
            assert frame.rig.taken_ns == pytest.approx(all_of_it.rig.taken_ns, abs=2)
            if name == "lidar":
                assert np.array_equal(frame.rig.points, part.points)
                assert frame.image.shape == (32, 720, 3)
                assert np.count_nonzero(frame.image[..., 0]) > 0.95 * len(part.points)
            else:
                assert np.array_equal(frame.image, part.shots[name].image)
                assert list(frame.rig.shots) == [name]


def test_live_and_looped_frames_have_the_time_of_now():
    with open_source(f"{URI}&live=1&loop=2&fps=50&format=nv12") as source:
        frames = list(source)
    assert frames[0].pixels.layout.format == "nv12"
    assert frames[-1].seq == 2
    for frame in frames:
        assert frame.clock == "monotonic"
        assert frame.rig.taken_ns == frame.pts_ns <= frame.captured_ns
        for name, shot in frame.rig.shots.items():
            late = frame.rig.rig.cameras[name].offset_ms * 1e6
            assert shot.taken_ns - frame.pts_ns == pytest.approx(late, abs=2)
    with open_source(f"{URI}&live=1&loop=2&fps=50&sensor=CAM_BACK") as source:
        frame = source.read()
        assert frame.pts_ns == frame.rig.shots["CAM_BACK"].taken_ns <= frame.captured_ns


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (f"{URI}&sensor=CAM_FRNT", "CAM_FRONT"),
        (f"{URI}&pictures=.", "no pictures"),
        ("synthetic://street?sensor=lidar", "only street-rig"),
        ("synthetic://gestures?sensor=lidar", "only street-rig"),
        ("synthetic://street-rog", "street-rig"),
        ("synthetic://street-rig?size=63x64", "size not usable"),
        ("synthetic://street-rig?size=3000x2000&loop=100", "MiB"),
    ],
)
def test_wrong_uris_say_what_is_wrong(uri, said):
    with pytest.raises(UsageError) as caught:
        open_source(uri)
    assert said in str(caught.value)
