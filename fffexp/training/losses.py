"""What the layers in a model need of a training loop: their losses, and to harden."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fffexp.layers import FeedforwardLayer, feedforward_layers
from fffexp.layers.base import probability
from fffexp.training.schedules import Exponential, Schedule

INVERSE_TEMPERATURE = Exponential(1.0, 300.0)  # that of configs/recipe/fff.yaml


def weighted_aux_losses(
    layers: Iterable[FeedforwardLayer], aux_weights: Mapping[str, float] | None = None
) -> Tensor | float:
    """Sum of the auxiliary losses of what these layers' training passes decided, by these weights or their own."""
    terms = [
        weight * aux_loss(routing)
        for layer in layers
        for name, aux_loss in layer.aux_losses.items()
        if (weight := (layer.default_aux_weights if aux_weights is None else aux_weights).get(name, 0.0))
        for routing in layer.routings
    ]
    return sum((term.to(terms[0].device) for term in terms[1:]), terms[0]) if terms else 0.0


def auxiliary_loss(model: nn.Module, aux_weights: Mapping[str, float] | None = None) -> Tensor:
    """() to be added to the loss of a training step, between the forward and the backward pass.

    It is the sum over all training passes since it was last read, and clears them. The weights by name are each
    layer's own recommendation unless given.

    Raises:
        ValueError: the model has no layer of this package, or none with an auxiliary loss of that name.
        RuntimeError: no layer made a training pass with gradients since the last call, or several did with
            torch.compile.
    """
    layers = _layers(model)
    known = {name for layer in layers for name in layer.aux_losses}
    if unknown := set(aux_weights or ()) - known:
        wrong, names = (", ".join(sorted(each)) for each in (unknown, known))
        raise ValueError(f"no layer has the auxiliary loss {wrong}; there are: {names or 'none'}")
    if known and all(layer.routing is None for layer in layers):  # some models leave layers out at random
        raise RuntimeError(
            "no layer made a training pass with gradients since the last loss: call the model, in training mode; "
            "gradient checkpointing needs use_reentrant=False"
        )
    total, device = weighted_aux_losses(layers, aux_weights), next(layers[0].parameters()).device
    for layer in layers:
        layer.routing = None  # the graph of this step is the loss's from now on
    return total.to(device) if isinstance(total, Tensor) else torch.zeros((), device=device)


def anneal(model: nn.Module, progress: float, schedule: Schedule = INVERSE_TEMPERATURE) -> None:
    """Set the choice scale of the trees in a model by its schedule; call it every step.

    ValueError if progress, the share of the training that is done, is not in [0, 1], or there is no layer.
    """
    scale = schedule(probability("progress", progress))
    for layer in _layers(model):
        if "inverse_temperature" in layer.annealed_buffers:
            layer.anneal("inverse_temperature", scale)


def _layers(model: nn.Module) -> list[FeedforwardLayer]:
    if layers := list(feedforward_layers(model).values()):
        return layers
    raise ValueError(f"{type(model).__name__} has no layer of fffexp")
