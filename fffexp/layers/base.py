"""The contract that every feedforward layer keeps, and what the package's own layers share."""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from inspect import signature
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, get_args
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fffexp.kernels.naive import Blocks
from fffexp.layers.blocks import BlockMLP, reset_parts

RoutingMode = Literal["auto", "soft", "hard"]
AuxiliaryLoss = Callable[[Any], Tensor]
SIZES = ("training_width", "training_size", "inference_width", "inference_size", "parameters", "flops_per_sample")


class FeedforwardLayer(nn.Module, ABC):
    """A layer that replaces an MLP: (..., in_features) -> (..., out_features), one tensor.

    Sizes are in neurons, as in paper.md section 1; `flops_per_sample` counts one inference pass, a multiply-add as two.
    `routing_mode` matters to layers that harden: "auto" is soft in training and hard in evaluation, "hard" in training
    is straight-through. `backend` asks for a kernel of hard inference by name; "auto" takes the fastest that serves.
    `vectorized = True` asks for the form that torch.vmap takes: plain torch operators of shapes that do not depend on
    the data.

    A layer of your own defines `forward`, `training_width` and `flops_per_sample`; the defaults of the rest are those
    of a dense layer. The package's layers take the `device` and `dtype` of their weights, and raise a ValueError for
    sizes and probabilities that make no sense, no activation, or weights that do not fit in memory.

    The first evaluation on a CPU compiles the kernels, once for a machine (half a minute; one line on stderr says so).
    Inputs of another floating dtype are cast to that of the weights, in training and evaluation.
    """

    shape: ClassVar[tuple[str, ...]] = ()  # attributes that print(layer) shows beside the features
    has_soft_mode: bool = False  # whether soft and hard decisions differ
    aux_losses: Mapping[str, AuxiliaryLoss] = MappingProxyType({})  # losses, functions of `routing`
    default_aux_weights: Mapping[str, float] = MappingProxyType({})  # by the recipes of configs/recipe/
    metrics: Mapping[str, AuxiliaryLoss] = MappingProxyType({})  # tracked quantities, functions of `routing`
    annealed_buffers: frozenset[str] = frozenset()  # buffers that a schedule may set
    baseline: ClassVar[str] = ""  # benchmarks record "speedup_over_BASELINE" of the layers after this one
    peer: ClassVar[str] = ""  # module:class of another package's form of it, for benchmarks

    num_experts: int = 1  # leaves or experts
    vectorizable: bool = False  # whether torch.vmap over stacked parameters takes it, with `vectorized` set
    sparse_gradients: bool = False  # whether gradients hold only the rows in use, which most optimizers refuse

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = whole("in_features", in_features)
        self.out_features = whole("out_features", out_features)
        self._routing_mode: RoutingMode = "auto"
        self.backend, self.vectorized = "auto", False
        # of each training pass: what it decided, an entry once backward has run, and what returns None without a graph
        self._passes: list[tuple[Any, list[bool], Callable[[], Any]]] = []
        self._overwritten = False
        # neurons of a training pass and products with rows of the router, where they are not those of all
        self._trained: tuple[int, int] | None = None

    @property
    def routing_mode(self) -> RoutingMode:
        """What it is set to, "auto", "soft" or "hard", else a ValueError; all three without a soft mode too."""
        return self._routing_mode

    @routing_mode.setter
    def routing_mode(self, value: RoutingMode) -> None:
        if value not in get_args(RoutingMode):
            raise ValueError(f"routing_mode is {value!r}; it must be 'auto', 'soft' or 'hard'")
        self._routing_mode = value

    @property
    def routings(self) -> list[Any]:
        """What each training pass decided since the last clearing, but those that backward has run through.

        A RuntimeError where passes under torch.compile, which keeps one, have overwritten another.
        """
        if self._overwritten:
            raise RuntimeError(
                f"{type(self).__name__} ran more than once under torch.compile, which keeps the last pass only: "
                "read the auxiliary loss, or set layer.routing = None, after each pass"
            )
        return [routing for routing, *_ in self._passes]

    @property
    def routing(self) -> Any:
        """What the last training pass decided, or None; None, the only value it can be set to, clears all passes."""
        return self._passes[-1][0] if self._passes else None

    @routing.setter
    def routing(self, value: None) -> None:
        if value is not None:
            raise ValueError("routing is written by the layer; it can only be cleared: layer.routing = None")
        self._passes, self._overwritten = [], False

    def _record(self, routing: Any, output: Tensor) -> None:
        ran: list[bool] = []

        def note(_: Tensor) -> None:  # holds no tensor, for the graph holds it
            ran.append(True)

        if not torch.is_grad_enabled() or recomputing():
            return
        if torch.compiler.is_compiling():  # guards would follow the length of a list that grows
            self._passes, self._overwritten = [(routing, ran, bool)], bool(self._passes)
            return
        if output.requires_grad:
            output.register_hook(note)
        elif not self.vectorized:  # nothing here is trained; torch.vmap hides what is
            self._passes.clear()
        full = len(self._passes) >= 16  # that nobody reads: then those whose graphs are gone go too
        self._passes = [each for each in self._passes if not (each[1] or (full and each[2]() is None))]
        self._passes.append((routing, ran, ref(note) if output.requires_grad else bool))

    def __getstate__(self) -> dict[str, Any]:
        # routing holds the graph of a pass: neither pickled nor copied
        return {**self.__dict__, "_passes": [], "_overwritten": False}

    @property
    def hard(self) -> bool:
        """Whether the next pass uses hard decisions."""
        return not self.training if self._routing_mode == "auto" else self._routing_mode == "hard"

    def anneal(self, name: str, value: float) -> None:
        """Set the buffer of this name, or those of this name in its parts; an AttributeError if there is none."""
        found = [buffer for path, buffer in self.named_buffers() if f".{path}".endswith(f".{name}")]
        if not found:
            raise AttributeError(f"{type(self).__name__} has no buffer {name}")
        for buffer in found:
            buffer.fill_(value)

    def inference_backend(self) -> str:
        """The backend that the next hard inference runs on."""
        return "eager"

    def training_backend(self, x: Tensor) -> str:
        """The backend that the next training pass of x runs on."""
        return "eager"

    def reset_parameters(self) -> None:
        """Draw the weights anew, and set buffers to their first values; here by what the modules within know."""
        reset_parts(self)

    def check_trainable(self) -> None:
        """Raise ValueError if this layer can be timed but not trained."""

    @property
    @abstractmethod
    def training_width(self) -> int:
        """Hidden neurons that can produce output in training."""

    @property
    def training_size(self) -> int:
        """All neurons, those that decide included."""
        return self.training_width

    @property
    def inference_width(self) -> int:
        """Hidden neurons that produce output for one sample."""
        return self.training_width

    @property
    def inference_size(self) -> int:
        """Neurons evaluated for one sample."""
        return self.inference_width

    @property
    @abstractmethod
    def flops_per_sample(self) -> int:
        """Operations of the products of one inference pass."""

    @property
    def training_flops_per_sample(self) -> int:
        """Operations of the products of one training pass, forward and backward, where the input needs no gradient."""
        width, router = self._trained or (self.training_width, 2 * (self.training_size - self.training_width))
        # both layers forward, the gradients of their weights and of the hidden activations; the router's likewise
        hidden = width * (2 * (self.in_features + self.out_features) + self.out_features)
        return 2 * (hidden + router * self.in_features)

    @property
    def trains_all_experts(self) -> bool:
        """Whether a training pass evaluates all leaves or experts for each sample."""
        return self._trained is None and not self.sparse_gradients

    @property
    def parameter_count(self) -> int:
        """Trainable scalars."""
        return sum(p.numel() for p in self.parameters())

    def sizes(self) -> dict[str, int]:
        """Every size of this layer under its tracked name."""
        return {name: self.parameter_count if name == "parameters" else getattr(self, name) for name in SIZES}

    def extra_repr(self) -> str:
        """Shape and sizes, for print(layer)."""
        shape = ", ".join(f"{name}={getattr(self, name)}" for name in ("in_features", "out_features", *self.shape))
        return (
            f"{shape}\ntraining width {self.training_width} (size {self.training_size}), "
            f"inference width {self.inference_width} (size {self.inference_size}), "
            f"{self.parameter_count:,} parameters, {self.flops_per_sample:,} FLOPs per sample"
        )

    def route(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (rows, k) index of the blocks that hard decisions use for each row; zeros for one."""
        return torch.zeros(len(self._rows(x)), 1, dtype=torch.long, device=x.device)

    def summands(self) -> list["FeedforwardLayer"]:
        """Layers whose outputs add up to this one's, in the order in which they start from a trained MLP."""
        return [self]

    def dense_blocks(self) -> tuple[Blocks, nn.Module] | None:
        """Networks that can start from the neurons of a trained MLP; None if this layer has none.

        The weights are views of its parameters, to be read and written; the module is their activation.
        """
        return None

    def set_router(self, x: Tensor, y: Tensor, split: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Let a router start from data; layers without hyperplanes keep theirs.

        Args:
            x: (rows, in_features) inputs.
            y: (rows, out_features) outputs that the layer is to give for them.
            split: some rows of x and y -> (in_features,) weight and () bias of the hyperplane that splits them.
        """

    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        """(rows, in_features) -> (rows, out_features) of inference in float64: the truth.

        Layers that decide compute it one sample at a time; by default it is the layer itself in float64.
        """
        # of the layer's own weights, for gradients are compared too
        weights = {name: tensor.double() for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        exact = copy.deepcopy(self).eval()
        exact.backend = "auto"  # not every one has float64
        return functional_call(exact, weights, (x.double(),))

    def weights_read(self, x: Tensor) -> int:
        """Distinct scalars of the weights that hard inference of x (rows, in_features) needs; all for a dense layer."""
        return self.parameter_count

    def _checked(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An input of the right width, else a ValueError, in the weights' dtype: the first's unless it is given."""
        if not x.dim() or x.shape[-1] != self.in_features:  # else its elements might do for other rows
            width = x.shape[-1] if x.dim() else "no"
            raise ValueError(f"x has {width} features; this {type(self).__name__} takes {self.in_features}")
        dtype = dtype or next(self.parameters()).dtype
        if x.dtype is dtype:
            return x
        if not x.is_floating_point():
            raise TypeError(f"x is {x.dtype}; {type(self).__name__} takes floating-point numbers: x.to({dtype})")
        return x.to(dtype)

    def _rows(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        x = self._checked(x, dtype)
        return x if x.dim() == 2 else x.reshape(-1, self.in_features)

    @classmethod
    def sized(
        cls, in_features: int, out_features: int, depth: int, leaf_width: int, top_k: int = 1, **more: Any
    ) -> Self:
        """A layer of 2^depth * leaf_width hidden neurons in training, for benchmarks of layers of equal width.

        The constructor gets `more` and, of the sizes below, those that it has parameters for. A gate that does not
        train at top_k = 1 is built all the same.
        """
        sizes = {"width": 2**depth * leaf_width, "depth": depth, "leaf_width": leaf_width, "expert_width": leaf_width}
        sizes |= {"num_experts": 2**depth, "top_k": min(top_k, 2**depth), "trainable": top_k > 1}
        taken = {name: sizes[name] for name in sizes.keys() & signature(cls).parameters}
        return cls(in_features, out_features, **taken | more)

    def share_experts(self, other: "FeedforwardLayer") -> None:
        """Take the other layer's leaves or experts for ours, if their shapes agree, to save memory."""
        theirs = next((module for module in other.children() if isinstance(module, BlockMLP)), None)
        for name, mine in self.named_children():
            if theirs and isinstance(mine, BlockMLP) and mine.hidden_weight.shape == theirs.hidden_weight.shape:
                setattr(self, name, theirs)

    def fast_forms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Other ways to compute inference, which may be faster, by name."""
        return {}

    def training_forms(self) -> dict[str, "FeedforwardLayer"]:
        """Other ways to train this layer, on the same weights, by name."""
        return {}


LayerFactory = Callable[[int, int], FeedforwardLayer]  # (in_features, out_features) -> layer


class BlockLayer(FeedforwardLayer):
    """A layer of two-layer networks, of all or some for a sample, and of neurons that decide which."""

    training_width = training_size = inference_width = inference_size = flops_per_sample = 0  # set by `_count`
    vectorizable = True
    router_rows = 1  # weights of a deciding neuron, in rows of the input's width

    def _count(
        self,
        width: tuple[int, int],
        deciding: tuple[int, int],
        blocks: int,
        fix: str,
        dropout: float,
        scalars: int | None = None,
        **factory: Any,
    ) -> None:
        """Note the neurons, (all, those of one sample); a ValueError if memory cannot hold the weights, `scalars`."""
        self.num_experts, self.dropout = blocks, probability("dropout", dropout)
        self.training_width, self.inference_width = width
        self.training_size, self.inference_size = width[0] + deciding[0], width[1] + deciding[1]
        self.flops_per_sample = 2 * (self.inference_size * self.in_features + width[1] * self.out_features)
        rows = width[0] + self.router_rows * deciding[0]
        of_blocks = rows * (self.in_features + 1) + (width[0] + blocks) * self.out_features
        check_memory(of_blocks if scalars is None else scalars, fix, **factory)


def whole(name: str, value: int, minimum: int = 1) -> int:
    """Return value, or raise ValueError if it is no whole number or below the minimum."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum}")
    return int(value)


def probability(name: str, value: float) -> float:
    """Return value, or raise ValueError if it is not in [0, 1]."""
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be between 0 and 1")
    return value


def check_memory(scalars: int, fix: str, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError, with what to lower, if memory cannot hold so many weights."""
    needed, memory = scalars * (dtype or torch.get_default_dtype()).itemsize, physical_memory()
    if needed > memory and torch.device(device or torch.get_default_device()).type == "cpu":
        # whole numbers, for no float holds 2 to the power of an absurd depth
        size = f"{needed // 2**30:,}" if needed < 2**100 else f"2^{needed.bit_length() - 31}"
        raise ValueError(
            f"the weights would take {size} GiB and this machine has {memory / 2**30:,.1f} GiB: lower {fix}"
        )


def physical_memory() -> float:
    """Bytes of this machine; infinite where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return float("inf")


def recomputing() -> bool:
    """Whether a checkpoint computes a pass again within backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def decision_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, in) -> (B, units) in at least float32, the same in training and inference, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(weight.dtype), weight, bias).to(torch.promote_types(weight.dtype, torch.float32))


def feedforward_layers(module: nn.Module) -> dict[str, FeedforwardLayer]:
    """The feedforward layers in a module by their path in it: the outermost, for a layer speaks for its parts."""
    layers = {name: each for name, each in module.named_modules() if isinstance(each, FeedforwardLayer)}
    parts = {part for layer in layers.values() for part in layer.modules() if part is not layer}
    return {name: layer for name, layer in layers.items() if layer not in parts}
