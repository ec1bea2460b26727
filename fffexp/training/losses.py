"""What the layers in a model need of a training loop: their losses, and to harden."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fffexp.layers import FeedforwardLayer
from fffexp.layers.base import probability
from fffexp.training.schedules import Exponential, Schedule

# that of configs/recipe/fff.yaml
INVERSE_TEMPERATURE = Exponential(1.0, 300.0)


def weighted_aux_losses(layers: Iterable[FeedforwardLayer], aux_weights: Mapping[str, float]) -> Tensor | float:
    """Sum of the regularisers of what these layers' last training pass decided; 0.0 where there is none."""
    total: Tensor | float = 0.0
    for layer in layers:
        for name, aux_loss in layer.aux_losses.items():
            if coefficient := aux_weights.get(name, 0.0):
                total = total + coefficient * aux_loss(layer.routing)
    return total


def auxiliary_loss(model: nn.Module, aux_weights: Mapping[str, float] | None = None) -> Tensor:
    """() to be added to the loss of a training step, between the forward and the backward pass.

    Args:
        model: any module with layers of this package in it, after a pass in training mode.
        aux_weights: of the regularisers by name; each layer's own recommendation unless given.

    Raises:
        ValueError: the model has no such layer, or none that knows a coefficient.
        RuntimeError: no layer made a training pass since the last call, or one more than one, or without gradients.
    """
    layers = _layers(model)
    known = {name for layer in layers for name in layer.aux_losses}
    if unknown := set(aux_weights or ()) - known:
        told = ", ".join(sorted(known)) or "none"
        raise ValueError(f"no layer has the regulariser {', '.join(sorted(unknown))}; there are: {told}")
    ran = [layer for layer in layers if layer.routing is not None]  # some models leave layers out at random
    if not ran and any(layer.aux_losses for layer in layers):
        raise RuntimeError("no layer made a training pass since the last loss: call the model, in training mode")
    total = torch.zeros((), device=next(layers[0].parameters()).device)
    for layer in ran:
        total = total + weighted_aux_losses([layer], layer.default_aux_weights if aux_weights is None else aux_weights)
        layer.routing = None  # the graph of this step is the loss's from now on
    weights = (p for layer in ran for p in layer.parameters())
    # the value last: reading it waits for the device
    if torch.is_grad_enabled() and not total.requires_grad and any(p.requires_grad for p in weights) and total:
        raise RuntimeError("the layers ran without gradients: gradient checkpointing needs use_reentrant=False")
    return total


def anneal(model: nn.Module, progress: float, schedule: Schedule = INVERSE_TEMPERATURE) -> None:
    """Set the choice scale of the trees in a model; call it every step.

    Args:
        model: any module with layers of this package in it.
        progress: share of the training that is done, in [0, 1].
        schedule: of the choice scale.

    Raises:
        ValueError: progress is something else, or the model has no such layer.
    """
    scale = schedule(probability("progress", progress))
    for layer in _layers(model):
        if "inverse_temperature" in layer.annealed_buffers:
            layer.get_buffer("inverse_temperature").fill_(scale)


def _layers(model: nn.Module) -> list[FeedforwardLayer]:
    layers = [module for module in model.modules() if isinstance(module, FeedforwardLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of fffexp")
    return layers
