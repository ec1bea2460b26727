"""Interchangeable feedforward layers: parameters and mathematics of one layer each."""

from fffexp.layers.base import FeedforwardLayer, feedforward_layers
from fffexp.layers.ff import FF
from fffexp.layers.fff import FFF
from fffexp.layers.forest import Forest
from fffexp.layers.moe import NoisyTopKMoE, SwitchMoE
from fffexp.layers.tree_ff import TreeFF

__all__ = ["FF", "FFF", "FeedforwardLayer", "Forest", "NoisyTopKMoE", "SwitchMoE", "TreeFF", "feedforward_layers"]
