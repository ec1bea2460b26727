"""Which feedforward layer: dense FF, noisy top-k MoE or FFF? Measured, with the layers to use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fffexp.convert import convert_feedforward
    from fffexp.data import IDX, Digits, FashionMNIST, Hub
    from fffexp.layers import FF, FFF, FeedforwardLayer, Forest, NoisyTopKMoE, SwitchMoE
    from fffexp.optim import RowAdamW
    from fffexp.regularization import harden, regularization_loss
    from fffexp.replace import replace_feedforward
    from fffexp.task import ClassificationTask

__all__ = [
    "FF",
    "FFF",
    "IDX",
    "ClassificationTask",
    "Digits",
    "FashionMNIST",
    "FeedforwardLayer",
    "Forest",
    "Hub",
    "NoisyTopKMoE",
    "RowAdamW",
    "SwitchMoE",
    "convert_feedforward",
    "harden",
    "regularization_loss",
    "replace_feedforward",
]

_HOMES = {
    "fffexp.convert": ("convert_feedforward",),
    "fffexp.data": ("Digits", "FashionMNIST", "Hub", "IDX"),
    "fffexp.layers": ("FF", "FFF", "FeedforwardLayer", "Forest", "NoisyTopKMoE", "SwitchMoE"),
    "fffexp.optim": ("RowAdamW",),
    "fffexp.regularization": ("harden", "regularization_loss"),
    "fffexp.replace": ("replace_feedforward",),
    "fffexp.task": ("ClassificationTask",),
}


def __getattr__(name: str) -> Any:
    # importing torch and lightning takes seconds, which --help and reports should not pay
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'fffexp' has no attribute {name!r}")
