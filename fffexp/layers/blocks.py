"""The two-layer networks that a tree or a gate chooses among."""

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fffexp.kernels import eager, operators
from fffexp.kernels.activations import activation_name
from fffexp.kernels.naive import Blocks
from fffexp.layers.random import Dropout

Activation = str | nn.Module | Callable[[], nn.Module]
Device = torch.device | str | None
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__.lower(): kind
    for kind in (
        *(
            nn.CELU,
            nn.ELU,
            nn.GELU,
            nn.Hardsigmoid,
            nn.Hardswish,
            nn.Hardtanh,
            nn.Identity,
            nn.LeakyReLU,
            nn.LogSigmoid,
        ),
        *(nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh),
    )
}

_NAMES = ("hidden_weight", "hidden_bias", "output_weight", "output_bias")


class BlockMLP(nn.Module):
    """`blocks` networks Linear, activation, dropout, Linear of the same width; `reset_parameters` sets the weights."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        width: int,
        activation: Activation,
        dropout: float,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.hidden_weight = nn.Parameter(empty(blocks, width, in_features))
        self.hidden_bias = nn.Parameter(empty(blocks, width))
        self.output_weight = nn.Parameter(empty(blocks, width, out_features))
        self.output_bias = nn.Parameter(empty(blocks, out_features))
        self.hidden = nn.Sequential(make_activation(activation), Dropout(dropout)).to(device, dtype)

    def reset_parameters(self) -> None:
        """As of torch.nn.Linear."""
        _, width, in_features = self.hidden_weight.shape
        for parameter, fan_in in zip(self.tensors(), (in_features, in_features, width, width), strict=True):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        reset_parts(self.hidden)

    @property
    def compiled_activation(self) -> str | None:
        """What the compiled kernels call the hidden part as it is now, or None where they cannot compute it."""
        activation, dropout = self.hidden._modules.values()
        assert dropout is not None
        assert activation is not None
        return None if dropout.training and dropout.p else activation_name(activation)

    def tensors(self) -> Blocks:
        """The parameters as the kernels take them."""
        return Blocks(*parameters(self, _NAMES))

    def exact(self, chosen: list[int] | slice = slice(None)) -> Blocks:
        """Some of the blocks, or all, in float64."""
        return Blocks(*(p[chosen].double() for p in self.tensors()))

    @property
    def exact_hidden(self) -> nn.Module:
        """The activation in float64, without dropout."""
        return copy.deepcopy(self.hidden).double().eval()

    @property
    def scalars(self) -> int:
        """Weights of one block."""
        return sum(p[0].numel() for p in self.tensors())

    def backend(self, requested: str) -> str:
        """The backend that evaluates chosen blocks in inference: "native", "triton" or "eager".

        Raises:
            ValueError: an unknown backend is requested, or one that cannot run these weights.
        """
        weight, activation = self.hidden_weight, self.compiled_activation
        return str(operators.backend_of(weight, activation)) if self.compiled(requested) else "eager"

    def compiled(self, requested: str) -> tuple[Any, ...] | None:
        """What the compiled operators take of the blocks, or None where eager serves.

        Raises:
            ValueError: as `backend`.
        """
        if requested == "eager":
            return None
        tensors, activation = parameters(self, _NAMES), self.compiled_activation
        found = operators.backend_of(tensors[0], activation)
        if found and requested in ("auto", found):
            return (*tensors, activation)
        if requested not in ("auto", "native", "triton"):
            raise ValueError(f"backend is {requested!r}; it must be 'auto', 'native', 'triton' or 'eager'")
        if requested != "auto":
            raise ValueError(
                f"backend is {requested!r}, which does not serve {type(self.hidden[0]).__name__} in "
                f"{tensors[0].dtype} on {tensors[0].device.type} here: set it to 'auto'"
            )
        return None

    def soft_backend(self, requested: str, x: Tensor) -> str:
        """The backend that evaluates all blocks for rows like these: "native" or "eager".

        Raises:
            ValueError: as `backend`.
        """
        # dropout and lower precision are left to torch
        float32 = x.dtype == self.hidden_weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return "native" if float32 and self.compiled_activation and self.backend(requested) == "native" else "eager"

    def mixture(self, x: Tensor, weights: Tensor) -> Tensor:
        """(B, in), (B, blocks) -> (B, out): all blocks, weighted."""
        return eager.mixture(x, weights, self.tensors(), self.hidden)

    def selected(self, x: Tensor, block: Tensor, weights: Tensor | None = None, backend: str = "eager") -> Tensor:
        """(B, in), (B, k), (B, k) -> (B, out): only the chosen blocks, summed by weight."""
        if backend != "eager":
            tensors = self.tensors()
            return operators.selected(x, block, weights, *tensors, self.compiled_activation)
        return eager.selected(x, block, weights, self.tensors(), self.hidden)


def parameters(module: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """Attributes of a module that are, as a rule, its parameters."""
    own = module._parameters  # a module's attribute takes 0.4 us, a small batch a few
    try:
        return [own[name] for name in names]  # type: ignore[misc] # none of ours is None
    except KeyError:  # torch.nn.utils.parametrize puts a property in a parameter's place
        return [getattr(module, name) for name in names]


def make_activation(activation: Activation) -> nn.Module:
    """A new module of its own: of a class, a factory, a copy of an instance, or by name ("relu", "torch.nn.ReLU").

    Raises:
        ValueError: it is something else.
    """
    made = activation
    if isinstance(activation, str):
        name = activation.lower().replace("_", "")
        module, _, attribute = activation.rpartition(".")
        if name in _ACTIVATIONS:
            made = _ACTIVATIONS[name]
        elif module:
            try:
                made = getattr(import_module(module), attribute)
            except (ImportError, AttributeError):
                made = None  # type: ignore[assignment] # refused below
    if isinstance(made, nn.Module):
        return copy.deepcopy(made)
    try:
        made = made()  # type: ignore[operator,unused-ignore] # what cannot be called is refused
    except TypeError:
        made = None  # type: ignore[assignment] # refused below
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"activation is {activation!r}; it must be a class or an instance of torch.nn, what makes one, or one of "
            f"{', '.join(sorted(_ACTIVATIONS))}"
        )
    return made


def reset_parts(module: nn.Module) -> None:
    """Call `reset_parameters` of the outermost modules within that have one."""
    for part in module.children():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
        else:
            reset_parts(part)
