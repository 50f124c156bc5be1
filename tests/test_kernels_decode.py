from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.decode import Decoder, decode, reference
from edgekit.tasks.detect.spec import Channels, DetectHead, HeadLevel
from tests.helpers import shared_data
from tests.test_kernels import PATHS, using

SIZE = (48, 32)
ANCHORS = ((10.0, 13.0), (33.0, 23.0))
ROW_COLUMNS = (
    ("cx", "cy", "w", "h", "obj", "cls*"),
    ("cx", "cy", "w", "h", "cls*"),
    ("x1", "y1", "x2", "y2", "score", "class"),
    ("class", "score", "x1", "y1", "x2", "y2"),
    ("x1", "y1", "x2", "y2", "obj", "score", "class"),
)
Outputs = Mapping[str, np.ndarray]


def split_head(family: str, classes: int, bins: int = 0, offset: float = 0.0) -> DetectHead:
    """One tensor per value kind and stride (8 and 16)."""
    levels = tuple(
        HeadLevel(
            stride=s,
            box=Channels(f"box{s}"),
            classes=Channels(f"cls{s}"),
            objectness=Channels(f"obj{s}") if family in ("yolox", "fastestdet") else None,
        )
        for s in (8, 16)
    )
    return DetectHead(family, classes, levels, bins=bins, cell_offset=offset)  # type: ignore[arg-type]


def joint_head(family: str, classes: int) -> DetectHead:
    """All values of a stride in one tensor, as YOLOv5 (anchors) and FastestDet have it."""
    if family == "yolov5":
        box, objectness, first, anchors = 0, 4, 5, ANCHORS
    else:
        box, objectness, first, anchors = 1, 0, 5, ()
    levels = tuple(
        HeadLevel(
            s, Channels(f"all{s}", box), Channels(f"all{s}", first), Channels(f"all{s}", objectness), anchors
        )
        for s in (8, 16)
    )
    return DetectHead(family, classes, levels)  # type: ignore[arg-type]


def heads(classes: int) -> list[DetectHead]:
    rows = []
    for k, columns in enumerate(ROW_COLUMNS):
        rows.append(
            DetectHead(
                "rows", classes, rows="rows", columns=columns, transposed=k % 2 == 1, normalized=k in (0, 2)
            )
        )
    return [
        split_head("yolox", classes),
        split_head("fastestdet", classes),
        split_head("yolov8", classes, bins=4, offset=0.5),
        split_head("nanodet", classes, bins=3),
        joint_head("yolov5", classes),
        joint_head("fastestdet", classes),
        *rows,
    ]


def shapes(head: DetectHead) -> dict[str, tuple[int, ...]]:
    if head.family == "rows":
        columns = len(head.columns) - 1 + head.num_classes if "cls*" in head.columns else len(head.columns)
        return {"rows": (1, columns, 23) if head.transposed else (1, 23, columns)}
    result = {}
    for s in (8, 16):
        grid = (math.ceil(SIZE[1] / s), math.ceil(SIZE[0] / s))
        if head.levels[0].box.tensor.startswith("all"):
            result[f"all{s}"] = (1, (5 + head.num_classes) * max(1, len(head.levels[0].anchors)), *grid)
        else:
            result[f"box{s}"] = (1, 4 * max(1, head.bins), *grid)
            result[f"cls{s}"] = (1, head.num_classes, *grid)
            if head.levels[0].objectness is not None:
                result[f"obj{s}"] = (1, 1, *grid)
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[DetectHead, dict[str, np.ndarray], float]:
    classes = draw(st.sampled_from((1, 2, 7)))
    head = draw(st.sampled_from(heads(classes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale, odd = draw(st.sampled_from((0.5, 3.0, 40.0))), draw(st.booleans())
    nhwc = draw(st.booleans())
    outputs = {}
    for name, shape in shapes(head).items():
        values = rng.normal(0, scale, shape).astype(np.float32)
        if head.family == "rows":
            values = np.abs(values) / np.float32(scale)
        if odd:  # NaN, infinities, ties and zeros in a fifth of the values
            special = np.array([np.nan, np.inf, -np.inf, 0.0, 2.0], np.float32)
            values = np.where(rng.random(shape) < 0.2, rng.choice(special, shape), values)
        if nhwc and len(shape) == 4:
            values = np.ascontiguousarray(values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        outputs[name] = values
    threshold = draw(st.sampled_from((0.0, 1e-6, 0.01, 0.25, 0.5, 0.9, 0.9999, 1.0)))
    return head, outputs, threshold


@settings(deadline=None, max_examples=600)
@given(case=cases())
def test_native_is_the_reference_bit_for_bit(case: tuple[DetectHead, dict[str, np.ndarray], float]) -> None:
    head, outputs, threshold = case
    with using("numpy"):
        expected = decode(outputs, head, *SIZE, threshold)
    for isa in ("auto", "portable"):
        with using("native"):
            got = Decoder(head, *SIZE, isa=isa).run(outputs, threshold)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert a.tobytes() == b.tobytes()


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def plain(head: DetectHead, outputs: Outputs, threshold: float) -> list[tuple[float, ...]]:
    """The formulas of tasks/detect/spec.py, cell by cell: (x1, y1, x2, y2, score, class)."""
    found = []

    def keep(score: float, label: int, *box: float) -> None:
        if score >= threshold and score > 0:
            found.append((*box, score, float(label)))

    def around(cx: float, cy: float, w: float, h: float) -> tuple[float, ...]:
        return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2

    if head.family == "rows":
        rows = outputs["rows"][0].T if head.transposed else outputs["rows"][0]
        for row in rows.astype(float):
            values = dict(
                zip(
                    head.columns[: head.columns.index("cls*")] if "cls*" in head.columns else head.columns,
                    row,
                    strict=False,
                )
            )
            if "cls*" in head.columns:
                classes = row[len(head.columns) - 1 :]
                score, label = classes.max(), int(classes.argmax())
            else:
                score, label = values["score"], round(values["class"])
                if not 0 <= label < head.num_classes:
                    continue
            score *= values.get("obj", 1.0)
            w, h = SIZE if head.normalized else (1, 1)
            if "cx" in values:
                box = around(values["cx"] * w, values["cy"] * h, values["w"] * w, values["h"] * h)
            else:
                box = (values["x1"] * w, values["y1"] * h, values["x2"] * w, values["y2"] * h)
            keep(score, label, *box)
        return found
    for level in head.levels:
        for a, anchor in enumerate(level.anchors or ((0.0, 0.0),)):
            shift = a * (5 + head.num_classes)
            box_t, class_t = outputs[level.box.tensor][0], outputs[level.classes.tensor][0]
            for y in range(box_t.shape[1]):
                for x in range(box_t.shape[2]):
                    start = level.classes.start + shift
                    logits = class_t[start : start + head.num_classes, y, x].astype(float)
                    label = int(logits.argmax())
                    t = box_t[level.box.start + shift :, y, x].astype(float)
                    obj = 0.0
                    if level.objectness is not None:
                        obj = float(outputs[level.objectness.tensor][0, level.objectness.start + shift, y, x])
                    if head.family == "yolox":
                        score = s(obj) * s(logits[label])
                        box = around(
                            (t[0] + x) * level.stride,
                            (t[1] + y) * level.stride,
                            math.exp(min(t[2], 80)) * level.stride,
                            math.exp(min(t[3], 80)) * level.stride,
                        )
                    elif head.family == "yolov5":
                        score = s(obj) * s(logits[label])
                        box = around(
                            (2 * s(t[0]) - 0.5 + x) * level.stride,
                            (2 * s(t[1]) - 0.5 + y) * level.stride,
                            (2 * s(t[2])) ** 2 * anchor[0],
                            (2 * s(t[3])) ** 2 * anchor[1],
                        )
                    elif head.family == "fastestdet":
                        soft = np.exp(logits - logits.max())
                        score = s(obj) ** 0.6 * (soft / soft.sum()).max() ** 0.4
                        box = around(
                            (x + math.tanh(t[0])) * level.stride,
                            (y + math.tanh(t[1])) * level.stride,
                            s(t[2]) * SIZE[0],
                            s(t[3]) * SIZE[1],
                        )
                    else:
                        score = s(logits[label])
                        bins = t[: 4 * head.bins].reshape(4, head.bins)
                        p = np.exp(bins - bins.max(axis=1, keepdims=True))
                        side = (p * np.arange(head.bins)).sum(axis=1) / p.sum(axis=1)
                        cx, cy = x + head.cell_offset, y + head.cell_offset
                        box = (cx - side[0], cy - side[1], cx + side[2], cy + side[3])
                        box = tuple(v * level.stride for v in box)
                    keep(score, label, *box)
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", range(len(heads(3))))
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.6])
def test_formulas(path: str, index: int, threshold: float) -> None:
    head = heads(3)[index]
    rng = np.random.default_rng(index)
    outputs = {name: rng.normal(0, 1.5, shape).astype(np.float32) for name, shape in shapes(head).items()}
    if head.family == "rows":  # activated values: 0..1, classes and coordinates 0..
        rows = np.abs(outputs["rows"])
        bounded = [k for k, name in enumerate(head.columns) if name in ("obj", "score")]
        if "cls*" in head.columns:
            bounded += range(len(head.columns) - 1, len(head.columns) - 1 + head.num_classes)
        columns = rows[0] if head.transposed else rows[0].T
        columns[bounded] = np.minimum(columns[bounded], 1)
        outputs = {"rows": rows}
    expected = plain(head, outputs, threshold)
    assert expected, "the case shows nothing"
    with using(path):
        boxes, scores, classes = decode(outputs, head, *SIZE, threshold)
    table = np.array(expected)
    assert len(boxes) == len(table)
    np.testing.assert_allclose(boxes, table[:, :4], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(scores, table[:, 4], rtol=1e-6)
    np.testing.assert_array_equal(classes, table[:, 5])


def test_elementary_functions() -> None:
    x = np.concatenate(
        [np.linspace(-750, 750, 30001), np.linspace(-2, 2, 30001), [0.0, np.inf, -np.inf, np.nan]]
    )
    with np.errstate(all="ignore"):
        inside = np.abs(x) <= 708
        np.testing.assert_allclose(reference.exp(x)[inside], np.exp(x[inside]), rtol=4e-16)
        np.testing.assert_array_equal(
            reference.exp(np.array([-709.0, 709.0, np.inf, -np.inf])), [0, np.inf, np.inf, 0]
        )
        assert np.isnan(reference.exp(np.array([np.nan]))).all()
        np.testing.assert_allclose(reference.tanh(x), np.tanh(x), rtol=1e-15, atol=2e-16)
        below = np.linspace(-87, 0, 100_001).astype(np.float32)
        assert reference.exp32(below).dtype == np.float32
        np.testing.assert_allclose(
            reference.exp32(below), np.exp(below.astype(float)), rtol=1.8e-7
        )  # 3 half ulp
        np.testing.assert_array_equal(reference.exp32(np.array([-88, -np.inf], np.float32)), [0, 0])
        assert np.isnan(reference.exp32(np.array([np.nan], np.float32))).all()
        p = np.concatenate([np.logspace(-300, 0, 20001), np.linspace(1e-3, 1, 20001)])
        np.testing.assert_allclose(reference.log(p), np.log(p), rtol=7e-16)  # 3 ulp
        np.testing.assert_array_equal(reference.log(np.zeros(1)), [-np.inf])


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_mean_bin_in_float32_is_near_the_exact_one(spread: float) -> None:
    logits = np.random.default_rng(0).normal(0, spread, (16, 50_000)).astype(np.float32)
    weight = np.exp(logits.astype(float) - logits.max(axis=0))
    exact = (weight * np.arange(16)[:, None]).sum(axis=0) / weight.sum(axis=0)
    np.testing.assert_allclose(reference._expected_bin(logits), exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["yolox", "yolov5", "yolov8", "fastestdet", "nanodet"])
def test_nothing_and_everything(path: str, family: str) -> None:
    head = next(h for h in heads(2) if h.family == family)
    cells = sum(math.prod(shape[2:]) for name, shape in shapes(head).items() if name[:3] in ("all", "cls"))
    cells *= max(1, len(head.levels[0].anchors))
    with using(path):
        decoder = Decoder(head, *SIZE)
        cold = {name: np.full(shape, -50, np.float32) for name, shape in shapes(head).items()}
        assert [len(a) for a in decoder.run(cold, 0.25)] == [0, 0, 0]
        assert len(decoder.run(cold, 0.0)[0]) == cells
        hot = {name: np.full(shape, 20, np.float32) for name, shape in shapes(head).items()}
        assert len(decoder.run(hot, 0.25)[0]) == cells
        broken = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes(head).items()}
        assert len(decoder.run(broken, 0.0)[0]) == 0


@pytest.mark.parametrize("path", PATHS)
def test_dropped_cells(path: str) -> None:
    """NaN objectness, NaN in a box and a box that overflows float32 each drop their cell only."""
    head = split_head("yolox", 2)
    outputs = {name: np.zeros(shape, np.float32) for name, shape in shapes(head).items()}
    outputs["obj8"][0, 0, 0, 0] = np.nan
    outputs["box8"][0, 1, 0, 1] = np.nan
    outputs["box8"][0, 2, 0, 2] = 100.0
    outputs["cls8"][0, 0, 0, 3] = np.nan  # the other class still counts
    outputs["cls8"][0, 1, 0, 3] = 5.0
    with using(path):
        boxes, _, classes = decode(outputs, head, *SIZE, 0.2)
    assert len(boxes) == 24 + 6 - 3
    assert classes[0] == 1


@pytest.mark.parametrize("path", PATHS)
def test_first_of_equal_classes(path: str) -> None:
    head = split_head("yolov8", 5, bins=2)
    outputs = {name: np.full(shape, 3.0, np.float32) for name, shape in shapes(head).items()}
    with using(path):
        assert set(decode(outputs, head, *SIZE, 0.5)[2]) == {0}


@pytest.mark.parametrize("path", PATHS)
def test_buffers_are_reused_and_sizes_may_change(path: str) -> None:
    head = DetectHead("rows", 1, rows="r", columns=("x1", "y1", "x2", "y2", "score"))
    with using(path):
        decoder = Decoder(head, *SIZE)
        for n in (1, 40, 7):
            rows = np.tile(np.array([1, 2, 3, 4, 0.5], np.float32), (1, n, 1))
            boxes, scores, classes = decoder.run({"r": rows}, 0.5)
            np.testing.assert_array_equal(boxes, rows[0, :, :4])
            assert scores.tolist() == [0.5] * n
            assert classes.tolist() == [0] * n


YOLOX = split_head("yolox", 2)


def zeros(head: DetectHead) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes(head).items()}


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({k: v for k, v in zeros(YOLOX).items() if k != "obj16"}, "output 'obj16': missing"),
        (zeros(YOLOX) | {"cls8": np.zeros((1, 1, 4, 6), np.float32)}, r"expected \[1, 2 or more, 4, 6\]"),
        (zeros(YOLOX) | {"cls8": np.zeros((1, 2, 6, 4), np.float32)}, r"got \[1, 2, 6, 4\]"),
        (zeros(YOLOX) | {"box8": np.zeros((4, 4, 6), np.float32)}, r"got \[4, 4, 6\]"),
        (zeros(YOLOX) | {"box8": np.zeros((2, 4, 4, 6), np.float32)}, r"got \[2, 4, 4, 6\]"),
        (zeros(YOLOX) | {"box8": np.zeros((1, 4, 4, 6), np.float16)}, "expected float32, got float16"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_outputs_that_do_not_fit(path: str, outputs: dict[str, np.ndarray], message: str) -> None:
    with using(path), pytest.raises(UsageError, match=message):
        decode(outputs, YOLOX, *SIZE, 0.25)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("cx", "cy", "w", "h"), "incomplete"),
        (("cx", "cy", "w", "cls*"), "incomplete"),
        (("x1", "y1", "x2", "y2", "score"), "incomplete"),
        (("x1", "y1", "x2", "y2", "score", "class", "cls*"), "incomplete"),
        (("x1", "y1", "x2", "y2", "clas", "score"), "Did you mean 'class'"),
        (("x1", "x1", "x2", "y2", "score", "class"), "named twice"),
    ],
)
def test_columns_that_make_no_box(columns: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Decoder(DetectHead("rows", 3, rows="r", columns=columns), *SIZE)


def test_rows_of_another_width() -> None:
    head = DetectHead("rows", 3, rows="r", columns=("cx", "cy", "w", "h", "cls*"))
    with pytest.raises(UsageError, match=r"expected \[1, N, 7\]"):
        decode({"r": np.zeros((1, 7, 10), np.float32)}, head, *SIZE, 0.1)


def test_heads_that_lack_something() -> None:
    level = HeadLevel(8, Channels("b"), Channels("c"))
    with pytest.raises(UsageError, match="no objectness"):
        Decoder(DetectHead("yolox", 1, (level,)), *SIZE)
    level = HeadLevel(8, Channels("b"), Channels("c"), Channels("o"))
    with pytest.raises(UsageError, match="expected some, got 0"):
        Decoder(DetectHead("yolov5", 1, (level,)), *SIZE)


@pytest.mark.shared
@pytest.mark.parametrize("path", PATHS)
def test_real_yolox_head(path: str) -> None:
    """Raw convolutions of YOLOX-nano decoded here equal its own activated output decoded as its authors do."""
    from benchmarks.overhead import NANO, run_nano

    image = np.random.default_rng(0).integers(0, 256, (416, 416, 3), np.uint8)
    raw, activated = run_nano(shared_data(), image.transpose(2, 0, 1)[None].astype(np.float32))
    strides = np.repeat([8, 16, 32], [52 * 52, 26 * 26, 13 * 13])[:, None]
    grid = np.concatenate(
        [np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) for n in (52, 26, 13)]
    )
    centre, size = (activated[0, :, :2] + grid) * strides, np.exp(activated[0, :, 2:4]) * strides
    score = activated[0, :, 4] * activated[0, :, 5:].max(axis=1)
    threshold = np.sort(score)[-200]
    keep = score > threshold * 1.0001
    with using(path):
        boxes, scores, classes = decode(raw, NANO.head, 416, 416, float(threshold) * 1.0001)
    assert len(boxes) == keep.sum() > 50
    np.testing.assert_allclose(
        boxes, np.hstack([centre - size / 2, centre + size / 2])[keep], rtol=1e-4, atol=1e-2
    )
    np.testing.assert_allclose(scores, score[keep], rtol=1e-4)
    np.testing.assert_array_equal(classes, activated[0, keep, 5:].argmax(axis=1))


@pytest.mark.parametrize("index", range(len(heads(3))))
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3])
def test_all_classes(index: int, threshold: float) -> None:
    """Every class above the threshold: native equals reference; the best of each box is what one class gives."""
    head = heads(3)[index]
    rng = np.random.default_rng(100 + index)
    outputs = {name: rng.normal(0, 1.5, shape).astype(np.float32) for name, shape in shapes(head).items()}
    for tensor in outputs.values():
        tensor.reshape(-1)[::97] = np.nan
    found = {}
    for path in PATHS:
        with using(path):
            found[path] = [a.copy() for a in decode(outputs, head, *SIZE, threshold, all_classes=True)]
            best = [a.copy() for a in decode(outputs, head, *SIZE, threshold)]
    for a, b in zip(*found.values(), strict=True) if len(found) > 1 else []:
        np.testing.assert_array_equal(a, b)
    boxes, scores, classes = found[PATHS[0]]
    several = head.family != "rows" or "cls*" in head.columns
    assert len(scores) > len(best[1]) if several else len(scores) == len(best[1])
    candidates = {
        (*box, score, label) for box, score, label in zip(boxes.tolist(), scores, classes, strict=True)
    }
    assert candidates >= {(*box, s, c) for box, s, c in zip(best[0].tolist(), best[1], best[2], strict=True)}


def test_all_classes_by_formula() -> None:
    head = next(h for h in heads(3) if h.family == "yolox")
    rng = np.random.default_rng(5)
    outputs = {name: rng.normal(0, 1.5, shape).astype(np.float32) for name, shape in shapes(head).items()}
    _, scores, classes = decode(outputs, head, *SIZE, 0.1, all_classes=True)
    wanted = []
    for level in head.levels:
        logits = outputs[level.classes.tensor][
            0, level.classes.start : level.classes.start + head.num_classes
        ]
        assert level.objectness is not None
        objectness = outputs[level.objectness.tensor][0, level.objectness.start]
        score = 1 / (1 + np.exp(-logits.astype(float))) / (1 + np.exp(-objectness.astype(float)))
        cells = score.reshape(head.num_classes, -1).T
        wanted += [(s, c) for cell in cells for c, s in enumerate(cell) if s >= 0.1]
    np.testing.assert_allclose(scores, [s for s, _ in wanted], rtol=1e-6)
    np.testing.assert_array_equal(classes, [c for _, c in wanted])
