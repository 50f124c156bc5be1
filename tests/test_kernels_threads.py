"""The pool of the native kernels (threads.h): many callers at once, a fork, no thread left spinning."""

from __future__ import annotations

import os
import select
import signal
import threading
import time

import numpy as np
import pytest

from edgekit.kernels import sparse_conv as sparse
from edgekit.kernels.sparse_conv import Weights
from tests.test_kernels import using


def convolved(threads: int) -> bytes:
    rng = np.random.default_rng(0)
    coordinates = np.argwhere(rng.random((1, 8, 40, 60)) < 0.3).astype(np.int32)
    at = sparse.sites(coordinates, (8, 40, 60))
    weights = Weights(rng.normal(size=(3, 3, 3, 16, 16)).astype(np.float32))
    features = rng.normal(size=(len(at), 16)).astype(np.float32)
    book = at.submanifold((3, 3, 3), threads=threads)
    return sparse.convolve(features, book, weights, threads=threads).tobytes()


def test_many_callers_at_once() -> None:
    with using("native"):
        expected = convolved(1)
        seen: list[bytes] = []
        threads = [
            threading.Thread(target=lambda n=n: seen.extend(convolved(n) for _ in range(5))) for n in range(5)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
            assert not t.is_alive()
        assert len(seen) == 25 and set(seen) == {expected}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    with using("native"):
        expected = convolved(3)  # the parent's pool is running
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, b"same" if convolved(3) == expected else b"different")
            finally:
                os._exit(0)
        os.close(writing)
        try:
            ready, _, _ = select.select(
                [reading], [], [], 60
            )  # a child waiting for threads that it lacks would hang
            assert ready and os.read(reading, 100) == b"same"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)


def test_idle_threads_sleep() -> None:
    with using("native"):
        convolved(4)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.15  # three spinning threads would have used most of 0.6 s
