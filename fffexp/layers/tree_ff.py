"""The tree whose nodes are the neurons."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fffexp.kernels import gathered, naive, operators, trees
from fffexp.kernels.naive import Trees
from fffexp.layers.base import AuxiliaryLoss, BlockLayer, FeedforwardLayer, decision_logits, whole
from fffexp.layers.blocks import Activation, Device, compiled, make_activation, parameters, reset_parts
from fffexp.layers.random import Dropout
from fffexp.routing import paths

# Neurons for each one on a path, above which training along the paths is faster: by compiled products, by plain torch.
COMPILED_SHARE, PLAIN_SHARE = 8, 100


class TreeFF(BlockLayer):
    """Trees whose nodes are the neurons (UltraFastBERT: Belcak and Wattenhofer, arXiv 2311.10770).

    A neuron's pre-activation is its output's argument and its decision: the sample goes on to the right child where it
    is >= 0. The output is the sum over the neurons on the paths, one path a tree, of activation times output weight.
    Routing is hard in training too: neurons off the path get no gradient, decisions none but through the neurons' own
    outputs. There is no soft mode.

    Initialisation, biases of the neurons and the activation are those of the authors' code
    (github.com/pbelcak/UltraFastBERT, training/cramming/architectures/fff.py; its depth counts a level less). It has no
    output bias; here there is one, as in all layers, and it starts at zero. Of the paper itself the abstract and the
    first lines of the introduction were read. Of "Dynamic sparsity in tree-structured feed-forward layers at scale"
    (arXiv 2604.08565) the abstract alone: its "auto-pruning", paths that fall out of use where the activation is not
    symmetric, shows in the usage of paths (`routing/used_leaves`, `stability/dead_leaves`); its ways to keep trees
    balanced are unread and not here.

    Args:
        depth: levels; a tree has 2^depth - 1 neurons, and depth of them are on a path.
        num_trees: trees beside each other.
        activation: class, instance or name ("gelu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping the activation of a neuron on a path in training.
    """

    shape = ("depth", "num_trees")
    aux_losses: Mapping[str, AuxiliaryLoss] = MappingProxyType({"node_balance": paths.node_balance})
    metrics: Mapping[str, AuxiliaryLoss] = aux_losses

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        num_trees: int = 1,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.depth, self.num_trees = whole("depth", depth), whole("num_trees", num_trees)
        factory: Any = {"device": device, "dtype": dtype}
        neurons, fix = 2**self.depth - 1, f"depth (it is {depth}) or num_trees (it is {num_trees})"
        widths = num_trees * neurons, num_trees * depth
        self._count(widths, (0, 0), 1, fix, dropout, **factory)  # one output bias
        self.num_experts = num_trees * 2 ** (depth - 1)  # paths
        # by products with all neurons, of which those on the paths are taken, or with these alone: the same result
        self.trained: Literal["auto", "all", "paths"] = "auto"
        self.node_weight = nn.Parameter(torch.empty(num_trees, neurons, in_features, **factory))
        self.node_bias = nn.Parameter(torch.empty(num_trees, neurons, **factory))
        self.output_weight = nn.Parameter(torch.empty(num_trees, neurons, out_features, **factory))
        self.output_bias = nn.Parameter(torch.empty(out_features, **factory))
        self.hidden = nn.Sequential(make_activation(activation), Dropout(dropout)).to(device, dtype)
        self.reset_parameters()

    def _compiled(self, training: bool = True) -> bool:
        """Whether products along the paths are; the backend asked for is that of inference."""
        return (training or self.backend != "eager") and gathered.compiles(self.node_weight)

    def _along_paths(self, training: bool = True) -> bool:
        if self.vectorized or self.trained != "auto":
            return self.trained == "paths" and not self.vectorized
        share = COMPILED_SHARE if self._compiled(training) else PLAIN_SHARE
        return self.training_width > share * self.inference_width

    @property
    def trains_all_experts(self) -> bool:
        return not self._along_paths()

    @property
    def training_flops_per_sample(self) -> int:
        walked = self.inference_width * self.in_features if self._along_paths() else 0
        width = self.inference_width if self._along_paths() else self.training_width
        return 2 * (width * (2 * self.in_features + 3 * self.out_features) + walked)

    def reset_parameters(self) -> None:
        for parameter, fan_in in (
            (self.node_weight, self.in_features),
            (self.node_bias, self.in_features),
            (self.output_weight, self.inference_width),
        ):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        nn.init.zeros_(self.output_bias)
        reset_parts(self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        weights = parameters(self, Trees._fields)
        rows, arguments = self._rows(x, weights[0].dtype), None
        if not (self.training or self.vectorized):
            arguments = compiled(self.backend, weights, self._modules["hidden"])  # type: ignore[arg-type] # self.hidden takes 0.7 us
        output = trees.tree_ff(rows, *arguments) if arguments else self._evaluate(rows)
        return output if x.dim() == 2 else output.reshape(*x.shape[:-1], self.out_features)

    def _evaluate(self, rows: Tensor) -> Tensor:
        *others, b2 = self.trees
        w1, b1, w2 = (tensor.flatten(0, 1) for tensor in others)
        dense, compiled = not self._along_paths(self.training), self._compiled(self.training)
        if dense:
            logits_BN = decision_logits(rows, w1, b1)
            path_BT = paths.descend(logits_BN.detach().unflatten(1, (self.num_trees, -1)))
        else:
            path_BT = self._paths(rows)
        neuron_BK = paths.path_neurons(path_BT, self.depth)
        if dense:
            logits_BK = logits_BN.gather(1, neuron_BK)
        else:
            logits_BK = gathered.gathered_dots(rows, neuron_BK, w1, compiled) + b1[neuron_BK]
            logits_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
        h_BK = self.hidden(logits_BK).to(w2.dtype)
        if dense:
            h_BN = h_BK.new_zeros(len(rows), len(w2)).scatter(1, neuron_BK, h_BK)
            output = F.linear(h_BN, w2.mT, b2)
        else:
            output = gathered.gathered_sum(h_BK, neuron_BK, w2, compiled) + b2
            if torch.is_autocast_enabled(device := rows.device.type):  # as products with all are cast
                output = output.to(torch.get_autocast_dtype(device))
        if self.training:
            self._record(paths.PathRouting(logits_BK.unflatten(1, (self.num_trees, -1)), path_BT), output)
        return output

    @property
    def trees(self) -> Trees:
        """The neurons' parameters."""
        return Trees(*parameters(self, Trees._fields))

    def _paths(self, rows: Tensor) -> Tensor:
        # whatever the activation: it decides nothing
        walked = self.backend != "eager" and operators.backend_of(self.node_weight, "identity")
        return trees.walk(rows, self.node_weight, self.node_bias, bool(walked))

    def inference_backend(self) -> str:
        served = compiled(self.backend, parameters(self, Trees._fields), self.hidden)
        if served:
            return str(operators.backend_of(served[0], served[-1]))
        return "native" if self._along_paths(False) and self._compiled(False) else "eager"  # in parts

    def training_backend(self, x: Tensor) -> str:
        return "native" if self._along_paths() and self._compiled() else "eager"

    def route(self, x: Tensor) -> Tensor:
        first = torch.arange(self.num_trees, device=x.device) * 2 ** (self.depth - 1)
        return self._paths(self._rows(x, self.node_weight.dtype)) + first

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        return naive.tree_ff(x.double(), self.trees, copy.deepcopy(self.hidden).double().eval())

    def weights_read(self, x: Tensor) -> int:
        neurons = paths.path_neurons(self._paths(self._rows(x, self.node_weight.dtype)), self.depth).unique()
        scalars = self.in_features + 1 + self.out_features
        return len(neurons) * scalars + self.out_features + sum(p.numel() for p in self.hidden.parameters())

    @classmethod
    def sized(
        cls, in_features: int, out_features: int, depth: int, leaf_width: int, top_k: int = 1, **more: Any
    ) -> Self:  # so many trees as a leaf is wide, each of one neuron less than there are leaves
        more = {"num_trees": leaf_width} | more
        return super().sized(in_features, out_features, max(1, depth), leaf_width, top_k, **more)

    def training_forms(self) -> dict[str, FeedforwardLayer]:
        other = copy.copy(self)  # on the same parameters
        other.trained = "all" if self._along_paths() else "paths"
        return {other.trained: other}
