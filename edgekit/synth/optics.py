"""Light, weather and sensor: from paint numbers to pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

from edgekit.synth.mesh import Color, Mesh, MeshBuilder

Array = np.ndarray

_SKIES: dict[str, tuple[tuple[Color, Color], ...]] = {  # (zenith, horizon)
    "day": (
        ((214, 150, 84), (236, 220, 200)),
        ((200, 130, 60), (240, 226, 206)),
        ((226, 176, 120), (238, 228, 216)),
    ),
    "overcast": (((176, 168, 162), (206, 202, 198)), ((150, 146, 144), (186, 184, 182))),
    "dusk": (((120, 78, 66), (110, 150, 226)), ((96, 66, 60), (130, 140, 196))),
    "night": (((22, 14, 12), (44, 34, 30)), ((30, 20, 14), (60, 48, 40))),
}


@dataclass(frozen=True)
class Look:
    """How a street is lit and filmed. Levels are 0..255 BGR; `haze` is 1/m."""

    time: str
    zenith: Array
    horizon: Array
    ambient: Array
    sun: Array
    sun_from: Array
    haze: float
    haze_color: Array
    rain: float
    wet: float
    gain: Array
    contrast: float
    noise: float
    blur: bool
    ground: Array
    """Albedo of terrain, road, pavement, marking, kerb: [5, 3]."""
    seed: int

    @property
    def night(self) -> bool:
        return self.time == "night"

    @property
    def lamps_lit(self) -> bool:
        return self.time in ("night", "dusk")

    @staticmethod
    def choose(
        rng: Random,
        seed: int,
        width: int,
        height: int,
        time: str | None,
        rain: float | None,
        fog: float | None,
    ) -> Look:
        """Draw hour, weather and camera from `rng`; arguments that are not None override the draw."""
        drawn = rng.choices(("day", "overcast", "dusk", "night"), (38, 22, 14, 26))[0]
        time = drawn if time is None else time
        raining, fogged = rng.random() < 0.25, rng.random() < 0.2
        rain_level = (rng.uniform(0.3, 1.0) if raining else 0.0) if rain is None else rain
        fog_level = (rng.uniform(0.2, 1.0) if fogged else 0.0) if fog is None else fog
        zenith, low = rng.choice(_SKIES[time])
        angle = rng.uniform(0, 2 * math.pi)
        up = {"day": 0.75, "overcast": 0.95, "dusk": 0.3, "night": 0.9}[time]
        flat = math.sqrt(1 - up * up)
        sun_from = np.array([-abs(math.cos(angle)) * flat, math.sin(angle) * flat, up], np.float32)
        ambient = {"day": (0.66, 0.62, 0.60), "overcast": (0.72, 0.70, 0.69), "dusk": (0.46, 0.42, 0.44),
                   "night": (0.25, 0.22, 0.20)}[time]  # fmt: skip
        sun = {"day": (0.44, 0.50, 0.52), "overcast": (0.14, 0.15, 0.15), "dusk": (0.08, 0.16, 0.26),
               "night": (0.02, 0.03, 0.04)}[time]  # fmt: skip
        dim = 1.0 - 0.25 * rain_level
        horizon = np.array(low, np.float32) * dim
        gray = np.full(3, float(horizon.mean()), np.float32)
        haze_color = horizon * (1 - 0.6 * fog_level) + gray * 0.6 * fog_level
        top = np.array(zenith, np.float32) * dim
        terrain = rng.choice(((70, 116, 96), (64, 104, 84), (96, 120, 130), (110, 114, 116)))
        asphalt, paving = rng.uniform(74, 122), rng.uniform(130, 178)
        tint = rng.uniform(-6, 6)
        ground = np.array([
            terrain, (asphalt + tint, asphalt, asphalt - tint), (paving, paving + 3, paving + 8),
            (225, 228, 230), (178, 180, 182),
        ], np.float32)  # fmt: skip
        if rain_level > 0:
            ground[1:3] *= 0.74
        gain = np.array([rng.uniform(0.9, 1.1) for _ in range(3)], np.float32) * rng.uniform(0.85, 1.15)
        contrast = rng.uniform(0.88, 1.15)
        noise = {"night": rng.uniform(4, 9), "dusk": rng.uniform(3, 6)}
        clear = 1 - 0.7 * max(fog_level, rain_level)
        return Look(
            time=time,
            zenith=top * (1 - 0.7 * fog_level) + haze_color * 0.7 * fog_level,
            horizon=haze_color,
            ambient=np.array(ambient, np.float32) * dim,
            sun=np.array(sun, np.float32) * dim * clear,
            sun_from=sun_from,
            haze=1 / 900 + fog_level / 60 + rain_level / 320,
            haze_color=haze_color,
            rain=rain_level,
            wet=0.28 if rain_level > 0 else 0.0,
            gain=gain,
            contrast=contrast,
            noise=noise.get(time, rng.uniform(1, 4)),
            blur=rng.random() < 0.55,
            ground=ground,
            seed=seed,
        )

    def light(self, colors: Array, normals: Array, depth: Array, shines: Array) -> Array:
        """Albedo [n, 3] to pixel levels, uint8 [n, 3]: sun and sky, headlamps, haze, camera gain."""
        unit = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
        facing = np.maximum(unit @ self.sun_from, 0.0)[:, None]
        light = self.ambient + self.sun * facing
        if self.lamps_lit:
            beam = (
                (0.95 if self.night else 0.4)
                * np.exp(-depth / 26.0)
                * (0.45 + 0.55 * np.maximum(-unit[:, 0], 0.0))
            )
            light = light + beam[:, None] * np.array([0.86, 0.97, 1.0], np.float32)
        level = np.where(shines[:, None], colors, colors * light)
        through = np.exp(-depth * self.haze)[:, None]
        return self.expose(level * through + self.haze_color * (1 - through))

    def expose(self, level: Array) -> Array:
        """Camera gain and contrast, clipped to uint8."""
        level = (level * self.gain - 110.0) * self.contrast + 110.0
        result: Array = np.clip(level, 0, 255).astype(np.uint8)
        return result

    def row_colors(self, height: int, horizon: float, focal: float, camera_height: float) -> Array:
        """Colours by row of terrain (sky above it), road, pavement, marking, kerb: uint8 [5 * H, 3]."""
        v = np.arange(height, dtype=np.float32) + 0.5
        below = np.maximum(v - horizon, 0.35)
        depth = focal * camera_height / below
        up = np.tile(np.array([[0, 0, 1]], np.float32), (height, 1))
        kinds = []
        rise = np.clip((horizon - v) / max(horizon, 1.0), 0, 1)[:, None] ** 0.7
        sky = self.expose(self.horizon * (1 - rise) + self.zenith * rise)
        dark = np.zeros(height, bool)
        for kind, albedo in enumerate(self.ground):
            color = np.tile(albedo, (height, 1))
            if self.wet and kind in (1, 2):
                mirror = np.clip(depth / 40.0, 0, 1)[:, None] * self.wet * 2
                color = color * (1 - mirror) + self.horizon / np.maximum(self.ambient, 0.2) * mirror * 0.8
            lit = self.light(np.minimum(color, 255), up, depth, dark)
            kinds.append(np.where((v < horizon)[:, None], sky, lit))
        return np.concatenate(kinds)

    def shadow(self, mesh: Mesh, label: int) -> Mesh:
        """Dark patch on the ground under a vehicle (label 0, 1) or a walker (2)."""
        strength = 0.42 if self.time == "day" else 0.55
        b, g, r = (float(level) * strength for level in self.ground[1])
        x0, x1, y0, y1 = mesh.footprint
        if label == 2:
            return _patch(-0.18, 0.18, round(y0, 2), round(y1, 2), (b, g, r))
        grow = 0.12
        return _patch(
            round(x0 - grow, 2), round(x1 + grow, 2), round(y0 - grow, 2), round(y1 + grow, 2), (b, g, r)
        )


@lru_cache(maxsize=512)
def _patch(x0: float, x1: float, y0: float, y1: float, color: Color) -> Mesh:
    m = MeshBuilder()
    m.rect(2, 0.01, (x0, y0), (x1, y1), color, 1.0)
    return m.build()


@lru_cache(maxsize=4)
def _textures(seed: int, height: int, width: int, noise: float, rain: float) -> tuple[Array, Array, Array]:
    """Drawn once per street, int16: asphalt grain [128, 128], then sensor noise and rain."""
    rng = np.random.default_rng([seed, 77])
    grain = rng.normal(0, 1, (128, 128))
    coarse = np.zeros((128, 128))
    for wave in range(1, 5):  # smooth patches that repeat without a seam
        phase = rng.uniform(0, 2 * math.pi, (2, 3))
        turn = 2 * math.pi * np.arange(128) / 128
        for k in range(3):
            coarse += (
                np.sin(wave * turn + phase[0, k])[:, None] * np.sin((k + 1) * turn + phase[1, k])[None, :]
            )
    asphalt = np.clip(4.0 * grain + 1.6 * coarse, -16, 16).astype(np.int16)
    shape = (height + 61, width + 61, 3)
    gray = rng.standard_normal(shape[:2], dtype=np.float32)[..., None]
    sensor = np.zeros((*shape[:2], 4), np.int16)
    sensor[..., :3] = (0.6 * gray + 0.7 * rng.standard_normal(shape, dtype=np.float32)) * noise
    streaks = np.zeros((height * 2, width + 120), np.int16)
    for _ in range(int(rain * width * height / 420)):
        x, y = int(rng.integers(0, width + 116)), int(rng.integers(0, height * 2 - 40))
        length, level = int(rng.integers(7, 26)), int(rng.integers(12, 46))
        lean = float(rng.uniform(0.05, 0.2))
        ys = np.arange(length)
        streaks[y + ys, x + (ys * lean).astype(int)] += level
    return asphalt, sensor, np.minimum(streaks, 70)


def finish(
    look: Look, palette: Array, buffer: Array, first_object: int, horizon: float, middle: float, focal: float,
    camera_height: float, here: float, index: int,
) -> Array:  # fmt: skip
    """Colour the paint numbers; add ground grain, rain, sensor noise and lens blur: uint8 [H, W, 3] BGR."""
    height, width = buffer.shape
    asphalt, sensor, streaks = _textures(look.seed, height, width, round(look.noise, 2), round(look.rain, 2))
    table = np.zeros((len(palette), 4), np.int16)  # a fourth channel makes a pixel one 64-bit word
    table[:, :3] = palette
    level = table.view(np.int64)[:, 0][buffer].view(np.int16).reshape(height, width, 4)

    pick = Random(look.seed * 1_000_003 + index)
    dy, dx = pick.randrange(60), pick.randrange(60)
    level += sensor[dy : dy + height, dx : dx + width]

    top = min(max(int(horizon) + 2, 0), height)
    if top < height:
        below = np.arange(top, height, dtype=np.float32) + 0.5 - horizon
        depth = focal * camera_height / below
        along = (np.floor((depth + here % 64.0) * 4.0).astype(np.int64) & 127) * 128
        steps = (np.arange(width, dtype=np.float32) + 0.5 - middle)[None, :] * (depth * 4.0 / focal)[:, None]
        across = (steps + 4096.0).astype(np.int32) & 127
        grain = asphalt.reshape(-1)[across + along[:, None].astype(np.int32)]
        fade = np.minimum(256.0, 256.0 * 14.0 / depth * float(np.clip(look.ambient.mean() * 1.4, 0.3, 1.0)))
        grain = (grain * fade.astype(np.int16)[:, None]) >> 8
        level[top:] += (grain * (buffer[top:] < first_object))[..., None]
    if look.rain > 0:
        dy, dx = pick.randrange(height), pick.randrange(120)
        level += streaks[dy : dy + height, dx : dx + width, None]
    np.clip(level, 0, 255, out=level)
    result = np.ascontiguousarray(level.astype(np.uint8)[..., :3])
    if look.blur:
        result = _soften(result)
    return result


def _soften(image: Array) -> Array:
    """[1 2 1]/4 in both directions, in 8-bit averages."""
    for axis in (0, 1):
        for forward in (True, False):
            a = image[1:] if axis == 0 else image[:, 1:]
            b = image[:-1] if axis == 0 else image[:, :-1]
            mean = (a & b) + ((a ^ b) >> 1)
            image = image.copy()
            if axis == 0:
                (image[:-1] if forward else image[1:])[:] = mean
            else:
                (image[:, :-1] if forward else image[:, 1:])[:] = mean
    return image


@lru_cache(maxsize=64)
def _sprite(radius: int) -> Array:
    grid = np.arange(-radius, radius + 1, dtype=np.float32) / (radius + 0.5)
    fall = np.clip(1 - np.hypot(grid[:, None], grid[None, :]), 0, 1)
    sprite: Array = (fall**2.2)[..., None]
    return sprite


def glow(look: Look, image: Array, instance: Array, lamps: Array, focal: float) -> None:
    """Add the halo of every lamp in view; `lamps` rows: u, v, x, y, z, radius, b, g, r, facing, owner."""
    height, width = image.shape[:2]
    strength = 0.85 if look.night else 0.5
    for u, v, x, _, _, size, b, g, r, facing, owner in lamps.tolist():
        column, line = int(u), int(v)
        if (
            facing > 0.5
            or not (0 <= column < width and 0 <= line < height)
            or instance[line, column] != int(owner)
        ):
            continue
        radius = int(min(max(size * focal / x, 2.0), 48.0 * width / 640))
        x0, x1 = max(column - radius, 0), min(column + radius + 1, width)
        y0, y1 = max(line - radius, 0), min(line + radius + 1, height)
        halo = _sprite(radius)[
            y0 - line + radius : y1 - line + radius, x0 - column + radius : x1 - column + radius
        ]
        color = np.array((b, g, r), np.float32) * (strength * math.exp(-x * look.haze))
        patch = image[y0:y1, x0:x1]
        patch[:] = np.minimum(patch + halo * color, 255).astype(np.uint8)
