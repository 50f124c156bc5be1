"""What a build proves about its payload, by running it: errors, agreement, accuracy, timing.

Nothing is estimated here. What cannot be measured on this machine is recorded with the reason,
and repeated under `limits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import tasks
from edgekit.backends.base import Payload
from edgekit.bundle import golden_bytes, golden_path
from edgekit.errors import EvidenceError, ModelError
from edgekit.kernels.letterbox import letterbox
from edgekit.manifest import Golden, GoldenTensor
from edgekit.passes.graph import op_counts
from edgekit.project import Accept
from edgekit.runtime.state import carry_over, convert
from edgekit.spec import StateSpec
from edgekit.target import Target
from edgekit.tasks.picture_input import only_input
from edgekit.toolchain.running import Footage, Running, Still, Subject, frames, restart

Progress = Callable[[str, int, int], None]

MIN_AGREEMENT = 0.5
MIN_MATCHED = 10
"""A mean shift of fewer scores says little."""
LOST_MARGIN = 0.1
"""Without labels, a payload is another network when it loses more than half of the float network's
boxes (answers) and not only such as lay within this of the score threshold."""
SAMPLE_WIDTH = 640
FLOAT_TOLERANCE = 1e-3
"""Float32 golden tolerance, of the output's largest value: other CPUs sum in another order."""
HALF_MARGIN = 4.0
"""Reduced-precision golden tolerance: this many times the error measured here on the golden input."""
GOLDEN_ALLOW = 1e-3
"""Share of elements that may lie outside it in reduced precision (near-ties in rounding)."""


def payload_facts(payload: Payload) -> dict[str, Any]:
    """What a payload holds: bytes, bytes of its weights as stored, operators and their counts."""
    known = {"backend": payload.backend, "precision": payload.precision, "bytes": len(payload.data)}
    if payload.format == "tflite":
        from edgekit.backends.litert.writer import facts

        return {**known, **facts(payload.data)}
    if payload.format == "ekn":
        from edgekit.backends.native.lower import facts as facts_of

        return {**known, **facts_of(payload.data)}
    import onnx

    graph = ir.from_proto(onnx.load_from_string(payload.data)).graph
    tensors = [value.const_value for value in graph.initializers.values()]
    tensors += [
        n.attributes["value"].as_tensor()
        for n in graph
        if n.op_type == "Constant" and "value" in n.attributes
    ]
    return {
        **known,
        "weight_bytes": int(sum(tensor.nbytes for tensor in tensors if tensor is not None)),
        "ops": op_counts(graph),
    }


class Noise:
    """Sums of the difference of one tensor over pictures, in float64; `row` for the evidence."""

    def __init__(self) -> None:
        self.worst = self.noise = self.signal = 0.0
        self.low, self.high, self.count = np.inf, -np.inf, 0

    def add(self, want: np.ndarray, got: np.ndarray) -> None:
        error = got - want
        self.worst = max(self.worst, float(np.abs(error).max()))
        self.noise += float((error**2).sum())
        self.signal += float((want**2).sum())
        self.low, self.high = min(self.low, float(want.min())), max(self.high, float(want.max()))
        self.count += want.size

    def row(self, name: str) -> dict[str, Any]:
        noise, signal = self.noise, self.signal
        return {
            "tensor": name,
            "max_abs": self.worst,
            "rms": (noise / self.count) ** 0.5,
            "sqnr_db": None if noise == 0 or signal == 0 else round(10 * float(np.log10(signal / noise)), 2),
            "range": [self.low, self.high],
        }


def output_errors(subject: Subject, images: Footage, progress: Progress) -> list[dict[str, Any]]:
    """Per raw output, payload against float network over `images`: max |e|, rms, SQNR (dB), range. Each network
    carries its own states through a clip.

    Raises: ModelError when the float network gives NaN or infinity, EvidenceError when the payload does.
    """
    return carried_errors(subject, images, progress)["outputs"]


def carried_errors(subject: Subject, images: Footage, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """`output_errors` as "outputs"; as "states" the same of each state after every frame, as its real values; as
    "by_frame" the rms error of all outputs together by the number of the frame in its clip: it must not grow."""
    reference, candidate = subject.reference.binding, subject.candidate.binding
    outputs = {name: Noise() for name in reference.outputs}
    held = _held(subject)
    states = {name: Noise() for name in held}
    by_frame: list[Noise] = []
    at = 0
    for number, (image, begins) in enumerate(frames(images)):
        progress("prove outputs", number, len(images))
        if begins:
            at = 0
            for running in (subject.reference, subject.candidate):
                running.reset()
        feed(subject, image)
        by_frame += [Noise()] if at == len(by_frame) else []
        for name, noise in outputs.items():
            want = reference.outputs[name].astype(np.float64)
            got = candidate.outputs[name].astype(np.float64)
            _check_finite(subject, name, want, got, number)
            noise.add(want, got)
            by_frame[at].add(want, got)
        for name, (want_spec, got_spec) in held.items():
            wanted = subject.reference.session.states[name].astype(np.float64)
            real = convert(subject.candidate.session.states[name], got_spec, want_spec)
            states[name].add(wanted, real.astype(np.float64))
        at += 1
    found = {"outputs": [noise.row(name) for name, noise in outputs.items()]}
    if held:
        found["states"] = [noise.row(name) for name, noise in states.items()]
        found["by_frame"] = [
            {k: v for k, v in noise.row(str(i)).items() if k in ("rms", "sqnr_db")}
            for i, noise in enumerate(by_frame)
        ]
    return found


def _held(subject: Subject) -> dict[str, tuple[StateSpec, StateSpec]]:
    """State by name, as the float network and as the payload hold it."""
    sides = []
    for running in (subject.reference, subject.candidate):
        specs = getattr(running.binding, "state_specs", ())
        sides.append({spec.name: spec for spec in specs})
    return {name: (spec, sides[1][name]) for name, spec in sides[0].items()}


def feed(subject: Subject, image: np.ndarray) -> None:
    """Run both networks on a picture, through the bundle's own preprocessing."""
    for running in (subject.reference, subject.candidate):
        _feed(running, subject, image)


def _feed(running: Running, subject: Subject, image: np.ndarray) -> None:
    array, quant = only_input(running.binding, "a network that is proven has one input")
    letterbox(image, subject.spec.preprocess, array, quant=quant)
    running.binding.run()


def _check_finite(subject: Subject, name: str, want: np.ndarray, got: np.ndarray, number: int) -> None:
    for values, precision in ((want, "float32"), (got, subject.candidate.payload.precision)):
        bad = int(values.size - np.isfinite(values).sum())
        if bad and values is want:
            raise ModelError(
                f"model: output {name} holds {bad} values of {values.size} that are NaN or infinite on picture "
                f"{number}, in {precision} already. Check the export and the input rule"
            )
        if bad:
            raise EvidenceError(
                f"payload {subject.candidate.payload.backend} {precision}: output {name} holds {bad} values of "
                f"{values.size} that are NaN or infinite on picture {number}. Build with --precision float32"
            )


def agreement(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """How far results of the float network and of the payload agree, per picture (see tasks.Task.agreement)."""
    return tasks.of(pairs[0][0]).agreement(pairs)


def check_accept(
    found: Mapping[str, Any], agreed: Mapping[str, Any], accept: Accept, score_threshold: float
) -> dict[str, Any]:
    """The verdict on the evidence: passed is True, False, or None where nothing could be measured."""
    problems = []
    unknown = ""
    name, unit = found.get("name", "AP"), agreed.get("unit", "boxes")
    matched, wanted = agreed[f"{unit}_matched"], agreed[f"{unit}_reference"]
    if "not_measured" in found:
        unknown = f"accuracy not measured: {found['not_measured']}"
    elif found["drop"] is None:
        unknown = "the labelled pictures hold no object to score"
    elif found["drop"] > accept.max_drop:
        problems.append(f"{name} dropped by {found['drop']:.4f}, at most {accept.max_drop} accepted")
    if accept.min_metric is not None:
        if unknown:
            problems.append(f"{name} of at least {accept.min_metric} required, but {unknown}")
        elif found["payload"][name] < accept.min_metric:
            problems.append(f"{name} is {found['payload'][name]:.4f}, at least {accept.min_metric} required")
    if accept.max_score_shift is not None:
        # a box that is gone went at least from its score to below the threshold
        lost = agreed["lost_score_max"]
        shift = max(agreed["score_shift_max"] or 0.0, 0.0 if lost is None else lost - score_threshold)
        if shift > accept.max_score_shift:
            problems.append(f"scores shift by up to {shift:.4f}, at most {accept.max_score_shift} accepted")
    loss, error = confidence_loss(agreed)
    if loss - 2 * error > accept.max_confidence_loss and matched >= MIN_MATCHED:
        problems.append(
            f"confidence compressed: scores fall by {loss:.4f} (standard error {error:.4f}) on average, "
            f"at most {accept.max_confidence_loss} accepted"
        )
    clearly = (agreed["lost_score_max"] or 0.0) > score_threshold + LOST_MARGIN
    if unknown and clearly and matched < MIN_AGREEMENT * wanted:
        problems.append(f"only {matched} of the float network's {wanted} {unit} are found again")
    limits = {"max_drop": accept.max_drop, "min_metric": accept.min_metric}
    limits["max_confidence_loss"] = accept.max_confidence_loss
    limits = {k: v for k, v in {**limits, "max_score_shift": accept.max_score_shift}.items() if v is not None}
    if problems:
        return {**limits, "passed": False, "reason": "; ".join(problems)}
    return {**limits, "passed": None if unknown else True, "reason": unknown or "within limits"}


def confidence_loss(agreed: Mapping[str, Any]) -> tuple[float, float]:
    """(mean fall of the scores of what both networks find, its standard error): a few boxes prove little."""
    shifts = np.array([got - ref for ref, got in agreed.get("pairs", ())], np.float64)
    error = float(shifts.std(ddof=1) / len(shifts) ** 0.5) if len(shifts) > 1 else 0.0
    return -(agreed.get("score_shift_mean") or 0.0), error


def require(
    verdict: dict[str, Any], model: str, target: str, allow_drop: bool, blame: str = ""
) -> dict[str, Any]:
    """The verdict, marked when a failure is to be kept all the same; `blame` follows the reason in the error.

    Raises: EvidenceError when it is a failure and `allow_drop` is not given.
    """
    if verdict["passed"] is not False:
        return verdict
    if not allow_drop:
        raise EvidenceError(
            f"model {model} for {target}: {verdict['reason']}{blame}. "
            "Use a higher precision, or keep it all the same with --allow-drop"
        )
    return {**verdict, "allowed": True, "reason": f"{verdict['reason']} (kept with --allow-drop)"}


def golden(
    subjects: Sequence[Subject], image: Still, states: Sequence[StateSpec] = (), own: bool = False
) -> tuple[Golden, dict[str, bytes]]:
    """Golden input (a real picture through the bundle's preprocessing) and float outputs, with tolerances that
    hold every one of the payloads.

    states: the manifest's. Their golden input is what the float network holds before the last frame of the
    clip `image`, their golden output what it holds after. own: outputs of the one float32 payload itself, which has other
    weights than the float network, by design.
    """
    reference = subjects[0].reference
    before = _play(subjects, image)
    want = _read(subjects[0].candidate if own else reference, states)
    inputs = {**reference.binding.inputs, **{state.input: before[state.name] for state in states}}
    files: dict[str, bytes] = {}
    sources = []
    for i, (tensor, value) in enumerate(inputs.items()):
        sources.append(GoldenTensor(tensor, golden_path("input", i)))
        files[sources[-1].path] = golden_bytes(_typed(value, tensor, states))
    reduced = [s.candidate for s in subjects if s.candidate.payload.precision != "float32"]
    got = [_read(candidate, states) for candidate in reduced]
    outputs = []
    for i, (tensor, value) in enumerate(want.items()):
        path = golden_path("output", i)
        rule = tolerance(tensor, path, value, [g[tensor] for g in got])
        outputs.append(rule)
        files[path] = golden_bytes(_typed(value, tensor, states))
    return Golden(tuple(sources), tuple(outputs)), files


def tolerance(tensor: str, path: str, value: np.ndarray, reduced: Sequence[np.ndarray]) -> GoldenTensor:
    """How near an output must come to its golden float `value`. reduced: what payloads of reduced precision gave here."""
    span = float(np.abs(value).max())
    if not reduced:
        return GoldenTensor(tensor, path, atol=FLOAT_TOLERANCE * span, rtol=FLOAT_TOLERANCE)
    errors = [np.abs(got.astype(np.float64) - value).max() for got in reduced]
    atol = HALF_MARGIN * float(max(errors)) + FLOAT_TOLERANCE * span
    return GoldenTensor(tensor, path, atol=atol, allow=GOLDEN_ALLOW)


def _play(subjects: Sequence[Subject], image: Still) -> dict[str, np.ndarray]:
    """Run every payload on the last frame of `image`, from the states that the float network holds before it.

    Returns: these states.
    """
    *lead, (last, _) = list(frames([image]))
    reference = subjects[0].reference
    reference.reset()
    for frame, _ in lead:
        _feed(reference, subjects[0], frame)
    specs = getattr(reference.binding, "state_specs", ())
    before = reference.session.snapshot() if specs else {}
    for running in (reference, *(s.candidate for s in subjects)):
        if specs:
            session = running.session
            session.restore(carry_over(before, specs, session.state_specs).values)
        _feed(running, subjects[0], last)
    return before


def _read(running: Running, states: Sequence[StateSpec]) -> dict[str, np.ndarray]:
    """Outputs, then what the states became, by the names of their outputs: as reals of the manifest's type."""
    found = dict(running.binding.outputs)
    if states:
        session = running.session
        held = {spec.name: spec for spec in session.state_specs}
        for state in states:
            found[state.output] = convert(session.states[state.name], held[state.name], state)
    return found


def _typed(value: np.ndarray, tensor: str, states: Sequence[StateSpec]) -> np.ndarray:
    """`value` in the type that the manifest gives a state; others as they are."""
    kind = next((s.dtype.value for s in states if tensor in (s.input, s.output)), value.dtype.name)
    return value.astype(kind, copy=False)


def variant_facts(
    subject: Subject, found: Mapping[str, Any], made: Any, speed: Mapping[str, Any]
) -> dict[str, Any]:
    """What is known of one variant beside its outputs: metric, speed, integers, the library's own account."""
    payload = subject.candidate.payload
    facts: dict[str, Any] = {}
    if "name" in found:
        facts["metric"] = {found["name"]: found["payload"][found["name"]], "drop": found["drop"]}
    timed = speed.get(payload.variant)
    if timed is not None:
        facts["speed"] = {**timed, "float_ms": speed["float"]["ms"], "threads": 1}
    if made is not None:
        facts["integer"] = made.record["integer"].get(payload.backend)
        facts["engine"] = subject.candidate.facts
        facts["layers"] = made.record["layers"]
    return facts


def samples(subject: Subject, images: Footage) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """Annotated JPEGs of what the payload finds, for the report."""
    _, pipeline = subject.pipelines()
    entries, files = [], {}
    for i, image in enumerate(images):
        restart(pipeline)
        for frame, _ in frames([image]):  # of a clip, what is found at its end
            image, result = frame, pipeline(frame)
        name = f"evidence/sample_{i}.jpg"
        files[name] = jpeg(result.draw(image), SAMPLE_WIDTH)
        entries.append(
            {
                "file": name,
                "caption": f"{result.caption()}, payload {subject.candidate.payload.precision}",
            }
        )
    return entries, files


def jpeg(picture: np.ndarray, width: int) -> bytes:
    """A picture, uint8 BGR, as JPEG of at most this width."""
    import cv2

    if picture.shape[1] > width:
        height = round(picture.shape[0] * width / picture.shape[1])
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 80])
    assert ok, "a valid picture encodes"
    return bytes(data.tobytes())


def conversion_limits(conversion: Mapping[str, Any]) -> list[str]:
    """What a clip model that looks ahead lost by becoming a one-frame network, as a sentence; [] if it did not."""
    if not conversion:
        return []
    what = "The network was trained with shifts from the future and runs without them"
    if "not_measured" in conversion:
        return [f"{what}: another network, whose drop was not measured: {conversion['not_measured']}."]
    name = conversion["name"]
    return [
        f"{what}: {name} of the clip model {conversion['clip_model']:.4f}, of the one-frame network "
        f"{conversion['one_frame']:.4f}, a drop of {conversion['drop']:.4f} on {conversion['images']} clips."
    ]


def limits(
    target: Target, subject: Subject, found: Mapping[str, Any], verdict: Mapping[str, Any], timed: bool
) -> list[str]:
    """Plain sentences on what this evidence does not show."""
    texts = []
    if verdict["passed"] is False:
        texts.append(f"The build missed its limits: {verdict['reason']}.")
    payload = subject.candidate.payload
    if subject.simulated:
        texts.append(
            f"The payload has not run on {target.title}: all results come from {subject.run_by}. The board's "
            f"{payload.backend} rounds otherwise; the self-test at the first load there checks its outputs."
        )
    elif target.name != "host":
        texts.append(
            f"The payload ran on the build machine, not on {target.title}; its outputs there may differ in the last digits."
        )
    if not timed:
        texts.append(f"No latency was measured on {target.title}: run 'edgekit bench' there.")
    if "not_measured" in found:
        texts.append(f"Accuracy was not measured: {found['not_measured']}.")
    return texts
