"""Streams of rigs: which sources are sensors, and calibration that is replaced while they run."""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgekitError, UsageError, did_you_mean
from edgekit.runtime.mailbox import POLL_S, Mailbox
from edgekit.runtime.sync import LIDAR, State, SyncOptions

if TYPE_CHECKING:
    from edgekit.rig import Rig
    from edgekit.runtime.frames import Frame
    from edgekit.runtime.sources import Source
    from edgekit.runtime.stream import Stream
    from edgekit.runtime.swap import Pipelines
    from edgekit.runtime.watch import Watch
    from edgekit.runtime.worker import Worker

LOOK_S = 0.5
"""How often a calibration's file is looked at."""


def read_rig(rig: Rig | str | Path | None) -> Rig | None:
    """A rig, or its file's. Raises: UsageError."""
    if rig is None or not isinstance(rig, (str, Path)):
        return rig
    from edgekit.rig import Rig as RigClass  # numpy work that streams of pictures do not need

    return RigClass.read(rig)


def takes_rigs(pipelines: Pipelines) -> bool:
    return bool(getattr(pipelines.opened[0], "takes_rigs", False))


def one_by_one(pipelines: Pipelines, names: list[str], given: bool, rig: Rig | None) -> bool:
    """Whether sources by these names are the sensors of a rig, each one its own; given: named by the caller.

    Raises: UsageError when some are and some are not.
    """
    if not takes_rigs(pipelines) or not given:
        return False
    network: tuple[str, ...] = getattr(getattr(pipelines.opened[0], "spec", None), "cameras", ())
    known = {LIDAR, *network, *(rig.cameras if rig is not None else ())}
    strange = [name for name in names if name not in known]
    if len(strange) == len(names) and not (rig is not None and _misspelt(strange, known)):
        return False
    if strange:
        raise UsageError(
            f"stream: source {strange[0]!r}: no sensor of the rig. {did_you_mean(strange[0], sorted(known))}"
        )
    return True


def _misspelt(names: Sequence[str], known: Collection[str]) -> bool:
    """Whether one of the names is nearly that of a sensor."""
    return any(difflib.get_close_matches(name, known, 1, 0.8) for name in names)


def open_worker(
    stream: Stream,
    name: str,
    pipelines: Pipelines,
    *,
    given: bool,
    score: float | None,
    rig: Rig | None,
    sync: SyncOptions | None,
    lidar_budget_ms: float | None = None,
) -> Worker:
    """The worker of an engine of a stream whose sources are open. given: the caller named the sources.

    Raises: UsageError where they do not fit.
    """
    from edgekit.runtime.worker import Worker

    sources = stream.sources
    if lidar_budget_ms is not None:
        first: Any = pipelines.opened[0]
        if not hasattr(first, "lidar_budget_ms"):
            raise UsageError(f"stream: lidar_budget_ms: engine {name} has no LiDAR branch. Leave it out")
        first.lidar_budget_ms = lidar_budget_ms  # refused now rather than at the first frame
    newest = stream.policy == "latest"
    if not one_by_one(pipelines, list(sources), given, rig):
        if (rig is not None or sync is not None) and not takes_rigs(pipelines):
            raise UsageError(f"stream: engine {name} takes pictures of one camera. Leave the rig out")
        if sync is not None:
            raise UsageError(
                "stream: `sync` is for sensors one by one. Name the sources as the rig's sensors, lidar among them"
            )
        timed = frozenset(camera for camera, source in sources.items() if source.live)
        box: Mailbox[Frame] = Mailbox(sources, newest=newest, stop=stream._stop)
        return Worker(name, pipelines, box, score, timed, rig, lidar_budget_ms)
    from edgekit.runtime.rig_worker import BOX, RigWorker

    live = {source.live for source in sources.values()}
    if len(live) > 1:
        files = [camera for camera, source in sources.items() if not source.live]
        raise UsageError(
            f"stream: sensor {files[0]!r} is a file while others are live: their times have nothing in common. "
            "Play all of them live, or none"
        )
    few = waiting_for(sources)
    places = {sensor: 1 if sensor in few else BOX for sensor in sources}
    box = Mailbox(sources, newest=newest, capacity=places if newest else None, stop=stream._stop)
    return RigWorker(
        name, pipelines, box, score,
        sensors=list(sources), rig=rig, options=sync, live=live.pop(), latest=newest, metrics=stream.metrics,
        condition=lambda sensor: condition(stream._watches[sensor]), spare=few, lidar_budget_ms=lidar_budget_ms,
    )  # fmt: skip


def condition(watch: Watch) -> State:
    """What a watchdog says of its sensor, in the words of the synchroniser."""
    if watch.trouble:
        return "frozen" if watch.trouble == "frozen" else "lost"
    return "running"


def waiting_for(sources: Mapping[str, Source]) -> dict[str, int]:
    """Of sensors whose driver has few buffers: how many may wait for their moment. One is in the mailbox, the others are
    for sinks (`for_sinks`)."""
    return {n: max(1, (s.spare - 1) // 2) for n, s in sources.items() if s.spare is not None}


def for_sinks(sources: Iterable[Source | None]) -> int | None:
    """How many moments sinks may hold, each a buffer of every sensor; None: as many as they like."""
    spares = [source.spare for source in sources if source is not None and source.spare is not None]
    return min((spare - 1 - max(1, (spare - 1) // 2) for spare in spares), default=None)


def recalibrate(stream: Stream, rig: Rig | str | Path) -> None:
    """See Stream.recalibrate."""
    found = read_rig(rig)
    assert found is not None
    workers = [worker for worker in stream._workers if takes_rigs(worker.holder.current)]
    if not workers:
        raise UsageError("recalibrate: no engine of this stream takes a rig")
    for worker in workers:  # all of them before the first changes
        worker.check(found)
    for worker in workers:
        wait_for(worker.prepare(worker.holder.current, found), stream._stop)
    for worker in workers:
        worker.recalibrate(found)


def wait_for(futures: Iterable[Future[Any]], stop: threading.Event) -> None:
    """Until all are done, or `stop`. Raises: what they raise."""
    for future in futures:
        while not stop.is_set():
            with contextlib.suppress(NotYet):
                future.result(POLL_S)
                break


Stamp = tuple[int, int, int]


def follow(
    path: Path,
    before: Stamp | None,
    stop: threading.Event,
    changed: Callable[[], None],
    failed: Callable[[str], None],
) -> None:
    """Call `changed` when a file's content may have changed since `stamp` gave `before`, until `stop`. What `changed`
    raises is told to `failed`.

    For a thread of its own. A file that is gone is none that changed: editors replace it.
    """
    while not stop.wait(LOOK_S):
        now = stamp(path)
        if now is None or now == before:
            continue
        before = now
        try:
            changed()
        except (EdgekitError, OSError) as error:
            failed(str(error))


def stamp(path: Path) -> Stamp | None:
    """What tells a file's content from another; None where there is no file. To be asked before it is read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
