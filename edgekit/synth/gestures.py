"""Twelve motions that no single picture gives away: labelled clips and an endless labelled stream.

    images, label = clip(seed=0, index=7)          # uint8 [8, 64, 64, 3] BGR, GESTURES[label]
    world = GestureWorld(seed=0, width=224, height=224)
    frame = world.frame(31)                        # .image, .label, .event: which frames the motion spans

A pose (x, y, log size, angle) is a sum of components, one per kind of motion: sideways, up and down, zoom,
turn, the two-phase zoom, shake. In every clip all components are drawn, amplitudes and directions too. The
component of the clip's class runs, at times u = (i + d) / T of frame i with d uniform in [0, 1); all others
are held at one time u uniform in [0, 1). So the pose in a frame picked at random has the same distribution
in every class, exactly, and the components are independent of each other and of the looks: whatever is told
from single frames alone is told by chance. Direction is in the order of frames only: `zoom out` is `zoom in`
backwards. There is no motion blur, which would show the direction in one picture.

numpy only. A clip depends on (seed, index, size, frames, pictures) alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.errors import UsageError
from edgekit.synth.sprites import SIDE, apart, backdrop, mipmap, sprite

Array = np.ndarray
GESTURES = (
    "still", "left", "right", "up", "down", "zoom in", "zoom out", "turn clockwise", "turn counter-clockwise",
    "approach and recede", "recede and approach", "shake",
)  # fmt: skip
STILL = 0
FRAMES_PER_SECOND = 10.0
"""Frame i of a stream is at i / this. Clips are taken at the same rate."""
CLIP = 8
"""Frames of a clip and of a motion in a stream."""
EVENT = 24
"""Frames from one object of a stream to the next."""
SCENE = 4
"""Objects of a stream that are seen before the same backdrop."""

_SIDEWAYS, _UPRIGHT, _ZOOM, _TURN, _PHASES, _SHAKE = range(6)
_MOVES: dict[int, tuple[int, float]] = {
    1: (_SIDEWAYS, -1.0), 2: (_SIDEWAYS, 1.0), 3: (_UPRIGHT, -1.0), 4: (_UPRIGHT, 1.0), 5: (_ZOOM, 1.0),
    6: (_ZOOM, -1.0), 7: (_TURN, 1.0), 8: (_TURN, -1.0), 9: (_PHASES, 1.0), 10: (_PHASES, -1.0),
    11: (_SHAKE, 1.0),
}  # fmt: skip
"""Class to component and direction; x to the right, y down, angles clockwise."""
_JITTER = 0.006
"""The camera shakes by up to this share of the shorter side, each way."""
_CONTRAST = 45.0
"""Objects and backdrop differ by at least this many levels in their mean colours."""
_CLIPS, _STREAM, _TILE = range(3)


@dataclass(frozen=True)
class Poses:
    """Where the object is, one entry per frame, float64: centre x, y and diameter as shares of the picture's
    shorter side (0, 0 is the middle), angle in radians clockwise."""

    x: Array
    y: Array
    size: Array
    angle: Array


def poses(rng: np.random.Generator, label: int, frames: int = CLIP, at: Array | None = None) -> Poses:
    """Draw the poses of one clip of class `label` (module docstring).

    at: moments to look at, in frames from the first one, whole or not; None = every frame.
    """
    at = np.arange(frames) if at is None else at
    times = np.repeat(rng.uniform(0, 1, (6, 1)), len(at), 1)
    signs = rng.choice((-1.0, 1.0), 6)
    running = (at + rng.uniform(0, 1)) / frames
    if label in _MOVES:
        component, sign = _MOVES[label]
        times[component], signs[component] = running, sign
    across = rng.uniform(0.28, 0.45, 2) * signs[:2]
    zoom, phases = rng.uniform(0.6, 0.95, 2) * (signs[_ZOOM], signs[_PHASES])
    turn = rng.uniform(1.4, 2.6) * signs[_TURN]
    reach, axis = rng.uniform(0.07, 0.12), rng.uniform(0, 2 * math.pi)
    wave = reach * np.sin(2 * math.pi * (rng.uniform(1.8, 2.6) * times[_SHAKE] + rng.uniform(0, 1)))
    two = 0.5 - np.abs(2 * times[_PHASES] - 1)  # up, then down
    x = rng.uniform(-0.16, 0.16) + across[0] * (times[_SIDEWAYS] - 0.5) + math.cos(axis) * wave
    y = rng.uniform(-0.16, 0.16) + across[1] * (times[_UPRIGHT] - 0.5) + math.sin(axis) * wave
    size = rng.uniform(0.38, 0.52) * np.exp(zoom * (times[_ZOOM] - 0.5) + phases * two)
    angle = rng.uniform(0, 2 * math.pi) + turn * (times[_TURN] - 0.5)
    return Poses(x, y, size, angle)


@dataclass(frozen=True)
class Event:
    """Motion `label` in frames start..stop-1 of a stream; before and after, the object stands still."""

    label: int
    start: int
    stop: int


@dataclass(frozen=True)
class GestureFrame:
    """One picture of a stream, uint8 [H, W, 3] BGR; `label` is what moves in it, into GESTURES (0: still).

    event: the motion nearest to it.  index: frame number.  pts_ns: index / FRAMES_PER_SECOND.
    """

    image: Array
    label: int
    event: Event
    index: int
    pts_ns: int


@dataclass(frozen=True)
class _Scene:
    """A backdrop with margins, float32; the sprite's levels; noise level."""

    ground: Array
    levels: list[Array]
    noise: float


class GestureWorld:
    """Clips and a stream of motions; every seed has others.

    seed: 0 to 2^63 - 1.  width, height: pixels, 32 to 4096.  pictures: uint8 [h, w, 3] BGR of at least 2 x 2,
    half of the objects and backdrops are cut from them (`sprites.load_pictures`).
    Raises: UsageError for values out of range.
    """

    def __init__(
        self, seed: int = 0, width: int = 64, height: int = 64, pictures: Sequence[Array] = ()
    ) -> None:  # fmt: skip
        if not 0 <= seed < 2**63:
            raise UsageError(
                f"gestures seed {seed}: out of range, expected 0 to {2**63 - 1}. Choose another seed"
            )
        if not (32 <= width <= 4096 and 32 <= height <= 4096):
            raise UsageError(f"gestures size {width}x{height}: out of range, expected 32x32 to 4096x4096")
        self.seed, self.width, self.height, self.pictures = seed, width, height, pictures
        self._short = min(width, height)
        self._margin = math.ceil(_JITTER * self._short) + 1
        tile = np.random.default_rng([seed, _TILE]).standard_normal((height + 61, width + 61, 3), np.float32)
        self._grain = np.clip(tile, -3, 3)
        self._kept: tuple[int, _Scene, Poses] | None = None

    def clip(self, index: int, frames: int = CLIP, lead: int = 0) -> tuple[Array, int]:
        """Clip `index` (>= 0): uint8 [lead + frames, H, W, 3] BGR and its class, which is index % 12.

        lead: frames before the motion, with the object at rest where the motion will begin.
        """
        rng = self._random(_CLIPS, index)
        label = index % len(GESTURES)
        path = poses(rng, label, frames)
        scene = self._scene(rng, rng)
        return np.stack([self._draw(scene, path, max(i, 0), rng) for i in range(-lead, frames)]), label

    def poses(self, index: int, frames: int = CLIP, lead: int = 0) -> Poses:
        """Where the object of clip `index` is, in each of its lead + frames pictures."""
        path = poses(self._random(_CLIPS, index), index % len(GESTURES), frames)
        at = np.maximum(np.arange(-lead, frames), 0)
        return Poses(path.x[at], path.y[at], path.size[at], path.angle[at])

    def event(self, number: int) -> Event:
        """The motion of object `number` (>= 0), which is seen in frames number * EVENT .. + EVENT - 1."""
        rng = self._random(_STREAM, number, 0)
        label = int(rng.integers(1, len(GESTURES)))
        start = number * EVENT + int(rng.integers(EVENT // 4, EVENT - CLIP - 2))
        return Event(label, start, start + CLIP)

    def frame(self, index: int) -> GestureFrame:
        """Frame `index` (>= 0) of the stream: one object after the other."""
        if index < 0:
            raise UsageError(f"gestures frame {index}: out of range, expected 0 or more")
        number = index // EVENT
        event = self.event(number)
        scene, path = self._object(number)
        at = min(max(index - event.start, 0), CLIP - 1)
        image = self._draw(scene, path, at, self._random(_STREAM, number, 2, index))
        label = event.label if event.start <= index < event.stop else STILL
        return GestureFrame(image, label, event, index, round(index * 1e9 / FRAMES_PER_SECOND))

    def seen(self, moment: float) -> Array:
        """The stream's picture at `moment` (>= 0), in frames: between two of them too, for cameras of other rates.

        At whole moments it is the picture of `frame`. uint8 [H, W, 3] BGR.
        """
        index = int(moment)
        if index == moment:
            return self.frame(index).image
        number = index // EVENT
        event = self.event(number)
        at = min(max(moment - event.start, 0.0), CLIP - 1.0)
        path = poses(self._random(_STREAM, number, 1), event.label, at=np.array([at]))
        part = int((moment - index) * 2**32)
        return self._draw(self._object(number)[0], path, 0, self._random(_STREAM, number, 2, index, part))

    def _object(self, number: int) -> tuple[_Scene, Poses]:
        """What is seen in the frames of object `number`, and where."""
        if self._kept is None or self._kept[0] != number:
            rng = self._random(_STREAM, number, 1)
            path = poses(rng, self.event(number).label)
            self._kept = (number, self._scene(rng, self._random(_STREAM, 2**40, number // SCENE)), path)
        return self._kept[1:]

    def _random(self, *key: int) -> np.random.Generator:
        if min(key) < 0:
            raise UsageError(f"gestures clip or event {min(key)}: out of range, expected 0 or more")
        return np.random.default_rng([self.seed, *key])

    def _scene(self, rng: np.random.Generator, ground: np.random.Generator) -> _Scene:
        more = 2 * self._margin
        behind = backdrop(ground, self.height + more, self.width + more, self.pictures)
        thing = sprite(rng, self.pictures)
        for _ in range(20):  # something to see
            if apart(thing, behind) >= _CONTRAST:
                break
            thing = sprite(rng, self.pictures)
        return _Scene(behind, mipmap(thing), float(ground.uniform(1, 4)))

    def _draw(self, scene: _Scene, path: Poses, i: int, rng: np.random.Generator) -> Array:
        """Backdrop, object, camera jitter, brightness and noise of one frame."""
        dx, dy = (float(v) for v in rng.uniform(-_JITTER, _JITTER, 2) * self._short)
        image = _window(scene.ground, self._margin - dx, self._margin - dy, self.width, self.height)
        x = self.width / 2 + float(path.x[i]) * self._short + dx
        y = self.height / 2 + float(path.y[i]) * self._short + dy
        _stamp(image, scene.levels, x, y, float(path.size[i]) * self._short, float(path.angle[i]))
        image *= rng.uniform(0.97, 1.03)
        top, left = rng.integers(0, 62, 2)
        image += scene.noise * self._grain[top : top + self.height, left : left + self.width]
        return np.asarray(np.clip(np.rint(image), 0, 255), np.uint8)


def _window(ground: Array, x: float, y: float, width: int, height: int) -> Array:
    """The part of float32 [H, W, 3] whose corner is at (x, y), between pixels: bilinear."""
    left, top = int(x), int(y)
    fx, fy = np.float32(x - left), np.float32(y - top)
    rows = ground[top : top + height, left : left + width + 1] * (1 - fy)
    rows += ground[top + 1 : top + 1 + height, left : left + width + 1] * fy
    part: Array = rows[:, :-1] * (1 - fx)
    part += rows[:, 1:] * fx
    return part


def _stamp(image: Array, levels: list[Array], x: float, y: float, size: float, angle: float) -> None:
    """Blend a sprite into float32 [H, W, 3]: centre x, y, diameter in pixels, turned clockwise; bilinear."""
    level = min(max(int(math.log2(SIDE / max(size, 1.0))), 0), len(levels) - 1)
    texels = levels[level]
    side, reach = texels.shape[0], size * 0.75
    scale, middle = (side - 2) / size, np.float32(side / 2 - 0.5)
    x0, x1 = max(int(x - reach), 0), min(int(x + reach) + 2, image.shape[1])
    y0, y1 = max(int(y - reach), 0), min(int(y + reach) + 2, image.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    px = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - x)
    py = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - y))[:, None]
    cos, sin = np.float32(math.cos(angle) * scale), np.float32(math.sin(angle) * scale)
    u = np.clip(px * cos + py * sin + middle, 0, side - 1.001)  # the outermost texels are empty
    v = np.clip(py * cos - px * sin + middle, 0, side - 1.001)
    column, row = u.astype(np.intp), v.astype(np.intp)
    fu, fv = (u - column)[..., None], (v - row)[..., None]
    flat, at = texels.reshape(-1, 4), row * side + column
    upper = flat[at] * (1 - fu) + flat[at + 1] * fu
    lower = flat[at + side] * (1 - fu) + flat[at + side + 1] * fu
    blend = upper * (1 - fv) + lower * fv
    window = image[y0:y1, x0:x1]
    window *= 1 - blend[..., 3:]
    window += blend[..., :3]


def clip(
    seed: int, index: int, frames: int = CLIP, size: int = 64, pictures: Sequence[Array] = ()
) -> tuple[Array, int]:
    """Clip `index` of `GestureWorld(seed, size, size, pictures)`: (uint8 [frames, size, size, 3] BGR, class)."""
    return GestureWorld(seed, size, size, pictures).clip(index, frames)
