"""The ground truth: one sample, one node, one leaf at a time. Every backend is compared with it.

Blocks (leaves or experts) are given as hidden_weight (G, width, in), hidden_bias (G, width),
output_weight (G, width, out), output_bias (G, out); they are cast to the dtype of x. Autograd works through all of it.
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


class Trees(NamedTuple):
    """Parameters of T trees whose N = 2^depth - 1 nodes are the neurons; their outputs are summed."""

    node_weight: Tensor  # (T, N, in), breadth first
    node_bias: Tensor  # (T, N)
    output_weight: Tensor  # (T, N, out)
    output_bias: Tensor  # (out)


def block(x: Tensor, index: int, blocks: Blocks, activation: Activation) -> Tensor:
    """(in,) -> (out,): output of one leaf or expert for one sample."""
    w1, b1, w2, b2 = (tensor[index].to(x.dtype) for tensor in blocks)
    return activation(w1 @ x + b1) @ w2 + b2


def selected(
    x_BI: Tensor, block_BK: Iterable[Iterable[int]], weights_BK: Tensor, blocks: Blocks, activation: Activation
) -> Tensor:
    """(B, in) -> (B, out): for each sample its K blocks, summed by weight."""
    rows = [
        torch.stack([w * block(x, i, blocks, activation) for i, w in zip(chosen, weights, strict=True)]).sum(0)
        for x, chosen, weights in zip(x_BI, block_BK, weights_BK, strict=True)
    ]
    return torch.stack(rows) if rows else x_BI.new_zeros(0, blocks.output_bias.shape[1])


def fff_soft(x_BI: Tensor, logits_BN: Tensor, depth: int, blocks: Blocks, activation: Activation) -> Tensor:
    """(B, in) -> (B, out): all leaves, each weighted by the product of the choices on its path."""
    weights = []
    for leaf in range(2**depth):
        weight_B, node = x_BI.new_ones(len(x_BI)), 0
        for level in reversed(range(depth)):
            right = leaf >> level & 1
            choice_B = torch.sigmoid(logits_BN[:, node])
            weight_B = weight_B * (choice_B if right else 1 - choice_B)
            node = 2 * node + 1 + right
        weights.append(weight_B)
    blocks = Blocks(*(tensor.to(x_BI.dtype) for tensor in blocks))  # once, and gradients of all rows add up in it
    return selected(x_BI, [range(2**depth)] * len(x_BI), torch.stack(weights, 1), blocks, activation)


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
    leaves = [[fff_leaf(x, node_weight, node_bias, depth)] for x in x_BI]
    return selected(x_BI, leaves, x_BI.new_ones(len(x_BI), 1), blocks, activation)


def moe(x_BI: Tensor, logits_BE: Tensor, k: int, blocks: Blocks, activation: Activation) -> Tensor:
    """(B, in) -> (B, out): the k experts of the largest logits, weighted by the softmax over those."""
    values, chosen = logits_BE.sort(dim=1, descending=True, stable=True)
    return selected(x_BI, chosen[:, :k].tolist(), torch.softmax(values[:, :k], dim=1), blocks, activation)


def peer(
    x_BI: Tensor,
    query_BHQ: Tensor,
    keys: tuple[Tensor, Tensor],
    k: int,
    hidden_weight: Tensor,
    output_weight: Tensor,
    activation: Activation,
) -> Tensor:
    """(B, in) -> (B, out): for each head the k neurons of the best keys, of all pairs, weighted by their softmax."""
    pairs = torch.stack([torch.cat((first, second)) for first in keys[0] for second in keys[1]])
    rows = []
    for x, heads in zip(x_BI, query_BHQ, strict=True):
        row = x.new_zeros(output_weight.shape[1])
        for query in heads:
            scores = pairs @ query
            chosen = scores.argsort(descending=True, stable=True)[:k].tolist()
            for weight, neuron in zip(torch.softmax(scores[chosen], dim=0), chosen, strict=True):
                row = row + weight * activation((hidden_weight[neuron] @ x).unsqueeze(0)) * output_weight[neuron]
        rows.append(row)
    return torch.stack(rows) if rows else x_BI.new_zeros(0, output_weight.shape[1])


def sigmoid_moe(
    x_BI: Tensor, logits_BE: Tensor, bias_E: Tensor, k: int, blocks: Blocks, activation: Activation
) -> Tensor:
    """(B, in) -> (B, out): the k experts of the largest sigmoid plus bias, weighted by sigmoids that sum to 1."""
    scores = torch.sigmoid(logits_BE)
    chosen = (scores + bias_E).argsort(dim=1, descending=True, stable=True)[:, :k]
    weights = scores.gather(1, chosen)
    return selected(x_BI, chosen.tolist(), weights / weights.sum(1, keepdim=True), blocks, activation)


def expert_choice(x_BI: Tensor, logits_BE: Tensor, cutoff_E: Tensor, blocks: Blocks, activation: Activation) -> Tensor:
    """(B, in) -> (B, out): the experts whose softmax over all reaches their cutoff, weighted by it."""
    weights = torch.softmax(logits_BE, dim=1)
    weights = torch.where(weights >= cutoff_E, weights, 0)
    return selected(x_BI, [range(len(cutoff_E))] * len(x_BI), weights, blocks, activation)


def switch(x_BI: Tensor, logits_BE: Tensor, blocks: Blocks, activation: Activation, k: int = 1) -> Tensor:
    """(B, in) -> (B, out): the k experts of the largest logits, weighted by their softmax over all."""
    chosen = logits_BE.argsort(dim=1, descending=True, stable=True)[:, :k]
    return selected(x_BI, chosen.tolist(), torch.softmax(logits_BE, dim=1).gather(1, chosen), blocks, activation)


def tree_path(x: Tensor, node_weight: Tensor, node_bias: Tensor) -> list[tuple[int, Tensor]]:
    """(in,) -> each neuron from the root down and its pre-activation; one of 0 goes right."""
    node, found = 0, []
    while node < len(node_weight):
        logit = node_weight[node] @ x + node_bias[node]
        found.append((node, logit))
        node = 2 * node + 1 + int(logit >= 0)
    return found


def tree_ff(x_BI: Tensor, trees: Trees, activation: Activation) -> Tensor:
    """(B, in) -> (B, out): the neurons on the path of each tree, activation times output weight."""
    trees = Trees(*(tensor.to(x_BI.dtype) for tensor in trees))
    rows = []
    for x in x_BI:
        row = trees.output_bias
        for node_weight, node_bias, output_weight in zip(*trees[:3], strict=True):
            for node, logit in tree_path(x, node_weight, node_bias):
                row = row + activation(logit.unsqueeze(0)) * output_weight[node]
        rows.append(row)
    return torch.stack(rows) if rows else x_BI.new_zeros(0, len(trees.output_bias))
