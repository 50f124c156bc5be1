"""Graph passes on `onnx_ir`: one pass a file, each checked after it ran.

A pass is a module of this package with `run(model) -> int` (in place; how much changed) and
`TOLERANCE`: the largest |difference| of an output it may cause, as a fraction of that output's
largest magnitude (at least 1). 0 means bit for bit. A new pass is a new file.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from edgekit.errors import ModelError, UsageError, did_you_mean
from edgekit.tasks.detect.spec import DetectHead

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from edgekit.tasks.preprocess import ImagePreprocess

BEFORE_SPLIT = ("fold_constants", "remove_identity", "fuse_batchnorm")
AFTER_SPLIT = (
    "fold_constants",
    "remove_identity",
    "fuse_batchnorm",
    "fuse_pad",
    "fold_focus",
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
    `preprocess` is the input rule found, `log` what ran."""

    model: ir.Model
    head: DetectHead | None
    log: tuple[PassRecord, ...]
    preprocess: ImagePreprocess | None = None
    notes: tuple[str, ...] = field(default=())


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


class _Reference:
    """Outputs of the model as it came, to hold every pass against."""

    def __init__(self, model: ir.Model) -> None:
        from edgekit.passes import probe

        self.feeds = probe.pictures(model)
        self.outputs = probe.evaluate(model, self.feeds)
        if not _finite(self.outputs):  # a network trained on 0..1 may overflow exp at 0..255
            self.feeds = probe.pictures(model, peak=1.0)
            self.outputs = probe.evaluate(model, self.feeds)

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
            _fail(
                name,
                records,
                f"changed output {worst!r} by {relative:.2e} of its range, expected at most {tolerance:.0e}",
            )
        self.outputs = outputs  # differences are per pass, they must not add up against the next one
        return diff


def _finite(outputs: Mapping[str, np.ndarray]) -> bool:
    import numpy as np

    return all(bool(np.isfinite(o).all()) for o in outputs.values())
