"""Mutations of ONNX files for tools/fuzz.py: damaged bytes, and graphs that are valid protobuf but odd."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgekit import frontends, passes
from edgekit.errors import EdgekitError
from tests.helpers import ROOT

TOLERANCE = 1e-3
"""Of the output's range: passes reorder sums; a changed weight shows far above it."""

SHARE_OF_SHIPPED = 0.03
"""Fraction of the mutants made from the models in apps/: they take long, the small one finds more."""


def small_detector(opset: int = 13, seed: int = 3) -> onnx.ModelProto:
    """A YOLOX-like network of one level, 32x32 pixels, 3 classes, [1, 16, 8]."""
    rng = np.random.default_rng(seed)
    weights: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    def conv(x: str, name: str, shape: tuple[int, ...], stride: int) -> str:
        w = constant(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float32))
        b = constant(f"{name}.bias", rng.normal(0, 0.1, shape[0]).astype(np.float32))
        pad = shape[-1] // 2
        nodes.append(helper.make_node("Conv", [x, w, b], [name], strides=[stride] * 2, pads=[pad] * 4))
        return name

    def norm(x: str, name: str, channels: int) -> str:
        values = [rng.uniform(0.5, 1.5, channels).astype(np.float32) for _ in range(4)]
        names = [constant(f"{name}.{i}", value) for i, value in enumerate(values)]
        nodes.append(helper.make_node("BatchNormalization", [x, *names], [name]))
        return name

    def silu(x: str) -> str:
        nodes.append(helper.make_node("Sigmoid", [x], [f"{x}.s"]))
        nodes.append(helper.make_node("Mul", [x, f"{x}.s"], [f"{x}.silu"]))
        return f"{x}.silu"

    x = silu(norm(conv("images", "stem", (8, 3, 3, 3), 2), "stem.bn", 8))
    x = silu(norm(conv(x, "mid", (8, 8, 3, 3), 2), "mid.bn", 8))
    nodes.append(helper.make_node("MaxPool", [x], ["pool"], kernel_shape=[2, 2], strides=[2, 2]))
    parts = [conv("pool", "reg", (4, 8, 1, 1), 1)]
    for name, channels in (("obj", 1), ("cls", 3)):
        nodes.append(helper.make_node("Sigmoid", [conv("pool", name, (channels, 8, 1, 1), 1)], [f"{name}.p"]))
        parts.append(f"{name}.p")
    nodes.append(helper.make_node("Concat", parts, ["cat"], axis=1))
    nodes.append(
        helper.make_node("Reshape", ["cat", constant("shape", np.array([1, 8, 16], np.int64))], ["flat"])
    )
    nodes.append(helper.make_node("Transpose", ["flat"], ["output"], perm=[0, 2, 1]))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 16, 8])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


class Models:
    """The mutations, by kind; `handle` loads one and compares what it computes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.small = [small_detector(13), small_detector(11, seed=4)]
        shipped = sorted((ROOT / "apps").glob("*/*.onnx"))
        self.shipped = [onnx.load(path) for path in shipped]

    def kinds(self) -> list[str]:
        return [name.removeprefix("m_").replace("_", " ") for name in dir(self) if name.startswith("m_")]

    def handle(self, kind: str, seed: int) -> str:
        """Make mutant `seed` of `kind`, read and prepare it, compare with the file run as it is."""
        rng = random.Random(seed)
        choice = self.shipped if self.shipped and rng.random() < SHARE_OF_SHIPPED else self.small
        model = onnx.ModelProto()
        model.CopyFrom(rng.choice(choice))
        mutate: Callable[[random.Random, onnx.ModelProto], bytes | None] = getattr(
            self, "m_" + kind.replace(" ", "_")
        )
        data = mutate(rng, model)
        path = self.folder / "mutant.onnx"
        path.write_bytes(model.SerializeToString() if data is None else data)
        loaded = frontends.load(path)
        try:
            return self._compare(path, loaded)
        except passes.PassError as error:  # refuses the model, but says that edgekit is at fault
            raise RuntimeError(str(error)) from error

    def _compare(self, path: Path, loaded: Any) -> str:
        refused = None
        try:
            passes.prepare(loaded.clone(), task="detect")
        except passes.PassError:
            raise
        except EdgekitError as error:  # no head that is known, say; the passes themselves still run below
            refused = error
        recipe = tuple(dict.fromkeys((*passes.BEFORE_SPLIT, *passes.AFTER_SPLIT)))
        prepared, _ = passes.run_passes(loaded, recipe)
        same = _same_function(path, prepared)
        if same is not None and not same:
            return "changed"
        if refused is not None:
            raise refused
        return "late" if same is None else "identical"

    # bytes

    def m_bytes_flip(self, rng: random.Random, model: onnx.ModelProto) -> bytes:
        bad = bytearray(model.SerializeToString())
        for _ in range(rng.choice((1, 1, 2, 8))):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        return bytes(bad)

    def m_bytes_structure(self, rng: random.Random, model: onnx.ModelProto) -> bytes:
        """Bits flipped in the graph's structure: the weights of the file are made small first."""
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) > 64:
                tensor.raw_data = bytes(len(tensor.raw_data))
        data = bytearray(model.SerializeToString())
        places = [i for i, byte in enumerate(data) if byte]
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.choice(places)] ^= 1 << rng.randrange(8)
        return bytes(data)

    def m_bytes_truncate(self, rng: random.Random, model: onnx.ModelProto) -> bytes:
        data = model.SerializeToString()
        return data[: rng.choice((0, 1, 8, rng.randrange(len(data)), len(data) - 1))]

    def m_bytes_insert(self, rng: random.Random, model: onnx.ModelProto) -> bytes:
        data = model.SerializeToString()
        at = rng.choice((0, len(data), rng.randrange(len(data))))
        return data[:at] + rng.choice((b"\0", b"\xff" * 10, rng.randbytes(rng.randint(1, 40)))) + data[at:]

    def m_bytes_delete(self, rng: random.Random, model: onnx.ModelProto) -> bytes:
        data = model.SerializeToString()
        at = rng.randrange(len(data))
        return data[:at] + data[at + rng.choice((1, 2, 16, 300)) :]

    def m_bytes_splice(self, rng: random.Random, model: onnx.ModelProto) -> bytes:
        data = model.SerializeToString()
        a, b, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.randint(1, 400)
        return data[:a] + data[b : b + size] + data[a + size :]

    def m_bytes_foreign(self, rng: random.Random, model: onnx.ModelProto) -> bytes:
        starts = (
            b"PK\3\4",
            b"\x89PNG\r\n",
            b"\xff\xd8\xff",
            b"<html>",
            b"\x80\x02}",
            b"\0\0\0\0TFL3",
            b"{",
            b"ftrt",
        )
        return rng.choice((rng.choice(starts), b"")) + rng.randbytes(rng.choice((0, 10, 5000)))

    # graphs

    def m_node_dropped(self, rng: random.Random, model: onnx.ModelProto) -> None:
        del model.graph.node[rng.randrange(len(model.graph.node))]

    def m_node_operator(self, rng: random.Random, model: onnx.ModelProto) -> None:
        ops = (
            "Relu",
            "Nope",
            "Loop",
            "If",
            "Conv",
            "Add",
            "Reshape",
            "NonMaxSuppression",
            "Einsum",
            "QuantizeLinear",
            "",
        )
        _node(rng, model).op_type = rng.choice(ops)

    def m_node_domain(self, rng: random.Random, model: onnx.ModelProto) -> None:
        _node(rng, model).domain = rng.choice(("com.microsoft", "ai.onnx", "evil", "ai.onnx.ml"))

    def m_node_edges(self, rng: random.Random, model: onnx.ModelProto) -> None:
        """Inputs and outputs rewired: cycles, dangling, missing and doubled names."""
        names = [n for node in model.graph.node for n in (*node.input, *node.output)] + ["", "nowhere"]
        for _ in range(rng.randint(1, 3)):
            node = _node(rng, model)
            side = rng.choice((node.input, node.output))
            trick = rng.randrange(4)
            if trick == 0 and side:
                side[rng.randrange(len(side))] = rng.choice(names)
            elif trick == 1:
                side.append(rng.choice(names))
            elif trick == 2 and side:
                del side[rng.randrange(len(side))]
            else:
                other = _node(rng, model)
                node.input[:], other.input[:] = list(other.input), list(node.input)

    def m_node_order(self, rng: random.Random, model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        rng.shuffle(nodes)
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    def m_attribute(self, rng: random.Random, model: onnx.ModelProto) -> None:
        """An attribute's value, type or name changed, or a new one."""
        node = rng.choice([n for n in model.graph.node if n.attribute])
        attribute = rng.choice(node.attribute)
        values: tuple[Any, ...] = (
            0,
            -1,
            1,
            3,
            2**31,
            -(2**63),
            1.5,
            "x",
            [],
            [0, 0],
            [1] * 40,
            [-1, -1, 9, 9],
            [2**40] * 2,
        )
        made = helper.make_attribute(attribute.name, rng.choice([v for v in values if v != []]))
        if rng.random() < 0.2:
            made.name = rng.choice(("dilations", "group", "auto_pad", "nope", ""))
            node.attribute.append(made)
        else:
            attribute.CopyFrom(made)

    def m_weight_values(self, rng: random.Random, model: onnx.ModelProto) -> None:
        """NaN, Inf, huge or denormal weights."""
        tensor = rng.choice([t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT])
        values = numpy_helper.to_array(tensor).copy()
        value = rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e-42, 0.0))
        values.reshape(-1)[rng.randrange(values.size) if rng.random() < 0.7 else slice(None)] = value
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    def m_weight_shape(self, rng: random.Random, model: onnx.ModelProto) -> None:
        tensor = rng.choice(model.graph.initializer)
        if tensor.dims and rng.random() < 0.7:
            at = rng.randrange(len(tensor.dims))
            tensor.dims[at] = rng.choice((0, -1, 1, tensor.dims[at] + 1, 2**31, 2**62))
        else:
            tensor.dims.extend([rng.choice((1, 2, 0, 2**40))] * rng.choice((1, 30)))

    def m_weight_type(self, rng: random.Random, model: onnx.ModelProto) -> None:
        rng.choice(model.graph.initializer).data_type = rng.choice(
            (0, 1, 2, 6, 7, 8, 10, 11, 14, 16, 17, 22, 99, -1)
        )

    def m_weight_data(self, rng: random.Random, model: onnx.ModelProto) -> None:
        """Raw data cut, grown or gone, or beside a second copy."""
        tensor = rng.choice(model.graph.initializer)
        raw, trick = tensor.raw_data, rng.randrange(4)
        if trick == 0:
            tensor.raw_data = raw[: rng.randrange(len(raw))]
        elif trick == 1:
            tensor.raw_data = raw + bytes(rng.randint(1, 9))
        elif trick == 2:
            tensor.ClearField("raw_data")
        else:
            tensor.float_data.extend([1.0] * rng.randint(1, 20))

    def m_weight_external(self, rng: random.Random, model: onnx.ModelProto) -> None:
        """Weights said to lie in other files, outside too."""
        tensor = rng.choice(model.graph.initializer)
        tensor.data_location = TensorProto.EXTERNAL
        if rng.random() < 0.7:
            tensor.ClearField("raw_data")
        places = (
            "../../../etc/passwd",
            "/etc/passwd",
            "/dev/zero",
            "mutant.onnx",
            "",
            ".",
            "nope.bin",
            "a\0b",
            "x" * 5000,
        )
        numbers = ("0", "-1", "10", str(2**70), "x")
        for key, value in (
            ("location", rng.choice(places)),
            ("offset", rng.choice(numbers)),
            ("length", rng.choice(numbers)),
        ):
            if rng.random() < 0.8:
                tensor.external_data.add(key=key, value=value)

    def m_names(self, rng: random.Random, model: onnx.ModelProto) -> None:
        """Empty, doubled, enormous and unprintable names, used consistently."""
        old = rng.choice(
            [t.name for t in model.graph.initializer]
            + [o for n in model.graph.node for o in n.output]
            + ["images"]
        )
        new = rng.choice(("", "images", "stem", "x" * 100_000, "a\nb\x1b[2J", "é\u202e", "a b/..;$(x)", "\0"))
        for node in model.graph.node:
            node.input[:] = [new if n == old else n for n in node.input]
            node.output[:] = [new if n == old else n for n in node.output]
        for value in (*model.graph.initializer, *model.graph.input, *model.graph.output):
            if value.name == old:
                value.name = new
        if rng.random() < 0.3:
            _node(rng, model).name = new

    def m_input_shape(self, rng: random.Random, model: onnx.ModelProto) -> None:
        dims = model.graph.input[0].type.tensor_type.shape.dim
        dim = rng.choice(dims)
        if rng.random() < 0.5:
            dim.dim_param = rng.choice(("N", "batch", "height", ""))
        else:
            dim.dim_value = rng.choice((0, -1, 1, 2, 31, 33, 40, 64, 10**6, 2**31, 2**62))
        if rng.random() < 0.2:
            del dims[rng.randrange(len(dims))]

    def m_input_type(self, rng: random.Random, model: onnx.ModelProto) -> None:
        side = rng.choice((model.graph.input, model.graph.output))
        if rng.random() < 0.7:
            side[0].type.tensor_type.elem_type = rng.choice((0, 2, 3, 7, 8, 9, 10, 16, 77))
        else:
            side[0].ClearField("type")

    def m_input_list(self, rng: random.Random, model: onnx.ModelProto) -> None:
        """Inputs and outputs missing, doubled, unknown, or weights listed as inputs (old exporters)."""
        graph, trick = model.graph, rng.randrange(6)
        side = rng.choice((graph.input, graph.output))
        if trick == 0:
            del side[:]
        elif trick == 1:
            side.add().CopyFrom(side[0])
        elif trick == 2:
            side.add().CopyFrom(helper.make_tensor_value_info("ghost", TensorProto.FLOAT, [1]))
        elif trick == 3:
            graph.output.add().CopyFrom(
                helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 32, 32])
            )
        else:
            for tensor in graph.initializer:
                value = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                graph.input.add().CopyFrom(value)

    def m_versions(self, rng: random.Random, model: onnx.ModelProto) -> None:
        trick = rng.randrange(4)
        if trick == 0:
            model.ir_version = rng.choice((0, 1, 3, 7, 99, 2**62))
        elif trick == 1:
            del model.opset_import[:]
        elif trick == 2:
            model.opset_import.add(domain=rng.choice(("", "evil")), version=rng.choice((1, 13, 400)))
        else:
            model.opset_import[0].version = rng.choice((0, -1, 1, 5, 7, 12, 17, 18, 21, 23, 99, 2**62))

    def m_deep(self, rng: random.Random, model: onnx.ModelProto) -> None:
        """Long chains, many outputs, nested subgraphs."""
        graph, trick = model.graph, rng.randrange(3)
        if trick == 0:
            last = "output"
            for i in range(rng.choice((50, 2000))):
                graph.node.append(
                    helper.make_node(rng.choice(("Identity", "Neg", "Relu")), [last], [f"chain{i}"])
                )
                last = f"chain{i}"
            graph.output[0].name = last
        elif trick == 1:
            inner = helper.make_graph([], "g0", [], [])
            for i in range(rng.choice((3, 30))):
                node = helper.make_node(
                    "If", ["images"], ["y"], then_branch=inner, else_branch=helper.make_graph([], "e", [], [])
                )
                inner = helper.make_graph([node], f"g{i}", [], [])
            graph.node.add().CopyFrom(inner.node[0])
        else:
            for i in range(500):
                graph.output.add().CopyFrom(
                    helper.make_tensor_value_info(f"ghost{i}", TensorProto.FLOAT, [1])
                )


def _node(rng: random.Random, model: onnx.ModelProto) -> onnx.NodeProto:
    node = rng.choice(model.graph.node)
    assert isinstance(node, onnx.NodeProto)
    return node


def _same_function(path: Path, prepared: Any) -> bool | None:
    """Whether the prepared network computes what onnxruntime makes of the file; None if it refuses the file."""
    import onnx_ir as ir

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        file = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - it raises a dozen types; all mean that it refuses the file
        return None
    data = ir.to_proto(prepared).SerializeToString()
    ours = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {
        value.name: rng.uniform(0, 1, [d if isinstance(d, int) and d > 0 else 1 for d in value.shape]).astype(
            np.float32
        )
        for value in ours.get_inputs()
    }
    try:
        wanted = file.run(None, feeds)
    except Exception:  # noqa: BLE001 - as above
        return None
    got = ours.run(None, feeds)
    return len(wanted) == len(got) and all(map(_close, wanted, got))


def _close(wanted: np.ndarray, got: np.ndarray) -> bool:
    if wanted.shape != got.shape:
        return False
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(got)):
        return False
    if not finite.any():
        return True
    span = max(1.0, float(np.abs(wanted[finite]).max()))
    return float(np.abs(wanted[finite].astype(np.float64) - got[finite]).max()) <= TOLERANCE * span


def prepare(folder: Path) -> tuple[list[str], Callable[[str, int], str]]:
    """Kinds of mutations and the function that makes and loads one."""
    models = Models(folder)
    return models.kinds(), models.handle
