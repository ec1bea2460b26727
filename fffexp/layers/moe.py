"""The mixture of experts that FFF is compared with."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fffexp.kernels import naive
from fffexp.layers.base import (
    FeedforwardLayer,
    Regularizer,
    check_fits,
    decision_logits,
    positive,
    probability,
)
from fffexp.layers.blocks import BlockMLP
from fffexp.routing import gate
from fffexp.routing.tree import block_counts


class NoisyTopKMoE(FeedforwardLayer):
    """Sparsely gated mixture of experts (Shazeer et al., arXiv 1701.06538, section 2).

    Rows are dispatched to their k experts alone, in training too. Noise on the gate in training only.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        num_experts: number of experts.
        expert_width: hidden neurons of one expert.
        k: experts evaluated for a sample.
        activation: makes the activation module of the experts.
        dropout: probability of dropping a hidden activation in training.

    Raises:
        ValueError: a size below 1, k above num_experts, or weights that do not fit in memory.
    """

    regularizers: Mapping[str, Regularizer] = MappingProxyType({"importance": gate.importance, "load": gate.load})
    metrics: Mapping[str, Regularizer] = MappingProxyType({"gate_entropy": gate.gate_entropy})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        expert_width: int,
        k: int = 2,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features)
        self.num_experts = positive("num_experts", num_experts)
        self.expert_width = positive("expert_width", expert_width)
        self.k = positive("k", k)
        if k > num_experts:
            raise ValueError(f"k is {k} but there are {num_experts} experts: lower k or raise num_experts")
        probability("dropout", dropout)
        per_expert = 2 * in_features + expert_width * (in_features + out_features + 1) + out_features
        check_fits(num_experts * per_expert, "lower num_experts or expert_width")
        # both start at zero, so that all experts are equally likely and sigma is ln 2
        self.gate_weight = nn.Parameter(torch.zeros(num_experts, in_features))
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, in_features))
        self.experts = BlockMLP(in_features, out_features, num_experts, expert_width, activation, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        rows = x.reshape(-1, self.in_features)
        clean = decision_logits(rows, self.gate_weight, None)
        logits = clean
        if self.training:
            sigma = F.softplus(decision_logits(rows, self.noise_weight, None))
            logits = clean + torch.randn_like(clean) * sigma
        top = logits.topk(self.k, dim=1)
        gates = torch.softmax(top.values, dim=1)
        if self.training:
            if self.k < self.num_experts:
                load = gate.chosen_probability(clean, sigma, logits, self.k).sum(0)
            else:
                load = block_counts(top.indices, self.num_experts).to(gates.dtype)
            dense = torch.zeros_like(logits).scatter(1, top.indices, gates)
            self._record(gate.GateRouting(gates_BE=dense, load_E=load))
        backend = "eager" if self.training else self.inference_backend()
        output = self.experts.selected(rows, top.indices, gates, backend)
        return output.reshape(*x.shape[:-1], self.out_features)

    def inference_backend(self) -> str:
        """The backend that the next inference runs on."""
        return self.experts.backend(self.backend)

    def route(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (rows, k) experts of each row, without noise, best first."""
        logits = decision_logits(x.reshape(-1, self.in_features), self.gate_weight, None)
        return logits.topk(self.k, dim=1).indices

    def check_trainable(self) -> None:
        """Refuse k = 1 among several experts: the prediction loss gives such a gate no gradient."""
        if self.k == 1 and self.num_experts > 1:
            raise ValueError(
                "k is 1: the softmax of one number gives a noisy top-k gate no gradient from the prediction loss; "
                "train with k >= 2 (a Switch gate is the form that trains at k = 1)"
            )

    def reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        """(rows, in_features) -> (rows, out_features) of inference, one sample at a time in float64: the truth."""
        logits_BE, rows = x.double() @ self.gate_weight.double().T, []
        for row, logits in zip(x.double(), logits_BE, strict=True):
            chosen = logits.topk(self.k).indices
            blocks = self.experts.exact(chosen.tolist())
            rows.append(naive.moe(row[None], logits[chosen][None], self.k, blocks, self.experts.hidden)[0])
        return torch.stack(rows)

    def weights_read(self, x: Tensor) -> int:
        """The gate and the experts that are chosen."""
        return self.gate_weight.numel() + len(self.route(x).unique()) * self.experts.scalars

    @property
    def blocks(self) -> int:
        """Experts."""
        return self.num_experts

    @property
    def training_width(self) -> int:
        """E * e."""
        return self.num_experts * self.expert_width

    @property
    def training_size(self) -> int:
        """E * e + E: a gate's row counts as one neuron."""
        return self.training_width + self.num_experts

    @property
    def inference_width(self) -> int:
        """K * e."""
        return self.k * self.expert_width

    @property
    def inference_size(self) -> int:
        """K * e + E."""
        return self.inference_width + self.num_experts

    @property
    def flops_per_sample(self) -> int:
        """The gate and k experts."""
        experts = self.inference_width * (self.in_features + self.out_features)
        return 2 * (self.num_experts * self.in_features + experts)
