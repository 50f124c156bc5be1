"""Metrics for Prometheus, in its text exposition format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.runtime.metrics import BUCKETS_MS, Metrics
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import Sink
from edgekit.runtime.sinks.http import Reply, Server

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_QUANTILES = (("0.5", "p50_ms"), ("0.95", "p95_ms"), ("0.99", "p99_ms"))

Labels = Mapping[str, str]


class PrometheusSink(Sink):
    """Serves `/metrics` at `address` (`:9108` is loopback) for as long as the stream runs.

    url: where, with the token that an address other than loopback needs.
    Raises: UsageError, OutputError where it cannot listen.
    """

    needs_pixels = False

    def __init__(self, address: str) -> None:
        super().__init__(Path(f"prometheus:{address}"))
        self._metrics = Metrics()
        self._server = Server(f"prometheus:{address}", address, {"/metrics": self._reply, "/": self._reply})
        self.url = (
            self._server.url.replace("/?", "/metrics?")
            if self._server.token
            else f"{self._server.url}metrics"
        )

    def start(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def _reply(self) -> Reply:
        return metrics_reply(self._metrics)

    def _write(self, item: StreamResult) -> None:
        """Nothing: the stream's metrics have it."""

    def _finish(self) -> None:
        self._server.close()

    def _drop(self) -> None:
        self._server.close()


def metrics_reply(metrics: Metrics) -> Reply:
    return Reply(exposition(metrics.snapshot()).encode(), CONTENT_TYPE)


def exposition(snapshot: Mapping[str, Any]) -> str:
    """A `Metrics.snapshot()` as Prometheus text.

    Times in seconds. Ages are a histogram, which may be summed over machines; stage times, frame
    intervals and sink times are summaries whose quantiles are of the newest values only.
    """
    out = _Text()
    cameras: list[tuple[Labels, Any]] = [({"camera": n}, m) for n, m in snapshot["cameras"].items()]
    engines: list[tuple[Labels, Any]] = [({"engine": n}, m) for n, m in snapshot["engines"].items()]
    sinks: list[tuple[Labels, Any]] = [({"sink": n}, m) for n, m in snapshot["sinks"].items()]

    out.family("stream_seconds", "gauge", "Seconds since the stream began.")
    out.sample("stream_seconds", {}, snapshot["seconds"])

    out.family("camera_up", "gauge", "1 while frames of the camera arrive.")
    for labels, m in cameras:
        out.sample("camera_up", labels, int(m["state"] == "running"))
    out.family("frames_total", "counter", "Frames that arrived from the camera.")
    for labels, m in cameras:
        out.sample("frames_total", labels, m["frames"])
    out.family("dropped_frames_total", "counter", "Frames that no engine saw, by reason.")
    for labels, m in cameras:
        for reason, count in sorted(m["drops"].items()):
            out.sample("dropped_frames_total", {**labels, "reason": reason}, count)
    out.family("faults_total", "counter", "Faults of the camera, by name.")
    for labels, m in cameras:
        for fault, count in sorted(m["faults"].items()):
            out.sample("faults_total", {**labels, "fault": fault}, count)
    out.family("restarts_total", "counter", "Times the camera was opened again.")
    for labels, m in cameras:
        out.sample("restarts_total", labels, m["restarts"])
    out.family("frame_interval_seconds", "summary", "Time from one frame of the camera to the next.")
    for labels, m in cameras:
        out.summary("frame_interval_seconds", labels, m["interval"])

    out.family("results_total", "counter", "Results of the engine.")
    for labels, m in engines:
        out.sample("results_total", labels, m["results"])
    out.family("state_resets_total", "counter", "Times that the state of a camera's stream began anew.")
    for labels, m in engines:
        for camera, count in sorted(m["resets"].items()):
            out.sample("state_resets_total", {**labels, "camera": camera}, count)
    out.family(
        "early_frames_total", "counter", "Frames that came before their step was due and were not run."
    )
    for labels, m in engines:
        out.sample("early_frames_total", labels, m["early_frames"])
    out.family("missed_steps_total", "counter", "Nominal steps of a network with state that were not run.")
    for labels, m in engines:
        out.sample("missed_steps_total", labels, m["missed_steps"])
    out.family("engine_faults_total", "counter", "Faults of the engine, by name.")
    for labels, m in engines:
        for fault, count in sorted(m["faults"].items()):
            out.sample("engine_faults_total", {**labels, "fault": fault}, count)
    rigs: list[tuple[Labels, Any]] = [(labels, m["rig"]) for labels, m in engines if "rig" in m]
    if rigs:
        _rigs(out, rigs)
    out.family("age_seconds", "histogram", "Age of results, from when the picture was taken.")
    for labels, m in engines:
        out.histogram("age_seconds", labels, m["age"])
    out.family("stage_seconds", "summary", "Where the age comes from; 'unaccounted' is what no stage claims.")
    for labels, m in engines:
        for stage, series in {**m["stages"], "unaccounted": m["unaccounted"]}.items():
            out.summary("stage_seconds", {**labels, "stage": stage}, series)
    out.family("copied_bytes_total", "counter", "Bytes moved unchanged between the sensor and the engine.")
    for labels, m in engines:
        out.sample("copied_bytes_total", labels, m["copied_bytes"])
    out.family("written_bytes_total", "counter", "Bytes that kernels and decoders produced on the way.")
    for labels, m in engines:
        out.sample("written_bytes_total", labels, m["written_bytes"])

    out.family("sink_up", "gauge", "1 while the sink takes results.")
    for labels, m in sinks:
        out.sample("sink_up", labels, int(m["state"] == "running"))
    out.family("sink_written_total", "counter", "Results that the sink took.")
    for labels, m in sinks:
        out.sample("sink_written_total", labels, m["written"])
    out.family("sink_dropped_total", "counter", "Results that came while the sink was busy.")
    for labels, m in sinks:
        out.sample("sink_dropped_total", labels, m["dropped"])
    out.family("sink_seconds", "summary", "Time the sink took for a result.")
    for labels, m in sinks:
        out.summary("sink_seconds", labels, m["time"])
    return out.text()


_CLOCKS = (
    ("phase_ms", "sensor_phase_seconds", "How far from the rig's offset its pictures are taken."),
    (
        "arrival_ms",
        "sensor_arrival_seconds",
        "Least time from timestamp to arrival: transport and clock error.",
    ),
    ("clock_ms", "sensor_clock_seconds", "Error of the sensor's clock that is put right after it stepped."),
)


def _rigs(out: _Text, rigs: list[tuple[Labels, Any]]) -> None:
    """Of engines that take a rig: what was missing, how old each sensor's part was, and what its clock says."""
    out.family("partial_results_total", "counter", "Results that were made without some sensor.")
    for labels, rig in rigs:
        out.sample("partial_results_total", labels, rig["partial"])
    out.family("missing_sensors_total", "counter", "Results without the sensor, by reason.")
    for labels, rig in rigs:
        for sensor, why in rig["missing"].items():
            for reason, count in sorted(why.items()):
                out.sample("missing_sensors_total", {**labels, "sensor": sensor, "reason": reason}, count)
    out.family("oldest_seconds", "summary", "Age of the oldest part that a result is made of.")
    for labels, rig in rigs:
        out.summary("oldest_seconds", labels, rig["oldest"])
    out.family("sensor_age_seconds", "summary", "Age of the sensor's part when the result was there.")
    for labels, rig in rigs:
        for sensor, series in rig["ages"].items():
            out.summary("sensor_age_seconds", {**labels, "sensor": sensor}, series)
    for key, name, text in _CLOCKS:
        out.family(name, "gauge", text)
        for labels, rig in rigs:
            for sensor, facts in rig["sync"].items():
                if facts[key] is not None:
                    out.sample(name, {**labels, "sensor": sensor}, facts[key] / 1e3)
    out.family("sensor_drift_ratio", "gauge", "How much slower than ours the sensor's clock is.")
    for labels, rig in rigs:
        for sensor, facts in rig["sync"].items():
            if facts["drift_ppm"] is not None:
                out.sample("sensor_drift_ratio", {**labels, "sensor": sensor}, facts["drift_ppm"] / 1e6)


class _Text:
    """Lines of the format (prometheus.io/docs/instrumenting/exposition_formats, text-based format)."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, text: str) -> None:
        self._lines += [f"# HELP edgekit_{name} {text}", f"# TYPE edgekit_{name} {kind}"]

    def sample(self, name: str, labels: Labels, value: float) -> None:
        inner = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        self._lines.append(f"edgekit_{name}{'{' + inner + '}' if inner else ''} {value!r}")

    def histogram(self, name: str, labels: Labels, series: Mapping[str, Any]) -> None:
        below = 0
        bounds = [repr(ms / 1e3) for ms in BUCKETS_MS] + ["+Inf"]
        for bound, count in zip(bounds, series["buckets"], strict=True):
            below += count
            self.sample(f"{name}_bucket", {**labels, "le": bound}, below)
        self._ends(name, labels, series)

    def summary(self, name: str, labels: Labels, series: Mapping[str, Any]) -> None:
        for quantile, key in _QUANTILES:
            if key in series:
                self.sample(name, {**labels, "quantile": quantile}, series[key] / 1e3)
        self._ends(name, labels, series)

    def _ends(self, name: str, labels: Labels, series: Mapping[str, Any]) -> None:
        self.sample(f"{name}_sum", labels, series.get("sum_ms", 0.0) / 1e3)
        self.sample(f"{name}_count", labels, series["count"])

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escape(value: str) -> str:
    """A label's value: backslash, quote and line feed are escaped, as the format asks."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
