"""On the boards, too, a stream gives frame by frame what its clip model gives for the whole clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.spec import DType

TOLERANCE = 1e-5
"""Stream beside clip, on one library and board; logits are around 1."""
STEPS = 0.03
"""ONNX Runtime's int8 kernels round some values to the next code on ARM (tests/arm/test_bundles.py)."""
MACHINES = 1e-4
"""Board beside workstation, as a share of the largest logit: sums in another order."""


@pytest.mark.parametrize("backend", ["onnxruntime", "litert"])
def test_frame_by_frame_equals_the_clip(expected: Path, backend: str) -> None:
    folder = expected / "video"
    with np.load(folder / "clips.npz", allow_pickle=False) as data:
        clips, rows = data["clips"], data["rows"]
    with (
        edgekit.load(folder / "stream.edge", threads=1, variant=backend) as engine,
        edgekit.load(folder / "clip.edge", threads=1, variant=backend) as engine_of_clips,
        engine.session() as session,
        engine_of_clips.session() as session_of_clips,
    ):
        assert len(session.states) == 10
        for frames, there in zip(clips, rows, strict=True):
            np.copyto(session_of_clips.inputs["clip"], frames)
            session_of_clips.run()
            want = session_of_clips.outputs["logits"]
            session.reset()
            got = []
            for frame in frames:
                np.copyto(session.inputs["image"][0], frame)
                session.run()
                got.append(session.outputs["logits"][0].copy())
            np.testing.assert_allclose(np.array(got), want, rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(want, there, rtol=0, atol=MACHINES * np.abs(there).max())
            # what came before matters, far more than that
            session.reset()
            session.run()
            assert np.abs(session.outputs["logits"][0] - want[-1]).max() > 1000 * TOLERANCE


def test_int8_as_built_carries_states_as_codes(expected: Path) -> None:
    """What `edgekit build` made: LiteRT bit for bit as on the workstation, frame after frame."""
    with np.load(expected / "video" / "built.npz", allow_pickle=False) as data:
        there = {name: data[name] for name in data.files}
    pictures = there.pop("pictures")
    assert {"litert-int8", "onnxruntime-int8"} <= set(there)
    for name, want in there.items():
        with edgekit.load(expected / "video" / "int8.edge", threads=1, variant=name) as engine:
            pipeline: Any = engine.pipeline()
            codes = [spec for spec in pipeline.session.state_specs if spec.dtype in (DType.int8, DType.uint8)]
            got = []
            for frames in pictures:
                pipeline.reset()
                got.append([pipeline(frame).logits.copy() for frame in frames])
        assert len(codes) == 10, name
        if name.startswith("litert"):
            assert np.array(got).tobytes() == want.tobytes()
        else:
            assert np.abs(np.array(got) - want).max() <= STEPS * np.abs(want).max(), name
        assert np.abs(want[0] - want[1]).max() > 0
