"""Shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_data() -> Path:
    """The folder of real models and images beside the checkout (or $EDGEKIT_SHARED); skips the test without it."""
    base = Path(os.environ.get("EDGEKIT_SHARED", ROOT.parent / "shared"))
    if not (base / "data").is_dir():
        pytest.skip(f"needs the reference data in {base / 'data'}")
    return base / "data"
