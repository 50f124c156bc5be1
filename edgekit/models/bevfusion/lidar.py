"""The LiDAR branch: sparse 3-D convolutions in torch, equal to `kernels.sparse_conv`, for training.

A sparse convolution is the dense one on a grid of zeros, read off at chosen sites: the inputs' own (submanifold), or all
whose window holds a voxel (strided). The kernel's rulebook lists which input voxel meets which output voxel at which kernel
position; position by position these rows are multiplied by that position's weights and added to their output's. Tests hold it
against `conv3d` times occupancy, and against the kernel. On a CPU, sums run in the rulebook's order: the same bits in every run.

Parameters have the names and shapes that `kernels.sparse_conv.encoder.prepare` takes: `weights(model)` is all it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.kernels import sparse_conv as sparse
from edgekit.kernels.sparse_conv.encoder import EncoderSpec
from edgekit.kernels.voxelize import VALUES, Voxels, encoder_values
from edgekit.models.bevfusion.config import LidarConfig
from edgekit.models.bevfusion.layers import MOMENTUM

__all__ = ["VALUES", "Cloud", "SparseEncoder", "Window", "cloud", "voxel_values", "weights", "window"]


def voxel_values(voxels: Voxels, config: LidarConfig) -> np.ndarray:
    """Inputs of the encoder, float32 [m, encoder.inputs], of voxels of points x, y, z, intensity, dt."""
    return encoder_values(voxels, config.grid, config.values, config.encoder.inputs)


@dataclass(frozen=True, eq=False)
class Window:
    """A rulebook as tensors: `inputs`, `outputs` int64 [pairs], sorted by kernel position; `counts`, how many each position has;
    `sites`, how many outputs there are."""

    inputs: Tensor
    outputs: Tensor
    counts: list[int]
    sites: int

    def to(self, device: torch.device) -> Window:
        return Window(self.inputs.to(device), self.outputs.to(device), self.counts, self.sites)


@dataclass(frozen=True, eq=False)
class Cloud:
    """A batch of clouds as the encoder takes it.

    values: float32 [m, inputs], sorted by site.  windows: one per layer (layers at the same sites share theirs).
    cells: int64 [n], where the last layer's rows lie in [batch, z, y, x].  batch: samples.
    """

    values: Tensor
    windows: tuple[Window, ...]
    cells: Tensor
    batch: int

    def to(self, device: torch.device) -> Cloud:
        moved: dict[int, Window] = {}
        for window in self.windows:
            moved.setdefault(id(window), window.to(device))
        windows = tuple(moved[id(window)] for window in self.windows)
        return Cloud(self.values.to(device), windows, self.cells.to(device), self.batch)


def cloud(spec: EncoderSpec, parts: Sequence[tuple[np.ndarray, np.ndarray]], threads: int = 0) -> Cloud:
    """parts: (coordinates int32 [m, 4], values float32 [m, inputs]) per sample, as `voxelize` and `voxel_values` give.
    Column 0 of the coordinates is set to the sample's number. A sample without points is one without voxels."""
    coordinates = [
        np.concatenate([np.full((len(at), 1), i, np.int32), at[:, 1:]], 1) for i, (at, _) in enumerate(parts)
    ]
    at = sparse.sites(np.concatenate(coordinates), spec.shape, len(parts))
    values = np.concatenate([values for _, values in parts])[at.order]
    made: dict[
        int, tuple[sparse.Rulebook, Window]
    ] = {}  # the rulebook too: an id is another's when it is gone
    windows = []
    for layer in spec.layers():
        book = layer.book(at, threads)
        if id(book) not in made:
            made[id(book)] = book, window(book)
        windows.append(made[id(book)][1])
        at = book.outputs
    places = sparse.reference.linear(at.coordinates, at.shape)
    cells = torch.from_numpy(places.astype(np.int64))
    return Cloud(torch.from_numpy(values), tuple(windows), cells, len(parts))


def window(book: sparse.Rulebook) -> Window:
    """A rulebook's pairs as tensors."""
    position, inputs, outputs = (part.astype(np.int64) for part in book.pairs())
    counts = np.bincount(position, minlength=int(np.prod(book.kernel)))
    return Window(torch.from_numpy(inputs), torch.from_numpy(outputs), counts.tolist(), len(book.outputs))


def _multiplied(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """[pairs, out]: each position's rows times its weights, weight [K, in, out]."""
    out = rows.new_empty((len(rows), weight.shape[2]))
    for piece, into, matrix in zip(torch.split(rows, counts), torch.split(out, counts), weight, strict=True):
        torch.mm(piece, matrix, out=into)
    return out


class _Convolve(torch.autograd.Function):
    """Written out, so that what is gathered and multiplied need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, place: Window) -> Tensor:
        ctx.place = place
        ctx.save_for_backward(x, weight)
        products = _multiplied(x.index_select(0, place.inputs), weight, place.counts)
        return x.new_zeros((place.sites, weight.shape[2])).index_add_(0, place.outputs, products)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        place: Window = ctx.place
        arriving = gradient.index_select(0, place.outputs)
        to_x = None
        if ctx.needs_input_grad[0]:
            products = _multiplied(arriving, weight.transpose(1, 2), place.counts)
            to_x = torch.zeros_like(x).index_add_(0, place.inputs, products)
        to_weight = torch.empty_like(weight)
        rows = x.index_select(0, place.inputs)
        for given, came, into in zip(
            torch.split(rows, place.counts), torch.split(arriving, place.counts), to_weight, strict=True
        ):
            torch.mm(given.T, came, out=into)
        return to_x, to_weight, None


class _Conv(nn.Module):
    def __init__(self, kernel: tuple[int, int, int], inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*kernel, inputs, outputs))
        # windows of a LiDAR are about a quarter full
        nn.init.normal_(self.weight, std=(2.0 / (max(1.0, np.prod(kernel) / 4) * inputs)) ** 0.5)

    def forward(self, x: Tensor, place: Window) -> Tensor:
        out: Tensor = _Convolve.apply(x, self.weight.flatten(0, 2), place)  # type: ignore[no-untyped-call]
        return out


class _Norm(nn.BatchNorm1d):
    """Batch norm over voxels; a single voxel has no spread and is left to the running figures."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(x)


class SparseEncoder(nn.Module):
    """`kernels.sparse_conv.encoder` in torch: `Cloud` -> bird's-eye view [B, outputs * nz, ny, nx], channel c of height z at
    c * nz + z."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec, self.plan = spec, tuple(spec.layers())
        for layer in self.plan:
            _put(self, layer.name, _Conv(layer.kernel, layer.inputs, layer.outputs))
            _put(self, layer.norm, _Norm(layer.outputs, spec.eps, MOMENTUM))

    def forward(self, given: Cloud) -> Tensor:
        x = block_input = given.values
        for layer, place in zip(self.plan, given.windows, strict=True):
            y = self.get_submodule(layer.norm)(self.get_submodule(layer.name)(x, place))
            x, block_input = functional.relu(y + block_input if layer.residual else y), x
        nz, ny, nx = self.spec.out_shape
        dense = x.new_zeros((given.batch * nz * ny * nx, x.shape[1]))
        dense = dense.index_put((given.cells,), x)
        return (
            dense.reshape(given.batch, nz, ny, nx, -1).permute(0, 4, 1, 2, 3).reshape(given.batch, -1, ny, nx)
        )


def weights(encoder: SparseEncoder) -> dict[str, np.ndarray]:
    """What `kernels.sparse_conv.encoder.prepare` takes, float32; copies."""
    return {
        name: value.detach().cpu().numpy().copy()
        for name, value in encoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    """`part` as the submodule of that dotted name."""
    *path, last = name.split(".")
    for step in path:
        if step not in module._modules:
            module.add_module(step, nn.Module())
        module = module.get_submodule(step)
    module.add_module(last, part)
