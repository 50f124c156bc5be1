"""Batches of streams: the pass that gives a model lanes, and streams that share a run."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import edgekit
from edgekit.backends.base import LoadOptions, Payload, half
from edgekit.errors import ModelError, StreamError, UsageError
from edgekit.manifest import Variant
from edgekit.passes import PassError, probe
from edgekit.passes import lanes as lanes_pass
from edgekit.passes.graph import new_weight, shape
from edgekit.passes.lanes import lanes
from edgekit.passes.states import set_states, states
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.calibrate import calibrate
from edgekit.quant.placement import Choices, place
from edgekit.quant.rules import rules_for
from edgekit.spec import DType, QuantParams, StateSpec
from edgekit.toolchain import recurrent
from tests.litert_graphs import HOST, graph
from tests.state_bundles import CLASSES, SIZE, STATES, onnx_payload, pictures, reference, shifted, write

BACKENDS = ("onnxruntime", "litert", "openvino")
LANES = 4


# --- the pass ----------------------------------------------------------------------------------


def network(
    nodes: list[Any], shapes: dict[str, tuple[int, ...]], values: dict[str, np.ndarray], *outputs: str
) -> ir.Model:
    return graph(nodes, shapes, values, outputs)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


MOVES: dict[str, tuple[list[Any], dict[str, np.ndarray]]] = {
    "flatten": ([node("Flatten", "x", "y")], {}),
    "reshape-to-zero": ([node("Reshape", "x t", "y")], {"t": np.array([0, -1])}),
    "reshape-and-back": (
        [node("Reshape", "x t", "a"), node("Relu", "a", "b"), node("Reshape", "b u", "y")],
        {"t": np.array([1, 2, 4, 6, 6]), "u": np.array([1, 8, 6, 6])},
    ),
    "shuffle": (
        [
            node("Reshape", "x t", "a"),
            node("Transpose", "a", "b", perm=[0, 2, 1, 3, 4]),
            node("Reshape", "b u", "y"),
        ],
        {"t": np.array([1, 2, 4, 6, 6]), "u": np.array([1, -1, 6, 6])},
    ),
    "lane-not-first": (
        [
            node("Transpose", "x", "a", perm=[1, 0, 2, 3]),
            node("Sigmoid", "a", "b"),
            node("Transpose", "b", "y", perm=[1, 0, 2, 3]),
        ],
        {},
    ),
    "squeeze": (
        [
            node("GlobalAveragePool", "x", "a"),
            node("Squeeze", "a ax", "b"),
            node("Unsqueeze", "b one", "y"),
        ],
        {"ax": np.array([2, 3]), "one": np.array([1])},
    ),
    "slice-all": (
        [node("Slice", "x s e", "y")],
        {"s": np.array([0, 2]), "e": np.array([2**63 - 1, 5])},
    ),
    "split-concat": (
        [node("Split", "x n", "a b", axis=1), node("Concat", "b a", "y", axis=1)],
        {"n": np.array([3, 5])},
    ),
    "concat-constant": (
        [node("Concat", "k x", "y", axis=1)],
        {"k": np.arange(36, dtype=np.float32).reshape(1, 1, 6, 6)},
    ),
    "pad": ([node("Pad", "x p", "y")], {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1])}),
    "expand": (
        [node("GlobalAveragePool", "x", "a"), node("Expand", "a t", "y")],
        {"t": np.array([1, 8, 3, 3])},
    ),
    "tile": ([node("Tile", "x r", "y")], {"r": np.array([1, 1, 2, 1])}),
    "gather": ([node("Gather", "x i", "y", axis=2)], {"i": np.array([3, 0, 1])}),
    "resize-sizes": (
        [node("Resize", "x empty empty2 z", "y", mode="nearest")],
        {
            "empty": np.zeros(0, np.float32),
            "empty2": np.zeros(0, np.float32),
            "z": np.array([1, 8, 12, 12]),
        },
    ),
    "gemm": (
        [node("GlobalAveragePool", "x", "a"), node("Flatten", "a", "f"), node("Gemm", "f w c", "y")],
        {
            "w": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32),
            "c": np.ones((1, 3), np.float32),
        },
    ),
    "attention-inside-a-picture": (
        [
            node("Reshape", "x t", "a"),
            node("Transpose", "a", "b", perm=[0, 2, 1]),
            node("MatMul", "b a", "m"),
            node("Softmax", "m", "s", axis=-1),
            node("MatMul", "a s", "y"),
        ],
        {"t": np.array([1, 8, 36])},
    ),
    "shape-arithmetic": (
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "n"),
            node("Concat", "n rest", "t", axis=0),
            node("Reshape", "x t", "y"),
        ],
        {"zero": np.array([0]), "rest": np.array([-1])},
    ),
    "axes-of-one-added": ([node("Reshape", "x t", "y")], {"t": np.array([1, 1, 288, 1])}),
    "shared-target": (
        [
            node("Reshape", "x t", "a"),
            node("Reshape", "a u", "b"),
            node("Reshape", "b t", "y"),
        ],
        {"t": np.array([1, 288]), "u": np.array([1, 4, 72])},
    ),
}


@pytest.mark.parametrize("case", MOVES)
def test_every_lane_computes_what_the_model_does(case: str) -> None:
    nodes, values = MOVES[case]
    model = network(nodes, {"x": (1, 8, 6, 6)}, values, "y")
    made = lanes(model, 3)
    assert shape(model.graph.inputs[0]) == (1, 8, 6, 6)  # the model stays
    x = np.random.default_rng(1).normal(size=(3, 8, 6, 6)).astype(np.float32)
    got = probe.evaluate(made, {"x": x})["y"]
    want = np.concatenate([probe.evaluate(model, {"x": x[i : i + 1]})["y"] for i in range(3)])
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert shape(made.graph.outputs[0]) == got.shape


REFUSED: dict[str, tuple[list[Any], dict[str, np.ndarray], str]] = {
    "mean": (
        [node("ReduceMean", "x ax", "y")],
        {"ax": np.array([0, 2])},
        "ReduceMean 'y' takes a mean over the lanes",
    ),
    "sum": ([node("ReduceSum", "x ax", "y")], {"ax": np.array([0])}, "runs over the lanes"),
    "softmax": ([node("Softmax", "x", "y", axis=0)], {}, "runs along the lanes"),
    "own-weight-after-transpose": (
        [node("Transpose", "x", "a", perm=[1, 0, 2, 3]), node("Conv", "a w", "y")],
        {"w": np.ones((1, 1, 1, 1), np.float32)},
        "mixes lanes, which lie along axis 1",
    ),
    "merged": (
        [node("Reshape", "x t", "y")],
        {"t": np.array([288])},
        r"Reshape 'y' puts the lane of \[1, 8, 6, 6\] together with other axes, in \[288\]",
    ),
    "squeezed": ([node("Squeeze", "x ax", "y")], {"ax": np.array([0])}, "takes the axis of the lanes away"),
    "tiled": ([node("Tile", "x r", "y")], {"r": np.array([2, 1, 1, 1])}, "makes 2 of one lane"),
    "concat": ([node("Concat", "x x", "y", axis=0)], {}, "joins tensors along the lanes"),
    "not-first": (
        [node("Transpose", "x", "y", perm=[1, 0, 2, 3])],
        {},
        r"'y', an output, \[8, 1, 6, 6\] does not begin with the batch",
    ),
    "unknown": (
        [node("NonZero", "x", "n"), node("Cast", "n", "y", to=1)],
        {},
        "NonZero 'n' is not known to keep lanes apart",
    ),
    "dynamic-scale": (
        [node("DynamicQuantizeLinear", "x", "q s z"), node("DequantizeLinear", "q s z", "y")],
        {},
        "DynamicQuantizeLinear 'q' is not known to keep lanes apart",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_operators_in_which_lanes_would_meet_are_refused(case: str) -> None:
    nodes, values, message = REFUSED[case]
    model = network(nodes, {"x": (1, 8, 6, 6)}, values, "y")
    with pytest.raises(ModelError, match=message) as caught:
        lanes(model, 2)
    assert "\n" not in str(caught.value)
    assert "batch of 2 lanes" in str(caught.value)


def test_all_that_is_refused_is_told_at_once() -> None:
    nodes = [node("Softmax", "x", "a", axis=0), node("Relu", "a", "y"), node("ReduceSum", "x ax", "z")]
    model = network(nodes, {"x": (1, 8)}, {"ax": np.array([0])}, "y", "z")
    with pytest.raises(ModelError, match=r"Softmax 'a' .*; ReduceSum 'z'"):
        lanes(model, 2)


def test_models_that_are_no_single_picture_and_counts_that_are_none() -> None:
    clip = network([node("Relu", "x", "y")], {"x": (2, 3, 4, 4)}, {}, "y")
    with pytest.raises(ModelError, match=r"input x \[2, 3, 4, 4\]: expected a leading axis of size 1"):
        lanes(clip, 2)
    for count in (0, -1, 257, True, 2.0):
        with pytest.raises(UsageError, match=r"lanes .*: expected a whole number from 1 to 256"):
            lanes(shifted(), count)  # type: ignore[arg-type]


def test_the_result_is_held_against_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is wrong is found by running: here one that lets a cut along the lanes pass as one of channels."""
    weights = {"t": np.array([1, 8, 1, 1]), "k": np.ones((1, 8, 1, 1), np.float32)}
    model = network([node("Add", "x k", "y")], {"x": (1, 8, 1, 1)}, weights, "y")
    widen = lanes_pass._Widener.run

    def wrong(self: Any) -> None:
        widen(self)
        data = np.repeat(weights["k"], self.count, 0)
        data[-1] += 1
        add = next(iter(self.graph))
        add.replace_input_with(1, new_weight(self.graph, "k_wrong", data))

    monkeypatch.setattr(lanes_pass._Widener, "run", wrong)
    with pytest.raises(PassError, match=r"pass lanes: output 'y' of lane 2 differs"):
        lanes(model, 3)


def test_constants_that_are_joined_keep_their_scale() -> None:
    nodes, values = MOVES["concat-constant"]
    model = network(nodes, {"x": (1, 8, 6, 6)}, values, "y")
    params = QuantParams(DType.int8, (0.25,), (3,))
    set_quant(model.graph.initializers["k"], params)
    (joined,) = (n for n in lanes(model, 2).graph if n.op_type == "Concat")
    assert quant(joined.inputs[0]) == params


def test_states_keep_their_pairs() -> None:
    model = shifted()
    set_states(model, STATES)
    made = lanes(model, 4)
    assert states(made) == tuple(dataclasses.replace(s, shape=(4, *s.shape[1:])) for s in STATES)
    assert lanes(model, 1) is not model
    assert states(lanes(model, 1)) == STATES


# --- what backends make of it ------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> ir.Model:
    made = shifted()
    set_states(made, STATES)
    return made


KINDS = (
    ("onnxruntime", "float32"),
    ("onnxruntime", "int8"),
    ("litert", "float32"),
    ("litert", "dynamic"),
    ("litert", "int8"),
    ("openvino", "float32"),
    ("openvino", "int8"),
)


def lowered(model: ir.Model, backend: str, precision: str, count: int) -> Payload:
    """Quantized as a single picture, then given lanes: codes mean the same in both."""
    if precision == "int8":
        frames = pictures(12, seed=3)
        feeds = [
            {"image": frame, **{s.input: before[s.output] for s in STATES}}
            for frame, before in zip(frames[1:], reference(model, frames), strict=False)
        ]
        model = place(model, calibrate(model, feeds), rules_for(backend, HOST), Choices(scheme="minmax"))
    payload: Payload = half(backend, "lower").lower(lanes(model, count), HOST, precision)[0]
    return payload


def specs(count: int) -> tuple[StateSpec, ...]:
    return tuple(dataclasses.replace(s, shape=(count, *s.shape[1:])) for s in STATES)


def bound(payload: Payload) -> Any:
    variant = Variant(
        "v", payload.backend, payload.precision, payload.format, "", 0, "", dict(payload.options)
    )
    engine = half(payload.backend, "engine")
    return engine.load(memoryview(payload.data), variant, LoadOptions(threads=1)).bind()


def run(binding: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, array in feeds.items():
        np.copyto(binding.inputs[name], array)
    binding.run()
    return {name: array.copy() for name, array in binding.outputs.items()}


def noise(rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
    if like.dtype.kind == "f":
        return rng.normal(size=like.shape).astype(like.dtype)
    limits = np.iinfo(like.dtype)
    return rng.integers(limits.min, limits.max, like.shape, like.dtype, endpoint=True)


@pytest.mark.parametrize(("backend", "precision"), KINDS)
def test_lanes_equal_the_single_picture_bit_for_bit_whatever_the_others_hold(
    model: ir.Model, backend: str, precision: str
) -> None:
    """In every payload that is built, in any lane, beside others, NaN and infinity."""
    one, many = (bound(lowered(model, backend, precision, count)) for count in (1, LANES))
    rng = np.random.default_rng(0)
    feeds = [{name: noise(rng, array) for name, array in one.inputs.items()} for _ in range(LANES)]
    assert (precision == "int8") == any(a.dtype.kind in "iu" for a in feeds[0].values())  # states as codes
    want = [run(one, feed) for feed in feeds]
    for fill in (None, np.nan, np.inf):
        for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
            given_ = {n: np.concatenate([feeds[j][n] for j in order]) for n in feeds[0]}
            if fill is not None:
                for array in given_.values():
                    array[1:] = fill if array.dtype.kind == "f" else np.iinfo(array.dtype).max
            got = run(many, given_)
            for lane, which in enumerate(order[: None if fill is None else 1]):
                for name, value in want[which].items():
                    np.testing.assert_array_equal(got[name][lane : lane + 1], value, err_msg=name)
    one.close()
    many.close()


# --- streams -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, model: ir.Model) -> Callable[..., Path]:
    """By count of lanes and precision: a bundle with a payload for each backend, all with the scales of the first."""
    folder = tmp_path_factory.mktemp("lanes")

    def make(count: int, backend: str = "", precision: str = "float32") -> Path:
        path = folder / f"{count}-{backend}-{precision}.edge"
        if not path.exists():
            names = (backend,) if backend else BACKENDS
            payloads = {name: lowered(model, name, precision, count) for name in names}
            held = recurrent.agreed(specs(count), list(payloads.values()))
            tolerance = 1e-4 if precision == "float32" else 0.5
            write(path, payloads, lanes(model, count), states=held, tolerance=tolerance)
        return path

    return make


def load(path: Path, backend: str = "onnxruntime") -> edgekit.Engine:
    return edgekit.load(path, variant=backend, threads=1)


def alone(engine: edgekit.Engine, frames: np.ndarray) -> np.ndarray:
    """Logits of every frame by a session of one stream."""
    with engine.session() as session:
        assert session.inputs["image"].shape == (1, 3, SIZE, SIZE)
        found = []
        for frame in frames:
            np.copyto(session.inputs["image"], frame)
            session.run()
            found.append(session.outputs["logits"].copy())
        return np.array(found)


def images(frames: Mapping[Any, np.ndarray], step: int) -> dict[Any, dict[str, np.ndarray]]:
    return {key: {"image": array[step]} for key, array in frames.items()}


@pytest.mark.parametrize("count", [1, 3, 4, 7, 32])
@pytest.mark.parametrize(("backend", "precision"), KINDS)
def test_batches_of_any_streams_equal_each_alone_bit_for_bit(
    bundle: Callable[..., Path], backend: str, precision: str, count: int
) -> None:
    """Members chosen at random, batches smaller and larger than the lanes, single steps between."""
    rng = random.Random(count)
    frames: dict[Any, np.ndarray] = {key: pictures(6, seed=100 + key) for key in range(count)}
    with (
        load(bundle(1, backend, precision), backend) as single,
        load(bundle(LANES, backend, precision), backend) as engine,
        engine.streams() as streams,
    ):
        assert streams.lanes == LANES
        assert streams.inputs["image"].shape == (1, 3, SIZE, SIZE)
        want = {key: alone(single, frames[key]) for key in frames}
        at = dict.fromkeys(frames, 0)
        while left := [key for key in frames if at[key] < 6]:
            members = rng.sample(left, rng.randint(1, len(left)))
            given_ = {key: {"image": frames[key][at[key]]} for key in members}
            if len(members) == 1:
                results = {members[0]: streams.step(members[0], given_[members[0]])}
            else:
                results = streams.step_many(given_)
            assert list(results) == members
            for key in members:
                np.testing.assert_array_equal(results[key]["logits"], want[key][at[key]])
                at[key] += 1
        assert len(streams) == count


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_order_of_calls_keeps_streams_apart(bundle: Callable[..., Path], data: st.DataObject) -> None:
    """Steps, batches, resets, snapshots, restores and drops in any order, against one session per stream."""
    keys = ["a", "b", "c", "d", "e", "f"]
    frames = pictures(4, seed=7)
    with load(bundle(1)) as single, load(bundle(LANES)) as engine, engine.streams() as streams:
        sessions = {key: single.session() for key in keys}
        kept: dict[str, Any] = {}
        for _ in range(data.draw(st.integers(3, 12))):
            act = data.draw(
                st.sampled_from(["step", "many", "many", "seat", "reset", "keep", "back", "drop"])
            )
            key = data.draw(st.sampled_from(keys))
            if act in ("step", "many", "seat"):
                chosen = [key]
                if act != "step":
                    most = LANES if act == "seat" else len(keys)
                    chosen = data.draw(
                        st.lists(st.sampled_from(keys), unique=True, min_size=1, max_size=most)
                    )
                pick = {k: frames[data.draw(st.integers(0, 3))] for k in chosen}
                results: Mapping[str, Any]
                if act == "step":
                    results = {key: streams.step(key, {"image": pick[key]})}
                elif act == "many":
                    results = streams.step_many({k: {"image": pick[k]} for k in chosen})
                else:
                    for k, arrays in streams.seat(chosen).items():
                        arrays["image"][:] = pick[k]
                    results = streams.step_many(dict.fromkeys(chosen))
                for k in chosen:
                    np.copyto(sessions[k].inputs["image"], pick[k])
                    sessions[k].run()
                    np.testing.assert_array_equal(results[k]["logits"], sessions[k].outputs["logits"])
            elif act == "back" and key in kept:
                streams.restore(key, kept[key])
                sessions[key].restore(kept[key])
            elif key in streams and act == "reset":
                streams.reset(key)
                sessions[key].reset()
            elif key in streams and act == "keep":
                kept[key] = streams.snapshot(key)
            elif key in streams and act == "drop":
                streams.drop(key)
                sessions[key].reset()
            for k in streams:
                for name, array in streams.snapshot(k).items():
                    np.testing.assert_array_equal(array, sessions[str(k)].states[name])
        for session in sessions.values():
            session.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_idle_lanes_may_hold_anything(bundle: Callable[..., Path], backend: str) -> None:
    """What is left in them, NaN, is neither seen by the others nor kept as anybody's state."""
    frames: dict[Any, np.ndarray] = {key: pictures(4, seed=key) for key in range(3)}
    with (
        load(bundle(1), backend) as single,
        load(bundle(LANES), backend) as engine,
        engine.streams() as streams,
    ):
        want = {key: alone(single, frames[key]) for key in frames}
        poison = [f"bad{i}" for i in range(LANES)]
        for key in poison:
            streams.restore(key, {s.name: np.full(s.shape, np.nan, np.float32) for s in STATES})
        for arrays in streams.seat(poison).values():
            arrays["image"][:] = np.nan
        assert all(np.isnan(a).all() for a in streams._session.states.values())
        for step in range(4):
            results = streams.step_many(images(frames, step))
            for key in frames:
                np.testing.assert_array_equal(results[key]["logits"], want[key][step])
            # and a stream that sits out does not step
            before = streams.snapshot("bad0")
            streams.step_many(images({"x": frames[0]}, step))
            for name, array in streams.snapshot("bad0").items():
                np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_same_members_move_nothing(bundle: Callable[..., Path], backend: str) -> None:
    """Their states stay in the buffers that take turns; in another order too."""
    frames: dict[Any, np.ndarray] = {key: pictures(1, seed=key) for key in range(2 * LANES)}
    first, second = list(frames)[:LANES], list(frames)[LANES:]
    with load(bundle(LANES), backend) as engine, engine.streams() as streams:
        one = streams.bytes_per_switch // 2
        assert one == sum(4 * s.elements for s in STATES)
        assert streams._session.bytes_copied_per_run == 0

        def moved(members: list[int]) -> int:
            before = streams.bytes_moved
            streams.step_many(images({key: frames[key] for key in members}, 0))
            return streams.bytes_moved - before

        assert moved(first) == LANES * one  # they enter empty lanes
        assert moved(first) == moved(first[::-1]) == 0
        assert moved([*first[:3], second[0]]) == 2 * one  # one takes another's place
        assert moved(first[:2]) == 2 * one  # the others leave, as the run writes their lanes
        assert moved(first) == 2 * one
        assert moved([*first, *second]) == 2 * LANES * one  # those who are there run first
        assert moved([*first, *second]) == 2 * LANES * one
        streams.drop(first[0])
        streams.reset(first[1])
        assert moved([first[1]]) <= 2 * LANES * one


def test_results_of_several_runs_are_all_there(bundle: Callable[..., Path]) -> None:
    frames: dict[Any, np.ndarray] = {key: pictures(1, seed=key) for key in range(2 * LANES + 1)}
    with load(bundle(1)) as single, load(bundle(LANES)) as engine, engine.streams() as streams:
        results = streams.step_many(images(frames, 0))
        for key, found in results.items():
            np.testing.assert_array_equal(found["logits"], alone(single, frames[key])[0])
        one = streams.step_many(images({key: frames[key] for key in range(LANES)}, 0))
        assert all(np.shares_memory(r["logits"], streams._session.outputs["logits"]) for r in one.values())
        assert streams.step_many({}) == {}


def test_bundles_without_lanes_take_many_streams_one_by_one(bundle: Callable[..., Path]) -> None:
    frames: dict[Any, np.ndarray] = {key: pictures(3, seed=key) for key in range(3)}
    with load(bundle(1)) as engine, engine.streams() as streams:
        assert streams.lanes == 1
        want = {key: alone(engine, frames[key]) for key in frames}
        for step in range(3):
            for key, found in streams.step_many(images(frames, step)).items():
                np.testing.assert_array_equal(found["logits"], want[key][step])


def test_a_network_without_states_runs_in_batches(tmp_path: Path) -> None:
    nodes = [
        node("GlobalAveragePool", "image", "m"),
        node("Flatten", "m", "f"),
        node("Gemm", "f w", "logits"),
    ]
    weights = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)
    single = network(nodes, {"image": (1, 3, SIZE, SIZE)}, {"w": weights}, "logits")
    many = lanes(single, 2)
    path = write(tmp_path / "b.edge", {"onnxruntime": onnx_payload(many)}, many, states=())
    frames: dict[Any, np.ndarray] = {key: pictures(1, seed=key) for key in range(3)}
    with load(path) as engine, engine.streams() as streams:
        assert streams.lanes == 2
        for key, found in streams.step_many(images(frames, 0)).items():
            np.testing.assert_allclose(found["logits"], frames[key][0].mean((2, 3)) @ weights, atol=1e-6)
        assert streams.bytes_moved == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": {}}, r"step_many: stream 'a': expected inputs \['image'\], got \[\]"),
        (
            {
                "b": {"image": np.zeros((1, 3, SIZE, SIZE), np.float32)},
                "a": {"image": np.zeros((4, 3, 8, 8))},
            },
            r"step_many: stream 'a': input image: expected float32 \(1, 3, 8, 8\), got float64 \(4, 3, 8, 8\)",
        ),
        ({"a": None}, r"step_many: stream 'a': nothing was written for it"),
        (dict.fromkeys("rstuv"), r"step_many: stream 'r': nothing was written for it"),
    ],
)
def test_inputs_that_do_not_fit_change_nothing(
    bundle: Callable[..., Path], inputs: Any, message: str
) -> None:
    with load(bundle(LANES)) as engine, engine.streams() as streams:
        streams.seat("rstu")
        streams.step_many({key: {"image": pictures(1)[0]} for key in "rstu"})
        before = {key: streams.snapshot(key) for key in streams}
        with pytest.raises(UsageError, match=message):
            streams.step_many(inputs)
        assert set(streams) == set(before)
        for key, snapshot in before.items():
            for name, array in streams.snapshot(key).items():
                np.testing.assert_array_equal(array, snapshot[name])
        with pytest.raises(UsageError, match="seat: 5 streams, expected at most 4"):
            streams.seat("abcde")


def test_a_run_that_fails_steps_nobody_in_it(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = list(range(2 * LANES))
    frames: dict[Any, np.ndarray] = {key: pictures(3, seed=key) for key in keys}
    with load(bundle(1)) as single, load(bundle(LANES)) as engine, engine.streams() as streams:
        want = {key: alone(single, frames[key]) for key in keys}
        streams.step_many(images(frames, 0))
        run_, runs = streams._session.run, 0

        def fail_second() -> None:
            nonlocal runs
            runs += 1
            if runs == 2:
                raise StreamError("engine: made to fail")
            run_()

        there = set(streams._lane_of)  # they run first
        with monkeypatch.context() as patch:
            patch.setattr(streams._session, "run", fail_second)
            with pytest.raises(StreamError, match="made to fail"):
                streams.step_many(images(frames, 1))
        for key in keys:
            step = 2 if key in there else 1
            got = streams.step_many(images({key: frames[key]}, step))[key]["logits"]
            np.testing.assert_array_equal(got, want[key][step])
