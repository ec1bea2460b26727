"""The product of sparse activations with a matrix, which reads the rows of non-zero ones alone.

Shape suffixes: B samples, H hidden neurons, U those that are not zero for all samples, O outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("fffexp", "FRAGMENT")
_LIBRARY.define("native_skip_zeros(Tensor h, Tensor weight, Tensor bias) -> Tensor")  # in csrc/skip_zeros.cpp


def skip_zeros(h_BH: Tensor, weight_HO: Tensor, bias_O: Tensor, compiled: bool) -> Tensor:
    """(B, O): h times weight, plus bias, by the compiled operator or plain torch; all in one dtype."""
    if compiled and not torch.is_grad_enabled():  # without the detour through Python's operators
        return torch.ops.fffexp.native_skip_zeros(h_BH, weight_HO, bias_O)
    return _skip_zeros(h_BH, weight_HO, bias_O, compiled)


def used(h_BH: Tensor) -> Tensor:
    """(U,) neurons that some sample needs."""
    return (h_BH != 0).any(0).nonzero().squeeze(1)


@torch.library.custom_op("fffexp::skip_zeros", mutates_args=())
def _skip_zeros(h_BH: Tensor, weight_HO: Tensor, bias_O: Tensor, compiled: bool) -> Tensor:
    with torch.autocast(h_BH.device.type, enabled=False):  # the type of the result is that of the inputs
        if compiled:
            return torch.ops.fffexp.native_skip_zeros(h_BH, weight_HO, bias_O)
        used_U = used(h_BH)
        if 2 * len(used_U) <= len(weight_HO):  # else gathering costs more than it saves
            h_BH, weight_HO = h_BH[:, used_U], weight_HO[used_U]
        return torch.addmm(bias_O, h_BH, weight_HO)


def _fake(h_BH: Tensor, weight_HO: Tensor, *_: Any) -> Tensor:
    return h_BH.new_empty(h_BH.shape[0], weight_HO.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
    # of zeros too: an activation may be 0 where it is not flat
    h_BH, weight_HO = ctx.saved_tensors
    with torch.autocast(h_BH.device.type, enabled=False):
        return grad_BO @ weight_HO.T, h_BH.T @ grad_BO, grad_BO.sum(0), None


_skip_zeros.register_fake(_fake)
_skip_zeros.register_autograd(_backward, setup_context=_setup)
torch.library.register_fake("fffexp::native_skip_zeros", _fake)


@register_flop_formula([torch.ops.fffexp.skip_zeros, torch.ops.fffexp.native_skip_zeros])
def _flops(h: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * h[0] * h[1] * weight[1]  # at most
