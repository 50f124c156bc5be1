"""The kernels compute the same bits on every board as their numpy definitions on the workstation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit import kernels
from tests.arm import cases


@pytest.mark.parametrize("choice", ["native", "numpy"])
def test_same_bits_as_on_the_workstation(
    choice: str, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_KERNELS", choice)
    assert (kernels.native() is not None) == (choice == "native")
    got = cases.results()
    with np.load(expected / "kernels.npz", allow_pickle=False) as want:
        assert set(got) == set(want.files)
        differ = [
            name
            for name, value in got.items()
            if value.dtype != want[name].dtype
            or value.shape != want[name].shape
            or value.tobytes() != want[name].tobytes()
        ]
    assert differ == []
