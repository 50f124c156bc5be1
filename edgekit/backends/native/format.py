"""Payloads of the native engine: a `Program` to bytes and back (src/payload.h). What operators mean: docs/native.md.

Nothing is checked here: the engine believes nothing that it has not checked itself (src/check.cpp).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.errors import BundleError

MAGIC, VERSION, NONE, ALIGN = b"EKNATIVE", 1, 0xFFFFFFFF, 64

_HEADER = struct.Struct("<8s6I7Q")
_BUFFER = struct.Struct("<QII")
_TENSOR = struct.Struct("<6IQQfi2I")
_OP = struct.Struct("<2I4I2I2I2I2I4II5i6f12Q2Q")
_PORT = struct.Struct("<96s4I8I2I")
_NAME = 95
"""Bytes of a port's name at most."""


class Dtype(enum.IntEnum):
    """Element types of tensors."""

    u8 = 0
    f32 = 1


class Act(enum.IntEnum):
    """Activations: see `Act` in src/payload.h."""

    none = 0
    table = 1
    curve = 2
    relu = 16
    clip = 17
    leaky_relu = 18
    sigmoid = 19
    silu = 20
    hard_swish = 21
    hard_sigmoid = 22
    tanh = 23
    gelu = 24
    exp = 25


class OpType(enum.IntEnum):
    """Operators: see `OpType` in src/payload.h."""

    conv = 0
    add = 1
    mul = 2
    table = 3
    max_pool = 4
    avg_pool = 5
    nearest = 6
    bilinear = 7
    gather = 8
    quantize = 9
    dequantize = 10
    conv_f32 = 16
    add_f32 = 17
    mul_f32 = 18
    unary_f32 = 19
    max_pool_f32 = 20
    avg_pool_f32 = 21
    softmax_f32 = 22
    copy_f32 = 23


_CONSTANTS: dict[OpType, str] = {
    OpType.conv: "bifBB",
    OpType.add: "B",
    OpType.mul: "B",
    OpType.table: "B",
    OpType.max_pool: "B",
    OpType.nearest: "iiB",
    OpType.bilinear: "ifif",
    OpType.gather: "iB",
    OpType.dequantize: "f",
    OpType.conv_f32: "fff",
}
"""Types of constants, as numpy writes them, by operator: for `decode`. Where they depend on more, see `_typed`."""


@dataclass(frozen=True)
class Buffer:
    """Memory of tensors. bytes: without what lies behind it for kernels to read; external: a port's."""

    bytes: int
    external: bool = False


@dataclass(frozen=True)
class Tensor:
    """A picture [n, h, w, c] in a buffer, channels last. offset, pitch: in elements; pitch 0 = c."""

    buffer: int
    shape: tuple[int, int, int, int]
    dtype: Dtype = Dtype.u8
    scale: float = 1.0
    zero: int = 0
    offset: int = 0
    pitch: int = 0


@dataclass(frozen=True)
class Op:
    """One operator. inputs: tensors, None = not there; pad: top, left, bottom, right."""

    type: OpType
    inputs: tuple[int | None, ...]
    output: int
    act: Act = Act.none
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    group: int = 1
    ints: tuple[int, ...] = ()
    scalars: tuple[float, ...] = ()
    constants: tuple[np.ndarray | None, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Port:
    """An input or output. shape: as sessions see it; channels_last: they see [N, C, ...] of what lies as [N, ..., C].

    state: of an input, number of the output port that is its next value.
    """

    name: str
    tensor: int
    output: bool
    shape: tuple[int, ...]
    channels_last: bool = False
    state: int | None = None


@dataclass(frozen=True)
class Program:
    """All of a payload."""

    buffers: tuple[Buffer, ...]
    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    ports: tuple[Port, ...]


class Builder:
    """Makes a program piece by piece; the methods return numbers."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.ports: list[Port] = []

    def buffer(self, bytes: int, external: bool = False) -> int:
        """Number of a new buffer."""
        self.buffers.append(Buffer(bytes, external))
        return len(self.buffers) - 1

    def tensor(
        self,
        shape: Sequence[int],
        dtype: Dtype = Dtype.u8,
        scale: float = 1.0,
        zero: int = 0,
        external: bool = False,
        buffer: int | None = None,
        offset: int = 0,
        pitch: int = 0,
    ) -> int:
        """Number of a new tensor: in a buffer of its own, or a range of the one given."""
        n, h, w, c = shape
        if buffer is None:
            room = offset + (n * h * w - 1) * (pitch or c) + c
            buffer = self.buffer(room * (4 if dtype == Dtype.f32 else 1), external)
        self.tensors.append(Tensor(buffer, (n, h, w, c), dtype, scale, zero, offset, pitch))
        return len(self.tensors) - 1

    def op(self, op: Op) -> int:
        """Appends an operator; number of its output."""
        self.ops.append(op)
        return op.output

    def port(
        self,
        name: str,
        tensor: int,
        output: bool,
        shape: Sequence[int] | None = None,
        channels_last: bool | None = None,
        state: int | None = None,
    ) -> int:
        """Number of a new port. Without a shape sessions see [N, C, H, W]."""
        n, h, w, c = self.tensors[tensor].shape
        turned = shape is None if channels_last is None else channels_last
        seen = (n, c, h, w) if shape is None else tuple(shape)
        self.ports.append(Port(name, tensor, output, seen, turned, state))
        return len(self.ports) - 1

    def program(self) -> Program:
        """What was made so far."""
        return Program(tuple(self.buffers), tuple(self.tensors), tuple(self.ops), tuple(self.ports))


def encode(program: Program) -> bytes:
    """The payload. Equal programs give equal bytes; equal constants are stored once."""
    constants = _Constants()
    ops = b"".join(_op(op, constants) for op in program.ops)
    sections = [
        b"".join(_BUFFER.pack(b.bytes, b.external, 0) for b in program.buffers),
        b"".join(_tensor(t) for t in program.tensors),
        ops,
        b"".join(_port(p) for p in program.ports),
        bytes(constants.data),
    ]
    at, places = _up(_HEADER.size), []
    for section in sections:
        places.append(at)
        at = _up(at + len(section))
    counts = len(program.buffers), len(program.tensors), len(program.ops), len(program.ports)
    header = _HEADER.pack(MAGIC, VERSION, *counts, 0, at, *places, len(constants.data))
    file = bytearray(at)
    file[: len(header)] = header
    for place, section in zip(places, sections, strict=True):
        file[place : place + len(section)] = section
    return bytes(file)


def _up(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class _Constants:
    def __init__(self) -> None:
        self.data = bytearray()
        self._found: dict[bytes, int] = {}

    def put(self, data: bytes) -> tuple[int, int]:
        """(at, bytes) of these bytes; nothing is (0, 0)."""
        if not data:
            return 0, 0
        if data not in self._found:
            self.data += bytes(-len(self.data) % ALIGN)
            self._found[data] = len(self.data)
            self.data += data
        return self._found[data], len(data)


def _tensor(t: Tensor) -> bytes:
    pitch = t.pitch or t.shape[3]
    return _TENSOR.pack(t.buffer, t.dtype, *t.shape, t.offset, pitch, t.scale, t.zero, 0, 0)


def _op(op: Op, constants: _Constants) -> bytes:
    def filled(values: Sequence[int | None], count: int) -> list[int]:
        return [NONE if v is None else v for v in values] + [NONE] * (count - len(values))

    ranges: list[int] = []
    for array in op.constants:
        data = (
            b"" if array is None else np.ascontiguousarray(array).astype(_little(array), copy=False).tobytes()
        )
        ranges += constants.put(data)
    ranges += [0] * (12 - len(ranges))
    ints = list(op.ints) + [0] * (5 - len(op.ints))
    scalars = list(op.scalars) + [0.0] * (6 - len(op.scalars))
    return _OP.pack(
        op.type, op.act, *filled(op.inputs, 4), op.output, NONE, *op.kernel, *op.stride, *op.dilation, *op.pad,
        op.group, *ints, *scalars, *ranges, *constants.put(op.name.encode())
    )  # fmt: skip


def _little(array: np.ndarray) -> np.dtype:
    return array.dtype.newbyteorder("<")


def _port(p: Port) -> bytes:
    name = p.name.encode()
    if not 0 < len(name) <= _NAME:
        raise BundleError(
            f"tensor {p.name!r}: its name has {len(name)} bytes, expected 1 to {_NAME}. Rename it in the model"
        )
    shape = list(p.shape) + [0] * (8 - len(p.shape))
    state = NONE if p.state is None else p.state
    return _PORT.pack(name, p.tensor, p.output, state, len(p.shape), *shape, p.channels_last, 0)


def decode(data: bytes | memoryview) -> Program:
    """The program of a payload; constants are views of `data`, one-dimensional. Raises: BundleError."""
    try:
        return _decode(memoryview(data).cast("B"))
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"payload: not of the native engine: {error}. Build the bundle again") from None


def _decode(data: memoryview) -> Program:
    magic, version, buffers, tensors, ops, ports, _, _, *places, _ = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"{magic!r}, version {version}")
    at_buffers, at_tensors, at_ops, at_ports, base = places

    def each(form: struct.Struct, at: int, count: int) -> list[tuple[int, ...]]:
        return list(form.iter_unpack(data[at : at + count * form.size]))

    def option(number: int) -> int | None:
        return None if number == NONE else number

    def bare(numbers: Sequence[int]) -> tuple[int | None, ...]:
        last = max((i for i, n in enumerate(numbers) if n != NONE), default=-1)
        return tuple(option(n) for n in numbers[: last + 1])

    found = []
    for v in each(_OP, at_ops, ops):
        kind, ranges = OpType(v[0]), v[30:42]
        arrays = [
            _typed(kind, i, Act(v[1]), v[19], data[base + at : base + at + size])
            for i, (at, size) in enumerate(zip(ranges[::2], ranges[1::2], strict=True))
        ]
        while arrays and arrays[-1] is None:
            arrays.pop()
        name = bytes(data[base + v[42] : base + v[42] + v[43]]).decode()
        found.append(
            Op(kind, bare(v[2:6]), v[6], Act(v[1]), (v[8], v[9]), (v[10], v[11]), (v[12], v[13]),
               (v[14], v[15], v[16], v[17]), v[18], v[19:24], v[24:30], tuple(arrays), name)
        )  # fmt: skip
    return Program(
        tuple(Buffer(b, bool(e)) for b, e, _ in each(_BUFFER, at_buffers, buffers)),
        tuple(
            Tensor(v[0], (v[2], v[3], v[4], v[5]), Dtype(v[1]), v[8], v[9], v[6], v[7])
            for v in each(_TENSOR, at_tensors, tensors)
        ),
        tuple(found),
        tuple(_port_of(p) for p in each(_PORT, at_ports, ports)),
    )


def _port_of(v: tuple[int, ...]) -> Port:
    name: bytes = v[0]  # type: ignore[assignment]
    tensor, output, state, rank = v[1:5]
    shape = tuple(v[5 : 5 + min(rank, 8)])
    text = name.split(b"\0")[0].decode()
    return Port(text, tensor, bool(output), shape, bool(v[13]), None if state == NONE else state)


def _typed(kind: OpType, number: int, act: Act, first: int, data: memoryview) -> np.ndarray | None:
    if not data:
        return None
    types = _CONSTANTS.get(kind, "")
    letter = types[number] if number < len(types) else "B"
    if kind == OpType.conv and number == 3 and act == Act.curve:
        letter = "h"
    if kind == OpType.conv_f32 and number == 0 and first == 1:
        letter = "b"
    return np.frombuffer(data, np.dtype(letter).newbyteorder("<"))
