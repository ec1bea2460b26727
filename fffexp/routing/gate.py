"""Gates of mixtures of experts: noisy top-k, and Switch.

Shape suffixes: B samples, E experts, K experts chosen for a sample.
Sources: Shazeer et al., arXiv 1701.06538, section 2.1 and appendix A; Fedus et al., arXiv 2101.03961, section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fffexp.routing.blocks import balance, cv_squared

# Below this the noise is treated as this small, so that the load stays finite where there is none.
SMALLEST_NOISE = 1e-6


@dataclass(frozen=True)
class GateRouting:
    """What one training pass of a gate leaves behind for losses and metrics.

    Args:
        gates_BE: (batch, experts) gate values, zero where an expert was not chosen.
        load_E: (experts,) smooth estimate of how many samples each expert gets.
    """

    gates_BE: Tensor
    load_E: Tensor


@dataclass(frozen=True)
class SwitchRouting:
    """What one training pass of a Switch gate leaves behind for losses and metrics.

    Args:
        gates_BE: (batch, experts) softmax over all experts.
        expert_B: (batch,) the expert that was chosen.
    """

    gates_BE: Tensor
    expert_B: Tensor


def kth_excluding(logits_BE: Tensor, k: int) -> Tensor:
    """(B, E): for each expert, the k-th largest logit of its row leaving that expert out; k < E."""
    top = logits_BE.topk(k + 1, dim=1)
    chosen = torch.zeros_like(logits_BE, dtype=torch.bool).scatter(1, top.indices[:, :k], True)
    return torch.where(chosen, top.values[:, k:], top.values[:, k - 1 : k])


def chosen_probability(clean_BE: Tensor, noise_BE: Tensor, noisy_BE: Tensor, k: int) -> Tensor:
    """P(x, i): probability that expert i is among the top k if its own noise alone is drawn again.

    Args:
        clean_BE: (B, E) logits without noise.
        noise_BE: (B, E) standard deviation of the noise.
        noisy_BE: (B, E) logits with the noise that was drawn.
        k: experts per sample, less than E.
    """
    margin = clean_BE - kth_excluding(noisy_BE, k)
    return torch.special.ndtr(margin / noise_BE.clamp_min(SMALLEST_NOISE))


def importance(routing: GateRouting) -> Tensor:
    """CV^2 of the gate values summed over the batch."""
    return cv_squared(routing.gates_BE.sum(0))


def load(routing: GateRouting) -> Tensor:
    """CV^2 of the estimated number of samples per expert."""
    return cv_squared(routing.load_E)


def switch_balance(routing: SwitchRouting) -> Tensor:
    """Auxiliary loss of arXiv 2101.03961, section 2.2: 1 if uniform, experts if collapsed."""
    return balance(routing.gates_BE, routing.expert_B)


def gate_entropy(routing: GateRouting | SwitchRouting) -> Tensor:
    """Entropy in nats of the mean gate over the experts; log E if they are used alike."""
    return torch.special.entr(routing.gates_BE.mean(0)).sum()
