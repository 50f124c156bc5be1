"""A fusion engine without a network, and sensors of a rig as live sources, for tests of streams."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from edgekit.bundle import Bundle
from edgekit.errors import StreamError
from edgekit.pixels import Pixels
from edgekit.rig import RigFrame
from edgekit.runtime.engine import Engine
from edgekit.synth.street_rig import street_rig
from edgekit.tasks.fusion.boxes import no_boxes

RIG = street_rig(3, 64, 64)
CAMERAS = tuple(RIG.cameras)
SENSORS = (*CAMERAS, "lidar")


class Double:
    """A pipeline of the task fusion that takes time and remembers what it was given."""

    takes_rigs = True

    def __init__(
        self, camera_s: float = 0.0, finish_s: float = 0.0, cameras: tuple[str, ...] = CAMERAS
    ) -> None:
        self.spec = SimpleNamespace(cameras=cameras)
        self.session = SimpleNamespace(inputs={}, close=self._close)
        self.camera_s, self.finish_s = camera_s, finish_s
        self.stage_ns = (0, 0, 0)
        self.moments: list[RigFrame] = []
        self.given: list[dict[str, tuple[int, str]]] = []
        self.cameras: Counter[str] = Counter()
        self.prepared: list[str] = []
        self.wholes = 0
        self.closed = False
        self.threads: set[int] = set()

    def _close(self) -> None:
        self.closed = True

    def camera(self, name, picture):
        if self.closed:
            raise StreamError("session: closed")
        assert isinstance(picture, Pixels)
        time.sleep(self.camera_s)
        self.threads.add(threading.get_ident())
        self.cameras[name] += 1
        total = int(picture.planes[0].sum()) if picture.layout.format == "bgr" else -1
        return id(self), name, total

    def finish(self, moment, seen, *, score_threshold=None):
        if self.closed:
            raise StreamError("session: closed")
        begun = time.perf_counter_ns()
        for name, (whose, camera, total) in seen.items():
            assert whose == id(self) and camera == name
            assert total == -1 or total == int(moment.shots[name].image.sum())
        time.sleep(self.finish_s)
        self.moments.append(moment)
        self.given.append(dict(seen))
        missing = tuple(n for n in self.spec.cameras if n not in moment.shots)
        missing += ("lidar",) if moment.points is None else ()
        self.stage_ns = (0, time.perf_counter_ns() - begun, 0)
        return no_boxes(("car",), missing, moment.taken_ns)

    def __call__(self, frame, *, score_threshold=None, taken_ns=None, epoch=0):
        self.wholes += 1
        seen = {name: (id(self), name, int(shot.image.sum())) for name, shot in frame.shots.items()}
        return self.finish(frame, seen)

    def prepare(self, rig):
        self.prepared.append(rig.digest())


class _Named(Bundle):
    """A bundle that is a name."""

    def __init__(self, path: Path) -> None:
        self.path = path


class DoubleEngine(Engine):
    """Gives `Double`s; nothing is loaded."""

    def __init__(self, name: str = "fusion", **options) -> None:
        self.bundle = _Named(Path(f"{name}.host.edge"))
        self.manifest = SimpleNamespace(task="fusion", pipeline={})
        self.options = options
        self.opened: list[Double] = []
        self.variants, self.refused, self.why = {}, {}, {}
        self._executables = {}

    def pipeline(self, *, stepping=None):
        self.opened.append(Double(**self.options))
        return self.opened[-1]

    def describe(self):
        return {}

    def close(self):
        pass


def sensor(name: str, frames: int = 0, fps: float = 20, loop: int = 3, plan: str = "", live: int = 1) -> str:
    """A sensor of the synthetic rig as a camera of its own, with faults of `plan`."""
    uri = f"synthetic://street-rig?seed=3&size=64x64&sensor={name}&fps={fps:g}"
    uri += f"&live=1&frames={frames}&loop={loop}" if live else f"&frames={frames}"
    return f"faulty:{plan}|{uri}" if plan else uri


def sensors(names=SENSORS, plans=None, **options) -> dict[str, str]:
    return {name: sensor(name, plan=(plans or {}).get(name, ""), **options) for name in names}


def points_of(moment: RigFrame) -> int:
    return 0 if moment.points is None else len(moment.points)


def same_motion(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.allclose(a, b, atol=1e-6))
