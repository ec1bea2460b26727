"""How a batch spreads over leaves or experts.

Shape suffixes: B samples, G blocks (leaves or experts).
"""

import torch
from torch import Tensor


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation with the population variance: 0 if uniform, n - 1 if one-hot."""
    mean = values.mean()
    # an empty batch has no importance to vary
    return values.var(correction=0) / mean.square().clamp_min(torch.finfo(values.dtype).tiny)


def block_counts(block: Tensor, blocks: int) -> Tensor:
    """Rows per leaf or expert, (blocks,) long; unlike bincount its shape does not depend on the data."""
    flat = block.flatten()
    # not in place: torch.vmap has no place for several results in one tensor
    return torch.zeros(blocks, dtype=torch.long, device=block.device).index_add(0, flat, torch.ones_like(flat))


def balance(weights_BG: Tensor, block_B: Tensor) -> Tensor:
    """Blocks times sum of (share of the samples sent there x mean soft weight): 1 if uniform, blocks if collapsed.

    Source: Fedus et al., arXiv 2101.03961, equations 4 to 6; for trees arXiv 2405.16836.
    """
    batch, blocks = weights_BG.shape
    counts = block_counts(block_B, blocks)
    return blocks * (counts / max(batch, 1) * weights_BG.sum(0) / max(batch, 1)).sum()
