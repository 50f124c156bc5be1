"""Same inputs, same bytes: builds in other processes, folders and hash seeds agree to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundle_samples import assert_same_but_for_times, files_of
from tests.helpers import ROOT

TARGETS = ("host", "jetson-orin", "rpi5")
SCRIPT = """
import sys, edgekit
model, out, instances, images, classes = sys.argv[1:]
for precision in ("auto", "float16"):
    for bundle in edgekit.build(model, ["host", "jetson-orin", "rpi5"], precision=precision, out=f"{out}/{precision}",
                                classes=classes, instances=instances, images=images):
        bundle.close()
"""


def _build(folder: Path, seed: str, shared: Path, threads: str) -> Path:
    """Build a copy of the shipped network in `folder`, from there, with relative paths."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "apps" / "detect" / "yolo_lite.onnx", folder / "net.onnx")
    arguments = ["net.onnx", "out", *(str(shared / n) for n in ("instances.json", ".", "classes.txt"))]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": str(ROOT),
        "EDGEKIT_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": threads,
    }
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=folder, env=environment, check=True)
    return folder / "out"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from edgekit.synth.coco import export_coco
    from edgekit.synth.street import CLASSES

    root = tmp_path_factory.mktemp("determinism")
    export_coco(root / "data", [40_001, 40_002], [45], 320, 180)
    (root / "data" / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    first = _build(root / "a", "1", root / "data", "1")
    second = _build(root / "another folder" / "b", "4242", root / "data", "2")
    return first, second


@pytest.mark.parametrize("precision", ["auto", "float16"])
@pytest.mark.parametrize("target", TARGETS)
def test_two_builds_agree(outputs: tuple[Path, Path], precision: str, target: str) -> None:
    a, b = (files_of(out / precision / f"net.{target}.edge") for out in outputs)
    assert_same_but_for_times(a, b)


def test_different_payloads_have_different_digests(outputs: tuple[Path, Path]) -> None:
    digests = {
        json.loads(files_of(path)["manifest.json"])["payload_digest"] for path in outputs[0].rglob("*.edge")
    }
    # a Jetson's default is float16, so it was built twice
    assert len(digests) == 2 * len(TARGETS) - 1


def test_no_path_of_the_build_machine_is_in_a_bundle(outputs: tuple[Path, Path]) -> None:
    root = str(outputs[0].parent.parent).encode()
    for path in outputs[0].rglob("*.edge"):
        data = path.read_bytes()
        for place in (root, str(ROOT).encode(), str(Path.home()).encode() + b"/"):
            assert place not in data, f"{path.name} tells of {place.decode()}"
