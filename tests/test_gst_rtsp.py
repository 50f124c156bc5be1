"""Network cameras against a real RTSP server on loopback: pictures, loss, recovery, passwords."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.frames import Frame
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.sources import Source, open_source
from edgekit.runtime.watch import Watch
from tests import gst_tools
from tests.helpers import ROOT

Server = tuple["subprocess.Popen[str]", int]
Serve = Callable[..., Server]
WITHIN_S = 20.0
"""Separates what is noticed from what hangs; says nothing about speed."""


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers: (codec, port, login) -> (process, port). All are killed at the end."""
    gst_tools.need("rtspsrc", "decodebin", "jpegdec", libraries=("libgstrtspserver-1.0.so.0",))
    running: list[subprocess.Popen[str]] = []

    def start(codec: str = "jpeg", port: int = 0, login: str = "") -> Server:
        command = [sys.executable, str(ROOT / "tests/gst_rtsp_server.py"), codec, str(port), login]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said, f"no server: {process.wait()}"
        return process, int(said)

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def read(source: Source) -> Frame:
    frame = source.read(WITHIN_S)
    assert frame is not None
    return frame


def drain(source: Source, timeout_s: float = WITHIN_S) -> None:
    """Read what is still on its way, until something is raised."""
    while (frame := source.read(timeout_s)) is not None:
        frame.release()


@pytest.mark.parametrize(
    ("codec", "needs", "swing"),
    [
        ("jpeg", (), "full"),
        ("h264", ("x264enc", "avdec_h264"), "limited"),
        ("vp8", ("vp8enc", "vp8dec"), "limited"),
    ],
)
def test_a_network_camera(serve: Serve, codec: str, needs: tuple[str, ...], swing: str) -> None:
    """Live, decoded, on our clock, without a copy behind the decoder; a white ball on black is seen to move."""
    gst_tools.need(*needs)
    _, port = serve(codec)
    before = time.monotonic_ns()
    uri = f"rtsp://127.0.0.1:{port}/street?latency=50"
    with open_source(uri) as source:
        assert source.live and source.size == (320, 240)
        assert source.uri == f"rtsp://127.0.0.1:{port}/street"
        places, seqs, pictures = set(), [], []
        while len(pictures) < 30:
            frame = read(source)
            if frame.corrupt:  # joined between two key frames: the decoder says so, and a stream drops it
                assert codec == "h264" and not pictures
                frame.release()
                continue
            assert frame.clock == "monotonic"
            assert before - 10**9 < frame.pts_ns < time.monotonic_ns() + 10**9
            layout = frame.pixels.layout
            assert (layout.format, layout.matrix, layout.range) == ("i420", "bt601", swing)
            assert sum(hop.copied for hop in frame.hops) == 0
            luma = frame.pixels.planes[0]
            assert luma.max() > 200 and 0 < (luma > 128).mean() < 0.2
            places.add(frame.pixels.addresses)
            seqs.append(frame.seq)
            pictures.append(luma.copy())
            frame.release()
    assert seqs == sorted(set(seqs)) and len(places) <= 12
    assert not np.array_equal(pictures[0], pictures[-1])


def test_a_dead_server_is_noticed_and_found_again(serve: Serve) -> None:
    process, port = serve()
    uri = f"rtsp://127.0.0.1:{port}/street"
    with open_source(uri) as source:
        read(source).release()
        process.kill()
        process.wait()
        with pytest.raises(SourceLost, match=str(port)) as lost:
            drain(source)
        assert "\n" not in str(lost.value)
        with pytest.raises(SourceLost):
            source.read(1)
    with pytest.raises(SourceLost, match="connect"):  # may come back: the watchdog goes on trying
        open_source(uri)
    serve(port=port)
    with open_source(uri) as source:
        read(source).release()


def test_the_watchdog_finds_a_camera_again(serve: Serve) -> None:
    """Killed, away for a while, there again: the frames go on in a new epoch, and the fault is counted once."""
    process, port = serve()
    metrics = Metrics()
    uri = f"rtsp://ann:hunter2@127.0.0.1:{port}/street"
    watch = Watch(lambda: open_source(uri), metrics, "front", stop=threading.Event())
    watch.open()
    timer = threading.Timer(0.5, serve, kwargs={"port": port})  # while the watchdog tries to connect
    try:
        epochs = []
        for frame in watch.frames():
            epochs.append(frame.epoch)
            frame.release()
            if len(epochs) == 5:
                process.kill()
                process.wait()
                timer.start()
            if epochs.count(epochs[0]) < len(epochs) - 5:
                break
    finally:
        watch.close()
        timer.cancel()
        timer.join()
    camera = metrics.snapshot()["cameras"]["front"]
    assert camera["restarts"] == 1 and camera["faults"]["lost"] == 1
    assert camera["faults"].keys() <= {"lost", "dropped"}  # a busy machine loses frames of a live camera
    assert sorted(set(epochs)) == [0, 1]
    assert "hunter2" not in str(metrics.snapshot())


def test_a_silent_server_times_out(serve: Serve) -> None:
    """The connection stands but nothing comes: read returns, close does too."""
    process, port = serve()
    with open_source(f"rtsp://127.0.0.1:{port}/street") as source:
        read(source).release()
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            drain(source, 0.5)
        process.send_signal(signal.SIGCONT)
        read(source).release()
        process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
    assert time.monotonic() - started < WITHIN_S
    process.send_signal(signal.SIGCONT)


def test_a_wrong_path_and_a_lease_that_outlives_the_camera(serve: Serve) -> None:
    process, port = serve()
    with pytest.raises(SourceLost, match="404"):
        open_source(f"rtsp://127.0.0.1:{port}/lane")
    source = open_source(f"rtsp://127.0.0.1:{port}/street")
    frame = read(source)
    copy = frame.pixels.planes[0].copy()
    process.kill()
    with pytest.raises(SourceLost):
        drain(source)
    source.close()
    assert np.array_equal(frame.pixels.planes[0], copy)
    frame.release()


def test_passwords_work_and_stay_secret(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    _, port = serve("jpeg", 0, "ann:se cret/1")
    for login in ("", "ann:wrong-one@"):
        with pytest.raises(UsageError, match="Unauthorized") as caught:
            open_source(f"rtsp://{login}127.0.0.1:{port}/street")
        assert "wrong-one" not in str(caught.value)
    with open_source(f"rtsp://ann:se%20cret%2F1@127.0.0.1:{port}/street") as source:
        frame = read(source)
        assert source.uri == frame.source == f"rtsp://***@127.0.0.1:{port}/street"
        frame.release()
    with pytest.raises(SourceLost) as lost:
        open_source("rtsp://ann:hunter2@127.0.0.1:9/street?token=abc123")
    printed = capfd.readouterr()
    for text in (str(lost.value), printed.out, printed.err):
        assert "hunter2" not in text and "abc123" not in text and "cret" not in text


def test_udp(serve: Serve) -> None:
    gst_tools.need("udpsrc")
    _, port = serve()
    with open_source(f"rtsp://127.0.0.1:{port}/street?protocols=udp&latency=20") as source:
        for _ in range(5):
            read(source).release()
