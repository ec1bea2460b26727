"""The mixture of experts of DeepSeek-V3: sigmoid scores, and biases that balance the loads without a loss.

Shape suffixes: B samples, E experts, K experts chosen for a sample.
"""

from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fffexp.kernels import naive
from fffexp.layers.base import decision_logits, recomputing
from fffexp.layers.blocks import Activation, Device
from fffexp.layers.moe import NormalizedExperts
from fffexp.routing import blocks


class SigmoidMoE(NormalizedExperts):
    """Top-k mixture of experts with sigmoid scores (DeepSeek-V3, arXiv 2412.19437, equations 13 to 16).

    A sample takes the experts of the largest score plus bias; its weights are the scores alone, normalized over those.
    The bias of each expert moves by `bias_update_rate` after a training step: up where its load was below the mean,
    down where it was above (arXiv 2408.15664, algorithm 1). There is no noise, no capacity, no shared expert, and no
    loss, neither theirs over sequences.

    A layer sees no optimizer step, so the loads of all training passes add up until one finds that the gate's weights
    have changed; it moves the biases before it chooses. So micro-batches whose gradients accumulate count as one step,
    and what a checkpoint computes again takes the same experts. The biases are buffers of each seed: seeds train one
    after another. Under DistributedDataParallel those of the first process are sent to all, by its rows.

    Args:
        num_experts: number of experts.
        expert_width: hidden neurons of one expert.
        top_k: experts evaluated for a sample, at most all.
        bias_update_rate: how far a bias moves in a step.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation in training.
        trainable: as of NoisyTopKMoE.
    """

    metrics = MappingProxyType({"gate_entropy": blocks.gate_entropy, "max_violation": blocks.max_violation})

    bias_moves: Tensor
    load: Tensor
    seen_gate: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        expert_width: int,
        top_k: int = 2,
        bias_update_rate: float = 0.001,
        activation: Activation = "relu",
        dropout: float = 0.0,
        trainable: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = in_features, out_features, num_experts, expert_width, top_k
        super().__init__(sizes, activation, dropout, trainable, device=device, dtype=dtype)
        if not 0 <= bias_update_rate < float("inf"):
            raise ValueError(f"bias_update_rate is {bias_update_rate}; it must be at least 0, and finite")
        self.bias_update_rate, self.vectorizable = bias_update_rate, False
        # whole numbers, which no lower precision rounds: moves up minus moves down, and rows since the last step
        for name in ("bias_moves", "load"):
            self.register_buffer(name, torch.empty(num_experts, dtype=torch.long, device=device))
        self.register_buffer("seen_gate", torch.empty_like(self.gate_weight, requires_grad=False), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.experts.reset_parameters()
        self._reset_narrow()
        for buffer in (self.bias_moves, self.load, self.seen_gate):
            buffer.zero_()

    @property
    def bias(self) -> Tensor:
        """(E,) what is added to the scores for the choice."""
        return self.bias_moves * self.bias_update_rate

    def _choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # logits (B, E) and experts (B, K), best first
        logits = decision_logits(rows, self.gate_weight)
        return logits, (torch.sigmoid(logits) + self.bias.to(logits.dtype)).topk(self.top_k, dim=1).indices

    def _decide(self, rows: Tensor) -> tuple[Tensor, Tensor, Any]:
        if self.training:
            self._balance()
        logits, expert_BK = self._choose(rows)
        # scores over their sum, also where they are too small for a number
        gates_BK = torch.softmax(F.logsigmoid(logits.gather(1, expert_BK)), dim=1)
        if not self.training:
            return expert_BK, gates_BK, None
        load_E = blocks.block_counts(expert_BK, self.num_experts)
        if not recomputing():
            self.load += load_E
        dense = torch.zeros_like(logits).scatter(1, expert_BK, gates_BK)
        return expert_BK, gates_BK, blocks.GateRouting(dense, load_E.to(logits.dtype))

    @torch.no_grad()
    def _balance(self) -> None:
        """Move the biases by the loads of the last step, if the gate has changed since they were begun."""
        stepped = (self.gate_weight != self.seen_gate).any().long()
        self.bias_moves += stepped * torch.sign(self.load.sum() - self.num_experts * self.load)
        self.load *= 1 - stepped
        self.seen_gate.copy_(self.gate_weight)

    def route(self, x: Tensor) -> Tensor:
        return self._choose(self._rows(x, self.gate_weight.dtype))[1]

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        x = x.double()
        logits, bias = x @ self.gate_weight.double().T, self.bias.double()
        return naive.sigmoid_moe(x, logits, bias, self.top_k, *self.experts.exact())
