"""The .mcap sink: what it writes, for whom else it is readable, and what is left when power or disk fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("mcap", reason="needs the package mcap (edgekit[mcap])")
from mcap.reader import make_reader

from edgekit.errors import MissingExtraError, OutputError, StreamError, UsageError
from edgekit.pixels import PixelLayout, Pixels
from edgekit.runtime import foxglove, mcap_writer
from edgekit.runtime.frames import Frame, Hop
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import open_sink
from edgekit.runtime.sinks.mcap import SMALL_BYTES, McapSink, open_recording
from edgekit.tasks.classify.classification import Classification
from edgekit.tasks.detect.detections import Detections
from tests.helpers import ROOT
from tests.recordings import FOUND, START_NS, frame, noise, played, record, replay, same_pixels

LARGE = PixelLayout("yuyv", 640, 240)


def messages(path: Path) -> list[tuple[str, str, Any]]:
    """(topic, schema, message) of every message, as the format's own reader gives them, checksums checked."""
    with path.open("rb") as file:
        found = make_reader(file, validate_crcs=True).iter_messages(log_time_order=False)
        return [(channel.topic, schema.name if schema else "", message) for schema, channel, message in found]


def of_topic(path: Path, topic: str) -> list[Any]:
    return [message for name, _, message in messages(path) if name == topic]


# --- what is in the file ---


def test_the_formats_own_reader_reads_it_and_its_summary(tmp_path: Path) -> None:
    path = record(tmp_path / "a.mcap", [frame(i, camera="front") for i in range(5)])
    with path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True)
        summary = reader.get_summary()
        assert summary is not None and summary.statistics is not None
        topics = {
            c.topic: (c.message_encoding, summary.schemas[c.schema_id].name)
            for c in summary.channels.values()
        }
        (about,) = reader.iter_metadata()
        by_time = [m.log_time for _, _, m in reader.iter_messages(topics=["/front/image"])]
    assert topics == {
        "/front/frame": ("json", "edgekit.Frame"),
        "/front/image": ("protobuf", "foxglove.RawImage"),
        "/front/result": ("json", "edgekit.Result"),
        "/front/annotations": ("protobuf", "foxglove.ImageAnnotations"),
    }
    assert summary.statistics.message_count == len(messages(path)) == 20
    assert sum(len(index.message_index_offsets) > 0 for index in summary.chunk_indexes) == len(
        summary.chunk_indexes
    )
    assert about.name == "edgekit" and about.metadata["bit_exact"] == "true"
    assert np.diff(by_time).tolist() == [40_000_000] * 4, "the log time is the arrival"


def test_times_are_the_wall_clock_of_arrival_and_of_the_sensor(tmp_path: Path) -> None:
    now = time.monotonic_ns()
    f = frame(0, captured_ns=now, pts_ns=now - 6_000_000)
    path = record(tmp_path / "a.mcap", [f])
    (image,), (result,) = of_topic(path, "/camera/image"), of_topic(path, "/camera/result")
    assert abs(image.log_time - time.time_ns()) < 60e9, "a viewer shows the time of day"
    assert image.log_time - image.publish_time == 6_000_000
    assert result.log_time - result.publish_time == 9_000_000, "logged when it was there: at its age"


def test_media_time_counts_from_the_first_frame_of_each_epoch(tmp_path: Path) -> None:
    frames = [frame(i, clock="media", pts_ns=i * 20_000_000, epoch=i // 3) for i in range(5)]
    images = of_topic(record(tmp_path / "a.mcap", frames), "/camera/image")
    late = [(m.log_time - m.publish_time) // 10**6 for m in images]
    assert late == [0, 20, 40, 0, 20], (
        "the sensor's own intervals, anchored at the arrival of the first frame"
    )


def test_pictures_decode_with_foxgloves_own_classes(tmp_path: Path) -> None:
    pytest.importorskip(
        "foxglove_schemas_protobuf", reason="needs foxglove-schemas-protobuf, Foxglove's own messages"
    )
    from foxglove_schemas_protobuf.ImageAnnotations_pb2 import ImageAnnotations
    from foxglove_schemas_protobuf.RawImage_pb2 import RawImage

    f = frame(3, LARGE, camera="front")
    path = record(tmp_path / "a.mcap", [f])
    (message,) = of_topic(path, "/front/image")
    image = RawImage.FromString(message.data)
    assert (image.width, image.height, image.encoding, image.step) == (640, 240, "yuyv", 1280)
    assert image.frame_id == "front" and image.data == f.pixels.planes[0].tobytes()
    assert image.timestamp.seconds * 10**9 + image.timestamp.nanos == message.publish_time
    (message,) = of_topic(path, "/front/annotations")
    drawn = ImageAnnotations.FromString(message.data)
    assert [t.text for t in drawn.texts] == ["dog 0.90", "car 0.30"]
    assert [(p.x, p.y) for p in drawn.points[0].points] == [(10, 20), (60, 20), (60, 70), (10, 70)]
    assert drawn.points[0].type == drawn.points[0].LINE_LOOP and drawn.points[0].outline_color.a == 1
    assert drawn.timestamp == image.timestamp, "Foxglove pairs them by it"


def test_schemas_are_a_subset_of_foxgloves(tmp_path: Path) -> None:
    pytest.importorskip(
        "foxglove_schemas_protobuf", reason="needs foxglove-schemas-protobuf, Foxglove's own messages"
    )
    import foxglove_schemas_protobuf.CameraCalibration_pb2
    import foxglove_schemas_protobuf.CompressedImage_pb2
    import foxglove_schemas_protobuf.FrameTransforms_pb2
    import foxglove_schemas_protobuf.ImageAnnotations_pb2
    import foxglove_schemas_protobuf.PointCloud_pb2
    import foxglove_schemas_protobuf.RawImage_pb2
    import foxglove_schemas_protobuf.SceneUpdate_pb2  # noqa: F401
    from google.protobuf import descriptor_pool
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    checked = 0
    files = [
        file
        for schema in (foxglove.RAW_IMAGE, foxglove.SCENE_UPDATE)
        for file in FileDescriptorSet.FromString(foxglove.descriptor_set(schema)).file
    ]
    assert "SceneUpdate" in [message.name for message in files[-1].message_type]
    for file in files:
        for message in file.message_type:
            theirs = descriptor_pool.Default().FindMessageTypeByName(f"{file.package}.{message.name}")
            for ours in message.field:
                field = theirs.fields_by_name[ours.name]
                assert (field.number, field.type, field.is_repeated) == (
                    ours.number,
                    ours.type,
                    ours.label == 3,
                )
                kind = field.message_type or field.enum_type
                assert ours.type_name == (f".{kind.full_name}" if kind else "")
                checked += 1
            for enum in message.enum_type:
                theirs_by_name = theirs.enum_types_by_name[enum.name].values_by_name
                assert all(theirs_by_name[v.name].number == v.number for v in enum.value)
    assert checked > 70


def test_a_generic_reader_decodes_it_by_the_schemas_in_the_file(tmp_path: Path) -> None:
    support = pytest.importorskip("mcap_protobuf.decoder", reason="needs mcap-protobuf-support")
    path = record(tmp_path / "a.mcap", [frame(0)])
    with path.open("rb") as file:
        reader = make_reader(file, decoder_factories=[support.DecoderFactory()])
        decoded = [
            d.decoded_message
            for d in reader.iter_decoded_messages(topics=["/camera/image", "/camera/annotations"])
        ]
    image = next(d for d in decoded if d.DESCRIPTOR.full_name == "foxglove.RawImage")
    drawn = next(d for d in decoded if d.DESCRIPTOR.full_name == "foxglove.ImageAnnotations")
    assert image.encoding == "yuyv" and len(drawn.points) == 2


def test_results_hold_the_whole_of_the_result(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    hops = (Hop("read", "DMA", copied=7), Hop("preprocess", "CPU", written=9))
    with McapSink(path) as sink:
        sink.write(
            StreamResult(frame(4, epoch=2, camera="c"), FOUND, 9_000_000, {"engine": 2_500_000}, "yolo", hops)
        )
    (message,) = of_topic(path, "/c/yolo/result")
    assert json.loads(message.data) == {
        "seq": 4, "pts_ns": START_NS + 160_000_000, "epoch": 2, "camera": "c", "engine": "yolo",
        "age_ms": 9.0, "stage_ms": {"engine": 2.5}, "unaccounted_ms": 6.5,
        "hops": [{"name": "read", "by": "DMA", "copied": 7, "written": 0},
                 {"name": "preprocess", "by": "CPU", "copied": 0, "written": 9}],
        "task": "detect", "count": 2, "result": FOUND.to_json(),
    }  # fmt: skip


def test_a_classification_is_shown_as_text(tmp_path: Path) -> None:
    result = Classification(
        np.array([1], np.int32), np.array([0.5], np.float32), np.array([0.5, 0.5], np.float32), ("a", "bee")
    )
    with McapSink(tmp_path / "a.mcap") as sink:
        sink.write(StreamResult(frame(0), result, 1))
    (message,) = of_topic(tmp_path / "a.mcap", "/camera/annotations")
    assert b"bee" in message.data


def test_a_frame_that_several_engines_saw_is_stored_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    frames = [frame(i) for i in range(6)]
    with McapSink(path) as sink:
        for engine, seen in (
            ("fast", 0),
            ("fast", 1),
            ("slow", 0),
            ("fast", 3),
            ("slow", 2),
            ("fast", 4),
            ("slow", 3),
        ):
            sink.write(StreamResult(frames[seen], FOUND, 1, {}, engine))
    assert len(of_topic(path, "/camera/image")) == 5
    assert len(of_topic(path, "/camera/slow/result")) == 3
    with replay(path) as source:
        assert [f.seq for f in source] == [0, 1, 2, 3, 4], "a replay has them in order of arrival"


def test_metrics_are_recorded_with_the_time(tmp_path: Path) -> None:
    metrics = Metrics()
    with McapSink(tmp_path / "a.mcap") as sink:
        sink.start(metrics)
        for i in range(3):
            f = frame(i)
            metrics.frame("camera", f)
            sink.write(StreamResult(f, FOUND, 1))
    snapshots = [json.loads(m.data) for m in of_topic(tmp_path / "a.mcap", "/metrics")]
    assert [s["cameras"]["camera"]["frames"] for s in snapshots] == [1, 3], (
        "the first, then by the second; the last at the end"
    )


def test_jpeg_pictures_say_that_they_are_not_the_same(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV")
    flat = Pixels.bgr(np.full((48, 64, 3), (30, 160, 90), np.uint8))
    path = record(tmp_path / "a.mcap", [Frame(flat, 7, 1, 2, "x")], images="jpeg")
    with path.open("rb") as file:
        (about,) = make_reader(file).iter_metadata()
    assert (about.metadata["images"], about.metadata["bit_exact"]) == ("jpeg", "false")
    assert messages(path)[1][1] == "foxglove.CompressedImage"
    with replay(path) as source:
        (back,) = list(source)
    assert back.seq == 7 and np.abs(back.image.astype(int) - flat.planes[0]).max() < 8


def test_without_pictures_no_buffer_is_held_and_a_replay_says_why_not(tmp_path: Path) -> None:
    sink = McapSink(tmp_path / "a.mcap", images="none")
    assert not sink.needs_pixels
    with sink:
        sink.write(StreamResult(frame(0), FOUND, 1))
    assert [name for _, name, _ in messages(sink.path)] == [
        "edgekit.Frame",
        "edgekit.Result",
        "foxglove.ImageAnnotations",
    ]
    with pytest.raises(UsageError, match="holds no picture"):
        replay(sink.path)


# --- files ---


def test_a_recording_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    first = record(path, [frame(0)])
    before = first.read_bytes()
    second = record(path, [frame(1)])
    assert (first, second) == (path, tmp_path / "a_0002.mcap")
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="expected raw, jpeg or none"):
        McapSink(path, images="png")  # type: ignore[arg-type]


def test_long_recordings_are_split(tmp_path: Path) -> None:
    with McapSink(tmp_path / "a.mcap", split_bytes=600_000) as sink:
        for i in range(6):
            sink.write(StreamResult(frame(i, LARGE), FOUND, 1))
    assert [p.name for p in sink.paths] == ["a.mcap", "a_0002.mcap", "a_0003.mcap"]
    seqs = [[f.seq for f in played(path)] for path in sink.paths]
    assert seqs == [[0, 1], [2, 3], [4, 5]]


def test_options_in_the_name(tmp_path: Path) -> None:
    with open_recording(f"{tmp_path}/a.mcap?images=none&quality=80&split=2MB") as sink:
        assert (sink.images, sink._quality, sink._split) == ("none", 80, 2_000_000)
        assert sink.path == tmp_path / "a.mcap"
    for tail, reason in {
        "image=raw": "Did you mean 'images'",
        "split=1TB": "split is not a number",
        "quality=9GB": "quality is not a number",
        "quality=0": "expected quality 1 to 100",
        "images=png": "expected raw, jpeg or none",
    }.items():
        with pytest.raises(UsageError, match=reason):
            open_recording(f"{tmp_path}/b.mcap?{tail}")


def test_an_empty_recording_is_whole(tmp_path: Path) -> None:
    with open_sink(tmp_path / "a.mcap"):
        pass
    assert messages(tmp_path / "a.mcap") == []
    with pytest.raises(UsageError, match="holds no picture"):
        replay(tmp_path / "a.mcap")


def test_what_was_recorded_before_an_error_is_kept_whole(tmp_path: Path) -> None:
    def work() -> None:
        with McapSink(tmp_path / "a.mcap") as sink:
            sink.write(StreamResult(frame(0), FOUND, 1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    with replay(tmp_path / "a.mcap") as source:
        assert len(list(source)) == 1 and source.skipped == []


def test_a_result_that_is_no_number_is_one_line_and_spoils_nothing(tmp_path: Path) -> None:
    broken = Detections(np.full((1, 4), np.nan, np.float32), np.ones(1, np.float32), np.zeros(1, np.int32))
    with McapSink(tmp_path / "a.mcap") as sink:
        with pytest.raises(StreamError, match="not a finite number"):
            sink.write(StreamResult(frame(0), broken, 1))
        sink.write(StreamResult(frame(1), FOUND, 1))
    assert [f.seq for f in played(tmp_path / "a.mcap")] == [1]


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = record(tmp_path / "a.mcap", [frame(0)])
    monkeypatch.setitem(sys.modules, "mcap.records", None)
    for work in (McapSink, replay):
        with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[mcap\]'"):
            work(path)


def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    with McapSink(tmp_path / "a.mcap") as sink:
        tracemalloc.start()
        try:
            f = frame(0, LARGE)
            for i in range(150):
                f.seq, f.captured_ns = i, f.captured_ns + 1
                sink.write(StreamResult(f, FOUND, 1))
                if i == 10:
                    before = tracemalloc.get_traced_memory()[0]
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert grown < 140 * 400, "only the index and what was seen lately: one picture has 300 KiB"


# --- copies and leases ---


@pytest.mark.parametrize("format", ["yuyv", "nv12", "bgr", "grey"])
def test_large_pictures_are_written_from_the_cameras_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    written: list[tuple[int, int]] = []
    writev = os.writev

    def spy(fd: int, buffers: list[memoryview]) -> int:
        written.extend(
            (int(np.frombuffer(b, np.uint8).__array_interface__["data"][0]), len(b)) for b in buffers
        )
        return writev(fd, buffers)

    f = frame(0, PixelLayout(format, 800, 600))
    with McapSink(tmp_path / "a.mcap") as sink:
        monkeypatch.setattr(os, "writev", spy)
        sink.write(StreamResult(f, FOUND, 1))
        monkeypatch.setattr(os, "writev", writev)
    planes = list(zip(f.pixels.addresses, [p.nbytes for p in f.pixels.planes], strict=True))
    assert [entry for entry in written if entry in planes] == planes, (
        "the system was given the planes themselves"
    )
    assert sink.copied_bytes == 0


def test_copies_that_are_made_are_counted(tmp_path: Path) -> None:
    padded = PixelLayout("bgr", 400, 300)
    for layout, strides, copied in (
        (PixelLayout("yuyv", 64, 48), (), 64 * 48 * 2),  # small: shares a chunk
        (padded, (1280,), padded.nbytes),  # rows apart
        (PixelLayout("i420", 800, 600), (), 800 * 600 // 2),  # its chroma is stored as nv12
        (PixelLayout("nv21", 800, 600), (), 800 * 600 // 2),
    ):
        with McapSink(tmp_path / f"{layout.format}{layout.width}.mcap") as sink:
            sink.write(StreamResult(Frame(noise(layout, 1, strides), 0, 0, 0, "x"), FOUND, 1))
        assert sink.copied_bytes == copied, layout


def test_the_buffer_may_be_overwritten_as_soon_as_write_returns(tmp_path: Path) -> None:
    for layout in (PixelLayout("yuyv", 64, 48), LARGE, PixelLayout("i420", 800, 600)):
        path = tmp_path / f"{layout.width}.mcap"
        f = frame(0, layout)
        kept = f.pixels.copy()
        with McapSink(path) as sink:
            sink.write(StreamResult(f, FOUND, 1))
            for plane in f.pixels.planes:
                plane[...] = 0
        with replay(path) as source:
            assert same_pixels(next(source).pixels, kept)


# --- power and disk ---


@pytest.fixture(scope="module")
def long_recording(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Frame], list[int]]:
    """A recording of eight large frames, the frames, and where each one's chunk ends."""
    path = tmp_path_factory.mktemp("recording") / "a.mcap"
    frames = [frame(i, PixelLayout("yuyv", 512, 257)) for i in range(8)]
    assert frames[0].pixels.layout.nbytes > SMALL_BYTES
    record(path, frames)
    with path.open("rb") as file:
        summary = make_reader(file).get_summary()
    assert summary is not None
    ends = [index.chunk_start_offset + index.chunk_length for index in summary.chunk_indexes]
    assert len(ends) == 8
    return path.read_bytes(), frames, ends


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_ends_anywhere_is_read_up_to_its_last_whole_chunk(
    tmp_path: Path, long_recording: tuple[bytes, list[Frame], list[int]], data: st.DataObject
) -> None:
    whole, frames, ends = long_recording
    near = st.sampled_from(ends).flatmap(
        lambda end: st.integers(max(0, end - 60), min(len(whole) - 1, end + 60))
    )
    cut = data.draw(st.one_of(st.integers(0, len(whole) - 1), near))
    path = tmp_path / "cut.mcap"
    path.write_bytes(whole[:cut])
    expected = sum(end <= cut for end in ends)
    if expected == 0:
        with pytest.raises(UsageError) as error:
            replay(path)
        assert "\n" not in str(error.value)
        return
    with replay(path) as source:
        back = list(source)
    assert [f.seq for f in back] == list(range(expected))
    assert all(same_pixels(f.pixels, g.pixels) for f, g in zip(back, frames, strict=False))
    data_end = ends[-1] + 300  # message indexes of the last chunk
    if cut < ends[-1]:
        assert len(source.skipped) == 1 and "power lost" in source.skipped[0][1], (
            "it says that something is missing"
        )
    elif cut > data_end:
        assert source.skipped == []


@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), count=st.integers(1, 4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_never_give_a_wrong_picture(
    tmp_path: Path, long_recording: tuple[bytes, list[Frame], list[int]], at: float, value: int, count: int
) -> None:
    whole, frames, _ = long_recording
    damaged = bytearray(whole)
    for i in range(count):
        damaged[int(at * len(whole) * (i + 1) / count) % len(whole)] ^= value
    path = tmp_path / "damaged.mcap"
    path.write_bytes(damaged)
    try:
        with replay(path) as source:
            back = list(source)
    except UsageError:
        return
    for f in back:
        assert same_pixels(f.pixels, frames[f.seq].pixels), "a checksum stands before every picture"


FILL = """
import resource, sys
from pathlib import Path
from edgekit.errors import OutputError
from edgekit.pixels import PixelLayout
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import open_sink
from tests.recordings import FOUND, frame
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
sink = open_sink(sys.argv[1])
written = 0
try:
    with sink:
        for i in range(20):
            sink.write(StreamResult(frame(i, PixelLayout("yuyv", 512, 257)), FOUND, 1))
            written += 1
except OutputError as error:
    print(written)
    print(error)
"""


@pytest.mark.parametrize("limit", [1_000_000, 263_000, 800_123])  # room for a summary, no frame, no summary
def test_a_full_disk_is_one_line_and_the_file_stays_readable(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.mcap"
    out = subprocess.run(
        [sys.executable, "-c", FILL, str(path), str(limit)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    written, error = out.stdout.splitlines()
    assert error == f"sink {path}: File too large. Free some space or write elsewhere"
    assert int(written) >= 1 or limit < 264_000
    if int(written):
        with replay(path) as source:
            assert [f.seq for f in source] == list(range(int(written)))
        told = [reason for _, reason in source.skipped]
        if limit == 1_000_000:
            assert told == [], "the part that did not fit is gone, and the summary found room"
            assert len(of_topic(path, "/camera/image")) == int(written)
        else:
            assert len(told) == 1 and "has no end" in told[0], "what is there ends behind a whole record"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Choose another path"):
        McapSink(tmp_path / "file" / "a.mcap")


KILLED = """
import sys, time
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import open_sink
from tests.recordings import FOUND, frame
sink = open_sink(sys.argv[1])
for i in range(3):
    sink.write(StreamResult(frame(i), FOUND, 1))
print("written", flush=True)
time.sleep(60)
"""


def test_small_frames_reach_the_disk_by_themselves_and_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "written\n"
        deadline = time.monotonic() + 30
        while path.stat().st_size < 10_000 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
    with replay(path) as source:
        assert [f.seq for f in source] == [0, 1, 2]
    assert "power lost" in source.skipped[0][1]


def test_the_disk_is_synced_while_recording_and_no_thread_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()
    fdatasync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (fdatasync(fd), synced.set()))
    monkeypatch.setattr(mcap_writer, "CHUNK_SECONDS", 0.02)
    before = threading.active_count()
    with McapSink(tmp_path / "a.mcap") as sink:
        sink.write(StreamResult(frame(0), FOUND, 1))
        assert synced.wait(30)
    assert threading.active_count() == before


def test_a_disk_that_fails_while_nothing_is_written_is_told_at_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(fd: int) -> None:
        failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mcap_writer, "CHUNK_SECONDS", 0.02)
    monkeypatch.setattr(os, "fdatasync", fail)
    sink = McapSink(tmp_path / "a.mcap")
    sink.write(StreamResult(frame(0), FOUND, 1))
    assert failed.wait(30)

    def write_on() -> None:
        for i in range(200):
            sink.write(StreamResult(frame(i, LARGE), FOUND, 1))
            time.sleep(0.01)

    with pytest.raises(OutputError, match="Input/output error"):
        write_on()
    sink.abort()
