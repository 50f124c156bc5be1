"""Sparse 3-D convolution on a CPU: submanifold, strided and inverse, float32 and INT8.

    voxels = sites(coordinates, (41, 1440, 1440))     # sorted; voxels.order says which row each is
    book = voxels.submanifold((3, 3, 3))               # built once, kept with the sites
    features = convolve(features[voxels.order], book, weights, relu=True)
    down = voxels.strided((3, 3, 3), (2, 2, 2), (1, 1, 1))
    smaller = convolve(features, down, weights2)       # rows of down.outputs

The method is output-stationary gather-GEMM (Graham & van der Maaten, arXiv 1706.01307; spconv's implicit GEMM);
reference.py defines order and arithmetic.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.sparse_conv import reference
from edgekit.kernels.sparse_conv.reference import Triple

MAX_KERNEL = 15
"""Cells of a kernel's side."""


class Sites:
    """Where the voxels of a sparse tensor are. Made by `sites` and by strided rulebooks; immutable, and its
    rulebooks are made once, whichever threads ask.

    coordinates: int32 [n, 4], batch z y x, sorted by them, read-only.  shape: cells along z, y, x.
    order: int32 [n], which row of the coordinates given to `sites` each is.
    """

    def __init__(
        self, coordinates: np.ndarray, shape: Triple, batch: int, order: np.ndarray, made: Any
    ) -> None:
        self.coordinates, self.shape, self.batch, self.order = coordinates, shape, batch, order
        self.coordinates.flags.writeable = False
        self._made = made
        self._books: dict[tuple[Triple, Triple, Triple, bool], _Built] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.coordinates)

    def submanifold(self, kernel: Triple, *, threads: int = 0) -> Rulebook:
        """Outputs at the sites of the inputs, window centred on them. Raises: UsageError for an even side."""
        if any(k % 2 == 0 for k in kernel):
            raise UsageError(f"submanifold kernel: expected odd sides, got {list(kernel)}.")
        z, y, x = (k // 2 for k in kernel)
        return self._book(kernel, (1, 1, 1), (z, y, x), True, threads)

    def strided(self, kernel: Triple, stride: Triple, padding: Triple, *, threads: int = 0) -> Rulebook:
        """Outputs wherever a window holds a voxel. Raises: UsageError for sizes that leave no output."""
        return self._book(kernel, stride, padding, False, threads)

    def _book(self, kernel: Triple, stride: Triple, padding: Triple, same: bool, threads: int) -> Rulebook:
        sides = (kernel, stride, padding)
        if any(len(s) != 3 for s in sides) or not all(1 <= k <= MAX_KERNEL for k in kernel):
            raise UsageError(f"sparse kernel: expected three sides of 1..{MAX_KERNEL}, got {list(kernel)}.")
        shape = reference.out_shape(self.shape, kernel, stride, padding) if min(stride) > 0 else (0, 0, 0)
        if min(shape) < 1 or min(padding) < 0:
            raise UsageError(
                f"sparse convolution of {list(self.shape)}: nothing comes out of kernel {list(kernel)}, "
                f"stride {list(stride)}, padding {list(padding)}."
            )
        key = (kernel, stride, padding, same)
        with self._lock:
            built = self._books.get(key)
            if built is None:
                built = self._books[key] = self._build(*sides, same, shape, threads)
        return Rulebook(self, self if built.outputs is None else built.outputs, kernel, built)

    def _build(
        self, kernel: Triple, stride: Triple, padding: Triple, same: bool, shape: Triple, threads: int
    ) -> _Built:
        window = (kernel, stride, padding)
        module = kernels.native()
        outputs = None
        if not same:
            if module is not None and self._made is not None:
                made = module.sparse_strided(self._made, shape, *window)
                found = made.coordinates
            else:
                made = None
                found = reference.strided_sites(self.coordinates, self.shape, shape, *window)
            outputs = Sites(found, shape, self.batch, np.arange(len(found), dtype=np.int32), made)
        to = self if outputs is None else outputs
        if module is not None and self._made is not None:
            return _Built(outputs, module.sparse_rulebook(self._made, to._made, *window, threads), None)
        return _Built(outputs, None, reference.pairs(self.coordinates, self.shape, to.coordinates, *window))


class _Built:
    """What `Sites` keep of a rulebook. It does not refer to them, so that they go with their last user: a stream
    makes megabytes of this per sweep, which must not wait for the garbage collector.

    outputs: None for those of the sites themselves.
    """

    def __init__(self, outputs: Sites | None, made: Any, pairs: reference.Pairs | None) -> None:
        self.outputs, self.made, self.pairs = outputs, made, pairs
        self._inverse: _Built | None = None
        self._lock = threading.Lock()

    def inverse(self) -> _Built:
        with self._lock:
            if self._inverse is None:
                if self.made is not None:
                    self._inverse = _Built(None, self.made.inverse(), None)
                else:
                    assert self.pairs is not None, "one of the two is there"
                    self._inverse = _Built(None, None, reference.inverse(self.pairs))
            return self._inverse


class Rulebook:
    """Which input voxel meets which output voxel at which kernel position. inputs, outputs: Sites."""

    def __init__(self, inputs: Sites, outputs: Sites, kernel: Triple, built: _Built) -> None:
        self.inputs, self.outputs, self.kernel = inputs, outputs, kernel
        self._built, self._made, self._pairs = built, built.made, built.pairs

    def __len__(self) -> int:
        """Number of pairs: a convolution multiplies this many rows."""
        count: int = self._made.count if self._pairs is None else len(self._pairs[0])
        return count

    def pairs(self) -> reference.Pairs:
        """(position, input, output), int32 [n] each, sorted by position, then output."""
        pairs: reference.Pairs = self._made.pairs() if self._pairs is None else self._pairs
        return pairs

    def inverse(self) -> Rulebook:
        """From the outputs back to the inputs (spconv's SparseInverseConv3d), position for position."""
        return Rulebook(self.outputs, self.inputs, self.kernel, self._built.inverse())


def sites(coordinates: np.ndarray, shape: Triple, batch: int = 1) -> Sites:
    """Sites of voxels in any order: int32 [n, 4], batch z y x, on a grid of `shape` (z, y, x) cells.

    Raises: UsageError for another shape or dtype, a voxel outside of the grid or given twice.
    """
    if coordinates.ndim != 2 or coordinates.shape[1] != 4 or coordinates.dtype != np.int32:
        raise UsageError(
            f"coordinates: expected int32 [n, 4], got {coordinates.dtype} {list(coordinates.shape)}."
        )
    if (
        len(shape) != 3
        or min(shape) < 1
        or batch < 1
        or math.prod(shape) * batch >= 2**62
        or max(shape) >= 2**30
    ):
        raise UsageError(f"sparse grid: expected z, y, x and batch of at least 1, got {shape}, {batch}.")
    module = kernels.native()
    if module is not None:
        result = module.sparse_sites(np.ascontiguousarray(coordinates), shape, batch)
        if isinstance(result, str):
            raise UsageError(f"coordinates: {result}, expected distinct voxels of {batch} x {list(shape)}.")
        made, order = result
        return Sites(made.coordinates, shape, batch, order, made)
    outside = ((coordinates < 0) | (coordinates >= np.array((batch, *shape)))).any(axis=1)
    if outside.any():
        raise UsageError(
            f"coordinates: row {outside.argmax()} is outside of the grid, "
            f"expected distinct voxels of {batch} x {list(shape)}."
        )
    places = reference.linear(coordinates, shape)
    order = np.argsort(places, kind="stable").astype(np.int32)
    twice = np.flatnonzero(np.diff(places[order]) == 0)
    if len(twice):
        raise UsageError(
            f"coordinates: row {order[twice[0] + 1]} is there twice, "
            f"expected distinct voxels of {batch} x {list(shape)}."
        )
    return Sites(np.ascontiguousarray(coordinates[order]), shape, batch, order, None)


class Weights:
    """A layer's float32 weights, arranged once for the CPU.

    weight: float32 [kz, ky, kx, in, out] (spconv 1's order; spconv 2 has [out, kz, ky, kx, in]).
    bias: float32 [out] or None. isa: an instruction set of `isas()`, for tests.
    Raises: UsageError for arrays of another shape or dtype.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None = None, *, isa: str = "auto") -> None:
        _check_weight(weight, bias, np.float32)
        self.kernel: Triple = weight.shape[:3]
        self.channels, self.outputs = weight.shape[3:]
        self._weight = np.ascontiguousarray(weight).reshape(-1, self.channels, self.outputs)
        self._bias = np.zeros(self.outputs, np.float32) if bias is None else np.ascontiguousarray(bias)
        module = kernels.native()
        self._made = module and module.SparseWeights(self._weight, self._bias, isa)


class Weights8:
    """A layer's INT8 weights: real weight = weight * scale[out].

    weight: int8 [kz, ky, kx, in, out] in -127..127.  scale: float32 [out] > 0.  bias: float32 [out] or None.
    Raises: UsageError for arrays of another shape, dtype or range.
    """

    def __init__(
        self, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None = None, *, isa: str = "auto"
    ) -> None:
        _check_weight(weight, bias, np.int8)
        if scale.shape != weight.shape[4:] or scale.dtype != np.float32 or not (scale > 0).all():
            raise UsageError(f"sparse weight scales: expected positive float32 [{weight.shape[4]}].")
        if weight.size and weight.min() < -127:
            raise UsageError("sparse weights: expected int8 in -127..127, got -128.")
        self.kernel: Triple = weight.shape[:3]
        self.channels, self.outputs = weight.shape[3:]
        self.scale = np.ascontiguousarray(scale)
        self._bias = np.zeros(self.outputs, np.float32) if bias is None else np.ascontiguousarray(bias)
        flat = weight.reshape(-1, self.channels, self.outputs)
        # products are taken four channels at a time
        self._weight = np.ascontiguousarray(np.pad(flat, ((0, 0), (0, -self.channels % 4), (0, 0))))
        module = kernels.native()
        self._made = module and module.SparseWeights8(self._weight, self._bias, isa)

    @classmethod
    def quantize(cls, weight: np.ndarray, bias: np.ndarray | None = None, *, isa: str = "auto") -> Weights8:
        """From float32 weights, symmetric, one scale per output channel: max |w| / 127."""
        _check_weight(weight, bias, np.float32)
        largest = np.abs(weight).reshape(-1, weight.shape[4]).max(axis=0)
        scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
        return cls(np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale, bias, isa=isa)


def _check_weight(weight: np.ndarray, bias: np.ndarray | None, dtype: Any) -> None:
    if weight.ndim != 5 or weight.dtype != dtype or 0 in weight.shape:
        raise UsageError(
            f"sparse weights: expected {np.dtype(dtype)} [kz, ky, kx, in, out], "
            f"got {weight.dtype} {list(weight.shape)}."
        )
    if bias is not None and (bias.shape != weight.shape[4:] or bias.dtype != np.float32):
        raise UsageError(
            f"sparse bias: expected float32 [{weight.shape[4]}], got {bias.dtype} {list(bias.shape)}."
        )


def isas() -> list[str]:
    """Instruction sets that this machine has products for, best first; empty without the native module."""
    module = kernels.native()
    return module.sparse_isas() if module is not None else []


def fold_batch_norm(
    weight: np.ndarray,
    bias: np.ndarray | None,
    gamma: np.ndarray,
    beta: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    eps: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) of the convolution that does the batch norm after it, too; computed in float64."""
    factor = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + eps)
    before = 0.0 if bias is None else bias.astype(np.float64)
    folded = (weight.astype(np.float64) * factor).astype(np.float32)
    return folded, (beta + (before - mean.astype(np.float64)) * factor).astype(np.float32)


def _check_call(
    features: np.ndarray, dtype: Any, book: Rulebook, weights: Weights | Weights8, threads: int
) -> None:
    if features.shape != (len(book.inputs), weights.channels) or features.dtype != dtype:
        raise UsageError(
            f"features: expected {np.dtype(dtype)} [{len(book.inputs)}, {weights.channels}], "
            f"got {features.dtype} {list(features.shape)}."
        )
    if weights.kernel != book.kernel or threads < 0:
        raise UsageError(
            f"sparse convolution: expected weights of kernel {list(book.kernel)} and threads of at least 0, "
            f"got {list(weights.kernel)}, {threads}."
        )


def _check_residual(residual: np.ndarray | None, shape: tuple[int, int], *dtypes: Any) -> None:
    if residual is not None and (residual.shape != shape or residual.dtype not in dtypes):
        raise UsageError(
            f"residual: expected {' or '.join(map(str, map(np.dtype, dtypes)))} {list(shape)}, "
            f"got {residual.dtype} {list(residual.shape)}."
        )


def convolve(
    features: np.ndarray,
    book: Rulebook,
    weights: Weights,
    *,
    residual: np.ndarray | None = None,
    relu: bool = False,
    threads: int = 0,
) -> np.ndarray:
    """Features of `book.outputs`: float32 [m, out]; `relu(sum + bias + residual)`.

    features: float32 [n, in], one row per site of `book.inputs`.  residual: float32 [m, out].
    Raises: UsageError for arrays of another shape or dtype, or weights of another kernel.
    """
    _check_call(features, np.float32, book, weights, threads)
    shape = (len(book.outputs), weights.outputs)
    _check_residual(residual, shape, np.float32)
    module = kernels.native()
    if module is None or book._made is None or weights._made is None:
        return reference.convolve(
            features, weights._weight, weights._bias, book.pairs(), shape[0], residual, relu
        )
    out = np.empty(shape, np.float32)
    more = None if residual is None else np.ascontiguousarray(residual)
    module.sparse_convolve(
        weights._made, book._made, np.ascontiguousarray(features), more, relu, out, threads
    )
    return out


def quantize(features: np.ndarray, scale: float) -> np.ndarray:
    """int8 features of float32 ones: round(x / scale), halves to even, within -127..127."""
    result: np.ndarray = np.clip(np.rint(features / np.float32(scale)), -127, 127).astype(np.int8)
    return result


def convolve8(
    features: np.ndarray,
    scale: float,
    book: Rulebook,
    weights: Weights8,
    *,
    residual: np.ndarray | None = None,
    residual_scale: float = 1.0,
    relu: bool = False,
    out_scale: float | None = None,
    threads: int = 0,
) -> np.ndarray:
    """As `convolve`, from int8 features (real value = feature * scale) with INT8 weights.

    residual: int8 [m, out], real value = residual * residual_scale, or float32 [m, out] as it is.
    out_scale: None for float32 results, else they are int8, real value = result * out_scale.
    Raises: UsageError for arrays of another shape or dtype, scales that are not positive, or weights of another
    kernel.
    """
    _check_call(features, np.int8, book, weights, threads)
    shape = (len(book.outputs), weights.outputs)
    _check_residual(residual, shape, np.int8, np.float32)
    scales = (scale, residual_scale, 1.0 if out_scale is None else out_scale)
    if not all(math.isfinite(s) and s > 0 for s in scales):
        raise UsageError(
            f"sparse convolution: expected positive scales, got {scale}, {residual_scale}, {out_scale}."
        )
    padded = np.pad(features, ((0, 0), (0, -weights.channels % 4)))
    factor = weights.scale * np.float32(scale)
    module = kernels.native()
    if module is None or book._made is None or weights._made is None:
        return reference.convolve8(
            padded, weights._weight, factor, weights._bias, book.pairs(), shape[0],
            residual, residual_scale, relu, out_scale,
        )  # fmt: skip
    out = np.empty(shape, np.float32 if out_scale is None else np.int8)
    more = None if residual is None else np.ascontiguousarray(residual)
    module.sparse_convolve8(
        weights._made, book._made, np.ascontiguousarray(padded), factor, more, residual_scale, relu,
        out, scales[2], threads,
    )  # fmt: skip
    return out


def to_dense(
    features: np.ndarray, at: Sites, *, out: np.ndarray | None = None, threads: int = 0
) -> np.ndarray:
    """float32 [batch, channels, z, y, x], zeros where there is no voxel. features: float32 [n, channels].

    `.reshape(batch, channels * z, y, x)` of it is BEVFusion's bird's-eye view (channel c, height z at c * nz + z).
    out: an array of that shape to write into, C-contiguous.
    Raises: UsageError for features of other sites, or another `out`.
    """
    if features.ndim != 2 or len(features) != len(at) or features.dtype != np.float32:
        raise UsageError(
            f"features: expected float32 [{len(at)}, channels], got {features.dtype} {list(features.shape)}."
        )
    shape = (at.batch, features.shape[1], *at.shape)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise UsageError(
            f"argument out: expected C-contiguous float32 {list(shape)}, got {out.dtype} {list(out.shape)}."
        )
    module = kernels.native()
    if module is None or at._made is None:
        out[:] = reference.to_dense(at.coordinates, features, at.shape, at.batch)
    else:
        module.sparse_to_dense(at._made, np.ascontiguousarray(features), out, threads)
    return out
