"""Where pipelines place pictures: each time what the kernel alone would write, in no memory but its own."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import BundleError, UsageError
from edgekit.kernels.letterbox import letterbox
from edgekit.pixels import PixelLayout, Pixels, ReleasedPixels
from edgekit.tasks.picture_input import PictureInput
from edgekit.tasks.preprocess import ImagePreprocess

RULE = ImagePreprocess(32, 24, resize="letterbox-center", color="rgb", std=(255.0, 255.0, 255.0))


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def placed(image: np.ndarray) -> np.ndarray:
    out = np.empty((1, 3, 24, 32), np.float32)
    letterbox(image, RULE, out)
    return out


def test_pictures_of_changing_size_into_one_of_an_input_for_several() -> None:
    images = np.full((4, 3, 24, 32), 7, np.float32)
    slot = PictureInput(RULE, images[2:3])
    for seed, size in enumerate([(40, 20), (40, 20), (10, 80), (40, 20), (24, 32), (10, 80)]):
        where = slot.place(Pixels.bgr(picture(seed, *size)))
        assert np.array_equal(images[2:3], placed(picture(seed, *size)))
        assert (where.left, where.top) == (10 if size == (40, 20) else 0, 10 if size == (10, 80) else 0)
    assert (images[[0, 1, 3]] == 7).all()


def test_padding_that_somebody_else_wrote_over_comes_back() -> None:
    array = np.zeros((1, 3, 24, 32), np.float32)
    slot, image = PictureInput(RULE, array), picture(1, 10, 80)
    slot.place(Pixels.bgr(image))
    array[:] = 5
    slot.place(Pixels.bgr(image))
    assert not np.array_equal(array, placed(image)), "rows of padding are not written each time"
    slot.forget()
    slot.place(Pixels.bgr(image))
    assert np.array_equal(array, placed(image))


def test_a_picture_that_could_not_be_read_leaves_nothing_to_rely_on() -> None:
    array = np.zeros((1, 3, 24, 32), np.float32)
    slot, image = PictureInput(RULE, array), picture(1, 10, 80)
    slot.place(Pixels.bgr(image))
    with pytest.raises(UsageError, match="was released"):
        slot.place(ReleasedPixels(PixelLayout("bgr", 20, 40)))
    array[:] = 5
    slot.place(Pixels.bgr(image))
    assert np.array_equal(array, placed(image))


@pytest.mark.parametrize(
    "array", [np.zeros((1, 24, 32, 3), np.float32), np.zeros((1, 3, 24, 32), np.float16)]
)
def test_a_rule_of_another_network(array: np.ndarray) -> None:
    with pytest.raises(
        BundleError, match="its pipeline does not fit its network: argument out: wrong tensor"
    ):
        PictureInput(RULE, array)
