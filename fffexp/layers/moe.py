"""Mixtures of experts: noisy top-k, which the FFF paper compares with, and Switch, which trains at k = 1.

Shape suffixes: B samples, E experts, K experts chosen for a sample.
"""

from abc import abstractmethod
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fffexp.kernels import eager, naive
from fffexp.layers.base import BlockLayer, decision_logits, whole
from fffexp.layers.blocks import Activation, BlockMLP, Device
from fffexp.layers.random import normal_like
from fffexp.routing import blocks


class GatedExperts(BlockLayer):
    """A mixture of experts with a gate that is a product; k experts are evaluated for a sample, in training too."""

    shape = ("num_experts", "expert_width", "top_k")
    metrics = MappingProxyType({"gate_entropy": blocks.gate_entropy})

    def __init__(
        self, sizes: tuple[int, int, int, int, int], activation: Activation, dropout: float, **factory: Any
    ) -> None:
        in_features, out_features, num_experts, expert_width, top_k = sizes
        super().__init__(in_features, out_features)
        experts = whole("num_experts", num_experts)
        self.expert_width, self.top_k = whole("expert_width", expert_width), whole("top_k", top_k)
        if top_k > num_experts:
            raise ValueError(f"top_k is {top_k} but there are {num_experts} experts: lower top_k or raise num_experts")
        width = experts * self.expert_width, self.top_k * self.expert_width
        self._count(width, (experts, experts), experts, "num_experts or expert_width", dropout, **factory)
        self._trained = width[1], 2 * self.router_rows * experts
        self.vectorizable = not dropout  # a single run draws it for the chosen experts only
        self.gate_weight = nn.Parameter(torch.empty(experts, in_features, **factory))
        self.experts = BlockMLP((experts, self.expert_width, in_features, out_features), activation, dropout, **factory)

    @abstractmethod
    def _decide(self, rows: Tensor) -> tuple[Tensor, Tensor, Any]:
        """(B, in) -> (B, K) experts, (B, K) weights of their outputs, and in training what they leave as routing."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self._rows(x, self.gate_weight.dtype)
        expert_BK, gates_BK, routing = self._decide(rows)
        if self.vectorized:  # all experts, those that are not chosen with a gate of 0
            gates_BE = gates_BK.new_zeros(len(rows), self.num_experts).scatter(1, expert_BK, gates_BK)
            output = eager.mixture(rows, gates_BE, self.experts.tensors(), self.experts.hidden)
        else:
            output = self.experts.selected(rows, expert_BK, gates_BK, "eager" if self.training else self.backend)
        if self.training:
            self._record(routing, output)
        return output.reshape(*x.shape[:-1], self.out_features)

    def inference_backend(self) -> str:
        return self.experts.backend(self.backend)

    def route(self, x: Tensor) -> Tensor:  # without noise, best first
        logits = decision_logits(self._rows(x, self.gate_weight.dtype), self.gate_weight)
        return logits.topk(self.top_k, dim=1).indices

    def weights_read(self, x: Tensor) -> int:
        return self.gate_weight.numel() + len(self.route(x).unique()) * self.experts.scalars

    def _reset_narrow(self) -> None:
        """Draw a gate of a tenth of the usual variance, cut at two deviations (arXiv 2101.03961, section 2.4)."""
        std = (0.1 / self.in_features) ** 0.5
        nn.init.trunc_normal_(self.gate_weight, std=std, a=-2 * std, b=2 * std)


class NormalizedExperts(GatedExperts):
    """A mixture whose weights sum to 1 over the chosen experts: the weight of a single one does not train the gate."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        activation: Activation,
        dropout: float,
        trainable: bool,
        **factory: Any,
    ) -> None:
        super().__init__(sizes, activation, dropout, **factory)
        self.trainable = trainable

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.trainable and torch.is_grad_enabled():
            self.check_trainable()
        return super().forward(x)

    def check_trainable(self) -> None:
        if self.top_k == 1 and self.num_experts > 1:
            raise ValueError(
                "top_k is 1: a weight that is normalized over one expert is 1 and gives the gate no gradient from "
                "the prediction loss; train with top_k >= 2 (SwitchMoE, a Switch gate, trains at top_k = 1)"
            )


class NoisyTopKMoE(NormalizedExperts):
    """Sparsely gated mixture of experts (Shazeer et al., arXiv 1701.06538, section 2).

    Rows are dispatched to their k experts alone, in training too. Noise on the gate in training only.

    Args:
        num_experts: number of experts.
        expert_width: hidden neurons of one expert.
        top_k: experts evaluated for a sample, at most all.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation in training.
        trainable: whether it may be trained; with top_k = 1 of several experts the gate would not learn, so that a
            training pass raises, unless this is False (for timing).
    """

    aux_losses = MappingProxyType({"importance": blocks.importance, "load": blocks.load})
    default_aux_weights = MappingProxyType({"importance": 0.1})
    router_rows = 2
    baseline = "moe"

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
        super().__init__(sizes, activation, dropout, trainable, device=device, dtype=dtype)
        self.noise_weight = nn.Parameter(torch.empty_like(self.gate_weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.experts.reset_parameters()
        # all experts equally likely, and sigma ln 2
        for parameter in (self.gate_weight, self.noise_weight):
            nn.init.zeros_(parameter)

    def _decide(self, rows: Tensor) -> tuple[Tensor, Tensor, Any]:
        logits = clean = decision_logits(rows, self.gate_weight)
        if self.training:
            sigma = F.softplus(decision_logits(rows, self.noise_weight))
            logits = clean + normal_like(clean) * sigma
        top = logits.topk(self.top_k, dim=1)
        gates = torch.softmax(top.values, dim=1)  # over the chosen alone
        if not self.training:
            return top.indices, gates, None
        loads = blocks.chosen_probability(clean, sigma, logits, self.top_k).sum(0)
        dense = torch.zeros_like(logits).scatter(1, top.indices, gates)
        return top.indices, gates, blocks.GateRouting(dense, loads)

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        x = x.double()
        return naive.moe(x, x @ self.gate_weight.double().T, self.top_k, *self.experts.exact())


class SwitchMoE(GatedExperts):
    """Mixture of experts with a Switch gate (Fedus et al., arXiv 2101.03961, section 2.1).

    One expert a sample, its output times its softmax probability among all experts, which is how the gate learns.
    No noise, and no capacity: every row reaches its expert.

    Args:
        num_experts: number of experts.
        expert_width: hidden neurons of one expert.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation in training.
    """

    aux_losses = MappingProxyType({"load_balance": blocks.balance})
    default_aux_weights = MappingProxyType({"load_balance": 0.3})

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
        sizes = in_features, out_features, num_experts, expert_width, 1
        super().__init__(sizes, activation, dropout, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.experts.reset_parameters()
        self._reset_narrow()

    def _decide(self, rows: Tensor) -> tuple[Tensor, Tensor, Any]:
        logits = decision_logits(rows, self.gate_weight)
        top = logits.topk(1, dim=1)
        gates = torch.exp(top.values - logits.logsumexp(1, keepdim=True))  # softmax over all
        routing = blocks.SwitchRouting(torch.softmax(logits, dim=1), top.indices.squeeze(1)) if self.training else None
        return top.indices, gates, routing

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        x = x.double()
        return naive.switch(x, x @ self.gate_weight.double().T, *self.experts.exact())
