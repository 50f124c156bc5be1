"""Inputs that a payload takes as codes: the same bits as of one that makes them itself, on every way into a session."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekit.backends.base import Payload
from edgekit.backends.native.engine import NativeExecutable
from edgekit.backends.native.format import Builder, Dtype, Op, OpType, decode, encode
from edgekit.backends.native.lower import lower
from edgekit.host import backend_problem
from edgekit.input_codes import input_codes
from edgekit.quant.annotate import node_id
from edgekit.quant.rules import rules_for
from edgekit.runtime.slots import Streams
from edgekit.spec import DType, QuantParams
from edgekit.target import Target
from edgekit.toolchain.running import run_here
from tests.quant_graphs import annotated, between, network, pictures, produced

pytestmark = pytest.mark.skipif(bool(backend_problem("native")), reason="libedgekit.so was not built")

HOST = Target.load("host")
RULES = rules_for("native", HOST)
SPECIAL = np.array([0, -0.0, np.nan, np.inf, -np.inf, 3e38, 1e-40, 0.5, 1.5, 2.5, -0.5], np.float32)


def lowered(model: ir.Model, precision: str = "int8", pictures: bool = True) -> Payload:
    (payload,) = lower(model, HOST, precision, pictures=pictures)
    return payload


@given(
    scale=st.floats(2**-20, 1024, width=32),
    zero=st.integers(0, 255),
    seed=st.integers(0, 2**32 - 1),
)
@example(scale=1.0, zero=0, seed=0)
def test_codes_are_the_engines_own(scale: float, zero: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    near = (rng.integers(-300, 300, 200) + 0.5 * rng.integers(0, 2, 200)) * np.float32(scale)
    x = np.concatenate([SPECIAL, near, np.nextafter(near, np.inf), rng.normal(0, 100 * scale, 100)])
    x = np.resize(x.astype(np.float32), (1, 1, 1, x.size))
    b = Builder()
    source = b.tensor(x.shape, Dtype.f32, external=True)
    b.port("x", source, False, x.shape, False)
    target = b.tensor(x.shape, Dtype.u8, scale, zero, external=True)
    b.port("y", target, True, x.shape, False)
    b.op(Op(OpType.quantize, (source,), target, scalars=(float(np.float32(1 / scale)),)))
    binding = NativeExecutable(encode(b.program())).bind()
    binding.inputs["x"][...] = x
    binding.run()
    codes = input_codes(x, QuantParams(DType.uint8, (scale,), (zero,)))
    np.testing.assert_array_equal(codes, binding.outputs["y"])


@pytest.mark.parametrize("name", ["SiLU", "AddRelu", "Concat", "MaxPool", "ResizeLinear"])
def test_results_are_those_of_the_float_port(name: str) -> None:
    model = annotated(between(name), RULES)
    floats, codes = lowered(model, pictures=False), lowered(model)
    steps = [[op.type for op in decode(p.data).ops] for p in (floats, codes)]
    assert steps[0] == [OpType.quantize, *steps[1]] and OpType.quantize not in steps[1]
    assert floats.inputs == codes.inputs and not floats.options and list(codes.options["codes"]) == ["x"]
    plain, taken = run_here(floats).session, run_here(codes).session
    assert taken.inputs["x"].dtype == np.uint8 and list(taken.codes) == ["x"] and not plain.codes
    for feed in pictures():
        for session in (plain, taken):
            session.write("x", feed["x"])
            session.run()
        np.testing.assert_array_equal(taken.outputs["y"], plain.outputs["y"])


def test_streams_make_codes_of_real_numbers() -> None:
    model = annotated(between("SiLU"), RULES)
    feed = pictures()[0]
    with (
        Streams(run_here(lowered(model, pictures=False)).session) as plain,
        Streams(run_here(lowered(model)).session) as taken,
    ):
        wanted = plain.step("a", feed)["y"].copy()
        np.testing.assert_array_equal(taken.step("a", feed)["y"], wanted)
        np.testing.assert_array_equal(taken.step_many({"b": feed})["b"]["y"], wanted)
        given = {"x": input_codes(feed["x"], taken.codes["x"])}
        np.testing.assert_array_equal(taken.step("a", given)["y"], wanted)


def test_levels_are_numbers_whatever_the_payload_takes() -> None:
    """A picture of bytes, or a list, means the same on a payload of codes as on one of real numbers."""
    model = annotated(between("SiLU"), RULES)
    plain, taken = run_here(lowered(model, pictures=False)).session, run_here(lowered(model)).session
    levels = np.random.default_rng(3).integers(0, 3, plain.inputs["x"].shape).astype(np.uint8)
    for picture in (levels, levels.tolist()):
        for session in (plain, taken):
            session.inputs["x"][...] = 0
            session.write("x", picture)
            session.run()
        np.testing.assert_array_equal(taken.outputs["y"], plain.outputs["y"])


def test_an_input_that_is_also_read_as_it_is_stays_float() -> None:
    """A second reader that computes in floats would see rounded numbers."""
    model = network(
        "a = Conv <pads=[1,1,1,1]> (x, w1, b1) \n b = Conv <pads=[1,1,1,1]> (x, w2, b2) \n y = Add (a, b)"
    )
    float_nodes = frozenset({node_id(produced(model, "b"))})
    payload = lowered(annotated(model, RULES, float_nodes=float_nodes))
    made = decode(payload.data)
    readers = {op.type for op in made.ops if made.ports[0].tensor in op.inputs}
    assert readers == {OpType.quantize, OpType.conv_f32} and not payload.options
    for precision in ("float32", "dynamic"):
        assert not lowered(between("SiLU"), precision).options
