"""Published latencies as rows that the estimate can be held against, or the reason why a row cannot be."""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import NETWORKS
from edgekit.schema import from_json
from edgekit.target import Target
from edgekit.toolchain.cost import Machine, group
from edgekit.toolchain.estimate import machine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOARDS: list[tuple[str, str, str | None]] = [
    # device in the CSV starts with, board, power mode where the row states none
    ("Jetson Orin Nano Super 4", "", None),
    ("Jetson Orin Nano 4", "jetson-orin-nano-4", None),
    ("Jetson Orin Nano Super", "jetson-orin-nano-8", "MAXN_SUPER"),
    ("Jetson Orin Nano", "jetson-orin-nano-8", "15W-standard"),
    ("Jetson Orin NX 8", "jetson-orin-nx-8", None),
    ("Jetson Orin NX", "jetson-orin-nx-16", "MAXN"),
    ("Jetson AGX Orin 32", "jetson-orin-32", None),
    ("Jetson AGX Orin", "jetson-orin", "MAXN"),
    ("Jetson AGX Thor", "jetson-thor", None),
    ("Jetson Thor", "", None),
    ("Jetson TX2", "jetson-tx2", None),
    ("Jetson AGX Xavier", "jetson-agx-xavier", None),
    ("Jetson Xavier NX", "jetson-xavier-nx", None),
    ("Jetson Nano", "jetson-nano", None),
    ("Raspberry Pi 3", "rpi3", None),
    ("Raspberry Pi 4", "rpi4", None),
    ("Raspberry Pi 5", "rpi5", None),
    ("Pixel 1", "pixel-1", None),
    ("Pixel 2", "pixel-2", None),
    ("Pixel 3a", "pixel-3a", None),
    ("Pixel 3", "pixel-3", None),
    ("Pixel 4", "pixel-4", None),
    ("Pixel 6", "pixel-6", None),
    ("Galaxy S24", "snapdragon-8-gen-3", None),
    ("Snapdragon 855", "snapdragon-855-plus", None),
    ("Snapdragon 865", "snapdragon-865", None),
    ("Snapdragon 888", "android-arm64", None),
    ("Snapdragon 8 Gen 2", "android-arm64-i8mm", None),
    ("Snapdragon 7 Gen 4", "snapdragon-7-gen-4", None),
    ("Kirin 980", "kirin-980", None),
    ("QCS6490", "qcs6490", None),
]
MODES = {
    "MAXN": "MAXN",
    "MAXP": "MAXN",
    "MAXN_SUPER": "MAXN_SUPER",
    "15W": "15W",
    "25W": "25W",
    "30W": "30W",
    "40W": "40W",
    "50W": "50W",
    "10W": "10W",
}
NAMES = {
    "ppresnet50": "resnet50",
    "resnet_v2_101": "resnet101",
    "squeezenet": "squeezenet1_0",
    "yolox_t": "yolox_tiny",
    "mobilenet_v1_1.0": "mobilenet_v1",
    "mobilenet_v2_1.0": "mobilenet_v2",
    "mobilenet_v3_large_1.0": "mobilenet_v3_large",
    "mobilenet_v3_small_1.0": "mobilenet_v3_small",
}


@dataclass(frozen=True)
class Row:
    """A published latency and how to estimate it. `target` has the clock that the row states."""

    device: str
    board: str
    target: Target
    power: str | None
    network: str
    size: tuple[int, int]
    precision: str
    runtime: str
    threads: int | None
    seconds: float
    source: str
    python: bool = False
    """Timed around a call from Python, which adds its own cost."""

    @property
    def backend(self) -> str:
        return "tensorrt" if self.runtime == "tensorrt" else "onnxruntime"

    @property
    def machine(self) -> Machine:
        return machine(self.target, self.backend, self.power, self.threads, runtime=self.runtime)

    @property
    def group(self) -> str:
        return group(self.machine, {self.precision})


@functools.cache
def boards() -> dict[str, Target]:
    """Every board that a row may be of: those of targets/ and those of boards.toml."""
    data = tomllib.loads((Path(__file__).parent / "boards.toml").read_text(encoding="utf-8"))
    extra = {name: from_json(Target, {"name": name, **facts}, name) for name, facts in data.items()}
    return {**{n: Target.load(n) for n in Target.names() if n != "host"}, **extra}


def read(path: Path) -> tuple[list[Row], list[tuple[dict[str, str], str]]]:
    """(rows, [(row of the file, why it is left out)])."""
    rows: list[Row] = []
    left: list[tuple[dict[str, str], str]] = []
    with path.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            found = parse(record)
            if isinstance(found, Row):
                rows.append(found)
            else:
                left.append((record, found))
    return rows, left


def parse(r: dict[str, str]) -> Row | str:
    """The row, or why it cannot be judged."""
    runtime = _runtime(r)
    if runtime.startswith("!"):
        return runtime[1:]
    includes = r["includes"].lower()
    if r["batch"] != "1":
        return "batch is not 1"
    if re.search(
        r"throughput|pipeline|demo loop|incl\. ros|engines|mediapipe|pre-processing|predictor|incl\. nms",
        includes,
    ):
        return "a pipeline or throughput, not the network's latency"
    if "copies included" in includes:
        return "copies between host and device included"
    if "unoptimised baseline" in includes:
        return "an unoptimised baseline of unknown conditions"
    network = NAMES.get(r["model"], r["model"])
    if network not in NETWORKS:
        return "network not built here, or its variant not stated"
    size = re.fullmatch(r"(\d+)x(\d+)", r["input"])
    if not size:
        return "input size not stated"
    device = r["device"].removeprefix("NVIDIA ").lower()
    found = next(((b, p) for start, b, p in BOARDS if device.startswith(start.lower())), ("", None))
    if not found[0]:
        return "board not described here"
    board, power = found
    target = boards()[board]
    stated = r["power_mode"].split()[0].strip(",").upper() if r["power_mode"] else ""
    if stated == "MAXQ":
        return "power mode without known clocks"
    if MODES.get(stated) in {m.name for m in target.power_modes} and not (power or "").endswith("-standard"):
        power = MODES[stated]
    precision = _precision(r, runtime, target)
    if precision.startswith("!"):
        return precision[1:]
    if (
        runtime != "tensorrt"
        and (clock := re.search(r"([\d.]+) ?(GHz|MHz)", r["power_mode"]))
        and "GPU" not in r["power_mode"]
    ):
        target = _clocked(target, float(clock[1]) * (1e9 if clock[2] == "GHz" else 1e6))
    width, height = int(size[1]), int(size[2])  # written width x height by the sources that differ
    return Row(
        r["device"], board, target, power, network, (height, width), precision, runtime, _threads(r),
        float(r["latency_ms"]) / 1e3, r["source"], "Ultralytics" in r["includes"],
    )  # fmt: skip


def _runtime(r: dict[str, str]) -> str:
    name, version = r["runtime"], r["version"]
    if "DLA" in name:
        return "!DLA"
    if name == "TensorRT GPU":
        return "tensorrt"
    if name.startswith("TensorRT"):
        return "!a pipeline or throughput, not the network's latency"
    if "32-bit" in name:
        return "!a 32-bit build"
    if "CPU" not in name or "not stated" in name:
        return "!another accelerator, or which one is not stated"
    if name.startswith("TFLite"):
        return "tflite_old" if re.search(r"20(19|20) era", version) else "xnnpack"
    for start, runtime in {
        "XNNPACK": "xnnpack", "ExecuTorch": "xnnpack", "ncnn": "ncnn", "MNN": "mnn", "OpenVINO": "openvino",
        "ONNX Runtime": "onnxruntime",
    }.items():  # fmt: skip
        if name.startswith(start):
            return runtime
    return "!a library without coefficients (PyTorch, OpenCV, Paddle-Lite)"


def _precision(r: dict[str, str], runtime: str, target: Target) -> str:
    text = r["precision"]
    if (
        text.startswith("not stated")
        or " or " in text
        or "as labelled" in text
        or "sparse" in text
        or "+" in text
    ):
        return "!precision not stated"
    found = {"FP32": "float32", "FP16": "float16", "INT8": "int8"}.get(text.split()[0])
    if found is None:
        return "!precision not stated"
    if runtime in ("ncnn", "openvino") and found == "float32" and "fp16" in target.cpus[0].isa:
        return "float16"  # what both compute in where the CPU can, unless told otherwise
    if runtime == "onnxruntime" and found == "float16":
        return "float32"  # its CPU kernels widen
    return found


def _threads(r: dict[str, str]) -> int | None:
    if number := re.match(r"\d+", r["threads"]):
        return int(number[0])
    if r["runtime"].startswith("TFLite") and "Ultralytics" in r["includes"]:
        return 1  # tf.lite.Interpreter without num_threads
    return None


def _clocked(target: Target, clock: float) -> Target:
    return dataclasses.replace(
        target, cpus=tuple(dataclasses.replace(c, clock_hz=clock) for c in target.cpus)
    )


def count(left: list[tuple[dict[str, Any], str]]) -> dict[str, int]:
    """Why rows are left out, and how many, the most first."""
    reasons: dict[str, int] = {}
    for _, why in left:
        reasons[why] = reasons.get(why, 0) + 1
    return dict(sorted(reasons.items(), key=lambda item: -item[1]))
