"""Interchangeable feedforward layers: parameters and mathematics of one layer each."""

from fffexp.layers.base import FeedforwardLayer
from fffexp.layers.ff import FF
from fffexp.layers.fff import FFF
from fffexp.layers.forest import Forest
from fffexp.layers.moe import NoisyTopKMoE
from fffexp.layers.switch import SwitchMoE

# What may stand in a network of ours; the parts of a forest are layers for themselves.
Layer = FeedforwardLayer | Forest

__all__ = ["FF", "FFF", "FeedforwardLayer", "Forest", "Layer", "NoisyTopKMoE", "SwitchMoE"]
