"""The two-layer networks that a tree or a gate chooses among."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fffexp.kernels import eager, operators
from fffexp.kernels.naive import Blocks
from fffexp.layers.random import Dropout

Activation = str | nn.Module | Callable[[], nn.Module]
Device = torch.device | str | None

_ACTIVATIONS = (
    "CELU ELU GELU Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 SELU SiLU Sigmoid"
    " Softplus Softsign Tanh"
)


class BlockMLP(nn.Module):
    """Networks Linear, activation, dropout, Linear of one shape; `reset_parameters` sets the weights.

    The shape is that of (networks, hidden neurons, inputs, outputs); `factory` may hold device and dtype.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], activation: Activation, dropout: float, **factory: Any
    ) -> None:
        super().__init__()
        (blocks, width, in_features, out_features), empty = shape, partial(torch.empty, **factory)
        self.hidden_weight = nn.Parameter(empty(blocks, width, in_features))
        self.hidden_bias = nn.Parameter(empty(blocks, width))
        self.output_weight = nn.Parameter(empty(blocks, width, out_features))
        self.output_bias = nn.Parameter(empty(blocks, out_features))
        self.hidden = nn.Sequential(make_activation(activation), Dropout(dropout)).to(**factory)

    def reset_parameters(self) -> None:
        _, width, in_features = self.hidden_weight.shape
        for parameter, fan_in in zip(self.tensors(), (in_features, in_features, width, width), strict=True):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)  # as of torch.nn.Linear
        reset_parts(self.hidden)

    @property
    def compiled_activation(self) -> str | None:
        """What the compiled kernels call the hidden part as it is now, or None where they cannot compute it."""
        return compiled_activation(self.hidden)

    def tensors(self) -> Blocks:
        return Blocks(*parameters(self, Blocks._fields))

    def exact(self) -> tuple[Blocks, nn.Module]:
        """The blocks, and the activation in float64, without dropout: what the functions of naive.py take."""
        return self.tensors(), copy.deepcopy(self.hidden).double().eval()

    @property
    def scalars(self) -> int:  # of one block
        return sum(p[0].numel() for p in self.tensors())

    def backend(self, requested: str) -> str:
        """The backend of chosen blocks in inference; a ValueError if the one requested cannot run these weights."""
        return str(operators.backend_of(served[0], served[-1])) if (served := self.compiled(requested)) else "eager"

    def compiled(self, requested: str) -> tuple[Any, ...] | None:
        """What the compiled operators take of the blocks, or None where eager serves; errors as of `backend`."""
        return compiled(requested, parameters(self, Blocks._fields), self.hidden)

    def selected(self, x: Tensor, block: Tensor, weights: Tensor | None = None, requested: str = "eager") -> Tensor:
        """(B, in), (B, k), (B, k) -> (B, out): only the chosen blocks, summed by weight, on the requested backend."""
        if arguments := self.compiled(requested):
            return operators.selected(x, block, weights, *arguments)
        return eager.selected(x, block, weights, self.tensors(), self.hidden)


def compiled_activation(hidden: nn.Sequential) -> str | None:
    """What the compiled kernels call activation and dropout as they are now, or None where they cannot compute them."""
    activation, dropout = hidden._modules.values()
    return None if dropout.training and dropout.p else operators.activation_name(activation)


def compiled(requested: str, tensors: list[Tensor], hidden: nn.Sequential) -> tuple[Any, ...] | None:
    """These weights and the activation's name for a compiled operator, or None where eager serves.

    A ValueError if the backend requested cannot run them.
    """
    if requested == "eager":
        return None
    activation = compiled_activation(hidden)
    found = operators.backend_of(tensors[0], activation)
    if found and requested in ("auto", found):
        return (*tensors, activation)
    if requested == "auto":
        return None
    raise ValueError(
        f"backend is {requested!r}, which does not serve {type(hidden[0]).__name__} in {tensors[0].dtype} on "
        f"{tensors[0].device.type} here; of 'auto', 'native', 'triton' or 'eager', 'auto' always does"
    )


def native(requested: str, weight: Tensor, served: bool) -> bool:
    """Whether the requested backend, which may be "auto", is the native one; a ValueError where it does not serve."""
    if requested not in ("auto", "eager", *(("native",) if served else ())):
        raise ValueError(
            f"backend is {requested!r}, which does not serve {weight.dtype} on {weight.device.type} here; of 'auto', "
            "'native' or 'eager', 'auto' always does"
        )
    return served and requested != "eager"


def parameters(module: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """Attributes of a module that are, as a rule, its parameters."""
    own = module._parameters  # a module's attribute takes 0.4 us, a small batch a few
    try:
        return [own[name] for name in names]  # type: ignore[misc] # none of ours is None
    except KeyError:  # torch.nn.utils.parametrize puts a property in a parameter's place
        return [getattr(module, name) for name in names]


def make_activation(activation: Activation) -> nn.Module:
    """A new module: of a class, a factory, an instance, or a name ("relu", "torch.nn.ReLU"); else a ValueError."""
    made: Any = activation
    known = {name.lower(): name for name in _ACTIVATIONS.split()}
    if isinstance(activation, str):
        home, _, name = activation.rpartition(".")
        with suppress(ImportError, AttributeError, KeyError):
            made = getattr(import_module(home or "torch.nn"), name if home else known[name.lower().replace("_", "")])
    if not isinstance(made, nn.Module):
        with suppress(TypeError):
            made = made()
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"activation is {activation!r}; it must be a class or an instance of torch.nn, what makes one, or one of "
            f"{', '.join(sorted(known))}"
        )
    return copy.deepcopy(made)


def reset_parts(module: nn.Module) -> None:
    """Call `reset_parameters` of the outermost modules within that have one."""
    for part in module.children():
        getattr(part, "reset_parameters", partial(reset_parts, part))()
