"""How a batch spreads over leaves or experts.

Shape suffixes: B samples, G blocks (leaves or experts).
"""

import torch
from torch import Tensor

from fffexp.routing.gate import GateRouting, SwitchRouting
from fffexp.routing.tree import TreeRouting


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


def gate_entropy(routing: GateRouting | SwitchRouting) -> Tensor:
    """Entropy in nats of the mean gate over the experts; log of their number if they are used alike."""
    return torch.special.entr(routing.weights_BG.mean(0)).sum()
