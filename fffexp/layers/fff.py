"""The Fast Feedforward layer."""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fffexp.kernels import eager, naive, operators, soft, sparse
from fffexp.kernels.naive import Blocks
from fffexp.layers.base import AuxiliaryLoss, BlockLayer, FeedforwardLayer, decision_logits, probability, whole
from fffexp.layers.blocks import Activation, BlockMLP, Device, parameters
from fffexp.layers.random import uniform_like
from fffexp.routing import tree
from fffexp.routing.blocks import balance, importance


class FFF(BlockLayer):
    """Fast Feedforward layer (Belcak and Wattenhofer, arXiv 2308.14711, section 3).

    A binary tree of linear nodes over 2^depth leaf networks: soft, the mixture of all leaves; hard, the one
    leaf that is reached by going right wherever a node's logit is >= 0.

    Args:
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
            None, for they look at all leaves; no region leaks.
        detach_router_input: the layers before this one get no gradient through the routing, for deep models: once
            routing has hardened, that gradient is almost always zero, and huge near a boundary.
    """

    peer = "fastfeedforward:FFF"
    shape = ("depth", "leaf_width")
    has_soft_mode = True
    aux_losses: Mapping[str, AuxiliaryLoss] = MappingProxyType(
        {
            "hardening_mean": tree.hardening_mean,
            "hardening_sum": tree.hardening_sum,
            "load_balance": balance,
            "importance": importance,
        }
    )
    default_aux_weights = MappingProxyType({"importance": 0.1})
    metrics: Mapping[str, AuxiliaryLoss] = MappingProxyType({"entropy": tree.hardening_mean})
    annealed_buffers = frozenset({"inverse_temperature"})

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
            raise ValueError(f"region_leak is {region_leak} but trained is {trained!r}: one leaf trains, none leaks")
        self.depth, self.leaf_width = whole("depth", depth, 0), whole("leaf_width", leaf_width)
        self._train_leaves(trained)
        self.region_leak, self.detach_router_input = probability("region_leak", region_leak), detach_router_input
        leaves, nodes = 2**self.depth, 2**self.depth - 1
        factory: Any = {"device": device, "dtype": dtype}
        width, fix = leaves * self.leaf_width, f"depth (it is {depth}) or leaf_width (it is {leaf_width})"
        self._count((width, self.leaf_width), (nodes, self.depth), leaves, fix, dropout, **factory)
        self.node_weight = nn.Parameter(torch.empty(nodes, in_features, **factory))
        self.node_bias = nn.Parameter(torch.empty(nodes, **factory))
        # a factor on the node logits; a buffer, so that soft evaluation survives saving
        self.register_buffer("inverse_temperature", torch.empty((), **factory))
        self.leaves = BlockMLP((leaves, self.leaf_width, in_features, out_features), activation, dropout, **factory)
        self.reset_parameters()

    def _train_leaves(self, trained: str) -> Self:
        self.trained, self.sparse_gradients = trained, trained != "all"
        self.vectorizable = not self.sparse_gradients
        if self.sparse_gradients:
            self.aux_losses, self.metrics = {}, {}
            # chosen_path computes the logits of its path again, with gradients
            self._trained = self.leaf_width, self.depth * (1 if trained == "chosen_leaf" else 3)
        return self

    def reset_parameters(self) -> None:
        for parameter in (self.node_weight, self.node_bias):  # as of torch.nn.Linear
            nn.init.uniform_(parameter, -(self.in_features**-0.5), self.in_features**-0.5)
        nn.init.ones_(self.inverse_temperature)
        self.leaves.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
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
        output = sparse.selected(rows, leaf, self.leaves.tensors(), self.leaves.hidden)
        if self.trained == "chosen_leaf":
            return output
        deciding = rows.detach() if self.detach_router_input else rows
        log_p = sparse.path_log_probability(deciding, leaf, self.depth, self.node_weight, self.node_bias, self._scale())
        return output * (log_p - log_p.detach()).exp().unsqueeze(1)

    def _soft(self, rows: Tensor) -> Tensor:
        scale = self._scale()
        leaking = self.training and self.region_leak > 0
        if not self.hard and not leaking and self.training_backend(rows) == "native":
            tensors, activation = self.leaves.tensors(), str(self.leaves.compiled_activation)
            output, logits, soft_weights = soft.soft_tree(
                rows, self.node_weight, self.node_bias, scale, tensors, activation, self.detach_router_input
            )
            output = output.view_as(output)  # for routing holds the node that made it
        else:
            deciding = rows.detach() if self.detach_router_input else rows
            logits = decision_logits(deciding, self.node_weight, self.node_bias)
            choices = torch.sigmoid(logits * scale)
            swap = uniform_like(choices) < self.region_leak if leaking else None
            soft_weights = weights = tree.leaf_mixture(_swapped(choices, swap), self.depth)
            if self.hard:
                weights = tree.leaf_mixture(_swapped(tree.straight_through(choices, logits), swap), self.depth)
            output = eager.mixture(rows, weights, self.leaves.tensors(), self.leaves.hidden)
        if self.training:
            self._record(tree.TreeRouting(logits, scale, soft_weights), output)
        return output

    def _scale(self) -> Tensor:
        # a copy: schedules set the buffer between a pass and its backward
        scale = self.inverse_temperature
        return scale.to(torch.promote_types(scale.dtype, torch.float32), copy=True)

    def inference_backend(self) -> str:
        return self.leaves.backend(self.backend)

    def training_backend(self, x: Tensor) -> str:
        if self.vectorized or self.sparse_gradients:
            return "eager" if self.vectorized else "sparse"
        # dropout and lower precision are left to torch
        float32 = x.dtype == self.leaves.hidden_weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        fits = float32 and self.leaves.compiled_activation
        return "native" if fits and self.inference_backend() == "native" else "eager"

    def route(self, x: Tensor) -> Tensor:
        rows = self._rows(x, self.node_weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.inference_backend() != "eager":
                return torch.ops.fffexp.route(rows, self.node_weight, self.node_bias).unsqueeze(1)
            return eager.route(rows, self.node_weight, self.node_bias, self.depth).unsqueeze(1)

    def dense_blocks(self) -> tuple[Blocks, nn.Module]:
        return self.leaves.tensors(), self.leaves.hidden[0]

    @torch.no_grad()
    def set_router(self, x: Tensor, y: Tensor, split: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        node_B = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for node in range(len(self.node_weight)):  # from the root down, each by the rows that reach it
            mine = (node_B == node).nonzero().squeeze(1)
            if len(mine) > 1:
                self.node_weight[node], self.node_bias[node] = split(x[mine], y[mine])
            logits = x[mine] @ self.node_weight[node] + self.node_bias[node]
            node_B[mine] = 2 * node + 1 + (logits >= 0)

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        x, nodes = x.double(), (self.node_weight.double(), self.node_bias.double())
        if decisions == "hard":
            return naive.fff_hard(x, *nodes, self.depth, *self.leaves.exact())
        logits = nn.functional.linear(x, *nodes) * self.inverse_temperature.double()
        return naive.fff_soft(x, logits, self.depth, *self.leaves.exact())

    def weights_read(self, x: Tensor) -> int:
        leaf = self.route(x)
        nodes = sum(len((leaf >> levels).unique()) for levels in range(1, self.depth + 1))
        return nodes * (self.in_features + 1) + len(leaf.unique()) * self.leaves.scalars

    def training_forms(self) -> dict[str, FeedforwardLayer]:
        forms = ("chosen_leaf", "chosen_path") if self.trained == "all" else ()
        return {trained: copy.copy(self)._train_leaves(trained) for trained in forms}  # on the same parameters


def _swapped(choices: Tensor, swap: Tensor | None) -> Tensor:
    return choices if swap is None else torch.where(swap, 1 - choices, choices)
