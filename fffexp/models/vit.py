"""The vision transformer of arXiv 2308.14711, section 4.4, whose feedforward layers are interchangeable."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fffexp.layers.base import LayerFactory, whole
from fffexp.layers.random import Dropout
from fffexp.models.transformer import TransformerBlock


class ViT(nn.Module):
    """Patches and a class token through transformer blocks; the logits come from the class token.

    Args:
        layer: (in_features, out_features) -> layer of a block; None for blocks of attention alone.
        in_shape: (channels, height, width) of one sample.
        num_classes: number of classes.
        patch_size: side of a patch in pixels; it divides height and width, or a ValueError is raised.
        features: size of a token.
        num_blocks: transformer blocks.
        heads: attention heads of a block; they divide the features.
        input_dropout: probability of dropping a feature of the embedded patches in training.
        depths: of the trees of each block, in the place of the layer's own depth.
    """

    def __init__(
        self,
        layer: LayerFactory | None,
        in_shape: Sequence[int],
        num_classes: int,
        patch_size: int = 4,
        features: int = 128,
        num_blocks: int = 4,
        heads: int = 4,
        input_dropout: float = 0.1,
        depths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if len(in_shape) != 3:
            raise ValueError(f"a sample has shape {tuple(in_shape)}; a ViT takes (channels, height, width)")
        channels, height, width = in_shape
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size is {patch_size}, which does not divide images of {height} x {width}")
        self.patches = nn.Conv2d(channels, features, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, features))
        tokens = 1 + (height // patch_size) * (width // patch_size)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, features), std=0.02))
        self.dropout = Dropout(input_dropout)
        layers = [layer] * whole("num_blocks", num_blocks)
        if depths is not None:
            if layer is None or len(depths) != num_blocks:
                raise ValueError(f"there are {len(depths)} depths for {num_blocks if layer else 0} layers")
            layers = [partial(layer, depth=depth) for depth in depths]  # type: ignore[call-arg] # trees have one
        try:
            self.blocks = nn.Sequential(*(TransformerBlock(each, features, heads) for each in layers))
        except TypeError as error:
            if depths is None:
                raise
            raise ValueError(f"depths are given for a layer that takes none: {error}") from error
        self.norm, self.classifier = nn.LayerNorm(features), nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *in_shape) -> (batch, num_classes)."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        *blocks, last = self.blocks
        x = self.dropout(torch.cat([self.class_token.expand(len(x), -1, -1), patches], 1) + self.positions)
        for block in blocks:
            x = block(x)
        # the class token alone is read, and rows that nobody reads would have a say in how the last layer is balanced
        return self.classifier(self.norm(last(x, wanted=1)[:, 0]))
