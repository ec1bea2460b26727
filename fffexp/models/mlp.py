"""The network of arXiv 2308.14711, section 4.1."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fffexp.layers.base import LayerFactory


class MLP(nn.Module):
    """One feedforward layer from the flattened input to the class logits.

    Args:
        layer: (in_features, out_features) -> layer; a ValueError if there is none.
        in_shape: shape of one sample.
        num_classes: number of classes.
    """

    def __init__(self, layer: LayerFactory | None, in_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if layer is None:
            raise ValueError("layer is None, and an MLP is nothing else: name one")
        self.layer = layer(math.prod(in_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *in_shape) -> (batch, num_classes)."""
        return self.layer(x.flatten(1))
