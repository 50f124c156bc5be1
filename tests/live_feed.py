"""Drives a live page without a camera: street pictures with their exact labels, and faults on demand.

`python -m tests.live_feed --address :8080 --cameras 2 --seconds 600 --faults` shows it in a browser.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame, Hop
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import Sink
from edgekit.synth.gestures import EVENT, GESTURES, GestureWorld
from edgekit.synth.street import CLASSES, StreetWorld
from edgekit.tasks.classify.classification import Classification
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.video.pipeline import VideoPipeline
from edgekit.tasks.video.result import VideoResult
from edgekit.tasks.video.spec import VideoSpec
from tests.video_bundles import RULE, Script

STAGES = {"transport": 4.1, "wait": 2.2, "preprocess": 1.4, "engine": 24.6, "decode": 0.5}
"""Invented, milliseconds: for looks, never for a table."""


class Feed:
    """Results as a stream would give them, with metrics to match."""

    def __init__(
        self, sinks: Sequence[Sink], cameras: int = 1, size: tuple[int, int] = (640, 360), pictures: int = 24
    ):
        self.metrics = Metrics()
        self.sinks = list(sinks)
        self.names = ["front", "left", "right", "rear"][:cameras]
        self.silent: set[int] = set()
        """Cameras that give no frames just now."""
        self.random = random.Random(7)
        self.worlds: list[Any] = []
        self.watchers: dict[int, VideoPipeline] = {}
        """Task video: by camera, with outputs that are written down."""
        for seed in range(cameras):
            world = StreetWorld(seed + 3, *size)
            self.worlds.append([world.frame(3 * i) for i in range(pictures)])
        for sink in self.sinks:
            sink.start(self.metrics)
        self.metrics.engine_facts(
            "",
            {"bundle": "street.host.edge", "task": "detect", "library": "onnxruntime", "precision": "int8"},
        )

    def frame(self, camera: int, seq: int, age_ms: float = 0) -> Frame:
        picture = self.worlds[camera][seq % len(self.worlds[camera])]
        now = time.monotonic_ns()
        taken = now - int(age_ms * 1e6)
        name = self.names[camera]
        source = f"v4l2:/dev/video{camera}"
        return Frame(Pixels.bgr(picture.image), seq, taken, now, source, clock="monotonic", camera=name)

    def item(self, camera: int, seq: int, task: str = "detect") -> StreamResult:
        stages = {name: int(1e6 * ms * self.random.lognormvariate(0, 0.12)) for name, ms in STAGES.items()}
        if self.random.random() < 0.02:
            stages["wait"] += int(22e6 * self.random.random())
        age = sum(stages.values()) + self.random.randrange(50_000, 250_000)
        frame = self.frame(camera, seq, age / 1e6)
        picture = self.worlds[camera][seq % len(self.worlds[camera])]
        hops = (
            Hop("camera buffer", "driver"),
            Hop("letterbox", "CPU", written=3 * 416 * 416),
            Hop("engine input", "CPU"),
        )
        self.metrics.frame(frame.camera, frame)
        found = self.watched(camera, frame) if task == "video" else result(picture, task)
        return StreamResult(frame, found, age, stages, "", hops)

    def watched(self, camera: int, frame: Frame) -> VideoResult:
        """A motion of the synthetic gestures each 2.4 s, as a network would see it that is hardly ever wrong."""
        if camera not in self.watchers:
            spec = VideoSpec(RULE, "logits", GESTURES, dt_s=0.1, background=GESTURES[0], stepping="plain")
            world, rng = GestureWorld(camera), np.random.default_rng(camera)

            def logits(run: int) -> np.ndarray:
                event = world.event((run // 3) // EVENT)  # 30 frames a second, 10 of the world's
                row = rng.normal(0, 0.8, len(GESTURES))
                row[event.label if event.start <= run // 3 < event.stop else 0] += 6
                return row

            self.watchers[camera] = VideoPipeline(spec, Script(logits, len(GESTURES)))
        return self.watchers[camera](frame.pixels, taken_ns=frame.taken_ns)

    def step(self, camera: int, seq: int, task: str = "detect") -> StreamResult:
        item = self.item(camera, seq, task)
        if self.random.random() < 0.06:
            self.metrics.drop(item.camera, "superseded")
        self.metrics.result(item)
        for sink in self.sinks:
            began = time.perf_counter_ns()
            sink.write(item)
            self.metrics.sink_wrote(str(sink.path), time.perf_counter_ns() - began)
        return item

    def run(
        self,
        stop: threading.Event,
        seconds: float,
        fps: float = 30,
        faults: bool = False,
        task: str = "detect",
    ) -> None:
        """At `fps` until `stop`. faults: some of each kind, and the last camera is lost for some seconds."""
        lost_at, back_at = 6.0, 14.0
        last = len(self.names) - 1
        for tick in ticks(stop, seconds, fps):
            now = tick / fps
            if faults and abs(now - lost_at) < 0.5 / fps:
                self.metrics.fault(self.names[last], "lost", "VIDIOC_DQBUF: No such device")
                self.metrics.camera_state(self.names[last], "lost")
            if faults and abs(now - back_at) < 0.5 / fps:
                self.metrics.restarted(self.names[last], "after 8.0 s, epoch 1")
            if faults and tick in (40, 90):
                self.metrics.fault(self.names[0], "corrupt", f"frame {tick}: V4L2_BUF_FLAG_ERROR")
                self.metrics.drop(self.names[0], "corrupt")
            if faults and tick == 120:
                self.metrics.fault(self.names[0], "dropped", "3 frames missing before 120")
                self.metrics.drop(self.names[0], "driver", 3)
            for camera in range(len(self.names)):
                if camera not in self.silent and not (faults and camera == last and lost_at <= now < back_at):
                    self.step(camera, tick, task)


def ticks(stop: threading.Event, seconds: float, fps: float) -> Iterator[int]:
    began = time.monotonic()
    for tick in range(int(seconds * fps)):
        if stop.wait(max(0.0, began + tick / fps - time.monotonic())):
            return
        yield tick


def result(picture: object, task: str) -> object:
    if task == "classify":
        scores = np.array([0.81, 0.09, 0.04, 0.02, 0.01], np.float32)
        return Classification(np.arange(5, dtype=np.int32), scores, scores, CLASSES)
    boxes, classes = picture.boxes, picture.classes  # type: ignore[attr-defined]
    order = np.argsort(-((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])), kind="stable")
    scores = np.linspace(0.97, 0.46, len(order)).astype(np.float32)
    return Detections(boxes[order].astype(np.float32), scores, classes[order].astype(np.int32), CLASSES)


def main() -> None:
    from edgekit.runtime.sinks import open_sink

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default=":8080")
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--fps", type=float, default=30)
    parser.add_argument("--task", default="detect")
    parser.add_argument("--faults", action="store_true")
    options = parser.parse_args()
    with open_sink(f"view:{options.address}") as sink:
        feed = Feed([sink], options.cameras)
        print(getattr(sink, "url", ""), flush=True)
        feed.run(threading.Event(), options.seconds, options.fps, options.faults, options.task)


if __name__ == "__main__":
    main()
