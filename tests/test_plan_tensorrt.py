"""A plan of TensorRT engines with kernels on the CPU between them, on a fake board that enforces CUDA's rules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.backends.base import LoadOptions
from edgekit.backends.tensorrt import cuda, engine
from edgekit.backends.tensorrt.plan import BuildPlan, Hardware, Io
from edgekit.errors import StreamError
from edgekit.kernels import steps
from edgekit.kernels.bev_pool import BevPool, Geometry, build
from edgekit.manifest import Golden, KernelStep, Manifest, Segment, Variant
from edgekit.runtime.session import Session
from edgekit.spec import TensorSpec
from tests import fake_tensorrt as fake
from tests.bevfusion_nets import TINY, frame
from tests.fusion_plans import feed, kernel_steps, put, shapes
from tests.test_plan_session import by_hand

SAME = {
    "seen": "images",
    "weight": "depth",
    "marks": "depth_images",
    "above": "lidar_grid",
    "joint": "camera_bev",
}
"""Tensors of this plan that are like one of the real one's."""

Board = tuple[fake.Machine, Manifest, dict[str, Any]]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Board]:
    """Networks that make 2 x + 1: before, between and after kernels, one of them run camera by camera."""
    machine = fake.Machine()
    monkeypatch.setitem(sys.modules, "tensorrt", fake.make_tensorrt(machine))
    monkeypatch.setattr(cuda, "open_api", lambda: fake.FakeCuda(machine))
    known = shapes()
    tensors = known | {
        name: TensorSpec(name, known[like].dtype, known[like].shape) for name, like in SAME.items()
    }
    (raster, pool, encoder), data = kernel_steps()
    inputs = ("images", "depth", "features", *[n for n in feed(frame()) if n not in ("images", "present")])
    executables: dict[str, Any] = {}

    def segment(name: str, sources: tuple[str, ...], results: tuple[str, ...], **how: Any) -> Segment:
        def one(tensor: str) -> tuple[int, ...]:
            shape = tensors[tensor].shape
            return (1, *shape[1:]) if "repeat" in how else shape

        sides = [[(tensor, one(tensor)) for tensor in names] for names in (sources, results)]
        plan = BuildPlan(
            *(tuple(Io(tensor, "float32", shape) for tensor, shape in side) for side in sides),
            workspace_bytes=1 << 30,
            hardware=Hardware("Fake Orin", "8.7"),
        )
        network = fake.network(*sides)
        variant = Variant(
            name, "tensorrt", "float16", "onnx", "", len(network), "sha256:0", plan.to_options()
        )
        options = LoadOptions(cache_dir=tmp_path, cache_key=name)
        executables[name] = engine.load(memoryview(network), variant, options)
        return Segment(name, sources, results, (variant,), **how)

    pooled = KernelStep(
        "pool", "bev_pool", ("weight", *pool.inputs[1:]), pool.outputs, pool.options, when="cameras"
    )
    plan = (
        segment("camera", ("images",), ("seen",), repeat=6, when="cameras"),
        raster,
        segment("weigh", ("depth", "depth_images"), ("weight", "marks"), when="cameras"),
        pooled,
        encoder,
        segment("fusion", ("lidar_grid", "camera_bev"), ("above", "joint")),
    )
    by_name = {**tensors}
    for step in plan:
        if isinstance(step, KernelStep):
            executables[step.name] = steps.load(step, by_name, lambda _: memoryview(data), LoadOptions(1))
    manifest = Manifest(
        schema_version=1, model="m", task="none", target="jetson-orin", inputs=inputs,
        outputs=("above", "joint", "seen", "marks"),
        tensors=tuple(t for n, t in tensors.items() if n in {*inputs, *(x for s in plan for x in s.outputs)}),
        plan=plan, pipeline={}, payload_digest="", golden=Golden((), ()), files={}, provenance={},
    )  # fmt: skip
    yield machine, manifest, executables
    machine.fail.clear()
    for executable in executables.values():
        executable.close()
    executables.clear()
    assert machine.idle(), machine.leaks()


def given() -> dict[str, np.ndarray]:
    known, rng = shapes(), np.random.default_rng(0)
    found = {name: array for name, array in feed(frame()).items() if name != "present"}
    return found | {
        name: rng.normal(size=known[name].shape).astype(np.float32) for name in ("depth", "features")
    }


def expected(fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    real = by_hand(
        {
            **{n: a for n, a in fed.items() if n not in ("depth", "features")},
            "present": np.ones((1, 2), np.float32),
        }
    )
    there = fed["cameras"].astype(bool)
    bev = np.zeros_like(real["camera_bev"])
    if there.any():
        table = build(
            Geometry(fed["intrinsics"], fed["camera_to_lidar"], None, TINY.camera.frustum, TINY.bev.pool)
        )
        bev = BevPool(table, TINY.camera.channels).run(
            2 * fed["depth"] + 1, fed["features"], cameras=there.tolist()
        )
    return {
        "seen": np.where(there[:, None, None, None], 2 * fed["images"] + 1, 0),
        "marks": (2 * real["depth_images"] + 1) * there.any(),
        "above": 2 * real["lidar_grid"] + 1,
        "joint": 2 * bev + 1,
    }


def test_kernels_write_into_pinned_memory(board: Board) -> None:
    machine, manifest, executables = board
    fed = given()
    with Session(manifest, executables) as session:
        known = shapes()
        assert (
            session.bytes_copied_per_run == 2 * 4 * known["images"].elements
        )  # in and out, camera by camera
        pinned = set(machine.host_memory)
        for name in ("lidar_grid", "camera_bev", "depth_images", "depth", "weight", "above"):
            assert session.buffers[name].ctypes.data in pinned, name
        for cameras in (range(6), (0, 3), (), range(6)):
            fed["cameras"][:] = 0
            fed["cameras"][list(cameras)] = 1
            want = expected(fed)
            for overlap in (
                True,
                False,
                True,
                True,
            ):  # graphs are recorded on the second run, in whichever thread
                session.overlap = overlap
                put(session, fed)
                machine.calls.clear()
                session.run()
                for name, array in session.outputs.items():
                    np.testing.assert_array_equal(array, want[name], err_msg=name)
        assert machine.calls.count("launch") == 8
        session.run_slot("camera", 4)
        np.testing.assert_array_equal(session.buffers["seen"][4], 2 * fed["images"][4] + 1)
    with pytest.raises(StreamError, match="closed"):
        session.run()
    del session


@pytest.mark.parametrize("overlap", [True, False])
def test_a_board_that_fails(board: Board, overlap: bool) -> None:
    machine, manifest, executables = board
    fed = given()
    with Session(manifest, executables) as session:
        session.overlap = overlap
        put(session, fed)
        session.run()
        machine.fail.add("to_device")
        with pytest.raises(StreamError, match="made to fail"):
            session.run()
        machine.fail.clear()
        session.run()
        want = expected(fed)
        for name, array in session.outputs.items():
            np.testing.assert_array_equal(array, want[name], err_msg=name)
    del session


def test_no_memory_left_on_the_board(board: Board) -> None:
    machine, manifest, executables = board
    machine.memory_bytes = 300_000
    with pytest.raises(StreamError, match="out of memory"):
        Session(manifest, executables)
    assert not machine.device_memory and not machine.streams


def test_an_engine_that_closes_ends_its_sessions(board: Board) -> None:
    _, manifest, executables = board
    with Session(manifest, executables) as session:
        put(session, given())
        session.run()
        executables["weigh"].close()
        with pytest.raises(StreamError, match="closed"):
            session.run()
    del session
