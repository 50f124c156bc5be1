"""The native engine around its operators: files, ports, memory, states, threads, and what it refuses."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.backends.base import LoadOptions, zeros
from edgekit.backends.native import engine as native
from edgekit.backends.native import library
from edgekit.backends.native.engine import NativeExecutable
from edgekit.backends.native.format import (
    Act,
    Buffer,
    Builder,
    Dtype,
    Op,
    OpType,
    Port,
    Program,
    Tensor,
    decode,
    encode,
)
from edgekit.errors import BundleError, MissingExtraError, StreamError, UsageError
from edgekit.manifest import Variant

pytestmark = pytest.mark.skipif(not library.path().exists(), reason="libedgekit.so was not built")

SIDE = 12


def a_net(channels: int = 16, depth: int = 3) -> Program:
    """image [1, C, 12, 12] and a state like it -> a float score per channel: convolutions one after another."""
    rng = np.random.default_rng(5)
    b = Builder()
    shape = (1, SIDE, SIDE, channels)
    image, state, following = (b.tensor(shape, scale=0.1, zero=7, external=True) for _ in range(3))
    x = b.tensor(shape, scale=0.1, zero=7)
    b.op(Op(OpType.add, (image, state), x, scalars=(0.5, 0.5), name="mix"))
    for i in range(depth):
        y = b.tensor(shape, scale=0.1, zero=7)
        weights = rng.integers(-127, 128, (channels, 3, 3, channels)).astype(np.int8)
        constants = (weights, np.zeros(channels, np.int32), np.full(channels, 0.001, np.float32))
        b.op(Op(OpType.conv, (x,), y, kernel=(3, 3), pad=(1, 1, 1, 1), constants=constants, name=f"conv {i}"))
        x = y
    b.op(Op(OpType.table, (x,), following, constants=(np.arange(256, dtype=np.uint8),), name="keep"))
    pooled = b.tensor((1, 1, 1, channels), scale=0.1, zero=7)
    b.op(Op(OpType.avg_pool, (x,), pooled, kernel=(SIDE, SIDE), scalars=(1.0,)))
    scores = b.tensor((1, 1, 1, channels), Dtype.f32, external=True)
    b.op(Op(OpType.dequantize, (pooled,), scores, constants=(np.arange(256, dtype=np.float32),)))
    b.port("image", image, False)
    b.port("state", state, False, state=2)
    b.port("state_next", following, True)
    b.port("scores", scores, True, (1, channels), False)
    return b.program()


PAYLOAD = encode(a_net()) if library.path().exists() else b""


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, 16, SIDE, SIDE)).astype(np.uint8)


def expected(frames: int) -> list[np.ndarray]:
    """Scores of some frames in order, one binding, its state copied."""
    session = NativeExecutable(PAYLOAD, isa="scalar").bind()
    session.inputs["state"][...] = 7
    found = []
    for i in range(frames):
        session.inputs["image"][...] = image(i)
        session.run()
        session.inputs["state"][...] = session.outputs["state_next"]
        found.append(session.outputs["scores"].copy())
    return found


# --- files ---

numbers = st.integers(0, 2**31)
names = st.text(st.characters(min_codepoint=32, max_codepoint=0x2000), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read(data: st.DataObject) -> None:
    draw = data.draw
    shape = st.tuples(*[st.integers(1, 99)] * 4)
    buffers = draw(st.lists(st.builds(Buffer, numbers, st.booleans()), max_size=3))
    tensor = st.builds(
        Tensor,
        numbers,
        shape,
        st.sampled_from(Dtype),
        st.floats(0, 1e9, width=32),
        st.integers(0, 255),
        numbers,
        st.integers(1, 2**31),
    )
    tensors = draw(st.lists(tensor, max_size=3))
    port = st.builds(
        Port,
        names,
        numbers,
        st.booleans(),
        st.lists(st.integers(1, 9), max_size=8).map(tuple),
        st.booleans(),
        st.none() | numbers,
    )
    ports = draw(st.lists(port, max_size=3))
    ops = [
        Op(
            OpType.conv,
            (draw(numbers), None, draw(numbers)),
            draw(numbers),
            Act.curve,
            (3, 5),
            (1, 2),
            (2, 1),
            (1, 2, 3, 4),
            7,
            tuple(draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=5, max_size=5))),
            tuple(draw(st.lists(st.floats(width=32, allow_nan=False), min_size=6, max_size=6))),
            (
                np.arange(6, dtype=np.int8),
                None,
                np.arange(3, dtype=np.float32),
                np.arange(128, dtype=np.int16),
            ),
            draw(names),
        )
    ]
    program = Program(tuple(buffers), tuple(tensors), tuple(ops), tuple(ports))
    file = encode(program)
    again = decode(file)
    assert encode(again) == file
    assert (again.buffers, again.tensors, again.ports) == (program.buffers, program.tensors, program.ports)
    assert replace(again.ops[0], constants=()) == replace(ops[0], constants=())
    for a, b in zip(again.ops[0].constants, ops[0].constants, strict=True):
        assert (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and a.tolist() == b.tolist()))


@pytest.mark.parametrize("data", [b"", b"EKNATIVE", b"x" * 500, PAYLOAD[:150]])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        decode(data)
    with pytest.raises(BundleError):
        NativeExecutable(data or b"\0")


# --- ports, states, memory ---


def test_describes_itself() -> None:
    engine = NativeExecutable(PAYLOAD, threads=2)
    told = engine.describe()
    assert [s["type"] for s in told["steps"]] == [
        "add",
        "conv",
        "conv",
        "conv",
        "table",
        "avg_pool",
        "dequantize",
    ]
    assert told["steps"][1]["name"] == "conv 0" and told["threads"] == 2 and told["library"] == "edgekit"
    assert [(s.name, s.shape, s.dtype.value) for s in engine.inputs] == [
        ("image", (1, 16, SIDE, SIDE), "uint8"),
        ("state", (1, 16, SIDE, SIDE), "uint8"),
    ]
    assert [(s.name, s.shape) for s in engine.outputs] == [
        ("state_next", (1, 16, SIDE, SIDE)),
        ("scores", (1, 16)),
    ]
    quant = engine.inputs[0].quant
    assert quant is not None and (np.float32(quant.scale[0]), quant.zero_point[0]) == (np.float32(0.1), 7)


def test_memory_is_used_again() -> None:
    """However deep: two pictures at a time, and what follows them."""
    sizes = [NativeExecutable(encode(a_net(depth=d))).describe()["arena_bytes"] for d in (3, 9)]
    room = 16 * SIDE * SIDE + 64
    assert sizes[0] == sizes[1] < 2 * room + 256


@pytest.mark.parametrize("turns", [False, True])
def test_states_go_round(turns: bool) -> None:
    engine = NativeExecutable(PAYLOAD)
    bindings = engine.bind_turns({"state": "state_next"}) if turns else (engine.bind(),)
    engine.close()
    bindings[0].inputs["state"][...] = 7
    for i, want in enumerate(expected(5)):
        binding = bindings[i % len(bindings)]
        binding.inputs["image"][...] = image(i)
        binding.run()
        assert np.array_equal(binding.outputs["scores"], want)
        if not turns:
            binding.inputs["state"][...] = binding.outputs["state_next"]


def test_the_library_turns_states_itself() -> None:
    """As C programs use it: sessions of their own memory, and one with a port bound elsewhere."""
    lib = library.load()
    engine = NativeExecutable(PAYLOAD)
    for bound in (False, True):
        session = engine._open()
        own = zeros((SIDE * SIDE * 16 + 64,), "uint8")
        if bound:
            library.checked(lib, lib.ek_session_bind(session.value, 1, own.ctypes.data), "bind")
        library.checked(lib, lib.ek_session_reset(session.value), "reset")
        for i, want in enumerate(expected(4)):
            memory = ctypes.c_void_p()
            library.checked(lib, lib.ek_session_memory(session.value, 0, ctypes.byref(memory)), "memory")
            there = np.frombuffer(
                (ctypes.c_uint8 * (SIDE * SIDE * 16)).from_address(memory.value or 0), np.uint8
            )
            there[...] = image(i).transpose(0, 2, 3, 1).ravel()
            library.checked(lib, lib.ek_session_run(session.value), "run")
            library.checked(lib, lib.ek_session_memory(session.value, 3, ctypes.byref(memory)), "memory")
            got = np.frombuffer((ctypes.c_float * 16).from_address(memory.value or 0), np.float32)
            assert np.array_equal(got[None], want)
            library.checked(lib, lib.ek_session_turn(session.value), "turn")


def test_works_in_arrays_of_others() -> None:
    engine = NativeExecutable(PAYLOAD)
    picture = zeros((1, SIDE, SIDE, 16), "uint8").transpose(0, 3, 1, 2)
    scores = zeros((1, 16), "float32")
    elsewhere = zeros((1, 16, SIDE, SIDE), "uint8")  # [N, C, H, W] as it lies: not how the engine has it
    binding = engine.bind_to({"image": picture, "scores": scores, "state_next": elsewhere})
    assert binding.inputs["image"] is picture and binding.outputs["scores"] is scores
    assert binding.outputs["state_next"] is not elsewhere
    binding.inputs["state"][...] = 7
    picture[...] = image(0)
    binding.run()
    assert np.array_equal(scores, expected(1)[0])


def test_arrays_that_do_not_fit_are_left_alone() -> None:
    engine = NativeExecutable(PAYLOAD)
    tight = np.zeros(SIDE * SIDE * 16, np.uint8).reshape(1, SIDE, SIDE, 16).transpose(0, 3, 1, 2)
    shifted = zeros((SIDE * SIDE * 16 + 1,), "uint8")[1:].reshape(1, SIDE, SIDE, 16).transpose(0, 3, 1, 2)
    for given_ in (tight, shifted, zeros((1, SIDE, SIDE, 16), "uint8")):
        assert engine.bind_to({"image": given_}).inputs["image"] is not given_


def test_keeps_every_tensor() -> None:
    program = a_net()
    engine = NativeExecutable(PAYLOAD, keep=True)
    session = engine.bind()
    session.inputs["image"][...] = image(0)
    session.inputs["state"][...] = 7
    session.run()
    number = program.ops[-3].inputs[0]
    assert number is not None
    last = session.tensor(number, SIDE * SIDE * 16).reshape(1, SIDE, SIDE, 16)
    assert np.array_equal(last.transpose(0, 3, 1, 2), session.outputs["state_next"])
    with pytest.raises(UsageError, match="keep"):
        NativeExecutable(PAYLOAD).bind().tensor(number, 1)
    with pytest.raises(UsageError, match="tensor 99"):
        session.tensor(99, 1)


def test_measures_steps() -> None:
    session = NativeExecutable(PAYLOAD).bind()
    with pytest.raises(UsageError, match="not measured"):
        session.times(7)
    session.profile()
    session.run()
    assert (session.times(7) > 0).all()


def test_loads_as_a_backend_does() -> None:
    variant = Variant(
        "native-int8", "native", "int8", "ekn", "segments/x.ekn", len(PAYLOAD), "sha256:" + 64 * "0"
    )
    engine = native.load(memoryview(b"?" + PAYLOAD)[1:], variant, LoadOptions(threads=1))  # not aligned
    assert engine.describe()["threads"] == 1
    with pytest.raises(BundleError, match="payload native-int8: "):
        native.load(memoryview(PAYLOAD[:-64]), variant, LoadOptions())


def test_closing() -> None:
    engine = NativeExecutable(PAYLOAD, threads=3)
    session = engine.bind()
    engine.close()
    engine.close()
    session.run()
    with pytest.raises(StreamError, match="closed"):
        engine.bind()
    scores = session.outputs["scores"]
    session.close()
    session.close()
    with pytest.raises(StreamError, match="closed"):
        session.run()
    assert np.isfinite(scores).all()


def test_arguments() -> None:
    with pytest.raises(UsageError, match="instruction set sse9: not known"):
        NativeExecutable(PAYLOAD, isa="sse9")
    with pytest.raises(UsageError, match="threads: at most 64"):
        NativeExecutable(PAYLOAD, threads=65)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "libedgekit.so"))
    with pytest.raises(MissingExtraError, match="C\\+\\+17"):
        NativeExecutable(PAYLOAD)


# --- threads ---


def test_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sessions of one engine at once, all steps split: one has the crew, the others work alone."""
    monkeypatch.setenv("EDGEKIT_NATIVE_SPLIT", "0")
    before = threading.active_count()
    want = expected(20)
    for spin in (0, 20):
        engine = NativeExecutable(PAYLOAD, threads=3, spin_us=spin)
        wrong: list[int] = []

        def stream(engine: NativeExecutable = engine, wrong: list[int] = wrong) -> None:
            session = engine.bind()
            session.inputs["state"][...] = 7
            for i in range(60):
                if i % 20 == 0:
                    session.inputs["state"][...] = 7
                session.inputs["image"][...] = image(i % 20)
                session.run()
                session.inputs["state"][...] = session.outputs["state_next"]
                if not np.array_equal(session.outputs["scores"], want[i % 20]):
                    wrong.append(i)

        streams = [threading.Thread(target=stream) for _ in range(3)]
        for thread in streams:
            thread.start()
        for thread in streams:
            thread.join(60)
        assert not any(thread.is_alive() for thread in streams) and not wrong
        engine.close()
    assert threading.active_count() == before


def test_threads_end_with_the_engine() -> None:
    def become(count: int) -> bool:
        """Whether there are soon so many of the engine's threads: the kernel forgets them some time after they end."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            names = []
            for task in Path("/proc/self/task").iterdir():
                with contextlib.suppress(OSError):
                    names.append((task / "comm").read_text().strip())
            if names.count("edgekit") == count:
                return True
            time.sleep(0.01)
        return False

    assert become(0)
    engine = NativeExecutable(PAYLOAD, threads=8)
    assert become(7)
    engine.bind().run()
    engine.close()
    assert become(0)


# --- refusals ---

Change = Callable[[Program], Program]


def op(number: int, **change: object) -> Change:
    return lambda p: replace(p, ops=(*p.ops[:number], replace(p.ops[number], **change), *p.ops[number + 1 :]))  # type: ignore[arg-type]


def tensor(number: int, **change: object) -> Change:
    return lambda p: replace(
        p,
        tensors=(*p.tensors[:number], replace(p.tensors[number], **change), *p.tensors[number + 1 :]),  # type: ignore[arg-type]
    )


def port(number: int, **change: object) -> Change:
    return lambda p: replace(
        p, ports=(*p.ports[:number], replace(p.ports[number], **change), *p.ports[number + 1 :])
    )  # type: ignore[arg-type]


def buffer(number: int, **change: object) -> Change:
    return lambda p: replace(
        p,
        buffers=(*p.buffers[:number], replace(p.buffers[number], **change), *p.buffers[number + 1 :]),  # type: ignore[arg-type]
    )


def constant(number: int, which: int, array: np.ndarray | None) -> Change:
    def change(p: Program) -> Program:
        constants = list(p.ops[number].constants)
        constants[which] = array
        return op(number, constants=tuple(constants))(p)

    return change


REFUSED: list[tuple[str, Change]] = [
    ("does not fit its buffer", tensor(3, shape=(1, SIDE + 1, SIDE, 16))),
    ("does not fit its buffer", tensor(3, pitch=17)),
    ("does not fit its buffer", tensor(3, offset=1)),
    ("does not fit its buffer", tensor(3, pitch=2**40)),
    ("does not fit its buffer", tensor(3, offset=2**64 - 1)),
    ("tensor 3: buffer 99", tensor(3, buffer=99)),
    ("an axis of 0", tensor(3, shape=(1, 0, SIDE, 16))),
    ("scale -1", tensor(3, scale=-1.0)),
    ("scale nan", tensor(3, scale=float("nan"))),
    ("zero point 256", tensor(3, zero=256)),
    ("another type", tensor(3, dtype=Dtype.f32, shape=(1, SIDE, SIDE, 4))),
    ("0 bytes", buffer(3, bytes=0)),
    ("of no port", buffer(3, external=True)),
    ("buffer of its own", buffer(0, external=False)),
    ("buffer of its own", buffer(0, bytes=16 * SIDE * SIDE + 1)),
    ("buffer of its own", port(1, tensor=0)),
    ("twice", port(1, name="image")),
    ("shape is not that", port(0, shape=(1, 16, SIDE, SIDE + 1))),
    ("shape is not that", port(0, shape=(1, SIDE, SIDE, 16))),
    ("no output", port(1, state=0)),
    ("no output", port(1, state=77)),
    ("another type or shape", port(1, state=3)),
    ("name is no text", port(0, name="a\x07b")),
    ("writes an input", op(0, inputs=(1, 2), output=0)),
    ("writes what it reads", op(1, output=3)),
    ("reads what nothing wrote", op(1, inputs=(5,))),
    ("1 inputs", op(0, inputs=(0,))),
    ("tensor 99 is not there", op(0, inputs=(0, 99))),
    ("expected one output", op(0, output=99)),
    ("could be as large", op(0, scalars=(4e6, 4e6))),
    ("scalar 1 is not finite", op(0, scalars=(1.0, float("inf")))),
    ("activation 1 is not known", op(0, act=Act.table)),
    ("has no windows", op(0, kernel=(3, 3))),
    ("has no groups", op(0, group=2)),
    ("kernel 0", op(1, kernel=(0, 3))),
    ("stride 0", op(1, stride=(0, 1))),
    ("pad 3 of a window of 3", op(1, pad=(3, 1, 1, 1))),
    ("12 windows over 12, expected 10", op(1, pad=(0, 1, 0, 1))),
    ("constant 0 has", op(1, group=2)),
    ("3 groups of 16", op(1, group=3)),
    ("constant 3 has 0 bytes", op(1, act=Act.table)),
    ("constant 3 has 0 bytes", op(1, act=Act.curve)),
    ("2 inputs", op(1, inputs=(3, 0), ints=(0, 0, 1))),
    ("cannot go on", op(1, inputs=(3, None, 0), ints=(0, 0, 1))),
    (
        "sums of channel 3 leave int32",
        constant(1, 1, np.where(np.arange(16) == 3, 2**31 - 1, 0).astype(np.int32)),
    ),
    ("could be as large", constant(1, 2, np.full(16, 1e4, np.float32))),
    ("not finite", constant(1, 2, np.full(16, np.nan, np.float32))),
    ("constant 2 has 60 bytes", constant(1, 2, np.zeros(15, np.float32))),
    ("constant 0 has 0 bytes", constant(4, 0, None)),
    ("counts by 2", op(5, ints=(2,))),
    ("expected 2", op(5, kernel=(11, 11))),
    ("another type", op(6, type=OpType.table)),
    ("shapes differ", op(4, output=7)),
]


def test_refuses_lines_that_no_kernel_could_copy() -> None:
    """Pads as wide as a dilated window, of many channels: 4 GiB a line, which 32 bits do not count."""
    b = Builder()
    given, got = b.tensor((1, 1, 1, 65536), external=True), b.tensor((1, 1, 1, 1), external=True)
    b.port("x", given, False)
    b.port("y", got, True)
    constants = (np.zeros((1, 1, 17, 65536), np.int8), np.zeros(1, np.int32), np.ones(1, np.float32))
    b.op(
        Op(
            OpType.conv,
            (given,),
            got,
            kernel=(1, 17),
            dilation=(1, 4096),
            pad=(0, 65536, 0, 0),
            constants=constants,
        )
    )
    with pytest.raises(BundleError, match="lines of 65536 channels with their pads are too large"):
        NativeExecutable(encode(b.program()))


@pytest.mark.parametrize(
    ("problem", "change"), REFUSED, ids=[f"{i}-{p[:20]}" for i, (p, _) in enumerate(REFUSED)]
)
def test_refuses(problem: str, change: Change) -> None:
    with pytest.raises(BundleError, match=problem):
        NativeExecutable(encode(change(a_net())))


def resized(kind: OpType, *lists: np.ndarray) -> Program:
    b = Builder()
    a, out = (b.tensor((1, 4, 4, 8), external=True) for _ in range(2))
    b.op(Op(kind, (a,), out, scalars=(1.0,), constants=lists))
    b.port("in", a, False)
    b.port("out", out, True)
    return b.program()


INDEX, WEIGHT = np.arange(4, dtype=np.int32), np.full(4, 0.5, np.float32)
PAIRS = np.stack([INDEX, INDEX], 1)


@pytest.mark.parametrize(
    ("problem", "kind", "lists"),
    [
        ("index 4 of 4", OpType.nearest, (INDEX + 1, INDEX)),
        ("index -1 of 4", OpType.nearest, (INDEX, INDEX - 1)),
        ("index 4 of 4", OpType.bilinear, (PAIRS + 1, WEIGHT, PAIRS, WEIGHT)),
        ("weight 2.5", OpType.bilinear, (PAIRS, WEIGHT, PAIRS, WEIGHT * 5)),
        ("index 8 of 8", OpType.gather, (np.arange(1, 9, dtype=np.int32),)),
    ],
)
def test_refuses_indices(problem: str, kind: OpType, lists: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(BundleError, match=problem):
        NativeExecutable(encode(resized(kind, *lists)))


@pytest.mark.parametrize(
    ("problem", "at", "value"),
    [
        ("version 2", 8, struct.pack("<I", 2)),
        ("reserved", 28, struct.pack("<I", 1)),
        ("bytes, expected", 32, struct.pack("<Q", 5)),
        ("operators: ", 20, struct.pack("<I", 9999)),
        ("at most", 20, struct.pack("<I", 2**31)),
        ("tensors: ", 48, struct.pack("<Q", 2**63)),
        ("constants: ", 80, struct.pack("<Q", 2**64 - 1)),
    ],
)
def test_refuses_headers(problem: str, at: int, value: bytes) -> None:
    with pytest.raises(BundleError, match=problem):
        NativeExecutable(PAYLOAD[:at] + value + PAYLOAD[at + len(value) :])
