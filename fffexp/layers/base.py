"""The contract that every feedforward layer keeps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from fffexp.kernels.naive import Blocks

RoutingMode = Literal["auto", "soft", "hard"]
AuxiliaryLoss = Callable[[Any], Tensor]
SIZES = ("training_width", "training_size", "inference_width", "inference_size", "parameters", "flops_per_sample")


class DenseBlocks(NamedTuple):
    """The dense networks that a layer consists of; the weights are views of its parameters, to be read and written."""

    weights: Blocks
    activation: nn.Module


class FeedforwardLayer(nn.Module, ABC):
    """A layer that replaces an MLP: (..., in_features) -> (..., out_features), one tensor.

    Sizes are in neurons, as in paper.md section 1; `flops_per_sample` counts one inference pass, a
    multiply-add as two. `decisions` matters to layers that harden: "auto" is soft in training and hard in
    evaluation, "hard" in training is straight-through. `backend` asks for a kernel of hard inference by name;
    "auto" takes the fastest that serves.
    """

    has_soft_mode: ClassVar[bool] = False  # whether soft and hard decisions differ
    aux_losses: Mapping[str, AuxiliaryLoss] = MappingProxyType({})  # losses, functions of `routing`
    default_aux_weights: Mapping[str, float] = MappingProxyType({})  # by the recipes of configs/recipe/
    metrics: Mapping[str, AuxiliaryLoss] = MappingProxyType({})  # tracked quantities, functions of `routing`
    annealed_buffers: ClassVar[frozenset[str]] = frozenset()  # buffers that a schedule may set

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = positive("in_features", in_features)
        self.out_features = positive("out_features", out_features)
        self.routing_mode: RoutingMode = "auto"
        self.backend = "auto"
        self._routing: Any = None
        self._ran_twice = False

    @property
    def routing(self) -> Any:
        """What the last training pass decided, or None; set it to None after each backward pass.

        Raises:
            RuntimeError: the layer ran more than once in training since `routing` was last set to None.
        """
        if self._ran_twice:
            raise RuntimeError(
                f"{type(self).__name__} ran more than once in training since its routing was read and cleared: "
                "set layer.routing = None after each backward pass, and do not share a layer within a step"
            )
        return self._routing

    @routing.setter
    def routing(self, value: None) -> None:
        if value is not None:
            raise ValueError("routing is written by the layer; it can only be cleared: layer.routing = None")
        self._routing = None
        self._ran_twice = False

    def _record(self, routing: Any) -> None:
        # a checkpoint computes the pass again within backward
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self._ran_twice = self._routing is not None
        self._routing = routing

    def __getstate__(self) -> dict[str, Any]:
        # routing holds the graph of one pass: neither pickled nor copied
        return {**self.__dict__, "_routing": None, "_ran_twice": False}

    @property
    def hard(self) -> bool:
        """Whether the next pass uses hard decisions."""
        decisions = self.routing_mode
        if decisions == "auto":
            return not self.training
        if decisions not in ("soft", "hard"):
            raise ValueError(f"decisions is {decisions!r}; it must be 'auto', 'soft' or 'hard'")
        return decisions == "hard"

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

    def check_trainable(self) -> None:
        """Raise ValueError if this layer can be timed but not trained."""

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """Number of leaves or experts; 1 for a dense layer."""

    @property
    @abstractmethod
    def training_width(self) -> int:
        """Hidden neurons that can produce output in training."""

    @property
    @abstractmethod
    def training_size(self) -> int:
        """All neurons, those that decide included."""

    @property
    @abstractmethod
    def inference_width(self) -> int:
        """Hidden neurons that produce output for one sample."""

    @property
    @abstractmethod
    def inference_size(self) -> int:
        """Neurons evaluated for one sample."""

    @property
    @abstractmethod
    def flops_per_sample(self) -> int:
        """Operations of the products of one inference pass."""

    @abstractmethod
    def route(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (rows, k) index of the blocks that hard decisions use for each row.

        Raises:
            ValueError: x is of another width.
        """

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

    @abstractmethod
    def forward_reference(self, x: Tensor, decisions: Literal["soft", "hard"] = "hard") -> Tensor:
        """(rows, in_features) -> (rows, out_features) of inference, one sample at a time in float64: the truth."""

    @abstractmethod
    def weights_read(self, x: Tensor) -> int:
        """Distinct scalars of the weights that hard inference of x (rows, in_features) needs."""

    def _rows(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (rows, in_features)."""
        if x.shape[-1] != self.in_features:  # else its elements might do for other rows
            raise ValueError(f"x has {x.shape[-1]} features; this {type(self).__name__} takes {self.in_features}")
        return x.reshape(-1, self.in_features)

    @property
    def parameter_count(self) -> int:
        """Trainable scalars."""
        return sum(p.numel() for p in self.parameters())

    def sizes(self) -> dict[str, int]:
        """Every size of this layer under its tracked name."""
        widths = self.training_width, self.training_size, self.inference_width, self.inference_size
        return dict(zip(SIZES, (*widths, self.parameter_count, self.flops_per_sample), strict=True))


def positive(name: str, value: int) -> int:
    """Return value, or raise ValueError if it is below 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return value


def probability(name: str, value: float) -> float:
    """Return value, or raise ValueError if it is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be between 0 and 1")
    return value


def check_fits(scalars: int, mend: str) -> None:
    """Raise ValueError before weights are allocated that this machine's memory cannot hold."""
    needed = scalars * torch.get_default_dtype().itemsize
    total = psutil.virtual_memory().total
    if needed > total and torch.get_default_device().type == "cpu":
        # whole numbers, for no float holds 2 to the power of an absurd depth
        size = f"{needed // 2**30:,}" if needed < 2**100 else f"2^{needed.bit_length() - 31}"
        raise ValueError(f"the weights would take {size} GiB and this machine has {total / 2**30:,.1f} GiB: {mend}")


def at_least_float32(x: Tensor) -> Tensor:
    """RoutingMode, gates, entropies and losses are computed in this precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def decision_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, in) -> (B, units) in at least float32, the same in training and inference, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return at_least_float32(nn.functional.linear(x.to(weight.dtype), weight, bias))
