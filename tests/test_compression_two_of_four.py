"""2:4 sparse weights on the way to a Jetson: no repair and no pass breaks the pattern, the payload's plan says which layers
have it, and TensorRT's builder is told."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import passes
from edgekit.backends.tensorrt.compile import _configure
from edgekit.backends.tensorrt.lower import lower
from edgekit.backends.tensorrt.plan import BuildPlan
from edgekit.bundle import Bundle, write_bundle
from edgekit.cli import inspect
from edgekit.compression.methods import nm
from edgekit.compression.shapes_problem import ShapesNet, shapes_problem
from edgekit.compression.work import begin
from edgekit.frontends import onnx as frontend
from edgekit.manifest import Segment
from edgekit.passes.graph import constant
from edgekit.quant import search, sparsity
from edgekit.quant.calibrate import calibrate
from edgekit.quant.placement import Choices, place
from edgekit.quant.repair import adaround, bias_correction, split_channels
from edgekit.quant.rules import rules_for
from edgekit.target import Target
from tests import fake_tensorrt
from tests.bundle_samples import EVIDENCE, sample
from tests.quant_graphs import unmeasured
from tests.sparse_graphs import PADS, SHAPE, folded, network, pictures, stored, two_of_four
from tests.tensorrt_graphs import graph

ORIN = Target.load("jetson-orin")
TRT = rules_for("tensorrt", ORIN)


def test_every_layer_is_judged() -> None:
    found = {row.id: row for row in sparsity.layers(network(dense=("w2",)))}
    reasons = {name: row.reason for name, row in found.items()}
    assert sorted(reasons.values()) == ["", "", "dense"]
    assert [row.zeros for row in found.values() if row.sparse] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("body", "shape", "reason"),
    [
        ("y = Conv <group=4> (x, w)", (16, 4, 1, 1), "it has groups"),
        ("y = ConvTranspose (x, w)", (16, 16, 1, 1), "a transposed convolution"),
        ("s = Slice(x, i0, i6, i1) \n y = Conv (s, w)", (16, 6, 1, 1), "6 input channels do not divide by 4"),
        ("y = Conv (x, w)", (16, 16, 1, 1), "all its weights are zero"),
        ("w2 = Relu(w) \n y = Conv (x, w2)", (16, 16, 1, 1), "its weight is computed"),
    ],
)
def test_layers_that_cannot_be_sparse(body: str, shape: tuple[int, ...], reason: str) -> None:
    picks = {f"i{i}": np.array([i]) for i in (0, 1, 6)}
    made = graph(body, {"x": SHAPE}, {"y": SHAPE}, {"w": np.zeros(shape, np.float32), **picks}, opset=19)
    (row,) = sparsity.layers(ir.from_proto(made))
    assert (row.sparse, row.reason) == (False, reason)


@pytest.mark.parametrize(
    ("body", "axis"),
    [("y = MatMul(x, w)", 0), ("y = Gemm(x, w)", 0), ("y = Gemm <transB=1> (x, w)", 1)],
)
def test_products_are_sparse_along_what_they_sum(body: str, axis: int) -> None:
    weights = two_of_four(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32))
    for at in (0, 1):
        numbers = weights if at == 1 else weights.T.copy()
        made = graph(body, {"x": (3, 8)}, {"y": (3, 8)}, {"w": numbers}, opset=19)
        (row,) = sparsity.layers(ir.from_proto(made))
        assert row.sparse == (at == axis)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 999), st.booleans())
def test_adaround_leaves_zeros_alone(seed: int, compensate: bool) -> None:
    """Also where it moves weights against the error of their inputs."""
    model = folded(network(seed))
    feeds = pictures(3, seed)
    placed = place(model, calibrate(model, feeds), TRT, Choices(scheme="minmax"))
    after = adaround.run(placed, model, feeds, compensate=compensate)
    rows = sparsity.layers(after)
    assert len(rows) == 3
    assert all(row.sparse for row in rows)


def test_what_is_compensated_solves_the_system_of_the_weights_that_are_free() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 12))
    h, right, free = x.T @ x / 40, rng.standard_normal((3, 12)), rng.random((3, 12)) < 0.5
    found = adaround._conjugate_gradients(h, 0.3, right, free)
    assert not found[~free].any()
    for row, r, f in zip(found, right, free, strict=True):
        np.testing.assert_allclose(
            row[f], np.linalg.solve((h + 0.3 * np.eye(12))[np.ix_(f, f)], r[f]), rtol=1e-3
        )


def test_channels_of_a_sparse_reader_are_not_split() -> None:
    """Whose fours would be others afterwards; a dense reader's are."""
    feeds = pictures(3)
    for dense, expected in ((("w2", "w3"), 1), ((), 0)):
        arrays = network(0, loud=40, dense=dense)
        body = f"a = Conv {PADS} (x, w1, b1) \n r = Relu(a) \n y = Conv {PADS} (r, w2, b2)"
        numbers = {
            n: constant(v) for n, v in arrays.graph.initializers.items() if n[0] in "wb" and n[1] < "3"
        }
        made = graph(body, {"x": SHAPE}, {"y": SHAPE}, numbers, opset=19)
        model = ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True))
        placed = place(model, calibrate(model, feeds), TRT, Choices(scheme="minmax"))
        assert len(split_channels.plan(placed, model, feeds, granularity=32)) == expected


def problem(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> search.Problem:
    def restat(changed: ir.Model, names: object) -> dict:
        return dict(calibrate(changed, feeds, only=set(names)))  # type: ignore[call-overload]

    gate: Callable[[ir.Model], search.Look] = lambda _: search.Look(False, 0.1, 0.4, "never enough")  # noqa: E731
    return search.Problem(model, calibrate(model, feeds), TRT, feeds[:4], feeds[4:], restat, gate)


@pytest.mark.parametrize("loud", [1.0, 100.0])
def test_the_whole_search_keeps_the_pattern(loud: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm folded, ranges, equalization, every repair, on to the payload's codes."""
    monkeypatch.setattr(search, "CLEARLY", -10.0)  # keep every step, also those that gain nothing
    monkeypatch.setattr(search, "ISLANDS", ())
    monkeypatch.setattr(search, "NOISY", 10.0 if loud == 1 else 0.0)  # adaround, or its compensating form
    model = folded(network(2, loud))
    feeds = pictures(6)
    found = search.search(problem(model, feeds), lambda *_: None)
    kept = " ".join(found.steps)
    assert ("adaround, compensating" if loud > 1 else "adaround") in kept
    assert loud == 1 or "equalize" in kept
    (payload,) = lower(found.model, ORIN, "int8")
    weights = stored(payload)
    assert len(weights) == 3
    assert all(w.dtype == np.int8 and sparsity.holds(w) and w.any() for w in weights)
    plan = BuildPlan.from_options(dict(payload.options))
    assert plan.sparse_weights
    assert plan.sparse is not None and len(plan.sparse.layers) == 3 and not plan.sparse.dense


def test_bias_correction_keeps_weights() -> None:
    model = folded(network(4))
    feeds = pictures(3)
    placed = place(model, calibrate(model, feeds), TRT, Choices(scheme="minmax"))
    assert all(row.sparse for row in sparsity.layers(bias_correction.run(placed, model, feeds, share=0.0)))


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_the_plan_says_which_layers_are_sparse(precision: str) -> None:
    model = folded(network(dense=("w2",)))
    (payload,) = lower(unmeasured(model, TRT) if precision == "int8" else model, ORIN, precision)
    plan = BuildPlan.from_options(json.loads(json.dumps(payload.options)))
    assert plan.sparse_weights
    assert plan.sparse is not None
    assert plan.sparse.pattern == "2:4"
    assert len(plan.sparse.layers) == 2
    assert list(plan.sparse.dense.values()) == ["dense"]
    assert [sparsity.holds(w) for w in stored(payload)] == [True, False, True]


def test_dense_networks_and_gpus_without_sparse_cores_get_no_flag() -> None:
    dense = network(dense=("w1", "w2", "w3"))
    (payload,) = lower(dense, ORIN, "float16")
    plan = BuildPlan.from_options(dict(payload.options))
    assert (plan.sparse_weights, plan.sparse) == (False, None)
    assert "sparse" not in payload.options["plan"], "plans of dense networks are as they were"
    assert ORIN.gpu is not None
    old = replace(ORIN, gpu=replace(ORIN.gpu, sparse_2_4=False))
    (payload,) = lower(network(), old, "float16")
    assert not BuildPlan.from_options(dict(payload.options)).sparse_weights


def test_from_torch_to_the_payload(tmp_path: Path) -> None:
    """Method, export with BatchNorms folded, every pass, repairs, codes."""
    net = ShapesNet(width=0.5)
    given = shapes_problem(net, train=64, test=10)
    work = begin(given)
    nm.run(work, nm.Options(pattern="2:4", scheme="maxq", steps=2))
    given.write(work.model, tmp_path / "net.onnx")
    model, _ = passes.run_passes(frontend.load(tmp_path / "net.onnx"), passes.names())
    feeds = [{"images": given.batch(i)[0][:1].numpy()} for i in range(6)]
    placed = place(model, calibrate(model, feeds), TRT, Choices())
    placed = adaround.run(placed, model, feeds[:2], compensate=True)
    (payload,) = lower(placed, ORIN, "int8")
    assert [sparsity.holds(w) for w in stored(payload)[1:]] == [True, True, True]
    sparse = BuildPlan.from_options(dict(payload.options)).sparse
    assert sparse is not None
    assert len(sparse.layers) == 3
    assert set(sparse.dense.values()) == {
        "3 input channels do not divide by 4",
        "dense",
    }  # the first, and the head


@pytest.mark.parametrize("told", [False, True])
def test_the_builder_is_told(told: bool) -> None:
    trt = fake_tensorrt.make_tensorrt(fake_tensorrt.Machine())
    config = trt.Builder.create_builder_config(None)
    (payload,) = lower(network(dense=() if told else ("w1", "w2", "w3")), ORIN, "float16")
    _configure(trt, config, BuildPlan.from_options(dict(payload.options)), None)
    assert ("SPARSE_WEIGHTS" in config.flags) == told


def test_inspect_says_which_layers_are_sparse(tmp_path: Path) -> None:
    (payload,) = lower(network(dense=("w2",)), ORIN, "float16")
    manifest, files = sample()
    last = manifest.plan[-1]
    assert isinstance(last, Segment)
    (variant,) = last.variants
    manifest = replace(
        manifest,
        plan=(*manifest.plan[:-1], replace(last, variants=(replace(variant, options=payload.options),))),
    )
    path = tmp_path / "x.edge"
    write_bundle(path, manifest, files, EVIDENCE)
    page = io.StringIO()
    with Bundle.open(path) as bundle:
        inspect.print_human(bundle, page)
    section = page.getvalue().split("2:4 sparse weights\n")[1].split("\n\n")[0]
    assert re.search(r"head/fp16.onnx +2 of 3 layers +\w+, \w+\n +1 not: dense +\w+$", section), section
