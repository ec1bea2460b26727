"""Inference of trees whose nodes are the neurons, as operators that compiled kernels implement: C++, Triton.

Rows and weights are in float32 or bfloat16. torch.compile, torch.export and autograd see the operators; gradients come
from the products in gathered.py. Shape suffixes: B samples, T trees, N neurons of a tree, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fffexp.kernels import eager
from fffexp.kernels.gathered import compiles, gathered_dots, gathered_sum, scattered_outer
from fffexp.kernels.operators import ACTIVATIONS
from fffexp.routing.paths import path_neurons

_ARGUMENTS = "Tensor x, Tensor node_weight, Tensor node_bias, Tensor output_weight, Tensor output_bias, str activation"
_LIBRARY = torch.library.Library("fffexp", "FRAGMENT")
for _name in ("tree_ff", "tree_ff_inference"):  # the second without the detour through autograd's Python
    _LIBRARY.define(f"{_name}({_ARGUMENTS}) -> Tensor")
    torch.library.register_fake(f"fffexp::{_name}", lambda x, *others: x.new_empty(x.shape[0], others[3].shape[0]))

# looked up once: a small batch takes no longer than such a look
_TREE_FF, _INFERENCE = torch.ops.fffexp.tree_ff.default, torch.ops.fffexp.tree_ff_inference.default


def tree_ff(x_BI: Tensor, *arguments: Any) -> Tensor:
    """(B, O) of the neurons on the paths; the arguments are those of the operator `fffexp::tree_ff`."""
    return _TREE_FF(x_BI, *arguments) if torch.is_grad_enabled() else _INFERENCE(x_BI, *arguments)


@torch.no_grad()
def walk(x_BI: Tensor, node_weight_TNI: Tensor, node_bias_TN: Tensor, compiled: bool) -> Tensor:
    """(B, T) path of each tree, by the compiled operator `fffexp::route` or plain torch."""
    depth = node_bias_TN.shape[1].bit_length()
    deciding = 2 ** (depth - 1) - 1  # neurons of a tree
    nodes = [(weight[:deciding], bias[:deciding]) for weight, bias in zip(node_weight_TNI, node_bias_TN, strict=True)]
    with torch.autocast(x_BI.device.type, enabled=False):
        if compiled:
            return torch.stack([torch.ops.fffexp.route(x_BI, *each) for each in nodes], 1)
        return torch.stack([eager.route(x_BI, *each, depth - 1) for each in nodes], 1)


@register_flop_formula([torch.ops.fffexp.tree_ff, torch.ops.fffexp.tree_ff_inference])
def _flops(x: torch.Size, node: torch.Size, _: Any, output: torch.Size, *__: Any, **options: Any) -> int:
    return 2 * x[0] * node[0] * node[1].bit_length() * (node[2] + output[2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
    x_BI, node_weight, node_bias, output_weight, _ = ctx.saved_tensors
    neuron_BK = path_neurons(walk(x_BI, node_weight, node_bias, compiled=True), node_bias.shape[1].bit_length())
    w1, b1, w2 = node_weight.flatten(0, 1), node_bias.flatten(), output_weight.flatten(0, 1)
    compiled = compiles(w1)
    z_BK = gathered_dots(x_BI, neuron_BK, w1, compiled) + b1[neuron_BK]
    h_BK, derive = torch.func.vjp(ACTIVATIONS[ctx.activation], z_BK)  # type: ignore[misc] # three with has_aux alone
    (grad_BK,) = derive(gathered_dots(grad_BO, neuron_BK, w2, compiled))
    grad_b1 = torch.zeros_like(b1).index_add(0, neuron_BK.flatten(), grad_BK.flatten())
    return (
        gathered_sum(grad_BK, neuron_BK, w1, compiled) if ctx.needs_input_grad[0] else None,
        scattered_outer(grad_BK, neuron_BK, x_BI, len(w1), compiled).view_as(node_weight),
        grad_b1.view_as(node_bias),
        scattered_outer(h_BK, neuron_BK, grad_BO, len(w2), compiled).view_as(output_weight),
        grad_BO.sum(0),
        None,
    )


torch.library.register_autograd("fffexp::tree_ff", _backward, setup_context=_setup)
