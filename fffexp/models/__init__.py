"""Networks that take a layer factory and know no concrete layer."""

from fffexp.models.gpt import GPT
from fffexp.models.mlp import MLP
from fffexp.models.vit import ViT

__all__ = ["GPT", "MLP", "ViT"]
