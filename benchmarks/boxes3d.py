"""Rotated boxes and heat-map peaks: ours beside the numpy references, OpenCV and torch.

    python benchmarks/boxes3d.py [--repeats 60]

- `iou`: IoU from above of every box with every other. `reference`: edgekit's own in numpy; `cv2`: a loop over
  `cv2.rotatedRectangleIntersection` and `cv2.contourArea`, called only for pairs whose circles overlap (found in numpy).
- `nms`: greedy, one class, at IoU 0.2. `cv2`: `cv2.dnn.NMSBoxesRotated`, the boxes already as it wants them.
- `circle`: greedy by distance, 1 m; beside the numpy reference alone.
- `peaks`: 10 classes on 180 x 180 cells, best 500 with score >= 0.1 and their 10 regression values. `torch`: sigmoid,
  max_pool2d, equality, topk, threshold, gather (the usual route of CenterNet-like heads), one thread.

`places`: `scene`, 60 objects within 54 m, each with many boxes beside each other, as heads give them; `crowd`, all boxes
within 10 m. Routes in turn within one loop, on one thread; slow ones in every 10th round. One JSON line per case;
`ratio` = median of ours / median of the route. The routes must give the same boxes, but for OpenCV's rounding (float32,
up to 0.01 of an IoU is let pass, `cv2_off` is printed) and for its rule that a box inside another one has IoU 1 with it
(`cv2_differs_in`: boxes kept by one of the two alone; our IoU with that rule must give OpenCV's boxes exactly).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
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
from edgekit.kernels.boxes3d import bev_iou, nms_circle, nms_rotated, reference  # noqa: E402
from edgekit.kernels.peaks import peaks  # noqa: E402
from edgekit.kernels.peaks import reference as peaks_reference  # noqa: E402

SLOW = 10
IOU = 0.2
RADIUS = 1.0
CLASSES, CELLS, LIMIT, THRESHOLD = 10, 180, 500, 0.1
Route = Callable[[], Any]


def scene(places: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [count, 7] and scores, no two equal."""
    rng = np.random.default_rng(0)
    objects = 60 if places == "scene" else count
    reach = 54.0 if places == "scene" else 10.0
    base = np.zeros((objects, 7))
    base[:, :2] = rng.uniform(-reach, reach, (objects, 2))
    base[:, 3:6] = rng.uniform((0.5, 0.5, 1.0), (6.0, 2.5, 3.0), (objects, 3))
    base[:, 6] = rng.uniform(-np.pi, np.pi, objects)
    boxes = base[np.arange(count) % objects]
    boxes = boxes + rng.normal(0, 1, boxes.shape) * (0.3, 0.3, 0.1, 0.1, 0.05, 0.05, 0.05)
    scores = rng.permutation(np.linspace(0.1, 0.99, count))
    return boxes.astype(np.float32), scores.astype(np.float32)


def rectangles(boxes: np.ndarray) -> list[tuple[tuple[float, float], tuple[float, float], float]]:
    return [
        ((float(x), float(y)), (float(length), float(width)), float(np.degrees(yaw)))
        for x, y, _, length, width, _, yaw in boxes
    ]


def iou_of_cv2(boxes: np.ndarray, rects: list[Any]) -> np.ndarray:
    xy, radius = boxes[:, :2], np.hypot(boxes[:, 3], boxes[:, 4]) / 2
    apart = np.hypot(*np.moveaxis(xy[:, None] - xy[None], 2, 0))
    area = boxes[:, 3] * boxes[:, 4]
    result = np.zeros((len(boxes), len(boxes)), np.float32)
    for i, j in zip(*np.nonzero(np.triu(apart < radius[:, None] + radius[None])), strict=True):
        kind, points = cv2.rotatedRectangleIntersection(rects[i], rects[j])
        if kind == cv2.INTERSECT_NONE:
            continue
        shared = cv2.contourArea(cv2.convexHull(points))
        result[i, j] = result[j, i] = shared / (area[i] + area[j] - shared)
    return result


def greedy_as_cv2(boxes: np.ndarray, scores: np.ndarray, rects: list[Any]) -> list[int]:
    overlap = bev_iou(boxes, boxes)
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable").tolist():
        rivals = [k for k in kept if overlap[i, k] > 0]
        inside = (
            cv2.rotatedRectangleIntersection(rects[i], rects[k])[0] == cv2.INTERSECT_FULL for k in rivals
        )
        if not any(overlap[i, k] > IOU or full for k, full in zip(rivals, inside, strict=True)):
            kept.append(i)
    return kept


def peaks_of_torch(torch: Any, heat: Any, maps: Any) -> Any:
    scores = heat.sigmoid()
    scores = scores * (torch.nn.functional.max_pool2d(scores[None], 3, 1, 1)[0] == scores)
    best, index = scores.reshape(-1).topk(LIMIT)
    keep = best >= THRESHOLD
    best, index = best[keep], index[keep]
    return best, index, maps.reshape(len(maps), -1)[:, index % (CELLS * CELLS)].T.contiguous()


def timed(routes: dict[str, Route], slow: set[str], repeats: int) -> dict[str, Any]:
    times: dict[str, list[int]] = {name: [] for name in routes}
    for k in range(repeats + 3):
        for name in sorted(routes, reverse=bool(k % 2)):
            if name in slow and k % SLOW:
                continue
            start = time.perf_counter_ns()
            routes[name]()
            if k >= 3 or name in slow:
                times[name].append(time.perf_counter_ns() - start)
    result: dict[str, Any] = {}
    for name, values in times.items():
        result[name] = {"median_ms": round(statistics.median(values) / 1e6, 4), "rounds": len(values)}
    ours = result["ours"]["median_ms"]
    result["ratio"] = {name: round(ours / result[name]["median_ms"], 5) for name in routes if name != "ours"}
    return result


def measure_iou(places: str, count: int, repeats: int) -> dict[str, Any]:
    boxes, _ = scene(places, count)
    rects = rectangles(boxes)
    out = np.empty((count, count), np.float32)
    routes: dict[str, Route] = {
        "ours": lambda: bev_iou(boxes, boxes, out=out, threads=1),
        "reference": lambda: reference.iou_matrix(boxes, boxes, False),
        "cv2": lambda: iou_of_cv2(boxes, rects),
    }
    ours, usual = routes["ours"](), routes["cv2"]()
    if not np.array_equal(ours, routes["reference"]()):
        raise SystemExit("iou: native and reference differ")
    off = float(np.abs(ours - usual).max())
    if off > 0.01:
        raise SystemExit(f"iou: OpenCV differs by {off}")
    facts = {"boxes": count, "overlapping": int((ours > 0).sum() - count), "cv2_off": off}
    return facts | timed(routes, {"reference", "cv2"}, repeats)


def measure_nms(places: str, count: int, repeats: int, circle: bool) -> dict[str, Any]:
    boxes, scores = scene(places, count)
    classes = np.zeros(count, np.int32)
    limits = np.array([RADIUS if circle else IOU], np.float32)
    run, limit = (nms_circle, RADIUS) if circle else (nms_rotated, IOU)
    routes: dict[str, Route] = {
        "ours": lambda: run(boxes, scores, classes, limit, count),
        "reference": lambda: reference.nms(boxes, scores, classes, limits, circle, count, count),
    }
    kept = routes["ours"]().tolist()
    if kept != routes["reference"]().tolist():
        raise SystemExit("nms: native and reference differ")
    facts: dict[str, Any] = {"boxes": count, "kept": len(kept)}
    if not circle:
        rects, as_list = rectangles(boxes), scores.tolist()
        routes["cv2"] = lambda: cv2.dnn.NMSBoxesRotated(rects, as_list, 0.0, IOU)
        facts["cv2_kept"] = len(usual := set(np.asarray(routes["cv2"]()).reshape(-1).tolist()))
        facts["cv2_differs_in"] = len(usual ^ set(kept))
        facts["explained"] = usual == set(greedy_as_cv2(boxes, scores, rects))
        if not facts["explained"]:
            raise SystemExit(f"nms: OpenCV keeps other boxes: {facts}")
    return facts | timed(routes, {"reference", "cv2"}, repeats)


def measure_peaks(places: str, repeats: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    heat = rng.normal(-6, 1, (CLASSES, CELLS, CELLS)).astype(np.float32)
    # blobs around objects, in a scene; a network that is not sure of anything, in a crowd
    if places == "crowd":
        heat += 3.5
    else:
        at = np.arange(-4, 5)
        bump = 9 * np.exp(-(at[:, None] ** 2 + at[None] ** 2) / 6.0)
        for _ in range(60):
            c, y, x = rng.integers(0, (CLASSES, CELLS - 9, CELLS - 9))
            heat[c, y : y + 9, x : x + 9] = np.maximum(
                heat[c, y : y + 9, x : x + 9], bump - 6 + rng.normal(0, 0.5)
            )
    maps = rng.normal(0, 1, (10, CELLS, CELLS)).astype(np.float32)
    heat_t, maps_t = torch.from_numpy(heat), torch.from_numpy(maps)
    windows = np.full(CLASSES, 3, np.int32)
    routes: dict[str, Route] = {
        "ours": lambda: peaks(heat, [maps], threshold=THRESHOLD, limit=LIMIT),
        "reference": lambda: peaks_reference.peaks(heat, [maps], windows, THRESHOLD, LIMIT),
        "torch": lambda: peaks_of_torch(torch, heat_t, maps_t),
    }
    found, (best, index, values) = routes["ours"](), routes["torch"]()
    flat = (found.cells[:, 0] * CELLS + found.cells[:, 1]) * CELLS + found.cells[:, 2]
    # torch.topk leaves the order of equal scores open
    if (
        sorted(flat.tolist()) != sorted(index.tolist())
        or np.abs(found.scores - best.numpy()).max(initial=0) > 1e-6
    ):
        raise SystemExit(f"peaks: torch finds others, {len(index)} and {len(flat)}")
    if sorted(map(tuple, found.values.tolist())) != sorted(map(tuple, values.tolist())):
        raise SystemExit("peaks: torch reads other values")
    facts = {
        "cells": heat.size,
        "above": int((heat >= peaks_reference.cutoff(THRESHOLD)).sum()),
        "peaks": len(found),
    }
    return facts | timed(routes, {"reference"}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    module = kernels.native()
    cv2.setNumThreads(1)
    versions = {"python": platform.python_version(), "numpy": np.__version__, "cv2": cv2.__version__}
    for places in ("scene", "crowd"):
        cases: dict[str, Callable[[], dict[str, Any]]] = {
            "iou": lambda places=places: measure_iou(places, 500, args.repeats),
            "nms": lambda places=places: measure_nms(places, 1000, args.repeats, circle=False),
            "circle": lambda places=places: measure_nms(places, 1000, args.repeats, circle=True),
            "peaks": lambda places=places: measure_peaks(places, args.repeats),
        }
        for name, case in cases.items():
            line = {
                "benchmark": "boxes3d",
                "case": name,
                "places": places,
                "kernels": "numpy" if module is None else f"native/{module.isa}",
                **case(),
                "commit": commit(),
                "machine": machine(),
                "versions": versions,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
