"""`synthetic://street?...`: the procedural street world as a source."""

from __future__ import annotations

import math
import re
import time
import urllib.parse

from edgekit.errors import UsageError, did_you_mean
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame
from edgekit.runtime.sources.base import Source, split_uri

WORLDS = ("street",)
KEYS = ("seed", "frames", "size", "fps")
MIN_SIDE, MAX_SIDE = 64, 4096


class SyntheticSource(Source):
    """`synthetic://street?seed=0&frames=300&size=640x360&fps=30` (the defaults).

    seed 0..2^63-1, frames 1..10^7, size WxH with each side 64..4096, fps above 0 up to 1000.
    Frames come as fast as they are read; `pts_ns` = seq / fps. Frame i of a seed is
    always the same: the drive goes on by 1/30 s per frame, so another fps plays it slower or faster.

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
        self._total = _integer(uri, query, "frames", 300, 1, 10**7)
        self._rate = _rate(uri, query.get("fps", "30"))
        self.fps = self._rate
        self.size = _size(uri, query.get("size", "640x360"))
        seed = _integer(uri, query, "seed", 0, 0, 2**63 - 1)
        from edgekit.synth.street import StreetWorld  # numpy work that no other source needs

        self._world = StreetWorld(seed, *self.size)
        self._next = 0
        self._expect(self._total)

    def _read(self, timeout_s: float | None) -> Frame | None:
        if self._next == self._total:
            return None
        seq = self._next
        self._next += 1
        image = self._world.frame(seq).image
        pts_ns = round(seq * 1e9 / self._rate)
        return Frame(Pixels.bgr(image), seq, pts_ns, time.monotonic_ns(), self.uri, clock="media")


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
