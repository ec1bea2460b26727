"""Gates of mixtures of experts: noisy top-k, and Switch.

Shape suffixes: B samples, E experts (G in a routing, as of all blocks), K experts chosen for a sample.
Sources: Shazeer et al., arXiv 1701.06538, section 2.1 and appendix A; Fedus et al., arXiv 2101.03961, section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GateRouting:
    """What one training pass of a noisy gate leaves behind for losses and metrics."""

    weights_BG: Tensor  # gate values, zero where an expert was not chosen
    load_G: Tensor  # smooth estimate of how many samples each expert gets


@dataclass(frozen=True)
class SwitchRouting:
    """What one training pass of a Switch gate leaves behind for losses and metrics."""

    weights_BG: Tensor  # softmax over all experts
    block_B: Tensor  # the expert that was chosen


def kth_excluding(logits_BE: Tensor, k: int) -> Tensor:
    """(B, E): for each expert, the k-th largest logit of its row leaving that expert out; k < E."""
    top = logits_BE.topk(k + 1, dim=1)
    chosen = torch.zeros_like(logits_BE, dtype=torch.bool).scatter(1, top.indices[:, :k], True)
    return torch.where(chosen, top.values[:, k:], top.values[:, k - 1 : k])


def chosen_probability(clean_BE: Tensor, noise_BE: Tensor, noisy_BE: Tensor, k: int) -> Tensor:
    """P(x, i): probability that expert i is among the top k < E if its own noise alone is drawn again.

    Takes the logits without noise, the standard deviation of the noise, and the logits with the noise that was drawn.
    """
    # of no noise at all the load would not be finite
    return torch.special.ndtr((clean_BE - kth_excluding(noisy_BE, k)) / noise_BE.clamp_min(1e-6))
