"""What a YOLOX head learns: SimOTA assignment and the losses (Ge et al. 2021, arXiv:2107.08430)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.models.yolo_lite import STRIDES, decode


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(IoU, GIoU) of broadcastable boxes [..., 4] (Rezatofighi et al. 2019)."""
    ax0, ay0, ax1, ay1 = a.unbind(-1)
    bx0, by0, bx1, by1 = b.unbind(-1)
    wide = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp_(min=0)
    inter = wide * (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp_(min=0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter
    hull = (torch.maximum(ax1, bx1) - torch.minimum(ax0, bx0)) * (
        torch.maximum(ay1, by1) - torch.minimum(ay0, by0)
    )
    iou = inter / union.clamp(min=1e-6)
    return iou, iou - (hull - union) / hull.clamp(min=1e-6)


def assign(
    boxes: Tensor, scores: Tensor, truth: Tensor, kinds: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """SimOTA (YOLOX, section 2.1): which truth every cell learns.

    boxes [B,N,4] and scores [B,N,C] predicted, truth [B,G,4], kinds [B,G] (-1: none), size = (height,
    width) of the input. Returns (matched [B,N] bool, which [B,N]). Candidates of a truth are, on each
    level, the 5x5 cells around its centre whose centres lie, on each axis, within the box or one
    stride; cost = -log(score of the class) + 3 * -log(IoU); the k cheapest are taken, k = sum of the
    ten best IoUs; a cell wanted twice goes to the cheaper truth.
    """
    batch, count = kinds.shape
    middle = (truth[..., :2] + truth[..., 2:]) / 2
    half = (truth[..., 2:] - truth[..., :2]) / 2
    step = torch.arange(-2, 3, device=boxes.device)
    cells_at, nears, first = [], [], 0
    for stride in STRIDES:
        rows, columns = size[0] // stride, size[1] // stride
        axes = []
        for axis, limit in ((0, columns), (1, rows)):
            at = (middle[..., axis, None] / stride).floor().long() + step
            away = ((at + 0.5) * stride - middle[..., axis, None]).abs()
            good = (at >= 0) & (at < limit) & (away < half[..., axis, None].clamp(min=stride))
            axes.append((at.clamp(0, limit - 1), good))
        (x, x_good), (y, y_good) = axes
        cells_at.append((first + y[..., :, None] * columns + x[..., None, :]).flatten(2))
        nears.append((y_good[..., :, None] & x_good[..., None, :]).flatten(2))
        first += rows * columns
    cell = torch.cat(cells_at, 2)
    near = torch.cat(nears, 2) & (kinds >= 0)[..., None]
    flat = cell.flatten(1)
    there = torch.gather(boxes, 1, flat[..., None].expand(-1, -1, 4)).view(*cell.shape, 4)
    iou = overlaps(there, truth[:, :, None])[0] * near
    kind = kinds.clamp(min=0)[..., None].expand_as(cell).flatten(1)
    score = scores.flatten(1).gather(1, flat * scores.shape[-1] + kind).view_as(cell)
    cost = -score.clamp(min=1e-8).log() - 3 * iou.clamp(min=1e-8).log() + 1e5 * ~near
    wanted = iou.topk(10, -1).values.sum(-1).int().clamp(min=1)
    cheap = cost.topk(10, -1, largest=False)
    chosen = (torch.arange(10, device=cost.device) < wanted[..., None]) & near.gather(2, cheap.indices)
    price = torch.where(chosen, cheap.values, torch.inf).flatten(1)
    target = cell.gather(2, cheap.indices).flatten(1)
    best = torch.full(boxes.shape[:2], torch.inf, device=boxes.device).scatter_reduce(
        1, target, price, "amin"
    )
    truth_number = torch.arange(count, device=cost.device)[None, :, None].expand(batch, -1, 10).flatten(1)
    winner = torch.where(chosen.flatten(1) & (price <= best.gather(1, target)), truth_number, -1)
    which = torch.full(boxes.shape[:2], -1, device=boxes.device).scatter_reduce(1, target, winner, "amax")
    return which >= 0, which.clamp(min=0)


def losses(
    levels: list[tuple[Tensor, Tensor, Tensor]],
    truth: Tensor,
    kinds: Tensor,
    grid: Tensor,
    stride: Tensor,
    size: tuple[int, int],
    l1: bool,
) -> dict[str, Tensor]:
    """Box (GIoU), objectness and class losses per matched cell, YOLOX weights; box is weighted 5."""
    raw = torch.cat([box.flatten(2) for box, _, _ in levels], 2).transpose(1, 2).float()
    obj = torch.cat([o.flatten(2) for _, o, _ in levels], 2)[:, 0].float()
    cls = torch.cat([c.flatten(2) for _, _, c in levels], 2).transpose(1, 2).float()
    boxes = decode(raw, grid, stride)
    with torch.no_grad():
        scores = (obj.sigmoid()[..., None] * cls.sigmoid()).sqrt()
        matched, which = assign(boxes.detach(), scores, truth, kinds, size)
    count = matched.sum().clamp(min=1)
    goal = torch.gather(truth, 1, which[..., None].expand(-1, -1, 4))[matched]
    kind = torch.gather(kinds, 1, which)[matched]
    iou, giou = overlaps(boxes[matched], goal)
    target = functional.one_hot(kind.clamp(min=0), cls.shape[-1]) * iou.detach()[:, None]
    result = {
        "box": 5 * (1 - giou).sum() / count,
        "objectness": functional.binary_cross_entropy_with_logits(obj, matched.float(), reduction="sum")
        / count,
        "class": functional.binary_cross_entropy_with_logits(cls[matched], target, reduction="sum") / count,
    }
    if l1:
        step = stride.expand_as(matched)[matched][:, None]
        cell = grid.expand(*matched.shape, 2)[matched]
        side = (goal[:, 2:] - goal[:, :2]) / step
        want = torch.cat([(goal[:, :2] + goal[:, 2:]) / 2 / step - cell, side.clamp(min=1e-4).log()], 1)
        result["l1"] = (raw[matched] - want).abs().sum() / count
    return result
