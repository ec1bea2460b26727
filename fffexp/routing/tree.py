"""Choices of a binary tree, and what is lost or gained by them.

Shape suffixes: B samples, N = 2^depth - 1 nodes (breadth first), L = 2^depth leaves (G in a routing, as of all blocks).
Source: Belcak and Wattenhofer, arXiv 2308.14711, section 3 (paper.md sections 1 and 7).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TreeRouting:
    """What one training pass of a tree leaves behind for losses and metrics."""

    logits_BN: Tensor  # their signs decide
    scale: Tensor  # () the sigmoids of the logits times it weigh the leaves
    weights_BG: Tensor  # soft mixture; each row sums to 1

    # the two below are computed where a loss or a metric asks for them: most steps need neither

    @property
    def entropy_BN(self) -> Tensor:
        """(batch, nodes) Bernoulli entropy of each choice, in nats."""
        return bernoulli_entropy(self.logits_BN * self.scale)

    @property
    def block_B(self) -> Tensor:
        """(batch,) leaf that hard decisions reach."""
        return descend(self.logits_BN.detach(), self.weights_BG.shape[1].bit_length() - 1)


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of choices with these logits; same shape, finite for any finite logit."""
    magnitude = logits.abs()  # symmetric, and in this form nothing cancels for large logits
    return F.softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)


def leaf_mixture(choices_BN: Tensor, depth: int) -> Tensor:
    """(B, N) probabilities of going right -> (B, L) product of the choices on each leaf's path."""
    weights = choices_BN.new_ones(choices_BN.shape[0], 1)
    for level in range(depth):
        right = choices_BN[:, 2**level - 1 : 2 ** (level + 1) - 1]
        weights = torch.stack((weights * (1 - right), weights * right), dim=2).flatten(1)
    return weights


def straight_through(choices: Tensor, logits: Tensor) -> Tensor:
    """Choices rounded to 0 or 1 (a logit of 0 goes right), with the gradient of the unrounded ones."""
    # in this order the forward value is exact: choices - choices.detach() is 0
    return (logits >= 0).to(choices.dtype) + (choices - choices.detach())


def descend(logits_BN: Tensor, depth: int) -> Tensor:
    """(B, N) node logits -> (B,) leaf reached by going right wherever the logit is >= 0."""
    position = torch.zeros(logits_BN.shape[0], 1, dtype=torch.long, device=logits_BN.device)
    for level in range(depth):
        logit = logits_BN.gather(1, position + (2**level - 1))
        position = 2 * position + (logit >= 0)
    return position.squeeze(1)


def hardening_mean(routing: TreeRouting) -> Tensor:
    """Entropy of the choices, mean over batch and nodes (0 where there are no nodes)."""
    return routing.entropy_BN.sum() / max(routing.logits_BN.numel(), 1)


def hardening_sum(routing: TreeRouting) -> Tensor:
    """Entropy of the choices, summed over batch and nodes, as printed in arXiv 2308.14711, section 3."""
    return routing.entropy_BN.sum()
