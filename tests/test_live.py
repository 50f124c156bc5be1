"""The live page's server with real clients: who may read, what they get, and that none holds the stream up."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPMessage
from typing import Any

import cv2
import numpy as np
import pytest

from edgekit.errors import OutputError, UsageError
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame, Hop, Lease
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import http, open_sink
from edgekit.runtime.sinks.live import LiveSink, hub
from edgekit.tasks.classify.classification import Classification
from edgekit.tasks.detect.detections import Detections
from tests.helpers import ROOT

FOUND = Detections(
    np.array([[10, 20, 60, 70], [1, 2, 30, 40]], np.float32),
    np.array([0.9, 0.3], np.float32),
    np.array([0, 1], np.int32),
    ("car", "<b>dog"),
)
DEADLINE = 20.0
"""Seconds: separates what works from what hangs."""


def item(
    seq: int = 0, width: int = 320, height: int = 200, camera: str = "front", result: Any = FOUND
) -> StreamResult:
    noise = np.random.default_rng(seq).integers(0, 255, (height, width, 3), np.uint8)
    frame = Frame(Pixels.bgr(noise), seq, 0, time.monotonic_ns(), "cam", camera=camera)
    stages = {"transport": 2_000_000, "wait": 1_000_000, "engine": 6_000_000}
    return StreamResult(
        frame, result, 10_000_000, stages, hops=(Hop("buffer", "driver"), Hop("box", "CPU", written=9))
    )


@pytest.fixture
def sink() -> Iterator[LiveSink]:
    before = threading.active_count()
    with LiveSink(":0") as sink:
        sink.start(Metrics())
        yield sink
    assert_threads(before)


def assert_threads(before: int) -> None:
    limit = time.monotonic() + DEADLINE
    while threading.active_count() > before:
        assert time.monotonic() < limit, f"left: {threading.enumerate()}"
        time.sleep(0.01)


def get(url: str, **headers: str) -> tuple[int, HTTPMessage, bytes]:
    """Status, headers and body where it ends; redirects are not followed."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any) -> None:
            return None

    request = urllib.request.Request(url, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.build_opener(Stay).open(request, timeout=DEADLINE) as reply:
            ends = reply.headers["Content-Length"] is not None  # the body of /stream does not
            return reply.status, reply.headers, reply.read() if ends else b""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def port(sink: LiveSink) -> int:
    return sink._server.address.port


def connect(sink: LiveSink, path: str = "/stream", receive: int = 0, **headers: str) -> socket.socket:
    """A client that has asked for `path` and reads as it likes. receive: bytes of its buffer."""
    client = socket.socket()
    if receive:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    client.settimeout(DEADLINE)
    client.connect(("127.0.0.1", port(sink)))
    lines = {"Host": "localhost", **headers}
    client.sendall(
        f"GET {path} HTTP/1.1\r\n{''.join(f'{k}: {v}' + chr(13) + chr(10) for k, v in lines.items())}\r\n".encode()
    )
    return client


class Reader:
    """Messages of `/stream`."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.file = client.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        while self.file.readline().strip():
            pass

    def next(self, kind: str = "") -> tuple[dict[str, Any], bytes]:
        limit = time.monotonic() + DEADLINE
        while time.monotonic() < limit:
            text, jpeg = struct.unpack(">II", self.file.read(8))
            message, picture = json.loads(self.file.read(text)), self.file.read(jpeg)
            if kind in ("", message["kind"]):
                return message, picture
        raise AssertionError(f"no {kind} came")

    def close(self) -> None:
        self.file.close()
        self.client.close()


@contextlib.contextmanager
def page(sink: LiveSink, **options: Any) -> Iterator[Reader]:
    reader = Reader(connect(sink, **options))
    try:
        yield reader
    finally:
        reader.close()


@contextlib.contextmanager
def writing(sink: LiveSink, size: tuple[int, int] = (320, 200), fps: float = 100) -> Iterator[list[int]]:
    """Results all the while; the list grows by the nanoseconds that each `write` took."""
    stop, took = threading.Event(), []

    def run() -> None:
        pictures = [item(seq, *size) for seq in range(4)]
        while not stop.wait(1 / fps):
            began = time.monotonic_ns()
            sink.write(pictures[len(took) % 4])
            took.append(time.monotonic_ns() - began)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()


def wait_until(condition: Any) -> None:
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "host", "number"),
    [
        (":8080", "127.0.0.1", 8080),
        ("8080", "127.0.0.1", 8080),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("localhost:81", "127.0.0.1", 81),
        ("0.0.0.0:8080", "0.0.0.0", 8080),
        ("[::1]:8080", "::1", 8080),
        ("[::]:1", "::", 1),
    ],
)
def test_addresses(text: str, host: str, number: int) -> None:
    address = http.Address.parse(text)
    assert (address.host, address.port) == (host, number)
    assert address.loopback == (host in ("127.0.0.1", "::1"))


@pytest.mark.parametrize(
    "text", ["", ":", "8080:", ":65536", ":-1", "::1:80", "[::1]", "a:b", ":8080/x", "x y:1", ":８０"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="address"):
        http.Address.parse(text)


def test_a_taken_port_is_one_line(sink: LiveSink) -> None:
    with pytest.raises(OutputError, match=r"cannot listen at .*Choose another port"):
        LiveSink(f":{port(sink)}")


def test_without_an_address_of_its_own_it_is_reached_from_this_machine_only(sink: LiveSink) -> None:
    assert sink._server._tcp.server_address[0] == "127.0.0.1"
    assert sink.url == f"http://127.0.0.1:{port(sink)}/"


def test_ipv6() -> None:
    try:
        sink = LiveSink("[::1]:0")
    except OutputError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with sink:
        assert sink.url.startswith("http://[::1]:") and get(sink.url)[0] == 200


def test_it_is_found_by_its_scheme() -> None:
    with open_sink("view::0") as sink:
        assert isinstance(sink, LiveSink) and sink.needs_pixels


def test_it_says_at_once_that_opencv_is_missing() -> None:
    code = (
        "import sys; sys.modules['cv2'] = None\n"
        "from edgekit.errors import MissingExtraError\nfrom edgekit.runtime.sinks import open_sink\n"
        "try: open_sink('view::0')\nexcept MissingExtraError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "edgekit[camera]" in out.stdout


# --- who may read ---


def test_the_page_and_its_headers(sink: LiveSink) -> None:
    status, headers, body = get(sink.url)
    assert status == 200 and b"<title>edgekit live" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert headers["Access-Control-Allow-Origin"] is None
    assert "Python" not in headers["Server"]
    for path in ("page.css", "page.js", "plots.js", "icon.svg", "metrics"):
        assert get(sink.url + path)[0] == 200, path
    assert (
        b"style=" not in body and b"onclick" not in body and b"http" not in body.replace(b"http-equiv", b"")
    )


@pytest.mark.parametrize("path", ["nothing", "../setup.py", "page.html", "%2e%2e/", "hub.py"])
def test_there_is_nothing_else(sink: LiveSink, path: str) -> None:
    assert get(sink.url + path)[0] == 404


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9999", "127.0.0.1:80", "[::1]:8080", "robot.localhost"]
)
def test_names_of_this_machine(sink: LiveSink, host: str) -> None:
    assert get(sink.url, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "localhost@evil", "[::2]"]
)
def test_other_names_are_refused_against_rebinding(sink: LiveSink, host: str) -> None:
    for path in ("", "stream", "metrics"):
        assert get(sink.url + path, Host=host)[0] == 403


def test_requests_of_other_sites_pages_are_refused(sink: LiveSink) -> None:
    for site in ("cross-site", "same-site"):
        assert get(sink.url + "stream", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors")[0] == 403
    assert get(sink.url, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200  # a link to it
    assert get(sink.url + "page.js", Sec_Fetch_Site="same-origin")[0] == 200


def test_only_reading(sink: LiveSink) -> None:
    request = urllib.request.Request(sink.url, data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=DEADLINE)
    with caught.value as error:
        assert error.code == 501


def test_elsewhere_a_token_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(http.TOKEN_VARIABLE, raising=False)
    with LiveSink("0.0.0.0:0") as sink, LiveSink("0.0.0.0:0") as other:
        token = sink._server.token
        assert len(token) >= 32 and token != other._server.token
        assert sink.url.endswith(f":{port(sink)}/?token={token}") and "0.0.0.0" not in sink.url
        base = f"http://127.0.0.1:{port(sink)}/"
        for path in ("", "stream", "metrics", "page.js", "nothing"):
            assert get(base + path)[0] == 401
            assert get(f"{base}{path}?token={token[:-1]}")[0] == 401
            assert get(f"{base}{path}?token={other._server.token}")[0] == 401
        status, headers, _ = get(f"{base}?token={token}")
        assert status == 303 and headers["Location"] == "/"
        assert "HttpOnly" in headers["Set-Cookie"] and "SameSite" in headers["Set-Cookie"]
        cookie = headers["Set-Cookie"].partition(";")[0]
        assert get(base, Cookie=cookie)[0] == 200
        assert get(base, Cookie=f"a=b; {cookie}", Host="robot.lan")[0] == 200, "any name: the token guards it"
        assert get(f"http://127.0.0.1:{port(other)}/", Cookie=cookie)[0] == 401
        assert get(base + "metrics", Authorization=f"Bearer {token}")[0] == 200
        assert get(base + "metrics", Authorization="Bearer é")[0] == 401
        assert get(f"{base}metrics?token={token}")[0] == 200


def test_a_token_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(http.TOKEN_VARIABLE, "a-token-that-stays")
    with LiveSink("0.0.0.0:0") as sink:
        assert sink.url.endswith("?token=a-token-that-stays")
    for bad in ("short", "with spaces in the middle", "ü" * 20):
        monkeypatch.setenv(http.TOKEN_VARIABLE, bad)
        with pytest.raises(UsageError, match="EDGEKIT_TOKEN"):
            LiveSink("0.0.0.0:0")


# --- what comes ---


def test_a_picture_with_its_boxes(sink: LiveSink) -> None:
    with page(sink) as reader:
        assert reader.status == 200
        wait_until(lambda: sink._hub.watched)
        sink.write(item(7, 1920, 1080))
        message, jpeg = reader.next("picture")
    assert (message["camera"], message["seq"], message["task"]) == ("front", 7, "detect")
    assert (message["width"], message["height"], message["age_ms"]) == (1920, 1080, 10.0)
    assert [thing["label"] for thing in message["found"]] == ["car", "<b>dog"]
    assert message["found"][0]["box"] == [10, 20, 60, 70]
    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (540, 960, 3)


def test_classes(sink: LiveSink) -> None:
    scores = np.array([0.7, 0.2], np.float32)
    with page(sink) as reader:
        wait_until(lambda: sink._hub.watched)
        sink.write(
            item(result=Classification(np.array([1, 0], np.int32), scores, scores[::-1], ("cat", "dog")))
        )
        message, _ = reader.next("picture")
    assert [(t["label"], t["box"]) for t in message["found"]] == [("dog", None), ("cat", None)]


def test_what_is_not_finite_is_left_out(sink: LiveSink) -> None:
    bad = Detections(
        np.array([[np.nan, 0, 1, 1], [0, 0, 5, 5]], np.float32),
        np.ones(2, np.float32),
        np.zeros(2, np.int32),
        ("car",),
    )
    with page(sink) as reader:
        wait_until(lambda: sink._hub.watched)
        sink.write(item(result=bad))
        assert len(reader.next("picture")[0]["found"]) == 1


def test_the_state_has_the_metrics_and_the_last_minute(sink: LiveSink) -> None:
    first = item()
    sink._hub.metrics.engine_facts("", {"library": "onnxruntime"})
    sink._hub.metrics.frame("front", first.frame)
    sink._hub.metrics.drop("front", "superseded", 3)
    sink._hub.metrics.fault("front", "corrupt", "frame 4")
    for _ in range(3):
        sink._hub.metrics.result(first)
        sink.write(first)
    with page(sink) as reader:
        state, jpeg = reader.next("state")
    assert jpeg == b""
    assert state["cameras"]["front"]["drops"] == {"superseded": 3}
    assert state["engines"][""]["facts"] == {"library": "onnxruntime"}
    assert [e["name"] for e in state["events"]] == ["corrupt"]
    minute = state["minute"][""]
    assert sum(b[4] for b in minute["bins"]) == 3 and minute["bins"][0][1:4] == [10, 10, 10]
    assert minute["stages"] == [["transport", 2], ["wait", 1], ["engine", 6], ["unaccounted", 1]]
    assert [hop["name"] for hop in state["ledger"][""]] == ["buffer", "box"]


def test_nothing_is_encoded_while_nobody_watches(sink: LiveSink, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    monkeypatch.setattr(
        "edgekit.runtime.sinks.live.encode", lambda frame: encoded.append(frame.seq) or b"jpeg"
    )
    for seq in range(5):
        sink.write(item(seq))
    assert encoded == []
    with page(sink):
        wait_until(lambda: sink._hub.watched)
        sink.write(item(5))
    wait_until(lambda: not sink._hub.watched or sink.write(item(6)))
    count = len(encoded)
    sink.write(item(7))
    assert encoded[0] == 5 and len(encoded) == count


def test_pictures_are_encoded_at_most_so_often(sink: LiveSink, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    encoded: list[int] = []
    monkeypatch.setattr("edgekit.runtime.sinks.live.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("edgekit.runtime.sinks.live.encode", lambda frame: encoded.append(frame.seq) or b"")
    monkeypatch.setattr(type(sink._hub), "watched", True)
    for seq in range(100):  # 100 frames/s for one second
        clock[0] = 100 + seq / 100
        sink.write(item(seq))
    assert 14 <= len(encoded) <= 16


def test_it_holds_no_frame(sink: LiveSink) -> None:
    released = []
    one = item()
    one.frame.lease = Lease(lambda: released.append(True))
    with page(sink) as reader:
        wait_until(lambda: sink._hub.watched)
        sink.write(one)
        one.frame.release()
        assert released == [True]
        reader.next("picture")


def test_several_views(sink: LiveSink) -> None:
    with page(sink) as reader:
        wait_until(lambda: sink._hub.watched)
        for name in ("front", "rear"):
            sink.write(item(camera=name))
        assert {reader.next("picture")[0]["camera"] for _ in range(2)} == {"front", "rear"}


# --- clients that misbehave ---


def test_a_client_that_stops_reading_holds_nobody_up(sink: LiveSink) -> None:
    # pictures of noise, more than any buffer holds
    stuck = [connect(sink, receive=4096) for _ in range(3)]
    with page(sink) as good, writing(sink, (1280, 720)) as took:
        for _ in range(12):
            good.next("picture")
        wait_until(lambda: len(took) > 40)
        assert len(sink._hub._pages) == 4
        waiting = [len(p.waiting) for p in sink._hub._pages]
        assert max(waiting) <= 1, "the newest picture only"
    for client in stuck:
        client.close()


def test_a_client_that_stops_reading_is_disconnected(sink: LiveSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SEND_S", 0.3)
    client = connect(sink, receive=4096)
    wait_until(lambda: sink._hub.watched)
    with writing(sink, (1280, 720)):
        wait_until(lambda: not sink._hub.watched)
    client.close()


def test_a_client_that_vanishes_is_forgotten(sink: LiveSink) -> None:
    client = connect(sink)
    wait_until(lambda: sink._hub.watched)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no goodbye
    client.close()
    with writing(sink):
        wait_until(lambda: not sink._hub.watched)


def test_a_client_that_is_gone_is_noticed_without_results(sink: LiveSink) -> None:
    connect(sink).close()
    wait_until(lambda: not sink._hub.watched and not sink._server._tcp._open)


def test_too_many_pages(sink: LiveSink) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(hub.CLIENTS):
            assert stack.enter_context(page(sink)).status == 200
        status, headers, body = get(sink.url + "stream")
        assert status == 503 and headers["Retry-After"] and b"close one" in body
        assert get(sink.url)[0] == 200
    wait_until(lambda: len(sink._hub._pages) < hub.CLIENTS)
    with page(sink) as reader:
        assert reader.status == 200


def test_too_many_connections(sink: LiveSink) -> None:
    idle = [socket.create_connection(("127.0.0.1", port(sink))) for _ in range(http.CONNECTIONS)]
    wait_until(lambda: len(sink._server._tcp._open) == http.CONNECTIONS)
    with connect(sink, "/") as one_more:
        assert one_more.recv(100).startswith(b"HTTP/1.1 503")
    for client in idle:
        client.close()
    wait_until(lambda: not sink._server._tcp._open)
    assert get(sink.url)[0] == 200


def test_a_request_that_trickles_is_cut_off(sink: LiveSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_S", 0.3)
    with socket.create_connection(("127.0.0.1", port(sink)), timeout=DEADLINE) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(OSError):
            for _ in range(1000):
                client.sendall(b"X")
                client.settimeout(0.05)
                try:
                    if client.recv(100) == b"":
                        break
                except TimeoutError:
                    continue
        wait_until(lambda: not sink._server._tcp._open)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\0\1\2\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"/" * 70000,
        b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_requests_that_are_none(
    sink: LiveSink, request_bytes: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", port(sink)), timeout=DEADLINE) as client:
        client.sendall(request_bytes)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                pass
    wait_until(lambda: not sink._server._tcp._open)
    assert get(sink.url)[0] == 200
    assert capfd.readouterr().err == ""


# --- the end ---


def test_pages_are_told_of_the_end(sink: LiveSink) -> None:
    with page(sink) as reader:
        wait_until(lambda: sink._hub.watched)
        sink.close()
        reader.next("end")
        assert reader.file.read() == b""
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", port(sink)), timeout=1)
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write(item())


def test_closing_waits_for_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SEND_S", 1000)
    before = threading.active_count()
    sink = LiveSink(":0")
    stuck = [connect(sink, receive=4096) for _ in range(2)] + [
        socket.create_connection(("127.0.0.1", port(sink)))
    ]
    wait_until(lambda: len(sink._hub._pages) == 2)
    with writing(sink, (1280, 720)) as took:
        wait_until(lambda: len(took) > 40)
    sink.close()
    assert_threads(before)
    for client in stuck:
        client.close()


def test_the_port_is_free_again_at_once(sink: LiveSink) -> None:
    with page(sink):
        wait_until(lambda: sink._hub.watched)
        sink.abort()
    with LiveSink(f":{port(sink)}") as again:
        assert get(again.url)[0] == 200
