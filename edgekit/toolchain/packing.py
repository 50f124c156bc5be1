"""Weights stored in few bits (`edgekit build --weights-codec`): the network gets the weights that the codec can hold, is
lowered and proven with them, and its payload is stored with their codes in their place (edgekit/packed.py).

The device decodes them when it loads the bundle and runs as fast as before, in as much memory: what is saved is the
download. A network that was trained on the codec's set (methods/codebook.py) loses nothing here; any other one is
rounded to it, which the accuracy budget judges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import codecs, packed
from edgekit.backends.base import Payload
from edgekit.codecs import Encoded
from edgekit.compression.codecs import Scheme, encode, scheme
from edgekit.errors import UsageError
from edgekit.passes.graph import constant
from edgekit.quant.rules import WEIGHTED, weight, weight_axis

MIN_WEIGHTS = 1024
"""Smaller tensors stay as they are."""
LAYOUTS: dict[int, tuple[tuple[int, ...], ...]] = {
    4: ((0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0)),
    2: ((0, 1), (1, 0)),
}
"""Orders of axes in which libraries' files hold a weight (channels last, depthwise)."""


def check_codec(name: str, precisions: Sequence[str], lanes: int) -> None:
    """Raises: UsageError for a weights codec that there is not, or that does not go with what is to be built."""
    scheme(name)
    others = sorted(set(precisions) - {"float32"})
    if others:
        raise UsageError(
            f"weights codec {name}: for float32 payloads, got {', '.join(others)}. Add --precision float32"
        )
    if lanes > 1:
        raise UsageError(f"weights codec {name}: not for {lanes} lanes. Build without it")


@dataclass(frozen=True)
class Coded:
    """A network whose weights lie on a codec's set. tensors: (weight, axis of its output channels)."""

    model: ir.Model
    how: Scheme
    name: str
    tensors: tuple[tuple[np.ndarray, int], ...]


def coded(model: ir.Model, name: str) -> Coded:
    """A copy of `model` with the weights of its products, but for the first and small ones, as codec `name` has them.

    Raises: UsageError for a codec that there is not, one that does not fit, or a network without such weights.
    """
    how, model = scheme(name), model.clone()
    found: dict[ir.Value, int] = {}
    nodes = [node for node in model.graph if node.op_type in WEIGHTED and weight(node) is not None]
    for node in nodes[1:]:
        value = weight(node)
        data = constant(value)
        if value is not None and data is not None and data.dtype == np.float32 and data.size >= MIN_WEIGHTS:
            found.setdefault(value, weight_axis(node))
    tensors = []
    for value, axis in found.items():
        data = constant(value)
        assert data is not None
        array = codecs.decode(encode(np.ascontiguousarray(data), how, axis))
        value.const_value = ir.tensor(array, name=value.name)
        tensors.append((array, axis))
    if not tensors:
        raise UsageError(
            f"weights codec {name}: no weights of at least {MIN_WEIGHTS} values behind the first layer. "
            "Build without it"
        )
    return Coded(model, how, name, tuple(tensors))


def stored(payload: Payload, made: Coded) -> tuple[Payload, dict[str, Any]]:
    """(the payload as it is stored, what the evidence says of it). The payload was lowered from `made.model`.

    Raises: UsageError where its file holds none of the weights as they are.
    """
    places: list[tuple[int, Encoded]] = []
    missing = 0
    for array, axis in made.tensors:
        place = _place(payload.data, array, axis, made.how, places)
        if place is None:
            missing += 1
        else:
            places.append(place)
    if not places:
        raise UsageError(
            f"weights codec {made.name}: {payload.backend} holds none of these weights as float32. Build without it"
        )
    places.sort(key=lambda place: place[0])
    data = packed.pack(payload.data, places)
    whole = sum(4 * array.size for array, _ in made.tensors)
    record = {
        "codec": made.name, "tensors": len(places), "left_as_they_are": missing, "float32_bytes": whole,
        "stored_bytes": sum(encoded.nbytes for _, encoded in places), "payload_bytes": len(payload.data),
        "packed_bytes": len(data),
    }  # fmt: skip
    options = {**payload.options, packed.OPTION: packed.facts(payload.data)}
    return replace(payload, data=data, options=options), record


def _place(
    data: bytes, array: np.ndarray, axis: int, how: Scheme, taken: Sequence[tuple[int, Encoded]]
) -> tuple[int, Encoded] | None:
    """Where the file holds a weight, in whichever order of axes, and the weight in that order."""
    for order in LAYOUTS.get(array.ndim, (tuple(range(array.ndim)),)):
        turned = np.ascontiguousarray(array.transpose(order))
        raw = turned.astype("<f4").tobytes()
        at = data.find(raw)
        while at >= 0 and any(at < start + _bytes(e) and start < at + len(raw) for start, e in taken):
            at = data.find(raw, at + 1)
        if at < 0:
            continue
        settings = dict(how.settings)
        if "along" in settings:
            settings["along"] = order.index(settings["along"])
        encoded = encode(turned, replace(how, settings=settings), order.index(axis))
        if np.array_equal(codecs.decode(encoded), turned):
            return at, encoded
    return None


def _bytes(encoded: Encoded) -> int:
    """Of the float32 weights."""
    return 4 * math.prod(encoded.shape)
