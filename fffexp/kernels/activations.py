"""Activations that the compiled kernels know, by the name that they call them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

_aten = torch.ops.aten
# the value, and the gradient from (gradient, preactivation)
GRADIENTS: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]] = {
    "identity": (nn.Identity(), lambda g, z: g),
    "relu": (nn.ReLU(), lambda g, z: _aten.threshold_backward(g, z, 0)),
    "gelu": (nn.GELU(), lambda g, z: _aten.gelu_backward(g, z)),
    "gelu_tanh": (nn.GELU("tanh"), lambda g, z: _aten.gelu_backward(g, z, approximate="tanh")),
    "silu": (nn.SiLU(), lambda g, z: _aten.silu_backward(g, z)),
    "tanh": (nn.Tanh(), lambda g, z: _aten.tanh_backward(g, torch.tanh(z))),
}
_NAMES = {(type(value), vars(value).get("approximate")): name for name, (value, _) in GRADIENTS.items()}


def activation_name(module: nn.Module) -> str | None:
    """What the kernel calls this activation, or None if it does not know it."""
    return _NAMES.get((type(module), vars(module).get("approximate")))
