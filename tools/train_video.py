"""Train the small gesture recogniser (TSM on MobileNetV2) on the procedural motions, from nothing.

    python tools/train_video.py --out runs/video                       # about a quarter of an hour on two CPU cores
    python tools/train_video.py --out runs/video --modes none online offline   # with both controls, three times that
    python tools/train_video.py --out runs/video --resume              # go on after an interruption
    python tools/train_video.py --eval-only runs/video/online/clip.onnx

A mode is where the shifted channels come from: `online` (the frame before: runs frame by frame), `offline`
(both neighbours), `none` (no shift: TSN, the control that cannot see motion). Writes to OUT/<mode>/:
`last.pt` (checkpoint), `log.jsonl` (one JSON object a line), `clip.onnx`, `online.onnx` (not for offline),
`eval.json`; and to OUT/eval.json all modes. Training clips are of seed --data-seed, each drawn once and
never again; evaluation is on other seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.models.training import cosine, save, twin
from edgekit.synth.gestures import CLIP, EVENT, FRAMES_PER_SECOND, GESTURES, GestureWorld, Poses
from edgekit.synth.sprites import load_pictures

EVAL_SEED = 10_000
HINTS = 7
"""Auxiliary outputs of the network in training (`targets`)."""
MODES = ("online", "offline", "none")


@dataclass(frozen=True)
class Options:
    """What decides the result; kept in the checkpoint and compared on --resume."""

    mode: str = "online"
    backbone: str = "mobilenet_v2"
    width: float = 0.5
    size: int = 64
    steps: int = 2200
    batch: int = 32
    shards: int = 2
    """A batch is cut into this many parts, each normalised by its own statistics; they run side by side."""
    lr: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 100
    ema: float = 0.995
    lead: int = 5
    """Every second batch of `online` begins this many frames before the motion, with the object at rest, so
    that motions after a running start are learnt too; their answers do not count."""
    hints: float = 1.0
    """Weight of the auxiliary loss (`targets`): where the object is and how it moved since the frame before.
    Without it the first thousands of clips teach next to nothing. The outputs are cut off at export."""
    tail: float = 0.35
    """Share of the steps, the last ones, with frozen batch norm statistics: those of a batch of few scenes are
    far from those the exported network is left with, and accuracy falls by as much."""
    seed: int = 0
    data_seed: int = 0
    pictures: str = ""


# --- data -------------------------------------------------------------------------------------------


def normalised(images: np.ndarray) -> np.ndarray:
    """uint8 BGR [..., H, W, 3] to float32 RGB [..., 3, H, W] as the networks take it."""
    from edgekit.models.tsm import MEAN, STD

    scale = np.array([1 / (255 * s) for s in STD], np.float32)
    offset = np.array([m / s for m, s in zip(MEAN, STD, strict=True)], np.float32)
    return np.ascontiguousarray(np.moveaxis(images[..., ::-1] * scale - offset, -1, -3))


def targets(path: Poses) -> np.ndarray:
    """What the auxiliary outputs learn, float32 [T, 7]: x, y, log size, and the steps from the frame before of
    x, y, log size and angle (0 in the first), each divided by its usual size."""
    place = np.stack([path.x, path.y, np.log(path.size)], 1)
    steps = np.diff(np.concatenate([place, path.angle[:, None]], 1), axis=0, prepend=np.nan)
    moved = np.where(np.isnan(steps), 0.0, steps) / (0.035, 0.035, 0.09, 0.22)
    return np.concatenate([(place - (0, 0, -0.8)) / (0.15, 0.15, 0.3), moved], 1).astype(np.float32)


def batches(options: Options, start: int, workers: int) -> Iterator[tuple[Any, Any, Any]]:
    """Batches of the steps start..: uint8 images [B, T, H, W, 3] BGR, classes [B], auxiliary targets [B, T, 7].

    A batch depends on its step alone.
    """
    import torch.utils.data as tud

    pictures = load_pictures(options.pictures) if options.pictures else ()
    world = GestureWorld(options.data_seed, options.size, options.size, pictures)

    class Steps(tud.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return options.steps

        def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            lead = options.lead if options.mode == "online" and step % 2 else 0
            # classes at random: a batch with each class as often would tell through its statistics
            kinds = np.random.default_rng([options.data_seed, step]).integers(0, len(GESTURES), options.batch)
            chosen = (np.arange(options.batch) + step * options.batch) * len(GESTURES) + kinds
            drawn = [world.clip(int(i), lead=lead) for i in chosen]
            paths = [targets(world.poses(int(i), lead=lead)) for i in chosen]
            return np.stack([images for images, _ in drawn]), np.array([k for _, k in drawn]), np.stack(paths)

    loader = tud.DataLoader(
        Steps(),
        batch_size=None,
        sampler=range(start, options.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


# --- evaluation -------------------------------------------------------------------------------------


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def evaluate(model: Path, clips: int, threads: int = 1, seed: int = EVAL_SEED) -> dict[str, Any]:
    """Top-1 of an exported clip model on `clips` clips of an unseen seed: all, by class, and the worst mix-ups."""
    session = _session(model, threads)
    _, _, height, width = session.get_inputs()[0].shape
    world = GestureWorld(seed, width, height)
    counts = np.zeros((len(GESTURES), len(GESTURES)), int)
    for i in range(clips):
        images, label = world.clip(i)
        (logits,) = session.run(None, {"clip": normalised(images)})
        counts[label, logits.mean(0).argmax()] += 1
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong = [(counts[a, b], GESTURES[a], GESTURES[b]) for a, b in np.argwhere(counts) if a != b]
    return {
        "clips": clips,
        "accuracy": round(float(np.trace(counts) / clips), 4),
        **{f"accuracy {name}": round(float(shares[i, i]), 3) for i, name in enumerate(GESTURES)},
        "mixed up": [f"{a} as {b}: {n}" for n, a, b in sorted(wrong, reverse=True)[:5]],
    }


def evaluate_stream(model: Path, events: int, threads: int = 1, seed: int = EVAL_SEED + 1) -> dict[str, Any]:
    """Frame by frame over one long stream of an unseen seed, states never reset: share of the motions whose
    summed answers (over their frames) are right. The class `still` is no event."""
    session = _session(model, threads)
    image, *inputs = session.get_inputs()
    world = GestureWorld(seed, image.shape[3], image.shape[2])
    states = {value.name: np.zeros(value.shape, np.float32) for value in inputs}
    right = 0
    for number in range(events):
        event = world.event(number)
        total = np.zeros(len(GESTURES))
        for i in range(number * EVENT, (number + 1) * EVENT):
            logits, *after = session.run(None, {image.name: normalised(world.frame(i).image)[None], **states})
            states = dict(zip(states, after, strict=True))
            if event.start <= i < event.stop:
                total += logits[0]
        right += int(total.argmax()) == event.label
    return {"events": events, "event accuracy": round(right / events, 4)}


# --- training ---------------------------------------------------------------------------------------


def learning_rate(options: Options, step: int) -> float:
    """Linear warm-up, then a cosine down to 1 %."""
    return options.lr * cosine(step, options.steps, options.warmup, floor=0.01)


def _cut(model: Any) -> None:
    """Take the auxiliary outputs off a network."""
    import torch

    last = [part for part in model.modules() if isinstance(part, torch.nn.Linear)][-1]
    last.weight = torch.nn.Parameter(last.weight[: len(GESTURES)].detach().clone())
    last.bias = torch.nn.Parameter(last.bias[: len(GESTURES)].detach().clone())
    last.out_features = len(GESTURES)


def train(args: argparse.Namespace, options: Options, out: Path) -> bool:
    """Train one mode and export it into `out`; False if stopped before the end."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from edgekit.models.tsm import TSM, export_clip, export_online

    out.mkdir(parents=True, exist_ok=True)
    each = max(1, args.threads // options.shards)  # no thread waits for another inside an operator
    torch.set_num_threads(each)
    torch.manual_seed(options.seed)
    device = torch.device(args.device)
    model = TSM(options.backbone, len(GESTURES) + HINTS, options.mode, options.width)
    mean = TSM(options.backbone, len(GESTURES) + HINTS, options.mode, options.width)
    mean.load_state_dict(model.state_dict())
    model, mean = model.to(device, memory_format=torch.channels_last), mean.to(device)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=options.lr,
    )
    start, checkpoint, log = 0, out / "last.pt", out / "log.jsonl"
    if args.resume and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["options"] != asdict(options):
            raise SystemExit(
                f"checkpoint {checkpoint}: made with {state['options']}. Use these or a new --out"
            )
        model.load_state_dict(state["model"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    weights = list(model.parameters())
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.03
    replicas = [model] + [twin(model) for _ in range(options.shards - 1)]

    def work(job: Any) -> tuple[float, int, Any]:
        """Losses, right answers and gradients of one shard."""
        replica, raw, labels, hints = job
        torch.set_num_threads(each)
        images = torch.from_numpy(normalised(raw.numpy())).to(device)
        labels, hints = labels.to(device), hints.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            rows = replica(images).float()
        logits = rows[:, -CLIP:, : len(GESTURES)].mean(1)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        near = torch.nn.functional.smooth_l1_loss(rows[..., len(GESTURES) :], hints)
        grads = torch.autograd.grad(loss + options.hints * near, weights)
        return (loss.item(), near.item()), int((logits.argmax(1) == labels).sum()), grads

    last = min(options.steps, args.stop_at or options.steps)
    bar = Progress(
        TextColumn(options.mode),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    began, seen, right, summed = time.monotonic(), 0, 0, np.zeros(2)
    stream = batches(options, start, args.workers)
    pool = ThreadPoolExecutor(options.shards)
    with pool, bar, log.open("a", encoding="utf-8") as lines:
        task = bar.add_task("train", total=last, completed=start, note="")
        for step in range(start, last):
            if step >= options.steps * (1 - options.tail) and model.training:
                for replica in replicas:
                    replica.load_state_dict(model.state_dict())
                    replica.eval()
            raw, labels, hints = next(stream)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step)
            pieces = (part.chunk(options.shards) for part in (raw, labels, hints))
            parts = list(pool.map(work, zip(replicas, *pieces, strict=True)))
            for number, weight in enumerate(weights):
                weight.grad = torch.stack([grads[number] for _, _, grads in parts]).mean(0)
            torch.nn.utils.clip_grad_norm_(weights, 5.0)
            optimizer.step()
            keep = min(options.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), 1 - keep)
                for old, new in zip(mean.buffers(), model.buffers(), strict=True):
                    old.lerp_(new, 1 - keep) if old.dtype.is_floating_point else old.copy_(new)
            done = step + 1
            seen, right = seen + len(labels), right + sum(part[1] for part in parts)
            summed += np.mean([part[0] for part in parts], 0) * len(labels)
            if done % 20 == 0 or done == last:
                line = {
                    "step": done,
                    "lr": learning_rate(options, step),
                    "loss": round(float(summed[0] / seen), 4),
                    "hints": round(float(summed[1] / seen), 4),
                    "accuracy": round(right / seen, 4),
                    "seconds": round(time.monotonic() - began, 1),
                }
                seen, right, summed = 0, 0, np.zeros(2)
                print(json.dumps(line), file=lines, flush=True)
                bar.update(
                    task, completed=done, note=f"loss {line['loss']:.2f}, {line['accuracy']:.0%} right"
                )
            if done % args.save_every == 0 or done == last:
                save(
                    checkpoint,
                    {
                        "options": asdict(options),
                        "step": done,
                        "model": model.state_dict(),
                        "mean": mean.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    },
                )
    _cut(mean.cpu())
    size = (options.size, options.size)
    export_clip(mean, out / "clip.onnx", CLIP, size)
    if options.mode != "offline":
        export_online(mean, out / "online.onnx", size, nominal_dt_s=1 / FRAMES_PER_SECOND)
    return last == options.steps


def main(argv: list[str] | None = None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    parser.add_argument("--out", type=Path, default=Path("runs/video"), help="folder for all that is written")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["online"], help="trained one by one")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/<mode>/last.pt if it exists")
    parser.add_argument(
        "--eval-only", type=Path, metavar="CLIP.onnx", help="only print the accuracy of a model"
    )
    parser.add_argument("--eval-clips", type=int, default=1200, help="unseen clips to evaluate on")
    parser.add_argument("--eval-events", type=int, default=200, help="unseen motions in a stream")
    parser.add_argument("--backbone", default=defaults.backbone)
    parser.add_argument("--pictures", default="", help="folder of pictures to cut objects from, as well")
    for name in ("size", "steps", "batch", "warmup", "lead", "seed", "data_seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name in ("width", "lr", "weight_decay", "ema", "hints", "tail"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    parser.add_argument("--stop-at", type=int, help="stop after this step (the schedule still spans --steps)")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=cores, help="torch threads")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw batches (0: none)")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=False, help="autocast to bfloat16"
    )
    args = parser.parse_args(argv)
    if args.eval_only is not None:
        if not args.eval_only.is_file():
            print(f"model {args.eval_only}: not found, expected an exported clip model", file=sys.stderr)
            return 2
        print(json.dumps(evaluate(args.eval_only, args.eval_clips, args.threads)))
        return 0
    results: dict[str, Any] = {}
    for mode in args.modes:
        chosen = {name: getattr(args, name) for name in asdict(defaults) if name in vars(args)}
        folder = args.out / mode
        if not train(args, Options(mode=mode, **chosen), folder):
            continue
        results[mode] = evaluate(folder / "clip.onnx", args.eval_clips, args.threads)
        if mode != "offline":
            results[mode] |= evaluate_stream(folder / "online.onnx", args.eval_events, args.threads)
        (folder / "eval.json").write_text(json.dumps(results[mode], indent=1) + "\n")
        print(json.dumps({"mode": mode, **results[mode]}), flush=True)
    if results:
        (args.out / "eval.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
