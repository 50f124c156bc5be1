"""`replay:FILE.mcap`: a recording as a source, ours or someone else's."""

from __future__ import annotations

import heapq
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgekit.errors import UsageError, did_you_mean, printable
from edgekit.picture import decode_picture
from edgekit.pixels import Pixels
from edgekit.rig import Rig, mosaic
from edgekit.runtime import foxglove
from edgekit.runtime.frames import Clock, Frame, Hop
from edgekit.runtime.mcap_reader import McapReader, Message, Topic
from edgekit.runtime.recording import CAMERA_KEY, FRAME, RESULT, Facts, from_raw
from edgekit.runtime.recording_rig import MAX_CAMERAS, MOMENT, Moment, read_points
from edgekit.runtime.sources import ros2
from edgekit.runtime.sources.base import Source
from edgekit.runtime.sources.ros2 import Picture

KEYS = ("speed", "camera", "loop")
_WINDOW = 4
"""Frames that are put in order of their arrival: several engines finish the frames of a camera out of turn."""
_PAUSE_NS, _LONGEST_NS = 500_000_000, 60_000_000_000
"""Longest pause that is waited for in real time, unless the camera itself is slower; and then."""
_PARTS = (foxglove.POINT_CLOUD, foxglove.RAW_IMAGE, foxglove.COMPRESSED_IMAGE)
_MOST_PARTS = MAX_CAMERAS + 1
_PICTURES = {
    (foxglove.RAW_IMAGE, "protobuf"),
    (foxglove.COMPRESSED_IMAGE, "protobuf"),
    (ros2.IMAGE, "cdr"),
    (ros2.COMPRESSED_IMAGE, "cdr"),
}


@dataclass(frozen=True)
class _Recorded:
    """A picture that is not decoded yet, or a moment of a rig. facts: None in someone else's file. parts: messages of
    the moment by sensor."""

    message: Message
    facts: Facts | None
    number: int
    parts: dict[str, Message] = field(default_factory=dict)

    @property
    def arrived_ns(self) -> int:
        return self.facts.captured_ns if self.facts is not None else self.message.log_ns

    def __lt__(self, other: _Recorded) -> bool:
        return (self.arrived_ns, self.number) < (other.arrived_ns, other.number)


class ReplaySource(Source):
    """`replay:FILE.mcap?speed=0&camera=NAME&loop=0` (speed and loop: the defaults).

    A recording of the .mcap sink, or any MCAP file with `foxglove.RawImage` or `foxglove.CompressedImage` (protobuf) or
    ROS 2 `sensor_msgs/msg/Image` or `CompressedImage` (CDR) messages. camera: which one, by name or
    topic; needed where there are several. The file is read to its last whole chunk; what is damaged or missing is
    told in `skipped`.

    speed=0: as fast as it is read, nothing is dropped: the same frames each time. `seq`, `pts_ns`, `epoch`,
        `exposure` and pixels are as recorded, bit for bit; `captured_ns` is now, and `clock` is `media` (`none`
        where it was), because the recording's clock is not this machine's: ages count from the read.
    speed=1: in real time, like the live camera it was: frames come at the recorded intervals (pauses cut to the
        larger of 0.5 s and five times the interval before); one that is not read before the next is due is dropped. A `monotonic` clock
        is shifted by as much as the arrival is, so that ages hold the recorded way from sensor to arrival.
    loop=1: for ever; `seq`, `pts_ns` and `epoch` go on rising.

    Of a rig each frame is a whole moment, `frame.rig`; `camera` may name the topic of one of its cameras instead.

    In someone else's file `seq` counts pictures, `pts_ns` is the header's stamp from the first one on, clock `media`.

    Raises: UsageError for an unknown key or value, no MCAP file, or a file without pictures; MissingExtraError.
    """

    reopens = False

    def __init__(self, uri: str, limit: int | None = None) -> None:
        super().__init__(uri, limit)
        self._path, query = _split(uri)
        self.live = _switch(uri, query, "speed")
        self._loop = _switch(uri, query, "loop")
        self._wanted = query.get("camera")
        self._name = printable(self._path)
        self._topic = self._rig = ""
        """`_rig`: the beginning of the topics of a moment's parts."""
        self._known_rig: Rig | None = None
        self._noted: set[str] = set()
        self._first_stamp_ns: int | None = None
        self._pace: _Pace | None = None
        self._reader = McapReader(self._path)
        try:
            self._start()
        except BaseException:
            self._reader.close()
            raise

    def _start(self) -> None:
        """Settle the camera and find the first picture. Raises: UsageError."""
        summary = self._reader.summary()
        if summary is not None:
            self._choose(list(summary.values()))
        self._queue = self._recorded()
        self._next: _Recorded | None = next(self._queue, None)
        first = None
        while first is None and self._next is not None:
            first = self._decoded(self._next)
            if first is None:
                self._next = next(self._queue, None)
        if first is None:
            self._tell_problems()
            why = next((f" ({text})" for _, text in self.skipped), "")
            raise UsageError(
                f"recording {self._name}: holds no picture that can be replayed{why}, expected messages of "
                f"{', '.join(sorted(name for name, _ in _PICTURES))}. Record with the .mcap sink and images=raw"
            )
        self.size = (first.width, first.height)
        self._turn = _Turn(first.pts_ns)

    def _choose(self, topics: list[tuple[Topic, int]]) -> None:
        """Settle which camera is played, from the file's summary. Raises: UsageError."""
        pictures = [(topic, count) for topic, count in topics if _is_picture(topic) and count]
        rigs = [(topic, count) for topic, count in pictures if topic.schema == MOMENT]
        if self._wanted is None and rigs:  # its cameras are parts of it
            pictures = [each for each in pictures if not _within(each[0], [rig for rig, _ in rigs])]
        names = {_camera(topic): topic.name for topic, _ in pictures}
        found = [(t, n) for t, n in pictures if self._wanted is None or _answers(t, self._wanted)]
        if pictures and (not found or len({t.name for t, _ in found}) > 1):
            what = f"camera {self._wanted!r}: unknown" if self._wanted is not None else "several cameras"
            hint = did_you_mean(self._wanted or "", names)
            raise UsageError(f"source {self.uri}: {what}. {hint} Choose with ?camera=NAME")
        if not found:
            return
        self._settle(found[0][0])
        count = sum(n for _, n in found)
        self._expect(None if self._loop else count)
        if count > 1 and self._reader.span_ns > 0:
            rate = (count - 1) / (self._reader.span_ns / 1e9)
            self.fps = rate if 0 < rate <= 1000 else None

    def _recorded(self) -> Iterator[_Recorded]:
        """The camera's pictures in order of arrival."""
        window: list[_Recorded] = []
        facts: dict[str, tuple[int, Facts | str]] = {}
        moment: _Recorded | None = None  # whose parts are being read
        known: Facts | str
        number = 0
        for message in self._reader.messages():
            topic = message.topic
            if topic.schema == FRAME and topic.encoding == "json":
                try:
                    known = Facts.from_json(message.data)
                except ValueError as error:
                    known = str(error)
                facts[_camera(topic)] = (message.sequence, known)
                if len(facts) > 1000:
                    facts.clear()  # no camera has so many names
                continue
            if moment is not None and topic.name.startswith(self._rig):
                if topic.schema in _PARTS and message.sequence == moment.message.sequence:
                    if len(moment.parts) < _MOST_PARTS:
                        moment.parts[topic.name[len(self._rig) :].rpartition("/")[0]] = message
                    continue
                if message.sequence != moment.message.sequence or topic.schema == RESULT:
                    heapq.heappush(window, replace(moment, number=number))
                    number, moment = number + 1, None
                    if len(window) > _WINDOW:
                        yield replace(heapq.heappop(window), number=number - len(window) - 1)
            if self._rig and topic.name.startswith(self._rig) and topic.schema in _PARTS:
                continue  # of a moment that is lost
            if not _is_picture(topic) or not self._is_chosen(topic):
                continue
            about: Facts | None = None
            if CAMERA_KEY in topic.metadata:
                sequence, known = facts.pop(_camera(topic), (-1, ""))
                if sequence != message.sequence or isinstance(known, str):
                    self._skip(
                        f"picture {message.sequence}: {known if isinstance(known, str) and known else 'its facts are missing'}"
                    )
                    continue
                about = known
            item = _Recorded(message, about, number)
            if topic.schema == MOMENT:
                moment = item
                continue
            heapq.heappush(window, item)
            number += 1
            if len(window) > _WINDOW:
                yield replace(heapq.heappop(window), number=number - len(window) - 1)
        if moment is not None:
            heapq.heappush(window, replace(moment, number=number))
            number += 1
        while window:
            yield replace(heapq.heappop(window), number=number - len(window) - 1)

    def _is_chosen(self, topic: Topic) -> bool:
        if not self._topic and (self._wanted is None or _answers(topic, self._wanted)):
            self._settle(topic)
        if topic.name != self._topic and topic.name not in self._noted and len(self._noted) < 100:
            self._noted.add(topic.name)
            if self._wanted is None:
                name = printable(_camera(topic))
                self._skip(f"camera {name!r} is left out. Choose it with ?camera={name}")
        return topic.name == self._topic

    def _settle(self, topic: Topic) -> None:
        self._topic = topic.name
        self._rig = topic.name.removesuffix("moment") if topic.schema == MOMENT else ""

    def _skip(self, reason: str) -> None:
        if len(self.skipped) < 100:
            self.skipped.append((str(self._path), f"recording {self._name}: {reason}"))

    def _read(self, timeout_s: float | None) -> Frame | None:
        while True:
            item = self._next
            if item is None:
                self._tell_problems()
                if not (self._loop and self._turn.over()):
                    return None
                self._again()
                continue
            now_ns = time.monotonic_ns()
            due_ns = now_ns
            if self.live:
                self._pace = self._pace or _Pace(now_ns)
                due_ns = self._pace.due(item)
                if due_ns > now_ns:
                    wait_s = (due_ns - now_ns) / 1e9
                    if timeout_s is not None and wait_s > timeout_s:
                        time.sleep(max(0.0, timeout_s))
                        raise TimeoutError
                    time.sleep(wait_s)
                self._pace.passed(item, due_ns)
            following = self._next = next(self._queue, None)
            frame: Frame | None = None
            late = self._pace is not None and following is not None and self._pace.due(following) <= now_ns
            if not late:  # else the next one is due as well: nobody would see this one
                frame = self._decoded(item)
            if frame is not None:
                return self._placed(frame, due_ns)

    def _placed(self, frame: Frame, arrived_ns: int) -> Frame:
        """A frame as recorded, in this run's time."""
        turn = self._turn
        turn.saw(frame)
        clock: Clock = frame.clock
        if clock != "monotonic":
            pts_ns = frame.pts_ns + turn.pts_ns
        elif self.live:
            pts_ns = frame.pts_ns + arrived_ns - frame.captured_ns
        else:
            clock, pts_ns = "media", frame.pts_ns + turn.pts_ns
        rig = None if frame.rig is None else frame.rig.shifted(pts_ns - frame.pts_ns)
        return replace(
            frame,
            rig=rig,
            seq=frame.seq + turn.seq,
            epoch=frame.epoch + turn.epoch,
            pts_ns=pts_ns,
            captured_ns=arrived_ns,
            clock=clock,
        )

    def _again(self) -> None:
        """From the start of the file."""
        if self._pace is not None:
            self._pace.restart()
        self._reader.rewind()
        self._queue = self._recorded()
        self._next = next(self._queue, None)

    def close(self) -> None:
        super().close()
        self._reader.close()

    def _tell_problems(self) -> None:
        for text in self._reader.problems:
            self._skip(text)
        self._reader.problems.clear()

    def _decoded(self, item: _Recorded) -> Frame | None:
        """As recorded; None, and a line in `skipped`, for what is damaged or of another kind."""
        try:
            return self._decode(item)
        except ValueError as error:
            self._skip(f"picture {item.number}: {error}")
            return None

    def _decode(self, item: _Recorded) -> Frame:
        """Raises: ValueError for a picture that is damaged or of another kind."""
        message, facts = item.message, item.facts
        if message.topic.schema == MOMENT:
            return self._moment(item)
        picture = _READERS[message.topic.encoding](message.topic.schema, message.data)
        if picture.compressed:
            pixels = Pixels.bgr(decode_picture(bytes(picture.data)))
        else:
            layout = facts.layout if facts is not None else None
            pixels = from_raw(
                picture.data, picture.encoding, picture.step, picture.width, picture.height, layout
            )
        source, hops = str(self._path), (Hop("replay", "CPU", written=pixels.layout.nbytes),)
        if facts is None:
            stamp_ns = picture.stamp_ns or message.publish_ns
            camera = _camera(message.topic)
            if self._first_stamp_ns is None:
                self._first_stamp_ns = stamp_ns
            stamp_ns -= self._first_stamp_ns
            return Frame(
                pixels, item.number, stamp_ns, message.log_ns, source, "media", camera=camera, hops=hops
            )
        return Frame(
            pixels,
            facts.seq,
            facts.pts_ns,
            facts.captured_ns,
            source,
            facts.clock,
            facts.exposure,
            facts.camera,
            facts.epoch,
            facts.corrupt,
            hops,
        )

    def _moment(self, item: _Recorded) -> Frame:
        """Raises: ValueError for a moment that is damaged or not complete."""
        facts = item.facts
        assert facts is not None, "a moment of ours has its facts"
        moment = Moment.from_json(item.message.data)
        if (
            moment.rig == self._known_rig
        ):  # one object for as long as nothing changes: what is made from it stays
            moment = replace(moment, rig=self._known_rig)
        self._known_rig = moment.rig
        points, rings, images = None, None, {}
        for sensor, message in item.parts.items():
            if message.sequence != item.message.sequence:
                continue
            if message.topic.schema == foxglove.POINT_CLOUD:
                points, rings = read_points(message.data)
            elif sensor in moment.shots:
                picture = _read_protobuf(message.topic.schema, message.data)
                images[sensor] = (
                    decode_picture(bytes(picture.data))
                    if picture.compressed
                    else from_raw(
                        picture.data, picture.encoding, picture.step, picture.width, picture.height, None
                    ).planes[0]
                )
        rig = moment.frame(points, images, rings)
        pixels = Pixels.bgr(mosaic(rig) if rig.rig.cameras else np.zeros((1, 1, 3), np.uint8))
        written = sum(image.nbytes for image in images.values()) + (0 if points is None else points.nbytes)
        return Frame(
            pixels, facts.seq, facts.pts_ns, facts.captured_ns, str(self._path), facts.clock, facts.exposure,
            facts.camera, facts.epoch, facts.corrupt, (Hop("replay", "CPU", written=written),), rig=rig,
        )  # fmt: skip


class _Turn:
    """What `loop=1` adds to the numbers of a file, so that they go on rising."""

    def __init__(self, first_ns: int) -> None:
        """first_ns: timestamp of the first frame in the file."""
        self.seq = self.pts_ns = self.epoch = 0
        self._first_ns = self._last_ns = first_ns
        self._last_seq = self._last_epoch = -1
        self._step_ns = 0

    def saw(self, frame: Frame) -> None:
        """A frame as recorded. Some may be left out, but not the last."""
        if frame.pts_ns > self._last_ns:
            self._step_ns = frame.pts_ns - self._last_ns
        self._last_seq, self._last_epoch = max(self._last_seq, frame.seq), max(self._last_epoch, frame.epoch)
        self._last_ns = frame.pts_ns

    def over(self) -> bool:
        """The end of the file was reached; whether it had a picture, without which looping would never end."""
        if self._last_seq < 0:
            return False
        self.seq += self._last_seq + 1
        self.epoch += self._last_epoch + 1
        self.pts_ns += self._last_ns - self._first_ns + self._step_ns
        self._last_ns, self._last_seq, self._last_epoch = self._first_ns, -1, -1
        return True


class _Pace:
    """When the frames of a recording are due in real time."""

    def __init__(self, now_ns: int) -> None:
        self._due_ns, self._gap_ns = now_ns, 0
        self._arrived_ns: int | None = None

    def due(self, item: _Recorded) -> int:
        if self._arrived_ns is None:
            return self._due_ns + self._gap_ns
        longest_ns = min(max(_PAUSE_NS, 5 * self._gap_ns), _LONGEST_NS)
        return self._due_ns + min(max(item.arrived_ns - self._arrived_ns, 0), longest_ns)

    def passed(self, item: _Recorded, due_ns: int) -> None:
        """`item` was due at `due_ns`: the next ones are counted from there."""
        self._gap_ns = due_ns - self._due_ns
        self._due_ns, self._arrived_ns = due_ns, item.arrived_ns

    def restart(self) -> None:
        """The next frame is the first of the file again, one frame time after the last."""
        self._arrived_ns = None


def _is_picture(topic: Topic) -> bool:
    """Whether its messages are frames: pictures, or moments of a rig."""
    return (topic.schema, topic.encoding) in _PICTURES or (
        topic.schema == MOMENT and CAMERA_KEY in topic.metadata
    )


def _within(topic: Topic, rigs: list[Topic]) -> bool:
    """Whether a topic is a part of one of these moments."""
    return topic.schema != MOMENT and any(
        topic.name.startswith(rig.name.removesuffix("moment")) for rig in rigs
    )


def _camera(topic: Topic) -> str:
    """The camera's name; in someone else's file the topic without its slash."""
    return topic.metadata.get(CAMERA_KEY, topic.name.lstrip("/"))


def _answers(topic: Topic, name: str) -> bool:
    return name in (_camera(topic), topic.name)


def _read_protobuf(schema: str, data: memoryview) -> Picture:
    """Raises: ValueError for bytes that are no such message."""
    values = dict(foxglove.fields(data))
    raw = schema == foxglove.RAW_IMAGE
    stamp = values.get(1, memoryview(b""))
    body = values.get(6 if raw else 2, memoryview(b""))
    if not isinstance(stamp, memoryview) or not isinstance(body, memoryview):
        raise ValueError("message is damaged")
    time_fields = dict(foxglove.fields(stamp))
    seconds, nanos = (_number(time_fields, n) for n in (1, 2))
    stamp_ns = seconds * 10**9 + nanos
    if not raw:
        return Picture(body, stamp_ns=stamp_ns)
    width, height, step = (_number(values, n) for n in (2, 3, 5))
    encoding = values.get(4, memoryview(b""))
    if not isinstance(encoding, memoryview):
        raise ValueError("message is damaged")
    name = bytes(encoding[:64]).decode(errors="replace")
    return Picture(body, name or "?", width, height, step, stamp_ns)


def _number(values: dict[int, int | memoryview], number: int) -> int:
    value = values.get(number, 0)
    if not isinstance(value, int):
        raise ValueError("message is damaged")
    return value


_READERS = {"protobuf": _read_protobuf, "cdr": ros2.read}


def _split(uri: str) -> tuple[Path, dict[str, str]]:
    """The file and the options of a URI. Raises: UsageError."""
    text = uri.partition(":")[2]
    text = text[2:] if text.startswith("//") else text
    name, _, tail = text.partition("?")
    query: dict[str, str] = {}
    for part in filter(None, tail.split("&")):
        key, _, value = part.partition("=")
        if key not in KEYS:
            raise UsageError(f"source {uri}: unknown key {key!r}. {did_you_mean(key, KEYS)}")
        if key in query:
            raise UsageError(f"source {uri}: key {key!r} is given twice. Leave one out")
        query[key] = urllib.parse.unquote(value)
    if not name:
        raise UsageError(f"source {uri}: no file, expected replay:FILE.mcap. Name the recording")
    return Path(name), query


def _switch(uri: str, query: dict[str, str], key: str) -> bool:
    value = query.get(key, "0")
    if value not in ("0", "1"):
        raise UsageError(f"source {uri}: {key} not usable, expected 0 or 1, got {value[:40]!r}")
    return value == "1"
