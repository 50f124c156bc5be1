"""The emulated board is what it claims, and the device half is as light there as anywhere."""

from __future__ import annotations

import json
import subprocess
import sys

from edgekit import host
from edgekit.target import Target

TARGETS = {"pi4": "rpi4", "pi5": "rpi5", "orin": "jetson-orin", "v9": "android-arm64-i8mm"}
TOOLCHAIN = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxslim", "pycocotools", "rich", "cryptography"}


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys, json\nprint(json.dumps([m.partition('.')[0] for m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_the_board_is_seen_as_its_target(device: str) -> None:
    here, target = Target.load("host"), Target.load(TARGETS[device])
    assert here.arch == "aarch64"
    assert set(target.cpus[0].isa) <= set(here.cpus[0].isa)
    assert ("dotprod" in here.cpus[0].isa) == ("dotprod" in target.cpus[0].isa)
    assert here.backends == ("onnxruntime",)
    assert host.matches(target, ["onnxruntime"])[0]


def test_a_tensorrt_bundle_is_refused_without_a_gpu() -> None:
    runs, why = host.matches(Target.load("jetson-orin"), ["tensorrt"])
    assert not runs
    assert "no CUDA GPU" in why


def test_the_device_half_brings_numpy_only() -> None:
    before = modules_after("")
    assert modules_after("import edgekit") - before - set(sys.stdlib_module_names) == {"edgekit"}
    runtime = "import edgekit.runtime.engine, edgekit.tasks.detect.pipeline, edgekit.host"
    assert modules_after(runtime) - before - set(sys.stdlib_module_names) <= {"edgekit", "numpy"}


def test_loading_a_bundle_never_brings_the_toolchain(expected, bundles) -> None:  # type: ignore[no-untyped-def]
    path = expected / next(iter(bundles.values()))["path"]
    found = modules_after(f"import edgekit\nedgekit.load({str(path)!r}, threads=1, self_test=False)")
    assert "onnxruntime" in found
    assert not found & TOOLCHAIN
