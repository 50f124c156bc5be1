"""Raw heads to boxes in the picture: ours beside numpy decode and `cv2.dnn.NMSBoxes`.

    python benchmarks/decode.py [--repeats 400] [--candidates 960]

Heads of a 640 x 640 network with 80 classes: 8400 cells, of which `candidates` reach the threshold. Ours:
`Postprocess` on the raw head convolutions, one native call. Usual: what a detector's demo does with the
network's own activated output, vectorised numpy (transpose where needed, argmax, threshold, corners), then
`cv2.dnn.NMSBoxes` on boxes shifted apart by class, then back to the picture. For `yolov8` that output is
[1, 84, 8400], boxes already decoded inside the network, so the usual route is spared the softmax over 16
bins per side that ours computes; for `yolox` it is [1, 8400, 85] before the grid is added.

Both on one thread, in turn within one loop. Before every call `--evict` MiB (default 0) of other memory are
read, which is what a network does to the caches. Places: `objects`, 4 x 4 cells around each of
candidates / 16 objects, as a network answers; `scattered`, single cells anywhere, the worst case.
Prints one JSON line per head and place; `ratio` = median of ours / median of usual.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit  # noqa: E402
from benchmarks.overhead import machine  # noqa: E402
from edgekit import kernels  # noqa: E402
from edgekit.tasks.detect.decode import Postprocess  # noqa: E402
from edgekit.tasks.detect.spec import Channels, DetectHead, DetectSpec, HeadLevel  # noqa: E402
from edgekit.tasks.preprocess import ImagePreprocess, Placement, place  # noqa: E402

SIDE, CLASSES, BINS = 640, 80, 16
STRIDES = (8, 16, 32)
PICTURE = (720, 1280)
Outputs = dict[str, np.ndarray]
Found = tuple[np.ndarray, np.ndarray, np.ndarray]


def spec(family: str) -> DetectSpec:
    def level(stride: int) -> HeadLevel:
        objectness = Channels(f"obj{stride}") if family == "yolox" else None
        return HeadLevel(stride, Channels(f"box{stride}"), Channels(f"cls{stride}"), objectness)

    levels = tuple(level(s) for s in STRIDES)
    if family == "yolox":
        head = DetectHead("yolox", CLASSES, levels)
    else:
        head = DetectHead("yolov8", CLASSES, levels, bins=BINS, cell_offset=0.5)
    return DetectSpec(ImagePreprocess(SIDE, SIDE), head, tuple(str(c) for c in range(CLASSES)))


def targets(
    rng: np.random.Generator, places: str, count: int
) -> dict[int, list[tuple[int, int, int, np.ndarray]]]:
    """(y, x, class, box in input pixels) of each candidate, by stride."""
    cells: dict[int, list[tuple[int, int, int, np.ndarray]]] = {s: [] for s in STRIDES}
    taken = {s: np.zeros((SIDE // s, SIDE // s), bool) for s in STRIDES}
    block = 4 if places == "objects" else 1
    for k in range(count // block**2):
        stride = STRIDES[rng.choice(3, p=(0.7, 0.24, 0.06))]
        n = SIDE // stride
        while True:
            y, x = rng.integers(0, n - block + 1, 2)
            if not taken[stride][y : y + block, x : x + block].any():
                break
        taken[stride][y : y + block, x : x + block] = True
        middle = (np.array([x, y]) + block / 2) * stride
        # a side of at most 8 cells: 15 bins reach it from every cell of the block
        size = rng.uniform(3, 8, 2) * stride
        for j in range(block**2):
            box = np.concatenate([middle - size / 2, middle + size / 2]) + rng.normal(0, 0.06 * stride, 4)
            cells[stride].append((int(y) + j // block, int(x) + j % block, k % CLASSES, box))
    return cells


def heads(family: str, places: str, count: int) -> tuple[Outputs, np.ndarray]:
    """Raw head tensors by name, and the same network's activated output."""
    rng = np.random.default_rng(0)
    cells = targets(rng, places, count)
    raw: Outputs = {}
    rows = []
    for stride in STRIDES:
        n = SIDE // stride
        classes = rng.normal(-8, 1, (1, CLASSES, n, n)).astype(np.float32).clip(max=-3)
        objectness = rng.normal(-8, 1, (1, 1, n, n)).astype(np.float32).clip(max=-3)
        box = rng.normal(0, 0.5, (1, 4 if family == "yolox" else 4 * BINS, n, n)).astype(np.float32)
        for y, x, label, corners in cells[stride]:
            # 0.38 .. 0.98, and in yolox its square: all above the threshold of 0.25
            classes[0, label, y, x] = objectness[0, 0, y, x] = rng.uniform(0.5, 4)
            x1, y1, x2, y2 = corners / stride
            if family == "yolox":
                box[0, :, y, x] = (x1 + x2) / 2 - x, (y1 + y2) / 2 - y, np.log(x2 - x1), np.log(y2 - y1)
                continue
            sides = np.clip((x + 0.5 - x1, y + 0.5 - y1, x2 - x - 0.5, y2 - y - 0.5), 0, BINS - 1)
            distance = np.abs(np.arange(BINS) - sides[:, None])
            box[0, :, y, x] = (rng.normal(0, 0.2, (4, BINS)) - 5 * distance).reshape(-1)
        raw |= {f"box{stride}": box, f"cls{stride}": classes}
        scores = 1 / (1 + np.exp(-classes))
        if family == "yolox":
            raw[f"obj{stride}"] = objectness
            activated = [box, 1 / (1 + np.exp(-objectness)), scores]
        else:
            weight = np.exp(box.reshape(4, BINS, n, n))
            left, top, right, bottom = np.einsum("sbyx,b->syx", weight, np.arange(BINS)) / weight.sum(axis=1)
            gy, gx = np.mgrid[0:n, 0:n] + 0.5
            decoded = (gx + (right - left) / 2, gy + (bottom - top) / 2, left + right, top + bottom)
            activated = [np.stack(decoded)[None] * stride, scores]
        rows.append(np.concatenate(activated, axis=1).reshape(-1, n * n))
    output = np.concatenate(rows, axis=1).astype(np.float32)
    return raw, np.ascontiguousarray(output.T)[None] if family == "yolox" else output[None]


class Usual:
    """The usual route; what it may keep between frames (grids) it keeps."""

    def __init__(self, family: str, placement: Placement, threshold: float, iou: float) -> None:
        sizes = [SIDE // s for s in STRIDES]
        grids = [np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) for n in sizes]
        self.grid = np.concatenate(grids).astype(np.float32)
        self.stride = np.repeat(STRIDES, [n * n for n in sizes]).astype(np.float32)[:, None]
        self.family, self.scale, self.threshold, self.iou = family, placement.scale_x, threshold, iou

    def __call__(self, output: np.ndarray) -> Found:
        if self.family == "yolox":
            rows = output[0]
            scores = rows[:, 4:5] * rows[:, 5:]
            classes = scores.argmax(axis=1)
            best = scores[np.arange(len(rows)), classes]
            keep = best >= self.threshold
            centre = (rows[keep, :2] + self.grid[keep]) * self.stride[keep]
            size = np.exp(rows[keep, 2:4]) * self.stride[keep]
        else:
            columns = output[0]
            best = columns[4:].max(axis=0)
            keep = best >= self.threshold
            classes = np.zeros(len(best), np.int64)
            classes[keep] = columns[4:, keep].argmax(axis=0)
            centre, size = columns[:2, keep].T, columns[2:4, keep].T
        best, classes = best[keep], classes[keep]
        boxes = np.concatenate([centre - size / 2, size], axis=1) / self.scale
        shifted = boxes.copy()
        shifted[:, :2] += classes[:, None] * 8192.0
        kept = np.asarray(cv2.dnn.NMSBoxes(shifted, best, self.threshold, self.iou), int).reshape(-1)
        boxes[:, 2:] += boxes[:, :2]
        np.clip(boxes, 0, (PICTURE[1], PICTURE[0]) * 2, out=boxes)
        return boxes[kept], best[kept], classes[kept]


def measure(family: str, places: str, candidates: int, repeats: int, evict: int) -> dict[str, Any]:
    """Milliseconds per route: medians and quartiles."""
    cv2.setNumThreads(1)
    rule = spec(family)
    placement = place(rule.preprocess, PICTURE[1], PICTURE[0])
    raw, activated = heads(family, places, candidates)
    post, usual = Postprocess(rule), Usual(family, placement, rule.score_threshold, rule.iou_threshold)
    other = np.zeros(evict << 18, np.float32)
    routes = {
        "ours": lambda: post(raw, placement, PICTURE, max_detections=candidates),
        "usual": lambda: usual(activated),
    }
    found, (boxes, scores, classes) = routes["ours"](), routes["usual"]()
    all_of_them = len(post(raw, placement, PICTURE, iou_threshold=1.0, max_detections=9000))
    # the same boxes, but for order among scores that are equal after the usual route's float32 rounding
    ours = sorted(zip(found.classes.tolist(), *found.boxes.T.round(0).tolist(), strict=True))
    theirs = sorted(zip(classes.tolist(), *boxes.T.round(0).tolist(), strict=True))
    if len(found) != len(scores) or np.abs(np.subtract(ours, theirs)).max(initial=0) > 1:
        raise SystemExit(f"the two routes disagree: {len(found)} and {len(scores)} boxes")
    times: dict[str, list[int]] = {name: [] for name in routes}
    for k in range(repeats + 20):
        for name in sorted(routes, reverse=bool(k % 2)):
            other.sum()
            start = time.perf_counter_ns()
            routes[name]()
            if k >= 20:  # warm by then
                times[name].append(time.perf_counter_ns() - start)

    def summary(values: list[int]) -> dict[str, float]:
        cuts = (v / 1e6 for v in statistics.quantiles(values, n=4))
        return dict(zip(("p25_ms", "median_ms", "p75_ms"), (round(v, 4) for v in cuts), strict=True))

    result: dict[str, Any] = {"candidates": all_of_them, "detections": len(found), "repeats": repeats}
    result |= {name: summary(values) for name, values in times.items()}
    result["ratio"] = round(result["ours"]["median_ms"] / result["usual"]["median_ms"], 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--candidates", type=int, default=960, help="a multiple of 16")
    parser.add_argument("--evict", type=int, default=0, help="MiB of other memory read before every call")
    args = parser.parse_args()
    module = kernels.native()
    for family in ("yolov8", "yolox"):
        for places in ("objects", "scattered"):
            result = {
                "benchmark": "decode",
                "head": f"{family}, 8400 cells, {CLASSES} classes",
                "places": places,
                "evict_mib": args.evict,
                "kernels": "numpy" if module is None else f"native/{module.isa}",
                **measure(family, places, args.candidates, args.repeats, args.evict),
                "commit": commit(),
                "machine": machine(),
                "versions": {
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                    "cv2": cv2.__version__,
                },
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
