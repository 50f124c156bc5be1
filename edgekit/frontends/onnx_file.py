"""Reading an ONNX file from disk as untrusted input: bounded, no path outside the model's folder.

Format: onnx.proto3 (https://onnx.ai/onnx/repo-docs/IR.html), external data as in
https://onnx.ai/onnx/repo-docs/ExternalData.html.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped,unused-ignore]
from onnx import TensorProto

from edgekit.errors import ModelError

MAX_BYTES = 2**31 - 1
"""Protobuf's own limit; larger networks do not fit the devices either."""

MAX_RANK = 16

_FOREIGN = (
    (b"PK\x03\x04", "a zip archive (a torch checkpoint?)", "Export it with torch.onnx.export"),
    (b"\xff\xd8\xff", "a JPEG picture", "Give the model first, pictures with --source"),
    (b"\x89PNG", "a PNG picture", "Give the model first, pictures with --source"),
    (b"version https://git-lfs", "a Git LFS pointer", "Run: git lfs pull"),
    (b"ftrt", "a TensorRT engine", "Give the ONNX file that it was built from"),
    (b"ptrt", "a TensorRT engine", "Give the ONNX file that it was built from"),
    (b"\x89HDF", "an HDF5 (Keras) file", "Export it with tf2onnx"),
    (b"\x80\x02", "a Python pickle", "Export the network with torch.onnx.export"),
    (b"7767517", "an ncnn param file", "Give the ONNX file that it was made from"),
    (b"<", "a text (HTML or XML) file", "Download the file itself, not its web page"),
)

# bits per element of what TensorProto may hold as raw bytes
_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.UINT8: 8, TensorProto.INT8: 8, TensorProto.UINT16: 16,
    TensorProto.INT16: 16, TensorProto.INT32: 32, TensorProto.INT64: 64, TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16, TensorProto.DOUBLE: 64, TensorProto.UINT32: 32, TensorProto.UINT64: 64,
    TensorProto.BFLOAT16: 16,
}  # fmt: skip


def one_line(error: object, limit: int = 240) -> str:
    """The text of `error` on one line, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read(path: Path) -> onnx.ModelProto:
    """Parse the file and load its external data. Raises: ModelError."""
    data = _read_bytes(path)
    for magic, what, hint in _FOREIGN:
        if data.startswith(magic):
            raise ModelError(f"model {path}: not an ONNX file, it is {what}. {hint}.")
    if data[4:8] == b"TFL3":
        raise ModelError(
            f"model {path}: not an ONNX file, it is a TFLite model. Export the original to ONNX."
        )
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ModelError(
            f"model {path}: not an ONNX file, or cut short ({len(data)} bytes do not parse). "
            "Export or download it again."
        ) from None
    if not _is_text_clean(model):
        raise ModelError(f"model {path}: damaged, a name in it is not UTF-8. Export or download it again.")
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"model {path}: not an ONNX model, no graph with operators in it. Export it again.")
    budget = MAX_BYTES
    for tensor in tensors(model.graph):
        where = f"model {path}: weight {tensor.name!r}"
        if tensor.data_location == TensorProto.EXTERNAL:
            budget -= _load_external(tensor, path, where, budget)
        _check_size(tensor, where)
    return model


def _read_bytes(path: Path) -> bytes:
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise ModelError(f"model {path}: is a folder, expected an ONNX file. Name the file in it.")
        if not stat.S_ISREG(info.st_mode):  # reading a pipe or a device could block for ever
            raise ModelError(f"model {path}: not a regular file, expected an ONNX file.")
        if info.st_size > MAX_BYTES:
            raise ModelError(
                f"model {path}: too big, expected at most {MAX_BYTES} bytes, got {info.st_size}. "
                "Give the inference network without optimizer state."
            )
        if info.st_size == 0:
            raise ModelError(f"model {path}: the file is empty. Export or download it again.")
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"model {path}: no such file. Check the path.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path}: cannot be read: {one_line(error)}. Check the path.") from None


def _is_text_clean(message: Message) -> bool:
    """Protobuf hands out strings that are no UTF-8 as bytes, which nothing after this expects."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        for item in (value,) if isinstance(value, (str, bytes, Message)) else value:
            if isinstance(item, bytes) or (isinstance(item, Message) and not _is_text_clean(item)):
                return False
    return True


def tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every tensor stored in `graph`: initialisers and attributes, subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from tensors(attribute.g)
            for subgraph in attribute.graphs:
                yield from tensors(subgraph)


def _elements(tensor: TensorProto, where: str) -> int:
    if len(tensor.dims) > MAX_RANK or any(d < 0 for d in tensor.dims):
        raise ModelError(f"{where}: bad shape {list(tensor.dims)[:MAX_RANK]}. Export the model again.")
    return math.prod(tensor.dims)


def _check_size(tensor: TensorProto, where: str) -> None:
    """The bytes present must be what type and shape ask for (later code trusts them)."""
    elements = _elements(tensor, where)
    if tensor.data_type == TensorProto.STRING:
        return
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        kinds = TensorProto.DataType
        known = tensor.data_type in kinds.values()
        kind = kinds.Name(tensor.data_type) if known else str(tensor.data_type)
        raise ModelError(f"{where}: element type {kind} is not supported, expected float or integer data.")
    if tensor.HasField("raw_data"):
        want, got, unit = elements * bits // 8, len(tensor.raw_data), "bytes"
    else:
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data)
        want, got, unit = elements, sum(map(len, (*fields, tensor.uint64_data))), "values"
    if want != got:
        raise ModelError(
            f"{where}: damaged, shape {list(tensor.dims)} needs {want} {unit}, got {got}. "
            "Export or download the model again."
        )


def _load_external(tensor: TensorProto, path: Path, where: str, budget: int) -> int:
    """Move the tensor's bytes from its side file into the message; the number of bytes read."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = PurePosixPath(location.replace("\\", "/")).parts
    if (
        not location
        or location.startswith(("/", "\\"))
        or ".." in parts
        or ":" in location
        or "\0" in location
    ):
        raise ModelError(
            f"{where}: external data at {location!r}, expected a file beside the model. "
            "Save the model with its data in one folder."
        )
    folder = path.parent.resolve()
    file = folder.joinpath(*parts)
    try:
        if not file.resolve().is_relative_to(folder):
            raise ModelError(f"{where}: external data {location!r} leads out of the model's folder.")
        if not file.is_file():
            raise ModelError(
                f"{where}: external data file {location!r} is missing. Copy it beside the model file."
            )
        offset = int(entries.get("offset") or 0)
        bits = _BITS.get(tensor.data_type, 0)
        length = int(entries.get("length") or _elements(tensor, where) * bits // 8)
        size = file.stat().st_size
        if offset < 0 or length < 0 or offset + length > size:
            raise ModelError(
                f"{where}: external data {location!r} is cut short, expected {offset + length} bytes, "
                f"got {size}."
            )
        if length > budget:
            raise ModelError(f"{where}: external data exceed {MAX_BYTES} bytes in all.")
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: external data {location!r} cannot be read: {one_line(error)}.") from None
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
    return length
