"""The mixture of experts that the FFF paper compares with."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fffexp.layers.base import AuxiliaryLoss, decision_logits
from fffexp.layers.experts import GatedExperts
from fffexp.layers.random import normal_like
from fffexp.routing import gate
from fffexp.routing.blocks import block_counts


class NoisyTopKMoE(GatedExperts):
    """Sparsely gated mixture of experts (Shazeer et al., arXiv 1701.06538, section 2).

    Rows are dispatched to their k experts alone, in training too. Noise on the gate in training only.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        num_experts: number of experts.
        expert_width: hidden neurons of one expert.
        top_k: experts evaluated for a sample.
        activation: makes the activation module of the experts, which has to be elementwise.
        dropout: probability of dropping a hidden activation in training.

    Raises:
        ValueError: a size below 1, top_k above num_experts, or weights that do not fit in memory.
    """

    aux_losses: Mapping[str, AuxiliaryLoss] = MappingProxyType({"importance": gate.importance, "load": gate.load})
    default_aux_weights: Mapping[str, float] = MappingProxyType({"importance": 0.1})
    metrics: Mapping[str, AuxiliaryLoss] = MappingProxyType({"gate_entropy": gate.gate_entropy})
    gate_products: ClassVar[int] = 2
    baseline: ClassVar[str] = "moe"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        expert_width: int,
        top_k: int = 2,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, num_experts, expert_width, top_k, activation, dropout)
        # both start at zero, so that all experts are equally likely and sigma is ln 2
        nn.init.zeros_(self.gate_weight)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        rows = self._rows(x)
        clean = decision_logits(rows, self.gate_weight, None)
        logits = clean
        if self.training:
            sigma = F.softplus(decision_logits(rows, self.noise_weight, None))
            logits = clean + normal_like(clean) * sigma
        top = logits.topk(self.top_k, dim=1)
        gates = self.gates(top.values, logits)
        output = self.dispatch(x, top.indices, gates)
        if self.training:
            if self.top_k < self.num_experts:
                load = gate.chosen_probability(clean, sigma, logits, self.top_k).sum(0)
            else:
                load = block_counts(top.indices, self.num_experts).to(gates.dtype)
            dense = torch.zeros_like(logits).scatter(1, top.indices, gates)
            self._record(gate.GateRouting(gates_BE=dense, load_E=load), output)
        return output

    def gates(self, chosen_BK: Tensor, logits_BE: Tensor) -> Tensor:
        """(B, K), (B, E) -> (B, K): softmax over the chosen alone."""
        return torch.softmax(chosen_BK, dim=1)

    def check_trainable(self) -> None:
        """Refuse top_k = 1 among several experts: the prediction loss gives such a gate no gradient."""
        if self.top_k == 1 and self.num_experts > 1:
            raise ValueError(
                "top_k is 1: the softmax of one number gives a noisy top-k gate no gradient from the prediction loss; "
                "train with top_k >= 2 (SwitchMoE, a Switch gate, is the form that trains at top_k = 1)"
            )
