"""Train the small gesture recogniser (TSM) on the procedural motions, from nothing.

    python tools/train_video.py --out runs/video                       # under a quarter of an hour on two CPU cores
    python tools/train_video.py --out runs/video --modes none online offline   # with both controls, three times that
    python tools/train_video.py --out runs/video --resume              # go on after an interruption
    python tools/train_video.py --eval-only runs/video/online/clip.onnx

A mode is where the shifted channels come from: `online` (the frame before: runs frame by frame), `offline`
(both neighbours), `none` (no shift: TSN, the control that cannot see motion). The training clips are drawn
once, into OUT/clips-<key>/ (2 GB, shared by the modes; delete it when done). Writes to OUT/<mode>/: `last.pt`
(checkpoint), `log.jsonl` (one JSON object a line), `clip.onnx`, `online.onnx` (not for offline), `eval.json`;
and to OUT/eval.json all modes. Evaluation is on other seeds than --data-seed.

Twelve labels a second teach a network that starts from nothing next to nothing. So in training it also says,
at a middle stage, which cells the object covers and how far each of them moved (exact optical flow, from the
poses), and at the end where the object is and how it moved: outputs that are cut off at export. And each
clip is seen mirrored, upside down, backwards and in other colours, with the label that this makes of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.models import training
from edgekit.synth.gestures import CLIP, EVENT, FRAMES_PER_SECOND, GESTURES, GestureWorld
from edgekit.synth.sprites import load_pictures

EVAL_SEED = 10_000
HINTS = 7
"""Auxiliary outputs at the end of the network in training (`targets`)."""
FLOW_STAGE = {"mobilenet_v2": "features.6", "resnet18": "layer2.1", "resnet50": "layer2.3"}
"""The last layer at an eighth of the picture's size, by backbone: its cells say how they moved."""
MODES = ("online", "offline", "none")
USUAL_STEP = 0.035
"""Shares of the picture that an object moves from frame to frame, roughly: flow is counted in these."""
SWAPS = {
    "mirrored": (("left", "right"), ("turn clockwise", "turn counter-clockwise")),
    "upside down": (("up", "down"), ("turn clockwise", "turn counter-clockwise")),
    "backwards": (
        ("left", "right"),
        ("up", "down"),
        ("zoom in", "zoom out"),
        ("turn clockwise", "turn counter-clockwise"),
    ),
}
"""Which motions change places when a clip is seen that way; the others stay what they are."""


@dataclass(frozen=True)
class Options:
    """What decides the result; kept in the checkpoint and compared on --resume."""

    mode: str = "online"
    backbone: str = "resnet18"
    width: float = 0.25
    size: int = 64
    clips: int = 12_000
    steps: int = 3000
    batch: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.02
    warmup: int = 100
    lead: int = 5
    """Every second batch of `online` begins this many frames before the motion, with the object at rest, so
    that motions after a running start are learnt too; their answers do not count."""
    hints: float = 1.0
    """Weight of the auxiliary loss at the end of the network (`targets`)."""
    flow: float = 1.0
    """Weight of the auxiliary loss at a middle stage (`cells`)."""
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


def steps(path: np.ndarray) -> np.ndarray:
    """float64 [..., T, 4]: how x, y, log size and angle changed since the frame before (0 in the first)."""
    place = np.concatenate([path[..., :2], np.log(path[..., 2:3]), path[..., 3:]], -1)
    first = np.zeros_like(place[..., :1, :])
    return np.concatenate([first, np.diff(place, axis=-2)], -2)


def targets(path: np.ndarray) -> np.ndarray:
    """What the outputs at the end learn, float32 [..., T, 7]: x, y, log size, then `steps`, each divided by its
    usual size.  path: float [..., T, 4], x, y, size, angle as in `Poses`."""
    place = np.concatenate([path[..., :2], np.log(path[..., 2:3]) + 0.8], -1) / (0.15, 0.15, 0.3)
    moved = steps(path) / (USUAL_STEP, USUAL_STEP, 0.09, 0.22)
    return np.concatenate([place, moved], -1).astype(np.float32)


def cells(path: np.ndarray, side: int) -> np.ndarray:
    """What the cells of the middle stage learn, float32 [..., T, 3, side, side]: 1 where the object is, and how
    far its point there moved to the right and down since the frame before, in usual steps.

    The motion of a similarity transform: that of the centre, plus growth and turn times the offset from it.
    """
    at = (np.arange(side) + 0.5) / side - 0.5
    x, y, size, _ = (path[..., i, None, None] for i in range(4))
    right, down = at[None, :] - x, at[:, None] - y
    inside = np.hypot(right, down) < size / 2
    dx, dy, grown, turned = (steps(path)[..., i, None, None] for i in range(4))
    u = dx + grown * right - turned * down
    v = dy + grown * down + turned * right
    return np.stack([inside, u / USUAL_STEP, v / USUAL_STEP], -3).astype(np.float32)


@dataclass(frozen=True)
class Clips:
    """Drawn clips: `images` uint8 [N, lead + CLIP, H, W, 3] BGR on disk, `paths` float64 [N, lead + CLIP, 4];
    clip i is of class i % 12."""

    images: np.ndarray
    paths: np.ndarray

    def batch(self, options: Options, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images [B, T, H, W, 3], classes [B] and paths [B, T, 4] of a step, on which alone they depend."""
        rng = np.random.default_rng([options.data_seed, step])
        started = options.mode == "online" and step % 2 == 1
        # classes at random: a batch with each class as often would tell through its statistics
        chosen = np.sort(rng.choice(len(self.images), options.batch, replace=False))
        first = 0 if started else self.images.shape[1] - CLIP
        seen = [
            varied(rng, self.images[i, first:], int(i) % len(GESTURES), self.paths[i, first:], not started)
            for i in chosen
        ]
        images, labels, paths = zip(*seen, strict=True)
        return np.stack(images), np.array(labels), np.stack(paths)


def varied(
    rng: np.random.Generator, images: np.ndarray, label: int, path: np.ndarray, backwards: bool
) -> tuple[np.ndarray, int, np.ndarray]:
    """A clip mirrored, upside down, `backwards` if allowed, each or not, with its colours in any order; with the
    class and the path that this makes of it."""
    path = path.copy()
    if rng.random() < 0.5:
        images, label = images[:, :, ::-1], swapped("mirrored", label)
        path[:, [0, 3]] *= -1
    if rng.random() < 0.5:
        images, label = images[:, ::-1], swapped("upside down", label)
        path[:, [1, 3]] *= -1
    if backwards and rng.random() < 0.5:
        images, label, path = images[::-1], swapped("backwards", label), path[::-1]
    return images[..., rng.permutation(3)], label, path


def swapped(how: str, label: int) -> int:
    """The class of a clip of class `label` seen that way (a key of `SWAPS`)."""
    for pair in SWAPS[how]:
        if GESTURES[label] in pair:
            return GESTURES.index(pair[1 - pair.index(GESTURES[label])])
    return label


def drawn(options: Options, out: Path, workers: int) -> Clips:
    """The training clips, from OUT/clips-<key>/ or drawn into it, whole or not at all."""
    from rich.progress import track

    length = options.lead + CLIP
    key = json.dumps(
        [options.data_seed, options.size, options.clips, options.lead, options.pictures, _sources()]
    )
    folder = out / f"clips-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        part = out / f"{folder.name}.part"
        part.mkdir(parents=True, exist_ok=True)
        shape = (options.clips, length, options.size, options.size, 3)
        images = np.lib.format.open_memmap(part / "images.npy", "w+", np.uint8, shape)
        paths = np.empty((options.clips, length, 4))
        pictures = load_pictures(options.pictures) if options.pictures else ()
        world = GestureWorld(options.data_seed, options.size, options.size, pictures)
        draw = partial(world.clip, lead=options.lead)
        with get_context("spawn").Pool(max(1, workers)) as pool:
            found = pool.imap(draw, range(options.clips), 64)
            for i, (clip, _) in enumerate(track(found, "draw clips", options.clips)):
                path = world.poses(i, lead=options.lead)
                images[i], paths[i] = clip, np.stack([path.x, path.y, path.size, path.angle], 1)
        images.flush()
        np.save(part / "paths.npy", paths)
        part.replace(folder)
    return Clips(np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "paths.npy"))


def _sources() -> str:
    """Digest of the code that draws."""
    from edgekit.synth import gestures, sprites

    return hashlib.sha256(b"".join(Path(m.__file__).read_bytes() for m in (gestures, sprites))).hexdigest()


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
    return options.lr * training.cosine(step, options.steps, options.warmup, floor=0.01)


def with_flow(model: Any, stage: str) -> Any:
    """`model` with a head on its layer `stage` that says per cell what `cells` lists: images
    [B, T, 3, H, W] -> (rows [B, T, K], grid [B, T, 3, h, w]), float32."""
    import torch

    class WithFlow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.kept = model, None
            layer = model.net.get_submodule(stage)
            channels = [m for m in layer.modules() if isinstance(m, torch.nn.BatchNorm2d)][-1].num_features
            self.grid = torch.nn.Conv2d(channels, 3, 1)
            layer.register_forward_hook(self.keep)

        def keep(self, layer: Any, given: Any, made: Any) -> None:
            self.kept = made

        def forward(self, images: Any) -> Any:
            rows = self.model(images).float()
            grid, self.kept = self.grid(self.kept).float(), None
            return rows, grid.unflatten(0, images.shape[:2])

    return WithFlow()


def flow_loss(grid: Any, truth: Any) -> Any:
    """Whether each cell is the object's, plus how its point moved where it is; both [B, T, 3, h, w]."""
    import torch

    inside = truth[:, :, 0]
    covered = torch.nn.functional.binary_cross_entropy_with_logits(grid[:, :, 0], inside)
    moved = torch.nn.functional.smooth_l1_loss(grid[:, :, 1:], truth[:, :, 1:], reduction="none").sum(2)
    return covered + (inside * moved).sum() / inside.sum().clamp(min=1)


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

    from edgekit.models.tsm import TSM, export_clip, export_online

    clips = drawn(options, args.out, args.threads)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(options.seed)
    device = torch.device(args.device)
    model = TSM(options.backbone, len(GESTURES) + HINTS, options.mode, options.width)
    taught = with_flow(model, FLOW_STAGE[options.backbone]).to(device, memory_format=torch.channels_last)
    weights = list(taught.parameters())
    optimizer = training.adamw(weights, options.lr, options.weight_decay)
    checkpoint = training.Checkpoint(out / "last.pt", asdict(options), model=taught, optimizer=optimizer)
    start = checkpoint.resume(device) if args.resume else 0
    taught.train()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.05
    last = min(options.steps, args.stop_at or options.steps)
    began, seen, right, summed = time.monotonic(), 0, 0, np.zeros(3)
    coming = training.ahead(partial(clips.batch, options), start, last)
    with training.logged(out / "log.jsonl", options.mode, start, last) as say:
        for step, (images, labels, paths) in coming:
            training.set_rate(optimizer, learning_rate(options, step))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                rows, grid = taught(torch.from_numpy(normalised(images)).to(device))
            logits, kinds = rows[:, -CLIP:, : len(GESTURES)].mean(1), torch.from_numpy(labels).to(device)
            near = rows[..., len(GESTURES) :], torch.from_numpy(targets(paths)).to(device)
            truth = torch.from_numpy(cells(paths, grid.shape[-1])).to(device)
            losses = torch.stack(
                [
                    torch.nn.functional.cross_entropy(logits, kinds),
                    torch.nn.functional.smooth_l1_loss(*near),
                    flow_loss(grid, truth),
                ]
            )
            optimizer.zero_grad(set_to_none=True)
            (losses[0] + options.hints * losses[1] + options.flow * losses[2]).backward()
            torch.nn.utils.clip_grad_norm_(weights, 5.0)
            optimizer.step()
            done = step + 1
            seen, right = seen + len(labels), right + int((logits.argmax(1) == kinds).sum())
            summed += losses.detach().cpu().numpy() * len(labels)
            if done % 20 == 0 or done == last:
                loss, hints, flow = (round(float(v), 4) for v in summed / seen)
                line = {
                    "step": done,
                    "lr": learning_rate(options, step),
                    "loss": loss,
                    "hints": hints,
                    "flow": flow,
                    "accuracy": round(right / seen, 4),
                    "seconds": round(time.monotonic() - began, 1),
                }
                say(line, f"loss {loss:.2f}, {right / seen:.0%} right")
                seen, right, summed = 0, 0, np.zeros(3)
            if done % args.save_every == 0 or done == last:
                checkpoint.save(done)
    model = model.cpu()
    _cut(model)
    size = (options.size, options.size)
    export_clip(model, out / "clip.onnx", CLIP, size)
    if options.mode != "offline":
        export_online(model, out / "online.onnx", size, nominal_dt_s=1 / FRAMES_PER_SECOND)
    return last == options.steps


def main(argv: list[str] | None = None) -> int:
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
    parser.add_argument("--backbone", choices=tuple(FLOW_STAGE), default=defaults.backbone)
    parser.add_argument("--pictures", default="", help="folder of pictures to cut objects from, as well")
    for name in ("size", "clips", "steps", "batch", "warmup", "lead", "seed", "data_seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name in ("width", "lr", "weight_decay", "hints", "flow"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(defaults, name))
    training.add_run_arguments(parser, "torch threads, and processes that draw the clips")
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
