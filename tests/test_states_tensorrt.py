"""State that stays on a GPU: the tensorrt backend on a fake board that enforces CUDA's and TensorRT's rules."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.backends.base import LoadOptions
from edgekit.backends.tensorrt import cuda
from edgekit.backends.tensorrt import engine as tensorrt_engine
from edgekit.backends.tensorrt.plan import BuildPlan, Hardware, Io
from edgekit.errors import StreamError
from edgekit.manifest import Golden, Manifest, Segment, Variant
from edgekit.runtime.session import Session
from edgekit.runtime.slots import Streams
from edgekit.spec import DType, StateSpec, TensorSpec
from tests import fake_tensorrt as fake


@pytest.fixture
def board(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[fake.Machine, Manifest, Any]]:
    """A fake network that makes 2 x + 1 of each input, so that the state counts 0, 1, 3, 7, ...

    Its parameter: how many lanes it has, by default one.
    """
    shape = (getattr(request, "param", 1), 4, 8, 8)
    machine = fake.Machine()
    monkeypatch.setitem(sys.modules, "tensorrt", fake.make_tensorrt(machine))
    monkeypatch.setattr(cuda, "open_api", lambda: fake.FakeCuda(machine))
    data = fake.network([("x", shape), ("s", shape)], [("y", shape), ("t", shape)])
    sides = [tuple(Io(name, "float32", shape) for name in names) for names in ("xs", "yt")]
    plan = BuildPlan(*sides, workspace_bytes=1 << 30, hardware=Hardware("Fake Orin", "8.7"))
    variant = Variant("v", "tensorrt", "float16", "onnx", "", len(data), "sha256:0", plan.to_options())
    manifest = Manifest(
        schema_version=1,
        model="m",
        task="none",
        target="jetson-orin",
        inputs=("x",),
        outputs=("y",),
        tensors=tuple(TensorSpec(n, DType.float32, shape) for n in "xsyt"),
        plan=(Segment("net", ("x", "s"), ("y", "t"), (variant,)),),
        pipeline={},
        payload_digest="",
        golden=Golden((), ()),
        files={},
        provenance={},
        states=(StateSpec("count", DType.float32, shape, "s", "t"),),
    )
    executable = tensorrt_engine.load(data, variant, LoadOptions(cache_dir=tmp_path))
    yield machine, manifest, executable
    machine.fail.clear()
    executable.close()
    del executable
    assert machine.idle(), machine.leaks()


Board = tuple[fake.Machine, Manifest, Any]


@pytest.mark.parametrize("recorded", [True, False])
def test_states_stay_on_the_device_of_tensorrt(board: Board, recorded: bool) -> None:
    machine, manifest, executable = board
    machine.sync_inside_execute = not recorded
    with Session(manifest, {"net": executable}) as session:
        assert session.bytes_copied_per_run == 0
        for _ in range(2):
            for i in range(7):
                session.inputs["x"][:] = i
                machine.calls.clear()
                session.run()
                tries = 1 + machine.calls.count("begin_capture")
                assert machine.calls.count("to_device") <= tries  # x alone
                assert machine.calls.count("to_host") <= tries  # y alone
                assert (session.outputs["y"] == 2 * i + 1).all()
                if i % 3:
                    assert (session.states["count"] == 2 ** (i + 1) - 1).all()
            kept = session.snapshot()
            session.reset()
            assert (session.states["count"] == 0).all()
        session.restore(kept)
        session.run()
        assert (session.states["count"] == 2**8 - 1).all()
        if recorded:
            machine.calls.clear()
            for _ in range(4):
                session.run()
            assert set(machine.calls) == {"launch", "synchronize"}
    with pytest.raises(StreamError, match="closed"):
        session.snapshot()
    del session


def test_streams_on_tensorrt(board: Board) -> None:
    _, manifest, executable = board
    rng = random.Random(0)
    counts = dict.fromkeys(range(7), 0)
    with Streams(Session(manifest, {"net": executable})) as streams:
        for _ in range(80):
            key = rng.randrange(7)
            streams.step(key)
            counts[key] += 1
            assert (streams.snapshot(key)["count"] == np.float32(2 ** counts[key] - 1)).all()


@pytest.mark.parametrize("board", [3], indirect=True)
def test_batches_of_streams_on_tensorrt(board: Board) -> None:
    """States of all lanes come to the host and go back when members change, and only then."""
    machine, manifest, executable = board
    rng = random.Random(0)
    counts = dict.fromkeys(range(7), 0)
    with Streams(Session(manifest, {"net": executable})) as streams:
        assert streams.lanes == 3
        for _ in range(120):
            keys = rng.sample(range(7), rng.randint(1, 4))
            given = {key: {"x": np.full((1, 4, 8, 8), key, np.float32)} for key in keys}
            for key, found in streams.step_many(given).items():
                assert (found["y"] == 2 * key + 1).all()
                counts[key] += 1
            for key in [k for k in counts if k in streams]:
                if rng.random() < 0.1:
                    streams.reset(key)
                    counts[key] = 0
                elif rng.random() < 0.1:  # not always: looking brings the states of all lanes to the host
                    assert (streams.snapshot(key)["count"] == np.float32(2 ** counts[key] - 1)).all()
        streams.step_many(given := {key: {"x": np.zeros((1, 4, 8, 8), np.float32)} for key in (0, 1, 2)})
        streams.step_many(given)
        machine.calls.clear()
        for _ in range(4):
            streams.step_many(given)
        assert set(machine.calls) == {"launch", "synchronize"}


@pytest.mark.parametrize("turn", [0, 1, 2, 3, 6, 7])
@pytest.mark.parametrize("call", ["execute_async_v3", "synchronize", "launch", "set_tensor_address"])
def test_a_failed_run_on_tensorrt_leaves_the_state(board: Board, call: str, turn: int) -> None:
    machine, manifest, executable = board
    with Session(manifest, {"net": executable}) as session:
        for _ in range(turn):
            session.run()
        machine.fail.add(call)
        try:
            session.run()
            done = turn + 1  # without a recording it goes on as long as it can; nothing else is forgiven
        except StreamError:
            done = turn
        machine.fail.clear()
        for i in range(4):
            assert (session.states["count"] == 2 ** (done + i) - 1).all()
            session.run()


@pytest.mark.parametrize("call", ["to_device", "set_tensor_address", "alloc"])
def test_a_session_that_cannot_begin_on_tensorrt_leaves_nothing(board: Board, call: str) -> None:
    machine, manifest, executable = board
    machine.fail.add(call)
    with pytest.raises(StreamError):
        Session(manifest, {"net": executable})
    machine.fail.clear()
    assert not machine.streams
