"""What TensorRT's ONNX parser takes, as data.

Source: onnx/onnx-tensorrt `docs/operators.md` of release 10.15 (operators, types, restrictions) and its
`docs/Changelog.md` (the release in which an operator or a relaxation came). Types are those that an
operator computes in: INT8 and FP8 appear only between QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

_FLOAT = frozenset({"float32", "float16", "bfloat16"})
_INT = frozenset({"int32", "int64"})
_BOOL = frozenset({"bool"})
_HALF = frozenset({"float32", "float16"})

_TABLE: tuple[tuple[frozenset[str], str], ...] = (
    (
        _FLOAT,
        "Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Clip Conv"
        " ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool"
        " GlobalMaxPool GroupNormalization GRU HardSigmoid HardSwish Hardmax InstanceNormalization IsInf"
        " LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool"
        " MeanVarianceNormalization PRelu QuantizeLinear RandomNormal RandomNormalLike RandomUniform"
        " RandomUniformLike Reciprocal Resize RMSNormalization RNN RotaryEmbedding Round Scan Selu Sigmoid"
        " Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
    ),
    (
        _FLOAT | _INT,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max"
        " Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax"
        " ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND"
        " Shrink Sign SpaceToDepth Sub Sum TensorScatter TopK",
    ),
    (
        _FLOAT | _INT | _BOOL,
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape"
        " ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (
        _FLOAT | _INT | _BOOL | {"uint8"},
        "Cast CastLike",
    ),
    (_FLOAT | _INT | _BOOL | {"int8", "float8e4m3fn", "float4e2m1", "int4"}, "Constant ConstantOfShape"),
    (_BOOL, "And Not Or Xor"),
    (
        _HALF,
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero"
        " RoiAlign",
    ),
    (frozenset({"float32"}), "STFT"),
    (frozenset({"int8", "float8e4m3fn", "float4e2m1", "int4"}), "DequantizeLinear"),
)

TYPES: dict[str, frozenset[str]] = {op: types for types, ops in _TABLE for op in ops.split()}
"""Operator (default ONNX domain) -> element types it computes in."""

SINCE: dict[str, tuple[int, int]] = {
    "DeformConv": (10, 1),
    "BlackmanWindow": (10, 4),
    "HammingWindow": (10, 4),
    "HannWindow": (10, 4),
    "STFT": (10, 5),
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
}
"""First release that parses an operator, where it came after 10.0."""

REFUSED: dict[str, str] = {
    "QLinearConv": "use QuantizeLinear/DequantizeLinear around Conv",
    "QLinearMatMul": "use QuantizeLinear/DequantizeLinear around MatMul",
    "ConvInteger": "use QuantizeLinear/DequantizeLinear around Conv",
    "MatMulInteger": "use QuantizeLinear/DequantizeLinear around MatMul",
    "DynamicQuantizeLinear": "calibrate and use QuantizeLinear with a constant scale",
    "NonMaxSuppression": "cut it from the network: edgekit runs NMS itself",
    "DeformConv": "it needs NVIDIA's plugin library",
    "RoiAlign": "it needs NVIDIA's plugin library",
}
"""Operators refused by edgekit with what to do instead; some would parse but do not build everywhere."""

SHAPE_INPUTS: dict[str, tuple[int, ...]] = {
    "Expand": (1,),
    "Pad": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "Upsample": (1,),
}
"""Inputs that decide a shape: as network inputs they would make it dynamic."""

TYPED_INPUT: dict[str, int] = {"Where": 1, "OneHot": 2}
"""Input whose type counts, where it is not the first."""

SAME_TYPE: dict[str, tuple[tuple[int, ...], tuple[int, int] | None]] = {
    "BatchNormalization": ((0, 1, 2, 3, 4), (10, 7)),
    "GridSample": ((0, 1), None),
    "Pow": ((0, 1), (10, 12)),
    "PRelu": ((0, 1), None),
    "LayerNormalization": ((0, 1, 2), None),
    "InstanceNormalization": ((0, 1, 2), None),
    "GroupNormalization": ((0, 1, 2), None),
}
"""Inputs that a strongly typed network wants of one type although ONNX lets them differ, and the
release from which they may differ (None: no release known)."""


def opsets(release: tuple[int, ...]) -> tuple[int, int]:
    """Lowest and highest opset that a TensorRT release parses.

    The highest follows from the ONNX that the parser was built with (Changelog: 1.17 from 10.6, 1.18 from
    10.11); before that 20, which the releases' documents name.
    """
    high = 20 if release < (10, 6) else 22 if release < (10, 11) else 23 if release < (10, 15) else 24
    return 9, high
