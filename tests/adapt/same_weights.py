"""A dense layer of the weights of the MLP that it replaced."""

from typing import Any

import torch
from torch import nn

from fffexp.layers import FF


def linears(mlp: nn.Module) -> list[Any]:
    """Its linear layers, those of GPT-2 too."""
    return [m for m in mlp.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


@torch.no_grad()
def copy_weights(mlp: nn.Module, layer: nn.Module) -> None:
    """Make an FF compute what an MLP does."""
    assert isinstance(layer, FF)
    for old, new in zip(linears(mlp), linears(layer), strict=True):
        new.weight.copy_(old.weight if isinstance(old, nn.Linear) else old.weight.T)
        new.bias.zero_() if old.bias is None else new.bias.copy_(old.bias)
