"""The street all around the vehicle: where every solid stands or moves at time t, and what the ground is made of.

Layout, lanes and traffic follow `scene.Street` of the same seed (as there, everything is a closed formula of seed
and time), but the street bends, goes on behind the vehicle, and everything has all its sides. The world's x goes
along the street, y to the left; z = 0 is the ground, which is flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from edgekit.synth import solids
from edgekit.synth.scene import LANE, Street, stream
from edgekit.synth.solids import Solid

Array = np.ndarray

REACH = 85.0
"""Objects further along the street than this from the vehicle (metres) are left out."""
TERRAIN, ROAD, PAVEMENT, MARKING, KERB = range(5)
_STEP = 1e-3
"""Seconds over which velocities are taken."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A solid in the world: x, y in m, yaw in radians, velocity in m/s. key: the same object has the same key."""

    solid: Solid
    x: float
    y: float
    yaw: float
    vx: float
    vy: float
    key: tuple[int, ...]


class RigStreet:
    """The surroundings of seed `seed`. Positions along and across the street are `s`, `d` (metres, d to the left)."""

    def __init__(self, seed: int, night: bool) -> None:
        rng = stream(seed, 101)
        self.seed = seed
        self.street = Street(seed, night)
        self.bend = rng.uniform(0.0, 9.0) if rng.random() < 0.7 else 0.0
        self.wave = 2 * math.pi / rng.uniform(190, 320)
        self.phase = rng.uniform(0, 2 * math.pi)
        has_pavement = self.street.pavement > 0
        self.bike = rng.uniform(1.4, 1.8) if rng.random() < 0.6 else 0.0
        """Width of the strip for bicycles between road and pavement."""
        self.pavement = self.street.pavement
        self.riders = rng.uniform(0.2, 0.7)
        self.crowd = self.street.crowd * rng.uniform(0.25, 0.75)
        self.clutter = rng.uniform(0.2, 0.8)
        self.has_tail = rng.random() < 0.75
        self.right = self.street.right - self.bike
        self.left = self.street.left + self.bike
        self.verge = 0.45 if has_pavement else 1.4
        self._solids: dict[tuple[int, ...], Solid] = {}
        self._blocks: dict[int, list[Placed]] = {}

    # --- the line of the street ---------------------------------------------------------------

    def place(self, s: float, d: float) -> tuple[float, float]:
        """World x, y."""
        angle = self.wave * s + self.phase
        slope = self.bend * self.wave * math.cos(angle)
        return s, self.bend * math.sin(angle) + d * math.sqrt(1 + slope * slope)

    def position(self, t: float) -> float:
        """s of the vehicle after t seconds. Where it waits, its front stays behind the crossing's line."""
        return self.street.position(t) - (4.0 if self.street.waiting else 0.0)

    def heading(self, s: float) -> float:
        """Direction of the street, radians."""
        return math.atan(self.bend * self.wave * math.cos(self.wave * s + self.phase))

    def ego(self, t: float) -> tuple[float, float, float]:
        """World x, y, yaw of the vehicle (its ego frame) after t seconds."""
        moving = 1.0 if self.street.speed else 0.0
        s = self.position(t)
        d = moving * 0.35 * math.sin(0.23 * t + self.phase)
        # it heads where it goes: the drift across adds to the street's own direction
        drift = moving * 0.35 * 0.23 * math.cos(0.23 * t + self.phase) / max(self.street.speed, 3.0)
        x, y = self.place(s, d)
        return x, y, self.heading(s) + drift

    def ground(self, x: Array, y: Array) -> Array:
        """int8 [n]: TERRAIN, ROAD, PAVEMENT, MARKING or KERB, at world x, y (float64 [n])."""
        street = self.street
        angle = self.wave * x + self.phase
        slope = self.bend * self.wave * np.cos(angle)
        d = (y - self.bend * np.sin(angle)) / np.sqrt(1 + slope * slope)
        kind = np.zeros(x.shape, np.int8)
        if self.pavement:
            kind[(d > self.right - self.pavement) & (d < self.left + self.pavement)] = PAVEMENT
        kind[(d > self.right - 0.14) & (d < self.left + 0.14)] = KERB if self.pavement else ROAD
        kind[(d > self.right) & (d < self.left)] = ROAD
        border = LANE / 2
        on_road = (d > street.right) & (d < street.left)
        lines = [border]
        if self.bike or not self.pavement:
            lines += [street.right + 0.15, street.left - 0.15]
        for line in lines:
            kind[np.abs(d - line) < 0.08] = MARKING
        dashed = [-border - LANE * i for i in range(street.right_lanes)]
        dashed += [border + LANE * i for i in range(1, street.left_lanes)]
        dash = np.mod(x, 9.0) < 4.0
        for line in dashed:
            kind[dash & (np.abs(d - line) < 0.07)] = MARKING
        if street.style != "country":
            within = np.mod(x, street.block)
            before = street.block - within
            kind[within < street.crossing] = ROAD
            kind[on_road & (before < 5.6) & (before > 0.2)] = ROAD
            kind[on_road & (before > 1.4) & (before < 4.4) & (np.mod(d, 1.0) < 0.5)] = MARKING
            kind[on_road & (np.abs(d) < border) & (before > 5.0) & (before < 5.4)] = MARKING
        return kind

    # --- what stands and moves ----------------------------------------------------------------

    def objects(self, t: float) -> list[Placed]:
        """Everything within REACH at time t. Labelled things do not overlap."""
        here = self.position(t)
        first, last = (math.floor((here + side) / self.street.block) for side in (-REACH, REACH))
        found: list[Placed] = []
        for number in range(first, last + 1):
            found += [p for p in self._block(number) if abs(p.x - here) < REACH]
        moving = [*self._lanes(here, t), *self._own_lane(here, t)]
        for number in range(first, last + 1):
            moving += self._crossing(number, t)
        moving += [*self._riders(here, t), *self._walkers(here, t)]
        return found + _apart([p for p in moving if abs(p.x - here) < REACH])

    def _solid(self, key: tuple[int, ...], make: Callable[[Random], Solid]) -> Solid:
        found = self._solids.get(key)
        if found is None:
            if len(self._solids) > 4000:
                self._solids.clear()
            found = self._solids[key] = make(stream(self.seed, 102, *key))
        return found

    def _moving(
        self,
        solid: Solid,
        key: tuple[int, ...],
        where: Callable[[float], tuple[float, float]],
        turn: float,
        t: float,
    ) -> Placed:
        """`where` gives s, d at a time; `turn` is the heading relative to the street."""
        s, d = where(t)
        x, y = self.place(s, d)
        x0, y0 = self.place(*where(t - _STEP))
        x1, y1 = self.place(*where(t + _STEP))
        return Placed(
            solid, x, y, self.heading(s) + turn, (x1 - x0) / (2 * _STEP), (y1 - y0) / (2 * _STEP), key
        )

    def _standing(self, solid: Solid, key: tuple[int, ...], s: float, d: float, turn: float) -> Placed:
        x, y = self.place(s, d)
        return Placed(solid, x, y, self.heading(s) + turn, 0.0, 0.0, key)

    def _vehicle(self, key: tuple[int, ...], draw: float, trucks: float) -> Solid:
        """A car, or with chance `trucks` a truck or bus."""
        make = solids.car if draw >= trucks else solids.truck if draw < 0.6 * trucks else solids.bus
        return self._solid(key, make)

    def _lanes(self, here: float, t: float) -> Iterator[Placed]:
        street = self.street
        for lane in street.lanes:
            parked = lane.number >= 20
            for slot, at in street._slots(here - REACH, here + REACH, lane.spacing, lane.speed * t):
                present, kind, along, across, _ = street._draws(104, lane.number, slot)
                if present > lane.presence:
                    continue
                trucks = 0.0 if parked and lane.spacing < 14 else lane.trucks
                solid = self._vehicle((1, lane.number, slot), kind, trucks)
                slack = max(lane.spacing - solid.size[0] - 1.5, 0.0) * 0.5
                s = at + slack * (2 * along - 1)
                if lane.speed == 0.0 and street.inside_crossing(s, solid.size[0] / 2 + 0.8):
                    continue
                d = lane.y + (-0.25 + 0.5 * across)
                turn = (math.pi if lane.heading == 2 else 0.0) + (along + across - 1.0) * (
                    0.10 if parked else 0.03
                )
                speed = lane.speed
                yield self._moving(
                    solid, (1, lane.number, slot),
                    lambda u, s=s, d=d, speed=speed: (s + speed * (u - t), d), turn, t,  # type: ignore[misc]
                )  # fmt: skip

    def _own_lane(self, here: float, t: float) -> Iterator[Placed]:
        street = self.street
        for direction, there in ((1, street.has_lead), (-1, self.has_tail)):
            for slot in range(1, 6) if there else ():
                kind, along, across, _, _ = street._draws(105, direction, slot)
                solid = self._vehicle((2, direction, slot), kind, street.truck_share)
                gap = (max(street.lead, 18.0) if slot > 1 else street.lead) * slot - 2.0 + 4.0 * along
                gap = max(gap, 8.0 + solid.size[0] / 2) + 3.0
                sway = 1.5 if street.speed else 0.0

                def where(u: float, gap: float = gap, sway: float = sway, slot: int = slot, direction: int = direction,
                          d: float = -0.3 + 0.6 * across) -> tuple[float, float]:  # fmt: skip
                    return self.position(u) + direction * (gap + sway * math.sin(0.4 * u + slot)), d

                s = where(t)[0]
                if street.waiting and street.inside_crossing(s, solid.size[0] / 2 + 0.5):
                    continue
                yield self._moving(solid, (2, direction, slot), where, 0.0, t)

    def _crossing(self, number: int, t: float) -> Iterator[Placed]:
        """Vehicles in the side street of block `number`: waiting, or passing while the camera's street waits."""
        street = self.street
        if street.style == "country":
            return
        start = number * street.block
        for lane, heading, share in ((42, 1, 0.72), (43, 3, 0.28)):
            side = -1.0 if heading == 1 else 1.0
            s = start + street.crossing * share
            turn = math.pi / 2 * heading
            if street.waiting:
                speed = -side * (5.0 + 2 * share)
                for slot, d in street._slots(-60, 60, 14.0 + 4 * share, speed * t):
                    draws = street._draws(106, lane, number, slot)
                    if draws[0] < 0.5:
                        solid = self._vehicle((3, lane, number, slot), draws[1], 0.3)
                        d += 1.5 * (2 * draws[2] - 1)
                        yield self._moving(
                            solid, (3, lane, number, slot),
                            lambda u, d=d, speed=speed, s=s: (s, d + speed * (u - t)), turn, t,  # type: ignore[misc]
                        )  # fmt: skip
                continue
            edge = (self.right if side < 0 else self.left) + side * 1.0
            for slot in range(4):
                draws = street._draws(107, lane, number, slot)
                solid = self._vehicle((3, lane, number, slot), draws[1], 0.3)
                d = edge + side * (solid.size[0] / 2 + draws[2])
                edge = d + side * (solid.size[0] / 2 + 1.0)
                if draws[0] < 0.5:
                    yield self._standing(solid, (3, lane, number, slot), s, d, turn + 0.1 * (draws[3] - 0.5))
        if street.waiting:
            for lane, way in ((50, 1.0), (51, -1.0)):
                for slot, d in street._slots(street.right - 3, street.left + 3, 4.2, way * 1.25 * t):
                    draws = street._draws(108, lane, number, slot)
                    if draws[0] < 0.5:
                        s = start - 3.0 + 1.2 * (2 * draws[1] - 1)
                        yield self._walker(
                            (5, lane, number, slot), s, d, 0.0, way * 1.25, way * math.pi / 2, t
                        )

    def _walker(
        self, key: tuple[int, ...], s: float, d: float, vs: float, vd: float, turn: float, t: float
    ) -> Placed:
        speed = abs(vs) + abs(vd)
        start = self.street._draws(109, *key)[0]
        phase = int(((speed * t / 1.4 + start) % 1.0) * 8) if speed else -1
        # the same person in every phase: the stream does not know it
        who = stream(self.seed, 110, *key)
        solid = self._solids.get((*key, 1000 + phase))
        if solid is None:
            solid = self._solids[(*key, 1000 + phase)] = solids.pedestrian(
                who, phase / 8 if phase >= 0 else -1.0
            )
        return self._moving(solid, key, lambda u: (s + vs * (u - t), d + vd * (u - t)), turn, t)

    def _walkers(self, here: float, t: float) -> Iterator[Placed]:
        street = self.street
        wide = max(self.pavement, 1.5)
        for lane, edge, side in ((60, self.right, -1.0), (70, self.left, 1.0)):
            for i, (speed, spacing) in enumerate(((1.25, 9.0), (-1.15, 11.0), (0.0, 14.0))):
                for slot, at in street._slots(here - REACH, here + REACH, spacing, speed * t):
                    present, forward, across, company, other = street._draws(111, lane + i, slot)
                    if present > self.crowd:
                        continue
                    s = at + spacing * 0.35 * (2 * forward - 1)
                    if street.style != "country" and s % street.block < street.crossing and speed == 0.0:
                        continue
                    d = edge + side * (self.verge + 0.35 + max(wide - self.verge - 0.6, 0.2) * across)
                    turn = 0.0 if speed > 0 else math.pi if speed < 0 else 2 * math.pi * company
                    yield self._walker((5, lane + i, slot), s, d, speed, 0.0, turn, t)
                    if company < 0.25:
                        yield self._walker((5, lane + i + 100, slot), s + 0.25, d + side * 0.65 * abs(other), speed,
                                           0.0, turn, t)  # fmt: skip

    def _riders(self, here: float, t: float) -> Iterator[Placed]:
        street = self.street
        for lane, edge, way in ((80, self.right, 1.0), (81, self.left, -1.0)):
            for slot, at in street._slots(here - REACH, here + REACH, 19.0, way * 4.2 * t):
                present, along, across, stands, turn = street._draws(112, lane, slot)
                if present > self.riders:
                    continue
                width = self.bike or 0.9
                d = edge + way * (width / 2 + 0.25 * (2 * across - 1)) * (1 if self.bike else -1)
                s = at + 5.0 * (2 * along - 1)
                speed = way * 4.2
                solid = self._solid((4, lane, slot), solids.bicycle)
                yield self._moving(
                    solid, (4, lane, slot), lambda u, s=s, d=d, speed=speed: (s + speed * (u - t), d),  # type: ignore[misc]
                    (0.0 if way > 0 else math.pi) + 0.06 * turn * stands, t,
                )  # fmt: skip

    def _block(self, number: int) -> list[Placed]:
        if number not in self._blocks:
            if len(self._blocks) > 12:
                self._blocks.clear()
            found: list[Placed] = []
            for i, (solid, s, d, turn) in enumerate(self._furnish(number)):
                found.append(self._standing(solid, (0, number, i), s, d, turn))
            self._blocks[number] = found
        return self._blocks[number]

    def _furnish(self, number: int) -> Iterator[tuple[Solid, float, float, float]]:
        """What never moves in block `number`: solid, s, d, heading relative to the street."""
        street = self.street
        rng = stream(self.seed, 103, number)
        start = number * street.block
        free, end = start + street.crossing, start + street.block
        for side, edge in ((-1.0, self.right), (1.0, self.left)):
            kerb = edge + side * self.verge
            wall = edge + side * (self.pavement + street.setback)
            at = free + rng.uniform(0, 2)
            while at < end - 6:
                front = min(rng.uniform(9, 22), end - at)
                if rng.random() < {"city": 0.96, "suburb": 0.75, "country": 0.15}[street.style]:
                    depth = rng.uniform(9, 16)
                    house = solids.building(rng, front - 0.1, depth, street.style != "city")
                    # a straight wall beside a bend: back off by what the bend takes
                    back = front * front / 8 * self.bend * self.wave**2 + 0.2
                    yield house, at + front / 2, wall + side * (depth / 2 + back), 0.0
                at += front + (0.0 if street.style == "city" and rng.random() < 0.7 else rng.uniform(1, 7))
            at = free + rng.uniform(2, 9)
            while at < end - 7:
                if rng.random() < street.trees:
                    d = kerb + side * (0.1 if self.pavement else rng.uniform(1.5, 9))
                    yield solids.tree(rng), at, d, rng.uniform(0, 6)
                at += rng.uniform(7, 15)
            at = free + rng.uniform(1, 6)
            while at < end - 7:
                if rng.random() < self.clutter:
                    make, off = rng.choice(((solids.post, 0.0), (solids.post, 0.0), (solids.bush, 0.6)))
                    d = kerb + side * off if self.pavement else kerb + side * rng.uniform(1, 5)
                    yield make(rng), at, d, rng.choice((0.0, math.pi / 2))
                at += rng.uniform(4, 14)
            if rng.random() < 0.4 * self.clutter and street.setback > 3:
                d = edge + side * (self.pavement + 1.5)
                yield solids.container(rng), rng.uniform(free + 4, end - 12), d, rng.uniform(-0.1, 0.1)
            if self.pavement:
                for at in (free + 6, free + 6 + street.block * 0.42):
                    yield solids.street_lamp(rng), at, kerb, 0.0 if side < 0 else math.pi
            for _ in range(rng.randint(1, 4)):
                at = rng.uniform(free + 1, end - 7)
                yield solids.sign(rng), at, kerb, 0.0 if side < 0 else math.pi
        if street.style != "country":
            yield solids.traffic_light(rng), end - 2.0, self.right - self.verge, 0.0
            yield solids.traffic_light(rng), free + 1.5, self.left + self.verge, math.pi


def _apart(found: list[Placed]) -> list[Placed]:
    """Without those that stand in another: of two, the first stays. Circles over each object's length and width."""
    kept: list[Placed] = []
    discs: list[tuple[float, float, float]] = []
    for placed in found:
        length, width, _ = placed.solid.size
        count = max(1, round(length / width))
        cos, sin = math.cos(placed.yaw), math.sin(placed.yaw)
        mine = []
        for i in range(count):
            off = ((i + 0.5) / count - 0.5) * length
            mine.append((placed.x + cos * off, placed.y + sin * off, 0.5 * width))
        if any((x - a) ** 2 + (y - b) ** 2 < (r + s) ** 2 for x, y, r in mine for a, b, s in discs):
            continue
        kept.append(placed)
        discs += mine
    return kept
