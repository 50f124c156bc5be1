"""Train the network on, as it is: what every method that damages it wants behind it.

lr is at its peak (None: a tenth of what suits from scratch), then falls along a cosine (Loshchilov & Hutter 2017).
ema > 0 keeps, beside the weights, their moving average, and ends with that (Polyak & Juditsky 1992): short trainings
end less noisy. clip: largest norm of a batch's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.compression.work import CLIP_NORM, Work


@dataclass(frozen=True)
class Options:
    """steps: batches."""

    steps: int = 500
    lr: float | None = None
    ema: float = 0.0
    clip: float = CLIP_NORM

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 10**7:
            raise ValueError(f"steps must be between 1 and 10000000, got {self.steps}")
        if self.lr is not None and not 0 < self.lr <= 10:
            raise ValueError(f"lr must be above 0 and at most 10, got {self.lr:g}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {self.ema:g}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip:g}")


def run(work: Work, options: Options) -> None:
    work.train(options.steps, lr=options.lr, ema=options.ema, clip=options.clip)
