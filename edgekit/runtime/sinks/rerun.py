"""`rerun:`: pictures, boxes, ages and stage times in the Rerun viewer, or in a `.rrd` file for it."""

from __future__ import annotations

import re
import time
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import MissingExtraError, OutputError, UsageError, did_you_mean, printable
from edgekit.optional import load_cv2, quiet
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import Sink, failure, make_parent
from edgekit.runtime.sinks.rerun_rig import log_rig, show_rig
from edgekit.runtime.sinks.rigs import rig_of

IMAGES = ("jpeg", "raw", "none")
QUALITY = 85
FLUSH_SECONDS, FLUSH_TIMEOUT_S = 1.0, 5.0
"""So often the library's queue is emptied, which bounds its memory; a viewer that takes longer than this has failed."""
_COLOR_MODELS = {"bgr": "BGR", "rgb": "RGB", "bgra": "BGRA", "rgba": "RGBA", "grey": "L"}
_PIXEL_FORMATS = {
    ("nv12", "limited"): "NV12",
    ("yuyv", "limited"): "YUY2",
    ("i420", "limited"): "Y_U_V12_LimitedRange",
    ("i420", "full"): "Y_U_V12_FullRange",
}


class RerunSink(Sink):
    """`rerun:` opens the viewer, `rerun:HOST:PORT` sends to one that runs, `rerun:FILE.rrd` writes a file.

    `?images=jpeg` (default: quality 85, needs OpenCV), `raw` (the camera's own bytes where Rerun knows their format,
    BT.601 even-sized; else converted to BGR) or `none`.

    Entities: `<camera>/image`, `<camera>/image/<engine>boxes` (label and score; other results as a line of text),
    `<camera>/<engine>age_ms`, `<camera>/<engine>stage/<name>_ms`; of a rig those of rerun_rig.py. Timelines: `sensor_time` (wall clock of
    this machine, when the picture was taken; cameras), `media_time` (files) and `frame` (seq).

    Raises: UsageError for unusable text; MissingExtraError without the package `rerun-sdk`; OutputError where
    the viewer cannot be started or reached, or the file not be written.
    """

    def __init__(self, text: str) -> None:
        target, _, tail = text.partition("?")
        super().__init__(Path(target or "viewer"))
        self._name = f"sink rerun:{printable(target)}"
        self._images = self._option(tail)
        self.needs_pixels = self._images != "none"
        address = re.fullmatch(r"([^/\\]*):([0-9]{1,5})", target)
        if target and not address and not target.lower().endswith(".rrd"):
            raise UsageError(
                f"{self._name}: expected nothing (opens the viewer), HOST:PORT or FILE.rrd, got {printable(target)!r}. "
                "Name the file with .rrd"
            )
        try:
            import rerun  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError:
            raise MissingExtraError("rerun-sdk", "rerun", "show results in Rerun") from None
        self._rr: Any = rerun
        self._stream: Any = rerun.RecordingStream("edgekit")
        self._flushed = time.monotonic()
        self._wall_ns = time.time_ns() - time.monotonic_ns()
        self._shown: set[str] = set()
        """Rigs that the viewer was told how to show."""
        self._is_file = bool(target and not address)
        if self._is_file:
            make_parent(self.path)
            try:  # the library tells of a file that it cannot write only in its own log
                self.path.open("wb").close()
            except OSError as error:
                raise failure(self.path, error) from None
        try:
            if address:
                self._stream.connect_grpc(f"rerun+http://{address[1] or '127.0.0.1'}:{address[2]}/proxy")
            elif target:
                self._stream.save(self.path)
            else:
                self._stream.spawn()
        except (RuntimeError, ValueError, OSError) as error:
            raise self._failed(error) from None
        self._flush()  # a viewer that is not there is told now

    def _option(self, tail: str) -> str:
        images = "jpeg"
        for part in filter(None, tail.split("&")):
            key, _, value = part.partition("=")
            if key != "images":
                raise UsageError(f"{self._name}: unknown key {key!r}. {did_you_mean(key, ('images',))}")
            images = urllib.parse.unquote(value)
        if images not in IMAGES:
            raise UsageError(f"{self._name}: images {images!r}, expected {', '.join(IMAGES)}")
        return images

    def _failed(self, error: Exception) -> OutputError:
        reason = printable(str(error).partition("\n")[0])
        step = (
            "Free some space or write elsewhere"
            if self._is_file
            else "Start the viewer with 'rerun', or write a file.rrd"
        )
        return OutputError(f"{self._name}: {reason}. {step}")

    def _write(self, item: StreamResult) -> None:
        rr, stream, frame = self._rr, self._stream, item.frame
        stream.reset_time()
        stream.set_time("frame", sequence=frame.seq)
        if frame.clock == "monotonic":
            stream.set_time("sensor_time", timestamp=np.datetime64(frame.taken_ns + self._wall_ns, "ns"))
        elif frame.clock == "media":
            stream.set_time("media_time", duration=np.timedelta64(frame.pts_ns, "ns"))
        root = frame.camera or "camera"
        engine = f"{item.engine}/" if item.engine else ""
        if item.result.task == "fusion":
            rig = rig_of(item)
            if rig is not None and root not in self._shown:
                self._shown.add(root)
                show_rig(stream, root, rig)
            log_rig(rr, stream, root, engine, item, self._shot)
        else:
            if self._images != "none":
                stream.log(f"{root}/image", self._picture(frame))
            self._log_result(f"{root}/image/{engine}", item.result)
        stream.log(f"{root}/{engine}age_ms", rr.Scalars(item.age_ms))
        for stage, ns in item.stage_ns.items():
            stream.log(f"{root}/{engine}stage/{stage}_ms", rr.Scalars(ns / 1e6))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _log_result(self, entity: str, result: Any) -> None:
        rr = self._rr
        if not hasattr(result, "boxes"):
            self._stream.log(f"{entity}result", rr.TextLog(result.caption()))
            return
        from edgekit.tasks.detect.draw import class_color

        boxes = rr.Boxes2D(
            array=np.asarray(result.boxes, np.float32).reshape(-1, 4),
            array_format=rr.Box2DFormat.XYXY,
            labels=[f"{label} {score:.2f}" for _, score, _, label in result],
            colors=[class_color(cls)[::-1] for _, _, cls, _ in result],
        )
        self._stream.log(f"{entity}boxes", boxes)

    def _picture(self, frame: Frame) -> Any:
        return self._jpeg(frame.image) if self._images == "jpeg" else self._raw(frame, frame.pixels)

    def _shot(self, image: np.ndarray) -> Any:
        """The picture of one camera of a rig, uint8 BGR; None where none are wanted."""
        if self._images == "none":
            return None
        return self._jpeg(image) if self._images == "jpeg" else self._rr.Image(image, color_model="BGR")

    def _jpeg(self, image: np.ndarray) -> Any:
        cv2 = load_cv2("send JPEG pictures to Rerun")
        with quiet(cv2):
            try:
                ok, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
            except cv2.error:
                ok = False
        if not ok:
            raise OutputError(
                f"{self._name}: {image.shape[1]}x{image.shape[0]} pixels cannot be stored as JPEG. Add ?images=raw"
            )
        return self._rr.EncodedImage(contents=data.tobytes(), media_type="image/jpeg")

    def _raw(self, frame: Frame, pixels: Pixels) -> Any:
        """The camera's bytes as they are where Rerun takes them, else as BGR."""
        rr, layout = self._rr, pixels.layout
        even = layout.width % 2 == 0 and layout.height % 2 == 0
        name = (
            _PIXEL_FORMATS.get((layout.format, layout.range)) if even and layout.matrix == "bt601" else None
        )
        if name is not None:
            data = b"".join(plane.tobytes() for plane in pixels.planes)
            return rr.Image(
                bytes=data,
                width=layout.width,
                height=layout.height,
                pixel_format=getattr(rr.PixelFormat, name),
            )
        model = _COLOR_MODELS.get(layout.format)
        if model is None:
            return rr.Image(frame.image, color_model="BGR")
        plane = pixels.planes[0]
        return rr.Image(plane[:, :, 0] if plane.shape[2] == 1 else plane, color_model=model)

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        try:
            self._stream.flush(timeout_sec=FLUSH_TIMEOUT_S)
        except (RuntimeError, ValueError, OSError) as error:
            raise self._failed(error) from None

    def _finish(self) -> None:
        try:
            self._flush()
        finally:
            self._drop()

    def _drop(self) -> None:
        self._stream.disconnect()
