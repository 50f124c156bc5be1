"""`.mcap`: a recording of frames, results and metrics that Foxglove and Rerun show and `replay:` plays."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import __version__
from edgekit.errors import OutputError, StreamError, UsageError, did_you_mean, printable
from edgekit.optional import load_cv2, quiet
from edgekit.runtime import foxglove
from edgekit.runtime.frames import Frame
from edgekit.runtime.mcap_file import load_mcap
from edgekit.runtime.mcap_writer import McapWriter, Piece
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.recording import CAMERA_KEY, FRAME, METRICS, RESULT, Facts, Images, dumps, to_raw
from edgekit.runtime.recording_rig import MOMENT
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import Sink, failure, make_parent
from edgekit.runtime.sinks.mcap_rig import Made, moment_messages, result_messages
from edgekit.runtime.sinks.rigs import rig_of

SMALL_BYTES = 1 << 18
"""A picture up to this size is copied, to share a chunk with others; a larger one is written from where it lies."""
METRICS_SECONDS = 1.0
_RECENT = 64
"""Newest frames that are remembered, so that a frame which several engines saw is written once."""
_JSON_SCHEMAS: dict[str, dict[str, str]] = {
    FRAME: {"seq": "integer", "pts_ns": "integer", "captured_ns": "integer", "clock": "string", "epoch": "integer",
            "exposure": "string", "corrupt": "boolean", "camera": "string", "source": "string", "layout": "object",
            "picture": "string"},
    RESULT: {"seq": "integer", "pts_ns": "integer", "epoch": "integer", "camera": "string", "engine": "string",
             "age_ms": "number", "stage_ms": "object", "unaccounted_ms": "number", "hops": "array", "task": "string",
             "count": "integer", "result": "object"},
    MOMENT: {"rig": "object", "taken_ns": "integer", "index": "integer", "pose": "array", "points": "integer",
             "shots": "object"},
    METRICS: {"seconds": "number", "cameras": "object", "engines": "object", "sinks": "object", "events": "array",
              "event_count": "integer"},
}  # fmt: skip


class McapSink(Sink):
    """Records into `path`; an existing file is never overwritten: `name_0002.mcap` and on are taken instead.

    images: `raw` the camera's own bytes, so that a replay gives the same results bit for bit; `jpeg`
        (`quality` 1..100) about a tenth of that, and other pixels; `none` results and metrics only.
    split_bytes: begin the next numbered file at this size; 0 never.

    The file is readable at any moment up to the last whole chunk; at most about a second is lost when
    the power fails (see McapWriter). A large picture is written from the camera's buffer without a copy in this
    process; `copied_bytes` counts what was copied all the same. Recorded are the frames that the sink
    was given: a stream that drops results here leaves gaps in `seq`.

    Raises: UsageError for unusable options; MissingExtraError without the package `mcap`.
    """

    def __init__(
        self, path: Path, *, images: Images = "raw", quality: int = 90, split_bytes: int = 0
    ) -> None:
        super().__init__(Path(path))
        if images not in ("raw", "jpeg", "none"):
            raise UsageError(f"sink {printable(path)}: images {images!r}, expected raw, jpeg or none")
        if not 1 <= quality <= 100 or split_bytes < 0:
            raise UsageError(
                f"sink {printable(path)}: expected quality 1 to 100 and split_bytes from 0, "
                f"got {quality} and {split_bytes}"
            )
        load_mcap("record")
        make_parent(self.path)
        self.images: Images = images
        self.needs_pixels = images != "none"
        self.copied_bytes = 0
        """Picture bytes copied in this process so far, all frames together."""
        self.paths: list[Path] = []
        """The files, in order."""
        self._first = self.path
        self._quality = quality
        self._split = split_bytes
        self._file: McapWriter | None = None
        self._metrics: Metrics | None = None
        self._metrics_at = 0.0
        self._schemas: dict[str, int] = {}
        self._channels: dict[tuple[str, str, str], int] = {}
        self._sequence = 0
        self._seen: dict[str, deque[tuple[int, int, int]]] = {}
        self._media: dict[str, tuple[int, int]] = {}
        self._borrowed = False
        self._wall_ns = time.time_ns() - time.monotonic_ns()

    def start(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def _write(self, item: StreamResult) -> None:
        try:
            self._record(item)
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> OutputError:
        return failure(self.path, error)

    def _record(self, item: StreamResult) -> None:
        frame = item.frame
        try:
            result = dumps(_result_json(item))
        except ValueError:
            raise StreamError(
                f"sink {printable(self.path)}: frame {frame.seq} has a box or score that is not a finite number. "
                "Check the engine with 'edgekit verify'"
            ) from None
        prefix = f"/{frame.camera or 'camera'}"
        sensor_ns = self._sensor_ns(frame)
        fusion = item.result.task == "fusion"
        rig = rig_of(item)
        if self._file is not None and self._split and self._file.size >= self._split:
            self._end_file()
        if self._file is None:
            self._file = self._open()
        file = self._file
        log_ns = frame.captured_ns + self._wall_ns
        key = (frame.epoch, frame.seq, frame.captured_ns)
        seen = self._seen.setdefault(frame.camera, deque(maxlen=_RECENT))
        try:
            if key not in seen:
                seen.append(key)
                self._sequence += 1
                # the pictures of a rig are recorded one by one
                facts = dumps(Facts.of(frame, "none" if fusion and rig is None else self.images).to_json())
                channel = self._channel(f"{prefix}/frame", FRAME, frame.camera)
                file.add(channel, self._sequence, log_ns, sensor_ns, [facts])
                if rig is not None:
                    seen_by = moment_messages(rig, sensor_ns, self.images, self._jpeg)
                    self._write_made(file, prefix, seen_by, log_ns, frame.camera)
                elif self.images != "none" and not fusion:
                    name, pieces = self._picture(frame, sensor_ns)
                    channel = self._channel(f"{prefix}/image", name, frame.camera)
                    file.add(channel, self._sequence, log_ns, sensor_ns, pieces)
            engine = f"{item.engine}/" if item.engine else ""
            done_ns = frame.taken_ns + item.age_ns + self._wall_ns
            channel = self._channel(f"{prefix}/{engine}result", RESULT, frame.camera)
            file.add(channel, self._sequence, done_ns, sensor_ns, [result])
            if fusion:
                said = result_messages(item.result, rig, engine, sensor_ns)
                self._write_made(file, prefix, said, done_ns, frame.camera)
            else:
                channel = self._channel(
                    f"{prefix}/{engine}annotations", foxglove.IMAGE_ANNOTATIONS, frame.camera
                )
                file.add(channel, self._sequence, done_ns, sensor_ns, [_annotations(item.result, sensor_ns)])
            self._write_metrics(file)
        finally:
            if self._borrowed:
                self._borrowed = False
                file.flush()  # the planes go back to the camera

    def _write_made(
        self, file: McapWriter, prefix: str, made: Iterable[Made], log_ns: int, camera: str
    ) -> None:
        for each in made:
            channel = self._channel(f"{prefix}/{each.topic}", each.schema, camera if each.replays else None)
            file.add(channel, self._sequence, log_ns, each.ns, each.pieces)
            self.copied_bytes += each.copied

    def _sensor_ns(self, frame: Frame) -> int:
        """When the picture was taken, in the wall clock of this machine; media time counts from the first frame."""
        if frame.clock != "media":
            return frame.taken_ns + self._wall_ns
        epoch, base = self._media.get(frame.camera, (-1, 0))
        if epoch != frame.epoch:
            base = frame.captured_ns + self._wall_ns - frame.pts_ns
            self._media[frame.camera] = (frame.epoch, base)
        return base + frame.pts_ns

    def _picture(self, frame: Frame, ns: int) -> tuple[str, list[Piece]]:
        """(schema, message in pieces); `_borrowed` where these view the frame's planes."""
        name = frame.camera or "camera"
        if self.images == "jpeg":
            data = self._jpeg(frame.image)
            head = foxglove.compressed_image_head(ns, name, "jpeg", len(data))
            return foxglove.COMPRESSED_IMAGE, [head, data]
        encoding, step, planes, copied = to_raw(frame.pixels)
        nbytes = sum(map(len, planes))
        head = foxglove.raw_image_head(ns, name, frame.width, frame.height, encoding, step, nbytes)
        self.copied_bytes += copied
        if nbytes > SMALL_BYTES:
            self._borrowed = True
            return foxglove.RAW_IMAGE, [head, *planes]
        self.copied_bytes += nbytes
        return foxglove.RAW_IMAGE, [head, *map(bytes, planes)]

    def _jpeg(self, image: np.ndarray) -> bytes:
        cv2 = load_cv2("record JPEG pictures")
        with quiet(cv2):
            try:
                ok, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self._quality])
            except cv2.error:
                ok = False
        if not ok:
            raise OutputError(
                f"sink {printable(self.path)}: {image.shape[1]}x{image.shape[0]} pixels cannot be stored as JPEG. "
                "Record raw pictures"
            )
        return bytes(data.tobytes())

    def _write_metrics(self, file: McapWriter) -> None:
        now = time.monotonic()
        if self._metrics is None or now - self._metrics_at < METRICS_SECONDS:
            return
        self._metrics_at = now
        ns = time.monotonic_ns() + self._wall_ns
        file.add(self._channel("/metrics", METRICS, None), 0, ns, ns, [dumps(self._metrics.snapshot())])

    def _channel(self, topic: str, schema: str, camera: str | None) -> int:
        """camera: whose frames these are; None for what is none's, as the metrics and the sensors of a rig."""
        assert self._file is not None
        known = self._channels.get((topic, schema, camera or ""))
        if known is not None:
            return known
        ours = schema in _JSON_SCHEMAS
        if schema not in self._schemas:
            data = dumps(_json_schema(schema)) if ours else foxglove.descriptor_set(schema)
            encoding = "jsonschema" if ours else "protobuf"
            self._schemas[schema] = self._file.schema(schema, encoding, data)
        metadata = {} if camera is None else {CAMERA_KEY: camera}
        number = self._file.channel(topic, "json" if ours else "protobuf", self._schemas[schema], metadata)
        self._channels[topic, schema, camera or ""] = number
        return number

    def _open(self) -> McapWriter:
        about = {
            "version": __version__,
            "images": self.images,
            "bit_exact": "true" if self.images == "raw" else "false",
            "wall_minus_monotonic_ns": str(self._wall_ns),
        }
        number = len(self.paths)
        while True:
            number += 1
            path = self._first
            if number > 1:
                path = path.with_name(f"{path.stem}_{number:04d}{path.suffix}")
            try:
                file = McapWriter(path, f"edgekit {__version__}", {"edgekit": about})
            except FileExistsError:
                continue
            self.path = path
            self.paths.append(path)
            self._schemas, self._channels = {}, {}
            return file

    def _end_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.finish()

    def _finish(self) -> None:
        try:
            if self._file is None and not self.paths:
                self._file = self._open()  # no frame came: an empty recording says so
            elif self._file is not None and self._metrics is not None:
                self._metrics_at = 0.0
                self._write_metrics(self._file)
            self._end_file()
        except OSError as error:
            raise self._failure(error) from None

    def _drop(self) -> None:
        """What was recorded is worth most when something failed: the file is finished all the same."""
        self._end_file()


def open_recording(text: str) -> McapSink:
    """`FILE.mcap?images=raw|jpeg|none&quality=90&split=4GB` (split in bytes, kB, MB or GB). Raises: UsageError."""
    name, _, tail = text.partition("?")
    options: dict[str, Any] = {}
    for part in filter(None, tail.split("&")):
        key, _, value = part.partition("=")
        if key not in ("images", "quality", "split"):
            raise UsageError(
                f"sink {printable(text)}: unknown key {key!r}. {did_you_mean(key, ('images', 'quality', 'split'))}"
            )
        size = re.fullmatch(r"([0-9]{1,12})(kB|MB|GB|)", value)
        if key == "images":
            options[key] = value
        elif size is None or (key == "quality" and size[2]):
            raise UsageError(f"sink {printable(text)}: {key} is not a number, got {value[:40]!r}")
        elif key == "quality":
            options[key] = int(size[1])
        else:
            options["split_bytes"] = int(size[1]) * {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}[size[2]]
    return McapSink(Path(name), **options)


def _result_json(item: StreamResult) -> dict[str, Any]:
    return {
        "seq": item.frame.seq,
        "pts_ns": item.frame.pts_ns,
        "epoch": item.frame.epoch,
        "camera": item.frame.camera,
        "engine": item.engine,
        "age_ms": item.age_ns / 1e6,
        "stage_ms": {name: ns / 1e6 for name, ns in item.stage_ns.items()},
        "unaccounted_ms": item.unaccounted_ns / 1e6,
        "hops": [vars(hop) for hop in item.hops],
        "task": item.result.task,
        "count": len(item.result),
        "result": item.result.to_json(),
    }


def _annotations(result: Any, ns: int) -> bytes:
    """What Foxglove draws on the picture: boxes where the result has some, else its caption."""
    if not hasattr(result, "boxes"):
        return foxglove.image_annotations(ns, (), [result.caption()])
    from edgekit.tasks.detect.draw import class_color, ink_color

    boxes = []
    for box, score, cls, label in result:
        ground = class_color(cls)
        x1, y1, x2, y2 = (float(v) for v in box)
        boxes.append(
            (
                (x1, y1, x2, y2),
                foxglove.rgba(ground),
                foxglove.rgba(ink_color(ground)),
                f"{label} {score:.2f}",
            )
        )
    return foxglove.image_annotations(ns, boxes)


def _json_schema(name: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in _JSON_SCHEMAS[name].items()}
    return {"title": name, "type": "object", "properties": properties}
