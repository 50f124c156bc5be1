"""A headless Chromium driven over its DevTools pipe: what a page logs, holds and looks like."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE_S = 60.0


def find() -> str:
    """The browser's program; skips the test without one, fails it where one is required."""
    found = os.environ.get("EDGEKIT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found:
        return found
    if os.environ.get("EDGEKIT_REQUIRE_CHROMIUM") == "1":
        pytest.fail("EDGEKIT_REQUIRE_CHROMIUM=1, but there is no Chromium: install chromium")
    pytest.skip("needs Chromium (apt install chromium, or EDGEKIT_CHROMIUM=PROGRAM)")


class Chromium:
    """One browser with one page.

    log: errors and warnings of its console, and exceptions that no script caught.
    """

    def __init__(
        self, profile: Path, width: int = 1440, height: int = 900, scale: float = 1, dark: bool = False
    ) -> None:
        self.log: list[str] = []
        self._number = 0
        self._buffer = b""
        near_take, self._write = os.pipe()
        self._read, near_give = os.pipe()
        take, give = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (near_take, near_give))
        os.close(near_take)
        os.close(near_give)
        flags = [
            "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--no-first-run", "--disable-gpu",
            "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars", "--mute-audio",
            f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank",
        ]  # fmt: skip
        # the browser reads commands from descriptor 3 and answers on 4
        script = f'exec "$@" 3<&{take} 4>&{give} {take}<&- {give}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", find(), *flags],
            pass_fds=(take, give), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(take)
        os.close(give)
        self._session = ""
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
            mobile=width < 600,
        )  # fmt: skip
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        limit = time.monotonic() + DEADLINE_S
        while True:
            answer = self._next(limit)
            if answer is None:
                raise TimeoutError(f"Chromium: no answer to {method}")
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                found: dict[str, Any] = answer["result"]
                return found

    def _next(self, limit: float) -> dict[str, Any] | None:
        """The next message, None at the limit; events go to the log."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, limit - time.monotonic()))
            if not ready:
                return None
            more = os.read(self._read, 1 << 20)
            assert more, "Chromium ended"
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        params = message.get("params", {})
        if message.get("method") == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "warning",
            "assert",
        ):
            self.log.append(f"console {params['type']}: {params['args']}")
        elif message.get("method") == "Runtime.exceptionThrown":
            self.log.append(f"exception: {params['exceptionDetails']}")
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.log.append(f"log: {params['entry']['text']} {params['entry'].get('url', '')}")
        return message

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """What a JavaScript expression gives; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 20) -> Any:
        """The value of an expression once it is true. Raises: AssertionError after `seconds`."""
        limit = time.monotonic() + seconds
        while True:
            found = self.value(script)
            if found:
                return found
            assert time.monotonic() < limit, f"{script}: still {found!r} after {seconds} s; log: {self.log}"
            self._next(min(limit, time.monotonic() + 0.1))

    def screenshot(self, path: Path, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError, TimeoutError):
            self._session = ""
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._read)
        os.close(self._write)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
