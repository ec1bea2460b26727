"""Several trees beside each other, and a leaf that every sample passes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from fffexp.layers.base import AuxiliaryLoss, FeedforwardLayer, check_fits, whole
from fffexp.layers.blocks import Activation, Device
from fffexp.layers.ff import FF
from fffexp.layers.fff import FFF, tree_scalars


def _over_trees(function: AuxiliaryLoss, combine: Callable[[Tensor], Tensor]) -> AuxiliaryLoss:
    return lambda routings: combine(torch.stack([function(routing) for routing in routings]))


class Forest(FeedforwardLayer):
    """Sum of the outputs of FFF layers of one shape and, if it has a width, of a dense FF.

    The dense part is the master leaf of Charalampopoulos et al., arXiv 2405.16836; its weight in the sum, trained
    there, is in the output weights here. Sizes are sums over the parts, auxiliary losses sums over the trees, and
    `routing` is a tuple with the routing of each tree. A master leaf counts as one expert, the last.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        trees: how many.
        depth: of each tree.
        leaf_width: hidden neurons of one leaf.
        master_width: hidden neurons of the master leaf; 0 for none.
        activation: class, instance or name ("relu") of a module of torch.nn, or what makes one; elementwise.
        dropout: probability of dropping a hidden activation in training.
        detach_router_input: as of FFF.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: no trees, a negative master width, or what FFF refuses.
    """

    has_soft_mode: ClassVar[bool] = FFF.has_soft_mode
    aux_losses: Mapping[str, AuxiliaryLoss] = MappingProxyType(
        {name: _over_trees(loss, torch.sum) for name, loss in FFF.aux_losses.items()}
    )
    default_aux_weights: Mapping[str, float] = FFF.default_aux_weights
    metrics: Mapping[str, AuxiliaryLoss] = MappingProxyType(
        {name: _over_trees(metric, torch.mean) for name, metric in FFF.metrics.items()}
    )
    annealed_buffers: ClassVar[frozenset[str]] = FFF.annealed_buffers

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
        whole("master_width", master_width, 0)
        whole("leaf_width", leaf_width)
        shape = in_features, out_features, depth, leaf_width
        scalars = whole("trees", trees) * tree_scalars(in_features, out_features, whole("depth", depth, 0), leaf_width)
        check_fits(scalars, f"lower trees (it is {trees}), depth (it is {depth}) or leaf_width", device, dtype)
        self.trees = nn.ModuleList(
            FFF(*shape, 0.0, activation, dropout, "all", detach_router_input, device=device, dtype=dtype)
            for _ in range(trees)
        )
        self.master = None
        if master_width:
            self.master = FF(in_features, out_features, master_width, activation, dropout, device=device, dtype=dtype)

    @property
    def parts(self) -> list[FeedforwardLayer]:
        """The trees and the master leaf."""
        return [*self.trees, *([self.master] if self.master else [])]

    @classmethod
    def sized(
        cls, in_features: int, out_features: int, depth: int, leaf_width: int, top_k: int = 1, **more: Any
    ) -> Self:
        """Two trees with half of the leaves each; one where there is one leaf."""
        more = {"trees": 2 if depth else 1} | more
        return super().sized(in_features, out_features, max(0, depth - 1), leaf_width, top_k, **more)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        x = self._checked(x)
        first, *others = self.parts
        output: Tensor = first(x)
        for part in others:
            output = output + part(x)
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        # the parts are set alike; the base class sets its defaults before there are any
        super().__setattr__(name, value)
        if name in ("routing_mode", "backend", "vectorized") and "trees" in self._modules:
            for part in self.parts:
                setattr(part, name, value)

    @property
    def routings(self) -> list[Any]:
        """A tuple with the routing of each tree for each training pass, as of every layer."""
        return list(zip(*(tree.routings for tree in self.trees), strict=True))

    @property
    def routing(self) -> Any:
        """That of the last pass, or None."""
        last = tuple(tree.routing for tree in self.trees)
        return None if None in last else last

    @routing.setter
    def routing(self, value: None) -> None:
        for part in self.parts:
            part.routing = value

    def anneal(self, name: str, value: float) -> None:
        """Set one of `annealed_buffers` in all trees."""
        for part in self.parts:
            if name in part.annealed_buffers:
                part.anneal(name, value)

    def inference_backend(self) -> str:
        """That of the trees."""
        return self.parts[0].inference_backend()

    def training_backend(self, x: Tensor) -> str:
        """That of the trees."""
        return self.parts[0].training_backend(x)

    @property
    def vectorizable(self) -> bool:
        """If all parts are."""
        return all(part.vectorizable for part in self.parts)

    def route(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (rows, parts) leaf of each row in each tree, numbered through."""
        x = self._checked(x)
        offset, routes = 0, []
        for part in self.parts:
            routes.append(part.route(x) + offset)
            offset += part.num_experts
        return torch.cat(routes, 1)

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        """(rows, in_features) -> (rows, out_features), the sum of the parts' references."""
        return torch.stack([part.forward_reference(x, decisions) for part in self.parts]).sum(0)

    def weights_read(self, x: Tensor) -> int:
        """Those of all parts."""
        return sum(part.weights_read(x) for part in self.parts)

    @property
    def num_experts(self) -> int:
        """Leaves, the master leaf included."""
        return sum(part.num_experts for part in self.parts)

    @property
    def training_width(self) -> int:
        """Sum over the parts."""
        return sum(part.training_width for part in self.parts)

    @property
    def training_size(self) -> int:
        """Sum over the parts."""
        return sum(part.training_size for part in self.parts)

    @property
    def inference_width(self) -> int:
        """Sum over the parts."""
        return sum(part.inference_width for part in self.parts)

    @property
    def inference_size(self) -> int:
        """Sum over the parts."""
        return sum(part.inference_size for part in self.parts)

    @property
    def flops_per_sample(self) -> int:
        """Sum over the parts."""
        return sum(part.flops_per_sample for part in self.parts)
