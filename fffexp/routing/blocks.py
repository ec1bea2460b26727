"""Gates of mixtures of experts, noisy top-k and Switch, and how a batch spreads over leaves or experts.

Shape suffixes: B samples, G blocks (leaves or experts), E experts, K experts chosen for a sample.
Sources: Shazeer et al., arXiv 1701.06538, section 2.1 and appendix A; Fedus et al., arXiv 2101.03961, section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fffexp.routing.tree import TreeRouting


@dataclass(frozen=True)
class GateRouting:
    """What one training pass of a top-k gate leaves behind for losses and metrics."""

    weights_BG: Tensor  # gate values, zero where an expert was not chosen
    load_G: Tensor  # how many samples each expert gets, or a smooth estimate


@dataclass(frozen=True)
class SwitchRouting:
    """What one training pass of a Switch gate leaves behind for losses and metrics."""

    weights_BG: Tensor  # softmax over all experts
    block_B: Tensor  # the expert that was chosen


@dataclass(frozen=True)
class ExpertChoiceRouting:
    """What one training pass of expert choice leaves behind for metrics."""

    weights_BG: Tensor  # softmax over all experts
    taken_B: Tensor  # experts that chose the sample


def kth_excluding(logits_BE: Tensor, k: int) -> Tensor:
    """(B, E): for each expert, the k-th largest logit of its row leaving that expert out; k < E."""
    top = logits_BE.topk(k + 1, dim=1)
    chosen = torch.zeros_like(logits_BE, dtype=torch.bool).scatter(1, top.indices[:, :k], True)
    return torch.where(chosen, top.values[:, k:], top.values[:, k - 1 : k])


def chosen_probability(clean_BE: Tensor, noise_BE: Tensor, noisy_BE: Tensor, k: int) -> Tensor:
    """P(x, i): probability that expert i is among the top k of E if its own noise alone is drawn again.

    Takes the logits without noise, the standard deviation of the noise, and the logits with the noise that was drawn.
    """
    if k == clean_BE.shape[1]:
        return torch.ones_like(clean_BE)
    # of no noise at all the load would not be finite
    return torch.special.ndtr((clean_BE - kth_excluding(noisy_BE, k)) / noise_BE.clamp_min(1e-6))


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation with the population variance: 0 if uniform, n - 1 if one-hot."""
    # an empty batch has no importance to vary
    return values.var(correction=0) / values.mean().square().clamp_min(torch.finfo(values.dtype).tiny)


def block_counts(block: Tensor, blocks: int) -> Tensor:
    """Rows per leaf or expert, (blocks,) long; unlike bincount its shape does not depend on the data."""
    flat = block.flatten()
    # not in place: torch.vmap has no place for several results in one tensor
    return torch.zeros(blocks, dtype=torch.long, device=block.device).index_add(0, flat, torch.ones_like(flat))


def importance(routing: GateRouting | TreeRouting) -> Tensor:
    """CV^2 of the weights of the blocks summed over the batch: 0 if uniform, blocks - 1 if collapsed."""
    return cv_squared(routing.weights_BG.sum(0))


def max_violation(routing: GateRouting) -> Tensor:
    """How far the largest load is above the mean, as a share of that: 0 if even (arXiv 2408.15664, equation 4)."""
    mean = routing.load_G.mean()
    return (routing.load_G.max() - mean) / mean.clamp_min(torch.finfo(mean.dtype).tiny)


def load(routing: GateRouting) -> Tensor:
    """CV^2 of the estimated number of samples per expert."""
    return cv_squared(routing.load_G)


def balance(routing: SwitchRouting | TreeRouting) -> Tensor:
    """Blocks times sum of (share of the samples sent there x mean soft weight): 1 if uniform, blocks if collapsed.

    Source: Fedus et al., arXiv 2101.03961, equations 4 to 6; for trees arXiv 2405.16836.
    """
    batch, blocks = routing.weights_BG.shape
    batch = max(batch, 1)
    return blocks * (block_counts(routing.block_B, blocks) / batch * routing.weights_BG.sum(0) / batch).sum()


def dropped_samples(routing: ExpertChoiceRouting) -> Tensor:
    """Share of the samples that no expert chose."""
    return (routing.taken_B == 0).to(routing.weights_BG.dtype).mean()


def gate_entropy(routing: GateRouting | SwitchRouting | ExpertChoiceRouting) -> Tensor:
    """Entropy in nats of the mean gate over the experts; log of their number if they are used alike."""
    return torch.special.entr(routing.weights_BG.mean(0)).sum()
