"""Stream equals clip: one-frame networks in bundles, frame by frame, beside the clip model they came from."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

import edgekit  # noqa: E402
from benchmarks import drops  # noqa: E402
from benchmarks import video_bundles as bundles  # noqa: E402
from edgekit import passes  # noqa: E402
from edgekit.passes import probe  # noqa: E402
from edgekit.passes.streamify import streamify  # noqa: E402
from edgekit.synth.gestures import EVENT, GestureWorld  # noqa: E402
from tests.helpers import ROOT  # noqa: E402

SIZE, FRAMES = 48, 12
NETWORKS = {"mobilenet_v2": (0.25, 10), "resnet18": (0.125, 8)}
"""Backbone -> width, states."""
BACKENDS = ("onnxruntime", "litert", "openvino")
TOLERANCE = 1e-5
"""Stream beside clip, of logits around 1, on one library."""
LIBRARIES = 1e-4
"""One library beside another one: sums in other orders, through a network of random weights."""
AGREEMENT = 0.99
APP = ROOT / "apps" / "gesture"

Network = tuple[str, ir.Model, Path, Path]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    """Backbone, its clip model of FRAMES frames, and bundles of this and of the one-frame form, with a payload
    for every library."""
    backbone = request.param
    model = bundles.settled(backbone, SIZE, NETWORKS[backbone][0], 12)
    clip = bundles.clip_of(model, SIZE, FRAMES)
    forms = {"stream": streamify(clip).model, "clip": clip}
    paths = []
    for name, graph in forms.items():
        graph = passes.prepare(graph, task="none").model
        payloads = {b: bundles.payload(graph, b, "float32", SIZE) for b in BACKENDS}
        paths.append(bundles.write(tmp_path_factory.mktemp(backbone) / f"{name}.edge", graph, payloads))
    return backbone, clip, *paths


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    """Gestures, float32 [5, FRAMES, 3, SIZE, SIZE]."""
    world = GestureWorld(3, SIZE, SIZE)
    return np.stack([bundles.normalised(world.clip(i, FRAMES)[0]) for i in (1, 3, 5, 7, 11)])


def feed(session: edgekit.Session, frame: np.ndarray) -> np.ndarray:
    np.copyto(session.inputs["image"][0], frame)
    session.run()
    return session.outputs["logits"][0].copy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_frame_by_frame_equals_the_clip(network: Network, clips: np.ndarray, backend: str) -> None:
    backbone, clip, one, whole = network
    with (
        edgekit.load(one, variant=backend, threads=1) as engine,
        edgekit.load(whole, variant=backend, threads=1) as engine_of_clips,
        engine.session() as session,
        engine_of_clips.session() as session_of_clips,
    ):
        assert len(session.states) == NETWORKS[backbone][1]
        for frames in clips:
            np.copyto(session_of_clips.inputs["clip"], frames)
            session_of_clips.run()
            want = session_of_clips.outputs["logits"]
            session.reset()
            got = np.array([feed(session, frame) for frame in frames])
            np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
            reference = probe.evaluate(clip, {"clip": frames})["logits"]
            np.testing.assert_allclose(got, reference, rtol=0, atol=LIBRARIES * np.abs(reference).max())
            # what came before matters, far more than that
            session.reset()
            assert np.abs(feed(session, frames[-1]) - want[-1]).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("count", [1, 7, 32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_streams_equal_each_alone_bit_for_bit(
    network: Network, clips: np.ndarray, backend: str, count: int
) -> None:
    length, rng = 5, random.Random(count)
    flat = clips.reshape(-1, *clips.shape[2:])
    frames = {key: flat[(np.arange(length) + key) % len(flat)] for key in range(count)}
    with edgekit.load(network[2], variant=backend, threads=1) as engine:
        alone = {}
        with engine.session() as session:
            for key in frames:
                session.reset()
                alone[key] = [feed(session, frame) for frame in frames[key]]
        turns = [key for key in frames for _ in range(length)]
        rng.shuffle(turns)
        got: dict[int, list[np.ndarray]] = {key: [] for key in frames}
        with engine.streams() as streams:
            for key in turns:
                image = frames[key][len(got[key])][None]
                got[key].append(streams.step(key, {"image": image})["logits"][0].copy())
    for key in frames:
        np.testing.assert_array_equal(np.array(got[key]), np.array(alone[key]))


# --- the shipped network in int8 ----------------------------------------------------------------


def answers(path: Path, variant: str, events: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in each frame of a stream of unseen gestures, states never reset, and the top class of the sum over
    each motion."""
    network = drops.BundleNetwork(path, variant)
    try:
        world = GestureWorld(20_000, *network.size[::-1])
        frames = [network.tensor(world.frame(i).image) for i in range(events * EVENT)]
        logits = np.array([network.step("one", frame) for frame in frames])
    finally:
        network.close()
    spans = [world.event(i) for i in range(events)]
    scores = np.exp(logits - logits.max(1, keepdims=True))
    named = np.array([logits[s.start : s.stop].sum(0).argmax() for s in spans])
    return scores / scores.sum(1, keepdims=True), named


@pytest.mark.skipif(
    not (APP / "edgekit.toml").is_file(), reason="apps/gesture is not there: it holds the trained weights"
)
def test_int8_says_what_float_says(tmp_path: Path) -> None:
    """Every INT8 payload of the shipped network over a stream of unseen gestures.

    `motions` are held to 99 %. Of all frames, 97 to 98 % agree, not the 99 % that one would want: in some 3 % of them
    the float network has two classes within 0.2 of each other (where a motion begins or ends, where the object
    changes), and noise 30 dB below the signal decides there. `decided`, the others: 99 %, give or take the search's path.
    """
    (exact,) = edgekit.build(APP, "host", precision="float32", out=tmp_path / "float", limit=24)
    (small,) = edgekit.build(APP, "host", precision="int8", out=tmp_path / "int8")
    want, named = answers(exact.path, "onnxruntime-float32", 80)
    assert len(set(named.tolist())) > 6, "one answer to everything would agree with itself"
    first, second = np.sort(want, 1)[:, :-3:-1].T
    decided = first - second > 0.2
    shares = {}
    for _, variant in small.manifest.variants():
        got, names = answers(small.path, variant.name, 80)
        same = got.argmax(1) == want.argmax(1)
        shares[variant.name] = {
            "frames": round(float(same.mean()), 4),
            "decided": round(float(same[decided].mean()), 4),
            "motions": round(float((names == named).mean()), 4),
        }
    print(f"INT8 agrees with float: {shares}; decided are {decided.mean():.1%} of the frames")
    assert shares
    assert decided.mean() > 0.95
    for share in shares.values():
        assert share["motions"] >= AGREEMENT, shares
        assert share["decided"] >= 0.98, shares
        assert share["frames"] >= 0.96, shares
