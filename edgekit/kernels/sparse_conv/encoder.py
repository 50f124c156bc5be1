"""BEVFusion's sparse LiDAR encoder from a dictionary of weights: voxels in, bird's-eye view out.

The layers are those of mmdetection3d's SparseEncoder with basic blocks, in BEVFusion's nuScenes configuration
(Liu et al., arXiv 2205.13542): a submanifold stem, stages of residual blocks with a strided convolution after all
but the last, and one that squeezes the height. Weights carry that module's names, so that a checkpoint's
dictionary can be passed as it is:

    conv_input.0.weight                       [kz, ky, kx, in, out]
    conv_input.1.{weight, bias, running_mean, running_var}       batch norm
    encoder_layers.encoder_layer<i>.<j>.{conv1, conv2}.weight, {bn1, bn2}.*          residual block
    encoder_layers.encoder_layer<i>.<j>.0.weight, .1.*                                downsampling
    conv_out.0.weight, conv_out.1.*

BEVFusion numbers its axes x, y, z where we have z, y, x: `prepare(axes="xyz")` turns the weights of its
checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from edgekit.errors import UsageError
from edgekit.kernels import sparse_conv as sparse
from edgekit.kernels.sparse_conv import Rulebook, Sites, Weights, Weights8
from edgekit.kernels.sparse_conv.reference import Triple

_SUBMANIFOLD: Triple = (3, 3, 3)


@dataclass(frozen=True)
class Stage:
    """`blocks` residual blocks of `channels`; then a 3x3x3 convolution to `down` channels with stride 2 and
    `padding` (z, y, x), or nothing if `down` is 0."""

    channels: int
    blocks: int = 2
    down: int = 0
    padding: Triple = (1, 1, 1)


@dataclass(frozen=True)
class EncoderSpec:
    """shape: cells along z, y, x.  inputs: values of a voxel.  outputs: channels of each height of the result.
    Defaults: BEVFusion on nuScenes with voxels of 0.075 m."""

    shape: Triple = (41, 1440, 1440)
    inputs: int = 5
    stages: tuple[Stage, ...] = (
        Stage(16, 2, 32),
        Stage(32, 2, 64),
        Stage(64, 2, 128, (0, 1, 1)),
        Stage(128, 2),
    )
    outputs: int = 128
    eps: float = 1e-3

    def layers(self) -> list[Layer]:
        """All convolutions in the order in which they run."""
        found = [Layer("conv_input.0", "conv_input.1", self.inputs, self.stages[0].channels)]
        channels = self.stages[0].channels
        for i, stage in enumerate(self.stages, 1):
            at = f"encoder_layers.encoder_layer{i}"
            assert channels == stage.channels, "a stage has the channels that the one before made"
            for j in range(stage.blocks):
                found += [
                    Layer(f"{at}.{j}.conv1", f"{at}.{j}.bn1", channels, channels),
                    Layer(f"{at}.{j}.conv2", f"{at}.{j}.bn2", channels, channels, residual=True),
                ]
            if stage.down:
                j = stage.blocks
                window = ((3, 3, 3), (2, 2, 2), stage.padding)
                found.append(Layer(f"{at}.{j}.0", f"{at}.{j}.1", channels, stage.down, window))
                channels = stage.down
        squeeze = ((3, 1, 1), (2, 1, 1), (0, 0, 0))
        return [*found, Layer("conv_out.0", "conv_out.1", channels, self.outputs, squeeze)]

    @property
    def out_shape(self) -> Triple:
        """Cells of the result along z, y, x."""
        shape = self.shape
        for layer in self.layers():
            if layer.window is not None:
                shape = sparse.reference.out_shape(shape, *layer.window)
        return shape


BEVFUSION = EncoderSpec()


@dataclass(frozen=True)
class Layer:
    """A convolution and the batch norm after it. window: (kernel, stride, padding) of a strided one, None for a
    submanifold one. residual: the input of the layer before is added."""

    name: str
    norm: str
    inputs: int
    outputs: int
    window: tuple[Triple, Triple, Triple] | None = None
    residual: bool = False

    @property
    def kernel(self) -> Triple:
        return _SUBMANIFOLD if self.window is None else self.window[0]

    def book(self, at: Sites, threads: int) -> Rulebook:
        if self.window is None:
            return at.submanifold(_SUBMANIFOLD, threads=threads)
        return at.strided(*self.window, threads=threads)


@dataclass(frozen=True)
class Encoder:
    """Made by `prepare`. weights: one per layer. scales: of each layer's int8 result by its name, empty for a float
    encoder; `conv_input.0` itself is always float, and so is the result of the last layer."""

    spec: EncoderSpec
    layers: tuple[Layer, ...]
    weights: tuple[Weights | Weights8, ...]
    scales: Mapping[str, float]


def prepare(
    weights: Mapping[str, np.ndarray],
    spec: EncoderSpec = BEVFUSION,
    *,
    axes: str = "zyx",
    scales: Mapping[str, float] | None = None,
) -> Encoder:
    """Fold batch norms and arrange weights for the CPU.

    axes: the order of the weights' three kernel axes, 'zyx' or 'xyz'.
    scales: of every layer but the last (see `calibrate`), for INT8.
    Raises: UsageError for weights that are missing or of another shape.
    """
    if axes not in ("zyx", "xyz"):
        raise UsageError(f"encoder axes {axes!r}: expected 'zyx' or 'xyz'.")
    layers = tuple(spec.layers())
    made: list[Weights | Weights8] = []
    for n, layer in enumerate(layers):
        turn = (2, 1, 0, 3, 4) if axes == "xyz" else (0, 1, 2, 3, 4)
        weight = _get(weights, f"{layer.name}.weight", None).transpose(turn)
        wanted = (*layer.kernel, layer.inputs, layer.outputs)
        if weight.shape != wanted:
            raise UsageError(
                f"encoder weights {layer.name}.weight: expected {list(wanted)} (z, y, x, in, out), "
                f"got {list(weight.shape)}."
            )
        gamma, beta, mean, variance = (
            _get(weights, f"{layer.norm}.{part}", (layer.outputs,))
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        bias = weights.get(f"{layer.name}.bias")
        folded = sparse.fold_batch_norm(weight, bias, gamma, beta, mean, variance, spec.eps)
        if scales is not None and n + 1 < len(layers) and layer.name not in scales:
            raise UsageError(f"encoder scales: {layer.name} has none. Run calibrate with this encoder.")
        made.append(Weights(*folded) if scales is None or n == 0 else Weights8.quantize(*folded))
    return Encoder(spec, layers, tuple(made), dict(scales or {}))


def _get(weights: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    if name not in weights:
        raise UsageError(
            f"encoder weights: {name} is missing, expected the names of mmdetection3d's SparseEncoder."
        )
    if shape is not None and weights[name].shape != shape:
        raise UsageError(f"encoder weights {name}: expected {list(shape)}, got {list(weights[name].shape)}.")
    return weights[name]


def run(
    encoder: Encoder,
    coordinates: np.ndarray,
    features: np.ndarray,
    batch: int = 1,
    *,
    threads: int = 0,
    seen: dict[str, float] | None = None,
) -> tuple[np.ndarray, Sites]:
    """(features float32 [n, outputs], their sites) of the last layer.

    coordinates: int32 [m, 4], batch z y x, in any order, features: float32 [m, inputs], as `voxelize` makes them.
    seen: is told the largest magnitude of each layer's result (float encoders).
    Raises: UsageError for arrays of another shape or dtype, voxels outside of `spec.shape`.
    """
    at = sparse.sites(coordinates, encoder.spec.shape, batch)
    if len(features) != len(at):
        raise UsageError(f"features: expected one row per voxel, {len(at)}, got {len(features)}.")
    x = features[at.order]
    block_input, scale_of_block, scale = x, 1.0, 1.0
    for layer, weights in zip(encoder.layers, encoder.weights, strict=True):
        book = layer.book(at, threads)
        residual = block_input if layer.residual else None
        before, scale_before = x, scale
        last = layer is encoder.layers[-1]
        scale = 1.0 if last else encoder.scales.get(layer.name, 1.0)
        if isinstance(weights, Weights):
            x = sparse.convolve(x, book, weights, residual=residual, relu=True, threads=threads)
            if encoder.scales:
                x = sparse.quantize(x, scale)
        else:
            x = sparse.convolve8(
                x, scale_before, book, weights, residual=residual, residual_scale=scale_of_block, relu=True,
                out_scale=None if last else scale, threads=threads,
            )  # fmt: skip
        block_input, scale_of_block = before, scale_before
        at = book.outputs
        if seen is not None:
            seen[layer.name] = max(seen.get(layer.name, 0.0), float(np.abs(x).max(initial=0.0)))
    assert x.dtype == np.float32
    return x, at


def encode(
    encoder: Encoder,
    coordinates: np.ndarray,
    features: np.ndarray,
    batch: int = 1,
    *,
    out: np.ndarray | None = None,
    threads: int = 0,
) -> np.ndarray:
    """Bird's-eye view float32 [batch, outputs * nz, ny, nx], channel c of height z at c * nz + z. As `run`.

    out: an array of that shape to write into, C-contiguous.
    """
    x, at = run(encoder, coordinates, features, batch, threads=threads)
    nz, ny, nx = at.shape
    shape = (batch, encoder.spec.outputs * nz, ny, nx)
    if out is not None and out.shape != shape:
        raise UsageError(f"argument out: expected {list(shape)}, got {list(out.shape)}.")
    into = None if out is None else out.reshape(batch, encoder.spec.outputs, nz, ny, nx)
    dense = sparse.to_dense(x, at, out=into, threads=threads)
    return dense.reshape(shape) if out is None else out


def calibrate(
    encoder: Encoder, clouds: Iterable[tuple[np.ndarray, np.ndarray]], *, threads: int = 0
) -> dict[str, float]:
    """Scales for `prepare(scales=...)`: largest magnitude / 127 of each layer's result over (coordinates, features).

    Raises: UsageError for an INT8 encoder, or without clouds.
    """
    if encoder.scales:
        raise UsageError("encoder calibration: expected a float encoder, got an INT8 one.")
    seen: dict[str, float] = {}
    for coordinates, features in clouds:
        run(encoder, coordinates, features, threads=threads, seen=seen)
    if not seen:
        raise UsageError("encoder calibration: expected at least one cloud, got none.")
    return {name: largest / 127 if largest > 0 else 1.0 for name, largest in seen.items()}


def random_weights(spec: EncoderSpec = BEVFUSION, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights with the shapes of `spec` and activations of ordinary size, for tests and timings."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for layer in spec.layers():
        fan = max(1, int(np.prod(layer.kernel)) * layer.inputs // 4)  # about a quarter of a window is there
        shape = (*layer.kernel, layer.inputs, layer.outputs)
        made[f"{layer.name}.weight"] = (rng.standard_normal(shape) * (1.0 / fan) ** 0.5).astype(np.float32)
        n = layer.outputs
        made[f"{layer.norm}.weight"] = rng.uniform(0.6, 1.2, n).astype(np.float32)
        made[f"{layer.norm}.bias"] = rng.normal(0, 0.1, n).astype(np.float32)
        made[f"{layer.norm}.running_mean"] = rng.normal(0, 0.1, n).astype(np.float32)
        made[f"{layer.norm}.running_var"] = rng.uniform(0.5, 1.5, n).astype(np.float32)
    return made
