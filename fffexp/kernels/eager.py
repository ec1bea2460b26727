"""The backend in plain torch operators: any device, any dtype, differentiable.

Shape suffixes: B samples, R rows (samples or copies of them), G blocks, C samples of a block, H hidden
neurons, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fffexp.kernels.grouped import grouped_mm
from fffexp.kernels.naive import Activation, Blocks
from fffexp.routing.blocks import block_counts
from fffexp.routing.tree import descend

# Levels that are decided by one product with all their nodes; below them a gather per level is cheaper.
SHALLOW_LEVELS = 7


def mixture(x_BI: Tensor, weights_BG: Tensor, blocks: Blocks, hidden: Activation) -> Tensor:
    """(B, O): all blocks for all samples, weighted, as two products over the whole width."""
    w1, b1, w2, b2 = blocks
    h = hidden(F.linear(x_BI, w1.flatten(0, 1), b1.flatten()))
    weights = weights_BG.to(h.dtype)
    h = (h.unflatten(1, b1.shape) * weights.unsqueeze(2)).flatten(1)
    return h @ w2.flatten(0, 1) + weights @ b2.to(h.dtype)


def route(x_BI: Tensor, node_weight: Tensor, node_bias: Tensor, depth: int) -> Tensor:
    """(B,) leaf reached by hard decisions, level by level."""
    shallow = min(depth, SHALLOW_LEVELS)
    leaf = descend(F.linear(x_BI, node_weight[: 2**shallow - 1], node_bias[: 2**shallow - 1]), shallow)
    for level in range(shallow, depth):
        node = leaf + (2**level - 1)
        logit = torch.bmm(node_weight[node].unsqueeze(1), x_BI.unsqueeze(2)).flatten() + node_bias[node]
        leaf = 2 * leaf + (logit >= 0)
    return leaf


def selected(x_BI: Tensor, block_BK: Tensor, weights_BK: Tensor | None, blocks: Blocks, hidden: Activation) -> Tensor:
    """(B, O): for each sample only its K blocks, summed by weight; rows sorted by block, grouped products."""
    if torch.is_autocast_enabled(device := x_BI.device.type):  # grouped_mm is not on its list of products
        blocks = Blocks(*(p.to(torch.get_autocast_dtype(device)) for p in blocks))
    w1, b1, w2, b2 = blocks
    batch, k = block_BK.shape
    block_R, order_R = block_BK.flatten().sort(stable=True)
    sample_R = order_R // k
    ends_G = block_counts(block_R, len(w1)).cumsum(0)
    h = hidden(grouped_mm(x_BI[sample_R].to(w1.dtype), w1.transpose(1, 2), ends_G) + b1[block_R])
    y_RO = grouped_mm(h, w2, ends_G) + b2[block_R]
    if weights_BK is not None:
        y_RO = y_RO * weights_BK.flatten()[order_R].to(y_RO.dtype).unsqueeze(1)
    return torch.zeros(batch, w2.shape[2], dtype=y_RO.dtype, device=y_RO.device).index_add(0, sample_R, y_RO)


def chosen_samples(x_BI: Tensor, sample_GC: Tensor, weights_GC: Tensor, blocks: Blocks, hidden: Activation) -> Tensor:
    """(B, O): each block evaluates its C samples; a sample gets the sum of what chose it, by weight."""
    w1, b1, w2, b2 = blocks
    h_GCH = hidden(torch.baddbmm(b1.unsqueeze(1), x_BI[sample_GC], w1.mT))
    y_GCO = torch.baddbmm(b2.unsqueeze(1), h_GCH, w2)
    y_GCO = y_GCO * weights_GC.to(y_GCO.dtype).unsqueeze(2)
    zeros = torch.zeros(len(x_BI), w2.shape[2], dtype=y_GCO.dtype, device=y_GCO.device)
    return zeros.index_add(0, sample_GC.flatten(), y_GCO.flatten(0, 1))
