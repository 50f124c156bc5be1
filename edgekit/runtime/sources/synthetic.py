"""`synthetic://street?...` and other procedural worlds as a source, as a file or as a live camera."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from edgekit.errors import UsageError, did_you_mean
from edgekit.pixels import Format, PixelLayout, Pixels
from edgekit.runtime.frames import Frame
from edgekit.runtime.sources.base import Source, split_uri

if TYPE_CHECKING:
    import numpy as np

    from edgekit.rig import RigFrame
    from edgekit.synth.gestures import GestureWorld
    from edgekit.synth.street import StreetWorld
    from edgekit.synth.street_rig import RigWorld

    _Taken = tuple[Pixels, RigFrame | None]

WORLDS = {"street": ("640x360", "30"), "gestures": ("224x224", "10"), "street-rig": ("256x144", "10")}
"""What there is to film, with the size and the frames/s it has unless asked otherwise."""
KEYS = ("seed", "frames", "size", "fps", "live", "loop", "format", "pictures", "sensor")
MIN_SIDE, MAX_SIDE = 64, 4096
MAX_LOOP = 3600
_PR_SET_TIMERSLACK = 29
MAX_LOOP_BYTES = 2**30


class SyntheticSource(Source):
    """`synthetic://street?seed=0&frames=300&size=640x360&fps=30&live=0&loop=0&format=bgr` (the defaults).

    seed 0..2^63-1, frames 1..10^7, size WxH with each side 64..4096, fps above 0 up to 1000.
    Frames come as fast as they are read; `pts_ns` = seq / fps. Frame i of a seed is
    always the same: the drive goes on by 1/30 s per frame, so another fps plays it slower or faster.

    `synthetic://gestures` (defaults size=224x224, fps=10) is `synth.gestures.GestureWorld`: objects that move
    one way at a time. `GestureWorld(seed, *size).frame(i)` tells what frame i shows, and from when to when.
    pictures=FOLDER, only there: half of the objects and backdrops are cut from these pictures.

    `synthetic://street-rig` (defaults size=256x144, that of each camera, fps=10) is `synth.street_rig.RigWorld`: six
    cameras and a LiDAR around a vehicle (docs/rigs.md). `frame.rig` is the `rig.RigFrame`; the picture shows all
    cameras, three above three. Frame i goes on by 1/10 s. `pts_ns` is when the sweep ends: seq / fps + 50 ms.
    sensor=NAME, only there: one camera of it, or `lidar`, as a source of its own, whose `pts_ns` is when that
        sensor measured, `camera` its name and `frame.rig` its part. The LiDAR's picture shows how near things are,
        a row for each ring, the highest on top. All such sources of one seed see the same world. With live=1
        they measure at whole multiples of 1 / fps (and their offset), and with a loop show the same of it then: sensors of
        one rate belong together whenever they are opened.

    format: one of `pixels.FORMATS`; YUV is BT.601, limited range.
    loop=N: frames 0..N-1 are rendered when opened and handed out again and again, so that a frame costs
        no work, as a camera's would. They are shared, hence read-only. N up to 3600, 1 GiB in all.
    live=1: a camera. Frame i is taken i / fps after opening on `time.monotonic_ns()`, which is its `pts_ns`
        (clock `monotonic`); `read` waits for it. The newest frame waits for a slow reader, those before it
        are lost and `seq` jumps, as a driver's counter does. After `frames` frames, lost ones included,
        the source ends. Without `loop`, rendering takes its time too: give one where the CPU is to be idle.
    frames=0, only with `live` or `loop`: no end.

    Raises: UsageError for an unknown world or key, a key given twice or a value out of range.
    """

    def __init__(self, uri: str, limit: int | None = None) -> None:
        super().__init__(uri, limit)
        parts = split_uri(uri)
        world = parts.netloc + parts.path.rstrip("/")
        if world not in WORLDS:
            raise UsageError(f"source {uri}: unknown world {world!r}. {did_you_mean(world, WORLDS)}")
        if parts.fragment:
            raise UsageError(f"source {uri}: '#{parts.fragment}' means nothing here. Leave it out")
        query = _query(uri, parts.query)
        self.live = bool(_integer(uri, query, "live", 0, 0, 1))
        loop = _integer(uri, query, "loop", 0, 0, MAX_LOOP)
        total = _integer(uri, query, "frames", 300, 0 if self.live or loop else 1, 10**7)
        self._total = total or None
        size, rate = WORLDS[world]
        self._rate = _rate(uri, query.get("fps", rate))
        self.fps = self._rate
        self.size = _size(uri, query.get("size", size))
        self._format = _format(uri, query.get("format", "bgr"))
        seed = _integer(uri, query, "seed", 0, 0, 2**63 - 1)
        self._world, self.size, self._lag_ns = _world(uri, world, seed, self.size, query)
        try:
            layout = PixelLayout(self._format, *self.size)
        except UsageError as error:  # an odd width for a format of pairs
            raise UsageError(f"source {uri}: {error}. Choose another size or format") from None
        if loop * layout.nbytes > MAX_LOOP_BYTES:
            most = MAX_LOOP_BYTES // layout.nbytes
            raise UsageError(
                f"source {uri}: loop={loop} takes {loop * layout.nbytes >> 20} MiB, expected at most "
                f"{MAX_LOOP_BYTES >> 20} MiB, which is loop={most}. Choose a shorter loop"
            )
        from edgekit.synth import formats  # numpy work that no other source needs

        self._convert = formats.convert
        self._sensor = query.get("sensor", "")
        if self._total is not None:
            loop = min(loop, self._total)
        self._loop = [(_read_only(pixels), rig) for pixels, rig in map(self._render, range(loop))]
        self._next = 0
        self._rendered: tuple[int, _Taken] | None = None
        self._expect(self._total)
        if self._total is None:
            self.frames = limit
        self._start_ns = time.monotonic_ns()
        self._first = 0
        if self._sensor and self.live:  # triggered together: whichever is opened first
            period_ns = 1e9 / self._rate
            self._first = math.ceil(self._start_ns / period_ns)
            self._start_ns = round(self._first * period_ns)
        self._punctual = 0
        """The thread whose sleeps are exact."""

    def _render(self, index: int) -> _Taken:
        taken = self._world.frame(index)
        return self._convert(taken.image, self._format), taken.rig if isinstance(taken, _View) else None

    def _taken(self, seq: int) -> _Taken:
        return self._loop[(self._first + seq) % len(self._loop)] if self._loop else self._render(seq)

    def _frame(self, taken: _Taken, seq: int, pts_ns: int) -> Frame:
        pixels, rig = taken
        if rig is not None:
            # a rig's time is its sweep's, `pts_ns` that of the sensor that this source is
            rig = rig.shifted(pts_ns - self._lag_ns + _sweep_ns(rig) - rig.taken_ns)
        return Frame(
            pixels, seq, pts_ns, time.monotonic_ns(), self.uri, clock="monotonic" if self.live else "media",
            exposure="end" if self.live else "unknown", camera=self._sensor, rig=rig,
        )  # fmt: skip

    def _read(self, timeout_s: float | None) -> Frame | None:
        if self._next == self._total:
            return None
        if self.live:
            return self._read_live(timeout_s)
        seq = self._next
        self._next += 1
        return self._frame(self._taken(seq), seq, round(seq * 1e9 / self._rate) + self._lag_ns)

    def _read_live(self, timeout_s: float | None) -> Frame:
        period_ns = 1e9 / self._rate
        now_ns = time.monotonic_ns()
        deadline_ns = None if timeout_s is None else now_ns + round(timeout_s * 1e9)
        newest = max(0, int((now_ns - self._start_ns - self._lag_ns) / period_ns))
        if self._total is not None:
            newest = min(newest, self._total - 1)
        seq = max(self._next, newest)
        # drawn before it is due, and kept when the wait runs out of time
        if self._rendered is None or self._rendered[0] != seq:
            self._rendered = (seq, self._taken(seq))
        pts_ns = self._start_ns + round(seq * period_ns) + self._lag_ns
        if self._punctual != threading.get_ident():
            self._punctual = threading.get_ident()
            _be_punctual()
        until_ns = pts_ns if deadline_ns is None else min(pts_ns, deadline_ns)
        while (left_ns := until_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns / 1e9)
        if until_ns < pts_ns:
            raise TimeoutError(f"source {self.uri}: no frame within {timeout_s:g} s")
        taken = self._rendered[1]
        self._rendered = None
        self._next = seq + 1
        return self._frame(taken, seq, pts_ns)


@dataclass(frozen=True)
class _View:
    """A frame of a rig as a picture."""

    image: np.ndarray
    rig: RigFrame


class _Rig:
    """The rig's world, or one sensor of it, as something that has pictures."""

    def __init__(self, world: RigWorld, sensor: str) -> None:
        self._world, self._sensor = world, sensor

    def frame(self, index: int) -> _View:
        from edgekit.rig import mosaic

        if not self._sensor:
            rig = self._world.frame(index)
            return _View(mosaic(rig), rig)
        rig = self._world.frame(index, (self._sensor,))
        if self._sensor == "lidar":
            return _View(self._world.nearness(rig), rig)
        return _View(rig.shots[self._sensor].image, rig)


def _world(
    uri: str, name: str, seed: int, size: tuple[int, int], query: dict[str, str]
) -> tuple[StreetWorld | GestureWorld | _Rig, tuple[int, int], int]:
    """The world, the size of its pictures, and how long after the beginning of its first frame that is measured (ns)."""
    if "pictures" in query and name != "gestures":
        place = "the street has" if name == "street" else "the rig has"
        raise UsageError(f"source {uri}: {place} no pictures. Leave the key out")
    if "sensor" in query and name != "street-rig":
        raise UsageError(f"source {uri}: only street-rig has several sensors. Leave the key out")
    if name == "street-rig":
        return _rig(uri, seed, size, query.get("sensor", ""))
    if name == "street":
        from edgekit.synth.street import StreetWorld

        return StreetWorld(seed, *size), size, 0
    from edgekit.synth.gestures import GestureWorld
    from edgekit.synth.sprites import load_pictures

    pictures = load_pictures(query["pictures"]) if "pictures" in query else ()
    return GestureWorld(seed, *size, pictures=pictures), size, 0


def _rig(uri: str, seed: int, size: tuple[int, int], sensor: str) -> tuple[_Rig, tuple[int, int], int]:
    from edgekit.synth.street_rig import RigWorld

    world = RigWorld(seed, width=size[0], height=size[1])
    lidar, cameras = world.rig.lidar, world.rig.cameras
    lag_ms = lidar.period_ms
    if sensor == "lidar":
        size = (world.spinner.azimuths, world.spinner.rings)
    elif sensor in cameras:
        lag_ms += cameras[sensor].offset_ms
    elif sensor:
        known = (*cameras, "lidar")
        raise UsageError(f"source {uri}: unknown sensor {sensor[:40]!r}. {did_you_mean(sensor[:40], known)}")
    else:
        size = (3 * size[0], 2 * size[1])
    return _Rig(world, sensor), size, round(lag_ms * 1e6)


def _sweep_ns(rig: RigFrame) -> int:
    return round(rig.rig.lidar.period_ms * 1e6)


def _read_only(pixels: Pixels) -> Pixels:
    for plane in pixels.planes:
        plane.flags.writeable = False
    return pixels


def _format(uri: str, text: str) -> Format:
    known: dict[str, Format] = {name: name for name in get_args(Format)}
    if text not in known:
        raise UsageError(f"source {uri}: unknown format {text[:40]!r}. {did_you_mean(text[:40], known)}")
    return known[text]


def _be_punctual() -> None:
    """Ask the kernel to end this thread's sleeps on time: a camera's interrupt does not wait for the 50 us of
    timer slack that it otherwise may add (Linux, prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def _query(uri: str, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in filter(None, text.split("&")):
        key, _, value = item.partition("=")
        if key not in KEYS:
            raise UsageError(f"source {uri}: unknown key {key!r}. {did_you_mean(key, KEYS)}")
        if key in found:
            raise UsageError(f"source {uri}: key {key!r} is given twice. Leave one out")
        found[key] = urllib.parse.unquote(value)
    return found


def _integer(uri: str, query: dict[str, str], key: str, default: int, low: int, high: int) -> int:
    text = query.get(key, str(default))
    # length first: a huge number would be slow to convert, and Python refuses it in its own words
    value = int(text) if re.fullmatch(r"[0-9]{1,20}", text) else -1
    if not low <= value <= high:
        raise UsageError(f"source {uri}: {key} out of range, expected {low} to {high}, got {text[:40]!r}")
    return value


def _rate(uri: str, text: str) -> float:
    value = float(text) if re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,9})?", text) else math.nan
    if not 0 < value <= 1000:
        raise UsageError(f"source {uri}: fps out of range, expected above 0 up to 1000, got {text[:40]!r}")
    return value


def _size(uri: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not match or not all(MIN_SIDE <= int(v) <= MAX_SIDE for v in match.groups()):
        raise UsageError(
            f"source {uri}: size not usable, expected WIDTHxHEIGHT with {MIN_SIDE} to {MAX_SIDE} each, "
            f"got {text[:40]!r}"
        )
    return int(match[1]), int(match[2])
