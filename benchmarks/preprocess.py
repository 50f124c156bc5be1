"""From the camera's bytes to the engine's input: the fused kernel beside chains of cv2.

    python benchmarks/preprocess.py [--repeats 200] [--cases yuyv-f32,yuyv-i8,nv12-f32,nv12-i8]

One thread each. A case is a camera format and size, and an input of 640x640 that the picture is letterboxed
into: float32 NCHW, or int8 NHWC codes of scale 1, zero point -128. The chains join every way found to get
the resized BGR picture with every way to store it; all reuse one set of buffers and leave the padding as it is,
and so does the kernel (`blobFromImage` cannot). All routes write the same input, as the stages of one program would.

`off_max`, `off_mean`: levels that a chain is off the kernel (the kernel must equal its numpy reference, else
the benchmark fails). Saturated colours differ by the order of clipping. `resize first` shrinks the planes
before it converts them, which is cheaper and blurs chroma: not the same picture, yet it competes.

All run in turn within one loop, in an order that moves on each time, after a warm-up, on pictures in memory
(a ring of --ring MiB, larger than the last-level cache) and again on two pictures in the cache. Prints one JSON
line per case and place: medians and quartiles in milliseconds; `ratio` = median of the fastest chain of all / median
of ours, `ratio_same` = the same among chains with off_mean below 0.5; `bytes` of the picture and of the
part of the input that is written, and `bandwidth_share` = bytes per second by the machine's rate for copying a
large array (bytes read + written; `copy_gb_s`), measured in the same run. Above 1: caches served a part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import commit, reference_data  # noqa: E402
from edgekit import kernels  # noqa: E402
from edgekit.kernels.letterbox import LetterboxPlan, reference  # noqa: E402
from edgekit.pixels import Format, PixelLayout, Pixels  # noqa: E402
from edgekit.runtime.bench import machine  # noqa: E402
from edgekit.spec import DType, QuantParams  # noqa: E402
from edgekit.tasks.preprocess import ImagePreprocess  # noqa: E402

SIDE = 640
CASES: dict[str, tuple[Format, int, int, bool]] = {
    "yuyv-f32": ("yuyv", 1280, 720, False),
    "yuyv-i8": ("yuyv", 1280, 720, True),
    "nv12-f32": ("nv12", 1920, 1080, False),
    "nv12-i8": ("nv12", 1920, 1080, True),
    "bgr-f32": ("bgr", 1280, 720, False),
}
COPIED = 256 << 20
"""Bytes of the arrays that the bandwidth is measured on."""

Chain = Callable[[Pixels], np.ndarray]


def photo(width: int, height: int, seed: int) -> np.ndarray:
    """A picture, uint8 [height, width, 3] BGR: of the reference data where it lies beside the checkout, else of smooth noise."""
    data = reference_data()
    photos = sorted((data / "coco_mini/val_a").rglob("*.jpg"))
    if photos:
        return cv2.resize(cv2.imread(str(photos[seed % len(photos)])), (width, height))
    noise = np.random.default_rng(seed).normal(0, 1, (height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 6)
    return np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def camera(image: np.ndarray, format: Format) -> Pixels:
    """The picture as a camera would give it."""
    height, width = image.shape[:2]
    layout = PixelLayout(format, width, height)
    if format == "bgr":
        return Pixels.bgr(image)
    if format == "yuyv":
        return Pixels.view(cv2.cvtColor(image, cv2.COLOR_BGR2YUV_YUYV).reshape(-1), layout)
    planar = cv2.cvtColor(image, cv2.COLOR_BGR2YUV_I420).reshape(-1)
    luma, chroma = planar[: width * height], planar[width * height :].reshape(2, -1)
    return Pixels.view(np.concatenate([luma, chroma.T.reshape(-1)]), layout)


def resized_by_cv2(layout: PixelLayout, roi: np.ndarray) -> dict[str, Callable[[Pixels], None]]:
    """Ways to the resized BGR picture in `roi`, a part of a canvas, by name."""
    height, width = roi.shape[:2]
    full = np.empty((layout.height, layout.width, 3), np.uint8)
    if layout.format == "bgr":
        return {"resize": lambda p: cv2.resize(p.planes[0], (width, height), dst=roi) is None}
    if layout.format == "yuyv":
        flat = np.empty((height, layout.width, 2), np.uint8)
        flat_bgr = np.empty((height, layout.width, 3), np.uint8)
        luma = np.empty((layout.height, layout.width), np.uint8)
        chroma = np.empty((layout.height, layout.width // 2, 2), np.uint8)
        y, uv = np.empty((height, width), np.uint8), np.empty((height // 2, width // 2, 2), np.uint8)

        def convert_first(p: Pixels) -> None:
            cv2.cvtColor(p.planes[0], cv2.COLOR_YUV2BGR_YUYV, dst=full)
            cv2.resize(full, (width, height), dst=roi)

        def rows_first(p: Pixels) -> None:
            cv2.resize(p.planes[0], (layout.width, height), dst=flat)
            cv2.cvtColor(flat, cv2.COLOR_YUV2BGR_YUYV, dst=flat_bgr)
            cv2.resize(flat_bgr, (width, height), dst=roi)

        def resize_first(p: Pixels) -> None:
            cv2.extractChannel(p.planes[0], 0, luma)
            pairs = p.planes[0].reshape(layout.height, layout.width // 2, 4)
            cv2.mixChannels([pairs], [chroma], [1, 0, 3, 1])
            cv2.resize(luma, (width, height), dst=y)
            cv2.resize(chroma, (width // 2, height // 2), dst=uv)
            cv2.cvtColorTwoPlane(y, uv, cv2.COLOR_YUV2BGR_NV12, roi)

        return {"convert first": convert_first, "rows first": rows_first, "resize first": resize_first}
    y, uv = np.empty((height, width), np.uint8), np.empty((height // 2, width // 2, 2), np.uint8)

    def two_planes(p: Pixels) -> None:
        cv2.cvtColorTwoPlane(p.planes[0], p.planes[1], cv2.COLOR_YUV2BGR_NV12, full)
        cv2.resize(full, (width, height), dst=roi)

    def planes_first(p: Pixels) -> None:
        cv2.resize(p.planes[0], (width, height), dst=y)
        cv2.resize(p.planes[1], (width // 2, height // 2), dst=uv)
        cv2.cvtColorTwoPlane(y, uv, cv2.COLOR_YUV2BGR_NV12, roi)

    return {"convert first": two_planes, "resize first": planes_first}


def stored(
    canvas: np.ndarray, roi: np.ndarray, out: np.ndarray, codes: bool
) -> dict[str, Callable[[], np.ndarray]]:
    """Ways from the resized picture to the input `out`, by name."""
    height, width = roi.shape[:2]
    if codes:
        table = np.bitwise_xor(np.arange(256, dtype=np.uint8), 128)

        def xor() -> np.ndarray:
            np.bitwise_xor(roi, 128, out=out[0, :height, :width].view(np.uint8))
            return out

        def look_up() -> np.ndarray:
            cv2.LUT(roi, table, dst=out[0, :height, :width].view(np.uint8))
            return out

        def subtract() -> np.ndarray:
            cv2.subtract(roi, (128, 128, 128, 0), dst=out[0, :height, :width], dtype=cv2.CV_8S)
            return out

        return {"xor": xor, "LUT": look_up, "subtract": subtract}
    planes = [np.empty((height, width), np.uint8) for _ in range(3)]

    def split_bytes() -> np.ndarray:
        cv2.split(roi, planes)
        for c in range(3):
            out[0, c, :height, :width] = planes[c]
        return out

    def split_floats() -> np.ndarray:
        cv2.split(roi.astype(np.float32), [out[0, c, :height, :width] for c in range(3)])
        return out

    def transpose() -> np.ndarray:
        out[0, :, :height, :width] = roi.transpose(2, 0, 1)
        return out

    def blob() -> np.ndarray:
        return cv2.dnn.blobFromImage(canvas)

    ways: dict[str, Callable[[], np.ndarray]] = {
        "split": split_bytes,
        "transpose": transpose,
        "blobFromImage": blob,
    }
    if width == SIDE:  # the planes of the input are then whole rows, which split can write into
        ways["astype, split"] = split_floats
    return ways


def chains(layout: PixelLayout, size: tuple[int, int], out: np.ndarray, codes: bool) -> dict[str, Chain]:
    canvas = np.full((SIDE, SIDE, 3), 114, np.uint8)
    roi = canvas[: size[1], : size[0]]
    made: dict[str, Chain] = {}
    for front, resize in resized_by_cv2(layout, roi).items():
        for back, store in stored(canvas, roi, out, codes).items():

            def chain(p: Pixels, resize: Any = resize, store: Any = store) -> np.ndarray:
                resize(p)
                result: np.ndarray = store()
                return result

            made[f"{front}, {back}"] = chain
    return made


def copy_rate() -> float:
    """Bytes read + written per second when one large array is copied to another."""
    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    np.copyto(target, source)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED / statistics.median(seconds)


def summary(values: list[int]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median_ms": round(middle / 1e6, 4), "q1_ms": round(low / 1e6, 4), "q3_ms": round(high / 1e6, 4)}


def measure(name: str, repeats: int, ring: int, rate: float) -> dict[str, Any]:
    """One case; `ring`: bytes of pictures that are read in turn, `rate`: bytes per second of a copy."""
    format, width, height, codes = CASES[name]
    quant = QuantParams(DType.int8, (1.0,), (-128,)) if codes else None
    spec = ImagePreprocess(SIDE, SIDE, layout="NHWC" if codes else "NCHW")
    layout = PixelLayout(format, width, height)
    made = LetterboxPlan(spec, layout, quant)
    size = (made.placement.width, made.placement.height)
    frames = [camera(photo(width, height, k), format) for k in range(4)]
    out = np.zeros(made.out_shape, made.out_dtype)
    made.run(frames[0], out)

    def ours(p: Pixels) -> np.ndarray:
        made.run(p, out, True)
        return out

    routes: dict[str, Chain] = {"ours": ours, **chains(layout, size, out, codes)}
    off = {}
    expected = np.empty_like(out)
    tables = reference.tables(spec, made.placement, layout, quant)
    for k in range(4):
        reference.letterbox(frames[k], tables, made.placement, expected, made.nhwc)
        for route, chain in routes.items():
            levels = np.abs(chain(frames[k]).astype(np.float32) - expected.astype(np.float32))
            off.setdefault(route, []).append((float(levels.max()), float(levels.mean())))
    if max(off["ours"])[0] != 0:
        raise SystemExit(f"{name}: the kernel is not its reference")
    count = max(2, -(-ring // layout.nbytes))
    frames = [frames[k % 4].copy() for k in range(count)]
    times: dict[str, list[int]] = {route: [] for route in routes}
    order, at = list(routes), 0
    for k in range(repeats + 10):
        order = order[1:] + order[:1]
        for route in order:
            chain, frame = routes[route], frames[at % len(frames)]
            at += 1
            start = time.perf_counter_ns()
            chain(frame)
            took = time.perf_counter_ns() - start
            if k >= 10:  # warm by then
                times[route].append(took)
    results = {
        route: {
            **summary(values),
            "off_max": max(o[0] for o in off[route]),
            "off_mean": round(max(o[1] for o in off[route]), 3),
        }
        for route, values in times.items()
    }
    mine = results.pop("ours")
    best, same = (
        min((r for r in results if results[r]["off_mean"] < limit), key=lambda r: results[r]["median_ms"])
        for limit in (float("inf"), 0.5)
    )
    written = size[0] * size[1] * 3 * out.itemsize
    seconds = mine["median_ms"] / 1e3
    return {
        "case": name,
        "picture": f"{width}x{height} {format}",
        "input": f"{out.dtype} {spec.layout} {SIDE}x{SIDE}",
        "pictures": "memory" if ring else "cache",
        "ring_bytes": count * layout.nbytes,
        "repeats": repeats,
        "ours": mine,
        "cv2": results,
        "best": best,
        "ratio": round(results[best]["median_ms"] / mine["median_ms"], 2),
        "best_same": same,
        "ratio_same": round(results[same]["median_ms"] / mine["median_ms"], 2),
        "bytes": layout.nbytes + written,
        "gb_s": round((layout.nbytes + written) / seconds / 1e9, 2),
        "copy_gb_s": round(rate / 1e9, 2),
        "bandwidth_share": round((layout.nbytes + written) / seconds / rate, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--ring", type=int, default=128, help="MiB of pictures that are read in turn")
    args = parser.parse_args()
    names = args.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"unknown case {unknown[0]}, expected some of {', '.join(CASES)}")
    cv2.setNumThreads(1)
    module, rate = kernels.native(), copy_rate()
    for name, ring in ((name, ring) for name in names for ring in (args.ring << 20, 0)):
        result = {
            "benchmark": "preprocess",
            **measure(name, args.repeats, ring, rate),
            "kernels": "numpy" if module is None else f"native/{module.isa}",
            "commit": commit(),
            "machine": machine(1),
            "versions": {"numpy": np.__version__, "cv2": cv2.__version__},
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
