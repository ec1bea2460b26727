"""Experts retrieved by product keys: the best pairs of two sets of sub-keys, and how evenly they are used.

Shape suffixes: B samples, H heads, M and N sub-keys of the two sets, K experts retrieved by a head, G = M * N experts.
Source: Lample et al., arXiv 1907.05242, section 3.1; He, arXiv 2407.04153, sections 2 and 3.3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RetrievalRouting:
    """What one training pass of a retrieval leaves behind for metrics."""

    score_G: Tensor  # router scores of each expert, summed over the batch and the heads


def product_top_k(first_BHM: Tensor, second_BHN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, H, K) best sums of a score of each set, and their experts m * N + n; of G sums, K * K at most are made."""
    first, second = (scores.topk(min(k, scores.shape[2]), dim=2) for scores in (first_BHM, second_BHN))
    sums = (first.values.unsqueeze(3) + second.values.unsqueeze(2)).flatten(2)
    best, width = sums.topk(k, dim=2), second.values.shape[2]
    m, n = first.indices.gather(2, best.indices // width), second.indices.gather(2, best.indices % width)
    return best.values, m * second_BHN.shape[2] + n


def unevenness(routing: RetrievalRouting) -> Tensor:
    """Kullback-Leibler divergence of the experts' shares of the scores from equal ones: 0 if uniform, log G if one."""
    score = routing.score_G
    share = score / score.sum().clamp_min(torch.finfo(score.dtype).tiny)
    return share.sum() * torch.log(torch.tensor(len(share), dtype=score.dtype)) - torch.special.entr(share).sum()
