"""A whole stream on a true camera: nothing copied on the way to the engine, and it survives an unplugged cable."""

from __future__ import annotations

import pytest

import edgekit
from edgekit.kernels.letterbox import plan
from edgekit.runtime.watch import WatchOptions
from tests.camera.conftest import BOARD, USB, mappings

PATIENT = WatchOptions(stall_s=20, first_s=60, frozen_s=0)
"""The guest is emulated: what takes a moment elsewhere takes seconds there."""


def load(path):
    """Timings mean nothing here: no race between variants."""
    return edgekit.load(path, threads=1, tune=False)


@pytest.fixture(scope="module")
def engine(prepared):
    """A tiny network: what is emulated runs a hundred times slower."""
    with load(prepared / "tiny.edge") as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("bundle", "frames", "uri", "mapped"),
    [
        ("tiny", 4, f"v4l2:{USB}?size=1280x720&format=yuyv&fps=5&io=mmap", USB),
        ("tiny", 6, f"v4l2:{USB}?size=320x180&format=nv12&fps=10&io=mmap", USB),
        ("tiny", 6, f"v4l2:{BOARD}?size=320x180&format=nv12&fps=10&io=dmabuf", "/dmabuf"),
    ],
)
def test_nothing_is_copied_between_the_driver_s_buffer_and_the_engine(prepared, bundle, frames, uri, mapped):
    addresses = set()
    with (
        load(prepared / f"{bundle}.edge") as engine,
        edgekit.stream(engine, uri, watch_options=PATIENT) as stream,
    ):
        (detector,) = stream._workers[0].holder.current.opened
        (tensor,) = detector.session.inputs.values()
        for count, item in enumerate(stream):
            ranges = mappings(mapped)
            fused = plan(detector.spec.preprocess, item.frame.pixels.layout)
            read, written = fused.addresses(item.frame.pixels, tensor)
            assert read and all(any(at in r for r in ranges) for at in read), (
                "the kernel reads the driver's memory"
            )
            assert written == tensor.__array_interface__["data"][0], "the kernel writes the engine's input"
            assert detector._input.plan is fused, "and it is the kernel that the stream runs"
            assert sum(hop.copied for hop in item.hops) == 0
            assert [hop.written for hop in item.hops if "engine input" in hop.name] == [tensor.nbytes]
            addresses.add(item.frame.pixels.addresses)
            if count == frames - 1:
                break
    assert len(addresses) > 1, "the driver's buffers go round"


def test_a_camera_that_is_unplugged_and_plugged_in_again(engine, vivid):
    epochs = []
    with edgekit.stream(
        engine, f"v4l2:{USB}?size=320x180&format=yuyv&fps=10", watch_options=PATIENT
    ) as stream:
        for count, item in enumerate(stream):
            epochs.append(item.frame.epoch)
            if count == 3:
                vivid(USB).press("disconnect")
            if epochs[-1] and len(epochs) > 8:
                break
    camera = stream.metrics.snapshot()["cameras"]["video0"]
    assert epochs[0] == 0 and epochs[-1] == 1 and epochs == sorted(epochs)
    assert (camera["restarts"], camera["faults"]["lost"]) == (1, 1)


def test_damaged_and_dropped_buffers_are_counted_and_not_seen(engine, vivid):
    with edgekit.stream(
        engine, f"v4l2:{USB}?size=320x180&format=yuyv&fps=10", watch_options=PATIENT
    ) as stream:
        next(stream)
        vivid(USB).press("inject_v4l2_buf_flag_error")
        vivid(USB).set("percentage_of_dropped_buffers", 50)
        for count, item in enumerate(stream):
            assert not item.frame.corrupt
            if count == 8:
                break
    drops = stream.metrics.snapshot()["cameras"]["video0"]["drops"]
    assert drops["corrupt"] == 1 and drops["driver"] > 0


def test_two_cameras_on_one_engine(engine):
    seen = {}
    sources = {
        "left": f"v4l2:{USB}?size=320x180&format=yuyv&fps=10",
        "right": f"v4l2:{BOARD}?size=320x180&format=nv12&fps=10",
    }
    with edgekit.stream(engine, sources, watch_options=PATIENT) as stream:
        for item in stream:
            seen[item.camera] = seen.get(item.camera, 0) + 1
            if min(seen.values()) > 2 and len(seen) == 2:
                break
