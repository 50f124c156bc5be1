"""A rig's stream into every kind of file: a real plan with random weights, whole moments and sensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest

import edgekit
from edgekit.runtime.engine import Engine
from edgekit.runtime.sinks import open_sink
from tests import bevfusion_nets as nets
from tests import fusion_plans as plans

pytest.importorskip("mcap", reason="needs the package mcap (edgekit[mcap])")
from mcap.reader import make_reader

NAMES = (*nets.TINY.camera.names, "lidar")
WHOLE = "synthetic://street-rig?seed=3&size=128x72&frames=3"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    bundle = plans.write(tmp_path_factory.mktemp("rig") / "tiny.host.edge", tolerance=1e-3)
    with edgekit.load(bundle, threads=1, self_test=False) as loaded:
        yield loaded


@pytest.mark.parametrize("apart", [False, True])
def test_every_file_is_written(engine: Engine, tmp_path: Path, apart: bool) -> None:
    source = {name: f"{WHOLE}&sensor={name}" for name in NAMES} if apart else WHOLE
    places = ["a.jsonl", "a.mcap?images=jpeg", "pictures/", "a.mp4"]
    sinks = [open_sink(f"{tmp_path}/{place}", fps=10) for place in places]
    with edgekit.stream(engine, source, sinks=sinks, score_threshold=0.02) as stream:
        items = [(item.result.to_json(), dict(item.missing)) for item in stream]
    assert len(items) == 3
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["boxes"] for line in lines] == [found["boxes"] for found, _ in items]
    assert all(len(line["boxes"][0]) == 9 for line in lines)
    with (tmp_path / "a.mcap").open("rb") as file:
        topics = [channel.topic for _, channel, _ in make_reader(file).iter_messages()]
    (rig,) = {topic.split("/")[1] for topic in topics if topic.endswith("/lidar/points")}
    for name in (
        "CAM_FRONT/image",
        "CAM_FRONT/calibration",
        "CAM_FRONT/tiny/annotations",
        "lidar/points",
        "tiny/boxes",
    ):
        assert topics.count(f"/{rig}/{name}") == 3, name
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert len(pictures) == 3
    shown = cv2.imread(str(pictures[0]))
    assert shown.shape[1] > 3 * 128, "all cameras, and the view from above beside them"
    assert shown.std() > 20
    video = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    video.release()
