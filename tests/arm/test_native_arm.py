"""The native engine gives the workstation's bits on the boards, with the instructions that the board has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.arm.native_cases import cases
from tests.arm.test_bundles import DOT_BOARDS
from tests.native_nets import isas, run

EXPECTED = {"pi4": ["neon", "scalar"], "pi5": ["neon_dot", "neon", "scalar"], "orin": ["neon_dot", "neon", "scalar"],
            "v9": ["neon_i8mm", "neon_dot", "neon", "scalar"]}  # fmt: skip


def test_the_board_has_its_instruction_sets(device: str) -> None:
    assert isas() == EXPECTED[device]
    assert ("neon_dot" in isas()) == (device in DOT_BOARDS)


def test_every_operator_gives_the_bits_of_the_workstation(
    expected: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_NATIVE_SPLIT", "0")  # small steps, too, are split among threads
    best, *others, _ = EXPECTED[device]
    runs = [(best, 1), (best, 3), *((isa, 1) for isa in others)]
    with np.load(expected / "native.npz", allow_pickle=False) as want:
        left, differ = set(want.files), []
        for name, payload, inputs, out in cases():
            left.discard(name)
            for isa, threads in runs:
                if run(payload, inputs, out, isa, threads).tobytes() != want[name].tobytes():
                    differ.append(f"{name} by {isa}, {threads} threads")
        assert not left
    assert differ == []
