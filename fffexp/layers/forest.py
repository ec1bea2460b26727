"""Several trees beside each other, and a leaf that every sample passes."""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fffexp.layers.base import AuxiliaryLoss, FeedforwardLayer, whole
from fffexp.layers.blocks import Activation, Device
from fffexp.layers.ff import FF
from fffexp.layers.fff import FFF
from fffexp.layers.summed import SummedLayer


def _over_trees(function: AuxiliaryLoss, combine: Callable[[Tensor], Tensor]) -> AuxiliaryLoss:
    return lambda routings: combine(torch.stack([function(routing) for routing in routings]))


class Forest(SummedLayer):
    """Sum of the outputs of FFF layers of one shape and, if it has a width, of a dense FF.

    The dense part is the master leaf of Charalampopoulos et al., arXiv 2405.16836; its weight in the sum, trained
    there, is in the output weights here. Sizes are sums over the parts, auxiliary losses sums over the trees, and
    `routing` is a tuple with the routing of each tree. A master leaf counts as one expert, the last.

    Args:
        trees: how many.
        depth: of each tree.
        leaf_width: hidden neurons of one leaf.
        master_width: hidden neurons of the master leaf; 0 for none.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation in training.
        detach_router_input: as of FFF.
    """

    has_soft_mode = FFF.has_soft_mode
    aux_losses = MappingProxyType({name: _over_trees(loss, torch.sum) for name, loss in FFF.aux_losses.items()})
    default_aux_weights = FFF.default_aux_weights
    metrics = MappingProxyType({name: _over_trees(metric, torch.mean) for name, metric in FFF.metrics.items()})
    annealed_buffers = FFF.annealed_buffers

    def __init__(
        self,
        in_features: int,
        out_features: int,
        trees: int,
        depth: int,
        leaf_width: int,
        master_width: int = 0,
        activation: Activation = "relu",
        dropout: float = 0.0,
        detach_router_input: bool = False,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        trees, master = whole("trees", trees), whole("master_width", master_width, 0)
        width, leaves = whole("leaf_width", leaf_width), trees * 2 ** whole("depth", depth, 0)
        widths, deciding = (leaves * width + master, trees * width + master), (leaves - trees, trees * depth)
        fix = f"trees (it is {trees}), depth (it is {depth}) or leaf_width"
        self._count(widths, deciding, leaves + bool(master), fix, dropout, device=device, dtype=dtype)
        more: Any = {"activation": activation, "dropout": dropout, "device": device, "dtype": dtype}
        tree = partial(FFF, in_features, out_features, depth, width, detach_router_input=detach_router_input, **more)
        self.trees = nn.ModuleList(tree() for _ in range(trees))
        self.master = FF(in_features, out_features, master, **more) if master else None

    @property
    def parts(self) -> list[FeedforwardLayer]:
        return [*self.trees, *([self.master] if self.master else [])]

    @classmethod
    def sized(
        cls, in_features: int, out_features: int, depth: int, leaf_width: int, top_k: int = 1, **more: Any
    ) -> Self:  # two trees with half of the leaves each; one where there is one leaf
        more = {"trees": 2 if depth else 1} | more
        return super().sized(in_features, out_features, max(0, depth - 1), leaf_width, top_k, **more)

    def summands(self) -> list[FeedforwardLayer]:
        return [*([self.master] if self.master else []), *self.trees]

    def _decided(self) -> Any:
        return tuple(tree.routing for tree in self.trees)
