"""Quantized states: one scale for what goes round, and codes at the border of every INT8 payload.

The numbers here are made so that integers and floats say exactly the same: every scale is a power of two and every
weight a small multiple of one, so sums in float32 are exact and so are the roundings.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekit
from edgekit.backends.base import LoadOptions, Payload, Ports, half
from edgekit.backends.litert.writer import facts
from edgekit.errors import BundleError, UsageError
from edgekit.manifest import Variant
from edgekit.passes import AFTER_SPLIT, compact, probe, run_passes
from edgekit.passes.states import answers, set_states, states
from edgekit.quant import search, simulate
from edgekit.quant.annotate import REAL_STATES, node_id, quant, set_quant, state_codes
from edgekit.quant.calibrate import calibrate
from edgekit.quant.placement import Choices, place
from edgekit.quant.rules import rules_for
from edgekit.quant.sensitivity import Probe, output_error
from edgekit.runtime.session import Session
from edgekit.runtime.state import carry_over
from edgekit.spec import DType, QuantParams, StateSpec, TensorSpec
from edgekit.target import Target
from tests.quant_graphs import executed
from tests.state_bundles import SHAPES, STATES, onnx_payload, pictures, reference, shifted, write

ARM, ORIN = Target.load("rpi5"), Target.load("jetson-orin")
X86 = dataclasses.replace(
    ARM, arch="x86_64", cpus=(dataclasses.replace(ARM.cpus[0], isa=("avx2", "avx512_vnni")),)
)
TARGETS = {"onnxruntime": X86, "openvino": X86, "litert": X86, "onnxruntime on arm": ARM, "tensorrt": ORIN}
HERE = ("onnxruntime", "litert", "openvino")
RULES = {name: rules_for(name.split()[0], target) for name, target in TARGETS.items()}
PARTS = 5
"""Powers of two: 2^-PARTS is the step of every activation, and of every weight."""
STEP = 2.0**-PARTS


def load(path: Path, variant: str | None = None) -> edgekit.Engine:
    return edgekit.load(path, variant=variant, threads=1)


def with_states(model: ir.Model, specs: Sequence[StateSpec] = STATES) -> ir.Model:
    set_states(model, specs)
    return model


def network() -> ir.Model:
    """`shifted`, its weights multiples of STEP that carry that scale."""
    model = with_states(shifted())
    for name, value in model.graph.initializers.items():
        if name.startswith("w"):
            numbers = value.const_value.numpy()  # type: ignore[union-attr]
            value.const_value = ir.tensor(
                (np.clip(np.rint(numbers / STEP), -63, 63) * STEP).astype(np.float32), name=name
            )
            count = numbers.shape[0]
            set_quant(value, QuantParams(DType.int8, (STEP,) * count, (0,) * count, 0))
    return model


def exact(low: int) -> tuple[float, float]:
    """A range of 256 codes with a step of STEP, the lowest `low` steps from 0."""
    return low * STEP, (low + 255) * STEP


RANGES = (
    ("image", exact(-128)),
    ("x0", exact(0)),
    ("x1", exact(0)),
    ("c2", exact(-120)),
    ("logits", exact(-128)),
)
"""Given ranges of any value of a group decide for it: x0 and x1 are what is split, kept and joined."""


def placed(backend: str, model: ir.Model | None = None, **choices: Any) -> ir.Model:
    model = model or network()
    return place(model, statistics(), RULES[backend], Choices(ranges=RANGES, **choices))


_statistics: dict[str, Any] = {}


def statistics() -> dict[str, Any]:
    if not _statistics:
        frames, model = pictures(8, seed=3), network()
        results = reference(model, frames)
        held = [{s.input: before[s.output] for s in STATES} for before in results[:-1]]
        feeds = [{"image": frame, **state} for frame, state in zip(frames[1:], held, strict=True)]
        _statistics.update(calibrate(model, feeds))
    return _statistics


def lowered(backend: str, model: ir.Model) -> Payload:
    name = backend.split()[0]
    (payload,) = half(name, "lower").lower(model, TARGETS[backend], "int8")
    return payload


def lowered_if_any(backend: str, model: ir.Model) -> Payload | None:
    """None where the choices leave nothing to compute in integers."""
    try:
        return lowered(backend, model)
    except UsageError as error:
        if "has no quantization parameters" not in str(error):
            raise
        return None


def stream(payload: Payload, model: ir.Model, frames: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Outputs frame by frame, next states among them as the payload holds them."""
    variant = Variant(
        "v",
        payload.backend,
        payload.precision,
        payload.format,
        "",
        len(payload.data),
        "",
        dict(payload.options),
    )
    executable = half(payload.backend, "engine").load(
        memoryview(payload.data), variant, LoadOptions(threads=1)
    )
    binding = executable.bind()
    specs = {t.name: t for t in (*executable.inputs, *executable.outputs)}
    for side, given_ in (("inputs", payload.inputs), ("outputs", payload.outputs)):
        for want in given_:
            got = specs[want.name]
            assert (got.dtype, got.shape) == (want.dtype, want.shape), side
            assert got.quant == want.quant or want.quant is None, side
    for state in states(model):
        params = specs[state.input].quant
        binding.inputs[state.input][...] = 0 if params is None else params.zero_point[0]
    results = []
    for frame in frames:
        binding.inputs["image"][...] = frame
        binding.run()
        results.append({n: np.array(a) for n, a in binding.outputs.items()})
        for state in states(model):
            np.copyto(binding.inputs[state.input], binding.outputs[state.output])
    binding.close()
    executable.close()
    return results


# --- the stream is the clip -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", HERE)
def test_a_stream_of_codes_is_the_clip_in_fake_quantization(backend: str) -> None:
    """64 frames: the simulation shifts channels between frames itself, the payload carries its states."""
    model = placed(backend)
    payload = lowered(backend, model)
    frames = pictures(64)
    got = stream(payload, model, frames)
    fake = simulate.fake_quantized(model)
    held = {s.input: np.zeros(s.shape, np.float32) for s in STATES}
    specs = {t.name: t for t in payload.outputs}
    seen: set[int] = set()
    for number, (frame, result) in enumerate(zip(frames, got, strict=True)):
        (want,) = simulate.run(fake, [{"image": frame, **held}], ["x0", "x1", "joined0", "joined1", "logits"])
        for i, state in enumerate(STATES):
            spec, channels = specs[state.output], state.shape[1]
            assert spec.quant is not None and spec.dtype in (DType.int8, DType.uint8)
            (scale,), (zero,) = spec.quant.scale, spec.quant.zero_point
            assert scale == STEP

            def codes(real: np.ndarray, scale: float = scale, zero: int = zero) -> np.ndarray:
                return np.rint(real / scale).astype(np.int64) + zero

            np.testing.assert_array_equal(result[state.output], codes(want[f"x{i}"][:, :channels]))
            before = np.full(state.shape, zero) if number == 0 else got[number - 1][state.output]
            np.testing.assert_array_equal(before, codes(want[f"joined{i}"][:, :channels]))
            held[state.input] = want[f"x{i}"][:, :channels]  # the clip's own definition of its shift
            seen |= set(np.unique(result[state.output]).tolist())
        # a mean may round a tie the other way
        assert np.abs(result["logits"] - want["logits"]).max() <= STEP * 1.001
    assert len(seen) > 60  # they do hold something


def test_arm_codes_are_those_of_x86_less_128() -> None:
    """The file for ARM runs here too, in Q/DQ: the same numbers, int8."""
    frames = pictures(6)
    pair = [stream(lowered(b, placed(b)), network(), frames) for b in ("onnxruntime", "onnxruntime on arm")]
    for x86, arm in zip(*pair, strict=True):
        for state in STATES:
            assert (x86[state.output].dtype, arm[state.output].dtype) == (np.uint8, np.int8)
            np.testing.assert_array_equal(x86[state.output].astype(int) - 128, arm[state.output].astype(int))


# --- what is not added -------------------------------------------------------------------------------


def counts(backend: str, payload: Payload, workdir: Path) -> Counter[str]:
    if backend == "litert":
        return Counter(facts(payload.data)["ops"])
    if backend == "openvino":
        import io

        import openvino

        network = openvino.Core().compile_model(openvino.Core().read_model(io.BytesIO(payload.data)), "CPU")
        return Counter(
            o.get_rt_info()["layerType"].astype(str) for o in network.get_runtime_model().get_ops()
        )
    return executed(payload.data, workdir)


@pytest.fixture(scope="module")
def tsm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ir.Model, Any]]:
    """MobileNetV2 of a quarter of the channels, with shifts and without: model and statistics."""
    torch = pytest.importorskip("torch")

    from edgekit import frontends
    from edgekit.models.tsm import TSM, export_online

    found = {}
    for mode in ("online", "none"):
        torch.manual_seed(1)
        net = TSM("mobilenet_v2", 5, mode, 0.25)
        for part in net.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = 0.5
        with torch.no_grad():
            net(torch.randn(4, 3, 64, 64))
        path = tmp_path_factory.mktemp("tsm") / f"{mode}.onnx"
        export_online(net.eval(), path, (64, 64))
        model, _ = run_passes(frontends.load(path), AFTER_SPLIT, check=False)
        rng = np.random.default_rng(0)
        held = {s.input: np.zeros(s.shape, np.float32) for s in states(model)}
        feeds = []
        for _ in range(4):
            feeds.append({"image": rng.standard_normal((1, 3, 64, 64)).astype(np.float32), **held})
            outputs = probe.evaluate(model, feeds[-1])
            held = {s.input: outputs[s.output] for s in states(model)}
        found[mode] = model, calibrate(model, feeds)
    return found


@pytest.mark.parametrize(
    ("backend", "extra"),
    [
        ("litert", {"SLICE": 20, "CONCATENATION": 10}),
        ("onnxruntime", {"Split": 10, "QLinearConcat": 10}),
    ],
)
def test_a_shift_in_codes_is_a_split_and_a_concat(
    backend: str, extra: dict[str, int], tsm: dict[str, tuple[ir.Model, Any]], tmp_path: Path
) -> None:
    """No transpose, no change of scale, no Quantize or Dequantize beside those of the network without shift."""
    found = {}
    for mode, (model, stats) in tsm.items():
        payload = lowered(backend, place(model, stats, RULES[backend]))
        found[mode] = counts(backend, payload, tmp_path)
        if backend == "onnxruntime":  # the layouts too, which `executed` leaves out
            nodes = onnx.load(str(tmp_path / "optimised.onnx")).graph.node
            found[mode]["Transpose"] = sum(n.op_type == "Transpose" for n in nodes)
    assert found["online"] - found["none"] == Counter(extra)
    assert not found["none"] - found["online"]
    if backend == "litert":
        real = [half(backend, "lower").lower(tsm[mode][0], X86, "float32")[0] for mode in ("online", "none")]
        assert counts(backend, real[0], tmp_path) - counts(backend, real[1], tmp_path) == Counter(extra)
    model, stats = tsm["online"]
    held = place(model, stats, RULES[backend])
    held.metadata_props[REAL_STATES] = "1"
    more = counts(backend, lowered(backend, held), tmp_path) - found["online"]
    assert {10} == {n for kind, n in more.items() if "quant" in kind.lower()}  # what codes at the border save


def test_openvino_computes_as_many_products_in_integers(tsm: dict[str, tuple[ir.Model, Any]]) -> None:
    import io

    import openvino

    found = {}
    for mode, (model, stats) in tsm.items():
        payload = lowered("openvino", place(model, stats, RULES["openvino"]))
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(io.BytesIO(payload.data)), "CPU")
        infos = [o.get_rt_info() for o in compiled.get_runtime_model().get_ops()]
        found[mode] = Counter(
            (i["layerType"].astype(str), i["runtimePrecision"].astype(str))
            for i in infos
            if i["layerType"].astype(str) != "Const"
        )
    more = found["online"] - found["none"]
    assert more[("Concatenation", "u8")] == more[("Split", "u8")] == 10
    assert {kind for kind, precision in more if precision == "f32"} <= {"Reshape"}  # of constants


# --- placement ---------------------------------------------------------------------------------------


NODES = [node_id(n) for n in network().graph]
LISTED = st.frozensets(st.sampled_from(NODES))


@settings(max_examples=40, deadline=None)
@given(floats=LISTED, own=LISTED, backend=st.sampled_from(sorted(TARGETS)))
def test_a_state_never_has_two_scales(floats: frozenset[str], own: frozenset[str], backend: str) -> None:
    model = placed(backend, float_nodes=floats, own_scales=own)
    values = {v.name: v for v in (*model.graph.inputs, *model.graph.outputs)}
    for state in STATES:
        assert quant(values[state.input]) == quant(values[state.output])
    payload = lowered_if_any(backend, model)
    if payload is None:
        return
    sides = {t.name: t for t in (*payload.inputs, *payload.outputs)}
    held = state_codes(model)
    for state in STATES:
        before, after = sides[state.input], sides[state.output]
        assert (before.dtype, before.shape, before.quant) == (after.dtype, after.shape, after.quant)
        assert (before.dtype != DType.float32) == (state.input in held)
    for tensor in (sides["image"], sides["logits"]):
        assert tensor.dtype == DType.float32 and tensor.quant is None


@settings(max_examples=10, deadline=None)
@given(floats=LISTED, own=LISTED, backend=st.sampled_from(HERE))
def test_whatever_is_left_in_float_the_stream_is_the_simulation(
    floats: frozenset[str], own: frozenset[str], backend: str
) -> None:
    model = placed(backend, float_nodes=floats, own_scales=own)
    payload = lowered_if_any(backend, model)
    if payload is None:
        return
    frames = pictures(4)
    got = stream(payload, model, frames)
    want = reference(simulate.fake_quantized(model), frames)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a["logits"], b["logits"], atol=2.01 * STEP)


def test_own_scales_of_a_concat_leave_the_pair_alone() -> None:
    """Where a Concat's inputs keep their scales, the state keeps that of the tensor it is cut from."""
    model = place(
        network(),
        statistics(),
        RULES["onnxruntime"],
        Choices(scheme="minmax", own_scales=frozenset({"joined0"})),
    )
    values = {str(v.name): v for n in model.graph for v in n.outputs} | {
        str(v.name): v for v in model.graph.inputs
    }
    assert quant(values["state_0"]) == quant(values["state_0_next"]) == quant(values["x0"]) is not None


def test_a_state_is_measured_as_activations_are() -> None:
    """Pictures keep their whole range; one rare spike in a state must not cost its other values their codes."""
    model, spiky = network(), {}
    frames = pictures(8, seed=3)
    frames[2, 0, 0, 0, 0] = 60
    results = reference(model, frames)
    feeds = [
        {"image": f, **{s.input: r[s.output] for s in STATES}}
        for f, r in zip(frames[1:], results[:-1], strict=True)
    ]
    stats = calibrate(model, feeds)
    for scheme in ("minmax", "percentile:99"):
        made = place(model, stats, RULES["litert"], Choices(scheme=scheme))
        values = {v.name: quant(v) for v in made.graph.inputs}
        spiky[scheme] = {name: params.scale[0] for name, params in values.items() if params is not None}
    assert spiky["minmax"]["image"] == spiky["percentile:99"]["image"]
    for state in STATES:
        assert spiky["percentile:99"][state.input] < 0.7 * spiky["minmax"][state.input]


def test_a_search_goes_by_the_answers() -> None:
    """A state is no answer: its error counts by what it does to one."""
    model, frames = network(), pictures(4, seed=3)
    results = reference(model, frames)
    feeds = [
        {"image": f, **{s.input: r[s.output] for s in STATES}}
        for f, r in zip(frames[1:], results[:-1], strict=True)
    ]
    rules = RULES["litert"]
    problem = search.Problem(
        model, statistics(), rules, feeds, feeds, lambda *_: {}, lambda _: search.Look(True)
    )
    found = search.plain(problem, "minmax")
    pairs = zip(
        simulate.run(model, feeds), simulate.run(simulate.fake_quantized(found.model), feeds), strict=True
    )
    want = np.mean([output_error({"logits": x["logits"]}, y) for x, y in pairs])
    assert answers(model) == ["logits"] and found.error == pytest.approx(float(want), rel=1e-9)
    assert Probe(found.model, feeds).error() == pytest.approx(found.error, rel=0.05)


FIXED = {"Sigmoid": (1 / 256, -128), "Tanh": (1 / 128, 0)}


@pytest.mark.parametrize("op", FIXED)
def test_a_state_that_an_activation_of_fixed_scale_writes(op: str) -> None:
    """TensorFlow Lite fixes that scale: the state takes it, and what it is joined with keeps its own."""
    from tests.litert_graphs import graph

    rng = np.random.default_rng(0)
    weights = {
        "w0": rng.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32),
        "w1": rng.normal(0, 0.3, (8, 16, 3, 3)).astype(np.float32),
        "w2": rng.normal(0, 0.3, (4, 8, 3, 3)).astype(np.float32),
    }
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["image", "w0"], ["a"], pads=[1] * 4),
        make("Concat", ["s", "a"], ["j"], axis=1),
        make("Conv", ["j", "w1"], ["g"], pads=[1] * 4),
        make(op, ["g"], ["t"]),
        make("Conv", ["t", "w2"], ["y"], pads=[1] * 4),
    ]
    shape = (1, 8, 8, 8)
    spec = StateSpec("s", DType.float32, shape, "s", "t")
    model = with_states(graph(nodes, {"image": SHAPES["image"], "s": shape}, weights, ("y", "t")), [spec])
    frames = 4 * pictures(6)
    held = np.zeros(shape, np.float32)
    feeds, want = [], []
    for frame in frames:
        feeds.append({"image": frame, "s": held})
        outputs = probe.evaluate(model, feeds[-1])
        held = outputs["t"]
        want.append(outputs["y"])
    made = place(model, calibrate(model, feeds), RULES["litert"], Choices(scheme="minmax"))
    values = {str(v.name): quant(v) for n in made.graph for v in n.outputs} | {
        "s": quant(made.graph.inputs[1])
    }
    (scale, zero) = FIXED[op]
    assert values["s"] == values["t"] == QuantParams(DType.int8, (scale,), (zero,))
    assert (
        values["j"] is not None and values["j"].scale[0] > 4 * scale
    )  # it was not squeezed into the state's
    got = stream(lowered("litert", made), made, frames)
    error = max(float(np.abs(g["y"] - w).max()) for g, w in zip(got, want, strict=True))
    assert error < 0.1 * max(float(np.abs(w).max()) for w in want)


def test_without_metadata_nothing_is_a_state() -> None:
    model = network()
    del model.metadata_props["edgekit.states"]
    payload = lowered("onnxruntime", placed("onnxruntime", model))
    assert {t.dtype for t in (*payload.inputs, *payload.outputs)} == {DType.float32}
    assert not payload.options


def test_compact_keeps_what_says_which_are_states() -> None:
    model = network()
    want = states(model)
    compact.run(model)
    assert states(model) == want and {v.name for v in model.graph.inputs} >= {s.input for s in want}
    again = ir.from_proto(onnx.load_from_string(lowered("tensorrt", placed("tensorrt")).data))
    assert [s.name for s in states(again)] == [s.name for s in want]


# --- sessions ----------------------------------------------------------------------------------------


def manifest_states(model: ir.Model) -> tuple[StateSpec, ...]:
    codes = state_codes(model)
    return tuple(dataclasses.replace(s, quant=codes[s.input]) for s in STATES)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All libraries' INT8, and float, of one network; the manifest speaks int8."""
    payloads = {name: lowered(name, placed(name)) for name in HERE}
    payloads["float"] = onnx_payload(network())
    given_ = reference(network(), pictures(2, seed=8))[-1]
    golden = {s.input: given_[s.output] for s in STATES}
    path = tmp_path_factory.mktemp("states") / "b.edge"
    specs = manifest_states(placed("litert"))
    return write(path, payloads, network(), states=specs, golden_states=golden, tolerance=0.2)


def feed(runnable: Any, frame: np.ndarray) -> np.ndarray:
    runnable.inputs["image"][...] = frame
    runnable.run()
    return np.array(runnable.outputs["logits"])


@pytest.mark.parametrize("backend", HERE)
def test_states_start_at_the_zero_point_and_go_round(backend: str, bundle: Path) -> None:
    frames = pictures(12)
    want = stream(lowered(backend, placed(backend)), network(), frames)
    with load(bundle, backend) as engine, engine.session() as session:
        for _ in range(2):
            for spec in session.state_specs:
                assert spec.quant is not None and spec.quant.dtype == spec.dtype != DType.float32
                assert (session.states[spec.name] == spec.quant.zero_point[0]).all()
            for frame, result in zip(frames, want, strict=True):
                np.testing.assert_array_equal(feed(session, frame), result["logits"])
                for state in STATES:
                    np.testing.assert_array_equal(session.states[state.name], result[state.output])
            session.reset()
        if backend != "litert":  # whose tensors lie where the library put them
            assert session.bytes_copied_per_run == 0


@pytest.mark.parametrize("backend", HERE)
def test_interleaved_streams_of_codes_are_each_alone(backend: str, bundle: Path) -> None:
    keys = range(5)
    frames = {k: pictures(8, seed=k) for k in keys}
    with load(bundle, backend) as engine:
        alone = {}
        for k in keys:
            with engine.session() as session:
                alone[k] = [feed(session, f) for f in frames[k]]
        order = [k for k in keys for _ in range(8)]
        random.Random(0).shuffle(order)
        at = dict.fromkeys(keys, 0)
        with engine.streams() as streams:
            for k in order:
                got = streams.step(k, {"image": frames[k][at[k]]})["logits"]
                np.testing.assert_array_equal(got, alone[k][at[k]])
                at[k] += 1
    assert not np.array_equal(alone[0][1], alone[1][1])


@pytest.mark.parametrize("first", [*HERE, "float"])
@pytest.mark.parametrize("second", [*HERE, "float"])
def test_a_hot_swap_keeps_values_to_half_a_scale(first: str, second: str, bundle: Path) -> None:
    frames = pictures(6)

    def real(session: Session, spec: StateSpec) -> np.ndarray:
        array = session.states[spec.name].astype(np.float64)
        if spec.dtype == DType.float32:
            return array
        assert spec.quant is not None
        return (array - spec.quant.zero_point[0]) * spec.quant.scale[0]

    with (
        load(bundle, first) as one,
        load(bundle, second) as other,
        one.session() as a,
        other.session() as b,
    ):
        for frame in frames[:5]:
            feed(a, frame)
        carried = carry_over(a.snapshot(), a.state_specs, b.state_specs)
        assert carried.reset == {}
        b.restore(carried.values)
        for before, after in zip(a.state_specs, b.state_specs, strict=True):
            error = np.abs(real(a, before) - real(b, after)).max()
            assert error <= (STEP / 2 if first == "float" and second != "float" else 0) * 1.0001
            assert np.abs(real(b, after)).max() > 10 * STEP


def test_a_payload_of_another_scale_is_refused(tmp_path: Path) -> None:
    """Its codes would be read by the manifest's scale."""
    payload = lowered("onnxruntime", placed("onnxruntime"))
    specs = tuple(
        dataclasses.replace(s, quant=dataclasses.replace(s.quant, scale=(2 * STEP,)))
        for s in manifest_states(placed("litert"))
        if s.quant is not None
    )
    path = write(tmp_path / "b.edge", {"codes": payload}, network(), states=specs)
    with pytest.raises(
        BundleError, match=r"state state_0: state_0 has scale 0.03125 .*, expected scale 0.0625"
    ):
        load(path)


# --- what the file does not say of its tensors ---------------------------------------------------------


def test_ports_are_written_and_read() -> None:
    params = QuantParams(DType.uint8, (0.5,), (3,))
    ports = Ports(frozenset({"s"}), {"s": params})
    options = ports.to_options()
    assert options == {"channels_last": ["s"], "codes": {"s": ["uint8", 0.5, 3]}}
    assert Ports().to_options() == {}
    variant = Variant("v", "onnxruntime", "int8", "onnx", "", 0, "", options)
    assert Ports.of(variant) == ports
    shown = ports.shown(TensorSpec("s", DType.uint8, (1, 8, 9, 4)))
    assert (shown.shape, shown.quant) == ((1, 4, 8, 9), params)
    with pytest.raises(BundleError, match=r"has shape \[4\], expected \[N, H, W, C\]"):
        ports.shown(TensorSpec("s", DType.uint8, (4,)))


@pytest.mark.parametrize(
    "options",
    [
        {"channels_last": "s"},
        {"channels_last": [1]},
        {"codes": []},
        {"codes": {"s": ["uint8", 0.5]}},
        {"codes": {"s": ["uint9", 0.5, 3]}},
        {"codes": {"s": ["uint8", float("inf"), 3]}},
        {"codes": {"s": ["uint8", -1.0, 3]}},
        {"codes": {"s": ["uint8", "x", 3]}},
        {"codes": {"s": 3}},
    ],
)
def test_ports_of_a_strange_bundle_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"payload v: options .* Build the bundle again"):
        Ports.of(Variant("v", "onnxruntime", "int8", "onnx", "", 0, "", options))
