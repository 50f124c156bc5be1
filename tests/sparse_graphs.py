"""A small network whose weights are 2:4 sparse, and what of them a payload holds."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.backends.base import Payload
from edgekit.passes import fuse_batchnorm
from tests.tensorrt_graphs import graph

SHAPE = (1, 16, 8, 8)
PADS = "<pads=[1,1,1,1]>"
BODY = (
    f"a = Conv {PADS} (x, w1, b1) \n n = BatchNormalization (a, g, o, m, v) \n r = Relu(n) \n "
    f"b = Conv {PADS} (r, w2, b2) \n s = Add(b, x) \n t = Relu(s) \n y = Conv {PADS} (t, w3, b3)"
)


def two_of_four(weights: np.ndarray) -> np.ndarray:
    """The two largest of each four input channels."""
    groups = np.moveaxis(weights, 1, -1).reshape(-1, 4)
    order = np.argsort(-np.abs(groups), axis=1, kind="stable")[:, 2:]
    np.put_along_axis(groups, order, 0, axis=1)
    sizes = (weights.shape[0], *weights.shape[2:], weights.shape[1])
    return np.moveaxis(groups.reshape(sizes), -1, 1).copy()


def network(seed: int = 0, loud: float = 1.0, dense: tuple[str, ...] = ()) -> ir.Model:
    """Three convolutions, 2:4 but for `dense`; channel 3 of the first is `loud` times the others, and read as much softer."""
    rng = np.random.default_rng(seed)
    arrays = {f"w{i}": (rng.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32) for i in (1, 2, 3)}
    arrays = {name: w if name in dense else two_of_four(w) for name, w in arrays.items()}
    arrays |= {f"b{i}": (rng.standard_normal(16) / 4).astype(np.float32) for i in (1, 2, 3)}
    arrays |= {name: rng.uniform(0.5, 2, 16).astype(np.float32) for name in "gomv"}
    arrays["w1"][3] *= loud
    arrays["b1"][3] *= loud
    arrays["w2"][:, 3] /= loud
    made = graph(BODY, {"x": SHAPE}, {"y": SHAPE}, arrays, opset=19)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True))


def pictures(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(count)]


def folded(model: ir.Model) -> ir.Model:
    fuse_batchnorm.run(model)
    return model


def stored(payload: Payload) -> list[np.ndarray]:
    """The weight codes, or floats, of the convolutions in the file itself, in order."""
    proto = onnx.load_from_string(payload.data)
    numbers = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    made = {o: n for n in proto.graph.node for o in n.output}
    names = [node.input[1] for node in proto.graph.node if node.op_type == "Conv"]
    return [numbers[made[name].input[0] if name in made else name] for name in names]
