"""Fixtures: small real bundles, built once per test session by the real toolchain."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: threads of their own would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # boards run their tests without it
    pass
else:  # how long a test takes says nothing on a busy machine
    settings.register_profile("edgekit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("edgekit")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never read or fill the user's cache."""
    os.environ["EDGEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    if "EDGEKIT_ARM_COUNT" not in os.environ:  # builds would count instructions where an emulator is set up
        os.environ["EDGEKIT_ARM_DIR"] = str(tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="session")
def app_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped detector, built for a host, an ARM board and a Jetson."""
    import edgekit

    out = tmp_path_factory.mktemp("bundles")
    bundles = edgekit.build(ROOT / "apps" / "detect", ["host", "rpi5", "jetson-orin"], out=out, limit=8)
    paths = {b.manifest.target: b.path for b in bundles}
    for bundle in bundles:
        bundle.close()
    return paths


@pytest.fixture(scope="session")
def host_bundle(app_bundles: dict[str, Path]) -> str:
    return str(app_bundles["host"])


@pytest.fixture
def _no_thread_stays() -> Iterator[None]:
    """A test that leaves a thread behind fails. `pytestmark = pytest.mark.usefixtures("_no_thread_stays")`."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left
