"""Training of the chosen blocks, with gradients of their rows alone. Shape suffixes as in eager.py; U blocks in use."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fffexp.kernels.grouped import grouped_mm, grouped_outer
from fffexp.kernels.naive import Activation, Blocks


def _gradient(index_U: Tensor, values: Tensor, rows: int) -> Tensor:
    shape = (rows, *values.shape[1:])
    return torch.sparse_coo_tensor(index_U.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False)


class _Product(torch.autograd.Function):
    # rows sorted by block, each times its block's matrix, (G, O, I) or (G, I, O), plus its bias (G, O)
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, block_R: Tensor, weight: Tensor, bias: Tensor, inputs_last: bool) -> Tensor:
        used_U, place_R, count_U = torch.unique_consecutive(block_R, return_inverse=True, return_counts=True)
        ends_G = count_U.new_zeros(len(weight)).index_copy_(0, used_U, count_U).cumsum(0)
        ctx.save_for_backward(x_RI, weight, used_U, place_R, count_U, ends_G)
        ctx.inputs_last = inputs_last
        return grouped_mm(x_RI, weight.mT if inputs_last else weight, ends_G) + bias[block_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, weight, used_U, place_R, count_U, ends_G = ctx.saved_tensors
        transposed, *sides = (weight, grad_RO, x_RI) if ctx.inputs_last else (weight.mT, x_RI, grad_RO)
        grad_x = grouped_mm(grad_RO, transposed, ends_G) if ctx.needs_input_grad[0] else None
        grad_weight = _gradient(used_U, grouped_outer(*sides, count_U.cumsum(0)), len(weight))
        summed = grad_RO.new_zeros(len(used_U), grad_RO.shape[1]).index_add_(0, place_R, grad_RO)
        return grad_x, None, grad_weight, _gradient(used_U, summed, len(weight)), None


def selected(x_BI: Tensor, block_B: Tensor, blocks: Blocks, hidden: Activation) -> Tensor:
    """(B, O): for each sample its one block; the gradients of the blocks are sparse (torch.sparse_coo)."""
    w1, b1, w2, b2 = blocks
    block_R, order_R = block_B.sort(stable=True)
    h_RH = hidden(_Product.apply(x_BI[order_R], block_R, w1, b1, True))
    y_RO = _Product.apply(h_RH, block_R, w2, b2, False)
    return torch.zeros_like(y_RO).index_copy(0, order_R, y_RO)


class _PathLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, node_BD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x_BI, node_BD, weight)
        return torch.bmm(weight[node_BD], x_BI.unsqueeze(2)).squeeze(2) + bias[node_BD]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, node_BD, weight = ctx.saved_tensors
        (batch, depth), nodes = node_BD.shape, len(weight)
        grad_x = torch.bmm(grad_BD.unsqueeze(1), weight[node_BD]).squeeze(1) if ctx.needs_input_grad[0] else None
        used_U, place = node_BD.flatten().unique(return_inverse=True)
        sample = torch.arange(batch, device=x_BI.device).repeat_interleave(depth)
        shape = (len(used_U), batch)
        of_UB = torch.sparse_coo_tensor(torch.stack((place, sample)), grad_BD.flatten(), shape, check_invariants=False)
        grad_bias = grad_BD.new_zeros(len(used_U)).index_add_(0, place, grad_BD.flatten())
        return grad_x, None, _gradient(used_U, of_UB @ x_BI, nodes), _gradient(used_U, grad_bias, nodes)


def path_log_probability(
    x_BI: Tensor, leaf_B: Tensor, depth: int, node_weight: Tensor, node_bias: Tensor, scale: Tensor
) -> Tensor:
    """(B,) log of the product of the choices on each sample's path; the gradients of the nodes are sparse."""
    levels = torch.arange(depth, device=x_BI.device)
    node_BD = (leaf_B.unsqueeze(1) >> (depth - levels)) + 2**levels - 1
    right_BD = leaf_B.unsqueeze(1) >> (depth - 1 - levels) & 1
    with torch.autocast(x_BI.device.type, enabled=False):  # decisions are not made in a lower precision
        logits_BD: Tensor = _PathLogits.apply(x_BI, node_BD, node_weight, node_bias)
    return F.logsigmoid(logits_BD * scale * (2 * right_BD - 1)).sum(1)
