"""The device path stays light: what it imports, and what that costs, in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT

HEAVY = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxslim",
    "cv2",
    "pycocotools",
    "rich",
    "tensorrt",
    "cuda",
    "cryptography",
}


def modules_after(code: str) -> set[str]:
    """Top-level modules in sys.modules after running `code` in a fresh interpreter."""
    script = (
        f"import sys, json\n{code}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_import_edgekit_brings_the_standard_library_only() -> None:
    before = modules_after("")
    third_party = modules_after("import edgekit") - before - set(sys.stdlib_module_names)
    assert third_party == {"edgekit"}


@pytest.mark.parametrize(
    "module",
    [
        "edgekit.runtime.engine",
        "edgekit.runtime.sources",
        "edgekit.runtime.sinks",
        "edgekit.tasks.detect.pipeline",
        "edgekit.runtime.bench",
        "edgekit.rig_files",
        "edgekit.synth.street_rig",
        "edgekit.tasks.fusion.draw",
    ],
)
def test_runtime_imports_numpy_and_itself(module: str) -> None:
    before = modules_after("")
    found = modules_after(f"import {module}") - before - set(sys.stdlib_module_names)
    assert found <= {"edgekit", "numpy"}, f"{module} brings {sorted(found)}"


def test_running_a_bundle_never_imports_the_toolchain(host_bundle: str) -> None:
    code = (
        "import numpy, edgekit\n"
        f"engine = edgekit.load({host_bundle!r})\n"
        "engine.predict(numpy.zeros((90, 160, 3), numpy.uint8))"
    )
    found = modules_after(code)
    assert "onnxruntime" in found
    assert not found & (HEAVY - {"cv2"}) and "cv2" not in found


def import_ms(code: str) -> float:
    script = f"import time\nt = time.perf_counter()\n{code}\nprint(1e3 * (time.perf_counter() - t))"
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
            ).stdout
        )
        for _ in range(3)
    ]
    return min(runs)


def main() -> None:
    """python -m tests.test_lean_import: print the import times (budgets: 5 ms, and 60 ms on top of numpy)."""
    print(f"import edgekit          {import_ms('import edgekit'):.1f} ms")
    print(
        f"import edgekit.runtime  {import_ms('import numpy'):.1f} ms numpy, then "
        f"{import_ms('import numpy, edgekit.runtime.engine') - import_ms('import numpy'):.1f} ms"
    )


if __name__ == "__main__":
    main()
