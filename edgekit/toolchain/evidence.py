"""What a build proves about its payload, by running it: errors, agreement, accuracy, timing.

Nothing is estimated here. What cannot be measured on this machine is recorded with the reason,
and repeated under `limits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.backends.base import Binding, LoadOptions, Payload, half
from edgekit.bundle import golden_bytes, golden_path
from edgekit.errors import EvidenceError
from edgekit.kernels.letterbox import letterbox
from edgekit.manifest import Golden, GoldenTensor, Variant
from edgekit.project import Accept
from edgekit.target import Target
from edgekit.tasks.detect.dataset import CocoSet
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.draw import draw
from edgekit.tasks.detect.evaluate import evaluate_pipeline
from edgekit.tasks.detect.metric import bootstrap_interval
from edgekit.tasks.detect.pipeline import DetectPipeline
from edgekit.tasks.detect.spec import DetectSpec
from edgekit.toolchain import cache

Progress = Callable[[str, int, int], None]

MATCH_IOU = 0.5
AGREEMENT_PAIRS = 400
SAMPLE_WIDTH = 640
FLOAT_TOLERANCE = 1e-3
"""Float32 golden tolerance, of the output's largest value: other CPUs sum in another order."""
HALF_MARGIN = 4.0
"""Reduced-precision golden tolerance: this many times the error measured here on the golden input."""
GOLDEN_ALLOW = 1e-3
"""Share of elements that may lie outside it in reduced precision (near-ties in rounding)."""


@dataclass(frozen=True)
class Subject:
    """A payload beside the float network it came from, both runnable on this machine."""

    spec: DetectSpec
    payload: Payload
    reference: Binding
    candidate: Binding
    simulated: str | None
    """Why `candidate` is not the target's own library, or None when it is."""

    def pipelines(self) -> tuple[DetectPipeline, DetectPipeline]:
        return DetectPipeline(self.spec, self.reference), DetectPipeline(self.spec, self.candidate)


def open_payload(payload: Payload) -> Binding:
    """Run a payload on this machine's ONNX Runtime, whatever backend it is for (all are ONNX)."""
    variant = Variant("build", "onnxruntime", payload.precision, payload.format, "", len(payload.data), "")
    executable = half("onnxruntime", "engine").load(memoryview(payload.data), variant, LoadOptions())
    binding: Binding = executable.bind()
    return binding


def output_errors(subject: Subject, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Per raw output, payload against float network over `images`: max |e|, rms, SQNR (dB), range."""
    totals = {name: [0.0, 0.0, 0.0, np.inf, -np.inf, 0] for name in subject.reference.outputs}
    for image in images:
        for binding in (subject.reference, subject.candidate):
            (array,) = binding.inputs.values()
            letterbox(image, subject.spec.preprocess, array)
            binding.run()
        for name, total in totals.items():
            want = subject.reference.outputs[name].astype(np.float64)
            error = subject.candidate.outputs[name].astype(np.float64) - want
            total[0] = max(total[0], float(np.abs(error).max()))
            total[1] += float((error**2).sum())
            total[2] += float((want**2).sum())
            total[3] = min(total[3], float(want.min()))
            total[4] = max(total[4], float(want.max()))
            total[5] += want.size
    return [
        {
            "tensor": name,
            "max_abs": worst,
            "rms": (noise / count) ** 0.5,
            "sqnr_db": None if noise == 0 else round(10 * float(np.log10(signal / noise)), 2),
            "range": [low, high],
        }
        for name, (worst, noise, signal, low, high, count) in totals.items()
    ]


def agreement(pairs: Sequence[tuple[Detections, Detections]]) -> dict[str, Any]:
    """How many boxes of the float network the payload finds (same class, IoU >= 0.5), and at what score."""
    scores: list[list[float]] = []
    wanted = found = 0
    for reference, candidate in pairs:
        wanted += len(reference)
        free = np.ones(len(candidate), bool)
        overlaps = _iou(reference.boxes, candidate.boxes)
        for i in range(len(reference)):
            ok = free & (candidate.classes == reference.classes[i]) & (overlaps[i] >= MATCH_IOU)
            if ok.any():
                j = int(np.argmax(np.where(ok, overlaps[i], -1)))
                free[j] = False
                found += 1
                scores.append([float(reference.scores[i]), float(candidate.scores[j])])
    shift = np.array([got - ref for ref, got in scores]) if scores else np.zeros(0)
    return {
        "images": len(pairs),
        "boxes_reference": wanted,
        "boxes_matched": found,
        "boxes_payload": sum(len(candidate) for _, candidate in pairs),
        "score_shift_mean": float(shift.mean()) if len(shift) else None,
        "score_shift_max": float(np.abs(shift).max()) if len(shift) else None,
        "pairs": [[round(a, 4), round(b, 4)] for a, b in scores[:AGREEMENT_PAIRS]],
    }


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every box pair, [len(a), len(b)]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.clip(high - low, 0, None).prod(axis=2)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(axis=1), (b[:, 2:] - b[:, :2]).prod(axis=1)
    overlap = np.asarray(inter / np.maximum(area_a[:, None] + area_b[None] - inter, 1e-9))
    # a box that the picture's edge clips to a line has no area, yet agrees with itself
    overlap[(a[:, None] == b[None]).all(axis=2)] = 1.0
    return overlap


def metric(subject: Subject, data: CocoSet, reference_key: str, progress: Progress) -> dict[str, Any]:
    """AP of the float network and of the payload on the same labelled pictures.

    The float result is cached under `reference_key` (digest of network, spec and data).
    """
    reference, candidate = subject.pipelines()
    known = cache.load("metric", reference_key)
    if known is None:
        known, _ = evaluate_pipeline(reference, data, progress=lambda i, n: progress("accuracy, float", i, n))
        cache.store("metric", reference_key, known)
    got, results = evaluate_pipeline(
        candidate, data, progress=lambda i, n: progress(f"accuracy, {subject.payload.precision}", i, n)
    )
    return {
        "name": "AP",
        "data": data.name,
        "data_digest": data.digest,
        "images": len(data.images),
        "reference": {k: v for k, v in known.items() if k != "per_class"},
        "payload": {k: v for k, v in got.items() if k != "per_class"},
        "per_class": got.get("per_class", {}),
        "drop": round(known["AP"] - got["AP"], 6)
        if known["AP"] is not None and got["AP"] is not None
        else None,
        "interval95": bootstrap_interval(data, results),
        "measured_by": subject.simulated or f"{subject.payload.backend} on this machine",
    }


def check_accept(found: Mapping[str, Any], agreed: Mapping[str, Any], accept: Accept) -> dict[str, Any]:
    """The verdict on the evidence: passed is True, False, or None where nothing could be measured."""
    problems = []
    shift = agreed["score_shift_max"]
    if accept.max_score_shift is not None and shift is not None and shift > accept.max_score_shift:
        problems.append(f"scores shift by up to {shift:.4f}, at most {accept.max_score_shift} accepted")
    unknown = ""
    if "not_measured" in found:
        unknown = f"not measured: {found['not_measured']}"
    elif found["drop"] is None:
        unknown = "the labelled pictures hold no object to score"
    else:
        if found["drop"] > accept.max_drop:
            problems.append(f"AP dropped by {found['drop']:.4f}, at most {accept.max_drop} accepted")
        if accept.min_metric is not None and found["payload"]["AP"] < accept.min_metric:
            problems.append(f"AP is {found['payload']['AP']:.4f}, at least {accept.min_metric} required")
    if problems:
        return {"max_drop": accept.max_drop, "passed": False, "reason": "; ".join(problems)}
    return {
        "max_drop": accept.max_drop,
        "passed": None if unknown else True,
        "reason": unknown or "within limits",
    }


def require(verdict: Mapping[str, Any], model: str, target: str) -> None:
    """Raises: EvidenceError when the verdict is a failure."""
    if verdict["passed"] is False:
        raise EvidenceError(
            f"model {model} for {target}: {verdict['reason']}. "
            "Use a higher precision, or keep it all the same with --allow-drop"
        )


def golden(subject: Subject, image: np.ndarray) -> tuple[Golden, dict[str, bytes]]:
    """Golden input (a real picture through the bundle's preprocessing) and float outputs, with tolerances."""
    (name,) = subject.reference.inputs
    for binding in (subject.reference, subject.candidate):
        letterbox(image, subject.spec.preprocess, binding.inputs[name])
        binding.run()
    source = GoldenTensor(name, golden_path("input", 0))
    files = {source.path: golden_bytes(subject.reference.inputs[name])}
    outputs = []
    for i, (tensor, want) in enumerate(subject.reference.outputs.items()):
        path = golden_path("output", i)
        span = float(np.abs(want).max())
        if subject.payload.precision == "float32":
            rule = GoldenTensor(tensor, path, atol=FLOAT_TOLERANCE * span, rtol=FLOAT_TOLERANCE)
        else:
            got = subject.candidate.outputs[tensor].astype(np.float64)
            atol = HALF_MARGIN * float(np.abs(got - want).max()) + FLOAT_TOLERANCE * span
            rule = GoldenTensor(tensor, path, atol=atol, allow=GOLDEN_ALLOW)
        outputs.append(rule)
        files[path] = golden_bytes(want)
    return Golden((source,), tuple(outputs)), files


def samples(subject: Subject, images: Sequence[np.ndarray]) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """Annotated JPEGs of what the payload finds, for the report."""
    import cv2

    _, pipeline = subject.pipelines()
    entries, files = [], {}
    for i, image in enumerate(images):
        detections = pipeline(image)
        picture = draw(image, detections)
        if picture.shape[1] > SAMPLE_WIDTH:
            height = round(picture.shape[0] * SAMPLE_WIDTH / picture.shape[1])
            picture = cv2.resize(picture, (SAMPLE_WIDTH, height), interpolation=cv2.INTER_AREA)
        ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 80])
        assert ok, "a valid picture encodes"
        name = f"evidence/sample_{i}.jpg"
        files[name] = data.tobytes()
        entries.append(
            {"file": name, "caption": f"{len(detections)} boxes, payload {subject.payload.precision}"}
        )
    return entries, files


def limits(target: Target, subject: Subject, found: Mapping[str, Any], timed: bool) -> list[str]:
    """Plain sentences on what this evidence does not show."""
    texts = []
    if subject.simulated:
        texts.append(f"The payload has not run on {target.title}: {subject.simulated}.")
    elif target.name != "host":
        texts.append(
            f"The payload ran on the build machine, not on {target.title}; its outputs there may differ in the last digits."
        )
    if not timed:
        texts.append(f"No latency was measured on {target.title}: run 'edgekit bench' there.")
    if "not_measured" in found:
        texts.append(f"Accuracy was not measured: {found['not_measured']}.")
    return texts
