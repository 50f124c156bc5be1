"""These tests run on emulated boards (`make test-arm`) with what tools/arm/expect.py wrote on the workstation."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = None
    if platform.machine() != "aarch64" or "EDGEKIT_ARM_EXPECTED" not in os.environ:
        skip = pytest.mark.skip(reason="runs on emulated boards: make test-arm")
    for item in items:
        if Path(str(item.fspath)).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.arm)
            if skip:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def expected() -> Path:
    """The folder that expect.py filled on the workstation."""
    return Path(os.environ["EDGEKIT_ARM_EXPECTED"])


@pytest.fixture(scope="session")
def frames(expected: Path) -> list[np.ndarray]:
    """Pictures, uint8 [H, W, 3] BGR, pixel for pixel those of the workstation."""
    with np.load(expected / "frames.npz", allow_pickle=False) as data:
        return [data[name] for name in sorted(data.files)]


@pytest.fixture(scope="session")
def records(expected: Path) -> list[dict[str, Any]]:
    """One per variant of a bundle, as the workstation found it: path (file name), target, variant, backend,
    precision, threshold, detections (one object per frame)."""
    found = json.loads((expected / "bundles.json").read_text())
    assert found, "expect.py wrote no bundle"
    return list(found)


@pytest.fixture(scope="session")
def outputs(expected: Path) -> dict[str, np.ndarray]:
    """Raw outputs on the workstation by "<path> <variant> <frame> <output>"."""
    with np.load(expected / "outputs.npz", allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


@pytest.fixture(scope="session")
def device() -> str:
    return os.environ["ARM_DEVICE"]
