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
from onnx import TensorProto, helper

from edgekit.errors import ModelError
from edgekit.schema import printable

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
    TensorProto.BFLOAT16: 16, TensorProto.STRING: 0,  # never raw
}  # fmt: skip


def one_line(error: object, limit: int = 240) -> str:
    """The text of `error` on one line, shortened."""
    text = " ".join(str(error).split())
    return printable(text, limit)


def shown(name: str) -> str:
    """A name or path out of the file, quoted for a message: names may be enormous or unprintable."""
    return f"'{printable(name)}'"


def named(path: Path) -> str:
    """What a message about the file `path` begins with."""
    return f"model {printable(str(path), 200)}"


def read(path: Path) -> onnx.ModelProto:
    """Parse the file and load its external data. Raises: ModelError."""
    where = named(path)
    data = _read_bytes(path)
    for magic, what, hint in _FOREIGN:
        if data.startswith(magic):
            raise ModelError(f"{where}: not an ONNX file, it is {what}. {hint}.")
    if data[4:8] == b"TFL3":
        raise ModelError(f"{where}: not an ONNX file, it is a TFLite model. Export the original to ONNX.")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ModelError(
            f"{where}: not an ONNX file, or cut short ({len(data)} bytes do not parse). "
            "Export or download it again."
        ) from None
    if not _is_text_clean(model):
        raise ModelError(f"{where}: damaged, a name in it is not UTF-8. Export or download it again.")
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"{where}: not an ONNX model, no graph with operators in it. Export it again.")
    if not 1 <= model.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"{where}: ONNX format version {model.ir_version} is not known, expected 1 to "
            f"{onnx.IR_VERSION}. Update the onnx package, or export the model again."
        )
    budget = MAX_BYTES
    for tensor in tensors(model.graph):
        weight = f"{where}: weight {shown(tensor.name)}"
        if tensor.data_location == TensorProto.EXTERNAL:
            budget -= _load_external(tensor, path, weight, budget)
        _check_size(tensor, weight)
    return model


def _read_bytes(path: Path) -> bytes:
    where = named(path)
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise ModelError(f"{where}: is a folder, expected an ONNX file. Name the file in it.")
        if not stat.S_ISREG(info.st_mode):  # reading a pipe or a device could block for ever
            raise ModelError(f"{where}: not a regular file, expected an ONNX file.")
        if info.st_size > MAX_BYTES:
            raise ModelError(
                f"{where}: too big, expected at most {MAX_BYTES} bytes, got {info.st_size}. "
                "Give the inference network without optimizer state."
            )
        if info.st_size == 0:
            raise ModelError(f"{where}: the file is empty. Export or download it again.")
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{where}: no such file. Check the path.") from None
    except OSError as error:
        raise ModelError(f"{where}: cannot be read: {error.strerror}. Check the path.") from None
    except ValueError as error:  # a NUL in the path
        raise ModelError(f"{where}: cannot be read: {one_line(error)}. Check the path.") from None


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
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        kinds = TensorProto.DataType
        known = tensor.data_type in kinds.values()
        kind = kinds.Name(tensor.data_type) if known else str(tensor.data_type)
        raise ModelError(f"{where}: element type {kind} is not supported, expected float or integer data.")
    if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
        want, got, unit = elements * bits // 8, len(tensor.raw_data), "bytes"
    else:  # each type has one field of its own; values in another one are not read
        got = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type)))
        want, unit = elements, "values"
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
            f"{where}: external data at {shown(location)}, expected a file beside the model. "
            "Save the model with its data in one folder."
        )
    folder = path.parent.resolve()
    file = folder.joinpath(*parts)
    try:
        if not file.resolve().is_relative_to(folder):
            raise ModelError(f"{where}: external data {shown(location)} leads out of the model's folder.")
        if not file.is_file():
            raise ModelError(
                f"{where}: external data file {shown(location)} is missing. Copy it beside the model file."
            )
        offset = int(entries.get("offset") or 0)
        bits = _BITS.get(tensor.data_type, 0)
        length = int(entries.get("length") or _elements(tensor, where) * bits // 8)
        size = file.stat().st_size
        if offset < 0 or length < 0 or offset + length > size:
            raise ModelError(
                f"{where}: external data {shown(location)} is cut short, expected "
                f"{printable(str(offset + length))} bytes, got {size}."
            )
        if length > budget:
            raise ModelError(f"{where}: external data exceed {MAX_BYTES} bytes in all.")
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
    except OSError as error:
        raise ModelError(
            f"{where}: external data {shown(location)} cannot be read: {error.strerror}."
        ) from None
    except ValueError as error:  # an offset or length that is no number
        raise ModelError(
            f"{where}: external data {shown(location)} cannot be read: {one_line(error)}."
        ) from None
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]
    return length
