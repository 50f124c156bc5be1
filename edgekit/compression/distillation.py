"""What a student learns from a teacher: losses on logits, features, relations, and on the raw heads of detectors.

Every loss is a mean over the batch and zero where the student equals the teacher. methods/distil.py puts them into
trainings; a detector's problem sets `Problem.imitate = YoloxImitation()` (raw levels) or `MapImitation(...)` (one
tensor of activated rows or maps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.models.yolo_lite import STRIDES, cells, decode
from edgekit.models.yolox_loss import overlaps

Levels = Sequence[tuple[Tensor, Tensor, Tensor]]
"""Raw (box [B,4,H,W], objectness [B,1,H,W], classes [B,C,H,W]) per level, as models.yolo_lite gives them."""

FOREGROUND = 0.1
"""Teacher's score above which a place counts as an object."""


# --- logits -----------------------------------------------------------------------------------------


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of softened logits [B, C, ...] (Hinton et al. 2015), mean over all but C."""
    p = functional.log_softmax(teacher / temperature, 1)
    q = functional.log_softmax(student / temperature, 1)
    return (p.exp() * (p - q)).sum(1).mean() * temperature**2


def dkd_terms(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(TCKD, NCKD, p) [B] each of logits [B, C] and targets int64 [B]: KL(teacher || student) = TCKD + (1 - p) NCKD.

    TCKD: KL of (target, all others); NCKD: KL among the others; p: the teacher's probability of the target.
    Zhao et al. 2022, "Decoupled Knowledge Distillation", section 3.
    """
    chosen = functional.one_hot(targets, student.shape[1]).bool()
    p, q = ((z / temperature).log_softmax(1) for z in (teacher, student))
    pt, qt = p[chosen], q[chosen]
    # log(1 - p) as the log-sum of the others: exact where the target has nearly everything
    others = [z.masked_fill(chosen, -torch.inf) for z in (p, q)]
    rest_p, rest_q = (z.logsumexp(1) for z in others)
    tckd = pt.exp() * (pt - qt) + rest_p.exp() * (rest_p - rest_q)
    inside_p, inside_q = (
        (z - r[:, None]).masked_fill(chosen, 0.0) for z, r in zip((p, q), (rest_p, rest_q), strict=True)
    )
    share = inside_p.exp().masked_fill(chosen, 0.0)
    return tckd, (share * (inside_p - inside_q)).sum(1), pt.exp()


def dkd(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD): what the teacher knows about the wrong classes counts however sure it is."""
    tckd, nckd, _ = dkd_terms(student, teacher, targets, temperature)
    return (alpha * tckd + beta * nckd).mean() * temperature**2


# --- features ---------------------------------------------------------------------------------------


def hint(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of features [B, C, ...] over the teacher's variance per channel (FitNets, Romero et al. 2015).

    1 = no better than the mean, so that its weight does not depend on the scale of a layer. mask [B, 1, ...] in 0..1:
    where it counts (Wang et al. 2019, "Fine-grained Feature Imitation": on and near objects); 0 for an empty mask.
    """
    rest = [d for d in range(teacher.ndim) if d != 1]
    scale = teacher.var(rest, keepdim=True, unbiased=False)
    error = (student - teacher) ** 2 / (scale + 1e-2 * scale.mean() + 1e-12)
    if mask is None:
        return error.mean()
    return (error * mask).sum() / (mask.sum() * teacher.shape[1]).clamp(min=1e-6)


def distances(features: Tensor) -> Tensor:
    """Distances between the rows of [B, F], over the mean of those above 0: [B, B], the diagonal 0."""
    square = ((features[:, None] - features[None]) ** 2).sum(2)
    found = square.clamp(min=1e-12).sqrt() * (1 - torch.eye(len(features), device=features.device))
    return found / found[found > 0].mean() if len(features) > 1 else found


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between normalised distances of rows [B, F] (Park et al. 2019); F may differ."""
    return functional.smooth_l1_loss(distances(student), distances(teacher))


def angles(features: Tensor) -> Tensor:
    """Cosine of the angle at row j between rows i and k: [B (j), B (i), B (k)]; 0 where two are the same row."""
    unit = functional.normalize(features[None] - features[:, None], dim=2)
    return unit @ unit.transpose(1, 2)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between cosines of all triplets of rows [B, F] (Park et al. 2019)."""
    return functional.smooth_l1_loss(angles(student), angles(teacher))


# --- detectors --------------------------------------------------------------------------------------


def _bce(student: Tensor, teacher: Tensor) -> Tensor:
    """KL between Bernoullis per element: student as logits, teacher as probabilities."""
    floor = functional.binary_cross_entropy(teacher, teacher, reduction="none")
    return functional.binary_cross_entropy_with_logits(student, teacher, reduction="none") - floor


@dataclass(frozen=True)
class YoloxImitation:
    """Imitation of raw YOLOX heads (models.yolo_lite), level by level, per foreground place of the teacher.

    objectness: everywhere, as KL; where the teacher is sure that nothing is there, the student has to be, too.
    classes: KL, only where the teacher's score (objectness times best class) is above `threshold`.
    box: GIoU to the teacher's box there, weighted by how good the teacher's box is, and teacher-bounded (Chen et al.
    2017, "Learning Efficient Object Detection Models"): not where the student's overlap with the truth is already
    better by `margin`. Without targets the weight is the teacher's score, unbounded.
    """

    threshold: float = FOREGROUND
    margin: float = 0.0
    box: float = 5.0
    objectness: float = 1.0
    classes: float = 1.0

    def __call__(self, student: Levels, teacher: Levels, targets: Any = None) -> Tensor:
        """targets: None, or (boxes [B, G, 4] x1 y1 x2 y2 in input pixels, classes [B, G], -1: none)."""
        raw, obj, cls = _rows(student)
        raw_t, obj_t, cls_t = (part.detach() for part in _rows(teacher))
        score = obj_t.sigmoid() * cls_t.sigmoid().amax(2)
        front = score > self.threshold
        count = front.sum().clamp(min=1)
        loss = self.objectness * _bce(obj, obj_t.sigmoid()).sum() / count
        loss = loss + self.classes * _bce(cls[front], cls_t[front].sigmoid()).sum() / count
        height, width = (n * STRIDES[0] for n in student[0][0].shape[2:])
        grid, stride = cells(height, width, raw.device)
        boxes, boxes_t = decode(raw, grid, stride), decode(raw_t, grid, stride)
        weight = score
        if targets is not None:
            weight = self._quality(boxes.detach(), boxes_t, *targets[:2])
        weight = weight * front
        giou = overlaps(boxes, boxes_t)[1]
        return loss + self.box * (weight * (1 - giou)).sum() / count

    def _quality(self, student: Tensor, teacher: Tensor, truth: Tensor, kinds: Tensor) -> Tensor:
        """[B, N]: overlap of the teacher's boxes with their truths, 0 where the student's is better by the margin."""
        there = (kinds >= 0)[:, None]
        if not truth.shape[1]:
            return torch.zeros_like(teacher[..., 0])
        best, which = (overlaps(teacher[:, :, None], truth[:, None])[0] * there).max(2)
        own = truth.gather(1, which[..., None].expand(-1, -1, 4))
        return torch.where(overlaps(student, own)[0] + self.margin > best, 0.0, best)

    def foreground(self, teacher: Levels) -> list[Tensor]:
        """The teacher's scores [B, 1, H, W] per level, 0 where not above the threshold: where features are imitated."""
        found = [obj.sigmoid() * cls.sigmoid().amax(1, keepdim=True) for _, obj, cls in teacher]
        return [score * (score > self.threshold) for score in found]


def _rows(levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """(box [B, N, 4], objectness [B, N], classes [B, N, C]) of all levels."""
    box, obj, cls = (torch.cat([level[k].flatten(2) for level in levels], 2).float() for k in range(3))
    return box.transpose(1, 2), obj[:, 0], cls.transpose(1, 2)


@dataclass(frozen=True)
class MapImitation:
    """Imitation of one output whose scores are already activated: FastestDet's maps, YOLOX's exported rows.

    scores: runs of channels [first, last) along `axis` that are probabilities; a place's score is the product of the
    best of each run. A run of one channel (objectness) is imitated everywhere, longer ones (classes) and all other
    channels (boxes, as squared error over the teacher's variance) where the teacher's score is above `threshold`.
    Probabilities by KL. FastestDet [B, 5 + C, H, W]: scores ((0, 1), (5, 5 + C)), axis 1. YOLOX rows [B, N, 5 + C]:
    ((4, 5), (5, 5 + C)), axis 2.
    """

    scores: tuple[tuple[int, int], ...]
    axis: int = 1
    threshold: float = FOREGROUND
    box: float = 1.0

    def __call__(self, student: Tensor, teacher: Tensor, targets: Any = None) -> Tensor:
        teacher = teacher.detach().movedim(self.axis, -1).float()
        student = student.movedim(self.axis, -1).float()
        front = self._score(teacher) > self.threshold
        count = front.sum().clamp(min=1)
        loss = student.sum() * 0.0
        boxes = torch.ones(teacher.shape[-1], dtype=torch.bool, device=teacher.device)
        for first, last in self.scores:
            boxes[first:last] = False
            s, t = student[..., first:last], teacher[..., first:last]
            if last - first > 1:
                s, t = s[front], t[front]
            floor = functional.binary_cross_entropy(t, t, reduction="sum")
            loss = loss + (functional.binary_cross_entropy(s, t, reduction="sum") - floor) / count
        if front.sum() < 2 or not boxes.any():
            return loss
        s, t = student[front][:, boxes], teacher[front][:, boxes]
        scale = t.var(0, unbiased=False)
        return loss + self.box * ((s - t) ** 2 / (scale + 1e-2 * scale.mean() + 1e-6)).mean()

    def _score(self, teacher: Tensor) -> Tensor:
        """[B, ...] of channels-last [B, ..., D]."""
        best = [teacher[..., first:last].amax(-1) for first, last in self.scores]
        return torch.stack(best).prod(0)

    def foreground(self, teacher: Tensor) -> list[Tensor]:
        """The teacher's scores [B, 1, H, W], 0 where not above the threshold; nothing where the output is no map."""
        if teacher.ndim != 4:
            return []
        score = self._score(teacher.movedim(self.axis, -1))[:, None]
        return [score * (score > self.threshold)]


imitation = YoloxImitation()
"""`Problem.imitate` of YOLO-lite: imitation(student levels, teacher levels, targets) -> scalar."""
