"""Graph passes on `onnx_ir`: one pass a file, each checked after it ran.

A pass is a module of this package with `run(model) -> int` (in place; how much changed) and
`TOLERANCE`: the largest |difference| of an output it may cause, as a fraction of that output's
largest magnitude (at least 1). 0 means bit for bit. A new pass is a new file.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from edgekit.errors import ModelError, UsageError, did_you_mean
from edgekit.schema import printable
from edgekit.tasks.detect.spec import DetectHead

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgekit.passes.streamify import Streamified
    from edgekit.tasks.preprocess import ImagePreprocess

BEFORE_SPLIT = ("fold_constants", "remove_identity", "fuse_batchnorm")
AFTER_SPLIT = (
    "fold_constants",
    "remove_identity",
    "fuse_batchnorm",
    "fuse_pad",
    "fold_focus",
    "fold_shuffle",
    "join_slices",
    "normalize_silu",
    "compact",
)
"""The recipe. Passes that help finding the head run first; the rest see the head already cut."""


class PassError(ModelError):
    """A pass broke the graph: a fault of edgekit, reported with the pass and those before it."""


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran. `max_abs_diff`: of any output before and after it, None if not checked;
    `seconds` is informational; `note`: a finding worth telling the user."""

    name: str
    nodes_before: int
    nodes_after: int
    changed: int
    max_abs_diff: float | None = None
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Prepared:
    """A network ready for calibration and lowering. `head` is None for tasks without one;
    `preprocess` is the input rule found, `log` what ran; `activation`: for the tasks `classify` and `video`,
    what turns the output into scores (tasks.classify.spec); `streamed`: how a clip model became this
    one-frame model, whose states `passes.states` reads."""

    model: ir.Model
    head: DetectHead | None
    log: tuple[PassRecord, ...]
    preprocess: ImagePreprocess | None = None
    notes: tuple[str, ...] = field(default=())
    activation: str = ""
    streamed: Streamified | None = None


def names() -> tuple[str, ...]:
    """Every pass that `run_passes` knows, found by its file."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "run") and hasattr(module, "TOLERANCE"):
            found.append(info.name)
    return tuple(sorted(found))


def run_passes(
    model: ir.Model, names: Sequence[str], *, check: bool = True
) -> tuple[ir.Model, tuple[PassRecord, ...]]:
    """Run passes in order on a copy of `model`.

    With `check`, after each pass that changed something the graph must pass onnx's checker with
    shape inference, and its outputs on a seeded picture must stay within the pass's tolerance.
    Raises: PassError (a ModelError) that names the failing pass and those before it; UsageError
    for an unknown pass; ModelError when the model itself cannot run.
    """
    known = {name: _load(name) for name in names}
    model = model.clone()
    reference = _Reference(model) if check else None
    records: list[PassRecord] = []
    for name in names:
        start, before = time.perf_counter(), len(model.graph)
        try:
            changed = known[name].run(model)
        except Exception as error:  # noqa: BLE001 - whatever a pass trips over is reported with its name
            _fail(name, records, f"stopped with {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        diff = None
        if reference is not None:
            diff = reference.check(model, known[name].TOLERANCE, name, records) if changed else 0.0
        seconds = time.perf_counter() - start
        records.append(PassRecord(name, before, len(model.graph), int(changed), diff, seconds))
    return model, tuple(records)


def prepare(
    model: ir.Model,
    *,
    task: str = "detect",
    head: str | None = None,
    num_classes: int | None = None,
    columns: Sequence[str] | None = None,
    normalized: bool = False,
    frames: int | None = None,
    allow_bidirectional: bool = False,
    nominal_dt_s: float | None = None,
    check: bool = True,
) -> Prepared:
    """The whole recipe on a copy of `model`: simplify, cut the head (detect) or Softmax (classify, video), fuse,
    compact. For the task `video` a clip model becomes a one-frame model first (passes.streamify).

    head: a family of tasks.detect.spec, None to find it, "rows" to keep the output and read it by
    `columns` (with `normalized` coordinates or not). `num_classes`: how many names the user has.
    frames, allow_bidirectional, nominal_dt_s: of a clip model, see passes.streamify.streamify.
    check: verify every pass, and the found head against the decode in the graph, on a seeded picture.
    Raises: ModelError (PassError among them), UsageError.
    """
    from edgekit.passes import find_input_rule, probe
    from edgekit.passes.graph import clean

    log: list[PassRecord] = []
    if task == "classify":
        return _prepare_classifier(model, check)
    if task == "video":
        return _prepare_video(model, frames, allow_bidirectional, nominal_dt_s, check)
    if task != "detect":
        model, records = run_passes(model, AFTER_SPLIT, check=check)
        return Prepared(model, None, records)
    if (head == "rows") != (columns is not None):
        raise UsageError(
            "head 'rows': needs its columns, and only it has them. Give --head rows --columns LIST."
        )
    model, records = run_passes(model, BEFORE_SPLIT, check=check)
    log += records
    start = time.perf_counter()
    if columns is not None:
        from edgekit.passes.declared_rows import declared_rows

        cut, found = declared_rows(model, columns, num_classes=num_classes, normalized=normalized)
        notes: tuple[str, ...] = ()
        difference = None
    else:
        from edgekit.passes.check_head import check_head
        from edgekit.passes.split_head import split

        result = split(model, family=head, num_classes=num_classes)
        cut, found, notes = result.model, result.head, result.notes
        difference = None
        if check:
            feeds = probe.finite_pictures(model)[0]
            difference, remark = check_head(model, cut, found, feeds)
            notes += (remark,) if remark else ()
    seconds = time.perf_counter() - start
    name = "declared_rows" if columns is not None else "split_head"
    removed = len(model.graph) - len(cut.graph)
    log.append(
        PassRecord(name, len(model.graph), len(cut.graph), removed, difference, seconds, "; ".join(notes))
    )
    rule, why = find_input_rule.find_input_rule(model, found)
    clean(cut)
    cut, records = run_passes(cut, AFTER_SPLIT, check=check)
    return Prepared(cut, found, (*log, *records), rule, (*notes, why))


def _prepare_video(
    model: ir.Model, frames: int | None, allow_bidirectional: bool, nominal_dt_s: float | None, check: bool
) -> Prepared:
    """One frame at a time: a model that says what its states are as it is, a clip model through streamify."""
    from edgekit.passes.states import KEY, states

    if KEY in model.metadata_props:
        found = states(model)
        notes = [f"a one-frame model with {len(found)} states of {sum(s.elements for s in found)} elements"]
        if allow_bidirectional:
            notes.append(
                "allow_bidirectional changes nothing: a one-frame model has no later frames to look at"
            )
        prepared = _prepare_classifier(model, check)
        return replace(prepared, notes=(*notes, *prepared.notes))
    from edgekit.passes.streamify import streamify

    start = time.perf_counter()
    made = streamify(model, frames=frames, allow_bidirectional=allow_bidirectional, nominal_dt_s=nominal_dt_s)
    elements = sum(s.elements for s in made.states)
    how = "equal to it" if made.exact else "another network than it"
    note = (
        f"streamify: the clip model of {made.frames} frames became a one-frame model with {len(made.states)} states of "
        f"{elements} elements, {how}"
    )
    nodes = len(model.graph), len(made.model.graph)
    seconds = time.perf_counter() - start
    record = PassRecord(
        "streamify", *nodes, len(made.shifts), made.difference, seconds, "; ".join(made.notes)
    )
    prepared = _prepare_classifier(made.model, check)
    said = (note, *made.notes, *prepared.notes)
    return replace(prepared, log=(record, *prepared.log), notes=said, streamed=made)


def _prepare_classifier(model: ir.Model, check: bool) -> Prepared:
    """Simplified, its Softmax cut off, fused. The input rule is one that the graph states itself, or None."""
    from edgekit.passes import find_input_rule, split_softmax

    model, before = run_passes(model, BEFORE_SPLIT, check=check)
    start = time.perf_counter()
    result = split_softmax.split(model)
    nodes = len(model.graph), len(result.model.graph)
    record = PassRecord(
        "split_softmax",
        *nodes,
        nodes[0] - nodes[1],
        result.difference,
        time.perf_counter() - start,
        result.note,
    )
    rule, why = find_input_rule.find_input_rule(model, None)
    cut, after = run_passes(result.model, AFTER_SPLIT, check=check)
    notes = (result.note, why) if result.note else (why,)
    return Prepared(cut, None, (*before, record, *after), rule, notes, result.activation)


def _load(name: str) -> Any:
    try:
        module = importlib.import_module(f"{__name__}.{name}") if name.isidentifier() else None
    except ModuleNotFoundError:
        module = None
    if module is None or not hasattr(module, "run") or not hasattr(module, "TOLERANCE"):
        raise UsageError(f"pass {name!r}: unknown. {did_you_mean(name, names())}")
    return module


def _fail(name: str, records: Sequence[PassRecord], problem: str) -> NoReturn:
    before = ", ".join(r.name for r in records) or "none"
    raise PassError(
        f"pass {name}: {problem} (passes before it: {before}). "
        "Report it with the model; build goes on without the pass if it is left out of the recipe."
    ) from None


def _finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())


class _Reference:
    """Outputs of the model as it came, to hold every pass against."""

    def __init__(self, model: ir.Model) -> None:
        from edgekit.passes import probe

        self.feeds, self.outputs = probe.finite_pictures(model)

    def check(self, model: ir.Model, tolerance: float, name: str, records: Sequence[PassRecord]) -> float:
        import onnx.checker
        import onnx_ir as ir

        from edgekit.passes import probe

        try:
            onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
            outputs = probe.evaluate(model, self.feeds)
        except Exception as error:  # noqa: BLE001 - the checker raises several kinds; all mean a broken graph
            _fail(name, records, f"left an invalid graph: {' '.join(str(error).split())[:200]}")
        diff, relative, worst = probe.largest_difference(self.outputs, outputs)
        if relative > tolerance:
            odd = sorted(n for n, o in self.outputs.items() if o.dtype.kind == "f" and not _finite(o))
            if odd:  # what overflows depends on the order of sums: nothing to hold a pass against
                raise ModelError(
                    f"model: output '{printable(odd[0])}' is NaN or Inf on an ordinary picture, expected "
                    "finite values. Check the weights and the checkpoint that it was exported from."
                )
            _fail(
                name,
                records,
                f"changed output '{printable(worst)}' by {relative:.2e} of its range, expected at most {tolerance:.0e}",
            )
        self.outputs = outputs  # differences are per pass, they must not add up against the next one
        return diff
