"""Statistics of batch norms after a change of the network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set running means and variances of every batch norm to the average over `batches` of inputs, in place.

    What remains of a network sees other activations than those its norms counted (Yu & Huang 2019, "Universally Slimmable
    Networks", §3.3; Once-for-All does the same for every sub-network). Without batches nothing changes. The mode of every
    module stays as it was; dropout and the like are off.
    """
    norms = [p for p in model.modules() if isinstance(p, _BatchNorm) and p.track_running_stats]
    modes = {part: part.training for part in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    try:
        for number, inputs in enumerate(batches):
            for norm in norms:
                if number == 0:
                    norm.reset_running_stats()
                    norm.momentum = None  # the plain average over batches
                norm.train()
            model(inputs)
    finally:
        for norm in norms:
            norm.momentum = momenta[norm]
        for part, before in modes.items():
            part.training = before
