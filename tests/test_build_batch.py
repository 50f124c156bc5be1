"""Builds for a batch: what a bundle with lanes holds, and that each lane is the network of one stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.bundle import Bundle
from edgekit.cli.main import main
from edgekit.errors import LoweringError, ModelError, UsageError
from edgekit.project import load_project
from edgekit.runtime.selftest import golden_values
from edgekit.synth.gestures import GESTURES
from edgekit.tasks.video.dataset import read_set
from edgekit.toolchain import batch as batching
from edgekit.toolchain.api import build
from tests import clip_models

SIZE, FRAMES, LANES = 16, 4, 3
CLIPS = f"synthetic://gestures?clips=12&seed=10000&size={SIZE * 2}&frames={FRAMES}"
CALIBRATION = f"synthetic://gestures?clips=4&seed=1000000&size={SIZE * 2}"
OPTIONS: dict[str, Any] = {
    "task": "video",
    "preprocess": {"resize": "stretch", "color": "rgb", "mean": (127.5,) * 3, "std": (64.0,) * 3},
    "video": {"dt_s": 0.1, "background": "still"},
    "allow_drop": True,
    "data": CLIPS,
}
INT8 = {"precision": "int8", "calibration": CALIBRATION, "quantization": "minmax"}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    net = clip_models.seeded(lambda: clip_models.Net(FRAMES, classes=len(GESTURES)))
    clip_models.export(net, (FRAMES, 3, SIZE, SIZE), path)
    return path


@pytest.fixture(scope="module")
def built(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Bundle]:
    """By precision and lanes."""
    known: dict[tuple[str, int], Bundle] = {}

    def make(precision: str, count: int) -> Bundle:
        if (precision, count) not in known:
            options = {**OPTIONS, **(INT8 if precision == "int8" else {})}
            out = tmp_path_factory.mktemp(f"{precision}{count}")
            (known[precision, count],) = build(network, "host", out=out, batch=count, **options)
        return known[precision, count]

    return make


def test_all_tensors_begin_with_the_lanes(built: Callable[[str, int], Bundle]) -> None:
    one, many = built("float32", 1).manifest, built("float32", LANES).manifest
    assert (many.inputs, many.outputs) == (one.inputs, one.outputs)
    for before, after in zip((*one.tensors, *one.states), (*many.tensors, *many.states), strict=True):
        assert before.name == after.name
        assert after.shape == (LANES, *before.shape[1:])
    assert {(s.nominal_dt_s, s.reset_after_s) for s in many.states} == {(0.1, 0.5)}
    for value in (*many.golden.inputs, *many.golden.outputs):
        alone = golden_values(built("float32", 1), value)
        np.testing.assert_array_equal(
            golden_values(built("float32", LANES), value), np.repeat(alone, LANES, 0)
        )


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_evidence_is_that_of_one_stream_and_says_how_lanes_differ(
    built: Callable[[str, int], Bundle], precision: str
) -> None:
    one, many = built(precision, 1).evidence, built(precision, LANES).evidence
    assert "batch" not in one
    assert many["batch"]["lanes"] == LANES
    assert many["batch"]["payloads"].keys() == many["payloads"].keys() == one["payloads"].keys()
    assert all(row["max_difference"] == 0 for row in many["batch"]["payloads"].values())
    for what in ("metric", "agreement", "accept"):
        assert many[what] == one[what]
    for name, row in many["payloads"].items():
        assert row["outputs"] == one["payloads"][name]["outputs"]
        (variant,) = (v for _, v in built(precision, LANES).manifest.variants() if v.name == name)
        assert row["bytes"] == variant.bytes
    assert many["timing"]["stages"]["engine"]["median_ms"] > 0


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_streams_in_lanes_equal_streams_by_themselves(
    built: Callable[[str, int], Bundle], precision: str
) -> None:
    """On every payload of both bundles, which loading them has tested."""
    rng = np.random.default_rng(0)
    for _, variant in built(precision, 1).manifest.variants():
        engines = [
            edgekit.load(built(precision, count).path, variant=variant.name, threads=1)
            for count in (1, LANES)
        ]
        with engines[0] as one, engines[1] as many, one.streams() as alone, many.streams() as together:
            assert (alone.lanes, together.lanes) == (1, LANES)
            for _ in range(5):
                feeds = {
                    key: {n: rng.normal(size=a.shape).astype(a.dtype) for n, a in alone.inputs.items()}
                    for key in range(2 * LANES - 1)
                }
                for key, found in together.step_many(feeds).items():
                    np.testing.assert_array_equal(
                        found["logits"], alone.step(key, feeds[key])["logits"], err_msg=variant.name
                    )


def test_a_bundle_with_lanes_does_what_any_other_does(
    built: Callable[[str, int], Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures one by one through its pipeline, in one lane; verify and inspect."""
    data = read_set(Path(CLIPS), None)
    answers = []
    for count in (1, LANES):
        with edgekit.load(built("float32", count).path, threads=1) as engine:
            pipeline = engine.pipeline()
            answers.append([pipeline(image).logits.copy() for image in data.clip(0).images])
    np.testing.assert_array_equal(*answers)
    path = str(built("float32", LANES).path)
    assert main(["verify", "--json", "--data", CLIPS, path]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["self_test"] == "passed"
    assert found["metric"]["top1"] == pytest.approx(built("float32", 1).evidence["metric"]["payload"]["top1"])
    totals = []
    for count in (1, LANES):
        assert main(["inspect", str(built("float32", count).path)]) == 0
        text = capsys.readouterr().out
        totals.append(text[text.index("State of one stream") :].split("elements", 1)[1].split("\n", 1)[0])
    assert totals[0] == totals[1], "states of one lane"
    assert f"lanes       {LANES} streams in one run" in text
    assert f"{LANES}x3x{SIZE}x{SIZE}" in text.replace(" ", "").replace(",", "x")


def test_a_lane_that_computes_something_else_is_refused(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widen = batching.lanes

    def wrong(model: Any, count: int) -> Any:
        made = widen(model, count)
        weight = max(made.graph.initializers.values(), key=lambda v: v.const_value.size)
        weight.const_value = type(weight.const_value)(weight.const_value.numpy() * 1.01, name=weight.name)
        return made

    monkeypatch.setattr(batching, "lanes", wrong)
    with pytest.raises(LoweringError, match=r"with 2 lanes an output differs by .* Build it without --batch"):
        build(network, "host", out=tmp_path, batch=2, **OPTIONS)
    assert not list(tmp_path.glob("*.edge"))


def test_a_network_that_cannot_take_lanes_is_refused(tmp_path: Path) -> None:
    """Its answer is made of the sum over the batch."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["m"]),
        helper.make_node("Reshape", ["m", "flat"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["c"]),
        helper.make_node("ReduceSum", ["c", "first"], ["logits"], keepdims=1),
    ]
    weights = {
        "flat": np.array([1, 3]),
        "w": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
        "first": np.array([0]),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = tmp_path / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    options = {k: OPTIONS[k] for k in ("preprocess", "allow_drop")}
    with pytest.raises(ModelError, match=r"cannot be made a batch of 2 lanes: .*over the lanes"):
        build(path, "host", task="classify", out=tmp_path, batch=2, calibration=pictures(tmp_path), **options)


def pictures(folder: Path) -> Path:
    import cv2

    (folder / "pictures").mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        cv2.imwrite(str(folder / "pictures" / f"{i}.png"), noise)
    return folder / "pictures"


@pytest.mark.parametrize("count", [0, 257, True])
def test_counts_that_are_none(network: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(UsageError, match=r"batch .*: expected a whole number from 1 to 256"):
        build(network, "host", out=tmp_path, batch=count, **OPTIONS)


def test_the_count_may_stand_in_the_project(network: Path, tmp_path: Path) -> None:
    def project(count: object) -> Path:
        path = tmp_path / "edgekit.toml"
        path.write_text(
            f'[project]\nname = "p"\n[[model]]\nname = "m"\nsource = "{network}"\ntask = "video"\nbatch = {count}\n'
        )
        return path

    assert load_project(project(8)).model("m").batch == 8
    with pytest.raises(UsageError, match="batch must be between 1 and 256, got 0"):
        load_project(project(0))
