"""A network's picture input: where pipelines place what a camera saw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekit.errors import BundleError, UsageError
from edgekit.kernels.letterbox import LetterboxPlan, letterbox, plan

if TYPE_CHECKING:
    from edgekit.pixels import PixelLayout, Pixels
    from edgekit.spec import QuantParams
    from edgekit.tasks import Runnable
    from edgekit.tasks.preprocess import ImagePreprocess, Placement


class PictureInput:
    """Places pictures in one array of a session's input, one after the other, by the rule of a bundle.

    array: what the kernel writes to, [1, 3, h, w] or [1, h, w, 3] as the rule says: a session's whole input, or
        picture i of an input for several, `images[i : i + 1]`. It is this object's own: nobody else writes there, or
        calls `forget` after it, so the padding of a picture of the same size is still there for the next one.
    quant: the array takes codes of this scale and zero point.
    plan: the kernel's tables for the last picture's layout; not there before the first.

    Raises: BundleError where the rule does not fit the array: one pixel is placed, so that it is found now.
    """

    plan: LetterboxPlan

    def __init__(self, rule: ImagePreprocess, array: np.ndarray, quant: QuantParams | None = None) -> None:
        self.rule = rule
        self.array = array
        self.quant = quant
        self._padded: PixelLayout | None = None
        """Of the pictures whose padding the array holds."""
        try:
            letterbox(np.zeros((1, 1, 3), np.uint8), rule, array, quant=quant)
        except UsageError as error:
            raise unfit(error) from None

    def place(self, pixels: Pixels) -> Placement:
        """Write `pixels`, of any format and size, into the array. Returns where the picture lies in it.

        Raises: UsageError for a size or format that cannot be used.
        """
        layout = pixels.layout
        padded = layout == self._padded
        if not padded:
            self._padded, self.plan = None, plan(self.rule, layout, self.quant)
        placement = self.plan.run(pixels, self.array, padded)
        self._padded = layout  # not after an error: its padding may not be there
        return placement

    def forget(self) -> None:
        """Somebody else wrote to the array: the next picture comes with its padding."""
        self._padded = None


def only_input(session: Runnable, owner: str) -> tuple[np.ndarray, QuantParams | None]:
    """The one input of a session, beside states, and of what scale it takes codes, None for real numbers.
    owner: who has one, for the message. Raises: BundleError."""
    if len(session.inputs) != 1:
        raise BundleError(f"bundle: {owner}, got {len(session.inputs)}")
    ((name, array),) = session.inputs.items()
    return array, getattr(session, "codes", {}).get(name)


def unfit(problem: object) -> BundleError:
    """The error of a bundle whose `pipeline` table is of another network."""
    return BundleError(f"bundle: its pipeline does not fit its network: {problem}")
