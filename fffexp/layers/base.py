"""The contract that every feedforward layer keeps."""

import copy
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args
from weakref import ref

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fffexp.kernels.naive import Blocks
from fffexp.layers.blocks import BlockMLP, Device, reset_parts

RoutingMode = Literal["auto", "soft", "hard"]
ROUTING_MODES = get_args(RoutingMode)
AuxiliaryLoss = Callable[[Any], Tensor]
SIZES = ("training_width", "training_size", "inference_width", "inference_size", "parameters", "flops_per_sample")

# Training passes that are kept without having been read, where their graphs are gone.
MAX_UNREAD = 16


class _Pass:
    """What a training pass decided, and whether it is over."""

    def __init__(self, routing: Any) -> None:
        self.routing = routing
        self._ran: list[bool] = []
        self._graph: Callable[[], Any] = bool

    def watch(self, output: Tensor) -> None:
        ran = self._ran

        def note(_: Tensor) -> None:  # holds no tensor, for the graph holds it
            ran.append(True)

        output.register_hook(note)
        self._graph = ref(note)

    def over(self, crowded: bool) -> bool:
        """Whether backward has run through it or, where it is crowded, its graph is gone."""
        return bool(self._ran) or (crowded and self._graph() is None)


class DenseBlocks(NamedTuple):
    """The dense networks that a layer consists of; the weights are views of its parameters, to be read and written."""

    weights: Blocks
    activation: nn.Module


class FeedforwardLayer(nn.Module, ABC):
    """A layer that replaces an MLP: (..., in_features) -> (..., out_features), one tensor.

    Sizes are in neurons, as in paper.md section 1; `flops_per_sample` counts one inference pass, a
    multiply-add as two. `routing_mode` matters to layers that harden: "auto" is soft in training and hard in
    evaluation, "hard" in training is straight-through. `backend` asks for a kernel of hard inference by name;
    "auto" takes the fastest that serves. `vectorized = True` asks for the form that torch.vmap takes: plain torch
    operators of shapes that do not depend on the data.

    A layer of your own defines `forward`, `training_width` and `flops_per_sample`; the defaults of the rest are those
    of a dense layer.

    The first evaluation on a CPU compiles the kernels, once for a machine (half a minute; one line on stderr says so).
    Inputs of another floating dtype are cast to that of the weights, in training and evaluation.
    """

    shape: ClassVar[tuple[str, ...]] = ()  # attributes that print(layer) shows beside the features

    has_soft_mode: ClassVar[bool] = False  # whether soft and hard decisions differ
    aux_losses: Mapping[str, AuxiliaryLoss] = MappingProxyType({})  # losses, functions of `routing`
    default_aux_weights: Mapping[str, float] = MappingProxyType({})  # by the recipes of configs/recipe/
    metrics: Mapping[str, AuxiliaryLoss] = MappingProxyType({})  # tracked quantities, functions of `routing`
    annealed_buffers: ClassVar[frozenset[str]] = frozenset()  # buffers that a schedule may set
    baseline: ClassVar[str] = ""  # benchmarks record "speedup_over_BASELINE" of the layers after this one
    peer: ClassVar[str] = ""  # module:class of another package's form of it, for benchmarks

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = whole("in_features", in_features)
        self.out_features = whole("out_features", out_features)
        self._routing_mode: RoutingMode = "auto"
        self.backend = "auto"
        self.vectorized = False
        self._passes: list[_Pass] = []
        self._overwritten = False

    @property
    def routing_mode(self) -> RoutingMode:
        """ "auto", "soft" or "hard"; layers without a soft mode take all three.

        Raises:
            ValueError: it is set to something else.
        """
        return self._routing_mode

    @routing_mode.setter
    def routing_mode(self, value: RoutingMode) -> None:
        if value not in ROUTING_MODES:
            raise ValueError(f"routing_mode is {value!r}; it must be 'auto', 'soft' or 'hard'")
        self._routing_mode = value

    @property
    def routings(self) -> list[Any]:
        """What each training pass decided since the last clearing, but those that backward has run through.

        Raises:
            RuntimeError: passes under torch.compile, which keeps one, have overwritten another.
        """
        if self._overwritten:
            raise RuntimeError(
                f"{type(self).__name__} ran more than once under torch.compile, which keeps the last pass only: "
                "read the auxiliary loss, or set layer.routing = None, after each pass"
            )
        return [each.routing for each in self._passes]

    @property
    def routing(self) -> Any:
        """What the last training pass decided, or None; None, the only value it can be set to, clears all passes."""
        return self._passes[-1].routing if self._passes else None

    @routing.setter
    def routing(self, value: None) -> None:
        if value is not None:
            raise ValueError("routing is written by the layer; it can only be cleared: layer.routing = None")
        self._passes, self._overwritten = [], False

    def _record(self, routing: Any, output: Tensor) -> None:
        """Keep what a training pass with gradients decided."""
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            # guards would follow the length of a list that grows
            self._overwritten = bool(self._passes)
            self._passes = [_Pass(routing)]
            return
        if torch._C._current_graph_task_id() != -1:  # a checkpoint computes the pass again within backward
            return
        new = _Pass(routing)
        if output.requires_grad:
            new.watch(output)
        elif not self.vectorized:  # nothing here is trained; torch.vmap hides what is
            self._passes.clear()
        crowded = len(self._passes) >= MAX_UNREAD
        self._passes = [each for each in self._passes if not each.over(crowded)] + [new]

    def __getstate__(self) -> dict[str, Any]:
        # routing holds the graph of a pass: neither pickled nor copied
        return {**self.__dict__, "_passes": [], "_overwritten": False}

    @property
    def hard(self) -> bool:
        """Whether the next pass uses hard decisions."""
        return not self.training if self._routing_mode == "auto" else self._routing_mode == "hard"

    def anneal(self, name: str, value: float) -> None:
        """Set one of `annealed_buffers`."""
        self.get_buffer(name).fill_(value)

    def inference_backend(self) -> str:
        """The backend that the next hard inference runs on."""
        return "eager"

    def training_backend(self, x: Tensor) -> str:
        """The backend that the next training pass of x runs on."""
        return "eager"

    @property
    def sparse_gradients(self) -> bool:
        """Whether gradients hold only the rows in use, which most optimizers refuse."""
        return False

    @property
    def vectorizable(self) -> bool:
        """Whether it can run under torch.vmap over stacked parameters, with `vectorized` set."""
        return False

    def reset_parameters(self) -> None:
        """Draw the weights anew, and set buffers to their first values; here by what the modules within know."""
        reset_parts(self)

    def check_trainable(self) -> None:
        """Raise ValueError if this layer can be timed but not trained."""

    @property
    def num_experts(self) -> int:
        """Number of leaves or experts; 1 for a dense layer."""
        return 1

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

    def route(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (rows, k) index of the blocks that hard decisions use for each row; zeros for one.

        Raises:
            ValueError: x is of another width.
        """
        rows = self._rows(x, next(self.parameters()).dtype)
        return torch.zeros(len(rows), 1, dtype=torch.long, device=x.device)

    def dense_blocks(self) -> DenseBlocks | None:
        """Networks that can start from the neurons of a trained MLP; None if this layer has none."""
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
        output: Tensor = functional_call(copy.deepcopy(self).eval(), weights, (x.double(),))
        return output

    def weights_read(self, x: Tensor) -> int:
        """Distinct scalars of the weights that hard inference of x (rows, in_features) needs; all for a dense layer."""
        return self.parameter_count

    def _checked(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An input of the right width in the weights' dtype, that of the first unless it is given.

        Raises:
            ValueError: x is of another width.
            TypeError: x holds no floating-point numbers.
        """
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
        """(..., in_features) -> (rows, in_features), checked as by `_checked`."""
        x = self._checked(x, dtype)
        return x if x.dim() == 2 else x.reshape(-1, self.in_features)

    def extra_repr(self) -> str:
        """Shape and sizes, for print(layer)."""
        s = self.sizes()
        shape = ", ".join(f"{name}={getattr(self, name)}" for name in ("in_features", "out_features", *self.shape))
        return (
            f"{shape}\ntraining width {s['training_width']} (size {s['training_size']}), "
            f"inference width {s['inference_width']} (size {s['inference_size']}), "
            f"{s['parameters']:,} parameters, {s['flops_per_sample']:,} FLOPs per sample"
        )

    @property
    def parameter_count(self) -> int:
        """Trainable scalars."""
        return sum(p.numel() for p in self.parameters())

    def sizes(self) -> dict[str, int]:
        """Every size of this layer under its tracked name."""
        widths = self.training_width, self.training_size, self.inference_width, self.inference_size
        return dict(zip(SIZES, (*widths, self.parameter_count, self.flops_per_sample), strict=True))

    @classmethod
    def sized(
        cls, in_features: int, out_features: int, depth: int, leaf_width: int, top_k: int = 1, **more: Any
    ) -> Self:
        """A layer of 2^depth * leaf_width hidden neurons in training, for benchmarks of layers of equal width.

        Of width, depth, leaf_width, num_experts, expert_width, top_k and trainable, the constructor gets those that it
        has parameters for.

        Args:
            in_features: size of the last dimension of the input.
            out_features: size of the last dimension of the output.
            depth: 2^depth leaves or experts.
            leaf_width: hidden neurons of one of them.
            top_k: experts of a sample, if there are as many; a gate that does not train at 1 is built all the same.
            more: further arguments of the constructor; they come before those of the same name.
        """
        experts = 2**depth
        sizes = {
            "width": experts * leaf_width,
            "depth": depth,
            "leaf_width": leaf_width,
            "num_experts": experts,
            "expert_width": leaf_width,
            "top_k": min(top_k, experts),
            "trainable": top_k > 1,
        }
        named = inspect.signature(cls).parameters
        return cls(in_features, out_features, **{name: sizes[name] for name in sizes if name in named} | more)

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

    @property
    def trains_all_experts(self) -> bool:
        """Whether a training pass evaluates all leaves or experts for each sample."""
        return not self.sparse_gradients

    @property
    def training_flops_per_sample(self) -> int:
        """Operations of the products of one training pass, forward and backward, where the input needs no gradient."""
        return self._training_flops(self.training_width, 2 * (self.training_size - self.training_width))

    def _training_flops(self, width: int, router_products: int) -> int:
        # both layers forward, the gradients of their weights and of the hidden activations; the router's likewise
        hidden = width * (2 * (self.in_features + self.out_features) + self.out_features)
        return 2 * (hidden + router_products * self.in_features)


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


def physical_memory() -> int | None:
    """Bytes of this machine, or None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def check_fits(scalars: int, fix: str, device: Device = None, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError before weights are allocated that this machine's memory cannot hold."""
    needed = scalars * (dtype or torch.get_default_dtype()).itemsize
    total = physical_memory()
    kind = torch.device(device or torch.get_default_device()).type
    if total is not None and needed > total and kind == "cpu":
        # whole numbers, for no float holds 2 to the power of an absurd depth
        size = f"{needed // 2**30:,}" if needed < 2**100 else f"2^{needed.bit_length() - 31}"
        raise ValueError(f"the weights would take {size} GiB and this machine has {total / 2**30:,.1f} GiB: {fix}")


def at_least_float32(x: Tensor) -> Tensor:
    """RoutingMode, gates, entropies and losses are computed in this precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def decision_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, in) -> (B, units) in at least float32, the same in training and inference, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return at_least_float32(nn.functional.linear(x.to(weight.dtype), weight, bias))


def feedforward_layers(module: nn.Module) -> dict[str, FeedforwardLayer]:
    """The feedforward layers in a module by their path in it: the outermost, for a layer speaks for its parts."""
    found: dict[str, FeedforwardLayer] = {}
    parts: set[nn.Module] = set()
    for name, each in module.named_modules():
        if isinstance(each, FeedforwardLayer) and each not in parts:
            found[name] = each
            parts.update(each.modules())
    return found
