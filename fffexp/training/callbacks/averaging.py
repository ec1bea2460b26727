"""An average of the weights over the last steps."""

from collections.abc import Sequence

import torch
from lightning.pytorch import callbacks
from torch import Tensor


class WeightAveraging(callbacks.WeightAveraging):
    """Exponential moving average of the weights, which is validated, kept and tested.

    In step t the average keeps a share min(decay, (1 + t) / (10 + t)) of itself, so that in a short training it does
    not reach back to the first weights. ValueError for a decay below 0 or not below 1.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be at least 0 and below 1")
        # buffers are counters and schedules, not weights
        super().__init__(use_buffers=False, multi_avg_fn=self._update)
        self.decay = decay

    def share(self, step: float) -> float:  # of the weights of a step, from 1, in the average
        return max(1 - self.decay, 9 / (10 + step))

    @torch.no_grad()
    def _update(self, averages: Sequence[Tensor], weights: Sequence[Tensor], steps: Tensor | int) -> None:
        torch._foreach_lerp_(list(averages), list(weights), self.share(float(steps)))
