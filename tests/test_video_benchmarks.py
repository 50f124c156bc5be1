"""benchmarks/: the torch peer, cameras that lose frames, ways of stepping, and what the video benchmarks print."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import edgekit  # noqa: E402
from benchmarks import drops, video  # noqa: E402
from benchmarks import video_bundles as bundles  # noqa: E402
from benchmarks.torch_online_tsm import OnlineMobileNetV2, TorchOnline, with_weights  # noqa: E402
from edgekit.models.tsm import export_online  # noqa: E402
from edgekit.spec import DType, StateSpec  # noqa: E402
from edgekit.synth.gestures import CLIP, GESTURES, GestureWorld  # noqa: E402
from edgekit.timebase import StateClock  # noqa: E402
from tests import video_bundles as hand_made  # noqa: E402

SIZE, WIDTH = 32, 0.25


@pytest.fixture(scope="module")
def model() -> bundles.TSM:
    return bundles.settled("mobilenet_v2", SIZE, WIDTH, len(GESTURES))


@pytest.fixture(scope="module")
def onnx_file(model: bundles.TSM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("online") / "online.onnx"
    export_online(model, path, (SIZE, SIZE), nominal_dt_s=0.1)
    return path


# --- torch --------------------------------------------------------------------------------------


def test_the_torch_peer_is_the_network_of_the_demo() -> None:
    net = OnlineMobileNetV2()
    shapes = [tuple(b.shape[1:]) for b in net.buffers(224)]
    assert shapes == [
        (3, 56, 56), (4, 28, 28), (4, 28, 28), (8, 14, 14), (8, 14, 14), (8, 14, 14), (12, 14, 14), (12, 14, 14),
        (20, 7, 7), (20, 7, 7),
    ]  # fmt: skip
    assert sum(int(np.prod(s)) for s in shapes) == 27_048
    assert net.classifier.out_features == 27


def test_the_torch_peer_gives_the_rows_of_the_clip(model: bundles.TSM) -> None:
    weights = [value.double() for value in model.net.state_dict().values()]
    net = with_weights(len(GESTURES), WIDTH, weights).double()
    pictures, _ = GestureWorld(1, SIZE, SIZE).clip(3)
    clip = torch.from_numpy(bundles.normalised(pictures)).double()
    with torch.no_grad():
        want = copy.deepcopy(model).double()(clip)
        buffers = [buffer.double() for buffer in net.buffers(SIZE)]
        for image, row in zip(clip, want, strict=True):
            logits, buffers = net(image[None], buffers)
            torch.testing.assert_close(logits[0], row, rtol=0, atol=1e-9)
    assert (want[1:] - want[:-1]).abs().max() > 1e-2


def test_the_torch_peer_goes_from_picture_to_logits(model: bundles.TSM) -> None:
    net = TorchOnline(with_weights(len(GESTURES), WIDTH, list(model.net.state_dict().values())), SIZE)
    pictures, _ = GestureWorld(1, SIZE, SIZE).clip(3)
    tensors = torch.from_numpy(bundles.normalised(pictures))
    pictures = np.ascontiguousarray(pictures[..., ::-1])
    torch.testing.assert_close(net.picture(pictures[0]), tensors[:1], rtol=0, atol=1e-5)
    rows = [net(picture) for picture in pictures]
    net.reset()
    again = [net.network(net.picture(picture)) for picture in pictures]
    np.testing.assert_array_equal(rows, again)


def test_weights_of_another_network_are_refused(model: bundles.TSM) -> None:
    with pytest.raises(ValueError, match=r"MobileNetV2 x 0[.]5 with 12 classes"):
        with_weights(len(GESTURES), 2 * WIDTH, list(model.net.state_dict().values()))


# --- cameras ------------------------------------------------------------------------------------


def test_cameras_lose_what_they_say() -> None:
    found = drops.cameras(20_000, seed=3)
    assert all(np.array_equal(found[name], again) for name, again in drops.cameras(20_000, seed=3).items())
    for moments in found.values():
        assert (np.diff(moments) > 0).all()
        assert moments[0] >= 0 and moments[-1] < 20_000
    rates = {name: len(moments) / 20_000 for name, moments in found.items()}
    wanted = {
        "every frame": 1, "30% lost": 0.7, "30% lost in bursts": 0.7, "jitter": 1, "jitter, 30% lost": 0.7,
        "20 Hz": 2, "20 Hz, 30% lost": 1.4, "5 Hz": 0.5,
    }  # fmt: skip
    assert rates == pytest.approx(wanted, abs=0.03)
    runs = {}
    for name in ("30% lost", "30% lost in bursts"):
        gaps = np.diff(found[name]) - 1
        runs[name] = gaps[gaps > 0].mean()
    assert runs["30% lost"] == pytest.approx(1 / 0.7, abs=0.1)
    assert runs["30% lost in bursts"] == pytest.approx(drops.BURST, abs=0.2)
    off = found["jitter"] - np.arange(20_000)
    assert 0.38 < np.abs(off).max() <= drops.JITTER


# --- stepping -----------------------------------------------------------------------------------


class Counter:
    """A network that remembers its inputs, a number each, since the state began."""

    size = (32, 32)
    states = (StateSpec("s", DType.float32, (1,), "s", "s_next", nominal_dt_s=0.1),)

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def tensor(self, image: np.ndarray) -> np.ndarray:
        return image

    def step(self, stream: str, tensor: np.ndarray) -> np.ndarray:
        self.seen.setdefault(stream, []).append(round(float(tensor), 6))
        return np.full(len(GESTURES), len(self.seen[stream]), np.float32)

    def reset(self, stream: str) -> None:
        self.seen[stream] = []

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("way", "wanted"),
    [
        (drops.Way("plain"), [0, 1, 4, 4.4, 6]),
        (drops.Way("hold"), [0, 1, 4, 6]),
        (drops.Way("reset"), [6]),
        (drops.Way("resample", "this"), [0, 1, 4, 4, 4, 6, 6]),
        (drops.Way("resample", "last"), [0, 1, 1, 1, 4, 4, 6]),
        (drops.Way("resample", "blend"), [0, 1, 2, 3, 4, 5, 6]),
    ],
    ids=lambda value: value.name if isinstance(value, drops.Way) else "",
)
def test_what_the_network_sees_when_frames_are_missing(way: drops.Way, wanted: list[float]) -> None:
    """Frames at 0, 1, 4, 4.4 and 6 that show these numbers."""
    network = Counter()
    stepper = drops.Stepper(network, way, StateClock(0.1, 0.5), "one")
    moments = []
    for moment in (0.0, 1.0, 4.0, 4.4, 6.0):
        answer, runs = stepper.feed(moment, np.float32(moment))
        assert answer is not None
        moments += [at for at, _ in runs]
    assert network.seen["one"] == wanted
    assert moments == sorted(moments)
    stepper.feed(12.0, np.float32(12))  # after a gap that ends the state
    assert network.seen["one"] == [12]


@pytest.mark.parametrize("way", drops.WAYS, ids=lambda way: way.name)
def test_the_task_steps_in_the_same_ways(way: drops.Way, tmp_path: Path) -> None:
    """What is measured here is what a pipeline of the task `video` does."""
    path = hand_made.write(tmp_path / "net.edge", stepping=way.policy, fill=way.fill)
    rng = np.random.default_rng(2)
    network = drops.BundleNetwork(path)
    stepper = drops.Stepper(network, way, StateClock(0.1, 0.5), "one")
    with edgekit.load(path, threads=1) as engine:
        pipeline = engine.pipeline()
        for moment in (0, 1, 2, 2.4, 4.1, 5, 9, 10, 17, 17.3, 19):
            image = rng.integers(0, 256, (8, 8, 3), np.uint8)
            answer, _ = stepper.feed(moment, network.tensor(image))
            logits = pipeline(image, taken_ns=round(moment * 1e8)).logits
            np.testing.assert_allclose(logits, answer, rtol=0, atol=1e-5)
    network.close()


def test_shares_are_paired() -> None:
    right = [True] * 80 + [False] * 20
    found = drops.share(right, [True] * 90 + [False] * 10, seed=0)
    assert (found["accuracy"], found["loss"]) == (0.8, 0.1)
    low, high = found["interval95"]
    assert 0.7 < low < 0.8 < high < 0.9
    low, high = found["loss_interval95"]
    assert 0.03 < low < 0.1 < high < 0.18
    assert drops.share(right, right, seed=0)["loss_interval95"] == (0.0, 0.0)


class Oracle(Counter):
    """Answers with the pictures' brightness as the class: pictures are labels here."""

    def step(self, stream: str, tensor: np.ndarray) -> np.ndarray:
        return np.eye(len(GESTURES))[int(tensor)]


def test_motions_are_named_by_the_answers_over_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    world = GestureWorld(4, 32, 32)

    def label(moment: float) -> float:
        event = world.event(int(moment) // drops.EVENT)
        return float(event.label if event.start <= moment < event.stop else (event.label + 1) % 12)

    monkeypatch.setattr(world, "seen", label)
    for name, moments in drops.cameras(6 * drops.EVENT, seed=1).items():
        *_, right = drops.judge_events(Oracle(), world, moments, 6, 5)
        for way in ("plain", "hold"):
            assert right[way].frames == [True] * 6, (name, way)
    monkeypatch.setattr(world, "seen", lambda moment: (label(moment) + 1) % 12)
    *_, right = drops.judge_events(Oracle(), world, np.arange(6.0 * drops.EVENT), 6, 5)
    assert right["plain"].frames == right["resample blend"].runs == [False] * 6


# --- what is printed ----------------------------------------------------------------------------


def test_the_table_of_drops_is_the_same_for_a_file_and_a_bundle(
    onnx_file: Path, model: bundles.TSM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = bundles.without_shift(model, "mobilenet_v2", WIDTH)
    graph = bundles.graphs(model, plain, SIZE)["online"]
    bundle = bundles.write(
        tmp_path / "net.edge", graph, {"only": bundles.payload(graph, "onnxruntime", "float32", SIZE)}
    )
    found = []
    for path in (onnx_file, bundle):
        assert drops.main([str(path), "--events", "3", "--clips", "6"]) == 0
        ran = capsys.readouterr()
        assert "event accuracy of" in ran.err and "clip accuracy of" in ran.err
        found.append([json.loads(line) for line in ran.out.splitlines()])
    for lines in found:
        assert [line["of"] for line in lines] == ["event accuracy"] * 8 + ["clip accuracy"] * 3
        assert (lines[0]["count"], lines[8]["count"]) == (3, 6)
        assert {line["model"] for line in lines} <= {"online.onnx", "net.edge"}
        every = lines[0]
        assert len({json.dumps(every[way.name]) for way in drops.WAYS}) == 1, "no frame is missing"
        for line in lines:
            line.pop("model")
    assert found[0] == found[1]


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drops.main([str(tmp_path / "none.onnx")]) == 2
    assert "not found, expected an online .onnx or .edge file" in capsys.readouterr().err


def test_the_cost_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        video.main(["--size", "32", "--width", "0.25", "--rounds", "2", "--libraries", "litert"])
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(x["benchmark"], x.get("precision", x.get("from"))) for x in lines] == [
        ("video step", "float32"),
        ("video streams", "float32"),
        ("video step", "int8"),
        ("video streams", "int8"),
        ("video torch", "network"),
        ("video torch", "picture"),
    ]
    for line in lines[0:4:2]:
        assert line["states"] == 10
        assert line["online_to_plain"]["ratio"] > 0
        assert line["clip_to_online"]["ratio"] > 1
    assert lines[0]["state_bytes"] == 4 * lines[0]["state_elements"]
    assert all(line["streams"] == 8 and line["turns_to_batch"]["ratio"] > 0 for line in lines[1:4:2])
    assert set(lines[4]["torch_to_online"]) == {"litert float32", "litert int8"}
    assert all(line["commit"] and line["machine"]["threads"] == 1 for line in lines)


def test_forms_that_differ_are_not_timed() -> None:
    with pytest.raises(SystemExit, match=r"logits differ by .* nothing was timed"):
        video.agree("one beside the other", np.ones(3), np.array([1, 1, 1.001]))
    video.agree("the same", np.ones(3), np.ones(3))


def test_calibration_frames_carry_states(onnx_file: Path) -> None:
    from edgekit import frontends
    from edgekit.passes import probe

    graph = frontends.load(onnx_file)
    found = list(bundles.feeds(graph, SIZE)())
    assert len(found) == bundles.CALIBRATION_CLIPS * CLIP
    for i, feed in enumerate(found[: 2 * CLIP]):
        if i % CLIP == 0:
            assert not any(np.any(value) for name, value in feed.items() if name != "image")
        else:
            before = probe.evaluate(graph, found[i - 1])
            np.testing.assert_allclose(feed["state_3"], before["state_3_next"], atol=1e-5)
