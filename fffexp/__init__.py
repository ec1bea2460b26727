"""Which feedforward layer: dense FF, noisy top-k MoE or FFF? Measured, with the layers to use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fffexp.adapt.distil import convert_feedforward
    from fffexp.adapt.replace import replace_feedforward
    from fffexp.data import IDX, Digits, FashionMNIST, Hub
    from fffexp.layers import FF, FFF, FeedforwardLayer, Forest, NoisyTopKMoE, SwitchMoE, feedforward_layers
    from fffexp.models.mlp import LayerFactory
    from fffexp.training.classification import ClassificationTask
    from fffexp.training.losses import anneal, auxiliary_loss
    from fffexp.training.optim import LazyAdamW
    from fffexp.training.schedules import Adaptive, Constant, Exponential, Linear, Schedule, Step
    from fffexp.training.task import Task

__all__ = [
    "FF",
    "FFF",
    "IDX",
    "Adaptive",
    "ClassificationTask",
    "Constant",
    "Digits",
    "Exponential",
    "FashionMNIST",
    "FeedforwardLayer",
    "Forest",
    "Hub",
    "LayerFactory",
    "LazyAdamW",
    "Linear",
    "NoisyTopKMoE",
    "Schedule",
    "Step",
    "SwitchMoE",
    "Task",
    "anneal",
    "auxiliary_loss",
    "convert_feedforward",
    "feedforward_layers",
    "replace_feedforward",
]

_HOMES = {
    "fffexp.adapt.distil": ("convert_feedforward",),
    "fffexp.data": ("Digits", "FashionMNIST", "Hub", "IDX"),
    "fffexp.layers": ("FF", "FFF", "FeedforwardLayer", "Forest", "NoisyTopKMoE", "SwitchMoE", "feedforward_layers"),
    "fffexp.models.mlp": ("LayerFactory",),
    "fffexp.training.optim": ("LazyAdamW",),
    "fffexp.training.losses": ("anneal", "auxiliary_loss"),
    "fffexp.adapt.replace": ("replace_feedforward",),
    "fffexp.training.classification": ("ClassificationTask",),
    "fffexp.training.schedules": ("Adaptive", "Constant", "Exponential", "Linear", "Schedule", "Step"),
    "fffexp.training.task": ("Task",),
}


def __getattr__(name: str) -> Any:
    # importing torch and lightning takes seconds, which --help and reports should not pay
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("fffexp")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'fffexp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "__version__", *__all__]
