"""Bundles built on the workstation load on the boards, pass their self-test and find the same objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import edgekit

SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE_PX = 0.05


def unmatched(want: dict[str, Any], got: dict[str, Any], threshold: float) -> list[str]:
    """What one side found, clear of the threshold, and the other did not."""
    missing = []
    for side, a, b in (("only on the workstation", want, got), ("only on the board", got, want)):
        boxes, scores, classes = (
            np.array(b["boxes"]).reshape(-1, 4),
            np.array(b["scores"]),
            np.array(b["classes"]),
        )
        for box, score, cls in zip(a["boxes"], a["scores"], a["classes"], strict=True):
            same = (classes == cls) & (np.abs(scores - score) <= SCORE_TOLERANCE)
            same &= (np.abs(boxes - np.array(box)) <= BOX_TOLERANCE_PX).all(axis=1)
            if not same.any() and score > threshold + SCORE_TOLERANCE:
                missing.append(
                    f"{side}: class {cls}, score {score:.5f}, box {[round(float(v), 2) for v in box]}"
                )
    return missing


def test_same_detections_as_on_the_workstation(
    expected: Path, bundles: dict[str, dict[str, Any]], frames: list[np.ndarray]
) -> None:
    found = 0
    for target, record in bundles.items():
        with edgekit.load(expected / record["path"], threads=1) as engine:  # with its self-test
            for index, (frame, want) in enumerate(zip(frames, record["detections"], strict=True)):
                got = engine.predict(frame, score_threshold=record["threshold"])
                found += len(got)
                plain = {"boxes": got.boxes, "scores": got.scores, "classes": got.classes}
                assert unmatched(want, plain, record["threshold"]) == [], f"{target}, frame {index}"
    assert found > 0, "nothing was found on any frame, so nothing was compared"
