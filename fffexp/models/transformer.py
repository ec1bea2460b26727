"""The transformer block that the vision transformer and the language model share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fffexp.layers.base import LayerFactory


class Cache:
    """Keys and values of the tokens that a causal block has seen, for decoding one token after another.

    Attributes:
        key, value: (batch, heads, context, head features); places from `length` on are to be written.
        length: tokens seen.
    """

    def __init__(self, key: Tensor) -> None:
        self.key, self.value, self.length = key, torch.zeros_like(key), 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of (batch, heads, tokens, ...) new tokens -> those of all tokens so far."""
        end = self.length + key.shape[2]
        self.key[:, :, self.length : end], self.value[:, :, self.length : end] = key, value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a feedforward layer, each with a residual.

    Args:
        layer: (in_features, out_features) -> layer; None for attention alone.
        features: size of a token.
        heads: attention heads; they divide the features, or a ValueError is raised.
        causal: whether a token attends to itself and those before it alone; then positions are rotary.
    """

    def __init__(self, layer: LayerFactory | None, features: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if features % heads:
            raise ValueError(f"heads is {heads}, which does not divide the {features} features")
        if causal and features // heads % 2:
            raise ValueError(f"{features} features of {heads} heads: rotary positions need an even number for a head")
        self.heads, self.causal = heads, causal
        self.norm_attention = nn.LayerNorm(features)
        self.qkv, self.projection = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.norm_layer = nn.LayerNorm(features) if layer else None
        self.layer = layer(features, features) if layer else None

    def forward(self, x: Tensor, wanted: int | None = None, cache: Cache | None = None) -> Tensor:
        """(batch, tokens, features) -> the same, or (batch, wanted, features): of the first tokens alone.

        With a cache the tokens follow those that it holds; several at once only where it is empty.
        """
        qkv = self.qkv(self.norm_attention(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        if self.causal:
            query, key = rotary(torch.stack([query, key]), cache.length if cache else 0).unbind(0)
        if cache is not None:
            if cache.length and x.shape[1] > 1:
                raise ValueError(f"{x.shape[1]} tokens follow {cache.length} in the cache; give one")
            key, value = cache.append(key, value)
        several = self.causal and query.shape[2] > 1
        attended = F.scaled_dot_product_attention(query[:, :, :wanted], key, value, is_causal=several)
        x = x[:, :wanted] + self.projection(attended.transpose(1, 2).flatten(2))
        return x if self.layer is None or self.norm_layer is None else x + self.layer(self.norm_layer(x))


def rotary(x: Tensor, start: int) -> Tensor:
    """(..., tokens, features) rotated by the tokens' positions, the first of which is `start` (arXiv 2104.09864)."""
    tokens, features = x.shape[-2:]
    frequencies = 10_000.0 ** -torch.arange(0, features, 2, dtype=torch.float32, device=x.device).div(features)
    angles = torch.arange(start, start + tokens, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
