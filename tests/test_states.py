"""Recurrent state: sessions that keep it, many streams on one session, and what the self-test makes of it."""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime import InferenceSession

import edgekit
from edgekit.backends.base import Payload
from edgekit.backends.litert.lower import INTEGER_IO, lower
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, SelfTestError, StreamError, UsageError
from edgekit.quant.annotate import quant, set_quant
from edgekit.runtime import selftest
from edgekit.runtime import variants as runtime_variants
from edgekit.runtime.state import carry_over
from edgekit.spec import DType, StateSpec
from tests import plan_bundles
from tests.bundle_samples import files_of, forge
from tests.litert_graphs import HOST, annotate
from tests.plan_bundles import WIDTH, Step, network
from tests.state_bundles import (
    STATES,
    onnx_payload,
    pictures,
    reference,
    shifted,
    with_fields,
    write,
)

BACKENDS = ("onnxruntime", "litert", "openvino")


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return shifted()


@pytest.fixture(scope="module")
def payloads(model: ir.Model) -> dict[str, Payload]:
    return {
        "onnxruntime": onnx_payload(model),
        "litert": lower(model, HOST, "float32")[0],
        "openvino": onnx_payload(model, "openvino"),
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, model: ir.Model, payloads: dict[str, Payload]) -> Path:
    return write(tmp_path_factory.mktemp("states") / "all.edge", payloads, model)


def load(path: Path, variant: str | None = None, **options: Any) -> edgekit.Engine:
    return edgekit.load(path, variant=variant, threads=1, **options)


def feed(session: Any, frame: np.ndarray) -> np.ndarray:
    """Run on one picture; a copy of the logits."""
    np.copyto(session.inputs["image"], frame)
    session.run()
    return session.outputs["logits"].copy()


def alone(engine: edgekit.Engine, frames: np.ndarray) -> list[np.ndarray]:
    with engine.session() as session:
        return [feed(session, frame) for frame in frames]


# --- sessions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_session_hands_its_state_on(bundle: Path, model: ir.Model, backend: str) -> None:
    frames = pictures(9)
    want = reference(model, frames)
    with load(bundle, backend) as engine, engine.session() as session:
        assert list(session.inputs) == ["image"]
        assert list(session.outputs) == ["logits"]
        assert list(session.states) == ["state_0", "state_1"]
        with pytest.raises(ValueError, match="read-only"):  # on a device it would be lost
            session.states["state_0"][:] = 1
        logits = session.outputs["logits"]
        for frame, expected in zip(frames, want, strict=True):
            np.testing.assert_allclose(feed(session, frame), expected["logits"], atol=1e-5)
            for state in STATES:
                np.testing.assert_allclose(session.states[state.name], expected[state.output], atol=1e-5)
        assert session.outputs["logits"] is logits
        # the answers depend on what came before, so equal answers say something
        assert np.abs(alone(engine, frames[-1:])[0] - want[-1]["logits"]).max() > 1e-3


def test_copies_between_runs_are_counted_and_swapped_buffers_need_none(bundle: Path) -> None:
    states = sum(4 * s.elements for s in STATES)
    for backend, copied in (("onnxruntime", 0), ("openvino", 0), ("litert", states)):
        with load(bundle, backend) as engine, engine.session() as session:
            assert session.bytes_copied_per_run == copied, backend


def test_openvino_copies_a_state_that_it_reads_channels_last(
    tmp_path: Path, model: ir.Model, payloads: dict[str, Payload]
) -> None:
    """In bundles of integers it reads pictures so, and takes what has up to four channels for one."""
    payload = dataclasses.replace(payloads["openvino"], precision="int8")
    frames = pictures(6)
    with load(write(tmp_path / "b.edge", {"v": payload}, model)) as engine, engine.session() as session:
        assert session.bytes_copied_per_run == 4 * STATES[0].elements
        for frame, want in zip(frames, reference(model, frames), strict=True):
            np.testing.assert_allclose(feed(session, frame), want["logits"], atol=1e-5)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_two_buffers_are_swapped_for_ever(bundle: Path, backend: str) -> None:
    with load(bundle, backend) as engine, engine.session() as session:
        addresses = []
        for frame in pictures(6):
            addresses.append(session.states["state_1"].ctypes.data)
            feed(session, frame)
        assert addresses[0::2] == [addresses[0]] * 3
        assert addresses[1::2] == [addresses[1]] * 3
        assert addresses[0] != addresses[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("before", [1, 2])
def test_reset_snapshot_and_restore(bundle: Path, backend: str, before: int) -> None:
    frames = pictures(8)
    with load(bundle, backend) as engine, engine.session() as session:
        whole = [feed(session, frame) for frame in frames]
        session.reset()
        assert all((array == 0).all() for array in session.states.values())
        again = [feed(session, frame) for frame in frames[:before]]
        kept = session.snapshot()
        feed(session, pictures(1, seed=9)[0])  # which the snapshot does not see
        with engine.session() as other:
            other.restore(kept)
            again += [feed(other, frame) for frame in frames[before:5]]
        session.restore(kept)
        rest = [feed(session, frame) for frame in frames[before:]]
        np.testing.assert_array_equal(np.array(again), np.array(whole[:5]))
        np.testing.assert_array_equal(np.array(rest), np.array(whole[before:]))


def test_initial_values_are_those_of_the_manifest(
    tmp_path: Path, model: ir.Model, payloads: dict[str, Payload]
) -> None:
    states = with_fields(STATES, initial=0.75)
    given = {s.input: np.full(s.shape, 0.75, np.float32) for s in STATES}
    path = write(tmp_path / "b.edge", payloads, model, states=states, golden_states=given)
    (want,) = reference(model, pictures(1), given)
    for backend in BACKENDS:
        with load(path, backend) as engine, engine.session() as session:
            for _ in range(2):
                np.testing.assert_allclose(feed(session, pictures(1)[0]), want["logits"], atol=1e-5)
                session.reset()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("state_0"), "state 'state_0' is missing"),
        (
            lambda s: s.update(memory=s["state_0"]),
            "state 'memory' is not one of this network, expected state_0, state_1",
        ),
        (
            lambda s: s.update(state_1=s["state_1"][:, :4]),
            r"state 'state_1': expected float32 \(1, 8, 8, 8\), got",
        ),
        (lambda s: s.update(state_1=s["state_1"].astype(np.float64)), r"got float64 \(1, 8, 8, 8\)"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused_and_changes_nothing(
    bundle: Path, edit: Callable[[dict[str, np.ndarray]], Any], message: str
) -> None:
    with load(bundle, "onnxruntime") as engine, engine.session() as session:
        feed(session, pictures(1)[0])
        before = session.snapshot()
        other = {name: array + 1 for name, array in before.items()}
        edit(other)
        with pytest.raises(UsageError, match=message) as caught:
            session.restore(other)
        assert "\n" not in str(caught.value)
        for name, array in session.states.items():
            np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_session_does_not_run_and_nothing_holds_it(bundle: Path, backend: str) -> None:
    with load(bundle, backend) as engine:
        session = engine.session()
        feed(session, pictures(1)[0])
        session.close()
        session.close()
        assert len(session.snapshot()) == 2
        with pytest.raises(StreamError, match="closed"):
            session.run()
        held = weakref.ref(session)
        gc.disable()
        try:
            del session
            assert held() is None
        finally:
            gc.enable()


def test_a_stateless_network_runs_without_a_hop(tmp_path: Path) -> None:
    path = plan_bundles.write(tmp_path / "b.edge", [Step("net", {"a": network("x", "y")})])
    with load(path) as engine, engine.session() as session:
        assert session.run == session._layout.bindings[0].run
        assert dict(session.states) == {}
        session.reset()
        session.restore(session.snapshot())


def looped(path: Path, outputs: tuple[str, ...] = ("y",)) -> Path:
    """a = f(x + h), y = g(a + h); the next h is y, which is an output as well: two steps read the state, and
    the second one writes it."""
    steps = [
        Step("first", {"v": network("x", "a", extra="h")}),
        Step("second", {"v": network("a", "y", 1, extra="h")}),
    ]
    state = StateSpec("memory", DType.float32, (1, WIDTH), "h", "y")
    return plan_bundles.write(path, steps, outputs=outputs, inputs=("x",), states=(state,))


def test_a_state_that_others_see_is_copied(tmp_path: Path) -> None:
    run = [
        InferenceSession(
            network(source, result, seed, extra="h").SerializeToString(), providers=["CPUExecutionProvider"]
        )
        for source, result, seed in (("x", "a", 0), ("a", "y", 1))
    ]
    h = np.zeros((1, WIDTH), np.float32)
    with load(looped(tmp_path / "b.edge")) as engine, engine.session() as session:
        assert session.bytes_copied_per_run == 4 * WIDTH  # y to what both read next
        for i in range(5):
            x = np.random.default_rng(i).normal(size=(1, WIDTH)).astype(np.float32)
            (a,) = run[0].run(None, {"x": x, "h": h})
            (h,) = run[1].run(None, {"a": a, "h": h})
            np.copyto(session.inputs["x"], x)
            session.run()
            np.testing.assert_allclose(session.outputs["y"], h, atol=1e-6)
            np.testing.assert_allclose(session.states["memory"], h, atol=1e-6)


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        ([], 0),
        ([Step("second", {"v": network("h_next", "y")})], 4 * WIDTH),  # read on
        ([Step("second", {"v": network("a", "y", extra="h")})], 4 * WIDTH),  # read as well
    ],
    ids=["private", "read-on", "read-as-well"],
)
def test_only_states_that_nobody_else_sees_take_turns(tmp_path: Path, second: list[Step], kept: int) -> None:
    steps = [Step("first", {"v": _counting()}), *second]
    state = StateSpec("memory", DType.float32, (1, WIDTH), "h", "h_next")
    outputs = ("y",) if second else ("a",)
    path = plan_bundles.write(tmp_path / "b.edge", steps, outputs=outputs, inputs=("x",), states=(state,))
    with load(path) as engine, engine.session() as session:
        assert session.bytes_copied_per_run == kept
        session.inputs["x"][:] = 1
        for count in range(4):
            assert (session.states["memory"] == count).all()
            if second:
                feeds = {"a": count + 1.0, "h": float(count), "h_next": count + 1.0}
                proto = second[0].variants["v"]
                run = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run
                given = {i.name: np.full((1, WIDTH), feeds[i.name], np.float32) for i in proto.graph.input}
                (want,) = run(None, given)
            session.run()
            if second:
                np.testing.assert_allclose(session.outputs["y"], want, atol=1e-6)


def test_a_state_that_is_an_output_stays_where_it_is(
    tmp_path: Path, model: ir.Model, payloads: dict[str, Payload]
) -> None:
    path = write(tmp_path / "b.edge", payloads, model, outputs=("logits", "state_1_next"))
    frames = pictures(5)
    for backend in ("onnxruntime", "openvino"):
        with load(path, backend) as engine, engine.session() as session:
            assert session.bytes_copied_per_run == 4 * STATES[1].elements
            for frame, want in zip(frames, reference(model, frames), strict=True):
                np.testing.assert_allclose(feed(session, frame), want["logits"], atol=1e-5)
                np.testing.assert_allclose(session.outputs["state_1_next"], want["state_1_next"], atol=1e-5)


def test_a_run_that_fails_leaves_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the step that wrote it had run: the first of two here turns its state round itself."""
    steps = [Step("first", {"v": _counting()}), Step("second", {"v": network("a", "y")})]
    state = StateSpec("memory", DType.float32, (1, WIDTH), "h", "h_next")
    path = plan_bundles.write(tmp_path / "b.edge", steps, inputs=("x",), states=(state,))

    def fail() -> None:
        raise StreamError("engine: made to fail")

    with load(path) as engine:
        bound = engine._executables["second"].bind_to  # type: ignore[attr-defined]
        failing = False

        def bind(*given: Any) -> Any:
            binding = bound(*given)
            run = binding.run
            monkeypatch.setattr(binding, "run", lambda: fail() if failing else run())
            return binding

        monkeypatch.setattr(engine._executables["second"], "bind_to", bind)
        with engine.session() as session:
            session.inputs["x"][:] = 1
            for count in (1, 2, 3):
                failing = True
                with pytest.raises(StreamError, match="made to fail"):
                    session.run()
                assert (session.states["memory"] == count - 1).all()
                failing = False
                session.run()
                assert (session.states["memory"] == count).all()
            assert session.bytes_copied_per_run == 0


def _counting() -> Any:
    """x, h -> a = x + h, h_next = x + h + 0."""
    from onnx import TensorProto, helper, numpy_helper

    info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, WIDTH]) for n in ("x", "h", "a", "h_next")
    ]
    nodes = [helper.make_node("Add", ["x", "h"], ["a"]), helper.make_node("Add", ["a", "nought"], ["h_next"])]
    nought = [numpy_helper.from_array(np.zeros((1, WIDTH), np.float32), "nought")]
    proto = helper.make_graph(nodes, "net", info[:2], info[2:], nought)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


# --- states as codes ---------------------------------------------------------------------------


def samples(model: ir.Model) -> list[dict[str, np.ndarray]]:
    """What the network reads on some frames, its states included."""
    frames = pictures(12, seed=3)
    return [
        {"image": frame, **{s.input: before[s.output] for s in STATES}}
        for frame, before in zip(frames[1:], reference(model, frames), strict=False)
    ]


def annotated_model(model: ir.Model) -> ir.Model:
    return annotate(model, samples(model))


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, model: ir.Model, payloads: dict[str, Payload]
) -> tuple[Path, tuple[StateSpec, ...]]:
    """A bundle whose LiteRT payload holds its states as codes and whose ONNX Runtime payload holds them as reals."""
    annotated = annotated_model(model)
    values = {v.name: v for v in [*annotated.graph.inputs, *annotated.graph.outputs]}
    states = []
    for state in STATES:
        params = quant(values[state.output])
        set_quant(values[state.input], params)  # one scale for what goes round
        states.append(dataclasses.replace(state, quant=params))
    annotated.metadata_props[INTEGER_IO] = ",".join(n for s in STATES for n in (s.input, s.output))
    (payload,) = lower(annotated, HOST, "int8")
    path = tmp_path_factory.mktemp("mixed") / "b.edge"
    given = {s.input: samples(model)[0][s.input] for s in STATES}
    both = {"float": payloads["onnxruntime"], "codes": payload}
    write(path, both, model, states=states, golden_states=given, tolerance=0.3)
    return path, tuple(states)


def test_states_go_round_as_codes(mixed: tuple[Path, tuple[StateSpec, ...]], model: ir.Model) -> None:
    path, states = mixed
    with load(path, "codes") as engine, engine.session() as session:
        assert {a.dtype for a in session.states.values()} == {np.dtype(np.int8)}
        assert [s.dtype for s in session.state_specs] == [DType.int8] * 2
        for state in states:  # zero is a code of its own, not code 0
            assert state.quant is not None
            assert (session.states[state.name] == state.quant.zero_point[0]).all()
        assert any(s.quant and s.quant.zero_point[0] != 0 for s in states)
        frames = pictures(10)
        want = np.array([r["logits"] for r in reference(model, frames)])
        got = np.array([feed(session, frame) for frame in frames])
        assert np.abs(got - want).max() < 0.1 * np.abs(want).max()
        assert session.bytes_copied_per_run == sum(s.elements for s in states)


def test_hot_swap_between_payloads_keeps_the_state(
    mixed: tuple[Path, tuple[StateSpec, ...]], model: ir.Model
) -> None:
    path, states = mixed
    frames = pictures(6)
    with (
        load(path, "float") as floats,
        load(path, "codes") as codes,
        floats.session() as a,
        codes.session() as b,
    ):
        for frame in frames[:5]:
            feed(a, frame)
        with pytest.raises(UsageError, match=r"got float32 .*carry_over"):
            b.restore(a.snapshot())
        carried = carry_over(a.snapshot(), a.state_specs, b.state_specs)
        assert (carried.kept, carried.reset) == (("state_0", "state_1"), {})
        b.restore(carried.values)
        back = carry_over(b.snapshot(), b.state_specs, a.state_specs).values
        for state in states:
            assert state.quant is not None
            error = np.abs(back[state.name] - a.states[state.name])
            assert error.max() <= 0.5001 * state.quant.scale[0]
        fresh = alone(codes, frames[5:])[0]
        want = feed(a, frames[5])
        assert np.abs(feed(b, frames[5]) - want).max() < 0.25 * np.abs(fresh - want).max()


def test_codes_need_a_scale_in_the_manifest(
    mixed: tuple[Path, tuple[StateSpec, ...]], tmp_path: Path, model: ir.Model
) -> None:
    with Bundle.open(mixed[0]) as opened:
        variant = next(v for _, v in opened.manifest.variants() if v.name == "codes")
        payload = Payload(
            "litert", "int8", "tflite", bytes(opened.read(variant.path)), (), (), variant.options
        )
    path = write(tmp_path / "b.edge", {"codes": payload}, model)
    with pytest.raises(BundleError, match=r"input state_0: expected float32 .*, got int8"):
        load(path)


def test_a_payload_must_hold_a_state_alike_on_both_sides(
    mixed: tuple[Path, tuple[StateSpec, ...]], tmp_path: Path, model: ir.Model
) -> None:
    annotated = annotated_model(model)
    annotated.metadata_props[INTEGER_IO] = ",".join(s.input for s in STATES)
    (payload,) = lower(annotated, HOST, "int8")
    path = write(tmp_path / "b.edge", {"codes": payload}, model, states=mixed[1])
    with pytest.raises(BundleError, match=r"state state_0: reads int8 but writes float32, expected one type"):
        load(path)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_payload_of_other_scales_is_refused(
    mixed: tuple[Path, tuple[StateSpec, ...]], tmp_path: Path, model: ir.Model, side: str
) -> None:
    """Codes go round as they are: a payload that reads them by another scale than it writes would drift."""
    annotated = annotated_model(model)
    for value in (*annotated.graph.inputs, *annotated.graph.outputs):
        for state in mixed[1]:
            if value.name in (state.input, state.output):
                set_quant(value, state.quant)
    name = getattr(STATES[1], side)
    value = next(v for v in (*annotated.graph.inputs, *annotated.graph.outputs) if v.name == name)
    params = quant(value)
    assert params is not None
    set_quant(value, dataclasses.replace(params, scale=(2 * params.scale[0],)))
    annotated.metadata_props[INTEGER_IO] = ",".join(n for s in STATES for n in (s.input, s.output))
    (payload,) = lower(annotated, HOST, "int8")
    path = write(tmp_path / "b.edge", {"codes": payload}, model, states=mixed[1])
    with pytest.raises(
        BundleError, match=rf"state state_1: {name} has scale .* and zero point .*, expected scale"
    ):
        load(path)


# --- many streams ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_streams_equal_each_alone_bit_for_bit(bundle: Path, backend: str, count: int) -> None:
    rng = random.Random(count)
    frames = {key: pictures(6, seed=100 + key) for key in range(count)}
    with load(bundle, backend) as engine, engine.streams() as streams:
        want = {key: alone(engine, frames[key]) for key in frames}
        turns = [key for key in frames for _ in range(6)]
        rng.shuffle(turns)
        got: dict[int, list[np.ndarray]] = {key: [] for key in frames}
        for key in turns:
            frame = frames[key][len(got[key])]
            got[key].append(streams.step(key, {"image": frame})["logits"].copy())
        assert len(streams) == count
        for key in frames:
            np.testing.assert_array_equal(np.array(got[key]), np.array(want[key]))


def test_streams_of_codes(mixed: tuple[Path, tuple[StateSpec, ...]]) -> None:
    frames = pictures(5)
    with load(mixed[0], "codes") as engine, engine.streams() as streams:
        want = alone(engine, frames)
        for frame, expected in zip(frames, want, strict=True):
            for key in "abc":
                np.testing.assert_array_equal(streams.step(key, {"image": frame})["logits"], expected)


@pytest.mark.parametrize("resident", [True, False])
def test_each_stream_is_reset_dropped_snapshot_and_restored_by_itself(bundle: Path, resident: bool) -> None:
    frames = pictures(5)

    def elsewhere() -> None:
        if not resident:
            streams.step(None, {"image": pictures(1, seed=8)[0]})  # None is a key like another

    with load(bundle, "onnxruntime") as engine, engine.streams() as streams:
        want = alone(engine, frames)

        def steps(key: str, numbers: range) -> None:
            for i in numbers:
                np.testing.assert_array_equal(streams.step(key, {"image": frames[i]})["logits"], want[i])
                elsewhere()

        steps("a", range(3))
        kept = streams.snapshot("a")
        steps("a", range(3, 5))
        streams.reset("a")
        steps("a", range(2))
        streams.restore("a", kept)
        steps("a", range(3, 5))
        streams.restore("b", kept)  # a new one
        steps("b", range(3, 5))
        streams.drop("b")
        steps("b", range(2))
        streams.drop("a")
        assert "a" not in streams
        assert "b" in list(streams)
        steps("a", range(4))
        with pytest.raises(UsageError, match="state 'state_0' is missing"):
            streams.restore("c", {})
        assert "c" not in streams
        steps("a", range(4, 5))
        for act in (streams.reset, streams.drop, streams.snapshot):
            with pytest.raises(UsageError, match="stream 'nobody': unknown"):
                act("nobody")


def test_a_stream_runs_like_a_session(bundle: Path) -> None:
    frames = pictures(4)
    with load(bundle, "litert") as engine, engine.streams() as streams:
        want = alone(engine, frames)
        slots = [streams.stream(key) for key in ("left", "right")]
        for frame, expected in zip(frames, want, strict=True):
            for slot in slots:
                np.testing.assert_array_equal(feed(slot, frame), expected)
        slots[0].reset()
        np.testing.assert_array_equal(feed(slots[0], frames[0]), want[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"expected inputs \['image'\], got \[\]"),
        ({"image": np.zeros((1, 3, 8, 9), np.float32)}, r"input image: expected float32 \(1, 3, 8, 8\), got"),
        ({"image": np.zeros((1, 3, 8, 8))}, "got float64"),
    ],
)
def test_a_step_that_does_not_fit_starts_no_stream(
    bundle: Path, inputs: Mapping[str, np.ndarray], message: str
) -> None:
    with load(bundle, "onnxruntime") as engine, engine.streams() as streams:
        with pytest.raises(UsageError, match=message):
            streams.step("a", inputs)
        assert len(streams) == 0


# --- the self-test and the race ----------------------------------------------------------------


def test_golden_values_may_hold_states(tmp_path: Path, model: ir.Model, payloads: dict[str, Payload]) -> None:
    given = {s.input: pictures(1, seed=i)[0].repeat(3, axis=1)[:, : s.shape[1]] for i, s in enumerate(STATES)}
    path = write(tmp_path / "b.edge", payloads, model, golden_states=given)
    for backend in BACKENDS:
        with load(path, backend) as engine, engine.session() as session:
            assert all((array == 0).all() for array in session.states.values())


def test_a_payload_that_forgets_is_refused(
    tmp_path: Path, model: ir.Model, payloads: dict[str, Payload]
) -> None:
    """It answers right from the initial state; only golden states tell."""
    wrong = shifted()
    for node in wrong.graph:
        if node.op_type == "Concat":  # reads its own first channels, which are no state
            kept = next(n for n in wrong.graph if n.outputs[0].name == str(node.inputs[0].name) + "_next")
            mask = ir.node("Mul", [kept.outputs[0], _zero(wrong)])
            add = ir.node("Mul", [node.inputs[0], _zero(wrong)])
            both = ir.node("Add", [mask.outputs[0], add.outputs[0]])
            wrong.graph.insert_before(node, [mask, add, both])
            node.replace_input_with(0, both.outputs[0])
    forgets = {"onnxruntime": onnx_payload(wrong)}
    load(write(tmp_path / "plain.edge", forgets, model)).close()
    given = {s.input: np.ones(s.shape, np.float32) for s in STATES}
    with pytest.raises(SelfTestError, match="output logits"):
        load(write(tmp_path / "golden.edge", forgets, model, golden_states=given))


def _zero(model: ir.Model) -> ir.Value:
    if "nought" not in model.graph.initializers:
        value = ir.Value(name="nought", const_value=ir.tensor(np.zeros(1, np.float32), name="nought"))
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([1])
        model.graph.register_initializer(value)
    return model.graph.initializers["nought"]


def test_a_payload_whose_next_state_is_wrong_is_refused(tmp_path: Path, model: ir.Model) -> None:
    wrong = shifted()
    node = next(n for n in wrong.graph if n.outputs[0].name == "state_1_next")
    wrong.graph.outputs[2].name = "unused"
    twice = ir.node("Add", [node.outputs[0], node.outputs[0]])
    twice.outputs[0].name = "state_1_next"
    twice.outputs[0].dtype, twice.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
    wrong.graph.append(twice)
    wrong.graph.outputs[2] = twice.outputs[0]
    given = {s.input: np.ones(s.shape, np.float32) for s in STATES}
    payload = {"onnxruntime": onnx_payload(wrong)}
    with pytest.raises(SelfTestError, match="output state_1_next"):
        load(write(tmp_path / "b.edge", payload, model, golden_states=given))


def test_the_self_test_leaves_the_session_at_its_initial_state(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[None] = []
    monkeypatch.setattr(selftest, "recorded_latency", lambda *_: 1.0)
    monkeypatch.setattr(
        selftest, "check_latency", lambda _, __, run: (run(), run(), run(), timed.append(None))
    )
    with load(bundle, "onnxruntime") as engine, engine.session() as session:
        feed(session, pictures(1)[0])
        selftest.self_test(engine.bundle, session, ["onnxruntime"], 1)
        assert timed
        assert all((array == 0).all() for array in session.states.values())


def test_the_race_carries_no_state(bundle: Path, tmp_path: Path, model: ir.Model) -> None:
    """Every candidate is timed on the same values; what wins starts anew."""
    with load(bundle, cache_dir=tmp_path) as engine:
        assert engine.tuning is not None
        assert len(engine.tuning.timings) == 3
        want = [r["logits"] for r in reference(model, pictures(3))]
        np.testing.assert_allclose(np.array(alone(engine, pictures(3))), np.array(want), atol=1e-5)
    with load(bundle, cache_dir=tmp_path) as engine:  # as recorded
        assert "(recorded)" in engine.why["net"]


def test_candidates_that_hold_states_differently_race(
    mixed: tuple[Path, tuple[StateSpec, ...]], tmp_path: Path
) -> None:
    with load(mixed[0], cache_dir=tmp_path) as engine:
        assert engine.tuning is not None
        assert {t.name for t in engine.tuning.timings} == {"net/float", "net/codes"}


def test_bundles_that_could_not_start_are_refused_before_anything_loads(
    bundle: Path,
    tmp_path: Path,
    model: ir.Model,
    payloads: dict[str, Payload],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime_variants, "load_variants", lambda *_: pytest.fail("loaded a payload"))
    (tmp_path / "unread.edge").write_bytes(
        forge(files_of(bundle), lambda tree: tree["plan"][0]["inputs"].remove("state_1"))
    )
    with pytest.raises(BundleError, match="no step of its plan reads input 'state_1'"):
        load(tmp_path / "unread.edge")
    states = with_fields(STATES, initial=1e39)
    with pytest.raises(BundleError, match=r"state state_0: initial value 1e\+39 is not one of float32"):
        load(write(tmp_path / "b.edge", payloads, model, states=states))
