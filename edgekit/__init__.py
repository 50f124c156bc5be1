"""edgekit puts trained vision models on edge devices.

    bundle = edgekit.build("model.onnx", "jetson-orin")     # workstation: pip install edgekit[build]
    engine = edgekit.load("model.jetson-orin.edge")         # device
    detections = engine.predict(image)

    for item in edgekit.stream("model.jetson-orin.edge", "v4l2:/dev/video0"):   # live, the newest frame each time
        print(item.age_ms, item.result)

Names load on first use, so that `import edgekit` costs nothing and the device never imports the toolchain.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it as true; importing `typing` would be most of the start-up time

__version__ = "0.1.0"

_HOMES = {
    "app_bundle": "edgekit.toolchain.api",
    "build": "edgekit.toolchain.api",
    "compress": "edgekit.toolchain.api",
    "load": "edgekit.runtime.engine",
    "open_source": "edgekit.runtime.sources",
    "stream": "edgekit.runtime.stream",
    "Stream": "edgekit.runtime.stream",
    "StreamResult": "edgekit.runtime.results",
    "Frame": "edgekit.runtime.frames",
    "Pixels": "edgekit.pixels",
    "Bundle": "edgekit.bundle",
    "Classification": "edgekit.tasks.classify.classification",
    "Detections": "edgekit.tasks.detect.detections",
    "EdgekitError": "edgekit.errors",
    "Engine": "edgekit.runtime.engine",
    "Session": "edgekit.runtime.session",
    "Target": "edgekit.target",
}

__all__ = [
    "Bundle",
    "Classification",
    "Detections",
    "EdgekitError",
    "Engine",
    "Frame",
    "Pixels",
    "Session",
    "Stream",
    "StreamResult",
    "Target",
    "app_bundle",
    "build",
    "compress",
    "load",
    "open_source",
    "stream",
]

if TYPE_CHECKING:
    from typing import Any

    from edgekit.bundle import Bundle
    from edgekit.errors import EdgekitError
    from edgekit.pixels import Pixels
    from edgekit.runtime.engine import Engine, load
    from edgekit.runtime.frames import Frame
    from edgekit.runtime.results import StreamResult
    from edgekit.runtime.session import Session
    from edgekit.runtime.sources import open_source
    from edgekit.runtime.stream import Stream, stream
    from edgekit.target import Target
    from edgekit.tasks.classify.classification import Classification
    from edgekit.tasks.detect.detections import Detections
    from edgekit.toolchain.api import app_bundle, build, compress


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'edgekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
