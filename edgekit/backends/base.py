"""What every backend provides: a toolchain half (`lower.py`) and a device half (`engine.py`).

    edgekit/backends/<name>/lower.py    lower(model: onnx_ir.Model, target, precision) -> tuple[Payload, ...]
    edgekit/backends/<name>/engine.py   load(data, variant, options) -> Executable

The device half imports numpy and its own library only.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgekit.errors import BundleError, UsageError, did_you_mean
from edgekit.spec import DType, QuantParams, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgekit.manifest import Variant

BACKENDS = ("onnxruntime", "litert", "openvino", "tensorrt", "native")


@dataclass(frozen=True)
class Payload:
    """One lowered network, ready to go into a bundle: the toolchain's side of a `bundle.Variant`."""

    backend: str
    precision: str
    format: str
    """File format and suffix, e.g. `onnx`, `tflite`."""
    data: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the device half needs to know (JSON values), e.g. TensorRT's build plan."""

    @property
    def variant(self) -> str:
        """Its variant's name in a bundle."""
        return f"{self.backend}-{self.precision}"


@dataclass(frozen=True)
class LoadOptions:
    """How to load on this machine. `threads` 0 = the backend's choice; `progress(done, text)` with done in 0..1.

    alone: no other step of a plan runs beside it or right after it, so that its threads may wait for more work by spinning.
    """

    threads: int = 0
    cache_dir: Path | None = None
    cache_key: str = ""
    """Digest of the payload; backends that compile on the device key their cache by it."""
    progress: Callable[[float, str], None] | None = None
    alone: bool = True


class Binding(Protocol):
    """Preallocated I/O of one session. Write `inputs`, call `run`, read `outputs` (C-contiguous, reused)."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def run(self) -> None: ...

    def close(self) -> None: ...


class Executable(Protocol):
    """A loaded, immutable payload, shared by sessions. `bind` gives one session its own buffers."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def bind(self) -> Binding: ...

    def close(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        """Library, version, providers and threads actually used (JSON values)."""
        ...


class Fitting(Protocol):
    """What an executable adds to `Executable` where it can work in arrays of others: a plan then needs no copies
    between its steps."""

    def bind_to(self, given: Mapping[str, np.ndarray], beside: Binding | None = None) -> Binding:
        """As `bind`, in those of the arrays in `given`, by tensor, that it can use as they lie; these very objects are then
        in the binding's `inputs` and `outputs`. For the others it has memory of its own.

        beside: a binding of this executable that never runs at the same time, whose working memory may be shared.
        An executable may name outputs in `turnable`: those it can also write where they lie as [N, H, W, C]. One that
        says `reentrant = True` shares no working memory: its bindings may run at the same time.
        """
        ...


class Turning(Protocol):
    """What an executable adds to `Executable` where recurrent state can go round without a copy."""

    def bind_turns(self, states: Mapping[str, str]) -> tuple[Binding, Binding]:
        """Two bindings for runs in turn. states: input -> the output that is its next value.

        They share every array, save that what one of them writes as a state's output the other one
        reads as its input. A state whose arrays are shared as well is copied by the session.
        Where states stay on a device, the two have `pull()` and `push()`: these bring what the
        binding's next run reads as states from the device to the arrays in `inputs`, and back.
        """
        ...


ALIGN = 64
"""Bytes: arrays that steps exchange begin at a cache line, which kernels with vectors want."""


def zeros(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Zeros, C-contiguous, the first one at a multiple of ALIGN bytes, with as many bytes behind the last one."""
    import numpy as np

    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    memory = np.zeros(size + 2 * ALIGN, np.uint8)
    start = -memory.ctypes.data % ALIGN
    return memory[start : start + size].view(kind).reshape(shape)


def usable(array: np.ndarray | None, spec: TensorSpec, axes: Sequence[int] | None = None) -> bool:
    """Whether `array` can be the memory of a tensor that is stored as `array.transpose(axes)`."""
    if array is None or array.shape != spec.shape or array.dtype != spec.dtype.value:
        return False
    stored = array if axes is None else array.transpose(axes)
    return bool(stored.flags.c_contiguous and stored.flags.writeable and stored.flags.aligned)


TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
_TURNED, _CODES = "channels_last", "codes"


@dataclass(frozen=True)
class Ports:
    """What an ONNX file does not say of its inputs and outputs, kept in the payload's options.

    turned: names of those that it has as [N, H, W, C]; sessions see [N, C, H, W]. codes: the parameters of those
    that hold codes.
    """

    turned: frozenset[str] = frozenset()
    codes: Mapping[str, QuantParams] = field(default_factory=dict)

    def to_options(self) -> dict[str, Any]:
        """As JSON values: {"channels_last": [names], "codes": {name: [type, scale, zero point]}}, empty ones left out."""
        codes = {n: [q.dtype.value, q.scale[0], q.zero_point[0]] for n, q in sorted(self.codes.items())}
        return {k: v for k, v in ((_TURNED, sorted(self.turned)), (_CODES, codes)) if v}

    @staticmethod
    def of(variant: Variant) -> Ports:
        """From a variant's options. Raises: BundleError for what `to_options` does not write."""
        turned, codes = variant.options.get(_TURNED, []), variant.options.get(_CODES, {})
        try:
            if not isinstance(turned, list) or not all(isinstance(n, str) for n in turned):
                raise ValueError("expected a list of names")
            found = {str(n): QuantParams(DType(t), (float(s),), (int(z),)) for n, (t, s, z) in codes.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise BundleError(
                f"payload {variant.name}: options {_TURNED!r} and {_CODES!r}: {error}. Build the bundle again"
            ) from None
        return Ports(frozenset(turned), found)

    def shown(self, spec: TensorSpec) -> TensorSpec:
        """A tensor of the file as sessions see it. Raises: BundleError where a turned one has not four axes."""
        spec = replace(spec, quant=self.codes.get(spec.name, spec.quant))
        if spec.name not in self.turned:
            return spec
        if len(spec.shape) != 4:
            raise BundleError(
                f"payload tensor {spec.name}: has shape {list(spec.shape)}, expected [N, H, W, C]. "
                "Build the bundle again"
            )
        return replace(spec, shape=tuple(spec.shape[axis] for axis in TO_FIRST))


def half(backend: str, part: str) -> Any:
    """The module `lower` or `engine` of a backend. Raises: UsageError for an unknown backend."""
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: unknown. {did_you_mean(backend, BACKENDS)}")
    return importlib.import_module(f"edgekit.backends.{backend}.{part}")
