"""A transformer block whose feedforward layer is interchangeable."""

import torch.nn.functional as F
from torch import Tensor, nn

from fffexp.models.mlp import LayerFactory


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a feedforward layer, each with a residual.

    Args:
        layer: (in_features, out_features) -> layer; None for attention alone.
        features: size of a token.
        heads: attention heads; they divide the features.

    Raises:
        ValueError: the heads do not divide the features.
    """

    def __init__(self, layer: LayerFactory | None, features: int, heads: int) -> None:
        super().__init__()
        if features % heads:
            raise ValueError(f"heads is {heads}, which does not divide the {features} features")
        self.heads = heads
        self.norm_attention = nn.LayerNorm(features)
        self.qkv, self.projection = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.norm_layer = nn.LayerNorm(features) if layer else None
        self.layer = layer(features, features) if layer else None

    def forward(self, x: Tensor, wanted: int | None = None) -> Tensor:
        """(batch, tokens, features) -> the same, or (batch, wanted, features): of the first tokens alone."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(query[:, :, :wanted], key, value)
        x = x[:, :wanted] + self.projection(attended.transpose(1, 2).flatten(2))
        if self.layer is None or self.norm_layer is None:
            return x
        output: Tensor = x + self.layer(self.norm_layer(x))
        return output
