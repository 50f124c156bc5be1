"""`replay:`: a recording gives the same frames and the same results, bit for bit, ours or someone else's."""

from __future__ import annotations

import contextlib
import itertools
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("mcap", reason="needs the package mcap (edgekit[mcap])")
from mcap.writer import CompressionType, Writer

from edgekit.errors import UsageError
from edgekit.pixels import FORMATS, PixelLayout, Pixels
from edgekit.runtime import foxglove
from edgekit.runtime.frames import Frame
from edgekit.runtime.recording import Facts, dumps
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.mcap import McapSink
from edgekit.runtime.sources import open_source
from tests.recordings import frame, noise, record, replay, same_pixels

FACTS = ("seq", "pts_ns", "exposure", "camera", "epoch", "corrupt")


# --- the same frames ---


@st.composite
def pictures(draw: st.DrawFn) -> Pixels:
    format = draw(st.sampled_from(FORMATS))
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    width += width % 2 if format in ("yuyv", "uyvy") else 0
    layout = PixelLayout(
        format,
        width,
        height,
        draw(st.sampled_from(["bt601", "bt709"])),
        draw(st.sampled_from(["full", "limited"])),
    )
    natural = [int(np.prod(shape[1:])) for shape in layout.plane_shapes]
    pixels = noise(layout, draw(st.integers(0, 99)), [n + draw(st.integers(0, 9)) for n in natural])
    if draw(st.booleans()):  # upside down: rows a negative distance apart
        pixels = Pixels(tuple(plane[::-1] for plane in pixels.planes), layout)
    return pixels


whole = st.integers(-(2**62), 2**62)


@given(
    pixels=pictures(),
    seq=st.integers(0, 2**40),
    pts=whole,
    captured=st.integers(0, 2**62),
    clock=st.sampled_from(["monotonic", "media", "none"]),
    exposure=st.sampled_from(["start", "end", "unknown"]),
    camera=st.text(max_size=20),
    epoch=st.integers(0, 9),
    corrupt=st.booleans(),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_picture_and_all_its_facts_survive_the_way(
    tmp_path_factory: pytest.TempPathFactory, pixels: Pixels, captured: int, pts: int, **facts: Any
) -> None:
    path = tmp_path_factory.mktemp("r") / "a.mcap"
    facts["pts_ns"] = pts
    sent = Frame(pixels, captured_ns=captured, source="v4l2:/dev/video0", **facts)
    record(path, [sent])
    with replay(path) as source:
        (back,) = list(source)
    assert same_pixels(back.pixels, sent.pixels)
    assert [getattr(back, name) for name in FACTS] == [getattr(sent, name) for name in FACTS]
    assert back.clock == ("none" if sent.clock == "none" else "media")
    assert source.skipped == [] and (source.frames, source.size) == (1, (sent.width, sent.height))


def test_large_pictures_of_every_format_survive_too(tmp_path: Path) -> None:
    for format in FORMATS:
        sent = frame(0, PixelLayout(format, 640, 480))
        with replay(record(tmp_path / f"{format}.mcap", [sent])) as source:
            assert same_pixels(next(source).pixels, sent.pixels), format


def test_gaps_and_epochs_are_as_recorded(tmp_path: Path) -> None:
    frames = [frame(i, epoch=e) for i, e in ((3, 0), (4, 0), (9, 0), (10, 1), (12, 4))]
    with replay(record(tmp_path / "a.mcap", frames)) as source:
        assert [(f.seq, f.epoch, f.pts_ns) for f in source] == [(f.seq, f.epoch, f.pts_ns) for f in frames]


def test_open_source_finds_it_and_counts(tmp_path: Path) -> None:
    path = record(tmp_path / "a.mcap", [frame(i) for i in range(26)])
    with open_source(f"replay:{path}", limit=4) as source:
        assert (source.frames, source.live, source.size) == (4, False, (64, 48))
        assert source.fps == pytest.approx(25, rel=0.01)
        assert len(list(source)) == 4
    with open_source(f"replay://{path}") as source:
        assert len(list(source)) == 26


def test_ages_count_from_the_read_when_played_as_fast_as_possible(tmp_path: Path) -> None:
    with replay(record(tmp_path / "a.mcap", [frame(0)])) as source:
        before = time.monotonic_ns()
        f = next(source)
        assert before <= f.taken_ns == f.captured_ns <= time.monotonic_ns()


def test_one_camera_of_several_is_chosen(tmp_path: Path) -> None:
    frames = [frame(i, camera=c) for i in range(3) for c in ("front", "rear")]
    path = record(tmp_path / "a.mcap", frames)
    with pytest.raises(UsageError, match=r"several cameras. Known: front, rear. Choose with \?camera=NAME"):
        replay(path)
    with pytest.raises(UsageError, match=r"camera 'read': unknown\. Did you mean 'rear'"):
        replay(path, "?camera=read")
    for name in ("rear", "/rear/image"):
        with replay(path, f"?camera={name}") as source:
            back = list(source)
        assert [(f.camera, f.seq) for f in back] == [("rear", i) for i in range(3)]
        assert source.frames == 3


def test_in_a_file_without_an_end_other_cameras_are_told(tmp_path: Path) -> None:
    path = record(tmp_path / "a.mcap", [frame(i, camera=c) for i in range(3) for c in ("front", "rear")])
    path.write_bytes(path.read_bytes()[:-20])
    with replay(path) as source:
        assert {f.camera for f in source} == {"front"}
    assert any("?camera=rear" in reason for _, reason in source.skipped)


# --- the same results ---


@pytest.mark.parametrize("format", ["bgr", "yuyv", "nv12", "i420"])
def test_a_replay_gives_the_same_results_bit_for_bit(tmp_path: Path, host_bundle: str, format: Any) -> None:
    import edgekit

    def run(pipeline: Any, f: Frame) -> tuple[Any, dict[str, np.ndarray]]:
        result = pipeline(f.pixels, score_threshold=0.05)
        return result, {name: value.copy() for name, value in pipeline.session.inputs.items()}

    with edgekit.load(host_bundle) as engine, McapSink(tmp_path / "a.mcap") as sink:
        pipeline, first, boxes = engine.pipeline(), [], 0
        with open_source("synthetic://street?frames=6&size=640x360") as world:
            for f in world:
                if format != "bgr":
                    f.pixels = as_camera(f.pixels.planes[0], format)
                result, inputs = run(pipeline, f)
                boxes += len(result)
                first.append((f.seq, f.pts_ns, result, inputs))
                sink.write(StreamResult(f, result, 1))
        sink.close()
        assert boxes > 0, "something was seen"
        with replay(sink.path) as source:
            for f, (seq, pts_ns, result, inputs) in itertools.zip_longest(source, first):
                again, seen = run(pipeline, f)
                assert (f.seq, f.pts_ns) == (seq, pts_ns)
                assert all(np.array_equal(seen[name], value) for name, value in inputs.items())
                for name in ("boxes", "scores", "classes"):
                    assert getattr(again, name).tobytes() == getattr(result, name).tobytes()


@pytest.mark.parametrize("speed", [0, 1])
def test_a_stream_is_recorded_and_its_replay_streams_the_same(
    tmp_path: Path, host_bundle: str, speed: int
) -> None:
    import edgekit

    def run(uri: str, *sinks: McapSink) -> tuple[dict[tuple[int, int], bytes], dict[str, Any]]:
        with edgekit.stream(host_bundle, uri, sinks=sinks, score_threshold=0.05) as stream:
            found = {
                (item.frame.epoch, item.frame.seq): item.result.boxes.tobytes() + item.result.scores.tobytes()
                for item in stream
            }
        (camera,) = stream.metrics.snapshot()["cameras"].values()
        return found, camera

    sink = McapSink(tmp_path / "a.mcap")
    first, _ = run("synthetic://street?frames=12&size=640x360", sink)
    assert len(first) == 12 and sink.written == 12
    again, camera = run(f"replay:{sink.path}?speed={speed}")
    assert again.items() <= first.items() if speed else again == first
    assert camera["faults"] == {} and again, "nothing for the watchdog to do"


def as_camera(image: np.ndarray, format: Any) -> Pixels:
    """A BGR picture in a camera's format, roughly: the luma is its green, the chroma some of the others."""
    h, w = image.shape[:2]
    layout = PixelLayout(format, w, h)
    pixels = Pixels.view(np.zeros(layout.nbytes, np.uint8), layout)
    if format == "yuyv":
        pixels.planes[0][..., 0] = image[..., 1]
        pixels.planes[0][:, 0::2, 1] = image[:, 0::2, 0]
        pixels.planes[0][:, 1::2, 1] = image[:, 0::2, 2]
        return pixels
    pixels.planes[0][...] = image[..., 1]
    if format == "nv12":
        pixels.planes[1][...] = image[0::2, 0::2, 0::2]
    else:
        pixels.planes[1][...], pixels.planes[2][...] = image[0::2, 0::2, 0], image[0::2, 0::2, 2]
    return pixels


# --- in real time ---


def test_in_real_time_intervals_and_the_way_from_the_sensor_are_as_recorded(tmp_path: Path) -> None:
    frames = [
        frame(i, captured_ns=10**12 + i * 3_000_000, pts_ns=10**12 + i * 3_000_000 - 700_000 * (i % 3))
        for i in range(12)
    ]
    with replay(record(tmp_path / "a.mcap", frames), "?speed=1") as source:
        assert source.live
        begun = time.monotonic_ns()
        back = list(source)
        now = time.monotonic_ns()
    assert back[-1].seq == 11, "the last frame is never dropped"
    assert now - begun >= 11 * 3_000_000, "not faster than it was"
    for f in back:
        sent = frames[f.seq]
        assert f.clock == "monotonic" and begun <= f.captured_ns <= now
        assert f.captured_ns - back[0].captured_ns == sent.captured_ns - frames[back[0].seq].captured_ns
        assert f.captured_ns - f.pts_ns == sent.captured_ns - sent.pts_ns
        assert same_pixels(f.pixels, sent.pixels)


def test_in_real_time_a_wait_is_bounded_and_nothing_is_lost_by_it(tmp_path: Path) -> None:
    frames = [frame(i, captured_ns=10**12 + i * 200_000_000) for i in range(2)]
    with replay(record(tmp_path / "a.mcap", frames), "?speed=1") as source:
        assert next(source).seq == 0
        timeouts = 0
        while True:
            try:
                f = source.read(0.01)
            except TimeoutError:
                timeouts += 1
                continue
            break
    assert f is not None and f.seq == 1 and timeouts >= 5


def test_in_real_time_frames_that_nobody_read_are_gone(tmp_path: Path) -> None:
    frames = [frame(i, captured_ns=10**12 + i * 20_000_000) for i in range(50)]
    with replay(record(tmp_path / "a.mcap", frames), "?speed=1") as source:
        assert next(source).seq == 0
        time.sleep(0.3)
        f = next(source)
        assert f.seq >= 14
    with replay(source._path) as source:
        next(source)
        time.sleep(0.1)
        assert next(source).seq == 1, "as fast as possible nothing is dropped"


def test_in_real_time_a_long_pause_is_cut(tmp_path: Path) -> None:
    frames = [frame(i, captured_ns=10**12 + (i > 1) * 3600 * 10**9 + i * 10_000_000) for i in range(4)]
    with replay(record(tmp_path / "a.mcap", frames), "?speed=1") as source:
        begun = time.monotonic()
        assert [f.seq for f in source][-1] == 3
    assert time.monotonic() - begun < 30, "an hour was recorded"


@pytest.mark.parametrize("speed", [0, 1])
def test_a_loop_goes_on_rising(tmp_path: Path, speed: int) -> None:
    frames = [
        frame(i + 5, captured_ns=10**12 + i * 2_000_000, epoch=i // 2, clock="media", pts_ns=i * 2_000_000)
        for i in range(4)
    ]
    with replay(record(tmp_path / "a.mcap", frames), f"?loop=1&speed={speed}", limit=10) as source:
        assert source.frames is None
        back = list(source)
    assert len(back) == 10
    assert all(
        a.seq < b.seq and a.pts_ns < b.pts_ns and a.epoch <= b.epoch for a, b in itertools.pairwise(back)
    )
    assert [f.epoch for f in back][:10:4] == [0, 2, 4] or speed, "state does not survive the seam"


# --- someone else's files ---


def foreign(path: Path, schema: str, encoding: str, datas: list[bytes], **options: Any) -> Path:
    with path.open("wb") as file:
        writer = Writer(file, **options)
        writer.start("ros2" if encoding == "cdr" else "")
        other = writer.register_channel("/imu", "json", writer.register_schema("Imu", "jsonschema", b"{}"))
        number = writer.register_schema(schema, "protobuf" if encoding == "protobuf" else "ros2msg", b"")
        channel = writer.register_channel("/cam/image_raw", encoding, number)
        for i, data in enumerate(datas):
            writer.add_message(other, 10**18 + i, b"{}", 10**18 + i)
            writer.add_message(channel, 10**18 + i * 40_000_000, data, 10**18 + i * 40_000_000)
        writer.finish()
    return path


def raw(ns: int, width: int, height: int, encoding: str, step: int, data: bytes) -> bytes:
    return foxglove.raw_image_head(ns, "x", width, height, encoding, step, len(data)) + data


@pytest.mark.parametrize("compression", list(CompressionType))
@pytest.mark.parametrize("chunked", [True, False])
def test_foxglove_files_by_other_writers(tmp_path: Path, compression: CompressionType, chunked: bool) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (3, 5, 20), np.uint8)
    datas = [raw(10**18 + i * 33_000_000, 6, 5, "bgr8", 20, r.tobytes()) for i, r in enumerate(rows)]
    path = foreign(
        tmp_path / "a.mcap",
        foxglove.RAW_IMAGE,
        "protobuf",
        datas,
        compression=compression,
        use_chunking=chunked,
        chunk_size=300,
    )
    with replay(path) as source:
        back = list(source)
    assert [(f.seq, f.pts_ns, f.clock, f.camera) for f in back] == [
        (i, i * 33_000_000, "media", "cam/image_raw") for i in range(3)
    ]
    assert all(np.array_equal(f.image, r[:, :18].reshape(5, 6, 3)) for f, r in zip(back, rows, strict=True))


def test_compressed_pictures_by_other_writers(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    data = cv2.imencode(".png", image)[1].tobytes()
    message = foxglove.compressed_image_head(5, "x", "png", len(data)) + data
    broken = foxglove.compressed_image_head(5, "x", "png", 60) + data[:60]
    with replay(
        foreign(tmp_path / "a.mcap", foxglove.COMPRESSED_IMAGE, "protobuf", [broken, message])
    ) as source:
        (back,) = list(source)
    assert np.array_equal(back.image, image) and back.seq == 1
    assert len(source.skipped) == 1 and "truncated" in source.skipped[0][1]


HEADER = """================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
IMAGE = "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data\n"


def test_ros2_bags(tmp_path: Path) -> None:
    ros2 = pytest.importorskip(
        "mcap_ros2.writer", reason="needs mcap-ros2-support, an independent CDR writer"
    )
    layouts = {
        "bgr8": "bgr",
        "rgb8": "rgb",
        "mono8": "grey",
        "yuv422_yuy2": "yuyv",
        "uyvy": "uyvy",
        "nv21": "nv21",
    }
    for encoding, format in layouts.items():
        path = tmp_path / f"{encoding}.mcap"
        pixels = noise(PixelLayout(format, 8, 6), 3)  # type: ignore[arg-type]
        data = b"".join(p.tobytes() for p in pixels.planes)
        writer = ros2.Writer(str(path))
        schema = writer.register_msgdef("sensor_msgs/msg/Image", IMAGE + HEADER)
        for i in range(3):
            header = {"stamp": {"sec": 1_700_000_000, "nanosec": i * 1000}, "frame_id": "abc"[:i]}
            message = {"header": header, "height": 6, "width": 8, "encoding": encoding, "is_bigendian": 0,
                       "step": pixels.planes[0][0].nbytes, "data": data}  # fmt: skip
            writer.write_message("/cam/image_raw", schema, message, log_time=i)
        writer.finish()
        with replay(path) as source:
            back = list(source)
        assert [f.pts_ns for f in back] == [0, 1000, 2000]
        assert all(same_pixels(f.pixels, pixels) for f in back), encoding


def test_ros2_compressed_pictures_of_either_byte_order(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    image = np.full((16, 16, 3), 99, np.uint8)
    data = cv2.imencode(".png", image)[1].tobytes()
    for order, mark in (("<", 1), (">", 0)):
        name, kind = b"cam\0", b"png\0"
        body = struct.pack(f"{order}iII4sI4sI", 7, 0, len(name), name, len(kind), kind, len(data)) + data
        path = foreign(
            tmp_path / f"{mark}.mcap",
            "sensor_msgs/msg/CompressedImage",
            "cdr",
            [bytes((0, mark, 0, 0)) + body],
        )
        with replay(path) as source:
            assert np.array_equal(next(source).image, image)


def test_what_cannot_be_shown_is_told_with_the_reason(tmp_path: Path) -> None:
    good = raw(1, 4, 2, "mono8", 4, bytes(8))
    cases = {
        "encoding '16UC1' is not taken": raw(1, 4, 2, "16UC1", 8, bytes(16)),
        "too short for 4x2 grey": raw(1, 4, 2, "mono8", 4, bytes(7)),
        "too large": raw(1, 2**31, 2**31, "mono8", 4, bytes(7)),
        "0x2 pixels": raw(1, 0, 2, "mono8", 4, bytes(7)),
        "needs an even width": raw(1, 3, 2, "yuyv", 6, bytes(12)),
        "message is cut short": good[:-1],
        "damaged": b"\xff" * 20,
    }
    for reason, message in cases.items():
        path = foreign(tmp_path / "a.mcap", foxglove.RAW_IMAGE, "protobuf", [message, good])
        with replay(path) as source:
            assert [f.seq for f in source] == [1]
        assert len(source.skipped) == 1 and reason in source.skipped[0][1], reason
        with pytest.raises(UsageError, match="holds no picture"):
            replay(foreign(path, foxglove.RAW_IMAGE, "protobuf", [message]))


# --- bad and hostile files ---


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("replay:", "no file"),
        ("replay:nowhere.mcap", "No such file"),
        ("replay:a.mcap?speed=2", "speed not usable, expected 0 or 1"),
        ("replay:a.mcap?sped=1", "Did you mean 'speed'"),
        ("replay:a.mcap?loop=1&loop=1", "given twice"),
        ("replay:.", "Is a directory"),
    ],
)
def test_wrong_uris_are_one_line(uri: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        open_source(uri)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for data in (b"", b"\x89MCAP0", b"not an mcap file at all"):
        (tmp_path / "a.mcap").write_bytes(data)
        with pytest.raises(UsageError, match="not an MCAP file"):
            replay(tmp_path / "a.mcap")


MAGIC = b"\x89MCAP0\r\n"


@given(data=st.binary(max_size=400))
@example(data=struct.pack("<BQ", 6, 2**63))
@example(data=struct.pack("<BQ", 6, 40) + struct.pack("<QQQIIQ", 0, 0, 2**60, 0, 0, 0))
@example(data=struct.pack("<BQ", 4, 40) + struct.pack("<HHI", 1, 1, 2**31) + bytes(32))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.mcap").write_bytes(MAGIC + data)
    with pytest.raises(UsageError) as error:
        replay(tmp_path / "a.mcap")
    assert "\n" not in str(error.value)


def peak_bytes(path: Path) -> tuple[int, list[str]]:
    """Most memory that Python held while the file was played, and what was left out."""
    tracemalloc.start()
    try:
        with replay(path) as source:
            assert len(list(source)) == 1
        return tracemalloc.get_traced_memory()[1], [reason for _, reason in source.skipped]
    finally:
        tracemalloc.stop()


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    lz4 = pytest.importorskip("lz4.frame")
    zeros = bytes(64 << 20)
    good = foreign(tmp_path / "a.mcap", foxglove.RAW_IMAGE, "protobuf", [raw(1, 4, 2, "mono8", 4, bytes(8))])
    begin, _, end = good.read_bytes().partition(struct.pack("<BQ", 15, 4))  # the end of its data
    for name, packed in ((b"zstd", zstandard.compress(zeros)), (b"lz4", lz4.compress(zeros))):
        for said in (1000, 2**40):
            head = struct.pack("<QQQII", 0, 0, said, 0, len(name)) + name + struct.pack("<Q", len(packed))
            chunk = struct.pack("<BQ", 6, len(head) + len(packed)) + head + packed
            good.write_bytes(MAGIC + chunk + begin[8:])
            peak, reasons = peak_bytes(good)
            assert peak < 8 << 20, "64 MiB were packed into it"
            assert any("left out" in reason for reason in reasons)
    good.write_bytes(begin + struct.pack("<BQ", 6, 1 << 29) + end)
    peak, reasons = peak_bytes(good)
    assert peak < 8 << 20 and any("ends inside a record" in reason for reason in reasons)


@given(
    values=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["seq", "layout", "width"]), inner)
        ),
        max_leaves=5,
    )
)
def test_facts_of_any_shape_are_checked(values: Any) -> None:
    good = Facts.of(frame(0), "raw").to_json()
    assert Facts.from_json(dumps(good)) == Facts.of(frame(0), "raw")
    for key in good:
        with contextlib.suppress(ValueError):
            Facts.from_json(dumps({**good, key: values}))
    with pytest.raises(ValueError, match=r"\w"):
        Facts.from_json(dumps({"seq": values}))
    with pytest.raises(ValueError, match=r"\w"):
        Facts.from_json(b"\xff{")
