"""The Fast Feedforward layer."""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fffexp.kernels import eager, naive, operators, soft
from fffexp.kernels import sparse as sparse_kernels
from fffexp.layers.base import (
    AuxiliaryLoss,
    DenseBlocks,
    FeedforwardLayer,
    at_least_float32,
    check_fits,
    decision_logits,
    probability,
    whole,
)
from fffexp.layers.blocks import Activation, BlockMLP, Device, parameters
from fffexp.layers.random import uniform_like
from fffexp.routing import tree


class FFF(FeedforwardLayer):
    """Fast Feedforward layer (Belcak and Wattenhofer, arXiv 2308.14711, section 3).

    A binary tree of linear nodes over 2^depth leaf networks: soft, the mixture of all leaves; hard, the one
    leaf that is reached by going right wherever a node's logit is >= 0.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        depth: levels of decisions; 0 is an FF of width leaf_width.
        leaf_width: hidden neurons of one leaf.
        region_leak: probability, per sample and node, that a training pass swaps the two children
            ("randomized child transposition", section 3).
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation of a leaf in training.
        trained: "all" leaves, or only the leaf that hard routing chooses, at a cost that does not grow with depth, for
            trees that have hardened: "chosen_leaf" leaves the nodes as they are (h = infinity, section 4.3);
            "chosen_path" multiplies the output by p / stopgrad(p), p the product of the choices on the path, which
            moves the nodes by a biased estimate: the other leaves' outputs have no say. Gradients are sparse tensors:
            use LazyAdamW or SGD without momentum. There are no auxiliary losses in these modes and `routing` stays
            None, for they look at all leaves.
        detach_router_input: the layers before this one get no gradient through the routing, for deep models: once
            routing has hardened, that gradient is almost always zero, and huge near a boundary.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: depth below 0, a size below 1 or no whole number, no activation, an unknown value of trained, a
            chosen leaf together with region_leak, or weights that do not fit in memory.
    """

    peer: ClassVar[str] = "fastfeedforward:FFF"
    shape: ClassVar[tuple[str, ...]] = ("depth", "leaf_width")

    has_soft_mode: ClassVar[bool] = True
    aux_losses: Mapping[str, AuxiliaryLoss] = MappingProxyType(
        {
            "hardening_mean": tree.hardening_mean,
            "hardening_sum": tree.hardening_sum,
            "load_balance": tree.balance,
            "importance": tree.leaf_importance,
        }
    )
    default_aux_weights: Mapping[str, float] = MappingProxyType({"importance": 0.1})
    metrics: Mapping[str, AuxiliaryLoss] = MappingProxyType({"entropy": tree.hardening_mean})
    annealed_buffers: ClassVar[frozenset[str]] = frozenset({"inverse_temperature"})

    inverse_temperature: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        leaf_width: int,
        region_leak: float = 0.0,
        activation: Activation = "relu",
        dropout: float = 0.0,
        trained: Literal["all", "chosen_leaf", "chosen_path"] = "all",
        detach_router_input: bool = False,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        if trained not in ("all", "chosen_leaf", "chosen_path"):
            raise ValueError(f"trained is {trained!r}; it must be 'all', 'chosen_leaf' or 'chosen_path'")
        if trained != "all" and region_leak:
            raise ValueError(
                f"region_leak is {region_leak} but trained is {trained!r}: one leaf is trained, none leaks"
            )
        self.trained = trained
        if trained != "all":
            self.aux_losses, self.metrics = {}, {}
        self.depth = whole("depth", depth, 0)
        self.leaf_width = whole("leaf_width", leaf_width)
        self.region_leak = probability("region_leak", region_leak)
        self.detach_router_input = detach_router_input
        probability("dropout", dropout)
        check_fits(
            tree_scalars(in_features, out_features, depth, leaf_width),
            f"lower depth (it is {depth}) or leaf_width (it is {leaf_width})",
            device,
            dtype,
        )
        self.node_weight = nn.Parameter(torch.empty(2**depth - 1, in_features, device=device, dtype=dtype))
        self.node_bias = nn.Parameter(torch.empty(2**depth - 1, device=device, dtype=dtype))
        # a factor on the node logits; a buffer, so that soft evaluation survives saving
        self.register_buffer("inverse_temperature", torch.empty((), device=device, dtype=dtype))
        self.leaves = BlockMLP(in_features, out_features, 2**depth, leaf_width, activation, dropout, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As of torch.nn.Linear; an inverse temperature of 1."""
        for parameter in (self.node_weight, self.node_bias):
            nn.init.uniform_(parameter, -(self.in_features**-0.5), self.in_features**-0.5)
        nn.init.ones_(self.inverse_temperature)
        self.leaves.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        nodes = parameters(self, ("node_weight", "node_bias"))
        rows = self._rows(x, nodes[0].dtype)
        if self.training and self.sparse_gradients and self.routing_mode != "soft":
            output = self._sparse(rows)
        elif self.training or not self.hard or self.vectorized:
            output = self._soft(rows)
        elif arguments := self._modules["leaves"].compiled(self.backend):  # type: ignore[union-attr,operator] # self.leaves takes 0.7 us
            output = operators.fff(rows, *nodes, *arguments)
        else:
            output = self.leaves.selected(rows, self.route(rows))
        return output if x.dim() == 2 else output.reshape(*x.shape[:-1], self.out_features)

    def _sparse(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            leaf = self.route(rows).squeeze(1)
        output = sparse_kernels.selected(rows, leaf, self.leaves.tensors(), self.leaves.hidden)
        if self.trained == "chosen_leaf":
            return output
        nodes = self.node_weight, self.node_bias
        log_p = sparse_kernels.path_log_probability(self._deciding(rows), leaf, self.depth, *nodes, self._scale())
        return output * (log_p - log_p.detach()).exp().unsqueeze(1)

    def _soft(self, rows: Tensor) -> Tensor:
        scale = self._scale()
        leaking = self.training and self.region_leak > 0
        if not self.hard and not leaking and self.training_backend(rows) == "native":
            nodes, leaves = (self.node_weight, self.node_bias), self.leaves
            assert leaves.compiled_activation is not None
            output, logits, soft_weights = soft.soft_tree(
                rows, *nodes, scale, leaves.tensors(), leaves.compiled_activation, self.detach_router_input
            )
            output = output.view_as(output)  # for routing holds the node that made it
        else:
            logits = decision_logits(self._deciding(rows), self.node_weight, self.node_bias)
            choices = torch.sigmoid(logits * scale)
            swap = uniform_like(choices) < self.region_leak if leaking else None
            soft_weights = weights = tree.leaf_mixture(_swapped(choices, swap), self.depth)
            if self.hard:
                weights = tree.leaf_mixture(_swapped(tree.straight_through(choices, logits), swap), self.depth)
            output = self.leaves.mixture(rows, weights)
        if self.training:
            self._record(tree.TreeRouting(logits, scale, soft_weights), output)
        return output

    def _scale(self) -> Tensor:
        # a copy: schedules set the buffer between a pass and its backward
        return at_least_float32(self.inverse_temperature).clone()

    def _deciding(self, rows: Tensor) -> Tensor:
        """The rows as the nodes see them."""
        return rows.detach() if self.detach_router_input else rows

    def inference_backend(self) -> str:
        """The backend that the next hard inference runs on."""
        return self.leaves.backend(self.backend)

    def training_backend(self, x: Tensor) -> str:
        """The backend that the next training pass of x runs on."""
        if self.vectorized:
            return "eager"
        return "sparse" if self.sparse_gradients else self.leaves.soft_backend(self.backend, x)

    @property
    def vectorizable(self) -> bool:
        """Unless its gradients are sparse."""
        return not self.sparse_gradients

    @property
    def sparse_gradients(self) -> bool:
        """Whether it trains the chosen leaves alone."""
        return self.trained != "all"

    def route(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (rows, 1) leaf of each row."""
        rows = self._rows(x, self.node_weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.inference_backend() != "eager":
                return torch.ops.fffexp.route(rows, self.node_weight, self.node_bias).unsqueeze(1)
            return eager.route(rows, self.node_weight, self.node_bias, self.depth).unsqueeze(1)

    def dense_blocks(self) -> DenseBlocks:
        """The leaves."""
        return DenseBlocks(self.leaves.tensors(), self.leaves.hidden[0])

    @torch.no_grad()
    def set_router(self, x: Tensor, y: Tensor, split: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Set the nodes from the root down, each by the rows that reach it."""
        node_B = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for node in range(len(self.node_weight)):
            mine = (node_B == node).nonzero().squeeze(1)
            if len(mine) > 1:
                self.node_weight[node], self.node_bias[node] = split(x[mine], y[mine])
            logits = x[mine] @ self.node_weight[node] + self.node_bias[node]
            node_B[mine] = 2 * node + 1 + (logits >= 0)

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        """(rows, in_features) -> (rows, out_features) of inference, one sample at a time in float64: the truth."""
        x, weight, bias, activation = (
            x.double(),
            self.node_weight.double(),
            self.node_bias.double(),
            self.leaves.exact_hidden,
        )
        if decisions == "soft":
            logits = (x @ weight.T + bias) * self.inverse_temperature.double()
            return naive.fff_soft(x, logits, self.depth, self.leaves.exact(), activation)
        leaves = [naive.fff_leaf(row, weight, bias, self.depth) for row in x]
        rows = [naive.block(row, 0, self.leaves.exact([leaf]), activation) for row, leaf in zip(x, leaves, strict=True)]
        return torch.stack(rows)

    def weights_read(self, x: Tensor) -> int:
        """The nodes on the paths and the leaves that are reached."""
        leaf = self.route(x)
        nodes = sum(len((leaf >> levels).unique()) for levels in range(1, self.depth + 1))
        return nodes * (self.in_features + 1) + len(leaf.unique()) * self.leaves.scalars

    @property
    def num_experts(self) -> int:
        """Leaves."""
        return 2**self.depth

    @property
    def training_width(self) -> int:
        """2^d * l."""
        return self.num_experts * self.leaf_width

    @property
    def training_size(self) -> int:
        """2^d - 1 + 2^d * l."""
        return self.num_experts - 1 + self.training_width

    @property
    def inference_width(self) -> int:
        """L: the neurons of one leaf."""
        return self.leaf_width

    @property
    def inference_size(self) -> int:
        """D + l: the nodes on the path and one leaf."""
        return self.depth + self.leaf_width

    @property
    def flops_per_sample(self) -> int:
        """The nodes on the path and one leaf."""
        return 2 * (self.depth * self.in_features + self.leaf_width * (self.in_features + self.out_features))

    def training_forms(self) -> dict[str, FeedforwardLayer]:
        """Training of the chosen leaves only, both ways."""
        forms: dict[str, FeedforwardLayer] = {}
        for trained in ("chosen_leaf", "chosen_path") if self.trained == "all" else ():
            form = copy.copy(self)  # with the same parameters
            form.trained, form.aux_losses, form.metrics = trained, {}, {}
            forms[trained] = form
        return forms

    @property
    def training_flops_per_sample(self) -> int:
        """All leaves and nodes; or one leaf and its path, whose logits chosen_path computes again, with gradients."""
        if self.trained == "all":
            return super().training_flops_per_sample
        return self._training_flops(self.leaf_width, self.depth * (1 if self.trained == "chosen_leaf" else 3))


def _swapped(choices: Tensor, swap: Tensor | None) -> Tensor:
    return choices if swap is None else torch.where(swap, 1 - choices, choices)


def tree_scalars(in_features: int, out_features: int, depth: int, leaf_width: int) -> int:
    """Weights of a tree."""
    per_leaf = leaf_width * (in_features + out_features + 1) + out_features
    return (2**depth - 1) * (in_features + 1) + 2**depth * per_leaf
