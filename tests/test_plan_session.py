"""Sessions on plans of networks and kernels: a small BEVFusion against the same parts called one by one."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edgekit.backends.base import Payload
from edgekit.bundle import make_variant
from edgekit.errors import StreamError, UsageError
from edgekit.kernels.bev_pool import BevPool, Geometry, build
from edgekit.kernels.depth_raster import depth_raster
from edgekit.kernels.sparse_conv import encoder
from edgekit.kernels.voxelize import local_values, voxelize
from edgekit.manifest import Golden, Manifest, Segment
from edgekit.models.bevfusion.lidar import weights
from edgekit.runtime.session import Session
from edgekit.runtime.slots import Streams
from edgekit.spec import DType, TensorSpec
from tests.bevfusion_nets import TINY, frame, network
from tests.fusion_plans import HOST, SEGMENTS, executables, feed, manifest, payload, put, shapes

Given = dict[str, np.ndarray]
MIXED = {
    "camera": [("litert", "float32")], "lift": [("openvino", "float32")], "lidar": [HOST],
    "fusion": [("litert", "float32")],
}  # fmt: skip
"""A library for each network; LiteRT's neighbours are kernels, other libraries, and a network run camera by camera."""


@functools.lru_cache(8)
def ort(segment: str) -> Callable[[Mapping[str, np.ndarray]], Given]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        payload(segment, *HOST).data, options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]

    def run(given: Mapping[str, np.ndarray]) -> Given:
        found = session.run(names, {value.name: given[value.name] for value in session.get_inputs()})
        return dict(zip(names, found, strict=True))

    return run


def by_hand(given: Given) -> Given:
    """Every tensor of the plan, by calling its parts; what `when` switches off is zeros."""
    found = {name: np.zeros(spec.shape, np.float32) for name, spec in shapes().items()} | given
    points = given["points"][: given["point_count"][0]]
    for i in np.flatnonzero(given["cameras"]):
        found["pyramid"][i : i + 1] = ort("camera")({"images": given["images"][i : i + 1]})["pyramid"]
    if given["lidar"].any():
        found["depth_images"] = depth_raster(points, given["projections"], TINY.camera.image)[:, None]
        voxels = voxelize(points, TINY.lidar.grid)
        net = encoder.prepare(weights(network(TINY).encoder), TINY.lidar.encoder)
        found["lidar_grid"] = encoder.encode(net, voxels.coordinates, local_values(voxels, TINY.lidar.grid))
        found |= ort("lidar")(found)
    if given["cameras"].any():
        found |= ort("lift")(found)
        table = build(
            Geometry(given["intrinsics"], given["camera_to_lidar"], None, TINY.camera.frustum, TINY.bev.pool)
        )
        pool = BevPool(table, TINY.camera.channels)
        there = given["cameras"].astype(bool).tolist()
        found["camera_bev"] = pool.run(found["depth"], found["features"], cameras=there)
    return found | ort("fusion")(found)


def without(given: Given, cameras: list[int] = [], lidar: bool = True) -> Given:  # noqa: B006 - not changed
    found = {name: array.copy() for name, array in given.items()}
    found["cameras"][cameras] = 0
    if not lidar:
        found["lidar"][0], found["point_count"][0] = 0, 0
    found["present"][0] = found["cameras"].any(), lidar
    return found


def copied(arrays: Mapping[str, np.ndarray]) -> Given:
    return {name: array.copy() for name, array in arrays.items()}


def same(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
    for name, array in got.items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)


@pytest.fixture(scope="module")
def plan() -> tuple[Manifest, dict[str, Any]]:
    made, files = manifest()
    return made, executables(made, files)


@pytest.fixture
def session(plan: tuple[Manifest, dict[str, Any]]) -> Iterator[Session]:
    with Session(*plan) as made:
        yield made


def test_a_plan_gives_what_its_parts_give(session: Session) -> None:
    assert set(session.buffers) == set(shapes())
    for seed in (1, 2):
        given = feed(frame(seed))
        put(session, given)
        session.run()
        want = by_hand(given)
        same(session.buffers, want)
        assert all(session.outputs[name] is session.buffers[name] for name in session.outputs)
        assert np.abs(want["lidar_bev"]).max() > 0 and np.abs(want["camera_bev"]).max() > 0


@pytest.mark.parametrize("overlap", [True, False])
def test_missing_sensors(session: Session, overlap: bool) -> None:
    """What ran before leaves nothing behind."""
    session.overlap = overlap
    whole = feed(frame())
    cases = [
        without(whole, [2]), whole, without(whole, lidar=False), without(whole, [0, 1, 2, 3, 4, 5]), whole,
        without(whole, [0, 5], lidar=False), without(whole, list(range(6)), lidar=False), without(whole, [3]),
    ]  # fmt: skip
    assert len(whole["cameras"]) == 6
    for given in cases:
        put(session, given)
        session.run()
        same(session.buffers, by_hand(given))


def test_steps_run_at_the_same_time_and_give_the_same_bits(plan: tuple[Manifest, dict[str, Any]]) -> None:
    given = [feed(frame(seed)) for seed in (1, 2)]
    with Session(*plan) as serial, Session(*plan) as overlapped:
        serial.overlap = False
        assert overlapped.overlap
        want = []
        for each in given:
            put(serial, each)
            serial.run()
            times = list(serial.step_ns.values())
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(times))
            want.append(copied(serial.buffers))
        for i in range(60):
            put(overlapped, given[i % 2])
            overlapped.run()
            same(overlapped.buffers, want[i % 2])


def test_the_branches_do_overlap(plan: tuple[Manifest, dict[str, Any]]) -> None:
    """Camera and encoder, each held up until the other has begun."""
    made, loaded = plan
    meet = threading.Barrier(2, timeout=20)
    names = set()

    def waiting(executable: Any, once: list[int]) -> Any:
        class Held:
            inputs, outputs = executable.inputs, executable.outputs

            def bind_to(self, *given: Any) -> Any:
                binding = executable.bind_to(*given)
                run = binding.run

                def held() -> None:
                    if once:
                        once.pop()
                        names.add(threading.current_thread().name)
                        meet.wait()
                    run()

                binding.run = held
                return binding

        return Held()

    held = {**loaded, **{name: waiting(loaded[name], [1]) for name in ("camera", "encoder")}}
    given = feed(frame())
    with Session(made, held) as session:
        put(session, given)
        session.run()
        same(session.buffers, by_hand(given))
    assert len(names) == 2
    meet.reset()
    with Session(made, {**loaded, "camera": waiting(loaded["camera"], [1])}) as session:
        session.overlap = False
        threading.Timer(0.2, meet.abort).start()  # alone it would wait for ever
        put(session, given)
        with pytest.raises(threading.BrokenBarrierError):
            session.run()


def test_slices_run_side_by_side_where_their_library_can(plan: tuple[Manifest, dict[str, Any]]) -> None:
    """Two pictures of the repeated step, each held up until the other has begun."""
    made, loaded = plan
    meet = threading.Barrier(2, timeout=20)
    camera, left = loaded["camera"], [1, 1]
    assert camera.reentrant

    class Held:
        inputs, outputs, reentrant = camera.inputs, camera.outputs, True

        def bind_to(self, *given: Any) -> Any:
            binding = camera.bind_to(*given)
            run = binding.run

            def held() -> None:
                if left:
                    left.pop()
                    meet.wait()
                run()

            binding.run = held
            return binding

    given = feed(frame())
    with Session(made, {**loaded, "camera": Held()}) as session:
        put(session, given)
        session.run()
        same(session.buffers, by_hand(given))
        begin, end = session.step_ns["camera"]
        assert begin < end <= session.step_ns["lift"][0]


def test_slots_and_what_is_done(session: Session) -> None:
    given = feed(frame())
    want = by_hand(given)
    put(session, {**given, "cameras": np.zeros(6, np.float32)})
    for slot in (3, 0, 5, 1, 4, 2):
        session.run_slot("camera", slot)
        same({"slice": session.buffers["pyramid"][slot]}, {"slice": want["pyramid"][slot]})
    session.inputs["cameras"][:] = 1
    session.buffers["images"][:] = np.nan  # would show if it were run again
    session.run(done=("camera",))
    same({**session.outputs, "pyramid": session.buffers["pyramid"]}, want)
    assert session.step_ns["camera"][1] - session.step_ns["camera"][0] < 1e8

    # tensors from elsewhere, and a camera less: its slice is zeros although it is said to be done
    less = without(given, [4])
    put(session, less)
    session.buffers["pyramid"][...] = want["pyramid"]
    session.run(["camera"])
    same(session.buffers, by_hand(less))

    for words in (("nothing", 0), ("fusion", 0), ("lift", 0), ("camera", 6), ("camera", -1)):
        with pytest.raises(UsageError, match="step"):
            session.run_slot(*words)
    with pytest.raises(UsageError, match=r"step 'camer': not in this plan. Did you mean 'camera'"):
        session.run(done=("camer",))


def test_a_step_that_is_not_repeated_has_one_slot(session: Session) -> None:
    """The network of a rig's only camera is one, too."""
    given = feed(frame())
    want = by_hand(given)
    put(session, given)
    names = ("camera", "depth_raster", "encoder", "lift", "fusion", "nothing")
    assert [session.slots(name) for name in names] == [6, 1, 1, 0, 0, 0]
    session.run_slot("encoder", 0)
    same({"grid": session.buffers["lidar_grid"]}, {"grid": want["lidar_grid"]})
    session.run(done=("encoder",))
    same(session.outputs, {name: want[name] for name in session.outputs})


def test_times_of_steps(session: Session) -> None:
    assert dict(session.step_ns) == {}
    put(session, feed(frame()))
    session.run()
    first = session.step_ns
    assert set(first) == {"camera", "depth_raster", "lift", "pool", "encoder", "lidar", "fusion"}
    assert all(begin <= end for begin, end in first.values())
    for before, after in (
        ("camera", "lift"),
        ("lift", "pool"),
        ("encoder", "lidar"),
        ("lidar", "fusion"),
        ("pool", "fusion"),
    ):
        assert first[before][1] <= first[after][0]
    kept = dict(first)
    session.run()
    assert dict(first) == kept and session.step_ns["fusion"] > kept["fusion"]


@pytest.mark.parametrize("overlap", [True, False])
def test_an_error_of_a_step_comes_out(plan: tuple[Manifest, dict[str, Any]], overlap: bool) -> None:
    given = feed(frame())
    with Session(*plan) as session:
        session.overlap = overlap
        put(session, given)
        for count in (-1, 6001, 2**31 - 1):
            session.inputs["point_count"][0] = count
            with pytest.raises(StreamError, match="point_count: expected 0 to 6000, got") as caught:
                session.run()
            assert "\n" not in str(caught.value)
        session.inputs["point_count"][0] = given["point_count"][0]
        session.inputs["intrinsics"][1] = 0
        with pytest.raises(StreamError, match=r"step pool: .*camera 1.* invertible"):
            session.run()
        put(session, given)
        session.run()
        same(session.outputs, by_hand(given))
    with pytest.raises(StreamError, match="closed"):
        session.run()
    with pytest.raises(StreamError, match="closed"):
        session.run_slot("camera", 0)
    session.close()


def helpers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("edgekit-plan")}


def test_threads_come_with_the_first_run_and_go_with_the_session(
    plan: tuple[Manifest, dict[str, Any]],
) -> None:
    before = helpers()
    given = feed(frame())
    sessions = [Session(*plan) for _ in range(3)]
    assert helpers() == before
    for session in sessions:
        put(session, given)
        session.run()
    started = helpers() - before
    assert 3 <= len(started) <= 6
    for _ in range(5):
        sessions[0].run()
    assert helpers() - before == started
    sessions[0].close()
    sessions[1].close()
    assert len(helpers() - before) == len(started) // 3
    gone = weakref.ref(sessions[2])
    sessions.clear()
    del session
    gc.collect()
    assert gone() is None and helpers() == before  # also where nobody closes it


def test_many_sessions_in_many_threads(plan: tuple[Manifest, dict[str, Any]]) -> None:
    cases = [(feed(frame(seed)), by_hand(feed(frame(seed)))) for seed in (1, 2)]

    def work(number: int) -> None:
        given, want = cases[number % 2]
        with Session(*plan) as session:
            put(session, given)
            for _ in range(12):
                session.run()
                same(session.outputs, want)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, i) for i in range(6)]:
            future.result(60)
    assert not helpers()


def test_sessions_leave_nothing_behind() -> None:
    made, files = manifest()
    loaded = executables(made, files)
    with Session(made, loaded) as session:
        put(session, feed(frame()))
        session.run()
        arrays = [weakref.ref(array.base) for array in session.buffers.values() if array.base is not None]
    refs = [weakref.ref(each) for each in (session, *loaded.values())]
    for each in loaded.values():
        each.close()
    del session, loaded, each
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert not [ref for ref in arrays if ref() is not None]


# --- memory and libraries -----------------------------------------------------------------------


def test_nothing_is_copied_between_steps(session: Session) -> None:
    assert session.bytes_copied_per_run == 0


def test_libraries_in_one_plan(plan: tuple[Manifest, dict[str, Any]]) -> None:
    made, files = manifest(MIXED)
    sizes = {name: 4 * spec.elements for name, spec in shapes().items()}
    given = feed(frame())
    with Session(made, executables(made, files)) as session:
        # pictures and pyramids go in and out of LiteRT camera by camera; what fusion reads lies there channels last,
        # which the pooling can write, but not ONNX Runtime
        assert not session.buffers["camera_bev"].flags.c_contiguous
        assert session.bytes_copied_per_run == sum(sizes[name] for name in ("images", "pyramid", "lidar_bev"))
        for each in (given, without(given, [1], lidar=False), without(given, list(range(6)))):
            want = by_hand(each)
            for overlap in (True, False):
                session.overlap = overlap
                put(session, each)
                session.run()
                for name, array in session.buffers.items():
                    scale = max(1.0, float(np.abs(want[name]).max()))
                    assert np.abs(array - want[name]).max() <= 2e-4 * scale, name
        first = None
        for i in range(20):
            session.overlap = bool(i % 2)
            session.run()
            first = first or copied(session.buffers)
            same(session.buffers, first)


@pytest.mark.parametrize("backend", ["openvino", "litert"])
def test_one_other_library(backend: str) -> None:
    made, files = manifest({segment: [(backend, "float32")] for segment in SEGMENTS})
    given = feed(frame())
    want = by_hand(given)
    with Session(made, executables(made, files)) as session:
        if backend == "openvino":
            assert session.bytes_copied_per_run == 0
        put(session, given)
        for slot in (2, 5):
            session.run_slot("camera", slot)
            np.testing.assert_allclose(session.buffers["pyramid"][slot], want["pyramid"][slot], atol=1e-3)
        session.run()
        for name, array in session.outputs.items():
            np.testing.assert_allclose(array, want[name], atol=1e-3)


def test_a_kernel_first_and_a_kernel_last() -> None:
    """Plans of one kernel, and of kernels only."""
    made, files = manifest()
    raster = dataclasses.replace(made.plan[1], when=None)
    names = (*raster.inputs, *raster.outputs)
    tensors = tuple(tensor for tensor in made.tensors if tensor.name in names)
    small = dataclasses.replace(
        made, plan=(raster,), inputs=raster.inputs, outputs=raster.outputs, tensors=tensors
    )
    given = feed(frame())
    with Session(small, executables(small, files)) as session:
        for name in raster.inputs:
            session.inputs[name][...] = given[name]
        session.run()
        same(session.outputs, by_hand(given))


def test_cameras_are_no_lanes() -> None:
    """A plan whose tensors all begin with the number of cameras takes one stream a run."""
    made, files = manifest()
    camera = made.plan[0]
    tensors = tuple(tensor for tensor in made.tensors if tensor.name in ("images", "pyramid", "cameras"))
    small = dataclasses.replace(
        made, plan=(camera,), inputs=("images", "cameras"), outputs=("pyramid",), tensors=tensors
    )
    given = feed(frame())
    with Streams(Session(small, executables(small, files))) as streams:
        assert streams.lanes == 1
        found = streams.step("a", {name: given[name] for name in ("images", "cameras")})
        same(found, {"pyramid": by_hand(given)["pyramid"]})


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_slices_that_lie_channels_last(backend: str) -> None:
    """A payload that takes its pictures as [1, H, W, C], as INT8 ones do: run picture by picture where they are."""
    from onnx import TensorProto, helper

    n, c, h, w = shape = (3, 4, 5, 6)
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 3, 1, 2]),
        helper.make_node("Add", ["turned", "turned"], ["y"]),
    ]
    sides = ([("x", [1, h, w, c])], [("y", [1, c, h, w])])
    values = [[helper.make_tensor_value_info(m, TensorProto.FLOAT, s) for m, s in side] for side in sides]
    graph = helper.make_graph(nodes, "net", *values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = {"channels_last": ["x"]}
    lowered = Payload(backend, "float32", "onnx", model.SerializeToString(), (), (), options)
    variant = make_variant("net", "v", lowered)
    tensors = tuple(TensorSpec(name, DType.float32, shape) for name in "xy")
    made = Manifest(
        schema_version=1, model="m", task="none", target="host", inputs=("x",), outputs=("y",), tensors=tensors,
        plan=(Segment("net", ("x",), ("y",), (variant,), repeat=n),), pipeline={}, payload_digest="",
        golden=Golden((), ()), files={}, provenance={},
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with Session(made, executables(made, {variant.path: lowered.data})) as session:
        assert session.inputs["x"].shape == shape and not session.inputs["x"].flags.c_contiguous
        assert session.bytes_copied_per_run == 0
        for factor in (1, 2):
            session.inputs["x"][...] = factor * x
            session.run()
            np.testing.assert_array_equal(session.outputs["y"], 2 * factor * x)
