"""Which of a camera's formats, sizes and rates to take: those that the kernels read as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgekit.errors import UsageError
from edgekit.runtime.sources import v4l2_abi as abi

USUAL = (1280, 720)
"""The size taken unasked, or the nearest below: networks look at 640 or less, more only costs bandwidth."""
USUAL_FPS = 30.0
LIVE_FPS = 24.0
"""Slower cameras than this are taken unasked only where nothing faster is offered."""
RATE_SLACK = 0.99
"""Cameras call 29.97 frames per second 30."""


@dataclass(frozen=True)
class SizeRange:
    """Sizes a driver takes: from least to most in steps."""

    min_width: int
    max_width: int
    step_width: int
    min_height: int
    max_height: int
    step_height: int

    def nearest(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """The size in this range nearest to `size` (None: the usual one)."""
        width, height = size or USUAL
        return (
            _snap(width, self.min_width, self.max_width, self.step_width),
            _snap(height, self.min_height, self.max_height, self.step_height),
        )


def _snap(value: int, least: int, most: int, step: int) -> int:
    bounded = min(max(value, least), most)
    return least + (bounded - least) // max(step, 1) * max(step, 1)


@dataclass(frozen=True)
class Mode:
    """One thing a camera offers.

    name: the format, ours where `readable`. rates: frames per second, sorted, empty where unknown.
    any_rate: anything between the first and the last.
    """

    name: str
    code: int
    readable: bool
    compressed: bool
    width: int
    height: int
    rates: tuple[float, ...] = ()
    any_rate: bool = False

    @property
    def fastest(self) -> float:
        return self.rates[-1] if self.rates else float("inf")

    def rate(self, fps: float | None) -> float | None:
        """The slowest rate that is `fps` or more (None: the usual), else the fastest; None where unknown."""
        if not self.rates:
            return fps
        wanted = fps or USUAL_FPS
        if self.any_rate:
            return min(max(wanted, self.rates[0]), self.rates[-1])
        return next((r for r in self.rates if r >= wanted * RATE_SLACK), self.rates[-1])


def choose(
    modes: Sequence[Mode],
    camera: str,
    *,
    size: tuple[int, int] | None = None,
    format: str | None = None,
    fps: float | None = None,
) -> Mode:
    """The best mode that fulfils every wish. Raises: UsageError that says what is offered instead.

    Without a wish: fast enough to be live, then the largest size up to 1280x720, then few bytes per pixel,
    then colour before grey.
    """
    other = f"usb:{camera}"
    raw = [m for m in modes if m.readable]
    if not raw:
        packed = _list(m.name for m in modes if m.compressed)
        if packed:
            raise UsageError(
                f"camera {camera}: offers only {packed}, expected pixels as they are. Use {other} (GStreamer), which decodes it"
            )
        what = f"offers {_list(m.name for m in modes)}" if modes else "offers no format"
        raise UsageError(
            f"camera {camera}: {what}, expected one of {_list(c.format for c in abi.PIXEL_CODES.values())}. "
            f"Use {other} (GStreamer), or csi:0 for a bare sensor"
        )
    left = raw
    if format is not None:
        left = [m for m in left if format in (m.name, abi.fourcc_text(m.code))]
        if not left:
            raise UsageError(
                f"camera {camera}: no format {format}, expected one of {_list(m.name for m in raw)}"
            )
    if size is not None:
        sized = [m for m in left if (m.width, m.height) == size]
        if not sized:
            text = f"{size[0]}x{size[1]}"
            if any(m.compressed and (m.width, m.height) == size for m in modes):
                names = _list(m.name for m in modes if m.compressed and (m.width, m.height) == size)
                raise UsageError(
                    f"camera {camera}: {text} is offered only as {names}. Use {other} (GStreamer), which decodes it"
                )
            near = sorted(
                {(m.width, m.height) for m in left}, key=lambda s: abs(s[0] * s[1] - size[0] * size[1])
            )
            sizes = ", ".join(f"{w}x{h}" for w, h in near[:8])
            raise UsageError(
                f"camera {camera}: no size {text}{f' as {format}' if format else ''}, expected {sizes}"
            )
        left = sized
    if fps is not None:
        fast = [m for m in left if m.fastest >= fps * RATE_SLACK]
        if not fast:
            best = max(left, key=lambda m: m.fastest)
            raise UsageError(
                f"camera {camera}: no {fps:g} frames per second, expected at most {best.fastest:g} "
                f"({best.width}x{best.height} {best.name}). Ask for fewer, or a smaller size"
            )
        left = fast
    return min(left, key=_rank)


def _rank(mode: Mode) -> tuple[bool, bool, int, int]:
    area, usual = mode.width * mode.height, USUAL[0] * USUAL[1]
    order = list(abi.PIXEL_CODES).index(mode.code)
    return mode.fastest < LIVE_FPS * RATE_SLACK, area > usual, area if area > usual else -area, order


def _list(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
