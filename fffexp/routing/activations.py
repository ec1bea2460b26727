"""Which neurons of a dense layer are active. Shape suffixes: B samples, H neurons."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActivationRouting:
    """What one training pass of hidden activations leaves behind for losses and metrics."""

    l1_B: Tensor  # sum of their magnitudes
    active_B: Tensor  # how many are not zero

    @classmethod
    def of(cls, h_BH: Tensor) -> Self:
        """What these activations leave behind."""
        kind = torch.promote_types(h_BH.dtype, torch.float32)
        return cls(h_BH.abs().sum(1, dtype=kind), (h_BH != 0).sum(1))


def activation_l1(routing: ActivationRouting) -> Tensor:
    """L1 norm of the activations of a sample, mean over the batch.

    As in the code of arXiv 2603.23198; its equation 2 divides by the number of neurons too.
    """
    return routing.l1_B.sum() / max(len(routing.l1_B), 1)


def active_neurons(routing: ActivationRouting) -> Tensor:
    """Neurons of a sample that are not zero, mean over the batch."""
    return routing.active_B.to(routing.l1_B.dtype).mean()
