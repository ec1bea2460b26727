"""Products of each sample with rows of a matrix that it has chosen, as operators; each one's gradients are the others.

Shape suffixes: B samples, K rows chosen by a sample, N rows of the matrix, I their columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fffexp.kernels.operators import available

# Scalars that a step over some of the samples gathers at most.
STEP = 2**24


@torch.library.custom_op("fffexp::gathered_dots", mutates_args=())
def gathered_dots(x_BI: Tensor, row_BK: Tensor, weight_NI: Tensor, compiled: bool) -> Tensor:
    """(B, K): each sample's products with its rows, by the compiled kernels or plain torch."""
    if compiled:
        return torch.ops.fffexp.native_dots(x_BI, row_BK, weight_NI)
    parts = _steps(row_BK, weight_NI, x_BI)
    with torch.autocast(x_BI.device.type, enabled=False):  # the type of the result is that of the inputs
        out = [torch.bmm(weight_NI[row], x.unsqueeze(2)).squeeze(2) for row, x in parts]
    return torch.cat(out) if out else x_BI.new_empty(row_BK.shape)


@torch.library.custom_op("fffexp::gathered_sum", mutates_args=())
def gathered_sum(h_BK: Tensor, row_BK: Tensor, weight_NI: Tensor, compiled: bool) -> Tensor:
    """(B, I): the sum of each sample's rows, weighted by h."""
    if compiled:
        return torch.ops.fffexp.native_sum(h_BK, row_BK, weight_NI)
    parts = _steps(row_BK, weight_NI, h_BK)
    with torch.autocast(h_BK.device.type, enabled=False):
        out = [torch.bmm(h.unsqueeze(1), weight_NI[row]).squeeze(1) for row, h in parts]
    return torch.cat(out) if out else h_BK.new_empty(len(h_BK), weight_NI.shape[1])


@torch.library.custom_op("fffexp::scattered_outer", mutates_args=())
def scattered_outer(h_BK: Tensor, row_BK: Tensor, x_BI: Tensor, rows: int, compiled: bool) -> Tensor:
    """(rows, I): for each row the sum of the samples that chose it, weighted by h; 0 where there are none."""
    if compiled:
        return torch.ops.fffexp.native_outer(h_BK, row_BK, x_BI, rows)
    total = torch.promote_types(x_BI.dtype, torch.float32)  # of many terms
    out = x_BI.new_zeros(rows, x_BI.shape[1], dtype=total)
    for row, h, x in _steps(row_BK, x_BI, h_BK, x_BI):
        out.index_add_(0, row.flatten(), (h.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1).to(total))
    return out.to(x_BI.dtype)


def compiles(matrix: Tensor) -> bool:
    """Whether the compiled kernels can compute these products with such a matrix."""
    return matrix.is_cpu and matrix.dtype == torch.float32 and available()


def _steps(row_BK: Tensor, matrix: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    size = max(1, STEP // max(1, row_BK.shape[1] * matrix.shape[1]))
    return list(zip(*(each.split(size) for each in (row_BK, *others)), strict=True)) if len(row_BK) else []


def _setup_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.compiled = inputs
    ctx.save_for_backward(*tensors)


def _dots_backward(ctx: Any, grad_BK: Tensor) -> tuple[Tensor | None, ...]:
    (x_BI, row_BK, weight_NI), compiled = ctx.saved_tensors, ctx.compiled
    # the input of a network's first layer needs none
    grad_x = gathered_sum(grad_BK, row_BK, weight_NI, compiled) if ctx.needs_input_grad[0] else None
    grad_weight = scattered_outer(grad_BK, row_BK, x_BI, len(weight_NI), compiled) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_weight, None


def _sum_backward(ctx: Any, grad_BI: Tensor) -> tuple[Tensor | None, ...]:
    (h_BK, row_BK, weight_NI), compiled = ctx.saved_tensors, ctx.compiled
    grad_weight = scattered_outer(h_BK, row_BK, grad_BI, len(weight_NI), compiled) if ctx.needs_input_grad[2] else None
    return gathered_dots(grad_BI, row_BK, weight_NI, compiled), None, grad_weight, None


def _setup_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.compiled = inputs
    ctx.save_for_backward(*tensors)


def _outer_backward(ctx: Any, grad_NI: Tensor) -> tuple[Tensor | None, ...]:
    (h_BK, row_BK, x_BI), compiled = ctx.saved_tensors, ctx.compiled
    grad_h, grad_x = gathered_dots(x_BI, row_BK, grad_NI, compiled), gathered_sum(h_BK, row_BK, grad_NI, compiled)
    return grad_h, None, grad_x, None, None


gathered_dots.register_fake(lambda x_BI, row_BK, *_: x_BI.new_empty(row_BK.shape))
gathered_dots.register_autograd(_dots_backward, setup_context=_setup_product)
gathered_sum.register_fake(lambda h_BK, _0, weight_NI, _1: h_BK.new_empty(h_BK.shape[0], weight_NI.shape[1]))
gathered_sum.register_autograd(_sum_backward, setup_context=_setup_product)
scattered_outer.register_fake(lambda _0, _1, x_BI, rows, _2: x_BI.new_empty(rows, x_BI.shape[1]))
scattered_outer.register_autograd(_outer_backward, setup_context=_setup_outer)


@register_flop_formula([torch.ops.fffexp.gathered_dots, torch.ops.fffexp.gathered_sum])
def _product_flops(_: Any, row_shape: torch.Size, weight_shape: torch.Size, *__: Any, **___: Any) -> int:
    return 2 * row_shape.numel() * weight_shape[1]


@register_flop_formula(torch.ops.fffexp.scattered_outer)
def _outer_flops(_: Any, row_shape: torch.Size, x_shape: torch.Size, *__: Any, **___: Any) -> int:
    return 2 * row_shape.numel() * x_shape[1]
