"""Writes a `.tflite` file with the official schema: tensors, operators, constants; the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from edgekit.errors import MissingExtraError
from edgekit.spec import QuantParams

SCHEMA_VERSION = 3
IDENTIFIER = b"TFL3"
ALIGNMENT = 16
"""Of constants in the file, so that kernels may read them where they lie."""


@cache
def schema() -> Any:
    """The module of the flatbuffer schema. Raises: MissingExtraError."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        raise MissingExtraError("ai-edge-litert", "litert", "write .tflite files") from None
    return schema_py_generated


class Writer:
    """One model of one subgraph. Tensors are named by number, in the order in which they are made."""

    def __init__(self) -> None:
        s = self._s = schema()
        self._model = s.ModelT()
        self._model.version = SCHEMA_VERSION
        self._model.description = "edgekit"
        self._model.buffers = [s.BufferT()]  # by convention the first one is empty
        self._model.operatorCodes = []
        self._graph = s.SubGraphT()
        self._graph.tensors = []
        self._graph.operators = []
        self._codes: dict[tuple[str, int], int] = {}
        self._constants: dict[tuple[Any, ...], int] = {}

    def tensor(
        self, name: str, shape: Sequence[int], dtype: np.dtype | type, quant: QuantParams | None = None
    ) -> int:
        """A tensor that an operator (or the caller) writes."""
        s = self._s
        t = s.TensorT()
        t.name = name
        t.shape = np.array(shape, np.int32)
        t.type = getattr(s.TensorType, np.dtype(dtype).name.upper())
        t.buffer = 0
        if quant is not None:
            q = s.QuantizationParametersT()
            q.scale = np.array(quant.scale, np.float32)
            q.zeroPoint = np.array(quant.zero_point, np.int64)
            q.quantizedDimension = quant.axis or 0
            t.quantization = q
        self._graph.tensors.append(t)
        return len(self._graph.tensors) - 1

    def constant(self, data: np.ndarray, name: str = "", quant: QuantParams | None = None) -> int:
        """A tensor that is part of the file; equal ones are stored once."""
        data = np.ascontiguousarray(data)
        raw = data.tobytes()
        key = (data.dtype.str, data.shape, quant, raw)
        if key not in self._constants:
            buffer = self._s.BufferT()
            buffer.data = np.frombuffer(raw, np.uint8)
            self._model.buffers.append(buffer)
            index = self.tensor(name, data.shape, data.dtype, quant)
            self._graph.tensors[index].buffer = len(self._model.buffers) - 1
            self._constants[key] = index
        return self._constants[key]

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: str = "",
        values: Mapping[str, Any] | None = None,
        version: int = 1,
    ) -> None:
        """An operator (`name` of BuiltinOperator), its options table and that table's fields."""
        s = self._s
        if (name, version) not in self._codes:
            code = s.OperatorCodeT()
            code.builtinCode = getattr(s.BuiltinOperator, name)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = version
            self._model.operatorCodes.append(code)
            self._codes[name, version] = len(self._model.operatorCodes) - 1
        operator = s.OperatorT()
        operator.opcodeIndex = self._codes[name, version]
        operator.inputs = np.array(inputs, np.int32)
        operator.outputs = np.array(outputs, np.int32)
        if options:
            table = getattr(s, options + "T")()
            for field, value in (values or {}).items():
                assert hasattr(table, field), f"{options} has no field {field}"
                setattr(table, field, value)
            operator.builtinOptionsType = getattr(s.BuiltinOptions, options)
            operator.builtinOptions = table
        self._graph.operators.append(operator)

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file."""
        self._graph.inputs = np.array(inputs, np.int32)
        self._graph.outputs = np.array(outputs, np.int32)
        self._model.subgraphs = [self._graph]
        size = sum(0 if b.data is None else len(b.data) for b in self._model.buffers)
        builder: Any = _aligning_builder()(size + 65536)
        builder.Finish(self._model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())


def facts(data: bytes) -> dict[str, Any]:
    """What a `.tflite` file holds: {"weight_bytes": bytes of its constants, "ops": operators and their counts}."""
    s = schema()
    model = s.Model.GetRootAs(data, 0)
    names = {v: k for k, v in vars(s.BuiltinOperator).items() if isinstance(v, int)}
    codes = [names[model.OperatorCodes(i).BuiltinCode()] for i in range(model.OperatorCodesLength())]
    graph = model.Subgraphs(0)
    counts: dict[str, int] = {}
    for i in range(graph.OperatorsLength()):
        name = codes[graph.Operators(i).OpcodeIndex()]
        counts[name] = counts.get(name, 0) + 1
    size = sum(model.Buffers(i).DataLength() for i in range(model.BuffersLength()))
    return {"weight_bytes": size, "ops": dict(sorted(counts.items()))}


@cache
def _aligning_builder() -> Any:
    """flatbuffers' Builder, but vectors of bytes (constants) start at multiples of ALIGNMENT."""
    from flatbuffers import Builder

    class Aligning(Builder):  # type: ignore[misc, unused-ignore]
        __slots__ = ()

        def CreateNumpyVector(self, x: np.ndarray) -> Any:
            if x.dtype != np.uint8:
                return super().CreateNumpyVector(x)
            self.StartVector(1, x.size, ALIGNMENT)
            self.head -= x.size
            self.Bytes[self.head : self.head + x.size] = x.tobytes()
            self.vectorNumElems = x.size  # type: ignore[misc, unused-ignore]
            return self.EndVector()

    return Aligning
