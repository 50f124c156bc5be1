"""Where decoders find what they read: channels of a plan's outputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekit.errors import BundleError
from edgekit.tasks.detect.spec import Channels


def check_channels(
    outputs: Mapping[str, np.ndarray], place: Channels, count: int, what: str, axes: tuple[str, ...]
) -> tuple[int, ...]:
    """The sizes along `axes` of the tensor at `place`, float32 [1, channels, *axes].

    count: channels from `place.start` on. what: it is, for the message.
    Raises: BundleError when it is missing, of another type or rank, or has too few channels.
    """
    tensor = outputs.get(place.tensor)
    if tensor is None:
        raise BundleError(f"{what}: no output {place.tensor!r}, expected one of {sorted(outputs)}")
    shape = tensor.shape
    if tensor.dtype != np.float32 or len(shape) != 2 + len(axes) or shape[0] != 1:
        raise BundleError(
            f"{what}: output {place.tensor!r}: expected float32 [1, channels, {', '.join(axes)}], "
            f"got {tensor.dtype} {list(shape)}"
        )
    if place.start < 0 or place.start + count > shape[1]:
        raise BundleError(
            f"{what}: output {place.tensor!r}: expected channels {place.start}..{place.start + count - 1}, "
            f"got {shape[1]} channels"
        )
    return shape[2:]
