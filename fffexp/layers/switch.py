"""The mixture of experts that trains at k = 1."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fffexp.layers.base import AuxiliaryLoss, decision_logits
from fffexp.layers.blocks import Activation, Device
from fffexp.layers.experts import GatedExperts
from fffexp.routing import gate


class SwitchMoE(GatedExperts):
    """Mixture of experts with a Switch gate (Fedus et al., arXiv 2101.03961, section 2.1).

    One expert a sample, its output times its softmax probability among all experts, which is how the gate learns.
    No noise, and no capacity: every row reaches its expert.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        num_experts: number of experts.
        expert_width: hidden neurons of one expert.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation in training.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: a size below 1 or no whole number, no activation, or weights that do not fit in memory.
    """

    aux_losses: Mapping[str, AuxiliaryLoss] = MappingProxyType({"load_balance": gate.switch_balance})
    default_aux_weights: Mapping[str, float] = MappingProxyType({"load_balance": 0.3})
    metrics: Mapping[str, AuxiliaryLoss] = MappingProxyType({"gate_entropy": gate.gate_entropy})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        expert_width: int,
        activation: Activation = "relu",
        dropout: float = 0.0,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, num_experts, expert_width, 1, activation, dropout, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Section 2.4: the gate at a tenth of the usual variance, cut at two deviations."""
        self.experts.reset_parameters()
        std = (0.1 / self.in_features) ** 0.5
        nn.init.trunc_normal_(self.gate_weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        rows = self._rows(x, self.gate_weight.dtype)
        logits = decision_logits(rows, self.gate_weight, None)
        top = logits.topk(1, dim=1)
        output = self.dispatch(rows, top.indices, self.gates(top.values, logits))
        if self.training:
            routing = gate.SwitchRouting(gates_BE=torch.softmax(logits, dim=1), expert_B=top.indices.squeeze(1))
            self._record(routing, output)
        return output.reshape(*x.shape[:-1], self.out_features)

    def gates(self, chosen_BK: Tensor, logits_BE: Tensor) -> Tensor:
        """(B, 1), (B, E) -> (B, 1): softmax over all, of the chosen."""
        return torch.exp(chosen_BK - logits_BE.logsumexp(1, keepdim=True))
