"""Which payload of each segment runs here: load every one, test every one, keep the fastest that passes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgekit.backends.base import Executable, LoadOptions, half
from edgekit.bundle import Bundle
from edgekit.errors import BundleError, EdgekitError, SelfTestError, UsageError, did_you_mean
from edgekit.host import backend_problem
from edgekit.manifest import Manifest, Segment, Variant
from edgekit.runtime.selftest import self_test
from edgekit.runtime.session import Session

RACE_RUNS = 7
"""Runs by which the fastest of several variants is chosen; the first ones warm up."""
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
    executable = half(variant.backend, "engine").load(
        bundle.read(variant.path), variant, replace(options, cache_key=variant.digest)
    )
    try:
        _check_io(bundle.manifest, segment, variant, executable)
    except BaseException:
        executable.close()
        raise
    return Candidate(segment.name, variant, executable)


def _check_io(manifest: Manifest, segment: Segment, variant: Variant, executable: Executable) -> None:
    for kind, names, specs in (
        ("input", segment.inputs, executable.inputs),
        ("output", segment.outputs, executable.outputs),
    ):
        found = {s.name: s for s in specs}
        for name in [*names, *(n for n in found if n not in names)]:
            want, got = manifest.tensor(name) if name in names else None, found.get(name)
            if want is None or got is None or (got.shape, got.dtype) != (want.shape, want.dtype):
                expected, shown = (
                    f"{t.dtype.value} {list(t.shape)}" if t else "nothing" for t in (want, got)
                )
                raise BundleError(
                    f"payload {variant.name}: {kind} {name}: expected {expected}, got {shown}. "
                    "Build the bundle again"
                )


def choose(
    bundle: Bundle, loaded: Mapping[str, Sequence[Candidate]], test: bool, threads: int, refused: Refused
) -> dict[str, Candidate]:
    """Per segment the fastest candidate that passes the self-test; the others go to `refused`.

    The golden values are those of the whole plan, so candidates are tested in combination: first
    until one combination passes, then each other candidate in its place. With `test` false
    all count as passed. Raises: SelfTestError when nothing passes.
    """
    if not test:
        return {segment: _fastest(candidates, refused) for segment, candidates in loaded.items()}
    verdicts: dict[tuple[str, ...], EdgekitError | None] = {}

    def passes(plan: Mapping[str, Candidate]) -> bool:
        key = tuple(candidate.name for candidate in plan.values())
        if key not in verdicts:
            verdicts[key] = _verdict(bundle, plan, threads)
        return verdicts[key] is None

    combinations = itertools.islice(itertools.product(*loaded.values()), MAX_COMBINATIONS)
    plans = (dict(zip(loaded, combination, strict=True)) for combination in combinations)
    base = next((plan for plan in plans if passes(plan)), None)
    if base is None:
        failures = [error for error in verdicts.values() if error is not None]
        verdicts.clear()
        raise _worst(failures)
    chosen = {}
    for segment, candidates in loaded.items():
        passing = []
        for candidate in candidates:
            plan = {**base, segment: candidate}
            if passes(plan):
                passing.append(candidate)
            else:
                refused[candidate.name] = str(verdicts[tuple(c.name for c in plan.values())])
        chosen[segment] = _fastest(passing, refused)
    # each passed beside the base; several at once are another combination
    return chosen if passes(chosen) else base


def _verdict(bundle: Bundle, plan: Mapping[str, Candidate], threads: int) -> EdgekitError | None:
    try:
        with Session(bundle.manifest, {name: c.executable for name, c in plan.items()}) as session:
            self_test(bundle, session, [c.variant.name for c in plan.values()], threads)
    except EdgekitError as error:
        return _without_frames(error)
    return None


def _without_frames(error: EdgekitError) -> EdgekitError:
    """An error that may be kept: frames, and through them the mapped bundle, would live as long as it."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _fastest(candidates: Sequence[Candidate], refused: Refused) -> Candidate:
    if len(candidates) == 1:
        return candidates[0]
    times = [_race(candidate.executable) for candidate in candidates]
    best = min(range(len(candidates)), key=times.__getitem__)
    for candidate, seconds in zip(candidates, times, strict=True):
        if candidate is not candidates[best]:
            refused[candidate.name] = (
                f"slower here than {candidates[best].name}: {1e3 * seconds:.3g} ms against {1e3 * times[best]:.3g} ms"
            )
    return candidates[best]


def _race(executable: Executable) -> float:
    """Best of a few runs, seconds."""
    binding = executable.bind()
    try:
        best = float("inf")
        for _ in range(RACE_RUNS):
            start = time.perf_counter()
            binding.run()
            best = min(best, time.perf_counter() - start)
        return best
    finally:
        binding.close()


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
