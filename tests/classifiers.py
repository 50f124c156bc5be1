"""Tiny classifiers that are right by construction, and pictures for them.

The network's logits are 0.05 times the mean of each channel, so its answer is the brightest colour.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.runtime.engine import Engine

COLORS = ("red", "green", "blue")
SIZE = 16
RULE = {"resize": "stretch", "color": "rgb", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
WORDS = ("--task", "classify", "--resize", "stretch", "--color", "rgb", "--mean", "0", "--std", "1")


def network(tail: str = "Softmax", opset: int = 13, size: int = SIZE) -> onnx.ModelProto:
    """Conv 1x1, mean, Gemm, then `tail`: Softmax, LogSoftmax, Sigmoid, none, reshaped, spelled."""
    weights = [
        numpy_helper.from_array(np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1), "w"),
        numpy_helper.from_array(0.05 * np.eye(3, dtype=np.float32), "g"),
        numpy_helper.from_array(np.zeros(3, np.float32), "b"),
        numpy_helper.from_array(np.array([1, 3, 1, 1], np.int64), "shape"),
        numpy_helper.from_array(np.array([1], np.int64), "axes"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
    ]
    last = "y" if tail == "none" else "logits"
    nodes.append(helper.make_node("Gemm", ["f", "g", "b"], [last]))
    shape = [1, 3]
    if tail in ("Softmax", "LogSoftmax"):
        nodes.append(helper.make_node(tail, ["logits"], ["y"], axis=1))
    elif tail == "Sigmoid":
        nodes.append(helper.make_node(tail, ["logits"], ["y"]))
    elif tail == "reshaped":
        shape = [1, 3, 1, 1]
        nodes += [
            helper.make_node("Softmax", ["logits"], ["s"], axis=-1),
            helper.make_node("Reshape", ["s", "shape"], ["y"]),
        ]
    elif tail == "spelled":
        nodes += [
            helper.make_node("Exp", ["logits"], ["e"]),
            helper.make_node("ReduceSum", ["e", "axes"], ["t"], keepdims=1),
            helper.make_node("Div", ["e", "t"], ["y"]),
        ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [w for w in weights if w.name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def pictures(count: int, seed: int = 0, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, size, size, 3] RGB, classes [N]): noise with one channel brighter."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % 3
    images = rng.integers(0, 120, (count, size, size, 3), np.uint8)
    images[np.arange(count), :, :, classes] += 80
    return images, classes


def folder_per_class(root: Path, images: np.ndarray, classes: np.ndarray) -> Path:
    """PNG files in `root`/<colour>/."""
    import cv2

    for i, (image, cls) in enumerate(zip(images, classes, strict=True)):
        path = root / COLORS[cls] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image[:, :, ::-1])
    return root


@contextmanager
def tiny_engine(folder: Path) -> Iterator[Engine]:
    """`network`, built into `folder` and loaded."""
    onnx.save(network(), str(folder / "tiny.onnx"))
    (bundle,) = edgekit.build(
        folder / "tiny.onnx", task="classify", preprocess=RULE, precision="float32", out=folder
    )
    with bundle, edgekit.load(bundle, threads=1) as loaded:
        yield loaded
