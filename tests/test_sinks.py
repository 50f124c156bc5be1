"""Sinks: what is written, and that nothing half-written is left when it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgekit.errors import OutputError, StreamError, UsageError
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import Sink, open_sink
from edgekit.runtime.sinks.video import fit
from edgekit.runtime.sources import open_source
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.draw import draw
from tests.helpers import ROOT

FOUND = Detections(
    np.array([[10, 20, 60, 70], [1.23456, 2, 30, 40]], np.float32),
    np.array([0.9, 0.3], np.float32),
    np.array([1, 0], np.int32),
    ("car", "dog"),
)
NONE = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def frame(seq: int = 0, width: int = 96, height: int = 80, source: str = "cam.mp4") -> Frame:
    image = np.full((height, width, 3), 40 + 10 * seq, np.uint8)
    return Frame(Pixels.bgr(image), seq, 40_000_000 * seq, 0, source)


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write_and_close(sink: Sink, error: BaseException | None = None) -> None:
    """One frame, then the end or `error`."""
    with sink:
        sink.write(StreamResult(frame(), FOUND, 0))
        if error is not None:
            raise error


# --- JSON lines ---


def test_json_lines_hold_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_sink(path) as sink:
        sink.write(StreamResult(frame(0), FOUND, 12345670))
        assert len(path.read_text().splitlines()) == 1, "a line can be read as soon as it is written"
        sink.write(StreamResult(frame(7), NONE, 0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {
            "source": "cam.mp4",
            "seq": 0,
            "pts_ns": 0,
            "age_ms": 12.346,
            "boxes": [[10, 20, 60, 70], [1.235, 2, 30, 40]],
            "scores": [pytest.approx(0.9), pytest.approx(0.3)],
            "classes": [1, 0],
            "labels": ["dog", "car"],
        },
        {
            "source": "cam.mp4",
            "seq": 7,
            "pts_ns": 280_000_000,
            "age_ms": 0,
            "boxes": [],
            "scores": [],
            "classes": [],
            "labels": [],
        },
    ]
    assert list(lines[0]) == ["source", "seq", "pts_ns", "age_ms", "boxes", "scores", "classes", "labels"]
    assert sink.written == 2


def test_json_lines_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n" * 100)
    with open_sink(path) as sink:
        sink.write(StreamResult(frame(), NONE, 0))
    assert len(path.read_text().splitlines()) == 1
    with open_sink(path):
        pass
    assert path.read_text() == "", "no frames, no lines"


def test_scores_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    bad = Detections(FOUND.boxes, np.array([np.nan, 1], np.float32), FOUND.classes)
    sink = open_sink(tmp_path / "o.jsonl")
    with pytest.raises(StreamError, match="not a finite number"):
        sink.write(StreamResult(frame(), bad, 0))


def test_odd_file_names_are_valid_json(tmp_path: Path) -> None:
    with open_sink(tmp_path / "o.jsonl") as sink:
        sink.write(StreamResult(frame(source="a\n\udcff\u2028b"), NONE, 0))
    line = (tmp_path / "o.jsonl").read_bytes()
    assert line.count(b"\n") == 1 and line.isascii()


def test_a_full_disk_told_when_closing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = open_sink(tmp_path / "o.jsonl")
    sink.write(StreamResult(frame(), FOUND, 0))
    real = os.close

    def full(file: int) -> None:
        real(file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "close", full)
    with pytest.raises(OutputError, match="No space left"):
        sink.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "o.jsonl").symlink_to("/dev/full")
    sink = open_sink(tmp_path / "o.jsonl")
    with pytest.raises(OutputError, match="No space left") as caught:
        sink.write(StreamResult(frame(), FOUND, 0))
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    sink.abort()


WRITER = """
import resource, signal, sys
import numpy as np
from edgekit.errors import OutputError
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import open_sink
from edgekit.tasks.detect.detections import Detections
limit = int(sys.argv[2])
image = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
boxes = Detections(np.zeros((3, 4), np.float32), np.zeros(3, np.float32), np.zeros(3, np.int32))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with open_sink(sys.argv[1]) as sink:
        for i in range(60):
            sink.write(StreamResult(Frame(Pixels.bgr(image), i, i, 0, "x"), boxes, 0))
except OutputError as error:
    print(error)
    sys.exit(1)
"""


def limited(path: Path | str, limit: int) -> str:
    """Write 60 noisy frames where no file may grow over `limit` bytes; the error's text."""
    run = subprocess.run(
        [sys.executable, "-c", WRITER, str(path), str(limit)], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 1, run.stderr
    assert run.stderr == ""
    assert len(run.stdout.splitlines()) == 1
    return run.stdout


def test_json_lines_stay_whole_when_the_disk_fills(tmp_path: Path) -> None:
    assert "too large" in limited(tmp_path / "o.jsonl", 1000)
    text = (tmp_path / "o.jsonl").read_text()
    assert text.endswith("\n") and 1 < len(text.splitlines()) < 60
    for line in text.splitlines():
        json.loads(line)


@pytest.mark.parametrize("name", ["o.png", "o.mp4", "folder/"])
def test_nothing_half_written_stays_when_the_disk_fills(tmp_path: Path, name: str) -> None:
    says = limited(f"{tmp_path}/{name}", 100_000)
    assert "Free some space" in says
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("name", ["o.jsonl", "o.png", "o.mp4", "sub/"])
def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="Choose another path") as caught:
        open_sink(f"{tmp_path}/file/{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".png", ".mp4"])
def test_a_name_too_long_is_one_line(tmp_path: Path, suffix: str) -> None:
    sink = open_sink(tmp_path / ("a" * 300 + suffix))
    with pytest.raises(OutputError, match="too long"):
        write_and_close(sink)
    assert left_in(tmp_path) == []


# --- pictures ---


def test_one_frame_is_written_at_the_exact_name(tmp_path: Path) -> None:
    with open_sink(tmp_path / "o.png") as sink:
        sink.write(StreamResult(frame(), FOUND, 0))
    assert left_in(tmp_path) == ["o.png"]
    assert np.array_equal(cv2.imread(str(tmp_path / "o.png")), draw(frame().image, FOUND))


def test_several_frames_are_numbered(tmp_path: Path) -> None:
    with open_sink(tmp_path / "o.PNG") as sink:
        for i in range(3):
            sink.write(StreamResult(frame(i), NONE, 0))
    assert left_in(tmp_path) == ["o_000001.PNG", "o_000002.PNG", "o_000003.PNG"]
    levels = [cv2.imread(str(tmp_path / name))[0, 0, 0] for name in left_in(tmp_path)]
    assert levels == [40, 50, 60]


def test_the_only_picture_appears_at_the_end_and_not_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "o.png").write_bytes(b"old")
    with pytest.raises(StreamError):
        write_and_close(open_sink(tmp_path / "o.png"), StreamError("camera gone"))
    assert left_in(tmp_path) == ["o.png"] and (tmp_path / "o.png").read_bytes() == b"old"
    write_and_close(open_sink(tmp_path / "o.png"))
    assert (tmp_path / "o.png").read_bytes() != b"old"


def test_an_interrupted_write_leaves_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    sink = open_sink(f"{tmp_path}/out/")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sink.write(StreamResult(frame(), FOUND, 0))
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize("other", ["o_000001.png", "o_000002.png"])
def test_numbered_pictures_never_overwrite_another_source(tmp_path: Path, other: str) -> None:
    for name in ("a.png", "b.png", other):
        cv2.imwrite(str(tmp_path / name), frame().image)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    frames = list(open_source(tmp_path, limit=2))
    sink = open_sink(tmp_path / "o.png")
    sink.write(StreamResult(frames[0], FOUND, 0))
    with pytest.raises(OutputError, match="among the source"):
        sink.write(StreamResult(frames[1], FOUND, 0))
    sink.abort()
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_a_frame_is_not_changed_by_writing_it(tmp_path: Path) -> None:
    one = frame()
    with open_sink(tmp_path / "o.png") as sink:
        sink.write(StreamResult(one, FOUND, 0))
    assert (one.image == 40).all()


def test_a_folder_keeps_the_names(tmp_path: Path) -> None:
    with open_sink(f"{tmp_path}/out/") as sink:
        for source in ("x/a.jpg", "y/A.JPG", "x/a.png", "b.tiff"):
            sink.write(StreamResult(frame(source=source), NONE, 0))
        sink.write(StreamResult(frame(5, source="v/clip.mp4"), NONE, 0))
        sink.write(StreamResult(frame(6, source="synthetic://street?seed=1"), NONE, 0))
    assert left_in(tmp_path / "out") == sorted(
        ["a.jpg", "A_2.JPG", "a.png", "b.png", "clip_000005.png", "street_000006.png"]
    )


def test_sources_are_never_overwritten(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(cv2.imencode(".png", frame().image)[1].tobytes())
    before = picture.read_bytes()
    for target in (picture, tmp_path):
        one = next(open_source(picture))
        with pytest.raises(OutputError, match="source itself"):
            open_sink(target).write(StreamResult(one, FOUND, 0))
    assert picture.read_bytes() == before and left_in(tmp_path) == ["a.png"]


def test_a_picture_its_format_cannot_hold_is_one_line(tmp_path: Path) -> None:
    wide = Frame(Pixels.bgr(np.zeros((1, 16384, 3), np.uint8)), 0, 0, 0, "x")
    with pytest.raises(OutputError, match="16384x1"), open_sink(tmp_path / "o.webp") as sink:
        sink.write(StreamResult(wide, NONE, 0))


# --- videos ---


def levels(path: Path) -> tuple[list[float], float, tuple[int, int]]:
    with open_source(path) as source:
        assert source.size and source.fps
        return [float(f.image.mean()) for f in source], source.fps, source.size


@pytest.mark.parametrize("fps", [25, 10, 29.97, 23.976023976, 1, 240])
def test_a_video_holds_every_frame(tmp_path: Path, fps: float) -> None:
    with open_sink(tmp_path / "o.mp4", fps=fps) as sink:
        for i in range(12):
            sink.write(StreamResult(frame(i), NONE, 0))
        assert not (tmp_path / "o.mp4").exists(), "it appears when it is whole"
    got, rate, size = levels(tmp_path / "o.mp4")
    assert np.abs(np.array(got) - [40 + 10 * i for i in range(12)]).max() < 6
    assert rate == pytest.approx(fps, rel=1e-3) and size == (96, 80)
    assert left_in(tmp_path) == ["o.mp4"]


def test_a_video_without_clock_plays_at_ten(tmp_path: Path) -> None:
    with open_sink(tmp_path / "o.mp4") as sink:
        sink.write(StreamResult(frame(), NONE, 0))
    assert levels(tmp_path / "o.mp4")[1] == 10


@pytest.mark.parametrize(("width", "height"), [(1, 1), (17, 33), (3, 200), (9000, 20)])
def test_any_size_can_be_filmed(tmp_path: Path, width: int, height: int) -> None:
    with open_sink(tmp_path / "o.mp4") as sink:
        for i in range(3):
            sink.write(StreamResult(frame(i, width, height), FOUND, 0))
    got, _, size = levels(tmp_path / "o.mp4")
    assert len(got) == 3 and all(16 <= s <= 4096 and s % 2 == 0 for s in size)


def test_later_sizes_are_letterboxed(tmp_path: Path) -> None:
    with open_sink(tmp_path / "o.mp4") as sink:
        sink.write(StreamResult(frame(0, 96, 80), NONE, 0))
        sink.write(StreamResult(frame(0, 40, 200), NONE, 0))
    with open_source(tmp_path / "o.mp4") as source:
        second = list(source)[1].image
    assert second.shape == (80, 96, 3)
    assert second[:, :30].mean() < 4 and abs(second[:, 44:52].mean() - 40) < 4


def test_fit_keeps_the_aspect_ratio() -> None:
    image = np.full((100, 200, 3), 9, np.uint8)
    out = fit(image, 100, 100)
    assert (out[25:75] == 9).all() and (out[:25] == 0).all() and (out[75:] == 0).all()
    assert fit(image, 200, 100) is image


def test_a_failed_run_leaves_no_video_but_an_interrupted_one_does(tmp_path: Path) -> None:
    with pytest.raises(StreamError):
        write_and_close(open_sink(tmp_path / "o.mp4"), StreamError("camera gone"))
    assert left_in(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        write_and_close(open_sink(tmp_path / "o.mp4"), KeyboardInterrupt())
    assert left_in(tmp_path) == ["o.mp4"]


def test_a_failed_run_keeps_the_older_video(tmp_path: Path) -> None:
    (tmp_path / "o.mp4").write_bytes(b"old")
    with pytest.raises(StreamError):
        write_and_close(open_sink(tmp_path / "o.mp4"), StreamError("camera gone"))
    assert (tmp_path / "o.mp4").read_bytes() == b"old"


def test_no_frames_make_no_video(tmp_path: Path) -> None:
    with open_sink(tmp_path / "o.mp4"):
        pass
    assert left_in(tmp_path) == []


def test_closing_twice_does_nothing(tmp_path: Path) -> None:
    def each() -> list[Sink]:
        return [open_sink(f"{tmp_path}/{n}") for n in ("o.jsonl", "o.mp4", "o.png", "sub/")]

    for sink in each():
        sink.write(StreamResult(frame(), FOUND, 0))
        sink.close()
        sink.close()
        sink.abort()
    assert left_in(tmp_path) == ["o.jsonl", "o.mp4", "o.png", "sub"]


# --- names ---


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("o.jsnl", "'.jsonl'"),
        ("o.mp3", "'.mp4'"),
        ("o", "no suffix"),
        ("o.xyz", "Known"),
        ("o.pgn", "'.png'"),
    ],
)
def test_unknown_suffixes_are_refused(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_sink(tmp_path / name)
    assert says in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["", "a\0.jsonl"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no usable path"):
        open_sink(name)


@pytest.mark.parametrize("name", ["o.jsonl", "o.png", "o.mp4", "sub/"])
def test_missing_folders_are_made_before_the_work(tmp_path: Path, name: str) -> None:
    sink = open_sink(f"{tmp_path}/new/deep/{name}")
    assert (tmp_path / "new" / "deep").is_dir()
    sink.abort()


@pytest.mark.parametrize("name", ["o.jsonl", "o.png", "o.mp4"])
def test_a_folder_of_that_name_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match="a folder of that name"):
        open_sink(tmp_path / name)
    with open_sink(f"{tmp_path / name}/") as sink:  # asked for by the slash
        sink.write(StreamResult(frame(), NONE, 0))
    assert left_in(tmp_path / name) == ["cam_000000.png"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, where nobody can create files")
@pytest.mark.parametrize("name", ["o.jsonl", "o.png", "o.mp4", "sub/"])
def test_a_read_only_folder_is_one_line(name: str) -> None:
    with pytest.raises(OutputError) as caught:
        write_and_close(open_sink(f"/proc/self/{name}"))
    assert str(caught.value).startswith("sink /proc/self/") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["line\nbreak/o.jsonl", "line\nbreak.xyz"])
def test_odd_names_stay_on_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "line\nbreak").touch()  # a file where a folder is needed
    with pytest.raises((OutputError, UsageError)) as caught:
        open_sink(tmp_path / name)
    assert "\n" not in str(caught.value) and "line\\nbreak" in str(caught.value)


@pytest.mark.parametrize("name", ["o.jsonl", "o.png", "o.mp4", "sub/"])
def test_a_closed_sink_takes_nothing_more(tmp_path: Path, name: str) -> None:
    sink = open_sink(f"{tmp_path}/{name}")
    sink.write(StreamResult(frame(), FOUND, 0))
    sink.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="closed"):
        sink.write(StreamResult(frame(1), FOUND, 0))
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 5000])
def test_a_rate_that_cannot_be_played_is_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(UsageError, match="fps"):
        open_sink(tmp_path / "o.mp4", fps=fps)
