"""What every task asks of a picture."""

from __future__ import annotations

import numpy as np

from edgekit.errors import UsageError


def check_image(image: np.ndarray) -> None:
    """Raises: UsageError unless `image` is uint8 [H, W, 3] with at least one pixel."""
    shape = getattr(image, "shape", None)
    if shape is None or image.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        found = f"{getattr(image, 'dtype', type(image).__name__)} {list(shape) if shape is not None else ''}"
        raise UsageError(f"image: expected uint8 [height, width, 3] in BGR order, got {found.strip()}")
