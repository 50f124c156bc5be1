"""One convolution or Linear as a chain of smaller ones: what it computes, what it costs.

    kind      chain (convolution S -> T with a kh x kw kernel)                   ranks
    svd       kh x kw S -> R, 1x1 R -> T (Linear, too)                           (R,)
    data      the same, minimal error on outputs seen instead of on weights      (R,)
    spatial   kh x 1 S -> R, 1 x kw R -> T (Jaderberg et al. 2014)               (R,)
    tucker    1x1 S -> R2, kh x kw R2 -> R1, 1x1 R1 -> T (Kim et al. 2016)       (R1, R2)
    cp        1x1 S -> R, kh x 1 and 1 x kw by channel, 1x1 R -> T (Lebedev 2015) (R,)

Stride, padding and dilation stay with the spatial parts, the bias goes to the last; at full ranks the chain computes
what the layer did. Which ranks: lowrank_ranks.py; which layers of a network: lowrank_plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

KINDS = ("svd", "data", "spatial", "tucker", "cp")
OWNERS = {"svd": (0, 0), "data": (0, 0), "spatial": (0, 1), "tucker": (1, 1), "cp": (1, 2)}
"""Which part of a chain strides, pads and dilates along (height, width)."""
Layer = nn.Conv2d | nn.Linear
Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Outputs:
    """Second moments of a layer's outputs without its bias: mean [T], covariance [T, T] (divided by n), float64."""

    mean: Tensor
    covariance: Tensor


def fits(part: nn.Module, kind: str) -> TypeGuard[Layer]:
    """Whether `kind` is defined for this layer (no groups; spatial kinds need a kernel that is larger than 1x1)."""
    if isinstance(part, nn.Linear):
        return kind in ("svd", "data")
    if not isinstance(part, nn.Conv2d) or part.groups != 1:
        return False
    if kind == "spatial":
        return min(part.kernel_size) > 1
    return kind in ("svd", "data") or max(part.kernel_size) > 1


def tensor(layer: Layer) -> Tensor:
    """The weights [T, S, kh, kw], float64."""
    weight = layer.weight.detach().double()
    return weight[:, :, None, None] if weight.ndim == 2 else weight


def full_ranks(layer: Layer, kind: str) -> Ranks:
    """Ranks at which nothing is lost."""
    t, s, kh, kw = tensor(layer).shape
    if kind == "tucker":
        return min(t, s * kh * kw), min(s, t * kh * kw)
    if kind == "cp":
        return (min(s * kh, t * kw) * min(s, kh) * min(t, kw),)
    return (min(s * kh, t * kw) if kind == "spatial" else min(t, s * kh * kw),)


def size(kind: str, shape: Sequence[int], ranks: Ranks) -> int:
    """Weights of the chain for a layer [T, S, kh, kw], without biases."""
    return sum(math.prod(p) for p in part_shapes(kind, shape, ranks))


def part_shapes(kind: str, shape: Sequence[int], ranks: Ranks) -> list[tuple[int, int, int, int]]:
    """Weights [out, in / groups, kh, kw] of every part of the chain for a layer [T, S, kh, kw]."""
    t, s, kh, kw = shape
    r = ranks[0]
    if kind == "tucker":
        return [(ranks[1], s, 1, 1), (r, ranks[1], kh, kw), (t, r, 1, 1)]
    if kind == "cp":
        return [(r, s, 1, 1), (r, 1, kh, 1), (r, 1, 1, kw), (t, r, 1, 1)]
    if kind == "spatial":
        return [(r, s, kh, 1), (t, r, 1, kw)]
    return [(r, s, kh, kw), (t, r, 1, 1)]


def break_even(kind: str, shape: Sequence[int]) -> float:
    """The rank (tucker: of both sides) below which the chain has fewer weights than the layer."""
    t, s, kh, kw = shape
    if kind != "tucker":
        return t * s * kh * kw / size(kind, shape, (1,))
    taps = kh * kw  # r^2 taps + r (s + t) = t s taps
    return (math.sqrt((s + t) ** 2 + 4 * taps**2 * t * s) - s - t) / (2 * taps)


# --- factors ----------------------------------------------------------------------------------------


def unfold(weight: Tensor, mode: int) -> Tensor:
    """[d_mode, everything else] of a tensor."""
    return weight.movedim(mode, 0).flatten(1)


def two_factors(matrix: Tensor, rank: int, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """matrix [m, n] ~ left [m, r] @ right [r, n], both with columns/rows of equal length.

    basis [m, r], orthonormal: project onto it; None: onto the leading singular vectors.
    """
    if basis is None:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        root = s[:rank].sqrt()
        return u[:, :rank] * root, root[:, None] * v[:rank]
    right = basis[:, :rank].T @ matrix
    root = right.norm(dim=1).clamp(min=1e-30).sqrt()
    return basis[:, :rank] * root, right / root[:, None]


def tucker2(weight: Tensor, ranks: tuple[int, int], rounds: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """(left [T, R1], core [R1, R2, kh, kw], right [S, R2]): orthonormal sides, weight ~ core x1 left x2 right.

    HOSVD, then HOOI (De Lathauwer et al. 2000) until the core's norm stays within 1e-9.
    """
    out, into = ranks
    right = leading(unfold(weight, 1), into)
    before = 0.0
    for _ in range(rounds):
        left = leading(unfold(torch.einsum("tsij,sb->tbij", weight, right), 0), out)
        half = torch.einsum("tsij,ta->asij", weight, left)
        right = leading(unfold(half, 1), into)
        norm = torch.einsum("asij,sb->abij", half, right).norm().item()
        if norm - before <= 1e-9 * norm:
            break
        before = norm
    return left, torch.einsum("tsij,ta,sb->abij", weight, left, right), right


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The left singular vectors of the largest singular values, [m, rank], orthonormal."""
    found: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1]
    return found.flip(1)[:, :rank]


def cp(weight: Tensor, rank: int, rounds: int = 100, tolerance: float = 1e-6) -> list[Tensor]:
    """Factors [T, R], [S, R], [kh, R], [kw, R] whose outer products sum to about `weight`: alternating least squares.

    It starts from orthogonal rank-one parts (spatial SVD, both of its factors split by SVD again), the heaviest first:
    deterministic, and exact where R takes them all. A ridge of 1e-8 of the gram keeps cancelling parts in check. Ends
    where a round improves the relative error by less than `tolerance`.
    """
    factors = _orthogonal_parts(weight, rank)
    before = cp_error(weight, factors)
    square = weight.square().sum().item()
    taps = weight.shape[2] * weight.shape[3]
    outputs, inputs = unfold(weight, 0), unfold(weight, 1)
    for _ in range(rounds if before > 1e-12 else 0):
        a, b, c, d = factors
        window = torch.einsum("ir,jr->ijr", c, d).reshape(taps, rank)
        around = window.T @ window
        a = _solve(outputs @ torch.einsum("sr,kr->skr", b, window).reshape(-1, rank), (b.T @ b) * around)
        a = a / a.norm(dim=0).clamp(min=1e-30)
        b = _solve(inputs @ torch.einsum("tr,kr->tkr", a, window).reshape(-1, rank), (a.T @ a) * around)
        b = b / b.norm(dim=0).clamp(min=1e-30)
        # both spatial sides need the weights contracted with a and b alone: [R, kh, kw]
        inner = (
            (a.T @ outputs)
            .reshape(rank, -1, taps)
            .mul_(b.T[..., None])
            .sum(1)
            .reshape(rank, *weight.shape[2:])
        )
        sides = (a.T @ a) * (b.T @ b)
        c = _solve(torch.einsum("rij,jr->ir", inner, d), sides * (d.T @ d))
        c = c / c.norm(dim=0).clamp(min=1e-30)
        goal = torch.einsum("rij,ir->jr", inner, c)
        d = _solve(goal, sides * (c.T @ c))
        left = square - 2 * (goal * d).sum() + (sides * (c.T @ c) * (d.T @ d)).sum()
        error = math.sqrt(max(left.item(), 0.0) / max(square, 1e-300))
        if error > before:
            break
        factors, gain, before = [a, b, c, d], before - error, error
        if gain < tolerance:
            break
    lengths = [f.norm(dim=0).clamp(min=1e-30) for f in factors]
    even = torch.stack(lengths).prod(0) ** 0.25
    return [f / length * even for f, length in zip(factors, lengths, strict=True)]


def _solve(goal: Tensor, gram: Tensor) -> Tensor:
    """The factor [n, R] whose product with the others is nearest: goal gram^-1."""
    ridge = (1e-8 * gram.diagonal().mean() + 1e-30) * torch.eye(len(gram), dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(gram + ridge, goal.T).T
    return found


def _orthogonal_parts(weight: Tensor, rank: int) -> list[Tensor]:
    t, s, kh, kw = weight.shape
    u, sigma, v = torch.linalg.svd(weight.permute(1, 2, 0, 3).reshape(s * kh, t * kw), full_matrices=False)
    ub, sb, vb = torch.linalg.svd(u.T.reshape(-1, s, kh), full_matrices=False)
    ua, sa, va = torch.linalg.svd(v.reshape(-1, t, kw), full_matrices=False)
    weights = sigma[:, None, None] * sb[:, :, None] * sa[:, None, :]
    best = torch.argsort(weights.flatten(), descending=True, stable=True)[:rank]
    r, b, a = torch.unravel_index(best, weights.shape)
    found = [ua[r, :, a].T * weights[r, b, a], ub[r, :, b].T, vb[r, b].T, va[r, a].T]
    short = rank - len(best)  # more parts than there are: empty ones
    return [torch.cat([f, f.new_zeros(f.shape[0], short)], 1) for f in found]


def cp_error(weight: Tensor, factors: Sequence[Tensor]) -> float:
    """Norm of what the factors leave over, as a share of the weight's."""
    a, b, c, d = factors
    inner = torch.einsum("sr,ir,jr->sijr", b, c, d).reshape(-1, a.shape[1])
    return float((unfold(weight, 0) - a @ inner.T).norm() / weight.norm().clamp(min=1e-300))


# --- chains -----------------------------------------------------------------------------------------


def decompose(
    layer: Layer, kind: str, ranks: Ranks, outputs: Outputs | None = None, random: torch.Generator | None = None,
    rounds: int = 100,
) -> nn.Sequential:  # fmt: skip
    """The chain that stands for `layer`.

    outputs: what "data" needs (`observe`). random: factors are drawn (the control: same chain, nothing of the weights but their
    scale). rounds: of alternating least squares. Raises: ValueError for ranks that are not in 1..full ranks (cp may
    be larger).
    """
    assert fits(layer, kind)
    full = full_ranks(layer, kind)
    if len(ranks) != len(full) or any(
        not 1 <= r <= (f if kind != "cp" else r) for r, f in zip(ranks, full, strict=True)
    ):
        raise ValueError(f"ranks of {kind}: expected 1 to {full}, got {ranks}")
    if random is not None:
        return _chain(layer, kind, _drawn(layer, kind, ranks, random), None)
    weight = tensor(layer)
    t, s, kh, kw = weight.shape
    shift = None
    if kind == "tucker":
        left, core, right = tucker2(weight, (ranks[0], ranks[1]))
        parts = [right.T, core, left]
    elif kind == "cp":
        a, b, c, d = cp(weight, ranks[0], rounds)
        parts = [b.T, c.T, d.T, a]
    elif kind == "spatial":
        first, last = two_factors(weight.permute(1, 2, 0, 3).reshape(s * kh, t * kw), ranks[0])
        parts = [first.reshape(s, kh, -1).permute(2, 0, 1), last.reshape(-1, t, kw).permute(1, 0, 2)]
    else:
        basis = None
        if kind == "data":
            assert outputs is not None
            # W C^1/2 = U S V' and W' = U_r S_r V_r' C^-1/2 is U_r U_r' W, with U of W C W' = E[y y']: no root is needed
            basis = torch.linalg.eigh(outputs.covariance)[1].flip(1)
            kept = basis[:, : ranks[0]]
            shift = outputs.mean - kept @ (kept.T @ outputs.mean)
        left, right = two_factors(weight.flatten(1), ranks[0], basis)
        parts = [right, left]
    shapes = part_shapes(kind, weight.shape, ranks)
    return _chain(layer, kind, [p.reshape(to) for p, to in zip(parts, shapes, strict=True)], shift)


def skeleton(layer: Layer, kind: str, ranks: Ranks) -> nn.Sequential:
    """The chain with zeros for weights: what it costs does not depend on them."""
    return _chain(layer, kind, [torch.zeros(p) for p in part_shapes(kind, tensor(layer).shape, ranks)], None)


def _drawn(layer: Layer, kind: str, ranks: Ranks, random: torch.Generator) -> list[Tensor]:
    """Normal factors, scaled so that outputs are as large as the layer's on white inputs."""
    weight = tensor(layer)
    sizes = part_shapes(kind, weight.shape, ranks)
    found = [
        torch.randn(p, generator=random, dtype=weight.dtype) / math.sqrt(math.prod(p[1:])) for p in sizes
    ]
    found[-1] *= (weight.norm() / math.sqrt(weight.shape[0])).item()
    return found


def _chain(layer: Layer, kind: str, parts: Sequence[Tensor], shift: Tensor | None) -> nn.Sequential:
    """Parts [out, in / groups, kh, kw] as layers. shift: is added to the bias."""
    made: list[nn.Module] = []
    bias = None if layer.bias is None else layer.bias.detach().double()
    if shift is not None and float(shift.norm()) > 0:
        bias = shift if bias is None else bias + shift
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    for i, part in enumerate(parts):
        here = bias if i == len(parts) - 1 else None
        if isinstance(layer, nn.Linear):
            new: Layer = nn.Linear(inputs, part.shape[0], bias=here is not None)
            part = part[:, :, 0, 0]
        else:
            stride = _own(layer.stride, kind, i, 1)
            dilation = _own(layer.dilation, kind, i, 1)
            padding = layer.padding if isinstance(layer.padding, str) else _own(layer.padding, kind, i, 0)
            kernel = (part.shape[2], part.shape[3])
            new = nn.Conv2d(
                inputs, part.shape[0], kernel, stride, padding, dilation, inputs // part.shape[1], here is not None,
                layer.padding_mode,
            )  # fmt: skip
        new = new.to(layer.weight.device, layer.weight.dtype)
        with torch.no_grad():
            new.weight.copy_(part)
            if here is not None and new.bias is not None:
                new.bias.copy_(here)
        made.append(new)
        inputs = part.shape[0]
    return nn.Sequential(*made).train(layer.training)


def _own(values: tuple[int, ...], kind: str, part: int, other: int) -> tuple[int, int]:
    """`values` (height, width) along the axes that this part owns, `other` along the rest."""
    high, wide = (v if part == owner else other for v, owner in zip(values, OWNERS[kind], strict=True))
    return high, wide


def observe(model: nn.Module, names: Iterable[str], inputs: Iterable[Tensor]) -> dict[str, Outputs]:
    """Moments of the outputs of these layers over `inputs` (batches), the model in evaluation mode."""
    totals: dict[str, tuple[int, Tensor, Tensor]] = {}

    def add(name: str, output: Tensor, bias: Tensor | None) -> None:
        rows = output.flatten(0, -2) if output.ndim < 4 else output.transpose(0, 1).flatten(1).T
        rows = rows if bias is None else rows - bias
        count, total, square = totals.get(name, (0, 0.0, 0.0))
        totals[name] = (
            count + len(rows), total + rows.sum(0).double(), square + (rows.T @ rows).double(),
        )  # fmt: skip

    with watched(model, names, lambda name, part, _, output: add(name, output, part.bias)):
        for batch in inputs:
            model(batch)
    found = {}
    for name, (count, total, square) in totals.items():
        mean = total / count
        found[name] = Outputs(mean, square / count - torch.outer(mean, mean))
    return found


@contextmanager
def watched(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Layer, Tensor, Tensor], None]
) -> Iterator[None]:
    """`see(name, layer, input, output)` at every call of these layers, without gradients, in evaluation mode."""
    handles = []
    before = [(part, part.training) for part in model.modules()]
    for name in names:
        part = model.get_submodule(name)
        assert isinstance(part, nn.Conv2d | nn.Linear)
        handles.append(part.register_forward_hook(lambda p, x, y, name=name: see(name, p, x[0], y)))
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for handle in handles:
            handle.remove()
        for part, training in before:
            part.training = training


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
