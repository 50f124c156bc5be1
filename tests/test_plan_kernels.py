"""Kernels as steps of a plan: what they compute, what they refuse, and tables of rigs."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from edgekit.backends.base import LoadOptions, zeros
from edgekit.errors import BundleError, StreamError, UsageError
from edgekit.kernels import bev_pool, steps
from edgekit.kernels.bev_pool import BevPool, Geometry, build
from edgekit.kernels.sparse_conv import encoder as sparse
from edgekit.kernels.voxelize import local_values, voxelize
from edgekit.manifest import KernelStep
from edgekit.models.bevfusion.lidar import weights
from edgekit.schema import to_json
from edgekit.spec import DType, TensorSpec
from tests.bevfusion_nets import OTHER, TINY, frame, network
from tests.fusion_plans import feed, kernel_steps, shapes

RASTER, POOL, ENCODER = kernel_steps()[0]
DATA = kernel_steps()[1]


def load(
    step: KernelStep, data: bytes = DATA, tensors: dict[str, TensorSpec] | None = None, **options: Any
) -> steps.KernelExecutable:
    return steps.load(step, tensors or shapes(), lambda _: memoryview(data), LoadOptions(1, **options))


def run(executable: steps.KernelExecutable, given: dict[str, np.ndarray]) -> np.ndarray:
    binding = executable.bind()
    for name, array in binding.inputs.items():
        array[...] = given[name]
    binding.run()
    (out,) = binding.outputs.values()
    found = out.copy()
    out[...] = np.nan
    binding.run()
    np.testing.assert_array_equal(out, found)  # written whole
    return found


def fed(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = feed(frame(seed))
    return found | {n: rng.normal(size=shapes()[n].shape).astype(np.float32) for n in ("depth", "features")}


# --- what they compute --------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("values", ["local", "raw"])
def test_encoder(values: str, precision: str) -> None:
    config = TINY if values == "local" else OTHER
    spec, grid = config.lidar.encoder, config.lidar.grid
    found = fed()
    points = found["points"][: found["point_count"][0]]
    voxels = voxelize(points, grid, max_points=config.lidar.max_points, max_voxels=config.lidar.max_voxels)
    local = local_values(voxels, grid) if values == "local" else voxels.features[:, : spec.inputs]
    given = weights(network(config).encoder)
    scales = {}
    if precision == "int8":
        scales = sparse.calibrate(sparse.prepare(given, spec), [(voxels.coordinates, local)])
    want = sparse.encode(sparse.prepare(given, spec, scales=scales or None), voxels.coordinates, local)
    step = kernel_steps(config)[0][2]
    step.options.update(precision=precision, scales=scales)
    tensors = shapes(config)
    executable = load(step, kernel_steps(config)[1], tensors)
    np.testing.assert_array_equal(run(executable, found), want)
    assert executable.describe()["precision"] == precision
    found["point_count"][0] = 0
    assert not run(executable, found).any()


def test_inputs_go_by_their_place(tmp_path: Path) -> None:
    found = fed()
    names = {name: f"renamed {name}" for name in (*POOL.inputs, *POOL.outputs)}
    tensors = {new: dataclasses.replace(shapes()[old], name=new) for old, new in names.items()}
    step = dataclasses.replace(
        POOL, inputs=tuple(names[n] for n in POOL.inputs), outputs=tuple(names[n] for n in POOL.outputs)
    )
    got = run(load(step, tensors=tensors), {names[n]: found[n] for n in POOL.inputs})
    np.testing.assert_array_equal(got, run(load(POOL), found))


def test_arrays_that_are_given_are_used_where_they_fit() -> None:
    executable = load(POOL)
    given = {name: zeros(spec.shape, spec.dtype.value) for name, spec in shapes().items()}
    binding = executable.bind_to(given)
    assert all(binding.inputs[n] is given[n] for n in POOL.inputs)
    assert binding.outputs["camera_bev"] is given["camera_bev"]
    wrong = {
        "depth": given["depth"].astype(np.float64), "features": given["features"][..., ::-1],
        "cameras": given["cameras"][:-1], "camera_bev": given["camera_bev"][:, :, :, ::-1],
    }  # fmt: skip
    wrong["intrinsics"] = given["intrinsics"].view()
    wrong["intrinsics"].flags.writeable = False
    binding = executable.bind_to(wrong)
    arrays = {**binding.inputs, **binding.outputs}
    assert not any(arrays[name] is array for name, array in wrong.items())


def test_pooling_channels_last_is_the_same_to_the_bit() -> None:
    found, executable = fed(), load(POOL)
    want = run(executable, found)
    n, c, h, w = want.shape
    out = zeros((n, h, w, c), "float32").transpose(0, 3, 1, 2)
    binding = executable.bind_to({"camera_bev": out})
    assert binding.outputs["camera_bev"] is out
    for name in POOL.inputs:
        binding.inputs[name][...] = found[name]
    binding.run()
    np.testing.assert_array_equal(out, want)
    assert executable.layouts == ("NCHW", "NHWC")


@pytest.mark.parametrize("step", [RASTER, ENCODER, POOL], ids=lambda step: step.kernel)
@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38, -3e38, 1e-45, "signalling"])
def test_sensors_may_say_anything(step: KernelStep, number: Any) -> None:
    """No warning, no crash; a calibration that is none is told."""
    value = (
        np.array([0x7F800001], np.uint32).view(np.float32)[0]
        if number == "signalling"
        else np.float32(number)
    )
    executable = load(step)
    binding = executable.bind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in step.inputs:
            for where in (slice(None), slice(0, 1)):
                found = fed()
                for each, array in binding.inputs.items():
                    array[...] = found[each]
                if name != "point_count":
                    binding.inputs[name].reshape(-1)[where] = value
                told = "calibration"
                try:
                    binding.run()
                except StreamError as error:
                    told = str(error)
                assert "calibration" in told or "argument" in told


def test_closed() -> None:
    for step in (RASTER, POOL, ENCODER):
        executable = load(step)
        binding = executable.bind()
        executable.close()
        executable.close()
        with pytest.raises(StreamError, match="closed"):
            executable.bind()
        if step is RASTER:
            binding.run()
        binding.close()
        binding.close()
        with pytest.raises(StreamError, match="closed"):
            binding.run()


# --- tables of rigs -----------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Threads that made a table or read one from the cache."""
    made: list[str] = []
    cached = bev_pool.cached

    def counting(*given: Any) -> Any:
        made.append(threading.current_thread().name)
        return cached(*given)

    monkeypatch.setattr(bev_pool, "cached", counting)
    return made


def moved(found: dict[str, np.ndarray], by: float) -> dict[str, np.ndarray]:
    """The same with the cameras somewhere else."""
    to_lidar = found["camera_to_lidar"].copy()
    to_lidar[:, 0, 3] += np.float32(by)
    return {**found, "camera_to_lidar": to_lidar}


def test_a_table_is_made_once_for_each_rig(built: list[str], tmp_path: Path) -> None:
    executable = load(POOL, cache_dir=tmp_path)
    found = fed()
    other = moved(found, 0.5)
    geometry = Geometry(
        other["intrinsics"], other["camera_to_lidar"], None, TINY.camera.frustum, TINY.bev.pool
    )
    want = BevPool(build(geometry), TINY.camera.channels).run(other["depth"], other["features"])
    first = run(executable, found)
    assert not np.array_equal(first, want)
    assert len(built) == 1 and len(list((tmp_path / steps.TABLES).glob("*.table"))) == 1
    np.testing.assert_array_equal(run(executable, other), want)
    np.testing.assert_array_equal(run(executable, found), first)
    assert len(built) == 2, "shared by bindings"
    np.testing.assert_array_equal(run(load(POOL, cache_dir=tmp_path), other), want)
    assert len(built) == 3 and len(list((tmp_path / steps.TABLES).glob("*.table"))) == 2


def test_a_session_follows_its_rig(built: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration that changes between two runs changes the table; one that stays is not even looked up."""
    executable, found = load(POOL, cache_dir=tmp_path), fed()
    rigs = [
        found,
        moved(found, 0.5),
        {**found, "intrinsics": found["intrinsics"] * np.float32([[1.1], [1.1], [1]])},
    ]
    want = [run(executable, rig) for rig in rigs]
    assert len({array.tobytes() for array in want}) == len(built) == 3
    asked: list[int] = []
    table = executable.table
    monkeypatch.setattr(executable, "table", lambda *given: asked.append(1) or table(*given))
    binding = executable.bind()
    for number in (0, 0, 1, 1, 2, 0, 0):
        for name, array in binding.inputs.items():
            array[...] = rigs[number][name]
        binding.run()
        np.testing.assert_array_equal(binding.outputs["camera_bev"], want[number])
    assert len(asked) == 4 and len(built) == 3


def test_tables_used_last_are_kept(built: list[str], tmp_path: Path) -> None:
    executable = load(POOL, cache_dir=tmp_path)
    binding = executable.bind()
    found = fed()
    for by in range(steps.MAX_TABLES + 1):
        if by % 3 == 0:
            executable.table(*(found[n] for n in POOL.inputs[3:]))
        executable.table(*(moved(found, by)[n] for n in POOL.inputs[3:]))
    assert len(built) == steps.MAX_TABLES + 1 == len(executable._tables) + 1  # by = 0 is the rig itself
    executable.table(*(found[n] for n in POOL.inputs[3:]))
    assert len(built) == steps.MAX_TABLES + 1
    binding.close()


def test_tables_ahead(built: list[str], tmp_path: Path) -> None:
    executable = load(POOL, cache_dir=tmp_path)
    found = fed()
    rig = found["intrinsics"].copy(), found["camera_to_lidar"].copy()
    future = steps.prefetch(executable, *rig)
    rig[0][...] = 0  # was copied
    assert isinstance(future.result(30), BevPool)
    assert built == ["edgekit-table"]
    run(executable, found)
    assert len(built) == 1
    bad = steps.prefetch(executable, np.zeros((6, 3, 3)), found["camera_to_lidar"])
    with pytest.raises(UsageError, match="invertible"):
        bad.result(30)
    with pytest.raises(UsageError, match=r"prefetch: intrinsics: expected \[6, 3, 3\], got \[5, 3, 3\]"):
        steps.prefetch(executable, found["intrinsics"][:5], found["camera_to_lidar"])
    with pytest.raises(UsageError, match="expected a step of kernel bev_pool"):
        steps.prefetch(load(RASTER), found["intrinsics"], found["camera_to_lidar"])


def test_threads_that_want_the_same_table_wait_for_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executable, found, made = load(POOL, cache_dir=tmp_path), fed(), []
    begun, go = threading.Event(), threading.Event()
    cached = bev_pool.cached

    def slow(*given: Any) -> Any:
        made.append(1)
        begun.set()
        assert go.wait(30)
        return cached(*given)

    monkeypatch.setattr(bev_pool, "cached", slow)
    rig = found["intrinsics"], found["camera_to_lidar"]
    futures = [steps.prefetch(executable, *rig)]
    assert begun.wait(30)
    futures += [steps.prefetch(executable, *rig) for _ in range(3)]
    go.set()
    tables = {id(future.result(30)) for future in futures}
    assert len(tables) == len(made) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    executable = load(POOL, cache_dir=tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="not kept"):
        run(executable, fed())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(executable, fed())


# --- what they refuse ---------------------------------------------------------------------------


def changed(step: KernelStep, path: str, value: Any) -> KernelStep:
    """`step` with the option at `path` (keys joined by dots) set; None takes it away."""
    options = copy.deepcopy(to_json(step.options))
    *where, last = path.split(".")
    node = options
    for key in where:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if value is None:
        del node[last]
    else:
        node[int(last) if isinstance(node, list) else last] = value
    return dataclasses.replace(step, options=options)


BAD: list[tuple[KernelStep, str]] = [
    (dataclasses.replace(RASTER, kernel="magic"), "needs kernel 'magic'.*Upgrade edgekit"),
    (dataclasses.replace(RASTER, inputs=RASTER.inputs[:2]), "takes points, point_count, projections"),
    (dataclasses.replace(RASTER, outputs=("depth_images", "lidar_grid")), "2 outputs"),
    (dataclasses.replace(RASTER, options={"near": 1.0}), r"has no options, got \['near'\]"),
    (dataclasses.replace(RASTER, inputs=("point_count", "points", "projections")), "points 'point_count': expected float32"),
    (dataclasses.replace(RASTER, outputs=("depth",)), r"depth images 'depth': expected float32 \[6, 1, any, any\]"),
    (dataclasses.replace(RASTER, files={"x": "kernels/depth_raster/x.bin"}), r"has the files \[\], got \['x'\]"),
    (dataclasses.replace(ENCODER, files={}), r"has the files \['weights'\], got \[\]"),
    (dataclasses.replace(ENCODER, outputs=("lidar_bev",)), "output 'lidar_bev': expected float32"),
    (changed(ENCODER, "surprise", 1), "options: unknown key 'surprise'"),
    (changed(ENCODER, "grid", None), "key 'grid' is missing"),
    (changed(ENCODER, "grid.size", [0.4, 0.4, 0.0]), "a whole number of voxels"),
    (changed(ENCODER, "grid.size", [0.4, 0.4, "x"]), "expected a number"),
    (changed(ENCODER, "grid.low", [-32.0, -16.0, -2.6]), r"takes \[9, 80, 80\] cells, expected at least the \[8, 80, 120\]"),
    (changed(ENCODER, "values", "other"), "options.values: expected one of"),
    (changed(ENCODER, "values", "raw"), "takes 6 values, expected at most 5"),
    (changed(ENCODER, "max_voxels", -1), "limits from 0"),
    (changed(ENCODER, "max_points", 2**31), "limits from 0"),
    (changed(ENCODER, "precision", "int8"), "0 scales"),
    (changed(ENCODER, "scales", {"conv_input.0": 1.0}), "1 scales"),
    (changed(changed(ENCODER, "precision", "int8"), "scales", {"conv_input.0": 1.0}), "encoder scales: .* has none"),
    (changed(ENCODER, "encoder.inputs", 5), "takes 5 values, expected the 6"),
    (changed(ENCODER, "encoder.eps", 0.0), "0 < eps < 1"),
    (changed(ENCODER, "encoder.stages", []), "1..16 stages"),
    (changed(ENCODER, "encoder.stages.0.blocks", 10**9), "1..16 stages"),
    (changed(ENCODER, "encoder.stages.0.blocks", -1), "1..16 stages"),
    (changed(ENCODER, "encoder.stages.0.channels", 10**9), "1..4096 channels"),
    (changed(ENCODER, "encoder.stages.0.down", 16), "a stage has 8 channels, expected the 16"),
    (changed(ENCODER, "encoder.stages.1.down", -3), "expected up to 4096 channels, got -3"),
    (changed(ENCODER, "encoder.stages.0.padding", [1, 1, 10**9]), "padding of at most 8"),
    (changed(ENCODER, "encoder.shape", [9, 80, 10**15]), "1..4096 channels"),
    (changed(ENCODER, "encoder.shape", [2, 80, 80]), "nothing is left"),
    (changed(ENCODER, "encoder.outputs", 16), "output 'lidar_grid': expected float32"),
    (changed(ENCODER, "weights.0.0", "x"), "is missing"),
    (changed(ENCODER, "weights.0.1", [3, 3, 3, 8, 6]), r"expected \[3, 3, 3, 6, 8\]"),
    (changed(ENCODER, "weights.0.1", [3, 3, 3, 6, 800000]), "lie beyond the end of their file"),
    (changed(ENCODER, "weights.0.1", [2**62, 2**62, 3, 6, 8]), "lie beyond the end of their file"),
    (changed(ENCODER, "weights.0.1", [0, 3, 3, 6, 8]), "of the shape"),
    (changed(ENCODER, "weights.0.1", [-1, 3, 3, 6, -8]), "of the shape"),
    (changed(ENCODER, "weights.1", ["conv_input.0.weight", [8]]), "there twice"),
    (changed(ENCODER, "weights", []), "the file has"),
    (changed(POOL, "grid.x", [-16.0, 16.0, 0.7]), "grid x: unusable range"),
    (changed(POOL, "grid.x", [-16.0, 16.0, 0.00001]), "too large"),
    (changed(POOL, "grid.x", [-16.0, 16.0, 1.6]), "output 'camera_bev': expected float32"),
    (changed(POOL, "frustum.depth", [1.0, 60.0, 1e-12]), "depth 'depth': expected float32"),
    (changed(POOL, "frustum.depth", [1.0, 60.0, 0.0]), "unusable depth bins"),
    (changed(POOL, "frustum.features", [5, 9]), "features 'features': expected float32"),
    (changed(POOL, "frustum.size", 1), "unknown key 'size'"),
    (dataclasses.replace(POOL, inputs=(*POOL.inputs[:4], "projections")), "camera_to_lidar 'projections': expected"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "message"), BAD, ids=range(len(BAD)))
def test_refusals(step: KernelStep, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        load(step)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert f"step {step.name}" in str(caught.value)


def test_weights_that_cannot_be() -> None:
    names = [name for name, _ in ENCODER.options["weights"]]
    found = steps.unpack(ENCODER.options["weights"], memoryview(DATA))
    cases: list[tuple[str, Callable[[np.ndarray], np.ndarray], str]] = [
        (names[0], lambda w: w * np.nan, "finite"),
        (next(n for n in names if n.endswith("running_var")), lambda w: -w, "variance is negative"),
    ]
    for name, edit, message in cases:
        with np.errstate(all="ignore"):
            data = steps.pack({n: edit(w) if n == name else w for n, w in found.items()})[1]
        with pytest.raises(BundleError, match=message):
            load(ENCODER, data)
    for data in (DATA[:-1], DATA + b"\0", b""):
        with pytest.raises(BundleError, match=r"lie beyond|expected \d+"):
            load(ENCODER, data)
    more, data = steps.pack({**found, "spare": np.zeros(3, np.float32)})
    with pytest.raises(BundleError, match="weights 'spare': the encoder has none of that name"):
        load(changed(ENCODER, "weights", more), data)


@for_all(st.dictionaries(st.text(max_size=8), st.lists(st.integers(1, 4), max_size=4).map(tuple), max_size=6))
def test_weights_come_back(sizes: dict[str, tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}
    names, data = steps.pack(given)
    found = steps.unpack([(name, tuple(shape)) for name, shape in names], memoryview(data))
    assert list(found) == list(given)
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)


def one_line(call: Callable[[], object]) -> None:
    """It works, or says in one line why not."""
    told = ""
    try:
        call()
    except BundleError as error:
        told = str(error)
    assert "\n" not in told and len(told) < 700


ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**62, 1e300, -0.5, 1e-300, "", "x", [], {}, [[]], [1] * 5, {"a": 1}, [1.0, 2.0, 0.1],
]  # fmt: skip


@settings(max_examples=250)
@for_all(st.sampled_from([RASTER, POOL, ENCODER]), st.data())
def test_any_options_are_taken_or_refused(step: KernelStep, data: st.DataObject) -> None:
    """One value anywhere in the options is exchanged: nothing but BundleError comes out, quickly."""
    options = copy.deepcopy(to_json(step.options))
    node, key = options, None
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys)) if keys else "new"
        inner = node[key] if keys else None
        if not isinstance(inner, dict | list) or data.draw(st.integers(0, 3)) == 0:
            break
        node = inner
    if isinstance(node, list) and not node:
        node.append(data.draw(st.sampled_from(ODD)))
    else:
        node[key] = data.draw(st.sampled_from(ODD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_line(lambda: load(dataclasses.replace(step, options=options)))


@settings(max_examples=100)
@for_all(st.sampled_from([RASTER, POOL, ENCODER]), st.data())
def test_any_tensors_are_taken_or_refused(step: KernelStep, data: st.DataObject) -> None:
    tensors = dict(shapes())
    name = data.draw(st.sampled_from([*step.inputs, *step.outputs]))
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 40, 64, 2**20]), max_size=5))
    tensors[name] = TensorSpec(name, data.draw(st.sampled_from(DType)), tuple(shape))
    one_line(lambda: load(step, tensors=tensors))
