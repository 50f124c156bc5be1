"""make soak: a long run of `edgekit.stream` at full speed with random faults of its camera, and what must not happen.

    python tools/soak.py [--frames 300000] [--every 1500] [--seed 0] [--policy block|latest] [--bundle B.edge]

A camera in memory whose few buffers go round as a driver's do (and are poisoned when given back) feeds a small
network; results go to a pipe as JSON lines and to a sink that looks at every picture. About every `--every`
frames the camera is unplugged, stalls, freezes, slows down, comes in bursts, drops frames, marks them as
damaged, jumps in time, or comes back in another format. The run fails (exit 1) when one of these does not hold:

memory      no more than 3 MB above what it was after a tenth of the run
descriptors and threads: in every hundredth of the run back to as many as then
stalls      no time above 1 s in which the camera gave frames and no result came
errors      every fault that was put in was counted under its name, and nothing else was
pictures    none was overwritten while a result or a sink was looking at it
recovery    after each re-plug the first frame came within 1 s

One line a minute, a verdict, and a JSON line at the end. Ctrl-C ends it with the verdict so far (exit 130).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import edgekit
from edgekit.pixels import PixelLayout
from edgekit.runtime.frames import Frame
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import Sink
from edgekit.runtime.sources.faulty import FaultySource, Injector, random_faults
from edgekit.runtime.sources.pooled import PooledSource, stamp
from edgekit.runtime.watch import WatchOptions

SIDE = 64
LAYOUT = PixelLayout("bgr", SIDE, SIDE)
AGREED_FPS = 100.0
"""What the camera promises; it gives far more, so that only a fault makes it slow."""
AMOUNTS = {"unplug": 0.5, "stall": 60.0, "freeze": 60.0, "slow": 1.5, "burst": 0.3, "format": 0.3}
"""Seconds; a stalled or frozen camera stays so until it is opened again."""
OPTIONS = WatchOptions(frozen_s=0.25)
"""A camera at full speed repeats a frozen picture thousands of times in the usual 2 s."""
WARM_UP = 0.1
GROWTH_MB = 3.0
STALL_S = 1.0
RECOVERY_S = 1.0
POISONED = 2**32
"""No frame's number is as large; a stamp of poison is."""


def tiny_bundle(folder: Path) -> Path:
    """A network of two small convolutions on 64x64 pictures, built as any model is."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    shapes = {"a": (8, 3, 3, 3), "b": (16, 8, 3, 3), "c": (16, 4)}
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.2, s).astype(np.float32), n) for n, s in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["a1"], strides=[2, 2]),
        helper.make_node("Relu", ["a1"], ["a2"]),
        helper.make_node("Conv", ["a2", "b"], ["b1"], strides=[2, 2]),
        helper.make_node("Relu", ["b1"], ["b2"]),
        helper.make_node("GlobalAveragePool", ["b2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "c"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["y"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, SIDE, SIDE])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])]
    graph = helper.make_graph(nodes, "soak", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(folder / "soak.onnx"))
    rule = {"resize": "stretch", "color": "rgb", "mean": (0.0, 0.0, 0.0), "std": (255.0, 255.0, 255.0)}
    (bundle,) = edgekit.build(
        folder / "soak.onnx", task="classify", preprocess=rule, precision="float32", out=folder
    )
    bundle.close()
    return bundle.path


class Look(Sink):
    """Looks at every picture in its own thread, while the camera goes on."""

    def __init__(self) -> None:
        super().__init__(Path("look"))
        self.damaged = 0

    def _write(self, item: StreamResult) -> None:
        self.damaged += overwritten(item.frame)


def overwritten(frame: Frame) -> bool:
    """Whether its buffer went back to the camera while we look at it."""
    return stamp(frame.pixels) >= POISONED


@dataclass
class Verdict:
    """What was seen. `broken` names the bounds that do not hold."""

    frames: int = 0
    results: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    rss_mb: list[float] = field(default_factory=list)
    """Resident memory at every hundredth, from the end of the warm-up on; so the two below."""
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    descriptors_peak: int = 0
    """The most at any look, those in the middle of a reconnect included."""
    longest_wait_s: float = 0.0
    stalls: int = 0
    overwritten: int = 0
    injected: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    recovery_s: list[float] = field(default_factory=list)

    @property
    def growth_mb(self) -> float:
        return max(self.rss_mb) - self.rss_mb[0] if self.rss_mb else 0.0

    def broken(self) -> list[str]:
        found = []
        if self.growth_mb > GROWTH_MB:
            found.append(f"memory: grew by {self.growth_mb:.1f} MB, expected at most {GROWTH_MB:g}")
        for name, values in (("descriptors", self.descriptors), ("threads", self.threads)):
            if len(set(values)) > 1:
                found.append(f"{name}: expected {values[0]} throughout, got up to {max(values)}")
        if self.stalls:
            found.append(
                f"stalls: {self.stalls} above {STALL_S:g} s, the longest {self.longest_wait_s:.1f} s"
            )
        if self.injected != self.counted and not self.interrupted:  # which may be in the middle of one
            found.append(f"errors: put in {self.injected}, counted {self.counted}")
        if self.overwritten:
            found.append(f"pictures: {self.overwritten} were overwritten under a reader")
        if any(s > RECOVERY_S for s in self.recovery_s):
            found.append(f"recovery: {max(self.recovery_s):.2f} s after a re-plug, expected {RECOVERY_S:g}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "frames": self.frames,
            "results": self.results,
            "seconds": round(self.seconds, 1),
            "faults": sum(v for k, v in self.injected.items() if not k.endswith(" frames")),
            "injected": self.injected,
            "counted": self.counted,
            "restarts": self.restarts,
            "rss_growth_mb": round(self.growth_mb, 2),
            "descriptors": sorted(set(self.descriptors)),
            "descriptors_peak": self.descriptors_peak,
            "threads": sorted(set(self.threads)),
            "stalls": self.stalls,
            "longest_wait_s": round(self.longest_wait_s, 3),
            "overwritten": self.overwritten,
            "recovery_max_s": round(max(self.recovery_s, default=0.0), 3),
            "interrupted": self.interrupted,
            "broken": self.broken(),
        }


class Waits(threading.Thread):
    """Measures how long the camera gives frames and no result comes."""

    def __init__(self, device: Injector) -> None:
        super().__init__(name="soak-waits", daemon=True)
        self.device = device
        self.results = 0
        self.longest = 0.0
        self.stalls = 0
        self.ended = threading.Event()

    def run(self) -> None:
        results = frames = 0
        given_at: float | None = None  # when the first frame came that no result has followed
        counted = False
        while not self.ended.wait(0.02):
            now = time.monotonic()
            if self.results != results:
                results, frames, given_at, counted = self.results, self.device.frames, None, False
            elif given_at is None and self.device.frames != frames:
                given_at = now
            if given_at is not None:
                self.longest = max(self.longest, now - given_at)
                if now - given_at > STALL_S and not counted:
                    self.stalls += 1
                    counted = True


class Settled:
    """Counts descriptors and threads where they stay the same for a few results.

    While a source is opened again, the frames in work still map the buffers of the one before: that is more
    for a moment, and no leak. A number that does not come back within `PATIENCE` results is taken as it is.
    """

    SAME, PATIENCE = 5, 2000

    def __init__(self) -> None:
        self._last = (0, 0)
        self._same = self._tries = 0

    def now(self, verdict: Verdict) -> bool:
        """Whether numbers were added to `verdict`."""
        found = (len(os.listdir("/proc/self/fd")), threading.active_count())
        self._same = self._same + 1 if found == self._last else 0
        self._last = found
        self._tries += 1
        verdict.descriptors_peak = max(verdict.descriptors_peak, found[0])
        usual = not verdict.descriptors or found == (verdict.descriptors[0], verdict.threads[0])
        if not (self._same >= self.SAME and usual) and self._tries < self.PATIENCE:
            return False
        verdict.descriptors.append(found[0])
        verdict.threads.append(found[1])
        self._same = self._tries = 0
        return True


@contextmanager
def drained(path: Path) -> Iterator[None]:
    """A pipe at `path`, read by a thread that throws away what comes."""
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR)  # both ways, so that it never ends by itself

    def drain() -> None:
        while os.read(end, 1 << 16) != b"end":
            pass

    thread = threading.Thread(target=drain, name="soak-drain", daemon=True)
    thread.start()
    try:
        yield
    finally:
        while thread.is_alive():
            os.write(end, b"end")  # alone in the pipe at the latest the second time
            thread.join(0.2)
        os.close(end)


def rss_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(
    bundle: Path,
    folder: Path,
    *,
    frames: int = 300_000,
    every: float = 1500.0,
    seed: int = 0,
    policy: Literal["latest", "block"] = "block",
    progress: Any = None,
) -> Verdict:
    """Run it. progress: called as progress(results, verdict so far) for every result."""
    last = frames * 0.99  # what begins later may not be over at the end
    plan = itertools.takewhile(lambda p: p.frame < last, random_faults(seed, every, amounts=AMOUNTS))
    device = Injector(lambda: PooledSource(LAYOUT, buffers=6, padding=64, declared=AGREED_FPS), plan, rest=60)
    verdict, look, waits, settled = Verdict(), Look(), Waits(device), Settled()
    started = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(drained(folder / "results.jsonl"))
        stream = stack.enter_context(
            edgekit.stream(
                bundle,
                {"camera": FaultySource("faulty:", injector=device)},
                sinks=[folder / "results.jsonl", look],
                policy=policy,
                threads=1,
                watch_options=OPTIONS,
            )
        )
        waits.start()
        sample = int(frames * WARM_UP)
        try:
            for item in stream:
                verdict.overwritten += overwritten(item.frame)
                verdict.frames, verdict.results = device.frames, verdict.results + 1
                waits.results = verdict.results
                if verdict.frames >= sample and device.quiet and settled.now(verdict):
                    sample += max(1, frames // 100)
                    verdict.rss_mb.append(rss_mb())
                if progress is not None:
                    progress(verdict.frames, verdict)
                if verdict.frames >= frames and device.finished:
                    break
        except KeyboardInterrupt:
            verdict.interrupted = True
        finally:
            waits.ended.set()
            waits.join()
        # what is under way in the reading thread is counted when it has ended
        injected = dict(device.injected)
        stream.close()
        verdict.seconds = time.monotonic() - started
        camera = stream.metrics.snapshot()["cameras"]["camera"]
    verdict.overwritten += look.damaged
    verdict.longest_wait_s, verdict.stalls = waits.longest, waits.stalls
    drops = camera["drops"]
    verdict.injected = named(injected, injected.get("driver", 0), injected.get("damaged", 0))
    verdict.counted = named(camera["faults"], drops.get("driver", 0), drops.get("corrupt", 0))
    verdict.restarts = camera["restarts"]
    verdict.recovery_s = list(device.replugged)
    return verdict


def named(faults: dict[str, int], dropped: int, damaged: int) -> dict[str, int]:
    """Faults by name, and frames that were dropped or damaged; in one order, so that two compare."""
    kept = {name: faults[name] for name in sorted(faults) if name not in ("driver", "damaged")}
    return kept | {"dropped frames": dropped, "corrupt frames": damaged}


class Progress:
    """A bar where there is a terminal, and a line every minute."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self._started = self._said = time.monotonic()
        self._shown = 0.0
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True))
            self._task = self._bar.add_task("soak", total=frames)
            self._bar.start()

    def __call__(self, done: int, verdict: Verdict) -> None:
        now = time.monotonic()
        if self._bar is not None and now - self._shown > 0.2:
            self._shown = now
            self._bar.update(self._task, completed=done)
        if now - self._said >= 60:
            self._said = now
            line = (
                f"{(now - self._started) / 60:4.0f} min  {done:,} of {self.frames:,} frames  "
                f"memory +{verdict.growth_mb:.1f} MB  {verdict.overwritten} overwritten"
            )
            print(line, flush=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def report(verdict: Verdict) -> str:
    faults = ", ".join(f"{count} {name}" for name, count in verdict.counted.items())
    lines = [
        f"{verdict.frames:,} frames in {verdict.seconds:.0f} s, {verdict.results:,} results",
        f"faults       {faults}; {verdict.restarts} restarts",
        f"memory       +{verdict.growth_mb:.2f} MB after warm-up",
        f"descriptors  {sorted(set(verdict.descriptors))} (for moments up to {verdict.descriptors_peak}), "
        f"threads {sorted(set(verdict.threads))}",
        f"stalls       {verdict.stalls} above {STALL_S:g} s; longest wait {verdict.longest_wait_s * 1e3:.0f} ms",
        f"overwritten  {verdict.overwritten} pictures",
        f"recovery     at most {max(verdict.recovery_s, default=0.0) * 1e3:.0f} ms after a re-plug",
    ]
    broken = verdict.broken()
    end = "FAILED" if broken else "INTERRUPTED, nothing broken so far" if verdict.interrupted else "PASSED"
    return "\n".join([*lines, *(f"BROKEN  {text}" for text in broken), end])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=300_000)
    parser.add_argument("--every", type=float, default=1500.0, help="frames from fault to fault, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", choices=("latest", "block"), default="block")
    parser.add_argument("--bundle", type=Path, help="instead of a tiny network")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress = Progress(words.frames)
        try:
            verdict = soak(
                words.bundle or tiny_bundle(folder),
                folder,
                frames=words.frames,
                every=words.every,
                seed=words.seed,
                policy=words.policy,
                progress=progress,
            )
        finally:
            progress.end()
    print(report(verdict))
    print(json.dumps(verdict.to_json()))
    return 130 if verdict.interrupted else bool(verdict.broken())


if __name__ == "__main__":
    sys.exit(main())
