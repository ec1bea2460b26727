"""Activations that the compiled kernels know, by the name that they call them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

_aten = torch.ops.aten
# the value, and the gradient from (gradient, preactivation)
GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "identity": (lambda z: z, lambda g, z: g),
    "relu": (torch.relu, lambda g, z: _aten.threshold_backward(g, z, 0)),
    "gelu": (nn.functional.gelu, lambda g, z: _aten.gelu_backward(g, z)),
    "gelu_tanh": (
        lambda z: nn.functional.gelu(z, approximate="tanh"),
        lambda g, z: _aten.gelu_backward(g, z, approximate="tanh"),
    ),
    "silu": (nn.functional.silu, lambda g, z: _aten.silu_backward(g, z)),
    "tanh": (torch.tanh, lambda g, z: _aten.tanh_backward(g, torch.tanh(z))),
}
_NAMES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
}


def activation_name(module: nn.Module) -> str | None:
    """What the kernel calls this activation, or None if it does not know it."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _NAMES.get(type(module))
