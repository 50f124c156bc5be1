"""A payload whose weights are stored in few bits: put back together when it is loaded.

    EKPACKED | length of the header, uint32 | header | the payload without those weights | their data, one after the other

The header is JSON: {"tensors": [{"at": offset in the payload, codec, shape, bytes, ...}, ...]} (codecs.Encoded.to_json),
by rising offset. A variant's options say what must come out: "packed": {"bytes": n, "digest": "sha256:<hex>"}. It
does not matter what the payload is, only where in it little-endian float32 weights lie. Numpy only; untrusted input.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit import codecs
from edgekit.codecs import Encoded
from edgekit.errors import BundleError
from edgekit.schema import SchemaError, canonical_json, parse_json

OPTION = "packed"
MAGIC = b"EKPACKED"
MAX_TENSORS, MAX_HEADER, MAX_BYTES = 100_000, 16 << 20, 4 << 30
MAX_GROWTH = 4096
"""Bytes that come out for one that goes in, at most."""
ALIGN = 64
_AGAIN = "Build the bundle again"


def pack(data: bytes, tensors: Sequence[tuple[int, Encoded]]) -> bytes:
    """`data` with the float32 values at each offset stored as what `decode` gives there; by rising offset."""
    entries, literal, blobs, end = [], [], [], 0
    for at, encoded in tensors:
        size = 4 * math.prod(encoded.shape)
        assert at >= end and data[at : at + size] == codecs.decode(encoded).astype("<f4").tobytes()
        entries.append({"at": at, **encoded.to_json()})
        literal.append(data[end:at])
        blobs.append(encoded.blob())
        end = at + size
    header = canonical_json({"tensors": entries}, "header")
    return b"".join([MAGIC, struct.pack("<I", len(header)), header, *literal, data[end:], *blobs])


def facts(data: bytes) -> dict[str, Any]:
    """What a variant's options say of the payload that comes out."""
    return {"bytes": len(data), "digest": "sha256:" + hashlib.sha256(data).hexdigest()}


def payload(data: memoryview, options: Mapping[str, Any]) -> memoryview:
    """The payload of a variant with these options: `data` itself where it is not packed. Aligned to 64 bytes.

    Raises: BundleError for bytes that `pack` does not write, or that are not the ones that were built.
    """
    if OPTION not in options:
        return data
    said = options[OPTION]
    if not isinstance(said, dict) or set(said) != {"bytes", "digest"} or type(said["bytes"]) is not int:
        raise BundleError(f"packed payload: its options are damaged. {_AGAIN}")
    found = _expand(data, said["bytes"])
    if "sha256:" + hashlib.sha256(found).hexdigest() != said["digest"]:
        raise BundleError(f"packed payload: other weights come out than were built. {_AGAIN}")
    return found


def _expand(data: memoryview, size: int) -> memoryview:
    if not 0 < size <= min(MAX_BYTES, MAX_GROWTH * len(data)):
        raise BundleError(f"packed payload: {size} bytes are said to come out of {len(data)}. {_AGAIN}")
    start = len(MAGIC) + 4
    if len(data) < start or data[: len(MAGIC)] != MAGIC:
        raise BundleError(f"packed payload: it does not begin like one. {_AGAIN}")
    (length,) = struct.unpack("<I", data[len(MAGIC) : start])
    if length > min(MAX_HEADER, len(data) - start):
        raise BundleError(f"packed payload: its header is cut off. {_AGAIN}")
    entries = _entries(data[start : start + length])
    sizes = [_sizes(entry) for entry in entries]
    rest = size - sum(values for values, _ in sizes)
    if rest < 0 or start + length + rest + sum(stored for _, stored in sizes) != len(data):
        raise BundleError(f"packed payload: its parts do not add up to its size. {_AGAIN}")
    memory = np.empty(size + ALIGN, np.uint8)
    skip = -memory.ctypes.data % ALIGN
    out = memory[skip : skip + size]
    literal, blob, end = start + length, start + length + rest, 0
    for entry, (values, stored) in zip(entries, sizes, strict=True):
        at = entry["at"]
        if type(at) is not int or not end <= at <= size - values:
            raise BundleError(f"packed payload: a tensor lies outside of it. {_AGAIN}")
        out[end:at] = np.frombuffer(data[literal : literal + at - end], np.uint8)
        literal += at - end
        tree = {key: value for key, value in entry.items() if key != "at"}
        decoded = codecs.decode(codecs.from_json(tree, data[blob : blob + stored]))
        out[at : at + values] = np.ascontiguousarray(decoded, "<f4").reshape(-1).view(np.uint8)
        blob += stored
        end = at + values
    out[end:] = np.frombuffer(data[literal : literal + size - end], np.uint8)
    out.flags.writeable = False
    return out.data


def _entries(header: memoryview) -> list[Any]:
    try:
        tree = parse_json(header, "packed payload", MAX_HEADER)
    except SchemaError as error:
        raise BundleError(f"{error}. {_AGAIN}") from None
    entries = tree.get("tensors") if isinstance(tree, dict) and set(tree) == {"tensors"} else None
    if not isinstance(entries, list) or len(entries) > MAX_TENSORS:
        raise BundleError(f"packed payload: its header has no list of tensors. {_AGAIN}")
    if not all(isinstance(entry, dict) and "at" in entry for entry in entries):
        raise BundleError(f"packed payload: a tensor without a place. {_AGAIN}")
    return entries


def _sizes(entry: Mapping[str, Any]) -> tuple[int, int]:
    """(bytes that come out, bytes that are stored) of a tensor, as it says."""
    shape, inner = entry.get("shape"), entry.get("values")
    stored = [entry.get("bytes"), *([inner.get("bytes")] if isinstance(inner, dict) else [])]
    if not isinstance(shape, list) or not 1 <= len(shape) <= codecs.MAX_RANK:
        raise BundleError(f"packed payload: a tensor without a shape. {_AGAIN}")
    if any(type(n) is not int or not 0 <= n <= MAX_BYTES for n in (*shape, *stored)):
        raise BundleError(f"packed payload: a size that is none. {_AGAIN}")
    return 4 * math.prod(shape), sum(n for n in stored if isinstance(n, int))
