"""Paths of trees whose nodes are the neurons, and how evenly the nodes split what reaches them.

A tree of D levels has 2^D - 1 neurons, breadth first; a sample evaluates one a level and goes right where its
pre-activation is >= 0. The last level's sign decides nothing, so a tree has 2^(D - 1) paths, one for each of its last
neurons. Shape suffixes: B samples, T trees, N neurons of a tree, D levels, K = T * D neurons of a sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fffexp.routing import tree


@dataclass(frozen=True)
class PathRouting:
    """What one training pass leaves behind for losses and metrics."""

    logits_BTD: Tensor  # pre-activations of the neurons on the paths
    path_BT: Tensor  # which path of each tree


def descend(logits_BTN: Tensor) -> Tensor:
    """Pre-activations of all neurons -> (B, T) path of each tree."""
    batch, trees, neurons = logits_BTN.shape
    return tree.descend(logits_BTN.flatten(0, 1), neurons.bit_length() - 1).view(batch, trees)


def path_neurons(path_BT: Tensor, depth: int) -> Tensor:
    """(B, K) neurons on the paths, numbered through over the trees."""
    trees, level_D = (torch.arange(n, device=path_BT.device) for n in (path_BT.shape[1], depth))
    neuron_BTD = (path_BT.unsqueeze(2) >> (depth - 1 - level_D)) + 2**level_D - 1
    return (neuron_BTD + (trees * (2**depth - 1)).unsqueeze(1)).flatten(1)


def node_balance(routing: PathRouting) -> Tensor:
    """How one-sided the decisions are: 1 if every node sends half of what reaches it each way, 2 if all one way.

    Twice the sum over both children of (share sent there x mean sigmoid towards it), mean over the nodes by the samples
    that reach them; 0 where nothing is decided. Source: the balance loss of Fedus et al., arXiv 2101.03961, equations
    4 to 6, for each node as a gate of two experts.
    """
    (batch, trees, depth), device = routing.logits_BTD.shape, routing.logits_BTD.device
    decided = routing.logits_BTD[..., :-1]
    shift_D = torch.arange(depth - 1, device=device).flip(0)
    right = (routing.path_BT.unsqueeze(2) >> shift_D & 1).to(decided.dtype).flatten()
    neuron = path_neurons(routing.path_BT, depth).view(batch, trees, depth)[..., :-1].flatten()
    zeros = decided.new_zeros(trees * (2**depth - 1))
    # not in place: torch.vmap has no place for several results in one tensor
    reached, went, towards = (
        zeros.index_add(0, neuron, each) for each in (torch.ones_like(right), right, torch.sigmoid(decided).flatten())
    )
    one_sided = (went * towards + (reached - went) * (reached - towards)) / reached.clamp_min(1)
    return 2 * one_sided.sum() / max(right.numel(), 1)
