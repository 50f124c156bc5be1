"""What online video costs per frame: an online TSM beside its backbone, a clip model, and torch.

    python benchmarks/video.py [--backbone mobilenet_v2] [--width 1.0] [--size 224] [--rounds 40]

One set of weights in four forms (video_bundles.py), as bundles, each in its own session on one thread. A step is
what a stream pays: the picture copied into the session's input, the run, states carried, the logits read.

`step`, per library and precision: `online` (one frame and states); `plain`, the same backbone without shift;
`clip`, the last 8 frames again for each new one, in a window that moves by a frame.
`online_to_plain` = time of online / of plain; `clip_to_online` = of clip / of online.
`streams`: 8 streams of `online`, one step each: `batch`, one run of a network of 8 lanes; `turns`, 8 runs of one
session, whose state changes hands; `sessions`, 8 runs of a session each. `turns_to_batch`, `sessions_to_batch`.
`torch`: the online model as its public demo runs it (torch_online_tsm.py, eager) beside ours, from the tensor
(`network`) and from the picture, uint8 at the network's size, normalised by each in its way (`picture`).
`torch_to_online` = time of torch / of ours.

All of one line run interleaved, in a new order every round, after a warm-up; a ratio is the median over rounds
of the quotient of the best calls, `spread` its quartiles. Before anything is timed all forms must agree: online and
torch frame by frame, and with the clip model's rows. One JSON line each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edgekit  # noqa: E402
from benchmarks import video_bundles as bundles  # noqa: E402
from benchmarks.common import commit  # noqa: E402
from benchmarks.peers.timing import Times, interleave  # noqa: E402
from benchmarks.torch_online_tsm import TorchOnline, with_weights  # noqa: E402
from edgekit.kernels.letterbox import letterbox  # noqa: E402
from edgekit.models.tsm import MEAN, STD, TSM  # noqa: E402
from edgekit.passes.lanes import lanes  # noqa: E402
from edgekit.runtime.bench import machine  # noqa: E402
from edgekit.runtime.session import Session  # noqa: E402
from edgekit.runtime.slots import Streams  # noqa: E402
from edgekit.synth.gestures import GestureWorld  # noqa: E402
from edgekit.tasks.preprocess import ImagePreprocess  # noqa: E402

CLASSES = 27
"""As many as the public demo's network has."""
RING = 16
"""Pictures in turn: each form goes round on its own."""
AGREE = 1e-4
"""Largest difference of float logits between forms, as a fraction of their largest magnitude."""


def together(streams: Streams, tensors: np.ndarray, count: int) -> Callable[[], object]:
    """One step of `count` streams, each on its own frame; as many of them a run as the network has lanes."""
    frames = [{next(iter(streams.inputs)): tensor[None]} for tensor in tensors]
    turn = 0

    def step() -> object:
        nonlocal turn
        turn += 1
        given = {key: frames[(key + turn) % len(frames)] for key in range(count)}
        if streams.lanes > 1:
            return streams.step_many(given)
        for key, inputs in given.items():
            last = streams.step(key, inputs)
        return last

    return step


def apart(sessions: Sequence[Session], tensors: np.ndarray) -> Callable[[], object]:
    """One step of a session each."""
    streams = [Steps(session, tensors, tensors) for session in sessions]
    for number, stream in enumerate(streams):
        stream.at = number

    def step() -> object:
        for stream in streams:
            last = stream.tensor()
        return last

    return step


class Steps:
    """One form on a session: every call is one frame of an endless stream."""

    def __init__(
        self, session: Session, pictures: np.ndarray, tensors: np.ndarray, whole: bool = False
    ) -> None:
        self.session, self.pictures, self.tensors, self.at = session, pictures, tensors, 0
        (self.input,) = session.inputs.values()
        self.logits = session.outputs["logits"]
        self.whole = whole
        height, width = tensors.shape[-2:]
        levels = (tuple(255 * v for v in MEAN), tuple(255 * v for v in STD))
        self.rule = ImagePreprocess(width, height, "stretch", color="rgb", mean=levels[0], std=levels[1])

    def tensor(self) -> np.ndarray:
        """One step on a tensor that lies ready."""
        frame = self.tensors[self.at]
        self.at = (self.at + 1) % len(self.tensors)
        if self.whole:
            self.input[:-1] = self.input[1:]
            self.input[-1] = frame
        else:
            np.copyto(self.input[0], frame)
        self.session.run()
        return self.logits

    def picture(self) -> np.ndarray:
        """One step on a picture."""
        letterbox(self.pictures[self.at], self.rule, self.input)
        self.at = (self.at + 1) % len(self.pictures)
        self.session.run()
        return self.logits


def agree(what: str, want: np.ndarray, got: np.ndarray) -> None:
    """Raises: SystemExit when two forms of the network say different things."""
    worst = float(np.abs(got - want).max() / np.abs(want).max())
    if not worst <= AGREE:
        raise SystemExit(f"{what}: logits differ by {worst:.2e} of their range, nothing was timed")


def check(steps: Mapping[str, Steps], net: TorchOnline | None) -> None:
    """Online, clip and torch give the same answers on the first frames; states are at their start after it."""
    online, clip = steps["online"], steps["clip"]
    np.copyto(clip.input, clip.tensors[: bundles.CLIP])
    clip.session.run()
    got = np.concatenate([online.tensor().copy() for _ in range(bundles.CLIP)])
    agree("online beside clip", clip.logits, got)
    online.session.reset()
    online.at = 0
    if net is not None:
        rows = [net(np.ascontiguousarray(p[..., ::-1])) for p in online.pictures[: bundles.CLIP]]
        agree("torch beside clip", clip.logits, np.concatenate(rows))
        got = np.concatenate([online.picture().copy() for _ in range(bundles.CLIP)])
        agree("online from pictures", clip.logits, got)
        net.reset()


def summary(times: Times) -> dict[str, float]:
    return {
        "median_ms": round(times.median_ms, 4),
        "min_ms": round(times.min_ms, 4),
        "p90_ms": round(times.p90_ms, 4),
    }


def ratio(times: Times, inverse: bool = False) -> dict[str, Any]:
    """The baseline's time over this one's, or the other way round."""
    value, spread = times.ratio, times.spread
    if inverse:
        value, spread = 1 / value, (1 / spread[1], 1 / spread[0])
    return {"ratio": round(value, 4), "spread": [round(v, 4) for v in spread]}


def beside(
    batch: edgekit.Engine, single: edgekit.Engine, tensors: np.ndarray, count: int, rounds: int
) -> dict[str, Any]:
    """`count` streams in one run, in turns on one session, and in sessions of their own."""
    with contextlib.ExitStack() as stack:
        wide, turns = (stack.enter_context(engine.streams()) for engine in (batch, single))
        if wide.lanes != count:
            raise SystemExit(f"expected {count} lanes, got {wide.lanes}")
        sessions = [stack.enter_context(single.session()) for _ in range(count)]
        calls = {
            "batch": together(wide, tensors, count),
            "turns": together(turns, tensors, count),
            "sessions": apart(sessions, tensors),
        }
        times = interleave(calls, "batch", rounds=rounds)
        moved = turns.bytes_per_switch
    found: dict[str, Any] = {name: summary(t) for name, t in times.items()}
    found |= {f"{name}_to_batch": ratio(times[name], inverse=True) for name in ("turns", "sessions")}
    return {**found, "bytes_per_switch": moved, "rounds": rounds}


def torch_twin(model: TSM, width: float, size: int) -> TorchOnline:
    """The demo's network with the weights of `model`, a MobileNetV2."""
    return TorchOnline(with_weights(CLASSES, width, list(model.net.state_dict().values())), size)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--libraries", nargs="+", default=["onnxruntime", "litert"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = bundles.settled(args.backbone, args.size, args.width, CLASSES)
    plain = bundles.without_shift(model, args.backbone, args.width)
    forms = bundles.graphs(model, plain, args.size)
    world = GestureWorld(7, max(args.size, 32), max(args.size, 32))
    pictures = np.ascontiguousarray(
        np.concatenate([world.clip(i)[0] for i in (1, 2)])[:RING, : args.size, : args.size]
    )
    tensors = bundles.normalised(pictures)
    net = torch_twin(model, args.width, args.size) if args.backbone == "mobilenet_v2" else None
    common: dict[str, Any] = {"network": f"{args.backbone} x {args.width:g}", "size": args.size}
    end: dict[str, Any] = {
        "commit": commit(),
        "machine": machine(1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {n: version(n) for n in ("numpy", "onnxruntime", "ai-edge-litert", "openvino")},
    }
    ours: dict[str, Steps] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for library in args.libraries:
            for precision in args.precisions:
                steps: dict[str, Steps] = {}
                engines: dict[str, edgekit.Engine] = {}
                for form, graph in forms.items():
                    made = bundles.payload(graph, library, precision, args.size)
                    path = bundles.write(folder / f"{form}-{library}-{precision}.edge", graph, {"only": made})
                    engine = engines[form] = stack.enter_context(edgekit.load(path, threads=1))
                    session = stack.enter_context(engine.session())
                    steps[form] = Steps(session, pictures, tensors, form == "clip")
                if precision == "float32":
                    check(steps, net)
                calls: dict[str, Callable[[], object]] = {f: s.tensor for f, s in steps.items()}
                times = interleave(calls, "online", rounds=args.rounds)
                online = steps["online"].session
                line = {
                    "benchmark": "video step",
                    **common,
                    "library": library,
                    "precision": precision,
                    **{form: summary(t) for form, t in times.items()},
                    "online_to_plain": ratio(times["plain"]),
                    "clip_to_online": ratio(times["clip"], inverse=True),
                    "states": len(online.states),
                    "state_elements": sum(s.elements for s in online.state_specs),
                    "state_bytes": sum(a.nbytes for a in online.states.values()),
                    "bytes_copied_per_run": online.bytes_copied_per_run,
                    "rounds": args.rounds,
                }
                print(json.dumps(line | end), flush=True)
                ours[f"{library} {precision}"] = steps["online"]
                wide = bundles.payload(forms["online"], library, precision, args.size, count=args.streams)
                path = folder / f"lanes-{library}-{precision}.edge"
                bundles.write(path, lanes(forms["online"], args.streams), {"only": wide})
                engine = stack.enter_context(edgekit.load(path, threads=1))
                line = {
                    "benchmark": "video streams",
                    **common,
                    "library": library,
                    "precision": precision,
                    "streams": args.streams,
                    **beside(engine, engines["online"], tensors, args.streams, args.rounds),
                }
                print(json.dumps(line | end), flush=True)
        if net is None:
            return
        for start in ("network", "picture"):
            stream = demo(net, pictures, start)
            turns = {name: s.tensor if start == "network" else s.picture for name, s in ours.items()}
            times = interleave({"torch": stream, **turns}, "torch", rounds=args.rounds)
            line = {
                "benchmark": "video torch",
                **common,
                "from": start,
                **{name: summary(t) for name, t in times.items()},
                "torch_to_online": {name: ratio(t) for name, t in times.items() if name != "torch"},
                "rounds": args.rounds,
            }
            print(json.dumps(line | end), flush=True)


def demo(net: TorchOnline, pictures: np.ndarray, start: str) -> Callable[[], np.ndarray]:
    """The demo's step on the next of `pictures`, BGR, or on its tensor made beforehand."""
    frames = [np.ascontiguousarray(picture[..., ::-1]) for picture in pictures]
    tensors = [net.picture(frame) for frame in frames]
    at = 0

    def step() -> np.ndarray:
        nonlocal at
        at = (at + 1) % len(frames)
        return net(frames[at]) if start == "picture" else net.network(tensors[at])

    return step


if __name__ == "__main__":
    main()
