"""Hidden neurons that every input uses, beside a layer that routes."""

from collections.abc import Mapping
from typing import Any, Self

import torch

from fffexp.layers.base import SIZES, AuxiliaryLoss, FeedforwardLayer, LayerFactory, check_memory
from fffexp.layers.blocks import Activation, Device
from fffexp.layers.ff import FF
from fffexp.layers.fff import FFF
from fffexp.layers.summed import SummedLayer


class Shared(SummedLayer):
    """Sum of the outputs of a dense FF and of any other layer.

    What every input uses is the shared expert of DeepSeekMoE, arXiv 2401.06066, and of CMoE, arXiv 2502.04416. Sizes
    are sums; routing, auxiliary losses, metrics and what is annealed are the other layer's. The dense part counts as
    one expert, the last.

    Args:
        width: hidden neurons that every input uses.
        layer: (in_features, out_features) -> the other layer.
        activation: of the dense part, as of FF.
        dropout: of the dense part, as of FF.
    """

    shape = ("width",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        layer: LayerFactory,
        activation: Activation = "relu",
        dropout: float = 0.0,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        shared = FF(in_features, out_features, width, activation, dropout, device=device, dtype=dtype)
        with torch.device(device or torch.get_default_device()):
            routed = layer(in_features, out_features).to(dtype=dtype)
        if not isinstance(routed, FeedforwardLayer):
            raise ValueError(f"layer makes a {type(routed).__name__}, which is no FeedforwardLayer of fffexp")
        if (made := (routed.in_features, routed.out_features)) != (in_features, out_features):
            raise ValueError(f"layer makes a layer of {made[0]} -> {made[1]}: use the features that it is given")
        self.width, self.dropout, self.num_experts = shared.width, dropout, routed.num_experts + 1
        for name in SIZES:
            if name != "parameters":  # which are counted
                setattr(self, name, getattr(shared, name) + getattr(routed, name))
        check_memory(shared.parameter_count + routed.parameter_count, "width or what the layer has", device, dtype)
        for name in ("has_soft_mode", "annealed_buffers", "vectorizable", "sparse_gradients"):
            setattr(self, name, getattr(routed, name))
        self.shared, self.routed = shared, routed

    @classmethod
    def sized(
        cls, in_features: int, out_features: int, depth: int, leaf_width: int, top_k: int = 1, **more: Any
    ) -> Self:  # half of the neurons are shared, the others a tree's, but for the least
        half = 2**depth * leaf_width // 2 if depth else max(1, leaf_width // 2)
        rest = leaf_width if depth else max(1, leaf_width - half)

        def tree(in_features: int, out_features: int) -> FeedforwardLayer:
            return FFF(in_features, out_features, max(0, depth - 1), rest)

        given: dict[str, Any] = {"width": half, "layer": tree} | more
        return cls(in_features, out_features, **given)

    @property
    def parts(self) -> list[FeedforwardLayer]:
        return [self.routed, self.shared]

    # not set as the rest is: what a layer holds is pickled

    @property
    def aux_losses(self) -> Mapping[str, AuxiliaryLoss]:  # type: ignore[override] # they can only be read
        return self.routed.aux_losses

    @property
    def default_aux_weights(self) -> Mapping[str, float]:  # type: ignore[override] # as above
        return self.routed.default_aux_weights

    @property
    def metrics(self) -> Mapping[str, AuxiliaryLoss]:  # type: ignore[override] # as above
        return self.routed.metrics

    @property
    def training_flops_per_sample(self) -> int:
        return sum(part.training_flops_per_sample for part in self.parts)

    @property
    def trains_all_experts(self) -> bool:
        return self.routed.trains_all_experts

    def summands(self) -> list[FeedforwardLayer]:
        return [self.shared, *self.routed.summands()]

    def check_trainable(self) -> None:
        self.routed.check_trainable()

    def _decided(self) -> Any:
        return self.routed.routing
