"""Heads that no matcher knows: the user declares what the columns of the output mean."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgekit.errors import ModelError, UsageError, did_you_mean
from edgekit.passes.graph import clean, listed, shape
from edgekit.tasks.detect.spec import DetectHead

CORNERS = ("x1", "y1", "x2", "y2")
CENTRE = ("cx", "cy", "w", "h")
_KNOWN = {*CORNERS, *CENTRE, "obj", "score", "class", "cls*"}


def declared_rows(
    model: ir.Model,
    columns: Sequence[str],
    *,
    num_classes: int | None = None,
    normalized: bool = False,
) -> tuple[ir.Model, DetectHead]:
    """A copy of `model` with the one output that fits, and its head of family `rows`.

    `columns` in order: `x1 y1 x2 y2` or `cx cy w h`, then `obj` (if the graph does not multiply it
    in), then `score class` or `cls*` (one column per class). The output is [1, N, D] or [1, D, N].
    `num_classes` is needed with `score class`, and checked against D with `cls*`.
    Raises: UsageError for columns that make no sense, ModelError when no output fits them.
    """
    names = tuple(columns)
    _check_columns(names)
    model = model.clone()
    fixed = len(names) - ("cls*" in names)
    if "cls*" not in names and num_classes is None:
        raise UsageError("columns: the class count is not known from 'score class', give the class names.")
    want = f"{fixed} columns" if "cls*" not in names else f"{fixed} columns and one per class"
    wanted_width = None
    if "cls*" not in names:
        wanted_width = fixed
    elif num_classes is not None:
        wanted_width = fixed + num_classes
    fitting: list[tuple[ir.Value, int, bool]] = []
    for value in model.graph.outputs:
        sizes = shape(value)
        if sizes is None or len(sizes) != 3 or sizes[0] != 1:
            continue
        for width, transposed in ((sizes[2], False), (sizes[1], True)):
            rows = sizes[1] if not transposed else sizes[2]
            if width == wanted_width or (wanted_width is None and fixed < width < rows):
                fitting.append((value, width, transposed))
                break
    if len(fitting) != 1:
        count = f"{wanted_width} in all" if wanted_width is not None else "classes not given"
        problem = "no output fits" if not fitting else "several outputs fit"
        raise ModelError(
            f"model: {problem} the declared columns {','.join(names)}, expected one [1, N, D] or [1, D, N] "
            f"with {want} ({count}), got {listed(model.graph.outputs)}. Correct --columns or the class names."
        )
    value, width, transposed = fitting[0]
    assert value.name is not None
    if num_classes is None:
        num_classes = width - fixed
    model.graph.outputs.clear()
    model.graph.outputs.append(value)
    clean(model)
    head = DetectHead(
        "rows", num_classes, rows=value.name, columns=names, transposed=transposed, normalized=normalized
    )
    return model, head


def _check_columns(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in _KNOWN:
            raise UsageError(f"column {name!r}: unknown. {did_you_mean(name, _KNOWN)}")
    rest = names[4:]
    if names[:4] not in (CORNERS, CENTRE):
        raise UsageError(
            f"columns {','.join(names)}: expected to begin with x1,y1,x2,y2 or cx,cy,w,h, "
            f"got {','.join(names[:4])}."
        )
    if rest[:1] == ("obj",):
        rest = rest[1:]
    if rest not in (("score", "class"), ("cls*",)):
        raise UsageError(
            f"columns {','.join(names)}: expected to end with score,class or cls*, "
            f"got {','.join(rest) or 'nothing'}."
        )
