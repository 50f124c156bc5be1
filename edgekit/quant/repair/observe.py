"""Inner values of an annotated network and of its float original, picture by picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import shape
from edgekit.quant import simulate
from edgekit.quant.annotate import quant
from edgekit.quant.repair import Feed
from edgekit.spec import QuantParams

T = TypeVar("T")
VALUE_BYTES = 64 << 20
"""Inner values of one picture held at a time; a larger one alone."""


@dataclass(frozen=True)
class Want:
    """Values to look at, by value of the annotated model: what nodes read (rounded to codes where it is
    quantized), what they compute (before rounding), and values of the float model by name."""

    read: tuple[ir.Value, ...] = ()
    computed: tuple[ir.Value, ...] = ()
    exact: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """Arrays of one picture by value name."""

    read: dict[str, np.ndarray]
    computed: dict[str, np.ndarray]
    exact: dict[str, np.ndarray]


def observe(model: ir.Model, float_model: ir.Model, feeds: Sequence[Feed], want: Want) -> Iterator[Seen]:
    """What `want` asks for, one `Seen` per picture. `model` is annotated and is not changed."""
    inner = {str(v.name): v for v in want.read if v.producer() is not None}
    before = {str(v.name): f"{v.name}.exact" if quant(v) else str(v.name) for v in want.computed}
    names = list(dict.fromkeys((*inner, *before.values())))
    quantized = simulate.run(simulate.fake_quantized(model), feeds, names) if names else ({} for _ in feeds)
    original = simulate.run(float_model, feeds, want.exact) if want.exact else ({} for _ in feeds)
    for feed, a, b in zip(feeds, quantized, original, strict=True):
        read = {
            str(v.name): a[str(v.name)] if v.producer() is not None else rounded(feed[str(v.name)], quant(v))
            for v in want.read
        }
        yield Seen(read, {n: a[e] for n, e in before.items()}, dict(b))


def rounded(numbers: np.ndarray, params: QuantParams | None) -> np.ndarray:
    """The real numbers behind the codes of a per-tensor value; `numbers` themselves without params."""
    if params is None:
        return numbers
    scale, zero = np.float32(params.scale[0]), np.float32(params.zero_point[0])
    found: np.ndarray = np.clip(np.rint(numbers / scale) + zero, -128, 127) - zero
    return (found * scale).astype(np.float32)


def size(value: ir.Value | None) -> int:
    """Bytes of a float32 value, 1 MiB where its shape is open."""
    sizes = shape(value)
    return 1 << 20 if sizes is None else 4 * int(np.prod(sizes, dtype=np.int64))


def groups(items: Sequence[T], sizes: Sequence[int], count: int, limit: int) -> Iterator[list[T]]:
    """`items` in order, in about `count` groups of equal length whose sizes add up to `limit` at most
    (one that is larger stands alone)."""
    most = -(-len(items) // count)
    group: list[T] = []
    used = 0
    for item, bytes_ in zip(items, sizes, strict=True):
        if group and (len(group) >= most or used + bytes_ > limit):
            yield group
            group, used = [], 0
        group.append(item)
        used += bytes_
    if group:
        yield group
