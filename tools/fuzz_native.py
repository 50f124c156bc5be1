"""Damage payloads of the native engine and see that each is refused or runs safely, under sanitizers:
`python tools/fuzz_native.py --count 100000`.

Compiles the engine and tools/native/fuzz.cpp with AddressSanitizer and UndefinedBehaviorSanitizer (once, into a
temporary folder, or --build), makes small payloads with every operator, and runs mutants of these through the checker
and, where they pass, through every instruction set of this machine, whose results must agree. The same seed gives the
same mutants. Exit code 1 when something was found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgekit.backends.native.format import Act, Builder, Dtype, Op, OpType, encode  # noqa: E402

SOURCES = ROOT / "edgekit/backends/native/src"
FLAGS = (
    "-std=c++17 -O1 -g1 -pthread -ffp-contract=off -fsanitize=address,undefined,float-cast-overflow "
    "-fno-sanitize-recover=all -fno-omit-frame-pointer"
)


def build(folder: Path) -> Path:
    """The driver, compiled. Each source by itself: together they need much memory."""
    compiler = os.environ.get("CXX", "g++")
    objects = []
    for source in [*sorted(SOURCES.glob("*.cpp")), ROOT / "tools/native/fuzz.cpp"]:
        target = folder / f"{source.stem}.o"
        newest = max(p.stat().st_mtime for p in [source, *SOURCES.glob("*.h")])
        if not target.exists() or target.stat().st_mtime < newest:
            subprocess.run(
                [compiler, *FLAGS.split(), f"-I{SOURCES}", "-c", str(source), "-o", str(target)], check=True
            )
        objects.append(str(target))
    driver = folder / "fuzz"
    subprocess.run([compiler, *FLAGS.split(), *objects, "-o", str(driver)], check=True)
    return driver


def seeds() -> Iterator[tuple[str, bytes]]:
    """Small payloads, one for each operator in some of its forms, and nets of several."""
    rng = np.random.default_rng(0)

    def ints(low: int, high: int, *shape: int, kind: type = np.int32) -> np.ndarray:
        return rng.integers(low, high, shape).astype(kind)

    def reals(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    def weights(outs: int, each: int, k: int = 1) -> tuple[np.ndarray, ...]:
        return ints(-128, 128, outs, k, k, each, kind=np.int8), ints(-900, 900, outs), abs(reals(outs)) * 0.01

    table = ints(0, 256, 256, kind=np.uint8)
    curve = ints(-900, 12000, 128, kind=np.int16)

    def one(
        name: str, kind: OpType, shapes: list[tuple[int, int, int]], out: tuple[int, int, int], **more: object
    ) -> tuple[str, bytes]:
        b = Builder()
        floats = {OpType.quantize} | {k for k in OpType if k >= OpType.conv_f32}
        dtype = Dtype.f32 if kind in floats or more.pop("floats", False) else Dtype.u8
        inputs = []
        for i, (h, w, c) in enumerate(shapes):
            inputs.append(b.tensor((1, h, w, c), dtype, 0.1, 7, external=True))
            b.port(f"in{i}", inputs[-1], False)
        usual = {OpType.quantize: Dtype.u8, OpType.dequantize: Dtype.f32}.get(kind, dtype)
        back: Dtype = more.pop("back", usual)  # type: ignore[assignment]
        whole = b.tensor((1, out[0], out[1], out[2] + 5), back, 0.2, 11, external=True)
        b.port("out", whole, True)
        target = b.tensor(
            (1, *out), back, 0.2, 11, buffer=b.tensors[whole].buffer, offset=3, pitch=out[2] + 5
        )
        order = more.pop("order", range(len(inputs)))
        numbers = tuple(None if i is None else inputs[i] for i in order)  # type: ignore[attr-defined]
        b.op(Op(kind, numbers, target, name=name, **more))  # type: ignore[arg-type]
        return name, encode(b.program())

    pad = (1, 1, 1, 1)
    for act, extra, ints_ in (
        (Act.none, (), (0,)),
        (Act.table, (table,), (9,)),
        (Act.curve, (curve,), (16384,)),
    ):
        more = {"act": act, "ints": ints_}
        yield one(
            f"pointwise-{act.name}",
            OpType.conv,
            [(5, 6, 20)],
            (5, 6, 35),
            constants=(*weights(35, 20), *extra),
            **more,
        )
        yield one(f"dense-{act.name}", OpType.conv, [(7, 6, 8)], (4, 3, 18), kernel=(3, 3), stride=(2, 2), pad=pad,
                  constants=(*weights(18, 8, 3), *extra), **more)  # fmt: skip
        for k, stride, size in ((3, 1, 9), (3, 2, 5), (5, 1, 9), (7, 1, 9)):
            yield one(f"dw{k}s{stride}-{act.name}", OpType.conv, [(9, 9, 24)], (size, size, 24), kernel=(k, k), group=24,
                      stride=(stride, stride), pad=(k // 2,) * 4, constants=(*weights(24, 1, k), *extra), **more)  # fmt: skip
    yield one("stem", OpType.conv, [(12, 12, 3)], (6, 6, 16), kernel=(6, 6), stride=(2, 2), pad=(2, 2, 2, 2),
              constants=(*weights(16, 3, 6), table), act=Act.table, ints=(9,))  # fmt: skip
    yield one(
        "grouped",
        OpType.conv,
        [(6, 6, 12)],
        (6, 6, 9),
        kernel=(3, 3),
        group=3,
        pad=pad,
        constants=weights(9, 4, 3),
    )
    yield one("dilated", OpType.conv, [(8, 8, 5)], (8, 8, 9), kernel=(3, 3), dilation=(2, 2), pad=(2, 2, 2, 2),
              constants=weights(9, 5, 3))  # fmt: skip
    yield one("residual", OpType.conv, [(5, 5, 16), (5, 5, 24)], (5, 5, 24), ints=(3, 5), scalars=(0.5, 0.7),
              constants=(*weights(24, 16), table, table), act=Act.table)  # fmt: skip
    yield one("goes-on", OpType.conv, [(5, 5, 16), (5, 5, 6)], (5, 5, 24), ints=(0, 0, 1), order=(0, None, 1),
              constants=weights(24, 22))  # fmt: skip
    for act in (Act.none, Act.silu):
        yield one(f"to-reals-{act.name}", OpType.conv, [(5, 5, 16)], (5, 5, 21), constants=weights(21, 16),
                  act=act, back=Dtype.f32)  # fmt: skip
    yield one("far", OpType.conv, [(2, 40, 6)], (2, 201, 8), kernel=(1, 5), dilation=(1, 60), pad=(0, 200, 0, 201),
              constants=(ints(-128, 128, 8, 1, 5, 6, kind=np.int8), ints(-900, 900, 8), abs(reals(8)) * 0.01))  # fmt: skip
    yield one("add", OpType.add, [(4, 5, 33)] * 2, (4, 5, 33), scalars=(0.5, 0.7), constants=(table,))
    yield one("mul", OpType.mul, [(4, 5, 33), (1, 1, 33)], (4, 5, 33), scalars=(0.01,))
    yield one("table", OpType.table, [(4, 5, 33)], (4, 5, 33), constants=(table,))
    yield one(
        "max-pool",
        OpType.max_pool,
        [(9, 9, 20)],
        (9, 9, 20),
        kernel=(5, 5),
        pad=(2, 2, 2, 2),
        constants=(table,),
    )
    yield one("avg-pool", OpType.avg_pool, [(7, 7, 20)], (1, 1, 20), kernel=(7, 7), scalars=(0.9,), ints=(0,))
    rows, half = np.arange(8, dtype=np.int32) // 2, np.full(8, 0.25, np.float32)
    corners = np.stack([rows, np.minimum(rows + 1, 3)], 1)
    for floats in (False, True):
        name = "reals" if floats else "codes"
        yield one(
            f"nearest-{name}", OpType.nearest, [(4, 4, 19)], (8, 8, 19), constants=(rows, rows), floats=floats
        )
        yield one(f"bilinear-{name}", OpType.bilinear, [(4, 4, 19)], (8, 8, 19), scalars=(0.8,), floats=floats,
                  constants=(corners, half, corners, half))  # fmt: skip
        yield one(f"gather-{name}", OpType.gather, [(4, 4, 20)], (4, 4, 10), floats=floats,
                  constants=(np.arange(0, 20, 2, dtype=np.int32),))  # fmt: skip
    yield one("quantize", OpType.quantize, [(4, 5, 33)], (4, 5, 33), scalars=(9.0,))
    yield one("dequantize", OpType.dequantize, [(4, 5, 33)], (4, 5, 33), constants=(reals(256),))
    f32 = (OpType.conv_f32, [(5, 5, 6)], (5, 5, 18))
    yield one(
        "conv-f32", *f32, kernel=(3, 3), pad=pad, constants=(reals(18, 3, 3, 6), reals(18)), act=Act.silu
    )
    yield one(
        "conv-f32-bytes",
        *f32,
        ints=(1,),
        constants=(ints(-128, 128, 18, 6, kind=np.int8), reals(18), abs(reals(18))),
    )
    for group in (1, 6):
        yield one(f"conv-f32-codes-{group}", OpType.conv_f32, [(5, 5, 6)], (5, 5, 6), kernel=(3, 3), pad=pad, group=group, act=Act.silu,
                  scalars=(40.0,), constants=(reals(6, 3, 3, 6 // group), reals(6)), back=Dtype.u8)  # fmt: skip
    yield one("add-f32", OpType.add_f32, [(4, 5, 7)] * 2, (4, 5, 7))
    yield one("mul-f32", OpType.mul_f32, [(4, 5, 7), (1, 1, 7)], (4, 5, 7))
    yield one("max-pool-f32", OpType.max_pool_f32, [(6, 6, 7)], (3, 3, 7), kernel=(2, 2), stride=(2, 2))
    yield one("avg-pool-f32", OpType.avg_pool_f32, [(6, 6, 7)], (3, 3, 7), kernel=(2, 2), stride=(2, 2))
    for act in (a for a in Act if a >= Act.relu):
        yield one(
            f"unary-{act.name}", OpType.unary_f32, [(3, 3, 17)], (3, 3, 17), act=act, scalars=(0, 0, 0.1, 0.5)
        )
    yield one("softmax", OpType.softmax_f32, [(3, 3, 17)], (3, 3, 17))
    yield one("copy", OpType.copy_f32, [(3, 3, 17)], (3, 3, 17))
    yield "net", _net(weights, table)


def _net(weights: object, table: np.ndarray) -> bytes:
    """Several steps: memory used again, channels joined by writing side by side, a state."""
    make = weights
    assert callable(make)
    b = Builder()
    shape = (1, 8, 8, 16)
    image, state = (b.tensor(shape, scale=0.1, zero=7, external=True) for _ in range(2))
    following = b.tensor(shape, scale=0.1, zero=7, external=True)
    both = b.tensor((1, 8, 8, 40), scale=0.1, zero=7)
    left = b.tensor(shape, scale=0.1, zero=7, buffer=b.tensors[both].buffer, pitch=40)
    right = b.tensor((1, 8, 8, 24), scale=0.1, zero=7, buffer=b.tensors[both].buffer, offset=16, pitch=40)
    last = b.tensor((1, 1, 1, 40), scale=0.1, zero=7)
    logits = b.tensor((1, 1, 1, 10), Dtype.f32, external=True)
    b.op(Op(OpType.add, (image, state), left, scalars=(0.5, 0.5), name="mixed"))
    b.op(
        Op(
            OpType.conv,
            (left,),
            right,
            Act.table,
            (3, 3),
            pad=(1, 1, 1, 1),
            ints=(99,),
            constants=(*make(24, 16, 3), table),
        )
    )
    b.op(Op(OpType.table, (left,), following, constants=(table,), name="kept"))
    b.op(Op(OpType.avg_pool, (both,), last, kernel=(8, 8), scalars=(1.0,)))
    b.op(Op(OpType.conv, (last,), logits, constants=make(10, 40), name="classes"))
    b.port("image", image, False)
    b.port("state", state, False, state=2)
    b.port("state_next", following, True)
    b.port("logits", logits, True, (1, 10), False)
    return encode(b.program())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=100_000, help="mutated payloads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build", type=Path, help="where to compile, and to find what was compiled before")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.build or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        driver = build(folder)
        files = []
        for name, payload in seeds():
            files.append(folder / f"{name}.ekn")
            files[-1].write_bytes(payload)
        command = [str(driver), str(options.count), str(options.seed), *map(str, files)]
        return 1 if subprocess.run(command).returncode else 0


if __name__ == "__main__":
    sys.exit(main())
