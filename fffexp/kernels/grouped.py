"""Products of row groups, each with its own matrix, as one operator.

torch's own grouped_mm refuses float64, unaligned strides and, under torch.compile, float32 on a CPU; this
operator takes them all. Shape suffixes: R rows sorted by group, G groups, K summed over, N outputs.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("fffexp::grouped_mm", mutates_args=())
def grouped_mm(x_RK: Tensor, weight_GKN: Tensor, ends_G: Tensor) -> Tensor:
    """(R, N): the rows of group g, which end before row ends_G[g], times weight_GKN[g]."""
    used = _used(ends_G)
    if x_RK.dtype == torch.float64 or len(used) < len(ends_G):
        # torch's grouped_mm visits empty groups too, which in a deep tree are nearly all
        out = x_RK.new_empty(x_RK.shape[0], weight_GKN.shape[2])
        for group, start, end in used:
            torch.mm(x_RK[start:end], weight_GKN[group], out=out[start:end])
        return out
    # torch's grouped_mm wants strides that are multiples of 16 bytes
    pad_k, pad_n = (-size % (16 // x_RK.element_size()) for size in weight_GKN.shape[1:])
    if pad_k or pad_n:
        x_RK, weight_GKN = F.pad(x_RK, (0, pad_k)), F.pad(weight_GKN, (0, pad_n, 0, pad_k))
    product = F.grouped_mm(x_RK.contiguous(), weight_GKN, offs=ends_G.to(torch.int32))
    return product[:, : product.shape[1] - pad_n].contiguous()


@torch.library.custom_op("fffexp::grouped_outer", mutates_args=())
def grouped_outer(x_RK: Tensor, y_RN: Tensor, ends_G: Tensor) -> Tensor:
    """(G, K, N): for each group the product of its rows of x, transposed, with its rows of y."""
    out = x_RK.new_zeros(ends_G.shape[0], x_RK.shape[1], y_RN.shape[1])
    for group, start, end in _used(ends_G):
        torch.mm(x_RK[start:end].T, y_RN[start:end], out=out[group])
    return out


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mm_backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, Tensor, None]:
    x_RK, weight_GKN, ends_G = ctx.saved_tensors
    # the input of a network's first layer needs none
    grad_x = grouped_mm(grad_RN, weight_GKN.mT, ends_G) if ctx.needs_input_grad[0] else None
    return grad_x, grouped_outer(x_RK, grad_RN, ends_G), None


def _outer_backward(ctx: Any, grad_GKN: Tensor) -> tuple[Tensor, Tensor, None]:
    x_RK, y_RN, ends_G = ctx.saved_tensors
    return grouped_mm(y_RN, grad_GKN.mT, ends_G), grouped_mm(x_RK, grad_GKN, ends_G), None


grouped_mm.register_fake(lambda x_RK, weight_GKN, _: x_RK.new_empty(x_RK.shape[0], weight_GKN.shape[2]))
grouped_mm.register_autograd(_mm_backward, setup_context=_setup)
grouped_outer.register_fake(lambda x_RK, y_RN, ends_G: x_RK.new_empty(len(ends_G), x_RK.shape[1], y_RN.shape[1]))
grouped_outer.register_autograd(_outer_backward, setup_context=_setup)


@register_flop_formula([torch.ops.fffexp.grouped_mm, torch.ops.fffexp.grouped_outer])
def _flops(x_shape: torch.Size, other_shape: torch.Size, ends_shape: torch.Size, **_: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * other_shape[-1]


def _used(ends_G: Tensor) -> list[tuple[int, int, int]]:
    # group, first row and end of every group that has rows
    ends = ends_G.tolist()
    return [(g, start, end) for g, (start, end) in enumerate(itertools.pairwise([0, *ends])) if end > start]
