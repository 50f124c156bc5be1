"""What a detector learns from: labelled pictures in memory or on disk, cut, mirrored and coloured anew at every step.

data = rendered(Path("runs/street"), seeds=1000, frames=14, width=384, workers=2)    # the procedural street
data = pictures(read_coco(instances, folder), (256, 320))                            # real ones
images, boxes, classes = make_batch(data, Batching(batch=16), step=0)
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.synth.street import StreetWorld
from edgekit.tasks.detect.dataset import CocoSet

MAX_BOXES = 64
SOURCE = (640, 360)

Labelled = tuple[Sequence[np.ndarray], np.ndarray, np.ndarray]
"""Pictures uint8 [h, w, 3] that fit the network's input, boxes [n, MAX_BOXES, 4] x1 y1 x2 y2 in their pixels, classes
[n, MAX_BOXES] (-1: none)."""


def _render(job: tuple[int, int, int, int]) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """All cached frames of one street: images as wide as the network, boxes in their pixels, classes."""
    import cv2

    cv2.setNumThreads(0)
    seed, frames, width, height = job
    world = StreetWorld(seed, *SOURCE)
    images = np.zeros((frames, height, width, 3), np.uint8)
    boxes = np.zeros((frames, MAX_BOXES, 4), np.float32)
    classes = np.full((frames, MAX_BOXES), -1, np.int8)
    for i in range(frames):
        frame = world.frame(i * 50 + seed % 50)
        images[i] = cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_LINEAR)
        n = min(len(frame.boxes), MAX_BOXES)
        boxes[i, :n] = frame.boxes[:n] * (width / SOURCE[0])
        classes[i, :n] = frame.classes[:n]
    return seed, images, boxes, classes


def rendered(cache: Path, seeds: int, frames: int, width: int, workers: int) -> Labelled:
    """The street as a training set, drawn once and kept in `cache`: images [n, h, w, 3] on disk, boxes [n, 64, 4],
    classes [n, 64] (-1: none)."""
    from rich.progress import track

    height = width * SOURCE[1] // SOURCE[0]
    folder = cache / f"street-{seeds}x{frames}-{width}x{height}"
    if not folder.is_dir():
        part = folder.with_name(folder.name + ".part")
        part.mkdir(parents=True, exist_ok=True)
        shape = (seeds * frames, height, width, 3)
        images = np.lib.format.open_memmap(part / "images.npy", "w+", np.uint8, shape)
        boxes = np.zeros((shape[0], MAX_BOXES, 4), np.float32)
        classes = np.zeros((shape[0], MAX_BOXES), np.int8)
        jobs = [(seed, frames, width, height) for seed in range(seeds)]
        with multiprocessing.get_context("spawn").Pool(workers) if workers else nullcontext() as pool:
            done = pool.imap(_render, jobs) if pool else map(_render, jobs)
            for seed, image, box, kind in track(done, total=len(jobs), description="drawing streets"):
                at = slice(seed * frames, (seed + 1) * frames)
                images[at], boxes[at], classes[at] = image, box, kind
        images.flush()
        np.savez(part / "labels.npz", boxes=boxes, classes=classes)
        part.rename(folder)
    labels = np.load(folder / "labels.npz")
    return np.load(folder / "images.npy", mmap_mode="r"), labels["boxes"], labels["classes"]


def pictures(data: CocoSet, size: tuple[int, int]) -> Labelled:
    """Labelled pictures made to fit size = (height, width), aspect kept, in memory. Crowds are left out.

    Raises: UsageError for a file that is no picture.
    """
    import cv2

    places = {picture.id: number for number, picture in enumerate(data.images)}
    boxes = np.zeros((len(places), MAX_BOXES, 4), np.float32)
    classes = np.full((len(places), MAX_BOXES), -1, np.int8)
    images, ratios = [], []
    for number, picture in enumerate(data.images):
        image = data.read(number)
        ratio = min(size[0] / picture.height, size[1] / picture.width)
        shape = (int(picture.width * ratio), int(picture.height * ratio))
        images.append(cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR))
        ratios.append(ratio)
    count = [0] * len(places)
    for truth in data.truths:
        at = places[truth.image_id]
        if truth.crowd or count[at] == MAX_BOXES:
            continue
        x, y, w, h = truth.box
        boxes[at, count[at]] = np.array([x, y, x + w, y + h]) * ratios[at]
        classes[at, count[at]] = truth.cls
        count[at] += 1
    return images, boxes, classes


@dataclass(frozen=True)
class Batching:
    """What decides the batches, together with the pictures."""

    steps: int = 7800
    batch: int = 16
    width: int = 384
    height: int = 224
    crop_width: int = 256
    crop_height: int = 128
    tail: float = 0.12
    """Share of the steps, the last ones, on whole pictures; crops before."""
    seed: int = 0
    upright: bool = True
    """Pictures have an up and a down: they are mirrored left to right only."""

    def whole(self, step: int) -> bool:
        """Whether `step` sees whole pictures."""
        return step >= self.steps * (1 - self.tail)


def augment(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    out: tuple[int, int],
    rng: np.random.Generator,
    crop: bool,
    upright: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One training picture on a canvas out = (height, width), padded with 114.

    Whole pictures lie top left, as the network will see them. `crop`: a window around a random
    object, sometimes zoomed. Both: flip (two ways if not `upright`), brightness, contrast, colour.
    """
    import cv2

    height, width = out
    h, w = image.shape[:2]
    if rng.random() < 0.5:
        image = image[:, ::-1]
        boxes = boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32)
        boxes = boxes + np.array([w, 0, w, 0], np.float32)
    if not upright and rng.random() < 0.5:
        image = image[::-1]
        boxes = boxes[:, [0, 3, 2, 1]] * np.array([1, -1, 1, -1], np.float32)
        boxes = boxes + np.array([0, h, 0, h], np.float32)
    if crop:
        zoom = math.exp(rng.uniform(math.log(0.55), math.log(1.3))) if rng.random() < 0.5 else 1.0
        if len(boxes) and rng.random() < 0.85:
            box = boxes[rng.integers(len(boxes))]
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        else:
            middle = (rng.uniform(0, w), rng.uniform(0, h))
        shift = []
        for at, side, window in zip(middle, (w, h), (width, height), strict=True):
            free = window - zoom * side  # keep the window inside the picture where it fits
            shift.append(
                float(np.clip(window * rng.uniform(0.2, 0.8) - zoom * at, min(free, 0), max(free, 0)))
            )
        if zoom == 1.0:
            shift = [float(round(v)) for v in shift]
        dx, dy = shift
        move = np.array([[zoom, 0, dx], [0, zoom, dy]], np.float32)
        image = cv2.warpAffine(
            np.ascontiguousarray(image),
            move,
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderValue=(114, 114, 114),
        )
        before = boxes * zoom + np.array([dx, dy, dx, dy], np.float32)
        boxes = np.clip(before, 0, np.array([width, height, width, height], np.float32))
        size, whole = boxes[:, 2:] - boxes[:, :2], before[:, 2:] - before[:, :2]
        cut = (size < whole - 0.5).any(1)
        least = np.where(cut, 8.0, 3.8)  # the labelling rule of the street, at this scale
        keep = (size.min(1) >= least) & (size.max(1) >= 7.5)
        boxes, classes = boxes[keep], classes[keep]
    else:
        canvas = np.full((height, width, 3), 114, np.uint8)
        canvas[:h, :w] = image
        image = canvas
    if rng.random() < 0.4:
        level = np.arange(256, dtype=np.float32)
        gamma, gain = (
            math.exp(rng.uniform(-0.3, 0.3)),
            rng.uniform(0.8, 1.2, 3) ** 0.5 * rng.uniform(0.8, 1.2),
        )
        table = 255 * (level / 255)[:, None] ** gamma * gain
        image = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8)[None])
    return image, boxes, classes


def make_batch(data: Labelled, options: Batching, step: int) -> tuple[Any, Any, Any]:
    """Batch of `step`: uint8 [B, 3, H, W], boxes [B, G, 4], classes [B, G] (-1: none).

    It depends on the options and the step alone.
    """
    import torch

    images, boxes, classes = data
    total = len(images)
    crop = not options.whole(step)
    size = (options.crop_height, options.crop_width) if crop else (options.height, options.width)
    picks = []
    for slot in range(options.batch):
        epoch, at = divmod(step * options.batch + slot, total)
        picks.append(int(_order(options.seed, epoch, total)[at]))
    out = np.zeros((options.batch, *size, 3), np.uint8)
    all_boxes = np.zeros((options.batch, MAX_BOXES, 4), np.float32)
    all_classes = np.full((options.batch, MAX_BOXES), -1, np.int64)
    most = 1
    for slot, pick in enumerate(picks):
        rng = np.random.default_rng([options.seed, step, slot])
        n = int((classes[pick] >= 0).sum())
        out[slot], box, kind = augment(
            images[pick], boxes[pick, :n], classes[pick, :n], size, rng, crop, options.upright
        )
        all_boxes[slot, : len(box)], all_classes[slot, : len(box)] = box, kind
        most = max(most, len(box))
    return (
        torch.from_numpy(out).permute(0, 3, 1, 2),
        torch.from_numpy(all_boxes[:, :most].copy()),
        torch.from_numpy(all_classes[:, :most].copy()),
    )


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    key = (seed, epoch, total)
    if key not in _orders:
        for old in [k for k in _orders if k[1] < epoch - 1 or k[2] != total]:
            del _orders[old]
        _orders[key] = np.random.default_rng([seed, 1, epoch]).permutation(total)
    return _orders[key]


def batches(data: Labelled, options: Batching, start: int, workers: int) -> Iterator[Any]:
    """Batches from step `start` on, made by `workers` processes (0: in this one)."""
    import torch.utils.data as tud

    class Steps(tud.Dataset):
        def __len__(self) -> int:
            return options.steps

        def __getitem__(self, step: int) -> Any:
            return make_batch(data, options, step)

    loader = tud.DataLoader(
        Steps(),
        batch_size=None,
        sampler=range(start, options.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)
