"""Shared by the tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_data() -> Path:
    """The folder of real models and images beside the checkout (or $EDGEKIT_SHARED); skips the test without it."""
    base = Path(os.environ.get("EDGEKIT_SHARED", ROOT.parent / "shared"))
    if not (base / "data").is_dir():
        pytest.skip(f"needs the reference data in {base / 'data'}")
    return base / "data"


def load_script(path: str, name: str = "") -> ModuleType:
    """A script of the checkout, `path` from its root, as a module: `name`, or the file's, in sys.modules."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(name or file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up, and worker processes the module
    spec.loader.exec_module(module)
    return module
