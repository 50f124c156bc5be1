"""Engines and sessions: lifetimes, threads, variants, plans of several steps, what is allocated per call."""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgekit
from edgekit import kernels
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, SelfTestError, StreamError, UsageError
from edgekit.kernels.letterbox import letterbox
from edgekit.manifest import KernelStep
from edgekit.runtime import variants as runtime_variants
from edgekit.runtime.engine import Engine
from tests.bundle_samples import files_of, forge
from tests.plan_bundles import WIDTH, Step, altered, network, slowed, write


def mapped(path: Path | str) -> int:
    """How often this process has the file mapped."""
    return Path("/proc/self/maps").read_text().count(str(path))


def picture(seed: int = 0, height: int = 180, width: int = 320) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write(tmp_path / "single.edge", [Step("net", {"a": network("x", "y")})])


def two_steps(path: Path, **options: Any) -> Path:
    """x -> mid; (mid, x) -> y: the second step reads both an output and the input."""
    steps = [
        Step("first", {"a": network("x", "mid", 1)}),
        Step("second", {"a": network("mid", "y", 2, extra="x")}),
    ]
    return write(path, steps, **options)


# --- lifetimes ---------------------------------------------------------------------------------


def test_closing_an_engine_releases_the_bundle_that_it_opened(host_bundle: str) -> None:
    gc.disable()  # reference counts alone must do it
    try:
        assert not mapped(host_bundle)
        engine = edgekit.load(host_bundle)
        assert mapped(host_bundle)
        engine.predict(picture())
        engine.close()
        assert not mapped(host_bundle)
        engine.close()
    finally:
        gc.enable()


def test_a_failed_load_releases_the_bundle(single: Path) -> None:
    with pytest.raises(UsageError, match="variant 'b'"):
        edgekit.load(single, variant="b")
    assert not mapped(single)


def test_a_bundle_of_the_caller_stays_open(host_bundle: str) -> None:
    with Bundle.open(host_bundle) as bundle:
        with edgekit.load(bundle) as engine:
            engine.predict(picture())
        assert len(bundle.read("evidence.json")) > 0
        with edgekit.load(bundle) as engine:
            engine.predict(picture())


def test_a_session_outlives_its_engine_and_then_lets_go(host_bundle: str) -> None:
    engine = edgekit.load(host_bundle)
    session = engine.session()
    (source,) = session.inputs.values()
    source[...] = np.random.default_rng(0).random(source.shape, np.float32)
    session.run()
    want = {name: array.copy() for name, array in session.outputs.items()}
    engine.close()
    del engine
    gc.collect()
    assert mapped(host_bundle), "the weights are still in use"
    for array in session.outputs.values():
        array[...] = 0
    session.run()
    for name, array in session.outputs.items():
        np.testing.assert_array_equal(array, want[name])
    session.close()
    assert not mapped(host_bundle)
    session.close()


@pytest.mark.parametrize("make", [lambda p: write(p, [Step("n", {"a": network("x", "y")})]), two_steps])
def test_what_is_closed_says_so(tmp_path: Path, make: Any) -> None:
    engine = edgekit.load(make(tmp_path / "b.edge"))
    session = engine.session()
    session.run()
    kept = session.outputs["y"].copy()
    session.close()
    with pytest.raises(StreamError, match="closed"):
        session.run()
    np.testing.assert_array_equal(session.outputs["y"], kept)
    engine.close()
    for call in (engine.session, engine.pipeline, lambda: engine.predict(picture())):
        with pytest.raises(UsageError, match="is closed"):
            call()
    assert engine.describe() == {}


# --- threads -----------------------------------------------------------------------------------


def test_threads_share_an_engine_and_get_the_same_boxes(host_bundle: str) -> None:
    pictures = [picture(seed, 90 + 10 * seed, 160) for seed in range(4)]
    with edgekit.load(host_bundle, threads=1) as engine:
        alone = engine.pipeline()
        want = [alone(p, score_threshold=0.02) for p in pictures]
        assert any(len(d) for d in want)
        errors: list[str] = []

        def work(offset: int, own: bool) -> None:
            mine = engine.pipeline() if own else engine.predict
            for i in range(12):
                k = (i + offset) % len(pictures)
                got = mine(pictures[k], score_threshold=0.02)
                for name in ("boxes", "scores", "classes"):
                    if not np.array_equal(getattr(got, name), getattr(want[k], name)):
                        errors.append(f"thread {offset}: picture {k}: {name} differ")

        threads = [threading.Thread(target=work, args=(i, i % 2 == 0)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors


# --- allocation --------------------------------------------------------------------------------


def growth(call: Any, runs: int) -> int:
    """Bytes that `runs` calls leave allocated (Python and numpy), after as many to warm up."""
    for _ in range(runs):
        call()
    gc.collect()
    tracemalloc.start()
    for _ in range(runs):
        call()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(runs):
        call()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return after - before


def peak(call: Any) -> int:
    """Bytes allocated at most at a time during a call."""
    call()
    tracemalloc.start()
    call()
    base = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    call()
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return top - base


@pytest.mark.parametrize("steps", ["one", "two"])
def test_a_run_allocates_nothing_and_keeps_its_buffers(tmp_path: Path, steps: str) -> None:
    path = tmp_path / "b.edge"
    if steps == "one":
        write(path, [Step("net", {"a": network("x", "y")})])
    else:
        two_steps(path)
    with edgekit.load(path) as engine, engine.session() as session:
        arrays = {**session.inputs, **session.outputs}
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        assert growth(session.run, 400) < 400 * 8, "less than one reference a run"
        assert peak(session.run) < 1000
        assert addresses == {n: a.ctypes.data for n, a in {**session.inputs, **session.outputs}.items()}
        assert all(arrays[n] is a for n, a in {**session.inputs, **session.outputs}.items())


def test_a_frame_allocates_its_result_only(host_bundle: str) -> None:
    if kernels.native() is None:
        pytest.skip("the numpy references allocate: no compiler here")
    image = picture(3)
    with edgekit.load(host_bundle) as engine:
        pipeline = engine.pipeline()
        found = pipeline(image)
        result = sum(a.nbytes for a in (found.boxes, found.scores, found.classes))
        (source,) = pipeline.session.inputs.values()
        assert growth(lambda: pipeline(image), 50) < 50 * 64
        assert peak(lambda: pipeline(image)) < 3 * result + 8192 < source.nbytes / 10


# --- plans of several steps --------------------------------------------------------------------


def test_outputs_of_one_network_feed_the_next(tmp_path: Path) -> None:
    path = two_steps(tmp_path / "two.edge", outputs=["y", "mid"])
    x = np.random.default_rng(3).normal(size=(1, WIDTH)).astype(np.float32)

    def step(model: onnx.ModelProto, value: np.ndarray) -> np.ndarray:
        w, b = (numpy_helper.to_array(t) for t in model.graph.initializer)
        return np.tanh(value @ w + b)

    mid = step(network("x", "mid", 1), x)
    y = step(network("mid", "y", 2, extra="x"), mid + x)
    with edgekit.load(path) as engine, engine.session() as session:
        assert list(session.inputs) == ["x"] and list(session.outputs) == ["y", "mid"]
        for _ in range(2):
            session.inputs["x"][...] = x
            session.run()
            np.testing.assert_allclose(session.outputs["mid"], mid, atol=1e-6)
            np.testing.assert_allclose(session.outputs["y"], y, atol=1e-6)
        assert session.bytes_copied_per_run == 0  # the second network reads mid and x where they are
        assert set(engine.describe()) == {"first", "second"}


def test_a_plan_of_one_step_copies_nothing(single: Path) -> None:
    with edgekit.load(single) as engine, engine.session() as session:
        assert session.bytes_copied_per_run == 0


def test_unknown_kernels_are_refused_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = [Step("net", {"a": network("x", "y")})]
    kernel = KernelStep("pool", "mean_pool", ("y",), ("z",))
    write(tmp_path / "kernel.edge", net, kernel=kernel)
    monkeypatch.setattr(runtime_variants, "load_variants", lambda *_: pytest.fail("loaded a payload"))
    with pytest.raises(BundleError, match=r"step pool: needs kernel 'mean_pool'.* Upgrade edgekit"):
        edgekit.load(tmp_path / "kernel.edge")


def test_an_input_that_nothing_reads_is_refused(single: Path, tmp_path: Path) -> None:
    def edit(tree: Any) -> None:
        tree["plan"][0]["inputs"] = []

    (tmp_path / "bad.edge").write_bytes(forge(files_of(single), edit))
    with pytest.raises(BundleError, match="no step of its plan reads input 'x'"):
        edgekit.load(tmp_path / "bad.edge")


def test_payload_and_manifest_must_agree_on_every_tensor(single: Path, tmp_path: Path) -> None:
    extra = write(tmp_path / "extra.edge", [Step("net", {"a": network("x", "y", extra="p")})])

    def hide(tree: Any) -> None:
        tree["inputs"].remove("p")
        tree["plan"][0]["inputs"].remove("p")
        tree["golden"]["inputs"] = [g for g in tree["golden"]["inputs"] if g["tensor"] != "p"]
        del tree["files"][gone]

    files = files_of(extra)
    (gone,) = [g.path for g in Bundle.open(extra).manifest.golden.inputs if g.tensor == "p"]
    del files[gone]
    (tmp_path / "bad.edge").write_bytes(forge(files, hide))
    with pytest.raises(BundleError, match=r"input p: expected nothing, got float32 \[1, 136\]"):
        edgekit.load(tmp_path / "bad.edge")


# --- variants ----------------------------------------------------------------------------------


def test_the_fastest_variant_that_passes_is_kept(tmp_path: Path) -> None:
    good = network("x", "y")
    steps = [
        Step(
            "net",
            {
                "slow": slowed(good, 40),
                "fast": good,
                "wrong": altered(good, lambda w: w[::-1]),
                "broken": network("x", "other"),
            },
        )
    ]
    path = write(tmp_path / "v.edge", steps)
    with edgekit.load(path) as engine:
        assert engine.variants["net"].name == "fast"
        assert set(engine.refused) == {"net/slow", "net/wrong", "net/broken"}
        assert "slower here than net/fast" in engine.refused["net/slow"]
        assert "differ from the golden ones" in engine.refused["net/wrong"]
        assert "output y: expected float32" in engine.refused["net/broken"]
    with edgekit.load(path, variant="slow") as engine:
        assert engine.variants["net"].name == "slow" and not engine.refused
    with pytest.raises(SelfTestError, match="golden"):
        edgekit.load(path, variant="wrong")
    with pytest.raises(UsageError, match=r"variant 'fats'.* Did you mean 'fast'\?"):
        edgekit.load(path, variant="fats")
    gc.collect()  # pytest keeps the exceptions in cycles
    assert not mapped(path)


def test_when_no_variant_passes_all_reasons_are_told(tmp_path: Path) -> None:
    good = network("x", "y")
    steps = [Step("net", {"a": good, "b": network("x", "other")})]
    path = write(tmp_path / "v.edge", steps, golden=None)
    files = files_of(path)
    name = Bundle.open(path).manifest.golden.outputs[0].path
    from tests.plan_bundles import replace_file

    bad = replace_file(path, tmp_path / "bad.edge", name, bytes(len(files[name])))
    with pytest.raises(SelfTestError, match="differ from the golden ones"):
        edgekit.load(bad)
    steps = [Step("net", {"a": altered(good, lambda w: -w), "b": altered(good, lambda w: 0 * w)})]
    golden_of_good = files[name]
    bad = write(tmp_path / "both.edge", steps)
    bad = replace_file(bad, tmp_path / "both2.edge", name, golden_of_good)
    with pytest.raises(SelfTestError, match=r"differ.*The other variants: .*differ"):
        edgekit.load(bad)


def test_variants_of_several_segments_are_tested_together(tmp_path: Path) -> None:
    one, two = network("x", "mid", 1), network("mid", "y", 2)
    steps = [
        Step("first", {"good": one, "wrong": altered(one, lambda w: w.T)}),
        Step("second", {"good": two, "wrong": altered(two, lambda w: w.T)}),
    ]
    path = write(tmp_path / "v.edge", steps)

    def swap(tree: Any) -> None:  # the wrong ones first: the first combination fails
        for step in tree["plan"]:
            step["variants"].reverse()

    (tmp_path / "swapped.edge").write_bytes(forge(files_of(path), swap))
    for file in (path, tmp_path / "swapped.edge"):
        with edgekit.load(file) as engine:
            assert {s: v.name for s, v in engine.variants.items()} == {"first": "good", "second": "good"}
            assert set(engine.refused) == {"first/wrong", "second/wrong"}
            assert all("golden" in reason for reason in engine.refused.values())


@pytest.mark.parametrize("edit", [lambda w: -w, lambda w: w])
def test_a_load_leaves_no_cycle_that_keeps_the_map(tmp_path: Path, edit: Any) -> None:
    good = network("x", "y")
    path = write(tmp_path / "v.edge", [Step("net", {"good": good, "other": altered(good, edit)})])
    gc.disable()
    try:
        for wanted in (None, "other"):
            with contextlib.suppress(SelfTestError):
                edgekit.load(path, variant=wanted).close()
            assert not mapped(path)
    finally:
        gc.enable()


def test_an_interrupt_while_loading_leaves_nothing_open(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime_variants, "self_test", interrupt)
    with pytest.raises(KeyboardInterrupt):
        edgekit.load(single)
    assert not mapped(single)


# --- the rest ----------------------------------------------------------------------------------


def test_describe_is_json_and_names_what_runs(host_bundle: str) -> None:
    with edgekit.load(host_bundle, threads=1) as engine:
        (name,) = engine.manifest.plan
        facts = json.loads(json.dumps(engine.describe()))[name.name]
        assert facts["library"] == "onnxruntime" and facts["threads"] == 1
        assert facts["variant"] == engine.variants[name.name].name
        assert facts["mapped_weight_bytes"] > 0.9 * engine.variants[name.name].bytes
        assert engine.labels == ("car", "truck", "pedestrian", "traffic light", "traffic sign")


@pytest.mark.parametrize(
    "image",
    [
        None,
        "picture.jpg",
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(host_bundle: str, image: Any) -> None:
    with edgekit.load(host_bundle, self_test=False) as engine:
        with pytest.raises(UsageError, match=r"image: expected uint8 \[height, width, 3\]"):
            engine.predict(image)
        for threshold in (-0.1, 1.5, float("nan")):
            with pytest.raises(UsageError, match="thresholds"):
                engine.predict(picture(), score_threshold=threshold)


def test_negative_threads_are_refused(host_bundle: str) -> None:
    with pytest.raises(UsageError, match="threads -1"):
        edgekit.load(host_bundle, threads=-1)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("preprocess", "width"), 64),
        (("preprocess", "dtype"), "uint8"),
        (("head", "family"), "yolov8"),
        (("head", "num_classes"), 4),
        (("head", "levels", 0, "box", "tensor"), "absent"),
        (("head", "levels", 0, "classes", "start"), 10_000),
        (("head", "levels", 0, "box", "start"), -5),
        (("labels",), 7),
    ],
)
def test_a_pipeline_that_does_not_fit_its_network_is_a_bundle_error(
    host_bundle: str, tmp_path: Path, where: tuple[Any, ...], value: Any
) -> None:
    def edit(tree: Any) -> None:
        table = tree["pipeline"]
        for key in where[:-1]:
            table = table[key]
        table[where[-1]] = value

    path = tmp_path / "bad.edge"
    path.write_bytes(forge(files_of(Path(host_bundle)), edit))
    with edgekit.load(path, self_test=False) as engine:
        assert isinstance(engine.labels, tuple)
        with pytest.raises(BundleError):
            engine.predict(picture())


def test_an_unknown_task_runs_as_a_session_but_not_as_a_pipeline(single: Path) -> None:
    with Engine(Bundle.open(single), owner=True) as engine:
        with pytest.raises(BundleError, match="task 'none' is not known"):
            engine.pipeline()
        assert engine.labels == ()


def test_padding_is_right_whatever_came_before(host_bundle: str) -> None:
    """The pipeline writes the padding only when the picture's size changes; the input never shows it."""
    rng = np.random.default_rng(0)
    with edgekit.load(host_bundle) as engine:
        detect = engine.pipeline()
        (array,) = detect.session.inputs.values()
        for height, width in ((90, 160), (90, 160), (160, 90), (160, 90), (33, 200), (90, 160)):
            image = rng.integers(0, 256, (height, width, 3), np.uint8)
            detect(image)
            wanted = np.full_like(array, np.nan)
            letterbox(image, detect.spec.preprocess, wanted)
            np.testing.assert_array_equal(array, wanted)
