"""What a detector costs outside its network: ours beside the usual Python route.

    python benchmarks/overhead.py [--repeats 300] [--size 1280x720]

YOLOX-nano shapes. Ours: `letterbox` into the engine's input, then `Postprocess` on the raw heads.
Usual, as in YOLOX's own demo: cv2 resize into a padded canvas, transpose to a float32 CHW copy; numpy
decode of all 3549 rows of the network's activated output (grids computed beforehand), threshold,
`cv2.dnn.NMSBoxes` with class offsets, map back. Both on one thread, in turn within one loop, on a
ring of frames larger than most second-level caches. Outputs come from the real model where the
reference data lies beside the checkout ($EDGEKIT_SHARED), else they are synthetic, and the result
says so. Prints one JSON line; `ratio` = median of ours / median of usual.
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

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit, reference_data  # noqa: E402
from edgekit import kernels  # noqa: E402
from edgekit.kernels.letterbox import letterbox  # noqa: E402
from edgekit.tasks.detect.decode import Postprocess  # noqa: E402
from edgekit.tasks.detect.spec import Channels, DetectHead, DetectSpec, HeadLevel  # noqa: E402
from edgekit.tasks.preprocess import ImagePreprocess, Placement  # noqa: E402

SIDE = 416
STRIDES = (8, 16, 32)
NANO = DetectSpec(
    preprocess=ImagePreprocess(SIDE, SIDE),
    head=DetectHead(
        "yolox",
        80,
        tuple(HeadLevel(s, Channels(f"box{s}"), Channels(f"cls{s}"), Channels(f"obj{s}")) for s in STRIDES),
    ),
    labels=tuple(str(c) for c in range(80)),
)
RING = 8


def run_nano(data: Path, inputs: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """YOLOX-nano's raw head convolutions by name and its activated output [1, 3549, 85]."""
    import onnx
    import onnxruntime

    model = onnx.load(str(data / "models/yolox_nano/yolox_nano.onnx"))
    made_by = {name: node for node in model.graph.node for name in node.output}
    names = []
    for (
        node
    ) in model.graph.node:  # each level ends in Concat(box, Sigmoid(objectness), Sigmoid(classes)) -> Reshape
        level = made_by.get(node.input[0]) if node.op_type == "Reshape" else None
        if level is not None and level.op_type == "Concat" and len(level.input) == 3:
            names += [level.input[0], made_by[level.input[1]].input[0], made_by[level.input[2]].input[0]]
    assert len(names) == 9, "not the YOLOX head that was expected"
    final = model.graph.output[0].name
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    activated, *raw = session.run([final, *names], {session.get_inputs()[0].name: inputs})
    keys = [f"{kind}{s}" for s in STRIDES for kind in ("box", "obj", "cls")]
    return dict(zip(keys, raw, strict=True)), activated


def synthetic(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Heads in which about 60 of the 3549 cells pass, in groups around 12 objects."""
    raw, rows = {}, []
    for s in STRIDES:
        n = SIDE // s
        box = rng.normal(0, 0.5, (1, 4, n, n)).astype(np.float32)
        objectness = rng.normal(-8, 1, (1, 1, n, n)).astype(np.float32)
        classes = rng.normal(-5, 1, (1, 80, n, n)).astype(np.float32)
        for _ in range(4):
            y, x, c = rng.integers(0, n - 2), rng.integers(0, n - 2), rng.integers(0, 80)
            objectness[0, 0, y : y + 2, x : x + 3], classes[0, c, y : y + 2, x : x + 3] = 2, 2
        raw |= {f"box{s}": box, f"obj{s}": objectness, f"cls{s}": classes}
        activated = [box, 1 / (1 + np.exp(-objectness)), 1 / (1 + np.exp(-classes))]
        rows.append(np.concatenate(activated, axis=1).reshape(85, -1).T)
    return raw, np.concatenate(rows)[None].astype(np.float32)


class Usual:
    """The usual route; what it may keep between frames (grids) it keeps."""

    def __init__(self) -> None:
        sizes = [SIDE // s for s in STRIDES]
        grids = [np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) for n in sizes]
        self.grid = np.concatenate(grids).astype(np.float32)
        self.stride = np.repeat(STRIDES, [n * n for n in sizes]).astype(np.float32)[:, None]

    def preprocess(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        ratio = min(SIDE / image.shape[0], SIDE / image.shape[1])
        height, width = int(image.shape[0] * ratio), int(image.shape[1] * ratio)
        canvas = np.full((SIDE, SIDE, 3), 114, np.uint8)
        canvas[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return np.ascontiguousarray(canvas.transpose(2, 0, 1), dtype=np.float32)[None], ratio

    def postprocess(self, output: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = output[0]
        centre = (rows[:, :2] + self.grid) * self.stride
        size = np.exp(rows[:, 2:4]) * self.stride
        scores = rows[:, 4:5] * rows[:, 5:]
        classes = scores.argmax(axis=1)
        best = scores[np.arange(len(rows)), classes]
        keep = best >= NANO.score_threshold
        centre, size, classes, best = centre[keep], size[keep], classes[keep], best[keep]
        boxes = np.concatenate([centre - size / 2, size], axis=1) / ratio
        shifted = boxes.copy()
        shifted[:, :2] += classes[:, None] * 8192.0
        kept = cv2.dnn.NMSBoxes(shifted, best, NANO.score_threshold, NANO.iou_threshold)
        kept = np.asarray(kept, int).reshape(-1)
        boxes[:, 2:] += boxes[:, :2]
        return boxes[kept], best[kept], classes[kept]


def measure(
    frames: list[np.ndarray], raw: dict[str, np.ndarray], activated: np.ndarray, repeats: int
) -> dict[str, Any]:
    """Milliseconds per stage and route, medians and 5th..95th percentiles."""
    cv2.setNumThreads(1)
    target = np.zeros((1, 3, SIDE, SIDE), np.float32)
    post, usual, size = Postprocess(NANO), Usual(), frames[0].shape[:2]

    def ours(image: np.ndarray) -> tuple[int, int, Any]:
        start = time.perf_counter_ns()
        placement: Placement = letterbox(image, NANO.preprocess, target)
        middle = time.perf_counter_ns()
        found = post(raw, placement, size)
        return middle - start, time.perf_counter_ns() - middle, found

    def theirs(image: np.ndarray) -> tuple[int, int, Any]:
        start = time.perf_counter_ns()
        _, ratio = usual.preprocess(image)
        middle = time.perf_counter_ns()
        found = usual.postprocess(activated, ratio)
        return middle - start, time.perf_counter_ns() - middle, found

    found, expected = ours(frames[0])[2], theirs(frames[0])[2]
    clipped = np.clip(expected[0], 0, [size[1], size[0]] * 2)
    if len(found) != len(clipped) or np.abs(found.boxes - clipped).max(initial=0) > 0.1:
        raise SystemExit(f"the two routes disagree: {len(found)} and {len(clipped)} boxes")
    times: dict[str, list[tuple[int, int]]] = {"ours": [], "usual": []}
    for k in range(repeats + 20):
        image = frames[k % RING]
        for name, route in (
            (("ours", ours), ("usual", theirs)) if k % 2 else (("usual", theirs), ("ours", ours))
        ):
            pre, decode, _ = route(image)
            if k >= 20:  # warm by then
                times[name].append((pre, decode))

    def summary(values: list[int]) -> dict[str, float]:
        cuts = statistics.quantiles(values, n=20)
        return {
            "median_ms": round(statistics.median(values) / 1e6, 4),
            "p5_ms": round(cuts[0] / 1e6, 4),
            "p95_ms": round(cuts[-1] / 1e6, 4),
        }

    result: dict[str, Any] = {"detections": len(found), "repeats": repeats}
    for name, values in times.items():
        result[name] = {
            "total": summary([a + b for a, b in values]),
            "preprocess": summary([a for a, _ in values]),
            "decode": summary([b for _, b in values]),
        }
    result["ratio"] = round(result["ours"]["total"]["median_ms"] / result["usual"]["total"]["median_ms"], 3)
    return result


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    load = round(os.getloadavg()[0], 2)
    return {"cpu": model, "arch": platform.machine(), "cores": os.cpu_count(), "load_1min": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--size", default="1280x720", help="picture, WIDTHxHEIGHT")
    args = parser.parse_args()
    width, height = (int(v) for v in args.size.split("x"))
    rng = np.random.default_rng(0)
    data = reference_data()
    photos = sorted((data / "coco_mini/val_a").rglob("*.jpg"))[:RING]
    if (data / "models/yolox_nano/yolox_nano.onnx").is_file() and photos:
        frames = [cv2.resize(cv2.imread(str(photos[k % len(photos)])), (width, height)) for k in range(RING)]
        target = np.zeros((1, 3, SIDE, SIDE), np.float32)
        letterbox(frames[0], NANO.preprocess, target)
        raw, activated = run_nano(data, target)
        source = "YOLOX-nano on a photo"
    else:
        frames = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(RING)]
        raw, activated = synthetic(rng)
        source = "synthetic heads"
    module = kernels.native()
    result = {
        "benchmark": "overhead",
        "picture": args.size,
        "outputs": source,
        "kernels": "numpy" if module is None else f"native/{module.isa}",
        **measure(frames, raw, activated, args.repeats),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "cv2": cv2.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
