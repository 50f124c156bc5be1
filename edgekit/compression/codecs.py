"""Encode weights in few bits (edgekit/codecs.py decodes; its table says how each codec is laid out). Numpy only.

    packed = encode(weight, "kmeans-16")         # decode(packed) is what will run
    packed = encode(weight, "2:4+int8")          # 2 of 4 input channels, these in 8 bits

Weights that lie on a codec's set already (trained to, methods/codebook.py) are encoded exactly: decode gives back
the very bits. Methods and their constants: each function's paper; what cannot be exact is a least-squares or nearest choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from edgekit import codecs
from edgekit.codecs import Encoded, index_bits, pack
from edgekit.errors import UsageError, did_you_mean

NAMES = (
    "float32", "float16", "int2", "int3", "int4", "int5", "int6", "int7", "int8", "binary", "ternary", "ternary-2",
    "abc-2", "abc-3", "abc-4", "abc-5", "kmeans-K", "pow2-3", "pow2-4", "pow2-5",
)  # fmt: skip
TWN_THRESHOLD = 0.7
"""Of mean |w|: smaller weights become 0 (Li et al. 2016, eq. 6)."""
TTQ_THRESHOLD = 0.05
"""Of max |w|, with a value per sign (Zhu et al. 2016, eq. 9)."""
KMEANS_ROUNDS = 300
PINNED_ZEROS = 0.01
"""Share of exact zeros (a mask's) from which on a centroid stays 0."""


@dataclass(frozen=True)
class Scheme:
    """A codec with its settings, parsed from a name such as `kmeans-16`, `2:4+int8` or `sparse+ternary`."""

    codec: str
    settings: dict[str, int] = field(default_factory=dict)
    values: Scheme | None = None


def scheme(name: str) -> Scheme:
    """Raises: UsageError for a name that there is not."""
    mask, plus, rest = name.partition("+")
    if plus:
        found = re.fullmatch(r"(\d+):(\d+)", mask)
        inner = scheme(rest)
        if inner.values is not None:
            raise UsageError(f"codec {name!r}: one mask and one codec are expected")
        if found and 1 <= int(found[1]) < int(found[2]) <= 32 and int(found[1]) <= 16:
            return Scheme("nm", {"n": int(found[1]), "m": int(found[2]), "along": 1}, inner)
        if mask in ("sparse", "blocks"):
            rows, columns = (8, 4) if mask == "blocks" else (1, 1)
            return Scheme("sparse", {"rows": rows, "columns": columns}, inner)
        raise UsageError(f"codec {name!r}: mask {mask!r}: expected N:M (2:4), sparse or blocks (of 8 x 4)")
    head, _, tail = name.partition("-")
    number = int(tail) if tail.isdecimal() else None
    if head == "kmeans" and number is not None and 2 <= number <= 256:
        return Scheme("kmeans", {"levels": number})
    if name in NAMES:
        if head.startswith("int"):
            return Scheme("int", {"bits": int(head[3:])})
        if head == "ternary":
            return Scheme("ternary", {"signs": number or 1})
        if head == "abc":
            return Scheme("abc", {"bases": int(tail)})
        if head == "pow2":
            return Scheme("pow2", {"bits": int(tail), "zero": 0})
        if name != "kmeans-K":
            return Scheme(name)
    raise UsageError(
        f"codec {name!r}: unknown. {did_you_mean(name, [*NAMES, 'kmeans-16', '2:4+int8', 'sparse+kmeans-16'])}"
    )


def encode(weight: np.ndarray, how: str | Scheme, axis: int | None = 0) -> Encoded:
    """`weight` (finite float32, at least one axis) in a codec.

    axis: that has scales of its own where the codec has any (0: output channels of Conv), None = one for the tensor;
    a vector has one. Raises: UsageError for names, and for weights that N:M cannot hold.
    """
    how = scheme(how) if isinstance(how, str) else how
    assert weight.dtype == np.float32 and weight.size and np.isfinite(weight).all()
    axis = axis if how.codec in codecs.SCALED and weight.ndim > 1 else None
    if how.codec in codecs.MASKS:
        assert how.values is not None
        kept, data = (_places if how.codec == "nm" else _kept)(weight, how.settings)
        inner = encode(kept, how.values, None) if kept.size else codecs.NOTHING
        return Encoded(how.codec, weight.shape, data, None, how.settings, inner)
    rows = (
        weight.reshape(1, -1)
        if axis is None
        else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    )
    settings, data = _ENCODERS[how.codec](np.ascontiguousarray(rows), dict(how.settings))
    return Encoded(how.codec, weight.shape, data, axis, settings)


def quantized(weight: np.ndarray, how: str | Scheme, axis: int | None = 0) -> np.ndarray:
    """What `weight` becomes in a codec: float32 of its shape."""
    return codecs.decode(encode(weight, how, axis))


def error(weight: np.ndarray, found: np.ndarray) -> float:
    """Relative L2 error."""
    size = float(np.linalg.norm(weight))
    return float(np.linalg.norm(weight.astype(np.float64) - found)) / size if size else 0.0


# --- masks ---------------------------------------------------------------------------------------


def _places(weight: np.ndarray, settings: dict[str, int]) -> tuple[np.ndarray, bytes]:
    """The n largest of each m along axis `along`; of equal ones the lower index."""
    n, m, along = settings["n"], settings["m"], settings["along"]
    if along >= weight.ndim or weight.shape[along] % m:
        raise UsageError(f"{n}:{m}: axis {along} of weights {list(weight.shape)} is no multiple of {m}")
    groups = np.moveaxis(weight, along, -1).reshape(-1, m)
    places = np.sort(np.argsort(-np.abs(groups), axis=1, kind="stable")[:, :n], axis=1)
    kept = np.take_along_axis(groups, places, axis=1)
    return np.ascontiguousarray(kept).reshape(-1), pack(places, index_bits(m))


def _kept(weight: np.ndarray, settings: dict[str, int]) -> tuple[np.ndarray, bytes]:
    """What lies in blocks that are not zero throughout."""
    rows, columns = settings["rows"], settings["columns"]
    down, across, places = codecs.blocks(weight.shape, rows, columns)
    grid = np.zeros((down * rows, across * columns, places), bool)
    wide = weight.shape[1] if weight.ndim > 1 else 1
    grid[: weight.shape[0], :wide] = (weight != 0).reshape(weight.shape[0], wide, places)
    kept = np.asarray(grid.reshape(down, rows, across, columns, places).any(axis=(1, 3)))
    return weight[codecs.spread(kept, weight.shape, rows, columns)], pack(kept, 1)


# --- codecs: rows [G, R] and settings -> settings and data ---------------------------------------


def _f4(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, "<f4").tobytes()


def _float32(rows: np.ndarray, settings: dict[str, int]) -> tuple[dict[str, int], bytes]:
    return settings, _f4(rows)


def _float16(rows: np.ndarray, settings: dict[str, int]) -> tuple[dict[str, int], bytes]:
    if float(np.abs(rows).max()) > float(np.finfo(np.float16).max):
        raise UsageError("float16: a weight is above 65504. Store it as float32")
    return settings, rows.astype("<f2").tobytes()


def _int(rows: np.ndarray, settings: dict[str, int]) -> tuple[dict[str, int], bytes]:
    """Symmetric: scale = max |w| / (2^(bits-1) - 1)."""
    bits = settings["bits"]
    most = np.float32((1 << (bits - 1)) - 1)
    scales = _positive(np.abs(rows).max(axis=1) / most)
    for near in (scales, np.nextafter(scales, np.float32(0)), np.nextafter(scales, np.float32(np.inf))):
        exact = (np.rint(rows / near[:, None]) * near[:, None] == rows).all(
            axis=1
        )  # division may be off by one bit
        scales = np.where(exact, near, scales)
    codes = np.clip(np.rint(rows / scales[:, None]), -most, most).astype(np.int16)
    return settings, _f4(scales) + pack(codes & ((1 << bits) - 1), bits)


def _positive(scales: np.ndarray) -> np.ndarray:
    """float32, 1 where there is nothing to scale."""
    found = scales.astype(np.float32)
    return np.where(found > 0, found, np.float32(1))


def _binary(rows: np.ndarray, settings: dict[str, int]) -> tuple[dict[str, int], bytes]:
    """mean |w| times the sign, +1 for 0 (Rastegari et al. 2016, eq. 6)."""
    return settings, _f4(_mean(np.abs(rows), np.ones(rows.shape, bool))) + pack(rows < 0, 1)


def _mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Per row, float32, the mean of those `where`; exact where all are the same; 0 where there are none."""
    total = np.where(where, values, 0).sum(axis=1, dtype=np.float64)
    found = (total / np.maximum(where.sum(axis=1), 1)).astype(np.float32)
    least, most = np.where(where, values, np.inf).min(axis=1), np.where(where, values, 0).max(axis=1)
    return np.asarray(np.where(least == most, most, found), np.float32)


def ternary_threshold(rows: np.ndarray, signs: int) -> np.ndarray:
    """Per row: |w| above it is kept."""
    size = np.abs(rows).astype(np.float64)
    return np.asarray(TWN_THRESHOLD * size.mean(axis=1) if signs == 1 else TTQ_THRESHOLD * size.max(axis=1))


def _ternary(rows: np.ndarray, settings: dict[str, int]) -> tuple[dict[str, int], bytes]:
    kept = np.abs(rows) > ternary_threshold(rows, settings["signs"])[:, None]
    if settings["signs"] == 1:
        scales = _mean(np.abs(rows), kept)[:, None]
    else:
        sides = [_mean(np.abs(rows), kept & side) for side in (rows > 0, rows < 0)]
        scales = np.stack(sides, axis=1)
    # a threshold may cut off what is on the set already: two values in a row, one much smaller
    codes = np.where(kept, np.where(rows < 0, 2, 1), 0)
    whole = [_same(rows, side) for side in ((rows != 0,) if settings["signs"] == 1 else (rows > 0, rows < 0))]
    exact = np.all([ok for ok, _ in whole], axis=0)
    scales = np.where(exact[:, None], np.stack([value for _, value in whole], axis=1), scales)
    codes = np.where(exact[:, None], np.where(rows < 0, 2, np.where(rows > 0, 1, 0)), codes)
    return settings, _f4(scales) + pack(codes, 2)


def _same(rows: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row whether |w| is one value `where`, and the value (0 where there is none)."""
    size = np.abs(rows)
    most = np.where(where, size, 0).max(axis=1)
    return ((size == most[:, None]) | ~where).all(axis=1), most.astype(np.float32)


def _abc(rows: np.ndarray, settings: dict[str, int]) -> tuple[dict[str, int], bytes]:
    """Signs of w - mean + u * std with u from -1 to 1, scales by least squares (Lin et al. 2017, eq. 2 to 4)."""
    bases = settings["bases"]
    wide = rows.astype(np.float64)
    shifts = np.linspace(-1, 1, bases) if bases > 1 else np.zeros(1)
    centred, spread = wide - wide.mean(axis=1, keepdims=True), wide.std(axis=1, keepdims=True)
    negative = np.stack([centred + u * spread < 0 for u in shifts])  # [M, G, R]
    scales = np.empty((len(rows), bases), np.float32)
    for g, row in enumerate(wide):
        scales[g] = np.linalg.lstsq(np.where(negative[:, g], -1.0, 1.0).T, row, rcond=None)[0]
    return settings, _f4(scales) + b"".join(pack(plane, 1) for plane in negative)


def kmeans(values: np.ndarray, levels: int, centroids: np.ndarray | None = None) -> np.ndarray:
    """float32 [levels], ascending: centroids of `values` by Lloyd's rounds, from a grid over their range (Deep
    Compression's linear start) or from `centroids`. A centroid that loses its members stays where it is."""
    flat = np.sort(values.reshape(-1).astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    centres = (
        np.linspace(flat[0], flat[-1], levels) if centroids is None else np.sort(centroids.astype(np.float64))
    )
    for _ in range(KMEANS_ROUNDS):
        cuts = np.concatenate([[0], np.searchsorted(flat, (centres[1:] + centres[:-1]) / 2), [len(flat)]])
        count = np.diff(cuts)
        found = np.where(count > 0, np.diff(sums[cuts]) / np.maximum(count, 1), centres)
        if np.array_equal(found, centres):
            break
        centres = np.sort(found)
    return centres.astype(np.float32)


def nearest(values: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Index of the nearest entry of an ascending codebook, the upper one of two."""
    wide = book.astype(np.float64)
    cuts = (wide[1:] + wide[:-1]) / 2
    return np.asarray(np.searchsorted(cuts, values.astype(np.float64), side="right"))


def codebook(values: np.ndarray, levels: int) -> np.ndarray:
    """float32 [levels], ascending: the values where there are few enough, else centroids; exact zeros keep one."""
    distinct = np.unique(values)
    if len(distinct) <= levels:
        return np.concatenate([distinct, np.full(levels - len(distinct), distinct[-1], np.float32)])
    if levels > 2 and float((values == 0).mean()) >= PINNED_ZEROS:
        return np.sort(np.append(kmeans(values[values != 0], levels - 1), np.float32(0)))
    return kmeans(values, levels)


def _kmeans(rows: np.ndarray, settings: dict[str, int]) -> tuple[dict[str, int], bytes]:
    levels = settings["levels"]
    book = codebook(rows, levels)
    return settings, _f4(book) + pack(_exact_or_nearest(rows, book), index_bits(levels))


def _exact_or_nearest(rows: np.ndarray, book: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(book, rows), len(book) - 1)
    return np.where(book[at] == rows, at, nearest(rows, book))


def _pow2(rows: np.ndarray, settings: dict[str, int]) -> tuple[dict[str, int], bytes]:
    """sign * scale * 2^round(log2(|w| / scale)), scale = max |w| (DeepShift-Q; fold scales first). Exact zeros, which
    a mask has made, take the last shift."""
    bits = settings["bits"]
    zero = int((rows == 0).any())
    most = (1 << (bits - 1)) - 1 - zero
    scales = _positive(np.abs(rows).max(axis=1))
    with np.errstate(divide="ignore"):
        shifts = np.clip(np.rint(-np.log2(np.abs(rows).astype(np.float64) / scales[:, None])), 0, most)
    shifts = np.where(rows == 0, most + 1, shifts) if zero else shifts
    codes = shifts.astype(np.int64) | ((rows < 0).astype(np.int64) << (bits - 1))
    return {**settings, "zero": zero}, _f4(scales) + pack(codes, bits)


_ENCODERS = {
    "float32": _float32, "float16": _float16, "int": _int, "binary": _binary, "ternary": _ternary,
    "abc": _abc, "kmeans": _kmeans, "pow2": _pow2,
}  # fmt: skip
