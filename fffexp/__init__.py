"""Which feedforward layer: dense FF, noisy top-k MoE or FFF? Measured, with the layers to use."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fffexp.adapt.distil import convert_feedforward
    from fffexp.adapt.replace import replace_feedforward
    from fffexp.data import IDX, Digits, FashionMNIST, Hub
    from fffexp.layers import (
        FF,
        FFF,
        PEER,
        ExpertChoiceMoE,
        FeedforwardLayer,
        Forest,
        NoisyTopKMoE,
        SigmoidMoE,
        SparseFF,
        SwitchMoE,
        feedforward_layers,
    )
    from fffexp.layers.base import LayerFactory
    from fffexp.training.classification import ClassificationTask
    from fffexp.training.losses import anneal, auxiliary_loss
    from fffexp.training.optim import LazyAdamW
    from fffexp.training.schedules import Adaptive, Constant, Exponential, Linear, Schedule, Step
    from fffexp.training.task import Task

__all__ = [
    "FF", "FFF", "IDX", "PEER", "Adaptive", "ClassificationTask", "Constant", "Digits", "ExpertChoiceMoE",
    "Exponential", "FashionMNIST", "FeedforwardLayer", "Forest", "Hub", "LayerFactory", "LazyAdamW", "Linear",
    "NoisyTopKMoE", "Schedule", "SigmoidMoE", "SparseFF", "Step", "SwitchMoE", "Task", "anneal", "auxiliary_loss",
    "convert_feedforward", "feedforward_layers", "replace_feedforward",
]  # fmt: skip

# imported when first asked for: torch and lightning take seconds, which --help and reports should not pay
_HOMES = {
    "adapt.distil": ("convert_feedforward",),
    "adapt.replace": ("replace_feedforward",),
    "data": ("Digits", "FashionMNIST", "Hub", "IDX"),
    "layers": (
        "FF", "FFF", "PEER", "ExpertChoiceMoE", "FeedforwardLayer", "Forest", "NoisyTopKMoE", "SigmoidMoE", "SparseFF",
        "SwitchMoE", "feedforward_layers",
    ),
    "layers.base": ("LayerFactory",),
    "training.classification": ("ClassificationTask",),
    "training.losses": ("anneal", "auxiliary_loss"),
    "training.optim": ("LazyAdamW",),
    "training.schedules": ("Adaptive", "Constant", "Exponential", "Linear", "Schedule", "Step"),
    "training.task": ("Task",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("fffexp")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"fffexp.{home}"), name)
    raise AttributeError(f"module 'fffexp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "__version__", *__all__]
