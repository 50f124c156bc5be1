"""What a batch of streams saves: 8 streams in turn on one engine, and the same 8 in one run of 8 lanes.

    python benchmarks/stream_batches.py [--backbone mobilenet_v2] [--size 224] [--streams 8] [--threads 1] [--rounds 40]

An online TSM, per library and precision, as two bundles from one placed graph: one stream a run, and `streams` lanes
a run (passes.lanes). A turn is one frame of every stream, pictures copied in, states carried, logits there:

`single`: Streams.step for each, as one thread would serve them; every step moves two streams' states.
`sessions`: a session for each, whose states stay where they are: no moves, and as many buffers as streams.
`batch`: Streams.step_many of all; its members stay the same, so no state moves.
`turnover`: the same while one member in each batch is another than in the turn before.

`single_to_batch` = time of single / of batch, `sessions_to_batch` likewise: above 1 the batch is faster. All of one
line run interleaved, in a new order every round, after a warm-up; a ratio is the median over rounds of the quotient of the
best calls, `spread` its quartiles. Before anything is timed the batch must give what the single runs give: `equal`
says whether bit for bit, else `difference` of the logits as a fraction of their range. One JSON line each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edgekit  # noqa: E402
from benchmarks import video_bundles as bundles  # noqa: E402
from benchmarks.common import commit  # noqa: E402
from benchmarks.peers.timing import Times, interleave  # noqa: E402
from edgekit.passes.lanes import lanes  # noqa: E402
from edgekit.runtime.bench import machine  # noqa: E402
from edgekit.runtime.session import Session  # noqa: E402
from edgekit.runtime.slots import Streams  # noqa: E402
from edgekit.synth.gestures import GestureWorld  # noqa: E402

LIBRARIES = ("onnxruntime", "litert", "openvino")
AGREE = 1e-4
"""Largest difference of logits between a lane and a run of its own, as a fraction of their largest magnitude."""


class Turns:
    """Every call of a method is the next frame of all streams; returns the logits [streams, K] of the last one."""

    def __init__(self, single: Streams, sessions: list[Session], batch: Streams, frames: np.ndarray) -> None:
        """frames: float32 [streams, T, 1, 3, H, W]; stream i sees frames[i] again and again."""
        self._single, self._sessions, self._batch, self._frames = single, sessions, batch, frames
        self._at = {"single": 0, "sessions": 0, "batch": 0, "turnover": 0}
        (self._name,) = single.inputs

    def _next(self, which: str) -> np.ndarray:
        at = self._at[which]
        self._at[which] += 1
        pictures: np.ndarray = self._frames[:, at % self._frames.shape[1]]
        return pictures

    def single(self) -> list[np.ndarray]:
        found = []
        for key, picture in enumerate(self._next("single")):
            found.append(self._single.step(key, {self._name: picture})["logits"].copy())
        return found

    def sessions(self) -> list[np.ndarray]:
        for session, picture in zip(self._sessions, self._next("sessions"), strict=True):
            np.copyto(session.inputs[self._name], picture)
            session.run()
        return [session.outputs["logits"] for session in self._sessions]

    def batch(self) -> list[np.ndarray]:
        given = {key: {self._name: picture} for key, picture in enumerate(self._next("batch"))}
        return [found["logits"] for found in self._batch.step_many(given).values()]

    def turnover(self) -> list[np.ndarray]:
        spare = self._at["turnover"] % 2  # stream 0, or one that is not among the others
        given = {key: {self._name: picture} for key, picture in enumerate(self._next("turnover"), 1)}
        given["spare" if spare else "first"] = given.pop(1)
        return [found["logits"] for found in self._batch.step_many(given).values()]


def check(turns: Turns, count: int = 4) -> dict[str, Any]:
    """Raises: SystemExit when a stream says something else in a batch than by itself."""
    worst, equal = 0.0, True
    for _ in range(count):
        want = turns.single()
        for found in (turns.sessions(), turns.batch()):
            for a, b in zip(want, found, strict=True):
                equal = equal and np.array_equal(a, b)
                worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
    if not worst <= AGREE:
        raise SystemExit(
            f"batch beside single runs: logits differ by {worst:.2e} of their range, nothing was timed"
        )
    return {"equal": equal, "difference": worst}


def summary(times: Times) -> dict[str, float]:
    return {
        "median_ms": round(times.median_ms, 4),
        "min_ms": round(times.min_ms, 4),
        "p90_ms": round(times.p90_ms, 4),
    }


def quotient(times: Times) -> dict[str, Any]:
    """This one's time over the baseline's."""
    low, high = times.spread
    return {"ratio": round(1 / times.ratio, 4), "spread": [round(1 / high, 4), round(1 / low, 4)]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES))
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"])
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(argv)
    model = bundles.settled(args.backbone, args.size, args.width)
    plain = bundles.without_shift(model, args.backbone, args.width)
    graph = bundles.graphs(model, plain, args.size)["online"]
    many = lanes(graph, args.streams)
    world = GestureWorld(7, max(args.size, 32), max(args.size, 32))
    clips = np.stack([world.clip(i)[0][:8, : args.size, : args.size] for i in range(args.streams)])
    frames = bundles.normalised(clips)[:, :, None]
    end = {
        "commit": commit(),
        "machine": machine(args.threads),
        "versions": {"python": platform.python_version()}
        | {n: version(n) for n in ("numpy", "onnxruntime", "ai-edge-litert", "openvino")},
    }
    for library in args.libraries:
        for precision in args.precisions:
            with contextlib.ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                engines = []
                for name, network, count in (("single", graph, 1), ("batch", many, args.streams)):
                    made = bundles.payload(graph, library, precision, args.size, count=count)
                    path = bundles.write(folder / f"{name}.edge", network, {"only": made})
                    engines.append(stack.enter_context(edgekit.load(path, threads=args.threads)))
                one, _ = engines
                single, batched = (stack.enter_context(engine.streams()) for engine in engines)
                sessions = [stack.enter_context(one.session()) for _ in range(args.streams)]
                turns = Turns(single, sessions, batched, frames)
                same = check(turns)
                calls: dict[str, Callable[[], object]] = {
                    "batch": turns.batch,
                    "single": turns.single,
                    "sessions": turns.sessions,
                    "turnover": turns.turnover,
                }
                times = interleave(calls, "batch", rounds=args.rounds)
                line = {
                    "benchmark": "stream batches",
                    "network": f"{args.backbone} x {args.width:g}",
                    "size": args.size,
                    "streams": args.streams,
                    "library": library,
                    "precision": precision,
                    **same,
                    **{name: summary(t) for name, t in times.items()},
                    "single_to_batch": quotient(times["single"]),
                    "sessions_to_batch": quotient(times["sessions"]),
                    "turnover_to_batch": quotient(times["turnover"]),
                    "bytes_per_switch": single.bytes_per_switch,
                    "rounds": args.rounds,
                }
                print(json.dumps(line | end), flush=True)


if __name__ == "__main__":
    main()
