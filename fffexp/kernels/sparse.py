"""Training of the chosen blocks alone: gradients that hold rows for the blocks in use and nothing for the others.

Shape suffixes as in eager.py; U blocks in use.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fffexp.kernels.eager import Hidden
from fffexp.kernels.grouped import grouped_mm, grouped_outer
from fffexp.kernels.naive import Blocks


def _rows(index_U: Tensor, values: Tensor, rows: int) -> Tensor:
    """A gradient of so many rows that holds these."""
    shape = (rows, *values.shape[1:])
    return torch.sparse_coo_tensor(index_U.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False)


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block_B: Tensor, hidden: Hidden, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        block_R, order_R = block_B.sort(stable=True)
        used_U, place_R, count_U = torch.unique_consecutive(block_R, return_inverse=True, return_counts=True)
        ends_G = torch.zeros(len(w1), dtype=torch.long, device=x.device).index_copy_(0, used_U, count_U).cumsum(0)
        x_RI = x[order_R]
        z_RH = grouped_mm(x_RI, w1.mT, ends_G) + b1[block_R]
        with torch.enable_grad():  # of the activation and dropout, whatever they are
            ctx.z = z_RH.requires_grad_()
            ctx.h = hidden(ctx.z)
        h_RH = ctx.h.detach()
        ctx.save_for_backward(x_RI, h_RH, w1, w2, order_R, used_U, place_R, count_U, ends_G)
        y_RO = grouped_mm(h_RH, w2, ends_G) + b2[block_R]
        return torch.empty_like(y_RO).index_copy_(0, order_R, y_RO)

    @staticmethod
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, h_RH, w1, w2, order_R, used_U, place_R, count_U, ends_G = ctx.saved_tensors
        ends_U, groups = count_U.cumsum(0), len(w1)

        def rows(values: Tensor) -> Tensor:
            return _rows(used_U, values, groups)

        def summed(values_R: Tensor) -> Tensor:
            total = values_R.new_zeros(len(used_U), values_R.shape[1])
            return total.index_add_(0, place_R, values_R)

        grad_RO = grad_BO[order_R]
        (grad_z,) = torch.autograd.grad(ctx.h, ctx.z, grouped_mm(grad_RO, w2.mT, ends_G))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_RI).index_copy_(0, order_R, grouped_mm(grad_z, w1, ends_G))
        hidden = rows(grouped_outer(grad_z, x_RI, ends_U)), rows(summed(grad_z))
        output = rows(grouped_outer(h_RH, grad_RO, ends_U)), rows(summed(grad_RO))
        return grad_x, None, None, *hidden, *output


def selected(x_BI: Tensor, block_B: Tensor, blocks: Blocks, hidden: Hidden) -> Tensor:
    """(B, O): for each sample its one block; the gradients of the blocks are sparse (torch.sparse_coo)."""
    output: Tensor = _Selected.apply(x_BI, block_B, hidden, *blocks)
    return output


class _PathLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, node_BD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x_BI, node_BD, weight)
        return torch.bmm(weight[node_BD], x_BI.unsqueeze(2)).squeeze(2) + bias[node_BD]

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, node_BD, weight = ctx.saved_tensors
        (batch, depth), nodes = node_BD.shape, len(weight)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(grad_BD.unsqueeze(1), weight[node_BD]).squeeze(1)
        used_U, place = node_BD.flatten().unique(return_inverse=True)
        sample = torch.arange(batch, device=x_BI.device).repeat_interleave(depth)
        shape = (len(used_U), batch)
        of_UB = torch.sparse_coo_tensor(torch.stack((place, sample)), grad_BD.flatten(), shape, check_invariants=False)
        grad_bias = grad_BD.new_zeros(len(used_U)).index_add_(0, place, grad_BD.flatten())
        return grad_x, None, _rows(used_U, of_UB @ x_BI, nodes), _rows(used_U, grad_bias, nodes)


def path_log_probability(
    x_BI: Tensor, leaf_B: Tensor, depth: int, node_weight: Tensor, node_bias: Tensor, scale: Tensor
) -> Tensor:
    """(B,) log of the product of the choices on each sample's path; the gradients of the nodes are sparse."""
    levels = torch.arange(depth, device=x_BI.device)
    node_BD = (leaf_B.unsqueeze(1) >> (depth - levels)) + 2**levels - 1
    right_BD = leaf_B.unsqueeze(1) >> (depth - 1 - levels) & 1
    logits_BD: Tensor = _PathLogits.apply(x_BI, node_BD, node_weight, node_bias)
    return F.logsigmoid(logits_BD * scale * (2 * right_BD - 1)).sum(1)
