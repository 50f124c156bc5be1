"""What a project is calibrated on: its own pictures through its own input rule, none that it is judged on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import cv2
import numpy as np
import onnx_ir as ir
import pytest

from edgekit.dataset import DataSet, check_files, named_set, named_sets, picture_files
from edgekit.errors import CalibrationError, UsageError
from edgekit.frontends import load
from edgekit.passes import prepare
from edgekit.picture import read_picture
from edgekit.project import ModelEntry, default_app, load_project
from edgekit.quant import likeness
from edgekit.quant.calibrate import calibrate
from edgekit.synth.street import StreetWorld
from edgekit.tasks.detect.pipeline import DetectPipeline
from edgekit.tasks.picture_input import PictureInput
from edgekit.tasks.preprocess import ImagePreprocess
from edgekit.toolchain.data import calibration_feeds, evaluation_feeds, fed
from tests.helpers import shared_data

RULE = ImagePreprocess(64, 48, resize="letterbox-center", color="rgb", std=(255.0, 255.0, 255.0))


@dataclasses.dataclass(frozen=True)
class Spec:
    preprocess: ImagePreprocess = RULE


def quiet(what: str, done: int, of: int) -> None:
    pass


def folder_of(path, count, first=0):
    path.mkdir()
    for i in range(first, first + count):
        picture = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        assert cv2.imwrite(str(path / f"p{i}.png"), picture)
    return path


def entry(tmp_path, **fields) -> ModelEntry:
    return ModelEntry(name="net", source=tmp_path / "net.onnx", **fields)


def feeds_of(given: ModelEntry, limit=None, spec=None):
    return calibration_feeds(given, spec or Spec(), limit, input_name="x", progress=quiet)


def test_no_data_is_an_error(tmp_path):
    with pytest.raises(
        CalibrationError, match=r"^model net: int8 needs pictures .* Give --calibration FOLDER"
    ):
        feeds_of(entry(tmp_path))


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"folder .*none: holds no picture"):
        feeds_of(entry(tmp_path, calibration=DataSet(images=tmp_path / "none")))


def test_feeds_are_what_the_device_feeds(tmp_path):
    folder = folder_of(tmp_path / "a", 3)
    feeds = feeds_of(entry(tmp_path, calibration=DataSet(images=folder)))
    assert len(feeds) == len(list(feeds)) == len(list(feeds)) == 3

    class Session:
        inputs = {"x": np.zeros((1, 3, 48, 64), np.float32)}  # noqa: RUF012
        outputs: dict[str, np.ndarray] = {}  # noqa: RUF012

        def run(self) -> None:
            pass

    pipeline = DetectPipeline.__new__(DetectPipeline)  # its preprocessing alone
    pipeline.spec, pipeline.session = Spec(), Session()  # type: ignore[assignment]
    pipeline._input = PictureInput(RULE, Session.inputs["x"])
    pipeline._postprocess = lambda *a, **k: None  # type: ignore[assignment]
    for i, feed in enumerate(feeds):
        pipeline(read_picture(folder / f"p{i}.png"))
        assert np.array_equal(feed["x"], Session.inputs["x"])
        assert feed["x"].max() <= 1


def test_a_limit_takes_evenly_spaced_pictures_in_natural_order(tmp_path):
    folder = folder_of(tmp_path / "a", 12)
    given = entry(tmp_path, calibration=DataSet(images=folder))
    few = [f["x"] for f in feeds_of(given, 4)]
    want = [fed(read_picture(folder / f"p{i}.png"), RULE) for i in (0, 3, 6, 9)]
    assert all(np.array_equal(a, b) for a, b in zip(few, want, strict=True))
    counted = dataclasses.replace(given, calibration=DataSet(images=folder, count=6))
    assert (len(feeds_of(counted)), len(feeds_of(counted, 3)), len(feeds_of(given, 99))) == (6, 3, 12)


def test_digest_is_of_the_content(tmp_path):
    folder = folder_of(tmp_path / "a", 4)
    shutil.copytree(folder, tmp_path / "b")
    first, again = (feeds_of(entry(tmp_path, calibration=DataSet(images=tmp_path / n))) for n in "ab")
    assert first.digest == again.digest
    other_rule = dataclasses.replace(RULE, color="bgr")
    assert (
        feeds_of(entry(tmp_path, calibration=DataSet(images=folder)), spec=Spec(other_rule)).digest
        != first.digest
    )
    assert feeds_of(entry(tmp_path, calibration=DataSet(images=folder)), 3).digest != first.digest
    shutil.copy(folder / "p0.png", folder / "p3.png")
    assert feeds_of(entry(tmp_path, calibration=DataSet(images=folder))).digest != first.digest
    assert first.provenance["pictures"] == 4 and len(first.provenance["digest"]) == 64


# --- apart from evaluation -----------------------------------------------------------------------


def labels(path, names):
    path.write_text(
        json.dumps({"images": [{"file_name": n} for n in names], "annotations": [], "categories": []})
    )
    return path


def test_copies_of_evaluation_pictures_are_refused(tmp_path):
    judged, own = folder_of(tmp_path / "judged", 4), folder_of(tmp_path / "own", 5, first=10)
    instances = labels(tmp_path / "instances.json", ["p0.png", "p1.png", "p2.png"])
    given = entry(
        tmp_path, calibration=DataSet(images=own), evaluation=DataSet(images=judged, data=instances)
    )
    assert len(feeds_of(given)) == 5
    shutil.copy(judged / "p3.png", own / "other.png")  # lies there, but is not judged
    assert len(feeds_of(given)) == 6
    for i in (1, 2):
        shutil.copy(judged / f"p{i}.png", own / f"renamed{i}.png")
    with pytest.raises(CalibrationError, match="2 of 8 calibration pictures are evaluation pictures too"):
        feeds_of(given)


def test_files_of_one_size_are_told_apart_by_content(tmp_path):
    for name, content in (("a", b"12"), ("b", b"21"), ("c", b"12")):
        (tmp_path / name).write_bytes(content)
    check_files([tmp_path / "a"], [tmp_path / "b"], "here")
    with pytest.raises(CalibrationError, match="here: 1 of 1"):
        check_files([tmp_path / "a"], [tmp_path / "b", tmp_path / "c"], "here")


def test_pictures_in_arrays_are_told_apart_by_their_pixels(tmp_path):
    folder = folder_of(tmp_path / "a", 2)
    pixels = read_picture(folder / "p1.png")
    judged = DataSet(data=tmp_path / "set.npz")
    given = entry(tmp_path, calibration=DataSet(images=folder), evaluation=judged)
    for images, shared in ((pixels, True), (pixels[::-1], False)):
        rgb = np.ascontiguousarray(images[None, :, :, ::-1])
        np.savez(tmp_path / "set.npz", images=rgb, labels=np.zeros(1, np.int64))
        if shared:
            with pytest.raises(
                CalibrationError, match="1 of 2 calibration pictures are evaluation pictures too"
            ):
                feeds_of(given)
        else:
            assert len(feeds_of(given)) == 2


def test_picture_files(tmp_path):
    folder = folder_of(tmp_path / "a", 2)
    (folder / "note.txt").write_text("")
    (folder / "._p0.png").write_text("")
    folder_of(folder / "inner", 1)
    assert [p.name for p in picture_files(DataSet(images=folder))] == ["p0.png", "p1.png"]
    classes = tmp_path / "classes"
    classes.mkdir()
    folder_of(classes / "cat", 1)
    folder_of(classes / "dog", 1, first=3)
    assert [p.name for p in picture_files(DataSet(images=classes))] == ["p0.png", "p3.png"]
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(UsageError, match="not COCO instances"):
        picture_files(DataSet(images=folder, data=tmp_path / "bad.json"))


# --- named sets ----------------------------------------------------------------------------------


def test_every_named_set_says_what_it_holds():
    """A digest of its pictures, and seeds that no other set has."""
    sets = {name: named_set(name) for name in named_sets()}
    assert {"street", "street-eval"} <= set(sets)
    assert all(s.sha256 for s in sets.values())
    for a, b in itertools.combinations(sets.values(), 2):
        assert not set(range(a.seed, a.seed + a.count)) & set(range(b.seed, b.seed + b.count))


def test_the_shipped_detector_is_calibrated_on_streets():
    (given,) = load_project(default_app()).models
    feeds = calibration_feeds(given, Spec(), 3, input_name="x", progress=quiet)
    want = [fed(StreetWorld(1_000_000 + i, 640, 360).frame(45).image, RULE) for i in range(3)]
    assert all(np.array_equal(f["x"], w) for f, w in zip(feeds, want, strict=True))
    judged = evaluation_feeds(given, Spec(), 2, input_name="x", progress=quiet)
    assert judged is not None and len(judged) == 2 and judged.digest != feeds.digest


# --- enough, and alike ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector() -> tuple[ir.Model, ImagePreprocess]:
    (given,) = load_project(default_app()).models
    prepared = prepare(load(given.source), check=False)
    assert prepared.preprocess is not None
    return prepared.model, prepared.preprocess


def streets(first: int, count: int) -> list[np.ndarray]:
    return [StreetWorld(first + i, 640, 360).frame(45).image for i in range(count)]


def network_feeds(detector, pictures):
    model, rule = detector
    return [{str(model.graph.inputs[0].name): fed(p, rule)} for p in pictures]


@pytest.fixture(scope="module")
def street_stats(detector):
    return calibrate(detector[0], network_feeds(detector, streets(1_000_000, 24)))


def test_enough_and_alike(detector, street_stats):
    judged = network_feeds(detector, streets(10_000, 8))
    assert likeness.warnings(detector[0], street_stats, judged) == []
    assert likeness.warnings(detector[0], street_stats, None) == []


def test_too_few(detector):
    one, four = (calibrate(detector[0], network_feeds(detector, streets(5, n))) for n in (1, 4))
    (text,) = likeness.warnings(detector[0], one, None)
    assert "on 1 pictures: too few (one says nothing)" in text
    (text,) = likeness.warnings(detector[0], four, None)
    assert "on 4 pictures: too few (ranges still grow by" in text and 0 < likeness.growth(four) < 1


def test_ranges_that_keep_growing_are_too_few(street_stats):
    grown = {}
    for name, stats in street_stats.items():
        factors = np.linspace(1, 0.05, stats.image_low.size) ** 3
        factors[1::2] *= 0.5
        grown[name] = dataclasses.replace(
            stats, image_low=stats.low * factors, image_high=stats.high * factors
        )
    assert "ranges still grow" in likeness.too_few(grown)


@pytest.mark.parametrize("change", ["dark", "blank", "noise", "blur"])
def test_unlike(detector, street_stats, change):
    pictures = streets(10_000, 8)
    rng = np.random.default_rng(0)
    changes = {
        "dark": lambda x: (x * 0.2).astype(np.uint8),
        "blank": lambda x: np.zeros_like(x),
        "noise": lambda x: rng.integers(0, 256, x.shape, dtype=np.uint8),
        "blur": lambda x: cv2.GaussianBlur(x, (0, 0), 6),
    }
    judged = network_feeds(detector, [changes[change](p) for p in pictures])
    (text,) = likeness.warnings(detector[0], street_stats, judged)
    assert "unlike those for evaluation: distance" in text and "calibration: mean" in text


def test_distance_is_none_to_itself_and_a_shift_in_deviations(street_stats):
    names = list(street_stats)[:10]
    assert likeness.distance(street_stats, street_stats, names) == 0
    stats = street_stats[names[0]]
    deviation = (stats.mean_square - stats.mean**2) ** 0.5
    steps = round(deviation / stats.bin_width)
    moved = dataclasses.replace(
        stats,
        bin_low=stats.bin_low + steps * stats.bin_width,
        low=stats.low + steps * stats.bin_width,
        high=stats.high + steps * stats.bin_width,
    )
    assert likeness.wasserstein(stats, moved) == pytest.approx(1, abs=0.02)


@pytest.mark.shared
def test_photos_are_like_photos_and_unlike_streets():
    data = shared_data()
    prepared = prepare(load(data / "models" / "yolox_nano" / "yolox_nano.onnx"), check=False)
    assert prepared.preprocess is not None
    network = prepared.model, prepared.preprocess
    train, val = (sorted((data / "coco_mini" / n).glob("*.jpg")) for n in ("train", "val_a"))
    names = likeness.first_values(prepared.model)
    part = likeness.beginning(prepared.model, names)
    photos = [read_picture(p) for p in train[::5]]
    stats = calibrate(part, network_feeds(network, photos))
    judged = network_feeds(network, [read_picture(p) for p in val[::6]])
    assert likeness.unlike(prepared.model, stats, judged) == ""
    assert "unlike" in likeness.unlike(prepared.model, stats, network_feeds(network, streets(10_000, 8)))
    dark = network_feeds(network, [(read_picture(p) * 0.15).astype(np.uint8) for p in val[::12]])
    assert "unlike" in likeness.unlike(prepared.model, stats, dark)
