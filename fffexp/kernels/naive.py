"""The ground truth: one sample, one node, one leaf at a time. Every backend is compared with it.

Blocks (leaves or experts) are given as hidden_weight (G, width, in), hidden_bias (G, width),
output_weight (G, width, out), output_bias (G, out); autograd works through all of it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


class Blocks(NamedTuple):
    """Parameters of G two-layer networks."""

    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor


def block(x: Tensor, index: int, blocks: Blocks, activation: Activation) -> Tensor:
    """(in,) -> (out,): output of one leaf or expert for one sample."""
    hidden = activation(blocks.hidden_weight[index] @ x + blocks.hidden_bias[index])
    return hidden @ blocks.output_weight[index] + blocks.output_bias[index]


def fff_soft(x_BI: Tensor, logits_BN: Tensor, depth: int, blocks: Blocks, activation: Activation) -> Tensor:
    """(B, in) -> (B, out): all leaves, each weighted by the product of the choices on its path."""
    rows = []
    for x, logits in zip(x_BI, logits_BN, strict=True):
        output = x.new_zeros(blocks.output_bias.shape[1])
        for leaf in range(2**depth):
            weight, node = x.new_ones(()), 0
            for level in reversed(range(depth)):
                right = leaf >> level & 1
                choice = torch.sigmoid(logits[node])
                weight = weight * (choice if right else 1 - choice)
                node = 2 * node + 1 + right
            output = output + weight * block(x, leaf, blocks, activation)
        rows.append(output)
    return torch.stack(rows) if rows else x_BI.new_zeros(0, blocks.output_bias.shape[1])


def fff_leaf(x: Tensor, node_weight: Tensor, node_bias: Tensor, depth: int) -> int:
    """(in,) -> the leaf that hard decisions reach; a logit of 0 goes right."""
    node = 0
    for _ in range(depth):
        node = 2 * node + 1 + int(node_weight[node] @ x + node_bias[node] >= 0)
    return node - (2**depth - 1)


def fff_hard(
    x_BI: Tensor, node_weight: Tensor, node_bias: Tensor, depth: int, blocks: Blocks, activation: Activation
) -> Tensor:
    """(B, in) -> (B, out): one leaf per sample."""
    rows = [block(x, fff_leaf(x, node_weight, node_bias, depth), blocks, activation) for x in x_BI]
    return torch.stack(rows) if rows else x_BI.new_zeros(0, blocks.output_bias.shape[1])


def moe(x_BI: Tensor, logits_BE: Tensor, k: int, blocks: Blocks, activation: Activation) -> Tensor:
    """(B, in) -> (B, out): the k experts of the largest logits, weighted by the softmax over those."""
    rows = []
    for x, logits in zip(x_BI, logits_BE, strict=True):
        chosen = sorted(range(len(logits)), key=lambda i: -float(logits[i].detach()))[:k]
        gates = torch.softmax(logits[chosen], dim=0)
        rows.append(weighted(x, chosen, gates, blocks, activation))
    return torch.stack(rows) if rows else x_BI.new_zeros(0, blocks.output_bias.shape[1])


def switch(x_BI: Tensor, logits_BE: Tensor, blocks: Blocks, activation: Activation) -> Tensor:
    """(B, in) -> (B, out): the expert of the largest logit, weighted by its softmax over all."""
    rows = []
    for x, logits in zip(x_BI, logits_BE, strict=True):
        chosen = max(range(len(logits)), key=lambda i: float(logits[i].detach()))
        rows.append(torch.softmax(logits, dim=0)[chosen] * block(x, chosen, blocks, activation))
    return torch.stack(rows) if rows else x_BI.new_zeros(0, blocks.output_bias.shape[1])


def weighted(x: Tensor, chosen: Iterable[int], weights: Tensor, blocks: Blocks, activation: Activation) -> Tensor:
    """(in,) -> (out,): some blocks for one sample, summed by weight."""
    return torch.stack([w * block(x, i, blocks, activation) for w, i in zip(weights, chosen, strict=True)]).sum(0)
