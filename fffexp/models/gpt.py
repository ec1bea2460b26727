"""A small decoder-only language model whose feedforward layers are interchangeable."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fffexp.layers.base import LayerFactory, whole
from fffexp.models.transformer import Cache, TransformerBlock


class GPT(nn.Module):
    """Token embeddings through causal transformer blocks; the logits of the next token at each place.

    Args:
        layer: (in_features, out_features) -> layer of a block; None for blocks of attention alone.
        in_shape: (context,), the tokens of one sample.
        vocab_size: number of different tokens.
        features: size of a token's embedding.
        num_blocks: transformer blocks.
        heads: attention heads of a block; they divide the features.
    """

    def __init__(
        self,
        layer: LayerFactory | None,
        in_shape: Sequence[int],
        vocab_size: int,
        features: int = 128,
        num_blocks: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if len(in_shape) != 1:
            raise ValueError(f"a sample has shape {tuple(in_shape)}; a GPT takes (context,) tokens")
        (self.context,), self.heads = in_shape, heads
        self.embedding = nn.Embedding(vocab_size, features)
        nn.init.normal_(self.embedding.weight, std=0.02)
        blocks = whole("num_blocks", num_blocks)
        self.blocks = nn.ModuleList(TransformerBlock(layer, features, heads, causal=True) for _ in range(blocks))
        self.norm, self.classifier = nn.LayerNorm(features), nn.Linear(features, vocab_size)

    def forward(self, tokens: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """(batch, tokens) -> (batch, tokens, vocab_size) logits of the token that follows each.

        With caches, from `make_caches`, the tokens follow those that were given before.
        """
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, cache=caches[i] if caches else None)
        return self.classifier(self.norm(x))

    def make_caches(self, batch_size: int, context: int | None = None) -> list[Cache]:
        """Empty caches of the blocks, for the model's context or another number of tokens."""
        like, context = self.embedding.weight, context or self.context
        shape = (batch_size, self.heads, context, like.shape[1] // self.heads)
        return [Cache(like.new_zeros(shape)) for _ in self.blocks]

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], new_tokens: int, temperature: float = 1.0) -> list[int]:
        """Continue a prompt of at least one token; temperature 0 takes the likeliest token.

        Where the text is longer than the context, its last half is read anew, so that decoding costs one token again.
        """
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        self.eval()
        tokens, device = list(prompt), self.embedding.weight.device
        caches: list[Cache] = []
        for _ in range(new_tokens):
            fresh = not caches or caches[0].length >= self.context
            if fresh:
                caches = self.make_caches(1)
            keep = self.context if len(tokens) < self.context else max(1, self.context // 2)
            given = torch.tensor([tokens[-keep:] if fresh else tokens[-1:]], device=device)
            logits = self(given, caches)[0, -1].float()
            drawn = torch.multinomial((logits / temperature).softmax(0), 1) if temperature > 0 else logits.argmax()
            tokens.append(int(drawn))
        return tokens[len(prompt) :]
