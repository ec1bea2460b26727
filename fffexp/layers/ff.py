"""The dense baseline."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fffexp.kernels.naive import Blocks
from fffexp.layers.base import BlockLayer, whole
from fffexp.layers.blocks import Activation, Device, make_activation
from fffexp.layers.random import Dropout


class FF(BlockLayer):
    """Dense feedforward layer: Linear, activation, dropout, Linear.

    Args:
        width: hidden neurons.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one.
        dropout: probability of dropping a hidden activation in training.
    """

    baseline = "ff"
    shape = ("width",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        activation: Activation = "relu",
        dropout: float = 0.0,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.width = whole("width", width)
        self._count((width, width), (0, 0), 1, "width", dropout, device=device, dtype=dtype)
        self.network = nn.Sequential(
            nn.Linear(in_features, width, device=device, dtype=dtype),
            make_activation(activation).to(device, dtype),
            Dropout(dropout),
            nn.Linear(width, out_features, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        network = self._modules["network"]
        up = network._modules["0"]  # type: ignore[union-attr] # attributes of a module take 0.7 us
        try:
            dtype = up.weight.dtype  # type: ignore[union-attr] # as above
        except AttributeError:  # quantised, by torch.ao
            dtype = x.dtype
        return network(self._checked(x, dtype))  # type: ignore[misc,arg-type] # as above

    def inference_backend(self) -> str:
        return "linear"  # torch's own products

    def training_backend(self, x: Tensor) -> str:
        return "linear"

    def dense_blocks(self) -> tuple[Blocks, nn.Module]:
        up, activation, _, down = cast("Any", self.network)
        return Blocks(up.weight[None], up.bias[None], down.weight.T[None], down.bias[None]), activation

    def fast_forms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        blocks, activation = self.dense_blocks()
        w1, b1, w2, b2 = (tensor[0].detach() for tensor in blocks)
        w1, w2 = w1.T.contiguous(), w2.contiguous()
        return {"addmm": lambda x: torch.addmm(b2, activation(torch.addmm(b1, x, w1)), w2)}
