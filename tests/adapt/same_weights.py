"""A dense layer of the weights of the MLP that it replaced."""

from typing import Any

import torch
from torch import nn

from fffexp.adapt.replace import Replacement
from fffexp.layers import FF


def copy_weights(replacement: Replacement) -> None:
    """Make the new FF compute what the old MLP did."""
    linears: list[Any] = [
        m for m in replacement.old.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    assert isinstance(replacement.new, FF)
    for old, new in zip(linears, (replacement.new.network[0], replacement.new.network[3]), strict=True):
        weight = old.weight if isinstance(old, nn.Linear) else old.weight.T
        with torch.no_grad():
            new.weight.copy_(weight)
            new.bias.zero_() if old.bias is None else new.bias.copy_(old.bias)
