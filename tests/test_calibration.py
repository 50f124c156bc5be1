"""Calibration: streamed statistics, the same however they are fetched, cached, interrupted or ordered."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import CalibrationError, ModelError
from edgekit.passes.graph import infer
from edgekit.passes.probe import evaluate
from edgekit.quant import calibrate as calibrate_module
from edgekit.quant.calibrate import KIND, calibrate, measured
from edgekit.quant.stats import BINS, Accumulator, TensorStats, pack, unpack
from edgekit.toolchain import cache
from tests.helpers import ROOT

FLOATS = st.floats(-1e6, 1e6, width=32)


def gather(pictures: list[np.ndarray]) -> Accumulator:
    accumulator = Accumulator()
    for picture in pictures:
        assert accumulator.add(picture)
    return accumulator


def same(a: TensorStats, b: TensorStats) -> bool:
    """Bit for bit."""
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(np.array_equal(x, y) and type(x) is type(y) for x, y in pairs)


def small_network(extra: str = "") -> ir.Model:
    """Conv, SiLU, a branch that is read much later, Concat; `extra`: "log" for a value that is not finite."""
    rng = np.random.default_rng(1)
    weights = {
        "w": rng.normal(size=(4, 3, 3, 3)),
        "b": rng.normal(size=4),
        "v": rng.normal(size=(2, 4, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["conv"], ["gate"]),
        helper.make_node("Mul", ["conv", "gate"], ["silu"]),
        helper.make_node("Shape", ["silu"], ["size"]),
        helper.make_node("Conv", ["silu", "v"], ["narrow"]),
        helper.make_node("Concat", ["narrow", "gate"], ["both"], axis=1),
        helper.make_node("ReduceMean", ["both"], ["score"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Reshape", ["x", "flat"], ["late"]),
    ]
    if extra == "log":
        nodes.append(helper.make_node("Log", ["narrow"], ["bad"]))
    if extra == "if":
        then, other = (
            helper.make_graph(
                [helper.make_node(op, ["gate"], [f"{op}_in"])],
                op,
                [],
                [helper.make_tensor_value_info(f"{op}_in", TensorProto.FLOAT, (1, 4, 8, 6))],
            )
            for op in ("Neg", "Abs")
        )
        nodes.append(helper.make_node("If", ["yes"], ["either"], then_branch=then, else_branch=other))
    ends = {"score": (1,), "late": (1, 144)}
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in ends.items()]
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([1, -1]), "flat"))
    tensors.append(numpy_helper.from_array(np.array(True), "yes"))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 6))],
        outputs,
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return ir.from_proto(model)


def feeds(count: int = 5) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    return [{"x": (rng.normal(size=(1, 3, 8, 6)) * 4**i).astype(np.float32)} for i in range(count)]


# --- histograms ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(hnp.arrays(np.float32, (1, 3, 4), elements=FLOATS), min_size=1, max_size=6), st.randoms())
def test_histogram_grows_without_losing_anything(pictures, random):
    stats = gather(pictures).stats()
    every = np.concatenate([p.ravel() for p in pictures])
    assert stats.count == stats.counts.sum() == every.size
    # a one-shot histogram over the same bins, in float64
    bins = np.floor(every.astype(np.float64) / stats.bin_width) - stats.bin_low / stats.bin_width
    assert np.array_equal(np.bincount(bins.astype(int), minlength=BINS), stats.counts)
    assert (stats.low, stats.high, stats.zeros) == (every.min(), every.max(), (every == 0).sum())
    assert stats.bin_low <= stats.low and stats.high < stats.edges[-1]
    shuffled = list(pictures)
    random.shuffle(shuffled)
    again = gather(shuffled).stats()
    unordered = {"image_low": again.image_low, "image_high": again.image_high}
    assert same(again, dataclasses.replace(stats, **unordered))


@pytest.mark.parametrize("shape", [(1, 5, 3, 4), (2, 5, 7), (1, 5), (6,), (1, 5, 1, 1)])
def test_channels_lie_along_axis_1(shape):
    pictures = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in range(3)]
    stats = gather(pictures).stats()
    every = np.stack(pictures).astype(np.float64)
    assert stats.mean == pytest.approx(every.mean(), abs=1e-6)
    assert stats.mean_square == pytest.approx((every**2).mean(), rel=1e-6)
    if len(shape) < 2:
        assert stats.channel_low.size == stats.channel_mean.size == 0
        return
    rest = tuple(i for i in range(every.ndim) if i != 2)
    assert np.array_equal(stats.channel_low, every.min(axis=rest).astype(np.float32))
    assert np.array_equal(stats.channel_high, every.max(axis=rest).astype(np.float32))
    assert np.allclose(stats.channel_mean, every.mean(axis=rest), atol=1e-6)
    assert stats.channel_mean.dtype == np.float32


def test_half_of_the_bins_are_used_at_least():
    """Bins are as narrow as the grid allows: a range fills more than half of them, or nearly."""
    rng = np.random.default_rng(3)
    for scale in 10.0 ** np.arange(-6, 7):
        stats = gather([rng.uniform(-scale, 2 * scale, (1, 4, 500)).astype(np.float32)]).stats()
        assert (stats.high - stats.low) / stats.bin_width > BINS / 2 - 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_whole(bad):
    accumulator = gather([np.ones((1, 2, 3), np.float32)])
    picture = np.zeros((1, 2, 3), np.float32)
    picture[0, 1, 2] = bad
    assert not accumulator.add(picture)
    assert accumulator.stats().count == 6


def test_state_survives_packing():
    shapes = [(1, 3, 4), (7,), (1, 1)]
    every = [
        gather([np.random.default_rng(i + j).normal(size=s) for i in range(3)]) for j, s in enumerate(shapes)
    ]
    again = unpack(pack(every), len(every))
    assert again is not None
    assert all(same(a.stats(), b.stats()) for a, b in zip(every, again, strict=True))
    assert unpack(pack(every)[:-30], len(every)) is None
    assert unpack(b"", len(every)) is None


# --- whole networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["", "if"])
@pytest.mark.parametrize("stage_bytes", [1, 1000, 1 << 30])
def test_every_value_is_what_the_whole_network_gives(extra, stage_bytes):
    model = small_network(extra)
    found = calibrate(model, feeds(), stage_bytes=stage_bytes)
    whole = model.clone()
    infer(whole)
    names = measured(whole)
    assert {"x", "conv", "gate", "silu", "narrow", "both", "score", "late"} <= set(names) == set(found)
    assert "size" not in found
    whole.graph.outputs[:] = [o for n in whole.graph for o in n.outputs if o.name in names]
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for feed in feeds():
        for name, value in {**evaluate(whole, feed), **feed}.items():
            pictures[name].append(value)
    for name in names:
        assert same(found[name], gather(pictures[name]).stats()), name


def test_a_real_network_gives_the_same_bits_in_any_stages():
    model = ir.load(ROOT / "apps" / "detect" / "yolo_lite.onnx")
    (value,) = model.graph.inputs
    rng = np.random.default_rng(0)
    sizes = tuple(value.shape.numpy())
    pictures = [{str(value.name): rng.uniform(0, 255, sizes).astype(np.float32)} for _ in range(2)]
    few, many = (calibrate(model, pictures, stage_bytes=size) for size in (1 << 16, 1 << 30))
    assert few.keys() == many.keys() and len(few) > 50
    assert all(same(few[name], many[name]) for name in few)


def test_progress_and_order():
    seen: list[tuple[str, int, int]] = []
    forward = calibrate(small_network(), feeds(), progress=lambda *a: seen.append(a))
    assert seen == [("calibrate", i, 5) for i in range(6)]
    backward = calibrate(small_network(), reversed(feeds()))
    for name, stats in forward.items():
        other = dataclasses.replace(backward[name], image_low=stats.image_low, image_high=stats.image_high)
        assert same(stats, other)


def test_pictures_are_read_one_at_a_time():
    seen: list[weakref.ref] = []

    def source():
        for i in range(5):
            feed = {"x": np.full((1, 3, 8, 6), i, np.float32)}
            seen.append(weakref.ref(feed["x"]))
            yield feed
            del feed
            assert sum(ref() is not None for ref in seen) <= 1

    calibrate(small_network(), source())
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "no pictures"),
        ([{"y": np.zeros((1, 3, 8, 6), np.float32)}], "picture 0: expected arrays for x, got y"),
        (
            [{"x": np.zeros((1, 3, 6, 8), np.float32)}],
            "input x: expected FLOAT .1, 3, 8, 6., got float32 .1, 3, 6, 8.",
        ),
        ([{"x": np.zeros((1, 3, 8, 6))}], "got float64"),
    ],
)
def test_wrong_pictures(pictures, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(small_network(), pictures)


def test_a_value_that_is_not_finite_is_named():
    with pytest.raises(CalibrationError, match="picture 0: value bad is not finite"):
        calibrate(small_network("log"), feeds())


def test_a_network_that_cannot_run():
    model = small_network()
    next(n for n in model.graph if n.op_type == "Sigmoid").domain = "nowhere"
    with pytest.raises(ModelError):
        calibrate(model, feeds())


# --- cache ---------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    return tmp_path / KIND


def refuse():
    raise AssertionError("the cache should have answered")


def test_cache_answers_for_the_same_content_only(own_cache):
    first = calibrate(small_network(), feeds, cache_key="a")
    again = calibrate(small_network(), refuse, cache_key="a")
    assert all(same(first[name], again[name]) for name in first)
    assert sorted(p.suffix for p in own_cache.iterdir()) == [".json", ".npz"]
    with pytest.raises(AssertionError):
        calibrate(small_network(), refuse, cache_key="b")
    changed = small_network()
    changed.graph.initializers["b"].const_value = ir.tensor(np.zeros(4, np.float32), name="b")
    with pytest.raises(AssertionError):
        calibrate(changed, refuse, cache_key="a")


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_entry_is_a_miss(own_cache, suffix, damage):
    first = calibrate(small_network(), feeds, cache_key="a")
    (path,) = own_cache.glob(f"*{suffix}")
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(AssertionError):
        calibrate(small_network(), refuse, cache_key="a")
    again = calibrate(small_network(), feeds, cache_key="a")
    assert all(same(first[name], again[name]) for name in first)


def test_an_entry_of_another_network_is_a_miss(own_cache):
    calibrate(small_network(), feeds, cache_key="a")
    (path,) = own_cache.glob("*.json")
    entry = json.loads(path.read_text())["value"]
    entry["names"][0] = "another"
    cache.store(KIND, path.stem, entry)
    with pytest.raises(AssertionError):
        calibrate(small_network(), refuse, cache_key="a")


def test_an_interrupted_run_goes_on(own_cache, monkeypatch):
    monkeypatch.setattr(calibrate_module, "CHECKPOINT", 2)
    whole = calibrate(small_network(), feeds())
    used = []

    def interrupted():
        for i, feed in enumerate(feeds()):
            if i == 3:
                raise KeyboardInterrupt
            yield feed

    with pytest.raises(KeyboardInterrupt):
        calibrate(small_network(), interrupted, cache_key="a")
    again = calibrate(small_network(), feeds, cache_key="a", progress=lambda *a: used.append(a[1]))
    assert used == [3, 4, 5]
    assert all(same(whole[name], again[name]) for name in whole)
    assert not list(own_cache.glob("*.part*"))
    assert len(list(own_cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file"))
    assert calibrate(small_network(), feeds, cache_key="a")


# --- memory --------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_pictures_nor_with_the_network():
    """A chain of layers whose results are 8 MB each, 24 of them: 200 MB, if they were kept together."""
    script = Path(ROOT) / "benchmarks" / "calibration_memory.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    peaks = {}
    for what in ("float", "calibrate"):
        command = [
            sys.executable,
            str(script),
            "--worker",
            what,
            "--network",
            "chain",
            "--size",
            "256",
            "--pictures",
            "3",
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=True)
        peaks[what] = json.loads(done.stdout)
    assert peaks["calibrate"]["values_bytes"] > 150e6
    assert peaks["calibrate"]["peak_bytes"] - peaks["float"]["peak_bytes"] < 100e6
