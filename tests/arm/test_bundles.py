"""Bundles built on the workstation load on the boards, pass their self-test and find the same objects."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

import edgekit
from tests.arm.test_board import TARGETS

SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE_PX = 0.05
"""Floats are summed in another order on another CPU. LiteRT's integers and the native engine's are the same to the bit."""

DOT_BOARDS = ("pi5", "orin", "v9")

STEPS_OUTPUT = 0.03
STEPS_SCORE = 0.05
STEPS_BOX_PX = 2.0
"""ONNX Runtime's int8 kernels round some values to the next code on ARM (a few of its frames are equal to the
bit): its outputs may differ by this share of their largest value, its boxes by what that makes of them."""


def unmatched(
    want: dict[str, Any],
    got: dict[str, Any],
    threshold: float,
    score_tolerance: float = SCORE_TOLERANCE,
    box_tolerance: float = BOX_TOLERANCE_PX,
) -> list[str]:
    """What one side found, clear of the threshold, and the other did not."""
    missing = []
    for side, a, b in (("only on the workstation", want, got), ("only on the board", got, want)):
        boxes, scores, classes = (
            np.array(b["boxes"]).reshape(-1, 4),
            np.array(b["scores"]),
            np.array(b["classes"]),
        )
        for box, score, cls in zip(a["boxes"], a["scores"], a["classes"], strict=True):
            same = (classes == cls) & (np.abs(scores - score) <= score_tolerance)
            same &= (np.abs(boxes - np.array(box)) <= box_tolerance).all(axis=1)
            if not same.any() and score > threshold + score_tolerance:
                missing.append(
                    f"{side}: class {cls}, score {score:.5f}, box {[round(float(v), 2) for v in box]}"
                )
    return missing


def differences(record: dict[str, Any], here: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> list[str]:
    """Outputs of an int8 payload that are not what the workstation's were. Keys end with the output's name."""
    assert here.keys() == got.keys() and here
    if record["backend"] in ("litert", "native"):
        return [f"{n}: not bitwise equal" for n in here if here[n].tobytes() != got[n].tobytes()]
    shares = {n: float(np.abs(got[n] - here[n]).max() / np.abs(here[n]).max()) for n in here}
    return [f"{n}: differs by {share:.3f}" for n, share in shares.items() if not share <= STEPS_OUTPUT]


def counted() -> dict[str, int]:
    """Instructions of this process so far (tools/arm/count.c)."""
    ctypes.CDLL(None).lseek(-77, ctypes.c_long(0), 0)
    *_, last = Path(os.environ["ARM_COUNT"]).read_text(encoding="utf-8").splitlines()
    return dict(json.loads(last))


def test_the_same_as_on_the_workstation(
    expected: Path,
    records: list[dict[str, Any]],
    frames: list[np.ndarray],
    outputs: dict[str, np.ndarray],
    device: str,
) -> None:
    """Self-test, detections, and for int8 the raw outputs and which instructions computed them."""
    found, differ = 0, []
    for record in records:
        what, int8 = f"{record['path']} {record['variant']}", record["precision"] == "int8"
        if not int8 and record["target"] != TARGETS[device]:
            continue  # the float payload of the other board is the same file
        steps = int8 and record["backend"] == "onnxruntime"
        tolerances = (STEPS_SCORE, STEPS_BOX_PX) if steps else (SCORE_TOLERANCE, BOX_TOLERANCE_PX)
        with edgekit.load(expected / record["path"], threads=1, variant=record["variant"]) as engine:
            pipeline = engine.pipeline()
            for index, (frame, want) in enumerate(zip(frames, record["detections"], strict=True)):
                got = pipeline(frame, score_threshold=record["threshold"])
                found += len(got)
                plain = {"boxes": got.boxes, "scores": got.scores, "classes": got.classes}
                lost = unmatched(want, plain, record["threshold"], *tolerances)
                differ += [f"{what} frame {index} {text}" for text in lost]
                if int8:
                    here = {n: a for n, a in outputs.items() if n.startswith(f"{what} {index} ")}
                    board = {f"{what} {index} {n}": np.array(a) for n, a in pipeline.session.outputs.items()}
                    differ += differences(record, here, board)
            before = counted()
            pipeline.session.run()
            dots = counted()["dot"] - before["dot"]
        if (dots > 0) != (int8 and device in DOT_BOARDS):
            differ.append(f"{what}: {dots} dot product instructions on {device}")
    assert differ == []
    assert found > 0, "nothing was found on any frame, so nothing was compared"


def test_int8_is_among_them(records: list[dict[str, Any]]) -> None:
    kinds = {(r["backend"], r["precision"]) for r in records}
    assert {("onnxruntime", "float32"), ("litert", "int8")} <= kinds
