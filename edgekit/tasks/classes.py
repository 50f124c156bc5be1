"""Networks that answer with one vector of classes: what pipelines of several tasks do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekit.tasks.picture_input import unfit

if TYPE_CHECKING:
    from edgekit.tasks import Runnable


def check_output(session: Runnable, name: str, classes: int) -> None:
    """Raises: BundleError unless the session has an output `name` of as many values."""
    output = session.outputs.get(name)
    if output is None or output.size != classes:
        got = "nothing" if output is None else f"{output.size}"
        raise unfit(f"expected {classes} values in output {name!r}, got {got}")


def softmax(values: np.ndarray) -> np.ndarray:
    """exp(x - max) / sum of it, float32 [C]."""
    exponents = np.exp(values - values.max())
    result: np.ndarray = exponents / exponents.sum()
    return result


def best(scores: np.ndarray, count: int, least: float) -> np.ndarray:
    """At most `count` classes, int32, best first, of equal scores the lower number first; above 0, `least` leaves
    out those with a lower score."""
    order = np.argsort(-scores, kind="stable")[:count]
    found = order[scores[order] >= least] if least > 0 else order
    result: np.ndarray = found.astype(np.int32)
    return result
