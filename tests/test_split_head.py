"""Head splitting: found by structure in every family's export variants, decoded as the graph does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from edgekit import frontends, passes
from edgekit.errors import ModelError, UsageError
from edgekit.passes.check_head import candidates
from edgekit.passes.declared_rows import declared_rows
from edgekit.passes.find_input_rule import find_input_rule
from edgekit.passes.head_families import COCO_ANCHORS
from edgekit.passes.head_tail import find_tail
from edgekit.passes.split_head import detect_family, split, split_head
from edgekit.tasks.detect.spec import DetectHead
from tests import detectors
from tests.helpers import shared_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("detectors")


_made: dict[tuple[object, ...], Path] = {}


def exported(folder: Path, family: str, variant: str, opset: int = 13, dynamo: bool = False) -> Path:
    key = (family, variant, opset, dynamo)
    if key not in _made:
        path = folder / f"{len(_made)}.onnx"
        net = detectors.randomize(detectors.VARIANTS[family, variant]())
        _made[key] = detectors.export(net, path, opset=opset, dynamo=dynamo)
    return _made[key]


def simple(path: Path) -> ir.Model:
    return passes.run_passes(frontends.load(path), passes.BEFORE_SPLIT)[0]


def run(model: ir.Model | Path, x: np.ndarray) -> dict[str, np.ndarray]:
    data = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x}), strict=True))


def decoded(head: DetectHead, model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    return candidates(head, run(model, x), (x.shape[2], x.shape[3]))


PARTS = {
    ("yolov5", "raw"),
    ("yolov5", "conv"),
    ("yolov5", "conv 80 classes"),
    ("yolov8", "raw"),
    ("nanodet", "apart"),
    ("nanodet", "two"),
}
WHOLE = [key for key in detectors.VARIANTS if key not in PARTS]
"""Variants whose one output holds all rows."""


@pytest.mark.parametrize("key", WHOLE, ids=" ".join)
def test_decoding_the_raw_head_gives_the_original_rows(folder: Path, key: tuple[str, str]) -> None:
    path = exported(folder, *key)
    model, head = split_head(simple(path))
    assert head.family == key[0]
    x = np.random.default_rng(0).random((1, 3, *detectors.SIZE), np.float32)
    (want,) = run(path, x).values()
    rows = decoded(head, model, x)
    # decoded rows come first in `candidates`; these variants leave decoding to the host
    undecoded = key in {("yolox", "plain"), ("yolox", "four classes"), ("nanodet", "logits")}
    got = rows[1 if undecoded else 0]
    if key[0] == "yolov8":
        want = want.transpose(0, 2, 1)
    if key[0] == "fastestdet":
        want = want.reshape(1, want.shape[1], -1).transpose(0, 2, 1)
    np.testing.assert_allclose(got, want[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "opset", "dynamo"),
    [
        (("yolox", "decode"), 11, False),
        (("yolov5", "slice"), 11, False),
        (("yolov5", "split"), 18, True),
        (("yolov8", "joined"), 18, True),
        (("nanodet", "plus"), 11, False),
    ],
    ids=str,
)
def test_other_exporters_and_opsets(folder: Path, key: tuple[str, str], opset: int, dynamo: bool) -> None:
    prepared = passes.prepare(frontends.load(exported(folder, *key, opset, dynamo)))
    assert prepared.head is not None
    assert prepared.head.family == key[0]
    assert prepared.head.num_classes == detectors.CLASSES
    difference = next(r.max_abs_diff for r in prepared.log if r.name == "split_head")
    assert difference is not None
    assert difference < 1e-5


def test_several_outputs_per_level(folder: Path) -> None:
    for variant in ("apart", "two"):
        path = exported(folder, "nanodet", variant)
        model, head = split_head(simple(path))
        x = np.random.default_rng(0).random((1, 3, *detectors.SIZE), np.float32)
        rows = candidates(head, run(model, x), detectors.SIZE)[0]
        outputs = [v[0] for v in run(path, x).values()]
        want = np.hstack((np.vstack(outputs[:3]), np.vstack(outputs[3:])))
        np.testing.assert_allclose(rows, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", ["raw", "conv", "conv 80 classes"])
def test_yolov5_without_decode_takes_the_known_anchors_and_says_so(folder: Path, variant: str) -> None:
    result = split(simple(exported(folder, "yolov5", variant)))
    assert result.head.family == "yolov5"
    assert [level.anchors for level in result.head.levels] == [
        tuple((float(w), float(h)) for w, h in level) for level in COCO_ANCHORS[3]
    ]
    assert any("COCO anchors are used" in note for note in result.notes)


@pytest.mark.parametrize("variant", ["split", "slice"])
def test_yolov5_anchors_are_read_from_the_graph(folder: Path, variant: str) -> None:
    result = split(simple(exported(folder, "yolov5", variant)))
    assert result.head.levels[2].anchors == ((115.0, 91.0), (155.0, 199.0), (372.0, 327.0))
    assert result.notes == ()


def test_outputs_are_named_by_role_and_stride(folder: Path) -> None:
    names = {
        "yolox": ["box_8", "obj_8", "cls_8", "box_16", "obj_16", "cls_16", "box_32", "obj_32", "cls_32"],
        "yolov5": ["pred_8", "pred_16", "pred_32"],
        "yolov8": ["box_8", "cls_8", "box_16", "cls_16", "box_32", "cls_32"],
        "nanodet": ["pred_8", "pred_16", "pred_32", "pred_64"],
        "fastestdet": ["obj_16", "box_16", "cls_16"],
    }
    variants = {
        "yolox": "plain",
        "yolov5": "split",
        "yolov8": "joined",
        "nanodet": "plus",
        "fastestdet": "plain",
    }
    for family, want in names.items():
        model, head = split_head(simple(exported(folder, family, variants[family])))
        assert [o.name for o in model.graph.outputs] == want
        assert {t for level in head.levels for t in (level.box.tensor, level.classes.tensor)} <= set(want)
        left = {n.op_type for n in model.graph}
        assert not left & {"Transpose", "Exp", "Softmax", "Pow", "Reshape", "Expand"}
        used = {v.name for n in model.graph for v in n.inputs if v is not None}
        assert set(model.graph.initializers) <= used


def test_node_names_do_not_matter(folder: Path) -> None:
    proto = onnx.load(exported(folder, "yolov8", "joined"))
    renamed = {
        v: f"cls_{i}" for i, v in enumerate(dict.fromkeys(o for n in proto.graph.node for o in n.output))
    }
    last = proto.graph.output[0].name
    renamed[last] = last
    for i, node in enumerate(proto.graph.node):
        node.name = f"box_{i}"
        node.input[:] = [renamed.get(v, v) for v in node.input]
        node.output[:] = [renamed.get(v, v) for v in node.output]
    del proto.graph.value_info[:]
    path = folder / "renamed.onnx"
    onnx.save(proto, path)
    model, head = split_head(simple(path))
    assert head.family == "yolov8"
    assert [o.name for o in model.graph.outputs][:2] == ["box_8", "cls_8"]
    x = np.random.default_rng(0).random((1, 3, *detectors.SIZE), np.float32)
    np.testing.assert_allclose(decoded(head, model, x)[0], run(path, x)[last][0].T, rtol=1e-5, atol=1e-4)


def test_nms_in_the_graph_is_cut_off_too(folder: Path, tmp_path: Path) -> None:
    net = detectors.randomize(detectors.VARIANTS["yolox", "decode"]())
    path = detectors.append_nms(detectors.export(net, tmp_path / "nms.onnx"))
    prepared = passes.prepare(frontends.load(path))
    assert prepared.head is not None
    assert prepared.head.family == "yolox"
    record = next(r for r in prepared.log if r.name == "split_head")
    assert record.max_abs_diff is not None  # compared with the rows that go into the NMS
    assert record.max_abs_diff < 1e-5
    assert "NonMaxSuppression" not in {n.op_type for n in prepared.model.graph}


@pytest.mark.parametrize(
    ("name", "classes", "outputs"), [("yolox_nano/yolox_nano", 80, 9), ("fastestdet/FastestDet", 80, 3)]
)
@pytest.mark.parametrize("suffix", ["", "_op13"])
def test_real_detectors(name: str, classes: int, outputs: int, suffix: str) -> None:
    path = shared_data() / "models" / f"{name}{suffix}.onnx"
    prepared = passes.prepare(frontends.load(path))
    head, model = prepared.head, prepared.model
    assert head is not None
    assert (head.family, head.num_classes) == (name.split("/")[0].split("_")[0], classes)
    assert len(model.graph.outputs) == outputs
    size = tuple(model.graph.inputs[0].shape)  # type: ignore[arg-type]
    peak = 255.0 if head.family == "yolox" else 1.0
    x = passes.probe.natural_picture(size, seed=3, peak=peak)
    (want,) = run(path, x).values()
    rows = candidates(head, run(model, x), (size[2], size[3]))
    got = rows[1] if head.family == "yolox" else rows[0].T.reshape(want.shape[1:])
    np.testing.assert_allclose(got, want[0], rtol=0, atol=1e-4)


def test_the_wrong_class_count(folder: Path) -> None:
    model = simple(exported(folder, "yolov8", "joined"))
    with pytest.raises(ModelError, match="expected 80, got 5"):
        split_head(model, num_classes=80)
    assert split_head(model, num_classes=5)[1].num_classes == 5


def test_a_given_family_is_held_to(folder: Path) -> None:
    model = simple(exported(folder, "yolov8", "joined"))
    with pytest.raises(ModelError, match=r"expected one of yolox .*got head channels stride 8: 64\+5"):
        split_head(model, family="yolox")
    with pytest.raises(UsageError, match="Did you mean 'yolov8'"):
        split_head(model, family="yolo8")


def test_unknown_heads_say_what_was_looked_for(tmp_path: Path) -> None:
    net = nn.Sequential(detectors.Backbone(3), Last(), nn.Conv2d(8, 7, 1), nn.Sigmoid())
    model = simple(detectors.export(detectors.randomize(net), tmp_path / "net.onnx"))
    assert detect_family(model) is None
    with pytest.raises(ModelError) as caught:
        split_head(model)
    message = str(caught.value)
    assert "\n" not in message
    for word in ("yolox", "yolov5", "yolov8", "nanodet", "fastestdet", "stride 32: 7", "--head rows"):
        assert word in message


class Last(nn.Module):
    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return features[-1]


@pytest.mark.parametrize("channels", [37, 40, 64, 255])
def test_segmentation_is_no_detector(tmp_path: Path, channels: int) -> None:
    net = nn.Sequential(detectors.Backbone(3), Last(), nn.Conv2d(8, channels, 1))
    assert detect_family(simple(detectors.export(detectors.randomize(net), tmp_path / "net.onnx"))) is None


def test_classifiers_are_no_detectors() -> None:
    path = shared_data() / "models" / "cifar10_resnet8" / "resnet8_cifar10.onnx"
    model = frontends.load(path, shapes=None)
    assert detect_family(passes.run_passes(model, passes.BEFORE_SPLIT)[0]) is None


@pytest.mark.parametrize("dfl", [detectors.Dfl, detectors.DflMatmul])
def test_unusual_dfl_weights_are_refused(tmp_path: Path, dfl: type[detectors.Dfl]) -> None:
    weights = torch.arange(16).float() * 1.01
    net = detectors.randomize(detectors.YoloV8("separate", dfl=dfl(16, weights)))
    model = simple(detectors.export(net, tmp_path / "net.onnx"))
    with pytest.raises(ModelError, match="DFL expectation is unusual"):
        split_head(model)


@pytest.mark.parametrize("bins", [8, 17])
def test_bins_are_read_from_the_graph(tmp_path: Path, bins: int) -> None:
    net = detectors.randomize(detectors.YoloV8("joined", bins=bins))
    head = split_head(simple(detectors.export(net, tmp_path / "net.onnx")))[1]
    assert (head.bins, head.num_classes) == (bins, detectors.CLASSES)


class OffsetV8(detectors.YoloV8):
    """Decodes around cell corners instead of centres: right shapes, wrong rule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        assert isinstance(out, torch.Tensor)
        return torch.cat((out[:, :4] - 4.0, out[:, 4:]), 1)


def test_a_decode_that_differs_from_the_rule_is_refused(tmp_path: Path) -> None:
    path = detectors.export(detectors.randomize(OffsetV8("joined")), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="its decode differs from the yolov8 rule"):
        passes.prepare(frontends.load(path))
    assert passes.prepare(frontends.load(path), check=False).head is not None  # the check is what saw it


# --- declared rows ----------------------------------------------------------------------------

V5 = ("cx", "cy", "w", "h", "obj", "cls*")


def test_declared_rows(folder: Path) -> None:
    model = simple(exported(folder, "yolov5", "split"))
    kept, head = declared_rows(model, V5)
    assert (head.family, head.num_classes, head.transposed) == ("rows", 5, False)
    assert head.rows == kept.graph.outputs[0].name
    turned = declared_rows(simple(exported(folder, "yolov8", "joined")), ("cx", "cy", "w", "h", "cls*"))[1]
    assert (turned.num_classes, turned.transposed) == (5, True)
    assert declared_rows(model, V5, num_classes=5)[1].num_classes == 5


def test_declared_rows_through_prepare(folder: Path) -> None:
    model = frontends.load(exported(folder, "yolov5", "split"))
    prepared = passes.prepare(model, head="rows", columns=V5, normalized=True)
    assert prepared.head is not None
    assert prepared.head.normalized
    assert [o.name for o in prepared.model.graph.outputs] == [prepared.head.rows]
    with pytest.raises(UsageError, match="needs its columns"):
        passes.prepare(model, head="rows")
    with pytest.raises(UsageError, match="needs its columns"):
        passes.prepare(model, head="yolox", columns=V5)


@pytest.mark.parametrize(
    ("columns", "classes", "error", "words"),
    [
        (V5, 80, ModelError, "85 in all"),
        (("x1", "y1", "x2", "y2", "score", "class"), 3, ModelError, "6 in all"),
        (("x1", "y1", "x2", "y2", "score", "class"), None, UsageError, "class count"),
        (("cx", "cy", "w", "z", "cls*"), None, UsageError, "column 'z'"),
        (("cx", "cy", "x2", "y2", "cls*"), None, UsageError, "to begin with"),
        (("cx", "cy", "w", "h", "obj"), None, UsageError, "to end with"),
        (("cx", "cy", "w", "h", "cls*", "obj"), None, UsageError, "to end with"),
    ],
)
def test_declared_rows_that_do_not_fit(
    folder: Path, columns: tuple[str, ...], classes: int | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        declared_rows(simple(exported(folder, "yolov5", "split")), columns, num_classes=classes)


# --- input rule -------------------------------------------------------------------------------


def test_input_rules_by_family(folder: Path) -> None:
    height, width = detectors.SIZE
    variants = {
        "yolox": "plain",
        "yolov5": "split",
        "yolov8": "joined",
        "nanodet": "plus",
        "fastestdet": "plain",
    }
    found = {}
    for family, variant in variants.items():
        model = simple(exported(folder, family, variant))
        rule, why = find_input_rule(model, split_head(model)[1])
        assert rule is not None
        assert (rule.width, rule.height) == (width, height)
        assert family in why
        found[family] = (rule.resize, rule.color, rule.std[0])
    assert found == {
        "yolox": ("letterbox", "bgr", 1.0),
        "yolov5": ("letterbox-center", "rgb", 255.0),
        "yolov8": ("letterbox-center", "rgb", 255.0),
        "nanodet": ("stretch", "bgr", 57.375),
        "fastestdet": ("stretch", "bgr", 255.0),
    }
    assert find_input_rule(model, None)[0] is None


def test_a_graph_that_normalises_overrides_the_habit(tmp_path: Path) -> None:
    net = detectors.randomize(detectors.InputNorm(detectors.VARIANTS["nanodet", "plus"]()))
    model = simple(detectors.export(net, tmp_path / "net.onnx"))
    rule, why = find_input_rule(model, split_head(model)[1])
    assert rule is not None
    assert (rule.mean, rule.std, rule.color, rule.resize) == ((0, 0, 0), (1, 1, 1), "rgb", "stretch")
    assert "normalises its input itself" in why


def test_a_graph_that_takes_the_mean_of_0_to_1_still_needs_the_division(tmp_path: Path) -> None:
    class Norm(detectors.InputNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net((x - self.mean.flip(1)) / self.std.flip(1))  # type: ignore[no-any-return]

    net = detectors.randomize(Norm(detectors.VARIANTS["fastestdet", "plain"]()))
    model = simple(detectors.export(net, tmp_path / "net.onnx"))
    rule, _ = find_input_rule(model, split_head(model)[1])
    assert rule is not None
    assert (rule.mean, rule.std, rule.color) == ((0, 0, 0), (255, 255, 255), "bgr")


def test_strides_round_up(tmp_path: Path) -> None:
    """NanoDet-Plus at 416 has 7 cells at stride 64: 416 / 64 = 6.5."""
    net = detectors.randomize(detectors.VARIANTS["nanodet", "plus"]())
    model = simple(detectors.export(net, tmp_path / "net.onnx", size=(96, 160)))
    assert sorted(find_tail(model).levels) == [8, 16, 32, 64]
    assert [level.stride for level in split_head(model)[1].levels] == [8, 16, 32, 64]


def test_open_sizes_need_a_shape_and_then_fold(tmp_path: Path) -> None:
    net = detectors.randomize(detectors.VARIANTS["yolov8", "open"]())
    path = detectors.export(net, tmp_path / "net.onnx", dynamic=(0, 2, 3))
    with pytest.raises(ModelError, match="--shape images=1x3x416x416"):
        frontends.load(path)
    prepared = passes.prepare(frontends.load(path, shapes={"images": (1, 3, 160, 96)}))
    assert prepared.head is not None
    assert prepared.head.family == "yolov8"
    assert next(r.max_abs_diff for r in prepared.log if r.name == "split_head") is not None


def test_open_batch_exports(tmp_path: Path) -> None:
    net = detectors.randomize(detectors.VARIANTS["yolov8", "separate"]())
    path = detectors.export(net, tmp_path / "net.onnx", dynamic=(0,))
    prepared = passes.prepare(frontends.load(path))
    assert prepared.head is not None
    assert prepared.head.family == "yolov8"
    assert next(r.max_abs_diff for r in prepared.log if r.name == "split_head") is not None
