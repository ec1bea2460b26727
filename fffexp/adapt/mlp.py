"""An MLP that was found in a model."""

from typing import Any, NamedTuple

from torch import Tensor, nn


class Linear(NamedTuple):
    """A linear layer."""

    module: nn.Module  # an nn.Linear, or a Conv1D of transformers, whose weight is transposed
    weight: Tensor  # (out, in)
    bias: Tensor  # (out,)


class MLP(NamedTuple):
    """Linear layers that are an MLP, one up and one down, or gated: two up, or one of twice the width, and one down."""

    name: str
    module: nn.Module  # what is judged by `select`
    linears: list[Linear]  # as they run
    old: nn.Module
    places: list[tuple[nn.Module, str, Any]]  # attributes of modules and what they become; None: the layer
    dropout: nn.Module | None = None  # behind the MLP, where it stays
    gated: bool = False  # a product goes down
    run: bool | None = None  # whether its holder was run with a layer in its place; False: only that shows that it may

    @property
    def widths(self) -> tuple[int, int]:
        """Features that come in and that go out."""
        return self.linears[0].weight.shape[1], len(self.linears[-1].weight)

    def parts(self, holder: nn.Module) -> list[tuple[nn.Module, str]]:
        """Where it is in a module, in the order that its parts run in; of several places the first."""
        within = {*holder.modules()}
        layers = [(m, key) for m, key, value in self.places if value is None and m in within]
        return layers[:1] + [(m, key) for m, key, value in self.places if isinstance(value, nn.Identity)]


def linear_of(module: Any) -> Linear | None:
    """The module as a linear layer, if it is one of dense weights."""
    weight: Any = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    dense = isinstance(module, nn.Linear)
    # quantised ones are of a class of their own, or of a byte or less
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.itemsize > 1
    if not plain or weight.dim() != 2 or not (dense or type(module).__name__ == "Conv1D"):
        return None
    weight = weight if dense else weight.T
    return Linear(module, weight, weight.new_zeros(len(weight)) if bias is None else bias)
