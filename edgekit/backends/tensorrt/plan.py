"""The build plan: how a Jetson compiles a payload. Written by `lower`, carried in the variant's options,
read by `engine`. Standard library only, shared by both halves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from edgekit.errors import BundleError
from edgekit.schema import LATER, SchemaError, from_json, to_json

MIN_TENSORRT = "10.0"
"""Strong typing with Casts and Q/DQ as `lower` writes them came with TensorRT 10."""


@dataclass(frozen=True)
class Io:
    """One network input or output as the engine exposes it: `format` linear = row-major, no padding."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    format: Literal["linear"] = "linear"


@dataclass(frozen=True)
class Hardware:
    """The GPU that the payload was meant for. An engine is compiled on the device and fits only that GPU with
    that many SMs, so another power mode (which may switch SMs off) means another engine."""

    gpu: str
    compute_capability: str
    check_capability: str | None = None
    sms: int | None = None
    sms_by_power_mode: dict[str, int] | None = None


@dataclass(frozen=True)
class SparseLayers:
    """Weighted nodes by name: `layers` whose weights are sparse in the pattern, `dense` others with the reason."""

    pattern: Literal["2:4"]
    layers: tuple[str, ...]
    dense: dict[str, str]


@dataclass(frozen=True)
class BuildPlan:
    """`workspace_bytes` bounds the builder's and the engine's scratch memory. `tf32` lets float32 layers
    round their factors to 10 bits of mantissa (range unchanged). `kept_float32`: reason -> number of nodes
    that stay float32 in a float16 payload. `sparse_weights` lets the builder take kernels that skip the zeros of
    `sparse`, the layers that have the pattern (None: no layer)."""

    inputs: tuple[Io, ...]
    outputs: tuple[Io, ...]
    workspace_bytes: int
    hardware: Hardware
    min_tensorrt: str = MIN_TENSORRT
    strongly_typed: bool = True
    optimization_level: int = 3
    tf32: bool = False
    sparse_weights: bool = False
    dla: bool = False
    timing_cache: Literal["per-gpu", "off"] = "per-gpu"
    kept_float32: dict[str, int] | None = None
    sparse: SparseLayers | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise ValueError(f"optimization_level must be between 0 and 5, got {self.optimization_level}")
        if self.workspace_bytes < 1 << 20:
            raise ValueError(f"workspace_bytes must be at least 1 MiB, got {self.workspace_bytes}")
        if self.dla or not self.strongly_typed:
            raise ValueError("only strongly typed plans for the GPU are supported")

    def to_options(self) -> dict[str, Any]:
        """As JSON values for `Payload.options`."""
        return {"plan": to_json(self)}

    @staticmethod
    def from_options(options: dict[str, Any]) -> BuildPlan:
        """From `Variant.options`. Raises: BundleError for a plan that this version cannot follow."""
        try:
            return from_json(BuildPlan, options.get("plan"), "build plan")
        except SchemaError as error:
            raise BundleError(f"bundle: its {error}. Build the bundle again") from None


def parse_version(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: "10.3.0.30" -> (10, 3, 0, 30). Empty for text without one."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
