"""The task `video` from a clip model to a bundle: states carried through everything that is proven and shipped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import edgekit
from edgekit import frontends
from edgekit.backends.base import Payload, half
from edgekit.bundle import Bundle, write_bundle
from edgekit.cli import inspect
from edgekit.cli.main import main
from edgekit.errors import (
    CalibrationError,
    EvidenceError,
    LoweringError,
    ModelError,
    SelfTestError,
    UsageError,
)
from edgekit.kernels.letterbox import letterbox
from edgekit.passes import prepare, probe
from edgekit.passes.states import picture
from edgekit.passes.states import states as graph_states
from edgekit.project import ModelEntry, PreprocessHint, VideoHint, load_project
from edgekit.quant import likeness
from edgekit.quant.calibrate import calibrate
from edgekit.runtime.selftest import golden_values
from edgekit.spec import DType, QuantParams, StateSpec, TensorSpec
from edgekit.synth.gestures import GESTURES
from edgekit.target import Target
from edgekit.tasks.video.dataset import read_set
from edgekit.toolchain import clips, recurrent
from edgekit.toolchain.api import build
from edgekit.toolchain.running import frames, results, run_here
from edgekit.toolchain.tasks import half as toolchain_task
from tests import clip_models
from tests.helpers import ROOT

SIZE, FRAMES = 16, 4
RULE = {"resize": "stretch", "color": "rgb", "mean": (127.5,) * 3, "std": (64.0,) * 3}
CLIPS = f"synthetic://gestures?clips=12&seed=10000&size={SIZE * 2}&frames={FRAMES}"
CALIBRATION = f"synthetic://gestures?clips=12&seed=1000000&size={SIZE * 2}"
Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Exports a small clip model [4, 3, 16, 16] once for each kind."""
    folder = tmp_path_factory.mktemp("clips")

    def make(**options: Any) -> Path:
        path = folder / f"net{'-'.join(sorted(options))}.onnx"
        if not path.exists():
            net = clip_models.seeded(lambda: clip_models.Net(FRAMES, **{"classes": len(GESTURES), **options}))
            clip_models.export(net, (FRAMES, 3, SIZE, SIZE), path)
        return path

    return make


@pytest.fixture(scope="module")
def built(network: Maker, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A float bundle for this machine."""
    (bundle,) = build(network(), "host", out=tmp_path_factory.mktemp("out"), data=CLIPS, **OPTIONS)
    return bundle


@pytest.fixture(scope="module")
def int8(network: Maker, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same in int8, plain ranges."""
    options = {**OPTIONS, "calibration": CALIBRATION, "quantization": "minmax", "precision": "int8"}
    (bundle,) = build(network(), "host", out=tmp_path_factory.mktemp("int8"), data=CLIPS, **options)
    return bundle


OPTIONS: dict[str, Any] = {
    "task": "video",
    "preprocess": RULE,
    "video": {"dt_s": 0.1, "background": "still"},
    "allow_drop": True,
}


# --- the bundle ----------------------------------------------------------------------------------


def test_states_are_in_the_manifest(built: Bundle) -> None:
    m = built.manifest
    assert (m.inputs, m.outputs, m.task) == (("image",), ("logits",), "video")
    assert [(s.input, s.output) for s in m.states] == [(f"state_{i}", f"state_{i}_next") for i in (0, 1)]
    assert {(s.nominal_dt_s, s.reset_after_s, s.initial) for s in m.states} == {(0.1, 0.5, 0.0)}
    (step,) = m.plan
    assert step.name == "video" and set(step.inputs) == {"image", "state_0", "state_1"}
    assert m.pipeline["frames"] == FRAMES and m.pipeline["dt_s"] == 0.1
    assert m.pipeline["labels"] == list(GESTURES)  # as the evaluation set numbers them
    passes = built.evidence["graph"]["passes"]
    assert passes[0]["name"] == "streamify" and passes[0]["max_abs_diff"] <= 1e-5
    facts = built.evidence["states"]
    assert facts["clip_model"] == {"frames": FRAMES, "exact": True, "difference": passes[0]["max_abs_diff"]}
    assert (facts["count"], facts["elements"]) == (2, 2 * 2 * (SIZE // 2) ** 2)


def test_golden_values_have_states(built: Bundle) -> None:
    golden = built.manifest.golden
    assert [g.tensor for g in golden.inputs] == ["image", "state_0", "state_1"]
    assert [g.tensor for g in golden.outputs] == ["logits", "state_0_next", "state_1_next"]
    values = {g.tensor: golden_values(built, g) for g in (*golden.inputs, *golden.outputs)}
    assert np.abs(values["state_0"]).max() > 0  # from the middle of a clip, not the initial value
    assert not np.array_equal(values["state_0"], values["state_0_next"])


@pytest.mark.parametrize("which", ["built", "int8"])
def test_the_bundle_equals_the_clip_model(which: str, network: Maker, request: pytest.FixtureRequest) -> None:
    """Frame by frame: floats to 1e-5, integers as near as their evidence says."""
    bundle: Bundle = request.getfixturevalue(which)
    model = frontends.load(network())
    data = read_set(Path(CLIPS), None)
    with edgekit.load(bundle.path) as engine, engine.session() as session:
        pipeline = engine.pipeline()
        worst = 0.0
        for index in range(3):
            session.reset()
            images, rows = data.clip(index).images, []
            pipeline.reset()
            inputs = []
            for image in images:
                rows.append(pipeline(image).logits.copy())
                inputs.append(np.empty(pipeline.session.inputs["image"].shape, np.float32))
                letterbox(image, pipeline.spec.preprocess, inputs[-1])  # the session's own may be codes
            (want,) = probe.evaluate(model, {"clip": np.concatenate(inputs)}).values()
            worst = max(worst, float(np.abs(np.array(rows) - want).max()))
    payload = next(iter(bundle.evidence["payloads"].values()))
    assert worst <= (1e-5 if which == "built" else 2 * payload["outputs"][0]["max_abs"] + 1e-6)
    if which == "int8":
        assert worst > 1e-5  # it is another network


def test_all_libraries_of_an_int8_bundle(int8: Bundle) -> None:
    names = [v.name for _, v in int8.manifest.variants()]
    assert names == ["native-int8", "litert-int8", "onnxruntime-int8", "openvino-int8"]
    for name in names:
        with edgekit.load(int8.path, variant=name) as engine:  # its self-test carries states
            assert engine.variants["video"].name == name
        known = int8.evidence["payloads"][name]
        assert [s["tensor"] for s in known["states"]] == ["state_0", "state_1"]
        assert len(known["by_frame"]) == FRAMES
        assert known["outputs"][0]["sqnr_db"] > 20
    assert int8.evidence["agreement"]["answers_reference"] == 12 * FRAMES
    provenance = int8.manifest.provenance["data"]
    assert (provenance["clips"], provenance["pictures"]) == (12, 12 * 8)
    speed = int8.evidence["payloads"]["litert-int8"]["speed"]
    assert speed["ms"] > 0 and speed["float_ms"] > 0


def test_a_self_test_sees_a_wrong_state(built: Bundle, tmp_path: Path) -> None:
    """Golden states are compared: outputs alone would look right for a run."""
    m = built.manifest
    files = {name: bytes(built.read(name)) for name in m.files if name != "evidence.json"}
    paths = {g.tensor: g.path for g in m.golden.outputs}
    files[paths["state_0_next"]] = files[paths["state_1_next"]]
    write_bundle(tmp_path / "b.edge", dataclasses.replace(m, files={}), files, built.evidence)
    with pytest.raises(SelfTestError, match="state_0_next"):
        edgekit.load(tmp_path / "b.edge")


def test_equal_builds_give_equal_digests(network: Maker, built: Bundle, tmp_path: Path) -> None:
    (again,) = build(network(), "host", out=tmp_path, data=CLIPS, **OPTIONS)
    assert again.payload_digest == built.payload_digest


@pytest.mark.parametrize(
    ("target", "backend", "precision"),
    [("rpi5", "litert", "float32"), ("host", "openvino", "float32"), ("jetson-orin", "tensorrt", "float16")],
)
def test_every_backend_keeps_the_names(
    network: Maker, tmp_path: Path, target: str, backend: str, precision: str
) -> None:
    """Of the states, whatever the library; what cannot run here ran as the graph that the board compiles."""
    text = _toml(network(), f'[model.target.{target}]\nbackends = ["{backend}"]\nprecision = "{precision}"\n')
    (tmp_path / "edgekit.toml").write_text(text)
    (bundle,) = build(tmp_path, target, out=tmp_path, allow_drop=True)
    ((_, variant),) = bundle.manifest.variants()
    assert variant.backend == backend
    assert [s.name for s in bundle.manifest.states] == ["state_0", "state_1"]
    payload = bundle.evidence["payloads"][variant.name]
    assert payload["outputs"][0]["max_abs"] <= (1e-5 if precision == "float32" else 1e-2)
    assert payload["simulated"] is (backend == "tensorrt")


def test_a_one_frame_model_says_its_states_itself(network: Maker, tmp_path: Path) -> None:
    from edgekit.passes.streamify import streamify

    made = streamify(frontends.load(network()), nominal_dt_s=0.2)
    path = tmp_path / "one.onnx"
    path.write_bytes(ir.to_proto(made.model).SerializeToString())
    options = {**OPTIONS, "video": {"allow_bidirectional": True}}
    (bundle,) = build(path, "host", out=tmp_path, data=CLIPS, **options)
    assert {(s.nominal_dt_s, s.reset_after_s) for s in bundle.manifest.states} == {(0.2, 1.0)}
    assert "clip_model" not in bundle.evidence["states"]
    notes = bundle.evidence["graph"]["notes"]
    assert any("a one-frame model with 2 states" in n for n in notes)
    assert any("allow_bidirectional changes nothing" in n for n in notes), "it is not passed over in silence"


# --- networks that look ahead --------------------------------------------------------------------


def test_bidirectional_is_refused(network: Maker, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"bi-directional.*allow_bidirectional"):
        build(network(both=True), "host", out=tmp_path, data=CLIPS, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_bidirectional_says_what_it_costs(network: Maker, tmp_path: Path) -> None:
    options = {**OPTIONS, "video": {"dt_s": 0.1, "allow_bidirectional": True}}
    (bundle,) = build(network(both=True), "host", out=tmp_path, data=CLIPS, **options)
    found = bundle.evidence["states"]["clip_model"]
    assert found["exact"] is False
    metric = found["metric"]
    # the clip model's own accuracy, computed here another way
    model, data = frontends.load(network(both=True)), read_set(Path(CLIPS), None)
    with edgekit.load(bundle.path) as engine:
        pipeline = engine.pipeline()
        right = 0
        for index, clip in enumerate(data.images):
            inputs = []
            for image in data.clip(index).images:
                pipeline(image)
                inputs.append(np.array(pipeline.session.inputs["image"]))
            (rows,) = probe.evaluate(model, {"clip": np.concatenate(inputs)}).values()
            right += int(rows.mean(0).argmax()) == clip.cls
    assert metric["clip_model"] == pytest.approx(right / len(data.images), abs=1e-6)
    assert metric["drop"] == pytest.approx(metric["clip_model"] - metric["one_frame"], abs=1e-6)
    assert any("a drop of" in text for text in bundle.evidence["limits"])
    (without,) = build(network(both=True), "host", out=tmp_path / "b", **options)
    assert any("drop was not measured" in text for text in without.evidence["limits"])


# --- clips ---------------------------------------------------------------------------------------


def test_calibration_carries_states_in_time_order(network: Maker) -> None:
    """Every feed's states are what the float network left after the frame before; zero at a clip's start."""
    prepared = prepare(frontends.load(network()), task="video")
    states = graph_states(prepared.model)
    entry = _entry(network())
    spec = _spec(network())
    feeds = clips.calibration_clips(
        entry, spec, prepared.model, states, input_name="image", progress=lambda *_: None
    )
    every = list(feeds)
    assert len(every) == len(feeds) == 12 * 8
    for number, feed in enumerate(every):
        if number % 8 == 0:
            assert all(not feed[s.input].any() for s in states)
        else:
            after = probe.evaluate(prepared.model, every[number - 1])
            for s in states:
                np.testing.assert_allclose(feed[s.input], after[s.output], atol=1e-6)
    assert any(feed["state_1"].any() for feed in every)
    # fewer of them: the same feeds, states and all
    few = feeds.first(7)
    assert len(few) == 7 and few.digest != feeds.digest
    at = feeds.spread(7)
    assert len({i % 8 for i in at}) >= 5 and len({i // 8 for i in at}) == 7  # other clips, other moments
    for feed, number in zip(few, at, strict=True):
        assert all(np.array_equal(feed[name], every[number][name]) for name in feed)
    assert not set(feeds.spread(12, at)) & set(at)
    assert sorted(feeds.spread(1000)) == feeds.spread(1000) and len(set(feeds.spread(1000))) > 40
    other = clips.calibration_clips(
        dataclasses.replace(entry, calibration=dataclasses.replace(entry.calibration, seed=1_000_001)),  # type: ignore[type-var]
        spec, prepared.model, states, input_name="image", progress=lambda *_: None,
    )  # fmt: skip
    assert other.digest != feeds.digest


def test_clips_of_a_folder(tmp_path: Path) -> None:
    import cv2

    def picture(path: Path, level: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((8, 8, 3), level, np.uint8))

    for clip in ("b", "a"):
        for i in range(12):
            picture(tmp_path / "wave" / clip / f"{i}.png", i)
    picture(tmp_path / "push" / "0" / "0.png", 99)
    assert [p.name for p in clips.clip_paths(tmp_path)] == ["0", "a", "b"]
    assert clips.clip_paths(tmp_path / "push" / "0") == [tmp_path / "push" / "0"]
    found = clips.unlabelled_clips(clips.footage(str(tmp_path), 9))
    seen = clips.Clips(found, (0, 1, 2), frames=100)
    assert [len(c) for c in seen] == [1, 12, 12]
    assert [int(f[0, 0, 0]) for f in seen[1]] == list(range(12))  # 10 after 9
    assert [len(c) for c in dataclasses.replace(seen, frames=5)] == [1, 5, 5]
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="holds no clip"):
        clips.unlabelled_clips(clips.footage(str(tmp_path / "none"), 9))


def test_calibration_on_what_is_judged_is_refused(network: Maker, tmp_path: Path) -> None:
    clip = np.zeros((3, FRAMES, 8, 8, 3), np.uint8)
    clip += np.arange(3, dtype=np.uint8)[:, None, None, None, None]
    for name, part in (("a", clip), ("b", clip[1:] + np.array([0, 9], np.uint8)[:, None, None, None, None])):
        np.savez(tmp_path / f"{name}.npz", clips=part, labels=np.arange(len(part)))
    options = {**OPTIONS, "precision": "int8", "video": {}}
    with pytest.raises(CalibrationError, match="1 of 2 calibration clips are evaluation clips too"):
        build(
            network(), "host", out=tmp_path, data=tmp_path / "a.npz", calibration=tmp_path / "b.npz",
            **options,
        )  # fmt: skip
    with pytest.raises(UsageError, match="share the seeds"):
        build(network(), "host", out=tmp_path, data=CLIPS, calibration=CLIPS, **options)


def test_a_changed_generator_is_noticed(network: Maker) -> None:
    data = dataclasses.replace(_entry(network()).calibration, sha256="0" * 64)  # type: ignore[type-var]
    with pytest.raises(CalibrationError, match="its pictures have changed"):
        clips.unlabelled_clips(data, 2)


def test_named_sets_hold_what_they_say() -> None:
    from edgekit.dataset import DataTable, resolve

    for name, purpose in (("gestures", "calibration"), ("gestures-eval", "evaluation")):
        data = resolve(DataTable(set=name), Path(), purpose, "here")  # type: ignore[arg-type]
        found = clips.unlabelled_clips(dataclasses.replace(data, count=2))  # compares the digest
        assert found.labels == GESTURES and len(found.images) == 2


# --- running -------------------------------------------------------------------------------------


def test_state_begins_anew_with_each_clip(network: Maker) -> None:
    """A clip's results do not depend on what was run before."""
    prepared = prepare(frontends.load(network()), task="video")
    states = graph_states(prepared.model)
    (payload,) = half("onnxruntime", "lower").lower(prepared.model, Target.load("host"), "float32")
    data = read_set(Path(CLIPS), None)
    some = [data.clip(i).images for i in (0, 5)]
    from edgekit.tasks import open_pipeline

    def logits(footage: Any) -> np.ndarray:
        pipeline = open_pipeline(_spec(network()), run_here(payload, states).binding)
        return np.array([found[0].logits for _, found in results([pipeline], footage)])

    both, second = logits(some), logits(some[1:])
    assert np.array_equal(both[FRAMES:], second)
    still = logits([image for clip in some for image in clip])  # stills: each begins anew
    assert np.array_equal(still[0], both[0]) and not np.array_equal(still[1], both[1])
    assert [begins for _, begins in frames(some)] == [True, False, False, False] * 2


STATE = StateSpec("s", DType.float32, (1, 2), "s", "s_next", nominal_dt_s=0.1)


def _payload(dtype: DType, scale: float | None = None, backend: str = "litert", **after: Any) -> Payload:
    quant = None if scale is None else QuantParams(dtype, (scale,), (3,))
    tensors = [TensorSpec(name, dtype, (1, 2), "", quant) for name in ("s", "s_next")]
    tensors[1] = dataclasses.replace(tensors[1], **after)
    image = TensorSpec("image", DType.float32, (1, 3, 4, 4))
    out = TensorSpec("logits", DType.float32, (1, 5))
    return Payload(backend, "int8", "onnx", b"", (image, tensors[0]), (out, tensors[1]))


def test_what_payloads_say_of_states() -> None:
    codes, real = _payload(DType.int8, 0.5), _payload(DType.float32, backend="onnxruntime")
    (held,) = recurrent.held([STATE], codes)
    assert (held.dtype, held.quant) == (DType.float32, codes.inputs[1].quant)
    assert recurrent.held([STATE], real)[0].quant is None
    for order in ([codes, real], [real, codes]):
        (state,) = recurrent.agreed([STATE], order)  # one holds it as codes, the other one not
        assert (state.dtype, state.quant) == (DType.float32, codes.inputs[1].quant)
    other = _payload(DType.int8, 0.25, "openvino")
    assert "another scale than in the payloads before it" in recurrent.misfit([STATE], [real, codes], other)
    assert recurrent.misfit([STATE], [real], other) == ""
    wide = _payload(DType.float16, backend="tensorrt")
    assert "float16, expected float32" in recurrent.misfit([STATE], [real], wide)
    with pytest.raises(LoweringError, match="another scale"):
        recurrent.agreed([STATE], [codes, other])
    assert recurrent.ports(codes, [STATE]) == (("image",), ("logits",))
    types = {t.name: (t.dtype, t.quant) for t in recurrent.tensors(codes, [state])}
    assert types["s"] == types["s_next"] == (DType.float32, None)
    missing = dataclasses.replace(codes, inputs=codes.inputs[:1])
    unlike = _payload(DType.int8, 0.5, quant=QuantParams(DType.int8, (0.25,), (3,)))
    for bad in (missing, unlike, _payload(DType.float32, shape=(1, 3))):
        with pytest.raises(LoweringError, match="state s: expected an input s and an output s_next"):
            recurrent.held([STATE], bad)


def test_time_of_states() -> None:
    (state,) = recurrent.timed([STATE], None, None)
    assert (state.nominal_dt_s, state.reset_after_s) == (0.1, 0.5)
    (state,) = recurrent.timed([STATE], 0.2, 3.0)
    assert (state.nominal_dt_s, state.reset_after_s) == (0.2, 3.0)
    (state,) = recurrent.timed([dataclasses.replace(STATE, nominal_dt_s=None)], None, None)
    assert (state.nominal_dt_s, state.reset_after_s) == (None, None)


# --- commands ------------------------------------------------------------------------------------


def test_inspect_shows_states(int8: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(int8.path)]) == 0
    text = capsys.readouterr().out
    assert "state_0  float32  1x2x8x8  128 elements" in text and "elements    256" in text
    assert "as float32  1.00 KiB" in text and "as int8     256 bytes" in text
    assert "step        0.1 s" in text and "after 0.5 s without a frame" in text
    assert main(["inspect", "--json", str(int8.path)]) == 0
    shown = json.loads(capsys.readouterr().out)["states"]
    assert [(s["name"], s["elements"], s["bytes"]) for s in shown] == [
        ("state_0", 128, 512),
        ("state_1", 128, 512),
    ]


def test_the_published_network_in_figures() -> None:
    """MobileNetV2 at 224 x 224 (runtimes of the online demo): 10 states, 27,048 elements, 106 KiB, 53 KiB, 26 KiB."""
    sizes = [(3, 56), *[(4, 28)] * 2, *[(8, 14)] * 3, *[(12, 14)] * 2, *[(20, 7)] * 2]
    held = tuple(
        dataclasses.replace(STATE, name=f"state_{i}", shape=(1, c, n, n)) for i, (c, n) in enumerate(sizes)
    )
    rows = dict(inspect._stream(held, 1))
    assert (rows["states"], rows["elements"]) == ("10", "27,048")
    figures = [rows[f"as {kind}"] for kind in ("float32", "float16", "int8")]
    assert figures == ["105.66 KiB", "52.83 KiB", "26.41 KiB"]


def test_verify_measures_the_metric(built: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--json", "--data", CLIPS, str(built.path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["self_test"] == "passed" and found["images"] == 12
    assert found["metric"]["top1"] == pytest.approx(built.evidence["metric"]["payload"]["top1"])
    assert found["reference"]["top1"] == found["metric"]["top1"]
    assert main(["verify", "--data", CLIPS, str(built.path)]) == 0
    assert "on 12 clips" in capsys.readouterr().out


def test_compare_with_the_clip_model(
    int8: Bundle, network: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    words = ["compare", str(network()), str(int8.path), "--json", "--data", CLIPS, "--rounds", "3"]
    assert main([*words, "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"]["count"] == 12 * FRAMES
    (tensor,) = found["outputs"]["tensors"]
    assert tensor["tensor"] == "logits" and 20 < tensor["sqnr_db"] < 80
    assert found["results"]["a"] == 12 * FRAMES
    assert found["latency"]["engine"]["a_ms"] > 0 and found["metric"]["images"] == 12
    assert found["metric"]["of"] == "clips" and "<dt>Clips</dt>" in page.read_text()
    assert main(["compare", str(int8.path), str(int8.path), "--json", "--rounds", "0"]) == 0  # default clips
    found = json.loads(capsys.readouterr().out)
    assert found["outputs"]["tensors"][0]["max_abs"] == 0 and "gestures" in found["pictures"]["what"]


def test_bench_tune_run_and_report(int8: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(int8.path), "--runs", "5", "--json"]) == 0
    capsys.readouterr()
    assert main(["tune", str(int8.path), "--rounds", "3", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["segments"]
    assert {v["status"] for v in table["variants"]} == {"chosen", "slower"}
    sink = tmp_path / "out.jsonl"
    source = "synthetic://gestures?size=64x64&frames=9"
    assert main(["run", str(int8.path), "--source", source, "--sink", str(sink)]) == 0
    assert len(sink.read_text().splitlines()) == 9
    capsys.readouterr()
    page = tmp_path / "report.html"
    assert main(["report", str(int8.path), "--out", str(page)]) == 0
    text = page.read_text()
    assert "<h2>States</h2>" in text and "a clip model of 4 frames" in text and "SQNR litert-int8" in text


def test_predict_keeps_state_per_thread(built: Bundle) -> None:
    import threading

    images = read_set(Path(CLIPS), None).clip(1).images
    with edgekit.load(built.path) as engine:
        pipeline = engine.pipeline()
        want = [pipeline(image).logits.copy() for image in images]
        got = [engine.predict(image).logits.copy() for image in images]
        assert np.array_equal(got, want) and not np.array_equal(got[0], got[1])
        found: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: found.append(engine.predict(images[0]).logits.copy()))
        thread.start()
        thread.join(30)
        assert np.array_equal(found, [want[0]])  # its own beginning


# --- what is refused -----------------------------------------------------------------------------


def _toml(source: Path, more: str = "", video: str = "dt_s = 0.1\n") -> str:
    rule = "\n".join(f"{k} = {json.dumps(v)}" for k, v in RULE.items())
    return (
        f'[project]\nname = "p"\n[[model]]\nname = "m"\nsource = "{source}"\ntask = "video"\n'
        f"[model.preprocess]\n{rule}\n[model.video]\n{video}"
        f'[model.evaluation]\nsource = "synthetic://gestures?size={SIZE * 2}"\ncount = 12\nseed = 10000\n{more}'
    )


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("dt_s = 0.0\n", "dt_s must be above 0 seconds and at most 1e+09, got 0.0"),
        ("dt_s = 1e305\n", "dt_s must be above 0 seconds and at most 1e+09"),
        ("dt_s = 0.1\nreset_after_s = 0.05\n", "reset_after_s must be longer than dt_s"),
        ("frames = 0\n", "frames must be between 1 and"),
        ('stepping = "skip"\n', "stepping"),
        ("smoothing = { window = 0 }\n", "smoothing window must be between 1 and"),
        ("window = 3\n", "window"),
        ('background = "nobody"\n', "'nobody' is not one of the 12 labels"),
        ("frames = 5\n", "expected a clip of 5 frames"),
    ],
)
def test_faulty_tables(network: Maker, tmp_path: Path, table: str, says: str) -> None:
    (tmp_path / "edgekit.toml").write_text(_toml(network(), video=table))
    with pytest.raises((UsageError, ModelError)) as raised:
        build(tmp_path, "host", out=tmp_path, allow_drop=True)
    text = str(raised.value)
    assert says in text and "\n" not in text


def test_options_of_the_command_line(
    network: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = ["--resize", "stretch", "--color", "rgb", "--mean", "127.5", "--std", "64"]
    words = [
        "build",
        str(network(both=True)),
        "--target",
        "host",
        "--out",
        str(tmp_path),
        "--allow-drop",
        *rule,
    ]
    assert main([*words, "--task", "video"]) == 2
    assert "bi-directional" in capsys.readouterr().err
    assert main([*words, "--dt-s", "0.1"]) == 2
    assert "for the task video. Give --task video" in capsys.readouterr().err
    assert main([*words, "--task", "video", "--dt-s", "zero"]) == 2
    assert "expected seconds above 0" in capsys.readouterr().err
    given = ["--task", "video", "--allow-bidirectional", "--dt-s", "0.25", "--frames", "4"]
    assert main([*words, *given, "--data", CLIPS]) == 0
    with Bundle.open(next(tmp_path.glob("*.edge"))) as bundle:
        assert bundle.manifest.states[0].nominal_dt_s == 0.25
    assert main([*words, *given, "--data", "synthetic://gestures"]) == 2
    assert "how many" in capsys.readouterr().err


def test_a_detectors_head_is_refused(network: Maker, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a detector's, but the task is video"):
        build(network(), "host", out=tmp_path, head="yolox", **OPTIONS)


def test_a_missed_budget_writes_nothing(network: Maker, tmp_path: Path) -> None:
    (tmp_path / "edgekit.toml").write_text(_toml(network(), "[model.accept]\nmin_metric = 0.99\n"))
    with pytest.raises(EvidenceError, match="top1 is"):
        build(tmp_path, "host", out=tmp_path)
    assert not list(tmp_path.glob("*.edge"))


def _entry(path: Path) -> ModelEntry:
    from edgekit.dataset import from_uri

    hint = PreprocessHint(**RULE)
    return ModelEntry(
        "m", path, "video", preprocess=hint, calibration=from_uri(CALIBRATION), video=VideoHint(dt_s=0.1)
    )


def _spec(path: Path) -> Any:
    from edgekit.toolchain.tasks import half as task_half

    prepared = prepare(frontends.load(path), task="video", nominal_dt_s=0.1)
    spec, _, note = task_half("video").make_spec(_entry(path), prepared)
    assert "class_0 to class_11" in note
    return spec


def test_the_project_file_says_the_same(network: Maker, tmp_path: Path) -> None:
    (tmp_path / "edgekit.toml").write_text(_toml(network()))
    (entry,) = load_project(tmp_path).models
    assert entry.task == "video" and entry.video == VideoHint(dt_s=0.1)


def test_estimate_is_of_one_frame(network: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(network()), "--target", "rpi5"]) == 0
    assert "one-frame network that a build makes of this clip of 4" in capsys.readouterr().out


def test_a_network_without_shifts_has_no_states(
    network: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TSN, the control: frames are judged one by one."""
    (bundle,) = build(network(shift=None), "host", out=tmp_path, data=CLIPS, **OPTIONS)
    assert bundle.manifest.states == () and "states" not in bundle.evidence
    assert bundle.evidence["metric"]["of"] == "clips"
    with edgekit.load(bundle.path) as engine:
        pipeline = engine.pipeline()
        images = read_set(Path(CLIPS), None).clip(1).images
        first = pipeline(images[0]).logits.copy()
        pipeline(images[3])
        assert np.array_equal(pipeline(images[0]).logits, first)
    assert main(["inspect", str(bundle.path)]) == 0
    assert "\nStates" not in capsys.readouterr().out


def test_the_calibration_of_the_shipped_app_is_like_what_it_is_judged_on() -> None:
    (entry,) = load_project(ROOT / "apps/gesture").models
    task = toolchain_task("video")
    options = task.prepare_options(entry)
    prepared = prepare(frontends.load(entry.source), task="video", check=False, **options)
    model = prepared.model
    given = (entry, task.make_spec(entry, prepared)[0], model, graph_states(model))
    options = {"input_name": str(picture(model).name), "progress": lambda *_: None}
    first = likeness.beginning(model, likeness.first_values(model))
    seen = calibrate(first, clips.calibration_clips(*given, **options))
    assert likeness.unlike(model, seen, clips.evaluation_clips(*given, **options)) == ""
