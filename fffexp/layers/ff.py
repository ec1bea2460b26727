"""The dense baseline."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from fffexp.kernels.naive import Blocks
from fffexp.layers.base import DenseBlocks, FeedforwardLayer, check_fits, probability, whole
from fffexp.layers.blocks import Activation, Device, make_activation
from fffexp.layers.random import Dropout


class FF(FeedforwardLayer):
    """Dense feedforward layer: Linear, activation, dropout, Linear.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        width: hidden neurons.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one.
        dropout: probability of dropping a hidden activation in training.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: a size below 1 or no whole number, no activation, or weights that do not fit in memory.
    """

    baseline: ClassVar[str] = "ff"
    shape: ClassVar[tuple[str, ...]] = ("width",)

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
        probability("dropout", dropout)
        check_fits(width * (in_features + out_features + 1), "lower width", device, dtype)
        self.network = nn.Sequential(
            nn.Linear(in_features, width, device=device, dtype=dtype),
            make_activation(activation).to(device, dtype),
            Dropout(dropout),
            nn.Linear(width, out_features, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        network = self._modules["network"]
        up = network._modules["0"]  # type: ignore[union-attr] # attributes of a module take 0.7 us
        output: Tensor = network(self._checked(x, up.weight.dtype))  # type: ignore[misc,union-attr,arg-type] # as above
        return output

    def inference_backend(self) -> str:
        """Torch's own products."""
        return "linear"

    def training_backend(self, x: Tensor) -> str:
        """Torch's own products."""
        return "linear"

    @property
    def vectorizable(self) -> bool:
        """It always is."""
        return True

    def dense_blocks(self) -> DenseBlocks:
        """One, the layer itself."""
        up, activation, _, down = self.network
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        return DenseBlocks(Blocks(up.weight[None], up.bias[None], down.weight.T[None], down.bias[None]), activation)

    @property
    def training_width(self) -> int:
        """W."""
        return self.width

    @property
    def flops_per_sample(self) -> int:
        """Two products."""
        return 2 * self.width * (self.in_features + self.out_features)

    def fast_forms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """By addmm on transposed copies of the weights."""
        weight1, b1, weight2, b2 = (parameter.detach() for parameter in self.network.parameters())
        w1, w2, activation = weight1.T.contiguous(), weight2.T.contiguous(), self.network[1]
        return {"addmm": lambda x: torch.addmm(b2, activation(torch.addmm(b1, x, w1)), w2)}
