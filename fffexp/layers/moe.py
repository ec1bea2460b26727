"""The mixture of experts that the FFF paper compares with."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fffexp.layers.base import AuxiliaryLoss, decision_logits
from fffexp.layers.blocks import Activation, Device
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
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation in training.
        trainable: whether it may be trained; with top_k = 1 of several experts the gate would not learn, so that a
            training pass raises, unless this is False (for timing).
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: a size below 1 or no whole number, no activation, top_k above num_experts, weights that do not fit
            in memory, or a training pass with top_k = 1 (see trainable).
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
        activation: Activation = "relu",
        dropout: float = 0.0,
        trainable: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = in_features, out_features, num_experts, expert_width, top_k
        super().__init__(*sizes, activation, dropout, device, dtype)
        self.trainable = trainable
        self.noise_weight = nn.Parameter(torch.empty_like(self.gate_weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gate and noise start at zero, so that all experts are equally likely and sigma is ln 2."""
        self.experts.reset_parameters()
        nn.init.zeros_(self.gate_weight)
        nn.init.zeros_(self.noise_weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.training and self.trainable and torch.is_grad_enabled():
            self.check_trainable()
        rows = self._rows(x, self.gate_weight.dtype)
        clean = decision_logits(rows, self.gate_weight, None)
        logits = clean
        if self.training:
            sigma = F.softplus(decision_logits(rows, self.noise_weight, None))
            logits = clean + normal_like(clean) * sigma
        top = logits.topk(self.top_k, dim=1)
        gates = self.gates(top.values, logits)
        output = self.dispatch(rows, top.indices, gates)
        if self.training:
            if self.top_k < self.num_experts:
                load = gate.chosen_probability(clean, sigma, logits, self.top_k).sum(0)
            else:
                load = block_counts(top.indices, self.num_experts).to(gates.dtype)
            dense = torch.zeros_like(logits).scatter(1, top.indices, gates)
            self._record(gate.GateRouting(gates_BE=dense, load_E=load), output)
        return output.reshape(*x.shape[:-1], self.out_features)

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
