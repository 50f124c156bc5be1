"""Small programs of the native engine: one operator, its tensors anywhere in their buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgekit.backends.native.engine import NativeExecutable
from edgekit.backends.native.format import Builder, Dtype, Op, OpType, encode
from edgekit.errors import BundleError, UsageError

ISAS = ("avx512", "avxvnni", "avx2", "neon_i8mm", "neon_dot", "neon", "scalar")


@dataclass
class Picture:
    """Codes or reals [n, h, w, c], and how they lie: channels beside them, pixels around them."""

    values: np.ndarray
    scale: float = 0.1
    zero: int = 0
    before: int = 0
    after: int = 0
    lead: int = 0

    @property
    def dtype(self) -> Dtype:
        return Dtype.f32 if self.values.dtype == np.float32 else Dtype.u8

    @property
    def pitch(self) -> int:
        return int(self.before + self.values.shape[3] + self.after)

    @property
    def pixels(self) -> int:
        return int(np.prod(self.values.shape[:3]))

    def store(self, memory: np.ndarray, values: np.ndarray) -> None:
        """Into all of the buffer, [1, pitch, 1, pixels] as sessions see it."""
        rows = values.reshape(self.pixels, -1)
        memory[0, self.before : self.pitch - self.after, 0, self.lead : self.lead + self.pixels] = rows.T


def isas() -> list[str]:
    """The instruction sets that run here."""
    program = one_op(
        Op(OpType.table, (), 0, constants=(np.arange(256, dtype=np.uint8),)),
        [blank((1, 1, 1, 1))],
        blank((1, 1, 1, 1)),
    )
    found = []
    for name in ISAS:
        try:
            NativeExecutable(program, isa=name).close()
        except (BundleError, UsageError):
            continue
        found.append(name)
    return found


def blank(shape: Sequence[int], dtype: Any = np.uint8, **more: Any) -> Picture:
    """A picture of zeros, where something is to be written."""
    return Picture(np.zeros(tuple(shape), dtype), **more)


def one_op(op: Op, inputs: Sequence[Picture | None], out: Picture) -> bytes:
    """A payload with this operator; its tensors are ranges of ports `in0`.. and `out`."""
    b = Builder()

    def place(name: str, p: Picture, output: bool) -> int:
        size = p.lead + p.pixels + 1
        whole = b.tensor((1, 1, size, p.pitch), p.dtype, p.scale, p.zero, external=True)
        b.port(name, whole, output)
        n, h, w, c = p.values.shape
        return b.tensor(
            (n, h, w, c),
            p.dtype,
            p.scale,
            p.zero,
            False,
            b.tensors[whole].buffer,
            p.lead * p.pitch + p.before,
            p.pitch,
        )

    tensors = tuple(None if p is None else place(f"in{i}", p, False) for i, p in enumerate(inputs))
    b.op(replace(op, inputs=tensors, output=place("out", out, True)))
    return encode(b.program())


def run(
    payload: bytes, inputs: Sequence[Picture | None], out: Picture, isa: str, threads: int = 1
) -> np.ndarray:
    """The output [n, h, w, c]. Asserts that nothing beside it was written."""
    engine = NativeExecutable(payload, isa=isa, threads=threads)
    session = engine.bind()
    rng = np.random.default_rng(1)
    for i, picture in enumerate(inputs):
        if picture is not None:
            noise(rng, session.inputs[f"in{i}"])
            picture.store(session.inputs[f"in{i}"], picture.values)
    noise(rng, session.outputs["out"])
    before = session.outputs["out"].copy()
    session.run()
    after = session.outputs["out"]
    rows = after[0, out.before : out.pitch - out.after, 0, out.lead : out.lead + out.pixels].T
    result = rows.reshape(out.values.shape).copy()
    out.store(before, result)
    assert before.tobytes() == after.tobytes(), "wrote beside its output"
    session.close()
    engine.close()
    return result


def noise(rng: np.random.Generator, array: np.ndarray) -> None:
    """Something that is neither 0 nor what was there."""
    array[...] = (
        rng.integers(1, 255, array.shape) if array.dtype == np.uint8 else rng.normal(0, 1e3, array.shape)
    )
