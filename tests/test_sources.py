"""Sources: what a picture, folder, video or world gives, and what bad ones say."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError, MissingExtraError, UsageError
from edgekit.optional import native_messages
from edgekit.picture import HeaderError, decode_picture, read_header
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame, Lease
from edgekit.runtime.sources import open_source, read_picture
from edgekit.runtime.sources.pictures import natural_key
from tests.helpers import ROOT, shared_data

# 8x8 CMYK JPEG as Adobe writes it (inverted), cyan 255: what RGB (0, 255, 255) prints as
CMYK = """
ffd8ffee000e41646f626500640000000000ffdb004300020101010101020101010202020202040302020202050404030406
0506060605060606070908060709070606080b08090a0a0a0a0a06080b0c0b0a0c090a0a0affc00014080008000804431100
4d11005911004b1100ffc400150001010000000000000000000000000000090affc400141001000000000000000000000000
00000000ffda000e0443004d0059004b00003f009ff3f87f0fe3ffd9
"""


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth uint8 BGR picture that JPEG keeps nearly."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(
        np.uint8
    )


def encoded(suffix: str, image: np.ndarray) -> bytes:
    ok, data = cv2.imencode(suffix, image)
    assert ok
    return bytes(data.tobytes())


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and text
    return text


def refused(uri: object, kind: type[EdgekitError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        list(open_source(uri))  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return one_line(caught.value)


def make_video(
    path: Path, count: int = 20, fps: float = 25, code: str = "mp4v", size: tuple[int, int] = (64, 48)
) -> Path:
    """Frame i is grey of level 12 * i (mod 256)."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), fps, size)
    assert writer.isOpened()
    for i in range(count):
        writer.write(np.full((size[1], size[0], 3), 12 * i % 256, np.uint8))
    writer.release()
    return path


# --- frames ---


def test_a_frame_is_given_back_once() -> None:
    released = []
    frame = Frame(Pixels.bgr(gradient()), 3, 5, 0, "x", lease=Lease(lambda: released.append(1)))
    with frame as same:
        assert same is frame and (frame.width, frame.height) == (64, 48)
        frame.release()
    assert released == [1]


def test_age_counts_from_capture() -> None:
    assert Frame(Pixels.bgr(gradient()), 0, 0, time.monotonic_ns() - 10**9, "x").age_ms() >= 1000


# --- single pictures ---


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".ppm"])
def test_a_picture_gives_one_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(suffix, gradient()))
    with open_source(path) as source:
        assert (source.live, source.fps, source.size, source.frames) == (False, None, (64, 48), 1)
        frames = list(source)
    assert len(frames) == 1 and source.skipped == []
    frame = frames[0]
    assert (frame.seq, frame.pts_ns, frame.source, frame.pixels.layout.format) == (0, 0, str(path), "bgr")
    assert frame.image.dtype == np.uint8
    assert np.abs(frame.image.astype(int) - gradient()).mean() < 3


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    for name in ("a.jpg", "noext"):
        (tmp_path / name).write_bytes(encoded(".png", gradient()))
        assert np.array_equal(next(open_source(tmp_path / name)).image, gradient())


def test_depths_and_channels_become_8_bit_bgr(tmp_path: Path) -> None:
    image = gradient()
    grey = image[..., 0]
    assert np.array_equal(decode_picture(encoded(".png", grey)), np.repeat(grey[..., None], 3, 2))
    deep = image.astype(np.uint16) * 256 + 128
    assert np.array_equal(decode_picture(encoded(".png", deep)), image)
    alpha = np.dstack([image, np.zeros(image.shape[:2], np.uint8)])  # dropped, not blended to black
    assert np.array_equal(decode_picture(encoded(".png", alpha)), image)


def exif(orientation: int) -> bytes:
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    plain = encoded(".jpg", gradient())
    expected = decode_picture(plain)
    turned = decode_picture(plain[:2] + exif(6) + plain[2:])
    assert np.array_equal(turned, cv2.rotate(expected, cv2.ROTATE_90_CLOCKWISE))
    (tmp_path / "a.jpg").write_bytes(plain[:2] + exif(6) + plain[2:])
    assert open_source(tmp_path / "a.jpg").size == (48, 64)


def test_cmyk_jpeg_becomes_bgr() -> None:
    image = decode_picture(bytes.fromhex("".join(CMYK.split())))
    assert image.shape == (8, 8, 3)
    assert np.abs(image.astype(int) - [255, 255, 0]).max() <= 4


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".ppm", ".tif"])
def test_truncated_pictures_are_refused(tmp_path: Path, suffix: str) -> None:
    data = encoded(suffix, np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    path = tmp_path / f"a{suffix}"
    for part in (0.05, 0.3, 0.6, 0.95):
        path.write_bytes(data[: int(len(data) * part)])
        assert str(path) in refused(path)


def test_a_truncated_jpeg_with_a_thumbnail_is_refused() -> None:
    data = encoded(".jpg", gradient())
    thumbnail = b"\xff\xe1" + struct.pack(">H", 4 + 2) + b"\xff\xd9\0\0"  # holds an end marker itself
    whole = data[:2] + thumbnail + data[2:]
    assert decode_picture(whole).shape == (48, 64, 3)
    with pytest.raises(HeaderError, match="truncated"):
        decode_picture(whole[:-40])


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"\0\0\0\0IEND\xaeB`\x82"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + end


@pytest.mark.parametrize(
    ("width", "height"), [(16385, 1), (1, 16385), (16000, 16000), (2**31 - 1, 2**31 - 1)]
)
def test_bombs_are_refused_by_their_header(
    tmp_path: Path, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *a: pytest.fail("decoded a bomb"))
    (tmp_path / "a.png").write_bytes(png_header(width, height))
    assert "too large" in refused(tmp_path / "a.png")


def test_a_picture_without_pixels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(0, 4))
    assert "0x4" in refused(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif", ".ppm", ".jpeg", ".avi", ""])
@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"P6\n1"]
)
def test_junk_is_refused_in_one_line(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    refused(path)


@given(
    data=st.binary(max_size=300),
    kind=st.sampled_from([b"", b"\xff\xd8\xff", b"BM", b"II*\0", b"P5 ", b"RIFF    WEBP"]),
)
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_crash_the_reader(data: bytes, kind: bytes) -> None:
    try:
        image = decode_picture(kind + data)
    except ValueError as error:
        one_line(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3


@given(
    suffix=st.sampled_from([".jpg", ".png", ".webp", ".bmp", ".tif", ".ppm"]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.floats(0.5, 1),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_pictures_never_crash_the_reader(
    suffix: str, edits: list[tuple[int, int]], cut: float
) -> None:
    data = bytearray(encoded(suffix, gradient(24, 32)))
    for at, value in edits:
        data[at % len(data)] = value
    try:
        image = decode_picture(bytes(data[: int(len(data) * cut)]))
    except ValueError as error:
        one_line(error)
    else:
        assert image.dtype == np.uint8 and image.shape[2] == 3


def test_an_endless_jpeg_header_ends() -> None:
    with pytest.raises(HeaderError, match="damaged"):
        read_header(b"\xff\xd8" + b"\xff\xe1\0\x02" * 200_000)


def noise(size: int = 200) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)


def test_a_damaged_middle_of_a_jpeg_is_seen() -> None:
    data = encoded(".jpg", noise())
    for damaged in (data[:3000] + bytes(3000) + data[6000:], data[:5000] + data[9000:]):
        with pytest.raises(HeaderError, match="damaged JPEG data"):
            decode_picture(damaged)
    # the padding of cameras, before and after the end marker, is no damage
    whole = decode_picture(data)
    for padded in (data[:-2] + b"\1" * 20 + data[-2:], data + b"\0" * 2000):
        assert np.array_equal(decode_picture(padded), whole)


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_in_a_png_is_refused_or_harmless(at: int, bit: int) -> None:
    data = bytearray(encoded(".png", gradient(24, 32)))
    data[at % len(data)] ^= 1 << bit
    try:
        image = decode_picture(bytes(data))
    except ValueError as error:
        one_line(error)
    else:
        assert np.array_equal(image, gradient(24, 32))


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_orientation_of_other_formats_and_odd_profiles(capfd: pytest.CaptureFixture[str]) -> None:
    plain = encoded(".png", gradient())
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    turned = decode_picture(plain[:33] + png_chunk(b"eXIf", tiff) + plain[33:])
    assert np.array_equal(turned, cv2.rotate(gradient(), cv2.ROTATE_90_CLOCKWISE))
    odd = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"junk" * 40))  # libpng warns about it
    assert np.array_equal(decode_picture(plain[:33] + odd + plain[33:]), gradient())
    assert capfd.readouterr() == ("", "")


def test_16_bit_of_every_format_is_scaled() -> None:
    deep = gradient().astype(np.uint16) * 256 + 128
    for suffix in (".png", ".tif", ".ppm"):
        assert np.array_equal(decode_picture(encoded(suffix, deep)), gradient()), suffix


def test_a_size_given_twice_counts_as_the_larger() -> None:
    def tiff(*widths: int) -> bytes:
        tags = [struct.pack("<HHII", 256, 4, 1, w) for w in widths] + [struct.pack("<HHII", 257, 4, 1, 9)]
        return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + bytes(4)

    assert (read_header(tiff(8)).width, read_header(tiff(90_000, 8)).width) == (8, 90_000)


def test_other_messages_are_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with native_messages(("libpng ",)) as messages:
        os.write(2, b"libpng warning: x\nsomebody else\n")
    assert messages == ["libpng warning: x"] and capfd.readouterr().err == "somebody else\n"


def test_a_process_without_stderr_reads_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(".png", gradient()))
    code = (
        "import os, sys\nfrom edgekit.picture import read_picture\nos.close(2)\n"
        "print(read_picture(sys.argv[1]).shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True, cwd=ROOT
    )
    assert run.stdout == "(48, 64, 3)\n"


def test_nothing_is_printed_about_bad_files(tmp_path: Path) -> None:
    jpeg, png = encoded(".jpg", noise()), bytearray(encoded(".png", noise()))
    (tmp_path / "d.jpg").write_bytes(jpeg[:3000] + bytes(3000) + jpeg[6000:])
    png[len(png) // 2] ^= 1  # libpng and libjpeg write to stderr themselves
    (tmp_path / "e.png").write_bytes(png)
    (tmp_path / "a.png").write_bytes(encoded(".png", gradient())[:200])
    (tmp_path / "b.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\1" * 500)
    (tmp_path / "c.tif").write_bytes(encoded(".tif", gradient())[:2000])
    code = (
        "import sys\nfrom edgekit.runtime.sources import open_source\nfrom edgekit.errors import UsageError\n"
        "for name in sys.argv[1:]:\n    try:\n        list(open_source(name))\n    except UsageError: pass\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert run.stdout + run.stderr == ""


# --- folders and patterns ---


def test_natural_order() -> None:
    names = ["b1.png", "a10.png", "a2.png", "A1.png", "a01.png", "²a.png", "10", "9x"]
    got = sorted(map(Path, names), key=natural_key)
    assert [p.name for p in got] == ["9x", "10", "A1.png", "a01.png", "a2.png", "a10.png", "b1.png", "²a.png"]


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded(".png", np.full((4 + i, 5, 3), i, np.uint8)))
    return folder


def test_a_folder_gives_its_pictures_in_order(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pics", "f10.png", "f9.png", "f1.PNG")
    (folder / "notes.txt").write_text("x")
    (folder / "._f1.png").write_text("x")
    (folder / "sub.png").mkdir()
    with open_source(folder) as source:
        assert (source.frames, source.size, source.ignored) == (3, None, 2)
        frames = list(source)
    assert [Path(f.source).name for f in frames] == ["f1.PNG", "f9.png", "f10.png"]
    assert [f.seq for f in frames] == [0, 1, 2]
    assert source.skipped == []


def test_an_unreadable_picture_in_a_folder_is_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pics", "a1.png", "a2.png", "a3.png")
    (folder / "a2.png").write_bytes(b"junk")
    with open_source(folder) as source:
        assert [f.seq for f in source] == [0, 2]
        assert len(source.skipped) == 1
        path, reason = source.skipped[0]
        assert path == str(folder / "a2.png") and "not a picture" in reason and "\n" not in reason


def test_a_folder_of_only_bad_pictures_fails(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"junk")
    assert "none of its 2 pictures" in refused(tmp_path)


def test_an_empty_folder_fails(tmp_path: Path) -> None:
    assert "no picture" in refused(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert "1 other" in refused(str(tmp_path) + "/")


def test_a_pattern_picks_pictures(tmp_path: Path) -> None:
    fill(tmp_path, "a1.png", "a2.png", "b1.png")
    assert len(list(open_source(f"{tmp_path}/a*.png"))) == 2
    fill(tmp_path / "sub", "a3.png")
    assert len(list(open_source(f"{tmp_path}/**/a*.png"))) == 3
    assert "pattern" in refused(f"{tmp_path}/x*.png")


def test_a_name_with_brackets_is_a_file_before_a_pattern(tmp_path: Path) -> None:
    fill(tmp_path, "a[1].png")
    assert len(list(open_source(tmp_path / "a[1].png"))) == 1


def test_limit(tmp_path: Path) -> None:
    fill(tmp_path, "a1.png", "a2.png", "a3.png")
    source = open_source(tmp_path, limit=2)
    assert source.frames == 2 and len(list(source)) == 2
    assert open_source(tmp_path, limit=9).frames == 3
    with pytest.raises(UsageError, match="limit 0"):
        open_source(tmp_path, limit=0)


def test_a_closed_source_gives_nothing_more(tmp_path: Path) -> None:
    fill(tmp_path, "a1.png", "a2.png")
    source = open_source(tmp_path)
    next(source)
    source.close()
    source.close()
    assert list(source) == []


def test_file_uri_and_odd_names(tmp_path: Path) -> None:
    fill(tmp_path, "Größe 1%20.png")
    path = tmp_path / "Größe 1%20.png"
    assert len(list(open_source(path.as_uri()))) == 1
    assert "not a local file" in refused("file://server/a.png")
    assert "not a local file" in refused("file://")
    assert "not a local file" in refused("file://ser\tver/a\nb.png")


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "street.png")
    assert "Did you mean 'street.png'" in refused(tmp_path / "stret.png")
    assert "no such file" in refused(tmp_path / "x" / "y.png")
    assert "Did you mean 'synthetic'" in refused("sinthetic://street")
    assert "Known: csi, " in refused("zzz://1")
    assert "Check the path" in refused("a" * 5000)
    assert "Check the path" in refused("a\0b.png")
    assert "neither a file nor a folder" in refused("/dev/null")
    refused("")
    refused(tmp_path / "line\nbreak.png")
    refused(tmp_path / "stray\udcff.png").encode()


def test_without_opencv_the_pip_line_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a.png", "b.png")
    monkeypatch.setitem(sys.modules, "cv2", None)
    for uri in (tmp_path, tmp_path / "a.png"):
        assert "pip install" in refused(uri, MissingExtraError)


# --- videos ---


@pytest.mark.parametrize(("name", "code"), [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "FFV1")])
def test_a_video_gives_its_frames_and_times(tmp_path: Path, name: str, code: str) -> None:
    path = make_video(tmp_path / name, code=code)
    with open_source(path) as source:
        assert (source.live, source.fps, source.size, source.frames) == (False, 25, (64, 48), 20)
        opened = time.monotonic_ns()
        frames = list(source)
    assert [f.seq for f in frames] == list(range(20))
    assert [f.pts_ns for f in frames] == [40_000_000 * i for i in range(20)]
    assert all(f.captured_ns >= opened for f in frames)
    levels = [float(f.image.mean()) for f in frames]
    assert np.abs(np.array(levels) - 12 * np.arange(20)).max() < 6
    assert source.skipped == []


@pytest.mark.skipif(not hasattr(cv2, "imwriteanimation"), reason="this OpenCV cannot write a test GIF")
def test_times_are_the_containers_not_the_mean_rate(tmp_path: Path) -> None:
    clip = cv2.Animation()
    clip.frames = [np.full((32, 32, 3), level, np.uint8) for level in (20, 120, 220, 60)]
    clip.durations = np.array([100, 300, 200, 150], np.int32)
    assert cv2.imwriteanimation(str(tmp_path / "a.gif"), clip)
    source = open_source(tmp_path / "a.gif")
    assert [f.pts_ns for f in source] == [0, 100_000_000, 400_000_000, 600_000_000]
    assert source.skipped == []


def test_frames_of_a_video_do_not_share_memory(tmp_path: Path) -> None:
    frames = list(open_source(make_video(tmp_path / "a.mp4", 3)))
    assert not np.shares_memory(frames[0].image, frames[1].image)


def test_a_video_whose_tail_is_cut_gives_what_is_there_and_says_so(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.avi", 60, code="MJPG").read_bytes()
    path = tmp_path / "cut.avi"
    path.write_bytes(whole[: int(len(whole) * 0.5)])
    source = open_source(path)
    frames = list(source)
    assert 10 < len(frames) < 40
    assert len(source.skipped) == 1 and "early" in source.skipped[0][1]
    limited = open_source(path, limit=5)
    assert len(list(limited)) == 5 and limited.skipped == []


def test_a_cut_mp4_is_refused(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4").read_bytes()
    path = tmp_path / "cut1.mp4"
    for part in (0, 0.01, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        assert "cut1.mp4" in refused(path)


@given(edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=40)), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_damaged_videos_never_crash_the_reader(edits: list[tuple[float, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make_video(Path(folder) / "a.mp4", 8)
        data = bytearray(path.read_bytes())
        for where, patch in edits:
            at = int(where * (len(data) - 1))
            data[at : at + len(patch)] = patch
        path.write_bytes(data)
        try:
            with open_source(path, limit=50) as source:
                frames = list(source)
        except UsageError as error:
            one_line(error)
        else:
            assert all(b.pts_ns > a.pts_ns for a, b in itertools.pairwise(frames))


@given(
    data=st.binary(max_size=400),
    start=st.sampled_from([b"", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", b"RIFF\0\1\0\0AVI LIST", b"\x1aE\xdf\xa3", b"GIF89a",
                           b"#EXTM3U\n", b"ffconcat version 1.0\n", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"]),
    suffix=st.sampled_from([".mp4", ".avi", ".jpg", ".png", ".gif", ""]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_random_bytes_of_any_name_never_crash_a_source(data: bytes, start: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(start + data)
        try:
            with open_source(path, limit=20) as source:
                list(source)
        except UsageError as error:
            one_line(error)


@pytest.mark.parametrize(("name", "code"), [("cut.mkv", "FFV1"), ("cut.mp4", "mp4v")])
def test_a_container_with_its_index_in_front_is_read_to_the_cut(tmp_path: Path, name: str, code: str) -> None:
    rng = np.random.default_rng(0)
    whole = tmp_path / name
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter_fourcc(*code), 25, (64, 48))
    for _ in range(100):
        writer.write(rng.integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    data = whole.read_bytes()
    if name.endswith(".mp4"):
        data = index_first(data)
        whole.write_bytes(data)
    assert len(list(open_source(whole))) == 100
    whole.write_bytes(data[: len(data) * 6 // 10])
    source = open_source(whole)
    frames = list(source)
    assert 30 < len(frames) < 70
    assert [f.pts_ns for f in frames] == [40_000_000 * i for i in range(len(frames))]
    assert len(source.skipped) == 1 and "early" in source.skipped[0][1]


def index_first(data: bytes) -> bytes:
    """An MP4 with its `moov` box moved before `mdat`, chunk offsets (`stco`) adjusted."""
    boxes, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        boxes.append(data[at : at + size])
        at += size
    moov = bytearray(next(b for b in boxes if b[4:8] == b"moov"))
    table = moov.index(b"stco") + 8
    (count,) = struct.unpack_from(">I", moov, table)
    for entry in range(table + 4, table + 4 + 4 * count, 4):
        struct.pack_into(">I", moov, entry, struct.unpack_from(">I", moov, entry)[0] + len(moov))
    rest = [b for b in boxes if b[4:8] != b"moov"]
    return rest[0] + bytes(moov) + b"".join(rest[1:])


@pytest.mark.shared
def test_real_videos_and_photos_are_read_whole() -> None:
    data = shared_data()
    for path in sorted((data / "video").glob("*.mp4")):
        with open_source(path) as source:
            frames = sum(1 for _ in source)
        assert frames == source.frames and source.skipped == [], path
    with open_source(data / "photos") as source:
        assert len(list(source)) == source.frames and source.skipped == []


# --- the synthetic world ---


def test_the_synthetic_street() -> None:
    from edgekit.synth.street import StreetWorld

    uri = "synthetic://street?seed=3&frames=4&size=128x96&fps=12.5"
    with open_source(uri) as source:
        assert (source.live, source.fps, source.size, source.frames) == (False, 12.5, (128, 96), 4)
        frames = list(source)
    assert [f.pts_ns for f in frames] == [0, 80_000_000, 160_000_000, 240_000_000]
    assert np.array_equal(frames[2].image, StreetWorld(3, 128, 96).frame(2).image)
    assert frames[0].source == uri
    defaults = open_source("synthetic://street")
    assert (defaults.fps, defaults.size, defaults.frames) == (30, (640, 360), 300)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("synthetic://stret", "Did you mean 'street'"),
        ("synthetic://", "unknown world"),
        ("synthetic://street/night", "unknown world"),
        ("synthetic://street?sed=1", "Did you mean 'seed'"),
        ("synthetic://street?seed=1&seed=2", "twice"),
        ("synthetic://street?seed=-1", "seed out of range"),
        ("synthetic://street?seed=", "seed out of range"),
        ("synthetic://street?seed=١", "seed out of range"),
        (f"synthetic://street?seed={2**63}", "seed out of range"),
        ("synthetic://street?frames=0", "frames out of range"),
        ("synthetic://street?frames=" + "9" * 5000, "frames out of range"),
        ("synthetic://street?frames=1.5", "frames out of range"),
        ("synthetic://street?size=640", "WIDTHxHEIGHT"),
        ("synthetic://street?size=640x0", "WIDTHxHEIGHT"),
        ("synthetic://street?size=5000x5000", "WIDTHxHEIGHT"),
        ("synthetic://street?fps=nan", "fps out of range"),
        ("synthetic://street?fps=0", "fps out of range"),
        ("synthetic://street?fps=1001", "fps out of range"),
        ("synthetic://street#x", "#x"),
        ("synthetic://[street", "not a valid URI"),
    ],
)
def test_synthetic_queries_are_checked(uri: str, says: str) -> None:
    assert says in refused(uri)


def test_read_picture_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.png: No such file"):
        read_picture(tmp_path / "nothing.png")
    with pytest.raises(UsageError, match="not a regular file"):
        read_picture(tmp_path)
