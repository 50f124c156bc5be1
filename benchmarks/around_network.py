"""What a detector costs around its network, with the network running in between (cold caches, as on a robot).

    python benchmarks/around_network.py BUNDLE.edge MODEL.onnx [--runs 200]

YOLOX models. Ours: the bundle's pipeline. Usual: cv2 letterbox into a canvas, float32 CHW copy, the
whole network with its activated rows, numpy decode of all rows, cv2 NMS with class offsets. In turn
within one loop, one thread, a fresh copy of the picture each time. Prints one JSON line; `ratio` =
median of ours / median of usual, without the network's own time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime

from edgekit.runtime.bench import machine
from edgekit.runtime.engine import load
from edgekit.runtime.sources import open_source

STRIDES = (8, 16, 32)


class Usual:
    """The usual Python route around a YOLOX export."""

    def __init__(self, model: Path) -> None:
        config = onnxruntime.SessionOptions()
        config.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(model), config, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name
        self.height, self.width = self.session.get_inputs()[0].shape[2:]
        cells, strides = [], []
        for stride in STRIDES:
            y, x = np.mgrid[: self.height // stride, : self.width // stride]
            cells.append(np.stack([x, y], -1).reshape(-1, 2))
            strides.append(np.full((x.size, 1), stride))
        self.cells = np.concatenate(cells).astype(np.float32)
        self.strides = np.concatenate(strides).astype(np.float32)

    def __call__(self, image: np.ndarray, score: float, iou: float) -> tuple[int, int]:
        """Nanoseconds before and after the network."""
        start = time.perf_counter_ns()
        ratio = min(self.height / image.shape[0], self.width / image.shape[1])
        canvas = np.full((self.height, self.width, 3), 114, np.uint8)
        small = cv2.resize(image, (int(image.shape[1] * ratio), int(image.shape[0] * ratio)))
        canvas[: small.shape[0], : small.shape[1]] = small
        x = np.ascontiguousarray(canvas.transpose(2, 0, 1)[None], dtype=np.float32)
        placed = time.perf_counter_ns()
        rows: Any = self.session.run(None, {self.name: x})[0][0]
        ran = time.perf_counter_ns()
        centre, size = (rows[:, :2] + self.cells) * self.strides, np.exp(rows[:, 2:4]) * self.strides
        boxes = np.concatenate([centre - size / 2, centre + size / 2], 1) / ratio
        scores = rows[:, 4:5] * rows[:, 5:]
        classes = scores.argmax(1)
        best = scores[np.arange(len(classes)), classes]
        keep = best >= score
        boxes, best, classes = boxes[keep], best[keep], classes[keep]
        if len(boxes):
            offset = classes[:, None] * 8192
            cv2.dnn.NMSBoxes(
                np.concatenate([boxes[:, :2] + offset, boxes[:, 2:] - boxes[:, :2]], 1).tolist(),
                best.tolist(),
                score,
                iou,
            )
        return placed - start, time.perf_counter_ns() - ran


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=30)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with open_source("synthetic://street?seed=1&frames=1&size=1280x720") as source:
        picture = np.array(next(iter(source)).image)
    usual, ours = Usual(args.model), []
    theirs = []
    with load(args.bundle, threads=1) as engine:
        detect = engine.pipeline()
        for i in range(args.warmup + args.runs):
            image = picture.copy()
            a = usual(image, detect.spec.score_threshold, detect.spec.iou_threshold)
            detect(image)
            if i >= args.warmup:
                theirs.append(a)
                ours.append((detect.stage_ns[0], detect.stage_ns[2]))

    def table(samples: list[tuple[int, int]]) -> dict[str, float]:
        ms = np.array(samples) / 1e6
        total = ms.sum(axis=1)
        return {
            "before_ms": round(float(np.median(ms[:, 0])), 4),
            "after_ms": round(float(np.median(ms[:, 1])), 4),
            "total_ms": round(float(np.median(total)), 4),
            "iqr_ms": round(float(np.subtract(*np.percentile(total, [75, 25]))), 4),
        }

    row = {"benchmark": "around_network", "picture": "1280x720", "ours": table(ours), "usual": table(theirs)}
    row["ratio"] = round(row["ours"]["total_ms"] / row["usual"]["total_ms"], 4)  # type: ignore[index]
    print(json.dumps({**row, "runs": args.runs, "machine": machine(1)}))


if __name__ == "__main__":
    main()
