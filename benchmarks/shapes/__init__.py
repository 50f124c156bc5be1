"""Layer shapes of published networks, for the latency estimate: graphs as `passes.prepare` leaves them
(batch norm folded into the convolution, SiLU as Sigmoid and Mul), weights of zeros that take no memory.

    build("resnet50", (224, 224)) -> onnx_ir.Model
"""

from __future__ import annotations

import onnx_ir as ir

from benchmarks.shapes import classify, detect, yolo
from benchmarks.shapes.net import Net

NETWORKS = {**classify.NETWORKS, **detect.NETWORKS, **yolo.NETWORKS}


def build(name: str, size: tuple[int, int]) -> ir.Model:
    """The network `name` (a key of NETWORKS) for pictures of (height, width)."""
    net = Net(*size)
    outputs = NETWORKS[name](net)
    return net.model(outputs if isinstance(outputs, list) else [outputs])
