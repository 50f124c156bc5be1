"""The real YOLOX-nano, built in INT8: the C library finds in photographs the boxes that Python finds, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import edgekit
from edgekit.bundle import Bundle
from edgekit.host import backend_problem
from edgekit.picture import read_picture
from edgekit.pixels import PixelLayout, Pixels
from tests.cli_runs import cli
from tests.helpers import shared_data
from tests.native_c import Detector, opened

pytestmark = pytest.mark.skipif(bool(backend_problem("native")), reason="libedgekit.so was not built")

PHOTOS = ("dog", "giraffe", "cat_720p", "person")
PROJECT = """
[project]
name = "real"
[[model]]
name = "yolox_nano"
source = "{source}"
[model.calibration]
images = "calibration"
[model.accept]
max_confidence_loss = 1.0
[model.target.host]
precision = "int8"
backends = ["native"]
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few pictures and no search: what is compared here is one payload with itself."""
    data, folder = shared_data(), tmp_path_factory.mktemp("yolox")
    (folder / "calibration").mkdir()
    for photo in PHOTOS:
        shutil.copy(data / "photos" / f"{photo}.jpg", folder / "calibration")
    source = data / "models" / "yolox_nano" / "yolox_nano.onnx"
    (folder / "edgekit.toml").write_text(PROJECT.format(source=source))
    words = ("--quantization", "mse", "--allow-drop", "--out", folder / "out", "--json")
    ran = cli("build", folder, "--target", "host", *words)
    assert ran.code == 0, ran.err
    return Path(json.loads(ran.out)["bundles"][0]["path"])


def test_the_picture_goes_in_as_it_is(bundle: Path) -> None:
    with Bundle.open(bundle) as opened_:
        ((_, variant),) = opened_.manifest.variants()
        assert variant.options["codes"] == {"images": ["uint8", 1.0, 0]}  # a level is its code
        assert opened_.manifest.tensor("images").dtype.value == "float32"


def test_boxes_are_those_of_python(bundle: Path) -> None:
    found = 0
    with opened(bundle) as native, edgekit.load(bundle, threads=1) as engine:
        native.test()
        detector, pipeline = Detector(native), engine.pipeline()
        for number, photo in enumerate(PHOTOS):
            image = read_picture(shared_data() / "photos" / f"{photo}.jpg")
            height, width = (side // 2 * 2 for side in image.shape[:2])
            grey = np.ascontiguousarray(image[:height, :width, 1])  # as the luma of a camera's frame
            chroma = np.random.default_rng(number).integers(110, 146, (height // 2, width), dtype=np.uint8)
            frame = np.concatenate([grey.reshape(-1), chroma.reshape(-1)])
            for pixels in (Pixels.bgr(image), Pixels.view(frame, PixelLayout("nv12", width, height))):
                wanted = pipeline(pixels)
                boxes, scores, classes = detector(pixels)
                np.testing.assert_array_equal(boxes.view(np.int32), wanted.boxes.view(np.int32))
                np.testing.assert_array_equal(scores.view(np.int32), wanted.scores.view(np.int32))
                np.testing.assert_array_equal(classes, wanted.classes)
                found += len(wanted)
        detector.close()
    assert found >= 2 * len(PHOTOS), "too few boxes to compare"
