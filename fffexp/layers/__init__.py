"""Interchangeable feedforward layers: parameters and mathematics of one layer each."""

from fffexp.layers.base import FeedforwardLayer, feedforward_layers
from fffexp.layers.expert_choice import ExpertChoiceMoE
from fffexp.layers.ff import FF
from fffexp.layers.fff import FFF
from fffexp.layers.forest import Forest
from fffexp.layers.moe import NoisyTopKMoE, SwitchMoE
from fffexp.layers.peer import PEER
from fffexp.layers.shared import Shared
from fffexp.layers.sigmoid_moe import SigmoidMoE
from fffexp.layers.sparse_ff import SparseFF
from fffexp.layers.tree_ff import TreeFF

__all__ = [
    "FF", "FFF", "PEER", "ExpertChoiceMoE", "FeedforwardLayer", "Forest", "NoisyTopKMoE", "Shared", "SigmoidMoE",
    "SparseFF", "SwitchMoE", "TreeFF", "feedforward_layers",
]  # fmt: skip
