"""The live page in a real browser: what it shows, on a desktop and on a phone, and how it takes trouble."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekit.runtime.metrics import Metrics
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.live import LiveSink
from tests.camera_host.chromium import Chromium, find
from tests.live_feed import Feed
from tests.rig_items import rig_items

DESKTOP, PHONE = (1440, 900), (390, 844)
LIVE = "document.querySelector('.view .badge.good') !== null"
HOSTILE = '<img src=x onerror="console.error(1)">'


@contextlib.contextmanager
def feeding(
    sink: LiveSink, cameras: int = 1, names: list[str] | None = None, task: str = "detect"
) -> Iterator[Feed]:
    """Results at 30 a second, until the end."""
    feed = Feed([sink], cameras, pictures=4)
    feed.names = names or feed.names
    stop = threading.Event()
    thread = threading.Thread(target=feed.run, args=(stop, 600), kwargs={"task": task})
    thread.start()
    try:
        yield feed
    finally:
        stop.set()
        thread.join()


@pytest.fixture(autouse=True)
def _browser_is_there() -> None:
    find()


def text(selector: str) -> str:
    return f"document.querySelector({selector!r}).textContent"


def colours(selector: str, step: int = 1) -> str:
    """Every `step`-th pixel of a canvas as a number 0xRRGGBB; read from a copy, which leaves the page's alone."""
    return (
        f"(() => {{ const c = document.querySelector({selector!r}), o = new OffscreenCanvas(c.width, c.height),"
        " x = o.getContext('2d', {willReadFrequently: true}); x.drawImage(c, 0, 0);"
        " const d = x.getImageData(0, 0, c.width, c.height).data, s = [];"
        f" for (let i = 0; i < d.length; i += {4 * step}) s.push(d[i] << 16 | d[i + 1] << 8 | d[i + 2]); return s; }})()"
    )


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (PHONE, True)], ids=["desktop", "phone"])
def test_it_shows_pictures_and_numbers(tmp_path: Path, size: tuple[int, int], dark: bool) -> None:
    with LiveSink(":0") as sink, feeding(sink), Chromium(tmp_path, *size, dark=dark) as browser:
        browser.open(sink.url)
        browser.wait_for(f"{text('#status')} === 'Live'")
        browser.wait_for(f"/^[0-9.]+ms$/.test({text('#age-now')}) && /^[0-9.]+ms$/.test({text('#age-p99')})")
        browser.wait_for(f"/^[0-9.]+.s$/.test({text('#rate')})")
        browser.wait_for(f"new Set({colours('.view canvas', 97)}).size > 50")
        browser.wait_for(f"new Set({colours('#age-plot', 7)}).size > 3")
        stages = browser.value(
            "[...document.querySelectorAll('#stages tr')].map((r) => r.cells[0].textContent)"
        )
        assert stages == ["transport", "wait", "preprocess", "engine", "decode", "unaccounted", "age"]
        assert "0 B copied" in browser.value(text("#copied"))
        assert "street.host.edge" in browser.value(text("#facts"))
        assert browser.value(text(".view .badge")) == "live"
        assert "superseded" in browser.wait_for(
            f"{text('#drops')}.includes('superseded') && {text('#drops')}"
        )
        assert browser.value("document.documentElement.scrollWidth") <= size[0], "nothing sticks out"
        unnamed = "[...document.querySelectorAll('canvas, [role=img]')].filter((e) => !e.getAttribute('aria-label')).length"
        assert browser.value(unnamed) == 0
        assert browser.log == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_network_that_watches_a_stream_shows_its_last_seconds(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    track = "document.querySelector('.view .track')"
    with LiveSink(":0") as sink, feeding(sink, task="video"), Chromium(tmp_path, *size) as browser:
        browser.open(sink.url)
        browser.wait_for(LIVE)
        assert browser.value("document.querySelectorAll('.view .classes li').length") == 5
        # an event has ended, which is known by its label: two of them differ in colour from the still ground
        browser.wait_for(f"/events: (?!none).*;/.test({track}.getAttribute('aria-label'))")
        browser.wait_for(f"new Set({colours('.view .track')}).size > 4")
        assert browser.value("document.querySelectorAll('.view .classes .answer').length") == 1
        assert browser.value("document.documentElement.scrollWidth") <= size[0], "nothing sticks out"
        browser.value("document.querySelector('#results').click()")
        browser.wait_for(f"{track}.hidden")
        assert browser.log == []


def test_results_can_be_switched_off(tmp_path: Path) -> None:
    # the colour of boxes of class 0
    green = f"{colours('.view canvas')}.filter((colour) => colour === 0x4caf50).length"
    with LiveSink(":0") as sink, feeding(sink), Chromium(tmp_path, *DESKTOP) as browser:
        browser.open(sink.url)
        browser.wait_for(LIVE)
        browser.wait_for(f"{green} > 500")
        browser.value("document.querySelector('#results').click()")
        browser.wait_for(f"{green} === 0")
        assert browser.log == []


@contextlib.contextmanager
def a_rig(sink: LiveSink) -> Iterator[list[StreamResult]]:
    """Moments of a rig, ten a second: those in the list, which begins with a whole one, in turn."""
    shown = rig_items()[:1]
    sink.start(Metrics())
    stop = threading.Event()

    def run() -> None:
        count = 0
        while not stop.wait(0.1):
            sink.write(shown[count % len(shown)])
            count += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield shown
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_rig_is_one_picture_with_its_boxes(tmp_path: Path, size: tuple[int, int]) -> None:
    # the colour of boxes of class 0, as it is or over the dark line below it
    more = "(c >> 8 & 255) - (c >> 16) > 60 && (c >> 8 & 255) - (c & 255) > 60"
    green = f"{colours('.view canvas')}.filter((c) => (c >> 8 & 255) > 120 && {more}).length"
    missing = "document.querySelector('.view .missing')"
    with LiveSink(":0") as sink, a_rig(sink) as shown, Chromium(tmp_path, *size) as browser:
        browser.open(sink.url)
        browser.wait_for(LIVE)
        browser.wait_for(f"{green} > 100")
        assert browser.value("document.querySelectorAll('.view').length") == 1, "not one for each camera"
        assert browser.value(f"{missing}.hidden")
        assert browser.value("document.documentElement.scrollWidth") <= size[0], "nothing sticks out"
        assert "boxes" in browser.value("document.querySelector('.view canvas').getAttribute('aria-label')")
        browser.value("document.querySelector('#results').click()")
        browser.wait_for(f"{green} < 20")
        browser.value("document.querySelector('#results').click()")
        shown[:] = rig_items()[2:]
        browser.wait_for(f"!{missing}.hidden && {missing}.textContent === 'without CAM_FRONT, lidar'")
        assert browser.value("document.documentElement.scrollWidth") <= size[0]
        assert browser.log == []


def test_a_lost_camera_cannot_be_missed(tmp_path: Path) -> None:
    with LiveSink(":0") as sink, Chromium(tmp_path, *PHONE) as browser:
        with feeding(sink, 2) as feed:
            browser.open(sink.url)
            browser.wait_for("document.querySelectorAll('.view .badge.good').length === 2")
            feed.silent = {1}
            feed.metrics.fault("left", "frozen", "the same picture for 2.0 s")
            feed.metrics.fault("left", "lost", "No such device")
            feed.metrics.camera_state("left", "lost")
            left = ".view:nth-of-type(2)"
            browser.wait_for(f"/^Frozen [0-9]+ s ago, reopening$/.test({text(left + ' .over b')})")
            assert browser.value(text(left + " .over span")) == "No such device"
            assert browser.value(f"document.querySelector('{left}').classList.contains('stale')")
            assert browser.value(text(left + " .badge")) == "frozen"
            assert browser.value(text(".view .badge")) == "live"
            assert "No such device" in browser.value(text("#events"))
        # the engine hangs: nobody says so, but nothing comes
        browser.wait_for(f"/^No result for [0-9]+ s$/.test({text('.view .over b')})")
        assert browser.log == []


def test_it_finds_the_stream_again(tmp_path: Path) -> None:
    sink = LiveSink(":0")
    address = f":{sink._server.address.port}"
    with Chromium(tmp_path, *DESKTOP) as browser:
        with sink, feeding(sink):
            browser.open(sink.url)
            browser.wait_for(LIVE)
        browser.wait_for(f"['Ended', 'Disconnected'].includes({text('#status')})")
        assert not browser.value(LIVE)
        with LiveSink(address) as again, feeding(again, names=["second"]):
            browser.wait_for(f"{text('#status')} === 'Live'", 30)
            browser.wait_for(f"{LIVE} && {text('.under b')} === 'second'")
            assert browser.value("document.querySelectorAll('.view').length") == 1, (
                "nothing of the last run is left"
            )
    assert [line for line in browser.log if "ERR_CONNECTION" not in line] == []


def test_a_page_that_nobody_sees_costs_nothing(tmp_path: Path) -> None:
    hide = (
        "Object.defineProperty(document, 'hidden', {{value: {}, configurable: true}});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    with LiveSink(":0") as sink, feeding(sink), Chromium(tmp_path, *PHONE) as browser:
        browser.open(sink.url)
        browser.wait_for(LIVE)
        browser.value(hide.format("true"))
        for _ in range(600):
            if not sink._hub.watched:
                break
            browser.value("new Promise((resolve) => setTimeout(resolve, 20))")
        assert not sink._hub.watched
        browser.value(hide.format("false"))
        browser.wait_for(f"{text('#status')} === 'Live'")
        assert browser.log == []


def test_the_token_leaves_the_address_bar(tmp_path: Path) -> None:
    with LiveSink("0.0.0.0:0") as sink, feeding(sink), Chromium(tmp_path, *PHONE) as browser:
        local = f"http://127.0.0.1:{sink._server.address.port}/"
        browser.open(f"{local}?token={sink._server.token}")
        browser.wait_for(LIVE)
        assert browser.value("location.href") == local
        assert browser.log == []


def test_classes_and_hostile_names(tmp_path: Path) -> None:
    with (
        LiveSink(":0") as sink,
        feeding(sink, names=[HOSTILE], task="classify") as feed,
        Chromium(tmp_path, *PHONE) as browser,
    ):
        feed.metrics.engine_facts("", {HOSTILE: HOSTILE})
        feed.metrics.fault(HOSTILE, "slow", HOSTILE)
        browser.open(sink.url)
        browser.wait_for("document.querySelectorAll('.classes li').length === 5")
        assert browser.value(text(".classes li")).startswith("car")
        assert browser.value(text(".under b")) == HOSTILE
        browser.wait_for(f"{text('#events')}.includes('onerror')")
        assert browser.value("document.querySelectorAll('img').length") == 1
        assert browser.value("document.documentElement.scrollWidth") <= PHONE[0]
        assert browser.log == []
