"""Which payload of each segment runs here: of those that load and pass their self-test, the fastest.

The first load of a bundle with several variants tries and times them all (`tuning`) and records the
winner; later loads read only that one, test it, and go through all of them again should it fail.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import packed
from edgekit.backends.base import Binding, Executable, LoadOptions, Ports, half
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, EdgekitError, OutputError, SelfTestError, UsageError, did_you_mean
from edgekit.host import backend_problem, usable_cores
from edgekit.manifest import KernelStep, Manifest, Segment, Variant
from edgekit.runtime import tuning
from edgekit.runtime.plan import beside
from edgekit.runtime.selftest import golden_values, self_test, set_golden
from edgekit.runtime.session import Session, fill
from edgekit.runtime.state import convert, held_as, initial_value, private_states, same_codes, state_dtypes
from edgekit.spec import QuantParams

MAX_COMBINATIONS = 16
"""Combinations of variants tried until one passes: a plan of many segments must not be tried for ever."""


@dataclass(frozen=True)
class Candidate:
    """A variant of a segment, loaded. `name`: "<segment>/<variant>", as `edgekit inspect` calls it."""

    segment: str
    variant: Variant
    executable: Executable

    @property
    def name(self) -> str:
        return f"{self.segment}/{self.variant.name}"


Refused = dict[str, str]
"""Candidate name -> why it is not used."""


@dataclass
class Selection:
    """What `select` decided. By segment: the candidate in use and, in words, why.

    record: the measurement behind it, None when nothing was timed. refused: "<segment>/<variant>" -> why not.
    recorded: the measurement is that of an earlier load.
    """

    chosen: dict[str, Candidate]
    why: dict[str, str]
    refused: Refused = field(default_factory=dict)
    record: tuning.Record | None = None
    recorded: bool = False


def select(
    bundle: Bundle,
    segments: Sequence[Segment],
    options: LoadOptions,
    *,
    wanted: str | None = None,
    test: bool = True,
    effort: tuning.Effort | None = tuning.AT_LOAD,
    fresh: bool = False,
    kernels: Mapping[str, Executable] | None = None,
) -> Selection:
    """Load what runs here, per segment.

    wanted: the variant to use where a segment has it. test: self-test, and keep only what passes.
    effort: how long variants are timed where several pass; None = not at all, the first is taken.
    fresh: measure although there is a record. kernels: of `load_kernels`.

    Raises: the reason, when a segment has no variant that works; UsageError for an unknown variant.
    """
    manifest, threads, cache_dir = bundle.manifest, options.threads, options.cache_dir
    check_wanted(manifest, wanted)
    kernels = kernels or {}
    open_choice = wanted is None and any(len(segment.variants) > 1 for segment in segments)
    refused: Refused = {}
    if effort is not None and open_choice and not fresh:
        record = tuning.read(manifest, threads, cache_dir)
        chosen = _only(bundle, segments, record.chosen, options, test, refused, kernels) if record else None
        if record and chosen:
            why = _why(segments, record, wanted, " (recorded)")
            kept = record if record.timings else None
            return Selection(chosen, why, dict(record.refused), kept, recorded=True)
    if effort is None and open_choice:
        first = {segment.name: segment.variants[0].name for segment in segments}
        chosen = _only(bundle, segments, first, options, test, refused, kernels)
        if chosen:
            return Selection(chosen, dict.fromkeys(chosen, NOT_TUNED), _skipped(segments, chosen))
    refused.clear()
    loaded: dict[str, list[Candidate]] = {}
    chosen = {}
    try:
        for segment in segments:
            loaded[segment.name] = load_variants(bundle, segment, options, wanted, refused)
        passing = (
            passing_variants(bundle, loaded, threads, refused, kernels)
            if test
            else Passing(dict(loaded), {name: candidates[0] for name, candidates in loaded.items()})
        )
        if effort is None:
            for candidate in itertools.chain(*passing.candidates.values()):
                if candidate is not passing.base[candidate.segment]:
                    refused[candidate.name] = NOT_TRIED
            chosen = passing.base
            why = dict.fromkeys(chosen, NOT_TUNED)
            return Selection(chosen, why, refused)
        record = _race(bundle, passing, options, effort, kernels)
        chosen = {
            name: next(c for c in candidates if c.variant.name == record.chosen[name])
            for name, candidates in passing.candidates.items()
        }
        if test and not _works_together(bundle, chosen, passing, threads, kernels):
            chosen = passing.base
            names = {name: c.variant.name for name, c in chosen.items()}
            for timing in record.timings:
                refused[timing.name] = TOGETHER
            refused = {
                name: why for name, why in refused.items() if name not in {c.name for c in chosen.values()}
            }
            record = replace(record, chosen=names, timings=())
        for timing in record.timings:
            segment_name = timing.name.split("/")[0]
            if timing.name != chosen[segment_name].name:
                refused[timing.name] = _slower(timing, record, chosen[segment_name].name)
        record = replace(record, refused=dict(refused))
        if open_choice and test:  # what was not tested may be fast because it is wrong
            with contextlib.suppress(OutputError):  # a read-only device measures at every load
                tuning.store(record, cache_dir)
        return Selection(chosen, _why(segments, record, wanted), refused, record if record.timings else None)
    finally:
        close([c for cs in loaded.values() for c in cs if c is not chosen.get(c.segment)])


NOT_TUNED = "the first that works; tuning is off"
TOGETHER = "the fastest variants of several networks fail the self-test together"
NOT_TRIED = "not timed: tuning is off, and a variant before it works"


def _skipped(segments: Sequence[Segment], chosen: Mapping[str, Candidate]) -> Refused:
    names = (f"{segment.name}/{v.name}" for segment in segments for v in segment.variants)
    used = {candidate.name for candidate in chosen.values()}
    return {name: NOT_TRIED for name in names if name not in used}


def _why(
    segments: Sequence[Segment], record: tuning.Record, wanted: str | None, source: str = ""
) -> dict[str, str]:
    def words(segment: Segment) -> str:
        if len(segment.variants) == 1:
            return "the only variant"
        if record.chosen[segment.name] == wanted:
            return "asked for by name"
        return record.why(segment.name) + source

    return {segment.name: words(segment) for segment in segments}


def _slower(timing: tuning.Timing, record: tuning.Record, best: str) -> str:
    against = record.timing(best)
    assert against is not None, "the winner ran in the same race"
    figures = f"{timing.median_ms:.3g} ms against {against.median_ms:.3g} ms, {timing.ratio:.2f} x"
    if timing.median_ms <= against.median_ms * (1 + tuning.TIE):
        return f"as fast here as {best}, which comes first in the bundle: {figures}"
    return f"slower here than {best}: {figures}"


def _only(
    bundle: Bundle,
    segments: Sequence[Segment],
    names: Mapping[str, str],
    options: LoadOptions,
    test: bool,
    refused: Refused,
    kernels: Mapping[str, Executable],
) -> dict[str, Candidate] | None:
    """The variants of these names, loaded and tested together; None, all closed, when they do not work."""
    loaded: dict[str, Candidate] = {}
    keep = False
    try:
        for segment in segments:
            (loaded[segment.name],) = load_variants(bundle, segment, options, names[segment.name], refused)
        keep = not test or _verdict(bundle, loaded, options.threads, kernels) is None
    except EdgekitError:
        pass  # every variant is tried next, and the reasons are told then
    finally:
        if not keep:
            close(list(loaded.values()))
    return loaded if keep else None


def segments(bundle: Bundle) -> list[Segment]:
    """The plan's segments. Raises: BundleError for a plan that this edgekit cannot execute."""
    manifest, found, read = bundle.manifest, [], set()
    for step in manifest.plan:
        if isinstance(step, Segment):
            found.append(step)
        read |= {*step.inputs, step.when}
    for name in (*manifest.inputs, *(state.input for state in manifest.states)):
        if name not in read:
            raise BundleError(
                f"bundle {bundle.path}: no step of its plan reads input {name!r}. Build it again"
            )
    for state in manifest.states:
        initial_value(state)
    return found


def threads_of(manifest: Manifest, threads: int) -> dict[str, int]:
    """CPU threads by step. 0: where several branches of a plan may run at the same time each has its share of the
    cores, else the choice is the library's (0)."""
    from edgekit.kernels.steps import LIGHT

    names = [step.name for step in manifest.plan]
    if threads or len(names) == 1:
        return dict.fromkeys(names, threads)
    shares = zip(names, beside(manifest, LIGHT), strict=True)
    return {name: 0 if n == 1 else max(1, usable_cores() // n) for name, n in shares}


def load_kernels(bundle: Bundle, options: LoadOptions) -> dict[str, Executable]:
    """The kernels of the plan by step, ready to run. Raises: BundleError for one that this edgekit does not have, or that
    does not fit its tensors, options or files."""
    steps = [step for step in bundle.manifest.plan if isinstance(step, KernelStep)]
    if not steps:
        return {}
    from edgekit.kernels.steps import load  # not needed by most bundles

    tensors = {tensor.name: tensor for tensor in bundle.manifest.tensors}
    threads = threads_of(bundle.manifest, options.threads)
    try:
        return {
            step.name: load(step, tensors, bundle.read, replace(options, threads=threads[step.name]))
            for step in steps
        }
    except BundleError as error:
        if str(bundle.path) in str(error):
            raise
        raise BundleError(f"bundle {bundle.path}: {error}") from None


def check_wanted(manifest: Manifest, wanted: str | None) -> None:
    """Raises: UsageError when no segment has a variant called `wanted`."""
    names = sorted({variant.name for _, variant in manifest.variants()})
    if wanted is not None and wanted not in names:
        raise UsageError(f"variant {wanted!r}: not in this bundle. {did_you_mean(wanted, names)}")


def load_variants(
    bundle: Bundle, segment: Segment, options: LoadOptions, wanted: str | None, refused: Refused
) -> list[Candidate]:
    """The variants of a segment that load here; of those, only `wanted` if the segment has it.

    The rest goes to `refused`. Raises: the reason, when none is left.
    """
    loaded: list[Candidate] = []
    failures: list[EdgekitError] = []
    only = wanted in [variant.name for variant in segment.variants]
    try:
        for variant in segment.variants:
            if only and variant.name != wanted:
                continue
            try:
                loaded.append(_load(bundle, segment, variant, options))
            except EdgekitError as error:
                failures.append(_without_frames(error))
                refused[f"{segment.name}/{variant.name}"] = str(error)
    except BaseException:
        close(loaded)
        raise
    if not loaded:
        raise _worst(failures)
    failures.clear()  # see _worst
    return loaded


def _load(bundle: Bundle, segment: Segment, variant: Variant, options: LoadOptions) -> Candidate:
    problem = backend_problem(variant.backend)
    if problem:
        raise BundleError(f"bundle {bundle.path}: cannot run on this machine: {problem}")
    threads = threads_of(bundle.manifest, options.threads)[segment.name]
    executable: Executable = half(variant.backend, "engine").load(
        packed.payload(bundle.read(variant.path), variant.options),
        variant,
        replace(options, threads=threads, cache_key=variant.digest, alone=len(bundle.manifest.plan) == 1),
    )
    try:
        _check_io(bundle.manifest, segment, variant, executable)
    except BaseException:
        executable.close()
        raise
    return Candidate(segment.name, variant, executable)


def _check_io(manifest: Manifest, segment: Segment, variant: Variant, executable: Executable) -> None:
    private = private_states(manifest, segment)
    free = {name: state_dtypes(state) for state in private for name in (state.input, state.output)}
    free |= {name: (params.dtype,) for name, params in _input_codes(manifest, segment, variant, executable)}
    for kind, names, specs in (
        ("input", segment.inputs, executable.inputs),
        ("output", segment.outputs, executable.outputs),
    ):
        found = {s.name: s for s in specs}
        for name in [*names, *(n for n in found if n not in names)]:
            want, got = manifest.tensor(name) if name in names else None, found.get(name)
            if want and segment.repeat > 1:
                want = replace(want, shape=(1, *want.shape[1:]))
            if want and got and got.dtype in free.get(name, ()):
                want = replace(want, dtype=got.dtype)
            if want is None or got is None or (got.shape, got.dtype) != (want.shape, want.dtype):
                expected, shown = (
                    f"{t.dtype.value} {list(t.shape)}" if t else "nothing" for t in (want, got)
                )
                raise BundleError(
                    f"payload {variant.name}: {kind} {name}: expected {expected}, got {shown}. "
                    "Build the bundle again"
                )
    tensors = {tensor.name: tensor for tensor in (*executable.inputs, *executable.outputs)}
    for state in private:
        source, target = tensors[state.input], tensors[state.output]
        if source.dtype != target.dtype:
            raise BundleError(
                f"payload {variant.name}: state {state.name}: reads {source.dtype.value} but writes "
                f"{target.dtype.value}, expected one type. Build the bundle again"
            )
        for tensor in (source, target):  # codes go round as they are: another scale changes what they mean
            if state.quant and tensor.quant and not same_codes(tensor.quant, state.quant):
                raise BundleError(
                    f"payload {variant.name}: state {state.name}: {tensor.name} has {_shown(tensor.quant)}, "
                    f"expected {_shown(state.quant)}. Build the bundle again"
                )


def _input_codes(
    manifest: Manifest, segment: Segment, variant: Variant, executable: Executable
) -> Iterator[tuple[str, QuantParams]]:
    """Inputs of the plan that a payload takes as codes, as its variant's options say: those that nothing else reads."""
    found = {spec.name: spec.quant for spec in executable.inputs}
    for name, params in Ports.of(variant).codes.items():
        readers = [step for step in manifest.plan if name in (*step.inputs, step.when)]
        quant = found.get(name)
        if (
            name in manifest.inputs
            and readers == [segment]
            and quant is not None
            and same_codes(quant, params)
        ):
            yield name, params


def _shown(quant: QuantParams) -> str:
    return f"scale {quant.scale[0]:.6g} and zero point {quant.zero_point[0]}"


@dataclass(frozen=True)
class Passing:
    """`candidates`: per segment those that work beside `base`, a combination that works."""

    candidates: Mapping[str, Sequence[Candidate]]
    base: dict[str, Candidate]


def passing_variants(
    bundle: Bundle,
    loaded: Mapping[str, Sequence[Candidate]],
    threads: int,
    refused: Refused,
    kernels: Mapping[str, Executable] | None = None,
) -> Passing:
    """The candidates that pass the self-test; the others go to `refused`.

    The golden values are those of the whole plan, so candidates are tested in combination: first
    until one combination passes, then each other candidate in its place.
    Raises: SelfTestError when nothing passes.
    """
    verdicts: dict[tuple[str, ...], EdgekitError | None] = {}

    def passes(plan: Mapping[str, Candidate]) -> bool:
        key = tuple(candidate.name for candidate in plan.values())
        if key not in verdicts:
            verdicts[key] = _verdict(bundle, plan, threads, kernels or {})
        return verdicts[key] is None

    combinations = itertools.islice(itertools.product(*loaded.values()), MAX_COMBINATIONS)
    plans = (dict(zip(loaded, combination, strict=True)) for combination in combinations)
    base = next((plan for plan in plans if passes(plan)), None)
    if base is None:
        failures = [error for error in verdicts.values() if error is not None]
        verdicts.clear()
        raise _worst(failures)
    passing: dict[str, list[Candidate]] = {}
    for segment, candidates in loaded.items():
        passing[segment] = []
        for candidate in candidates:
            plan = {**base, segment: candidate}
            if passes(plan):
                passing[segment].append(candidate)
            else:
                refused[candidate.name] = str(verdicts[tuple(c.name for c in plan.values())])
    return Passing(passing, base)


def _works_together(
    bundle: Bundle,
    chosen: Mapping[str, Candidate],
    passing: Passing,
    threads: int,
    kernels: Mapping[str, Executable],
) -> bool:
    """Each winner passed beside the base; several at once are another combination."""
    replaced = [name for name, candidate in chosen.items() if candidate is not passing.base[name]]
    return len(replaced) < 2 or _verdict(bundle, chosen, threads, kernels) is None


def _session(bundle: Bundle, plan: Mapping[str, Candidate], kernels: Mapping[str, Executable]) -> Session:
    return Session(bundle.manifest, {**kernels, **{name: c.executable for name, c in plan.items()}})


def _verdict(
    bundle: Bundle, plan: Mapping[str, Candidate], threads: int, kernels: Mapping[str, Executable]
) -> EdgekitError | None:
    try:
        with _session(bundle, plan, kernels) as session:
            self_test(bundle, session, [c.variant.name for c in plan.values()], threads)
    except EdgekitError as error:
        return _without_frames(error)
    return None


def _without_frames(error: EdgekitError) -> EdgekitError:
    """An error that may be kept: frames, and through them the mapped bundle, would live as long as it."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def tune(
    path: Path,
    *,
    threads: int = 0,
    rounds: int = tuning.THOROUGH.rounds,
    cache_dir: Path | None = None,
    opened: Callable[[Bundle], None] | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Measure the variants of the bundle at `path` thoroughly and record the winner (`edgekit tune`).

    opened: called with the bundle before anything runs. Returns JSON values: bundle, payload_digest,
    device, record (file name, or None when there is nothing to choose) and per segment a table of its
    variants, in the bundle's order: status `chosen`, `slower`, `refused` or `only`, times in ms
    (None when not timed), ratio to the chosen one, and why.
    Raises: as `load`; OutputError when the record cannot be written.
    """
    with Bundle.open(path) as bundle:
        if opened is not None:
            opened(bundle)
        plan = segments(bundle)
        effort = replace(tuning.THOROUGH, rounds=rounds)
        options = LoadOptions(threads, cache_dir, progress=progress)
        kernels = load_kernels(bundle, options)
        selected = select(bundle, plan, options, effort=effort, fresh=True, kernels=kernels)
        try:
            record = selected.record
            stored = None if record is None else tuning.store(record, cache_dir)
            backends = [variant.backend for _, variant in bundle.manifest.variants()]
            return {
                "bundle": str(path),
                "payload_digest": bundle.payload_digest,
                "device": record.device if record else tuning.device(backends, threads),
                "record": None if stored is None else str(stored),
                "segments": [
                    {
                        "segment": segment.name,
                        "chosen": selected.chosen[segment.name].variant.name,
                        "why": selected.why[segment.name],
                        "variants": [_row(segment, variant, selected) for variant in segment.variants],
                    }
                    for segment in plan
                ],
            }
        finally:
            close(list(selected.chosen.values()))


def _row(segment: Segment, variant: Variant, selected: Selection) -> dict[str, Any]:
    name = f"{segment.name}/{variant.name}"
    timing = selected.record.timing(name) if selected.record else None
    used = selected.chosen[segment.name].name == name
    status = "chosen" if used else "slower" if timing else "refused"
    row: dict[str, Any] = {
        "variant": variant.name,
        "backend": variant.backend,
        "precision": variant.precision,
        "bytes": variant.bytes,
        "status": "only" if used and len(segment.variants) == 1 else status,
        "why": selected.why[segment.name] if used else selected.refused.get(name, ""),
    }
    figures = ("median_ms", "p25_ms", "p75_ms", "min_ms", "rounds", "ratio")
    return row | {key: getattr(timing, key) if timing else None for key in figures}


def _race(
    bundle: Bundle,
    passing: Passing,
    options: LoadOptions,
    effort: tuning.Effort,
    kernels: Mapping[str, Executable],
) -> tuning.Record:
    """Time the candidates of every segment that has several, on what it gets in a run on the bundle's golden input;
    of a repeated one a single slice."""
    backends = [variant.backend for _, variant in bundle.manifest.variants()]
    chosen = {name: candidates[0].variant.name for name, candidates in passing.candidates.items()}
    several = [name for name, candidates in passing.candidates.items() if len(candidates) > 1]
    table: list[tuning.Timing] = []
    if several:
        values = _flow(bundle, passing.base, kernels)
        share = replace(effort, budget_s=effort.budget_s / len(several))
        for name in several:
            candidates = passing.candidates[name]
            if options.progress:
                options.progress(0.0, f"timing {len(candidates)} variants of {name}")
            bindings: list[Binding] = []
            try:
                for candidate in candidates:
                    bindings.append(candidate.executable.bind())
                    for tensor, array in bindings[-1].inputs.items():
                        value = values[tensor]
                        if value.shape != array.shape:
                            value = value[: len(array)]  # of a repeated step
                        _fill(bundle.manifest, candidate, tensor, array, value)
                named = zip(candidates, bindings, strict=True)
                samples = tuning.race({c.name: b.run for c, b in named}, share)
            finally:
                for binding in bindings:
                    binding.close()
            best = tuning.winner(samples)
            chosen[name] = best.split("/", 1)[1]
            table += tuning.timings(samples, best)
    facts = tuning.device(backends, options.threads)
    return tuning.Record(bundle.payload_digest, facts, chosen, tuple(table))


def _flow(
    bundle: Bundle, plan: Mapping[str, Candidate], kernels: Mapping[str, Executable]
) -> dict[str, np.ndarray]:
    """Every tensor of the plan for the bundle's golden input, computed by `plan`; states that have none are
    at their initial values. No run of a race changes what the next one reads."""
    manifest = bundle.manifest
    given = {state.input: initial_value(state) for state in manifest.states}
    given |= {golden.tensor: golden_values(bundle, golden) for golden in manifest.golden.inputs}
    if len(manifest.plan) == 1:
        return given
    with _session(bundle, plan, kernels) as session:
        set_golden(bundle, session)
        session.run()
        return {name: array.copy() for name, array in session.buffers.items()} | given


def _fill(
    manifest: Manifest, candidate: Candidate, tensor: str, array: np.ndarray, value: np.ndarray
) -> None:
    """`value`, as the manifest types it, into a payload's array; a state or an input may be held as codes there."""
    state = next((s for s in manifest.states if s.input == tensor), None)
    if state is None:
        fill(array, value, Ports.of(candidate.variant).codes.get(tensor))
    else:
        np.copyto(
            array, convert(value, state, held_as(state, array)) if array.dtype != value.dtype else value
        )


def _worst(failures: list[EdgekitError]) -> EdgekitError:
    """What to tell: an engine that computes wrong before one that misses something; other reasons behind.

    Empties `failures`: a frame that holds its own exception is a cycle, and would keep the bundle mapped.
    """
    assert failures, "a segment has at least one variant"
    first = next((e for e in failures if isinstance(e, SelfTestError)), failures[0])
    others = list(dict.fromkeys(str(e) for e in failures if str(e) != str(first)))
    if others:
        first.args = (f"{first}. The other variants: {'; '.join(others)}",)
    failures.clear()
    return first


def close(candidates: Sequence[Candidate]) -> None:
    for candidate in candidates:
        candidate.executable.close()
