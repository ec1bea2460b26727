"""Several trees beside each other, and a leaf that every sample passes."""

from collections.abc import Callable

from torch import Tensor, nn

from fffexp.layers.base import positive
from fffexp.layers.ff import FF
from fffexp.layers.fff import FFF


class Forest(nn.Module):
    """Sum of the outputs of FFF layers of one shape and, if it has a width, of a dense FF.

    The dense part is the master leaf of Charalampopoulos et al., arXiv 2405.16836; its weight in the sum, trained
    there, is in the output weights here. Each part is a layer for itself: it is regularised, hardened and counted.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        trees: how many.
        depth: of each tree.
        leaf_width: hidden neurons of one leaf.
        master_width: hidden neurons of the master leaf; 0 for none.
        activation: makes the activation module, which has to be elementwise.
        detach_router_input: as of FFF.

    Raises:
        ValueError: no trees, a negative master width, or what FFF refuses.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        trees: int,
        depth: int,
        leaf_width: int,
        master_width: int = 0,
        activation: Callable[[], nn.Module] = nn.ReLU,
        detach_router_input: bool = False,
    ) -> None:
        super().__init__()
        if master_width < 0:
            raise ValueError(f"master_width is {master_width}; it must be at least 0")
        self.trees = nn.ModuleList(
            FFF(
                in_features,
                out_features,
                depth,
                leaf_width,
                activation=activation,
                detach_router_input=detach_router_input,
            )
            for _ in range(positive("trees", trees))
        )
        self.master = FF(in_features, out_features, master_width, activation=activation) if master_width else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        first, *others = self.trees
        output: Tensor = first(x)
        for tree in others:
            output = output + tree(x)
        return output if self.master is None else output + self.master(x)
