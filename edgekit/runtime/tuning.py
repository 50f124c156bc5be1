"""Which of several payloads is fastest on this very machine, and a record of it that later loads trust.

Records are small JSON files `<cache>/tune/<key>.json`, outside the bundle, which is immutable and signed.
The key is a digest of the payload digest and of everything a timing depends on (`device`), so another
CPU, library version or number of threads finds no record and measures again. A record that is damaged
counts as none; the payload that it names is still self-tested at every load.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import __version__, host
from edgekit.archive import write_atomic
from edgekit.backends.tensorrt.cache import default_dir
from edgekit.errors import UsageError
from edgekit.host import usable_cores
from edgekit.manifest import Manifest
from edgekit.runtime.selftest import conditions
from edgekit.schema import SchemaError, canonical_json, from_json, parse_json, printable, to_json

SWITCH = "EDGEKIT_TUNE"
"""`off`: loads time nothing and read no record; the first variant that passes its self-test runs."""

TIE = 0.03
"""Variants within this share of the best median count as equally fast, and the one that the bundle lists
first wins: a choice by noise would change from load to load."""

LONG_RUN_S = 0.05
"""Runs beyond it are not repeated within a turn: what the turn before left behind no longer matters."""

MAX_RECORDS = 256
MAX_RECORD_BYTES = 1 << 20

_SETTINGS = ("EDGEKIT_ORT_SPIN", "OMP_NUM_THREADS")
"""Variables of the environment that change how fast a library runs."""

_DISTRIBUTIONS = {
    # backend: the packages that may bring its library, the usual one first
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "litert": ("ai-edge-litert", "tflite-runtime"),
    "native": ("edgekit",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
}


@dataclass(frozen=True)
class Effort:
    """How long a race may take. `rounds` at most; no round begins that would end beyond `budget_s`
    seconds, save the first: every candidate has its `warmup` turns and one that counts."""

    rounds: int
    warmup: int
    budget_s: float


AT_LOAD = Effort(rounds=25, warmup=1, budget_s=1.5)
"""The first load on a device. Loading and self-testing the candidates comes on top."""
THOROUGH = Effort(rounds=60, warmup=3, budget_s=60.0)
"""`edgekit tune`."""


@dataclass(frozen=True)
class Timing:
    """One candidate's share of a race. `name`: "<segment>/<variant>".

    Milliseconds per run over `rounds` turns: median, quartiles, least. `ratio`: its time over the
    winner's, the median of the rounds' own ratios, so that load on the machine hits both sides.
    """

    name: str
    median_ms: float
    p25_ms: float
    p75_ms: float
    min_ms: float
    rounds: int
    ratio: float


@dataclass(frozen=True)
class Record:
    """What was measured where. `chosen`: segment -> variant. `refused`: "<segment>/<variant>" -> why not."""

    payload_digest: str
    device: dict[str, Any]
    chosen: dict[str, str]
    timings: tuple[Timing, ...]
    refused: dict[str, str] = field(default_factory=dict)

    def timing(self, name: str) -> Timing | None:
        return next((t for t in self.timings if t.name == name), None)

    def why(self, segment: str) -> str:
        """In words why the chosen variant of `segment` runs."""
        timed = [t for t in self.timings if t.name.split("/")[0] == segment]
        winner = f"{segment}/{self.chosen[segment]}"
        others = sorted((t for t in timed if t.name != winner), key=lambda t: t.ratio)
        if not others:
            return "the only variant that works here"
        listed = ", ".join(f"{t.name.split('/', 1)[1]} takes {t.ratio:.2f} x its time" for t in others)
        return f"fastest of {len(timed)} on this machine: {listed}"


def switched_off() -> bool:
    """The environment forbids timing. Raises: UsageError for a value that is neither `on` nor `off`."""
    value = os.environ.get(SWITCH, "on") or "on"
    if value not in ("on", "off"):
        raise UsageError(f"variable {SWITCH}: expected on or off, got {value[:40]!r}")
    return value == "off"


# --- the race ----------------------------------------------------------------------------------


def race(
    runs: Mapping[str, Callable[[], None]],
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Time callables against each other: turns in rounds, shuffled (always alike) within each.

    Interleaved, so that a change of clock or load hits all of them. In a turn the first run is not
    counted: caches, and the idle workers of another library that still spin, are not its fault.
    Returns: name -> seconds per run, float64 [rounds]. Raises: what a run raises.
    """

    def timed(run: Callable[[], None]) -> float:
        begin = clock()
        run()
        return clock() - begin

    def turn(run: Callable[[], None]) -> float:
        first = timed(run)
        return first if first > LONG_RUN_S else (timed(run) + timed(run)) / 2

    order = list(runs)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in runs}
    begin = clock()
    for _ in range(effort.warmup):
        for name in order:
            turn(runs[name])
    longest = 0.0
    for number in range(effort.rounds):
        start = clock()
        if number and start - begin + longest > effort.budget_s:
            break
        shuffle(order)
        for name in order:
            samples[name].append(turn(runs[name]))
        longest = max(longest, clock() - start)
    return {name: np.array(values) for name, values in samples.items()}


def winner(samples: Mapping[str, np.ndarray]) -> str:
    """The name with the least median, or an earlier one within `TIE` of it."""
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    best = min(medians.values())
    return next(name for name, median in medians.items() if median <= best * (1 + TIE))


def timings(samples: Mapping[str, np.ndarray], against: str) -> tuple[Timing, ...]:
    """The table of a race; ratios against the candidate `against`."""

    def ms(seconds: float) -> float:
        return round(1e3 * seconds, 5)

    table = []
    for name, values in samples.items():
        low, middle, high = (float(v) for v in np.percentile(values, (25, 50, 75)))
        ratio = 1.0 if name == against else float(np.median(values / np.maximum(samples[against], 1e-9)))
        least = ms(float(values.min()))
        table.append(Timing(name, ms(middle), ms(low), ms(high), least, len(values), round(ratio, 4)))
    return tuple(table)


# --- records -----------------------------------------------------------------------------------


def device(backends: Iterable[str], threads: int) -> dict[str, Any]:
    """All that a timing of payloads for `backends` depends on, as JSON values; no measurement.

    Libraries that are not installed are listed as null: once they are, it is another device.
    """
    facts: dict[str, Any] = {
        **conditions(threads),
        "edgekit": __version__,
        "libraries": {backend: library(backend) for backend in sorted(set(backends))},
        "settings": {name: printable(os.environ[name]) for name in _SETTINGS if name in os.environ},
    }
    with contextlib.suppress(UsageError):  # a system that does not describe its processors
        here = host.detect()
        facts["cores_by_kind"] = [f"{cpu.cores} x {cpu.name}" for cpu in here.cpus]
        facts["isa"] = list(here.cpus[0].isa)
        facts["gpu"] = here.gpu.name if here.gpu else None
        facts["l4t"] = host.l4t_release()
    return facts


def library(backend: str) -> str | None:
    """ "<package> <version>" of what would run payloads of `backend`; None when nothing can here."""
    for name in _DISTRIBUTIONS.get(backend, (backend,)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    # a library that is part of a board's system image may come without a version
    return None if host.backend_problem(backend) else f"{backend}, version not stated"


def record_path(manifest: Manifest, threads: int, cache_dir: Path | None = None) -> Path:
    """Where the record of this bundle on this device is or would be."""
    return _path(manifest.payload_digest, _device_of(manifest, threads), cache_dir)


def _device_of(manifest: Manifest, threads: int) -> dict[str, Any]:
    return device((variant.backend for _, variant in manifest.variants()), threads)


def _path(payload_digest: str, facts: Mapping[str, Any], cache_dir: Path | None) -> Path:
    key = sha256(canonical_json({"payload": payload_digest, "device": dict(facts)}, "key")).hexdigest()
    return (cache_dir or default_dir()) / "tune" / f"{key[:40]}.json"


def read(manifest: Manifest, threads: int, cache_dir: Path | None = None) -> Record | None:
    """The record of this bundle on this device; None when there is none, or one that cannot be trusted."""
    return _read(manifest, record_path(manifest, threads, cache_dir))


def records(manifest: Manifest, cache_dir: Path | None = None) -> dict[int, Record]:
    """Threads -> the record of this bundle on this device, for the library's choice (0) up to all cores."""
    facts = _device_of(manifest, 0)
    paths = {
        threads: _path(manifest.payload_digest, {**facts, "threads": threads}, cache_dir)
        for threads in range(usable_cores() + 1)
    }
    found = {threads: _read(manifest, path) for threads, path in paths.items()}
    return {threads: record for threads, record in found.items() if record is not None}


def _read(manifest: Manifest, path: Path) -> Record | None:
    try:
        entry = parse_json(path.read_bytes(), "record", MAX_RECORD_BYTES)
        if not isinstance(entry, dict) or entry.get("sha256") != _digest(entry.get("value")):
            return None
        record = from_json(Record, entry["value"], "record")
    except (OSError, SchemaError):
        return None
    known = {(segment.name, variant.name) for segment, variant in manifest.variants()}
    fits = record.payload_digest == manifest.payload_digest and set(record.chosen.items()) <= known
    return record if fits and set(record.chosen) == {segment for segment, _ in known} else None


def store(record: Record, cache_dir: Path | None = None) -> Path:
    """Keep a record, instead of an older one of the same key. Raises: OutputError."""
    path = _path(record.payload_digest, record.device, cache_dir)
    value = to_json(record)
    text = json.dumps({"sha256": _digest(value), "value": value}, indent=1, sort_keys=True)
    write_atomic(path, [text.encode()], "tuning record")
    _trim(path.parent)
    return path


def _digest(value: Any) -> str:
    return sha256(canonical_json(value, "record")).hexdigest()


def _trim(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process may tidy up as well
        paths: Sequence[Path] = sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime)
        for path in paths[:-MAX_RECORDS]:
            path.unlink()
