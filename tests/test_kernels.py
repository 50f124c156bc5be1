"""How kernels are chosen; `using` and `PATHS` serve the tests of each kernel."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from edgekit import kernels
from edgekit.errors import UsageError
from tests.helpers import ROOT

PATHS = ("numpy", "native")


@contextlib.contextmanager
def using(path: str) -> Iterator[None]:
    """Run kernels as `numpy` or `native`; skips the test where the native module is not built."""
    before = os.environ.get("EDGEKIT_KERNELS")
    os.environ["EDGEKIT_KERNELS"] = "auto" if before is None else before
    try:
        if path == "native" and kernels.native() is None:
            pytest.skip("edgekit._native is not built (python setup.py build_ext --inplace)")
        os.environ["EDGEKIT_KERNELS"] = path
        yield
    finally:
        if before is None:
            del os.environ["EDGEKIT_KERNELS"]
        else:
            os.environ["EDGEKIT_KERNELS"] = before


def test_numpy_is_forced() -> None:
    with using("numpy"):
        assert kernels.native() is None


def test_native_is_used_when_built() -> None:
    with using("native"):
        module = kernels.native()
        assert module is not None
        assert module.isa in ("avx2", "neon", "portable")


def test_native_demanded_but_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_load", lambda: None)
    monkeypatch.setenv("EDGEKIT_KERNELS", "native")
    with pytest.raises(UsageError, match="not built"):
        kernels.native()


def test_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_KERNELS", "nativ")
    with pytest.raises(UsageError, match="Did you mean 'native'"):
        kernels.native()


def test_kernels_import_numpy_only() -> None:
    code = (
        "import sys; import edgekit.tasks.detect.decode, edgekit.kernels.letterbox;"
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'cv2', 'onnxruntime') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
