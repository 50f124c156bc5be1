"""Networks that watch a stream, in a stream: time and state of every camera, what is counted, and what sinks show."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import edgekit
from edgekit.errors import BundleError, UsageError
from edgekit.pixels import Pixels
from edgekit.runtime.engine import Engine
from edgekit.runtime.frames import Frame
from edgekit.runtime.sinks import open_sink
from edgekit.runtime.sinks.live.picture import NOTHING, describe
from edgekit.runtime.sources.iterator import IteratorSource, PushSource
from edgekit.tasks.classify.spec import ClassifySpec
from edgekit.tasks.video.result import VideoResult
from tests import video_bundles
from tests.cli_runs import cli

pytestmark = pytest.mark.usefixtures("_no_thread_stays")

MS = 1_000_000
Moments = Sequence[tuple[int, int]]
"""(taken, milliseconds; epoch)"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for 0.1 s a step; a gap of more than 0.5 s ends state."""
    return video_bundles.write(tmp_path_factory.mktemp("video") / "watch.edge")


@pytest.fixture
def engine(bundle: Path) -> Iterator[Engine]:
    with edgekit.load(bundle, threads=1) as loaded:
        yield loaded


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 32, 3), np.uint8)


def frames(moments: Moments, seed: int = 0) -> list[Frame]:
    """As a camera's driver stamps them. They arrive at once: arrival tells nothing."""
    return [
        Frame(Pixels.bgr(image), i, ms * MS, time.monotonic_ns(), "cam", clock="monotonic", epoch=epoch)
        for i, (image, (ms, epoch)) in enumerate(zip(images(len(moments), seed), moments, strict=True))
    ]


def direct(engine: Engine, moments: Moments, seed: int = 0, **options: Any) -> list[VideoResult]:
    pipeline = engine.pipeline(**options)
    return [
        pipeline(image, taken_ns=ms * MS, epoch=epoch)
        for image, (ms, epoch) in zip(images(len(moments), seed), moments, strict=True)
    ]


def same(first: VideoResult, second: VideoResult) -> bool:
    return (
        first.logits.tobytes() == second.logits.tobytes()
        and first.all_scores.tobytes() == second.all_scores.tobytes()
        and first.to_json() == second.to_json()
    )


BROKEN: Moments = [
    (0, 0), (100, 0), (133, 0), (400, 0), (500, 1), (600, 1), (1400, 1), (1300, 1), (1400, 1),
]  # fmt: skip
"""An early frame; two missing; a reconnect; a gap; the clock goes back."""


def test_a_stream_goes_by_the_time_of_its_frames(engine: Engine) -> None:
    with edgekit.stream(engine, IteratorSource(frames(BROKEN))) as stream:
        results = [item.result for item in stream]
    wanted = direct(engine, BROKEN)
    assert all(map(same, results, wanted))
    assert [r.steps for r in results] == [1, 1, 0, 3, 1, 1, 1, 1, 1]
    assert [bool(r.reset) for r in results] == [False, False, False, False, True, False, True, True, False]
    counted = stream.metrics.snapshot()["engines"]["watch"]
    assert counted["resets"] == {"iterator": 3}
    assert (counted["early_frames"], counted["missed_steps"]) == (1, 0)


@pytest.mark.parametrize(
    ("stepping", "steps", "resets", "early", "missed"),
    [
        ("plain", [1] * 9, 3, 0, 2),
        ("hold", [1, 1, 0, 1, 1, 1, 1, 1, 1], 3, 1, 2),
        ("resample", [1, 1, 0, 3, 1, 1, 1, 1, 1], 3, 1, 0),
        ("reset", [1, 1, 0, 1, 1, 1, 1, 1, 1], 4, 1, 2),
    ],
)
def test_stepping_is_an_option_of_the_stream(
    engine: Engine, stepping: Any, steps: list[int], resets: int, early: int, missed: int
) -> None:
    with edgekit.stream(engine, IteratorSource(frames(BROKEN)), stepping=stepping) as stream:
        results = [item.result for item in stream]
    assert [r.steps for r in results] == steps
    assert all(map(same, results, direct(engine, BROKEN, stepping=stepping)))
    counted = stream.metrics.snapshot()["engines"]["watch"]
    assert counted["resets"] == {"iterator": resets}
    assert (counted["early_frames"], counted["missed_steps"]) == (early, missed)


def test_every_camera_has_a_state_of_its_own(engine: Engine) -> None:
    moments: list[Moments] = [[(i * 100, 0) for i in range(12)], [(7 + i * 100, i // 5) for i in range(9)]]
    sources = {f"cam{k}": IteratorSource(frames(m, seed=k)) for k, m in enumerate(moments)}
    found: dict[str, list[VideoResult]] = {name: [] for name in sources}
    with edgekit.stream(engine, sources, policy="block") as stream:
        for item in stream:
            found[item.camera].append(item.result)
    for k, m in enumerate(moments):
        assert all(map(same, found[f"cam{k}"], direct(engine, m, seed=k)))
        assert len(found[f"cam{k}"]) == len(m)
    assert stream.metrics.snapshot()["engines"]["watch"]["resets"] == {"cam1": 1}


def test_two_engines_keep_two_states(engine: Engine, bundle: Path) -> None:
    moments: Moments = [(i * 100, 0) for i in range(6)]
    with edgekit.load(bundle, threads=1) as other:
        engines = {"a": engine, "b": other}
        with edgekit.stream(engines, IteratorSource(frames(moments)), policy="block") as stream:
            found = [(item.engine, item.result) for item in stream]
    wanted = direct(engine, moments)
    for name in engines:
        assert all(map(same, [r for n, r in found if n == name], wanted))


def test_a_file_goes_by_its_own_time_and_pictures_are_steps(engine: Engine) -> None:
    """However fast they are read."""
    fast = IteratorSource(list(images(9)), fps=30)
    with edgekit.stream(engine, fast) as stream:
        assert [item.result.steps for item in stream] == [1, 0, 1, 0, 0, 1, 0, 0, 1]
    with edgekit.stream(engine, IteratorSource(list(images(4)))) as stream:
        results = [item.result for item in stream]
    assert [r.steps for r in results] == [1] * 4
    assert [r.taken_ns for r in results] == [0, 100 * MS, 200 * MS, 300 * MS]


def test_a_live_source_without_a_clock_goes_by_arrival(engine: Engine) -> None:
    camera = PushSource("cam")
    with edgekit.stream(engine, camera, policy="block", stepping="plain") as stream:
        taken = []
        for image in images(3):
            camera.push(image)
            item = next(stream)
            taken.append((item.result.taken_ns, item.frame.captured_ns))
    assert all(a == b for a, b in taken)


def test_what_cannot_be_is_said_at_once(engine: Engine, host_bundle: str) -> None:
    with pytest.raises(UsageError, match="stepping 'fast': unknown"):
        edgekit.stream(engine, IteratorSource([]), stepping="fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="keeps no state"):
        edgekit.stream(host_bundle, IteratorSource([]), stepping="hold")


# --- the command line ----------------------------------------------------------------------------


def test_run_prints_resets_and_early_frames(bundle: Path, tmp_path: Path) -> None:
    lines = tmp_path / "out.jsonl"
    ran = cli("run", bundle, "--source", "synthetic://gestures?frames=10&fps=20&size=64x64", "--sink", lines)
    assert ran.code == 0, ran
    assert re.search(r"^10 frames, \d+ events in ", ran.out), ran.out
    assert "watch: 4 early frames" in ran.out and "state reset" not in ran.out
    values = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [v["steps"] for v in values] == [1, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert all(len(v["scores"]) == 5 and v["answer"] in video_bundles.LABELS for v in values)
    ran = cli("run", bundle, "--source", "synthetic://gestures?frames=4&fps=1&size=64x64")
    assert "watch: state reset gestures 3" in ran.out
    ran = cli(
        "run", bundle, "--source", "synthetic://gestures?frames=4&fps=5&size=64x64", "--stepping", "hold"
    )
    assert "watch: 3 missed steps" in ran.out
    ran = cli(
        "run", bundle, "--source", "synthetic://gestures?frames=4&fps=5", "--stepping", "hold", "--json"
    )
    summary = json.loads(ran.out)
    assert (summary["missed_steps"], summary["early_frames"], summary["resets"]) == ({"watch": 3}, {}, {})
    assert cli("run", bundle, "--source", "x.mp4", "--stepping", "fast").code == 2


# --- sinks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shown.mp4", "shown/", "out.mcap"])
def test_sinks_take_its_results(engine: Engine, tmp_path: Path, name: str) -> None:
    moments: Moments = [(i * 100, 0) for i in range(6)]
    sink = open_sink(f"{tmp_path}/{name}", fps=10)
    with edgekit.stream(engine, IteratorSource(frames(moments)), sinks=sink) as stream:
        assert len(list(stream)) == 6
    if name.endswith(".mp4"):
        capture = cv2.VideoCapture(str(tmp_path / name))
        assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) >= 320, "enlarged to be read"
        capture.release()
    else:
        assert any(path.stat().st_size > 100 for path in tmp_path.rglob("*.*"))


def test_prometheus_counts_resets(engine: Engine) -> None:
    from edgekit.runtime.sinks.prometheus import metrics_reply

    with edgekit.stream(engine, IteratorSource(frames(BROKEN)), stepping="hold") as stream:
        for _ in stream:
            pass
    body = metrics_reply(stream.metrics).body
    text = body.decode() if isinstance(body, bytes) else b"".join(body).decode()
    assert re.search(r'^edgekit_state_resets_total\{.*camera="iterator".*\} 3$', text, re.MULTILINE), text
    assert re.search(r"^edgekit_early_frames_total\{.*\} 1$", text, re.MULTILINE)
    assert re.search(r"^edgekit_missed_steps_total\{.*\} 2$", text, re.MULTILINE)


def test_the_live_page_gets_the_last_seconds(engine: Engine) -> None:
    moments: Moments = [*((i * 100, 0) for i in range(4)), (9000, 0), (9100, 0)]
    with edgekit.stream(engine, IteratorSource(frames(moments))) as stream:
        for item in stream:
            told = describe(item)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    history = told["history"]
    assert history["seconds"] == 10 and history["answer"] in video_bundles.LABELS
    agos = [ago for ago, _, _ in history["answers"]]
    assert agos == sorted(agos, reverse=True) and agos[0] == 9.1
    assert [8.8, "", ""] in history["answers"], "where time broke nothing was seen"
    for _, label, color in history["answers"]:
        assert (color == NOTHING) == (label == "nothing") and (color == "") == (label == "")
    assert len(told["found"]) == 5 and all(thing["box"] is None for thing in told["found"])


def test_a_task_that_keeps_no_state_refuses_a_network_that_does(tmp_path: Path) -> None:
    """Its one pipeline would mix the states of all cameras."""
    spec = ClassifySpec(video_bundles.RULE, "logits", video_bundles.LABELS)
    path = video_bundles.write_as(tmp_path / "wrong.edge", "classify", spec)
    with edgekit.load(path) as engine, pytest.raises(BundleError, match="which would share it"):
        engine.pipeline()
