"""What mixtures of experts have in common: experts, a gate that is a product, and dispatch."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fffexp.kernels import naive
from fffexp.layers.base import FeedforwardLayer, check_fits, decision_logits, probability, whole
from fffexp.layers.blocks import Activation, BlockMLP, Device


class GatedExperts(FeedforwardLayer):
    """A mixture of experts that evaluates k of them for a sample, in training too.

    Args and errors: those of its children.
    """

    shape: ClassVar[tuple[str, ...]] = ("num_experts", "expert_width", "top_k")
    gate_products: ClassVar[int] = 1  # rows of the input's width that an expert has in the gate

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        expert_width: int,
        top_k: int,
        activation: Activation,
        dropout: float,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(in_features, out_features)
        whole("num_experts", num_experts)
        self.expert_width = whole("expert_width", expert_width)
        self.top_k = whole("top_k", top_k)
        if top_k > num_experts:
            raise ValueError(f"top_k is {top_k} but there are {num_experts} experts: lower top_k or raise num_experts")
        self.dropout = probability("dropout", dropout)
        per_expert = self.gate_products * in_features + expert_width * (in_features + out_features + 1) + out_features
        check_fits(num_experts * per_expert, "lower num_experts or expert_width", device, dtype)
        self.gate_weight = nn.Parameter(torch.empty(num_experts, in_features, device=device, dtype=dtype))
        self.experts = BlockMLP(
            in_features, out_features, num_experts, expert_width, activation, dropout, device, dtype
        )

    @abstractmethod
    def gates(self, chosen_BK: Tensor, logits_BE: Tensor) -> Tensor:
        """(B, K) logits of the chosen, (B, E) all logits -> (B, K) weight of each chosen expert's output."""

    def dispatch(self, rows: Tensor, expert_BK: Tensor, gates_BK: Tensor) -> Tensor:
        """(B, in), (B, K), (B, K) -> (B, out): each row through its own experts alone, summed by gate."""
        if self.vectorized:  # all experts, those that are not chosen with a gate of 0
            gates_BE = gates_BK.new_zeros(len(rows), self.num_experts).scatter(1, expert_BK, gates_BK)
            return self.experts.mixture(rows, gates_BE)
        backend = "eager" if self.training else self.inference_backend()
        return self.experts.selected(rows, expert_BK, gates_BK, backend)

    def inference_backend(self) -> str:
        """The backend that the next inference runs on."""
        return self.experts.backend(self.backend)

    @property
    def vectorizable(self) -> bool:
        """Unless there is dropout: a single run draws it for the chosen experts only."""
        return not self.dropout

    def route(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (rows, k) experts of each row, without noise, best first."""
        logits = decision_logits(self._rows(x, self.gate_weight.dtype), self.gate_weight, None)
        return logits.topk(self.top_k, dim=1).indices

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        """(rows, in_features) -> (rows, out_features) of inference, one sample at a time in float64: the truth."""
        logits_BE, rows, hidden = x.double() @ self.gate_weight.double().T, [], self.experts.exact_hidden
        for row, logits in zip(x.double(), logits_BE, strict=True):
            top = logits.topk(self.top_k)
            blocks = self.experts.exact(top.indices.tolist())
            gates = self.gates(top.values[None], logits[None])[0]
            rows.append(naive.weighted(row, range(self.top_k), gates, blocks, hidden))
        return torch.stack(rows)

    def weights_read(self, x: Tensor) -> int:
        """The gate and the experts that are chosen."""
        return self.gate_weight.numel() + len(self.route(x).unique()) * self.experts.scalars

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.gate_weight)

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
        return self.top_k * self.expert_width

    @property
    def inference_size(self) -> int:
        """K * e + E."""
        return self.inference_width + self.num_experts

    @property
    def flops_per_sample(self) -> int:
        """The gate and k experts."""
        experts = self.inference_width * (self.in_features + self.out_features)
        return 2 * (self.num_experts * self.in_features + experts)

    @property
    def trains_all_experts(self) -> bool:
        """Only the chosen."""
        return False

    @property
    def training_flops_per_sample(self) -> int:
        """The chosen experts, and what the gate is made of."""
        return self._training_flops(self.inference_width, 2 * self.gate_products * self.num_experts)
