"""Steps on several threads: order, errors, and what is left of a run."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import StreamError
from edgekit.manifest import Golden, KernelStep, Manifest
from edgekit.runtime.crew import MAX_HELPERS, Crew
from edgekit.runtime.plan import beside, dependencies
from edgekit.spec import DType, TensorSpec

Graph = list[list[int]]


@st.composite
def graphs(draw: st.DrawFn, most: int = 12) -> Graph:
    """By number: the smaller ones that it comes after."""
    count = draw(st.integers(1, most))
    return [sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else [] for i in range(count)]


@settings(max_examples=60)
@given(graphs(), st.integers(0, 4), st.integers(1, 4))
def test_each_once_and_after_what_it_waits_for(after: Graph, helpers: int, runs: int) -> None:
    crew = Crew(after, helpers)
    try:
        for _ in range(runs):
            lock, done, threads = threading.Lock(), [], set()

            def work(
                number: int, lock: threading.Lock = lock, done: list[int] = done, threads: set[str] = threads
            ) -> None:
                with lock:
                    assert set(after[number]) <= set(done)
                    threads.add(threading.current_thread().name)
                time.sleep(0)
                with lock:
                    done.append(number)

            crew.run(work)
            assert sorted(done) == list(range(len(after)))
            assert len(threads) <= helpers + 1
    finally:
        crew.close()


@settings(max_examples=60)
@given(graphs(), st.integers(0, 3), st.data())
def test_an_error_ends_the_run(after: Graph, helpers: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, len(after) - 1), min_size=1))
    crew = Crew(after, helpers)
    try:
        for broken in (True, False):
            lock, begun, ended = threading.Lock(), set(), set()

            def work(
                number: int,
                broken: bool = broken,
                lock: threading.Lock = lock,
                begun: set[int] = begun,
                ended: set[int] = ended,
            ) -> None:
                with lock:
                    begun.add(number)
                if broken and number in bad:
                    raise StreamError(f"step {number}")
                with lock:
                    ended.add(number)

            if broken:
                with pytest.raises(StreamError, match="step") as caught:
                    crew.run(work)
                assert int(str(caught.value).split()[1]) in bad
                assert not any(set(after[number]) & bad for number in begun)
                at_return = set(ended)
                time.sleep(0.001)
                assert ended == at_return, "something still ran"
            else:
                crew.run(work)
                assert ended == set(range(len(after)))
    finally:
        crew.close()


def test_two_at_a_time() -> None:
    meet = threading.Barrier(2, timeout=20)
    crew = Crew([[], []], 1)
    crew.run(lambda _: meet.wait() and None)
    crew.close()


def test_what_keeps_waiting_is_let_go_by_an_interrupt() -> None:
    """Ctrl-C in the caller's wait: what runs beside it ends first, the next run is as any other."""
    crew = Crew([[], []], 1)
    go, calls = threading.Event(), []
    wait = crew._wake.wait

    def interrupted(timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread() and not go.is_set():
            go.set()
            raise KeyboardInterrupt
        return wait(timeout)

    crew._wake.wait = interrupted  # type: ignore[method-assign]
    helper_ran = threading.Event()

    def work(number: int) -> None:
        if threading.current_thread() is threading.main_thread():
            assert helper_ran.wait(20)
        else:
            helper_ran.set()
            assert go.wait(20)
            calls.append(number)

    with pytest.raises(KeyboardInterrupt):
        crew.run(work)
    assert len(calls) == 1 and crew._active == 0
    crew.run(lambda number: calls.append(number))
    assert sorted(calls[1:]) == [0, 1]
    crew.close()


def test_closing() -> None:
    crew = Crew([[], [], []], 50)
    before = threading.active_count()
    crew.run(lambda _: None)
    assert threading.active_count() - before == MAX_HELPERS
    crew.close()
    crew.close()
    assert threading.active_count() == before
    with pytest.raises(StreamError, match="closed"):
        crew.run(lambda _: None)


def test_nothing_of_a_run_is_kept() -> None:
    class Thing:
        pass

    crew = Crew([[], [0], [0]], 2)
    thing = Thing()
    gone = weakref.ref(thing)

    def work(number: int, thing: Thing = thing) -> None:
        if number == 2 and failing:
            raise ValueError("no")

    failing = False
    crew.run(work)
    failing = True
    with pytest.raises(ValueError, match="no"):
        crew.run(work)
    del work, thing
    gc.collect()
    assert gone() is None
    crew.close()


def test_no_threads_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    crew, done = Crew([[], [], [0, 1]], 2), []
    for _ in range(2):
        crew.run(done.append)
    assert sorted(done) == [0, 0, 1, 1, 2, 2]
    crew.close()


# --- what may run at the same time ---------------------------------------------------------------


def plan_of(after: Graph, light: tuple[int, ...] = ()) -> Manifest:
    """Steps that read what those before them write."""
    steps = tuple(
        KernelStep(
            f"s{i}", "light" if i in light else "k", tuple(f"t{j}" for j in before) or ("x",), (f"t{i}",)
        )
        for i, before in enumerate(after)
    )
    names = ("x", *(f"t{i}" for i in range(len(after))))
    return Manifest(
        schema_version=1, model="m", task="none", target="host", inputs=("x",), outputs=names[-1:],
        tensors=tuple(TensorSpec(name, DType.float32, (1,)) for name in names), plan=steps, pipeline={},
        payload_digest="", golden=Golden((), ()), files={}, provenance={},
    )  # fmt: skip


@given(graphs())
def test_dependencies_are_those_of_the_tensors(after: Graph) -> None:
    assert [list(found) for found in dependencies(plan_of(after))] == after


@given(graphs(8))
def test_a_step_is_alone_exactly_where_all_others_come_before_or_after_it(after: Graph) -> None:
    reach = [set(before) for before in after]
    for i, before in enumerate(after):
        for j in before:
            reach[i] |= reach[j]
    shares = beside(plan_of(after))
    for i in range(len(after)):
        others = [j for j in range(len(after)) if j != i and j not in reach[i] and i not in reach[j]]
        assert (shares[i] == 1) == (not others)
        assert shares[i] <= 1 + len(others)


def test_branches() -> None:
    # camera | raster | lift(camera, raster) | pool | encoder | neck | fusion(pool, neck)
    after: Graph = [[], [], [0, 1], [2], [], [4], [3, 5]]
    assert beside(plan_of(after)) == [3, 3, 2, 2, 3, 3, 1]
    assert beside(plan_of(after, light=(1,)), ["light"]) == [2, 3, 2, 2, 2, 2, 1]


def test_what_runs_alone_runs_in_the_caller_s_thread() -> None:
    """Two side by side, then one that reads both, whoever of them ends last; slices of a step come after whole ones."""
    caller, ran = threading.current_thread(), []
    crew = Crew([(), (), (0, 1), (2,), (2,), (3, 4)], 1, late=(3,))
    try:
        for i in range(200):
            slow = i % 2

            def work(number: int, slow: int = slow) -> None:
                if number == slow:
                    time.sleep(2e-4)
                ran.append((number, threading.current_thread() is caller))

            crew.run(work)
            assert all(mine for number, mine in ran if number in (2, 5))
            ran.clear()
    finally:
        crew.close()
    alone = Crew([(), (), ()], 0, late=(0,))
    order: list[int] = []
    alone.run(order.append)
    assert order == [1, 2, 0]
