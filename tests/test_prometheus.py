"""The metrics as Prometheus reads them, by its own client's parser."""

from __future__ import annotations

import threading
import urllib.request
from typing import Any

import pytest
from prometheus_client import parser

from edgekit.runtime.frames import Hop
from edgekit.runtime.metrics import BUCKETS_MS, Metrics
from edgekit.runtime.sinks import open_sink
from edgekit.runtime.sinks.prometheus import CONTENT_TYPE, PrometheusSink, exposition
from tests.test_live import get, item

UGLY = 'front "left"\\\n{a="b"} é'


def read(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples by name and labels; each at most once, each in a family with a type and a help text."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.type != "unknown" and family.documentation, family.name
        assert family.name.startswith("edgekit_")
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float:
    return read(text)[f"edgekit_{name}", frozenset(labels.items())]


def filled() -> Metrics:
    metrics = Metrics()
    one = item()
    for _ in range(4):
        metrics.frame("front", one.frame)
    metrics.drop("front", "superseded", 2)
    metrics.fault("front", "corrupt")
    metrics.restarted("front")
    metrics.camera_state("rear", "lost")
    for ms in (0.5, 1, 40, 9000):
        one.age_ns = int(ms * 1e6)
        one.hops = (Hop("kept", "CPU", copied=100), Hop("box", "CPU", written=7))
        metrics.result(one)
    metrics.sink_wrote("out.jsonl", 2_000_000)
    metrics.sink_dropped("out.jsonl")
    return metrics


def test_the_numbers() -> None:
    text = exposition(filled().snapshot())
    assert value(text, "frames_total", camera="front") == 4
    assert value(text, "dropped_frames_total", camera="front", reason="superseded") == 2
    assert value(text, "faults_total", camera="front", fault="corrupt") == 1
    assert value(text, "restarts_total", camera="front") == 1
    assert value(text, "camera_up", camera="front") == 1
    assert value(text, "camera_up", camera="rear") == 0
    assert value(text, "results_total", engine="") == 4
    assert value(text, "copied_bytes_total", engine="") == 400
    assert value(text, "written_bytes_total", engine="") == 28
    assert value(text, "stage_seconds", engine="", stage="engine", quantile="0.5") == 0.006
    assert value(text, "stage_seconds_sum", engine="", stage="engine") == pytest.approx(0.024)
    assert value(text, "sink_written_total", sink="out.jsonl") == 1
    assert value(text, "sink_dropped_total", sink="out.jsonl") == 1


def test_the_histogram_is_cumulative_and_whole() -> None:
    text = exposition(filled().snapshot())
    found = {
        float(dict(labels)["le"]): count
        for (name, labels), count in read(text).items()
        if name.endswith("age_seconds_bucket")
    }
    assert sorted(found) == [ms / 1e3 for ms in BUCKETS_MS] + [float("inf")]
    assert [found[k] for k in sorted(found)] == sorted(found.values())
    assert found[0.001] == 2, "a bound belongs to its bucket"
    assert (found[0.03], found[0.05], found[5.0], found[float("inf")]) == (2, 3, 3, 4)
    assert value(text, "age_seconds_count", engine="") == 4
    assert value(text, "age_seconds_sum", engine="") == pytest.approx(9.0415)


def test_nothing_measured_yet() -> None:
    assert set(read(exposition(Metrics().snapshot()))) == {("edgekit_stream_seconds", frozenset())}
    metrics = Metrics()
    metrics.camera_state("front", "opening")
    metrics.sink_state("x", "running")
    metrics.engine_facts("", {"library": "x"})
    text = exposition(metrics.snapshot())
    assert value(text, "age_seconds_count", engine="") == 0
    assert value(text, "frame_interval_seconds_count", camera="front") == 0


def test_names_are_escaped() -> None:
    metrics = Metrics()
    metrics.drop(UGLY, "superseded")
    assert (
        value(exposition(metrics.snapshot()), "dropped_frames_total", camera=UGLY, reason="superseded") == 1
    )


def test_the_text_ends_with_a_line_feed_and_has_each_family_once() -> None:
    text = exposition(filled().snapshot())
    assert text.endswith("\n") and "\r" not in text
    for word in ("HELP", "TYPE"):
        names = [line.split()[2] for line in text.splitlines() if line.startswith(f"# {word} ")]
        assert len(names) == len(set(names))


def test_served() -> None:
    before = threading.active_count()
    metrics = filled()
    with open_sink("prometheus::0") as sink:
        assert isinstance(sink, PrometheusSink) and not sink.needs_pixels
        sink.start(metrics)
        sink.write(item())
        assert sink.url.endswith("/metrics")
        with urllib.request.urlopen(sink.url, timeout=20) as reply:
            assert reply.headers["Content-Type"] == CONTENT_TYPE
            assert value(reply.read().decode(), "results_total", engine="") == 4
        assert get(sink.url, Host="evil.example")[0] == 403
    assert threading.active_count() == before


def test_served_elsewhere_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_TOKEN", "a-token-that-stays")
    with open_sink("prometheus:0.0.0.0:0") as sink:
        url: Any = sink.url  # type: ignore[attr-defined]
        assert url.endswith("/metrics?token=a-token-that-stays")
        local = f"http://127.0.0.1:{url.split(':')[2].split('/')[0]}/metrics"
        assert get(local)[0] == 401
        assert get(local, Authorization="Bearer a-token-that-stays")[0] == 200


def test_the_live_page_serves_the_same() -> None:
    with open_sink("view::0") as sink:
        sink.start(filled())
        _, headers, body = get(sink.url + "metrics")  # type: ignore[attr-defined]
        assert headers["Content-Type"] == CONTENT_TYPE
        assert value(body.decode(), "results_total", engine="") == 4
