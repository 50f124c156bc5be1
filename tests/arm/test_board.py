"""The emulated board is what it claims, and the device half is as light there as anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgekit import host
from edgekit.target import Target

TARGETS = {"pi4": "rpi4", "pi5": "rpi5", "orin": "jetson-orin", "v9": "android-arm64-i8mm"}
TOOLCHAIN = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxslim", "pycocotools", "rich", "cryptography"}


def modules_after(*steps: str) -> list[set[str]]:
    """Top-level modules in sys.modules, third party only, after each step of one fresh interpreter."""
    script = "import sys, json\n"
    for step in steps:
        script += f"{step}\nprint('STEP', json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))\n"
    environment = {k: v for k, v in os.environ.items() if k != "ARM_COUNT"}  # one file takes one process
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    found = [set(json.loads(line[5:])) for line in out.stdout.splitlines() if line.startswith("STEP ")]
    return [modules - set(sys.stdlib_module_names) for modules in found]


def test_the_board_is_seen_as_its_target(device: str) -> None:
    here, target = Target.load("host"), Target.load(TARGETS[device])
    assert here.arch == "aarch64"
    assert set(target.cpus[0].isa) <= set(here.cpus[0].isa)
    assert ("dotprod" in here.cpus[0].isa) == ("dotprod" in target.cpus[0].isa)
    assert set(here.backends) == {"onnxruntime", "litert", "native"}
    assert host.matches(target, ["onnxruntime"])[0]


def test_a_tensorrt_bundle_is_refused_without_a_gpu() -> None:
    runs, why = host.matches(Target.load("jetson-orin"), ["tensorrt"])
    assert not runs
    assert "no CUDA GPU" in why


def test_the_device_half_is_light(expected: Path, records: list[dict[str, Any]]) -> None:
    path = expected / next(r["path"] for r in records if r["precision"] == "float32")
    start, edgekit, runtime, loaded = modules_after(
        "",
        "import edgekit",
        "import edgekit.runtime.engine, edgekit.tasks.detect.pipeline, edgekit.host",
        f"edgekit.load({str(path)!r}, threads=1, self_test=False)",
    )
    assert edgekit - start == {"edgekit"}
    assert runtime - start <= {"edgekit", "numpy"}
    assert "onnxruntime" in loaded
    assert not loaded & TOOLCHAIN
