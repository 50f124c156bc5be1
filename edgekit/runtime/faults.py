"""What can go wrong with a sensor, a sink or an engine while streaming, how soon it is seen, and what is done.

One row per fault; the counters, the documentation and the injected tests all use these names.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.errors import StreamError


class SourceLost(StreamError):
    """A sensor that is gone or failed and may come back: the watchdog opens it again."""


@dataclass(frozen=True)
class Fault:
    """within: how soon it is noticed. action: what the stream does about it."""

    name: str
    what: str
    within: str
    action: str


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "lost", "device unplugged or its driver failed", "at the next read, 0.1 s", "reopen with back-off"
        ),
        Fault(
            "stalled",
            "no frame arrives",
            "the larger of 1 s and 10 frame times; first frame: 5 s",
            "reopen with back-off",
        ),
        Fault(
            "frozen", "the same picture again and again", "2 s of identical frames", "reopen with back-off"
        ),
        Fault("slow", "frames come at less than half the agreed rate", "30 frames", "count and go on"),
        Fault("dropped", "the driver's frame counter jumped", "the next frame", "count and go on"),
        Fault("corrupt", "the driver marked the buffer as damaged", "at once", "drop the frame"),
        Fault("clock-jump", "timestamps go back, or ahead of ours by more than 1 s", "at once", "new epoch"),
        Fault(
            "format-changed", "another size or pixel format after a reconnect", "the first frame", "new epoch"
        ),
        Fault(
            "hung",
            "a driver's call does not return",
            "2 s after the stream is to end",
            "leave its thread behind",
        ),
        Fault(
            "sink-failed", "a sink cannot write (disk full)", "the failing write", "detach it; files: raise"
        ),
        Fault(
            "sink-blocked", "a sink does not take the next result in time", "at once", "drop the result there"
        ),
        Fault("blind", "no sensor of a rig is there", "when the last one is lost", "wait for one to return"),
        Fault(
            "calibration",
            "the rig's file changed and cannot be used",
            "1 s after the change",
            "go on with the calibration before",
        ),
        Fault("engine-failed", "the inference library reports an error", "at once", "raise to the caller"),
    )
}
