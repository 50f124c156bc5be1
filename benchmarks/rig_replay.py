"""How old the results of a whole rig are, and what is missing from them: six cameras of 10 to 30 Hz and a LiDAR, for minutes.

    python benchmarks/rig_replay.py BUNDLE.edge [--minutes 10] [--rates 10,12,15,20,25,30] [--lidar 10] [--faults 400]

Every sensor is a live source of its own: free-running cameras, each of another rate and phase, whose exposures and
deliveries jitter and of which some frames are lost. What they show was drawn beforehand, so that a frame costs no
work. `--faults N` puts a random fault into every sensor about every N of its frames. One JSON line:

age_ms: from the end of the sweep (without LiDAR: from the picture that paces) to the result. oldest_ms: of the oldest
    picture or sweep in it. stages_ms: means, which sum to the mean age but for `unaccounted_ms`.
drops: frames in no moment, by sensor and reason. missing: moments without a sensor, by reason. complete: share of moments.
processed: pictures that went through their camera's network, of those that arrived.
memory_mb: resident set after the first tenth of the time, at the end, and the difference. cpu: cores kept busy by the process.
phase_ms, arrival_ms: what the synchroniser says of each sensor at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import edgekit
from benchmarks.common import commit
from edgekit.errors import UsageError
from edgekit.pixels import Pixels
from edgekit.rig import RigFrame
from edgekit.runtime.bench import machine
from edgekit.runtime.frames import Frame
from edgekit.runtime.sources.base import Source
from edgekit.runtime.sources.faulty import FaultySource, Injector, random_faults
from edgekit.runtime.sync import SyncOptions
from edgekit.synth.street_rig import RigWorld

WORLD_HZ = 10.0


class Sensor(Source):
    """One sensor of a world that was drawn beforehand, as a live source that runs freely.

    rate: Hz.  jitter: of exposures, ms (standard deviation).  delay: ms until a frame is in our hands, at least, and the mean
    of what comes on top (exponential).  loss: share of frames that the driver loses.
    """

    live = True

    def __init__(
        self, name: str, shown: list[tuple[np.ndarray, RigFrame]], rate: float, seed: int, *, jitter: float,
        delay: tuple[float, float], loss: float, lag_ns: int,
    ) -> None:  # fmt: skip
        super().__init__(f"replay-{name}", None)
        self.name, self._shown, self.fps = name, shown, rate
        self._random = random.Random(f"{seed} {name}")
        self._jitter, self._delay, self._loss, self._lag_ns = jitter, delay, loss, lag_ns
        self._phase = self._random.random()
        self._start_ns = time.monotonic_ns()
        self._next = 0
        self._due: tuple[int, int, int] | None = None

    def _read(self, timeout_s: float | None) -> Frame | None:
        assert self.fps is not None
        ends_ns = time.monotonic_ns() + round((timeout_s if timeout_s is not None else 3600) * 1e9)
        while self._due is None:
            seq = self._next
            self._next += 1
            at = self._start_ns + (seq + self._phase) * 1e9 / self.fps
            at += self._random.gauss(0, self._jitter) * 1e6
            delay = self._delay[0] + self._random.expovariate(1 / self._delay[1])
            if self._random.random() >= self._loss:
                self._due = seq, round(at), round(at + delay * 1e6)
        seq, at_ns, due_ns = self._due
        while (left := min(due_ns, ends_ns) - time.monotonic_ns()) > 0:
            time.sleep(left / 1e9)
        if due_ns > ends_ns:
            raise TimeoutError
        self._due = None
        if time.monotonic_ns() - due_ns > 3e9 / self.fps:  # nobody read for long: those frames are gone
            self._next = max(
                self._next, int((time.monotonic_ns() - self._start_ns) / 1e9 * self.fps - self._phase)
            )
        picture, rig = self._shown[round(at_ns / 1e9 * WORLD_HZ) % len(self._shown)]
        return Frame(
            Pixels.bgr(picture), seq, at_ns, time.monotonic_ns(), self.uri, clock="monotonic", exposure="end",
            camera=self.name, rig=rig.shifted(at_ns - self._lag_ns - rig.taken_ns),
        )  # fmt: skip


def draw(world: RigWorld, frames: int) -> dict[str, list[tuple[np.ndarray, RigFrame]]]:
    """What every sensor shows, by name. Without poses: they would jump where the frames begin anew."""
    found: dict[str, list[tuple[np.ndarray, RigFrame]]] = {}
    for index in range(frames):
        whole = replace(world.frame(index), truth=None, pose=None)
        for _, name, part in whole.parts():
            picture = world.nearness(part) if name == "lidar" else part.shots[name].image
            found.setdefault(name, []).append((picture, part))
    return found


def memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def percentiles(values: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    found = {"p50": p50, "p95": p95, "p99": p99, "max": max(values), "mean": float(np.mean(values))}
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rates", default="10,12,15,20,25,30", help="Hz of each camera, in the rig's order")
    parser.add_argument("--lidar", type=float, default=10.0, help="Hz; 0: none")
    parser.add_argument("--size", default="256x144")
    parser.add_argument("--frames", type=int, default=16, help="of the world, drawn beforehand")
    parser.add_argument("--jitter", type=float, default=2.0, help="ms, of exposures")
    parser.add_argument(
        "--delay", default="3,4", help="ms from exposure to arrival: at least, and mean on top"
    )
    parser.add_argument("--loss", type=float, default=0.002, help="share of frames that drivers lose")
    parser.add_argument("--window", type=float, default=50.0, help="ms (SyncOptions.window_ms)")
    parser.add_argument("--timeout", type=float, default=60.0, help="ms (SyncOptions.timeout_ms)")
    parser.add_argument("--period", type=float, default=0.0, help="ms (SyncOptions.period_ms)")
    parser.add_argument(
        "--faults", type=float, help="a random fault in about every so many frames of each sensor"
    )
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    width, height = map(int, args.size.split("x"))
    world = RigWorld(args.seed, width=width, height=height)
    print(f"drawing {args.frames} frames of seven sensors", file=sys.stderr, flush=True)
    shown = draw(world, args.frames)
    rates = dict(zip(world.rig.cameras, map(float, args.rates.split(",")), strict=False))
    if args.lidar:
        rates["lidar"] = args.lidar
    least, more = map(float, args.delay.split(","))
    injectors: dict[str, Injector] = {}

    def open_(name: str, seed: int) -> Source:
        offset = 0.0 if name == "lidar" else world.rig.cameras[name].offset_ms
        return Sensor(
            name, shown[name], rates[name], seed, jitter=0.1 if name == "lidar" else args.jitter, delay=(least, more),
            loss=args.loss, lag_ns=round(offset * 1e6),
        )  # fmt: skip

    with edgekit.load(args.bundle, threads=args.threads) as engine:
        sources: dict[str, Source] = {}
        for number, name in enumerate(rates):
            if args.faults:
                plan = random_faults(args.seed + number, args.faults, 200)
                injectors[name] = Injector(lambda n=name: open_(n, args.seed), plan, rest=60)
                sources[name] = FaultySource("faulty:", injector=injectors[name])
            else:
                sources[name] = open_(name, args.seed)
        options = SyncOptions(window_ms=args.window, timeout_ms=args.timeout, period_ms=args.period)
        ages: list[float] = []
        oldest: list[float] = []
        lost: list[float] = []
        stages: Counter[str] = Counter()
        begun, cpu, warm_mb = time.monotonic(), time.process_time(), 0.0
        seconds = 60 * args.minutes
        said, threads = begun, 0
        with edgekit.stream(engine, sources, rig=world.rig, sync=options) as stream:
            for item in stream:
                now = time.monotonic()
                ages.append(item.age_ms)
                oldest.append(item.oldest_ns / 1e6)
                lost.append(item.unaccounted_ns / 1e6)
                for stage, ns in item.stage_ns.items():
                    stages[stage] += ns
                if not warm_mb and now - begun > 0.1 * seconds:
                    warm_mb, threads = memory_mb(), threading.active_count()
                if now - said > 30:
                    said = now
                    print(f"{now - begun:.0f} s, {len(ages)} moments", file=sys.stderr, flush=True)
                if now - begun > seconds:
                    break
            wall, busy = time.monotonic() - begun, time.process_time() - cpu
            end_mb, threads_end = memory_mb(), threading.active_count()
            snapshot = stream.metrics.snapshot()
    if not ages:
        raise UsageError("rig_replay: no moment at all. Run for longer")
    rig = snapshot["engines"][next(iter(snapshot["engines"]))]["rig"]
    found = {
        "benchmark": "rig_replay", "bundle": args.bundle.name, "minutes": round(wall / 60, 2), "rates_hz": rates,
        "moments": len(ages), "complete": round(1 - rig["partial"] / len(ages), 4),
        "age_ms": percentiles(ages), "oldest_ms": percentiles(oldest),
        "stages_ms": {stage: round(ns / 1e6 / len(ages), 2) for stage, ns in stages.items()},
        "unaccounted_ms": percentiles(lost), "missing": rig["missing"],
        "frames": {name: m["frames"] for name, m in snapshot["cameras"].items()},
        "processed": rig["processed"],
        "drops": {name: m["drops"] for name, m in snapshot["cameras"].items()},
        "faults": {name: m["faults"] for name, m in snapshot["cameras"].items() if m["faults"]},
        "injected": {name: dict(i.injected) for name, i in injectors.items()},
        "phase_ms": {name: f["phase_ms"] for name, f in rig["sync"].items()},
        "arrival_ms": {name: f["arrival_ms"] for name, f in rig["sync"].items()},
        "memory_mb": {"warm": round(warm_mb, 1), "end": round(end_mb, 1), "growth": round(end_mb - warm_mb, 1)},
        "threads": [threads, threads_end], "cpu": round(busy / wall, 2),
        "options": {"window_ms": args.window, "timeout_ms": args.timeout, "period_ms": args.period, "size": args.size},
        "machine": machine(args.threads), "commit": commit(),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
