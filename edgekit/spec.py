"""What a tensor is, shared by the toolchain and the runtime. Standard library only."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

MAX_LANES = 256
"""Streams in one run at most (passes.lanes)."""

MAX_SECONDS = 1e9
"""Longest step or gap of a state, 30 years: in nanoseconds it fits 64 bits."""


def is_duration(seconds: float) -> bool:
    """Whether a state may have this step or gap: above 0, at most MAX_SECONDS, no NaN."""
    return 0 < seconds <= MAX_SECONDS


def lanes_of(shapes: Iterable[tuple[int, ...]]) -> int:
    """Streams in one run of a network with inputs, outputs and states of these shapes: the leading size that all of
    them have in common, else 1."""
    sizes = {shape[0] if shape else 0 for shape in shapes}
    return max(1, sizes.pop()) if len(sizes) == 1 else 1


class DType(str, enum.Enum):
    """Element types, named as numpy names them (`bfloat16` as ml_dtypes does)."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"
    uint8 = "uint8"
    int32 = "int32"
    int64 = "int64"
    bool = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return {"float32": 4, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2}.get(self.value, 1)


@dataclass(frozen=True)
class QuantParams:
    """Affine quantization, real = scale * (q - zero_point) (Jacob et al. 2018, eq. 1).

    `scale` and `zero_point` hold one entry per tensor, or one per slice along `axis`.
    """

    dtype: DType
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None

    def __post_init__(self) -> None:
        if len(self.scale) != len(self.zero_point):
            raise ValueError(f"{len(self.scale)} scales but {len(self.zero_point)} zero points")
        if not all(s > 0 and math.isfinite(s) for s in self.scale):
            raise ValueError("every scale must be positive and finite")


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor with static shape. `layout` names the axes: NCHW, NHWC, or empty."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    layout: str = ""
    quant: QuantParams | None = None

    def __post_init__(self) -> None:
        if any(d < 1 for d in self.shape):
            raise ValueError(f"tensor {self.name!r} has shape {self.shape}, every size must be at least 1")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class StateSpec:
    """A recurrent tensor: read from graph input `input`, its next value is output `output`.

    The session sets it to `initial` at start and whenever time breaks: a gap longer than
    `reset_after_s`, a reconnect or a clock jump. `nominal_dt_s` is the step it was trained for.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    input: str
    output: str
    initial: float = 0.0
    nominal_dt_s: float | None = None
    reset_after_s: float | None = None
    quant: QuantParams | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)
