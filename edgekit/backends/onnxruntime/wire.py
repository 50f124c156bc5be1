"""Weights of an ONNX file where they lie: reads and lays out the protobuf bytes without the onnx package.

A protobuf message is a run of (tag, value) fields; only length-delimited fields matter here
(protobuf encoding guide, wire type 2). Field numbers are those of onnx.proto (ModelProto.graph 7,
GraphProto.initializer 5, TensorProto.dims 1, .data_type 2, .name 8, .raw_data 9, .doc_string 12,
.external_data 13, .data_location 14).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgekit.errors import BundleError

MODEL_GRAPH, GRAPH_INITIALIZER = 7, 5
DIMS, DATA_TYPE, NAME, RAW_DATA, DOC_STRING, EXTERNAL_DATA, DATA_LOCATION = 1, 2, 8, 9, 12, 13, 14

# TensorProto.DataType -> numpy; other types stay inside the graph
_DTYPES: dict[int, np.dtype] = {1: np.dtype("<f4"), 3: np.dtype("i1"), 2: np.dtype("u1"), 10: np.dtype("<f2")}

SMALL = 1024
"""Tensors below this many bytes stay in the graph: optimisers look at them and they cost nothing."""


@dataclass(frozen=True)
class Field:
    number: int
    start: int
    """Of the tag."""
    value: int
    """Of the value: the number itself for varints, else the offset of the first byte."""
    end: int
    wire: int


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise BundleError("payload: not a valid ONNX file (broken varint). Build the bundle again")


def fields(data: memoryview, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in data[start:end]. Raises: BundleError when the bytes are no message."""
    at = start
    while at < end:
        tag, value = _read_varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            number_value, stop = _read_varint(data, value, end)
            yield Field(number, at, number_value, stop, wire)
        else:
            if wire == 2:
                length, value = _read_varint(data, value, end)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise BundleError(
                    f"payload: not a valid ONNX file (wire type {wire}). Build the bundle again"
                )
            stop = value + length
            if stop > end:
                raise BundleError("payload: not a valid ONNX file (cut off). Build the bundle again")
            yield Field(number, at, value, stop, wire)
        at = stop


def delimited(number: int, body: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(body)) + body


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    raw: tuple[int, int] | None
    """Start and end of raw_data."""


def _tensor(data: memoryview, start: int, end: int) -> _Tensor:
    dims: list[int] = []
    name, kind, raw = "", 0, None
    for f in fields(data, start, end):
        if f.number == DIMS and f.wire == 0:
            dims.append(f.value)
        elif f.number == DIMS:
            at = f.value
            while at < f.end:
                dim, at = _read_varint(data, at, f.end)
                dims.append(dim)
        elif f.number == DATA_TYPE:
            kind = f.value
        elif f.number == NAME:
            name = bytes(data[f.value : f.end]).decode("utf-8", "replace")
        elif f.number == RAW_DATA:
            raw = (f.value, f.end)
    return _Tensor(name, tuple(dims), _DTYPES.get(kind), raw)


def detach_weights(data: memoryview) -> tuple[bytes, dict[str, np.ndarray]]:
    """Split an ONNX file into its graph and views of its weights.

    Returns: the model without the raw data of its larger initialisers (they are marked as
    external), and those initialisers as read-only arrays over `data` itself, by name.
    Raises: BundleError for bytes that are no ONNX model.
    """
    model = bytearray()
    weights: dict[str, np.ndarray] = {}
    for f in fields(data, 0, len(data)):
        if f.number != MODEL_GRAPH or f.wire != 2:
            model += data[f.start : f.end]
            continue
        graph = bytearray()
        for g in fields(data, f.value, f.end):
            tensor = _tensor(data, g.value, g.end) if g.number == GRAPH_INITIALIZER else None
            if tensor is None or tensor.raw is None or tensor.dtype is None or not tensor.shape:
                graph += data[g.start : g.end]
                continue
            size = tensor.raw[1] - tensor.raw[0]
            if size < SMALL or size != int(np.prod(tensor.shape)) * tensor.dtype.itemsize:
                graph += data[g.start : g.end]
                continue
            array = np.frombuffer(data[tensor.raw[0] : tensor.raw[1]], tensor.dtype).reshape(tensor.shape)
            weights[tensor.name] = array
            body = bytearray()
            for t in fields(data, g.value, g.end):
                if t.number not in (RAW_DATA, DOC_STRING):
                    body += data[t.start : t.end]
            entry = delimited(1, b"location") + delimited(2, b"bundle")
            body += delimited(EXTERNAL_DATA, entry) + varint(DATA_LOCATION << 3) + varint(1)
            graph += delimited(GRAPH_INITIALIZER, bytes(body))
        model += delimited(MODEL_GRAPH, bytes(graph))
    return bytes(model), weights


def external_weights(data: memoryview) -> list[str]:
    """Names of initialisers whose values lie outside the file. Raises: BundleError for bytes that are no ONNX model."""
    names = []
    for f in fields(data, 0, len(data)):
        for g in fields(data, f.value, f.end) if f.number == MODEL_GRAPH and f.wire == 2 else ():
            if g.number != GRAPH_INITIALIZER or g.wire != 2:
                continue
            tensor = list(fields(data, g.value, g.end))
            if any(t.number == EXTERNAL_DATA or (t.number == DATA_LOCATION and t.value) for t in tensor):
                names.append(_tensor(data, g.value, g.end).name)
    return names


def align_weights(data: bytes, alignment: int = 16) -> bytes:
    """The same ONNX model with every larger raw_data at a file offset divisible by `alignment`.

    The padding is a doc_string of spaces in front of the raw data, so any ONNX reader takes the
    file; mapped from an aligned bundle entry, the weights are then aligned in memory.
    """
    view = memoryview(data)
    top = list(fields(view, 0, len(view)))
    graphs = [f for f in top if f.number == MODEL_GRAPH and f.wire == 2]
    assert len(graphs) == 1, "an ONNX model has one graph"
    head = b"".join(data[f.start : f.end] for f in top if f is not graphs[0])
    parts = list(fields(view, graphs[0].value, graphs[0].end))
    length_bytes = len(varint(len(data)))
    while True:
        origin = len(head) + 1 + length_bytes
        graph = bytearray()
        for g in parts:
            if g.number == GRAPH_INITIALIZER:
                graph += _aligned_initializer(view, g, origin + len(graph), alignment)
            else:
                graph += data[g.start : g.end]
        if len(varint(len(graph))) == length_bytes:
            return head + delimited(MODEL_GRAPH, bytes(graph))
        length_bytes = len(varint(len(graph)))


def _aligned_initializer(view: memoryview, field: Field, at: int, alignment: int) -> bytes:
    raw = b""
    body = bytearray()
    for t in fields(view, field.value, field.end):
        if t.number == RAW_DATA:
            raw = bytes(view[t.value : t.end])
        elif t.number != DOC_STRING:
            body += view[t.start : t.end]
    if len(raw) < SMALL:
        return bytes(view[field.start : field.end])
    for pad in range(2 * alignment):
        filler = delimited(DOC_STRING, b" " * pad) if pad else b""
        whole = delimited(GRAPH_INITIALIZER, bytes(body) + filler + delimited(RAW_DATA, raw))
        if (at + len(whole) - len(raw)) % alignment == 0:
            return whole
    raise AssertionError("some padding aligns")
