"""Train the detector that ships in apps/detect on the procedural street, from nothing.

    python tools/train_detect.py --out runs/detect            # under an hour on two CPU cores
    python tools/train_detect.py --out runs/detect --resume   # go on after an interruption
    python tools/train_detect.py --eval-only apps/detect/yolo_lite.onnx

Writes to --out: `last.pt` (checkpoint), `log.jsonl` (one JSON object a line), `yolo_lite.onnx` and
`eval.json`. Training streets are seeds 0..999, evaluation streets start at seed 10000: no evaluation
street, hour or weather was seen in training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.host import usable_cores
from edgekit.models import training
from edgekit.models.detect_data import Batching, batches, rendered
from edgekit.synth.street import CLASSES

TRAIN_SEEDS = 1000
EVAL_FIRST_SEED = 10_000


@dataclass(frozen=True)
class Options(Batching):
    """What decides the result; kept in the checkpoint and compared on --resume."""

    shards: int = 2
    """A batch is cut into this many parts, each normalised by its own statistics; they run side by side."""
    seeds: int = TRAIN_SEEDS
    frames: int = 14
    lr: float = 1.5e-3
    weight_decay: float = 0.03
    warmup: int = 250
    ema: float = 0.999


# --- evaluation -------------------------------------------------------------------------------------


def eval_set(cache: Path, streets: int, frames: int) -> tuple[Path, dict[str, Any]]:
    """Evaluation pictures of unseen streets as (folder, COCO instances), drawn once into `cache`."""
    from edgekit.synth.coco import export_coco

    folder = cache / f"eval-{EVAL_FIRST_SEED}-{streets}x{frames}"
    if not (folder / "instances.json").is_file():
        export_coco(
            folder, range(EVAL_FIRST_SEED, EVAL_FIRST_SEED + streets), [90 + 120 * i for i in range(frames)]
        )
    return folder, json.loads((folder / "instances.json").read_text())


def detect(
    rows: np.ndarray, ratio: float, height: int, width: int, threshold: float = 0.01, most: int = 100
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode and suppress one exported output [N, 5 + C]: (boxes [n, 4] in picture pixels, scores, classes).

    Class-aware NMS at IoU 0.65, at most `most` boxes.
    """
    import torch

    from edgekit.models.yolo_lite import cells, decode

    grid, stride = cells(height, width)
    boxes = decode(torch.from_numpy(rows[:, :4]), grid, stride).numpy() / ratio
    scores = rows[:, 4:5] * rows[:, 5:]
    cell, kind = np.nonzero(scores > threshold)
    order = np.argsort(-scores[cell, kind], kind="stable")[:1000]
    cell, kind = cell[order], kind[order]
    boxes, score = boxes[cell], scores[cell, kind]
    area = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
    alive = np.ones(len(boxes), bool)
    keep: list[int] = []
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        keep.append(i)
        if len(keep) == most:
            break
        low, high = np.maximum(boxes[i, :2], boxes[:, :2]), np.minimum(boxes[i, 2:], boxes[:, 2:])
        inter = np.prod(np.maximum(high - low, 0), 1)
        alive &= (inter <= 0.65 * (area + area[i] - inter)) | (kind != kind[i])
    return boxes[keep], score[keep], kind[keep]


def evaluate(model: Path, folder: Path, truth: dict[str, Any], threads: int = 1) -> dict[str, Any]:
    """COCO metrics of an exported model on the pictures of `folder`: AP, AP50 and AP50 by class."""
    import contextlib
    import io

    import cv2
    import onnxruntime
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    _, _, height, width = session.get_inputs()[0].shape
    found = []
    for entry in truth["images"]:
        picture = cv2.imread(str(folder / entry["file_name"]))
        h, w = picture.shape[:2]
        ratio = min(height / h, width / w)
        size = (int(w * ratio), int(h * ratio))
        canvas = np.full((height, width, 3), 114, np.uint8)
        canvas[: size[1], : size[0]] = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
        rows = session.run(None, {"images": canvas.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
        for box, score, kind in zip(*detect(rows, ratio, height, width), strict=True):
            x, y, x1, y1 = (float(v) for v in box)
            found.append(
                {
                    "image_id": entry["id"],
                    "category_id": int(kind) + 1,
                    "bbox": [x, y, x1 - x, y1 - y],
                    "score": float(score),
                }
            )
    result: dict[str, Any] = {
        "AP": 0.0,
        "AP50": 0.0,
        "images": len(truth["images"]),
        "boxes": len(truth["annotations"]),
    }
    if not found:
        return result
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        scored = COCOeval(coco, coco.loadRes(found), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    result["AP"], result["AP50"] = round(float(scored.stats[0]), 4), round(float(scored.stats[1]), 4)
    precision = scored.eval["precision"][0, :, :, 0, 2]  # IoU 0.5, recall, class, all sizes, 100 boxes
    for entry, column in zip(truth["categories"], precision.T, strict=True):
        seen = column[column >= 0]
        result[f"AP50 {entry['name']}"] = round(float(seen.mean()), 4) if len(seen) else None
    return result


# --- training ---------------------------------------------------------------------------------------


def learning_rate(options: Options, step: int) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    return options.lr * training.cosine(step, options.steps, options.warmup, floor=0.02)


def train(args: argparse.Namespace, options: Options) -> Path:
    """Train and export; returns the path of the exported model."""
    import torch

    from edgekit.models.yolo_lite import YoloLite, cells, export_onnx
    from edgekit.models.yolox_loss import losses

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    each = max(1, args.threads // options.shards)  # no thread waits for another inside an operator
    torch.set_num_threads(each)
    torch.manual_seed(options.seed)
    device = torch.device(args.device)
    data = rendered(args.cache, options.seeds, options.frames, options.width, args.render_workers)
    model = YoloLite(len(CLASSES)).to(device, memory_format=torch.channels_last)
    mean = YoloLite(len(CLASSES)).to(device)
    mean.load_state_dict(model.state_dict())
    weights = list(model.parameters())
    optimizer = training.adamw(weights, options.lr, options.weight_decay)
    held = {"model": model, "mean": mean, "optimizer": optimizer}
    checkpoint = training.Checkpoint(out / "last.pt", asdict(options), **held)
    start = (
        checkpoint.resume(device, free=("steps",)) if args.resume else 0
    )  # a longer or shorter run is fine
    replicas = [model] + [training.twin(model) for _ in range(options.shards - 1)]

    def work(job: Any) -> tuple[dict[str, float], Any]:
        """Losses and gradients of one shard."""
        replica, images, truth, kinds, l1 = job
        torch.set_num_threads(each)
        images = images.float().contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            levels = replica(images)
        size = (images.shape[2], images.shape[3])
        grid, stride = cells(*size, device)
        parts = losses(levels, truth, kinds, grid, stride, size, l1)
        grads = torch.autograd.grad(torch.stack(list(parts.values())).sum(), weights)
        return {name: value.item() for name, value in parts.items()}, grads

    last = min(options.steps, args.stop_at or options.steps)
    exported = out / "yolo_lite.onnx"
    stream = batches(data, options, start, args.workers)
    began = time.monotonic()
    pool = ThreadPoolExecutor(options.shards)
    with pool, training.logged(out / "log.jsonl", "training", start, last) as say:
        for step in range(start, last):
            images, truth, kinds = (part.to(device) for part in next(stream))
            training.set_rate(optimizer, learning_rate(options, step))
            l1 = options.whole(step)
            done_parts = list(
                pool.map(
                    work,
                    zip(
                        replicas,
                        images.chunk(options.shards),
                        truth.chunk(options.shards),
                        kinds.chunk(options.shards),
                        [l1] * options.shards,
                        strict=True,
                    ),
                )
            )
            parts = {name: sum(p[name] for p, _ in done_parts) / options.shards for name in done_parts[0][0]}
            for number, weight in enumerate(weights):
                weight.grad = torch.stack([grads[number] for _, grads in done_parts]).mean(0)
            torch.nn.utils.clip_grad_norm_(weights, 10.0)
            optimizer.step()
            keep = min(options.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), 1 - keep)
                for old, new in zip(mean.buffers(), model.buffers(), strict=True):
                    old.lerp_(new, 1 - keep) if old.dtype.is_floating_point else old.copy_(new)
            done = step + 1
            if done % 20 == 0 or done == last:
                line: dict[str, Any] = {
                    "step": done,
                    "lr": learning_rate(options, step),
                    "loss": round(sum(parts.values()), 4),
                }
                line |= {name: round(value, 4) for name, value in parts.items()}
                line["seconds"] = round(time.monotonic() - began, 1)
                say(line, f"loss {line['loss']:.2f}")
            if done % args.save_every == 0 or done == last:
                checkpoint.save(done)
                export_onnx(
                    mean.cpu() if device.type != "cpu" else mean, exported, options.height, options.width
                )
                mean.to(device)
            if args.eval_every and done % args.eval_every == 0 and done < last:
                folder, wanted = eval_set(args.cache, 60, 2)
                say({"step": done, **evaluate(exported, folder, wanted, args.threads)})
    return exported


def main(argv: list[str] | None = None) -> int:
    cores = usable_cores()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    parser.add_argument(
        "--out", type=Path, default=Path("runs/detect"), help="folder for checkpoint, log and model"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/street"), help="folder for drawn pictures (3.5 GB)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt if it exists")
    parser.add_argument(
        "--eval-only", type=Path, metavar="MODEL.onnx", help="only print the metrics of a model"
    )
    parser.add_argument("--eval-streets", type=int, default=200, help="unseen streets to evaluate on")
    parser.add_argument("--eval-frames", type=int, default=2, help="pictures of each")
    for name in ("steps", "batch", "seeds", "frames", "seed", "warmup"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--eval-every", type=int, default=1000, help="0: only at the end")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare batches (0: none)")
    parser.add_argument(
        "--render-workers", type=int, default=cores, help="processes that draw the training set (0: none)"
    )
    training.add_run_arguments(parser, "torch threads", bf16=True)
    args = parser.parse_args(argv)
    model = args.eval_only
    if model is None:
        options = Options(
            steps=args.steps,
            batch=args.batch,
            seeds=args.seeds,
            frames=args.frames,
            seed=args.seed,
            warmup=args.warmup,
            lr=args.lr,
        )
        model = train(args, options)
        if args.stop_at and args.stop_at < options.steps:
            return 0
    elif not model.is_file():
        print(f"model {model}: not found, expected an exported ONNX file. Train one first", file=sys.stderr)
        return 2
    folder, truth = eval_set(args.cache, args.eval_streets, args.eval_frames)
    result = {"model": model.name, **evaluate(model, folder, truth, args.threads)}
    if args.eval_only is None:
        (args.out / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
