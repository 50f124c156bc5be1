"""The contents of an endless street: what stands where, and where the moving things are at time t.

Everything is a closed formula of (seed, t): blocks of street are numbered and filled from a random
stream of their own, traffic is made of numbered slots that move with their lane. Nothing is
integrated over time, so any moment can be asked for directly.

The street runs along +x; y = 0 is the middle of the camera's lane, positive to the left. Traffic
keeps to the right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from edgekit.synth import objects, vehicles
from edgekit.synth.mesh import Mesh

LANE = 3.3
PARKING = 2.3
REACH = 170.0
"""Objects further ahead than this (metres) are not drawn."""

_BLOCK, _VEHICLE, _WALKER, _LAMPS = range(4)


def stream(seed: int, *key: int) -> Random:
    """A random stream of its own for every seed (any size) and key of integers (each within ±2^31)."""
    number = seed
    for part in key:
        number = (number << 32) | (part & 0xFFFFFFFF)
    return Random(number)


@dataclass(frozen=True)
class Thing:
    """A mesh placed in the street: metres, x absolute along the street, `order` = x by which it is sorted."""

    mesh: Mesh
    x: float
    y: float
    z: float
    order: float
    label: int = -1
    state_key: int = -1
    """>= 0: a traffic light whose lamp changes; the number picks its looks."""
    simple: Mesh | None = None
    """Cheaper stand-in for far away."""


@dataclass(frozen=True)
class Lane:
    y: float
    heading: int
    speed: float
    spacing: float
    presence: float
    trucks: float
    number: int


class Street:
    """Layout and traffic of the street with number `seed`."""

    def __init__(self, seed: int, night: bool) -> None:
        rng = stream(seed, 1)
        self.seed, self.night = seed, night
        self.style = rng.choices(("city", "suburb", "country"), (5, 3, 2))[0]
        self.block = rng.uniform(75, 120)
        self.crossing = rng.uniform(11, 16)
        self.waiting = rng.random() < 0.3 and self.style != "country"
        self.speed = 0.0 if self.waiting else rng.uniform(5, 14)
        right = rng.choice((0, 0, 1))
        left = rng.choice((1, 1, 2))
        self.right_lanes, self.left_lanes = right, left
        park_right = self.style != "country" and rng.random() < 0.6
        park_left = self.style != "country" and rng.random() < 0.6
        self.right = -(LANE / 2 + right * LANE) - (PARKING if park_right else 0.4)
        self.left = LANE / 2 + left * LANE + (PARKING if park_left else 0.4)
        self.pavement = rng.uniform(2.4, 4.2) if self.style != "country" else 0.0
        self.setback = {"city": rng.uniform(0, 1.5), "suburb": rng.uniform(2, 7), "country": 8.0}[self.style]
        self.trees = {"city": 0.35, "suburb": 0.7, "country": 0.9}[self.style] * rng.uniform(0.5, 1.1)
        self.crowd = {"city": 0.7, "suburb": 0.4, "country": 0.12}[self.style] * rng.uniform(0.6, 1.3)
        trucks = rng.uniform(0.12, 0.4)
        density = rng.uniform(0.45, 0.9)
        self.origin = 0.0
        if self.waiting:
            self.origin = 3 * self.block - 5.0 - rng.uniform(0.8, 14.0)
        else:
            self.origin = rng.uniform(0, 400)

        lanes: list[Lane] = []
        for i in range(right):
            speed = 0.0 if self.waiting else self.speed + rng.uniform(-2.5, 2.5)
            lanes.append(Lane(-LANE * (i + 1), 0, speed, rng.uniform(11, 24), density, trucks, len(lanes)))
        for i in range(left):
            speed = 0.0 if self.waiting else -rng.uniform(6, 13)
            lanes.append(Lane(LANE * (i + 1), 2, speed, rng.uniform(10, 22), density, trucks, len(lanes)))
        if park_right:
            lanes.append(
                Lane(self.right + PARKING / 2, 0, 0.0, rng.uniform(6, 8.5), rng.uniform(0.35, 0.8), 0.1, 20)
            )
        if park_left:
            lanes.append(
                Lane(self.left - PARKING / 2, 2, 0.0, rng.uniform(6, 8.5), rng.uniform(0.35, 0.8), 0.1, 21)
            )
        self.lanes = tuple(lanes)
        self.lead = rng.uniform(13, 30)
        self.has_lead = rng.random() < 0.75
        self.truck_share = trucks
        self._blocks: dict[int, list[Thing]] = {}
        self._meshes: dict[tuple[int, ...], Mesh] = {}
        self._chances: dict[tuple[int, ...], tuple[float, float, float, float, float]] = {}

    def position(self, t: float) -> float:
        """x of the camera after t seconds."""
        return self.origin + self.speed * t + (0.6 * math.sin(0.5 * t) if self.speed else 0.0)

    def things(self, t: float) -> Iterator[Thing]:
        """Everything that can be in view at time t, unsorted."""
        here = self.position(t)
        first, last = math.floor((here - 45) / self.block), math.floor((here + REACH) / self.block)
        for number in range(first, last + 1):
            for thing in self._block(number):
                ahead = thing.x - here
                if ahead > REACH or thing.order < here:
                    continue
                if thing.state_key >= 0:
                    state = "red" if self.waiting or ahead > 38 else ("yellow" if ahead > 33 else "green")
                    yield replace(thing, mesh=self._light(thing.state_key, state))
                elif thing.simple is not None and ahead > 75:
                    yield replace(thing, mesh=thing.simple)
                else:
                    yield thing
            if self.waiting or self.style != "country":
                yield from self._crossing(number, t)
        for lane in self.lanes:
            yield from self._traffic(lane, here, t)
        if self.has_lead:
            yield from self._ahead(here, t)
        if self.pavement:
            yield from self._walkers(here, t)

    def inside_crossing(self, x: float, margin: float) -> bool:
        """Whether x lies in a side street (each block starts with one), the zebra before it included."""
        within = x % self.block
        return within < self.crossing + margin or within > self.block - 5.5 - margin

    def _draws(self, *key: int) -> tuple[float, float, float, float, float]:
        """What chance decides for a slot of traffic: four numbers in 0..1 and a sign, the same every time."""
        found = self._chances.get(key)
        if found is None:
            if len(self._chances) > 5000:
                self._chances.clear()
            rng = stream(self.seed, *key)
            found = (rng.random(), rng.random(), rng.random(), rng.random(), rng.choice((-1.0, 1.0)))
            self._chances[key] = found
        return found

    def _keep(self, key: tuple[int, ...], mesh: Mesh) -> Mesh:
        if len(self._meshes) > 3000:
            self._meshes.clear()
        self._meshes[key] = mesh
        return mesh

    def _light(self, number: int, state: str) -> Mesh:
        key = (_LAMPS, number, ("red", "yellow", "green").index(state))
        return self._meshes.get(key) or self._keep(
            key, objects.traffic_light(stream(self.seed, 2, number), state)
        )

    def _vehicle(self, lane: int, slot: int, heading: int, truck: bool, braking: bool) -> Mesh:
        key = (_VEHICLE, lane, slot, heading, truck, braking)
        make = vehicles.truck if truck else vehicles.car
        return self._meshes.get(key) or self._keep(
            key, make(stream(self.seed, 3, lane, slot), heading, braking)
        )

    def _slots(self, low: float, high: float, spacing: float, shift: float) -> Iterator[tuple[int, float]]:
        for slot in range(math.ceil((low - shift) / spacing), math.floor((high - shift) / spacing) + 1):
            yield slot, slot * spacing + shift

    def _traffic(self, lane: Lane, here: float, t: float) -> Iterator[Thing]:
        for slot, at in self._slots(here - 6, here + REACH, lane.spacing, lane.speed * t):
            present, kind, along, across, _ = self._draws(4, lane.number, slot)
            if present > lane.presence:
                continue
            truck = kind < lane.trucks
            slack = max(lane.spacing - (11.0 if truck else 5.0), 0.0) * 0.45
            x = at + (-slack + (slack + slack) * along)
            if lane.speed == 0.0 and self.inside_crossing(x, 5.5 if truck else 3.0):
                continue
            if lane.number >= 20 and truck and lane.spacing < 10:
                truck = False
            braking = lane.speed == 0.0 and lane.number < 20
            mesh = self._vehicle(lane.number, slot, lane.heading, truck, braking)
            y = lane.y + (-0.25 + 0.5 * across)
            yield Thing(mesh, x, y, 0.0, x, objects.TRUCK if truck else objects.CAR)

    def _ahead(self, here: float, t: float) -> Iterator[Thing]:
        for slot in range(1, 6):
            kind, along, across, _, _ = self._draws(5, slot)
            truck = kind < self.truck_share
            gap = self.lead * slot + (-3 + 6 * along) + 1.5 * math.sin(0.4 * t + slot)
            x = here + gap
            if self.waiting:
                x = (
                    3 * self.block
                    + self.crossing
                    + 4
                    + self.lead * 0.5 * slot
                    + (2.0 * t if slot > 2 else 1.2 * t)
                )
            braking = not self.waiting and math.sin(0.4 * t + slot) < -0.2
            mesh = self._vehicle(30, slot, 0, truck, braking)
            yield Thing(mesh, x, -0.3 + 0.6 * across, 0.0, x, objects.TRUCK if truck else objects.CAR)

    def _crossing(self, number: int, t: float) -> Iterator[Thing]:
        """Side street of block `number`: cars that wait, or traffic and walkers while the camera waits."""
        start = number * self.block
        if self.waiting and number == 3:
            for lane, share, heading, sign in ((40, 0.72, 1, 1.0), (41, 0.28, 3, -1.0)):
                x = start + self.crossing * share
                for slot, y in self._slots(-34, 34, 9.5 + 4 * share, sign * (5.5 + 2 * share) * t):
                    rng = stream(self.seed, 6, lane, slot)
                    if rng.random() > 0.6:
                        continue
                    truck = rng.random() < 0.25
                    mesh = self._vehicle(lane, slot, heading, truck, False)
                    yield Thing(
                        mesh, x, y + rng.uniform(-1, 1), 0.0, x, objects.TRUCK if truck else objects.CAR
                    )
            for lane, sign in ((50, 1.0), (51, -1.0)):
                for slot, y in self._slots(self.right - 3, self.left + 3, 4.2, sign * 1.25 * t):
                    rng = stream(self.seed, 7, lane, slot)
                    if rng.random() < 0.6:
                        x = start - 3.0 + rng.uniform(-1.2, 1.2)
                        yield self._walker(lane, slot, x, y, 1.25 * t, False)
            return
        if self.style == "country":
            return
        for lane, heading, side in ((42, 1, -1.0), (43, 3, 1.0)):
            rng = stream(self.seed, 8, lane, number)
            x = start + self.crossing * (0.72 if heading == 1 else 0.28)
            edge = self.right if side < 0 else self.left
            for slot in range(2):
                if rng.random() < 0.55:
                    truck = rng.random() < 0.2
                    mesh = self._vehicle(lane, number * 4 + slot, heading, truck, False)
                    y = edge + side * ((6.0 if truck else 3.2) + 7.5 * slot + rng.uniform(0, 1.5))
                    yield Thing(mesh, x, y, 0.0, x, objects.TRUCK if truck else objects.CAR)

    def _walker(self, lane: int, slot: int, x: float, y: float, walked: float, along: bool) -> Thing:
        start = self._draws(9, lane, slot)[0]
        phase = -1 if walked == 0 else int(((walked / 1.4 + start) % 1.0) * 8)
        key = (_WALKER, lane, slot, phase, along)
        mesh = self._meshes.get(key)
        if mesh is None:
            rng = stream(self.seed, 9, lane, slot)
            rng.random()  # `start`
            mesh = self._keep(key, objects.pedestrian(rng, phase / 8 if phase >= 0 else -1, along))
        return Thing(mesh, x, y, 0.0, x, objects.PEDESTRIAN)

    def _walkers(self, here: float, t: float) -> Iterator[Thing]:
        for lane, edge, side in ((60, self.right, -1.0), (70, self.left, 1.0)):
            for i, (speed, spacing) in enumerate(((1.25, 11.0), (-1.15, 13.0), (0.0, 16.0))):
                for slot, at in self._slots(here + 1, here + 90, spacing, speed * t):
                    present, forward, across, company, other = self._draws(10, lane + i, slot)
                    if present > self.crowd:
                        continue
                    x = at + (-4 + 8 * forward)
                    y = edge + side * (0.35 + (max(self.pavement - 0.3, 0.6) - 0.35) * across)
                    yield self._walker(lane + i, slot, x, y, abs(speed) * t, True)
                    if company < 0.25:
                        y += side * (other * 0.6)
                        yield self._walker(lane + i + 100, slot, x + 0.3, y, abs(speed) * t, True)

    def _block(self, number: int) -> list[Thing]:
        if number not in self._blocks:
            if len(self._blocks) > 12:
                self._blocks.clear()
            self._blocks[number] = list(self._furnish(number))
        return self._blocks[number]

    def _furnish(self, number: int) -> Iterator[Thing]:
        rng = stream(self.seed, 11, number)
        start = number * self.block
        free, end = start + self.crossing, start + self.block
        for side, edge in ((-1.0, self.right), (1.0, self.left)):
            kerb = edge + side * 0.45
            wall = edge + side * (self.pavement + self.setback)
            at = free + rng.uniform(0, 2)
            while at < end - 6:
                front = min(rng.uniform(9, 22), end - at)
                if rng.random() < {"city": 0.96, "suburb": 0.75, "country": 0.15}[self.style]:
                    house = objects.building(
                        rng, front, rng.uniform(9, 16), side, self.night, self.style != "city"
                    )
                    plain = Mesh(
                        house.corners[:3], house.normals[:3], house.colors[:3], house.glow[:3], house.lamps
                    )
                    yield Thing(house, at, wall, 0.0, at + front + 1.0, simple=plain)
                at += front + (0.0 if self.style == "city" and rng.random() < 0.7 else rng.uniform(1, 7))
            at = free + rng.uniform(2, 9)
            while at < end - 4:
                if rng.random() < self.trees:
                    y = kerb + side * (0.6 if self.pavement else rng.uniform(1.5, 9))
                    yield Thing(objects.tree(rng), at, y, 0.0, at + 0.3)
                at += rng.uniform(7, 15)
            if self.pavement:
                for at in (free + 6, free + 6 + self.block * 0.42):
                    yield Thing(objects.street_lamp(-side * 1.8), at, kerb, 0.0, at + 0.2)
            for _ in range(rng.randint(1, 4)):
                at = rng.uniform(free + 1, end - 7)
                height = rng.uniform(2.0, 2.9)
                yield Thing(objects.pole(height, 0.035), at, kerb, 0.0, at + 0.02)
                yield Thing(objects.sign(rng), at, kerb, height, at, objects.SIGN)
                if rng.random() < 0.15:
                    yield Thing(objects.sign(rng), at, kerb, height - 0.95, at, objects.SIGN)
        if self.style == "country" and rng.random() < 0.6:
            return
        yield from self._lights(rng, end - 2.0, number * 100)
        if rng.random() < 0.5:
            yield from self._lights(rng, start + self.crossing + 1.0, number * 100 + 20)
        if rng.random() < 0.4:
            yield from self._lights(rng, start + self.block * 0.55, number * 100 + 40)

    def _lights(self, rng: Random, x: float, number: int) -> Iterator[Thing]:
        blank = objects.traffic_light(rng, "red")
        number &= 0x3FFFFFFF
        places = [(self.right - 0.45, rng.uniform(2.5, 3.3))]
        if rng.random() < 0.55:
            places.append((self.left + 0.45, rng.uniform(2.5, 3.3)))
        for i, (y, z) in enumerate(places):
            yield Thing(objects.pole(z + 0.3, 0.05), x, y, 0.0, x + 0.02)
            yield Thing(blank, x, y, z, x, objects.LIGHT, number + i)
        if rng.random() < 0.45:
            y = self.right - 0.45
            yield Thing(objects.pole(5.9, 0.08, -y + 0.3), x + 0.1, y, 0.0, x + 0.12)
            yield Thing(blank, x, 0.3, 5.3, x, objects.LIGHT, number + 10)
