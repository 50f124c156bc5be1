"""Weights in few bits, as a bundle stores them: decoded when it is loaded, to the numbers it was proven with.

    codec     settings        data: scales and codebooks are little-endian float32, codes fill bits from the lowest on
    float32                   the numbers themselves
    float16                   the same in half precision
    int       bits 2..8       scales [G], codes in two's complement: scale * code
    binary                    scales [G], 1 bit: set = -scale, else +scale (XNOR-Net, arXiv 1603.05279)
    ternary   signs 1 | 2     scales [G, signs], 2 bits: 0, 1 = +scale, 2 = -scale, that of its sign (TWN 1605.04711, TTQ 1612.01064)
    abc       bases 1..8      scales [G, bases], a plane of signs per base: sum of +-scales (ABC-Net, 1711.11294)
    kmeans    levels 2..256   codebook [levels], indices (Deep Compression, 1510.00149)
    pow2      bits 2..6, zero scales [G], sign and shift: +-scale * 2^-shift; with zero = 1 the last shift means 0 (DeepShift, 1905.13298)
    nm        n, m, along     places of n weights in each m along an axis, ascending; `values`: these weights in another codec
    sparse    rows, columns   1 bit for rows x columns kernels of [O, I, ...] and a position; `values`: what is kept, in C order

G is 1, or the size of `axis`, which then comes first in the order of codes. Each section begins at a byte.
Data is untrusted: sizes are exact and bounded, whatever else is there is refused, and nothing but numbers comes out.
compression/codecs.py encodes. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.errors import BundleError

MAX_WEIGHTS = 1 << 28
"""Of one tensor: 1 GiB as float32."""
MAX_RANK = 8

# settings of a codec: name -> (least, most)
SETTINGS: dict[str, dict[str, tuple[int, int]]] = {
    "float32": {},
    "float16": {},
    "int": {"bits": (2, 8)},
    "binary": {},
    "ternary": {"signs": (1, 2)},
    "abc": {"bases": (1, 8)},
    "kmeans": {"levels": (2, 256)},
    "pow2": {"bits": (2, 6), "zero": (0, 1)},
    "nm": {"n": (1, 16), "m": (2, 32), "along": (0, MAX_RANK - 1)},
    "sparse": {"rows": (1, 64), "columns": (1, 64)},
}
MASKS = frozenset({"nm", "sparse"})
"""Codecs that say where weights are; what they are, `values` says."""
SCALED = frozenset({"int", "binary", "ternary", "abc", "pow2"})
"""Codecs that may have scales along an axis."""


@dataclass(frozen=True)
class Encoded:
    """A float32 tensor of `shape` in a codec. axis: that has scales of its own, None = one for all."""

    codec: str
    shape: tuple[int, ...]
    data: bytes
    axis: int | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    values: Encoded | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of data, all in all."""
        return len(self.data) + (self.values.nbytes if self.values else 0)

    def to_json(self) -> dict[str, Any]:
        """All but the data, whose size it says."""
        found: dict[str, Any] = {"codec": self.codec, "shape": list(self.shape), "bytes": len(self.data)}
        if self.axis is not None:
            found["axis"] = self.axis
        if self.settings:
            found["settings"] = dict(self.settings)
        if self.values is not None:
            found["values"] = self.values.to_json()
        return found

    def blob(self) -> bytes:
        """The data and that of `values`, one after the other: what `from_json` takes."""
        return self.data + (self.values.blob() if self.values else b"")


def from_json(tree: Any, blob: bytes | memoryview, nested: bool = False) -> Encoded:
    """What `to_json` and `blob` wrote; not yet checked beyond its own shape. Raises: BundleError."""
    known = {"codec", "shape", "bytes", "axis", "settings", "values"}
    if not isinstance(tree, dict) or not {"codec", "shape", "bytes"} <= set(tree) <= known:
        raise BundleError("encoded weights: expected codec, shape and bytes. Build the bundle again")
    codec, shape, size, axis = tree["codec"], tree["shape"], tree["bytes"], tree.get("axis")
    settings, values = tree.get("settings", {}), tree.get("values")
    whole = [size, *(shape if isinstance(shape, list) else [None]), *([] if axis is None else [axis])]
    whole += settings.values() if isinstance(settings, dict) else [None]
    if not isinstance(codec, str) or any(type(n) is not int or n < 0 for n in whole) or (nested and values):
        raise BundleError("encoded weights: a value of a wrong type. Build the bundle again")
    if size > len(blob) or (values is None and size != len(blob)):
        raise BundleError(f"encoded weights: expected {size} bytes, got {len(blob)}. Build the bundle again")
    inner = None if values is None else from_json(values, blob[size:], nested=True)
    return Encoded(codec, tuple(shape), bytes(blob[:size]), axis, settings, inner)


# --- bits ----------------------------------------------------------------------------------------


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Codes below 2^bits, each from its lowest bit on, one after the other."""
    flat = np.asarray(codes, np.uint8).reshape(-1)
    if bits == 8:
        return flat.tobytes()
    planes = (flat[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little").tobytes()


def unpack(data: bytes | memoryview, count: int, bits: int) -> np.ndarray:
    """uint8 [count] of what `pack` wrote. Raises: BundleError for another size and bits set behind the last code."""
    raw = np.frombuffer(data, np.uint8)
    if len(raw) != packed_size(count, bits):
        raise BundleError(f"encoded weights: expected {packed_size(count, bits)} bytes, got {len(raw)}")
    spare = len(raw) * 8 - count * bits
    if spare and int(raw[-1]) >> (8 - spare):
        raise BundleError("encoded weights: bits behind the last code. Build the bundle again")
    if bits == 8:
        return raw.copy()
    if 8 % bits == 0:
        places = np.arange(0, 8, bits, dtype=np.uint8)
        return ((raw[:, None] >> places) & np.uint8((1 << bits) - 1)).reshape(-1)[:count]
    planes = np.unpackbits(raw, count=count * bits, bitorder="little").reshape(count, bits)
    return np.asarray((planes << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8))


# --- decoding ------------------------------------------------------------------------------------


def index_bits(levels: int) -> int:
    """Bits of an index below `levels`."""
    return max(1, (levels - 1).bit_length())


def blocks(shape: tuple[int, ...], rows: int, columns: int) -> tuple[int, int, int]:
    """Blocks along O and I, and positions, of a tensor [O, I, ...] in blocks of rows x columns kernels. A tensor of
    one axis has I = 1."""
    across = shape[1] if len(shape) > 1 else 1
    return -(-shape[0] // rows), -(-across // columns), math.prod(shape[2:])


def spread(kept: np.ndarray, shape: tuple[int, ...], rows: int, columns: int) -> np.ndarray:
    """bool mask of `shape` from one bool per block and position."""
    grid = kept.reshape(blocks(shape, rows, columns)).repeat(rows, 0).repeat(columns, 1)
    return np.asarray(grid[: shape[0], : shape[1] if len(shape) > 1 else 1]).reshape(shape)


def decode(encoded: Encoded) -> np.ndarray:
    """float32 of `shape`: the same bits everywhere. Raises: BundleError for data that `encode` does not write."""
    _check(encoded)
    with np.errstate(over="ignore", invalid="ignore"):
        found = _DECODERS[encoded.codec](encoded)
    if not np.isfinite(found).all():
        raise BundleError("encoded weights: a weight that is no number. Build the bundle again")
    return found


def _check(e: Encoded) -> None:
    known = SETTINGS.get(e.codec)
    if known is None:
        raise BundleError(
            f"encoded weights: codec {e.codec[:40]!r} is unknown, expected one of {', '.join(SETTINGS)}. "
            "Upgrade edgekit"
        )
    if not 1 <= len(e.shape) <= MAX_RANK or min(e.shape) < 1 or math.prod(e.shape) > MAX_WEIGHTS:
        raise BundleError(
            f"encoded weights: expected 1 to {MAX_WEIGHTS} of them, got shape {list(e.shape)[:9]}"
        )
    if set(e.settings) != set(known):
        raise BundleError(f"encoded weights: expected settings {sorted(known)} of {e.codec}")
    for name, (least, most) in known.items():
        if not least <= e.settings[name] <= most:
            raise BundleError(f"encoded weights: {e.codec} {name}: expected {least} to {most}")
    if e.axis is not None and (e.codec not in SCALED or not 0 <= e.axis < len(e.shape)):
        raise BundleError(f"encoded weights: {e.codec} of {len(e.shape)} axes has no scales along {e.axis}")
    inner = e.values
    if (e.codec in MASKS) != (inner is not None) or (inner is not None and inner.codec in MASKS):
        raise BundleError(
            f"encoded weights: {e.codec}: values are expected of nm and sparse, and of these only"
        )


def _split(e: Encoded, scales: int, count: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The leading scales, checked, and the codes behind them."""
    start = 4 * scales
    expected = start + packed_size(count, bits)
    if len(e.data) != expected:
        raise BundleError(f"encoded weights: {e.codec}: expected {expected} bytes, got {len(e.data)}")
    return np.frombuffer(e.data, "<f4", scales).astype(np.float32), unpack(e.data[start:], count, bits)


def _order(e: Encoded) -> tuple[int, ...]:
    """The shape in the order of codes: [axis, rest...]."""
    shape = list(e.shape)
    return (shape.pop(e.axis), *shape) if e.axis is not None else (1, *shape)


def _placed(e: Encoded, found: np.ndarray) -> np.ndarray:
    """[G, rest] as `shape`."""
    ordered = found.astype(np.float32, copy=False).reshape(_order(e))
    return np.ascontiguousarray(ordered[0] if e.axis is None else np.moveaxis(ordered, 0, e.axis))


def _groups(e: Encoded) -> int:
    return 1 if e.axis is None else e.shape[e.axis]


def _floats(kind: str) -> Callable[[Encoded], np.ndarray]:
    def run(e: Encoded) -> np.ndarray:
        expected = math.prod(e.shape) * np.dtype(kind).itemsize
        if len(e.data) != expected:
            raise BundleError(f"encoded weights: {e.codec}: expected {expected} bytes, got {len(e.data)}")
        return np.frombuffer(e.data, kind).reshape(e.shape).astype(np.float32)

    return run


def _int(e: Encoded) -> np.ndarray:
    bits, groups = e.settings["bits"], _groups(e)
    scales, codes = _split(e, groups, math.prod(e.shape), bits)
    half = 1 << (bits - 1)
    if (codes == half).any():
        raise BundleError(f"encoded weights: int codes from {1 - half} are expected, got {-half}")
    signed = codes.astype(np.int16)
    signed[codes > half] -= 2 * half
    return _placed(e, signed.reshape(groups, -1).astype(np.float32) * scales[:, None])


def _binary(e: Encoded) -> np.ndarray:
    groups = _groups(e)
    scales, codes = _split(e, groups, math.prod(e.shape), 1)
    return _placed(e, np.where(codes.reshape(groups, -1) == 1, -scales[:, None], scales[:, None]))


def _ternary(e: Encoded) -> np.ndarray:
    groups, signs = _groups(e), e.settings["signs"]
    scales, codes = _split(e, groups * signs, math.prod(e.shape), 2)
    if (codes == 3).any():
        raise BundleError("encoded weights: ternary codes 0, 1 and 2 are expected, got 3")
    pairs = scales.reshape(groups, signs)
    table = np.stack([np.zeros(groups, np.float32), pairs[:, 0], -pairs[:, -1]], axis=1)
    return _placed(e, np.take_along_axis(table, codes.reshape(groups, -1).astype(np.intp), axis=1))


def _abc(e: Encoded) -> np.ndarray:
    groups, bases, count = _groups(e), e.settings["bases"], math.prod(e.shape)
    plane, start = packed_size(count, 1), 4 * groups * bases
    if len(e.data) != start + bases * plane:
        raise BundleError(f"encoded weights: abc: expected {start + bases * plane} bytes, got {len(e.data)}")
    scales = np.frombuffer(e.data, "<f4", groups * bases).reshape(groups, bases).astype(np.float32)
    total = np.zeros((groups, count // groups), np.float32)
    for i in range(bases):
        begin = start + i * plane
        codes = unpack(e.data[begin : begin + plane], count, 1).reshape(groups, -1)
        total += np.where(codes == 1, -scales[:, i, None], scales[:, i, None])
    return _placed(e, total)


def _kmeans(e: Encoded) -> np.ndarray:
    levels = e.settings["levels"]
    book, codes = _split(e, levels, math.prod(e.shape), index_bits(levels))
    if int(codes.max()) >= levels:
        raise BundleError(f"encoded weights: kmeans indices below {levels} are expected, got {codes.max()}")
    return _placed(e, book[codes])


def _pow2(e: Encoded) -> np.ndarray:
    groups, bits, zero = _groups(e), e.settings["bits"], e.settings["zero"]
    scales, codes = _split(e, groups, math.prod(e.shape), bits)
    last = (1 << (bits - 1)) - 1
    shifts, negative = codes & np.uint8(last), codes >> np.uint8(bits - 1)
    factor = np.ldexp(np.float32(1), -shifts.astype(np.int32))
    if zero:
        if ((shifts == last) & (negative == 1)).any():
            raise BundleError("encoded weights: pow2: a zero has no sign. Build the bundle again")
        factor = np.where(shifts == last, np.float32(0), factor)
    signed = np.where(negative == 1, -factor, factor).reshape(groups, -1)
    return _placed(e, signed * scales[:, None])


def _inner(e: Encoded, count: int) -> np.ndarray:
    assert e.values is not None
    if math.prod(e.values.shape) != count:
        raise BundleError(
            f"encoded weights: {e.codec}: expected {count} values, got shape {list(e.values.shape)[:9]}"
        )
    return decode(e.values).reshape(-1)


def _nm(e: Encoded) -> np.ndarray:
    n, m, along = (e.settings[name] for name in ("n", "m", "along"))
    if n >= m or along >= len(e.shape) or e.shape[along] % m:
        raise BundleError(f"encoded weights: {n}:{m} does not fit axis {along} of {list(e.shape)[:9]}")
    groups = math.prod(e.shape) // m
    places = unpack(e.data, groups * n, index_bits(m)).reshape(groups, n)
    if int(places.max()) >= m or (np.diff(places.astype(np.int16), axis=1) <= 0).any():
        raise BundleError(f"encoded weights: {n}:{m}: ascending places below {m} are expected")
    found = np.zeros((groups, m), np.float32)
    np.put_along_axis(found, places.astype(np.intp), _inner(e, groups * n).reshape(groups, n), axis=1)
    shape = list(e.shape)
    last = shape.pop(along)
    return np.ascontiguousarray(np.moveaxis(found.reshape(*shape, last), -1, along))


def _sparse(e: Encoded) -> np.ndarray:
    rows, columns = e.settings["rows"], e.settings["columns"]
    kept = unpack(e.data, math.prod(blocks(e.shape, rows, columns)), 1)
    mask = spread(kept == 1, e.shape, rows, columns)
    found = np.zeros(e.shape, np.float32)
    count = int(mask.sum())
    if count:
        found[mask] = _inner(e, count)
    elif e.values != NOTHING:
        raise BundleError("encoded weights: sparse: values without a place. Build the bundle again")
    return found


NOTHING = Encoded("float32", (1,), b"\0\0\0\0")
"""Values of a tensor of zeros."""

_DECODERS: dict[str, Callable[[Encoded], np.ndarray]] = {
    "float32": _floats("<f4"),
    "float16": _floats("<f2"),
    "int": _int,
    "binary": _binary,
    "ternary": _ternary,
    "abc": _abc,
    "kmeans": _kmeans,
    "pow2": _pow2,
    "nm": _nm,
    "sparse": _sparse,
}
