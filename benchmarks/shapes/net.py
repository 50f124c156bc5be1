"""Writes onnx_ir graphs a layer a line. Every value knows its shape; weights are zeros without memory."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir


class Net:
    """A graph in the making with one picture input [1, 3, height, width]."""

    def __init__(self, height: int, width: int) -> None:
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.input = self._value("image", (1, 3, height, width))

    def model(self, outputs: list[ir.Value]) -> ir.Model:
        graph = ir.Graph(
            [self.input],
            outputs,
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": 19},
            name="net",
        )
        return ir.Model(graph, ir_version=9)

    def parameters(self) -> int:
        """Elements of all weights that are not indices or sizes."""
        return sum(v.const_value.size for v in self.weights if v.dtype == ir.DataType.FLOAT)

    @staticmethod
    def _value(name: str, shape: tuple[int, ...]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    def node(
        self, op: str, inputs: list[ir.Value | None], shape: tuple[int, ...], **attributes: object
    ) -> ir.Value:
        output = self._value(f"v{len(self.nodes)}", shape)
        if op in ("Reshape", "Expand") and inputs[0] is not None:
            output.type = inputs[0].type
        kept = [ir.Attr(k, _kind(v), v) for k, v in attributes.items()]
        self.nodes.append(ir.Node("", op, inputs, kept, outputs=[output]))
        return output

    def constant(self, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=f"w{len(self.weights)}")
        value = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.weights.append(value)
        return value

    def zeros(self, *shape: int) -> ir.Value:
        return self.constant(np.broadcast_to(np.float32(0), shape))

    # ---- layers

    def conv(self, x, out, k=1, s=1, g=1, act="relu", pad=None, bias=True):
        """Convolution of a k x k (or (h, w)) kernel, "same" padding unless `pad` is given, then `act`."""
        kh, kw = k if isinstance(k, tuple) else (k, k)
        ph, pw = (kh // 2, kw // 2) if pad is None else (pad, pad)
        _, c, h, w = x.shape
        weight = self.zeros(out, c // g, kh, kw)
        shape = (1, out, (h + 2 * ph - kh) // s + 1, (w + 2 * pw - kw) // s + 1)
        inputs = [x, weight, self.zeros(out)] if bias else [x, weight]
        y = self.node(
            "Conv", inputs, shape, kernel_shape=[kh, kw], strides=[s, s], pads=[ph, pw, ph, pw], group=g
        )
        return self.act(y, act)

    def dw(self, x, k=3, s=1, act="relu"):
        return self.conv(x, x.shape[1], k, s, x.shape[1], act)

    def act(self, x, kind):
        shape = tuple(x.shape)
        if kind is None:
            return x
        if kind == "silu":
            return self.node("Mul", [x, self.node("Sigmoid", [x], shape)], shape)
        if kind == "relu6":
            return self.node("Clip", [x, self.zeros(), self.zeros()], shape)
        op = {"relu": "Relu", "leaky": "LeakyRelu", "hswish": "HardSwish", "sigmoid": "Sigmoid"}
        op |= {"hsigmoid": "HardSigmoid", "mish": "Mish"}
        return self.node(op[kind], [x], shape)

    def add(self, a, b, act=None):
        return self.act(self.node("Add", [a, b], tuple(a.shape)), act)

    def mul(self, a, b):
        return self.node("Mul", [a, b], tuple(max(p, q) for p, q in zip(a.shape, b.shape, strict=True)))

    def cat(self, *xs, axis=1):
        shape = list(xs[0].shape)
        shape[axis] = sum(x.shape[axis] for x in xs)
        return self.node("Concat", list(xs), tuple(shape), axis=axis)

    def pool(self, x, k, s, pad=None, op="MaxPool", ceil=False):
        pad = k // 2 if pad is None else pad
        _, c, h, w = x.shape
        up = s - 1 if ceil else 0
        shape = (1, c, (h + 2 * pad - k + up) // s + 1, (w + 2 * pad - k + up) // s + 1)
        return self.node(
            op, [x], shape, kernel_shape=[k, k], strides=[s, s], pads=[pad] * 4, ceil_mode=int(ceil)
        )

    def mean(self, x):
        return self.node("GlobalAveragePool", [x], (1, x.shape[1], 1, 1))

    def fc(self, x, out, act=None):
        """Flatten and Gemm."""
        size = math.prod(x.shape)
        flat = self.reshape(x, 1, size)
        y = self.node("Gemm", [flat, self.zeros(out, size), self.zeros(out)], (1, out), transB=1)
        return self.act(y, act)

    def reshape(self, x, *shape):
        return self.node("Reshape", [x, self.constant(np.array(shape, np.int64))], shape)

    def transpose(self, x, *perm):
        return self.node("Transpose", [x], tuple(x.shape[p] for p in perm), perm=list(perm))

    def up(self, x):
        _, c, h, w = x.shape
        scales = self.constant(np.array([1, 1, 2, 2], np.float32))
        return self.node("Resize", [x, None, scales], (1, c, 2 * h, 2 * w), mode="nearest")

    def part(self, x, start, end, axis=1):
        """x[start:end] along an axis."""
        bounds = [self.constant(np.array([n], np.int64)) for n in (start, end, axis)]
        shape = list(x.shape)
        shape[axis] = end - start
        return self.node("Slice", [x, *bounds], tuple(shape))

    def halves(self, x):
        c = x.shape[1]
        return self.part(x, 0, c // 2), self.part(x, c // 2, c)

    def matmul(self, a, b):
        return self.node("MatMul", [a, b], (*a.shape[:-1], b.shape[-1]))

    def softmax(self, x, axis=-1):
        return self.node("Softmax", [x], tuple(x.shape), axis=axis)

    def topk(self, x, keep):
        """(values, indices) of the `keep` largest of [1, n]."""
        outputs = [self._value(f"v{len(self.nodes)}{part}", (1, keep)) for part in ("", "i")]
        outputs[1].type = ir.TensorType(ir.DataType.INT64)
        k = self.constant(np.array([keep], np.int64))
        self.nodes.append(ir.Node("", "TopK", [x, k], outputs=outputs))
        return outputs

    def gather(self, x, index, columns):
        """Rows of x [1, n, columns] by index [1, k]."""
        shape = (1, index.shape[1], columns)
        sizes = self.constant(np.array(shape, np.int64))
        picked = self.node("Expand", [self.reshape(index, 1, index.shape[1], 1), sizes], shape)
        return self.node("GatherElements", [x, picked], shape, axis=1)

    def se(self, x, squeezed, inner="relu", gate="hsigmoid"):
        """Squeeze and excitation (Hu et al. 2018)."""
        y = self.conv(self.conv(self.mean(x), squeezed, act=inner), x.shape[1], act=gate)
        return self.mul(x, y)


def _kind(value: object) -> ir.AttributeType:
    if isinstance(value, list):
        return ir.AttributeType.INTS
    return ir.AttributeType.STRING if isinstance(value, str) else ir.AttributeType.INT


def rounded(channels: float, by: int = 8) -> int:
    """Channels to the nearest multiple of 8, never less than 90 % (MobileNet's rule)."""
    found = max(by, int(channels + by / 2) // by * by)
    return found + by if found < 0.9 * channels else found
