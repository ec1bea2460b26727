"""Soft training on a CPU: products over the whole width, and between them one compiled pass.

Float32; shape suffixes as in eager.py, N nodes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fffexp.kernels.naive import Blocks


class _SoftTree(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, node_weight: Tensor, node_bias: Tensor, scale: Tensor, *leaves: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        w1, b1, w2, b2, ctx.activation, ctx.detached = leaves
        # one node more than there are: products with an odd number of columns are slow
        nodes = torch.cat((node_weight, node_weight.new_zeros(1, x.shape[1])))
        logits = torch.addmm(nn.functional.pad(node_bias, (0, 1)), x, nodes.T)
        z = torch.addmm(b1.flatten(), x, w1.flatten(0, 1).T)
        h, weights = torch.ops.fffexp.soft(z, logits, scale, ctx.activation)
        ctx.save_for_backward(x, scale, nodes, w1, w2, b2, z, logits, h, weights)
        ctx.set_materialize_grads(False)
        return (h @ w2.flatten(0, 1)).addmm_(weights, b2), logits[:, :-1], weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_BO: Tensor | None, more_logits: Tensor | None, more_weights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, scale, nodes, w1, w2, b2, z, logits, h, weights = ctx.saved_tensors
        grad_BO = x.new_zeros(len(x), w2.shape[2]) if grad_BO is None else grad_BO
        grad_h = grad_BO @ w2.flatten(0, 1).T
        grad_weights = grad_BO @ b2.T if more_weights is None else torch.addmm(more_weights, grad_BO, b2.T)
        grad_z, grad_logits = torch.ops.fffexp.soft_backward(
            grad_h, grad_weights, z, logits, scale, more_logits, ctx.activation
        )
        grad_x = grad_z @ w1.flatten(0, 1) if ctx.needs_input_grad[0] else None
        if grad_x is not None and not ctx.detached:
            grad_x.addmm_(grad_logits, nodes)
        grad_nodes = (grad_logits.T @ x)[:-1], grad_logits.sum(0)[:-1]
        grad_hidden = (grad_z.T @ x).view_as(w1), grad_z.sum(0).view(w1.shape[:2])
        grad_output = (h.T @ grad_BO).view_as(w2), weights.T @ grad_BO
        return grad_x, *grad_nodes, None, *grad_hidden, *grad_output, None, None


def soft_tree(
    x_BI: Tensor, node_weight: Tensor, node_bias: Tensor, scale: Tensor, blocks: Blocks, activation: str, detached: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, O) mixture of all leaves, (B, N) logits, (B, leaves) weights; `detached`: the logits give x no gradient."""
    return _SoftTree.apply(x_BI, node_weight, node_bias, scale, *blocks, activation, detached)
