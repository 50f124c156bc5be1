"""Engines on plans of networks and kernels: load, self-test, choice of variants, what they say of themselves."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.bundle import golden_bytes
from edgekit.errors import BundleError, SelfTestError, UsageError
from edgekit.kernels import steps
from edgekit.manifest import kernel_path
from edgekit.runtime import tuning, variants
from edgekit.runtime.engine import load
from tests.bevfusion_nets import frame
from tests.bundle_samples import files_of, forge
from tests.fusion_plans import HOST, SEGMENTS, feed, put, write
from tests.plan_bundles import replace_file
from tests.test_plan_session import by_hand, same

OPENVINO = ("openvino", "float32")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plan") / "tiny.edge")


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two libraries for two of the networks, one of them run camera by camera."""
    several = {"camera": [HOST, OPENVINO], "lift": [OPENVINO, HOST]}
    return write(tmp_path_factory.mktemp("plan") / "choice.edge", several, tolerance=2e-3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_bundle_runs(bundle: Path) -> None:
    with edgekit.load(bundle, threads=1) as engine, engine.session() as first, engine.session() as second:
        for session, seed in ((first, 1), (second, 2), (first, 2)):
            given = feed(frame(seed))
            put(session, given)
            session.run()
            same(session.outputs, by_hand(given))
        assert set(engine.variants) == set(SEGMENTS)
        assert set(first.executables) == {
            "camera",
            "depth_raster",
            "lift",
            "pool",
            "encoder",
            "lidar",
            "fusion",
        }
    with pytest.raises(UsageError, match="closed"):
        engine.session()


def test_it_says_what_runs(bundle: Path) -> None:
    with load(bundle, threads=1) as engine:
        told = engine.describe()
        assert list(told) == [step.name for step in engine.manifest.plan]
        assert (
            told["camera"]["library"] == "onnxruntime" and told["camera"]["variant"] == "onnxruntime-float32"
        )
        for name, kernel in (
            ("depth_raster", "depth_raster"),
            ("pool", "bev_pool"),
            ("encoder", "lidar_encoder"),
        ):
            assert told[name]["variant"] == told[name]["kernel"] == kernel
            assert told[name]["library"] == "edgekit" and told[name]["version"] == edgekit.__version__
            assert told[name]["why"] and told[name]["threads"] == 1


def test_branches_share_the_cores(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    raw = steps.load
    monkeypatch.setattr(
        steps, "load", lambda step, *rest: seen.update({step.name: rest[-1].threads}) or raw(step, *rest)
    )
    monkeypatch.setattr(variants, "usable_cores", lambda: 8)
    with load(bundle) as engine:
        manifest = engine.manifest
        assert variants.threads_of(manifest, 0) == {
            "camera": 4, "depth_raster": 2, "lift": 4, "pool": 4, "encoder": 4, "lidar": 4, "fusion": 0,
        }  # fmt: skip
        assert variants.threads_of(manifest, 3) == dict.fromkeys(variants.threads_of(manifest, 0), 3)
        assert seen == {"depth_raster": 2, "pool": 4, "encoder": 4}
        told = engine.describe()
        assert told["camera"]["threads"] == told["encoder"]["threads"] == 4
        assert told["fusion"]["threads"] == "the library's choice"
        monkeypatch.setattr(variants, "usable_cores", lambda: 1)
        assert set(variants.threads_of(manifest, 0).values()) == {0, 1}


def test_a_plan_without_branches_is_left_to_the_libraries(tmp_path: Path) -> None:
    from tests import plan_bundles

    chain = [
        plan_bundles.Step("one", {"v": plan_bundles.network("x", "m")}),
        plan_bundles.Step("two", {"v": plan_bundles.network("m", "y", 1)}),
    ]
    with load(plan_bundles.write(tmp_path / "chain.edge", chain)) as engine, engine.session() as session:
        assert set(variants.threads_of(engine.manifest, 0).values()) == {0}
        before = threading.active_count()
        assert not session.overlap
        session.run()
        assert threading.active_count() <= before
        assert list(session.step_ns) == ["one", "two"]


def test_workers_of_a_network_do_not_spin_while_other_steps_want_the_cores(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    from tests import plan_bundles

    net = [plan_bundles.Step("net", {"v": plan_bundles.network("x", "y")})]
    single = plan_bundles.write(tmp_path / "single.edge", net)
    entries: list[list[str]] = []

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            entries.append([])

        def add_session_config_entry(self, key: str, value: str) -> None:
            entries[-1].append(f"{key}={value}")
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    load(bundle).close()
    load(single).close()
    stops = "session.force_spinning_stop=1"
    assert [stops in each for each in entries] == [True, True, True, True, False]


# --- the self-test ------------------------------------------------------------------------------


def test_weights_of_a_kernel_that_are_others_fail_the_self_test(bundle: Path, tmp_path: Path) -> None:
    path = kernel_path("encoder", "weights")
    data = np.frombuffer(files_of(bundle)[path], "<f4") * np.float32(1.3)
    bad = replace_file(bundle, tmp_path / "bad.edge", path, data.tobytes())
    with pytest.raises(SelfTestError, match=r"self-test output .* differ from the golden ones"):
        load(bad)
    with load(bad, self_test=False) as engine:
        engine.session().close()


def test_what_when_says_in_the_self_test_is_data(bundle: Path, tmp_path: Path) -> None:
    """Golden inputs without LiDAR: the golden outputs have to be those without it."""
    given = feed(frame())
    given["lidar"][0] = 0
    want = by_hand(given)
    with edgekit.Bundle.open(bundle) as opened:
        golden = opened.manifest.golden
    places = {each.tensor: each.path for each in (*golden.inputs, *golden.outputs)}
    path = replace_file(bundle, tmp_path / "bad.edge", places["lidar"], golden_bytes(given["lidar"]))
    with pytest.raises(SelfTestError):
        load(path)
    for each in golden.outputs:
        target = tmp_path / f"{each.tensor}.edge"
        path = replace_file(path, target, each.path, golden_bytes(want[each.tensor]))
    load(path).close()


def edited(bundle: Path, target: Path, edit: Callable[[Any], object]) -> Path:
    target.write_bytes(forge(files_of(bundle), lambda tree: edit(tree) and None))
    return target


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree["plan"][3].update(kernel="bev_pool_2"), "step pool: needs kernel 'bev_pool_2'.* Upgrade edgekit"),
        (lambda tree: tree["plan"][3]["options"]["grid"].update(z=[1.0, 1.0]), "step pool: grid z: unusable range"),
        (lambda tree: tree["plan"][0].pop("repeat"), r"input images: expected float32 \[6, 3, 40, 64\], got float32 \[1, 3"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit_are_refused(
    bundle: Path, tmp_path: Path, edit: Callable[[Any], object], message: str
) -> None:
    bad = edited(bundle, tmp_path / "bad.edge", edit)
    with pytest.raises(BundleError, match=message) as caught:
        load(bad)
    assert "\n" not in str(caught.value)


def test_kernels_are_refused_before_networks_load(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "load_variants", lambda *_: pytest.fail("loaded a payload"))
    bad = edited(bundle, tmp_path / "bad.edge", lambda tree: tree["plan"][1].update(options={"x": 1}))
    with pytest.raises(BundleError, match=r"bundle .*bad.edge: step depth_raster: .*no options"):
        load(bad)


# --- variants -----------------------------------------------------------------------------------


def test_each_network_is_timed_on_what_it_really_gets(
    choice: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = by_hand(feed(frame()))
    seen: dict[str, dict[str, np.ndarray]] = {}

    def race(runs: dict[str, Callable[[], None]], effort: tuning.Effort) -> dict[str, np.ndarray]:
        for name, run in runs.items():
            seen[name] = {k: np.array(a) for k, a in run.__self__.inputs.items()}  # type: ignore[attr-defined]
            run()
        return {name: np.array([2.0 if "onnxruntime" in name else 1.0]) for name in runs}

    monkeypatch.setattr(tuning, "race", race)
    with load(choice, threads=1) as engine:
        assert {s: v.backend for s, v in engine.variants.items()} == {
            "camera": "openvino", "lift": "openvino", "lidar": "onnxruntime", "fusion": "onnxruntime",
        }  # fmt: skip
        assert engine.refused.keys() == {"camera/onnxruntime-float32", "lift/onnxruntime-float32"}
        given = feed(frame(2))
        with engine.session() as session:
            put(session, given)
            session.run()
            for name, value in by_hand(given).items():
                np.testing.assert_allclose(session.buffers[name], value, atol=2e-3)
    assert seen.keys() == {
        f"{s}/{b}-float32" for s in ("camera", "lift") for b in ("openvino", "onnxruntime")
    }
    for name, inputs in seen.items():
        for tensor, value in inputs.items():
            expected = want[tensor][:1] if name.startswith("camera") else want[tensor]
            np.testing.assert_allclose(value, expected, atol=2e-3, err_msg=f"{name} {tensor}")

    monkeypatch.setattr(tuning, "race", lambda *_: pytest.fail("timed again"))
    with load(choice, threads=1) as engine:
        assert engine.variants["camera"].backend == "openvino" and "recorded" in engine.why["camera"]
    with load(choice, threads=1, variant="onnxruntime-float32") as engine:
        assert {v.backend for v in engine.variants.values()} == {"onnxruntime"}
    with load(choice, threads=1, tune=False) as engine:
        assert engine.variants["camera"].backend == "onnxruntime", "the first of the bundle"


def test_a_variant_that_computes_something_else_is_not_used(
    choice: Path, tmp_path: Path, cache: Path
) -> None:
    """The payload of another network of the same inputs and outputs, behind a sound one."""
    import onnx

    files = files_of(choice)
    name = "segments/camera/openvino-float32.onnx"
    model = onnx.load_from_string(files[name])
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim == 4:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[::-1]), tensor.name))
    bad = replace_file(choice, tmp_path / "bad.edge", name, model.SerializeToString())
    with load(bad, threads=1) as engine:
        assert engine.variants["camera"].backend == "onnxruntime"
        assert "self-test" in engine.refused["camera/openvino-float32"]


def test_edgekit_tune(choice: Path, cache: Path) -> None:
    table = variants.tune(choice, threads=1, rounds=2)
    assert [row["segment"] for row in table["segments"]] == list(SEGMENTS)
    assert len(table["segments"][0]["variants"]) == 2 and table["record"]


# --- what is left -------------------------------------------------------------------------------


def test_engines_leave_nothing_behind(bundle: Path) -> None:
    load(bundle, threads=1).close()
    threads = threading.active_count()

    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count(str(bundle))

    for _ in range(3):
        with load(bundle, threads=1) as engine, engine.session() as session:
            put(session, feed(frame()))
            session.run()
            future = steps.prefetch(
                session.executables["pool"],
                session.inputs["intrinsics"],
                session.inputs["camera_to_lidar"] + 0,
            )
            future.result(30)
        del engine, session, future
    assert not [t for t in threading.enumerate() if t.name.startswith("edgekit-plan")]
    assert threading.active_count() <= threads + 1  # a table's thread may be ending
    assert mapped() == 0
