"""The mixture of experts whose experts choose their samples. Suffixes: B samples, E experts, C samples of an expert."""

from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from fffexp.kernels import eager, naive
from fffexp.layers.base import decision_logits, recomputing
from fffexp.layers.blocks import Activation, Device
from fffexp.layers.moe import GatedExperts
from fffexp.routing import blocks


class ExpertChoiceMoE(GatedExperts):
    """Mixture of experts with expert choice (Zhou et al., arXiv 2202.09368, section 3.2).

    In training each expert takes the B * top_k / E samples of the batch, rounded up, that give it the largest softmax
    weight among the experts, and its output is multiplied by that weight. All loads are equal, without a loss; a sample
    is taken by any number of experts, also by none, which gives 0.

    Not for causal language models: the choice compares all rows, so those of later tokens have a say in what a token
    gets, and the training loss is too good (arXiv 2408.15664, section 5.2).

    In evaluation an expert takes a sample whose weight reaches `cutoff`, a running mean of the smallest weight that it
    took from a training batch: as many samples as in training if the data are like it, and no row depends on another.
    The paper leaves small batches open (section 6), where by its own rule every expert would take a single row; such
    thresholds are of expert threshold routing (arXiv 2603.11535). Sizes and FLOPs are those of `top_k` experts, which
    is the average. Before the first training pass each sample takes its `top_k` experts of the largest weight.

    Args:
        num_experts: number of experts.
        expert_width: hidden neurons of one expert.
        top_k: experts of a sample on average (the paper's capacity factor), at most all.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation in training.
    """

    metrics = MappingProxyType({"gate_entropy": blocks.gate_entropy, "dropped_samples": blocks.dropped_samples})

    cutoff: Tensor
    batches: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        expert_width: int,
        top_k: int = 2,
        activation: Activation = "relu",
        dropout: float = 0.0,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = in_features, out_features, num_experts, expert_width, top_k
        super().__init__(sizes, activation, dropout, device=device, dtype=dtype)
        self.vectorizable = False  # each seed has its own buffers
        self.register_buffer("cutoff", torch.empty(num_experts, device=device, dtype=dtype))
        self.register_buffer("batches", torch.empty((), dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.experts.reset_parameters()
        self._reset_narrow()
        self.cutoff.zero_()
        self.batches.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rows = self._rows(x, self.gate_weight.dtype)
        capacity = min(len(rows), -(-len(rows) * self.top_k // self.num_experts))
        weights_BE = torch.softmax(decision_logits(rows, self.gate_weight), dim=1)
        top = weights_BE.T.topk(capacity, dim=1)
        if len(rows) and not recomputing():
            self._remember(top.values[:, -1])
        output = eager.chosen_samples(rows, top.indices, top.values, self.experts.tensors(), self.experts.hidden)
        taken_B = blocks.block_counts(top.indices, len(rows))
        self._record(blocks.ExpertChoiceRouting(weights_BE, taken_B), output)
        return output.reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def _remember(self, smallest_E: Tensor) -> None:
        self.batches += 1
        share = (1 / self.batches).clamp_min(0.05)  # of all batches while they are few, then of some 20
        self.cutoff.lerp_(smallest_E.to(self.cutoff.dtype), share.to(self.cutoff.dtype))

    def _decide(self, rows: Tensor) -> tuple[Tensor, Tensor, Any]:  # in evaluation
        weights_BE = torch.softmax(decision_logits(rows, self.gate_weight), dim=1)
        if not self.batches:
            top = weights_BE.topk(self.top_k, dim=1)
            return top.indices, top.values, None
        taken_BE = weights_BE >= self.cutoff
        most = max(1, int(taken_BE.sum(1).max())) if len(rows) else 1
        top = torch.where(taken_BE, weights_BE, 0).topk(most, dim=1)
        # where fewer took the sample, its first again with a weight of 0: no others are read
        return torch.where(top.values > 0, top.indices, top.indices[:, :1]), top.values, None

    def route(self, x: Tensor) -> Tensor:  # best first, and again where fewer took the sample than another
        return self._decide(self._rows(x, self.gate_weight.dtype))[0]

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        x = x.double()
        logits, experts = x @ self.gate_weight.double().T, self.experts.exact()
        if not self.batches:
            return naive.switch(x, logits, *experts, self.top_k)
        return naive.expert_choice(x, logits, self.cutoff.double(), *experts)
