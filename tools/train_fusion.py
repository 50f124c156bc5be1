"""Train the lite BEVFusion (cameras and LiDAR, from above) on the synthetic street, from nothing.

    python tools/train_fusion.py --out runs/fusion --bf16      # on two CPU cores that know bfloat16
    python tools/train_fusion.py --out runs/fusion --resume    # go on after an interruption
    python tools/train_fusion.py --out runs/more --init runs/fusion/last.pt --data-seed 1000 --lr 1e-3 # more streets
    python tools/train_fusion.py --out runs/fusion --eval-only apps/bevfusion/plan    # only measure these

Frames are drawn once, into OUT/frames-<key>/ (about 1 MB each; delete it when done). Writes to OUT: `last.pt`
(checkpoint), `log.jsonl` (one JSON object a line), `segments/` (`models.bevfusion.export`), `eval.json`.

In training, at random: seen from above everything is turned, mirrored and scaled; the LiDAR is missing, or all cameras
are, or some of them; so one network serves a rig that loses a sensor. Beside the boxes it learns the depth of every pixel that
the LiDAR saw, also when the LiDAR itself is kept from it.

Evaluation: worlds of other seeds, the exported parts under onnxruntime with the kernels between them, AP by distance
of centres (`tasks.fusion.metric`) with both sensors, with each alone, and with one of the cameras lost (another one from frame
to frame). Intervals (95 %) are of frames drawn anew; those of differences draw the same frames for both.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.models import training
from edgekit.rig import Rig, RigFrame, Shot, Truth
from edgekit.synth.solids import CLASSES

EVAL_SEED = 10_000
REACH = 48.0
"""Points further off along x or y are not kept, metres: the corners of the map, turned, lie within."""
MODES = ("camera+lidar", "lidar", "camera", "one camera lost")


@dataclass(frozen=True)
class Options:
    """What decides the result; kept in the checkpoint and compared on --resume."""

    config: str = "lite"
    worlds: int = 150
    frames: int = 10
    """Of each world."""
    gap: int = 25
    """Frames of the world (a tenth of a second each) from one that is drawn to the next."""
    steps: int = 1500
    batch: int = 8
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    no_lidar: float = 0.25
    """Share of the samples that are shown without the LiDAR."""
    no_cameras: float = 0.2
    lost: float = 0.3
    """Share of the others in which one to five cameras are missing."""
    turn: float = 0.4
    """Largest turn of the view from above, radians."""
    scale: float = 0.05
    depth: float = 0.5
    """Weight of the loss of depth."""
    seed: int = 0
    data_seed: int = 0


# --- data -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frames:
    """Drawn frames in a folder: `images` uint8 [N, cam, H, W, 3], `motions` float64 [N, cam, 4, 4], the points and boxes of all
    frames one after the other, and a rig for each world."""

    folder: Path
    per_world: int

    def __post_init__(self) -> None:
        assert len(self) == self.per_world * len(self._rigs)

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("images", "motions", "points", "point_starts", "boxes", "classes", "counts", "box_starts")
        return {name: self._load(name) for name in names}

    @cached_property
    def _rigs(self) -> list[Rig]:
        return [Rig.read(path) for path in sorted(self.folder.glob("rig-*.toml"))]

    def __len__(self) -> int:
        return len(self._arrays["images"])

    def __getitem__(self, i: int) -> RigFrame:
        """Frame i, times and rings left out."""
        a, rig = self._arrays, self._rigs[i // self.per_world]
        points = np.array(a["points"][a["point_starts"][i] : a["point_starts"][i + 1]])
        own = slice(a["box_starts"][i], a["box_starts"][i + 1])
        counts = np.array(a["counts"][own])
        truth = Truth(np.array(a["boxes"][own]), np.array(a["classes"][own]), CLASSES, counts, counts)
        shots = {
            name: Shot(image, 0, np.array(motion))
            for name, image, motion in zip(rig.cameras, a["images"][i], a["motions"][i], strict=True)
        }
        return RigFrame(rig, 0, points, shots, None, truth, None, int(i))


def drawn(out: Path, config: str, seed: int, worlds: int, frames: int, gap: int, workers: int) -> Frames:
    """Frames of worlds seed, seed + 1, .., from OUT/frames-<key>/ or drawn into it, whole or not at all."""
    from rich.progress import track

    key = json.dumps([config, seed, worlds, frames, gap, REACH, _sources()])
    folder = out / f"frames-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return Frames(folder, frames)
    part = out / f"{folder.name}.part"
    part.mkdir(parents=True, exist_ok=True)
    jobs = [(seed + w, gap * k, config) for w in range(worlds) for k in range(1, frames + 1)]
    columns: dict[str, list[np.ndarray]] = {}
    images = None
    for i, frame in enumerate(track(_drawing(jobs, frames, workers), "draw frames", len(jobs))):
        if images is None:
            shape = (len(jobs), *frame["images"].shape)
            images = np.lib.format.open_memmap(part / "images.npy", "w+", np.uint8, shape)
        images[i] = frame.pop("images")
        toml = frame.pop("rig")
        if i % frames == 0:
            (part / f"rig-{i // frames:05}.toml").write_text(toml, encoding="utf-8")
        for name, value in frame.items():
            columns.setdefault(name, []).append(value)
    assert images is not None
    images.flush()
    np.save(part / "motions.npy", np.stack(columns.pop("motions")))
    for what in ("point", "box"):
        rows = columns["points" if what == "point" else "boxes"]
        np.save(part / f"{what}_starts.npy", np.cumsum([0, *map(len, rows)]))
    for name, values in columns.items():
        np.save(part / f"{name}.npy", np.concatenate(values))
    part.replace(folder)
    return Frames(folder, frames)


def _drawing(jobs: list[tuple[int, int, str]], chunk: int, workers: int) -> Iterator[dict[str, Any]]:
    if workers <= 1:
        yield from map(_draw, jobs)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_draw, jobs, chunk)


@lru_cache(1)
def _world(seed: int, config: str) -> Any:
    from edgekit.models.bevfusion.config import CONFIGS
    from edgekit.synth.street_rig import RigWorld

    height, width = CONFIGS[config].camera.image
    return RigWorld(seed, width=width, height=height)


def _draw(job: tuple[int, int, str]) -> dict[str, Any]:
    seed, index, config = job
    frame = _world(seed, config).frame(index)
    near = (np.abs(frame.points[:, :2]) < REACH).all(1)
    return {
        "rig": frame.rig.toml(),
        "images": np.stack([shot.image for shot in frame.shots.values()]),
        "motions": np.stack([shot.motion for shot in frame.shots.values()]),
        "points": frame.points[near],
        "boxes": frame.truth.boxes,
        "classes": frame.truth.classes,
        "counts": frame.truth.points,
    }


def _sources() -> str:
    """Digest of the code that draws."""
    from edgekit import rig
    from edgekit.synth import cast, optics, rig_scene, rig_view, solids, street, street_rig, sweep, vehicles

    modules = (rig, cast, optics, rig_scene, rig_view, solids, street, street_rig, sweep, vehicles)
    return hashlib.sha256(b"".join(Path(m.__file__).read_bytes() for m in modules)).hexdigest()


def batch(frames: Frames, options: Options, step: int, threads: int) -> tuple[Any, Any]:
    """(Batch, Targets) of a step, on which alone they depend."""
    import torch

    from edgekit.models.bevfusion.config import CONFIGS
    from edgekit.models.bevfusion.inputs import prepare, turned_boxes, turning
    from edgekit.models.bevfusion.loss import targets
    from edgekit.models.bevfusion.model import collate

    config = CONFIGS[options.config]
    rng = np.random.default_rng([options.data_seed, step])
    samples, boxes, classes = [], [], []
    count = config.camera.count
    cameras, lidar = np.ones((options.batch, count), np.float32), np.ones(options.batch, np.float32)
    for b, i in enumerate(rng.choice(len(frames), options.batch, replace=len(frames) < options.batch)):
        frame = frames[int(i)]
        flips = rng.random(2) < 0.5
        turned = turning(
            rng.uniform(-options.turn, options.turn), 1 + rng.uniform(-options.scale, options.scale), *flips
        )
        samples.append(prepare(frame, config, threads=threads, turned=turned))
        assert frame.truth is not None
        seen = frame.truth[frame.truth.points > 0]  # the metric does not ask for others
        boxes.append(turned_boxes(seen.boxes, turned))
        classes.append(seen.classes)
        chance = rng.random()
        if chance < options.no_lidar:
            lidar[b] = 0
        elif chance < options.no_lidar + options.no_cameras:
            cameras[b] = 0
        if cameras[b].any() and rng.random() < options.lost:
            cameras[b, rng.permutation(count)[: rng.integers(1, count)]] = 0
    made = collate(samples, config, threads)
    return made.without(torch.from_numpy(cameras), torch.from_numpy(lidar)), targets(config, boxes, classes)


# --- evaluation -------------------------------------------------------------------------------------


def cases(frame: RigFrame, number: int) -> dict[str, RigFrame]:
    """What the network is given of frame `number`, by mode."""
    lost = list(frame.rig.cameras)[number % len(frame.rig.cameras)]
    others = {name: shot for name, shot in frame.shots.items() if name != lost}
    return {
        "camera+lidar": frame,
        "lidar": replace(frame, shots={}),
        "camera": replace(frame, points=None),
        "one camera lost": replace(frame, shots=others),
    }


def evaluate(folder: Path, frames: Frames, config_name: str, threads: int = 1) -> dict[str, Any]:
    """By mode: mAP with its interval, AP by class, and the errors; and the differences of modes with theirs."""
    from rich.progress import track

    from edgekit.models.bevfusion.config import CONFIGS
    from edgekit.models.bevfusion.head import pipeline
    from edgekit.models.bevfusion.segments import Segments
    from edgekit.tasks.fusion.pipeline import FusionPipeline

    config = CONFIGS[config_name]
    look = FusionPipeline(pipeline(config), Segments(folder, threads))
    found: dict[str, list[Any]] = {mode: [] for mode in MODES}
    truths = []
    for i in track(range(len(frames)), "evaluate"):
        truths.append(frames[i].truth)
        for mode, given in cases(frames[i], i).items():
            found[mode].append(replace(look(given, score_threshold=0.02), moment=None))
    return judged(truths, found, config.head.labels)


def judged(truths: Sequence[Any], found: dict[str, list[Any]], labels: tuple[str, ...]) -> dict[str, Any]:
    """The figures of `evaluate` of what was found in the frames of `truths`, by mode."""
    from edgekit.tasks.fusion import metric
    from edgekit.tasks.interval import interval95

    def interval(values: list[float]) -> list[float]:
        low, high = interval95(values)
        return [round(low, 4), round(high, 4)]

    rules = metric.Rules(ranges=dict.fromkeys(labels, 32.0))
    results: dict[str, Any] = {"frames": len(truths)}
    spread: dict[str, list[float]] = {}
    for mode, boxes in found.items():
        matched = metric.judge(truths, boxes, labels, rules)
        whole = metric.evaluate(matched)
        spread[mode] = [v for v in metric.bootstrap(matched) if v is not None]
        results[mode] = {
            "mAP": round(whole["mAP"], 4),
            "interval": interval(spread[mode]),
            "AP": {label: round(v, 4) for label, v in whole["per_class"].items()},
            **{name: None if whole[name] is None else round(whole[name], 3) for name in metric.ERRORS},
        }
    pairs = (("camera+lidar", "lidar"), ("lidar", "camera"), ("camera+lidar", "one camera lost"))
    for a, b in pairs:
        each = [x - y for x, y in zip(spread[a], spread[b], strict=True)]
        results[f"{a} - {b}"] = {
            "mAP": round(results[a]["mAP"] - results[b]["mAP"], 4),
            "interval": interval(each),
        }
    return results


# --- training ---------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Tell glibc to keep what is freed: tensors of tens of megabytes come and go, and mapping their pages anew each time costs
    a third of the time. Other libraries are left as they are."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 64 << 20)  # M_TOP_PAD


def train(args: argparse.Namespace, options: Options) -> bool:
    """Train and export into OUT/segments; False if stopped before the end."""
    import torch

    from edgekit.models.bevfusion.config import CONFIGS
    from edgekit.models.bevfusion.export import export_segments
    from edgekit.models.bevfusion.loss import Weights, depth_bins, loss
    from edgekit.models.bevfusion.model import BEVFusion

    config, out = CONFIGS[options.config], args.out
    frames = drawn(
        out, options.config, options.data_seed, options.worlds, options.frames, options.gap, args.threads
    )
    torch.set_num_threads(args.threads)
    torch.manual_seed(options.seed)
    device = torch.device(args.device)
    model = BEVFusion(config).to(device)
    for p in model.parameters():  # faster, and bit for bit another sum
        if p.ndim == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
    weights, parts = list(model.parameters()), Weights(depth=options.depth)
    optimizer = training.adamw(weights, options.lr, options.weight_decay)
    checkpoint = training.Checkpoint(out / "last.pt", asdict(options), model=model, optimizer=optimizer)
    if args.init is not None:
        model.load_state_dict(torch.load(args.init, map_location=device, weights_only=True)["model"])
    start = checkpoint.resume(device) if args.resume else 0
    model.train()
    last = min(options.steps, args.stop_at or options.steps)
    began, summed, seen = time.monotonic(), {}, 0
    coming = training.ahead(lambda step: batch(frames, options, step, args.threads), start, last)
    with training.logged(out / "log.jsonl", config.name, start, last) as say:
        for step, (given, wanted) in coming:
            rate = options.lr * training.cosine(step, options.steps, options.warmup, floor=0.01)
            training.set_rate(optimizer, rate)
            given, wanted = given.to(device), wanted.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                said = model(given)
            losses = loss(said, wanted, depth_bins(config.camera, given.depth_images), config, parts)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(weights, 10.0)
            optimizer.step()
            done, seen = step + 1, seen + 1
            for name, value in losses.items():
                summed[name] = summed.get(name, 0.0) + float(value.detach())
            if done % 20 == 0 or done == last:
                means = {name: round(value / seen, 4) for name, value in summed.items()}
                seconds = time.monotonic() - began
                line = {"step": done, "lr": rate, **means, "seconds": round(seconds, 1)}
                line["samples_per_s"] = round((done - start) * options.batch / seconds, 2)
                say(line, ", ".join(f"{k} {v:.2f}" for k, v in means.items()))
                summed, seen = {}, 0
            if done % args.save_every == 0 or done == last:
                checkpoint.save(done)
    export_segments(model.cpu(), out / "segments")
    return last == options.steps


def main(argv: list[str] | None = None) -> int:
    from edgekit.models.bevfusion.config import CONFIGS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    known = [name for name, config in CONFIGS.items() if config.head.labels == CLASSES]
    parser.add_argument(
        "--out", type=Path, default=Path("runs/fusion"), help="folder for all that is written"
    )
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt if it exists")
    parser.add_argument(
        "--eval-only",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="PLAN",
        help="only measure PLAN (OUT/segments)",
    )
    parser.add_argument("--eval-worlds", type=int, default=25, help="unseen worlds to evaluate on")
    parser.add_argument("--eval-frames", type=int, default=8, help="frames of each")
    parser.add_argument("--config", choices=known, default=defaults.config)
    for name in ("worlds", "frames", "gap", "steps", "batch", "warmup", "seed", "data_seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name in ("lr", "weight_decay", "no_lidar", "no_cameras", "lost", "turn", "scale", "depth"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    parser.add_argument(
        "--init", type=Path, metavar="LAST.PT", help="begin with the weights of this checkpoint"
    )
    training.add_run_arguments(parser, "torch threads, and processes that draw the frames")
    args = parser.parse_args(argv)
    options = Options(**{name: getattr(args, name) for name in asdict(defaults)})
    segments = args.out / "segments"
    if args.eval_only is not None:
        segments = segments if args.eval_only == Path() else args.eval_only
        if not (segments / "plan.json").is_file():
            print(f"network {segments}: not found, expected exported segments", file=sys.stderr)
            return 2
    elif not train(args, options):
        return 0
    unseen = drawn(
        args.out, options.config, EVAL_SEED, args.eval_worlds, args.eval_frames, options.gap, args.threads
    )
    result = evaluate(segments, unseen, options.config, args.threads)
    (args.out / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
